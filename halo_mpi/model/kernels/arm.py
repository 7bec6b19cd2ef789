"""Tiles on 64-bit ARM: sdot, which multiplies and sums up groups of four (Raspberry Pi 5), and plain NEON (Raspberry Pi 4)."""

from halo_mpi.model.kernels.ir import Code
from halo_mpi.model.kernels.isa import InstructionSet, Sums, nibbles

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
    return [code.load("weights", "<16 x i8>", codes, 64 * j + 16 * part, 16) for j in range(4 * half, 4 * half + 4)]


SDOT_DECLARATIONS = "declare <4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32>, <16 x i8>, <16 x i8>)"


def _sdot(weights):
    def tile(code: Code, codes: str, tokens: list[str], parts: int) -> Sums:
        sums = [["zeroinitializer"] * len(tokens) for _ in range(parts)]
        for half in range(2):
            groups = [_groups(code, activations, half) for activations in tokens]
            for part in range(parts):
                for k, factor in enumerate(weights(code, codes, part, half)):
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


def _add_products(code: Code, sums: str, weights: str, group: str, half: range) -> str:
    """Sums in 16 bits of the bytes of two rows."""
    weights, group = (code.lanes_of("half", "<16 x i8>", value, list(half)) for value in (weights, group))
    products = code.let("products", f"call <8 x i16> @llvm.aarch64.neon.smull.v8i16(<8 x i8> {weights}, <8 x i8> {group})")
    return code.let("sums", f"add <8 x i16> {sums}, {products}")


def _pairs(code: Code, sums: str) -> str:
    return code.let("pairs", f"call <4 x i32> @llvm.aarch64.neon.saddlp.v4i32.v8i16(<8 x i16> {sums})")


def _rows(code: Code, low: str, high: str) -> str:
    """The sums of four rows from pairs of two rows and two rows."""
    return code.let("rows", f"call <4 x i32> @llvm.aarch64.neon.addp.v4i32(<4 x i32> {low}, <4 x i32> {high})")


def _neon_int4(code: Code, codes: str, tokens: list[str], parts: int) -> Sums:
    """All 8 groups fit into 16 bits."""
    sums = [[["zeroinitializer"] * 2 for _ in tokens] for _ in range(parts)]
    for half in range(2):
        weights = [_weights_int4(code, codes, part, half) for part in range(parts)]
        for t, activations in enumerate(tokens):
            for k, group in enumerate(_groups(code, activations, half)):
                for part in range(parts):
                    for side, lanes in enumerate((LOW, HIGH)):
                        sums[part][t][side] = _add_products(code, sums[part][t][side], weights[part][k], group, lanes)
    return [[_rows(code, *(_pairs(code, side) for side in sides)) for sides in part] for part in sums]


def _neon_int8(code: Code, codes: str, tokens: list[str], parts: int) -> Sums:
    """Two groups fit into 16 bits."""
    sums = [[["zeroinitializer"] * 2 for _ in tokens] for _ in range(parts)]
    for half in range(2):
        weights = [_weights_int8(code, codes, part, half) for part in range(parts)]
        for t, activations in enumerate(tokens):
            groups = _groups(code, activations, half)
            for k in (0, 2):
                for part in range(parts):
                    for side, lanes in enumerate((LOW, HIGH)):
                        first = _add_products(code, "zeroinitializer", weights[part][k], groups[k], lanes)
                        both = _add_products(code, first, weights[part][k + 1], groups[k + 1], lanes)
                        sums[part][t][side] = code.let("sums", f"add <4 x i32> {sums[part][t][side]}, {_pairs(code, both)}")
    return [[_rows(code, *sides) for sides in part] for part in sums]


NEON = InstructionSet(
    name="neon",
    lanes=LANES,
    features=("neon",),
    declarations=NEON_DECLARATIONS,
    int4=_neon_int4,
    int8=_neon_int8,
    int8_excess=0,
    parts={"int4": (4, 2, 2, 1), "int8": (4, 2, 2, 1)},
)
