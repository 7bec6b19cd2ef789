"""What became of every partial sum after prefill."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Ledger:
    """Each partial sum ends in exactly one of: on_time, waited, deferred (by lag), substituted.

    waited: came after the deadline and was waited for. Lag: the number of later syncs whose input lacked it. `inexact` has one
    number per token: the share of the token's work that was deferred or substituted.
    """

    asked: int = 0
    on_time: int = 0
    waited: int = 0
    deferred: dict[int, int] = field(default_factory=dict)
    substituted: int = 0
    discarded_late: int = 0
    inexact: list[float] = field(default_factory=list)
    sync_ms: list[float] = field(default_factory=list)
    late: dict[int, int] = field(default_factory=dict)  # by worker
    asked_of: dict[int, int] = field(default_factory=dict)

    def ask(self, rank: int) -> None:
        self.asked += 1
        self.asked_of[rank] = self.asked_of.get(rank, 0) + 1

    def missed_deadline(self, rank: int) -> None:
        self.late[rank] = self.late.get(rank, 0) + 1

    def correct(self, lag: int) -> None:
        self.deferred[lag] = self.deferred.get(lag, 0) + 1

    def late_rate(self, rank: int) -> float:
        """The share of a worker's partial sums that came after the deadline, or never."""
        return self.late.get(rank, 0) / max(1, self.asked_of.get(rank, 0))

    @property
    def partial_sums(self) -> int:
        return self.on_time + self.waited + sum(self.deferred.values()) + self.substituted

    def to_dict(self) -> dict:
        """The report's `ledger`."""
        counts = {name: getattr(self, name) for name in ("partial_sums", "on_time", "waited", "substituted", "discarded_late")}
        counts["deferred"] = {str(lag): self.deferred[lag] for lag in sorted(self.deferred)}
        counts["inexact_importance"] = round(sum(self.inexact) / len(self.inexact), 6) if self.inexact else 0.0
        return counts
