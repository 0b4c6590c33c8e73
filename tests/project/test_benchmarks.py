"""The figures of the benchmarks are computed correctly; no test measures speed."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import ablation, training
from groupvit_common.errors import InputError
from groupvit_common.training.recipe import Recipe, get_recipe
from groupvit_torch.attention import forced
from groupvit_torch.predictor import Segmenter
from groupvit_torch.train import cached_backward

# A model of some thousand parameters, for the paper's objective on images with captions.
SMALL = [
    "model.image_size=48", "data.image_size=48", "width=8", "heads=1", "depths=[1, 1]", "groups=[4]", "text_width=8",
    "text_heads=1", "text_layers=1", "embedding=8", "projection_width=8", "text_length=16",
]  # fmt: skip
FEW = ["scenes_per_level=70", "held_out_scenes=2", "width=16"]


# benchmarks.training


def by_hand(recipe: Recipe, tokens: int) -> int:
    """Operations of a step for one image and its texts, from the settings, product by product: the layers of both
    towers, the grouping blocks, the patches. Two a product; backward twice as many as forward, but for the patches,
    since pixels need no gradient."""
    model = recipe.model

    def layer(length: int, width: int, ratio: int) -> int:
        return length * (4 + 2 * ratio) * width**2 + 2 * length**2 * width

    width, half = model.width, model.width // 2
    patches = (model.image_size // model.patch_size) ** 2
    products, segments, before = 0, patches, 0
    for depth, groups in zip(model.depths, (*model.groups, 0), strict=True):
        products += depth * layer(segments + groups, width, model.mlp_ratio)
        if groups:
            if before:
                products += width * half * (before + groups)  # the last stage's group tokens for this one's
            products += width * half * (groups + groups)  # tokens are mixed
            attention = 2 * width**2 * (groups + segments) + 2 * groups * segments * width
            products += attention + 2 * groups * width**2 * model.mlp_ratio  # they look at the segments
            products += attention + 2 * groups * width**2 * model.mlp_ratio  # and gather them
            segments, before = groups, groups
    assert recipe.data is not None
    texts = 1 + recipe.data.prompts
    products += texts * model.text_layers * layer(tokens, model.text_width, model.text_mlp_ratio)
    return 2 * (3 * products + 2 * patches * 3 * model.patch_size**2 * width)


@pytest.mark.parametrize(
    "changes",
    [pytest.param([], marks=pytest.mark.slow), SMALL, [*SMALL, "depths=[1, 1, 1]", "groups=[6, 4]", "prompts=0"]],
)
def test_operations_of_an_image_are_those_counted_by_hand(changes):
    recipe = get_recipe("gcc-yfcc-30e", [change.replace("prompts", "data.prompts") for change in changes])
    tokens = recipe.model.text_length
    assert training.flops_per_image(recipe, tokens, batch=2) == by_hand(recipe, tokens)


def case_of(**changes: Any) -> training.Case:
    settings: dict[str, Any] = {
        "recipe": "gcc-yfcc-30e", "changes": tuple(SMALL), "batch": 8, "precision": "float32", "compiled": False,
        "checkpointing": False, "chunk": 0, "transformers": False, "tokens": 16, "warmup": 0, "steps": 1,
        "device": "cpu", "peak": 0.0, "limit": 0.0,
    }  # fmt: skip
    return training.Case(**{**settings, **changes})


def test_memory_is_counted_for_as_long_as_it_is_held():
    with FakeTensorMode(), training.Held() as held:
        x = torch.empty(1000, requires_grad=True)
        assert held.bytes == 4000
        y = x.exp().sin()  # its slope needs x.exp()
        y.detach().view(10, 100).t().mul_(2.0)  # the same memory
        assert held.bytes == held.peak == 3 * 4000
        y = y.sum()
        assert held.bytes == 2 * 4000 + 4
        y.backward()
        del y
    assert held.bytes == 2 * 4000  # x and its gradient


@pytest.mark.parametrize(
    "changes", [{}, {"batch": 16, "chunk": 8}, {"batch": 32, "checkpointing": True, "precision": "bfloat16"}], ids=str
)
def test_memory_on_shapes_is_what_the_allocator_is_asked_for(changes, monkeypatch):
    """PyTorch's profiler takes down every allocation of a real step. With few words: fake gradients are not added in
    place, so that those of captions and prompts, as large as the table of words, are there once more."""
    monkeypatch.setattr(training, "VOCABULARY", 600)
    case = case_of(changes=(*SMALL, "width=64", "text_width=32", "depths=[1, 1]"), **changes)
    recipe = training.recipe_of(case)
    torch.manual_seed(0)
    module = training.new_module(recipe).train()
    inputs = training.made_batch(recipe, case.batch, case.tokens)
    # Plain attention is for CPUs.
    with forced("fused"), torch.profiler.profile(profile_memory=True) as profile, OperationEnds():
        if case.chunk:
            cached_backward(module, inputs, case.chunk, hard=True)
        else:
            module(inputs, True)[0].backward()
    there = [p.nbytes for p in (*module.parameters(), *module.buffers())]
    tokens = [t for tokens in (inputs.captions, inputs.prompts) for t in tokens.values()]
    there += [t.nbytes for t in (inputs.pixels, inputs.of_caption, *tokens)]
    moments = 2 * sum(p.nbytes for p in module.parameters())
    expected = sum(there) + moments + OperationEnds.peak(profile)
    assert training.count(case)["memory"] * 2**30 == pytest.approx(expected, rel=0.05)


class OperationEnds(TorchDispatchMode):
    """Marks the end of every operation in a profile.

    What a kernel allocates for itself and gives back before its end is the CPU's affair: oneDNN repacks weights in
    bfloat16 where there are tiles for them (AMX), and does not elsewhere.
    """

    MARK = "end of an operation"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        with torch.profiler.record_function(self.MARK):
            return result

    @classmethod
    def peak(cls, profile: torch.profiler.profile) -> int:
        """Returns the most bytes allocated at once, beyond those at the start, at the end of any operation."""
        events = profile.profiler.kineto_results.events()
        # None: an end. The sort is stable: what has one time stays in the order of the profile.
        marks = ((e.start_ns(), None) for e in events if e.name() == cls.MARK)
        changes = ((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        timeline = sorted((*changes, *marks), key=lambda event: event[0])
        allocated = most = 0
        for _, change in timeline:
            if change is None:
                most = max(most, allocated)
            else:
                allocated += change
        return most


def test_a_plan():
    """Every figure from the others: operations = images x of each, time = operations / speed."""
    recipe = get_recipe("gcc-yfcc-30e", [*SMALL, "steps=1000", "warmup_steps=1", "batch_size=64"])
    options = {"tokens": 16, "gpus": 4, "peak": 2.0, "days": (0.5,), "price": 3.0, "per_core": 100.0}
    said = training.plan(recipe, **options)
    operations = 64_000 * by_hand(recipe, 16)
    assert said[0].startswith("0.1 million images (1000 steps of 64), ")
    rows = [
        [float(cell.strip("% ")) for cell in line.strip("|").split("|")]
        for line in said
        if line[:3].strip("| ").isdigit()
    ]
    share, speed, cores, hours, of_gpus, cost = map(list, zip(*rows[:5], strict=True))
    assert share == [10, 20, 30, 40, 50]
    for index, percent in enumerate(share):
        seconds = operations / (4 * 2e12 * percent / 100)
        assert speed[index] == pytest.approx(64_000 / seconds, abs=0.5)
        assert cores[index] == pytest.approx(speed[index] / 100, abs=0.51)
        assert hours[index] == pytest.approx(seconds / 3600, abs=0.05)
        assert training.gpu_hours(64_000, by_hand(recipe, 16), 2e12, percent / 100) == pytest.approx(seconds * 4 / 3600)
        assert of_gpus[index] == pytest.approx(4 * seconds / 3600, abs=0.5)
        assert cost[index] == pytest.approx(12 * seconds / 3600, abs=0.5)
    needed = 64_000 / (0.5 * 86400)
    row = [cell.strip() for cell in said[-1].strip("|").split("|")]
    assert row[:3] == ["0.5", f"{needed:.0f}", f"{needed / 4:.0f}"]
    assert row[4] == f"{needed * by_hand(recipe, 16) / 8e12:.1%}"
    assert not any("cost" in line for line in training.plan(recipe, **{**options, "price": 0.0}))


def asked(**changes: object) -> Namespace:
    options = {
        "recipe": "gcc-yfcc-30e", "set": SMALL, "batch": [4], "precision": ["float32"], "compile": ["no"],
        "checkpointing": ["no"], "chunk": [0], "transformers": False, "tokens": 16, "warmup": 1, "steps": 2,
        "device": "cpu", "peak": 1.0, "limit": 0.0,
    }  # fmt: skip
    return Namespace(**{**options, **changes})


def test_steps_are_measured_in_every_way():
    """Each in this process: a step was taken, and its share of the peak is its operations by its seconds."""
    cases = list(training.cases(asked(precision=["float32", "bfloat16"], checkpointing=["no", "yes"], chunk=[0, 2])))
    assert len(set(cases)) == len(cases) == 8
    # Plain, and with all changes together; each alone is counted above.
    for case in (cases[0], cases[-1]):
        found = training.measure(case)
        assert found["share"] * found["seconds"] * 1e12 == pytest.approx(4 * by_hand(training.recipe_of(case), 16))
        assert found["memory"] > 0
        assert found["cpu"] > 0
    # transformers' model computes no chunks.
    both = list(training.cases(asked(transformers=True, chunk=[0, 2])))
    assert [(case.transformers, case.chunk) for case in both] == [(False, 0), (False, 2), (True, 0)]


def test_too_little_memory_and_other_failures_are_rows(monkeypatch):
    large = [*SMALL, "model.image_size=224", "data.image_size=224"]
    case = next(iter(training.cases(asked(set=large, batch=[40_000], limit=12.0))))
    assert (
        training.row(case, training.in_a_process(case))
        == "| groupvit | 40000 | float32 |  |  |  | out of memory |  |  |  |"
    )
    failed = Namespace(returncode=1, stdout="", stderr="Traceback ...\nInputError: run.chunk_size must be at least 0\n")
    monkeypatch.setattr(training.subprocess, "run", lambda *_, **__: failed)
    assert "run.chunk_size must be at least 0" in training.row(case, training.in_a_process(case))
    case = next(iter(training.cases(asked())))
    assert training.row(case, {"seconds": 2.0, "cpu": 1.0, "memory": 0.5, "share": math.nan}).endswith(
        "| 2 | 0.25 | 0.50 |  |"
    )


def test_the_paper_alone_is_measured():
    with pytest.raises(InputError, match="of 'groups'"):
        training.made_batch(get_recipe("scenes-demo"), 4, 16)


def test_transformers_model_takes_the_same_step():
    """From the same weights the losses are equal, and its steps are measured like ours."""
    pytest.importorskip("transformers")
    cases = list(training.cases(asked(set=[*SMALL, "gumbel=false", "drop_path=0.0"], transformers=True)))
    recipe = training.recipe_of(cases[1])
    ours, theirs = training.new_module(recipe), training.TransformersModule(recipe)
    ours.model.load_state_dict(theirs.model.state_dict(), strict=False)
    inputs = training.made_batch(recipe, 4, 16)
    with torch.no_grad():
        losses = [module.eval()(inputs, True)[0].item() for module in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32
    assert training.measure(cases[1])["seconds"] > 0


# benchmarks.ablation


def test_k_means_comes_to_rest():
    """Far clusters are found; elsewhere each point is nearest to the mean of its own cluster, where k-means stops."""
    rng = np.random.default_rng(0)
    far = rng.standard_normal((40, 3)) + 100 * np.repeat(np.eye(3), [10, 20, 10], axis=0)
    found = ablation.k_means(far, 3)
    assert [len(set(found[part])) for part in (slice(0, 10), slice(10, 30), slice(30, 40))] == [1, 1, 1]
    assert len(set(found)) == 3
    points = rng.standard_normal((60, 4)).astype(np.float32)
    found = ablation.k_means(points, 5)
    means = np.stack([points[found == number].mean(axis=0) for number in range(5)])
    assert (np.linalg.norm(points[:, None] - means, axis=2).argmin(axis=1) == found).all()
    assert set(ablation.k_means(np.ones((6, 2)), 3)) == {0}  # equal points


def test_every_variant_is_trained_and_measured(tmp_path, monkeypatch, capsys):
    """Two steps each; again, nothing is left to do; a line that was cut off is done again."""
    out = tmp_path / "results.jsonl"
    command = ["ablation", "--out", str(out), "--seeds", "3", "--steps", "2", *(f"--set={change}" for change in FEW)]
    monkeypatch.setattr(sys, "argv", command)
    ablation.main()
    rows = [row["row"] for line in out.read_text().splitlines() for row in json.loads(line)["rows"]]
    assert rows == list(ablation.ROWS)
    said = capsys.readouterr().out
    assert all(name in said for name in ablation.ROWS.values())

    whole = out.read_text()
    out.write_text(whole[:-20])
    done = []
    train = ablation.records
    monkeypatch.setattr(ablation, "records", lambda variant, recipe: done.append(variant) or train(variant, recipe))
    ablation.main()
    assert done == ["vit"]
    assert len(out.read_text().splitlines()) == len(ablation.VARIANTS)


def test_variants_differ_in_what_they_are_called_after():
    recipes = {name: ablation.recipe_of(name, 0, 10) for name in ablation.VARIANTS}
    assert {name for name, recipe in recipes.items() if recipe.objective.hard_from == 0} == set(recipes) - {
        "soft",
        "soft-captions",
    }
    assert {name for name, recipe in recipes.items() if not recipe.multi_label} == {"hard-captions", "soft-captions"}
    assert {name: len(recipe.model.groups) for name, recipe in recipes.items()} == dict.fromkeys(recipes, 1) | {
        "two-stages": 2,
        "vit": 0,
    }
    assert {sum(recipe.model.depths) for recipe in recipes.values()} == {2}
    assert {recipe.data for recipe in recipes.values()} == {None}
    assert len({recipe.scenes for recipe in recipes.values()}) == 1


def test_patches_take_the_place_of_groups(tmp_path):
    """Alone, each patch has its own label; one cluster is the image as a whole, but for the projection's order."""
    recipe = ablation.recipe_of("vit", 0, 2, FEW)
    module, run, _ = ablation.trained(recipe)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    segmenter = ablation.PatchSegmenter(module.model, run.processor)
    segmenter.set_labels("red, green, blue")
    pixels = torch.from_numpy(segmenter.prepare(image)[None])
    with torch.no_grad():
        vision = module.model.vision_model(pixels)
        embeds = module.model.visual_projection(vision.last_hidden_state[0])
        labels = torch.from_numpy(segmenter._labelled().embeds)
        similarity = torch.nn.functional.normalize(embeds, dim=1) @ torch.nn.functional.normalize(labels, dim=1).T
    groups, _, (maps,) = segmenter._encode_images(pixels.numpy())
    torch.testing.assert_close(groups[0], embeds)
    assert (maps[0].flatten(1) == torch.eye(64)).all()
    found = segmenter(image)
    nearest = similarity.argmax(dim=1).reshape(8, 8).numpy()
    # In the middle of a patch nothing of its neighbours is seen.
    names = found.label_map[4::8, 4::8]
    assert (names == nearest).all()
    assert isinstance(segmenter, Segmenter)
    segmenter.clusters = 1
    assert len(np.unique(segmenter(image).label_map)) == 1
