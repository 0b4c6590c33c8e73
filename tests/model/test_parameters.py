"""The manifest lists exactly the tensors of the models and of the files."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from groupvit_common.model.config import GroupViTConfig
from groupvit_common.model.parameters import manifest
from tests.support.backends import Backend
from tests.support.paths import REFERENCE


@pytest.mark.parametrize("case", sorted(path.name for path in (REFERENCE / "transformers").iterdir()))
def test_manifest_equals_a_file_that_transformers_wrote(case: str) -> None:
    directory = REFERENCE / "transformers" / case
    config = GroupViTConfig.from_json_file(directory / "config.json")
    shapes = {name: array.shape for name, array in load_file(directory / "model.safetensors").items()}
    assert {name: parameter.shape for name, parameter in manifest(config).items()} == shapes


def test_manifest_equals_the_model(backend: Backend, tiny_config: GroupViTConfig) -> None:
    model = backend.build(tiny_config)
    shapes = {name: array.shape for name, array in backend.weights(model).items()}
    assert {name: parameter.shape for name, parameter in manifest(tiny_config).items()} == shapes


def test_the_default_configuration_has_the_published_size() -> None:
    sizes = {p.name: int(np.prod(p.shape)) for p in manifest(GroupViTConfig()).values()}
    # transformers' GroupViTModel(GroupViTConfig()) counted once: 502 tensors, 55.7 million parameters.
    assert len(sizes) == 502
    assert round(sum(sizes.values()) / 1e6, 1) == 55.7


def test_a_tower_has_its_share_of_the_full_manifest(tiny_config: GroupViTConfig) -> None:
    full = manifest(tiny_config)
    for tower, config in (("text_model.", tiny_config.text_config), ("vision_model.", tiny_config.vision_config)):
        assert manifest(config) == {name: p for name, p in full.items() if name.startswith(tower)}
