"""The number of columns of a batch of texts on which its pooled states depend.

Attention is causal, and a text is pooled at its end: what comes later changes nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from groupvit_common.model.config import LEGACY_EOS_TOKEN_ID

# Texts are cut in steps of so many tokens where a compiler makes a program for each length.
TOKEN_STEP = 16


def needed_length(input_ids: NDArray[Any], attended: NDArray[np.bool_] | None, eos_token_id: int) -> int:
    """Returns the number of leading columns that decide the pooled states.

    Args:
        input_ids: `[N, T]` integers, N at least 1.
        attended: `[N, T]`, False for padding; None: all are attended to.
        eos_token_id: of the configuration.
    """
    end = _ends(input_ids, eos_token_id)
    if attended is not None:
        positions = np.arange(input_ids.shape[1])
        sees = (attended & (positions <= end[:, None])).any(axis=1)
        # A text that may attend to nothing up to its end has equally low logits there and at attended tokens after it.
        end = np.where(sees, end, np.maximum(end, np.where(attended, positions, 0).max(axis=1)))
    return int(end.max()) + 1


def sees_whole_texts(input_ids: NDArray[Any], attended: NDArray[np.bool_], eos_token_id: int) -> bool:
    """Returns whether every text may attend to all columns up to its end: pooled states are then those without a mask.

    Arguments as in `needed_length`.
    """
    later = np.arange(input_ids.shape[1]) > _ends(input_ids, eos_token_id)[:, None]
    return bool((attended | later).all())


def _ends(input_ids: NDArray[Any], eos_token_id: int) -> NDArray[Any]:
    score = input_ids if eos_token_id == LEGACY_EOS_TOKEN_ID else input_ids == eos_token_id
    return score.argmax(axis=1)
