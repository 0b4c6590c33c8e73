"""Side by side with transformers itself, 4.34 to 5.x, where it is installed (it is no dependency: skipped elsewhere).

By hand: `pip install "transformers==4.49.0"` into an environment of its own, then `python -m pytest
tests/project/test_transformers.py`.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import groupvit_torch
from groupvit_common.model.config import GroupViTConfig

# transformers warns of its own deprecations at import and in use; they are not ours to fail on.
pytestmark = pytest.mark.filterwarnings("ignore")
transformers = pytest.importorskip("transformers", exc_type=ImportError)

# Over the array's largest value: two float32 programs (see test_parity.py), here with up to four stages.
FLOAT32 = 1e-5
FLOAT64 = 1e-10

CONFIGS = {
    "four_stages": {
        "text_config": {"hidden_act": "gelu", "num_attention_heads": 2, "hidden_size": 16, "eos_token_id": 59},
        "vision_config": {
            "depths": [1, 2, 1, 1],
            "num_group_tokens": [7, 5, 3, 0],
            "num_output_groups": [7, 5, 3, 3],
            "hidden_act": "silu",
        },
    },
    "new_gelu": {
        "text_config": {"hidden_act": "gelu_new", "num_attention_heads": 4, "hidden_size": 20, "eos_token_id": 59},
        "vision_config": {
            "hidden_act": "gelu_new",
            "depths": [1, 1],
            "num_group_tokens": [6, 0],
            "num_output_groups": [4, 4],
        },
    },
    "relu_legacy_eos": {
        "text_config": {"hidden_act": "relu", "num_attention_heads": 3, "hidden_size": 24, "eos_token_id": 2},
        "vision_config": {
            "hidden_act": "relu",
            "depths": [2, 1],
            "num_group_tokens": [5, 0],
            "num_output_groups": [5, 5],
        },
    },
}


def config_of(name: str) -> GroupViTConfig:
    small = CONFIGS[name]
    return GroupViTConfig(
        text_config={
            "vocab_size": 60,
            "intermediate_size": 30,
            "num_hidden_layers": 2,
            "max_position_embeddings": 11,
            **small["text_config"],
        },
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 36,
            "num_attention_heads": 2,
            "image_size": 24,
            "patch_size": 4,
            **small["vision_config"],
        },
        projection_dim=10,
        projection_intermediate_dim=18,
    )


def lively(model: torch.nn.Module) -> None:
    """Weights large enough, and batch-norm statistics odd enough, that a mistake anywhere shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and name != "logit_scale":
                noise = torch.rand(tensor.shape, generator=generator) - 0.5
                tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else tensor + 0.3 * noise)


def inputs_of(config: GroupViTConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(3, 58, (4, 9), generator=generator)
    ids[:, -1] = 59
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 5:] = 59, 0
    pixels = torch.randn(4, 3, 24, 24, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def assert_close(name: str, actual: torch.Tensor, wanted: torch.Tensor) -> None:
    assert actual.shape == wanted.shape, name
    assert (actual - wanted).abs().max() <= FLOAT32 * wanted.abs().max(), name


@pytest.fixture(params=sorted(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our model, and transformers' model loaded from what ours saved (in several shards)."""
    ours = groupvit_torch.GroupViTModel(config_of(request.param)).eval()
    lively(ours)
    ours.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    theirs, info = transformers.GroupViTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return ours, theirs.eval()


def test_transformers_loads_what_we_save_and_answers_alike(pair: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    ours, theirs = pair
    given = inputs_of(ours.config)
    flags = {"output_attentions": True, "output_hidden_states": True, "output_segmentation": True, "return_loss": True}
    with torch.no_grad():
        actual, wanted = ours(**given, **flags), theirs(**given, **flags)
    # transformers 5 dropped hidden states and attentions it had documented; what it returns is compared.
    for name in ("loss", "logits_per_image", "logits_per_text", "segmentation_logits", "text_embeds", "image_embeds"):
        assert_close(name, actual[name], wanted[name])
    for tower in ("text_model_output", "vision_model_output"):
        for name in ("last_hidden_state", "pooler_output"):
            assert_close(f"{tower}.{name}", actual[tower][name], wanted[tower][name])
        for name in ("hidden_states", "attentions"):
            if wanted[tower].get(name) is not None:
                assert len(actual[tower][name]) == len(wanted[tower][name])
                for index, (one, other) in enumerate(zip(actual[tower][name], wanted[tower][name], strict=True)):
                    assert_close(f"{tower}.{name}.{index}", one, other)


def test_we_load_what_transformers_saves(pair: tuple[torch.nn.Module, torch.nn.Module], tmp_path: Path) -> None:
    ours, theirs = pair
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    again = groupvit_torch.GroupViTModel.from_pretrained(tmp_path / "theirs")
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


def test_training_gradients_agree(
    pair: tuple[torch.nn.Module, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm in training mode; the grouping's noise stays off because its blocks stay in evaluation.

    In float64, because four samples in a batch norm make float32 gradients depend on the order of summation.
    """
    given = inputs_of(pair[0].config)
    given["pixel_values"] = given["pixel_values"].double()
    # transformers 4.49 makes its causal mask in the default dtype and cannot mix it with another.
    monkeypatch.setattr(torch, "finfo", lambda dtype, finfo=torch.finfo: finfo(torch.float32))
    gradients = []
    for model in pair:
        model.double()
        model.visual_projection.train()
        model.text_projection.train()
        model(**given, return_loss=True).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    largest = max(float(gradient.abs().max()) for gradient in gradients[1].values())
    for name, wanted in gradients[1].items():
        assert (gradients[0][name] - wanted).abs().max() <= FLOAT64 * largest, name
    ours, theirs = pair
    torch.testing.assert_close(
        ours.visual_projection[1].running_var, theirs.visual_projection[1].running_var, rtol=FLOAT64, atol=0
    )


def test_default_configuration_is_theirs() -> None:
    theirs = transformers.GroupViTConfig().to_dict()
    ours = GroupViTConfig().to_dict()
    for part in ("text_config", "vision_config"):
        for name in ours[part]:
            if name in theirs[part]:
                assert list(np.ravel(ours[part][name])) == list(np.ravel(theirs[part][name])), name
    assert ours["projection_dim"] == theirs["projection_dim"]
    assert ours["logit_scale_init_value"] == theirs["logit_scale_init_value"]
