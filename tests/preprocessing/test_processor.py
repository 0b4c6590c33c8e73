"""Text and images together, and the files of transformers 4 and 5."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.preprocessing.image_processor import GroupViTImageProcessor
from groupvit_common.preprocessing.processor import AutoProcessor, CLIPProcessor, GroupViTProcessor
from groupvit_common.preprocessing.tokenizer import CLIPTokenizer
from tests.support.paths import REFERENCE

IMAGE = REFERENCE / "images" / "2.png"
TEXTS = ["a red star", "grass"]


@pytest.fixture
def processor() -> GroupViTProcessor:
    small = REFERENCE / "tokenizer" / "small"
    tokenizer = CLIPTokenizer(small / "vocab.json", small / "merges.txt")
    return GroupViTProcessor(GroupViTImageProcessor(size=40, crop_size=32), tokenizer)


def assert_same(one, other) -> None:
    assert list(one) == list(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_text_and_images_are_joined(processor):
    both = processor(text=TEXTS, images=[IMAGE, IMAGE], padding=True, return_tensors="pt")
    assert list(both) == processor.model_input_names == ["input_ids", "attention_mask", "pixel_values"]
    assert both.pixel_values.shape == (2, 3, 32, 32)
    assert_same(
        processor(TEXTS, padding=True, return_tensors="pt"),
        processor.tokenizer(TEXTS, padding=True, return_tensors="pt"),
    )
    assert_same(processor(images=IMAGE, return_tensors="np"), processor.image_processor(IMAGE, return_tensors="np"))
    assert both.to(torch.float16).pixel_values.dtype == torch.float16
    positional = processor(TEXTS, IMAGE, "np", padding=True)
    assert positional.pixel_values.shape == (1, 3, 32, 32)


def test_keywords_reach_the_part_they_are_for(processor):
    got = processor(
        text=TEXTS,
        images=IMAGE,
        padding="max_length",
        max_length=10,
        crop_size=16,
        do_normalize=False,
        return_tensors="np",
    )
    assert got.input_ids.shape == (2, 10)
    assert got.pixel_values.shape == (1, 3, 16, 16)
    assert got.pixel_values.min() >= 0
    # As with transformers, keywords of a part that is not asked for do no harm.
    assert list(processor(images=IMAGE, padding=True)) == ["pixel_values"]
    with pytest.raises(InputError, match="'paddding' is not a keyword of the processor"):
        processor(text=TEXTS, paddding=True)


def test_bad_calls(processor):
    with pytest.raises(InputError, match="needs text, images or both"):
        processor()
    with pytest.raises(InputError, match="got NoneType and CLIPTokenizer"):
        GroupViTProcessor(tokenizer=processor.tokenizer)


def test_decode(processor):
    ids = processor(text=TEXTS, padding=True).input_ids
    assert processor.batch_decode(ids, skip_special_tokens=True) == TEXTS
    assert processor.decode(ids[0], skip_special_tokens=True) == TEXTS[0]


def test_saved_files_give_the_same_processor(processor, tmp_path):
    paths = processor.save_pretrained(tmp_path)
    assert sorted(Path(path).name for path in paths) == sorted(path.name for path in tmp_path.iterdir())
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        # By this, transformers' AutoProcessor knows what to make of a directory.
        assert json.loads((tmp_path / name).read_text())["processor_class"] == "CLIPProcessor"
    arguments = {"text": TEXTS, "images": IMAGE, "padding": True, "return_tensors": "np"}
    for kind in (AutoProcessor, CLIPProcessor):
        assert_same(kind.from_pretrained(tmp_path)(**arguments), processor(**arguments))
    overridden = AutoProcessor.from_pretrained(tmp_path, crop_size=8, model_max_length=9, use_fast=False)
    assert (overridden.image_processor.crop_size["height"], overridden.tokenizer.model_max_length) == (8, 9)


def test_unknown_keywords_are_refused_and_harmless_ones_are_not_saved(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"'modle_max_length' is not a keyword of the processor .*crop_size.*pad_token"
    ):
        AutoProcessor.from_pretrained(tmp_path, modle_max_length=5)
    with pytest.warns(UserWarning, match="'data_format' is not a keyword .* no effect"):  # of a call, not of the files
        AutoProcessor.from_pretrained(tmp_path, data_format="channels_last")
    loaded = AutoProcessor.from_pretrained(
        tmp_path, use_fast=True, trust_remote_code=True, do_lower_case=True, force_download=True, token="hf_SECRET"
    )
    before = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    loaded.save_pretrained(tmp_path / "again")
    assert {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "again").iterdir()} == before


def test_force_download_reaches_the_hub(processor, tmp_path, monkeypatch):
    processor.save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(
        "groupvit_common.preprocessing.processor.resolve",
        lambda *_, location, **__: asked.append(location.force_download) or tmp_path,
    )
    AutoProcessor.from_pretrained("org/name", force_download=True)
    AutoProcessor.from_pretrained("org/name")
    assert asked == [True, False]


def test_the_layout_of_transformers_5(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    # transformers 5 writes one processor_config.json, and neither preprocessor_config.json nor special_tokens_map.json.
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    combined = {"image_processor": settings | {"size": {"shortest_edge": 48}}, "processor_class": "CLIPProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(combined))
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.size == {"shortest_edge": 48}  # it goes first
    for name in ("preprocessor_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.image_processor.size == {"shortest_edge": 48}
    assert_same(loaded(text=TEXTS, padding=True), processor(text=TEXTS, padding=True))
    # Saved over it, the new settings count.
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.size == {"shortest_edge": 40}


def test_a_processor_file_of_transformers_4_has_no_image_processor(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.size == {"shortest_edge": 40}


def test_a_missing_part_is_named(processor, tmp_path):
    processor.save_pretrained(tmp_path / "whole")
    for missing, message in (
        ("preprocessor_config.json", "preprocessor_config.json"),
        ("tokenizer.json", "tokenizer.json"),
    ):
        directory = tmp_path / f"no_{missing}"
        shutil.copytree(tmp_path / "whole", directory)
        (directory / missing).unlink()
        (directory / "vocab.json").unlink()
        with pytest.raises(CheckpointError, match=message):
            AutoProcessor.from_pretrained(directory)
