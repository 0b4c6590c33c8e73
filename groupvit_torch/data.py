"""Batches as tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from groupvit_common.model.text_length import TOKEN_STEP
from groupvit_common.training.scene_batches import Batch

if TYPE_CHECKING:
    from groupvit_common.data.captions.stream import CaptionBatch
    from groupvit_common.training.run import Stream

Tokens = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of one step on one rank, whatever the data: B images, P patches, W prompts.

    pixels: `[B, 3, H, W]`; captions: tokens `[B, T]`; prompts: tokens `[W, T]`; of_caption: int64 `[B, M]`, which M of
    the prompts are each caption's. allowed, named: see `groupvit_common.training.scene_batches.Batch`. shared_prompts:
    whether all ranks have the same prompts, each once; else each caption has its own.
    """

    pixels: Tensor
    captions: Tokens | None
    prompts: Tokens | None
    of_caption: Tensor | None
    allowed: Tensor | None = None
    named: Tensor | None = None
    shared_prompts: bool = False

    @classmethod
    def of(cls, batch: Batch[NDArray[Any]] | CaptionBatch, device: torch.device | str = "cpu") -> Inputs:
        """Returns a batch of scenes or of captioned images, on a device."""
        if not isinstance(batch, Batch):
            prompts, of_caption = None, None
            if batch.prompt_ids is not None and batch.prompt_mask is not None:
                count, each, length = batch.prompt_ids.shape
                flat = (array.reshape(count * each, length) for array in (batch.prompt_ids, batch.prompt_mask))
                prompts = _trimmed(*(torch.from_numpy(array) for array in flat))
                of_caption = torch.arange(count * each).reshape(count, each)
            captions = _trimmed(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask))
            inputs = cls(torch.from_numpy(batch.pixel_values), captions, prompts, of_caption)
        else:
            tensors = batch.map(torch.from_numpy)
            inputs = cls(
                tensors.pixels,
                tensors.captions,
                tensors.prompts,
                tensors.of_caption,
                tensors.allowed,
                tensors.named,
                shared_prompts=True,
            )
        return inputs.to(device)

    def to(self, device: torch.device | str) -> Inputs:
        """On a device; to a GPU, the copy overlaps with what it computes."""
        cuda = torch.device(device).type == "cuda"

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return (value.pin_memory() if cuda else value).to(device, non_blocking=cuda)
            return {name: move(tokens) for name, tokens in value.items()} if isinstance(value, Mapping) else value

        return replace(self, **{field.name: move(getattr(self, field.name)) for field in fields(self)})

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as NumPy arrays, tokens as "captions.input_ids" and so on."""
        found: dict[str, NDArray[Any]] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found[field.name] = value.cpu().numpy()
            elif isinstance(value, Mapping):
                found |= {f"{field.name}.{name}": tokens.cpu().numpy() for name, tokens in value.items()}
        return found


def _trimmed(input_ids: Tensor, attention_mask: Tensor) -> Tokens:
    """Returns texts without the padding that all have. A text's state at its end does not depend on what follows."""
    longest = int(attention_mask.sum(dim=1).max())
    length = min(-(-longest // TOKEN_STEP) * TOKEN_STEP, input_ids.shape[1])
    return {"input_ids": input_ids[:, :length], "attention_mask": attention_mask[:, :length]}


class Feed:
    """A stream's batches, prepared for the device; the next one may be fetched while a step is computed.

    Args:
        prepare: what is done to a batch, such as moving it to the device.
    """

    def __init__(self, stream: Stream, prepare: Callable[[Any], Any]) -> None:
        self.stream = stream
        self.batches = iter(stream)
        self.prepare = prepare
        self.ahead: list[Any] = []
        self.before: dict[str, Any] = {}

    def take(self) -> Any:
        """Returns the next batch."""
        return self.ahead.pop() if self.ahead else self.prepare(next(self.batches))

    def look_ahead(self) -> None:
        """Fetches the batch that `take` returns next."""
        if not self.ahead:
            self.before = self.stream.state_dict()
            self.ahead.append(self.prepare(next(self.batches)))

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last batch taken."""
        return self.before if self.ahead else self.stream.state_dict()

    def close(self) -> None:
        """Ends the stream's workers."""
        close = getattr(self.batches, "close", None)
        if close is not None:
            close()
