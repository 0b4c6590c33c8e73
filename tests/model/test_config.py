"""Configurations: transformers' files in, the same meaning out, impossible values refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from tests.support.paths import REFERENCE

CASES = sorted(path.name for path in (REFERENCE / "transformers").iterdir())


def test_defaults_are_those_of_the_published_model() -> None:
    config = GroupViTConfig()
    text, vision = config.text_config, config.vision_config
    assert (text.vocab_size, text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (49408, 256, 1024, 12)
    assert (text.num_attention_heads, text.max_position_embeddings, text.hidden_act) == (4, 77, "quick_gelu")
    assert (text.pad_token_id, text.bos_token_id, text.eos_token_id) == (1, 49406, 49407)
    assert (vision.hidden_size, vision.depths, vision.num_group_tokens) == (384, [6, 3, 3], [64, 8, 0])
    assert (vision.num_output_groups, vision.num_attention_heads, vision.hidden_act) == ([64, 8, 8], 6, "gelu")
    assert (vision.image_size, vision.patch_size, vision.assign_eps, vision.assign_mlp_ratio) == (
        224,
        16,
        1.0,
        [0.5, 4],
    )
    assert (config.projection_dim, config.projection_intermediate_dim) == (256, 4096)
    assert config.logit_scale_init_value == 2.6592


@pytest.mark.parametrize("case", CASES)
def test_round_trip_of_a_file_keeps_every_key(case: str, tmp_path: Path) -> None:
    original = json.loads((REFERENCE / "transformers" / case / "config.json").read_text())
    GroupViTConfig.from_pretrained(REFERENCE / "transformers" / case).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())

    def contained(part: Any, whole: Any) -> bool:
        if isinstance(part, dict):
            return all(key in whole and contained(value, whole[key]) for key, value in part.items())
        return bool(part == whole)

    assert contained(original, written)
    assert GroupViTConfig.from_pretrained(tmp_path) == GroupViTConfig.from_dict(original)


# As transformers 4.18-4.25 wrote it: null legacy keys, and every generation setting in each tower.
OLD_FILE = {
    "architectures": ["GroupViTModel"],
    "model_type": "groupvit",
    "projection_dim": 256,
    "text_config_dict": None,
    "vision_config_dict": None,
    "text_config": {
        "_name_or_path": "",
        "add_cross_attention": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "model_type": "groupvit_text_model",
        "output_attentions": False,
        "return_dict": True,
        "torchscript": False,
        "vocab_size": 49408,
    },
    "vision_config": {"model_type": "groupvit_vision_model", "num_beams": 1, "output_groups": [64, 8, 8]},
    "transformers_version": None,
    "some_future_key": {"nested": [1, 2]},
}


def test_an_early_file_is_read_and_its_unknown_keys_are_kept() -> None:
    config = GroupViTConfig.from_dict(OLD_FILE)
    assert config.text_config.eos_token_id == 2
    assert config.text_config.extra["id2label"] == {0: "LABEL_0", 1: "LABEL_1"}
    assert config.vision_config.output_groups == [64, 8, 8]
    assert config.to_dict()["some_future_key"] == {"nested": [1, 2]}
    again = GroupViTConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config


def test_legacy_dictionaries_win_with_their_defaults() -> None:
    # transformers 4.49 answers the same: 128 wide, 12 layers (the default, not the 3 of text_config).
    config = GroupViTConfig(
        text_config={"hidden_size": 64, "num_hidden_layers": 3},
        text_config_dict={"hidden_size": 128, "num_attention_heads": 2},
    )
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (128, 12)


def test_a_tower_is_taken_out_of_a_full_file() -> None:
    directory = REFERENCE / "transformers" / "two_stage_wide"
    full = GroupViTConfig.from_pretrained(directory)
    assert GroupViTTextConfig.from_pretrained(directory) == full.text_config
    assert GroupViTVisionConfig.from_pretrained(directory) == full.vision_config


def test_full_configuration_from_towers_does_not_share_them() -> None:
    text, vision = GroupViTTextConfig(hidden_size=64), GroupViTVisionConfig(depths=[1, 2, 3])
    config = GroupViTConfig.from_text_vision_configs(text, vision, projection_dim=99)
    assert (config.text_config, config.vision_config, config.projection_dim) == (text, vision, 99)
    config.vision_config.depths[0] = 7
    assert vision.depths == [1, 2, 3]
    assert GroupViTVisionConfig().depths == [6, 3, 3]


def test_overrides_and_unused_keywords() -> None:
    directory = REFERENCE / "transformers" / "three_stage"
    config, unused = GroupViTConfig.from_pretrained(
        directory, projection_dim=5, colour="red", return_unused_kwargs=True
    )
    assert config.projection_dim == 5
    assert unused == {"colour": "red"}
    with pytest.raises(InputError, match="no setting 'colour'"):
        GroupViTConfig.from_pretrained(directory, colour="red")


def test_settings_can_be_changed_and_unknown_ones_are_an_attribute_error() -> None:
    config = GroupViTTextConfig()
    config.update({"hidden_size": 128, "note": "mine"})
    assert (config.hidden_size, config.note) == (128, "mine")
    assert not hasattr(config, "colour")
    with pytest.raises(InputError, match="dropout must be"):
        config.update({"dropout": 1.5})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depths": [6, 3]}, "one entry per stage each, got 2, 3 and 3 entries"),
        ({"image_size": 225}, "image_size must be a multiple of patch_size, got 225 and 16"),
        ({"hidden_act": "tanhish"}, "hidden_act must be one of gelu, quick_gelu"),
        ({"patch_size": 0}, "patch_size must be an integer of at least 1, got 0"),
        ({"hidden_size": "384"}, "hidden_size must be an integer of at least 0, got '384'"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"dropout": 1.0}, "dropout must be a number of at least 0 and below 1, got 1.0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be a number"),
        ({"num_group_tokens": [64, -8, 0]}, "num_group_tokens must be a non-empty list of integers"),
        ({"depths": []}, "depths must be a non-empty list"),
        ({"num_output_groups": [64, 0, 8]}, "stage 1 has 8 group tokens, so its num_output_groups must be at least 1"),
        ({"num_output_groups": [32, 8, 8]}, "as many group tokens as output groups, got 64 and 32"),
        ({"assign_mlp_ratio": [0.5]}, "assign_mlp_ratio must be two positive numbers"),
        ({"output_attentions": "yes"}, "output_attentions must be true or false"),
    ],
)
def test_impossible_vision_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GroupViTVisionConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projection_dim": 0}, "projection_dim must be an integer"),
        ({"text_config": GroupViTVisionConfig()}, "expected a GroupViTTextConfig or a dictionary"),
        ({"vision_config": 3}, "expected a GroupViTVisionConfig or a dictionary, got 3"),
        ({"text_config": {"eos_token_id": None}}, "eos_token_id must be an integer"),
        ({"output_segmentation": 1}, "output_segmentation must be true or false"),
    ],
)
def test_impossible_full_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GroupViTConfig(**settings)


def test_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="model type 'clip'"):
        GroupViTConfig.from_dict({"model_type": "clip"})
    with pytest.raises(InputError, match="or the text_config of a 'groupvit'"):
        GroupViTTextConfig.from_dict({"model_type": "clip_text_model"})


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content, message in (
        (b"{", "cannot be read as JSON"),
        (b"[]", "must hold a JSON object"),
        (b"\xff\xfe", "cannot be read as JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            GroupViTConfig.from_pretrained(tmp_path)
        assert str(path) in str(caught.value)
    path.write_text('{"vision_config": {"patch_size": 9}}')
    with pytest.raises(CheckpointError, match=r"config\.json: .*multiple of patch_size"):
        GroupViTConfig.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        GroupViTConfig().save_pretrained(path)
