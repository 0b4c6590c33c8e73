"""A recipe's pure functions, and that impossible settings are refused."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from groupvit_common.config import GroupViTConfig
from groupvit_common.errors import InputError
from groupvit_common.recipe import (
    RECIPES,
    Recipe,
    assigns_hard,
    decays,
    get_recipe,
    learning_rate_at,
    model_config,
    wave_positions,
)


@pytest.mark.parametrize("name", list(RECIPES))
def test_named_runs_give_a_model_that_the_configuration_accepts(name):
    config = model_config(get_recipe(name), 600, 32)
    assert isinstance(config, GroupViTConfig)
    assert config.text_config.eos_token_id == config.text_config.vocab_size - 1
    assert config.vision_config.num_group_tokens[-1] == 0
    assert config.segmentation_assignment == ("hard" if name == "scenes-paper" else "soft")


def test_an_unknown_run_is_named_with_those_that_exist():
    with pytest.raises(InputError, match="scenes-demo"):
        get_recipe("scenes")


def test_a_recipe_does_not_change():
    with pytest.raises(FrozenInstanceError):
        get_recipe("scenes-demo").seed = 1


def test_learning_rate_rises_in_a_line_and_falls_to_its_floor():
    recipe = Recipe(steps=1000, warmup_steps=100, learning_rate=2.0, final_rate=0.01)
    rates = [learning_rate_at(recipe, step) for step in range(1001)]
    np.testing.assert_allclose(np.diff(rates[:100]), 0.02, rtol=1e-9)
    assert max(rates) == rates[99] == rates[100] == 2.0
    assert rates[550] == pytest.approx((2.0 + 0.02) / 2)  # the middle of the cosine
    assert rates[1000] == pytest.approx(0.02)
    assert (np.diff(rates[100:]) < 0).all()


def test_learning_rate_without_warmup():
    recipe = Recipe(steps=10, warmup_steps=0)
    assert learning_rate_at(recipe, 0) == recipe.learning_rate


@pytest.mark.parametrize(
    ("name", "dimensions", "expected"),
    [
        ("vision_model.encoder.stages.0.layers.0.mlp.fc1.weight", 2, True),
        ("vision_model.embeddings.patch_embeddings.projection.weight", 4, True),
        ("visual_projection.0.weight", 2, True),
        ("vision_model.encoder.stages.0.layers.0.mlp.fc1.bias", 1, False),
        ("vision_model.layernorm.weight", 1, False),
        ("vision_model.embeddings.position_embeddings", 3, False),
        ("vision_model.encoder.stages.0.group_token", 3, False),
        ("text_model.embeddings.token_embedding.weight", 2, False),
        ("text_model.embeddings.position_embedding.weight", 2, False),
        ("logit_scale", 0, False),
    ],
)
def test_what_decays(name, dimensions, expected):
    assert decays(name, dimensions) is expected


def test_hard_assignment_begins_where_the_recipe_says():
    recipe = Recipe(steps=10, warmup_steps=0, hard_from=0.5)
    assert [assigns_hard(recipe, step) for step in range(10)] == [False] * 5 + [True] * 5
    assert not any(assigns_hard(replace(recipe, hard_from=1.0), step) for step in range(10))


def test_wave_positions_are_alike_where_patches_are_near():
    waves = wave_positions(16, 128, 0.7).astype(np.float64)
    assert waves.shape == (256, 128)
    likeness = (waves @ waves[8 * 16 + 8]).reshape(16, 16)
    assert likeness.argmax() == 8 * 16 + 8
    row = likeness[8, 8:]
    assert (np.diff(row[:4]) < 0).all()
    np.testing.assert_allclose(likeness, likeness.T, atol=1e-5)  # float32: down is as far as across
    assert np.abs(waves).max() <= 0.7 + 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 2}, "batch_size must be at least 4"),
        ({"turns": (1, 2)}, "turns must name"),
        ({"seed": 1_000_003}, "held-out"),
        ({"seed": -1}, "seeds must not be negative, got -1"),
        ({"steps": 100, "warmup_steps": 100}, "warmup_steps must be fewer than steps, got 100 of 100"),
        ({"mixed_share": 1.5}, "mixed_share must lie between 0 and 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Recipe(**settings)


def test_waves_need_a_width_of_fours():
    with pytest.raises(InputError, match="multiple of 4"):
        wave_positions(4, 30, 1.0)
