"""Where the time per token goes as ranks are added: computing and the rest, and the cost model's line through the rest."""

from dataclasses import dataclass

import numpy as np

from bench.stats import percentile, samples_of, token_ms


@dataclass(frozen=True, slots=True)
class Split:
    """Of a time per token in ms: means over the runs of one number of ranks."""

    ranks: int
    tpot_ms: float
    compute_ms: float  # of the slowest rank
    syncs: float  # per token

    @property
    def rest_ms(self) -> float:
        return self.tpot_ms - self.compute_ms


def split(runs: list[dict]) -> Split | None:
    ended = [run for run in runs if run["status"] == "ok" and samples_of(run)]
    if not ended:
        return None
    compute_ms = np.mean([max(device["compute_ms"] for device in run["report"]["devices"]) for run in ended])
    syncs = samples_of(ended[0]).per_token
    return Split(ended[0]["ranks"], float(np.mean([token_ms(run) for run in ended])), float(compute_ms), syncs)


def explanation(one: Split, many: Split) -> str:
    """In a sentence, why so many devices are faster than one, or are not."""
    saved, added = one.compute_ms - many.compute_ms, many.rest_ms - one.rest_ms
    verdict = "beat" if many.tpot_ms < one.tpot_ms else "do not beat"
    return (
        f"{many.ranks} devices {verdict} 1 ({many.tpot_ms:.0f} and {one.tpot_ms:.0f} ms): computing takes {saved:.0f} ms less "
        f"({one.compute_ms:.0f} -> {many.compute_ms:.0f}), the rest {added:.0f} ms more, "
        f"{added / many.syncs:.1f} ms for each of {many.syncs:.0f} syncs"
    )


def weak_explanation(one: Split, many: Split) -> str:
    """The same where the work grew with the devices."""
    return (
        f"{many.ranks} devices with {many.ranks} times the work take {many.tpot_ms:.0f} ms, 1 takes {one.tpot_ms:.0f}: "
        f"{many.compute_ms - one.compute_ms:+.0f} ms of computing, {many.rest_ms - one.rest_ms:+.0f} ms of the rest"
    )


@dataclass(frozen=True, slots=True)
class Line:
    """What a sync with n ranks takes beside the longest share, by the cost model: first_ms + further_ms x (n - 2).

    `off_ms`: by how much a measured token is off the line at most; None where two points or fewer leave nothing to be off.
    """

    first_ms: float
    further_ms: float
    off_ms: float | None = None


def fitted(splits: list[Split]) -> Line | None:
    """The line through what was measured, by least squares of times per token; None without one rank and two other numbers of ranks."""
    one, *others = sorted(splits, key=lambda own: own.ranks)
    if one.ranks != 1 or len(others) < 2:
        return None
    terms = np.array([[own.syncs, own.syncs * (own.ranks - 2)] for own in others])
    added = np.array([own.rest_ms - one.rest_ms for own in others])
    found = np.linalg.lstsq(terms, added, rcond=None)[0]
    off_ms = float(np.abs(terms @ found - added).max()) if len(others) > 2 else None
    return Line(float(found[0]), float(found[1]), off_ms)


def planned(runs: list[dict]) -> Line | None:
    """The same as the ranks measured it at their start, the median of some runs."""
    told = [found for run in runs if (found := scheduler_of(run))]
    if not told:
        return None
    first = [each["sync_ms"] + max(device["link_ms"] for device in each["devices"]) for each in told]
    return Line(percentile(first, 50), percentile([each["further_ms"] for each in told], 50))


def scheduler_of(run: dict) -> dict | None:
    """What the scheduler measured and found in a run with `--placement auto`."""
    return (run.get("report") or {}).get("scheduler")
