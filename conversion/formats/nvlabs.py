"""The authors' own checkpoints, `.pth`: a file of `torch.save` with the state dict and the settings of their code.

The configuration comes from the weights' shapes and the pickled settings. Only the number of the vision tower's heads
is in the settings alone, which the original trainer pickles as an OmegaConf object; where they cannot be read, heads
are taken to be 64 wide, as in every released model. Text heads are always 64 wide; the end-of-text token is the
vocabulary's last id.

Every stage of their model except the last ends in a grouping block, whose MLPs are 0.5 and 4 times as wide as the tower
whatever `mlp_ratio` is; the last has none.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from conversion.names import Naming, Row, T, V, from_parts
from conversion.pickle_records import shown
from conversion.source import Files, Opened, Source
from conversion.torch_states import plain, read_content, read_states, settings_of
from conversion.torch_writer import dictionary, opcodes, write_torch_file
from conversion.writing import Job
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig

_HEAD_WIDTH = 64
_MLP_RATIO = 4
_ASSIGN_RATIOS = [0.5, 4]
_MAX_REFERENCES = 20  # from one setting to the next

_TABLE: tuple[Row, ...] = (
    ("vision_model.embeddings.position_embeddings", "img_encoder.pos_embed", "same"),
    ("vision_model.embeddings.patch_embeddings.projection.{p}", "img_encoder.patch_embed.proj.{p}", "same"),
    ("vision_model.embeddings.layernorm.{p}", "img_encoder.patch_embed.norm.{p}", "same"),
    (V + ".layers.{l}.layer_norm{n}.{p}", "img_encoder.layers.{s}.blocks.{l}.norm{n}.{p}", "same"),
    (V + ".layers.{l}.self_attn.{qkv}_proj.{p}", "img_encoder.layers.{s}.blocks.{l}.attn.qkv.{p}", "same"),
    (V + ".layers.{l}.self_attn.out_proj.{p}", "img_encoder.layers.{s}.blocks.{l}.attn.proj.{p}", "same"),
    (V + ".layers.{l}.mlp.{path}", "img_encoder.layers.{s}.blocks.{l}.mlp.{path}", "same"),
    (
        V + ".downsample.pre_assign_attn.attn.out_proj.{p}",
        "img_encoder.layers.{s}.downsample.pre_assign_attn.attn.proj.{p}",
        "same",
    ),
    (V + ".{path}", "img_encoder.layers.{s}.{path}", "same"),
    ("vision_model.layernorm.{p}", "img_encoder.norm.{p}", "same"),
    ("text_model.embeddings.token_embedding.weight", "text_encoder.token_embedding.weight", "same"),
    ("text_model.embeddings.position_embedding.weight", "text_encoder.positional_embedding", "same"),
    (T + ".layer_norm{n}.{p}", "text_encoder.transformer.resblocks.{l}.ln_{n}.{p}", "same"),
    (T + ".self_attn.{qkv}_proj.{p}", "text_encoder.transformer.resblocks.{l}.attn.in_proj_{p}", "same"),
    (T + ".self_attn.out_proj.{p}", "text_encoder.transformer.resblocks.{l}.attn.out_proj.{p}", "same"),
    (T + ".mlp.fc1.{p}", "text_encoder.transformer.resblocks.{l}.mlp.c_fc.{p}", "same"),
    (T + ".mlp.fc2.{p}", "text_encoder.transformer.resblocks.{l}.mlp.c_proj.{p}", "same"),
    ("text_model.final_layer_norm.{p}", "text_encoder.ln_final.{p}", "same"),
    ("visual_projection.0.{p}", "img_projector.linear_hidden.0.{p}", "conv1"),
    ("visual_projection.1.{p}", "img_projector.linear_hidden.1.{p}", "same"),
    ("visual_projection.3.{p}", "img_projector.linear_out.{p}", "conv1"),
    ("text_projection.0.{p}", "text_projector.linear_hidden.0.{p}", "conv1"),
    ("text_projection.1.{p}", "text_projector.linear_hidden.1.{p}", "same"),
    ("text_projection.3.{p}", "text_projector.linear_out.{p}", "conv1"),
    ("logit_scale", "logit_scale", "same"),
)
NAMING = Naming(_TABLE, towers=("text_encoder", "img_encoder"))

Shapes = Mapping[str, tuple[int, ...]]


def detect(files: Files) -> bool:
    """Returns whether the model in files of `torch.save` has the authors' names."""
    choice = files.once(read_content).choice
    return choice is not None and choice.naming is NAMING


def read(files: Files) -> Opened:
    """Reads the tensors, and the configuration from shapes and settings.

    Raises:
        CheckpointError: the tensors are in shards.
    """
    if len(files.paths) > 1:
        raise CheckpointError(f"{files.main.parent} holds the authors' weights in shards, which their code never wrote")

    def config(source: Source) -> GroupViTConfig:
        settings = settings_of(files)
        shapes = {name: info.shape for name, info in source.tensors.items()}
        return read_config(shapes, settings.get("config", settings.get("cfg")), files.main)

    return read_states(files, NAMING)._replace(config=config)


def write(job: Job, path: Path) -> None:
    """Writes a file that the authors' code reads.

    Raises:
        InputError: the authors' code has no such model.
    """
    written = settings(job.checkpoint.config)
    by_name = {entry.foreign: entry for entry in job.entries(NAMING)}
    infos = {name: job.info(entry) for name, entry in by_name.items()}

    def content(state: bytes) -> bytes:
        return dictionary({"model": state, "config": opcodes(written)})

    write_torch_file(path, content, infos, lambda name: from_parts(by_name[name], job.value))


# -- the configuration -------------------------------------------------------------------------------------------------


def _table(value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a table of the settings, with the values that refer to other settings; {} for anything else."""
    return {key: _resolved(item, settings) for key, item in value.items()} if isinstance(value, dict) else {}


def _resolved(value: Any, settings: Mapping[str, Any]) -> Any:
    value = _followed(value, settings)
    if not isinstance(value, list):
        return value
    items = [_followed(item, settings) for item in value]
    # No setting has lists of lists; lists that name each other would never end.
    return [None if isinstance(item, list | dict) else item for item in items]


def _followed(value: Any, settings: Mapping[str, Any]) -> Any:
    """Follows OmegaConf's references, "${data.text_aug.multi_label}", to a value; None where there is none."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(value, str) or "${" not in value:
            return value
        match = re.fullmatch(r"\$\{([\w.]+)\}", value)
        value = settings if match else None
        for key in match[1].split(".") if match else ():
            value = value.get(key) if isinstance(value, dict) else None
    return None


def read_config(shapes: Shapes, pickled: Any, source: object) -> GroupViTConfig:
    """Returns the configuration of a checkpoint of the authors' code.

    Args:
        shapes: its tensors, name -> shape.
        pickled: its settings as the pickle has them, or None.
        source: the file's name in an error.

    Raises:
        CheckpointError: the tensors are no such model's, or the settings contradict them or describe what this
            project's model does not do.
    """
    settings = plain(pickled)
    settings = settings if isinstance(settings, dict) else {}
    model = _table(settings.get("model"), settings)
    image, text = (_table(model.get(key), settings) for key in ("img_encoder", "text_encoder"))
    _refuse_other_models(image, source)
    try:
        config, heads_known = _from_shapes(shapes, image, source)
        config.check_model()
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
            f"{config.vision_config.hidden_size} is no multiple of {_HEAD_WIDTH}: pass a configuration (--config)"
        )
    if isinstance(model.get("multi_label"), int):
        config.update({"multi_label": model["multi_label"]})
    return config


def _refuse_other_models(image: Mapping[str, Any], source: object) -> None:
    """Refuses settings that only the authors' code has; those that are absent have the authors' defaults."""
    factors, heads, hard = image.get("embed_factors"), image.get("num_heads"), image.get("hard_assignment")
    if isinstance(factors, list) and any(factor != 1 for factor in factors):
        raise CheckpointError(
            f"{source} has stages of different widths (embed_factors {shown(factors)}), which no other format knows"
        )
    if isinstance(heads, list) and any(n != heads[0] for n in heads):
        raise CheckpointError(
            f"{source} has stages with different numbers of heads ({shown(heads)}), which no other format knows"
        )
    if hard is not None and hard != 1:
        raise CheckpointError(
            f"{source} assigns patches to groups softly (hard_assignment {shown(hard)}); the models of all other "
            "formats assign hard"
        )
    # Of either kind, the positions' table is among the tensors and is used in the same way.
    kind = image.get("pos_embed_type")
    if kind not in (None, "simple", "fourier"):
        raise CheckpointError(
            f"{source} has position embeddings of type {shown(kind)}; known are 'simple' and 'fourier'"
        )


def _count(shapes: Shapes, pattern: str) -> int:
    """Returns one more than the largest number in the names at the pattern's group."""
    numbers = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    count = max(numbers, default=-1) + 1
    if count > len(shapes):
        raise ValueError("a number that has no tensors of its own")
    return count


def _from_shapes(shapes: Shapes, image: Mapping[str, Any], source: object) -> tuple[GroupViTConfig, bool]:
    _, positions, width = shapes["img_encoder.pos_embed"]
    _, channels, patch, _ = shapes["img_encoder.patch_embed.proj.weight"]
    vocabulary, text_width = shapes["text_encoder.token_embedding.weight"]
    depths, tokens, groups = [], [], []
    hidden: set[int] = set()
    mixing = None
    stages = max(_count(shapes, r"img_encoder\.layers\.(\d+)\."), 1)
    # A last stage without layers has no tensors; but it is there, since the last stage has no group tokens.
    if f"img_encoder.layers.{stages - 1}.group_token" in shapes:
        stages += 1
    for stage in range(stages):
        prefix = f"img_encoder.layers.{stage}"
        depths.append(_count(shapes, re.escape(prefix) + r"\.blocks\.(\d+)\."))
        tokens.append(shapes[f"{prefix}.group_token"][1] if f"{prefix}.group_token" in shapes else 0)
        for name in (f"{prefix}.blocks.0.mlp.fc1.weight", f"{prefix}.downsample.pre_assign_attn.mlp.fc1.weight"):
            hidden |= {shapes[name][0]} if name in shapes else set()
        if tokens[-1]:
            block = f"{prefix}.downsample"
            groups.append(shapes[f"{block}.mlp_inter.fc2.weight"][0])
            mixing = [shapes[f"{block}.{name}.fc1.weight"][0] for name in ("mlp_inter", "mlp_channels")]
        else:
            # A stage without group tokens leaves as many groups as it gets; the number is not used.
            groups.append(groups[-1] if groups else 1)
    if len(hidden) > 1:
        raise CheckpointError(
            f"{source} has MLPs of different widths ({', '.join(map(str, sorted(hidden)))}: an mlp_ratio other than 4 "
            "is that of the layers, not of the grouping blocks), which no other format knows"
        )
    if not hidden:
        ratio = image.get("mlp_ratio")
        hidden = {int(width * (ratio if _is_ratio(ratio) else _MLP_RATIO))}
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
            "intermediate_size": hidden.pop(),
            "depths": depths,
            "num_hidden_layers": sum(depths),
            "num_group_tokens": tokens,
            "num_output_groups": groups,
            "num_attention_heads": heads if known else max(width // _HEAD_WIDTH, 1),
            "image_size": math.isqrt(positions) * patch,
            "patch_size": patch,
            "num_channels": channels,
            "assign_mlp_ratio": _ASSIGN_RATIOS
            if mixing in (None, _widths(_ASSIGN_RATIOS, width))
            else [_ratio(n, width) for n in mixing],
            "dropout": _rate(image.get("drop_rate")),
            "attention_dropout": _rate(image.get("attn_drop_rate")),
        },
        projection_dim=shapes["img_projector.linear_out.weight"][0],
        projection_intermediate_dim=shapes["img_projector.linear_hidden.0.weight"][0],
    )
    return config, known


def _is_ratio(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and 0 < value < 1000


def _rate(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and 0 <= value < 1 else 0.0


def _widths(ratios: Sequence[float], width: int) -> list[int]:
    return [int(ratio * width) for ratio in ratios]


def _ratio(n: int, width: int) -> float:
    """Returns a number r for which int(r * width) is n."""
    ratio = n / width
    return ratio if int(ratio * width) == n else (n + 0.5) / width


def _check_settings(
    config: GroupViTConfig, model: Mapping[str, Any], image: Mapping[str, Any], text: Mapping[str, Any], source: object
) -> None:
    vision, words = config.vision_config, config.text_config
    scale = image.get("qk_scale")
    # 0 and nothing stand for the same.
    if scale not in (None, 0, (vision.hidden_size // vision.num_attention_heads) ** -0.5):
        raise CheckpointError(
            f"{source} scales attention by {shown(scale)} (qk_scale); other formats know only the root of the heads' "
            "width, inverted"
        )
    claims: dict[str, tuple[Mapping[str, Any], Any]] = {
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
        same = found == claimed
        if name.endswith("num_output_groups") and isinstance(claimed, list):
            # The last stage's is not used, and the authors leave it out.
            same = len(claimed) in (len(found) - 1, len(found)) and found[:-1] == claimed[: len(found) - 1]
        if not same:
            raise CheckpointError(
                f"{source} contradicts itself: its settings have model.{name} = {shown(claimed)}, its tensors "
                f"{shown(found)}"
            )
    ratio = image.get("mlp_ratio")
    if ratio is not None and not (_is_ratio(ratio) and int(ratio * vision.hidden_size) == vision.intermediate_size):
        raise CheckpointError(
            f"{source} contradicts itself: its settings have model.img_encoder.mlp_ratio = {shown(ratio)}, its tensors "
            f"{vision.intermediate_size / vision.hidden_size:g}"
        )


def settings(config: GroupViTConfig) -> dict[str, Any]:
    """Returns the settings from which the authors' code builds this model.

    Raises:
        InputError: the authors' code has no such model; lists all that it lacks.
    """
    vision, words = config.vision_config, config.text_config
    stages, grouping = len(vision.depths), any(vision.num_group_tokens)
    wants: dict[str, tuple[Any, Any]] = {
        "vision_config.hidden_act": (vision.hidden_act, "gelu"),
        "vision_config.layer_norm_eps": (vision.layer_norm_eps, 1e-5),
        "text_config.hidden_act": (words.hidden_act, "quick_gelu"),
        "text_config.layer_norm_eps": (words.layer_norm_eps, 1e-5),
        "text_config.intermediate_size": (words.intermediate_size, 4 * words.hidden_size),
    }
    if grouping:
        wants["vision_config.assign_eps"] = (vision.assign_eps, 1.0)
        wants["vision_config.intermediate_size"] = (vision.intermediate_size, _MLP_RATIO * vision.hidden_size)
    lacking = [f"{name} {value!r} (only {only!r})" for name, (value, only) in wants.items() if value != only]
    if [n > 0 for n in vision.num_group_tokens] != [True] * (stages - 1) + [False]:
        lacking.append(f"vision_config.num_group_tokens {vision.num_group_tokens} (in every stage but the last)")
    elif grouping:
        widths = _widths(vision.assign_mlp_ratio, vision.hidden_size)
        if widths != _widths(_ASSIGN_RATIOS, vision.hidden_size):
            lacking.append(f"vision_config.assign_mlp_ratio {vision.assign_mlp_ratio} (only {_ASSIGN_RATIOS})")
        if vision.hidden_size < 2:
            lacking.append("vision_config.hidden_size 1 (at least 2)")
    if words.hidden_size < _HEAD_WIDTH:
        lacking.append(
            f"text_config.hidden_size {words.hidden_size} (at least {_HEAD_WIDTH}, the width of a head there)"
        )
    elif words.num_attention_heads != words.hidden_size // _HEAD_WIDTH:
        lacking.append(
            f"text_config.num_attention_heads {words.num_attention_heads} (only {words.hidden_size // _HEAD_WIDTH}: a "
            f"head is {_HEAD_WIDTH} wide there)"
        )
    # The authors pool text at its largest id, as eos_token_id 2 does.
    if words.eos_token_id not in (2, words.vocab_size - 1):
        lacking.append(f"text_config.eos_token_id {words.eos_token_id} (only the last id, {words.vocab_size - 1})")
    if not words.num_hidden_layers:
        lacking.append("text_config.num_hidden_layers 0")
    if lacking:
        raise InputError(
            "the authors' code, whose format a .pth file is (a directory is another), has no model with "
            f"{', '.join(lacking)}"
        )
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
                "mlp_ratio": _ratio(vision.intermediate_size, vision.hidden_size),
                "drop_rate": vision.dropout,
                "attn_drop_rate": vision.attention_dropout,
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
