import os

import numpy as np
import pytest
from hypothesis import settings

from groupvit_common.model.config import GroupViTConfig
from tests.support.backends import BACKENDS, Backend

# The same examples in every run: a change is judged by what it changes. HYPOTHESIS_PROFILE=default draws others.
settings.register_profile("same", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]()


@pytest.fixture
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


@pytest.fixture
def tiny_inputs(tiny_config: GroupViTConfig) -> dict[str, np.ndarray]:
    """Three texts and three images for `tiny_config`; the second text is padded."""
    rng = np.random.default_rng(7)
    input_ids = rng.integers(0, 48, (3, 9))
    input_ids[:, 0], input_ids[:, -1] = 48, 49
    input_ids[1, 5:] = 49
    attention_mask = np.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    pixel_values = rng.standard_normal((3, 3, 32, 32)).astype(np.float32)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
