"""Quantities that follow from a recipe and the step: pure functions that both backends call."""

from __future__ import annotations

import math

from groupvit_common.training.recipe import Recipe


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """Returns the learning rate of step 0 .. steps - 1: linear warm-up, then a cosine down to `final_rate` of the
    peak."""
    schedule, peak = recipe.schedule, recipe.optimizer.learning_rate
    steps, warmup = schedule.total_steps, schedule.total_warmup_steps
    if step < warmup:
        start = peak * schedule.initial_rate
        return start + (peak - start) * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return peak * (schedule.final_rate + (1.0 - schedule.final_rate) * cosine)


def has_weight_decay(name: str, dimensions: int) -> bool:
    """Returns whether weight decay applies to a parameter: to matrices and filters, not to biases, norms, positions,
    tokens and scales."""
    excluded = ("position_embedding", "group_token", "token_embedding", "logit_scale")
    return dimensions > 1 and not any(part in name for part in excluded)


def ema_decay_at(recipe: Recipe, step: int) -> float:
    """Returns the decay of the weights' exponential moving average: `ema_decay`, lower in the first steps, 0 in the
    very first."""
    return min(recipe.optimizer.ema_decay, step / (step + 10))


def assigns_hard(recipe: Recipe, step: int) -> bool:
    """Returns whether each patch is assigned to one group at this step."""
    return step >= recipe.objective.hard_from * recipe.schedule.total_steps


def drop_path_rates(recipe: Recipe, layers: int) -> list[float]:
    """Returns the drop-path rate of each vision layer: from 0 in a line to the recipe's."""
    return [recipe.model.drop_path * layer / max(layers - 1, 1) for layer in range(layers)]
