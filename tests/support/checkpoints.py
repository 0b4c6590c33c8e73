"""Checkpoints for tests that look at masks."""

from pathlib import Path

import pytest

from groupvit_common.model.config import GroupViTConfig
from groupvit_common.preprocessing.image_processor import GroupViTImageProcessor
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.preprocessing.tokenizer import CLIPTokenizer


def random_checkpoint(directory: Path, seed: int, groups: tuple[int, ...] = (8,)) -> Path:
    """A small random model whose groups differ, with a processor, in `directory`; its grouping blocks leave
    `groups`."""
    torch = pytest.importorskip("torch")
    from groupvit_torch.model import GroupViTModel

    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.train(
        ["a photo of a cat, a couch, a sofa, a remote control and a dog."] * 9, 560, model_max_length=24
    )
    size, stages = len(tokenizer), len(groups) + 1
    model = GroupViTModel(
        GroupViTConfig(
            text_config={
                "vocab_size": size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                "num_attention_heads": 2, "max_position_embeddings": 24, "eos_token_id": size - 1,
            },
            vision_config={
                "hidden_size": 32, "intermediate_size": 64, "depths": [1] * stages, "num_hidden_layers": stages,
                "num_group_tokens": [*groups, 0], "num_output_groups": [*groups, groups[-1]], "num_attention_heads": 2,
                "image_size": 32, "patch_size": 4,
            },
            projection_dim=16, projection_intermediate_dim=32,
        )
    )  # fmt: skip
    # Initial weights are so small that all groups are alike.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    GroupViTProcessor(GroupViTImageProcessor(size=32, crop_size=32), tokenizer).save_pretrained(directory)
    return directory
