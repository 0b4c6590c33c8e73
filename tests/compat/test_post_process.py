"""`post_process_*_segmentation` of the processors, as transformers' image processors have them."""

import importlib
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from groupvit_common.errors import InputError
from groupvit_common.preprocessing.image_processor import GroupViTImageProcessor
from groupvit_common.preprocessing.processor import GroupViTProcessor

LABELS = ["red", "green", "blue", "grass"]

# Of transformers 4.49's SegformerImageProcessor, for the logits of `_logits`.
BEST = [[[0, 2, 2, 2], [1, 2, 1, 1], [2, 0, 1, 2]], [[1, 1, 1, 2], [1, 0, 2, 2], [1, 0, 0, 0]]]
BEST_RESIZED = [
    [
        [0, 0, 2, 2, 2, 2, 2],
        [0, 2, 2, 2, 2, 2, 2],
        [1, 1, 2, 1, 1, 1, 1],
        [2, 2, 0, 1, 1, 2, 2],
        [2, 2, 0, 0, 1, 2, 2],
    ],
    [[1, 1, 1, 1, 2, 2], [1, 0, 0, 0, 0, 0]],
]


def _logits():
    return np.random.default_rng(3).normal(size=(2, 3, 3, 4)).astype(np.float32)


@lru_cache
def demo_processor():
    return GroupViTProcessor.from_pretrained("demo")


@lru_cache
def model_of(name):
    return importlib.import_module(f"groupvit_{name}").GroupViTModel.from_pretrained("demo")


@pytest.fixture
def processor():
    return demo_processor()


def image():
    """A red disc and a blue square on green: 90 x 60."""
    drawn = Image.new("RGB", (90, 60), (40, 160, 40))
    draw = ImageDraw.Draw(drawn)
    draw.ellipse((8, 10, 44, 46), fill=(220, 30, 30))
    draw.rectangle((55, 15, 80, 50), fill=(30, 30, 220))
    return drawn


@lru_cache
def outputs_of(name):
    kind = {"torch": "pt", "tf": "tf"}[name]
    inputs = demo_processor()(text=LABELS, images=[image()] * 2, return_tensors=kind, padding=True)
    model = model_of(name)
    if name == "torch":
        import torch

        with torch.no_grad():
            return model(**inputs, output_segmentation=True)
    return model(**inputs, output_segmentation=True)


def _numpy(tensor):
    return tensor.numpy() if hasattr(tensor, "numpy") else np.asarray(tensor)


def test_label_maps_are_those_of_transformers(processor):
    outputs = SimpleNamespace(logits=_logits())
    maps = processor.post_process_semantic_segmentation(outputs)
    assert [each.dtype for each in maps] == [np.int64, np.int64]
    assert [each.tolist() for each in maps] == BEST
    resized = processor.post_process_semantic_segmentation(outputs, target_sizes=[(5, 7), (2, 6)])
    assert [each.tolist() for each in resized] == BEST_RESIZED


def test_the_image_processor_has_them_too():
    maps = GroupViTImageProcessor().post_process_semantic_segmentation({"segmentation_logits": _logits()})
    assert [each.tolist() for each in maps] == BEST


def test_label_maps_in_strips_are_those_of_the_whole(processor, monkeypatch):
    outputs = {"segmentation_logits": _logits()}
    whole = processor.post_process_semantic_segmentation(outputs, target_sizes=[(37, 23), (1, 1)])
    monkeypatch.setattr("groupvit_common.compat.post_process._VALUES_AT_ONCE", 3 * 23 * 2)
    strips = processor.post_process_semantic_segmentation(outputs, target_sizes=[(37, 23), (1, 1)])
    for one, other in zip(whole, strips, strict=True):
        np.testing.assert_array_equal(one, other)


def test_label_maps_of_a_model(backend, processor):
    outputs = outputs_of(backend.name)
    maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[(60, 90), (30, 45)])
    assert [tuple(each.shape) for each in maps] == [(60, 90), (30, 45)]
    assert type(maps[0]) is type(outputs.segmentation_logits)
    # The model knows colours: the middles of the disc and of the square.
    assert [LABELS[int(_numpy(maps[0])[y, x])] for y, x in ((28, 26), (32, 67))] == ["red", "blue"]
    full = processor.post_process_semantic_segmentation(outputs)
    expected = _numpy(outputs.segmentation_logits).argmax(1)
    np.testing.assert_array_equal(np.stack([_numpy(each) for each in full]), expected)


def test_groups_are_segments(backend, processor):
    outputs = outputs_of(backend.name)
    found = processor.post_process_instance_segmentation(outputs, target_sizes=[(60, 90)] * 2)
    ids = _numpy(found[0]["segmentation"])
    info = found[0]["segments_info"]
    assert (ids.dtype, ids.shape) == (np.int32, (60, 90))
    assert sorted(np.unique(ids).tolist()) == [each["id"] for each in info] == list(range(len(info)))
    assert {type(each["score"]) for each in info} == {float}
    assert [LABELS[info[ids[y, x]]["label_id"]] for y, x in ((28, 26), (32, 67))] == ["red", "blue"]


def test_scores_of_groups_are_the_models_own(backend, processor):
    """Undone from the logits, they are the softmax of the similarities of the groups' own embeddings and the texts."""
    outputs, model = outputs_of(backend.name), model_of(backend.name)
    states = outputs.vision_model_output.last_hidden_state[0]
    projected = model.visual_projection(states)
    embeds = _numpy(projected.detach() if hasattr(projected, "detach") else projected)
    embeds = embeds / np.linalg.norm(embeds, axis=-1, keepdims=True)
    scale = model.logit_scale.detach() if hasattr(model.logit_scale, "detach") else model.logit_scale
    odds = np.exp(np.exp(np.asarray(scale)) * embeds @ _numpy(outputs.text_embeds).T)
    expected = odds / odds.sum(-1, keepdims=True)
    info = processor.post_process_instance_segmentation(outputs)[0]["segments_info"]
    assert len(info) > 3  # some groups have no pixels in this image
    for each in info:
        # Rounded to six digits; logits of 100 in float32 are exact to 1e-5.
        there = np.abs(expected[:, each["label_id"]] - each["score"]) < 2e-5
        assert there.any(), (each, expected)
        assert (expected.argmax(-1)[there] == each["label_id"]).all()


def test_half_precision(processor):
    import torch

    from groupvit_torch import GroupViTModel

    inputs = processor(text=LABELS, images=image(), return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = GroupViTModel.from_pretrained("demo", dtype="bfloat16")(**inputs, output_segmentation=True)
    [label_map] = processor.post_process_semantic_segmentation(outputs, target_sizes=[(60, 90)])
    [found] = processor.post_process_instance_segmentation(outputs, target_sizes=torch.tensor([[60, 90]]))
    for name, (y, x) in (("red", (28, 26)), ("blue", (32, 67))):
        segment = found["segments_info"][found["segmentation"][y, x]]
        assert LABELS[label_map[y, x]] == LABELS[segment["label_id"]] == name
        assert segment["score"] > 0.9


def test_thresholds_leave_segments_out(processor):
    outputs = outputs_of("torch")
    whole = processor.post_process_instance_segmentation(outputs)[0]
    scores = sorted(each["score"] for each in whole["segments_info"])
    middle = scores[len(scores) // 2]
    some = processor.post_process_instance_segmentation(outputs, threshold=middle - 1e-6)[0]
    assert [each["score"] for each in some["segments_info"]] == [
        each["score"] for each in whole["segments_info"] if each["score"] >= middle
    ]
    assert (some["segmentation"] == -1).any()
    # No group ever fills a pixel wholly: what is nowhere so sure is left out, all pixels with it.
    none = processor.post_process_instance_segmentation(outputs, mask_threshold=1.0)[0]
    assert none["segments_info"] == []
    assert (none["segmentation"] == -1).all()
    # Of the pixels in which a group has a trace it owns only some.
    mine = processor.post_process_instance_segmentation(outputs, overlap_mask_area_threshold=0.99)[0]
    assert len(mine["segments_info"]) < len(whole["segments_info"])


def test_binary_maps(processor):
    outputs = outputs_of("torch")
    whole = processor.post_process_instance_segmentation(outputs)[0]
    maps = processor.post_process_instance_segmentation(outputs, return_binary_maps=True)[0]["segmentation"]
    assert maps.shape == (len(whole["segments_info"]), *whole["segmentation"].shape)
    np.testing.assert_array_equal(maps.numpy().argmax(0), whole["segmentation"].numpy())


def test_panoptic_segments_fuse_labels(processor):
    outputs = outputs_of("torch")
    apart = processor.post_process_panoptic_segmentation(outputs)[0]
    assert [each["id"] for each in apart["segments_info"]] == list(range(1, len(apart["segments_info"]) + 1))
    groups = [each for each in apart["segments_info"] if each["label_id"] == 1]
    assert len(groups) > 1
    fused = processor.post_process_panoptic_segmentation(outputs, label_ids_to_fuse={1})[0]
    [one] = [each for each in fused["segments_info"] if each["label_id"] == 1]
    assert one["was_fused"]
    assert one["score"] == max(each["score"] for each in groups)
    of_label = np.isin(apart["segmentation"].numpy(), [each["id"] for each in groups])
    np.testing.assert_array_equal(fused["segmentation"].numpy() == one["id"], of_label)


@pytest.mark.parametrize(
    ("outputs", "options", "message"),
    [
        ({"logits_per_image": 1}, {}, "no segmentation_logits: call the model with output_segmentation=True"),
        ({"segmentation_logits": np.zeros((2, 3, 4))}, {}, r"\[images, texts, height, width\], got \[2, 3, 4\]"),
        ({"segmentation_logits": _logits()}, {"target_sizes": [(5, 7)]}, "1 entries for 2 images"),
        ({"segmentation_logits": _logits()}, {"target_sizes": [(5, 7), 3]}, "got 3"),
        ({"segmentation_logits": _logits()}, {"target_sizes": [(5, 7), (0, 7)]}, r"at least 1, got \(0, 7\)"),
    ],
)
def test_what_cannot_be_labelled(processor, outputs, options, message):
    with pytest.raises(InputError, match=message):
        processor.post_process_semantic_segmentation(outputs, **options)


def test_what_has_no_segments(processor):
    with pytest.raises(InputError, match=r"no groups .* output_segmentation=True"):
        processor.post_process_instance_segmentation({"segmentation_logits": _logits()})
    with pytest.raises(InputError, match="threshold must be a number between 0 and 1, got 2"):
        processor.post_process_instance_segmentation(outputs_of("torch"), threshold=2)
    with pytest.raises(InputError, match="to_coco_annotations"):
        processor.post_process_instance_segmentation(outputs_of("torch"), return_coco_annotation=True)
