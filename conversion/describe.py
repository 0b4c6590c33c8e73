"""What a checkpoint is: format, architecture, parameters by part, dtypes, batch-norm statistics, and anything odd."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conversion.checkpoint import COMPANIONS, Checkpoint, locate, read
from conversion.formats import Source, open_source
from conversion.names import EXTRA
from conversion.verify import is_saved_model
from groupvit_common.checkpoints.directory import CONFIG_NAME
from groupvit_common.checkpoints.dtypes import numpy_dtype
from groupvit_common.errors import CheckpointError, some
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.model.parameters import manifest
from groupvit_common.storage.names import list_files

FORMATS = {
    "safetensors": "safetensors in PyTorch's layout (groupvit, transformers)",
    "pytorch": "a pickled state dict of PyTorch (pytorch_model.bin)",
    "transformers-tf": "TensorFlow weights of transformers (tf_model.h5)",
    "transformers-tf-safetensors": "safetensors in TensorFlow's layout (transformers)",
    "nvlabs": "the authors' own checkpoint (.pth)",
    "keras": "a Keras model (.keras)",
    "keras-weights": "the weights of a Keras model (.weights.h5)",
    "savedmodel": "a TensorFlow SavedModel, which is a program: it runs, its weights cannot be taken out",
}
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
_MAX_LOGIT_SCALE = 100.0


@dataclass
class Description:
    """What is known of a checkpoint.

    Attributes:
        format: as in `conversion.formats`, or "savedmodel"; files: name -> bytes.
        architecture: the configuration in a few words; config: all of it; both None if it has none.
        parameters: in all, and by part; without batch norms' statistics.
        dtypes: name -> (tensors, elements).
        batch_norm: what its statistics are.
        temperatures: exp(logit_scale) of the loss, and of the multi-label loss if that is kept.
        others: what the files hold besides the weights.
        odd: all that a user may want to look at, a sentence each.
        model: which of the `models` of the file this is, where there are several.
        notes: what was taken off its names, and left out.
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
    odd: list[str] = field(default_factory=list)
    model: str | None = None
    models: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        result = asdict(self)
        result["dtypes"] = {name: {"tensors": t, "elements": n} for name, (t, n) in self.dtypes.items()}
        return result

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.path}: {FORMATS[self.format]}"
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
        yield from (f"odd: {sentence}" for sentence in self.odd or ["nothing"])


def size(count: float) -> str:
    """Bytes for people: "1.6 MB"."""
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
    """Reads all of a checkpoint, one tensor at a time, and says what it is. What is wrong with it is told, as far as it can be read.

    Args:
        path, config, revision: see `conversion.checkpoint.read`.
        key: which model, of a file that holds several; the first of them if None.

    Raises:
        CheckpointError: it cannot be found, or is no checkpoint, or is damaged.
    """
    if is_saved_model(Path(path)):
        names = list_files(Path(path), folders=True)
        return Description(str(path), "savedmodel", {name: (Path(path) / name).stat().st_size for name in names})
    local = locate(path, revision)
    given = GroupViTConfig.from_pretrained(config) if isinstance(config, str | Path) else config
    source = open_source(local, given, key, first=True)
    result = Description(str(path), source.format, {file.name: file.stat().st_size for file in source.files})
    result.others = list(source.others)
    result.models, result.notes = list(source.choice.models), list(source.choice.notes)
    result.model = source.choice.model if len(result.models) > 1 else None
    beside = source.files[0].parent
    if local.is_dir() or (beside / CONFIG_NAME).is_file():
        result.companions = [name for name in COMPANIONS if (beside / name).is_file()]
    known = given or source.config
    for shape, dtype in source.tensors.values():
        tensors, elements = result.dtypes.get(dtype, (0, 0))
        result.dtypes[dtype] = (tensors + 1, elements + math.prod(shape))
    if known is not None:
        result.architecture, result.config = architecture(known), known.to_dict()
    checkpoint = None
    if known is None:
        result.odd.append(f"nothing says its configuration: put the model's {CONFIG_NAME} beside it, or pass one")
    else:
        try:
            checkpoint = read(source, config=known)
        except CheckpointError as error:
            result.odd.append(str(error))
    values = _examine(source, result)
    if checkpoint is None:
        result.parameters = sum(math.prod(shape) for shape, _ in source.tensors.values())
        for name, (shape, _) in source.tensors.items():
            part = re.split(r"[./]", name)[0]
            result.parts[part] = result.parts.get(part, 0) + math.prod(shape)
    else:
        _account(checkpoint, result, readable=values)
    return result


def architecture(config: GroupViTConfig) -> str:
    """A configuration in a few words."""
    vision, text = config.vision_config, config.text_config
    groups = [str(n) for n, tokens in zip(vision.num_output_groups, vision.num_group_tokens, strict=True) if tokens]
    return (
        f"images {vision.image_size} x {vision.image_size} in patches of {vision.patch_size}; {len(vision.depths)} stages of "
        f"{', '.join(map(str, vision.depths))} layers, {' -> '.join(groups) or 'no'} groups, width {vision.hidden_size}, "
        f"{vision.num_attention_heads} heads; texts of up to {text.max_position_embeddings} tokens of {text.vocab_size}, "
        f"{text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} heads; "
        f"embedding {config.projection_dim}"
    )


def _examine(source: Source, result: Description) -> bool:
    """Looks at every number; whether all are finite."""
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
        result.odd.append(f"NaN or infinite values in {some(bad)}")
    if zero:
        result.odd.append(f"nothing but zeros in {some(zero)}")
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
        result.odd.append(f"floating-point numbers of several types: {', '.join(floats)}")
    extra = [name for name in checkpoint.source.tensors if name.endswith("position_ids")]
    if extra:
        result.odd.append(f"{some(extra)}: buffers of transformers before 4.31, which nothing needs")
    if checkpoint.config.text_config.eos_token_id == 2 and checkpoint.source.format != "nvlabs":
        result.odd.append("eos_token_id is 2, as in early checkpoints: text is pooled at its largest id")
    if not readable:
        return
    _batch_norms(checkpoint, result)
    scales = {"contrastive": "logit_scale", "multi-label": EXTRA}
    for title, name in scales.items():
        if name in checkpoint.tensors:
            result.temperatures[title] = math.exp(min(float(checkpoint.value(name)), 700.0))
            # float32 rounds the limit itself.
            if result.temperatures[title] > _MAX_LOGIT_SCALE * 1.0001:
                result.odd.append(f"{name} is beyond 100, where training clamps it")


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
        result.odd.append("batch norms have the statistics of an untrained model")
    negative = [
        name for name in checkpoint.tensors if name.endswith("running_var") and np.any(checkpoint.value(name) < 0)
    ]
    if negative:
        result.odd.append(f"negative variances in {some(negative)}")
