"""Tiles on x86-64: AVX2, which multiplies bytes in pairs, and AVX-512 VNNI, which multiplies and sums up groups of four."""

from halo_mpi.model.kernels.ir import Code, constant
from halo_mpi.model.kernels.isa import GROUPS, InstructionSet, Sums, nibbles, repeated


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
        halves = [nibbles(code, 8, codes, 64 * j + 32 * part) for part in range(parts)]
        for t, activations in enumerate(tokens):
            for half in range(2):
                group = repeated(code, 8, activations, 2 * j + half)
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
            group = repeated(code, 8, activations, j)
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
    parts={"int4": (2, 2, 1, 1), "int8": (2, 2, 2, 1)},
)


VNNI_DECLARATIONS = "declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)"


def _vnni_dot(code: Code, sums: str, unsigned: str, signed: str) -> str:
    unsigned, signed = (code.let("fours", f"bitcast <64 x i8> {value} to <16 x i32>") for value in (unsigned, signed))
    operands = ", ".join(f"<16 x i32> {value}" for value in (sums, unsigned, signed))
    return code.let("sums", f"call <16 x i32> @llvm.x86.avx512.vpdpbusd.512({operands})")


def _vnni_int4(code: Code, codes: str, tokens: list[str], parts: int) -> Sums:
    sums = ["zeroinitializer"] * len(tokens)
    for j in range(GROUPS // 2):
        for half, weights in enumerate(nibbles(code, 16, codes, 64 * j)):
            for t, activations in enumerate(tokens):
                sums[t] = _vnni_dot(code, sums[t], weights, repeated(code, 16, activations, 2 * j + half))
    return [sums]


def _vnni_int8(code: Code, codes: str, tokens: list[str], parts: int) -> Sums:
    """The sign bit flipped makes an unsigned byte of each weight, 128 more than it was."""
    sums = ["zeroinitializer"] * len(tokens)
    for j in range(GROUPS):
        signed = code.load("signed", "<64 x i8>", codes, 64 * j, 16)
        unsigned = code.let("unsigned", f"xor <64 x i8> {signed}, {constant(64, 'i8', -128)}")
        for t, activations in enumerate(tokens):
            sums[t] = _vnni_dot(code, sums[t], unsigned, repeated(code, 16, activations, j))
    return [sums]


AVX512_VNNI = InstructionSet(
    name="avx512vnni",
    lanes=16,
    features=("avx512f", "avx512bw", "avx512vl", "avx512vnni"),
    declarations=VNNI_DECLARATIONS,
    int4=_vnni_int4,
    int8=_vnni_int8,
    int8_excess=128,
    parts={"int4": (1, 1, 1, 1), "int8": (1, 1, 1, 1)},
)
