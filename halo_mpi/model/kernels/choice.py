"""Which kernel a rank uses."""

from halo_mpi.errors import UsageError
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.kernel import Kernel
from halo_mpi.model.sizes import Sizes

KERNELS = ("auto", "llvm", "torch", "reference")
TILED = ("int4", "int8")  # storage that compiled kernels read
# What a rank takes beside weights and cache, by kernel: rss_bytes - weights_bytes in reports.
PROGRAM_BYTES = {
    "reference": 380 * 2**20,  # interpreter, torch and MPI: 311 to 373 MiB, the most where weights are read from blocks
    "llvm": 270 * 2**20,  # interpreter, LLVM and MPI: 188 to 220 MiB, 265 where it compiles
}


def make_kernel(
    name: str, config: ModelConfig, dtype: str, threads: int, cache: str = "auto", down_dtype: str | None = None
) -> Kernel:
    """`name`: of KERNELS; `dtype`, `down_dtype`: in which the model's weights are stored; `cache`: auto, f32 or f16, of K and V.

    auto: of weights in tiles llvm, if this processor has the instructions, else torch or the reference, whichever is quicker here; of
    others the reference, since torch would take digits from them. Raises UsageError if it cannot be the one wanted.
    """
    reason = f"the model's weights are {dtype}, not {' or '.join(TILED)}" if dtype not in TILED else _lacking()
    if name == "llvm" and reason:
        raise UsageError(f"--kernel llvm cannot be used: {reason}; use --kernel auto")
    if name == "auto":
        name = "llvm" if not reason else _quicker(config, dtype, threads, down_dtype) if dtype in TILED else "reference"
    if name == "reference":
        from halo_mpi.model.kernels.reference import Reference

        return Reference(config, threads, "f32" if cache == "auto" else cache)
    compact = "f16" if cache == "auto" else cache
    if name == "torch":
        from halo_mpi.model.kernels.torch_kernel import TorchKernel

        return TorchKernel(config, dtype, threads, compact, down_dtype)
    from halo_mpi.model.kernels.llvm import Compiled

    return Compiled(config, dtype, threads, compact, down_dtype)


def sizes_of(config: ModelConfig, dtype: str, down_dtype: str | None = None) -> Sizes:
    """What `auto` takes for a model stored in `dtype`, on a processor that has the instructions."""
    return Sizes(config, dtype, "int8", "f16", down_dtype) if dtype in TILED else Sizes(config)


def _quicker(config: ModelConfig, dtype: str, threads: int, down_dtype: str | None) -> str:
    from halo_mpi.model.kernels.trial import quicker

    return quicker(config, dtype, threads, down_dtype)


def _lacking() -> str | None:
    """Why the compiled kernels do not work here."""
    try:
        from halo_mpi.model.kernels.compiled import supported
    except ImportError as error:
        return f"{error.name} is not installed here"
    return None if supported() else "this processor has neither AVX2 nor NEON"
