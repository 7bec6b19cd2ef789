"""The report of a run (`--json`), one object; names and meaning are part of the tool's contract."""

import hashlib
import json
from pathlib import Path

import numpy as np

from halo_mpi import __version__
from halo_mpi.engine.machine import machine_name
from halo_mpi.engine.session import Session
from halo_mpi.errors import HaloError
from halo_mpi.versions import git_revision, mpi_name

SCHEMA = 1


def percentiles(samples: list[float], names: tuple[str, ...]) -> dict[str, float | None]:
    """mean, p50, p95, ... and max of some samples, by name; None where there are none."""
    if not samples:
        return dict.fromkeys(names)
    values = {"mean": float(np.mean(samples)), "max": float(np.max(samples))}
    values |= {name: float(np.percentile(samples, int(name[1:]))) for name in names if name.startswith("p")}
    return {name: round(values[name], 3) for name in names}


def make_report(session: Session, devices: list[dict], prompt_tokens: int, token_ids: list[int], text: str | None,
                ttft_ms: float | None, tpot_ms: list[float], perplexity: float | None = None) -> dict:  # fmt: skip
    """The report of a finished run. `tpot_ms`: one sample per token after the first."""
    run, meta, ledger = session.run, session.store.meta, session.root.ledger
    sync, relaxed = run.sync, run.sync.mode == "relaxed"
    mean = float(np.mean(tpot_ms)) if tpot_ms else None
    report = {
        "schema": SCHEMA,
        "halo_mpi": __version__,
        "git": git_revision(),
        "machine": machine_name(),
        "model": {
            "name": session.config.name,
            "digest": session.store.digest,
            "dtype": meta["dtype"],
            "parameters": session.config.parameters,
        },
        "ranks": session.comm.size,
        "mpi": mpi_name(),
        "kernel": session.kernel.name,
        "isa": session.kernel.isa,
        "threads": session.kernel.threads,
        "cache": session.kernel.sizes.cache_dtype,
        "placement": session.root.mover.plan.name,
        "sync": {
            "mode": sync.mode,
            "wire": sync.wire,
            "max_lag": sync.max_lag if relaxed else 0,
            "quality": sync.quality if relaxed else None,
            "deadline_ms": ("auto" if sync.deadline_ms is None else sync.deadline_ms) if relaxed else None,
            "kick_ms": sync.kick_ms,
            "copies": max(session.link.copies.values(), default=1),
            "trailer": sync.trailer,
            "tuned_sockets": session.tuned_sockets,
        },
        "prompt_tokens": prompt_tokens,
        "generated_tokens": len(token_ids),
        "token_ids": token_ids,
        "token_ids_sha256": hashlib.sha256(np.array(token_ids, "<i4").tobytes()).hexdigest(),
        "text": text,
        "perplexity": perplexity,
        "ttft_ms": None if ttft_ms is None else round(ttft_ms, 3),
        "tpot_ms": percentiles(tpot_ms, ("mean", "p50", "p95", "p99", "max")),
        "sync_ms": percentiles(ledger.sync_ms, ("p50", "p99", "max")),
        "tokens_per_s": round(1e3 / mean, 3) if mean else None,
        "load_s": None if session.load_s is None else round(session.load_s, 3),
        "ledger": ledger.to_dict(),
        "predictor": _predictor(session) if relaxed else None,
        "scheduler": _scheduler(session),
        "devices": devices,
        "events": session.events,
    }
    if run.samples:
        report["samples"] = {
            name: [round(ms, 3) for ms in times] for name, times in (("tpot_ms", tpot_ms), ("sync_ms", ledger.sync_ms))
        }
    return report


def _predictor(session: Session) -> dict:
    """Whether it was calibrated, and what it took: ms per token computed, prompts included."""
    predictor, tokens = session.root.predictor, max(1, session.root.computed_tokens)
    return {"calibrated": predictor.calibrated, "ms_per_token": round(predictor.seconds * 1e3 / tokens, 4)}


def _scheduler(session: Session) -> dict | None:
    """What was measured at the start, and if work may move, how the devices did in the end."""
    replacer = session.root.replacer
    return session.scheduler and {**session.scheduler, "last_seen": replacer.last_seen() if replacer else None}


def write_report(path: Path, report: dict) -> None:
    """Write the report as JSON. Raises HaloError if the file cannot be written."""
    try:
        path.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise HaloError(f"cannot write the report {path}: {error.strerror}") from error
