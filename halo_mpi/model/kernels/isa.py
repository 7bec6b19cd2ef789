"""What each instruction set does with a tile: multiply its codes by the codes of some tokens, and sum up each row.

A register holds 4 columns of as many rows as it has 32-bit lanes; the 16 rows of a tile are therefore cut into 1 (AVX-512), 2 (AVX2)
or 4 (NEON) parts. The 32 columns are 8 groups of 4. A group of a token, 4 bytes, is repeated in every lane, so that a lane's
4 products belong to one row, and a tile's sums come out as one i32 by row, in the order of the rows.

    int4   byte [j, r, i]: the low nibbles are group 2j, the high nibbles group 2j+1, as unsigned bytes 0..15
    int8   byte [j, r, i]: group j, signed -128..127;         activations: signed -127..127

Sums are exact integers, whatever their order. Where the products are summed up in 16 bits, they must fit: 8 * 15 * 127 = 15240 do, and
twice as many; 2 * 128 * 127 = 32512 do, and no more.
"""

from collections.abc import Callable
from dataclasses import dataclass

from halo_mpi.model.kernels.ir import Code, constant

GROUPS = 8  # of 4 columns, in a tile
Sums = list[list[str]]  # [part][token]: registers of i32 by row


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """`int4` and `int8` write a tile's sums: (code, pointer to the first part's codes, pointers to each token's codes, parts)."""

    name: str
    lanes: int  # 32-bit lanes of a register
    features: tuple[str, ...]  # that the processor must have, in LLVM's names
    declarations: str
    int4: Callable[[Code, str, list[str], int], Sums]
    int8: Callable[[Code, str, list[str], int], Sums]
    int8_excess: int  # the int8 sums are of code + excess
    parts: dict[str, tuple[int, ...]]  # multiplied in one pass over the columns, by 1, 2, 4, 8 tokens


def _nibbles(code: Code, lanes: int, codes: str, offset: int) -> tuple[str, str]:
    """Two groups of a part."""
    kind = f"<{4 * lanes} x i8>"
    both = code.load("both", kind, codes, offset, 16)
    low = code.let("low", f"and {kind} {both}, {constant(4 * lanes, 'i8', 15)}")
    return low, code.let("high", f"lshr {kind} {both}, {constant(4 * lanes, 'i8', 4)}")


def _repeated(code: Code, lanes: int, activations: str, group: int) -> str:
    """A group of a token in every lane."""
    four = code.load("four", "i32", activations, 4 * group)
    return code.let("group", f"bitcast <{lanes} x i32> {code.splat('lanes', lanes, 'i32', four)} to <{4 * lanes} x i8>")


# AVX2: vpmaddubsw multiplies unsigned by signed bytes and adds up pairs in 16 bits, vpmaddwd by 1 adds up pairs of those in 32 bits.

AVX2_DECLARATIONS = """
declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
declare <32 x i8> @llvm.x86.avx2.psign.b(<32 x i8>, <32 x i8>)
declare <32 x i8> @llvm.abs.v32i8(<32 x i8>, i1)
"""


def _avx2_pairs(code: Code, unsigned: str, signed: str) -> str:
    return code.let("pairs", f"call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> {unsigned}, <32 x i8> {signed})")


def _avx2_fours(code: Code, pairs: str) -> str:
    return code.let("fours", f"call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> {pairs}, <16 x i16> {constant(16, 'i16', 1)})")


def _avx2_int4(code: Code, codes: str, tokens: list[str], parts: int) -> Sums:
    """All 8 groups fit into 16 bits."""
    sums = [["zeroinitializer"] * len(tokens) for _ in range(parts)]
    for j in range(GROUPS // 2):
        halves = [_nibbles(code, 8, codes, 64 * j + 32 * part) for part in range(parts)]
        for t, activations in enumerate(tokens):
            for half in range(2):
                group = _repeated(code, 8, activations, 2 * j + half)
                for part in range(parts):
                    pairs = _avx2_pairs(code, halves[part][half], group)
                    sums[part][t] = code.let("sums", f"add <16 x i16> {sums[part][t]}, {pairs}")
    return [[_avx2_fours(code, pairs) for pairs in part] for part in sums]


def _avx2_int8(code: Code, codes: str, tokens: list[str], parts: int) -> Sums:
    """The sign of each weight moves to its activation. Only one group fits into 16 bits."""
    sums = [["zeroinitializer"] * len(tokens) for _ in range(parts)]
    for j in range(GROUPS):
        signed = [code.load("signed", "<32 x i8>", codes, 64 * j + 32 * part, 16) for part in range(parts)]
        sizes = [code.let("size", f"call <32 x i8> @llvm.abs.v32i8(<32 x i8> {weights}, i1 0)") for weights in signed]
        for t, activations in enumerate(tokens):
            group = _repeated(code, 8, activations, j)
            for part in range(parts):
                turned = code.let("turned", f"call <32 x i8> @llvm.x86.avx2.psign.b(<32 x i8> {group}, <32 x i8> {signed[part]})")
                fours = _avx2_fours(code, _avx2_pairs(code, sizes[part], turned))
                sums[part][t] = code.let("sums", f"add <8 x i32> {sums[part][t]}, {fours}")
    return sums


AVX2 = InstructionSet(
    name="avx2",
    lanes=8,
    features=("avx2", "fma", "f16c"),
    declarations=AVX2_DECLARATIONS,
    int4=_avx2_int4,
    int8=_avx2_int8,
    int8_excess=0,
    parts={"int4": (2, 2, 1, 1), "int8": (2, 2, 1, 1)},
)

BY_MACHINE = {"x86_64": [AVX2], "aarch64": []}  # the best first
