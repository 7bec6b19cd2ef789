"""Where a calibration lies in a model, and reading it.

    model.h5   group_estimate [layers, groups]   inward, outward [16, hidden], bias [1, hidden]
               head_estimate  [layers, heads]    the same
               importance     [layers, 1]        weight [groups + heads, hidden], bias [1, groups + heads]
               meta, "calibration"               everything that is a number for people, or for the scheduler

Estimates have 8 bits a weight: at hidden 576 a group's is 20 KiB.
"""

from collections.abc import Iterable

import numpy as np

from halo_mpi.model.config import ModelConfig
from halo_mpi.predict.fits import LayerFit, LowRank
from halo_mpi.store.layout import Part, RecordLayout
from halo_mpi.store.reader import ModelStore

KINDS = ("groups", "heads")
DIGITS = 4
TABLES = ("group_estimate", "head_estimate", "importance")


def calibration_tables(config: ModelConfig, rank: int) -> dict[str, tuple[RecordLayout, int, int]]:
    """Record layout, layers and entries of the tables."""
    hidden, sizes = config.hidden, config.groups + config.heads
    estimate = RecordLayout(
        [Part("inward", rank, hidden, "int8"), Part("outward", rank, hidden, "int8"), Part("bias", 1, hidden, "bf16")]
    )
    importance = RecordLayout([Part("weight", sizes, hidden, "f16"), Part("bias", 1, sizes, "f32")])
    return {
        "group_estimate": (estimate, config.layers, config.groups),
        "head_estimate": (estimate, config.layers, config.heads),
        "importance": (importance, config.layers, 1),
    }


def calibration_records(fit: LayerFit) -> dict[str, list[dict[str, np.ndarray]]]:
    """A layer's records: by table, the matrices of each entry."""

    def estimate(fit: LowRank) -> dict[str, np.ndarray]:
        return {"inward": fit.inward, "outward": fit.outward, "bias": fit.bias[None]}

    return {
        "group_estimate": [estimate(own) for own in fit.groups],
        "head_estimate": [estimate(own) for own in fit.heads],
        "importance": [{"weight": fit.weight, "bias": fit.bias[None]}],
    }


def read_estimate(store: ModelStore, table: str, layer: int, entry: int) -> LowRank:
    """The estimate of a group or head, f32."""
    layout, record = store.layout(table), store.read(table, layer, entry)
    return LowRank(layout.unpack(record, "inward"), layout.unpack(record, "outward"), layout.unpack(record, "bias")[0])


def read_importance(store: ModelStore, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight f32 [G + H, D] and bias f32 [G + H] that predict log |output| of a layer's groups, then heads."""
    layout, record = store.layout("importance"), store.read("importance", layer, 0)
    return layout.unpack(record, "weight"), layout.unpack(record, "bias")[0].copy()  # not a view of the whole record


def facts(fits: Iterable[LayerFit], sensitivities: np.ndarray | None) -> dict:
    """What `inspect` shows and the scheduler uses, by layer: of the groups in their new order, and of the heads."""
    found = {kind: {name: [] for name in ("importance", "correlation", "recall", "recovered", "memory")} for kind in KINDS}
    for fit in fits:
        importance = np.split(fit.importance, [len(fit.groups)])
        for index, (kind, columns) in enumerate(found.items()):
            judged = fit.judged
            values = (importance[index], judged.correlation[index], judged.recall[index], getattr(judged, f"{kind}_recovered"),
                      getattr(judged, f"{kind}_memory"))  # fmt: skip
            for column, value in zip(columns.values(), values):
                column.append(np.round(np.asarray(value, float), DIGITS).tolist())
    return {**found, "sensitivity": None if sensitivities is None else np.round(sensitivities, 6).tolist()}
