"""From raw runs to the numbers of a table: warm-up, percentiles, pairwise ratios, and whether the token ids agree."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

WARM_UP_TOKENS = 2  # of each run: the prompt's, whose time is TTFT, and the next, in which the connections find their pace
ENOUGH_PAIRS = 4
T_975 = {3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}  # Student's, by degrees of freedom
FEW_TOKENS = 100  # below this there is no 99th percentile


@dataclass(frozen=True, slots=True)
class Samples:
    """Times of one run or of several together, in ms, warm-up left out. `per_token`: syncs."""

    tpot_ms: list[float]
    sync_ms: list[float]
    per_token: float
    warm: bool = True  # False: so few tokens that the warm-up had to count

    @property
    def token_ms(self) -> float | None:
        """The mean time of a token; from the syncs, if no token was finished."""
        if self.tpot_ms:
            return float(np.mean(self.tpot_ms))
        return self.estimate_ms

    @property
    def estimate_ms(self) -> float | None:
        """The time of a token by its syncs alone: 2 x layers x mean sync."""
        return self.per_token * float(np.mean(self.sync_ms)) if self.sync_ms else None


def samples_of(run: dict) -> Samples | None:
    """The times of a run, None if it left none."""
    report = run.get("report") or {}
    raw = report.get("samples") or {}
    tpot_ms, sync_ms = raw.get("tpot_ms") or [], raw.get("sync_ms") or []
    if not tpot_ms and not sync_ms:
        return None
    per_token = report.get("syncs_per_token") or (len(sync_ms) / len(tpot_ms) if tpot_ms else 0)
    skip = WARM_UP_TOKENS - 1 if len(tpot_ms) >= WARM_UP_TOKENS else 0
    return Samples(tpot_ms[skip:], sync_ms[round(skip * per_token) :], per_token, warm=skip > 0)


def pooled(runs: Iterable[dict]) -> Samples | None:
    """All times of some runs of one kind."""
    parts = [samples for samples in map(samples_of, runs) if samples]
    if not parts:
        return None
    tokens, syncs = ([x for part in parts for x in getattr(part, name)] for name in ("tpot_ms", "sync_ms"))
    return Samples(tokens, syncs, max(part.per_token for part in parts), all(part.warm for part in parts))


def percentile(values: list[float], share: float) -> float | None:
    return float(np.percentile(values, share)) if values else None


def p99_name(number: int) -> str:
    """What the 99th percentile of so many samples is: with few it is no more than their maximum."""
    return f"n={number}" if number >= FEW_TOKENS else f"max of {number}"


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of pairs: the median, the extremes, and from `ENOUGH_PAIRS` on the 95 % interval of the geometric mean (Student's t)."""

    median: float
    low: float
    high: float
    pairs: int
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, ratios: list[float]) -> "Ratio":
        interval, count = None, len(ratios)
        if count >= ENOUGH_PAIRS:
            logs = np.log(ratios)
            width = T_975[min(count - 1, max(T_975))] * logs.std(ddof=1) / np.sqrt(count)
            interval = float(np.exp(logs.mean() - width)), float(np.exp(logs.mean() + width))
        return cls(float(np.median(ratios)), min(ratios), max(ratios), count, interval)

    def __str__(self) -> str:
        interval = f", 95 %: {self.interval[0]:.3f} .. {self.interval[1]:.3f}" if self.interval else ""
        return f"{self.median:.2f}" + (f" ({self.low:.2f} .. {self.high:.2f}{interval})" if self.pairs > 1 else " (1 pair)")


def pairwise(runs: Iterable[dict], others: Iterable[dict], value: Callable[[dict], float | None]) -> Ratio | None:
    """value(run) / value(other) for the runs and others of the same repeat; None without a pair."""
    by_repeat = {run["repeat"]: value(run) for run in others}
    pairs = [(value(run), by_repeat.get(run["repeat"])) for run in runs]
    ratios = [mine / other for mine, other in pairs if mine and other]
    return Ratio.of(ratios) if ratios else None


def token_ms(run: dict) -> float | None:
    samples = samples_of(run)
    return samples.token_ms if samples else None


@dataclass(frozen=True, slots=True)
class Identity:
    """Whether runs that must have written the same text did."""

    ranks: int
    wire: str
    placement: str
    runs: int
    common: int  # tokens compared
    same: bool

    def __str__(self) -> str:
        what = f"{self.ranks} ranks, {self.wire}, placement {self.placement}"
        if self.runs < 2:
            return f"{what}: a single run, nothing to compare"
        verdict = (
            f"the same first {self.common} token ids" if self.same else f"DIFFERENT token ids within the first {self.common}"
        )
        return f"{what}: {self.runs} runs, {verdict}"


def _is_exact(report: dict) -> bool:
    """Strict, or relaxed with nothing late."""
    ledger = report.get("ledger") or {}
    return report["sync"]["mode"] == "strict" or ledger.get("deferred") == {} and ledger.get("substituted") == 0


def identities(runs: Iterable[dict]) -> list[Identity]:
    """Of exact runs: those of the same model, ranks, wire format and placement must agree as far as both go."""
    alike = defaultdict(list)
    for run in runs:
        report = run.get("report") or {}
        if report.get("token_ids") and _is_exact(report):
            key = (report["ranks"], report["sync"]["wire"], report["placement"], report["model"]["digest"])
            alike[key].append(report["token_ids"])
    found = []
    for (ranks, wire, placement, _), texts in sorted(alike.items()):
        longest = max(texts, key=len)
        same = all(ids == longest[: len(ids)] for ids in texts)
        common = sorted(map(len, texts))[-2] if len(texts) > 1 else len(longest)
        found.append(Identity(ranks, wire, placement, len(texts), common, same))
    return found
