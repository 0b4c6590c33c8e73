"""Whether two checkpoints are the same model: tensor by tensor, and by what they compute.

Tensors are compared in canonical names, one at a time, without a framework. Then both models answer the same seeded pictures
and texts, each in the backend that its format belongs to where that is installed, in float64: there PyTorch and Keras differ
by some 1e-14, so that a patch between two groups goes to the same one in both, and a difference that is left is one of the
weights or of the program.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from conversion.checkpoint import Checkpoint, Values, locate, read
from conversion.formats import Source, open_source
from conversion.names import EXTRA
from groupvit_common.checkpoints.dtypes import cast
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig

BackendName = Literal["torch", "tf"]
Arrays = dict[str, np.ndarray]

# Of the largest value of an output. In float64 rounding is 1e-13 in models of the paper's depth; in float32, which only SavedModels
# need, 1e-5, and more where a patch stands between two groups.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
SEED = 2022
_IMAGES, _TEXTS = 2, 4
_MODULES: dict[BackendName, str] = {"torch": "torch", "tf": "tensorflow"}
_NAMES: dict[BackendName, str] = {"torch": "PyTorch", "tf": "Keras"}
_OF_FORMAT: dict[str, BackendName] = {
    "transformers-tf": "tf",
    "transformers-tf-safetensors": "tf",
    "keras": "tf",
    "keras-weights": "tf",
}
# From the widest: a checkpoint is rounded to another's type, never the reverse.
_WIDEST_FIRST = ("float64", "float32", "bfloat16", "float16")


class TensorDifference(NamedTuple):
    """A tensor that differs: the largest absolute difference, and the largest value."""

    name: str
    largest: float
    difference: float

    @property
    def relative(self) -> float:
        return relative(self.difference, self.largest)


class Row(NamedTuple):
    """An output of both models.

    largest: the largest absolute value in A; difference: the largest absolute difference of B from it; rounding: what the
    narrower type of one of them has changed by itself, which is not part of `difference`, or None.
    """

    name: str
    largest: float
    difference: float
    rounding: float | None

    @property
    def relative(self) -> float:
        return relative(self.difference, self.largest)


def relative(difference: float, largest: float) -> float:
    """A difference over the largest value; NaN counts as infinite."""
    if math.isnan(difference):
        return math.inf
    return difference / largest if largest else difference


@dataclass
class Verification:
    """What a comparison of A and B found.

    Attributes:
        comparable: whether they take the same inputs and have the same parts; if not, nothing else was compared.
        tensors: how many were compared; 0 where one is a SavedModel, whose tensors have no names.
        rounded: how many of them have a narrower type in one of the two, to which the other was rounded for the comparison;
            `rounded_to`: these types.
        differing: tensors that are not equal to the last bit.
        settings: settings of the configuration that differ, "name: A | B". They are told, and judged by what they do.
        backends: what computed A's and B's outputs; empty where no backend is installed.
        rows: outputs; `pixels_alike`: the share of pixels with the same label.
    """

    a: str
    b: str
    precision: str
    tolerance: float
    seed: int
    comparable: bool = True
    tensors: int = 0
    rounded: int = 0
    rounded_to: list[str] = field(default_factory=list)
    differing: list[TensorDifference] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    backends: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    pixels_alike: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def largest(self) -> float:
        """The largest relative difference of a tensor or an output."""
        differences = [tensor.relative for tensor in self.differing] + [row.relative for row in self.rows]
        return max(differences, default=0.0)

    @property
    def passed(self) -> bool:
        """Whether all tensors and outputs are within the tolerance; without outputs, the settings must be the same too."""
        told = bool(self.rows) or not self.settings
        return self.comparable and told and self.largest <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        result = asdict(self)
        for name in ("differing", "rows"):
            result[name] = [{**item._asdict(), "relative": item.relative} for item in getattr(self, name)]
        return {"passed": self.passed, "largest_relative_difference": self.largest, **result}

    def lines(self) -> Iterator[str]:
        """For people."""
        if self.tensors:
            of = f" ({self.rounded} after rounding to {' and '.join(self.rounded_to)})" if self.rounded else ""
            if self.differing:
                worst = max(self.differing, key=lambda tensor: tensor.relative)
                yield (
                    f"tensors: {len(self.differing)} of {self.tensors} differ{of}, most {worst.name}: by {worst.difference:.2g} "
                    f"of {worst.largest:.2g}"
                )
            else:
                yield f"tensors: all {self.tensors} equal to the last bit{of}"
        for setting in self.settings:
            yield f"configuration: {setting}"
        if self.rows:
            yield (
                f"outputs: {self.backends[0]} against {self.backends[1]} in {self.precision}, {_IMAGES} pictures and {_TEXTS} "
                f"texts of seed {self.seed}"
            )
            yield from _table(self.rows, self.rounded_to)
        if self.pixels_alike is not None:
            yield f"pixels with the same label: {self.pixels_alike:.4%}"
        yield from (f"note: {note}" for note in self.notes)
        verdict = "the same model" if self.passed else "NOT the same model"
        if not self.comparable:
            yield f"{verdict}: they are of different sizes"
            return
        yield f"{verdict}: the largest relative difference is {self.largest:.2g}, the tolerance {self.tolerance:.2g}"


def _table(rows: list[Row], rounded_to: list[str]) -> Iterator[str]:
    heads = ["output", "largest value", "difference", "relative"]
    if rounded_to:
        heads.append("by rounding")
    cells = [
        [row.name, f"{row.largest:.4g}", f"{row.difference:.2g}", f"{row.relative:.2g}"]
        + ([f"{row.rounding:.2g}" if row.rounding is not None else ""] if rounded_to else [])
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [heads, *cells]) for column in range(len(heads))]
    for line in [heads, *cells]:
        yield "  " + "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )


def verify(
    a: str | Path | Checkpoint,
    b: str | Path | Checkpoint,
    *,
    config: GroupViTConfig | str | Path | None = None,
    tolerance: float | None = None,
    seed: int = SEED,
    key: str | None = None,
) -> Verification:
    """Compares two checkpoints of any formats.

    Args:
        a, b: what `conversion.convert.read` takes or gave; either may also be a SavedModel's directory, which answers with its outputs
            alone.
        config: of those that say none themselves.
        tolerance: the largest difference of an output that passes, over the output's largest value; 1e-9, but for a SavedModel,
            which computes in float32, 1e-3.
        seed: of the pictures and texts.
        key: which model, of a file that holds several.

    Raises:
        CheckpointError: one of them cannot be found, read or understood.
        InputError: an argument that cannot be used.
    """
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"the tolerance must be a number from 0, got {tolerance}")
    if seed < 0:
        raise InputError(f"the seed must not be negative, got {seed}")
    sides = _sides(a, b, config, key)
    models = [side for side in sides if isinstance(side, _Model)]
    if not models:
        raise InputError("two SavedModels have no configuration to make inputs by: compare each with a checkpoint")
    known = models[0].checkpoint.config
    precision = "float64" if len(models) == 2 else "float32"
    limit = TOLERANCE[precision] if tolerance is None else tolerance
    result = Verification(sides[0].title, sides[1].title, precision, limit, seed)
    rounding: dict[str, str] = {}
    if len(models) == 2:
        first, second = (model.checkpoint for model in models)
        result.settings = _settings(first.config, second.config)
        result.comparable = _sizes(first.config) == _sizes(second.config)
        if not result.comparable:
            return result
        rounding = _rounding(first, second)
        result.rounded, result.rounded_to = len(rounding), sorted(set(rounding.values()))
        _compare_tensors(first, second, rounding, result)
    if not any(map(_installed, _MODULES)):
        if len(models) == 1:
            raise InputError("a SavedModel is run by TensorFlow: pip install 'groupvit[tf]'")
        result.notes.append("neither PyTorch nor TensorFlow is installed: no outputs were computed")
        return result
    inputs = sample_inputs(known, seed)
    # One model in memory at a time.
    answers = [side.outputs(inputs, precision, rounding) for side in sides]
    result.backends = [side.reader for side in sides]
    result.notes += [note for side in sides for note in side.notes]
    # What rounding does by itself: the model that was rounded for the comparison, as it is.
    exact = None
    if rounding:
        wider = next(index for index, model in enumerate(models) if model.loses_by(rounding))
        exact = models[wider].outputs(inputs, precision, {})
        rounded = answers[wider]
    for name, value in answers[0].items():
        if name in answers[1]:
            effect = None if exact is None else _largest_difference(exact[name], rounded[name])
            result.rows.append(Row(name, _largest(value), _largest_difference(value, answers[1][name]), effect))
    if all("segmentation logits" in answer for answer in answers):
        labels = [answer["segmentation logits"].argmax(axis=1) for answer in answers]
        result.pixels_alike = float((labels[0] == labels[1]).mean())
    return result


def _sides(
    a: str | Path | Checkpoint, b: str | Path | Checkpoint, config: GroupViTConfig | str | Path | None, key: str | None
) -> list[_Model | _SavedModel]:
    """Both sides; one that says no configuration gets `config`, or the other's."""
    sides: list[_Model | _SavedModel | Source] = []
    for side in (a, b):
        if isinstance(side, Checkpoint):
            sides.append(_Model(side))
        elif is_saved_model(Path(side)):
            sides.append(_SavedModel(Path(side)))
        else:
            source = open_source(locate(side), first=key is not None)
            # The other side may hold one model alone.
            source = open_source(source.path, key=key) if len(source.choice.models) > 1 else source
            sides.append(source if source.config is None else _Model(read(source)))
    others = [side.checkpoint.config for side in sides if isinstance(side, _Model)]
    substitute = config if config is not None else next(iter(others), None)
    return [_Model(read(side, config=substitute)) if isinstance(side, Source) else side for side in sides]


def is_saved_model(path: Path) -> bool:
    """Whether a directory is a TensorFlow SavedModel."""
    return (path / "saved_model.pb").is_file()


def _installed(backend: BackendName) -> bool:
    return importlib.util.find_spec(_MODULES[backend]) is not None


# -- tensors --------------------------------------------------------------------------------------------------------------


def _rounding(a: Checkpoint, b: Checkpoint) -> dict[str, str]:
    """The tensors that have other types in A and B: name -> the type that both are to be compared in."""
    return {
        name: max(a.tensors[name].dtype, b.tensors[name].dtype, key=_WIDEST_FIRST.index)
        if {a.tensors[name].dtype, b.tensors[name].dtype} != {"float16", "bfloat16"}
        else b.tensors[name].dtype
        for name in a.tensors
        if name in b.tensors and a.tensors[name].dtype != b.tensors[name].dtype
    }


def _compare_tensors(a: Checkpoint, b: Checkpoint, rounding: Mapping[str, str], result: Verification) -> None:
    for name in a.tensors:
        if name not in b.tensors:
            continue
        result.tensors += 1
        first, second = (_rounded(side.value(name), rounding.get(name)) for side in (a, b))
        # Batch norms' step counters change no output, and TensorFlow's files have none.
        if name.endswith(".num_batches_tracked"):
            if first != second and name not in (*a.filled, *b.filled):
                result.notes.append(f"{name} is {int(first)} | {int(second)}")
        elif first.tobytes() != second.tobytes():
            first, second = first.astype(np.float64), second.astype(np.float64)
            result.differing.append(TensorDifference(name, _largest(first), _largest_difference(first, second)))
    if (EXTRA in a.tensors) != (EXTRA in b.tensors):
        result.notes.append(f"only one of them holds {EXTRA}, which training alone uses")


def _rounded(array: np.ndarray, dtype: str | None) -> np.ndarray:
    return array if dtype is None else cast(array, dtype)


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0.0))


def _largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return math.inf
    return float(np.abs(a - b).max(initial=0.0))


# Settings that decide what a model answers, beside the sizes that its tensors' shapes show.
_DECIDING = ("hidden_act", "layer_norm_eps", "num_attention_heads", "assign_eps")


def _settings(a: GroupViTConfig, b: GroupViTConfig) -> list[str]:
    """The settings that differ, "name: A | B", of those that decide what a model is and answers."""
    first, second = (dict(_flat(deciding_settings(config))) for config in (a, b))
    return [
        f"{name}: {_shown(first, name)} | {_shown(second, name)}"
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    ]


def deciding_settings(config: GroupViTConfig) -> dict[str, Any]:
    """What decides a model's tensors and answers, as values that are equal where the models are."""
    vision, text = config.vision_config, config.text_config
    grouping = [tokens > 0 for tokens in vision.num_group_tokens]
    return {
        "projection_dim": config.projection_dim,
        "projection_intermediate_dim": config.projection_intermediate_dim,
        "vision_config": {name: getattr(vision, name) for name in _DECIDING}
        | {
            name: getattr(vision, name)
            for name in (
                "hidden_size",
                "intermediate_size",
                "depths",
                "num_group_tokens",
                "image_size",
                "patch_size",
                "num_channels",
            )
        }
        | {
            # Of stages without group tokens the number of groups is not used; ratios matter by the widths that they give.
            "num_output_groups": [n for n, used in zip(vision.num_output_groups, grouping, strict=True) if used],
            "assign_mlp_ratio": [int(ratio * vision.hidden_size) for ratio in vision.assign_mlp_ratio]
            if any(grouping)
            else [],
        },
        "text_config": {name: getattr(text, name) for name in _DECIDING if name != "assign_eps"}
        | {
            name: getattr(text, name)
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "max_position_embeddings",
                "vocab_size",
            )
        }
        # 2 stands for the largest id, which is the vocabulary's last.
        | {"eos_token_id": text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id},
    }


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], default=str) if name in settings else "(none)"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _sizes(config: GroupViTConfig) -> tuple[Any, ...]:
    """What inputs and outputs depend on."""
    vision, text = config.vision_config, config.text_config
    return (
        vision.image_size, vision.num_channels, vision.patch_size, vision.hidden_size, len(vision.depths),
        tuple(vision.num_group_tokens), text.vocab_size, text.max_position_embeddings, text.hidden_size,
        text.num_hidden_layers, config.projection_dim,
    )  # fmt: skip


# -- outputs --------------------------------------------------------------------------------------------------------------


def sample_inputs(config: GroupViTConfig, seed: int = SEED, images: int = _IMAGES, texts: int = _TEXTS) -> Arrays:
    """Pictures and texts for a model, the same for a seed and the same sizes.

    Returns:
        `pixel_values` float64 `[B, C, H, W]`: coarse and fine noise, as if normalised; `input_ids` and `attention_mask`
        int64 `[N, T]`: random ids of different numbers, then the end of text, then padding.
    """
    rng = np.random.default_rng(seed)
    vision, text = config.vision_config, config.text_config
    side, channels = vision.image_size, vision.num_channels
    coarse = rng.standard_normal((images, channels, 4, 4)).repeat(-(-side // 4), 2).repeat(-(-side // 4), 3)
    pixels = coarse[..., :side, :side] + 0.5 * rng.standard_normal((images, channels, side, side))
    # Where the configuration has the early checkpoints' 2, text is pooled at its largest id.
    end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    words = [token for token in range(text.vocab_size) if token not in (end, text.vocab_size - 1)] or [end]
    length = text.max_position_embeddings
    ids = np.full((texts, length), text.pad_token_id or 0, np.int64)
    mask = np.zeros((texts, length), np.int64)
    for row in range(texts):
        count = max(1, (length * (row + 1)) // texts)
        ids[row, : count - 1] = rng.choice(words, count - 1)
        ids[row, count - 1] = end
        mask[row, :count] = 1
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}


class _Model:
    """A checkpoint as one of the two that are compared."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.title = str(checkpoint.source.path)
        self.reader = ""  # what computed its outputs
        self.notes: list[str] = []

    def loses_by(self, rounding: Mapping[str, str]) -> bool:
        """Whether rounding changes a tensor's type."""
        return any(self.checkpoint.tensors[name].dtype != dtype for name, dtype in rounding.items())

    def outputs(self, inputs: Arrays, precision: str, rounding: Mapping[str, str]) -> Arrays:
        """All that the model computes on the way, float64, by name; after rounding its weights."""
        wanted: BackendName = _OF_FORMAT.get(self.checkpoint.source.format, "torch")
        other: BackendName = "tf" if wanted == "torch" else "torch"
        backend = wanted if _installed(wanted) else other
        self.reader = _NAMES[backend]
        if backend == "tf":
            _quiet()
        model_class = importlib.import_module(f"groupvit_{backend}").GroupViTModel
        value, note = own_reader(self.checkpoint, backend)
        self.notes = [note] if note else []
        arrays = Values(self.checkpoint.tensors, lambda name: _rounded(value(name), rounding.get(name)))
        model = model_class.from_arrays(self.checkpoint.config, arrays, dtype=precision)
        run = _run_torch if backend == "torch" else _run_keras
        return _named(run(model, inputs, precision))


def _quiet() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")


def _run_torch(model: Any, inputs: Arrays, precision: str) -> Any:
    import torch

    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    tensors["pixel_values"] = tensors["pixel_values"].to(getattr(torch, precision))
    with torch.no_grad():
        return model(**tensors, **_all_outputs(model))


def _run_keras(model: Any, inputs: Arrays, precision: str) -> Any:
    pixels = inputs["pixel_values"].astype(precision)
    return model(**{**inputs, "pixel_values": pixels}, **_all_outputs(model))


def _all_outputs(model: Any) -> dict[str, bool]:
    # Without groups there is nothing to segment by.
    groups = any(model.config.vision_config.num_group_tokens)
    return {"output_attentions": True, "output_hidden_states": True, "output_segmentation": groups}


def _named(outputs: Any) -> Arrays:
    vision, text = outputs.vision_model_output, outputs.text_model_output
    named = {
        "image embeddings": vision.hidden_states[0],
        **{f"image stage {n}": value for n, value in enumerate(vision.hidden_states[1:], 1)},
        **{f"group assignment {n}": value for n, value in enumerate(vision.attentions or (), 1)},
        "image tower": vision.last_hidden_state,
        "image features": outputs.image_embeds,
        "text embeddings": text.hidden_states[0],
        **{f"text layer {n}": value for n, value in enumerate(text.hidden_states[1:], 1)},
        "text features": outputs.text_embeds,
        "logits": outputs.logits_per_image,
        "segmentation logits": outputs.segmentation_logits,
    }
    return {name: np.asarray(value, np.float64) for name, value in named.items() if value is not None}


class _SavedModel:
    """A SavedModel as one of the two that are compared: its endpoints alone, in float32."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.title = str(directory)
        self.reader = "TensorFlow's SavedModel"
        self.notes: list[str] = []

    def outputs(self, inputs: Arrays, precision: str, rounding: Mapping[str, str]) -> Arrays:
        _quiet()
        try:
            import tensorflow as tf
        except ImportError as error:
            raise InputError("a SavedModel is run by TensorFlow: pip install 'groupvit[tf]'") from error
        try:
            loaded = tf.saved_model.load(str(self.directory))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.directory} cannot be loaded by TensorFlow: {error}") from error
        pixels = tf.constant(inputs["pixel_values"], tf.float32)
        ids, mask = (tf.constant(inputs[name], tf.int32) for name in ("input_ids", "attention_mask"))
        try:
            texts = loaded.text_features(ids, mask)["text_features"]
            images = loaded.image_features(pixels)["image_features"]
            logits = loaded.segment(pixels, texts)["segmentation_logits"] if hasattr(loaded, "segment") else None
        except (AttributeError, ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
            raise InputError(
                f"{self.directory} is no SavedModel of groupvit's, or of another model or image size: {str(error).splitlines()[0]}"
            ) from error
        features = {"image features": images, "text features": texts}
        named = {name: value / tf.norm(value, axis=-1, keepdims=True) for name, value in features.items()}
        named["segmentation logits"] = logits
        return {name: np.asarray(value, np.float64) for name, value in named.items() if value is not None}


# -- how a format's own program reads it ----------------------------------------------------------------------------------


def own_reader(checkpoint: Checkpoint, backend: BackendName) -> tuple[Callable[[str], np.ndarray], str]:
    """The values as the format's own program loads them, where it can, and a note where it should but cannot.

    A mistake that reading and writing here had in common would not be seen otherwise.
    """
    source = checkpoint.source
    programs = {
        ("safetensors", "torch"): (_safetensors_values, "safetensors"),
        ("pytorch", "torch"): (_torch_values, "torch.load"),
        ("keras", "tf"): (_keras_values, "keras.saving.load_model"),
        ("keras-weights", "tf"): (_keras_values, "load_weights"),
    }
    if (
        (source.format, backend) not in programs
        or any(not n.endswith("num_batches_tracked") for n in checkpoint.filled)
        # Within a larger Keras model, which takes its own program.
        or ("keras" in source.format and source.choice.prefix)
    ):
        return checkpoint.value, ""
    load, program = programs[source.format, backend]
    try:
        values = load(checkpoint)
    # What other programs may say of a file that is read here is no one exception.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        return (
            checkpoint.value,
            f"{source.path} is read by this package alone: {program} says {type(error).__name__}: {reason}",
        )
    return values, ""


def _safetensors_values(checkpoint: Checkpoint) -> Callable[[str], np.ndarray]:
    from safetensors import safe_open

    files = [safe_open(path, framework="pt") for path in checkpoint.source.files]
    homes = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    stored = checkpoint.source.choice.names
    return lambda name: (
        _array(homes[stored[name]].get_tensor(stored[name])) if stored.get(name) in homes else checkpoint.value(name)
    )


def _torch_values(checkpoint: Checkpoint) -> Callable[[str], np.ndarray]:
    import torch

    state: dict[str, Any] = {}
    for path in checkpoint.source.files:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for key in checkpoint.source.choice.at:
            content = content[key]
        state |= content
    stored = checkpoint.source.choice.names
    return lambda name: _array(state[stored[name]]) if stored.get(name) in state else checkpoint.value(name)


def _array(tensor: Any) -> np.ndarray:
    """PyTorch's tensor; floats as float64, which holds all of them."""
    array: np.ndarray = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    return array


def _keras_values(checkpoint: Checkpoint) -> Callable[[str], np.ndarray]:
    import keras

    from groupvit_tf import GroupViTModel
    from groupvit_tf.checkpoint import canonical_variables, kind, to_canonical

    (path,) = checkpoint.source.files
    if checkpoint.source.format == "keras":
        model = keras.saving.load_model(path, compile=False)
    else:
        types = {info.dtype for info in checkpoint.tensors.values()}
        model = GroupViTModel(checkpoint.config, dtype=next(name for name in _WIDEST_FIRST if name in types))
        model.load_weights(path)
    variables = canonical_variables(model)
    return lambda name: to_canonical(kind(variables[name]), np.asarray(variables[name]))
