"""Training on scenes with both backends, in runs of a few steps: what reaches it, what it repeats, what it writes."""

import importlib
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import islice
from typing import Any

import numpy as np
import pytest

from groupvit_common.data.scenes import LEVELS, Scene, make_scene
from groupvit_common.errors import GroupViTError, InputError
from groupvit_common.evaluation.metrics import mean_iou
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.segmentation.predictor import DEMO_MODEL
from groupvit_common.training import validation
from groupvit_common.training.initial_model import model_config, with_checkpoint_model
from groupvit_common.training.recipe import Recipe, get_recipe
from groupvit_common.training.run import MEASURES_NAME, TrainResult
from groupvit_common.training.scene_batches import Batch, SceneBatches, TrainingScenes, enlarged, mix_images, to_pixels
from groupvit_common.training.schedule import learning_rate_at
from groupvit_common.training.settings import changed
from groupvit_common.training.start import RECIPE_NAME, first_captions, make_processor, start_run
from tests.support.backends import Backend
from tests.support.training import BEYOND_FLOAT32, quiet, scenes_of, untraced

SMALL = changed(
    get_recipe("scenes-demo"),
    {
        "steps": 4, "batch_size": 4, "warmup_steps": 1, "scenes_per_level": 12, "held_out_scenes": 2, "width": 32,
        "heads": 1,
        "depths": (1, 0), "groups": (4,), "text_width": 32, "text_heads": 1, "embedding": 16,
        "projection_width": 32, "vocab_size": 530,
    },
)  # fmt: skip
PAPER = {"kind": "paper", "paper_weight": 0.0, "gumbel": True, "hard_from": 0.0, "position_amplitude": 0.0}


def small(**changes: Any) -> Recipe:
    return changed(SMALL, changes)


def package(backend: Backend, module: str = "train") -> Any:
    return importlib.import_module(f"groupvit_{backend.name}.{module}")


@pytest.fixture(scope="module")
def pictures() -> dict[int, TrainingScenes]:
    return {level: scenes_of(level, 12, 64) for level in SMALL.scenes.levels}


@pytest.fixture(scope="module")
def processor(pictures: dict[int, TrainingScenes]) -> GroupViTProcessor:
    return make_processor(SMALL, first_captions(pictures, 12))


def batches(recipe: Recipe, pictures: Any, processor: GroupViTProcessor, rng: np.random.Generator) -> Iterator[Any]:
    """The batches of a run of one process, as many as it has steps."""
    return islice(SceneBatches(recipe, pictures, processor, rng), recipe.schedule.total_steps)


# Runs


def run(backend: Backend, recipe: Recipe, directory: Any, **options: Any) -> TrainResult:
    result: TrainResult = package(backend).train(recipe, directory, log=quiet, **options)
    return result


def test_what_a_run_writes_loads_and_measures_the_same_and_a_failed_run_leaves_it(backend, tmp_path, monkeypatch):
    recipe = small(levels=(1, 2), turns=(2, 1), held_out_scenes=1, steps=2, hard_from=0.5, precision="float32")
    grouping, hard = package(backend, "grouping"), []
    assign = grouping.assign

    def noted(logits, **options):
        if logits.shape[0] == recipe.schedule.batch_size:  # what is measured comes one by one
            hard.append(options["hard"])
        return assign(logits, **options)

    monkeypatch.setattr(grouping, "assign", noted)
    with untraced(backend.name):
        result = run(backend, recipe, tmp_path, seed=5)
    assert list(dict.fromkeys(hard)) == [False, True]
    record = json.loads((tmp_path / MEASURES_NAME).read_text())
    assert record["recipe"]["run"]["seed"] == 5
    assert record["steps"] == recipe.schedule.total_steps == len(result.losses)
    assert set(result.mean_iou) == {1, 2}
    model, processor = backend.load(tmp_path), GroupViTProcessor.from_pretrained(tmp_path)
    segmenter = package(backend, "predictor").Segmenter(model, processor, batch_size=50)
    assert validation.scene_mean_iou(segmenter, recipe) == result.mean_iou

    before = (tmp_path / "model.safetensors").read_bytes()
    with (
        untraced(backend.name),
        pytest.raises(GroupViTError, match=r"the loss is inf at step 1.*: try a lower learning_rate"),
    ):
        run(backend, changed(recipe, {"naming_weight": BEYOND_FLOAT32, "max_bad_steps": 1}), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


# In Keras runs repeat themselves, and turn hard, in tests/groupvit_tf/test_train.py too.
@pytest.mark.parametrize("backend", ["torch", pytest.param("tf", marks=pytest.mark.slow)], indirect=True)
def test_a_run_repeats_itself_and_turns_hard_when_told(backend, tmp_path):
    """The paper's objective, which besides its batches draws noise in the model and prompts in the data: two runs, the
    same but for the step at which they turn hard, are equal up to it."""
    paper = small(**PAPER, levels=(1,), turns=(1,), held_out_scenes=1, steps=2, precision="float32")
    with untraced(backend.name):
        soft = run(backend, changed(paper, {"hard_from": 1.0}), tmp_path)
        hard = run(backend, changed(paper, {"hard_from": 0.5}), tmp_path)
    assert hard.losses[0] == soft.losses[0]
    assert hard.losses[1] != soft.losses[1]
    assert json.loads((tmp_path / "config.json").read_text())["segmentation_assignment"] == "hard"


def test_what_a_checkpoint_says_of_the_model_holds(backend, tmp_path):
    """A recipe that starts from one need not repeat its sizes, by which batches are mixed and grouped, and is saved
    with those that there are."""
    other = {
        "init_from": "demo", "image_size": 64, "patch_size": 12, "groups": (64, 8), "depths": (6, 3, 3),
        "width": 64, "text_layers": 3,
        "text_length": 9, "projection_width": 11, "hard_from": 0.0,
    }  # fmt: skip
    begun = start_run(changed(SMALL, other), tmp_path, log=quiet)
    model, _ = package(backend).start_model(begun.recipe, begun.processor)
    made = model_config(begun.recipe, len(begun.processor.tokenizer)).to_dict()
    for part in ("vision_config", "text_config"):
        sizes = {
            name: value for name, value in made[part].items() if name not in ("initializer_range", "num_hidden_layers")
        }
        found = model.config.to_dict()[part]
        assert {name: found[name] for name in sizes} == sizes
    assert get_recipe(tmp_path / RECIPE_NAME) == begun.recipe
    assert begun.recipe.model.groups == (16,)
    assert (
        GroupViTConfig.from_pretrained(DEMO_MODEL).extra["segmentation_assignment"],
        made["segmentation_assignment"],
    ) == ("soft", "hard")
    assert model.config.to_dict()["segmentation_assignment"] == "hard"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "demo", "image_size": 100}, r"a multiple of the 8 pixels of a patch of demo, got 100"),
        ({"size": 32}, r"a scene of 32 x 32 pixels has no room"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_anything_is_made(backend, changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(backend, changed(SMALL, changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_objective_for_another_model_than_the_checkpoints():
    config = GroupViTConfig.from_dict(
        {"vision_config": {"num_group_tokens": [12, 6, 0], "num_output_groups": [12, 6, 6]}}
    )
    with pytest.raises(
        InputError, match=r"'groups' trains one grouping block, and some/where has 2 \(12, 6 groups\): use kind=paper"
    ):
        with_checkpoint_model(changed(SMALL, {"init_from": "some/where"}), config)
    with pytest.raises(InputError, match=r"model.image_size must be a multiple of model.patch_size, got 50 and 8"):
        changed(SMALL, {"image_size": 50})


def test_a_folder_that_cannot_be_made_is_one_clear_error(backend, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        run(backend, SMALL, tmp_path / "file" / "model")


@pytest.mark.parametrize(
    ("variant", "times"),
    [
        pytest.param({}, 22, id="demo"),
        # Steps of the paper's objective: also in tests/groupvit_tf/test_train.py.
        pytest.param(PAPER | {"gumbel": False, "hard_from": 1.0}, 1, id="paper", marks=pytest.mark.slow),
    ],
)
def test_both_backends_take_the_same_steps_and_lower_the_loss(variant, times, pictures, processor, tmp_path):
    """From one checkpoint, the whole recipe in float64: batches, schedule, clipping, weight decay, objective,
    optimizer.

    One batch many times, then others; of the paper's objective, which has fewer parts, two steps.
    """
    torch, keras = pytest.importorskip("torch"), pytest.importorskip("keras")
    from groupvit_tf.model import GroupViTModel
    from groupvit_torch import train as T
    from groupvit_torch.data import Inputs

    recipe = small(**variant, precision="float32", steps=25, learning_rate=3e-3)
    kinds = list(batches(changed(recipe, {"steps": 4}), pictures, processor, np.random.default_rng(0)))
    data = [kinds[0]] * times + (kinds[1:] if times > 1 else kinds[1:2])

    torch.manual_seed(0)
    model = T.new_model(recipe, processor)
    model.save_pretrained(tmp_path)
    model = model.double()
    module = T.Objective(model, recipe)
    optimizer, expected = T.make_optimizer(module), []
    for step, batch in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(recipe, step)
        inputs = Inputs.of(batch)
        inputs = replace(inputs, pixels=inputs.pixels.double())
        expected.append(T.train_step(module, optimizer, inputs, hard=False).loss)

    floatx = keras.config.floatx()
    keras.config.set_floatx("float64")  # of the learning rate
    try:
        model = GroupViTModel.from_pretrained(tmp_path, dtype="float64")
        losses, _ = fit(model, recipe, data, eager=times == 1)
    finally:
        keras.config.set_floatx(floatx)
    # Rounding at 1e-16, which grows through 25 steps at a high learning rate, on each CPU from other bits.
    np.testing.assert_allclose(losses, expected, rtol=1e-7)
    # Four seeds came down to 4-7 %. Half leaves room, but an objective whose sign is wrong, or of which one of several
    # terms alone is learnt, stays above it.
    assert times == 1 or losses[21] < 0.5 * losses[0]


def fit(
    model: Any, recipe: Recipe, data: list[Batch[Any]], *callbacks: Any, eager: bool = False
) -> tuple[list[float], Any]:
    """Keras: the loss of each step of `fit` on batches, and what `fit` trained."""
    import keras

    from groupvit_tf import train as K
    from groupvit_tf.data import dataset

    class Losses(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.reset_metrics()

        def on_train_batch_end(self, batch, logs=None):
            losses.append(float(logs["loss"]))

    losses: list[float] = []
    trainer = K.Trainer(model, recipe)
    trainer.compile(K.make_optimizer(trainer), jit_compile=False, run_eagerly=eager)
    trainer.fit(
        dataset(lambda: data, recipe),
        steps_per_epoch=len(data),
        shuffle=False,
        verbose=0,
        callbacks=[Losses(), *callbacks],
    )
    return losses, trainer


def test_patches_named_by_themselves_learn_but_leave_batch_norm_to_the_groups(backend, pictures, processor):
    """The second naming reaches the layers before grouping; the projection's running statistics stay those of the
    groups."""
    T, statistics, gradients = package(backend), [], []
    for weight in (0.0, 1.0):
        recipe = small(ungrouped_weight=weight, precision="float32")
        batch = next(batches(recipe, pictures, processor, np.random.default_rng(0)))
        if backend.name == "torch":
            import torch

            torch.manual_seed(0)
            model = T.new_model(recipe, processor).train()
            T.Objective(model, recipe)(package(backend, "data").Inputs.of(batch), False)[0].backward()
            gradient = model.vision_model.embeddings.patch_embeddings.projection.weight.grad
        else:
            import keras
            import tensorflow as tf

            keras.utils.set_random_seed(0)
            model = T.new_model(recipe, processor)
            trainer, inputs = T.Trainer(model, recipe), package(backend, "data").inputs(batch, recipe)
            with tf.GradientTape() as tape:
                loss = trainer.compute_loss(inputs, None, trainer(inputs, training=True))
            gradient = tape.gradient(loss, model.vision_model.embeddings.patch_embeddings.projection.kernel.value)
        statistics.append(backend.weights(model)["visual_projection.1.running_var"])
        gradients.append(np.asarray(gradient))
    np.testing.assert_array_equal(*statistics)
    assert not np.allclose(*gradients)


def test_a_model_that_names_at_random_measures_near_nothing(backend, processor):
    Segmenter = package(backend, "predictor").Segmenter
    model = package(backend).new_model(small(precision="float32"), processor)
    scenes = [make_scene(9, index, 1, (64, 96)) for index in range(3)]
    confusion = validation.scene_confusion(Segmenter(model, processor), scenes)
    assert confusion.shape == (9, 9)
    assert confusion.sum() == 3 * 64 * 96
    truth = np.bincount(np.concatenate([scene.mask.ravel() for scene in scenes]), minlength=9)
    assert (confusion.sum(axis=1) == truth).all()
    # Any one class everywhere measures at most 1.6 % here, and twelve untrained models at most 0.6 %.
    assert mean_iou(confusion, background=0) < 0.05


# Keras's parts


def test_the_schedule_gives_the_very_rates_of_the_recipe():
    keras = pytest.importorskip("keras")
    from groupvit_tf.train import Schedule

    recipe = get_recipe("scenes-demo")
    schedule = Schedule.from_config(Schedule.of(recipe).get_config())
    for step in (0, 1, 199, 200, 2000, recipe.schedule.total_steps - 1):
        assert np.float32(schedule(keras.ops.convert_to_tensor(step))) == np.float32(learning_rate_at(recipe, step))
    assert np.float32(schedule(recipe.schedule.total_steps + 5)) == np.float32(
        learning_rate_at(recipe, recipe.schedule.total_steps - 1)
    )


def test_weight_decay_spares_the_same_parameters_in_both_backends(processor):
    pytest.importorskip("torch")
    pytest.importorskip("keras")
    from groupvit_tf import train as K
    from groupvit_tf.checkpoint import canonical_variables
    from groupvit_torch import train as T

    model = T.new_model(SMALL, processor)
    group = T.make_optimizer(T.Objective(model, SMALL)).param_groups[0]
    assert group["weight_decay"] > 0
    decayed = {id(parameter) for parameter in group["params"]}
    expected = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}

    twin = K.new_model(SMALL, processor)
    optimizer = K.make_optimizer(K.Trainer(twin, SMALL))
    names = {id(variable): name for name, variable in canonical_variables(twin).items()}
    assert {names[id(v)] for v in twin.trainable_variables if optimizer._use_weight_decay(v)} == expected


def test_a_token_that_occurs_twice_counts_as_one_gradient():
    """Keras's own optimisers square the two parts of it, instead of their sum."""
    keras, tf = pytest.importorskip("keras"), pytest.importorskip("tensorflow")
    from groupvit_tf.train import AdamW

    ways = []
    for sparse in (True, False):
        table = keras.Variable(np.ones((4, 2), np.float32))
        with tf.GradientTape() as tape:
            rows = tf.gather(table.value, [1, 1, 2])
            loss = tf.reduce_sum(rows * [[1.0], [2.0], [3.0]])
        gradient = tape.gradient(loss, table.value)
        assert isinstance(gradient, tf.IndexedSlices)
        optimizer = AdamW(0.1, global_clipnorm=0.01)
        for _ in range(2):
            optimizer.apply([gradient if sparse else tf.convert_to_tensor(gradient)], [table])
        ways.append([np.asarray(variable) for variable in (table, *optimizer.variables)])
    for one, other in zip(*ways, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_average_of_the_weights_and_the_limit_of_the_temperature(processor, pictures):
    keras = pytest.importorskip("keras")
    from groupvit_tf import train as K
    from groupvit_tf.checkpoint import canonical_variables

    recipe = small(steps=2, precision="float32")
    model = K.new_model(recipe, processor)
    model.logit_scale.assign(7.0)
    mean = K.EMA(model, lambda step: [0.0, 0.25][step])
    names = ("text_projection.1.running_var", "visual_projection.0.weight", "logit_scale")
    seen: list[list[np.ndarray]] = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            variables = canonical_variables(model)
            seen.append([np.asarray(variables[name]).copy() for name in names])

    data = list(batches(recipe, pictures, processor, np.random.default_rng(0)))
    fit(model, recipe, data, Watch(), mean, eager=True)
    variables = canonical_variables(mean.new_model())
    for name, first, second in zip(names, *seen, strict=True):
        expected = first * 0.25 + second * 0.75
        np.testing.assert_allclose(np.asarray(variables[name]), expected, rtol=1e-6)  # float32
    assert seen[0][-1] == np.float32(np.log(100))


# Data


def test_both_backends_get_the_same_batches(pictures, processor):
    """What reaches `fit` is what reaches the PyTorch loop, and a seed decides all of it."""
    torch = pytest.importorskip("torch")
    tf = pytest.importorskip("tensorflow")
    from groupvit_tf.data import dataset

    for recipe in (SMALL, small(paper_weight=0.0), small(**PAPER)):

        def data(recipe: Recipe = recipe) -> Any:
            return batches(recipe, pictures, processor, np.random.default_rng(3))

        count = 0
        tensors = (batch.map(torch.from_numpy) for batch in data())
        for ours, theirs, again in zip(tensors, dataset(data, recipe), data(), strict=True):
            count += 1
            expected = {"pixel_values": ours.pixels, "prompts": ours.prompts}
            if recipe.objective.has_paper_losses:
                expected |= {"captions": ours.captions, "of_caption": ours.of_caption}
            if recipe.objective.kind == "groups":
                expected |= {"allowed": ours.allowed, "named": ours.named}
            assert theirs.keys() == expected.keys()
            one, other = (
                tf.nest.flatten({k: dict(v) if hasattr(v, "keys") else v for k, v in x.items()})
                for x in (theirs, expected)
            )
            for tensor, array in zip(one, other, strict=True):
                np.testing.assert_array_equal(tensor.numpy(), array.numpy())
            np.testing.assert_array_equal(again.pixels, ours.pixels.numpy())
        assert count == recipe.schedule.total_steps


def test_prompts_of_a_caption_are_its_own_and_differ(pictures, processor):
    recipe = small(**PAPER, steps=6)
    for batch in batches(recipe, pictures, processor, np.random.default_rng(0)):
        for row, named in zip(batch.of_caption, batch.named, strict=True):
            assert named[row].all()
            assert len(set(row.tolist())) == len(row)


def test_masks_never_reach_training():
    """Scenes that differ in nothing but their masks are the same to training, and a batch has no field that could hold
    one."""
    scenes = [make_scene(0, index, 1) for index in range(6)]
    blank = [Scene(s.image, s.caption, s.nouns, np.full_like(s.mask, 7), s.level, background=0) for s in scenes]
    first, second = (TrainingScenes(made.__getitem__, 6, 1, 64).take(range(6)) for made in (scenes, blank))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert {field.name for field in fields(Batch)} == {
        "pixels", "allowed", "named", "prompts", "captions", "of_caption",
    }  # fmt: skip


def test_held_out_scenes_are_none_of_the_training_scenes():
    recipe = get_recipe("scenes-demo")
    held_out = make_scene(recipe.scenes.held_out_seed, 0, 1).image.tobytes()
    assert all(make_scene(recipe.run.seed, index, 1).image.tobytes() != held_out for index in range(50))


def test_captions_become_rows_of_named_words():
    scenes = scenes_of(2, 20, 64, seed=3)
    _, captions, rows = scenes.take(range(20))
    for number, caption in enumerate(captions):
        row = {word for word, named in zip(scenes.words, rows[number], strict=True) if named}
        assert row == set(make_scene(3, number, 2).nouns)
        assert row <= set(caption.replace(",", "").split())


def test_scenes_are_made_when_they_are_drawn_and_once():
    made, rng = [], np.random.default_rng(0)
    scenes = TrainingScenes(lambda number: (made.append(number), make_scene(0, number, 1, (48, 48)))[1], 9, 1, 48)
    images, captions, _ = scenes.draw(rng, 4)
    assert 0 < len(made) <= 4
    for _ in range(20):
        scenes.draw(rng, 4)
    assert sorted(made) == list(range(9))
    assert len(images) == len(captions) == 4


def test_pixels_are_the_image_processors(pictures, processor):
    images = processor.image_processor
    drawn = pictures[3].take(range(12))[0]
    expected = images(list(drawn), return_tensors="np")["pixel_values"]
    assert drawn.shape[1] < SMALL.model.image_size
    ours = to_pixels(enlarged(drawn, SMALL.model.image_size, images.resample), images.image_mean, images.image_std)
    np.testing.assert_allclose(ours, expected, atol=1e-5)  # two orders of float32 arithmetic on values up to 3


def test_scenes_are_made_at_their_own_size_and_seen_at_the_models(pictures, processor):
    recipe = small(size=48, image_size=80)
    assert validation.validation_scenes(recipe, 1)[0].image.shape == (48, 48, 3)
    batch = next(batches(recipe, pictures, processor, np.random.default_rng(0)))
    assert batch.pixels.shape == (4, 3, 80, 80)
    assert small(size=0, image_size=80).scene_size == 80


@pytest.mark.parametrize("quarters", [False, True])
def test_mixed_patches_carry_the_words_of_their_own_picture(quarters):
    """Each picture is one colour of its own, so that every patch tells where it came from."""
    batch, side, patch = 6, 16, 4
    pixels = np.broadcast_to(np.arange(batch, dtype=np.float32)[:, None, None, None], (batch, 3, side, side))
    named = np.eye(batch, dtype=bool)
    mixed, allowed = mix_images(pixels, named, 3, patch, np.random.default_rng(0), quarters=quarters)
    origin = mixed[:, 0, ::patch, ::patch].reshape(batch, -1).astype(int)
    assert (allowed == named[origin]).all()
    assert (origin[3:] == np.arange(3, 6)[:, None]).all()  # the second half of the batch is left alone
    for number in range(3):
        assert len(set(origin[number].tolist())) == (
            3 if quarters else 2
        )  # of three pictures, a fourth quarter is one of them
    assert (mixed == mixed[:, :, ::patch, ::patch].repeat(patch, 2).repeat(patch, 3)).all()


def test_the_most_frequent_class_everywhere_has_its_share_as_iou():
    recipe = small(held_out_scenes=5)
    for level, value in validation.majority_mean_iou(recipe).items():
        masks = np.stack([scene.mask for scene in validation.validation_scenes(recipe, level)])
        shares = np.array([(masks == k + 1).mean() for k in range(len(LEVELS[level]))])
        # Its intersection is its own pixels, its union every pixel; all other classes that occur score nothing.
        assert value == pytest.approx(100 * shares.max() / (shares > 0).sum())
