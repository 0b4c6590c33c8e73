"""PyTorch and Keras are one function: operations, layers, towers and models of random configurations
(`tests/support/parity.py`)."""

import functools

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorflow")

from tests.support import parity
from tests.support.parity import LEVELS, ZERO, has_gradient

# Two stages with the legacy end token, and four. `make parity` measures more.
SEEDS = (23, 17)
MEASURED = (("float32", SEEDS[1]), ("float64", SEEDS[0]))

# Largest difference over the array's largest value. float32 has 7 digits and the two programs sum in different orders.
FLOAT32 = 1e-5
GRADIENT = 1e-4  # twice as many operations, and sums whose parts cancel
# Rounding at 1e-16 is amplified as in float32: the worst seen was 1e-13.
FLOAT64 = 1e-10
LABELS = 0.9999  # of the pixels in float32; in float64 all
# Sixteen roundings of the last bit, about the number of layers that a value passes: 8 bits in bfloat16, 11 in float16.
HALF = {"bfloat16": 16 * 2**-8, "float16": 16 * 2**-11}


# Towers are compared in float64; in float32 the whole model, whose values and gradients pass through them.
@pytest.mark.parametrize(
    ("level", "dtype", "seed"),
    [
        pytest.param(level, *measured, marks=[pytest.mark.slow] if (level, measured[0]) == ("tower", "float32") else [])
        for measured in MEASURED
        for level in LEVELS
    ],
)
def test_every_quantity_agrees(level: str, dtype: str, seed: int) -> None:
    measured = parity.measure(level, seed, dtype)
    assert len(measured) > 30
    tolerance = {
        name: FLOAT64 if dtype == "float64" else GRADIENT if "gradient" in name else FLOAT32 for name in measured
    }
    apart = {name: value for name, value in measured.items() if value > tolerance[name]}
    assert not apart


def test_configurations_differ_where_they_should() -> None:
    configs = [parity.Draw(seed).config for seed in SEEDS]
    assert {len(config.vision_config.depths) for config in configs} == {2, 4}
    assert {config.text_config.eos_token_id == 2 for config in configs} == {True, False}
    assert len({config.vision_config.hidden_act for config in configs}) > 1


@pytest.mark.parametrize("seed", SEEDS[:1])
def test_gradients_left_out_are_zero(seed: int) -> None:
    for arrays in parity.both("model", seed, "float64"):
        largest = max(np.abs(value).max() for name, value in arrays.items() if name.startswith("gradient of the loss"))
        left_out = {name: np.abs(value).max() for name, value in arrays.items() if name.startswith(ZERO)}
        assert len(left_out) > 10
        # Rounding noise, four digits above that of a single number.
        assert max(left_out.values()) < 1e-12 * largest


def test_no_other_gradient_is_left_out() -> None:
    assert has_gradient("text_model.encoder.layers.0.self_attn.q_proj.bias", training=True)
    assert has_gradient("vision_model.encoder.stages.0.downsample.assign.k_proj.bias", training=True)
    assert has_gradient("vision_model.layernorm.bias", training=False)
    assert not has_gradient("vision_model.layernorm.bias", training=True)
    assert not has_gradient("vision_model.encoder.stages.0.downsample.pre_assign_attn.attn.k_proj.bias", training=False)


def test_label_maps_agree_pixel_by_pixel() -> None:
    for (dtype, seed), least in zip(MEASURED, (LABELS, 1.0), strict=True):
        agreement = parity.label_maps(seed, dtype)
        assert agreement.compared > 500
        assert agreement.tied < agreement.compared / 100
        assert agreement.share >= least


def test_the_segmenters_agree_pixel_by_pixel() -> None:
    """In float32, eagerly; in float64, also as a graph: segmentation/test_segmenter.py."""
    assert parity.segmenter_maps(2, "float32").share >= LABELS


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_as_near_to_float32_in_both(dtype: str) -> None:
    values, claims = parity.measure_half(SEEDS[0], dtype)
    for name, row in values.items():
        assert max(row) <= HALF[dtype], name
        assert min(row) > 0, name
    assert all(agreement.share > 0.9 for agreement in claims.values())


def broken_bias(x, attention_mask):
    """Forgets the mask."""
    from groupvit_tf import text

    return text.unbroken_bias(x, None)


def broken_assign(logits, *, noise=None, hard=True, temperature=1.0):
    """No gradient through the hard assignment but the upstream one."""
    from keras import ops

    from groupvit_tf import grouping

    soft = grouping.unbroken_assign(logits, noise=noise, hard=False, temperature=temperature)
    hard_one = grouping.unbroken_assign(logits, noise=noise, hard=True, temperature=temperature)
    return ops.stop_gradient(hard_one) + 0 * soft if hard else soft


def one_direction(logits):
    """The loss of images alone."""
    from keras import ops

    return -ops.mean(ops.diagonal(ops.log_softmax(logits, axis=1)))


# Level -> errors that are put into the Keras package: the row that must notice each, what is replaced, and by what.
ERRORS: dict[str, list[tuple[str, str, object]]] = {
    "operation": [
        ("gelu", "layers.ACTIVATIONS[gelu]", "gelu_new"),
        ("positions of another image size (bicubic)", "vision.resize_matrix", "bilinear"),
    ],
    "layer": [
        ("batch norm, evaluation", "layers.BatchNorm.epsilon", 2e-5),
        ("batch norm, running statistics", "layers.BatchNorm.momentum", 0.101),
        ("TokenAssign, hard, gradient", "grouping.assign", broken_assign),
    ],
    "tower": [("text, padding masked: last_hidden_state", "text._attention_bias", broken_bias)],
    "model": [("loss, evaluation", "model.symmetric_cross_entropy", one_direction)],
}


@pytest.mark.parametrize("level", ERRORS)
def test_errors_put_in_are_noticed(monkeypatch, level: str) -> None:
    import groupvit_tf.model
    import groupvit_tf.vision

    parity.both.cache_clear()
    for _, target, value in ERRORS[level]:
        module, *path = target.split(".")
        owner = functools.reduce(getattr, path[:-1], getattr(groupvit_tf, module))
        name = path[-1]
        if name.startswith("ACTIVATIONS"):
            monkeypatch.setitem(owner.ACTIVATIONS, "gelu", owner.ACTIVATIONS[value])
        elif name == "resize_matrix":
            replaced = functools.partial(lambda plain, mode, n, m, _: plain(n, m, mode), owner.resize_matrix, value)
            monkeypatch.setattr(owner, name, replaced)
        else:
            if callable(value):
                whole = f"unbroken_{name.removeprefix('_').split('_')[-1]}"
                monkeypatch.setattr(owner, whole, getattr(owner, name), raising=False)
            monkeypatch.setattr(owner, name, value)
    noticed = parity.rows(parity.measure(level, SEEDS[0], "float64"))
    parity.both.cache_clear()
    for row, _, _ in ERRORS[level]:
        assert noticed[row] > 1000 * FLOAT64, row
