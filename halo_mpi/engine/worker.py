"""A worker's request loop: stateless but for its weights and the KV cache of its heads."""

import time

import torch

from halo_mpi.engine.marks import Marks
from halo_mpi.errors import HaloError
from halo_mpi.model.llama import Share
from halo_mpi.wire.messages import Kind
from halo_mpi.wire.worker_link import WorkerLink


def serve(link: WorkerLink, share: Share, marks: Marks, even_shares: dict[Kind, list[float]]) -> float:
    """Answer requests until the root says stop; returns the seconds of computing. `even_shares` is for the lab's pace."""
    compute_s = 0.0
    for request in link.requests():
        begin = time.perf_counter()
        layer, position = int(request.header["layer"]), int(request.header["position"])
        x = torch.from_numpy(request.read())
        kind = int(request.header["kind"])
        if kind == Kind.ATTENTION:
            y = share.attention(layer, x, position)
        elif kind == Kind.FFN:
            y = share.ffn(layer, x)
        else:
            raise HaloError(f"the root sent a request of unknown kind {kind}; do all ranks run the same version?")
        marks.pace(begin, even_shares[kind][layer])
        compute_s += time.perf_counter() - begin
        link.answer(request, y.numpy())
    return compute_s
