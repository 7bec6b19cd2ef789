"""The product of a quantized matrix and the activations of 1, 2, 4 or 8 tokens, as LLVM IR.

    y[t, r] = sum over g of  scale[r, g] * a_scale[t, g] * sum over i of code[r, g, i] * a[t, g, i]  +  minimum[r, g] * a_sum[t, g]

A strip is the part of a row tile whose sums are kept in registers while the columns pass by: all 16 rows, or fewer where many tokens
need the registers. What happens to a number of a row and a token is the same whatever the strips and the tokens beside it, and every
fused operation is written as such: a token's result is the same, to the bit, in every one of these functions.
"""

from dataclasses import dataclass

from halo_mpi.model.kernels.ir import Code, constant
from halo_mpi.model.kernels.isa import InstructionSet
from halo_mpi.model.kernels.tiles import CODE_BYTES, LINE
from halo_mpi.store.encoding import BLOCK, TILE_ROWS

TOKENS = (1, 2, 4, 8)
PARAMETERS = ("codes", "scale", "minimum", "a", "a_scale", "a_sum", "y", "row_tiles", "column_tiles", "y_stride")
ADDRESSES = PARAMETERS[:7]
PREFETCHED = 2048  # bytes that codes are asked for ahead: on a Zen 3, matrices from memory take 20 % less time than without


def function_name(dtype: str, tokens: int) -> str:
    return f"product_{dtype}_{tokens}"


def module(isa: InstructionSet) -> str:
    """All products for an instruction set."""
    functions = [_Product(isa, dtype, tokens).function() for dtype in CODE_BYTES for tokens in TOKENS]
    fma = f"declare <{isa.lanes} x float> @llvm.fma.v{isa.lanes}f32({', '.join([f'<{isa.lanes} x float>'] * 3)})"
    return "\n".join([isa.declarations, fma, "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)", *functions])


@dataclass(slots=True)
class _Product:
    isa: InstructionSet
    dtype: str
    tokens: int

    @property
    def parts(self) -> int:
        """Registers of rows in a strip."""
        return self.isa.parts[self.dtype][TOKENS.index(self.tokens)]

    @property
    def strip_rows(self) -> int:
        return self.parts * self.isa.lanes

    @property
    def floats(self) -> str:
        return f"<{self.isa.lanes} x float>"

    def function(self) -> str:
        code = Code()
        code.label("entry")
        for name in ADDRESSES:
            code.do(f"%{name}.all = inttoptr i64 %{name} to ptr")
        self._strips(code)
        arguments = ", ".join(f"i64 %{name}" for name in PARAMETERS)
        return "\n".join([f"define void @{function_name(self.dtype, self.tokens)}({arguments}) {{", *code.lines, "}"])

    def _strips(self, code: Code) -> None:
        """The loop over strips, which holds the loop over column tiles."""
        passes = TILE_ROWS // self.strip_rows
        code.do(f"%strips = mul i64 %row_tiles, {passes}")
        code.do("br label %next_strip")
        code.label("next_strip")
        code.do("%strip = phi i64 [0, %entry], [%strip.after, %strip_done]")
        code.do("%strip.after = add i64 %strip, 1")
        code.do("%more_strips = icmp ult i64 %strip, %strips")
        code.do("br i1 %more_strips, label %strip_begins, label %done")
        code.label("strip_begins")
        row_tile = code.let("row_tile", f"udiv i64 %strip, {passes}")
        row = code.let("row", f"mul i64 {code.let('pass', f'urem i64 %strip, {passes}')}, {self.strip_rows}")
        first_tile = code.let("first_tile", f"mul i64 {row_tile}, %column_tiles")
        code.do("br label %next_tile")
        sums = self._columns(code, first_tile, row)
        code.label("strip_done")
        self._store(code, sums)
        code.do("br label %next_strip")
        code.label("done")
        code.do("ret void")

    def _columns(self, code: Code, first_tile: str, row: str) -> list[list[str]]:
        """The loop over column tiles: the strip's sums f32 [part][token] after all of them."""
        sums = [[f"%y.{part}.{t}" for t in range(self.tokens)] for part in range(self.parts)]
        code.label("next_tile")
        code.do("%g = phi i64 [0, %strip_begins], [%g.after, %tile]")
        for name in (name for part in sums for name in part):
            code.do(f"{name} = phi {self.floats} [zeroinitializer, %strip_begins], [{name}.after, %tile]")
        code.do("%g.after = add i64 %g, 1")
        code.do("%more_tiles = icmp ult i64 %g, %column_tiles")
        code.do("br i1 %more_tiles, label %tile, label %strip_done")
        code.label("tile")
        self._tile(code, code.let("tile", f"add i64 {first_tile}, %g"), row, sums)
        code.do("br label %next_tile")
        return sums

    def _tile(self, code: Code, tile: str, row: str, sums: list[list[str]]) -> None:
        """Add a tile's products to the sums."""
        codes = code.at("%codes.all", code.let("offset", f"mul i64 {tile}, {CODE_BYTES[self.dtype]}"))
        for line in range(0, CODE_BYTES[self.dtype], LINE):
            code.do(f"call void @llvm.prefetch.p0(ptr {code.at(codes, PREFETCHED + line)}, i32 0, i32 3, i32 1)")
        codes = code.at(codes, code.let("offset", f"mul i64 {row}, 4"))
        blocks = [
            code.let("block", f"add i64 %g, {code.let('before', f'mul i64 %column_tiles, {t}')}") for t in range(self.tokens)
        ]
        activations = [code.at("%a.all", code.let("offset", f"mul i64 {block}, {BLOCK}")) for block in blocks]
        dots = getattr(self.isa, self.dtype)(code, codes, activations, self.parts)

        first_row = code.let("first_row", f"add i64 {row}, {code.let('before', f'mul i64 {tile}, {TILE_ROWS}')}")
        scales = self._by_row(code, "scale", first_row)
        minima = self._by_row(code, "minimum", first_row) if self.dtype == "int4" else None
        for t, block in enumerate(blocks):
            a_scale, a_sum = self._by_token(code, "a_scale", block), self._by_token(code, "a_sum", block)
            for part in range(self.parts):
                so_far, after = sums[part][t], f"{sums[part][t]}.after"
                dot = code.let("dot", f"sitofp <{self.isa.lanes} x i32> {dots[part][t]} to {self.floats}")
                dot = code.let("dot", f"fmul {self.floats} {dot}, {a_scale}")
                if minima:
                    so_far = code.let("sum", self._fma(minima[part], a_sum, so_far))
                elif self.isa.int8_excess:
                    dot = code.let("dot", self._fma(constant(self.isa.lanes, "float", -float(self.isa.int8_excess)), a_sum, dot))
                code.do(f"{after} = {self._fma(scales[part], dot, so_far)}")

    def _by_row(self, code: Code, plane: str, first_row: str) -> list[str]:
        """The strip's scales or minima, by part."""
        pointer, halves = code.let(plane, f"getelementptr half, ptr %{plane}.all, i64 {first_row}"), f"<{self.isa.lanes} x half>"
        loaded = [code.load("halves", halves, pointer, 2 * self.isa.lanes * part, 2) for part in range(self.parts)]
        return [code.let(plane, f"fpext {halves} {part} to {self.floats}") for part in loaded]

    def _by_token(self, code: Code, name: str, block: str) -> str:
        """A token's factor for a column tile, in every lane."""
        pointer = code.let("at", f"getelementptr float, ptr %{name}.all, i64 {block}")
        return code.splat(name, self.isa.lanes, "float", code.load(name, "float", pointer, 0, 4))

    def _fma(self, a: str, b: str, c: str) -> str:
        return f"call {self.floats} @llvm.fma.v{self.isa.lanes}f32({self.floats} {a}, {self.floats} {b}, {self.floats} {c})"

    def _store(self, code: Code, sums: list[list[str]]) -> None:
        first = code.let("first", f"mul i64 %strip, {self.strip_rows}")
        for t in range(self.tokens):
            start = code.let("start", f"add i64 {first}, {code.let('before', f'mul i64 %y_stride, {t}')}")
            pointer = code.let("at", f"getelementptr float, ptr %y.all, i64 {start}")
            for part in range(self.parts):
                code.do(f"store {self.floats} {sums[part][t]}, ptr {code.at(pointer, 4 * self.isa.lanes * part)}, align 4")
