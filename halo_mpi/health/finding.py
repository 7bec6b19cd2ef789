"""What a check found on a host, or about all of them."""

from dataclasses import asdict, dataclass

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """`level`: ERROR, a run would fail; WARNING, it would be slower or survive less; OK. `do`: what to do, one line; empty if OK.
    `host`: empty if it is about all."""

    check: str
    level: str
    says: str
    do: str = ""
    host: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)
