"""Pipelines of transformers' interface."""

import base64
import importlib
import io
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from groupvit_common.errors import InputError
from groupvit_common.preprocessing.prompts import Label
from groupvit_common.segmentation.segments import segments
from tests.segmentation.conftest import segmenter_with_demo
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("shared_traces")

LABELS = ["a red disc", "grass", "a blue square, large"]
# Of `pipeline("zero-shot-image-classification")` of transformers 4.49.0 and 5.24.0 (both the same), with the bundled
# model and `drawn`: upright with the default template, turned with "a photo of {}".
UPRIGHT = [
    ("grass", 0.8057320713996887),
    ("a red disc", 0.12930288910865784),
    ("a blue square, large", 0.06496496498584747),
]
TURNED = [
    ("a red disc", 0.6528164744377136),
    ("grass", 0.1946297585964203),
    ("a blue square, large", 0.1525537222623825),
]


@pytest.fixture(scope="module")
def drawn():
    """A red disc and a blue square on green: 90 x 60."""
    image = Image.new("RGB", (90, 60), (40, 160, 40))
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 10, 44, 46), fill=(220, 30, 30))
    draw.rectangle((55, 15, 80, 50), fill=(30, 30, 220))
    return image


def make(name, task, **options):
    """A pipeline with the bundled model, which is loaded once."""
    segmenter = segmenter_with_demo(name)
    backend = importlib.import_module(f"groupvit_{name}")
    return backend.pipeline(task, model=segmenter.model, processor=segmenter.processor, **options)


def segmenting(name="torch", **options):
    return make(name, "zero-shot-image-segmentation", **options)


def classifying(name="torch", **options):
    return make(name, "zero-shot-image-classification", **options)


def named(results):
    return [(each["label"], each["score"]) for each in results]


def assert_scores(results, expected):
    assert [label for label, _ in named(results)] == [label for label, _ in expected]
    # The same sums in another order, in float32.
    np.testing.assert_allclose([score for _, score in named(results)], [score for _, score in expected], atol=1e-6)


def test_classification_has_transformers_numbers(backend, drawn):
    pipe = classifying(backend.name)
    assert_scores(pipe(drawn, candidate_labels=LABELS), UPRIGHT)
    turned = drawn.rotate(90, expand=True)
    [_, result] = pipe([drawn, turned], candidate_labels=LABELS, hypothesis_template="a photo of {}")
    assert_scores(result, TURNED)
    assert [type(score) for _, score in named(result)] == [float] * 3


def test_classification_of_a_label_given_twice(drawn):
    results = classifying()(images=drawn, candidate_labels=["red", "red"], hypothesis_template="{}")
    assert_scores(results, [("red", 0.5), ("red", 0.5)])


def test_every_way_to_pass_images(drawn, tmp_path):
    path, stored = tmp_path / "drawn.png", io.BytesIO()
    drawn.save(path)
    drawn.save(stored, "PNG")
    pipe = classifying(candidate_labels=LABELS)
    for image in (drawn, str(path), path, stored.getvalue(), stored, np.asarray(drawn)):
        assert_scores(pipe(image), UPRIGHT)
    assert_scores(pipe(image=drawn), UPRIGHT)
    assert_scores(pipe(inputs=drawn, timeout=5, num_workers=2), UPRIGHT)
    assert_scores(pipe.predict(drawn), UPRIGHT)
    for several in ([drawn, path], (drawn, drawn), np.stack([np.asarray(drawn)] * 2)):
        results = pipe(several)
        assert isinstance(results, list)
        for result in results:
            assert_scores(result, UPRIGHT)
    assert pipe([]) == []

    class DataSet:
        """Without an end but its length, as PyTorch's may be."""

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return drawn

    for several in ((image for image in [drawn] * 3), DataSet()):
        results = pipe(several, batch_size=2)
        assert iter(results) is results
        assert [named(result)[0][0] for result in results] == ["grass"] * 3


def test_images_are_read_as_they_are_needed(drawn):
    read = []

    def images():
        for number in range(20):
            read.append(number)
            yield drawn

    results = segmenting()(images(), candidate_labels="red, blue", batch_size=2)
    assert read == []
    next(results)
    assert len(read) <= 4 * 2


def test_masks_are_those_of_the_segmenter(backend, drawn, demo):
    pipe = segmenting(backend.name)
    results = pipe(drawn, candidate_labels=["red", "blue", "grass"])
    expected = demo(backend.name, labels=["red", "blue", "grass"])(drawn)
    assert [each["label"] for each in results] == list(expected.labels)
    for each in results:
        assert (each["mask"].mode, each["mask"].size) == ("L", (90, 60))
        np.testing.assert_array_equal(np.asarray(each["mask"]), expected.mask(each["label"]) * np.uint8(255))
        assert 0 < each["score"] <= 1
    assert next(each["mask"] for each in results if each["label"] == "red").getpixel((26, 28)) == 255
    assert list(results[0]) == ["score", "label", "mask"]


def test_scores_are_probabilities_of_the_groups(backend, drawn, demo):
    """Of one label alone each pixel is sure; of labels the mean over the pixels of what their groups are likely."""
    assert [score for _, score in named(segmenting(backend.name)(drawn, ["red"]))] == [1.0]
    result = demo(backend.name, labels=["red", "blue", "grass"])(drawn)
    np.testing.assert_allclose(np.sqrt(result.group_scores).sum(1), 1, atol=1e-5)
    by_group = {segment.group: segment.score for segment in segments(result, by="group")}
    for segment in segments(result):
        groups = result.group_map[segment.mask]
        same = [by_group[g] if result.group_labels[g] == segment.index else None for g in groups.tolist()]
        if None not in same:
            assert segment.score == pytest.approx(np.mean(same), abs=1e-6)


def test_groups_as_instances(drawn, demo):
    result = demo("torch", labels=["red", "blue", "grass"])(drawn)
    for subtask in ("instance", "panoptic"):
        results = segmenting()(drawn, ["red", "blue", "grass"], subtask=subtask)
        covered = sum((np.asarray(each["mask"]) > 0).astype(int) for each in results)
        np.testing.assert_array_equal(covered, 1)
        assert len(results) == len(np.unique(result.group_map))


def test_background_is_in_no_mask(drawn):
    pipe, labels = segmenting(), ["red", "blue"]
    whole = pipe(drawn, labels)
    some = pipe(drawn, labels, background=0.6)
    assert [each["label"] for each in some] == labels
    for before, after in zip(whole, some, strict=True):
        assert (np.asarray(after["mask"]) <= np.asarray(before["mask"])).all()
    assert sum(np.asarray(each["mask"]).sum() for each in some) < 255 * 90 * 60
    hidden = pipe(drawn, labels, background_labels="grass")
    assert [each["label"] for each in hidden] == labels
    # A candidate by that name is the caller's wish.
    named_so = pipe(drawn, ["red", "Background"])
    assert [each["label"] for each in named_so] == ["Background", "red"]
    assert sum(np.asarray(each["mask"]).sum() for each in named_so) == 255 * 90 * 60
    # Without a label of its own it has no score, and a threshold of scores does not touch it.
    assert pipe(drawn, labels, background=0.6, threshold=1.0) == []


def test_thresholds_leave_masks_out(drawn):
    pipe = segmenting(candidate_labels=["red", "blue", "grass"], overlap_mask_area_threshold=0.8, mask_threshold=0.5)
    scores = dict(named(pipe(drawn)))
    least = min(scores, key=scores.get)
    assert [label for label, _ in named(pipe(drawn, threshold=scores[least] + 1e-6))] == [
        label for label in scores if label != least
    ]


def test_labels_are_taken_as_they_are(drawn):
    pipe = segmenting()
    assert [label for label, _ in named(pipe(drawn, ["red, large", "grass"]))] == ["red, large", "grass"]
    of_text = pipe(drawn, "red|scarlet, grass")
    of_records = pipe(drawn, [Label("red", ("scarlet",)), Label("grass")])
    assert named(of_text) == named(of_records)
    assert [label for label, _ in named(classifying()(drawn, "red, grass"))] != []


def test_options_of_a_call_and_of_the_pipeline(drawn, demo):
    pipe = segmenting(candidate_labels="red, blue, grass", assignment="hard", hypothesis_template="a {}.")
    expected = demo("torch", labels="red, blue, grass", assignment="hard", templates="a {}.", flip=True)(drawn)
    results = pipe(drawn, flip=True)
    for each in results:
        np.testing.assert_array_equal(np.asarray(each["mask"]) > 0, expected.mask(each["label"]))


def test_attributes(backend):
    pipe = classifying(backend.name, framework={"torch": "pt", "tf": "tf"}[backend.name], device="cpu")
    assert (pipe.task, pipe.framework) == ("zero-shot-image-classification", {"torch": "pt", "tf": "tf"}[backend.name])
    assert pipe.model is segmenter_with_demo(backend.name).model
    assert str(pipe.device).startswith("cpu")
    assert str(pipe.dtype).endswith("float32")
    assert pipe.tokenizer is pipe.processor.tokenizer
    assert pipe.feature_extractor is pipe.image_processor is pipe.processor.image_processor
    assert type(pipe).__name__ == "ZeroShotImageClassificationPipeline"
    assert type(segmenting(backend.name)).__name__ == "ImageSegmentationPipeline"


def test_a_pipeline_by_name_and_its_copy(drawn, tmp_path):
    from groupvit_torch import CLIPTokenizerFast, GroupViTImageProcessor, pipeline

    tokenizer = CLIPTokenizerFast.from_pretrained("demo")
    pipe = pipeline(
        "image-segmentation", "demo", tokenizer=tokenizer, image_processor="demo", use_fast=True, device=-1,
        trust_remote_code=None, torch_dtype="auto", use_auth_token=None, framework="pt",
        model_kwargs={"low_cpu_mem_usage": True},
    )  # fmt: skip
    assert (pipe.tokenizer, pipe.task) == (tokenizer, "image-segmentation")
    at_hand = {"model": pipe.model, "image_processor": "demo"}
    assert type(pipeline("image-segmentation", tokenizer="demo", **at_hand).tokenizer) is CLIPTokenizerFast
    assert not pipeline("image-segmentation", tokenizer="demo", use_fast=False, **at_hand).tokenizer.is_fast
    assert not pipeline("image-segmentation", model=pipe.model, processor="demo", use_fast=False).tokenizer.is_fast
    pipe.save_pretrained(tmp_path)
    again = pipeline("image-segmentation", tmp_path, feature_extractor=GroupViTImageProcessor.from_pretrained("demo"))
    assert named(again(drawn, "red, grass")) == named(pipe(drawn, "red, grass"))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ("detection",),
            {},
            r"unknown task 'detection': there are zero-shot-image-classification, zero-shot-image-seg",
        ),
        ((), {}, "needs a task; there are"),
        (("image-segmentation",), {"framework": "tf"}, "the pipelines of this package are 'pt'"),
        (("image-segmentation", 3), {"processor": "demo"}, "a groupvit_torch.GroupViTModel, got builtins.int"),
        (("image-segmentation", "demo"), {"device": "abacus"}, "'abacus' cannot be used here"),
        (("image-segmentation", "demo"), {"device": 0, "device_map": "cpu"}, "device or device_map, not both"),
        (("image-segmentation", "demo"), {"subtask": "depth"}, "subtask must be one of semantic, instance, panoptic"),
        (("image-segmentation", "demo"), {"top_k": 0}, "top_k must be a whole number"),
        (("image-segmentation", "demo"), {"lables": "red"}, "'lables' is not a keyword of image-segmentation; these"),
        (("image-segmentation", "demo"), {"treshold": 0.5}, r"\(did you mean 'threshold'\?\)"),
    ],
)
def test_pipelines_that_cannot_be_made(arguments, options, message):
    from groupvit_torch import pipeline

    with pytest.raises(InputError, match=message):
        pipeline(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {"candidate_labels": ["red"]}, "needs images once"),
        (("image",), {"candidate_labels": ["red"], "image": "image"}, "needs images once, .* got 2"),
        (("image",), {}, "candidate_labels are missing"),
        (("image", []), {}, "no labels"),
        (("image", [3]), {}, "a label must be text"),
        ((3, ["red"]), {}, "several of them, got int"),
        (({"image": 3}, ["red"]), {}, "several of them, got int"),
        (({"photo": 3}, ["red"]), {}, 'needs the image as "image", got the keys photo'),
        (("nowhere.png", ["red"]), {}, "there is no image file nowhere.png"),
        (("image", ["red"]), {"threshold": 2}, "threshold must be a number between 0 and 1"),
        (("image", ["red"]), {"mask_threshold": 0.3}, "mask_threshold=0.3 is not supported"),
        (("image", ["red"]), {"timeout": 0}, "timeout must be a number of seconds above 0"),
        (("image", ["red"]), {"hypothesis_template": 3}, "hypothesis_template must be a sentence"),
        (("image", ["red"]), {"hypothesis_template": "{} {}"}, "hypothesis_template must be a sentence"),
        (("image", ["red"]), {"hypothesis_template": "{}", "templates": "one"}, "not both"),
        (("image", ["red"]), {"batch_size": 0}, "batch_size must be a whole number of at least 1"),
    ],
)
def test_calls_that_cannot_be_answered(drawn, arguments, options, message):
    def given(value):
        return drawn if value == "image" else value

    with pytest.raises(InputError, match=message):
        segmenting()(*map(given, arguments), **{name: given(value) for name, value in options.items()})


def test_rows_of_a_data_set_and_base64_text(drawn):
    stored = io.BytesIO()
    drawn.save(stored, "PNG")
    text = base64.b64encode(stored.getvalue()).decode()
    pipe = segmenting()
    red, blue = (named(pipe(drawn, [label, "grass"])) for label in ("red", "blue"))
    assert named(pipe(text, ["red", "grass"])) == named(pipe({"image": drawn, "id": 7}, ["red", "grass"])) == red
    rows = [{"image": drawn, "candidate_labels": [label, "grass"]} for label in ("red", "blue")]
    several = pipe([{"image": drawn}, drawn], ["red", "grass"])
    for each, wanted in zip([*pipe(rows), *several], [red, blue, red, red], strict=True):
        assert_scores(each, wanted)
    assert [named(each) for each in pipe(iter([{"image": drawn}]), ["red", "grass"])] == [red]
    with pytest.raises(InputError, match="are given alone or in a list"):
        list(pipe(iter(rows), ["red"]))


@pytest.mark.parametrize("labels", [[], "", ["red", 3], 3])
def test_labels_that_are_none(drawn, labels):
    with pytest.raises(InputError, match="label"):
        classifying()(drawn, labels)


def test_a_timeout_is_that_of_the_download(drawn, monkeypatch):
    asked = []
    stored = io.BytesIO()
    drawn.save(stored, "PNG")

    def download(address, seconds):
        asked.append((address, seconds))
        return stored.getvalue()

    monkeypatch.setattr("groupvit_common.segmentation.pipelines.download", download)
    assert_scores(classifying()("https://example.org/a.png", LABELS, timeout=7), UPRIGHT)
    assert asked == [("https://example.org/a.png", 7)]


def test_the_documentations_examples_run(drawn, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    drawn.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {})
