"""A file that describes devices, to plan for them where they are not.

    {"devices": [{"name": "pi5", "speed": 8.0, "memory": "6G"},
                 {"name": "pi4", "count": 3, "speed": 3.0, "memory": "3G", "link_ms": 0.4, "mbit": 100, "loss": 0.02}],
     "sync_ms": 0.3, "further_ms": 0.05}

The first device is the root. `speed`: GB/s at which it multiplies a matrix by a vector; or `attention_ms` and `ffn_ms`, and the other
names of a Device, as `halo-mpi plan --json` prints them. `read_gbps`: with it a share may be larger than the memory; what does not fit is
read at every token, so many GB/s of f32 weights, decoded. `sync_ms`: what a sync takes beside its longest share; `further_ms`: what each
worker but the first adds. `mbit`: a message's own time is added to `link_ms`; the root's, which sends twice, to `further_ms`; and it
tells `kb_ms`, what each KB of a long answer takes, without which the head is not split. `loss`: of packets, per direction, in place of
`late_rate` and `late_ms`.
"""

import json
import math
from dataclasses import fields
from pathlib import Path

from halo_mpi.errors import InputError
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.sizes import Sizes, shape_bytes
from halo_mpi.schedule.cost import Cluster, Device
from halo_mpi.schedule.memory import parse_size
from halo_mpi.wire.messages import HEADER, vector_bytes
from halo_mpi.wire.sockets import COPIES

REPAIR_MS = 10.0  # a message that was lost with its copy: about TCP's shortest timeout where sockets are tuned
PACKET_BYTES = 1448
AT_FIRST = COPIES["auto"][0]  # copies of each message
KNOWN = {field.name for field in fields(Device)} | {"count", "speed", "mbit", "loss"}
PRINTED = {"model", "head", "chosen", "unstable", "options", "losses", "may_lose", "simulated"}  # beside the devices in `plan --json`
EITHER = (("speed", "attention_ms"), ("speed", "ffn_ms"), ("loss", "late_rate"), ("loss", "late_ms"), ("mbit", "kb_ms"))
MOST_DEVICES = 4096
MOST = 1e9  # of any number here


def read_devices(path: Path, sizes: Sizes, context: int) -> Cluster:
    """The cluster that a file describes; `context`: tokens, of which half are in the cache at a usual token.

    Raises InputError that names what is wrong.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON file ({' '.join(str(error).split())[:80]})") from error
    return described(content, str(path), sizes, context)


def described(content: object, source: str, sizes: Sizes, context: int) -> Cluster:
    """The cluster that the content of such a file describes; `source`: what an InputError calls it."""
    config = sizes.config
    entries = content.get("devices") if isinstance(content, dict) else None
    if (
        not isinstance(entries, list)
        or not entries
        or set(content) - {"devices", "sync_ms", "further_ms", "head_ms", "kb_ms"} - PRINTED
    ):
        raise InputError(
            f'{source} must be {{"devices": [{{...}}, ...]}}, and may have "sync_ms", "further_ms", "head_ms" and "kb_ms"'
        )
    if content.get("model", config.name) != config.name:
        raise InputError(f"{source} has the times of {content['model']}, not of {config.name}; plan for that, or give speeds")
    devices: list[Device] = []
    for number, entry in enumerate(entries):
        where = f"{source}, device {number}"
        count = _checked(entry, where)
        if len(devices) + count > MOST_DEVICES:
            raise InputError(f"{source}: more than {MOST_DEVICES} devices")
        devices += [_device(entry, sizes, context, where)] * count
    vocabulary_ms = devices[0].ffn_ms * sizes.table().nbytes / _layer_bytes(sizes, context)[1]
    mbit = _number(entries[0], "mbit", f"{source}, device 0")
    further_ms = _number(content, "further_ms", source) + AT_FIRST * message_ms(mbit, config)
    kb_ms = devices[0].kb_ms if content.get("kb_ms") is None else _number(content, "kb_ms", source)
    head_ms = _number(content, "head_ms", source, vocabulary_ms)
    return Cluster(devices, _number(content, "sync_ms", source), further_ms, head_ms, kb_ms)


def _checked(entry: object, where: str) -> int:
    """How many devices of this kind."""
    if not isinstance(entry, dict) or set(entry) - KNOWN:
        unknown = sorted(set(entry) - KNOWN) if isinstance(entry, dict) else entry
        raise InputError(f"{where}: {unknown} is unknown; there are {', '.join(sorted(KNOWN))}")
    for one, other in EITHER:
        if one in entry and other in entry:
            raise InputError(f"{where}: give either {one} or {other}")
    count = entry.get("count", 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_DEVICES:
        raise InputError(f"{where}: count {str(count)[:20]} is not a number from 1 to {MOST_DEVICES}")
    return count


def _device(entry: dict, sizes: Sizes, context: int, where: str) -> Device:
    config = sizes.config
    known = {name: _number(entry, name, where) for name in ("fixed_ms", "link_ms", "late_ms")}
    known["late_rate"] = _number(entry, "late_rate", where, most=1)
    if "speed" in entry:
        speed = _number(entry, "speed", where, least=1e-6)
        whole = {name: size / speed / 1e6 for name, size in zip(("attention_ms", "ffn_ms"), _layer_bytes(sizes, context))}
    elif {"attention_ms", "ffn_ms"} <= set(entry):
        whole = {name: _number(entry, name, where, least=1e-6) for name in ("attention_ms", "ffn_ms")}
    else:
        raise InputError(f"{where} needs a speed, or attention_ms and ffn_ms")
    known["link_ms"] += 2 * message_ms(_number(entry, "mbit", where), config)
    if "loss" in entry:
        known |= {"late_rate": late_rate(_number(entry, "loss", where, most=1), config), "late_ms": REPAIR_MS}
    memory = None if entry.get("memory") is None else parse_size(str(entry["memory"])[:20])
    if entry.get("memory") is not None and memory is None:
        raise InputError(f"{where}: memory {str(entry['memory'])[:20]!r} is not a size; write for example 800M or 1.5G")
    known["read_gbps"] = None if entry.get("read_gbps") is None else _number(entry, "read_gbps", where, least=1e-6)
    known["kb_ms"] = _kb_ms(entry, where)
    for name in ("disk_heads", "disk_groups"):
        known[name] = None if entry.get(name) is None else int(_number(entry, name, where))
    return Device(str(entry.get("name", "device")), **whole, **known, memory=memory)


def _layer_bytes(sizes: Sizes, context: int) -> tuple[int, int]:
    """Bytes that one layer's attention (with half a context of K and V) and FFN read."""
    config = sizes.config
    heads = list(range(config.heads))
    attention = shape_bytes(sizes.attention(heads)) + sizes.cache_bytes([heads], context) // 2
    return attention, shape_bytes(sizes.ffn(list(range(config.groups))))


def late_rate(loss: float, config: ModelConfig) -> float:
    """How often a request or its answer, each sent twice in f16, loses a packet of both copies."""
    packets = math.ceil(_message_bytes(config) / PACKET_BYTES)
    copy_lost = 1 - (1 - loss) ** packets
    return 1 - (1 - copy_lost**AT_FIRST) ** 2


def _message_bytes(config: ModelConfig) -> int:
    """A request of one token, or its answer, in f16."""
    return HEADER.itemsize + vector_bytes(config.hidden, "f16")


def message_ms(mbit: float, config: ModelConfig) -> float:
    """What such a message takes on a line of so many Mbit/s; nothing if that is 0, which stands for unknown."""
    return 8 * _message_bytes(config) / (mbit * 1e3) if mbit else 0.0


def _kb_ms(entry: dict, where: str) -> float | None:
    if mbit := _number(entry, "mbit", where):
        return 8 / mbit
    return None if entry.get("kb_ms") is None else _number(entry, "kb_ms", where)


def _number(entry: dict, name: str, where: str, default: float = 0.0, least: float = 0.0, most: float = MOST) -> float:
    value = entry.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:  # nan is not
        raise InputError(f"{where}: {name} {str(value)[:20]!r} is not a number from {least:g} to {most:g}")
    return float(value)
