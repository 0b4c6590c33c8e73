"""The model that a recipe trains: its configuration, its initial values, which of its parameters are trained."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groupvit_common.checkpoints.directory import CONFIG_NAME, WEIGHTS_NAME, find_weights
from groupvit_common.checkpoints.hub import resolve
from groupvit_common.checkpoints.safetensors_file import read_arrays
from groupvit_common.errors import InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.storage.saving import read_lock
from groupvit_common.training.recipe import ModelSettings, Recipe
from groupvit_common.training.schedule import assigns_hard
from groupvit_common.training.settings import changed

MULTI_LABEL_SCALE = "multi_label_logit_scale"
"""The tensor of the multi-label loss's own temperature, saved beside the model's."""


def model_config(recipe: Recipe, vocab_size: int) -> GroupViTConfig:
    """Returns the configuration of the model that a recipe trains.

    Args:
        vocab_size: of the tokenizer, whose last id ends a text.
    """
    settings = recipe.model
    text: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": settings.text_width,
        "intermediate_size": settings.text_width * settings.text_mlp_ratio,
        "num_hidden_layers": settings.text_layers,
        "num_attention_heads": settings.text_heads,
        "max_position_embeddings": settings.text_length,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }
    vision: dict[str, Any] = {
        "hidden_size": settings.width,
        "intermediate_size": settings.width * settings.mlp_ratio,
        "depths": list(settings.depths),
        "num_hidden_layers": sum(settings.depths),
        "num_group_tokens": [*settings.groups, 0],
        "num_output_groups": [*settings.groups, settings.groups[-1] if settings.groups else 0],
        "num_attention_heads": settings.heads,
        "image_size": settings.image_size,
        "patch_size": settings.patch_size,
        "initializer_range": settings.initializer_range,
        "assign_mlp_ratio": [0.5, settings.mlp_ratio],
    }
    return GroupViTConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=settings.embedding,
        projection_intermediate_dim=settings.projection_width,
        logit_scale_init_value=math.log(settings.logit_scale),
        segmentation_assignment=segmentation_assignment(recipe),
    )


def with_checkpoint_model(recipe: Recipe, config: GroupViTConfig) -> Recipe:
    """Returns a recipe that starts from a checkpoint with the sizes of the checkpoint's model in the place of its own.

    Raises:
        InputError: an image size or an objective that does not fit this model.
    """
    vision, text = config.vision_config, config.text_config
    groups = [after for before, after in zip(vision.num_group_tokens, vision.num_output_groups, strict=True) if before]
    found: dict[str, Any] = {
        "patch_size": vision.patch_size,
        "width": vision.hidden_size,
        "heads": vision.num_attention_heads,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        "depths": list(vision.depths),
        "groups": groups,
        "text_width": text.hidden_size,
        "text_heads": text.num_attention_heads,
        "text_layers": text.num_hidden_layers,
        "text_mlp_ratio": text.intermediate_size / text.hidden_size,
        "text_length": text.max_position_embeddings,
        "embedding": config.projection_dim,
        "projection_width": config.projection_intermediate_dim,
        "vocab_size": text.vocab_size,
    }
    # A ratio that is not whole, which no recipe makes, stays the recipe's.
    known = {f"model.{name}": value for name, value in found.items() if isinstance(value, list) or value == int(value)}
    size, source = recipe.model.image_size, recipe.model.init_from
    if size % vision.patch_size:
        raise InputError(
            f"model.image_size must be a multiple of the {vision.patch_size} pixels of a patch of {source}, got {size}"
        )
    if recipe.objective.kind == "groups" and len(groups) != 1:
        raise InputError(
            f"the objective 'groups' trains one grouping block, and {source} has {len(groups)} "
            f"({', '.join(map(str, groups))} groups): use kind=paper"
        )
    return changed(recipe, known)


def segmentation_assignment(recipe: Recipe) -> str:
    """Returns "hard" or "soft", the assignment at the end of training; `Segmenter` reads it in config.json."""
    return "hard" if assigns_hard(recipe, recipe.schedule.total_steps - 1) else "soft"


def wave_positions(side: int, width: int, amplitude: float) -> NDArray[np.float32]:
    """Returns initial position embeddings of a square grid, float32 `[side * side, width]`.

    Sines and cosines of the row and of the column (Vaswani et al. 2017, in two dimensions), wavelengths 3 to 40
    patches: near patches are alike from the start, so that attention need not learn first which patches are neighbours.
    """
    if width % 4:
        raise InputError(f"wave positions need a width that is a multiple of 4, got {width}")
    frequency = 2 * np.pi / np.geomspace(3.0, 40.0, width // 4)
    row, column = np.divmod(np.arange(side * side), side)
    waves = [wave(axis[:, None] * frequency) for axis in (row, column) for wave in (np.sin, np.cos)]
    return (amplitude * np.concatenate(waves, axis=1)).astype(np.float32)


def multi_label_scale(source: str) -> float | None:
    """Returns the logarithm of the multi-label loss's factor of a checkpoint that training wrote; else None."""
    files = (CONFIG_NAME, WEIGHTS_NAME)
    with read_lock(resolve(source, patterns=files, required=files)) as directory:
        for path, names in find_weights(directory).files.items():
            if MULTI_LABEL_SCALE in names:
                return float(dict(read_arrays(path, [MULTI_LABEL_SCALE]))[MULTI_LABEL_SCALE])
    return None


def trainable_names(names: Collection[str], settings: ModelSettings) -> set[str]:
    """Returns those of these parameters that `model.freeze` and `model.train_only` leave trainable.

    Raises:
        InputError: a pattern that fits no parameter, or nothing is left.
    """
    for pattern in (*settings.freeze, *settings.train_only):
        if not any(matches(pattern, name) for name in names):
            parts = sorted({name.split(".")[0] for name in names})
            raise InputError(
                f"no parameter is called {pattern!r}; there are those of {', '.join(parts)}, and parts of them such as "
                "group_token"
            )

    def fits(patterns: Iterable[str], name: str) -> bool:
        return any(matches(pattern, name) for pattern in patterns)

    if settings.train_only:
        return {name for name in names if fits(settings.train_only, name)}
    found = {name for name in names if not fits(settings.freeze, name)}
    if not found:
        raise InputError(f"model.freeze leaves nothing to train: {list(settings.freeze)}")
    return found


def matches(pattern: str, name: str) -> bool:
    """Returns whether consecutive components of a tensor's name are the pattern: "text_model", "encoder.stages.0"."""
    return f".{pattern.strip('.')}." in f".{name}."
