"""Description of a checkpoint: format, architecture, parameters by part, dtypes, batch norms, and warnings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conversion.checkpoint import COMPANIONS, Checkpoint, opened_source, read
from conversion.formats.saved_model import is_saved_model
from conversion.names import EXTRA
from conversion.registry import get_format
from conversion.source import Source
from groupvit_common.checkpoints.directory import CONFIG_NAME
from groupvit_common.checkpoints.dtypes import numpy_dtype
from groupvit_common.errors import CheckpointError, some
from groupvit_common.model.config import LEGACY_EOS_TOKEN_ID, GroupViTConfig
from groupvit_common.model.parameters import manifest
from groupvit_common.segmentation.scores import MAX_LOGIT_SCALE
from groupvit_common.storage.names import list_files

_PARTS: tuple[tuple[str, str], ...] = (
    (r"text_model\.embeddings\.", "text embeddings"),
    (r"text_model\.", "text layers"),
    (r"vision_model\.embeddings\.", "image embeddings"),
    (r"vision_model\.encoder\.stages\.(\d+)\.", "image stage {}"),
    (r"vision_model\.", "image final norm"),
    (r"visual_projection\.", "image projector"),
    (r"text_projection\.", "text projector"),
    (r"", "temperature"),
)
_STATISTICS = ("running_mean", "running_var")


@dataclass
class Description:
    """The description of a checkpoint.

    Attributes:
        format: a name in `conversion.registry.FORMATS`.
        files: name -> bytes.
        architecture: the configuration in a few words; None without one.
        config: all of the configuration; None without one.
        parameters: number of elements, without batch norms' statistics; parts: by part of the model.
        dtypes: name -> (tensors, elements).
        batch_norm: the state of its statistics.
        temperatures: exp(logit_scale) of the loss, and of the multi-label loss if there is one.
        companions: files of the tokenizer and the image processor beside it.
        others: contents of the files besides the weights.
        warnings: what a user should look at, a sentence each.
        model: which of the `models` of the file this is, where there are several.
        notes: what was removed from names and left out.
    """

    path: str
    format: str
    files: dict[str, int]
    architecture: str | None = None
    config: dict[str, Any] | None = None
    parameters: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, tuple[int, int]] = field(default_factory=dict)
    batch_norm: str | None = None
    temperatures: dict[str, float] = field(default_factory=dict)
    companions: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    model: str | None = None
    models: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns the description as JSON values; `odd` are the warnings."""
        result = asdict(self)
        result["odd"] = result.pop("warnings")
        result["dtypes"] = {name: {"tensors": t, "elements": n} for name, (t, n) in self.dtypes.items()}
        return result

    def lines(self) -> Iterator[str]:
        """Yields the description as lines for people."""
        yield f"{self.path}: {get_format(self.format).title}"
        yield f"files: {', '.join(f'{name} ({size(count)})' for name, count in self.files.items())}"
        if self.companions:
            yield f"with it: {', '.join(self.companions)}"
        if self.model is not None:
            others = ", ".join(name for name in self.models if name != self.model)
            yield f"models in it: {self.model}, which this describes, and {others} (--key NAME)"
        yield from (f"names: {note}" for note in self.notes)
        if self.others:
            yield f"also in it: {', '.join(self.others)}"
        if self.architecture is not None:
            yield f"model: {self.architecture}"
        if self.parts:
            yield f"parameters: {self.parameters:,}"
            width = max(map(len, self.parts))
            digits = max(len(f"{count:,}") for count in self.parts.values())
            yield from (f"  {name:<{width}}  {count:>{digits},}" for name, count in self.parts.items())
        if self.dtypes:
            stored = (
                f"{name} ({tensors} tensors, {count:,} numbers)" for name, (tensors, count) in self.dtypes.items()
            )
            yield f"stored as: {', '.join(stored)}"
        if self.batch_norm is not None:
            yield f"batch norms: {self.batch_norm}"
        if self.temperatures:
            yield f"temperature: {', '.join(f'{name} {value:.4g}' for name, value in self.temperatures.items())}"
        yield from [f"warning: {sentence}" for sentence in self.warnings] or ["warnings: none"]


def size(count: float) -> str:
    """Returns a number of bytes for people: "1.6 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def describe(
    path: str | Path,
    *,
    config: GroupViTConfig | str | Path | None = None,
    revision: str | None = None,
    key: str | None = None,
) -> Description:
    """Reads all of a checkpoint, one tensor at a time, and describes it; faults are warnings as long as it can be read.

    Args:
        path, config, revision: see `conversion.checkpoint.read`.
        key: the model to describe, of a file that holds several; the first of them if None.

    Raises:
        CheckpointError: it cannot be found, or is no checkpoint, or is damaged.
    """
    if is_saved_model(Path(path)):
        names = list_files(Path(path), folders=True)
        return Description(str(path), "savedmodel", {name: (Path(path) / name).stat().st_size for name in names})
    with opened_source(path, revision, config=config, key=key, first=True) as source:
        return _described(str(path), source)


def _described(name: str, source: Source) -> Description:
    result = Description(name, source.format, {file.name: file.stat().st_size for file in source.files})
    result.others = list(source.others)
    result.models, result.notes = list(source.choice.models), list(source.choice.notes)
    result.model = source.choice.model if len(result.models) > 1 else None
    beside = source.files[0].parent
    if source.path.is_dir() or (beside / CONFIG_NAME).is_file():
        result.companions = [name for name in COMPANIONS if (beside / name).is_file()]
    known = source.config
    for info in source.tensors.values():
        tensors, elements = result.dtypes.get(info.dtype, (0, 0))
        result.dtypes[info.dtype] = (tensors + 1, elements + info.elements)
    if known is not None:
        result.architecture, result.config = architecture(known), known.to_dict()
    checkpoint = None
    if known is None:
        result.warnings.append(f"it has no configuration: put the model's {CONFIG_NAME} beside it, or pass one")
    else:
        try:
            checkpoint = read(source, config=known)
        except CheckpointError as error:
            result.warnings.append(str(error))
    values = _examine(source, result)
    if checkpoint is None:
        result.parameters = sum(info.elements for info in source.tensors.values())
        for name, info in source.tensors.items():
            part = re.split(r"[./]", name)[0]
            result.parts[part] = result.parts.get(part, 0) + info.elements
    else:
        _account(checkpoint, result, readable=values)
    return result


def architecture(config: GroupViTConfig) -> str:
    """Returns a configuration in a few words."""
    vision, text = config.vision_config, config.text_config
    groups = [str(n) for n, tokens in zip(vision.num_output_groups, vision.num_group_tokens, strict=True) if tokens]
    return (
        f"images {vision.image_size} x {vision.image_size} in patches of {vision.patch_size}; {len(vision.depths)} "
        f"stages of {', '.join(map(str, vision.depths))} layers, {' -> '.join(groups) or 'no'} groups, width "
        f"{vision.hidden_size}, "
        f"{vision.num_attention_heads} heads; texts of up to {text.max_position_embeddings} tokens of "
        f"{text.vocab_size}, "
        f"{text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} heads; "
        f"embedding {config.projection_dim}"
    )


def _examine(source: Source, result: Description) -> bool:
    """Reads every number; returns whether all are finite."""
    bad, zero = [], []
    for name, (shape, dtype) in source.tensors.items():
        if dtype not in ("float64", "float32", "float16", "bfloat16"):
            continue
        array = source.value(name)
        wrong = int(np.size(array) - np.count_nonzero(np.isfinite(array)))
        if wrong:
            bad.append(f"{name} ({wrong:,} of {math.prod(shape):,})")
        elif len(shape) > 1 and not np.any(array.astype(np.float32) if numpy_dtype(dtype).kind == "V" else array):
            zero.append(name)
    if bad:
        result.warnings.append(f"NaN or infinite values in {some(bad)}")
    if zero:
        result.warnings.append(f"nothing but zeros in {some(zero)}")
    return not bad


def _account(checkpoint: Checkpoint, result: Description, readable: bool) -> None:
    kinds = manifest(checkpoint.config)
    for name, parameter in kinds.items():
        if parameter.kind in (*_STATISTICS, "counter"):
            continue
        pattern, title = next((p, t) for p, t in _PARTS if re.match(p, name))
        match = re.match(pattern, name)
        part = title.format(*(int(group) + 1 for group in match.groups())) if match else title
        result.parts[part] = result.parts.get(part, 0) + math.prod(parameter.shape)
    result.parameters = sum(result.parts.values())
    floats = [dtype for dtype in result.dtypes if "float" in dtype]
    if len(floats) > 1:
        result.warnings.append(f"floating-point numbers of several types: {', '.join(floats)}")
    extra = [name for name in checkpoint.source.tensors if name.endswith("position_ids")]
    if extra:
        result.warnings.append(f"{some(extra)}: buffers of transformers before 4.31, which nothing needs")
    if checkpoint.config.text_config.eos_token_id == LEGACY_EOS_TOKEN_ID and checkpoint.source.format != "nvlabs":
        result.warnings.append("eos_token_id is 2, as in early checkpoints: text is pooled at its largest id")
    if not readable:
        return
    _batch_norms(checkpoint, result)
    scales = {"contrastive": "logit_scale", "multi-label": EXTRA}
    for title, name in scales.items():
        if name in checkpoint.tensors:
            result.temperatures[title] = math.exp(min(float(checkpoint.value(name)), 700.0))
            # float32 rounds the limit itself.
            if result.temperatures[title] > MAX_LOGIT_SCALE * 1.0001:
                result.warnings.append(f"{name} is beyond 100, where training clamps it")


def _batch_norms(checkpoint: Checkpoint, result: Description) -> None:
    counters = [name for name in checkpoint.tensors if name.endswith(".num_batches_tracked")]
    missing = [name for name in counters if name in checkpoint.filled]
    steps = sorted({int(checkpoint.value(name)) for name in counters if name not in missing})
    counted = "steps not counted" if missing else f"{' and '.join(map(str, steps))} steps"
    initial = all(
        np.all(checkpoint.value(name).astype(np.float32) == (1.0 if name.endswith("var") else 0.0))
        for name in checkpoint.tensors
        if name.endswith(_STATISTICS)
    )
    result.batch_norm = f"{'statistics as before any training' if initial else 'statistics present'}, {counted}"
    if initial:
        result.warnings.append("batch norms have the statistics of an untrained model")
    negative = [
        name for name in checkpoint.tensors if name.endswith("running_var") and np.any(checkpoint.value(name) < 0)
    ]
    if negative:
        result.warnings.append(f"negative variances in {some(negative)}")
