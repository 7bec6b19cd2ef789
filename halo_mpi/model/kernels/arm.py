"""Tiles on 64-bit ARM: sdot, which multiplies and sums up groups of four (Raspberry Pi 5), and plain NEON (Raspberry Pi 4)."""

from collections.abc import Callable

from halo_mpi.model.kernels.ir import Code
from halo_mpi.model.kernels.isa import GROUPS, InstructionSet, Sums, nibbles

LANES = 4
LOW, HIGH = range(8), range(8, 16)  # bytes of a register; each half holds two rows


def _groups(code: Code, activations: str, half: int) -> list[str]:
    """Four groups of a token, each in every lane: copies of one lane, which sdot makes by itself."""
    four = code.load("four", "<4 x i32>", activations, 16 * half)
    copies = [code.lanes_of("lanes", "<4 x i32>", four, [lane] * LANES) for lane in range(4)]
    return [code.let("group", f"bitcast <4 x i32> {copy} to <16 x i8>") for copy in copies]


def _weights_int4(code: Code, codes: str, part: int, half: int) -> list[str]:
    """Four groups of a part, bytes 0..15."""
    return [group for j in (2 * half, 2 * half + 1) for group in nibbles(code, LANES, codes, 64 * j + 16 * part)]


def _weights_int8(code: Code, codes: str, part: int, half: int) -> list[str]:
    """Four groups of a part, signed bytes."""
    return [code.load("weights", "<16 x i8>", codes, 64 * j + 16 * part, 16) for j in range(4 * half, 4 * half + 4)]


SDOT_DECLARATIONS = "declare <4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32>, <16 x i8>, <16 x i8>)"


def _sdot(weights_of: Callable) -> Callable:
    """Half a tile at a time, so that half of the activations need registers."""

    def tile(code: Code, codes: str, tokens: list[str], parts: int) -> Sums:
        sums = [["zeroinitializer"] * len(tokens) for _ in range(parts)]
        for half in range(2):
            groups = [_groups(code, activations, half) for activations in tokens]
            for part in range(parts):
                for k, factor in enumerate(weights_of(code, codes, part, half)):
                    for t in range(len(tokens)):
                        operands = f"<4 x i32> {sums[part][t]}, <16 x i8> {factor}, <16 x i8> {groups[t][k]}"
                        sums[part][t] = code.let("sums", f"call <4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8({operands})")
        return sums

    return tile


NEON_DOTPROD = InstructionSet(
    name="neon-dotprod",
    lanes=LANES,
    features=("neon", "dotprod"),
    declarations=SDOT_DECLARATIONS,
    int4=_sdot(_weights_int4),
    int8=_sdot(_weights_int8),
    int8_excess=0,
    parts={"int4": (4, 4, 2, 1), "int8": (4, 4, 2, 1)},
)


# Plain NEON: smull and smlal multiply 8 bytes each, half a register, to 16 bits; saddlp and sadalp add up pairs of those in 32 bits.

NEON_DECLARATIONS = """
declare <8 x i16> @llvm.aarch64.neon.smull.v8i16(<8 x i8>, <8 x i8>)
declare <4 x i32> @llvm.aarch64.neon.saddlp.v4i32.v8i16(<8 x i16>)
declare <4 x i32> @llvm.aarch64.neon.addp.v4i32(<4 x i32>, <4 x i32>)
"""


def _add_products(code: Code, sums: str, weights: str, group: str, rows: range) -> str:
    """Add up in 16 bits: pairs of lanes of two rows."""
    weights, group = (code.lanes_of("half", "<16 x i8>", value, list(rows)) for value in (weights, group))
    products = code.let("products", f"call <8 x i16> @llvm.aarch64.neon.smull.v8i16(<8 x i8> {weights}, <8 x i8> {group})")
    return code.let("sums", f"add <8 x i16> {sums}, {products}")


def _pairs(code: Code, sums: str) -> str:
    return code.let("pairs", f"call <4 x i32> @llvm.aarch64.neon.saddlp.v4i32.v8i16(<8 x i16> {sums})")


def _two_rows_int4(code: Code, weights: list[str], groups: list[str], rows: range) -> str:
    """All 8 groups fit into 16 bits."""
    sums = "zeroinitializer"
    for factor, group in zip(weights, groups):
        sums = _add_products(code, sums, factor, group, rows)
    return _pairs(code, sums)


def _two_rows_int8(code: Code, weights: list[str], groups: list[str], rows: range) -> str:
    """Two groups fit into 16 bits."""
    sums = "zeroinitializer"
    for k in range(0, GROUPS, 2):
        first = _add_products(code, "zeroinitializer", weights[k], groups[k], rows)
        both = _add_products(code, first, weights[k + 1], groups[k + 1], rows)
        sums = code.let("sums", f"add <4 x i32> {sums}, {_pairs(code, both)}")
    return sums


def _plain(weights_of: Callable, two_rows: Callable) -> Callable:
    """Token by token, so that only the weights and one token's sums need registers."""

    def tile(code: Code, codes: str, tokens: list[str], parts: int) -> Sums:
        weights = [weights_of(code, codes, part, 0) + weights_of(code, codes, part, 1) for part in range(parts)]
        sums = [[] for _ in range(parts)]
        for activations in tokens:
            groups = _groups(code, activations, 0) + _groups(code, activations, 1)
            for part in range(parts):
                low, high = (two_rows(code, weights[part], groups, rows) for rows in (LOW, HIGH))
                four = code.let("four", f"call <4 x i32> @llvm.aarch64.neon.addp.v4i32(<4 x i32> {low}, <4 x i32> {high})")
                sums[part].append(four)
        return sums

    return tile


NEON = InstructionSet(
    name="neon",
    lanes=LANES,
    features=("neon",),
    declarations=NEON_DECLARATIONS,
    int4=_plain(_weights_int4, _two_rows_int4),
    int8=_plain(_weights_int8, _two_rows_int8),
    int8_excess=0,
    parts={"int4": (4, 2, 1, 1), "int8": (4, 2, 1, 1)},
)
