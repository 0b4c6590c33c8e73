"""The processor as programs written for transformers use it, 4.18 to 5.x."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.preprocessing.image_processor import CLIPImageProcessor
from groupvit_common.preprocessing.processor import AutoProcessor, CLIPProcessor
from groupvit_common.preprocessing.tokenizer import CLIPTokenizer, CLIPTokenizerFast

PHOTO = Image.new("RGB", (50, 40), (200, 100, 50))
TEXTS = ["a", "a cat"]


@pytest.fixture(scope="module")
def processor():
    return CLIPProcessor.from_pretrained("demo")


@pytest.fixture(scope="module")
def both(processor):
    return processor(text=TEXTS, images=PHOTO, padding=True, return_tensors="np")


def assert_same(one, other):
    assert list(one) == list(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_text_and_images_in_either_order(processor, both):
    options = {"padding": True, "return_tensors": "np"}
    array, file = np.array(PHOTO), io.BytesIO()
    PHOTO.save(file, "PNG")
    assert list(both) == ["input_ids", "attention_mask", "pixel_values"]
    for image in (PHOTO, [PHOTO], array, [array], [[array]], torch.from_numpy(array), file, file.getvalue()):
        assert_same(processor(image, TEXTS, **options), both)
        assert_same(processor(TEXTS, image, **options), both)
        assert list(processor(image, **options)) == ["pixel_values"]
    assert_same(processor(TEXTS, PHOTO, "np", padding=True), both)
    assert_same(processor(tuple(TEXTS), images=[PHOTO], videos=None, audio=None, **options), both)
    with pytest.raises(InputError, match="videos= was given: GroupViT takes text and images"):
        processor(TEXTS, videos=[PHOTO])


def test_keywords_may_be_in_dictionaries(processor, both):
    nested = {"text_kwargs": {"padding": True}, "common_kwargs": {"return_tensors": "np"}}
    assert_same(processor(text=TEXTS, images=PHOTO, **nested), both)
    got = processor(PHOTO, TEXTS, images_kwargs={"do_normalize": False, "crop_size": 16}, **nested)
    assert (got.pixel_values.shape, got.pixel_values.max()) == ((1, 3, 16, 16), np.float32(200 / 255))
    with pytest.raises(InputError, match="'padding' is given twice, in text_kwargs and by itself"):
        processor(text=TEXTS, padding=True, text_kwargs={"padding": True})
    with pytest.raises(InputError, match="images_kwargs must be a dictionary of keywords, got 3"):
        processor(images=PHOTO, images_kwargs=3)


def test_keywords_that_nobody_knows(processor):
    with pytest.warns(UserWarning, match="'flavour' is not a keyword of the processor and has no effect"):
        assert list(processor(images=PHOTO, flavour=1)) == ["pixel_values"]
    with pytest.raises(InputError, match=r"'do_normalise' is not a keyword .*did you mean 'do_normalize'"):
        processor(images=PHOTO, do_normalise=False)


def test_parts_by_their_older_names(processor):
    images, tokenizer = CLIPImageProcessor(size=8, crop_size=8), processor.tokenizer
    made = CLIPProcessor(feature_extractor=images, tokenizer=tokenizer, chat_template=None)
    assert made.feature_extractor is made.image_processor is images
    made.feature_extractor = CLIPImageProcessor(size=6, crop_size=6)
    assert made(images=PHOTO, return_tensors="np").pixel_values.shape == (1, 3, 6, 6)
    made.image_processor, made.tokenizer = images, tokenizer
    assert made(images=PHOTO, return_tensors="np").pixel_values.shape == (1, 3, 8, 8)
    assert made.attributes == CLIPProcessor.get_attributes() == ["image_processor", "tokenizer"]
    assert (made.image_processor_class, made.chat_template) == ("CLIPImageProcessor", None)
    assert made.model_input_names == ["input_ids", "attention_mask", "pixel_values"]
    with pytest.raises(InputError, match="GroupViT has no chat"):
        CLIPProcessor(images, tokenizer, chat_template="{{ messages }}")
    with pytest.raises(InputError, match="GroupViT has no chat"):
        made.chat_template = "{{ messages }}"
    with pytest.raises(InputError, match=r"in this order, got CLIPTokenizer.* and CLIPImageProcessor"):
        CLIPProcessor(tokenizer, images)
    parts = [images, tokenizer]
    again, unused = CLIPProcessor.from_args_and_dict(parts, {"processor_class": "x"}, a=1, return_unused_kwargs=True)
    assert (again.image_processor, unused) == (images, {"a": 1})


def test_json(processor, tmp_path):
    assert processor.to_dict() == {"processor_class": "CLIPProcessor"}
    processor.to_json_file(tmp_path / "processor_config.json")
    assert (tmp_path / "processor_config.json").read_text() == processor.to_json_string()
    found = CLIPProcessor.get_processor_dict(tmp_path, foo=1, revision="main")
    assert found == CLIPProcessor.get_processor_dict(tmp_path / "processor_config.json", foo=1)
    assert found == (processor.to_dict(), {"foo": 1})
    assert CLIPProcessor.get_processor_dict("demo") == ({}, {})
    assert repr(processor).startswith("CLIPProcessor:\n- image_processor: CLIPImageProcessor {\n")


def test_files(processor, tmp_path, monkeypatch):
    paths = processor.save_pretrained(tmp_path, push_to_hub=False, token=None)
    assert str(tmp_path / "preprocessor_config.json") in paths
    plain = {
        "use_fast": True,
        "use_auth_token": None,
        "torch_dtype": torch.float16,
        "device_map": "auto",
        "proxies": None,
    }
    loaded = CLIPProcessor.from_pretrained(pretrained_model_name_or_path=str(tmp_path), do_normalize=False, **plain)
    assert loaded.image_processor.do_normalize is False
    with pytest.warns(UserWarning, match="'padding_value' is not a keyword of the processor and has no effect"):
        CLIPProcessor.from_pretrained(tmp_path, padding_value=1.0)
    _, unused = CLIPProcessor.from_pretrained(tmp_path, padding_value=1.0, return_unused_kwargs=True)
    assert unused == {"padding_value": 1.0}
    images = CLIPImageProcessor(size=5)
    assert CLIPProcessor.from_pretrained(tmp_path, image_processor=images, tokenizer=None).image_processor is images
    pushed = []
    monkeypatch.setattr(CLIPProcessor, "push_to_hub", lambda _, repo_id, **options: pushed.append((repo_id, options)))
    processor.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/it", commit_message="x", token=None)
    assert pushed == [("me/it", {"commit_message": "x"})]


def test_auto_processor_makes_no_other_kind(processor, tmp_path):
    assert type(AutoProcessor.from_pretrained("demo")) is CLIPProcessor
    processor.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processor_class": "BlipProcessor"}))
    with pytest.raises(CheckpointError, match="has processor_class 'BlipProcessor'; AutoProcessor here"):
        AutoProcessor.from_pretrained(tmp_path)

    class Mine(CLIPProcessor):
        pass

    classes = dict(AutoProcessor.classes)
    try:
        AutoProcessor.register(None, Mine)
        path.write_text(path.read_text().replace("BlipProcessor", "Mine"))
        assert type(AutoProcessor.from_pretrained(tmp_path)) is Mine
    finally:
        AutoProcessor.classes = classes
    assert type(processor.tokenizer) is CLIPTokenizerFast
    assert type(CLIPProcessor.from_pretrained("demo", use_fast=False).tokenizer) is CLIPTokenizer
