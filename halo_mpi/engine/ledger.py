"""What became of every partial sum after prefill."""

from array import array
from collections import Counter
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
    inexact: array = field(default_factory=lambda: array("f"))
    sync_ms: array = field(default_factory=lambda: array("f"))  # 4 bytes each: 1 MB in half an hour
    late: Counter[int] = field(default_factory=Counter)  # by worker, as the rest
    asked_of: Counter[int] = field(default_factory=Counter)
    deferred_of: Counter[int] = field(default_factory=Counter)
    substituted_of: Counter[int] = field(default_factory=Counter)

    def ask(self, rank: int) -> None:
        self.asked += 1
        self.asked_of[rank] += 1

    def missed_deadline(self, rank: int) -> None:
        self.late[rank] += 1

    def correct(self, rank: int, lag: int) -> None:
        self.deferred[lag] = self.deferred.get(lag, 0) + 1
        self.deferred_of[rank] += 1

    def substitute(self, rank: int) -> None:
        self.substituted += 1
        self.substituted_of[rank] += 1

    def give_up_token(self) -> None:
        """What was asked for and did not come does not count: the token is computed again."""
        self.asked = self.partial_sums

    def late_rate(self, rank: int) -> float:
        """The share of a worker's partial sums that came after the deadline, or never."""
        return self.late[rank] / max(1, self.asked_of[rank])

    @property
    def partial_sums(self) -> int:
        return self.on_time + self.waited + sum(self.deferred.values()) + self.substituted

    def to_dict(self) -> dict:
        """The report's `ledger`."""
        counts = {name: getattr(self, name) for name in ("partial_sums", "on_time", "waited", "substituted", "discarded_late")}
        counts["deferred"] = {str(lag): self.deferred[lag] for lag in sorted(self.deferred)}
        counts["inexact_importance"] = round(sum(self.inexact) / len(self.inexact), 6) if self.inexact else 0.0
        return counts
