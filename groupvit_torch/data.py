"""Batches as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from groupvit_common.data.captioned import Batch


def tensor_batches(batches: Iterable[Batch[NDArray[Any]]]) -> Iterator[Batch[Tensor]]:
    """The batches of `groupvit_common.data.captioned.batches` (or of `groupvit_common.training.Run`) as tensors."""
    return (batch.map(torch.from_numpy) for batch in batches)
