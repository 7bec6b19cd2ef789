"""A worker's request loop: stateless but for its weights and the KV cache of its heads."""

import time
from dataclasses import dataclass

import torch

from halo_mpi.errors import HaloError
from halo_mpi.model.llama import Share
from halo_mpi.wire.messages import Kind
from halo_mpi.wire.worker_link import WorkerLink


@dataclass(slots=True)
class Served:
    """What a worker did until the root said stop."""

    compute_s: float = 0.0


def serve(link: WorkerLink, share: Share) -> Served:
    """Answer requests until the root says stop."""
    served = Served()
    for request in link.requests():
        begin = time.perf_counter()
        layer, position = int(request.header["layer"]), int(request.header["position"])
        x = torch.from_numpy(request.read())
        if request.header["kind"] == Kind.ATTENTION:
            y = share.attention(layer, x, position)
        elif request.header["kind"] == Kind.FFN:
            y = share.ffn(layer, x)
        else:
            raise HaloError(
                f"the root sent a request of unknown kind {request.header['kind']}; do all ranks run the same version?"
            )
        served.compute_s += time.perf_counter() - begin
        link.answer(request, y.numpy())
    return served
