"""Makes, changes, compares, saves and loads configurations, and models from them."""

import copy
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, GroupViTConfig, GroupViTModel, GroupViTTextConfig, GroupViTVisionConfig


def main(checkpoint, data):
    text = GroupViTTextConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, vocab_size=90
    )
    vision = GroupViTVisionConfig(
        hidden_size=12,
        depths=[1, 1],
        num_group_tokens=[4, 0],
        num_output_groups=[4, 4],
        num_attention_heads=2,
        intermediate_size=20,
        image_size=16,
        patch_size=8,
    )
    config = GroupViTConfig.from_text_vision_configs(text, vision, projection_dim=6, projection_intermediate_dim=8)
    config.experiment = {"run": 7, "tags": ["small", "test"]}
    config.text_config.note = "kept"
    config.update({"projection_dim": 10})
    config.vision_config.layer_norm_eps = 1e-6
    model = GroupViTModel(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        written = json.loads(Path(folder, "config.json").read_text())
        again = GroupViTConfig.from_pretrained(folder)
        by_name = AutoConfig.from_pretrained(folder)
        text_again = GroupViTTextConfig.from_pretrained(folder)
        changed, unused = GroupViTConfig.from_pretrained(
            folder, logit_scale_init_value=1.5, foo=3, return_unused_kwargs=True
        )
        loaded = AutoModel.from_pretrained(folder)
        again.to_json_file(Path(folder, "other.json"))
        from_file = GroupViTConfig.from_json_file(Path(folder, "other.json"))
        raw, _ = GroupViTConfig.get_config_dict(folder)
    fresh = AutoModel.from_config(by_name)
    copied = copy.deepcopy(again)
    copied.projection_dim = 11
    published = GroupViTConfig.from_pretrained(checkpoint)
    return {
        "type": [written["model_type"], written["architectures"], config.model_type, text.model_type],
        "kept": [again.experiment, again.text_config.note, by_name.experiment["run"], text_again.note],
        "numbers": [again.projection_dim, again.vision_config.layer_norm_eps, again.vision_config.depths],
        "changed": [changed.logit_scale_init_value, unused],
        "equal": [again.to_dict() == from_file.to_dict(), again == copied, type(by_name).__name__],
        "raw": [raw["projection_dim"], sorted(set(raw) & {"text_config", "vision_config", "experiment"})],
        "diff": sorted(
            set(text.to_diff_dict()) & {"hidden_size", "vocab_size", "dropout", "num_hidden_layers", "note"}
        ),
        "sizes": [model.num_parameters(), loaded.num_parameters(), fresh.num_parameters()],
        "projections": [list(loaded.text_projection[3].weight.shape), list(fresh.visual_projection[0].weight.shape)],
        "same": all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items()),
        "text_in_json": json.loads(text.to_json_string())["hidden_size"],
        "default": [GroupViTConfig().projection_dim, hasattr(published, "experiment")],
        "labels": [published.num_labels, published.id2label[0], published.is_encoder_decoder],
        "image": [published.vision_config.image_size, published.vision_config.num_channels],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
