"""Programs written for transformers and models: towers, parts, functions, keywords and methods, in both backends.

Numbers in comments "4.49" are recorded from transformers 4.49.
"""

import copy
import importlib
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from groupvit_common.errors import CheckpointError, InputError
from tests.support.models import random_checkpoint, smallest_config, smallest_inputs

INPUTS = smallest_inputs()
BACKENDS = ("tf", "torch")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("compat") / "model", smallest_config(), extra=True)


@pytest.fixture(scope="module", params=BACKENDS)
def lib(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"groupvit_{request.param}")


@pytest.fixture(scope="module")
def functions(lib: ModuleType) -> ModuleType:
    name = "modeling_tf_groupvit" if is_tf(lib) else "modeling_groupvit"
    return importlib.import_module(f"{lib.__name__}.{name}")


@pytest.fixture(scope="module")
def model(lib: ModuleType, checkpoint: Path) -> Any:
    return lib.GroupViTModel.from_pretrained(pretrained_model_name_or_path=checkpoint)


def is_tf(lib: ModuleType) -> bool:
    return lib.__name__ == "groupvit_tf"


def tensors(lib: ModuleType, *arrays: Any) -> list[Any]:
    if not is_tf(lib):
        return [torch.tensor(array) for array in arrays]
    return [importlib.import_module("tensorflow").constant(array) for array in arrays]


def numbers(value: Any) -> np.ndarray:
    return value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def test_towers_take_flags_and_defaults(lib, model):
    ids, mask, pixels = tensors(lib, INPUTS["input_ids"], INPUTS["attention_mask"], INPUTS["pixel_values"])
    whole = model(input_ids=ids, pixel_values=pixels, attention_mask=mask)
    text = model.text_model(input_ids=ids, attention_mask=mask, return_dict=True, output_attentions=True)
    assert list(text) == ["last_hidden_state", "pooler_output", "attentions"]
    # PyTorch computes another kernel where weights are requested.
    np.testing.assert_allclose(
        numbers(text.pooler_output), numbers(whole.text_model_output.pooler_output), rtol=1e-4, atol=1e-6
    )
    assert [len(value) for value in model.text_model(ids, mask, None, True, True, False)] == [4, 4, 2, 1]
    vision = model.vision_model(pixel_values=pixels, output_hidden_states=True, output_attentions=True)
    assert list(vision) == ["last_hidden_state", "pooler_output", "hidden_states", "attentions"]
    assert len(model.vision_model(pixel_values=pixels, return_dict=False)) == 2
    # The order of the flags differs between transformers' two classes.
    hidden_states, attentions = (2, 1) if is_tf(lib) else (1, 2)
    flags = {hidden_states: True, attentions: False}
    assert list(model.vision_model(pixels, flags[1], flags[2])) == [
        "last_hidden_state",
        "pooler_output",
        "hidden_states",
    ]
    with pytest.raises(InputError, match="input_ids is missing"):
        model.text_model(input_ids=None)
    flags = model.config.text_config
    flags.output_hidden_states, flags.return_dict = True, False
    try:
        assert len(model.text_model(input_ids=ids)) == 3
        np.testing.assert_array_equal(numbers(model(ids, pixels)[0]).shape, (4, 4))
        assert len(model.text_model(input_ids=ids, output_hidden_states=False, return_dict=True)) == 2
    finally:
        flags.output_hidden_states, flags.return_dict = False, True


def test_parts_can_be_called_as_transformers_parts(lib, model):
    ids, pixels = tensors(lib, INPUTS["input_ids"], INPUTS["pixel_values"])
    text, vision = model.text_model, model.vision_model
    embedded = text.embeddings(input_ids=ids)
    causal = tensors(lib, np.triu(np.full((4, 1, 5, 5), -1e30, np.float32), 1))[0]
    encoded = text.encoder(embedded, None, causal, output_hidden_states=True, return_dict=True)
    state = text.final_layer_norm(encoded.last_hidden_state)
    np.testing.assert_allclose(numbers(state), numbers(text(input_ids=ids).last_hidden_state), rtol=1e-5, atol=1e-5)
    layer = text.encoder.layers[0](embedded, attention_mask=None, causal_attention_mask=causal)
    np.testing.assert_array_equal(numbers(layer[0]), numbers(encoded.hidden_states[1]))
    assert len(layer) == 1
    assert len(text.encoder.layers[0](embedded, None, causal, output_attentions=True)) == 2
    patches = vision.embeddings(pixels)
    states, group_tokens, found = patches, None, []
    for stage in vision.encoder.stages:  # the loop of transformers' encoder
        outputs = stage(states, group_tokens, output_attentions=True)
        states, group_tokens = outputs[0], outputs[1]
        found += [outputs[2]] if outputs[2] is not None else []
    record = vision.encoder(hidden_states=patches, output_attentions=True)
    np.testing.assert_array_equal(numbers(record.last_hidden_state), numbers(states))
    np.testing.assert_array_equal(numbers(record.attentions[0]), numbers(found[0]))
    assert len(vision.encoder(patches, True, True, return_dict=False)) == 3
    assert [stage.with_group_token for stage in vision.encoder.stages] == [True, False]
    x = vision.encoder.stages[0].downsample.assign.get_attn(found[0], gumbel=False, hard=False)
    np.testing.assert_allclose(numbers(x).sum(axis=1), 1, rtol=1e-6)


def test_functions_of_the_model(lib, functions):
    # 4.49
    first, second = tensors(
        lib, *(_softmax(np.sin(np.arange(2 * n * k) * 0.7), (2, n, k)) for n, k in ((3, 8), (2, 3)))
    )
    one_block = functions.get_grouping_from_attentions([first], (16, 8))
    both = functions.get_grouping_from_attentions((first, second), hw_shape=(8, 16))
    corners = functions.resize_attention_map(first, 4, 8, align_corners=True)
    for found, shape, values in (
        (both, (2, 2, 8, 16), [0.472267, 0.472267, 0.470245, 0.466201, 0.462157, 0.458113]),
        (one_block, (2, 3, 16, 8), [0.524236, 0.524236, 0.527503, 0.534036, 0.540569, 0.547102]),
        (corners, (2, 3, 4, 8), [0.524236, 0.535436, 0.546636, 0.528783, 0.496405, 0.455298]),
    ):
        assert found.shape == shape
        np.testing.assert_allclose(numbers(found).ravel()[:6], values, atol=2e-6)
    logits = tensors(lib, np.cos(np.arange(12) * 1.3).reshape(3, 4))[0]
    np.testing.assert_allclose(numbers(functions.hard_softmax(logits, dim=-1)).argmax(-1), [0, 1, 2], atol=0)
    assert numbers(functions.hard_softmax(logits, 0)).sum() == pytest.approx(4)
    assert numbers(functions.contrastive_loss(logits[:, :3])) == pytest.approx(0.6265, abs=5e-5)
    assert numbers(functions.groupvit_loss(logits[:, :3])) == pytest.approx(0.6213, abs=5e-5)
    drawn = numbers(functions.gumbel_softmax(logits, tau=1, hard=True, dim=0))
    np.testing.assert_allclose(np.sort(drawn, axis=0), [[0] * 4, [0] * 4, [1] * 4], atol=1e-7)
    with pytest.raises(InputError, match="make no grid"):
        functions.resize_attention_map(first, 30, 30)


def _softmax(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    x = np.exp(x.reshape(shape))
    return (x / x.sum(axis=1, keepdims=True)).astype(np.float32)


def test_classes_have_transformers_names(lib, functions):
    prefix = "TF" if is_tf(lib) else ""
    for name in ("TextTransformer", "VisionTransformer", "Stage", "TokenAssign", "PreTrainedModel", "ModelOutput"):
        assert hasattr(functions, f"{prefix}GroupViT{name}"), name
    assert set(functions.__all__) <= set(dir(functions))
    configurations = importlib.import_module(f"{lib.__name__}.configuration_groupvit")
    assert configurations.GroupViTConfig is lib.GroupViTConfig


def test_attributes_of_the_base_class(lib, model, checkpoint):
    assert (model.projection_dim, model.projection_intermediate_dim) == (6, 10)
    assert (model.text_embed_dim, model.vision_embed_dim) == (8, 12)
    assert model.base_model is model
    assert (model.base_model_prefix, model.main_input_name) == ("groupvit", "input_ids")
    assert model.name_or_path == model.config.name_or_path == str(checkpoint)
    assert model.framework == ("tf" if is_tf(lib) else "pt")
    assert (model.get_output_embeddings(), model.can_generate(), model.model_tags) == (None, False, None)
    tables = (30 + 12) * 8
    assert model.num_parameters() - model.num_parameters(exclude_embeddings=True) == tables
    assert model.get_memory_footprint(return_buffers=False) == 4 * model.num_parameters()
    assert model.get_memory_footprint() > 4 * model.num_parameters()
    model.warnings_issued["x"] = True
    assert model.warnings_issued == {"x": True}
    for name in ("prune_heads", "generate", "set_output_embeddings"):
        with pytest.raises(InputError, match=f"has no {name}: "):
            getattr(model, name)({})
    tower = lib.GroupViTVisionModel(smallest_config().vision_config)
    assert not hasattr(tower, "projection_dim")
    with pytest.raises(InputError, match="no token embeddings"):
        tower.resize_token_embeddings(5)


def test_token_embeddings_are_resized(lib, checkpoint, tmp_path):
    model = lib.GroupViTModel.from_pretrained(checkpoint)
    inputs = dict(zip(INPUTS, tensors(lib, *INPUTS.values()), strict=True))
    before = numbers(model(**inputs).logits_per_text)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    old = table(model)
    model.resize_token_embeddings(31, pad_to_multiple_of=8)
    assert model.config.text_config.vocab_size == 32
    np.testing.assert_array_equal(table(model)[:30], old)
    np.testing.assert_allclose(table(model)[30:], np.tile(old.mean(axis=0), (2, 1)), rtol=1e-5)
    np.testing.assert_array_equal(numbers(model(**inputs).logits_per_text), before)
    model.save_pretrained(tmp_path)
    assert table(lib.GroupViTModel.from_pretrained(tmp_path)).shape == (32, 8)
    with pytest.raises(InputError, match="new_num_tokens must be an integer of at least 1, got 0"):
        model.resize_token_embeddings(0)


def table(model: Any) -> np.ndarray:
    embedding = model.get_input_embeddings()
    return numbers(embedding.weight if hasattr(embedding, "weight") else embedding.embeddings).copy()


def test_keywords_of_loading_and_saving(lib, checkpoint, tmp_path):
    model, info = lib.GroupViTModel.from_pretrained(
        checkpoint,
        output_loading_info=True,
        variant=None,
        use_auth_token=None,
        quantization_config=None,
        local_files_only=True,
        attn_implementation="eager",
        torchscript=True,
        num_labels=3,
    )
    assert info["unexpected_keys"] == ["multi_label_logit_scale"]
    assert info["missing_keys"] == info["mismatched_keys"] == []
    assert model.config.num_labels == 3
    outputs = model(*tensors(lib, INPUTS["input_ids"], INPUTS["pixel_values"]))
    assert isinstance(outputs, tuple)
    assert isinstance(outputs[-1], tuple)
    model.config.note = 1
    positional = [True, None, None, False, "1GB", True, None, None, True]
    model.save_pretrained(tmp_path, *([False, 1, False, None, "1GB", False, True, None] if is_tf(lib) else positional))
    model.save_pretrained(tmp_path, save_function=torch.save, variant=None, max_shard_size="10GB", state_dict=None)
    assert lib.GroupViTConfig.from_pretrained(tmp_path).note == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    for keywords in ({"variant": "fp16"}, {"quantization_config": {}}, {"load_in_8bit": True}):
        with pytest.raises(InputError, match="cannot do"):
            lib.GroupViTModel.from_pretrained(checkpoint, **keywords)


def test_gradient_checkpointing_by_the_configuration(lib):
    config = smallest_config().text_config
    config.gradient_checkpointing = True
    model = lib.GroupViTTextModel(config)
    assert model.is_gradient_checkpointing
    assert not hasattr(model.config, "gradient_checkpointing")


def test_records_take_remarks_and_values_by_position(lib):
    record = lib.BaseModelOutputWithPooling(np.zeros(2), np.ones(2))
    record.extra = "mine"
    assert (record.extra, list(record)) == ("mine", ["last_hidden_state", "pooler_output"])
    assert list(pickle.loads(pickle.dumps(record))) == list(copy.copy(record)) == list(record)
    assert record[1].sum() == 2
    with pytest.raises(TypeError, match="4 fields, got 5 values"):
        lib.BaseModelOutputWithPooling(1, 2, 3, 4, 5)


# -- PyTorch --


def torch_model(checkpoint: Path, **keywords: Any) -> Any:
    import groupvit_torch

    return groupvit_torch.GroupViTModel.from_pretrained(checkpoint, **keywords)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_torchscript(checkpoint):
    arrays = [INPUTS[name] for name in ("input_ids", "pixel_values", "attention_mask")]
    inputs = tuple(torch.from_numpy(array) for array in arrays)
    model = torch_model(checkpoint, torchscript=True)
    traced = torch.jit.trace(model, inputs)
    torch.testing.assert_close(traced(*inputs)[0], model(*inputs)[0])


def test_hooks_see_what_transformers_parts_return(checkpoint):
    model, seen = torch_model(checkpoint), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, output, name=name: seen.__setitem__(name, output))
    inputs = {name: torch.from_numpy(array) for name, array in INPUTS.items()}
    output = model(**inputs)
    assert seen["vision_model.encoder"].keys() == {"last_hidden_state"}
    assert torch.equal(seen["vision_model.encoder"][0], seen["vision_model.encoder.stages.1"][0])
    assert torch.equal(seen["text_model"][1], output.text_model_output.pooler_output)
    assert [len(seen[f"text_model.encoder.layers.0{part}"]) for part in ("", ".self_attn")] == [1, 2]
    handle = model.text_model.encoder.layers[0].register_forward_hook(lambda m, i, o: (o[0] * 0,))
    assert not torch.equal(model(**inputs).text_embeds, output.text_embeds)
    handle.remove()


def test_methods_for_trainers_and_adapters(checkpoint):
    model = torch_model(checkpoint).requires_grad_(False)
    ids = torch.from_numpy(INPUTS["input_ids"])
    model.enable_input_require_grads()
    assert model.text_model(ids).last_hidden_state.requires_grad
    model.disable_input_require_grads()
    assert not model.text_model(ids).last_hidden_state.requires_grad
    assert model.floating_point_ops({"input_ids": ids}) == 6 * 20 * model.num_parameters(exclude_embeddings=True)
    assert model.get_head_mask(None, 2) == [None, None]
    bias = model.get_extended_attention_mask(torch.tensor([[1, 0]]), (1, 2))
    assert bias.tolist() == [[[[-0.0, torch.finfo(torch.float32).min]]]]
    model.add_model_tags(["a", "b"])
    model.add_model_tags("a")
    assert model.model_tags == ["a", "b"]


def test_a_class_of_ones_own_draws_its_own_values():
    import groupvit_torch

    class Head(groupvit_torch.GroupViTModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.head = torch.nn.Linear(6, 2)
            self.post_init()

        def _init_weights(self, module: torch.nn.Module) -> None:
            super()._init_weights(module)
            if isinstance(module, torch.nn.Linear) and module.out_features == 2:
                torch.nn.init.ones_(module.weight)

    model = Head(smallest_config())
    assert bool((model.head.weight == 1).all())
    assert float(model.vision_model.embeddings.position_embeddings.detach().std()) > 0


# -- TensorFlow --


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras and h5py
def test_the_main_layer_is_the_model(checkpoint, tmp_path):
    import keras

    import groupvit_tf

    model = groupvit_tf.TFGroupViTModel.from_pretrained(checkpoint, from_pt=True)
    pixels = tensors(groupvit_tf, INPUTS["pixel_values"])[0]
    names = [variable.path for variable in model.variables]
    assert model.groupvit is model
    assert len(set(names)) == len(names)
    out = model.groupvit.vision_model(
        pixel_values=pixels, output_attentions=False, output_hidden_states=False, return_dict=True
    )
    x = out.pooler_output
    for step in model.groupvit.visual_projection:
        x = step(x)
    np.testing.assert_allclose(numbers(x), numbers(model.get_image_features(pixels)), rtol=1e-6)
    # Keras saves whatever it finds in a model: not the model in itself.
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numbers(loaded.get_image_features(pixels)), numbers(x))
    assert [list(spec.shape) for spec in model.input_signature.values()] == [[None, None]] * 2 + [[None, 3, 16, 16]]
    assert numbers(model(model.dummy_inputs).logits_per_text).shape == (1, 1)
    assert model.serving(model.dummy_inputs).keys() == model(model.dummy_inputs).keys()


def test_a_keras_model_of_a_configuration():
    import groupvit_tf

    config = smallest_config().text_config
    for source in (config, config.to_dict(), groupvit_tf.TFGroupViTTextModel(config).get_config()):
        model = groupvit_tf.TFGroupViTTextModel.from_config(source)
        assert model.config == config
        model.build()


def test_the_factor_of_initial_values_scales_all_of_them(lib):
    settings = smallest_config().to_dict()
    for part in (settings, settings["text_config"], settings["vision_config"]):
        part.update(initializer_factor=1e-10, initializer_range=1e-10)
    model = lib.GroupViTModel(lib.GroupViTConfig.from_dict(settings))
    weights = model.weights if is_tf(lib) else [*model.parameters()]
    values = [np.abs(np.asarray(weight if is_tf(lib) else weight.detach())) for weight in weights]
    # Nothing but zeros, the ones of norms and the temperature, and state of the generators.
    floats = [value for value in values if value.dtype.kind == "f" and value.size > 1]
    assert all(value.max() < 1e-8 or (value == 1).all() for value in floats)


def test_a_state_dict_in_the_place_of_a_checkpoint(checkpoint, tmp_path):
    lib = importlib.import_module("groupvit_torch")
    state = lib.GroupViTModel(smallest_config()).state_dict()
    for model in (
        lib.GroupViTModel.from_pretrained(None, config=smallest_config(), state_dict=state),
        lib.GroupViTModel.from_pretrained(checkpoint, state_dict=state),
    ):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert model.logit_scale.data_ptr() != state["logit_scale"].data_ptr()
    tower = lib.GroupViTTextModel.from_pretrained(None, config=smallest_config().text_config, state_dict=state)
    assert torch.equal(tower.text_model.final_layer_norm.weight, state["text_model.final_layer_norm.weight"])
    with pytest.raises(CheckpointError, match="state_dict does not fit"):
        lib.GroupViTModel.from_pretrained(checkpoint, state_dict={**state, "x": state["logit_scale"]})
    with pytest.raises(InputError, match="takes a GroupViTConfig, got NoneType"):
        lib.GroupViTModel.from_pretrained(None, state_dict=state)
