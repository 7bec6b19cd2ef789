"""The number formats of tensors in GGUF and safetensors files, and how their bytes become f32 or blocks."""

import numpy as np

from halo_mpi.store.encoding import BLOCK, Blocks

# The nearest storage dtype of each format that can be read. Five bits and more keep their quality only in int8.
NATIVE_DTYPES = {
    "F32": "f32",
    "F16": "f16",
    "BF16": "bf16",
    **dict.fromkeys(("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0"), "int8"),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS"), "int4"),
    **dict.fromkeys(("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ1_0", "TQ2_0", "MXFP4"), "int4"),
}
READ_AS_BLOCKS = ("Q4_0", "Q4_1", "Q8_0")


def decode(data: np.ndarray, type_name: str, start: int, stop: int) -> np.ndarray | Blocks:
    """Columns start:stop of the bytes (uint8 [rows, bytes of whole blocks]) of a matrix; the result owns its memory.

    Q4_0, Q4_1 and Q8_0 give blocks with the same numbers, bit for bit, if the columns are whole blocks and (Q4_0) the
    minimum -8 * scale is finite in f16. Everything else gives f32.
    """
    data = np.array(data)
    if type_name in READ_AS_BLOCKS and start % BLOCK == 0 and stop % BLOCK == 0:
        blocks = _blocks(data, type_name)
        if blocks is not None:
            return blocks
    values = _dequantize(data, type_name)
    return values if values.shape[1] == stop - start else values[:, start:stop].copy()


def _dequantize(data: np.ndarray, type_name: str) -> np.ndarray:
    if type_name == "F32":
        return data.view("<f4")
    if type_name == "F16":
        return data.view("<f2").astype(np.float32)
    if type_name == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported by the caller
        return dequantize(data, GGMLQuantizationType[type_name])


def _blocks(data: np.ndarray, type_name: str) -> Blocks | None:
    rows = len(data)
    header = 4 if type_name == "Q4_1" else 2  # bytes of scale and minimum in front of the codes
    blocks = data.reshape(rows, -1, header + (BLOCK if type_name == "Q8_0" else BLOCK // 2))
    scale = blocks[..., 0:2].copy().view("<f2")[..., 0]
    codes = blocks[..., header:]
    if type_name == "Q8_0":
        return Blocks(codes.copy().view(np.int8).reshape(rows, -1), scale, None)
    codes = np.concatenate((codes & 15, codes >> 4), axis=-1).reshape(rows, -1)
    if type_name == "Q4_1":
        return Blocks(codes, scale, blocks[..., 2:4].copy().view("<f2")[..., 0])
    with np.errstate(over="ignore", invalid="ignore"):
        minimum = scale * np.float16(-8)
    return Blocks(codes, scale, minimum) if np.isfinite(minimum).all() else None
