"""The image processor and its `BatchFeature` as programs written for transformers use them."""

import copy
import dataclasses
import enum
import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from groupvit_common.compat.features import BatchFeature
from groupvit_common.compat.keywords import ChannelDimension
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.preprocessing.image_processor import (
    AutoImageProcessor,
    CLIPFeatureExtractor,
    CLIPImageProcessor,
    CLIPImageProcessorFast,
)

_ROWS, _COLUMNS = np.mgrid[:40, :60]
PHOTO = np.stack([_COLUMNS * 4, _ROWS * 6, (_COLUMNS * _ROWS) % 256], axis=-1).astype(np.uint8)
CHW = PHOTO.transpose(2, 0, 1)
DIM = (PHOTO[:, :, :1] > 99) * np.float32(0.2)
SIGNED = PHOTO / np.float32(127.5) - np.float32(1)
IMAGES = CLIPImageProcessor(size=20, crop_size=16)
CALLS = {
    "call": lambda: IMAGES(PHOTO)["pixel_values"][0],
    "raw": lambda: IMAGES(PHOTO, do_rescale=False, do_normalize=False)["pixel_values"][0],
    "factor": lambda: IMAGES(PHOTO, rescale_factor=0.3, do_normalize=False)["pixel_values"][0],
    "floats": lambda: IMAGES(PHOTO.astype(np.float32), do_resize=False)["pixel_values"][0],
    "centered": lambda: IMAGES(SIGNED, do_resize=False, do_rescale=False)["pixel_values"][0],
    "positional": lambda: IMAGES.preprocess(PHOTO, True, {"shortest_edge": 12}, 2, False)["pixel_values"][0],
    "resize": lambda: IMAGES.resize(PHOTO, {"shortest_edge": 15}),
    "resize_chw": lambda: IMAGES.resize(CHW, {"height": 9, "width": 8}, resample=2, data_format="channels_last"),
    "resize_unit": lambda: IMAGES.resize(DIM, {"height": 9, "width": 8}),
    "center_crop": lambda: IMAGES.center_crop(PHOTO, {"height": 11, "width": 61}),
    "center_crop_int": lambda: IMAGES.center_crop(CHW, 7, data_format="channels_last"),
    "rescale": lambda: IMAGES.rescale(PHOTO, 1 / 255),
    "rescale_first": lambda: IMAGES.rescale(
        PHOTO, 0.3, data_format="channels_first", input_data_format="channels_last"
    ),
    "rescale_64": lambda: IMAGES.rescale(PHOTO, 0.3, dtype=np.float64),
    "normalize": lambda: IMAGES.normalize(PHOTO, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]),
    "normalize_chw": lambda: IMAGES.normalize(CHW.astype(np.float64), 0.5, 0.25, data_format="channels_last"),
    "grey": lambda: IMAGES.normalize(PHOTO[:, :, :1], 0.5, 0.25),
}
# dtype, shape and CRC-32 of the bytes: of transformers 4.49's CLIPImageProcessor for the same calls.
RESULTS = {
    "call": ("float32", (3, 16, 16), 2418212667),
    "raw": ("uint8", (3, 16, 16), 4026217212),
    "factor": ("float32", (3, 16, 16), 1568182958),
    "floats": ("float32", (3, 16, 16), 3541646924),
    "centered": ("float32", (3, 16, 16), 3705549715),
    "positional": ("float32", (3, 12, 18), 3066054377),
    "resize": ("uint8", (15, 22, 3), 1393749343),
    "resize_chw": ("uint8", (9, 8, 3), 39574652),
    "resize_unit": ("float32", (9, 8, 1), 3737720360),
    "center_crop": ("uint8", (11, 61, 3), 4291415772),
    "center_crop_int": ("uint8", (7, 7, 3), 516078684),
    "rescale": ("float32", (40, 60, 3), 3233349658),
    "rescale_first": ("float32", (3, 40, 60), 1001125512),
    "rescale_64": ("float64", (40, 60, 3), 2011926975),
    "normalize": ("float32", (40, 60, 3), 2251075024),
    "normalize_chw": ("float64", (40, 60, 3), 4063827577),
    "grey": ("float32", (40, 60, 1), 2690325724),
}


def pixels(processor, image=PHOTO, **keywords):
    return processor(image, return_tensors="np", **keywords).pixel_values


@pytest.mark.parametrize("name", CALLS)
def test_steps_and_calls_have_the_bytes_of_transformers(name):
    array = np.ascontiguousarray(CALLS[name]())
    assert (array.dtype.name, array.shape, zlib.crc32(array.tobytes())) == RESULTS[name]


@pytest.mark.parametrize(
    ("attributes", "equal"),
    [
        ({"crop_size": 9}, {"crop_size": 9}),
        ({"crop_size": {"height": 9, "width": 5}}, {"crop_size": (9, 5)}),
        ({"size": 30, "do_normalize": False}, {"size": 30, "do_normalize": False}),
        ({"image_mean": 0.5, "image_std": (1, 1, 2)}, {"image_mean": [0.5] * 3, "image_std": [1, 1, 2]}),
        ({"resample": Image.Resampling.NEAREST}, {"resample": 0}),
        ({"do_resize": False}, {"do_resize": False}),
    ],
)
def test_an_attribute_that_is_set_counts_in_the_next_call(attributes, equal):
    processor = CLIPImageProcessor(size=20, crop_size=16)
    for name, value in attributes.items():
        setattr(processor, name, value)
    np.testing.assert_array_equal(pixels(processor), pixels(IMAGES, **equal))


def test_attributes_are_checked_when_they_are_set_or_used():
    processor = CLIPImageProcessor()
    with pytest.raises(InputError, match="crop_size must be a positive integer, got -4"):
        processor.crop_size = -4
    processor.crop_size["height"] = processor.size["shortest_edge"] = 7  # in place
    assert pixels(processor).shape == (1, 3, 7, 224)
    del processor.crop_size["width"]
    with pytest.raises(InputError, match="crop_size must be"):
        processor(PHOTO)


def test_sizes_in_the_forms_of_transformers_4_and_5():
    @dataclasses.dataclass
    class SizeDict:
        height: int | None = None
        width: int | None = None
        shortest_edge: int | None = None

    processor = CLIPImageProcessor(size=SizeDict(shortest_edge=30), crop_size=SizeDict(height=8, width=9))
    assert processor.size == {"shortest_edge": 30}
    assert (processor.size.shortest_edge, processor.size.height, processor.crop_size.width) == (30, None, 9)
    assert type(processor.to_dict()["size"]) is dict
    assert CLIPImageProcessor(resample=enum.Enum("Mode", {"BICUBIC": "bicubic"}).BICUBIC).resample == 3


def test_batches_may_be_nested():
    image = Image.fromarray(PHOTO)
    single = pixels(IMAGES)[0]
    several = np.empty(2, dtype=object)
    several[:] = [image, image]
    for batch, count in (
        ([[image]], 1), ([[image, PHOTO], [CHW]], 3), ([PHOTO[None], CHW[None]], 2), (several, 2),
        ([[torch.from_numpy(PHOTO)], (torch.from_numpy(PHOTO),)], 2),
    ):  # fmt: skip
        np.testing.assert_array_equal(pixels(IMAGES, batch), np.stack([single] * count))


def test_enumerations_are_their_values():
    kind = enum.Enum("TensorType", {"NUMPY": "np"}).NUMPY
    last = IMAGES(CHW, return_tensors=kind, data_format=ChannelDimension.LAST, input_data_format="channels_first")
    assert last.pixel_values.shape == (1, 16, 16, 3)
    assert IMAGES(PHOTO, return_tensors="np", data_format=None).pixel_values.shape == (1, 3, 16, 16)


def test_keywords_without_effect_pass_and_others_are_named():
    plain = pixels(IMAGES)
    np.testing.assert_array_equal(pixels(IMAGES, do_pad=False, device="cpu", disable_grouping=True), plain)
    with pytest.warns(UserWarning, match="'return_metadata' is not a keyword of the image processor and has no effect"):
        pixels(IMAGES, return_metadata=True)
    with pytest.raises(InputError, match="do_pad=True is not supported"):
        pixels(IMAGES, do_pad=True)
    with pytest.raises(InputError, match=r"preprocess takes 14 arguments after the images, each once; .* do_resize"):
        IMAGES.preprocess(PHOTO, True, do_resize=False)


def test_other_attributes_are_kept_and_saved(tmp_path):
    processor = CLIPImageProcessor(patch_note="a", mean_of_all=np.float32(2))
    processor.table = np.arange(3)
    assert (processor.patch_note, processor.mean_of_all) == ("a", 2)
    processor.save_pretrained(tmp_path)
    loaded = CLIPImageProcessor.from_pretrained(tmp_path)
    assert (loaded.patch_note, loaded.mean_of_all, loaded.table) == ("a", 2, [0, 1, 2])
    assert copy.deepcopy(processor).patch_note == pickle.loads(pickle.dumps(processor)).patch_note == "a"
    with pytest.raises(InputError, match="'do_resise' is not a setting"):
        CLIPImageProcessor(do_resise=False)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = processor.nothing
    processor.net = torch.nn.Identity()
    with pytest.raises(InputError, match="the attribute 'net' cannot be saved as JSON: it is a Identity"):
        processor.to_json_string()


def test_json_as_transformers_writes_it(tmp_path):
    text = IMAGES.to_json_string()
    assert text == json.dumps(IMAGES.to_dict(), indent=2, sort_keys=True) + "\n"
    assert "processor_class" not in text
    IMAGES.to_json_file(tmp_path / "a.json")
    assert CLIPImageProcessor.from_json_file(tmp_path / "a.json").to_dict() == IMAGES.to_dict()
    assert repr(IMAGES) == f"CLIPImageProcessor {text}"
    assert IMAGES.model_input_names == ["pixel_values"]


def test_files_by_every_name(tmp_path):
    (path,) = IMAGES.save_pretrained(tmp_path, push_to_hub=False, token=None)
    assert path == str(tmp_path / "preprocessor_config.json")
    for name in (tmp_path, path):
        assert CLIPImageProcessor.from_pretrained(pretrained_model_name_or_path=name).size == {"shortest_edge": 20}
    loaded, unused = CLIPImageProcessor.from_pretrained(path, do_normalize=False, foo=1, return_unused_kwargs=True)
    assert (loaded.do_normalize, unused) == (False, {"foo": 1})
    settings, rest = CLIPImageProcessor.get_image_processor_dict(tmp_path, foo=1, revision="main")
    assert (settings, rest) == (IMAGES.to_dict(), {"foo": 1})
    again = CLIPImageProcessor.from_dict(settings | {"x": 1}, size=42, crop_size=8, x=2)
    assert (again.size, again.crop_size, again.x) == ({"shortest_edge": 42}, {"height": 8, "width": 8}, 2)
    with pytest.raises(InputError, match="'commit_message' has a meaning with push_to_hub=True only"):
        IMAGES.save_pretrained(tmp_path, commit_message="x")


def test_a_save_may_push(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "groupvit_common.compat.image_processor.push", lambda folder, name, **options: calls.append((name, options))
    )
    IMAGES.save_pretrained(tmp_path / "mine", push_to_hub=True, use_auth_token="t", private=True)
    message = {"commit_message": "Upload image processor"}
    assert calls == [("mine", {"private": True, "use_auth_token": "t"} | message)]


def test_other_names_and_other_kinds(tmp_path):
    assert CLIPFeatureExtractor is CLIPImageProcessorFast is CLIPImageProcessor
    IMAGES.save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path, use_fast=False, backend="pil")) is CLIPImageProcessor
    settings = IMAGES.to_dict() | {"image_processor_type": "SamImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="has image_processor_type 'SamImageProcessor'; AutoImageProcessor here"):
        AutoImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="call AutoImageProcessor"):
        AutoImageProcessor()


def test_images_of_paths_and_lists(tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    one, (two,) = IMAGES.fetch_images(str(tmp_path / "a.png")), IMAGES.fetch_images([tmp_path / "a.png"])
    np.testing.assert_array_equal(one, PHOTO)
    np.testing.assert_array_equal(two, PHOTO)


# -- BatchFeature --


def test_features_are_a_dictionary_with_attributes():
    features = IMAGES(PHOTO)
    assert type(features) is BatchFeature
    assert dict(**features).keys() == {"pixel_values"} == features.data.keys()
    assert features.pixel_values is features["pixel_values"] is features.get("pixel_values")
    features.data["labels"] = 3
    features["more"] = [1]
    assert (features.labels, len(features), list(features)) == (3, 3, ["pixel_values", "labels", "more"])
    features.data = {"a": 1}
    assert features == {"a": 1}
    with pytest.raises(AttributeError, match="no 'nothing' among these features: a"):
        _ = features.nothing
    for again in (pickle.loads(pickle.dumps(features)), copy.deepcopy(features), copy.copy(features), features.copy()):
        assert (type(again), again) == (BatchFeature, features)


def test_features_become_tensors():
    data = {"a": [[1, 2], [3, 4]], "b": [1.5, 2.5], "c": [np.ones(3)] * 2, "d": [torch.ones(2)] * 2, "e": "text"}
    tensors = BatchFeature(data, tensor_type="pt")
    kinds = {name: (str(value.dtype), tuple(value.shape)) for name, value in tensors.items() if name != "e"}
    assert kinds == {
        "a": ("torch.int64", (2, 2)),
        "b": ("torch.float32", (2,)),
        "c": ("torch.float64", (2, 3)),
        "d": ("torch.float32", (2, 2)),
    }
    arrays = BatchFeature(data, tensor_type="np", skip_tensor_conversion=["a"])
    assert [type(value).__name__ for value in arrays.values()] == ["list", "ndarray", "ndarray", "ndarray", "str"]
    assert BatchFeature({"x": [[1, 2], [3]]}, tensor_type="np").x.dtype == object
    with pytest.raises(InputError, match="x cannot become one tensor"):
        BatchFeature({"x": [[1, 2], [3]]}, tensor_type="pt")
    with pytest.raises(InputError, match="tensor_type must be None, 'np', 'pt' or 'tf', got 'xx'"):
        BatchFeature({"x": [1]}).convert_to_tensors("xx")


def test_features_move():
    features = BatchFeature({"x": [torch.ones(2), torch.ones(3)], "i": torch.arange(2), "n": "text"})
    assert features.to(torch.float16) is features
    assert ([x.dtype for x in features.x], features.i.dtype) == ([torch.float16] * 2, torch.int64)
    moved = features.to("meta", non_blocking=True)
    assert (moved.x[1].device.type, moved.i.device.type, moved.n) == ("meta", "meta", "text")
    with pytest.raises(InputError, match=r"to\(\) takes a device or a dtype, got list"):
        features.to([1])


def test_a_subclass_may_replace_a_step(tmp_path: Path):
    class Darker(CLIPImageProcessor):
        def preprocess(self, images, **keywords):
            return super().preprocess(images, **{**keywords, "rescale_factor": 0.001})

    np.testing.assert_array_equal(pixels(Darker(size=20, crop_size=16)), pixels(IMAGES, rescale_factor=0.001))


def test_one_channel_becomes_three():
    grey = pixels(IMAGES, Image.fromarray(PHOTO[:, :, 0]))
    for image in (PHOTO[:, :, 0], PHOTO[:, :, :1], CHW[:1]):
        np.testing.assert_array_equal(pixels(IMAGES, image), grey)
    assert pixels(IMAGES, Image.fromarray(PHOTO[:1, :1])).shape == (1, 3, 16, 16)
