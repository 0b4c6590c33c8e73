"""The matrices are torch's interpolation."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from groupvit_common.errors import InputError
from groupvit_common.model.resample import resize_matrix

# Both sides compute in float64 with at most 4 x 4 taps of weight at most 1.3.
ROUNDING = 1e-12

sides = st.integers(1, 40)


def on_a_border(n_in: int, n_out: int) -> bool:
    return any((2 * i + 1) * n_in % (2 * n_out) == 0 for i in range(n_out))


@given(sides, sides, sides, sides, st.sampled_from(["bilinear", "bicubic", "nearest"]))
@settings(max_examples=150, deadline=None)
def test_two_matrices_equal_torch(h: int, w: int, new_h: int, new_w: int, mode: str) -> None:
    # A centre exactly between two samples belongs to the second; torch's rounding sends some to the first.
    assume(mode != "nearest" or not (on_a_border(h, new_h) or on_a_border(w, new_w)))
    image = np.random.default_rng(h * 41 + w).standard_normal((h, w))
    torch_mode = "nearest-exact" if mode == "nearest" else mode
    options = {} if mode == "nearest" else {"align_corners": False}
    wanted = F.interpolate(torch.from_numpy(image)[None, None], size=(new_h, new_w), mode=torch_mode, **options)
    actual = resize_matrix(h, new_h, mode) @ image @ resize_matrix(w, new_w, mode).T
    np.testing.assert_allclose(actual, wanted[0, 0].numpy(), atol=ROUNDING)


@given(sides, sides, st.sampled_from(["bilinear", "bicubic", "nearest"]))
@settings(max_examples=50, deadline=None)
def test_rows_sum_to_one_and_equal_sizes_change_nothing(n_in: int, n_out: int, mode: str) -> None:
    np.testing.assert_allclose(resize_matrix(n_in, n_out, mode).sum(axis=1), 1, atol=ROUNDING)
    np.testing.assert_allclose(resize_matrix(n_in, n_in, mode), np.eye(n_in), atol=ROUNDING)


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="at least 1"):
        resize_matrix(0, 3)
    with pytest.raises(InputError, match="unknown interpolation 'lanczos'"):
        resize_matrix(3, 3, "lanczos")  # type: ignore[arg-type]
