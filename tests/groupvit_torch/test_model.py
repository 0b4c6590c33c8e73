"""PyTorch alone: training mode, gradients, checkpointing, compilation, initial values."""

import copy

import numpy as np
import pytest
import torch

from groupvit_common.model.config import GroupViTConfig, GroupViTVisionConfig
from groupvit_torch import GroupViTModel, GroupViTTextModel, GroupViTVisionModel
from groupvit_torch.grouping import assign, gumbel_noise_like
from groupvit_torch.layers import MLP

# In float64, eight seeds had rounding noise below 2e-11 where the gradient is zero, and at least 5e-4 where it is not.
NO_GRADIENT = 1e-7


def tensors(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def test_training_draws_noise_and_evaluation_does_not(
    tiny_config: GroupViTConfig, tiny_inputs: dict[str, np.ndarray]
) -> None:
    torch.manual_seed(0)
    model, given = GroupViTModel(tiny_config), tensors(tiny_inputs)
    # Two passes over the same images merge different patches; without noise they cannot differ (no dropout here).
    twice = [model.train()(**given, output_hidden_states=True).vision_model_output.hidden_states for _ in range(2)]
    assert not torch.equal(twice[0][1], twice[1][1])
    twice = [model.eval()(**given, output_hidden_states=True).vision_model_output.hidden_states for _ in range(2)]
    assert torch.equal(twice[0][1], twice[1][1])


def test_gumbel_noise_has_the_right_distribution() -> None:
    torch.manual_seed(0)
    noise = gumbel_noise_like(torch.empty(200_000, dtype=torch.float64))
    # Mean: Euler's constant; variance: pi^2 / 6. Five standard errors of 200,000 samples.
    assert noise.mean().item() == pytest.approx(0.5772, abs=5 * 1.2825 / 200_000**0.5)
    assert noise.var().item() == pytest.approx(np.pi**2 / 6, abs=0.05)


def test_gradient_of_the_hard_assignment_is_the_soft_ones() -> None:
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 4, 5, dtype=torch.float64)
    (hard,) = torch.autograd.grad(assign(logits), logits, upstream)
    (soft,) = torch.autograd.grad(logits.softmax(dim=1), logits, upstream)
    torch.testing.assert_close(hard, soft)


def test_every_parameter_learns(tiny_config: GroupViTConfig, tiny_inputs: dict[str, np.ndarray]) -> None:
    torch.manual_seed(0)
    model = GroupViTModel(tiny_config).double().train()
    given = tensors(tiny_inputs)
    model(**given | {"pixel_values": given["pixel_values"].double()}, return_loss=True).loss.backward()
    # Zero by mathematics, rounding noise in practice: biases that what follows takes away again.
    cancelled = (
        "attn.k_proj.bias",  # by the softmax over the keys
        "downsample.assign.q_proj.bias",  # by the softmax over the groups, which are the queries here
        "_projection.0.bias",  # by the batch norm, as is what is added to every text or image in front of it:
        "text_model.final_layer_norm.bias",
        "vision_model.layernorm.bias",
        "downsample.mlp_inter.fc2.bias",  # one number a token: by the layer norm over its channels, as the next
        "group_projector.1.fc2.bias",
    )
    zero = {name for name, _ in model.named_parameters() if name.endswith(cancelled)}
    still = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < NO_GRADIENT}
    assert still == zero


def test_gradient_checkpointing_changes_no_gradient(
    tiny_config: GroupViTConfig, tiny_inputs: dict[str, np.ndarray]
) -> None:
    given = tensors(tiny_inputs)
    noise = [torch.randn(3, 6, 16), torch.randn(3, 5, 6)]
    plain = GroupViTModel(tiny_config).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable()
    assert saving.is_gradient_checkpointing
    assert not plain.is_gradient_checkpointing
    for model in (plain, saving):
        model(**given, return_loss=True, gumbel_noise=noise).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    saving.gradient_checkpointing_disable()
    assert not saving.is_gradient_checkpointing


def test_dropout_is_used_in_training_only(tiny_config: GroupViTConfig, tiny_inputs: dict[str, np.ndarray]) -> None:
    config = GroupViTConfig(
        text_config={**tiny_config.text_config.to_dict(), "attention_dropout": 0.5},
        vision_config={**tiny_config.vision_config.to_dict(), "dropout": 0.5},
    )
    model, given = GroupViTModel(config), tensors(tiny_inputs)
    outputs = [model.train()(**given, output_attentions=flag).text_embeds for flag in (False, False, True, True)]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[2], outputs[3])
    assert torch.equal(model.eval()(**given).text_embeds, model(**given).text_embeds)


def test_autocast_and_float32_pixels_into_a_half_model(
    tiny_config: GroupViTConfig, tiny_inputs: dict[str, np.ndarray]
) -> None:
    model, given = GroupViTModel(tiny_config), tensors(tiny_inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.train()(**given, return_loss=True)
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    model = model.eval().to(torch.bfloat16)
    assert model(**given).image_embeds.dtype == torch.bfloat16


def test_exports_without_a_graph_break(tiny_config: GroupViTConfig, tiny_inputs: dict[str, np.ndarray]) -> None:
    model, given = GroupViTModel(tiny_config).eval(), tensors(tiny_inputs)
    exported = torch.export.export(model, (), given)
    torch.testing.assert_close(exported.module()(**given).logits_per_image, model(**given).logits_per_image)


def test_initial_values_follow_the_documented_scheme(tiny_config: GroupViTConfig) -> None:
    torch.manual_seed(0)
    config = GroupViTConfig(
        vision_config={"depths": [1, 1, 1]}, text_config={"num_hidden_layers": 2, "vocab_size": 999}
    )
    state = GroupViTModel(config).state_dict()

    def std(name: str) -> float:
        return state[name].std().item()

    # Thousands of samples each: a few percent of sampling error. (Truncation at 2, not at 2 std, leaves 0.02 as it is.)
    close = {"rel": 0.05}
    stage, layer = "vision_model.encoder.stages.0", "text_model.encoder.layers.1"
    assert std(f"{stage}.layers.0.mlp.fc1.weight") == pytest.approx(0.02, **close)
    assert std(f"{stage}.downsample.assign.q_proj.weight") == pytest.approx(0.02, **close)
    assert std(f"{stage}.group_token") == pytest.approx(0.02, **close)
    assert std("vision_model.embeddings.position_embeddings") == pytest.approx(0.02, **close)
    assert std("text_model.embeddings.token_embedding.weight") == pytest.approx(0.02, **close)
    assert std("text_model.embeddings.position_embedding.weight") == pytest.approx(0.01, **close)
    assert std(f"{layer}.self_attn.q_proj.weight") == pytest.approx(256**-0.5, **close)
    assert std(f"{layer}.self_attn.out_proj.weight") == pytest.approx(256**-0.5 * 4**-0.5, **close)
    assert std(f"{layer}.mlp.fc1.weight") == pytest.approx(512**-0.5, **close)
    assert std(f"{layer}.mlp.fc2.weight") == pytest.approx(256**-0.5 * 4**-0.5, **close)
    for name in (f"{stage}.layers.0.mlp.fc1.bias", f"{layer}.mlp.fc1.bias", "vision_model.layernorm.bias"):
        assert not state[name].any()
    assert state["logit_scale"].item() == pytest.approx(2.6592)


@pytest.mark.parametrize("name", ["gelu", "quick_gelu", "gelu_new", "relu", "selu", "silu"])
def test_every_documented_activation(name: str) -> None:
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    # Written out from their definitions (Hendrycks & Gimpel 2016; Klambauer et al. 2017; Elfwing et al. 2017).
    wanted = {
        "gelu": x * (1 + torch.erf(x / 2**0.5)) / 2,
        "quick_gelu": x / (1 + torch.exp(-1.702 * x)),
        "gelu_new": x / 2 * (1 + torch.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "relu": x.clamp(min=0),
        "selu": 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * (x.exp() - 1)),
        "silu": x / (1 + torch.exp(-x)),
    }[name]
    torch.testing.assert_close(MLP(GroupViTVisionConfig(hidden_act=name)).activation(x), wanted, rtol=1e-12, atol=1e-12)


def test_towers_alone_equal_the_towers_within(tiny_config: GroupViTConfig, tiny_inputs: dict[str, np.ndarray]) -> None:
    full, given = GroupViTModel(tiny_config).eval(), tensors(tiny_inputs)
    state = full.state_dict()
    out = full(**given)
    text, vision = (
        GroupViTTextModel(tiny_config.text_config).eval(),
        GroupViTVisionModel(tiny_config.vision_config).eval(),
    )
    for tower in (text, vision):
        tower.load_state_dict({name: state[name] for name in tower.state_dict()})
    pooled = text(given["input_ids"], given["attention_mask"]).pooler_output
    torch.testing.assert_close(pooled, out.text_model_output.pooler_output)
    torch.testing.assert_close(
        vision(given["pixel_values"], return_dict=False)[1], out.vision_model_output.pooler_output
    )


def test_features_as_transformers_4_and_5_return_them(
    tiny_config: GroupViTConfig, tiny_inputs: dict[str, np.ndarray]
) -> None:
    model, given = GroupViTModel(tiny_config).eval(), tensors(tiny_inputs)
    tensor = model.get_image_features(given["pixel_values"])
    record = model.get_image_features(given["pixel_values"], return_dict=True)
    assert torch.equal(tensor, record.pooler_output)
    assert record.last_hidden_state.shape == (3, 5, 32)
    record = model.get_text_features(given["input_ids"], output_attentions=True, return_dict=True)
    torch.testing.assert_close(record.pooler_output, model.get_text_features(given["input_ids"]))
    assert len(record.attentions) == 2


def test_input_embeddings_can_be_replaced(tiny_config: GroupViTConfig) -> None:
    model = GroupViTModel(tiny_config)
    bigger = torch.nn.Embedding(60, 24)
    model.set_input_embeddings(bigger)
    assert model.get_input_embeddings() is bigger is model.text_model.embeddings.token_embedding


def test_a_model_without_storage_draws_no_initial_values(
    tiny_config: GroupViTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr("groupvit_torch.base.initialise", lambda part, factor: drawn.append(type(part).__name__))
    with torch.device("meta"):
        model = GroupViTModel(tiny_config)
    assert not drawn
    model.to_empty(device="cpu").init_weights()
    assert sorted(drawn) == ["Projection", "Projection", "TextTower", "VisionTower"]
