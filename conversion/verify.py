"""Comparison of two checkpoints: are they the same model? Tensor by tensor, and by what they compute.

Tensors are compared in canonical names, one at a time, without a framework. Then both models compute outputs for the
same seeded images and texts, each in the backend of its format where that is installed, in float64 (see
`conversion.outputs`). There PyTorch and Keras differ by some 1e-14, so that a patch between two groups goes to the same
one in both, and any larger difference is one of the weights or of the program.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conversion.checkpoint import Checkpoint, opened_source, read
from conversion.formats.saved_model import is_saved_model
from conversion.names import EXTRA
from conversion.outputs import IMAGES, SEED, TEXTS, Model, SavedModel, installed, rounded, sample_inputs
from conversion.source import Source
from groupvit_common.errors import InputError
from groupvit_common.model.config import LEGACY_EOS_TOKEN_ID, GroupViTConfig

# Of the largest value of an output. In float64 rounding is 1e-13 in models of the paper's depth; in float32, which only
# SavedModels need, 1e-5, and more where a patch stands between two groups.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
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

    Attributes:
        largest: the largest absolute value in A.
        difference: the largest absolute difference between A and B.
        rounding: the change by the narrower dtype of one of them, which is not part of `difference`; or None.
    """

    name: str
    largest: float
    difference: float
    rounding: float | None

    @property
    def relative(self) -> float:
        return relative(self.difference, self.largest)


def relative(difference: float, largest: float) -> float:
    """Returns a difference over the largest value; NaN counts as infinite."""
    if math.isnan(difference):
        return math.inf
    return difference / largest if largest else difference


@dataclass
class Verification:
    """The result of a comparison of A and B.

    Attributes:
        comparable: whether they take the same inputs and have the same parts; if not, nothing else was compared.
        tensors: number of tensors compared; 0 where one is a SavedModel, whose tensors have no names.
        rounded: number of tensors with a narrower dtype in one of the two, to which the other was rounded for the
            comparison.
        rounded_to: these dtypes.
        differing: tensors that are not equal to the last bit.
        settings: settings of the configuration that differ, "name: A | B". They are reported; the outputs decide.
        backends: the programs that computed A's and B's outputs; empty where no backend is installed.
        rows: outputs.
        pixels_alike: fraction of pixels with the same label.
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
        """True if all tensors and outputs are within the tolerance; without outputs, the settings must be equal too."""
        settings_pass = bool(self.rows) or not self.settings
        return self.comparable and settings_pass and self.largest <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        result = asdict(self)
        for name in ("differing", "rows"):
            result[name] = [{**item._asdict(), "relative": item.relative} for item in getattr(self, name)]
        return {"passed": self.passed, "largest_relative_difference": self.largest, **result}

    def lines(self) -> Iterator[str]:
        """Yields the result as lines for people."""
        if self.tensors:
            rounding = f" ({self.rounded} after rounding to {' and '.join(self.rounded_to)})" if self.rounded else ""
            if self.differing:
                worst = max(self.differing, key=lambda tensor: tensor.relative)
                yield (
                    f"tensors: {len(self.differing)} of {self.tensors} differ{rounding}, most {worst.name}: by "
                    f"{worst.difference:.2g} of {worst.largest:.2g}"
                )
            else:
                yield f"tensors: all {self.tensors} equal to the last bit{rounding}"
        for setting in self.settings:
            yield f"configuration: {setting}"
        if self.rows:
            yield (
                f"outputs: {self.backends[0]} against {self.backends[1]} in {self.precision}, {IMAGES} images and "
                f"{TEXTS} texts of seed {self.seed}"
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
        a, b: a source of `conversion.checkpoint.read`, or its result; or a SavedModel's directory, of which only
            outputs are compared.
        config: of those without one.
        tolerance: the largest difference of an output that passes, over the output's largest value; default 1e-9, and
            1e-3 for a SavedModel, which computes in float32.
        seed: of the images and texts.
        key: the model to choose, of a file that holds several.

    Raises:
        CheckpointError: one of them cannot be found, read or understood.
        InputError: an argument is invalid.
    """
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"the tolerance must be a number from 0, got {tolerance}")
    if seed < 0:
        raise InputError(f"the seed must not be negative, got {seed}")
    with ExitStack() as stack:
        return _compared(_sides(stack, (a, b), config, key), tolerance, seed)


def _compared(sides: list[Model | SavedModel], tolerance: float | None, seed: int) -> Verification:
    models = [side for side in sides if isinstance(side, Model)]
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
    if not installed("torch") and not installed("tf"):
        if len(models) == 1:
            raise InputError("a SavedModel is run by TensorFlow: pip install 'groupvit[tf]'")
        result.notes.append("neither PyTorch nor TensorFlow is installed: no outputs were computed")
        return result
    inputs = sample_inputs(known, seed)
    # One model in memory at a time.
    answers = [side.outputs(inputs, precision, rounding) for side in sides]
    result.backends = [side.reader for side in sides]
    result.notes += [note for side in sides for note in side.notes]
    # The effect of rounding alone: the model that was rounded for the comparison, as it is.
    exact = None
    if rounding:
        wider = next(index for index, model in enumerate(models) if model.loses_by(rounding))
        exact, narrow = models[wider].outputs(inputs, precision, {}), answers[wider]
    for name, value in answers[0].items():
        if name in answers[1]:
            effect = None if exact is None else _largest_difference(exact[name], narrow[name])
            result.rows.append(Row(name, _largest(value), _largest_difference(value, answers[1][name]), effect))
    if all("segmentation logits" in answer for answer in answers):
        labels = [answer["segmentation logits"].argmax(axis=1) for answer in answers]
        result.pixels_alike = float((labels[0] == labels[1]).mean())
    return result


def _sides(
    stack: ExitStack,
    pair: tuple[str | Path | Checkpoint, str | Path | Checkpoint],
    config: GroupViTConfig | str | Path | None,
    key: str | None,
) -> list[Model | SavedModel]:
    """Returns both sides; one without a configuration gets `config`, or the other's."""
    sides: list[Model | SavedModel | Source] = []
    for side in pair:
        if isinstance(side, Checkpoint):
            sides.append(Model(side))
        elif is_saved_model(Path(side)):
            sides.append(SavedModel(Path(side)))
        else:
            source = stack.enter_context(opened_source(side, first=key is not None))
            # The other side may hold one model alone.
            if len(source.choice.models) > 1:
                source = stack.enter_context(opened_source(source.path, key=key))
            sides.append(source if source.config is None else Model(read(source)))
    others = [side.checkpoint.config for side in sides if isinstance(side, Model)]
    substitute = config if config is not None else next(iter(others), None)
    return [Model(read(side, config=substitute)) if isinstance(side, Source) else side for side in sides]


# -- tensors -----------------------------------------------------------------------------------------------------------


def _rounding(a: Checkpoint, b: Checkpoint) -> dict[str, str]:
    """Returns the tensors whose dtypes differ between A and B: name -> the dtype in which both are compared."""
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
        first, second = (rounded(side.value(name), rounding.get(name)) for side in (a, b))
        # Batch norms' step counters change no output, and TensorFlow's files have none.
        if name.endswith(".num_batches_tracked"):
            if first != second and name not in (*a.filled, *b.filled):
                result.notes.append(f"{name} is {int(first)} | {int(second)}")
        elif first.tobytes() != second.tobytes():
            first, second = first.astype(np.float64), second.astype(np.float64)
            result.differing.append(TensorDifference(name, _largest(first), _largest_difference(first, second)))
    if (EXTRA in a.tensors) != (EXTRA in b.tensors):
        result.notes.append(f"only one of them holds {EXTRA}, which training alone uses")


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0.0))


def _largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return math.inf
    return float(np.abs(a - b).max(initial=0.0))


# Settings that decide what a model computes, beside the sizes that its tensors' shapes show.
_DECIDING = ("hidden_act", "layer_norm_eps", "num_attention_heads", "assign_eps")
_IMAGE_SIZES = (
    "hidden_size", "intermediate_size", "depths", "num_group_tokens", "image_size", "patch_size", "num_channels",
)  # fmt: skip
_TEXT_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "vocab_size")


def _settings(a: GroupViTConfig, b: GroupViTConfig) -> list[str]:
    """Returns the settings that differ, "name: A | B", of those that decide what a model is and computes."""
    first, second = (dict(_flat(deciding_settings(config))) for config in (a, b))
    return [
        f"{name}: {_shown(first, name)} | {_shown(second, name)}"
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    ]


def deciding_settings(config: GroupViTConfig) -> dict[str, Any]:
    """Returns the settings that decide a model's tensors and outputs, as values that are equal where the models are."""
    vision, text = config.vision_config, config.text_config
    grouping = [tokens > 0 for tokens in vision.num_group_tokens]
    return {
        "projection_dim": config.projection_dim,
        "projection_intermediate_dim": config.projection_intermediate_dim,
        "vision_config": {name: getattr(vision, name) for name in _DECIDING}
        | {name: getattr(vision, name) for name in _IMAGE_SIZES}
        | {
            # Of stages without group tokens the number of groups is not used; ratios matter by the widths that they
            # give.
            "num_output_groups": [n for n, used in zip(vision.num_output_groups, grouping, strict=True) if used],
            "assign_mlp_ratio": [int(ratio * vision.hidden_size) for ratio in vision.assign_mlp_ratio]
            if any(grouping)
            else [],
        },
        "text_config": {name: getattr(text, name) for name in _DECIDING if name != "assign_eps"}
        | {name: getattr(text, name) for name in _TEXT_SIZES}
        # 2 stands for the largest id, which is the vocabulary's last.
        | {"eos_token_id": text.vocab_size - 1 if text.eos_token_id == LEGACY_EOS_TOKEN_ID else text.eos_token_id},
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
    """Returns the sizes that inputs and outputs depend on."""
    vision, text = config.vision_config, config.text_config
    return (
        vision.image_size, vision.num_channels, vision.patch_size, vision.hidden_size, len(vision.depths),
        tuple(vision.num_group_tokens), text.vocab_size, text.max_position_embeddings, text.hidden_size,
        text.num_hidden_layers, config.projection_dim,
    )  # fmt: skip
