"""Products of small quantized matrices, what they should be, and ways to run the machine code that computes them."""

import ctypes
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import llvmlite.binding as llvm
import numpy as np

from halo_mpi.model.kernels.compiled import loaded, parsed, target
from halo_mpi.model.kernels.isa import InstructionSet
from halo_mpi.model.kernels.processor import this_processor
from halo_mpi.model.kernels.products import PARAMETERS, function_name, module
from halo_mpi.model.kernels.tiles import Tiles, aligned_bytes, stored_tiles
from halo_mpi.store.encoding import BLOCK, TILE_ROWS, Blocks, encode

UNTOUCHED = np.float32(-77.5)  # stands in y before a product
LARGEST = {"int4": 15, "int8": -128}  # codes with the largest products


@dataclass
class Case:
    """A matrix and activations, random, or the largest that there are; f32 arrays as the functions take them."""

    dtype: str
    tokens: int
    down: int
    across: int
    seed: int = 0
    largest: int = 0  # the activations' code, where all codes are the largest

    def __post_init__(self):
        random, shape = np.random.default_rng(self.seed), (self.down * TILE_ROWS, self.across * BLOCK)
        low, high = (0, 16) if self.dtype == "int4" else (-128, 128)
        codes = random.integers(low, high, shape).astype(np.uint8 if self.dtype == "int4" else np.int8)
        scale, minimum = (random.normal(size=(shape[0], self.across)).astype(np.float16) for _ in range(2))
        self.a = random.integers(-127, 128, (self.tokens, shape[1])).astype(np.int8)
        if self.largest:
            codes[:], self.a[:] = LARGEST[self.dtype], self.largest
        self.blocks = Blocks(codes, scale, minimum if self.dtype == "int4" else None)
        data = np.frombuffer(encode(self.blocks, self.dtype), np.uint8)
        memory = aligned_bytes(data.size)
        memory[:] = data
        self.tiles: Tiles = stored_tiles(memory, *shape, self.dtype)
        self.a_scale = random.random((self.tokens, self.across), np.float32)
        self.a_sum = self.a_scale * self.a.reshape(self.tokens, self.across, BLOCK).sum(-1).astype(np.float32)
        self.y = np.full((self.tokens, shape[0] + 5), UNTOUCHED)

    @cached_property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights and activations in f64."""
        scale, codes = self.blocks.scale.astype(float), self.blocks.codes.astype(float)
        weights = codes.reshape(*scale.shape, BLOCK) * scale[..., None]
        if self.blocks.minimum is not None:
            weights += self.blocks.minimum.astype(float)[..., None]
        a = self.a.reshape(self.tokens, self.across, BLOCK) * self.a_scale[..., None].astype(float)
        return weights.reshape(codes.shape), a.reshape(self.a.shape)

    def check(self, y: np.ndarray, first: int = 0) -> None:
        """That y f32 [tokens, columns] is right from the row tile `first` on, and untouched behind the last row.

        f32 sums lose some units in the last place of the largest number on the way: that of the largest weights.
        """
        weights, a = self.factors
        rows, whole = weights.shape[0] - first * TILE_ROWS, self.blocks
        largest = abs(LARGEST[self.dtype]) * np.abs(whole.scale.astype(float)).repeat(BLOCK, 1)
        if whole.minimum is not None:
            largest += np.abs(whole.minimum.astype(float)).repeat(BLOCK, 1)
        error = np.abs(y[:, :rows] - a @ weights.T[:, first * TILE_ROWS :])
        assert (error <= 3e-7 * (np.abs(a) @ largest.T[:, first * TILE_ROWS :])).all()
        assert (y[:, rows:] == UNTOUCHED).all()

    def arrays(self) -> list[np.ndarray]:
        planes = self.tiles.planes + ([] if self.dtype == "int4" else [np.zeros(1, np.float16)])
        return [*planes, self.a, self.a_scale, self.a_sum]

    def token(self, t: int) -> "Case":
        """The case of a single token."""
        one, alone = copy(self), slice(t, t + 1)
        one.tokens, one.y = 1, self.y[alone]
        one.a, one.a_scale, one.a_sum = self.a[alone], self.a_scale[alone], self.a_sum[alone]
        return one


class Native:
    """An instruction set's functions on this machine: called with a case, they return y."""

    def __init__(self, source: str):
        machine = target(llvm.get_process_triple(), this_processor().name, this_processor().features)
        self._engine = loaded(machine.emit_object(parsed(source)))

    def __call__(self, case: Case, first: int = 0) -> np.ndarray:
        """y of the row tiles from `first` on."""
        address = self._engine.get_function_address(function_name(case.dtype, case.tokens))
        function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(PARAMETERS))(address)
        arrays, y = case.arrays(), case.y.copy()
        y[:, -5 - first * TILE_ROWS :] = UNTOUCHED
        arrays[:3] = (plane[first:] for plane in arrays[:3])
        function(*(array.ctypes.data for array in (*arrays, y)), case.down - first, case.across, y.shape[1])
        return y


class Emulated:
    """The same on an emulated 64-bit ARM processor: `model` is Unicorn's."""

    CODE, STACK, DATA, PAGE = 0x10000, 0x200000, 0x1000000, 0x1000

    def __init__(self, isa: InstructionSet, processor: str, model: str):
        declarations, *functions = module(isa).split("define ")
        self.model, machine = model, target("aarch64-linux-gnu", processor, "")
        self._code = {}
        for function in functions:
            name = function[function.index("@") + 1 : function.index("(")]
            compiled = llvm.ObjectFileRef.from_data(machine.emit_object(parsed(f"{declarations}define {function}")))
            sections = {section.name(): section.data() for section in compiled.sections()}
            assert b".rela.text" not in sections  # nothing to be filled in: the bytes run wherever they lie
            self._code[name] = sections[b".text"]

    def __call__(self, case: Case) -> np.ndarray:
        import unicorn
        from unicorn import arm64_const as arm64

        machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        machine.ctl_set_cpu_model(getattr(arm64, f"UC_CPU_ARM64_{self.model}"))
        code, end = self._code[function_name(case.dtype, case.tokens)], self.CODE + 0x10000
        machine.mem_map(self.CODE, 0x20000)
        machine.mem_write(self.CODE, code)
        machine.mem_map(self.STACK, 0x10000)
        arguments, place = [], self.DATA
        for array in (*case.arrays(), case.y):
            machine.mem_map(place, -(-array.nbytes // self.PAGE) * self.PAGE)
            machine.mem_write(place, array.tobytes())
            arguments.append(place)
            place += (array.nbytes // self.PAGE + 2) * self.PAGE  # an unmapped page follows
        y = arguments[-1]
        arguments += [case.down, case.across, case.y.shape[1]]
        machine.reg_write(arm64.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point allowed
        for number in range(8):
            machine.reg_write(arm64.UC_ARM64_REG_X0 + number, arguments[number])
        stack = self.STACK + 0x8000
        machine.mem_write(stack, np.array(arguments[8:], np.int64).tobytes())
        machine.reg_write(arm64.UC_ARM64_REG_SP, stack)
        machine.reg_write(arm64.UC_ARM64_REG_LR, end)
        machine.emu_start(self.CODE, end)
        return np.frombuffer(bytes(machine.mem_read(y, case.y.nbytes)), np.float32).reshape(case.y.shape)
