"""`AutoConfig`, `AutoModel`, `set_seed` and other names of transformers, in both backends."""

import importlib
import json
import random

import numpy as np
import pytest

from groupvit_common.compat.features import BatchFeature
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.auto import AutoConfig
from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig
from tests.support.models import smallest_config


@pytest.fixture(scope="module", params=["groupvit_torch", "groupvit_tf"])
def backend(request):
    return pytest.importorskip(request.param)


def test_a_configuration_by_its_model_type(tmp_path):
    assert type(AutoConfig.from_pretrained("demo", trust_remote_code=False)) is GroupViTConfig
    config = AutoConfig.for_model("groupvit", projection_dim=32)
    assert (type(config), config.projection_dim) == (GroupViTConfig, 32)
    config.save_pretrained(tmp_path)
    loaded, unused = AutoConfig.from_pretrained(tmp_path / "config.json", foo=1, return_unused_kwargs=True)
    assert (loaded.projection_dim, unused) == (32, {"foo": 1})
    assert type(AutoConfig.for_model("groupvit_text_model")) is GroupViTTextConfig
    with pytest.raises(InputError, match="this configuration has model_type 'bert'; AutoConfig here knows groupvit, "):
        AutoConfig.for_model("bert")
    with pytest.raises(CheckpointError, match=r"call AutoConfig\.from_pretrained"):
        AutoConfig()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(CheckpointError, match="has model_type 'clip'; AutoConfig here knows groupvit, "):
        AutoConfig.from_pretrained(tmp_path)


def test_a_class_of_ones_own(monkeypatch):
    monkeypatch.setattr(AutoConfig, "classes", dict(AutoConfig.classes))

    class MyConfig(GroupViTConfig):
        model_type = "mine"

    AutoConfig.register("mine", MyConfig)
    assert type(AutoConfig.for_model("mine")) is MyConfig
    with pytest.raises(InputError, match="'groupvit' is the model type of GroupViTConfig; pass exist_ok=True"):
        AutoConfig.register("groupvit", MyConfig)


def test_a_model_by_its_model_type(backend, tmp_path):
    config = smallest_config()
    model = backend.AutoModel.from_config(config, attn_implementation="eager")
    assert type(model) is backend.GroupViTModel
    assert isinstance(model, backend.PreTrainedModel)
    model.save_pretrained(tmp_path)
    for given in ({}, {"config": config}, {"config": str(tmp_path)}):
        assert type(backend.AutoModel.from_pretrained(tmp_path, **given)) is backend.GroupViTModel
    assert type(backend.AutoModel.from_config(config.text_config)) is backend.GroupViTTextModel
    other = backend.AutoModelForZeroShotImageClassification
    with pytest.raises(InputError, match="has model_type 'groupvit_text_model'; AutoModelForZeroShot"):
        other.from_config(config.text_config)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(CheckpointError, match="has model_type 'clip'; AutoModel here knows groupvit, "):
        backend.AutoModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"call AutoModel\.from_pretrained"):
        backend.AutoModel()


def test_one_seed_for_all(backend):
    name = "torch" if backend.__name__.endswith("torch") else "keras"
    library = importlib.import_module(name)

    def numbers():
        backend.set_seed(7)
        drawn = library.rand(3) if name == "torch" else library.random.normal((3,))
        return [random.random(), np.random.rand(), *np.asarray(drawn)]

    state = random.getstate(), np.random.get_state()
    try:
        assert numbers() == numbers()
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
    with pytest.raises(InputError, match="a seed must be a whole number of at least 0 and below 2"):
        backend.set_seed(-1)


def test_names_of_transformers(backend):
    names = (
        "AutoConfig AutoFeatureExtractor AutoImageProcessor AutoModel AutoProcessor AutoTokenizer BatchEncoding "
        "BatchFeature CLIPFeatureExtractor CLIPImageProcessor CLIPImageProcessorFast CLIPProcessor "
        "PreTrainedModel set_seed"
    )
    assert set(names.split()) <= set(backend.__all__)


def test_keras_finds_the_tensors_in_features():
    pytest.importorskip("groupvit_tf")
    keras = importlib.import_module("keras")
    doubled = keras.tree.map_structure(lambda value: 2 * value, {"x": BatchFeature({"a": 1, "b": 2})})
    assert type(doubled["x"]) is BatchFeature
    assert doubled == {"x": {"a": 2, "b": 4}}
