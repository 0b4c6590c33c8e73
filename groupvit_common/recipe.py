"""Settings of a training run, and what follows from them as pure functions that both backends' loops use.

A run is a frozen record with a name in `RECIPES`; a variant of it is `dataclasses.replace(recipe, ...)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from groupvit_common.config import GroupViTConfig
from groupvit_common.errors import InputError

Objective = Literal["groups", "paper"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run on captioned scenes.

    Data: `levels`, one a step, in the order of `turns`, which starts again; `scenes_per_level` scenes of `image_size` pixels a side, made from `seed`;
    held-out scenes are made from `held_out_seed`, `held_out_scenes` a level. `templates`: one is drawn each step for all
    prompts. `vocab_size` of the tokenizer learnt from the captions.

    Objective "groups" trains groups against the batch's prompts (`loss.py` of a backend), beyond the paper:
    `naming_weight` patch naming, `claim_weight` prompt claims by `claim_patches` patches each; `ungrouped_weight` the same two
    for the patches themselves, as they enter the grouping block; `mixed_share` of each batch is mixed, part of one picture
    beside part of another, each patch answering to its own caption.
    Objective "paper" is the paper's: contrastive of the pooled image and its caption, plus multi-label contrastive with
    `paper_prompts` prompts a caption.

    Grouping: soft until the share `hard_from` of the steps, then hard with straight-through gradients; `gumbel` adds the
    paper's noise.

    Start: the model's own initial values, but position embeddings of waves with `position_amplitude` (0: the model's own).

    Optimiser: AdamW, `learning_rate` after `warmup_steps` of linear rise, then a cosine to `final_rate` of it, over `steps`
    steps of `batch_size` images; `weight_decay` by `decays`; gradients clipped to the norm `clip_norm`; the saved weights
    are an exponential mean with decay `ema_decay` (0: the last weights).
    """

    seed: int = 0
    held_out_seed: int = 1_000_003
    levels: tuple[int, ...] = (1, 2, 3)
    turns: tuple[int, ...] = (1, 2, 3, 2)
    scenes_per_level: int = 15_000
    held_out_scenes: int = 200
    image_size: int = 64
    vocab_size: int = 640
    templates: tuple[str, ...] = ("{}", "a {}", "a {} object", "a photo of a {}.", "a picture of {}.")

    # The model: one grouping block.
    patch_size: int = 4
    width: int = 128
    heads: int = 2
    mlp_ratio: int = 2
    depths: tuple[int, int] = (2, 0)
    groups: int = 32
    text_width: int = 64
    text_layers: int = 1
    embedding: int = 64
    projection_width: int = 256
    initializer_range: float = 0.08

    objective: Objective = "groups"
    naming_weight: float = 1.0
    claim_weight: float = 1.0
    claim_patches: int = 12
    ungrouped_weight: float = 1.0
    mixed_share: float = 0.5
    paper_prompts: int = 3
    hard_from: float = 1.0
    gumbel: bool = False

    position_amplitude: float = 0.7
    steps: int = 7500
    batch_size: int = 24
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    final_rate: float = 0.01
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    bfloat16: bool = True

    def __post_init__(self) -> None:
        if min(self.seed, self.held_out_seed) < 0:
            raise InputError(f"seeds must not be negative, got {self.seed} and {self.held_out_seed}")
        for name in ("steps", "batch_size", "scenes_per_level", "held_out_scenes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_steps < self.steps:
            raise InputError(f"warmup_steps must be fewer than steps, got {self.warmup_steps} of {self.steps}")
        if self.batch_size < 4:
            raise InputError(
                f"batch_size must be at least 4 (batch norm and mixing need company), got {self.batch_size}"
            )
        if not self.turns or set(self.turns) != set(self.levels):
            raise InputError(f"turns must name every one of the levels {self.levels} and no other, got {self.turns}")
        if self.seed == self.held_out_seed:
            raise InputError(f"seed {self.seed} is the seed of the held-out scenes; choose another")
        for name in ("hard_from", "mixed_share", "final_rate", "ema_decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")


def model_config(recipe: Recipe, vocab_size: int, max_length: int) -> GroupViTConfig:
    """The model that a recipe trains. `vocab_size`, `max_length`: of its tokenizer, whose last id ends a text."""
    text: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": recipe.text_width,
        "intermediate_size": recipe.text_width * 2,
        "num_hidden_layers": recipe.text_layers,
        "num_attention_heads": max(recipe.text_width // 32, 1),
        "max_position_embeddings": max_length,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }
    vision: dict[str, Any] = {
        "hidden_size": recipe.width,
        "intermediate_size": recipe.width * recipe.mlp_ratio,
        "depths": list(recipe.depths),
        "num_hidden_layers": sum(recipe.depths),
        "num_group_tokens": [recipe.groups, 0],
        "num_output_groups": [recipe.groups, recipe.groups],
        "num_attention_heads": recipe.heads,
        "image_size": recipe.image_size,
        "patch_size": recipe.patch_size,
        "initializer_range": recipe.initializer_range,
        "assign_mlp_ratio": [0.5, recipe.mlp_ratio],
    }
    return GroupViTConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=recipe.embedding,
        projection_intermediate_dim=recipe.projection_width,
        logit_scale_init_value=math.log(10.0),
        # Kept in config.json for `Segmenter`: masks are best made in the way that was trained.
        segmentation_assignment="hard" if assigns_hard(recipe, recipe.steps - 1) else "soft",
    )


def wave_positions(side: int, width: int, amplitude: float) -> NDArray[np.float32]:
    """Starting values for position embeddings of a square grid, float32 `[side * side, width]`.

    Sines and cosines of the row and of the column (Vaswani et al. 2017, in two dimensions), wavelengths 3 to 40 patches: near
    patches are alike from the start, so that attention finds neighbours without having to learn first who they are.
    """
    if width % 4:
        raise InputError(f"wave positions need a width that is a multiple of 4, got {width}")
    frequency = 2 * np.pi / np.geomspace(3.0, 40.0, width // 4)
    row, column = np.divmod(np.arange(side * side), side)
    waves = [wave(axis[:, None] * frequency) for axis in (row, column) for wave in (np.sin, np.cos)]
    return (amplitude * np.concatenate(waves, axis=1)).astype(np.float32)


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """Learning rate of step 0 .. steps - 1: linear warm-up, then a cosine down to `final_rate` of the peak."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(recipe.steps - recipe.warmup_steps, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return recipe.learning_rate * (recipe.final_rate + (1.0 - recipe.final_rate) * cosine)


def decays(name: str, dimensions: int) -> bool:
    """Whether weight decay applies to a parameter: to matrices and filters; not to biases, norms, positions, tokens, scale."""
    spared = ("position_embedding", "group_token", "token_embedding", "logit_scale")
    return dimensions > 1 and not any(word in name for word in spared)


def mean_decay_at(recipe: Recipe, step: int) -> float:
    """What the mean of the weights keeps of itself at this step: `ema_decay`, less in the first steps, none in the very first."""
    return min(recipe.ema_decay, step / (step + 10))


def assigns_hard(recipe: Recipe, step: int) -> bool:
    """Whether patches belong to one group each at this step."""
    return step >= recipe.hard_from * recipe.steps


_DEMO = Recipe()

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "scenes-demo": _DEMO,
        "scenes-paper": Recipe(objective="paper", gumbel=True, hard_from=0.0, mixed_share=0.0, position_amplitude=0.0),
    }
)
"""Named runs. "scenes-demo" made the bundled model; "scenes-paper" is the paper's own objective on the same scenes."""


def get_recipe(name: str) -> Recipe:
    """A named run; `InputError` lists the names there are."""
    if name not in RECIPES:
        raise InputError(f"no recipe called {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]
