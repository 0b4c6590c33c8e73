"""Operations of several ranks (`torch.distributed`). Alone, everything here is the identity.

The model knows one device; losses cover all ranks, through these functions. All carry gradients. They have an effect
after `torch.distributed.init_process_group`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional as F

from groupvit_common.errors import InputError
from groupvit_torch.checkpoint import usable_device

# One rank may measure the model or write a checkpoint while the others wait.
_PATIENCE = timedelta(hours=2)


def num_replicas() -> int:
    """Returns the number of ranks; 1 outside a process group."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def gather(x: Tensor) -> Tensor:
    """Gathers `[B, ...]` of every rank, in order: `[ranks * B, ...]`, the same on each of them."""
    if num_replicas() == 1:
        return x
    gathered: Tensor = _Gathered.apply(x)
    return gathered


def replica_sum(x: Tensor) -> Tensor:
    """Returns the sum over the ranks, the same on each of them."""
    if num_replicas() == 1:
        return x
    total: Tensor = _Summed.apply(x)
    return total


# PyTorch's own collectives with gradients are deprecated in favour of private ones.


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(num_replicas())]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Returns this rank's part of the gradients of all ranks' losses."""
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total.chunk(num_replicas())[torch.distributed.get_rank()]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total


def batch_norm(norm: nn.BatchNorm1d, x: Tensor, *, together: bool = True, keep: bool = True) -> Tensor:
    """A batch norm over the `[N, C]` inputs of all ranks, that computes on any device.

    Args:
        together: False: over this rank's alone, for inputs that are the same on every rank.
        keep: False: the statistics are used, but not kept by the layer.

    A layer in evaluation mode uses what it has kept, as ever.
    """
    if not norm.training:
        return norm(x)
    if not together or num_replicas() == 1:
        if keep:
            return norm(x)
        return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = replica_sum(torch.cat([wide.sum(dim=0), wide.new_full((1,), len(wide))]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        variance = replica_sum((wide - mean).square().sum(dim=0)) / count
        if keep:
            with torch.no_grad():
                norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
                unbiased = variance * count / (count - 1)
                norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
                norm.num_batches_tracked += 1
        result = (wide - mean) * (variance + norm.eps).rsqrt() * norm.weight + norm.bias
    return result.to(x.dtype)


def project(projection: nn.Sequential, x: Tensor, *, together: bool = True, keep: bool = True) -> Tensor:
    """A model's projection `[N, D]` -> `[N, E]` with its batch norm over all ranks; arguments as in `batch_norm`."""
    first, norm, activation, last = projection
    assert isinstance(norm, nn.BatchNorm1d)
    return last(activation(batch_norm(norm, first(x), together=together, keep=keep)))


@dataclass(frozen=True)
class ProcessInfo:
    """One process of a training: its number, their number, and its device."""

    rank: int
    world: int
    device: torch.device

    def all(self, value: Any) -> list[Any]:
        """Returns the values of every rank, in their order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def mean(self, numbers: list[float]) -> list[float]:
        """Returns the mean over the ranks of each number."""
        if self.world == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        result: list[float] = (tensor / self.world).tolist()
        return result


def rank_device(device: torch.device | str | None = None) -> torch.device:
    """Returns a device, by default the GPU of this process's number on its machine if there is one, else the CPU.

    Raises:
        InputError: there are fewer GPUs than processes, or no such device.
    """
    if device is None and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                "start as many processes"
            )
        device = f"cuda:{local}"
    return usable_device("cpu" if device is None else device)


@contextmanager
def process_group(device: torch.device | str | None = None) -> Iterator[ProcessInfo]:
    """This process among those that `torchrun` started, or alone.

    Args:
        device: None: the GPU of this process's number on its machine if there is one, else the CPU.

    Raises:
        InputError: there are fewer GPUs than processes, or no such device.
    """
    world, rank, _ = (int(os.environ.get(name, number)) for name, number in _ENVIRONMENT)
    chosen = rank_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    if there:
        yield ProcessInfo(torch.distributed.get_rank(), torch.distributed.get_world_size(), chosen)
        return
    if world == 1:
        yield ProcessInfo(0, 1, chosen)
        return
    torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield ProcessInfo(rank, world, chosen)
    finally:
        torch.distributed.destroy_process_group()


# What torchrun tells each process it starts, and what holds without it.
_ENVIRONMENT = (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
