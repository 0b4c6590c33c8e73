"""Cached features (`run.chunk_size`; Gao et al. 2021): a whole batch's gradients with a chunk in the towers at a time.

Activations in memory are one chunk's, kept for as long as its own gradient takes. `groupvit_tf.chunks` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from groupvit_torch.data import Inputs, Tokens
from groupvit_torch.objective import Features, Objective, Replay

RandomState = list[Tensor]  # the CPU's, and of a GPU its own
Chunk = TypeVar("Chunk")


def cached_backward(
    objective: Objective,
    inputs: Inputs,
    chunk: int,
    hard: bool,
    wrapped: nn.Module | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Computes a batch's loss and gradients with the towers' activations of `chunk` images in memory at a time.

    Three passes ("GradCache"): the features of all chunks without gradients; the loss of all of them and its gradient
    with respect to each; every chunk once more, from the random state it had before, for the parameters' gradients.
    Batch norm is in the projections, which come after the features and see all of them, in the second pass only. So
    nothing is approximate.

    Args:
        wrapped: `objective` in data-parallel training.

    Returns:
        The loss, and the soft assignments of the first chunk.
    """
    chunks, device = split_rows(objective, inputs, chunk), inputs.pixels.device
    assignments: tuple[Tensor, ...] = ()

    def encode(part: tuple[str, Tensor | Tokens]) -> Features:
        nonlocal assignments
        features, own = objective.encode(*part, hard)
        assignments = assignments or own
        return features

    def surrogate(number: int, gradients: Features) -> Tensor:
        # Data-parallel training waits for the gradient of every parameter, also of those that are complete.
        last = wrapped is not None and number + 1 == len(chunks)
        module = cast(nn.Module, wrapped) if last else objective
        return cast(Tensor, module(None, hard, Replay(*chunks[number], gradients, last))[0])

    encoded = encode_chunks(encode, chunks, device)
    leaves = encoded.together()
    loss = objective.compute_loss(objective.embed(leaves, inputs), inputs)
    (loss if scaler is None else scaler.scale(loss)).backward()
    backward_chunks(surrogate, encoded, {name: leaf.grad for name, leaf in leaves.items()}, device)
    return loss.detach(), assignments


def split_rows(objective: Objective, inputs: Inputs, chunk: int) -> list[tuple[str, Tensor | Tokens]]:
    """Splits a batch into chunks of `chunk` images, or of as many texts as there are to so many images."""
    chunks: list[tuple[str, Tensor | Tokens]] = []
    for kind, rows in objective.rows(inputs).items():
        if isinstance(rows, Tensor):
            chunks += [(kind, part) for part in rows.split(chunk)]
            continue
        texts = len(rows["input_ids"])
        size = texts if inputs.shared_prompts and kind == "prompts" else chunk * texts // len(inputs.pixels)
        split = {name: tensor.split(max(size, 1)) for name, tensor in rows.items()}
        chunks += [(kind, dict(zip(split, parts, strict=True))) for parts in zip(*split.values(), strict=True)]
    return chunks


class Encoded(NamedTuple):
    """The features of each chunk `[n, ...]`, without gradients, and the random state before each."""

    features: list[Features]
    states: list[RandomState]

    def together(self) -> Features:
        """Returns the features of all chunks `[N, ...]`, as leaves of a new graph."""
        names = dict.fromkeys(name for features in self.features for name in features)
        parts = {name: [features[name] for features in self.features if name in features] for name in names}
        return {name: torch.cat(tensors).requires_grad_() for name, tensors in parts.items()}


@torch.no_grad()
def encode_chunks(encode: Callable[[Chunk], Features], chunks: Sequence[Chunk], device: torch.device) -> Encoded:
    """Takes every chunk through its tower, one after the other; nothing but the features is kept."""
    encoded = Encoded([], [])
    for chunk in chunks:
        encoded.states.append(random_state(device))
        encoded.features.append(encode(chunk))
    return encoded


def backward_chunks(
    surrogate: Callable[[int, Features], Tensor],
    encoded: Encoded,
    gradients: Mapping[str, Tensor | None],
    device: torch.device,
) -> None:
    """Adds to the parameters' gradients what flows through each chunk, which meets the noise of its first pass again.

    Args:
        surrogate: number of a chunk, gradients `[n, ...]` of its features -> the scalar whose gradient carries them on.
        gradients: of the features `[N, ...]` of all chunks; None for one that no loss uses.
    """
    after, used = random_state(device), dict.fromkeys(gradients, 0)
    for number, (features, state) in enumerate(zip(encoded.features, encoded.states, strict=True)):
        own: Features = {}
        for name, feature in features.items():
            begin, used[name] = used[name], used[name] + len(feature)
            gradient = gradients[name]
            if gradient is not None:
                own[name] = gradient[begin : used[name]]
        set_random_state(state, device)
        loss = surrogate(number, own)
        if loss.requires_grad:
            loss.backward()
    set_random_state(after, device)


def random_state(device: torch.device) -> RandomState:
    """Returns the generators' states: the CPU's, and that of a GPU."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    """Sets the generators to `random_state`'s states."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
