"""Recipes: files, settings and their refusals, and the pure functions of a recipe."""

import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from groupvit_common.errors import InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.training.initial_model import model_config, wave_positions
from groupvit_common.training.recipe import Recipe, get_recipe, recipe_names
from groupvit_common.training.schedule import assigns_hard, drop_path_rates, has_weight_decay, learning_rate_at
from groupvit_common.training.settings import changed, parse_change, read_settings, to_toml
from groupvit_common.training.start import _FINETUNE_RATE, is_too_fast
from tests.support.paths import ROOT

DEMO = get_recipe("scenes-demo")


def demo(**changes):
    return changed(DEMO, changes)


# Files and settings


@pytest.mark.parametrize("name", recipe_names())
def test_named_runs_give_a_model_that_the_configuration_accepts(name):
    config = model_config(get_recipe(name), 49408)
    assert isinstance(config, GroupViTConfig)
    assert config.text_config.eos_token_id == config.text_config.vocab_size - 1
    assert config.vision_config.num_group_tokens[-1] == 0
    assert config.segmentation_assignment == ("soft" if name.startswith("scenes-demo") else "hard")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_its_toml(name, tmp_path):
    path = tmp_path / "recipe.toml"
    recipe = get_recipe(name)
    path.write_text(to_toml(recipe))
    assert get_recipe(path) == recipe


def test_the_demo_recipes_are_what_made_the_bundled_model():
    """The two parts of `make train-demo`; the first part's folder has the name that it had then."""
    records = ROOT / "groupvit_common/demo_model"
    first, second = (
        read_settings(Recipe, json.loads((records / name).read_text())["recipe"])
        for name in ("training-first.json", "training.json")
    )
    assert first == DEMO
    assert changed(second, {"model.init_from": "runs/scenes-demo"}) == get_recipe("scenes-demo-fine")


@pytest.mark.parametrize("name", ["gcc-yfcc-30e", "gcc-redcaps-30e"])
def test_the_papers_runs_are_the_authors(name):
    """Their model is that of the released checkpoints; the numbers are those of the authors' configuration."""
    recipe, released = get_recipe(name), GroupViTConfig()
    config = model_config(recipe, 49408)
    assert config.vision_config == released.vision_config
    ours, theirs = config.text_config.to_dict(), released.text_config.to_dict()
    assert {key: ours[key] for key in ours if key != "pad_token_id"} == {
        k: theirs[k] for k in theirs if k != "pad_token_id"
    }
    assert config.projection_dim == released.projection_dim
    assert config.logit_scale_init_value == pytest.approx(released.logit_scale_init_value, abs=1e-4)
    steps = recipe.schedule.total_steps
    assert steps == {"gcc-yfcc-30e": 209_935, "gcc-redcaps-30e": 189_804}[name]
    warm = recipe.schedule.total_warmup_steps
    assert warm == pytest.approx(steps / 15, abs=1)
    assert learning_rate_at(recipe, 0) == pytest.approx(4e-6, rel=0.04)  # one step above it
    assert learning_rate_at(recipe, warm) == 1.6e-3
    assert learning_rate_at(recipe, steps) == pytest.approx(4e-5)
    assert recipe.multi_label == (name == "gcc-yfcc-30e")
    assert drop_path_rates(recipe, 12)[-1] == 0.1


def test_a_file_is_based_on_another_and_settings_of_the_command_come_last(tmp_path):
    (tmp_path / "mine.toml").write_text('base = "scenes-demo"\n[optimizer]\nlearning_rate = 1\n[run]\nkeep = 5\n')
    (tmp_path / "more.toml").write_text('base = "mine.toml"\n[optimizer]\nlearning_rate = 0.5\n')
    recipe = get_recipe(tmp_path / "more.toml", ["steps=1e4", "model.freeze=['text_model']", "tokenizer=a/b"])
    assert recipe == demo(learning_rate=0.5, keep=5, steps=10_000, freeze=("text_model",), tokenizer="a/b")
    assert recipe.optimizer.weight_decay == DEMO.optimizer.weight_decay


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimizer]\nlearning_rat = 1", r"optimizer has no setting 'learning_rat'; did you mean learning_rate\?$"),
        ("[optimiser]\nlearning_rate = 1", r"has no setting 'optimiser'; did you mean optimizer\?$"),
        ("[optimizer]\nlearning_rate = 'high'", "optimizer.learning_rate must be a number, got 'high'"),
        ("[optimizer]\nbetas = [0.9]", r"optimizer.betas must be a list of 2, got \[0.9\]"),
        ("[model]\nwidth = 1.5", "model.width must be a whole number, got 1.5"),
        ("[model]\nwidth = true", "model.width must be a whole number, got True"),
        ("[model]\ndepths = 3", "model.depths must be a list, got 3"),
        ("[model]\ndepths = [1, 'two']", r"model.depths\[1\] must be a whole number, got 'two'"),
        ("[objective]\nkind = 'mine'", "objective.kind must be one of 'paper', 'groups', got 'mine'"),
        ("[objective]\ngumbel = 1", "objective.gumbel must be true or false, got 1"),
        ("[model]\ntokenizer = 3", "model.tokenizer must be a text, got 3"),
        ("model = 3", "model must be a table with image_size"),
        ("[model", "cannot be read as TOML"),
        ("base = 'none'", "no recipe called 'none'; there are .*scenes-demo"),
        ("base = 'none.toml'", "there is no recipe file .*none.toml"),
        ("base = 'mine.toml'", "is based on itself"),
        ("base = 1", "base must be the name or path of a recipe, got 1"),
        ("", "schedule needs steps, or epochs and images_per_epoch"),
        ("base = 'scenes-demo'\n[objective]\nclaim_patches = 0", "objective.claim_patches must be at least 1, got 0"),
        (
            "base = 'scenes-demo'\n[objective]\nnaming_weight = -1.0",
            "objective.naming_weight must be at least 0, got -1.0",
        ),
        ("base = 'scenes-demo'\n[objective]\nclaim_weight = nan", "objective.claim_weight must be at least 0, got nan"),
        (
            "base = 'scenes-demo'\n[objective]\nkind = 'paper'",
            "beside kind=groups, got 0.1 with kind=paper; set it to 0",
        ),
        ("base = 'scenes-demo'\n[scenes]\nsingle_share = 0.8", "must not exceed 1 together, got 0.8 and"),
        (
            "base = 'scenes-demo'\n[scenes]\nmixed_share = 1.0",
            "objective.paper_weight compares images .* remain 0, at least 2",
        ),
    ],
)
def test_a_file_that_is_no_recipe_gets_one_sentence(tmp_path, text, message):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        get_recipe(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps", "a setting is changed by NAME=VALUE"),
        ("stops=3", r"there is no setting 'stops'; did you mean schedule.steps\?$"),
        ("batchsize=8", r"there is no setting 'batchsize'; did you mean schedule.batch_size\?$"),
        ("batch-size=8", r"did you mean schedule.batch_size\?$"),
        ("lr=1", r"there is no setting 'lr'; did you mean optimizer.learning_rate\?$"),
        ("wd=1", r"did you mean optimizer.weight_decay\?$"),
        ("LearningRate=1", r"did you mean optimizer.learning_rate\?$"),
        ("num_workers=1", r"did you mean run.workers\?$"),
        ("warmup=1", r"did you mean schedule.warmup_steps or schedule.warmup_epochs\?$"),
        ("ema=0.9", r"did you mean optimizer.ema_decay\?$"),
        ("flipp=1", r"did you mean data.flip\?$"),
        ("optimizer.lr=1", r"optimizer has no setting 'lr'; did you mean learning_rate\?$"),
        ("zzz=1", "there is no setting 'zzz'; the sections are model, .*run; groupvit train NAME --show prints all"),
        ("=1", "a setting is changed by NAME=VALUE"),
        (".=1", "a recipe has no setting ''"),
        (
            "optimizer.learning_rate.x=1",
            "learning_rate.x cannot be set: learning_rate is a setting without others in it",
        ),
        ("run.seed=1\nrun.keep=2", r"run.seed must be a whole number, got '1\\nrun.keep=2'"),
        ("seed=1" + "0" * 5000, "run.seed must be a whole number"),
        ("betas=[0.9, 1.5]", r"optimizer.betas must be at least 0 and below 1, got \[0.9, 1.5\]"),
        ("learning_rate=inf", "optimizer.learning_rate must be at least 0, got inf"),
        ("learning_rate=nan", "optimizer.learning_rate must be at least 0, got nan"),
        ("patch_size=0", "model.patch_size must be at least 1, got 0"),
        ("heads=5", "model.width must be a multiple of model.heads, got 192 and 5"),
        ("model.groups=[0]", r"model.groups must each be at least 1, got \[0\]"),
        ("steps=100", "schedule.warmup_steps 200 must be less than schedule.steps 100: set warmup_steps to less"),
        ("schedule=3", "schedule is a section; change one of its settings, such as schedule.batch_size"),
        ("schedule.stops=3", "schedule has no setting 'stops'"),
        ("steps=many", "schedule.steps must be a whole number, got 'many'"),
    ],
)
def test_a_change_that_cannot_be_made_gets_one_sentence(change, message):
    with pytest.raises(InputError, match=message):
        get_recipe("scenes-demo", [change])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["epochs=1.4"],
            r"schedule.warmup_epochs 2 must be less than schedule.epochs 1.4 \(13995 of 9796 steps\): "
            "set warmup_epochs to less",
        ),
        (
            ["epochs=1", "warmup_steps=9999"],
            r"schedule.warmup_steps 9999 must be less than schedule.epochs 1 \(9999 of 6997 steps\)",
        ),
        (["steps=10"], r"schedule.warmup_epochs 2 must be less than schedule.steps 10 \(13995 of 10 steps\)"),
        (["images_per_epoch=0"], "got epochs 30 of 0 images for batch_size 4096"),
    ],
)
def test_a_warm_up_that_is_too_long_is_named_as_it_was_given(changes, message):
    with pytest.raises(InputError, match=message):
        get_recipe("gcc-yfcc-30e", changes)


def test_epochs_take_the_place_of_steps(tmp_path):
    """Where a recipe has steps, a length in epochs laid over it would be without effect."""
    changes = ["epochs=3", "images_per_epoch=25600"]
    (tmp_path / "mine.toml").write_text('base = "finetune"\n[schedule]\nepochs = 3\nimages_per_epoch = 25600\n')
    for recipe in (get_recipe("finetune", changes), get_recipe(tmp_path / "mine.toml")):
        assert recipe.schedule.total_steps == 300
    assert get_recipe("finetune", [*changes, "steps=400"]).schedule.total_steps == 400
    assert get_recipe(tmp_path / "mine.toml", ["schedule.steps=400"]).schedule.total_steps == 400
    with pytest.raises(InputError, match="images_per_epoch of at least one batch, got epochs 3 of 0 images"):
        get_recipe("finetune", ["schedule.epochs=3"])


def test_finetuning_takes_small_steps():
    recipe = get_recipe("finetune")
    assert recipe.model.init_from
    assert not is_too_fast(recipe)
    assert recipe.optimizer.learning_rate == _FINETUNE_RATE
    assert not is_too_fast(get_recipe("scenes-demo-fine"))
    assert is_too_fast(get_recipe("gcc-yfcc-30e", ["init_from=demo"]))
    assert not is_too_fast(get_recipe("gcc-yfcc-30e"))


def test_an_unknown_run_is_named_with_those_that_exist():
    with pytest.raises(
        InputError, match=r"no recipe called .scenes.; there are .*scenes-demo, scenes-demo-fine, scenes-paper"
    ):
        get_recipe("scenes")


def test_every_kind_of_text_survives_toml():
    odd = ("\x7f\x00\u2028", 'quote " and \\', "naïve 🙂", "")
    recipe = demo(templates=odd, learning_rate=1e-300)
    assert get_recipe_text(to_toml(recipe)) == recipe


def get_recipe_text(text):
    import tomllib

    return read_settings(Recipe, tomllib.loads(text))


def test_values_on_the_command_line_are_tomls_or_texts():
    assert parse_change("a.b=[1, 2]") == ("a.b", [1, 2])
    assert parse_change("a = true") == ("a", True)
    assert parse_change("a=x=y") == ("a", "x=y")
    assert parse_change("a=runs/mine") == ("a", "runs/mine")


def test_a_recipe_does_not_change():
    with pytest.raises(FrozenInstanceError):
        DEMO.run.seed = 1


# What follows from a recipe


def test_learning_rate_rises_in_a_line_and_falls_to_its_floor():
    recipe = demo(steps=1000, warmup_steps=100, learning_rate=2.0, final_rate=0.01)
    rates = [learning_rate_at(recipe, step) for step in range(1001)]
    np.testing.assert_allclose(np.diff(rates[:100]), 0.02, rtol=1e-9)
    assert max(rates) == rates[99] == rates[100] == 2.0
    assert rates[550] == pytest.approx((2.0 + 0.02) / 2)  # the middle of the cosine
    assert rates[1000] == pytest.approx(0.02)
    assert (np.diff(rates[100:]) < 0).all()


def test_learning_rate_without_warmup_and_from_a_share():
    assert learning_rate_at(demo(steps=10, warmup_steps=0), 0) == DEMO.optimizer.learning_rate
    recipe = demo(steps=10, warmup_steps=4, initial_rate=0.5, learning_rate=1.0)
    assert [learning_rate_at(recipe, step) for step in range(4)] == [0.625, 0.75, 0.875, 1.0]


def test_epochs_are_counted_in_batches():
    recipe = demo(steps=0, epochs=3.0, images_per_epoch=1001, batch_size=100, warmup_steps=0, warmup_epochs=0.5)
    assert (recipe.schedule.total_steps, recipe.schedule.total_warmup_steps) == (30, 5)


def test_drop_path_rises_in_a_line():
    np.testing.assert_allclose(drop_path_rates(demo(drop_path=0.2), 5), [0, 0.05, 0.1, 0.15, 0.2])
    assert drop_path_rates(demo(drop_path=0.2), 1) == [0.0]


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
def test_weight_decay(name, dimensions, expected):
    assert has_weight_decay(name, dimensions) is expected


def test_hard_assignment_begins_where_the_recipe_says():
    recipe = demo(steps=10, warmup_steps=0, hard_from=0.5)
    assert [assigns_hard(recipe, step) for step in range(10)] == [False] * 5 + [True] * 5
    assert not any(assigns_hard(changed(recipe, {"hard_from": 1.0}), step) for step in range(10))


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
        ({"steps": 0}, "schedule needs steps"),
        ({"steps": -1}, "schedule.steps must be at least 0, got -1"),
        ({"batch_size": 2}, "schedule.batch_size must be at least 4, got 2"),
        ({"turns": (1, 2)}, "scenes.turns must name"),
        ({"seed": 1_000_003}, "validation scenes"),
        ({"seed": -1}, "run.seed must be at least 0, got -1"),
        ({"steps": 100, "warmup_steps": 100}, "warmup_steps 100 must be less than schedule.steps 100"),
        ({"mixed_share": 1.5}, "scenes.mixed_share must lie between 0 and 1"),
        ({"depths": (1, 1, 1)}, "model.depths must have one entry more than model.groups"),
        ({"depths": (1, 1, 1), "groups": (4, 2)}, "the objective 'groups' trains one grouping block"),
        ({"freeze": ("text_model",), "train_only": ("group_token",)}, "exclude each other"),
        ({"logit_scale": 0}, "model.logit_scale must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        demo(**settings)


def test_waves_need_a_width_of_fours():
    with pytest.raises(InputError, match="multiple of 4"):
        wave_positions(4, 30, 1.0)
