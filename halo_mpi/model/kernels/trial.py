"""Which of torch's kernels is the quicker one here, for one token of a model: measured once and kept on disk."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.cache import kept
from halo_mpi.model.kernels.kernel import Kernel
from halo_mpi.model.kernels.reference import Reference
from halo_mpi.model.kernels.tiles import aligned_bytes
from halo_mpi.model.kernels.torch_kernel import TorchKernel
from halo_mpi.model.layer_weights import LayerWeights, runs_of
from halo_mpi.model.sizes import Shape

TIMES = 5
MOST_WEIGHTS = 8 * 2**20  # of a step: 32 MiB in f32
CHANGING = ("MHz", "bogomips", "BogoMIPS", "processor", "core id", "apicid")  # lines of /proc/cpuinfo that differ between cores


def quicker(config: ModelConfig, dtype: str, threads: int, down_dtype: str | None = None) -> str:
    """torch or reference. `dtype`, `down_dtype`: in which the layers' weights are stored."""
    kernel = TorchKernel(config, dtype, threads, down_dtype=down_dtype)
    key = ("kernel", processor(), torch.__version__, kernel.isa, str(threads), dtype, str(down_dtype), repr(config))

    def measured() -> bytes:
        return b"torch" if token_ms(kernel) <= token_ms(Reference(config, threads)) else b"reference"

    return kept(key, measured).decode()


def token_ms(kernel: Kernel) -> float:
    """What one token takes, from some heads, groups and rows of the vocabulary; the median of a few times."""
    sizes, config = kernel.sizes, kernel.sizes.config
    heads = range(min(config.heads, max(1, MOST_WEIGHTS // (4 * config.hidden * config.head_dim))))
    groups = range(min(config.groups, max(1, MOST_WEIGHTS // (3 * config.hidden * config.group_size))))
    rows = min(config.vocabulary, max(1, MOST_WEIGHTS // config.hidden))
    weights = LayerWeights(runs=runs_of(list(heads), config.heads_per_kv)[1])
    for name, shape in (sizes.attention(list(heads)) | sizes.ffn(list(groups))).items():
        setattr(weights, name, _made_up(kernel, shape))
    head = kernel.head(_made_up(kernel, Shape((rows, config.hidden), sizes.vocabulary_dtype)), rows)
    share, x = kernel.share([weights], 1), np.full((1, config.hidden), 0.5, np.float32)
    steps = (
        (config.layers * config.heads / len(heads), lambda: share.attention(0, x, 0)),
        (config.layers * config.groups / len(groups), lambda: share.ffn(0, x)),
        (config.vocabulary / rows, lambda: head.logits(x)),
    )
    return sum(times * _median_ms(step) for times, step in steps)


def _median_ms(step: Callable[[], object]) -> float:
    found = []
    for _ in range(TIMES):
        begin = time.perf_counter()
        step()
        found.append(time.perf_counter() - begin)
    return float(np.median(found)) * 1e3


def _made_up(kernel: Kernel, shape: Shape) -> object:
    memory = aligned_bytes(shape.nbytes)
    memory.view(np.float16).fill(0.01)
    return kernel.make(shape, memory)


def processor() -> str:
    """What Linux tells about the first processor, but for what differs between its cores."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in first if not any(word in line for word in CHANGING))
