"""The root's token loop: one token is a chain of syncs, two per layer."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from halo_mpi.engine.marks import Marks
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.llama import Share, Trunk, rms_norm
from halo_mpi.schedule.placement import Plan
from halo_mpi.wire.messages import Kind
from halo_mpi.wire.root_link import RootLink

PREFILL_ROWS = 64  # tokens per prefill request; 147 KiB at hidden 576 in f32


@dataclass(slots=True)
class Ledger:
    """What became of the partial sums after prefill, and how long the syncs took. Strict: all are waited for."""

    partial_sums: int = 0
    sync_ms: list[float] = field(default_factory=list)

    def to_dict(self) -> dict:
        counts = {"partial_sums": self.partial_sums, "on_time": self.partial_sums, "deferred": {}, "substituted": 0, "waited": 0}
        return {**counts, "discarded_late": 0, "inexact_importance": 0.0}


def even_shares(plan: Plan, rank: int, ranks: int) -> dict[Kind, list[float]]:
    """A rank's part of each layer's work, in even shares: 1.0 is as much as everybody would have."""
    owners = {Kind.ATTENTION: plan.query, Kind.FFN: plan.ffn}
    return {kind: ((owner == rank).mean(axis=1) * ranks).tolist() for kind, owner in owners.items()}


class Root:
    """Computes the model's logits with the workers' help. Strict: a token is the same whatever the network does.

    The text is one sequence; positions must be computed in order, beginning at 0 for a new text.
    """

    def __init__(self, config: ModelConfig, trunk: Trunk, share: Share, plan: Plan, link: RootLink, marks: Marks):
        self._config, self._trunk, self._share, self._link, self._marks = config, trunk, share, link, marks
        self._even_shares = even_shares(plan, 0, link.ranks)
        owners = {Kind.ATTENTION: plan.query, Kind.FFN: plan.ffn}
        self._workers = {kind: [sorted(set(owner.tolist()) - {0}) for owner in table] for kind, table in owners.items()}
        self.ledger = Ledger()
        self.compute_s = 0.0  # own share and head
        self.computed_tokens = 0

    def prefill(self, tokens: list[int]) -> np.ndarray:
        """Compute a new text's first tokens in chunks; logits f32 [V] after the last of them."""
        for start in range(0, len(tokens), PREFILL_ROWS):
            x = self._forward(tokens[start : start + PREFILL_ROWS], start, decoding=False)
        return self._logits(x)

    def step(self, token: int, position: int) -> np.ndarray:
        """Compute one token at `position`; logits f32 [V] for the next."""
        return self._logits(self._forward([token], position, decoding=True))

    def _forward(self, tokens: list[int], position: int, decoding: bool) -> torch.Tensor:
        trunk = self._trunk
        x = trunk.embedding[tokens]  # [T, D]
        for layer in range(self._config.layers):
            x = self._sync(Kind.ATTENTION, layer, position, x, trunk.attention_norms, trunk.o_bias, decoding)
            x = self._sync(Kind.FFN, layer, position, x, trunk.ffn_norms, trunk.down_bias, decoding)
        self.computed_tokens += len(tokens)
        return x

    def _sync(self, kind: Kind, layer: int, position: int, x: torch.Tensor, norms: torch.Tensor, bias: torch.Tensor | None,
              decoding: bool) -> torch.Tensor:  # fmt: skip
        """One sync: the residual vectors x [T, D] plus the partial sums of all ranks, added in rank order."""
        begin = time.perf_counter()
        normed = rms_norm(x, norms[layer], self._config.norm_eps)
        workers = self._workers[kind][layer]
        seq = self._link.ask(kind, layer, position, normed.numpy(), workers) if workers else 0
        if bias is not None:
            x = x + bias[layer]
        if self._even_shares[kind][layer]:
            start = time.perf_counter()
            own = self._share.attention(layer, normed, position) if kind == Kind.ATTENTION else self._share.ffn(layer, normed)
            self._marks.pace(start, self._even_shares[kind][layer])
            self.compute_s += time.perf_counter() - start
            x = x + own
        for answer in self._link.collect(seq, workers):
            x = x + torch.from_numpy(answer)
        if decoding:
            self.ledger.partial_sums += len(workers)
            self.ledger.sync_ms.append((time.perf_counter() - begin) * 1e3)
        return x

    def _logits(self, x: torch.Tensor) -> np.ndarray:
        start = time.perf_counter()
        last = rms_norm(x[-1:], self._trunk.final_norm, self._config.norm_eps)
        logits = F.linear(last, self._trunk.head)[0].numpy()
        self.compute_s += time.perf_counter() - start
        return logits
