"""Promises of the model's interface beyond the reference cases."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupvit_common.errors import InputError
from tests.support.backends import BACKENDS, Backend
from tests.support.models import tiny_config

# bfloat16 keeps 8 bits, float16 11: about three roundings' worth of the largest value after a dozen layers.
HALF = {"bfloat16": 0.05, "float16": 0.01}


@cache
def made(backend: str, dtype: str = "float32") -> Any:
    """The model of `tiny_config`, made once for all tests, which leave it as it is."""
    return BACKENDS[backend]().build(tiny_config(), dtype=dtype)


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (24, 56)])
def test_any_size_of_whole_patches(backend: Backend, size: tuple[int, int]) -> None:
    model = made(backend.name)
    pixels = np.random.default_rng(0).standard_normal((2, 3, *size)).astype(np.float32)
    ids = np.array([[48, 5, 49]])
    out = backend.call(model, input_ids=ids, pixel_values=pixels, output_segmentation=True)
    assert out.segmentation_logits.shape == (2, 1, *size)
    patches = size[0] // 8 * (size[1] // 8)
    assert [a.shape for a in out.vision_model_output.attentions] == [(2, 6, patches), (2, 5, 6)]
    assert np.isfinite(out.segmentation_logits).all()


def test_position_embeddings_are_interpolated_as_torch_does_it() -> None:
    import torch
    from torch.nn import functional as F

    from groupvit_torch.vision import VisionEmbeddings

    embeddings = VisionEmbeddings(tiny_config().vision_config).double()
    torch.nn.init.normal_(embeddings.position_embeddings)
    grid = embeddings.position_embeddings.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, size=(7, 3), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embeddings.positions(7, 3), wanted, atol=1e-12, rtol=0)  # float64 rounding
    assert embeddings.positions(4, 4) is embeddings.position_embeddings


@pytest.mark.parametrize("dtype", sorted(HALF))
def test_half_precision_stays_near(backend: Backend, tiny_inputs: dict[str, np.ndarray], dtype: str) -> None:
    full = made(backend.name)
    half = backend.build(tiny_config(), backend.weights(full), dtype)
    wanted, actual = (backend.call(model, **tiny_inputs, return_loss=True) for model in (full, half))
    for name in ("image_embeds", "text_embeds"):
        # Compared at unit length; a near-tie may flip a hard assignment, so the median over images, not the worst.
        assert np.median(np.abs(actual[name] - wanted[name]).max(axis=1)) < HALF[dtype]
    assert np.isfinite(actual.loss)


def test_records_or_tuples(backend: Backend, tiny_inputs: dict[str, np.ndarray]) -> None:
    model = made(backend.name)
    record = backend.call(model, **tiny_inputs, return_loss=True)
    flat = backend.call(model, **tiny_inputs, return_loss=True, return_dict=False)
    assert list(record) == [
        "loss",
        "logits_per_image",
        "logits_per_text",
        "text_embeds",
        "image_embeds",
        "text_model_output",
        "vision_model_output",
    ]
    assert len(flat) == len(record)
    np.testing.assert_array_equal(flat[0], record.loss)
    np.testing.assert_array_equal(flat[-1][0], record.vision_model_output.last_hidden_state)


def test_flags_default_to_the_configuration(backend: Backend, tiny_inputs: dict[str, np.ndarray]) -> None:
    config = tiny_config()
    config.update({"output_hidden_states": True, "output_segmentation": True})
    out = backend.call(backend.build(config), **tiny_inputs)
    assert out.segmentation_logits is not None
    assert len(out.text_model_output.hidden_states) == 3
    assert len(out.vision_model_output.hidden_states) == 4


def test_asking_for_attentions_changes_nothing_else(backend: Backend, tiny_inputs: dict[str, np.ndarray]) -> None:
    # The fused kernel and the written-out attention are two programs: float32 rounding apart.
    model = made(backend.name, "float64")
    plain, asked = (backend.call(model, **tiny_inputs, output_attentions=flag) for flag in (False, True))
    np.testing.assert_allclose(plain.text_embeds, asked.text_embeds, atol=1e-12)  # float64 rounding
    assert plain.text_model_output.attentions is None
    np.testing.assert_allclose(asked.text_model_output.attentions[0].sum(axis=-1), 1, atol=1e-12)


def test_padding_does_not_reach_the_features(backend: Backend) -> None:
    model = made(backend.name, "float64")
    short = np.array([[48, 3, 4, 49]])
    padded = np.array([[48, 3, 4, 49, 49, 49]])
    mask = np.array([[1, 1, 1, 1, 0, 0]])
    wanted = backend.features(model, "text", input_ids=short)
    actual = backend.features(model, "text", input_ids=padded, attention_mask=mask)
    np.testing.assert_allclose(actual, wanted, atol=1e-12)  # float64 rounding


def test_text_is_pooled_at_the_first_end_of_text(backend: Backend) -> None:
    model = made(backend.name)
    ids = np.array([[48, 3, 49, 49], [48, 49, 7, 8]])
    out = backend.call(model, input_ids=ids, pixel_values=np.zeros((2, 3, 32, 32), np.float32)).text_model_output
    np.testing.assert_array_equal(out.pooler_output[0], out.last_hidden_state[0, 2])
    np.testing.assert_array_equal(out.pooler_output[1], out.last_hidden_state[1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "input_ids is missing"),
        ({"pixel_values": None}, "pixel_values is missing"),
        ({"input_ids": np.zeros((3, 13), np.int64)}, "a text may have 1 to 12 tokens, got 13"),
        ({"input_ids": np.zeros((3, 0), np.int64), "attention_mask": None}, "a text may have 1 to 12 tokens, got 0"),
        ({"input_ids": np.zeros(3, np.int64)}, r"must have shape \[texts, tokens\], got \[3\]"),
        ({"input_ids": np.zeros((3, 9), np.float32)}, "input_ids must be integers"),
        ({"input_ids": np.full((3, 9), 50)}, "must lie between 0 and 49, got 50"),
        ({"input_ids": np.full((3, 9), -1)}, "must lie between 0 and 49, got -1"),
        ({"attention_mask": np.ones((3, 8), np.int64)}, r"the shape of input_ids, \[3, 9\], got \[3, 8\]"),
        ({"pixel_values": np.zeros((3, 3, 32, 33), np.float32)}, "multiples of the patch size 8, got 32 x 33"),
        ({"pixel_values": np.zeros((3, 3, 0, 32), np.float32)}, "multiples of the patch size 8, got 0 x 32"),
        ({"pixel_values": np.zeros((3, 32, 32), np.float32)}, "add a batch axis"),
        ({"pixel_values": np.zeros((3, 32, 32, 3), np.float32)}, "move the channels to axis 1"),
        ({"pixel_values": np.zeros((3, 3, 32, 32), np.uint8)}, "must be floating point"),
        ({"pixel_values": np.zeros((2, 3, 32, 32), np.float32)}, "got 2 images and 3 texts"),
        ({"gumbel_noise": [np.zeros((3, 6, 16))]}, r"one tensor per grouping block \(2\), got 1"),
    ],
)
def test_bad_input_gets_one_clear_error(
    backend: Backend,
    tiny_inputs: dict[str, np.ndarray],
    change: dict[str, Any],
    message: str,
) -> None:
    model = made(backend.name)
    with pytest.raises(InputError, match=message):
        backend.call(model, **{**tiny_inputs, **change}, return_loss=True)


# -- the hard assignment --


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_hard_assignment_takes_the_best_noisy_group(images: int, groups: int, segments: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, noise = rng.standard_normal((2, images, groups, segments))
    for make in BACKENDS.values():
        weights = make().assign(logits, noise=noise)
        assert (weights.argmax(axis=1) == (logits + noise).argmax(axis=1)).all()
        # Straight-through adds and subtracts the soft weights: exact but for float64 rounding.
        np.testing.assert_allclose(np.sort(weights, axis=1)[:, -1], 1, atol=1e-12)
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12)


def test_soft_assignment_is_a_softmax_at_the_temperature(backend: Backend) -> None:
    logits = np.random.default_rng(0).standard_normal((2, 4, 5))
    exponents = np.exp(logits / 0.5)
    wanted = exponents / exponents.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(backend.assign(logits, hard=False, temperature=0.5), wanted, atol=1e-12)


def test_explicit_noise_decides_the_training_pass(backend: Backend, tiny_inputs: dict[str, np.ndarray]) -> None:
    model = made(backend.name)
    rng = np.random.default_rng(3)
    noise = [rng.gumbel(size=shape).astype(np.float32) for shape in ((3, 6, 16), (3, 5, 6))]
    first, second = (backend.call(model, **tiny_inputs, gumbel_noise=noise).image_embeds for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_strong_noise_sends_every_segment_to_the_chosen_group(backend: Backend) -> None:
    rng = np.random.default_rng(3)
    for group in range(4):
        noise = np.zeros((2, 4, 5))
        noise[:, group] = 1e6  # beyond any logit
        wanted = np.zeros((2, 4, 5))
        wanted[:, group] = 1
        # Straight-through adds and subtracts the soft weights: exact but for float64 rounding.
        np.testing.assert_allclose(backend.assign(rng.standard_normal((2, 4, 5)), noise=noise), wanted, atol=1e-12)


def test_each_stage_takes_its_own_noise(backend: Backend, tiny_inputs: dict[str, np.ndarray]) -> None:
    model = made(backend.name)
    first, second = (np.zeros(shape, np.float32) for shape in ((3, 6, 16), (3, 5, 6)))

    def hidden_states(*noise: np.ndarray) -> tuple[np.ndarray, ...]:
        output = backend.call(model, **tiny_inputs, gumbel_noise=list(noise), output_hidden_states=True)
        return output.vision_model_output.hidden_states

    plain = hidden_states(first, second)
    for stage in range(2):
        noise = [first, second]
        noise[stage] = noise[stage].copy()
        noise[stage][:, 0] = 1e6
        equal = [np.array_equal(a, b) for a, b in zip(plain, hidden_states(*noise), strict=True)]
        # Patches, then what each stage hands on: equal up to the stage whose noise differs.
        assert equal == [True] * (1 + stage) + [False] * (3 - stage)
