"""The architecture of the authors' checkpoints: read from the weights' shapes and the pickled settings, and written as settings.

The shapes say nearly everything. How many heads the vision tower has stands in the settings alone, which the original trainer
pickles as an OmegaConf object; where they cannot be read, heads are taken to be 64 wide, as in every model that was released.
Text heads are always 64 wide; the end-of-text token is the vocabulary's last id.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from conversion.pickles import Inert
from groupvit_common.config import GroupViTConfig
from groupvit_common.errors import CheckpointError, InputError

_HEAD_WIDTH = 64
_MAX_DEPTH = 20  # of nested settings
_MAX_VALUES = 100_000

Shapes = Mapping[str, tuple[int, ...]]


def plain(value: Any) -> Any:
    """Pickled settings (OmegaConf's objects, mmcv's, dictionaries) as plain values; what is not understood becomes None."""
    return _plain(value, iter(range(_MAX_VALUES)), 0)


def _plain(value: Any, budget: Iterator[int], depth: int) -> Any:
    # Shared values may nest to astronomical numbers; no one's settings do.
    if depth > _MAX_DEPTH or next(budget, None) is None:
        return None
    if isinstance(value, Inert):
        state = value.state if isinstance(value.state, dict) else {}
        # OmegaConf: a container keeps its nodes in `_content`, a node its value in `_val`; mmcv's Config: `_cfg_dict`. Else it
        # is a class derived from dict or list, or one with attributes.
        for key in ("_content", "_val", "_cfg_dict"):
            if key in state:
                return _plain(state[key], budget, depth + 1)
        value = value.items or value.elements or state
    if isinstance(value, dict):
        return {key: _plain(item, budget, depth + 1) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [_plain(item, budget, depth + 1) for item in value]
    return value if isinstance(value, str | int | float | bool) else None


def read_config(shapes: Shapes, pickled: Any, source: object) -> GroupViTConfig:
    """The configuration of a checkpoint of the authors' code.

    Args:
        shapes: its tensors, name -> shape.
        pickled: its settings as the pickle has them, or None.
        source: what an error calls the file.

    Raises:
        CheckpointError: the tensors are no such model's, or the settings contradict them or describe what this project's
            model does not do.
    """
    settings = plain(pickled)
    model = settings.get("model") if isinstance(settings, dict) else None
    model = model if isinstance(model, dict) else {}
    image, text = (_table(model.get(key)) for key in ("img_encoder", "text_encoder"))
    try:
        config, heads_known = _from_shapes(shapes, image)
    except KeyError as error:
        raise CheckpointError(
            f"{source} is no GroupViT of the authors' code: it has no tensor {error.args[0]}"
        ) from None
    except InputError as error:
        raise CheckpointError(f"{source} describes no possible model: {error}") from error
    except (IndexError, ZeroDivisionError, ValueError) as error:
        raise CheckpointError(f"{source} describes no possible model: its tensors have unusual shapes") from error
    _check_settings(config, model, image, text, source)
    if not heads_known and config.vision_config.hidden_size % _HEAD_WIDTH:
        raise CheckpointError(
            f"{source} does not say how many attention heads its vision tower has, and its width of "
            f"{config.vision_config.hidden_size} is no multiple of {_HEAD_WIDTH}: pass a configuration"
        )
    if isinstance(model.get("multi_label"), int):
        config.update({"multi_label": model["multi_label"]})
    return config


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that stands in the names for the pattern's group."""
    numbers = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    count = max(numbers, default=-1) + 1
    if count > len(shapes):
        raise ValueError("a number that has no tensors of its own")
    return count


def _from_shapes(shapes: Shapes, image: Mapping[str, Any]) -> tuple[GroupViTConfig, bool]:
    _, positions, width = shapes["img_encoder.pos_embed"]
    _, channels, patch, _ = shapes["img_encoder.patch_embed.proj.weight"]
    vocabulary, text_width = shapes["text_encoder.token_embedding.weight"]
    depths, tokens, groups = [], [], []
    hidden = mixing = None
    stages = _count(shapes, r"img_encoder\.layers\.(\d+)\.")
    claimed = image.get("depths")
    # A last stage without layers has no tensors.
    if isinstance(claimed, list) and len(claimed) == stages + 1 and claimed[-1] == 0:
        stages += 1
    for stage in range(stages):
        prefix = f"img_encoder.layers.{stage}"
        depths.append(_count(shapes, re.escape(prefix) + r"\.blocks\.(\d+)\."))
        tokens.append(shapes[f"{prefix}.group_token"][1] if f"{prefix}.group_token" in shapes else 0)
        for name in (f"{prefix}.blocks.0.mlp.fc1.weight", f"{prefix}.downsample.pre_assign_attn.mlp.fc1.weight"):
            hidden = shapes[name][0] if name in shapes else hidden
        if tokens[-1]:
            block = f"{prefix}.downsample"
            groups.append(shapes[f"{block}.mlp_inter.fc2.weight"][0])
            mixing = [shapes[f"{block}.{name}.fc1.weight"][0] for name in ("mlp_inter", "mlp_channels")]
        else:
            # A stage without group tokens leaves as many groups as it gets; the number is not used.
            groups.append(groups[-1] if groups else 1)
    heads = image.get("num_heads")
    if isinstance(heads, list) and heads and all(n == heads[0] for n in heads):
        heads = heads[0]
    known = isinstance(heads, int) and not isinstance(heads, bool)
    config = GroupViTConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": shapes["text_encoder.transformer.resblocks.0.mlp.c_fc.weight"][0],
            "num_hidden_layers": _count(shapes, r"text_encoder\.transformer\.resblocks\.(\d+)\."),
            "num_attention_heads": max(text_width // _HEAD_WIDTH, 1),
            "max_position_embeddings": shapes["text_encoder.positional_embedding"][0],
            "pad_token_id": 0,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": hidden,
            "depths": depths,
            "num_hidden_layers": sum(depths),
            "num_group_tokens": tokens,
            "num_output_groups": groups,
            "num_attention_heads": heads if known else max(width // _HEAD_WIDTH, 1),
            "image_size": math.isqrt(positions) * patch,
            "patch_size": patch,
            "num_channels": channels,
            **({"assign_mlp_ratio": [_ratio(n, width) for n in mixing]} if mixing else {}),
        },
        projection_dim=shapes["img_projector.linear_out.weight"][0],
        projection_intermediate_dim=shapes["img_projector.linear_hidden.0.weight"][0],
    )
    return config, known


def _ratio(n: int, width: int) -> float:
    """A number r for which int(r * width) is n."""
    ratio = n / width
    return ratio if int(ratio * width) == n else (n + 0.5) / width


def _check_settings(
    config: GroupViTConfig, model: Mapping[str, Any], image: Mapping[str, Any], text: Mapping[str, Any], source: object
) -> None:
    vision, words = config.vision_config, config.text_config
    factors = image.get("embed_factors")
    if isinstance(factors, list) and any(factor != 1 for factor in factors):
        raise CheckpointError(
            f"{source} has stages of different widths (embed_factors {factors}), which no other format knows"
        )
    heads = image.get("num_heads")
    if isinstance(heads, list) and any(n != heads[0] for n in heads):
        raise CheckpointError(
            f"{source} has stages with different numbers of heads ({heads}), which no other format knows"
        )
    claims = {
        "img_encoder.embed_dim": (image, vision.hidden_size),
        "img_encoder.img_size": (image, vision.image_size),
        "img_encoder.patch_size": (image, vision.patch_size),
        "img_encoder.depths": (image, vision.depths),
        "img_encoder.num_group_tokens": (image, vision.num_group_tokens),
        "img_encoder.num_output_groups": (image, vision.num_output_groups),
        "text_encoder.width": (text, words.hidden_size),
        "text_encoder.layers": (text, words.num_hidden_layers),
        "text_encoder.vocab_size": (text, words.vocab_size),
        "text_encoder.context_length": (text, words.max_position_embeddings),
        "output_dim": (model, config.projection_dim),
    }
    for name, (table, found) in claims.items():
        claimed = table.get(name.rpartition(".")[2])
        if claimed is None:
            continue
        # The authors leave the last stage's number of groups out.
        same = (
            found[: len(claimed)] == claimed
            if isinstance(found, list) and isinstance(claimed, list)
            else found == claimed
        )
        if not same:
            raise CheckpointError(
                f"{source} contradicts itself: its settings say model.{name} = {claimed!r}, its tensors {found!r}"
            )


def settings(config: GroupViTConfig) -> dict[str, Any]:
    """The settings that the authors' code builds this model from.

    Raises:
        InputError: the authors' code has no such model; says all that it lacks.
    """
    vision, words = config.vision_config, config.text_config
    factor = vision.intermediate_size / vision.hidden_size
    wants = {
        "vision_config.hidden_act": (vision.hidden_act, "gelu"),
        "vision_config.layer_norm_eps": (vision.layer_norm_eps, 1e-5),
        "vision_config.assign_eps": (vision.assign_eps, 1.0),
        "vision_config.assign_mlp_ratio": (list(vision.assign_mlp_ratio), [0.5, 4]),
        "vision_config.intermediate_size": (vision.intermediate_size, int(factor * vision.hidden_size)),
        "text_config.hidden_act": (words.hidden_act, "quick_gelu"),
        "text_config.layer_norm_eps": (words.layer_norm_eps, 1e-5),
        "text_config.intermediate_size": (words.intermediate_size, 4 * words.hidden_size),
        "text_config.num_attention_heads": (words.num_attention_heads, words.hidden_size / _HEAD_WIDTH),
    }
    lacking = [f"{name} {value!r} (only {only!r})" for name, (value, only) in wants.items() if value != only]
    # The authors pool text at its largest id; eos_token_id 2 asks for the same.
    if words.eos_token_id not in (2, words.vocab_size - 1):
        lacking.append(f"text_config.eos_token_id {words.eos_token_id} (only the last id, {words.vocab_size - 1})")
    if not words.num_hidden_layers:
        lacking.append("text_config.num_hidden_layers 0")
    if lacking:
        raise InputError(f"the authors' code has no model with {', '.join(lacking)}")
    stages = len(vision.depths)
    return {
        "model": {
            "type": "MultiLabelContrastive",
            "img_encoder": {
                "type": "GroupViT",
                "img_size": vision.image_size,
                "patch_size": vision.patch_size,
                "in_chans": vision.num_channels,
                "embed_dim": vision.hidden_size,
                "embed_factors": [1] * stages,
                "num_heads": [vision.num_attention_heads] * stages,
                "num_group_tokens": list(vision.num_group_tokens),
                "num_output_groups": list(vision.num_output_groups[: stages - 1]),
                "depths": list(vision.depths),
                "mlp_ratio": factor,
                "drop_rate": vision.dropout,
            },
            "text_encoder": {
                "type": "TextTransformer",
                "context_length": words.max_position_embeddings,
                "width": words.hidden_size,
                "layers": words.num_hidden_layers,
                "vocab_size": words.vocab_size,
            },
            "contrast_temperature": math.exp(-config.logit_scale_init_value),
            "proj_num_layers": 2,
            "output_dim": config.projection_dim,
            **({"multi_label": config.extra["multi_label"]} if "multi_label" in config.extra else {}),
        }
    }
