"""The products of quantized matrices: right, the same to the bit however many tokens, on every instruction set."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halo_mpi.model.kernels.arm import NEON, NEON_DOTPROD
from halo_mpi.model.kernels.compiled import multiply, parsed, products, target
from halo_mpi.model.kernels.processor import this_processor
from halo_mpi.model.kernels.products import TOKENS, module
from halo_mpi.model.kernels.tiles import CODE_BYTES
from halo_mpi.model.kernels.x86 import AVX512_VNNI
from tests.product_cases import UNTOUCHED, Case, Emulated, Native

dtypes = pytest.mark.parametrize("dtype", CODE_BYTES)
EXTREMES = (127, -127)
PLAIN_VPDPBUSD = """
define <16 x i32> @plain_vpdpbusd(<16 x i32> %sums, <16 x i32> %unsigned, <16 x i32> %signed) {
  %u8 = bitcast <16 x i32> %unsigned to <64 x i8>
  %s8 = bitcast <16 x i32> %signed to <64 x i8>
  %u = zext <64 x i8> %u8 to <64 x i32>
  %s = sext <64 x i8> %s8 to <64 x i32>
  %products = mul <64 x i32> %u, %s
"""


HERE = {isa.name: isa for isa in this_processor().isas}
EMULATED = {"emulated-sdot": (NEON_DOTPROD, "cortex-a76", "MAX"), "emulated-neon": (NEON, "cortex-a72", "A72")}


def plain_vnni() -> str:
    """The functions for VNNI, with its one instruction in simple words."""
    lines, sums = [PLAIN_VPDPBUSD.rstrip()], "%sums"
    for i in range(4):
        lanes = ", ".join(f"i32 {lane}" for lane in range(i, 64, 4))
        lines.append(f"  %of.{i} = shufflevector <64 x i32> %products, <64 x i32> poison, <16 x i32> <{lanes}>")
        lines.append(f"  %sums.{i} = add <16 x i32> {sums}, %of.{i}")
        sums = f"%sums.{i}"
    definition = "\n".join([*lines, f"  ret <16 x i32> {sums}", "}"])
    return module(replace(AVX512_VNNI, declarations=definition)).replace("@llvm.x86.avx512.vpdpbusd.512", "@plain_vpdpbusd")


@cache
def run_of(name: str) -> Native | Emulated:
    if name in EMULATED:
        pytest.importorskip("unicorn", reason="emulates ARM processors; in the test extra")
        return Emulated(*EMULATED[name])
    return Native(plain_vnni() if name == "plain-vnni" else module(HERE[name]))


here = pytest.mark.parametrize("name", HERE)
everywhere = pytest.mark.parametrize("name", [*HERE, "plain-vnni", *EMULATED])


@everywhere
@dtypes
@settings(deadline=None, max_examples=12)
@given(tokens=st.sampled_from(TOKENS), down=st.integers(1, 4), across=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_products_of_odd_shapes_are_right(name, dtype, tokens, down, across, seed):
    case = Case(dtype, tokens, down, across, seed)
    case.check(run_of(name)(case))


@everywhere
@dtypes
@pytest.mark.parametrize("activation", EXTREMES)
def test_the_largest_codes_do_not_saturate(name, dtype, activation):
    for tokens in TOKENS:
        case = Case(dtype, tokens, 1, 2, largest=activation)
        case.check(run_of(name)(case))


@everywhere
@dtypes
def test_a_token_gets_the_same_bits_whatever_tokens_are_beside_it(name, dtype):
    run = run_of(name)
    for tokens in TOKENS:
        case = Case(dtype, tokens, 2, 7, seed=tokens)
        y = run(case)
        for t in range(tokens):
            assert run(case.token(t)).tobytes() == y[t].tobytes()


@here
@dtypes
def test_a_range_of_rows_is_a_product_of_its_own(name, dtype):
    case = Case(dtype, 2, 5, 3)
    whole, part = run_of(name)(case), run_of(name)(case, first=3)
    case.check(part, first=3)
    assert (part[:, :32] == whole[:, 48:80]).all()


def multiplied(case: Case, across: int) -> np.ndarray:
    """What `multiply` makes of the first column tiles."""
    y, addresses = case.y.copy(), getattr(products(), case.dtype)
    pointers = [array.ctypes.data for array in (*case.arrays(), y)]
    if case.dtype == "int8":
        pointers[2] = 0
    multiply(addresses, *pointers, case.tokens, case.down, across, y.shape[1])
    return y


@dtypes
@pytest.mark.parametrize("tokens", [1, 3, 7, 15, 21])
def test_any_number_of_tokens_is_multiplied_with_the_same_bits(dtype, tokens):
    case = Case(dtype, tokens, 5, 90)  # more codes than stay in the cache: in two or three pieces, if more than 8 tokens
    y = multiplied(case, case.across)
    case.check(y)
    for t in range(tokens):
        assert multiplied(case.token(t), case.across).tobytes() == y[t].tobytes()


@dtypes
def test_nothing_is_written_for_no_rows_and_zeros_for_no_columns(dtype):
    assert (multiplied(Case(dtype, 3, 0, 2), 2) == UNTOUCHED).all()
    y = multiplied(Case(dtype, 3, 2, 1), 0)
    assert (y[:, :32] == 0).all() and (y[:, 32:] == UNTOUCHED).all()


def assembly(isa, triple: str, processor: str) -> str:
    return target(triple, processor, "").emit_assembly(parsed(module(isa)))


@pytest.mark.parametrize(
    "isa, triple, processor, used, unused",
    [
        (AVX512_VNNI, "x86_64-linux-gnu", "icelake-server", ["vpdpbusd", "vcvtph2ps", "vfmadd"], ["vpmaddubsw"]),
        (NEON_DOTPROD, "aarch64-linux-gnu", "cortex-a76", ["sdot", "fcvtl", "fmla"], ["smull", "udot"]),
        (NEON, "aarch64-linux-gnu", "cortex-a72", ["smlal2", "sadalp", "fcvtl", "fmla"], ["sdot"]),
    ],
)
def test_the_compiler_finds_the_instructions_meant(isa, triple, processor, used, unused):
    text = assembly(isa, triple, processor)
    assert all(f"\t{name}" in text for name in used)
    assert not any(f"\t{name}" in text for name in unused)
    assert "call" not in text and "\tbl\t" not in text


def lines_of(text: str, instruction: str) -> list[str]:
    return [line for line in text.splitlines() if f"\t{instruction}\t" in line]


def test_vnni_works_on_whole_registers_and_repeats_activations_by_itself():
    lines = lines_of(assembly(AVX512_VNNI, "x86_64-linux-gnu", "icelake-server"), "vpdpbusd")
    assert lines and all("%zmm" in line for line in lines)
    assert sum("{1to16}" in line for line in lines) > len(lines) / 2


def test_sdot_takes_its_activations_from_lanes():
    lines = lines_of(assembly(NEON_DOTPROD, "aarch64-linux-gnu", "cortex-a76"), "sdot")
    assert lines and all(".4b[" in line for line in lines)
