"""Seeds of the random numbers that both backends share."""

import random
from typing import Any

import numpy as np

from groupvit_common.errors import InputError, short


def seed_python(seed: Any) -> int:
    """Seeds Python's and NumPy's global random numbers; returns the seed. Raises `InputError` beyond 32 bits."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 32:
        raise InputError(f"a seed must be a whole number of at least 0 and below 2**32, got {short(seed)}")
    random.seed(int(seed))
    np.random.seed(int(seed))
    return int(seed)
