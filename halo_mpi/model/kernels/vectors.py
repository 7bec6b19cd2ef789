"""What must be vectors for certain is written as such: compiled functions of addresses, on 8 or 32 lanes of f32 at a time.

LLVM turns them into AVX or NEON registers, as many as it takes. All sums have a fixed order here, so that a result does not
depend on what else is computed beside it. Every address and number is an int64.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
BLOCK = 32  # values that share a scale

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
LOG2_E, LN_2_HIGH, LN_2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
EXP_SERIES = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)  # Cephes, expf
EXP_LEAST, EXP_MOST = -87.3, 88.3  # where exp is a normal f32
ROUNDING = 12582912.0  # 1.5 * 2^23: added to a small f32, its lowest bits are the nearest integer
LEAST_SCALE = 1e-30  # what is smaller is zero: its inverse would not be finite


def compiled(emit, arguments: int, result=types.void):
    """Signature and code of an intrinsic that `emit`s itself, given a Lanes and int64 arguments."""

    def build(context, builder, signature, values):
        made = emit(Lanes(builder), *values)
        return context.get_dummy_value() if made is None else made

    return result(*[types.int64] * arguments), build


class Lanes:
    """Vectors in the code that is being built."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder

    def load(self, address, lanes: int = LANES, kind: ir.Type = F32):
        vector = ir.VectorType(kind, lanes)
        return self.builder.load(self.builder.inttoptr(address, vector.as_pointer()), align=1)

    def store(self, vector, address) -> None:
        self.builder.store(vector, self.builder.inttoptr(address, vector.type.as_pointer()), align=1)

    def after(self, address, number: int):
        return self.builder.add(address, I64(number))

    def fill(self, value, lanes: int = LANES):
        """A vector of one value: a number or a scalar of the code."""
        if isinstance(value, ir.Value) and not isinstance(value, ir.Constant):
            vector = ir.VectorType(value.type, lanes)
            one = self.builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
            return self.builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))
        kind = F32 if isinstance(value, float) else I32
        return ir.Constant(ir.VectorType(kind, lanes), [kind(value)] * lanes)

    def like(self, value, vector):
        return self.fill(value, vector.type.count)

    def call(self, name: str, result: ir.Type, *values):
        """LLVM's function of this name for the first value's type."""
        kind = values[0].type
        name = f"llvm.{name}.v{kind.count}{kind.element.intrinsic_name}"
        function = ir.FunctionType(result, [value.type for value in values])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function, name), values)

    def fma(self, x, y, z):
        """x * y + z, rounded once."""
        return self.call("fma", x.type, x, y, z)

    def bits(self, vector):
        return self.builder.bitcast(vector, ir.VectorType(I32, vector.type.count))

    def numbers(self, bits):
        return self.builder.bitcast(bits, ir.VectorType(F32, bits.type.count))

    def reduce(self, name: str, vector):
        """An integer sum or maximum, for which the order is indifferent."""
        return self.call(f"vector.reduce.{name}", vector.type.element, vector)

    def pick(self, x, y, lanes: list[int]):
        return self.builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def add_neighbours(self, x, y):
        """Sums of two neighbours: in each half of the lanes, those of x and then those of y."""
        even = self.pick(x, y, [0, 2, 8, 10, 4, 6, 12, 14])
        return self.builder.fadd(even, self.pick(x, y, [1, 3, 9, 11, 5, 7, 13, 15]))

    def sums(self, vectors: list):
        """The sum of each of 8 vectors."""
        while len(vectors) > 2:
            vectors = [self.add_neighbours(x, y) for x, y in zip(vectors[::2], vectors[1::2])]
        low = self.pick(*vectors, [0, 1, 2, 3, 8, 9, 10, 11])
        return self.builder.fadd(low, self.pick(*vectors, [4, 5, 6, 7, 12, 13, 14, 15]))

    def fold(self, vector, combine):
        """What `combine` makes of all lanes."""
        while vector.type.count > 1:
            half = vector.type.count // 2
            lower, upper = list(range(half)), list(range(half, 2 * half))
            vector = combine(self.pick(vector, vector, lower), self.pick(vector, vector, upper))
        return self.builder.extract_element(vector, I32(0))

    def single(self, value):
        """A vector of one lane."""
        return self.builder.insert_element(ir.Constant(ir.VectorType(value.type, 1), ir.Undefined), value, I32(0))

    def only(self, vector):
        """Of a vector of one lane."""
        return self.builder.extract_element(vector, I32(0))

    def greater(self, x, y):
        return self.builder.select(self.builder.fcmp_ordered(">", x, y), x, y)

    def exp(self, x):
        """e^x, to 1e-7 of it; 0 below the normal numbers, and never infinite (Cephes, expf)."""
        build = self.builder
        small = build.fcmp_ordered("<", x, self.like(EXP_LEAST, x))
        x = build.select(small, self.like(EXP_LEAST, x), x)
        x = build.select(build.fcmp_ordered(">", x, self.like(EXP_MOST, x)), self.like(EXP_MOST, x), x)
        shifted = self.fma(x, self.like(LOG2_E, x), self.like(ROUNDING, x))
        power = build.fsub(shifted, self.like(ROUNDING, x))
        rest = self.fma(power, self.like(-LN_2_HIGH, x), x)
        rest = self.fma(power, self.like(-LN_2_LOW, x), rest)
        series = self.like(EXP_SERIES[0], x)
        for factor in EXP_SERIES[1:]:
            series = self.fma(series, rest, self.like(factor, x))
        series = build.fadd(self.fma(series, build.fmul(rest, rest), rest), self.like(1.0, x))
        raised = build.add(self.bits(series), build.shl(self.bits(shifted), self.like(23, x)))
        return build.select(small, self.like(0.0, x), self.numbers(raised))

    def quantize(self, x, codes, scale, total) -> None:
        """Store 32 values as int8 codes, their scale, and scale * sum of codes. NaN and infinity stay visible in the scale."""
        build = self.builder
        largest = self.reduce("smax", build.and_(self.bits(x), self.like(0x7FFFFFFF, x)))  # bits of |x| are in its order
        step = build.fmul(build.bitcast(largest, F32), F32(1 / 127))
        nothing = build.fcmp_ordered("<", step, F32(LEAST_SCALE))
        step = build.select(nothing, F32(0.0), step)
        inverse = build.select(nothing, F32(0.0), build.fdiv(F32(1.0), step))
        rounded = build.fadd(build.fmul(x, self.like(inverse, x)), self.like(ROUNDING, x))
        whole = build.sub(self.bits(rounded), self.bits(self.like(ROUNDING, x)))
        self.store(build.trunc(whole, ir.VectorType(I8, x.type.count)), codes)
        build.store(step, build.inttoptr(scale, F32.as_pointer()))
        sum_of_codes = build.sitofp(self.reduce("add", whole), F32)
        build.store(build.fmul(step, sum_of_codes), build.inttoptr(total, F32.as_pointer()))


@intrinsic
def quantize_block(typing, x, codes, scale, total):
    """32 values at x -> 32 int8 codes, their f32 scale, and scale * sum of codes."""

    def emit(lanes, x, codes, scale, total):
        lanes.quantize(lanes.load(x, BLOCK), codes, scale, total)

    return compiled(emit, 4)


@intrinsic
def activate_block(typing, gate, up, codes, scale, total):
    """32 values silu(gate) * up, quantized."""

    def emit(lanes, gate, up, codes, scale, total):
        build = lanes.builder
        gate, up = lanes.load(gate, BLOCK), lanes.load(up, BLOCK)
        divisor = build.fadd(lanes.like(1.0, gate), lanes.exp(build.fneg(gate)))
        lanes.quantize(build.fmul(build.fdiv(gate, divisor), up), codes, scale, total)

    return compiled(emit, 5)


@intrinsic
def exp_lanes(typing, x, y):
    """e^x for 8 values at x, stored at y."""

    def emit(lanes, x, y):
        lanes.store(lanes.exp(lanes.load(x)), y)

    return compiled(emit, 2)


@intrinsic
def from_half(typing, bits):
    """The f16 with these bits (uint16) as f32; loops over it become vectors."""

    def build(context, builder, signature, values):
        return builder.fpext(builder.bitcast(values[0], ir.HalfType()), F32)

    return types.float32(types.uint16), build


@intrinsic
def to_half(typing, value):
    """The bits (uint16) of the nearest f16."""

    def build(context, builder, signature, values):
        return builder.bitcast(builder.fptrunc(values[0], ir.HalfType()), I16)

    return types.uint16(types.float32), build


def pointer_to(kind):
    """Signature and code of an intrinsic that makes a pointer of an address."""

    def build(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind)(types.int64), build


@intrinsic
def floats_at(typing, address):
    """A pointer to f32."""
    return pointer_to(types.float32)


@intrinsic
def halves_at(typing, address):
    """A pointer to the bits of f16."""
    return pointer_to(types.uint16)


@intrinsic
def words_at(typing, address):
    """A pointer to int64."""
    return pointer_to(types.int64)
