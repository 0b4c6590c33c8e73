"""A batch that goes through the towers a piece at a time: the first and the last of the three passes of cached features (Gao et al. 2021)
that `groupvit_torch.train.cached_backward` makes with `run.chunk_size`.

What is in memory is one piece's: its activations are kept for as long as its own gradient takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Features = dict[str, Tensor]
RandomState = list[Tensor]  # the CPU's, and of a GPU its own
Piece = TypeVar("Piece")


class Encoded(NamedTuple):
    """The features of each piece `[n, ...]`, without gradients, and the random state before each."""

    features: list[Features]
    states: list[RandomState]

    def together(self) -> Features:
        """The features of all pieces `[N, ...]`, as leaves of a new graph: their gradients are what `carried_back` takes."""
        names = dict.fromkeys(name for features in self.features for name in features)
        parts = {name: [features[name] for features in self.features if name in features] for name in names}
        return {name: torch.cat(tensors).requires_grad_() for name, tensors in parts.items()}


@torch.no_grad()
def encoded(encode: Callable[[Piece], Features], pieces: Sequence[Piece], device: torch.device) -> Encoded:
    """Every piece through its tower, one after the other; nothing but the features is kept."""
    found = Encoded([], [])
    for piece in pieces:
        found.states.append(random_state(device))
        found.features.append(encode(piece))
    return found


def carried_back(
    again: Callable[[int, Features], Tensor],
    passed: Encoded,
    gradients: Mapping[str, Tensor | None],
    device: torch.device,
) -> None:
    """Adds to the parameters' gradients what flows through each piece, which passes again and meets the noise that it has met.

    Args:
        again: the number of a piece and the gradients `[n, ...]` of its features -> the scalar whose gradient carries them on.
        gradients: of the features `[N, ...]` of all pieces; None of one that no loss looks at.
    """
    after, used = random_state(device), dict.fromkeys(gradients, 0)
    for number, (features, state) in enumerate(zip(passed.features, passed.states, strict=True)):
        own: Features = {}
        for name, feature in features.items():
            begin, used[name] = used[name], used[name] + len(feature)
            gradient = gradients[name]
            if gradient is not None:
                own[name] = gradient[begin : used[name]]
        set_random_state(state, device)
        surrogate = again(number, own)
        if surrogate.requires_grad:
            surrogate.backward()
    set_random_state(after, device)


def random_state(device: torch.device) -> RandomState:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
