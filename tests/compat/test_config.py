"""Programs written for transformers and configurations: attributes of their own, labels, differences, files."""

import copy
import json
import pickle

import pytest
import torch

from groupvit_common import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from groupvit_common.errors import InputError
from groupvit_common.model.parameters import manifest
from groupvit_common.model.pretrained import Pretrained
from tests.support.paths import ROOT

DEMO_MODEL = ROOT / "groupvit_common" / "demo_model"


@pytest.fixture
def config() -> GroupViTConfig:
    return GroupViTConfig.from_pretrained(DEMO_MODEL)


def test_whatever_is_set_is_kept(config, tmp_path):
    config.note, config.text_config.note = {"a": [1, 2]}, 1
    config.save_pretrained(tmp_path, push_to_hub=False)
    read = GroupViTConfig.from_pretrained(tmp_path)
    for twin in (read, copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert (twin.note, twin.text_config.note) == ({"a": [1, 2]}, 1)
        assert twin == config
    assert config.to_dict()["note"] == config.to_diff_dict()["note"] == config.extra["note"]
    shallow = copy.copy(config)
    shallow.other = 1
    assert not hasattr(config, "other")
    with pytest.raises(TypeError):
        config.extra["note"] = 2  # it would be lost


def test_keys_of_a_file_cover_no_method(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "groupvit", "to_dict": 1, "_served": 2, "extra": {"x": 1}}')
    config = GroupViTConfig.from_pretrained(tmp_path)
    assert config.to_dict()["to_dict"] == 1
    assert config.num_beams == 1


def test_what_every_configuration_of_transformers_has_is_read_and_not_written(config):
    # transformers 4.49's values.
    expected = {"use_bfloat16": False, "max_length": 20, "top_k": 50, "pruned_heads": {}, "tie_word_embeddings": True}
    expected |= {"is_encoder_decoder": False, "torchscript": False, "problem_type": None, "bos_token_id": None}
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.text_config.bos_token_id == 638
    assert not expected.keys() & config.to_dict().keys()
    assert expected.keys() < json.loads(config.to_json_string(use_diff=False)).keys()
    assert (config.attribute_map, config.is_composition) == ({}, False)
    assert GroupViTConfig.sub_configs == {"text_config": GroupViTTextConfig, "vision_config": GroupViTVisionConfig}
    assert config.get_text_config() is config.text_config
    with pytest.raises(AttributeError, match="has no setting 'hidden_size'"):
        _ = config.hidden_size
    config.pruned_heads[0] = [1]
    assert config.to_dict()["pruned_heads"] == {0: [1]}


def test_labels(config, tmp_path):
    assert (config.num_labels, config.id2label) == (2, {0: "LABEL_0", 1: "LABEL_1"})
    config.num_labels = 3
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    config.save_pretrained(tmp_path)
    assert GroupViTConfig.from_pretrained(tmp_path).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert GroupViTConfig(id2label={"0": "cat"}).num_labels == GroupViTConfig(num_labels=1).num_labels == 1
    with pytest.raises(InputError, match="id2label must have numbers"):
        GroupViTConfig(id2label={"cat": 0})
    with pytest.raises(InputError, match="problem_type must be one of"):
        GroupViTConfig(problem_type="x")


def test_differences_from_the_defaults(config):
    # As transformers 4.49 has them.
    assert sorted(config.to_diff_dict())[:3] == ["architectures", "initializer_factor", "initializer_range"]
    assert config.to_diff_dict()["text_config"] == {
        "bos_token_id": 638, "pad_token_id": 639, "eos_token_id": 639, "vocab_size": 640, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
        "model_type": "groupvit_text_model",
    }  # fmt: skip
    assert GroupViTConfig().to_diff_dict()["vision_config"] == {"model_type": "groupvit_vision_model"}


def test_where_it_came_from_is_not_written(config, tmp_path):
    config.name_or_path = tmp_path
    assert config._name_or_path == config.to_dict()["_name_or_path"] == str(tmp_path)
    assert "_name_or_path" not in config.to_json_string()
    assert config == GroupViTConfig.from_pretrained(DEMO_MODEL)


def test_dtypes(config):
    assert config.torch_dtype == config.dtype == torch.float32
    config.torch_dtype = torch.float16
    assert config.to_dict()["torch_dtype"] == "float16"
    assert GroupViTConfig().torch_dtype is None


def test_dictionaries_and_keywords():
    held, unused = GroupViTConfig.get_config_dict(DEMO_MODEL, note=1, use_auth_token=None)
    assert (held["projection_dim"], unused) == (64, {"note": 1})
    config, unused = GroupViTConfig.from_dict(held, return_unused_kwargs=True, projection_dim=3, num_labels=4, note=1)
    assert (config.projection_dim, config.num_labels, unused) == (3, 4, {"note": 1})
    config = GroupViTConfig.from_pretrained(
        DEMO_MODEL, None, False, True, None, "main", trust_remote_code=True, proxies=None, torchscript=True
    )
    assert (config.torchscript, config.use_return_dict, config.return_dict) == (True, False, True)
    with pytest.raises(InputError, match="cannot do gguf_file='a': only safetensors"):
        GroupViTConfig.from_pretrained(DEMO_MODEL, gguf_file="a")


def test_settings_from_text(config):
    config.update_from_string("projection_dim=3,output_attentions=yes,logit_scale_init_value=1.5")
    assert (config.projection_dim, config.output_attentions, config.logit_scale_init_value) == (3, True, 1.5)
    for text in ("nothing=3", "output_attentions=maybe", "projection_dim=x", "architectures=x"):
        with pytest.raises(InputError):
            config.update_from_string(text)


def test_keywords_of_saving():
    options = Pretrained._push_options(True, False, {"save_function": torch.save, "variant": None, "token": "t"})
    assert options == {"token": "t"}
    for keywords, reason in ({"variant": "fp16"}, "one name"), ({"commit_message": "x"}, "push_to_hub=True only"):
        with pytest.raises(InputError, match=reason):
            Pretrained._push_options(True, False, keywords)


@pytest.mark.parametrize("kind", [GroupViTTextConfig, GroupViTVisionConfig])
def test_sizes_need_fit_each_other_in_a_model_only(kind, tmp_path):
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        for value in (2, 37):
            assert getattr(kind(**{name: value}), name) == value
    config = kind(hidden_size=37)
    config.save_pretrained(tmp_path)
    assert kind.from_pretrained(tmp_path) == config
    for bad in (config, kind(hidden_size=0)):
        with pytest.raises(InputError, match=r"hidden_size must be (a multiple of num_att|an integer of at least 1)"):
            manifest(bad)
