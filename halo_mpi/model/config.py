"""The shape of a LLaMA-family model."""

from dataclasses import asdict, dataclass

import numpy as np

from halo_mpi.errors import InputError
from halo_mpi.store.encoding import BLOCK

MAX_GROUP = 128  # neurons; at hidden 576 a 4-bit group is 138 KiB, one read from an SD card
MOST_LAYERS = 255  # a message names one in a byte
GROUPS_WANTED = 12  # for small FFNs: enough groups that a handful of ranks all get some


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of the model; everything that is needed beside the weights to compute it.

    `rope_factors` divide the rotary frequencies one by one (head_dim / 2 of them): LLaMA 3's scaling, linear scaling and
    GGUF's `rope_freqs` tensor are all of this form. None means no scaling.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    context: int  # tokens the model was trained for
    norm_eps: float
    rope_theta: float
    rope_factors: tuple[float, ...] | None = None
    tied: bool = False  # the head is the embedding

    def __post_init__(self):
        for field in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocabulary", "context"):
            value = getattr(self, field)
            if not isinstance(value, int) or not 0 < value < 2**31:
                raise InputError(f"the model's {field} is {value!r}, not a positive whole number: its configuration is damaged")
        if self.layers > MOST_LAYERS:
            raise InputError(f"the model has {self.layers} layers, and at most {MOST_LAYERS} are supported")
        if self.heads % self.kv_heads:
            raise InputError(
                f"{self.heads} query heads cannot share {self.kv_heads} KV heads evenly: the configuration is damaged"
            )
        if self.head_dim % 2:
            raise InputError(f"the head dimension {self.head_dim} is odd, so rotary embeddings cannot pair its values")
        for field in ("norm_eps", "rope_theta"):
            value = getattr(self, field)
            if not (isinstance(value, float) and np.isfinite(value) and value > 0):
                raise InputError(f"the model's {field} is {value!r}, not a positive number: its configuration is damaged")
        if self.rope_factors is not None:
            factors = np.asarray(self.rope_factors, np.float64)
            if factors.shape != (self.head_dim // 2,) or not np.isfinite(factors).all() or (factors <= 0).any():
                raise InputError(f"expected {self.head_dim // 2} positive rotary frequency factors, found {factors.shape}")

    @property
    def heads_per_kv(self) -> int:
        return self.heads // self.kv_heads

    @property
    def group_size(self) -> int:
        """Neurons in an FFN group: a multiple of 32, so that 4-bit blocks of the down projection are never split."""
        return min(MAX_GROUP, max(BLOCK, BLOCK * round(self.ffn / (GROUPS_WANTED * BLOCK))))

    @property
    def groups(self) -> int:
        return -(-self.ffn // self.group_size)

    def group_neurons(self, group: int) -> range:
        """The neurons of one FFN group; the last group may be shorter."""
        return range(group * self.group_size, min(self.ffn, (group + 1) * self.group_size))

    @property
    def parameters(self) -> int:
        """Weights of the matrices, norms left out."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        embedding = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * (attention + 3 * self.hidden * self.ffn) + embedding

    def rotary_tables(self, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of the rotary angles, f32 [positions, head_dim / 2] (arXiv 2104.09864)."""
        frequency = self.rope_theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        if self.rope_factors is not None:
            frequency = frequency / np.asarray(self.rope_factors)
        angle = np.outer(np.arange(positions), frequency)
        return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "ModelConfig":
        """The inverse of `to_dict`, also after a trip through JSON.

        Raises InputError for unknown or missing fields.
        """
        factors = fields.get("rope_factors")
        try:
            return cls(**{**fields, "rope_factors": None if factors is None else tuple(factors)})
        except TypeError as error:
            raise InputError(f"the model's configuration does not have the expected fields ({error})") from error


def llama3_rope_factors(
    head_dim: int, theta: float, factor: float, low: float, high: float, original_context: int
) -> tuple[float, ...]:
    """LLaMA 3.1's frequency scaling as divisors: high frequencies kept, low ones divided by `factor`, a ramp between.

    `low` and `high` are the configuration's low_freq_factor and high_freq_factor. Source: the Llama 3.1 reference
    implementation (`apply_scaling`).
    """
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = original_context * frequency / (2 * np.pi)  # rotations within the original context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: unscaled, 0: divided by factor
    return tuple((1.0 / (keep + (1.0 - keep) / factor)).tolist())
