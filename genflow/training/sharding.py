"""Parameters shared out among the processes of a run (FSDP2), applied to a plain flow; and tensors whole, or our part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import register_dataclass

from genflow.flows.base import Flow, LossOutput
from genflow.flows.bijections.base import Bijection

# FSDP2 of torch 2.10 looks for where a backward begins in such classes alone, and of others leaves gradients as they are.
register_dataclass(LossOutput)


def shard(flow: Flow, network: nn.Module, dtype: torch.dtype) -> Flow:
    """The flow, of whose trained parameters, gradients and optimiser's state each process keeps a part (ZeRO stage 3).

    Rajbhandari et al. 2020 (arXiv 1910.02054); Zhao et al. 2023 (arXiv 2304.11277). Each of network's blocks is gathered
    when it runs, forward and backward, and its gradients are averaged into parts as soon as they are complete; what is
    outside of blocks, and a bijection, is gathered once a step. dtype: in which blocks are gathered, the arithmetic of the
    run; gradients are averaged in float32. Frozen parameters stay whole. Every process calls `sample` and `validate`
    together. To be applied before the optimiser is built, where the parameters of all processes are the same.
    """
    mesh = init_device_mesh(flow.device.type, (dist.get_world_size(),))
    frozen = {p for p in flow.parameters() if not p.requires_grad}
    # Inputs keep their dtype: autocast casts where it is due, and leaves the residual streams and times as they are.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in () if isinstance(network, Bijection) else getattr(network, "blocks", ()):
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    fully_shard(flow, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), ignored_params=frozen)
    for verb in ("sample", "validate", "preview"):
        if hasattr(flow, verb):
            register_fsdp_forward_method(flow, verb)
    return flow


@contextmanager
def unreduced(model: nn.Module) -> Iterator[None]:
    """Forward and backward inside leave the gradients on their ranks, for DDP and FSDP2: of all but the last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    elif isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """A shared-out tensor gathered, on every rank; every rank has to call. Others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """The part of a shared-out tensor that this rank keeps, in the same memory. Others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_shared(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every rank holds, on like's device and shared out as like is."""
    full = full.to(like.device)
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
