"""The record of options: one field is a keyword, a flag, a setting that is saved and a part of what a run is known
by."""

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from groupvit_common.cli.arguments import add_options
from groupvit_common.errors import InputError
from groupvit_common.evaluation.protocols import ProtocolSettings, protocol_settings
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.segmentation.options import OPTIONS, Option, SegmentationOptions

CHANGED = {
    "templates": ["a {}."], "normalize_prompts": False, "background": 0.5, "temperature": 2.0, "assignment": "soft",
    "top_k": 5, "shorter_side": 96, "window": 64, "stride": 16, "synonyms": "max", "flip": True, "scales": [0.5, 1.0],
    "refine": 10, "refine_dilations": [1, 2], "foreground": 0.8,
}  # fmt: skip


def test_a_run_that_was_begun_before_is_known_again():
    """Journals hold exactly this text; another one would keep evaluations from being resumed."""
    config = GroupViTConfig.from_dict({"vision_config": {"image_size": 224, "patch_size": 16}})
    assert json.dumps(SegmentationOptions().for_model(config).to_dict()) == (
        '{"templates": ["a photo of a {}."], "normalize_prompts": true, "background": null, "temperature": 1.0, '
        '"assignment": "hard", "top_k": null, "shorter_side": 448, "window": null, "stride": null, "synonyms": "mean", '
        '"flip": false, "scales": [1.0], "refine": 0, "refine_dilations": [1, 2, 4, 8, 12, 24], "foreground": null}'
    )
    chosen = SegmentationOptions(window=64, scales=(2, 0.9), background=0.95).for_model(config).to_dict()
    assert (chosen["stride"], chosen["scales"], chosen["background"]) == (32, [0.9, 2.0], 0.95)


def test_settings_of_results():
    assert json.dumps(protocol_settings("paper", "voc").to_dict()) == (
        '{"names": "authors", "templates": "one", "normalize_prompts": false, "background": 0.95, "temperature": 1.0, '
        '"assignment": "hard", "top_k": 5, "shorter_side": 448, "window": 448, "stride": 224, "synonyms": "mean", '
        '"flip": false, "scales": [1.0], "refine": 0, "refine_dilations": [1, 2, 4, 8, 12, 24], "foreground": null}'
    )
    assert isinstance(replace(ProtocolSettings(), names="set", flip=True), SegmentationOptions)


def test_there_and_back_as_json():
    assert CHANGED.keys() == OPTIONS.keys() == {each.name for each in fields(SegmentationOptions)}
    options = SegmentationOptions.from_dict(CHANGED)
    assert json.loads(json.dumps(options.to_dict())) == CHANGED
    assert SegmentationOptions.from_dict(options.to_dict()) == options
    assert SegmentationOptions.from_dict({}) == SegmentationOptions()
    with pytest.raises(InputError, match="no segmentation option 'top_n': there are assignment, background"):
        SegmentationOptions.from_dict({"top_n": 5})


def test_every_option_says_what_it_acts_on():
    """The early exit for one view's groups, and the oracle as a bound, are derived from this."""
    scopes = {"groups": [], "view": [], "views": [], "scores": [], "detail": []}
    for name, option in OPTIONS.items():
        scopes[option.scope].append(name)
    assert scopes == {
        "groups": [
            "templates", "normalize_prompts", "background", "temperature", "top_k", "shorter_side", "synonyms",
        ],
        "view": ["assignment", "window"],
        "views": ["flip", "scales"],
        "scores": ["refine", "foreground"],
        "detail": ["stride", "refine_dilations"],
    }  # fmt: skip
    with pytest.raises(TypeError, match="scope"):
        Option("flag", "help", None, (), command="segment")
    for name, value in CHANGED.items():
        stride = {"window": 64} if name == "stride" else {}
        options = SegmentationOptions(**{name: value, **stride})
        assert options.needs_scores == (name in scopes["scores"]), name
    assert not SegmentationOptions(scales=[2]).needs_scores


def test_numbers_of_numpy_are_those_of_python(tmp_path):
    (tmp_path / "sentences.txt").write_text("a {}.")
    options = SegmentationOptions(
        templates=Path(tmp_path / "sentences.txt"), top_k=np.int64(3), scales=np.array([0.5, 1]), flip=np.True_
    )
    assert options == SegmentationOptions(templates=tmp_path / "sentences.txt", top_k=3, scales=(0.5, 1.0), flip=True)
    assert json.loads(json.dumps(options.to_dict()))["templates"] == str(tmp_path / "sentences.txt")


def test_every_option_is_a_flag():
    parser = argparse.ArgumentParser()
    add_options(parser, OPTIONS)
    assert vars(parser.parse_args([])) == {}
    arguments = []
    for name, value in CHANGED.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag if value else flag.replace("--", "--no-"))
        else:
            value = value if name != "templates" else value[0]
            arguments += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    given = vars(parser.parse_args(arguments))
    assert SegmentationOptions(**given) == replace(SegmentationOptions.from_dict(CHANGED), templates="a {}.")


def test_a_flag_takes_every_default():
    """A flag can always be given with the value that it has without it."""
    for name, option in OPTIONS.items():
        if option.kind == "flag" or option.default is None:
            continue
        parser = argparse.ArgumentParser()
        add_options(parser, [name])
        value = ",".join(map(str, option.default)) if isinstance(option.default, tuple) else str(option.default)
        given = vars(parser.parse_args(["--" + name.replace("_", "-"), value]))
        assert SegmentationOptions(**given) == SegmentationOptions(), name


def test_a_protocol_is_replaced_by_none():
    parser = argparse.ArgumentParser()
    add_options(parser, OPTIONS, or_none=True)
    given = vars(parser.parse_args(["--background", "none", "--top-k", "none", "--window", "none", "--stride", "none"]))
    assert replace(protocol_settings("paper", "voc"), **given).background is None
    assert set(given.values()) == {None}
