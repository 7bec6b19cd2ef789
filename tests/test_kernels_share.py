"""Compiled shares: what they compute, against model/llama.py with the same weights; results that do not depend on the chunk."""

import threading
import time

import numpy as np
import pytest
import torch

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.share import CompiledHead, CompiledShare
from halo_mpi.model.kernels.team import Team
from halo_mpi.model.kernels.tiles import Tiles, aligned_bytes, stored_tiles, tiles_across, tiles_down
from halo_mpi.model.layer_weights import LayerWeights, runs_of
from halo_mpi.model.llama import Share
from halo_mpi.store.encoding import decode, encode

ROUNDING = 0.03  # relative error of 8-bit activations: about 0.7 % of each product's input
SAME_ROUNDING = 5e-4  # f32 differences, and the few codes that they turn


def shape(hidden=48, heads=6, kv_heads=2, head_dim=8) -> ModelConfig:
    sizes = dict(layers=1, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, ffn=96, vocabulary=50, context=128)
    return ModelConfig("test", norm_eps=1e-5, rope_theta=10000.0, **sizes)


def up_to(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What 8 bits leave of f32 [..., columns], 32 columns to a scale."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) * np.float32(1 / 127)
    return (torch.round(blocks * (1 / scale)) * scale).nan_to_num().flatten(-2)[..., : x.shape[-1]]


class RoundedShare(Share):
    """The reference with inputs of products rounded as the compiled share rounds them."""

    def attention(self, layer, x, position):
        dim = self.config.head_dim
        mixed = self.mix(layer, rounded(x), position).unflatten(-1, (-1, dim))
        return torch.nn.functional.linear(rounded(mixed).flatten(-2), self.layers[layer].o)

    def ffn(self, layer, x):
        return torch.nn.functional.linear(rounded(self.activations(layer, rounded(x))), self.layers[layer].down)


def quantized(matrix: np.ndarray, dtype: str) -> tuple[Tiles, np.ndarray]:
    """A matrix as tiles, and what they stand for."""
    rows, columns = matrix.shape
    data = np.frombuffer(encode(matrix, dtype), np.uint8)
    down, across = tiles_down(rows), tiles_across(columns)
    tiles = Tiles.of(aligned_bytes(Tiles.bytes_of(down, across, dtype)), down, across, dtype)
    tiles.put(stored_tiles(data, rows, columns, dtype))
    return tiles, decode(data, rows, columns, dtype)


def layer(config: ModelConfig, query_heads: list[int], dtype="int8", biased=False, neurons=64, seed=0):
    """The same random weights of some query heads and neurons, as tiles and as tensors."""
    random, dim, hidden = np.random.default_rng(seed), config.head_dim, config.hidden
    kv_heads, runs = runs_of(query_heads, config.heads_per_kv)
    blocks, head_rows, head_columns = len(query_heads) + 2 * len(kv_heads), up_to(dim, 16), up_to(dim, 32)

    def normal(*sizes):
        return random.normal(size=sizes).astype(np.float32)

    qkv, o = np.zeros((blocks, head_rows, hidden), np.float32), np.zeros((hidden, len(query_heads), head_columns), np.float32)
    qkv[:, :dim], o[..., :dim] = normal(blocks, dim, hidden) * hidden**-0.5 * 1.5, normal(hidden, len(query_heads), dim)
    qkv_tiles, qkv = quantized(qkv.reshape(-1, hidden), dtype)
    o_tiles, o = quantized(o.reshape(hidden, -1), dtype)
    gate_up_tiles, gate_up = quantized(normal(2 * neurons, hidden) * hidden**-0.5 * 2, dtype)
    down_tiles, down = quantized(normal(hidden, neurons), dtype)
    qkv = qkv.reshape(blocks, head_rows, hidden)[:, :dim].reshape(-1, hidden)
    o = o.reshape(hidden, -1, head_columns)[..., :dim].reshape(hidden, -1)
    bias, gate_bias, tensor_bias, tensor_gate_bias = None, None, None, None
    if biased:
        bias, gate_bias = np.zeros((blocks, head_rows), np.float32), normal(2 * neurons)
        bias[:, :dim] = normal(blocks, dim)
        tensor_bias, tensor_gate_bias = torch.tensor(bias[:, :dim].reshape(-1)), torch.tensor(gate_bias)
        bias = bias.reshape(-1)
    compiled = LayerWeights(qkv_tiles, bias, o_tiles, runs, gate_up_tiles, gate_bias, down_tiles)
    qkv, o, gate_up, down = (torch.tensor(matrix) for matrix in (qkv, o, gate_up, down))
    return compiled, LayerWeights(qkv, tensor_bias, o, runs, gate_up, tensor_gate_bias, down)


def inputs(config: ModelConfig, rows: int, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, config.hidden)).astype(np.float32)


def error(result: np.ndarray, reference: torch.Tensor) -> float:
    """Root mean square error, relative to the reference."""
    reference = reference.numpy()
    return float(np.sqrt(((result - reference) ** 2).mean() / (reference**2).mean()))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("down, across, above", [((1, 3), (1, 3), 0), ((0, 1), (2, 4), 1), ((3, 9), (3, 9), 0)])
def test_a_stored_matrix_is_put_where_its_tiles_would_be(dtype, down, across, above):
    """Of 2 by 2 tiles into 4 by 4, the last of which lie outside: as far as both reach."""
    data = np.frombuffer(encode(np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32), dtype), np.uint8)
    one, other = (Tiles.of(aligned_bytes(Tiles.bytes_of(4, 4, dtype)), 4, 4, dtype) for _ in range(2))
    target = one.part(slice(*down), slice(*across))
    (high, wide), stored = target.scale.shape[:2], stored_tiles(data, 32, 64, dtype)
    target.put(stored.part(slice(above, above + high), slice(0, wide)))
    other.put_stored(data, 32, 64, slice(*down), slice(*across), above)
    assert all(same_bits(mine, theirs) for mine, theirs in zip(one.planes, other.planes)) and one.scale.any()


SHAPES = [
    (shape(), [0, 1, 2, 3, 4, 5]),
    (shape(hidden=24, head_dim=20), [0, 4, 5]),  # uneven runs
    (shape(hidden=48, head_dim=48), [2, 3]),
    (shape(hidden=576, heads=9, kv_heads=3, head_dim=64), [0, 1, 2, 3, 8]),  # three heads at once, and one
    (shape(hidden=64, heads=5, kv_heads=1, head_dim=128), [0, 1, 2, 3, 4]),
]


@pytest.mark.parametrize("dtype, biased", [("int4", True), ("int8", False)])
@pytest.mark.parametrize("config, heads", SHAPES)
def test_sums_are_those_of_the_reference(config, heads, dtype, biased):
    compiled, tensors = layer(config, heads, dtype, biased)
    share, position = CompiledShare(config, [compiled], 256), 0
    references = [
        (kind(config, [tensors], 256), tolerance) for kind, tolerance in ((Share, ROUNDING), (RoundedShare, SAME_ROUNDING))
    ]
    for rows in (3, 1, 64, 100, 1):
        x = inputs(config, rows, seed=rows)
        attended, fed = share.attention(0, x, position), share.ffn(0, x)
        for reference, tolerance in references:
            assert error(attended, reference.attention(0, torch.tensor(x), position)) < tolerance
            assert error(fed, reference.ffn(0, torch.tensor(x))) < tolerance
        position += rows
    assert share.filled == position
    for mine, its in zip(share.kv[0], references[1][0].kv[0]):
        assert np.abs(mine - its.numpy()).max() < 1e-4


@pytest.mark.parametrize("cache_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("config, heads", SHAPES[1:])
def test_a_row_is_the_same_alone_and_in_a_chunk(config, heads, cache_dtype):
    compiled, _ = layer(config, heads, "int4", biased=True)
    x, results = inputs(config, 75), []
    for steps in ([75], [1] * 75, [33, 5, 1, 36]):
        share, position, parts = CompiledShare(config, [compiled], 80, cache_dtype), 0, []
        for rows in steps:
            part = x[position : position + rows]
            parts.append((share.attention(0, part, position).copy(), share.ffn(0, part).copy()))
            position += rows
        results.append([np.concatenate(each) for each in zip(*parts)] + list(share.kv[0]))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("config, heads", SHAPES)
def test_half_precision_caches_are_close(config, heads):
    compiled, _ = layer(config, heads)
    x = inputs(config, 40)
    full, half = (CompiledShare(config, [compiled], 64, dtype) for dtype in (np.float32, np.float16))
    assert half.kv[0][0].dtype == np.float16
    assert error(half.attention(0, x, 0), torch.tensor(full.attention(0, x, 0))) < 2e-2
    for mine, its in zip(half.kv[0], full.kv[0]):
        assert same_bits(mine, its.astype(np.float16))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("config, heads", SHAPES[1:])
def test_threads_do_not_change_a_bit(config, heads, threads):
    compiled, _ = layer(config, heads, "int4", biased=True)
    alone, team = (CompiledShare(config, [compiled], 128, team=Team(number)) for number in (1, threads))
    position = 0
    for rows in (70, 1, 2, 1):
        x = inputs(config, rows, seed=rows)
        assert same_bits(alone.attention(0, x, position), team.attention(0, x, position))
        assert same_bits(alone.ffn(0, x), team.ffn(0, x))
        position += rows
    team.append(0, x, position)
    alone.append(0, x, position)
    assert all(same_bits(a, b) for a, b in zip(alone.kv[0], team.kv[0]))


def test_threads_sleep_between_calls_and_end_with_their_share():
    config, heads = SHAPES[0]
    before = set(threading.enumerate())
    share, x = CompiledShare(config, [layer(config, heads)[0]], 8, team=Team(3)), inputs(config, 1)
    team = set(threading.enumerate()) - before
    first = share.ffn(0, x).copy()
    time.sleep(0.5)  # long enough to fall asleep
    assert same_bits(first, share.ffn(0, x))
    assert len(team) == 2 and all(thread.is_alive() for thread in team)
    del share
    for thread in team:
        thread.join(10)
        assert not thread.is_alive()


def test_appending_is_what_attention_does_first():
    config, heads = SHAPES[1]
    compiled, _ = layer(config, heads, biased=True)
    x, share, other = inputs(config, 20), *(CompiledShare(config, [compiled], 32) for _ in range(2))
    share.attention(0, x, 0)
    other.append(0, x[:12], 0)
    other.append(0, x[12:], 12)
    assert all(same_bits(a, b) for a, b in zip(share.kv[0], other.kv[0]))
    assert share.filled == other.filled == 20


def test_layers_and_caches_are_replaced_while_text_flows():
    config = shape()
    before, after = layer(config, [0, 1])[0], layer(config, [0, 1, 4], seed=5)[0]
    x = inputs(config, 9)
    share, fresh = CompiledShare(config, [before], 32), CompiledShare(config, [after], 32)
    share.attention(0, x, 0)
    cache = share.empty_cache(2)
    share.append(0, x, 0, (after, cache))
    share.layers[0], share.kv[0] = after, cache
    fresh.append(0, x, 0)
    last = inputs(config, 1, seed=3)
    assert same_bits(share.attention(0, last, 9), fresh.attention(0, last, 9))
    assert same_bits(share.ffn(0, last), fresh.ffn(0, last))


def test_matrices_may_arrive_later_in_the_same_layer():
    config = shape()
    full, other = layer(config, [0, 1])[0], layer(config, [0, 1], seed=5)[0]
    weights = LayerWeights()
    weights.runs = full.runs
    share, reference, x = CompiledShare(config, [weights], 32), CompiledShare(config, [full], 32), inputs(config, 2)
    for source in (other, full):
        for name in ("qkv", "o", "gate_up", "down"):
            setattr(weights, name, getattr(source, name))
        results = share.attention(0, x, 0), share.ffn(0, x)
    assert same_bits(results[0], reference.attention(0, x, 0)) and same_bits(results[1], reference.ffn(0, x))


def test_a_sequence_begins_again_without_a_reset():
    config, heads = SHAPES[3]
    compiled, _ = layer(config, heads)
    share, fresh = (CompiledShare(config, [compiled], 70) for _ in range(2))
    share.attention(0, inputs(config, 70, seed=7), 0)
    x = inputs(config, 5)
    assert same_bits(share.attention(0, x, 0), fresh.attention(0, x, 0))


def test_positions_beyond_the_cache_are_refused():
    config, heads = SHAPES[0]
    share = CompiledShare(config, [layer(config, heads)[0]], 8)
    with pytest.raises(ValueError, match="of a cache of 8"):
        share.attention(0, inputs(config, 2), 7)


@pytest.mark.parametrize("x", [np.zeros((1, 48)), np.zeros((48, 1), np.float32).T[:, ::2], np.zeros((1, 24), np.float32)])
def test_other_inputs_are_refused(x):
    config, heads = SHAPES[0]
    share = CompiledShare(config, [layer(config, heads)[0]], 8)
    with pytest.raises((TypeError, ValueError)):
        share.attention(0, x, 0)
    with pytest.raises((TypeError, ValueError)):
        share.ffn(0, x)


def test_large_inputs_stay_finite_and_nan_stays_visible():
    config, heads = SHAPES[0]
    share, x = CompiledShare(config, [layer(config, heads)[0]], 8), inputs(config, 3)
    x[0] *= 1e4
    x[1, :] = 0
    x[2, 5] = np.nan
    attended, fed = share.attention(0, x, 0), share.ffn(0, x)
    assert np.isfinite(attended[:2]).all() and np.isfinite(fed[:2]).all() and not fed[1].any()
    assert np.isnan(attended[2]).all() and np.isnan(fed[2]).all()


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("vocabulary, hidden", [(50, 24), (128, 64)])
def test_head_scores_tokens_and_embeds_them(vocabulary, hidden, dtype):
    tiles, weights = quantized(np.random.default_rng(0).normal(size=(vocabulary, hidden)).astype(np.float32), dtype)
    head = CompiledHead(tiles, vocabulary, hidden)
    for rows in (1, 3, 70):
        x = np.random.default_rng(rows).normal(size=(rows, hidden)).astype(np.float32)
        logits = head.logits(x)
        assert logits.shape == (rows, vocabulary)
        assert error(logits, rounded(torch.tensor(x)) @ torch.tensor(weights).T) < 1e-5
    share = CompiledShare(shape(), [], 8, team=Team(2))
    assert same_bits(logits, CompiledHead(tiles, vocabulary, hidden, share.team).logits(x))
    tokens = [3, vocabulary - 1, 0, 3]
    assert np.allclose(head.rows(tokens), weights[tokens], rtol=0, atol=1e-6)
    with pytest.raises(ValueError):
        head.rows([tiles.shape[0]])
