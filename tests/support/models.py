"""Models of the smallest size, and inputs for them."""

from pathlib import Path

import numpy as np

from groupvit_common.checkpoints.safetensors_file import array_info, write_arrays
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.model.parameters import manifest


def smallest_config() -> GroupViTConfig:
    """Every kind of part once: what takes a second to trace as a graph."""
    return GroupViTConfig(
        text_config={
            "vocab_size": 30,
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 12,
            "bos_token_id": 28,
            "eos_token_id": 29,
        },
        vision_config={
            "hidden_size": 12,
            "intermediate_size": 16,
            "depths": [1, 0],
            "num_group_tokens": [4, 0],
            "num_output_groups": [4, 4],
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        projection_dim=6,
        projection_intermediate_dim=10,
    )


def smallest_inputs() -> dict[str, np.ndarray]:
    """Four texts and four images for `smallest_config`; the second text is padded."""
    return _inputs(smallest_config(), rows=4, tokens=5, short=3)


def tiny_config() -> GroupViTConfig:
    """Three stages, 4x4 patches, everything small and no two sizes equal that need not be."""
    return GroupViTConfig(
        text_config={
            "vocab_size": 50,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 12,
            "bos_token_id": 48,
            "eos_token_id": 49,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "depths": [1, 1, 1],
            "num_group_tokens": [6, 5, 0],
            "num_output_groups": [6, 5, 5],
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=20,
        projection_intermediate_dim=28,
    )


def tiny_inputs() -> dict[str, np.ndarray]:
    """Three texts and three images for `tiny_config`; the second text is padded."""
    return _inputs(tiny_config(), rows=3, tokens=9, short=5)


def _inputs(config: GroupViTConfig, rows: int, tokens: int, short: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    text, side = config.text_config, config.vision_config.image_size
    input_ids = rng.integers(0, text.bos_token_id, (rows, tokens))
    input_ids[:, 0], input_ids[:, -1] = text.bos_token_id, text.eos_token_id
    input_ids[1, short:] = text.eos_token_id
    attention_mask = np.ones_like(input_ids)
    attention_mask[1, short + 1 :] = 0
    pixel_values = rng.standard_normal((rows, 3, side, side)).astype(np.float32)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}


def random_checkpoint(
    directory: Path, config: GroupViTConfig, seed: int = 0, extra: bool = False, dtype: str = "float32"
) -> Path:
    """A native checkpoint with other numbers in every tensor."""
    import ml_dtypes

    rng = np.random.default_rng(seed)
    numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    arrays: dict[str, np.ndarray] = {}
    for name, parameter in manifest(config).items():
        counter = parameter.kind == "counter"
        value = rng.integers(1, 1000) if counter else rng.standard_normal(parameter.shape)
        value = np.abs(value) if parameter.kind == "running_var" else value
        arrays[name] = np.asarray(value, np.int64 if counter else numpy_dtype)
    if extra:
        arrays["multi_label_logit_scale"] = np.asarray(2.5, numpy_dtype)
    directory.mkdir()
    infos = {name: array_info(value.shape, value.dtype.name) for name, value in arrays.items()}
    write_arrays(directory / "model.safetensors", infos, arrays.__getitem__)
    config.save_pretrained(directory)
    return directory
