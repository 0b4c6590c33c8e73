"""A step of the PyTorch loop: cached features against the plain batch, precisions, what is frozen, what is skipped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from groupvit_common.errors import GroupViTError, InputError  # noqa: E402
from groupvit_common.preprocessing.processor import GroupViTProcessor  # noqa: E402
from groupvit_common.training.initial_model import MULTI_LABEL_SCALE  # noqa: E402
from groupvit_common.training.recipe import Recipe  # noqa: E402
from groupvit_common.training.scene_batches import SceneBatches, TrainingScenes  # noqa: E402
from groupvit_common.training.settings import changed  # noqa: E402
from groupvit_common.training.start import first_captions, make_processor, start_run  # noqa: E402
from groupvit_torch import train as T  # noqa: E402
from groupvit_torch.chunks import split_rows  # noqa: E402
from groupvit_torch.data import Feed, Inputs  # noqa: E402
from groupvit_torch.layers import drop_path  # noqa: E402
from groupvit_torch.loss import contrastive_loss, multi_label_contrastive_loss  # noqa: E402
from groupvit_torch.model import GroupViTModel  # noqa: E402
from tests.support.models import smallest_config  # noqa: E402
from tests.support.training import BEYOND_FLOAT32, END, PAPER, Captions, quiet, scenes_of, tiny, train  # noqa: E402

BATCH = 8
EXACT = 1e-11  # float64, relative to the largest value: the same sums in another order
THREE_STEPS = 1e-7  # float64: AdamW magnifies the rounding of gradients that are zero by mathematics
HALF = 0.03  # bfloat16 has 8 bits, and a matrix is multiplied in other pieces

PROMPTED = tiny(**PAPER, gumbel=False)
NOISY = {"gumbel": True, "drop_path": 0.4}


@pytest.fixture(scope="module")
def scenes() -> dict[int, TrainingScenes]:
    return {1: scenes_of()}


@pytest.fixture(scope="module")
def processor(scenes: dict[int, TrainingScenes]) -> GroupViTProcessor:
    return make_processor(tiny(), first_captions(scenes, 16))


@pytest.fixture(params=["captions", "scenes", "scenes-groups"])
def task(request: pytest.FixtureRequest, scenes: Any, processor: GroupViTProcessor) -> tuple[Recipe, Iterator[Any]]:
    """A recipe without noise and its batches: captioned pictures with prompts of their own, scenes by either
    objective."""
    if request.param == "captions":
        return PROMPTED, iter(Captions(BATCH))
    recipe = tiny(gumbel=False, **(PAPER if request.param == "scenes" else {}))
    return recipe, SceneBatches(recipe, scenes, processor)


def module_of(recipe: Recipe, dtype: Any = torch.float64, dropout: float = 0.0) -> T.Objective:
    """A small model of two layers, for pictures of 48 x 48 and any of the texts here."""
    torch.manual_seed(0)
    config = smallest_config()
    config.text_config.vocab_size, config.text_config.eos_token_id = END + 1, END
    config.text_config.max_position_embeddings = 32
    config.vision_config.image_size, config.vision_config.patch_size = 48, 16
    config.vision_config.depths = [2, 1]
    config.vision_config.initializer_range = 0.3  # so narrow a tower would make gradients of 1e4 of the paper's 0.02
    config.text_config.attention_dropout = config.vision_config.dropout = dropout
    return T.Objective(GroupViTModel(config).to(dtype), recipe).train()


def inputs_of(batch: Any, dtype: Any = torch.float64) -> Inputs:
    inputs = Inputs.of(batch)
    return replace(inputs, pixels=inputs.pixels.to(dtype))


def features_of(module: T.Objective, inputs: Inputs, chunk: int) -> dict[str, Any]:
    """The features of a batch whose rows pass the towers in chunks, with all activations kept."""
    found: dict[str, list[Any]] = {}
    for part in split_rows(module, inputs, chunk):
        for name, feature in module.encode(*part, hard=True)[0].items():
            found.setdefault(name, []).append(feature)
    return {name: torch.cat(parts) for name, parts in found.items()}


def state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}


def gradients(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy().copy() for name, p in module.named_parameters() if p.grad is not None}


def compare(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Relative to each array's largest value; where that is zero by mathematics, to a hundredth of the largest of
    all."""
    assert actual.keys() == expected.keys()
    largest = max(float(np.abs(value).max()) for value in expected.values())
    for name, value in expected.items():
        scale = max(float(np.abs(value).max()), 0.01 * largest)
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=tolerance * scale, err_msg=name)


# Cached features


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_cached_features_have_the_gradients_of_the_plain_batch(task, chunk):
    recipe, batches = task
    inputs = inputs_of(next(batches))
    plain, cached = module_of(recipe), module_of(recipe)
    loss, _ = plain(inputs, True)
    loss.backward()
    again, _ = T.cached_backward(cached, inputs, chunk, hard=True)
    assert again.item() == pytest.approx(loss.item(), rel=EXACT)
    compare(gradients(cached), gradients(plain), EXACT)
    # Batch norm saw the whole batch, once.
    compare(state(cached), state(plain), EXACT)
    assert int(cached.model.visual_projection[1].num_batches_tracked) == 1


def test_more_images_are_more_negatives(task):
    """What a sum of the chunks' own losses would not do."""
    recipe, batches = task
    inputs = inputs_of(next(batches))
    # The first half of a batch for "groups" is mixed: for the paper's losses beside it, a batch of its own would be
    # empty.
    module = module_of(changed(recipe, {"paper_weight": 0.0}))
    T.cached_backward(module, inputs, 4, hard=True)
    whole = gradients(module)
    module.zero_grad()
    for rows in (slice(0, 4), slice(4, 8)):
        part = {
            "pixels": inputs.pixels[rows],
            "captions": inputs.captions and {name: t[rows] for name, t in inputs.captions.items()},
            "of_caption": None if inputs.of_caption is None else inputs.of_caption[rows],
            "allowed": None if inputs.allowed is None else inputs.allowed[rows],
            "named": None if inputs.named is None else inputs.named[rows],
        }
        if not inputs.shared_prompts:
            part["prompts"] = {name: t.unflatten(0, (8, 3))[rows].flatten(0, 1) for name, t in inputs.prompts.items()}
            part["of_caption"] = part["of_caption"] - part["of_caption"].min()
        (module(replace(inputs, **part), True)[0] / 2).backward()
    with pytest.raises(AssertionError):
        compare(gradients(module), whole, 1e-3)


def test_the_papers_losses_beside_groups(scenes, processor):
    """They are what is added: of the pictures that are not mixed, at their own temperature, times the weight; written
    out here."""
    recipe = tiny(gumbel=False, paper_weight=0.3, multi_label_weight=0.5)
    inputs = inputs_of(next(SceneBatches(recipe, scenes, processor)))
    module = module_of(recipe)
    with torch.no_grad():
        module.multi_label_logit_scale.fill_(1.5)
    together = module(inputs, True)[0].item()
    module.recipe = changed(recipe, {"paper_weight": 0.0})
    groups = module(inputs, True)[0].item()
    module.recipe = recipe
    features = features_of(module, inputs, BATCH)
    images, captions, prompts = (
        getattr(module.model, f"{tower}_projection")(features[name])
        for tower, name in (("visual", "images"), ("text", "captions"), ("text", "prompts"))
    )
    whole = inputs.named.any(dim=1)
    assert whole.tolist() == [False] * recipe.mixed_images + [True] * (BATCH - recipe.mixed_images)
    scale = math.exp(1.5)
    expected = contrastive_loss(images[whole], captions[whole], scale)
    expected += 0.5 * multi_label_contrastive_loss(images[whole], prompts[inputs.of_caption[whole]], scale)
    assert together == pytest.approx(groups + 0.3 * expected.item(), rel=EXACT)


def test_prompts_that_no_loss_looks_at_stay_out(scenes, processor):
    recipe = tiny(**PAPER, gumbel=False, multi_label_weight=0.0)
    module = module_of(recipe)
    module(inputs_of(next(SceneBatches(recipe, scenes, processor))), True)
    assert int(module.model.text_projection[1].num_batches_tracked) == 1


def test_cached_features_see_the_same_noise_twice(task):
    """Gumbel noise, dropped paths and dropout: the gradients are those of one pass with all activations kept."""
    recipe, batches = task
    recipe = changed(recipe, NOISY)
    inputs = inputs_of(next(batches))
    cached, kept = (module_of(recipe, dropout=0.2) for _ in range(2))
    torch.manual_seed(3)
    T.cached_backward(cached, inputs, 3, hard=True)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    kept.compute_loss(kept.embed(features_of(kept, inputs, 3), inputs), inputs).backward()
    compare(gradients(cached), gradients(kept), EXACT)
    assert torch.equal(after, torch.get_rng_state())
    torch.manual_seed(4)
    cached.zero_grad()
    T.cached_backward(cached, inputs, 3, hard=True)
    with pytest.raises(AssertionError):  # there was noise
        compare(gradients(cached), gradients(kept), 1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_three_steps_with_cached_features(task, checkpointing):
    """In float64, since AdamW makes whole steps of the rounding of gradients that are zero by mathematics."""
    recipe, batches = task
    recipe = changed(recipe, {"gradient_checkpointing": checkpointing})
    inputs = [inputs_of(batch) for batch in islice(batches, 3)]
    results = []
    for chunk in (0, 3):
        module = module_of(changed(recipe, {"chunk_size": chunk}))
        optimizer = T.make_optimizer(module)
        losses = [T.train_step(module, optimizer, batch, hard=True).loss for batch in inputs]
        results.append((losses, state(module)))
    (losses, plain), (again, cached) = results
    np.testing.assert_allclose(again, losses, rtol=THREE_STEPS)
    compare(cached, plain, THREE_STEPS)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_cached_features_in_half_precision(task, precision, checkpointing):
    recipe, batches = task
    recipe = changed(recipe, {"precision": precision, "gradient_checkpointing": checkpointing})
    inputs = inputs_of(next(batches), torch.float32)
    results = []
    for chunk in (0, 3):
        module = module_of(changed(recipe, {"chunk_size": chunk}), torch.float32)
        scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16", init_scale=2.0**8)
        result = T.train_step(module, T.make_optimizer(module), inputs, hard=True, scaler=scaler)
        assert result.taken
        results.append((result.loss, result.norm))
    np.testing.assert_allclose(*results, rtol=HALF)


# Skipped steps


def bad(inputs: Inputs) -> Inputs:
    pixels = inputs.pixels.clone()
    pixels[0, 0, 0, 0] = math.nan
    return replace(inputs, pixels=pixels)


def moments_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value.clone() for values in optimizer.state.values() for value in values.values()]


@pytest.mark.parametrize("chunk", [0, 3])
def test_a_skipped_step_changes_nothing(task, chunk):
    recipe, batches = task
    module = module_of(changed(recipe, {"chunk_size": chunk}), torch.float32)
    optimizer = T.make_optimizer(module)
    good = inputs_of(next(batches), torch.float32)
    assert T.train_step(module, optimizer, good, hard=True).taken
    before, moments = state(module), moments_of(optimizer)
    result = T.train_step(module, optimizer, bad(good), hard=True)
    assert not result.taken
    assert not result.overflowed
    compare(state(module), before, 0.0)
    assert all(torch.equal(one, other) for one, other in zip(moments_of(optimizer), moments, strict=True))
    assert T.train_step(module, optimizer, good, hard=True).taken


def test_a_gradient_that_float16_cannot_hold_lowers_its_scale_and_is_no_bad_step():
    module = module_of(changed(PROMPTED, {"precision": "float16"}), torch.float32)
    optimizer = T.make_optimizer(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    inputs = inputs_of(next(iter(Captions(BATCH))), torch.float32)
    before = state(module)
    result = T.train_step(module, optimizer, inputs, hard=True, scaler=scaler)
    assert (result.taken, result.overflowed) == (False, True)
    assert scaler.get_scale() == 2.0**39
    compare(state(module), before, 0.0)


def test_a_run_counts_bad_steps_and_ends_with_the_batch_saved(tmp_path):
    lines: list[str] = []
    recipe = tiny(max_bad_steps=3, claim_weight=BEYOND_FLOAT32)
    with pytest.raises(
        GroupViTError, match=r"the loss is inf at step 3 \(3 such steps\); its batch is in .*bad_batch.npz"
    ):
        train(recipe, tmp_path, log=lines.append)
    assert [line for line in lines if "skipped" in line] == [
        f"step {n} skipped: the loss is inf ({n} of at most 3)" for n in (1, 2)
    ]
    with np.load(tmp_path / "bad_batch.npz") as batch:
        assert batch["pixels"].shape == (8, 3, 48, 48)
        assert "prompts.input_ids" in batch


# Parts that stay


def test_frozen_parts_stay_as_they_are():
    recipe = changed(PROMPTED, {"freeze": ["text_model", "text_projection"], "chunk_size": 3})
    module = module_of(recipe, torch.float32)
    before = state(module)
    optimizer = T.make_optimizer(module)
    for batch in islice(Captions(BATCH), 3):
        T.train_step(module, optimizer, inputs_of(batch, torch.float32), hard=True)
    after = state(module)
    still = {name for name in before if np.array_equal(before[name], after[name])}
    assert {name for name in before if name.startswith("model.text_")} == still


def test_group_tokens_alone():
    module = module_of(changed(PROMPTED, {"train_only": ["group_token"]}))
    assert list(module.named_trainable()) == ["vision_model.encoder.stages.0.group_token"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freeze": ["text_modle"]}, "no parameter is called 'text_modle'; there are those of logit_scale, "),
        (
            {"freeze": ["text_model", "vision_model", "visual_projection", "text_projection", "logit_scale",
                        "multi_label_logit_scale"]},
            "leaves nothing to train",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_frozen_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        module_of(changed(PROMPTED, change))


def test_a_run_starts_from_a_checkpoint_at_another_image_size(tmp_path):
    """Positions are interpolated once and for all; the multi-label temperature comes along."""
    train(tiny(**{**PAPER, "hard_from": 1.0}, steps=2), tmp_path / "first", log=quiet)
    first = GroupViTModel.from_pretrained(tmp_path / "first")
    again = tiny(**PAPER, steps=1, warmup_steps=0, init_from=str(tmp_path / "first"), image_size=96, learning_rate=0.0)
    train(again, tmp_path / "second", log=quiet)
    second = GroupViTModel.from_pretrained(tmp_path / "second")
    assert second.config.vision_config.image_size == 96
    assert (first.config.segmentation_assignment, second.config.segmentation_assignment) == ("soft", "hard")
    pixels = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(
        second.get_image_features(pixels), first.get_image_features(pixels), rtol=0.3, atol=0.3
    )  # batch norm's statistics have moved
    torch.testing.assert_close(
        second.vision_model(pixels).pooler_output, first.vision_model(pixels).pooler_output, rtol=1e-5, atol=1e-5
    )
    scales = [_multi_label_scale(tmp_path / name) for name in ("first", "second")]
    assert scales[0] == scales[1] != pytest.approx(math.log(10.0), abs=1e-6)


def _multi_label_scale(directory: Path) -> float:
    from safetensors.numpy import load_file

    return float(load_file(directory / "model.safetensors")[MULTI_LABEL_SCALE])


# Temperatures, weights


def test_temperatures_are_two_and_stop_at_a_hundred():
    module = module_of(changed(PROMPTED, {"learning_rate": 1.0, "warmup_steps": 0}), torch.float32)
    optimizer = T.make_optimizer(module)
    with torch.no_grad():
        module.model.logit_scale.fill_(4.9)
        module.multi_label_logit_scale.fill_(4.8)
    T.train_step(module, optimizer, inputs_of(next(iter(Captions(BATCH))), torch.float32), hard=True)
    highest = float(np.float32(math.log(100)))
    assert module.model.logit_scale.item() <= highest
    assert module.multi_label_logit_scale.item() <= highest
    assert "multi_label_logit_scale" in module.named_variables()
    assert module_of(tiny(paper_weight=0.0)).multi_label_logit_scale is None


def test_padding_that_all_texts_have_is_cut():
    batch = next(iter(Captions(BATCH)))
    wide = replace(
        batch,
        input_ids=np.pad(batch.input_ids, ((0, 0), (0, 20)), constant_values=END),
        attention_mask=np.pad(batch.attention_mask, ((0, 0), (0, 20))),
    )
    assert Inputs.of(wide).captions["input_ids"].shape == (BATCH, 16)
    module = module_of(PROMPTED).eval()
    with torch.no_grad():
        losses = [float(module(inputs_of(b), True)[0]) for b in (batch, wide)]
    assert losses[0] == pytest.approx(losses[1], rel=EXACT)


def test_dropped_paths_keep_the_mean():
    ones = torch.ones(20_000, 2, 3)
    dropped = drop_path(ones, 0.25, training=True)
    assert (dropped == dropped[:, :1, :1]).all()  # a whole branch of a sample
    assert set(dropped.unique().tolist()) == {0.0, np.float32(1 / 0.75)}
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)  # five standard deviations
    assert drop_path(ones, 0.25, training=False) is ones
    layers = [
        layer
        for stage in module_of(changed(PROMPTED, NOISY)).model.vision_model.encoder.stages
        for layer in stage.layers
    ]
    assert [layer.drop_path for layer in layers] == pytest.approx([0.0, 0.2, 0.4])


# Work


def test_operations_are_counted_without_computing():
    """The products of the matrices of a step, by hand: forward, and twice that backward."""
    module = module_of(PROMPTED, torch.float32)
    inputs = inputs_of(next(iter(Captions(BATCH))), torch.float32)
    # The convolution over patches needs no gradient of the pixels.
    expected = 2 * (3 * (BATCH * _vision_products() + _text_products(inputs)) + 2 * BATCH * 9 * 3 * 16 * 16 * 12)
    assert T.step_flops(module, inputs) == expected


def _layer(tokens: int, width: int, hidden: int) -> int:
    return tokens * width * (4 * width + 2 * hidden) + 2 * tokens * tokens * width


def _vision_products() -> int:
    """For one image of `module_of` but for the patches themselves: 9 patches, width 12, 4 group tokens, 4 groups."""
    patches, width, hidden, tokens, groups = 9, 12, 16, 4, 4
    cross = width * width * (2 * groups + 2 * patches) + 2 * groups * patches * width + 2 * groups * width * hidden
    assign = width * width * (2 * groups + 2 * patches) + 2 * groups * patches * width
    mixers = width * (tokens + groups) * (width // 2) + 2 * groups * width * 4 * width
    return 2 * _layer(patches + tokens, width, hidden) + cross + assign + mixers + _layer(groups, width, hidden)


def _text_products(inputs: Inputs) -> int:
    return sum(
        len(tokens["input_ids"]) * _layer(tokens["input_ids"].shape[1], 8, 12)
        for tokens in (inputs.captions, inputs.prompts)
    )


def test_what_a_device_can_do_is_known_or_said():
    recipe = changed(PROMPTED, {"peak_tflops": 2.5})
    assert T.peak_flops(recipe, torch.device("cpu")) == 2.5e12
    assert T.peak_flops(PROMPTED, torch.device("cpu")) == 0


@pytest.mark.slow  # half a minute of compilation
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler imports parts that it calls deprecated
def test_compiled_towers_take_the_same_steps(tmp_path):
    losses = [
        train(tiny(**PAPER, gumbel=False, compile=on), tmp_path / str(on), log=quiet).losses for on in (False, True)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_batch_must_divide_among_processes(tmp_path):
    with pytest.raises(InputError, match="batch_size must be a multiple of the number of processes, got 8 for 3"):
        start_run(tiny(), tmp_path, world=3)


def test_a_batch_that_was_looked_at_ahead_is_not_yet_taken():
    plain, ahead = Feed(Captions(4), lambda batch: batch), Feed(Captions(4), lambda batch: batch)
    for _ in range(3):
        one, other = plain.take(), ahead.take()
        np.testing.assert_array_equal(one.pixel_values, other.pixel_values)
        ahead.look_ahead()
        ahead.look_ahead()
        assert plain.state_dict() == ahead.state_dict()
    again = Captions(4)
    again.load_state_dict(ahead.state_dict())
    np.testing.assert_array_equal(next(iter(again)).input_ids, ahead.take().input_ids)
