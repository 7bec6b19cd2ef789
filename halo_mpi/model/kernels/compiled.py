"""The products compiled for this machine, and how Numba code calls them.

products() -> Products       addresses of the functions; compiled once per process, or taken from the disk
call_product(address, ...)   one of them, from within a function that Numba compiles
multiply(addresses, ...)     any number of tokens, by the functions for 8, 4, 2 and 1 of them
"""

import platform
from dataclasses import dataclass, field
from functools import cache

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from halo_mpi.errors import HaloError
from halo_mpi.model.kernels.cache import kept
from halo_mpi.model.kernels.isa import BY_MACHINE, InstructionSet
from halo_mpi.model.kernels.products import PARAMETERS, TOKENS, function_name, module
from halo_mpi.model.kernels.tiles import CODE_BYTES

STRIP_BYTES = 16384  # of codes and scales that all tokens pass over before the next ones: what a first-level cache holds easily


class UnsupportedProcessorError(HaloError):
    """This processor lacks what the compiled products need."""


@dataclass(frozen=True, slots=True)
class Products:
    """int4, int8: int64 [4], addresses of the functions for 1, 2, 4 and 8 tokens. `_engine` owns their code."""

    isa: str
    int4: np.ndarray
    int8: np.ndarray
    _engine: object = field(repr=False)


@cache
def products() -> Products:
    isa = _instruction_set()
    if isa is None:
        raise UnsupportedProcessorError(
            f"no kernels for this processor ({platform.machine()}): it lacks AVX2 with FMA and F16C, or NEON"
        )
    engine = _loaded(object_code(isa, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()))
    addresses = {d: np.array([engine.get_function_address(function_name(d, n)) for n in TOKENS], np.int64) for d in CODE_BYTES}
    return Products(isa.name, addresses["int4"], addresses["int8"], engine)


def supported() -> str | None:
    """The name of the instruction set that `products` will use; None if this processor has none that fits."""
    isa = _instruction_set()
    return isa and isa.name


def _instruction_set() -> InstructionSet | None:
    features = llvm.get_host_cpu_features()
    fitting = (isa for isa in BY_MACHINE.get(platform.machine(), ()) if all(features.get(name) for name in isa.features))
    return next(fitting, None)


def object_code(isa: InstructionSet, processor: str, features: str) -> bytes:
    """All products for this machine, from the disk or compiled."""
    source = module(isa)
    version = ".".join(map(str, llvm.llvm_version_info))
    return kept((processor, features, version, source), lambda: target(None, processor, features).emit_object(parsed(source)))


def target(triple: str | None, processor: str, features: str) -> llvm.TargetMachine:
    """A compiler for a processor; triple None: of this machine's kind."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    chosen = llvm.Target.from_triple(triple or llvm.get_process_triple())
    return chosen.create_target_machine(cpu=processor, features=features, opt=3)


def parsed(source: str) -> llvm.ModuleRef:
    checked = llvm.parse_assembly(source)
    checked.verify()
    return checked


def _loaded(code: bytes) -> llvm.ExecutionEngine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), llvm.Target.from_default_triple().create_target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


@intrinsic
def call_product(typing, address, codes, scale, minimum, a, a_scale, a_sum, y, row_tiles, column_tiles, y_stride):
    """Call the function at an address of `Products` with these integers; see products.py."""

    def call(context, builder, signature, arguments):
        whole = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [whole] * len(PARAMETERS))
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * (1 + len(PARAMETERS))), call


@njit(nogil=True, cache=True)
def multiply(addresses, codes, scale, minimum, a, a_scale, a_sum, y, tokens, row_tiles, column_tiles, y_stride):
    """y [tokens, y_stride] = matrix [row_tiles, column_tiles] * activations [tokens, 32 * column_tiles]; see products.py.

    addresses: int64 [4], `Products.int4` or `.int8`. codes ... y: addresses too, of the first tile, token and so on.
    int8 has no minimum: 0.
    """
    code_bytes = 256 if minimum else 512
    tile_bytes = code_bytes + (64 if minimum else 32)
    step = row_tiles if tokens <= 8 else max(1, STRIP_BYTES // max(1, column_tiles * tile_bytes))
    for first in range(0, row_tiles, step):
        down, tile, t = min(step, row_tiles - first), first * column_tiles, 0
        for size in range(3, -1, -1):
            while tokens - t >= 1 << size:
                call_product(
                    addresses[size],
                    codes + tile * code_bytes,
                    scale + tile * 32,
                    minimum + tile * 32,
                    a + t * column_tiles * 32,
                    a_scale + t * column_tiles * 4,
                    a_sum + t * column_tiles * 4,
                    y + (t * y_stride + first * 16) * 4,
                    down,
                    column_tiles,
                    y_stride,
                )
                t += 1 << size
