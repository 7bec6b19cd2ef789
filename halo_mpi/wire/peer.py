"""A worker as the root knows it by its messages."""

from dataclasses import dataclass, field

import numpy as np

from halo_mpi.wire.deadline import Deadline


@dataclass(frozen=True, slots=True)
class Answer:
    """A worker's partial sum y, f32 [rows, width]; the seconds that it computed, and since it was asked.

    `unseen_s`: of these, those before it was found in which the root did not look: it may have come so much earlier.
    """

    rank: int
    seq: int
    y: np.ndarray
    took_s: float
    latency_s: float
    unseen_s: float


@dataclass(slots=True)
class Peer:
    """What the root knows of a worker. Times are the waiter's, in seconds."""

    rank: int
    deadline: Deadline
    asked_seq: int = 0
    answered_seq: int = 0
    settled_seq: int = 0  # answers to requests up to this one are not wanted, and may come
    heard_at: float = 0.0
    suspect: bool = False  # missed a deadline and was not heard since
    kicks_in_flight: int = 0
    probed_since: float = 0.0  # a kick is in flight
    kick_at: float = 0.0
    replays: int = 0  # and refills, that it has not done yet
    replayed_at: float = 0.0  # the last one was done
    rtt_ms: float = 0.0
    judged_from: int = 0  # the first seq whose answer tells how long answers take
    prepared: int | None = None  # the last plan for which it has said that it is ready, or cannot be
    refusal: str = ""  # why it cannot be
    probed_at: float | None = None  # a probe is under way
    probe: Answer | None = None  # what came of the last one
    asked_at: dict[int, float] = field(default_factory=dict)  # by seq, of what is not answered yet
    took_s: dict[int, float] = field(default_factory=dict)  # by kind: computing the last answer, per row
