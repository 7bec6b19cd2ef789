"""What every rank tells of itself at the end, and what becomes of it in the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil

from halo_mpi.wire.exchange import ROOT

if TYPE_CHECKING:
    from halo_mpi.engine.session import Session


def last_words(session: Session) -> dict:
    """What a rank tells of itself at the end."""
    return {
        "rank": session.comm.rank,
        "host": session.host,
        **session.weights.to_dict(),
        "rss_bytes": psutil.Process().memory_info().rss,
        "compute_s": (session.root or session.worker).compute_s,
        "paced": session.marks.current_pace(),
    }


def device_of(session: Session, rank: int, measured: dict | None) -> dict:
    """One entry of the report's devices: `speed` in GB/s of weights (None if work has moved), `compute_ms` per token computed (a lab's
    pace included); None where a rank that is gone did not tell."""
    if not measured:
        measured = dict.fromkeys(last_words(session)) | {"rank": rank, "host": session.hosts[rank]}
    tokens, compute_s = max(1, session.root.computed_tokens), measured.pop("compute_s")
    plan = session.root.mover.plan
    return {
        **measured,
        "groups": int((plan.ffn == rank).sum()),
        "heads": int((plan.query == rank).sum()),
        "head_rows": session.head_rows[rank],
        "speed": round(measured["weights_bytes"] * tokens / compute_s / 1e9, 3)
        if compute_s and not session.root.mover.number
        else None,
        "rtt_ms": session.link.peers[rank].rtt_ms if rank != ROOT else 0.0,
        "copies": session.link.copies.get(rank, 1),
        "late_rate": round(session.root.ledger.late_rate(rank), 6),
        "sent_bytes": session.link.received_bytes.get(rank, sum(session.link.sent_bytes.values())),
        "received_bytes": session.link.sent_bytes.get(rank, sum(session.link.received_bytes.values())),
        "compute_ms": None if compute_s is None else round(compute_s * 1e3 / tokens, 3),
        "state": "lost" if compute_s is None else session.root.crew.state(rank),
    }
