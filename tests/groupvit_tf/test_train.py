"""Training with Keras: against PyTorch and the authors' numbers, on replicas, stopped and continued, skipped steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.paths import ROOT

keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

from groupvit_common.errors import CheckpointError, GroupViTError, InputError  # noqa: E402
from groupvit_common.storage.locks import FolderLock  # noqa: E402
from groupvit_common.training.checkpoints import Checkpoints  # noqa: E402
from groupvit_common.training.recipe import Recipe  # noqa: E402
from groupvit_common.training.run import Interrupted  # noqa: E402
from groupvit_common.training.schedule import learning_rate_at  # noqa: E402
from groupvit_common.training.settings import changed, to_toml  # noqa: E402
from groupvit_common.training.start import LOCK_NAME, make_processor  # noqa: E402
from groupvit_tf import data as D  # noqa: E402
from groupvit_tf import optimizer  # noqa: E402
from groupvit_tf import train as K  # noqa: E402
from groupvit_tf.checkpoint import canonical_variables, kind, to_canonical  # noqa: E402
from groupvit_tf.layers import DropPath  # noqa: E402
from groupvit_tf.model import GroupViTModel  # noqa: E402
from tests.support.replicas import BATCH, Losses, captions_recipe, small_config  # noqa: E402
from tests.support.training import (  # noqa: E402
    BEYOND_FLOAT32,
    PAPER,
    Captions,
    ends_alike,
    quiet,
    stopping_at,
    tiny,
    untraced,
)

# float64, relative to the array's largest value: rounding at 1e-16 through some steps of AdamW, whose epsilon is 1e-6
# here.
FLOAT64 = 1e-8

Arrays = dict[str, np.ndarray]


def trainer_of(recipe: Recipe, dtype: str = "float64", config: Any = None) -> K.Trainer:
    keras.utils.set_random_seed(3)
    trainer = K.Trainer(GroupViTModel(config or small_config(), dtype=dtype), recipe)
    # Eagerly: to trace a graph takes longer than these few steps.
    trainer.compile(K.make_optimizer(trainer), run_eagerly=True, jit_compile=False)
    return trainer


def to_array(variable: Any) -> np.ndarray:
    return to_canonical(kind(variable), np.asarray(variable))


def state(trainer: K.Trainer) -> Arrays:
    return {name: to_array(variable).copy() for name, variable in trainer.named_variables().items()}


def optimizer_state(trainer: K.Trainer) -> list[np.ndarray]:
    return [np.asarray(v).copy() for v in (*trainer.optimizer._momentums, *trainer.optimizer._velocities)]


def fit(trainer: K.Trainer, batches: list[Any], *callbacks: Any) -> list[float]:
    losses = Losses()
    data = D.dataset(lambda: batches, trainer.recipe)
    trainer.fit(data, steps_per_epoch=len(batches), shuffle=False, verbose=0, callbacks=[losses, *callbacks])
    return losses.values


def furthest(actual: Arrays, wanted: Arrays) -> float:
    assert actual.keys() == wanted.keys()
    largest = max(float(np.abs(value).max()) for value in wanted.values())
    return max(
        float(np.abs(actual[name] - wanted[name]).max()) / max(float(np.abs(wanted[name]).max()), 1e-3 * largest)
        for name in wanted
    )


# Against PyTorch and the authors


def test_steps_of_the_papers_objective_are_those_of_pytorch():
    """Multi-label prompts, two grouping blocks, clipping, weight decay, hard assignment; a batch that is not finite in
    between."""
    torch = pytest.importorskip("torch")
    from dataclasses import replace

    from groupvit_torch import train as T
    from groupvit_torch.data import Inputs
    from groupvit_torch.model import GroupViTModel as TorchModel

    config = small_config()
    vision = config.vision_config
    vision.depths, vision.num_group_tokens, vision.num_output_groups = [1, 1, 0], [5, 4, 0], [5, 4, 4]
    recipe = captions_recipe(clip_norm=1.0, steps=3)
    batches = list(islice(Captions(BATCH), 3))
    batches[1].pixel_values[0, 0, 0, 0] = np.nan

    trainer = trainer_of(recipe, config=config)
    module = T.Objective(TorchModel(config).double(), recipe)
    start = state(trainer)
    scale = start.pop("multi_label_logit_scale")
    module.model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in start.items()})
    with torch.no_grad():
        module.multi_label_logit_scale.copy_(torch.from_numpy(np.array(scale)))
    optimizer, expected = T.make_optimizer(module), []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = float(np.float32(learning_rate_at(recipe, step)))  # as Keras holds it
        inputs = Inputs.of(batch)
        inputs = replace(inputs, pixels=inputs.pixels.double())
        expected.append(T.train_step(module, optimizer, inputs, hard=True))

    skipped: list[tuple[float, float]] = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            skipped.append((logs["skipped"], logs["gradient_norm"]))

    losses = fit(trainer, batches, Watch())
    assert [bool(s) for s, _ in skipped] == [not step.taken for step in expected] == [False, True, False]
    np.testing.assert_allclose(losses, [step.loss for step in expected], rtol=1e-6)  # Keras reports float32
    norms = [(ours, theirs.norm) for (_, ours), theirs in zip(skipped, expected, strict=True) if theirs.taken]
    np.testing.assert_allclose(*zip(*norms, strict=True), rtol=1e-6)
    theirs = {name: value.detach().numpy() for name, value in module.named_variables().items()}
    assert furthest(state(trainer), theirs) < FLOAT64
    moved = {name: np.abs(theirs[name] - value).max() for name, value in start.items()}
    assert sum(value > 1e-4 for value in moved.values()) > 0.8 * len(moved)


def test_the_authors_losses_and_gradients(tmp_path):
    from conversion.convert import convert
    from conversion.formats import nvlabs
    from conversion.names import from_parts
    from groupvit_common.model.config import GroupViTConfig
    from groupvit_tf.loss import contrastive_loss, multi_label_contrastive_loss
    from tests.conversion.test_convert import EXTRA, FLOAT32, GRADIENT, NVLABS, NVLABS_CASES, entries, values

    for case in NVLABS_CASES:
        convert(NVLABS / case / "checkpoint.pth", tmp_path / case)
        model = GroupViTModel.from_pretrained(tmp_path / case)
        stored = values(tmp_path / case)
        with np.load(NVLABS / case / "expected.npz") as archive:
            expected = dict(archive)
        texts = expected["text"] if expected["text"].ndim == 3 else expected["text"][:, None]
        scale = keras.Variable(stored.get(EXTRA, 0.0))
        with tf.GradientTape() as tape:
            images = model.get_image_features(expected["pixel_values"])
            words = model.get_text_features(texts.reshape(-1, texts.shape[-1]))
            words = keras.ops.reshape(words, (*texts.shape[:2], -1))
            losses = {"contrastive_loss": contrastive_loss(images, words[:, 0], keras.ops.exp(model.logit_scale))}
            if "multi_label_loss" in expected:
                losses["multi_label_loss"] = multi_label_contrastive_loss(images, words[:, 1:], keras.ops.exp(scale))
            total = sum(losses.values())
        for name, loss in losses.items():
            assert abs(float(loss) - expected[name]) <= FLOAT32 * abs(expected[name]), name
        learnt = {name: v for name, v in canonical_variables(model).items() if v.trainable} | {EXTRA: scale}
        found = tape.gradient(total, {name: v.value for name, v in learnt.items()})
        gradients = {
            name: to_canonical(kind(learnt[name]), np.asarray(tf.convert_to_tensor(gradient)))
            for name, gradient in found.items()
            if gradient is not None
        }
        largest = max(np.abs(value).max() for name, value in expected.items() if name.startswith("grad."))
        compared = 0
        config = GroupViTConfig.from_pretrained(tmp_path / case)
        for entry in entries(nvlabs.NAMING, config, EXTRA in stored):
            if f"grad.{entry.foreign}" in expected:
                actual, wanted = from_parts(entry, gradients.__getitem__), expected[f"grad.{entry.foreign}"]
                # Some are zero by mathematics (of biases before a softmax or a norm): what is left there is rounding.
                limit = GRADIENT * max(np.abs(wanted).max(), 1e-3 * largest)
                assert np.abs(actual - wanted).max() <= limit, entry.foreign
                compared += 1
        assert compared == sum(name.startswith("grad.") for name in expected)


# Replicas


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.replicas", *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", **environment},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def same_as_one(directory: Path, task: str, others: list[str]) -> None:
    """Relative, in float64, where little but another order of summation is left; Keras reports losses in float32."""
    one = dict(np.load(directory / f"one-0-{task}.npz"))
    for other in others:
        two = dict(np.load(directory / f"{other}-{task}.npz"))
        np.testing.assert_allclose(two.pop("losses"), one["losses"], rtol=1e-6)
        assert furthest(two, {name: value for name, value in one.items() if name != "losses"}) < FLOAT64


@pytest.mark.slow  # `fit` on two replicas is in test_model.py
@pytest.mark.parametrize("task", ["captions", "groups", "chunks"])
def test_two_replicas_train_by_a_recipe_as_one_device_does(task, tmp_path):
    """Two logical CPUs under MirroredStrategy, with multi-label prompts, or with claims of which one replica has more,
    or with cached features of three of each replica's four images at a time."""
    finish(start([str(tmp_path), task, "one", "mirrored"]))
    same_as_one(tmp_path, task, ["mirrored-0"])


@pytest.mark.slow
def test_two_workers_train_as_one_process_does(tmp_path):
    """MultiWorkerMirroredStrategy: two processes that find each other over localhost."""
    tasks = "plain,captions,groups,chunks"
    workers = [f"localhost:{port}" for port in free_ports(2)]
    processes = [
        start(
            [str(tmp_path), tasks, "workers"],
            TF_CONFIG=json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}),
        )
        for index in range(2)
    ]
    for process in processes:
        finish(process)
    finish(start([str(tmp_path), tasks, "one"]))
    for task in tasks.split(","):
        same_as_one(tmp_path, task, ["workers-0", "workers-1"])


@pytest.mark.slow
def test_two_workers_run_a_recipe_measure_save_and_go_on(tmp_path):
    """`groupvit train` on each; then once more from the checkpoint in the middle; against one process."""
    measured = {"evaluation.data": ("scenes:1",), "evaluation.limit": 3}
    recipe = tiny(gumbel=False, evaluate_every=3, save_every=3, log_every=1, **measured)
    (tmp_path / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")

    def both() -> None:
        workers = [f"localhost:{port}" for port in free_ports(2)]
        command = [
            "train",
            str(tmp_path / "recipe.toml"),
            "--out",
            str(tmp_path / "two"),
            "--backend",
            "tf",
            "--resume",
            "auto",
        ]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "groupvit_common.cli", *command], cwd=ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "TF_CONFIG": json.dumps(
                    {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
                )},
            )
            for index in range(2)
        ]  # fmt: skip
        for process in processes:
            finish(process)

    def losses(name: str) -> list[float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, lines) if "loss" in record]

    both()
    K.train(recipe, tmp_path / "one", log=quiet)
    whole = losses("two")
    assert len(whole) == 6
    # The workers share the set's pictures. A pixel may change sides: the weights differ by rounding.
    sets = [json.loads((tmp_path / name / "training.json").read_text())["sets"] for name in ("one", "two")]
    assert sets[0].keys() == sets[1].keys() >= {"mean_iou/scenes:1"}
    assert sets[0] == pytest.approx(sets[1], abs=1.0)
    np.testing.assert_allclose(whole, losses("one"), rtol=1e-3)  # float32 through AdamW
    paths = Checkpoints(tmp_path / "two").all()
    assert [path.name for path in paths] == ["step-00000003", "step-00000006"]
    shutil.rmtree(paths[1])
    both()
    np.testing.assert_allclose(losses("two"), whole, rtol=1e-6)


# Skipped steps


@pytest.fixture(scope="module")
def trainer() -> K.Trainer:
    """One that has taken a step and that no test freezes; its state is what the tests before have left."""
    trainer = trainer_of(captions_recipe(gumbel=True), dtype="float32")
    fit(trainer, list(islice(Captions(BATCH, seed=1), 1)))
    return trainer


def test_a_skipped_step_leaves_no_trace(trainer):
    (bad,) = islice(Captions(BATCH), 1)
    bad.pixel_values[1] = np.inf
    taken, iterations = (int(count) for count in (trainer.optimizer.taken, trainer.optimizer.iterations))
    before, moments = state(trainer), optimizer_state(trainer)
    (loss,) = fit(trainer, [bad])
    assert not np.isfinite(loss)
    after = state(trainer)
    assert all((after[name] == value).all() for name, value in before.items())
    assert all((one == other).all() for one, other in zip(optimizer_state(trainer), moments, strict=True))
    assert int(trainer.optimizer.taken) == taken
    assert int(trainer.optimizer.iterations) == iterations + 1  # the learning rate goes on


def test_a_finite_gradient_of_a_loss_that_is_none_is_not_followed():
    variable, optimizer = keras.Variable([1.0, 2.0]), K.AdamW(0.1)
    optimizer.build([variable])
    with tf.GradientTape() as tape:
        loss = keras.ops.sum(variable) + np.inf
        scaled = optimizer.scale_loss(loss)
    optimizer.apply(tape.gradient(scaled, [variable.value]), [variable])
    np.testing.assert_array_equal(np.asarray(variable), [1.0, 2.0])


@pytest.fixture
def eagerly() -> Iterator[None]:
    """Runs whose steps are not traced, for which they are too few."""
    with untraced("tf"):
        yield


def test_a_run_ends_at_its_last_bad_step_with_the_batch_saved(eagerly, tmp_path):
    recipe = tiny(naming_weight=BEYOND_FLOAT32, max_bad_steps=2)
    lines: list[str] = []
    with pytest.raises(
        GroupViTError, match=r"the loss is inf at step 2 \(2 such steps\); its batch is in .*bad_batch.npz"
    ):
        K.train(recipe, tmp_path, log=lines.append)
    assert any("step 1 skipped: the loss is inf (1 of at most 2)" in line for line in lines)
    batch = np.load(tmp_path / "bad_batch.npz")
    assert batch["pixel_values"].shape == (8, 3, 48, 48)
    assert "prompts.input_ids" in batch


def test_a_graph_moves_the_average_as_eager_steps_do(trainer, monkeypatch):
    # So that a run which resumes in the middle has the bits of one that did not.
    averages = []
    for last_eager in (9, 1):
        monkeypatch.setattr(optimizer, "_UPDATES_BEFORE_TRACING", last_eager + 1)
        average = K.EMA(trainer.model, lambda step: [0.9, 0.7][step])
        for variable in average.averages.values():
            variable.assign(variable + np.float32(0.1))
        for step in range(2):
            average.update(step)
        averages.append(average.arrays())
    for name, value in averages[0].items():
        np.testing.assert_array_equal(averages[1][name], value, err_msg=name)


# Runs


RUN = {"gumbel": True, "drop_path": 0.3, "ema_decay": 0.9, "evaluate_every": 2, "log_every": 1, "steps": 2}
PAPER_RUN = {**RUN, **PAPER, "steps": 6, "ema_decay": 0.0, "depths": (1, 1, 0), "groups": (4, 3), "hard_from": 0.5}


@pytest.mark.parametrize(
    "settings",
    [
        RUN,
        pytest.param({**PAPER_RUN, "precision": "float16", "steps": 16}, marks=pytest.mark.slow),
        pytest.param({**PAPER_RUN, "precision": "bfloat16"}, marks=pytest.mark.slow),
    ],
    ids=["groups-mean", "paper-float16", "paper-bfloat16"],
)
def test_a_run_that_is_stopped_and_continued_ends_with_the_same_bits(eagerly, settings, tmp_path):
    recipe = tiny(**settings)
    whole = K.train(recipe, tmp_path / "whole", log=quiet)
    assert whole.bad_steps == 0
    last = max(recipe.schedule.total_steps - 2, 1)  # the scale of float16's gradients falls at first
    with pytest.raises(Interrupted, match=f"stopped by SIGTERM at step {last}, saved; continue with --resume auto"):
        K.train(recipe, tmp_path / "parts", log=stopping_at(last))
    parts = K.train(recipe, tmp_path / "parts", resume="auto", log=quiet)
    assert parts.losses == whole.losses[last:]
    assert parts.mean_iou == whole.mean_iou
    ends_alike(tmp_path / "whole", tmp_path / "parts")
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    for one, other in zip(*records, strict=True):
        told = {"images_per_second"}
        assert {k: v for k, v in one.items() if k not in told} == {k: v for k, v in other.items() if k not in told}
    assert {"loss", "learning_rate", "gradient_norm", "logit_scale", "groups_in_use", "map_likeness"} <= set(
        records[0][0]
    )


@pytest.fixture(scope="module")
def torch_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of PyTorch, with a multi-label temperature."""
    pytest.importorskip("torch")
    from groupvit_torch import train as T

    directory = tmp_path_factory.mktemp("run")
    T.train(tiny(steps=2, save_every=2), directory, device="cpu", log=quiet)
    return directory


def rewound(whole: Path, directory: Path) -> Path:
    """A copy of a run without its last checkpoint: it stands where the one before was saved."""
    shutil.copytree(whole, directory)
    shutil.rmtree(Checkpoints(directory).all()[-1])
    return directory


def test_a_run_goes_on_in_the_other_framework(eagerly, torch_run, tmp_path):
    """Without noise, from the same initial values: as if there had been no change."""
    from groupvit_torch import train as T

    train = {"torch": T.train, "tf": K.train}
    recipe = tiny(init_from=str(torch_run), gumbel=False, ema_decay=0.9, log_every=1, steps=2, save_every=1)
    whole = {name: train[name](recipe, tmp_path / name, log=quiet).losses for name in train}
    for first, second in (("torch", "tf"), ("tf", "torch")):
        directory = rewound(tmp_path / first, tmp_path / f"{first}-{second}")
        (loss,) = train[second](recipe, directory, resume="auto", log=quiet).losses
        # float32, which AdamW's division by a gradient's own size makes visible.
        assert loss == pytest.approx(whole[second][1], rel=1e-3)
        assert loss != pytest.approx(whole[second][0], rel=1e-3)


KILLED = """
import os, signal, sys
import groupvit_tf
from groupvit_tf.train import train
from tests.groupvit_tf.test_train import RUN
from tests.support.training import tiny

def log(line):
    if line.startswith("step 4/"):
        os.kill(os.getpid(), signal.SIGKILL)

recipe = tiny(**{**RUN, "steps": 6}, save_every=1)
train(recipe, sys.argv[1], resume="auto", log=log if sys.argv[2] == "kill" else lambda line: None)
"""


def test_hard_assignment_begins_at_the_recipes_step(monkeypatch):
    """Which traces the graph once more."""
    trainer = trainer_of(captions_recipe(hard_from=0.5, steps=4), dtype="float32")
    traced: list[int] = []
    monkeypatch.setattr(trainer, "make_train_function", lambda force=False: traced.append(step) if force else None)
    callback = K.HardAssignment(trainer.recipe)
    callback.set_model(trainer)
    hard = []
    for step in range(4):
        trainer.optimizer.iterations.assign(step)
        callback.on_train_batch_begin(step)
        hard.append(trainer.assign_hard)
    assert hard == [False, False, True, True]
    assert traced == [2]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_with_the_same_bits(tmp_path):
    """Traced graphs this time; SIGKILL in the middle of a step, the newest checkpoint cut short besides."""

    def run(name: str, how: str) -> int:
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path / name), how], cwd=ROOT, check=False, timeout=600
        ).returncode

    assert run("whole", "") == 0
    assert run("killed", "kill") == -signal.SIGKILL
    newest = Checkpoints(tmp_path / "killed").all()[-1]
    assert newest.name == "step-00000003"
    os.truncate(newest / "state.safetensors", 100)
    assert run("killed", "") == 0
    ends_alike(tmp_path / "whole", tmp_path / "killed")


def recipe_of_pictures(directory: Path) -> Recipe:
    """Twenty of them, with prompts of their captions' nouns, and a tokenizer."""
    from PIL import Image

    from groupvit_common.data.captions.settings import DataSettings, SourceSettings

    pictures = directory / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(rng.integers(0, 255, (60, 50, 3), np.uint8)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"a dog and {number} cats on a red sofa")
    make_processor(tiny(), ("a dog and cats on a red sofa",)).save_pretrained(directory / "tokenizer")
    data = DataSettings(
        sources=(SourceSettings(kind="folder", path=str(pictures)),), image_size=48, prompts=2, rand_augment=0
    )
    settings = {"data": data, "tokenizer": str(directory / "tokenizer"), "workers": 1}
    return changed(tiny(**PAPER, log_every=1), settings)


def test_captioned_images_train_with_worker_processes(eagerly, tmp_path):
    """From a folder; resumed in the middle of an epoch."""
    recipe = changed(recipe_of_pictures(tmp_path), {"steps": 2, "save_every": 1})
    measured = {"quality": 1.0}
    whole = K.train(recipe, tmp_path / "whole", log=quiet, evaluate=lambda segmenter: measured)
    parts = rewound(tmp_path / "whole", tmp_path / "parts")
    # Batches do not depend on the number of workers.
    resumed = K.train(
        changed(recipe, {"workers": 0}), parts, resume="auto", log=quiet, evaluate=lambda segmenter: measured
    )
    assert resumed.losses == whole.losses[1:]
    ends_alike(tmp_path / "whole", parts)
    assert json.loads((tmp_path / "whole" / "training.json").read_text())["evaluated"] == measured


def test_a_checkpoint_of_another_model_is_refused(torch_run, tmp_path):
    """Of whichever framework."""
    shutil.copytree(torch_run, tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"of another model than the recipe's: .* has another shape"):
        K.train(tiny(width=16), tmp_path, resume="auto", log=quiet)
    # Whatever else is wrong: another training there, no checkpoint that is valid.
    lock = FolderLock(tmp_path, LOCK_NAME, "training")
    with pytest.raises(InputError, match="another training writes into"):
        K.train(tiny(), tmp_path, resume="auto", log=quiet)
    lock.release()
    (path,) = Checkpoints(tmp_path).all()
    (path / "state.json").write_text("{}")
    for resume in ("auto", "never"):
        with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints in .* and none was removed"):
            K.train(tiny(), tmp_path, resume=resume, log=quiet)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints in"):
        K.Checkpoint(tmp_path, log=quiet).restore(None)
    assert Checkpoints(tmp_path).all() == [path]


# Parts for scripts of one's own


def test_a_script_of_ones_own_goes_on_from_its_checkpoint(eagerly, tmp_path):
    """The model itself in `fit`, on its own data set: EMA, measures, the grouping watched, the best kept, noise and
    all."""
    from tests.support.models import smallest_config, smallest_inputs

    inputs, processor = smallest_inputs(), make_processor(tiny(), ("a red thing",))

    # One model for all scripts, each from its first values.
    keras.utils.set_random_seed(0)
    model = GroupViTModel(smallest_config())
    model.compile(K.AdamW(1e-3), jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    variables = (*model.variables, *model.optimizer.variables)
    first = [np.asarray(variable).copy() for variable in variables]

    def script(directory: Path, epochs: int, other: bool = False) -> tuple[Arrays, dict[str, Any], int]:
        for variable, value in zip(variables, first, strict=True):
            variable.assign(value)
        for variable in model.variables if other else ():
            variable.assign(np.asarray(variable) + 1)  # weights and seeds that a script which resumes must not keep
        average = K.EMA(model, lambda step: 0.5)
        models: list[GroupViTModel] = []

        def measure(segmenter: Any) -> dict[str, float]:
            models.append(segmenter.model)
            variables = canonical_variables(segmenter.model)
            for name, value in average.arrays().items():
                np.testing.assert_array_equal(to_array(variables[name]), value)
            return {"quality": next(measures)}

        evaluation = K.Evaluation(measure, processor, every=1, average=average, log=quiet)
        grouping = K.GroupingMeasures(inputs["pixel_values"], every=2, log=quiet)
        checkpoint = K.Checkpoint(
            directory, every=1, keep=1, average=average, evaluation=evaluation, processor=processor, log=quiet
        )
        done = checkpoint.restore(model)
        seen: dict[str, Any] = {}
        watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.update(logs))
        callbacks = [average, evaluation, grouping, watch, K.StopOnBadSteps(), checkpoint]
        model.fit(tf.data.Dataset.from_tensors(inputs), epochs=epochs, verbose=0, callbacks=callbacks)
        assert len(models) == epochs
        assert len(set(map(id, models))) == 1  # made once, given the weights of each step
        return average.arrays(), seen, done

    measures = iter([1.0, 9.0, 2.0])
    whole, seen, done = script(tmp_path / "whole", 3)
    assert done == 0
    assert [path.name for path in Checkpoints(tmp_path / "whole").all()] == ["step-00000002", "step-00000003"]
    assert {"loss", "quality", "groups_in_use", "map_likeness"} <= seen.keys()
    measures = iter([2.0])
    parts, _, done = script(rewound(tmp_path / "whole", tmp_path / "parts"), 1, other=True)
    assert done == 2
    for name, value in whole.items():
        np.testing.assert_array_equal(parts[name], value, err_msg=name)
    last = Checkpoints(tmp_path / "parts").all()[-1] / "model"
    saved = canonical_variables(GroupViTModel.from_pretrained(last))
    np.testing.assert_array_equal(np.asarray(saved["logit_scale"]), whole["logit_scale"])


def test_the_script_of_the_documentation(eagerly, monkeypatch, tmp_path):
    """Run twice: the second time goes on to one step more."""
    text = (ROOT / "docs" / "keras.md").read_text(encoding="utf-8")
    (script,) = (block for block in re.findall("```python\n(.*?)```", text, re.DOTALL) if "CaptionStream(" in block)
    script = script.replace("workers=8", "workers=0").replace("every=2000", "every=1").replace("every=100", "every=1")
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of_pictures(tmp_path)
    for steps in (1, 2):
        Path("my.toml").write_text(to_toml(changed(recipe, {"steps": steps, "warmup_steps": 0})), encoding="utf-8")
        exec(script, {"pixels": np.random.default_rng(0).standard_normal((4, 3, 48, 48)).astype(np.float32)})
    assert [path.name for path in Checkpoints(Path("runs/mine")).all()] == [f"step-0000000{n}" for n in (1, 2)]
    assert list(Path("runs/mine/tensorboard/train").glob("events.*"))
    GroupViTModel.from_pretrained("runs/mine/checkpoints/step-00000002/model")


def test_a_script_of_ones_own_ends_at_its_last_bad_step(trainer):
    batches = list(islice(Captions(BATCH), 5))
    for number in (0, 1, 3):
        batches[number].pixel_values[:] = np.nan
    lines: list[str] = []
    stop = K.StopOnBadSteps(2, log=lines.append)
    assert len(fit(trainer, batches, stop)) == 2
    trainer.stop_training = False
    assert stop.bad_steps == 2
    assert lines[-1] == "a loss or gradient is not finite (2 of at most 2 steps)"


def test_a_checkpoint_that_could_not_go_on_is_refused(tmp_path):
    model = GroupViTModel(small_config())
    model.compile(keras.optimizers.SGD())
    checkpoint = K.Checkpoint(tmp_path, log=quiet)
    checkpoint.set_model(model)
    with pytest.raises(InputError, match=r"needs groupvit_tf.train.AdamW as the optimizer, got SGD"):
        checkpoint.on_train_end()


# What is learnt, and from where it starts


@pytest.mark.parametrize("settings", [{"train_only": ("group_token",)}, {"freeze": ("text_model", "text_projection")}])
def test_what_is_frozen_stays(settings):
    trainer = trainer_of(captions_recipe(**settings), dtype="float32")
    before = state(trainer)
    fit(trainer, list(islice(Captions(BATCH), 1)))
    after = state(trainer)
    moved = {name for name in before if (after[name] != before[name]).any()}
    if "train_only" in settings:
        assert moved == {"vision_model.encoder.stages.0.group_token"}
    else:
        # Its batch norm's statistics too.
        assert not any(name.startswith(("text_model", "text_projection")) for name in moved)
        assert {"logit_scale", "visual_projection.1.running_mean", "multi_label_logit_scale"} <= moved


@pytest.mark.parametrize("setting", ["freeze", "train_only"])
def test_a_part_that_is_not_there_cannot_be_frozen(setting):
    with pytest.raises(InputError, match=r"no parameter is called 'colour'; there are those of logit_scale, "):
        trainer_of(captions_recipe(**{setting: ("colour",)}))


def test_a_run_starts_from_a_checkpoint_at_another_size(torch_run):
    """The positions are interpolated for good, as the model does it at that size, and the second temperature goes
    on."""
    from groupvit_common.preprocessing.processor import GroupViTProcessor

    recipe = tiny(**PAPER, init_from=str(torch_run), image_size=64)
    model, scale = K.start_model(recipe, GroupViTProcessor.from_pretrained(torch_run))
    old = GroupViTModel.from_pretrained(torch_run)
    assert model.config.vision_config.image_size == 64
    pixels = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    np.testing.assert_allclose(
        np.asarray(model.get_image_features(pixels)), np.asarray(old.get_image_features(pixels)), atol=1e-6
    )
    trainer = K.Trainer(model, recipe, scale)
    assert float(trainer.multi_label_logit_scale) == pytest.approx(scale)
    assert scale != pytest.approx(float(model.logit_scale))


def test_dropped_paths():
    """Whole images are dropped, the others scaled up, as often as the rate says; a layer that is computed again drops
    the same."""
    rate, ones = 0.25, np.ones((4000, 2, 3), np.float32)
    dropped = np.asarray(DropPath(rate, keras.random.SeedGenerator(0))(ones))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / (1 - rate))}
    assert (dropped == dropped[:, :1, :1]).all()
    assert (dropped[:, 0, 0] == 0).mean() == pytest.approx(rate, abs=0.03)  # four standard deviations

    recipe = captions_recipe(drop_path=0.5, depths=(2, 0))
    config = small_config()
    config.vision_config.depths = [2, 0]
    gradients = []
    for again in (False, True):
        keras.utils.set_random_seed(3)
        trainer = K.Trainer(GroupViTModel(config, dtype="float64"), changed(recipe, {"gradient_checkpointing": again}))
        inputs = D.inputs(next(iter(Captions(BATCH))), recipe)
        with tf.GradientTape() as tape:
            loss = trainer.compute_loss(inputs, None, trainer(inputs, training=True))
        token = trainer.model.vision_model.encoder.stages[0].group_token
        gradients.append(np.asarray(tape.gradient(loss, token.value)))
    np.testing.assert_allclose(*gradients, rtol=1e-9, atol=1e-12)


# Data


def test_a_feed_knows_which_batches_are_done():
    stream = Captions(BATCH)
    feed = D.Feed(stream)
    data = iter(D.dataset(lambda: feed, captions_recipe()))
    first = next(data)
    place = feed.state_dict()  # nothing is done yet, whatever was fetched ahead
    batch = feed.done()
    np.testing.assert_array_equal(batch.pixel_values, first["pixel_values"].numpy())
    again = Captions(BATCH)
    again.load_state_dict(place)
    np.testing.assert_array_equal(next(iter(again)).pixel_values, batch.pixel_values)
    second = next(data)
    again.load_state_dict(feed.state_dict())
    np.testing.assert_array_equal(next(iter(again)).pixel_values, second["pixel_values"].numpy())
    assert second["prompts"]["input_ids"].shape == (BATCH, 3, 12)
    feed.close()


def test_a_batch_is_divided_among_replicas():
    batch = {
        "pixel_values": np.arange(4), "of_caption": np.arange(4), "captions": {"input_ids": np.arange(8).reshape(4, 2)},
        "prompts": {"input_ids": np.arange(6).reshape(3, 2)},
    }  # fmt: skip
    one, two = D.parts(batch, 2)
    np.testing.assert_array_equal(two["pixel_values"], [2, 3])
    np.testing.assert_array_equal(two["captions"]["input_ids"], [[4, 5], [6, 7]])
    assert one["prompts"]["input_ids"].shape == (3, 2)  # words that all images share
    batch["prompts"] = {"input_ids": np.zeros((4, 3, 2))}
    assert next(D.parts(batch, 2))["prompts"]["input_ids"].shape == (2, 3, 2)
