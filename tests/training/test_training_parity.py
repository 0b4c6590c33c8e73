"""A training step is the same in PyTorch and in Keras: from one checkpoint, with the same batches and noise, four steps
each.

PyTorch runs a plain loop, Keras `compile` and `fit`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

import groupvit_tf  # noqa: E402
import groupvit_torch  # noqa: E402
from groupvit_common.model.config import GroupViTConfig  # noqa: E402
from groupvit_common.training.schedule import has_weight_decay  # noqa: E402
from groupvit_tf.checkpoint import canonical_variables, kind, to_canonical  # noqa: E402
from groupvit_tf.train import AdamW  # noqa: E402
from tests.support.parity import Arrays, Draw, TorchSide, difference, has_gradient, watched_margins  # noqa: E402
from tests.support.replicas import Losses  # noqa: E402

STEPS, BATCH = 4, 6

# float64, relative to the array's largest value. Rounding at 1e-16 through four steps; see EPSILON for where it is
# amplified.
FLOAT64 = 1e-9
# float32: a gradient is off by 1e-5 of itself at most, and four steps change a parameter by a tenth of itself at most.
FLOAT32 = 1e-5
# AdamW divides each gradient by its own size: one that is small beside its rounding, such as that of a hidden unit
# that is nearly off, becomes a step like any other. 1.4e-4 was found for the parameters that have a gradient; most are
# below 1e-6.
ADAMW_FLOAT32 = 1e-3

# Powers of two: Keras holds the learning rate in float32, and TensorFlow casts a Python float by way of it.
SGD_RATE, ADAMW_RATE, DECAY = 2.0**-7, 2.0**-8, 2.0**-4
# Where a gradient is zero by mathematics, AdamW divides rounding noise of 1e-16 by this: with the usual 1e-8 it would
# show.
EPSILON = 1e-6
BETAS = (0.9, 0.98)

Steps = list[dict[str, Any]]


@pytest.fixture(scope="module")
def config() -> GroupViTConfig:
    """Two stages of one layer: a step takes as long as there are parameters, however small."""
    return GroupViTConfig(
        text_config={
            "vocab_size": 30, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 7, "eos_token_id": 29,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "depths": [1, 1], "num_group_tokens": [5, 0],
            "num_output_groups": [4, 4], "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
        },
        projection_dim=10, projection_intermediate_dim=18,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(config: GroupViTConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in float32."""
    side, draw = TorchSide("float32"), Draw(0)
    draw.config = config
    directory = tmp_path_factory.mktemp("checkpoint")
    draw.fill(side, side.build(config)).save_pretrained(directory)
    return directory


class Course(NamedTuple):
    """Inputs and noise of each step, float32, and what PyTorch makes of the checkpoint with them in float64, by
    optimizer."""

    batches: Steps
    all_steps: dict[str, Arrays]


@pytest.fixture(scope="module")
def course(config: GroupViTConfig, checkpoint: Path) -> Course:
    """One that keeps away from the borders of `tests.support.parity` at every step."""
    for seed in range(2, 30):
        draw = Draw(seed)
        draw.config = config
        batches = [draw_batch(draw) for _ in range(STEPS)]
        with watched_margins() as margins:
            models = {name: load("torch", checkpoint, "float64") for name in ("sgd", "adamw")}
            for optimizer, model in models.items():
                in_torch(model, optimizer, batches)
        if min(margins) >= 1:
            return Course(batches, {optimizer: state(model) for optimizer, model in models.items()})
    raise AssertionError("no batches keep away from the borders")


def draw_batch(draw: Draw) -> dict[str, Any]:
    pixels = draw.normal(BATCH, 3, 16, 12) + 2 * draw.normal(BATCH, 3, 1, 1)
    ids = draw.rng.integers(3, 29, (BATCH, 7))
    mask = (np.arange(7) < draw.rng.integers(3, 8, (BATCH, 1))).astype(np.int64)
    ids[np.arange(BATCH), mask.sum(1) - 1] = 29
    # A tuple: tf.data would make one tensor of a list.
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "gumbel_noise": tuple(draw.noise(pixels))}


def load(backend: str, directory: Path, dtype: str) -> Any:
    package = groupvit_torch if backend == "torch" else groupvit_tf
    return package.GroupViTModel.from_pretrained(directory, dtype=dtype)


def state(model: Any) -> Arrays:
    """Every parameter and batch-norm statistic by canonical name."""
    if isinstance(model, torch.nn.Module):
        return {name: value.numpy().copy() for name, value in model.state_dict().items()}
    return {name: to_canonical(kind(v), v.numpy()).copy() for name, v in canonical_variables(model).items()}


def in_torch(model: Any, optimizer: str, steps: Steps, accumulate: int = 1) -> list[float]:
    """A plain loop; the loss of every batch. With `accumulate`, a step is made of the mean gradient of so many
    batches."""
    if optimizer == "sgd":
        made = torch.optim.SGD(model.parameters(), lr=SGD_RATE)
    else:
        named = dict(model.named_parameters())
        groups = [
            {
                "params": [p for n, p in named.items() if has_weight_decay(n, p.ndim) == decayed],
                "weight_decay": DECAY * decayed,
            }
            for decayed in (True, False)
        ]
        made = torch.optim.AdamW(groups, lr=ADAMW_RATE, betas=BETAS, eps=EPSILON)
    losses = []
    model.train()
    for number, batch in enumerate(steps):
        noise = [torch.from_numpy(array).to(model.dtype) for array in batch["gumbel_noise"]]
        inputs = {name: torch.from_numpy(array) for name, array in batch.items() if name != "gumbel_noise"}
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        loss = model(**inputs, gumbel_noise=noise, return_loss=True).loss
        (loss / accumulate).backward()
        losses.append(loss.item())
        if (number + 1) % accumulate == 0:
            made.step()
            made.zero_grad()
    return losses


def keras_optimizer(model: Any, optimizer: str, **options: Any) -> Any:
    if optimizer == "sgd":
        return keras.optimizers.SGD(SGD_RATE, **options)
    made = AdamW(ADAMW_RATE, weight_decay=DECAY, beta_1=BETAS[0], beta_2=BETAS[1], epsilon=EPSILON, **options)
    spared = [v for name, v in canonical_variables(model).items() if not has_weight_decay(name, len(v.shape))]
    made.exclude_from_weight_decay(spared)
    return made


def in_keras(model: Any, optimizer: str, steps: Steps, *, accumulate: int | None = None) -> list[float]:
    """`compile` and `fit` on dictionaries with the noise in them, eagerly, which is quicker for so few steps; the loss
    of every batch."""
    made = keras_optimizer(model, optimizer, gradient_accumulation_steps=accumulate)
    model.compile(made, run_eagerly=True, jit_compile=False)
    data = tf.data.Dataset.from_tensors(steps[0])
    for batch in steps[1:]:
        data = data.concatenate(tf.data.Dataset.from_tensors(batch))
    losses = Losses()
    model.fit(data, verbose=0, callbacks=[losses])
    return losses.values


def furthest(actual: Arrays, wanted: Arrays, names: Callable[[str], bool] = lambda name: True) -> float:
    """The largest difference relative to the array's largest value; counters must be equal."""
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.endswith("num_batches_tracked"):
            assert actual[name] == value
    return max(difference(actual[name], wanted[name]) for name in wanted if names(name))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_four_steps_in_float64(checkpoint: Path, course: Course, optimizer: str) -> None:
    ours = load("tf", checkpoint, "float64")
    before = state(ours)
    in_keras(ours, optimizer, course.batches)
    after = state(ours)
    moved = [name for name in before if difference(after[name], before[name]) > 1e-4]
    assert len(moved) > 0.8 * len(before)
    assert furthest(after, course.all_steps[optimizer]) < FLOAT64


# SGD's steps are those of float64, above.
@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.slow), "adamw"])
def test_four_steps_in_float32(checkpoint: Path, course: Course, optimizer: str) -> None:
    ours, theirs = (load(name, checkpoint, "float32") for name in ("tf", "torch"))
    wanted = in_torch(theirs, optimizer, course.batches)
    losses = in_keras(ours, optimizer, course.batches)
    assert len(set(losses)) == STEPS
    np.testing.assert_allclose(losses, wanted, rtol=FLOAT32)

    def comparable(name: str) -> bool:
        # AdamW makes steps of rounding noise where the gradient is zero by mathematics. Batch norm's running mean
        # follows the bias in front of it, which is such a one, and takes it away again.
        return optimizer == "sgd" or (has_gradient(name, training=True) and not name.endswith("running_mean"))

    assert furthest(state(ours), state(theirs), comparable) < (FLOAT32 if optimizer == "sgd" else ADAMW_FLOAT32)


@pytest.mark.parametrize(("first", "second"), [("torch", "tf"), ("tf", "torch")])
def test_a_run_continues_in_the_other_framework(
    tmp_path: Path, checkpoint: Path, course: Course, first: str, second: str
) -> None:
    run = {"torch": in_torch, "tf": in_keras}
    model = load(first, checkpoint, "float64")
    run[first](model, "sgd", course.batches[:2])
    model.save_pretrained(tmp_path)
    model = load(second, tmp_path, "float64")
    run[second](model, "sgd", course.batches[2:])
    assert furthest(state(model), course.all_steps["sgd"]) < FLOAT64


def test_accumulation_takes_the_mean_of_the_batches_gradients(checkpoint: Path, course: Course) -> None:
    ours, theirs = (load(name, checkpoint, "float64") for name in ("tf", "torch"))
    in_torch(theirs, "adamw", course.batches, accumulate=2)
    in_keras(ours, "adamw", course.batches, accumulate=2)
    assert furthest(state(ours), state(theirs)) < FLOAT64
