"""Checks of the models' inputs, with the same messages for every backend.

Shapes may have unknown sides (None) while a backend traces a graph; unknown sides are not checked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeGuard

from groupvit_common.errors import InputError

# Keeps the logarithm of a probability that underflowed finite; far below any probability that matters.
PROBABILITY_FLOOR = 1e-6

if TYPE_CHECKING:
    from groupvit_common.model.config import GroupViTTextConfig, GroupViTVisionConfig

Shape = Sequence[int | None]


def is_number(value: Any) -> TypeGuard[float]:
    """Returns whether a value is a number of Python or NumPy; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole_number(value: Any) -> TypeGuard[int]:
    """Returns whether a value is a whole number, by type: 2.0 is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def given(value: Any, name: str) -> Any:
    """Returns `value`. Raises `InputError` if it is None."""
    if value is None:
        raise InputError(f"{name} is missing: this model needs it")
    return value


def check_pixel_values(shape: Shape, dtype: str, is_floating_point: bool, config: GroupViTVisionConfig) -> None:
    """Raises `InputError` for anything but `[B, C, H, W]` floating point with sides that are multiples of the patch."""
    channels, patch = config.num_channels, config.patch_size
    if len(shape) != 4 or (shape[1] is not None and shape[1] != channels):
        raise InputError(
            f"pixel_values must have shape [batch, {channels}, height, width], got {list(shape)}"
            + ("; add a batch axis" if len(shape) == 3 else "")
            + ("; move the channels to axis 1" if len(shape) == 4 and shape[-1] == channels else "")
        )
    if not is_floating_point:
        raise InputError(f"pixel_values must be floating point, normalised as the image processor does it, got {dtype}")
    height, width = shape[2:]
    if any(side is not None and (not side or side % patch) for side in (height, width)):
        raise InputError(
            f"the sides of an image must be multiples of the patch size {patch}, got {height} x {width} "
            "(height x width); the image processor can resize to such sizes"
        )


def check_grouping(config: GroupViTVisionConfig) -> None:
    """Raises `InputError` for a model without groups, which has nothing to segment by."""
    if not any(config.num_group_tokens):
        raise InputError(
            f"a model without group tokens (num_group_tokens {config.num_group_tokens}) has no segmentation"
        )


def image_sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width) of a size that is given as one number or two. Raises `InputError` for anything else."""
    sides = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(sides) != 2 or not all(type(side) is int for side in sides):
        raise InputError(f"image_size must be an integer or (height, width), got {image_size!r}")
    return sides[0], sides[1]


def check_input_ids(
    shape: Shape, dtype: str, is_integer: bool, mask_shape: Shape | None, config: GroupViTTextConfig
) -> None:
    """Raises `InputError` for anything but integer `[N, T]` with at most as many tokens as positions, and a mask of
    that shape."""
    longest = config.max_position_embeddings
    if len(shape) != 2:
        raise InputError(f"input_ids must have shape [texts, tokens], got {list(shape)}")
    if not is_integer:
        raise InputError(f"input_ids must be integers, got {dtype}")
    if shape[1] is not None and not 1 <= shape[1] <= longest:
        raise InputError(
            f"a text may have 1 to {longest} tokens, got {shape[1]}; let the tokenizer truncate (truncation=True)"
        )
    if mask_shape is not None and (
        len(mask_shape) != 2
        or any(a != b for a, b in zip(shape, mask_shape, strict=True) if a is not None and b is not None)
    ):
        raise InputError(f"attention_mask must have the shape of input_ids, {list(shape)}, got {list(mask_shape)}")


def check_id_range(lowest: int, highest: int, config: GroupViTTextConfig) -> None:
    """Raises `InputError` for ids that the vocabulary does not have."""
    if lowest < 0 or highest >= config.vocab_size:
        raise InputError(
            f"input_ids must lie between 0 and {config.vocab_size - 1}, got {lowest if lowest < 0 else highest}; "
            "do the tokenizer and the model belong together?"
        )


def check_pairs(images: int | None, texts: int | None) -> None:
    """Raises `InputError` for unequal numbers of images and texts."""
    if images is not None and texts is not None and images != texts:
        raise InputError(
            "return_loss compares image i with text i and needs as many images as texts, "
            f"got {images} images and {texts} texts"
        )


def check_batch_norm(rows: int | None) -> None:
    """Raises `InputError` for a batch of one in training: a single row has no variance."""
    if rows == 1:
        raise InputError("batch norm in training needs at least 2 images and 2 texts in a batch, got 1")


def check_keras_backend(name: str) -> None:
    """Raises `InputError` for a backend of Keras that the models do not run on."""
    if name not in ("tensorflow", "jax"):
        raise InputError(
            f"groupvit_tf runs on Keras's backends tensorflow and jax, and Keras is set to {name!r}: set "
            "KERAS_BACKEND=tensorflow in "
            "the environment, or use groupvit_torch"
        )
    if name == "jax" and importlib.util.find_spec("jax") is None:
        raise InputError(
            'Keras is set to JAX, which is not installed: pip install "groupvit[jax]", or set KERAS_BACKEND=tensorflow'
        )


def check_sample_weight(shape: Shape, pairs: int | None) -> None:
    """Raises `InputError` for anything but one weight for each pair, `[pairs]` or `[pairs, 1]`."""
    fits = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
    if not fits or (pairs is not None and shape[0] is not None and shape[0] != pairs):
        raise InputError(
            f"sample_weight must have one number for each of the {pairs or ''} pairs, got shape {list(shape)}"
        )


def noise_per_stage(gumbel_noise: Sequence[Any] | None, groups: Sequence[bool]) -> list[Any]:
    """Returns the noise of every stage, None for those without a grouping block. `groups`: which stages have one."""
    if gumbel_noise is None:
        return [None] * len(groups)
    if len(gumbel_noise) != sum(groups):
        raise InputError(f"gumbel_noise needs one tensor per grouping block ({sum(groups)}), got {len(gumbel_noise)}")
    remaining = iter(gumbel_noise)
    return [next(remaining) if has_block else None for has_block in groups]
