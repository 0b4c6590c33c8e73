"""What several ranks (`torch.distributed`) do together. Alone, everything here is the identity.

The model knows one device; losses look across ranks, through these functions. All carry gradients. They have an effect once
`torch.distributed.init_process_group` was called with company.
"""

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import nn as collectives


def num_replicas() -> int:
    """How many ranks compute together; 1 outside a process group."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def gather(x: Tensor) -> Tensor:
    """`[B, ...]` of every rank, one after the other: `[ranks * B, ...]`, the same on each of them."""
    if num_replicas() == 1:
        return x
    return torch.cat(collectives.functional.all_gather(x.contiguous()))


def replica_sum(x: Tensor) -> Tensor:
    """The sum over the ranks, the same on each of them."""
    if num_replicas() == 1:
        return x
    return collectives.functional.all_reduce(x)
