"""The optimizer of a recipe, and the exponential moving average (EMA) of the weights.

float16's loss is scaled by PyTorch's `GradScaler`. `groupvit_tf.optimizer` has the same arithmetic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from groupvit_common.training.schedule import has_weight_decay
from groupvit_torch.objective import Objective


def make_optimizer(objective: Objective) -> torch.optim.Optimizer:
    """Returns AdamW with weight decay where `has_weight_decay` says so."""
    settings = objective.recipe.optimizer
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in objective.named_trainable().items():
        (decayed if has_weight_decay(name, parameter.ndim) else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    # One pass over each parameter: on a CPU a seventh of the time.
    fused = objective.model.device.type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=fused or None
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class EMA:
    """An exponential moving average of the weights and batch-norm statistics.

    Args:
        objective: whose weights; `objective` of this class is a copy that holds the average.
        decay_at: step 0, 1, ... -> the fraction that the average keeps of itself.
    """

    def __init__(self, objective: Objective, decay_at: Callable[[int], float]) -> None:
        self.source, self.objective = objective, copy.deepcopy(objective)
        self.decay_at = decay_at

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after a step."""
        averages, values = self.objective.state_dict(), self.source.state_dict()
        floating = [name for name, value in values.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [averages[name] for name in floating], [values[name] for name in floating], 1.0 - self.decay_at(step)
        )
