"""Ranks together compute what one process computes with the whole batch: losses, statistics, gradients, whole runs."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing

from groupvit_common.evaluation.datasets.segmentation import open_sets
from groupvit_common.evaluation.segmentation import evaluate_segmentation
from groupvit_common.training.checkpoints import Checkpoints
from groupvit_common.training.recipe import Recipe
from groupvit_common.training.run import Interrupted
from groupvit_common.training.scene_batches import SceneBatches
from groupvit_common.training.start import first_captions, make_processor
from groupvit_torch import train as T
from groupvit_torch.distributed import ProcessInfo, batch_norm, gather, num_replicas, process_group, replica_sum
from groupvit_torch.loss import contrastive_loss
from groupvit_torch.predictor import Segmenter
from groupvit_torch.train_state import load_weights
from tests.support.training import PAPER, Captions, quiet, scenes_of, tiny, train
from tests.training.test_train_step import inputs_of, module_of

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")

STEPS = 5
BATCH = 8
EXACT = {"rtol": 0, "atol": 1e-12}  # float64, another order of summation
LOSS = 1e-9  # of the promised 1e-6
PARAMETERS = 1e-7  # of the promised 1e-5


def in_ranks(work: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """Runs `work(*arguments)` in as many processes, told about each other as `torchrun` does it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (ranks, port, work, arguments), nprocs=ranks)


def _rank(number: int, ranks: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    work(*arguments)


# Functions


def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    return images.requires_grad_(), texts.requires_grad_()


def norm_of_features() -> torch.nn.BatchNorm1d:
    norm = torch.nn.BatchNorm1d(4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.5, 0.0, 0.1, 0.2]))
    return norm


def functions(directory: Path, process: ProcessInfo) -> None:
    ranks = process.world
    images, texts = (whole.detach().chunk(ranks)[process.rank].requires_grad_() for whole in features())
    norm = norm_of_features()
    normed = batch_norm(norm, images)
    loss = contrastive_loss(gather(normed), gather(texts), 7.0)
    # As data-parallel training does it: every rank's loss, the gradients' mean.
    (loss / num_replicas()).backward()
    total = replica_sum(images.detach().sum(dim=0).requires_grad_())
    alone = batch_norm(norm, images.detach(), together=False, keep=False)
    np.savez(
        directory / f"{process.rank}.npz",
        loss=loss.detach().numpy(),
        images=images.grad.numpy(),
        texts=texts.grad.numpy(),
        weight=norm.weight.grad.numpy(),
        total=total.detach().numpy(),
        mean=norm.running_mean.numpy(),
        variance=norm.running_var.numpy(),
        alone=alone.detach().mean(dim=0).numpy(),
    )


def test_two_ranks_are_one_process_with_the_whole_batch(two_ranks: Path) -> None:
    answers = [np.load(two_ranks / f"{number}.npz") for number in range(2)]

    images, texts = features()
    norm = norm_of_features()
    loss = contrastive_loss(norm(images), texts, 7.0)
    loss.backward()
    for answer in answers:
        np.testing.assert_allclose(answer["loss"], loss.item(), **EXACT)
        np.testing.assert_allclose(answer["total"], images.detach().sum(dim=0), **EXACT)
        np.testing.assert_allclose(answer["mean"], norm.running_mean, **EXACT)
        np.testing.assert_allclose(answer["variance"], norm.running_var, **EXACT)
        np.testing.assert_allclose(answer["alone"], norm.bias.detach(), **EXACT)  # its own inputs' mean is taken away
    for name, whole in (("images", images), ("texts", texts)):
        np.testing.assert_allclose(np.concatenate([a[name] for a in answers]), whole.grad, **EXACT)
    np.testing.assert_allclose(sum(a["weight"] for a in answers), norm.weight.grad, **EXACT)


def test_alone_nothing_happens() -> None:
    images, _ = features()
    assert num_replicas() == 1
    assert gather(images) is images
    assert replica_sum(images) is images
    with process_group("cpu") as process:
        assert (process.rank, process.world, process.all("x"), process.mean([1.5])) == (0, 1, ["x"], [1.5])


# Steps


def recipe_of(task: str, chunk: int) -> Recipe:
    settings = {"gumbel": False, "chunk_size": chunk, "learning_rate": 1e-3}
    return tiny(**settings) if task == "groups" else tiny(**PAPER | settings)


def steps(task: str, chunk: int, process: ProcessInfo) -> dict[str, Any]:
    """Five steps of this rank: the losses, and the weights after them."""
    recipe = recipe_of(task, chunk)
    if task == "captions":
        data: Any = iter(Captions(BATCH, rank=process.rank, world=process.world))
    else:
        pictures = {1: scenes_of()}
        data = SceneBatches(
            recipe,
            pictures,
            make_processor(recipe, first_captions(pictures, 16)),
            rank=process.rank,
            world=process.world,
        )
    module = module_of(recipe)
    optimizer = T.make_optimizer(module)
    wrapped = torch.nn.parallel.DistributedDataParallel(module, broadcast_buffers=False) if process.world > 1 else None
    results = [
        T.train_step(module, optimizer, inputs_of(batch), hard=True, process=process, wrapped=wrapped)
        for batch in islice(data, STEPS)
    ]
    assert all(result.taken for result in results)
    weights = {name: tensor.detach().numpy() for name, tensor in module.named_variables().items()}
    return {"losses": [result.loss for result in results], "norms": [result.norm for result in results], **weights}


TASKS = ("captions", "scenes", "groups")


def all_steps(directory: Path, process: ProcessInfo) -> None:
    """Plain and with cached features, in chunks that divide nothing evenly if there are so many images."""
    for task in TASKS:
        for chunk in (0, 3 if process.world == 2 else 1):
            np.savez(directory / f"{task}-{bool(chunk)}-{process.rank}.npz", **steps(task, chunk, process))


def four_ranks(directory: Path) -> None:
    with process_group("cpu") as process:
        all_steps(directory, process)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_ranks_take_the_steps_of_one_process_with_the_whole_batch(
    ranks: int, cached: bool, task: str, request: pytest.FixtureRequest
) -> None:
    """Captions with prompts of their own, and scenes by the paper's objective and by that of groups with it (all
    multi-label)."""
    directory = request.getfixturevalue("two_ranks" if ranks == 2 else "four")
    whole = steps(task, 0, ProcessInfo(0, 1, torch.device("cpu")))
    assert ("multi_label_logit_scale" in whole) == recipe_of(task, 0).multi_label
    for rank in range(ranks):
        with np.load(directory / f"{task}-{cached}-{rank}.npz") as answer:
            assert set(answer) == set(whole)
            np.testing.assert_allclose(answer["losses"], whole["losses"], rtol=LOSS)
            np.testing.assert_allclose(answer["norms"], whole["norms"], rtol=1e3 * LOSS)
            for name in whole:
                np.testing.assert_allclose(answer[name], whole[name], rtol=0, atol=PARAMETERS, err_msg=name)


# Runs


# With noise, which differs from rank to rank, and chunks.
NOISY = {
    **PAPER,
    "gumbel": True,
    "drop_path": 0.2,
    "chunk_size": 2,
    "ema_decay": 0.5,
    "log_every": 1,
    "peak_tflops": 1.0,
    "evaluation.data": ("scenes:1",),
    "evaluation.limit": 3,
}


def whole_run(directory: Path, process: ProcessInfo) -> None:
    """A run of two ranks, whole; and one of which the second rank receives a signal in the third step, continued."""
    recipe, step, count = tiny(**NOISY), T.train_step, 0

    def stopped(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3 and process.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments, **options)

    train(recipe, directory / "whole", log=quiet)
    T.train_step = stopped
    with pytest.raises(Interrupted, match="stopped by SIGTERM at step 3, saved"):
        train(recipe, directory / "parts", log=quiet)
    T.train_step = step
    result = train(recipe, directory / "parts", resume="auto", log=quiet)
    (directory / f"{process.rank}.json").write_text(json.dumps(result.losses))


def everything(directory: Path) -> None:
    with process_group("cpu") as process:
        functions(directory, process)
        all_steps(directory, process)
        whole_run(directory, process)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks answer to all of this file."""
    directory = tmp_path_factory.mktemp("two")
    in_ranks(everything, 2, directory)
    return directory


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("four")
    in_ranks(four_ranks, 4, directory)
    return directory


def test_a_run_of_two_ranks_stops_together_and_goes_on(two_ranks: Path) -> None:
    losses = [json.loads((two_ranks / f"{rank}.json").read_text()) for rank in range(2)]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
    last = [Checkpoints(two_ranks / name).all()[-1] for name in ("whole", "parts")]
    for file in ("model/model.safetensors", "state.safetensors"):
        one, other = (load_weights(path / "model") if "model" in file else _arrays(path) for path in last)
        for name in one:
            # Gloo may add in another order: bits are promised for one process only.
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)
    random = [
        run["random"] for run in json.loads((last[0] / "state.json").read_text().split(" ", 1)[1])["values"]["ranks"]
    ]
    assert random[0] != random[1]
    records = [json.loads(line) for line in (two_ranks / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < record["utilisation"] < 1 for record in records if "loss" in record)
    # Two pictures of the first rank, one of the second: the set's measures are those of all three.
    (data,) = open_sets("scenes:1", limit=3)
    alone = evaluate_segmentation(Segmenter.from_pretrained(two_ranks / "whole", device="cpu"), data)
    assert alone is not None
    for name, value in alone.scores().items():
        assert records[-1][f"{name}/scenes:1"] == pytest.approx(100 * value, abs=1e-9)


def _arrays(path: Path) -> dict[str, Any]:
    from groupvit_common.training.checkpoints import load

    return dict(load(path).arrays)
