"""Clock speed, heat, throttling and power supply, as Linux and a Raspberry Pi's firmware tell them.

`root` is where the files of the machine begin: `/`, or a folder that looks like it.
"""

import subprocess
import time
from pathlib import Path

from halo_mpi.health.finding import OK, WARNING, Finding

BUSY_S = 0.2  # of computing, after which a governor should have raised the clock
SLOW = 0.75  # of the highest clock; with all cores busy some processors take a little less by design
HOT_C = 80  # a Pi throttles from here on
SLOW_GOVERNORS = ("powersave", "conservative", "userspace")
GOVERNOR = "run `echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor`"
COOL = "give the board a heat sink and a fan, and air around it"
SUPPLY = "use the board's own power supply and a short cable (a Pi 5 wants 5 V and 5 A), and no other devices on its USB ports"
UNDER_VOLTAGE, CAPPED, THROTTLED, SOFT_LIMIT = 1, 2, 4, 8  # bits of get_throttled; 16 bits further: since the board started
SINCE_START = 16


def cooling(root: Path) -> list[Finding]:
    """Findings about clock, temperature and, of boards that tell, power."""
    bits = _firmware(root)
    power = _power(root, bits)
    return [_clock(root), _temperature(root, bits), *([power] if power else [])]


def _clock(root: Path) -> Finding:
    until = time.perf_counter() + BUSY_S
    while time.perf_counter() < until:
        pass
    cores = []
    for folder in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq")):
        current, allowed, most = (_number(folder / name) for name in ("scaling_cur_freq", "scaling_max_freq", "cpuinfo_max_freq"))
        if current and most:
            cores.append((current / most, current, allowed or most, most, _text(folder / "scaling_governor")))
    if not cores:
        return Finding("clock", OK, "not told by this kernel (no cpufreq)")
    part, current, allowed, most, governor = max(cores, key=lambda core: core[0])
    if allowed < most:
        says = f"limited to {_mhz(allowed)} of {_mhz(most)} MHz (scaling_max_freq)"
        return Finding("clock", WARNING, says, "lift the limit, or find out who set it: heat, a power saver, or config.txt")
    if part >= SLOW:
        return Finding("clock", OK, f"{_mhz(most)} MHz" if part > 0.99 else f"most of {_mhz(most)} MHz")
    says = f"{_mhz(current)} of {_mhz(most)} MHz while computing (governor {governor or 'unknown'})"
    return Finding("clock", WARNING, says, GOVERNOR if governor in SLOW_GOVERNORS else f"look for heat and power: {COOL}")


def _temperature(root: Path, bits: int | None) -> Finding:
    zones = [_number(file) for file in (root / "sys/class/thermal").glob("thermal_zone*/temp")]
    hottest = max((zone / 1000 for zone in zones if zone is not None), default=None)
    degrees = "" if hottest is None else f"{hottest:.0f} °C"
    for shift, when in ((0, "now"), (SINCE_START, "at times since it started")):
        told = (bits or 0) >> shift
        what = "throttled" if told & THROTTLED else "its clock is capped" if told & (CAPPED | SOFT_LIMIT) else ""
        if what:
            return Finding("cooling", WARNING, f"{what} {when}{f', {degrees}' if degrees else ''}", COOL)
    if (state := _slowed(root)) is not None:
        return Finding(
            "cooling", WARNING, f"Linux slows its processor down for heat ({state}{f', {degrees}' if degrees else ''})", COOL
        )
    if hottest is not None and hottest >= HOT_C:
        return Finding("cooling", WARNING, f"{degrees}, at which boards throttle", COOL)
    if hottest is None and bits is None:
        return Finding("cooling", OK, "not told by this machine")
    return Finding(
        "cooling", OK, "not throttled" if hottest is None else f"below {int(hottest) // 10 * 10 + 10} °C, not throttled"
    )


def _slowed(root: Path) -> str | None:
    """How far the kernel's cooling slows the processor down, if it does."""
    for folder in sorted((root / "sys/class/thermal").glob("cooling_device*")):
        kind, state, most = _text(folder / "type"), _number(folder / "cur_state"), _number(folder / "max_state")
        if state and kind and ("cpufreq" in kind or kind == "Processor"):
            return f"step {state} of {most}"
    return None


def _power(root: Path, bits: int | None) -> Finding | None:
    sensors = [
        file for file in (root / "sys/class/hwmon").glob("hwmon*/in0_lcrit_alarm") if _text(file.parent / "name") == "rpi_volt"
    ]
    if (bits or 0) & UNDER_VOLTAGE or any(_number(file) for file in sensors):
        return Finding("power", WARNING, "under-voltage now: the board slows itself down, and may restart", SUPPLY)
    if (bits or 0) >> SINCE_START & UNDER_VOLTAGE:
        return Finding("power", WARNING, "under-voltage at times since it started", SUPPLY)
    if bits is None and not sensors:
        return None
    return Finding("power", OK, "no under-voltage since it started" if bits is not None else "no under-voltage")


def _firmware(root: Path) -> int | None:
    """The bits of a Raspberry Pi's get_throttled; None elsewhere."""
    text = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    program = root / "usr/bin/vcgencmd"
    if text is None and program.exists():
        try:
            text = subprocess.run([program, "get_throttled"], capture_output=True, text=True, timeout=5).stdout
        except (OSError, subprocess.TimeoutExpired):
            return None
    try:
        return int((text or "").strip().rpartition("=")[2], 16)
    except ValueError:
        return None


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _number(file: Path) -> int | None:
    try:
        return int(_text(file) or "")
    except ValueError:
        return None


def _mhz(khz: int) -> str:
    return f"{khz / 1000:.0f}"
