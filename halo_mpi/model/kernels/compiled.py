"""The products compiled for this machine, and how Numba code calls them.

products() -> Products       addresses of the functions; compiled once per process, or taken from the disk
call_product(address, ...)   one of them, from within a function that Numba compiles
multiply(addresses, ...)     any number of tokens, by the functions for 8, 4, 2 and 1 of them
"""

from dataclasses import dataclass, field
from functools import cache

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from halo_mpi.errors import HaloError
from halo_mpi.model.kernels.cache import kept
from halo_mpi.model.kernels.isa import InstructionSet
from halo_mpi.model.kernels.processor import Processor, this_processor
from halo_mpi.model.kernels.products import PARAMETERS, TOKENS, function_name, module
from halo_mpi.model.kernels.tiles import CODE_BYTES
from halo_mpi.store.encoding import BLOCK, TILE_ROWS

INT4_BYTES, INT8_BYTES = CODE_BYTES["int4"], CODE_BYTES["int8"]
SCALE_BYTES = 2 * TILE_ROWS  # of a tile, as Numba wants its constants: plain numbers
STRIP_BYTES = 65536  # of codes and scales that all tokens pass over before the next ones: stays in any second-level cache


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
    processor = this_processor()
    if not processor.isas:
        raise UnsupportedProcessorError(
            f"no kernels for this processor ({processor.name}): it lacks AVX2 with FMA and F16C, or NEON"
        )
    isa = processor.isas[0]
    engine = loaded(object_code(isa, processor))
    addresses = {dtype: _addresses(engine, dtype) for dtype in CODE_BYTES}
    return Products(isa.name, addresses["int4"], addresses["int8"], engine)


def supported() -> str | None:
    """The name of the instruction set that `products` will use; None if this processor has none that fits."""
    isas = this_processor().isas
    return isas[0].name if isas else None


def _addresses(engine: llvm.ExecutionEngine, dtype: str) -> np.ndarray:
    return np.array([engine.get_function_address(function_name(dtype, tokens)) for tokens in TOKENS], np.int64)


def object_code(isa: InstructionSet, processor: Processor) -> bytes:
    """All products for a processor of this machine's kind, from the disk or compiled."""
    source = module(isa)
    version = ".".join(map(str, llvm.llvm_version_info))

    def compiled() -> bytes:
        return target(llvm.get_process_triple(), processor.name, processor.features).emit_object(parsed(source))

    return kept((processor.name, processor.features, version, source), compiled)


def target(triple: str, processor: str, features: str) -> llvm.TargetMachine:
    """A compiler for a processor, in LLVM's words."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(triple).create_target_machine(cpu=processor, features=features, opt=3)


def parsed(source: str) -> llvm.ModuleRef:
    checked = llvm.parse_assembly(source)
    checked.verify()
    return checked


def loaded(code: bytes) -> llvm.ExecutionEngine:
    """Object code made executable; the engine owns it and knows the addresses."""
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
    code_bytes = INT4_BYTES if minimum else INT8_BYTES
    tile_bytes = code_bytes + (2 * SCALE_BYTES if minimum else SCALE_BYTES)
    step = max(1, STRIP_BYTES // max(1, column_tiles * tile_bytes))
    for first in range(0, row_tiles, step):
        down, tile, t = min(step, row_tiles - first), first * column_tiles, 0
        for size in range(3, -1, -1):
            while tokens - t >= 1 << size:
                call_product(
                    addresses[size],
                    codes + tile * code_bytes,
                    scale + tile * SCALE_BYTES,
                    minimum + tile * SCALE_BYTES,
                    a + t * column_tiles * BLOCK,
                    a_scale + t * column_tiles * 4,
                    a_sum + t * column_tiles * 4,
                    y + (t * y_stride + first * TILE_ROWS) * 4,
                    down,
                    column_tiles,
                    y_stride,
                )
                t += 1 << size
