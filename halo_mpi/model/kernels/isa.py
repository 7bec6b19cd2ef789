"""What each instruction set does with a tile: multiply its codes by the codes of some tokens, and sum up each row.

A vector register holds 4 columns of as many rows as it has 32-bit lanes; the 16 rows of a tile are therefore cut into 1 (AVX-512), 2 (AVX2)
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


def nibbles(code: Code, lanes: int, codes: str, offset: int) -> tuple[str, str]:
    """Two groups of a part."""
    kind = f"<{4 * lanes} x i8>"
    both = code.load("both", kind, codes, offset, 16)
    low = code.let("low", f"and {kind} {both}, {constant(4 * lanes, 'i8', 15)}")
    return low, code.let("high", f"lshr {kind} {both}, {constant(4 * lanes, 'i8', 4)}")


def repeated(code: Code, lanes: int, activations: str, group: int) -> str:
    """A group of a token in every lane."""
    four = code.load("four", "i32", activations, 4 * group)
    return code.let("group", f"bitcast <{lanes} x i32> {code.splat('lanes', lanes, 'i32', four)} to <{4 * lanes} x i8>")
