"""PyTorch programs answer what the model answers. (TensorFlow's SavedModel: test_keras_files.py.)"""

from pathlib import Path

import pytest
import torch

from groupvit_common.errors import CheckpointError, InputError
from groupvit_torch import GroupViTModel, GroupViTTextModel, GroupViTVisionModel
from groupvit_torch.export import export_programs
from tests.support.models import smallest_config, smallest_inputs

FLOAT32 = 1e-5  # relative: the program and the model may sum in another order


@pytest.fixture(scope="module")
def model() -> GroupViTModel:
    torch.manual_seed(0)
    return GroupViTModel(smallest_config()).eval()


def load(directory: Path, name: str) -> torch.nn.Module:
    return torch.export.load(directory / f"{name}.pt2").module()


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() <= FLOAT32 * wanted.abs().max()


@torch.no_grad()
def test_programs_of_a_full_model(model: GroupViTModel, tmp_path: Path) -> None:
    export_programs(model.train(), tmp_path, image_size=(16, 24))
    assert model.training
    model.eval()
    given = {name: torch.from_numpy(array) for name, array in smallest_inputs().items()}
    pixels = torch.nn.functional.pad(given["pixel_values"], (0, 8))
    texts = {name: given[name][:3] for name in ("input_ids", "attention_mask")}
    features = load(tmp_path, "text_features")(**texts)["text_features"]
    close(features, model.get_text_features(**texts))
    image_features = load(tmp_path, "image_features")(pixel_values=pixels)["image_features"]
    close(image_features, model.get_image_features(pixels))
    wanted = model(**texts, pixel_values=pixels, output_segmentation=True).segmentation_logits
    segment = load(tmp_path, "segment")
    close(segment(pixel_values=pixels, text_features=features)["segmentation_logits"], wanted)
    one = segment(pixel_values=pixels[:1], text_features=features[:1])["segmentation_logits"]
    close(one, wanted[:1, :1])


@torch.no_grad()
def test_programs_of_the_towers(tmp_path: Path) -> None:
    config, given = smallest_config(), smallest_inputs()
    text, vision = GroupViTTextModel(config.text_config).eval(), GroupViTVisionModel(config.vision_config).eval()
    ids, pixels = (torch.from_numpy(given[name]) for name in ("input_ids", "pixel_values"))
    export_programs(text, tmp_path / "text")
    export_programs(vision, tmp_path / "vision")
    served = load(tmp_path / "text", "serve")(input_ids=ids, attention_mask=torch.ones_like(ids))
    close(served["pooler_output"], text(ids).pooler_output)
    served = load(tmp_path / "vision", "serve")(pixel_values=pixels)
    close(served["last_hidden_state"], vision(pixels).last_hidden_state)


def test_what_cannot_be_exported(model: GroupViTModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="multiples of the patch size 8, got 12 x 12"):
        export_programs(model, tmp_path, image_size=12)
    with pytest.raises(InputError, match="an integer or"):
        export_programs(model, tmp_path, image_size="large")
    with pytest.raises(InputError, match="no meaning for the text tower"):
        export_programs(GroupViTTextModel(smallest_config().text_config), tmp_path, image_size=16)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_programs(model, tmp_path / "file" / "below")
