"""`set_seed`: one seed for Python, NumPy and PyTorch."""

import torch

from groupvit_common.compat.seed import seed_python


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seeds the global random numbers of Python, NumPy and PyTorch, on all devices.

    `deterministic`: also have operations computed in a way that gives the same bits each time, where there is one.
    """
    torch.manual_seed(seed_python(seed))
    if deterministic:
        torch.use_deterministic_algorithms(True)
