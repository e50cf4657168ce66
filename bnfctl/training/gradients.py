"""Gradients between the backward passes and the optimizer: over ranks, and clipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bnfctl.training.world import World

BUCKET = 1 << 26
"""Numbers per all-reduce: 256 MiB of float32."""


def reduce(parameters: Sequence[nn.Parameter], world: World, sharded: bool) -> None:
    """Sum the gradients of all ranks, in place; FSDP2 has done it already where parameters are sharded.

    One pass after the last backward, in buckets of parameters in their order: the same sums in the same order on every
    step and after every resume.  A parameter that had no part in a step on this rank counts as 0.
    """
    if sharded or world.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    bucket: list[Tensor] = []
    for parameter in parameters:
        assert parameter.grad is not None
        bucket.append(parameter.grad)
        if sum(grad.numel() for grad in bucket) >= BUCKET:
            _sum(bucket, world)
            bucket = []
    if bucket:
        _sum(bucket, world)


def _sum(bucket: list[Tensor], world: World) -> None:
    flat = world.sum(torch.cat([grad.flatten() for grad in bucket]))
    start = 0
    for grad in bucket:
        grad.copy_(flat[start : start + grad.numel()].view_as(grad))
        start += grad.numel()


def clip(parameters: Sequence[nn.Parameter], largest: float) -> float:
    """The norm of all gradients together, which is brought down to `largest` (0: left alone)."""
    with_grad = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_grad if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if largest:
        torch.nn.utils.clip_grads_with_norm_(with_grad, largest, norm)
    return float(norm)
