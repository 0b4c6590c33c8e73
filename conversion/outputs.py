"""Outputs of models for seeded images and texts, each computed in the backend that its format belongs to.

Where the format's own program can read the file, its values are used: a mistake that reading and writing here had in
common would not be found otherwise.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conversion.checkpoint import Checkpoint, Values
from conversion.formats import saved_model
from conversion.registry import BackendName
from groupvit_common.checkpoints.dtypes import cast
from groupvit_common.model.config import LEGACY_EOS_TOKEN_ID, GroupViTConfig
from groupvit_common.tensorflow_logging import set_environment

Arrays = dict[str, np.ndarray]

SEED = 2022
IMAGES, TEXTS = 2, 4
_MODULES: dict[BackendName, str] = {"torch": "torch", "tf": "tensorflow"}
_NAMES: dict[BackendName, str] = {"torch": "PyTorch", "tf": "Keras"}


def installed(backend: BackendName) -> bool:
    """Returns whether a backend's framework is installed."""
    return importlib.util.find_spec(_MODULES[backend]) is not None


def rounded(array: np.ndarray, dtype: str | None) -> np.ndarray:
    """Returns values rounded to a dtype; None: as they are."""
    return array if dtype is None else cast(array, dtype)


def sample_inputs(config: GroupViTConfig, seed: int = SEED, images: int = IMAGES, texts: int = TEXTS) -> Arrays:
    """Returns images and texts for a model, the same for a seed and the same sizes.

    Returns:
        `pixel_values` float64 `[B, C, H, W]`: coarse and fine noise, as if normalised; `input_ids` and `attention_mask`
        int64 `[N, T]`: random ids of different numbers, then the end of text, then padding.
    """
    rng = np.random.default_rng(seed)
    vision, text = config.vision_config, config.text_config
    side, channels = vision.image_size, vision.num_channels
    coarse = rng.standard_normal((images, channels, 4, 4)).repeat(-(-side // 4), 2).repeat(-(-side // 4), 3)
    pixels = coarse[..., :side, :side] + 0.5 * rng.standard_normal((images, channels, side, side))
    # With eos_token_id 2, as in early checkpoints, text is pooled at its largest id.
    end = text.vocab_size - 1 if text.eos_token_id == LEGACY_EOS_TOKEN_ID else text.eos_token_id
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


class Model:
    """A checkpoint as one of the two that are compared."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.title = str(checkpoint.source.path)
        self.reader = ""  # the program that computed its outputs
        self.notes: list[str] = []

    def loses_by(self, rounding: Mapping[str, str]) -> bool:
        """Returns whether rounding changes a tensor's dtype."""
        return any(self.checkpoint.tensors[name].dtype != dtype for name, dtype in rounding.items())

    def outputs(self, inputs: Arrays, precision: str, rounding: Mapping[str, str]) -> Arrays:
        """Returns all that the model computes, float64, by name; after rounding its weights."""
        wanted = self.checkpoint.source.spec.backend
        other: BackendName = "tf" if wanted == "torch" else "torch"
        backend = wanted if installed(wanted) else other
        self.reader = _NAMES[backend]
        if backend == "tf":
            set_environment()
        model_class = importlib.import_module(f"groupvit_{backend}").GroupViTModel
        value, note = _program_values(self.checkpoint, backend)
        self.notes = [note] if note else []
        arrays = Values(self.checkpoint.tensors, lambda name: rounded(value(name), rounding.get(name)))
        model = model_class.from_arrays(self.checkpoint.config, arrays, dtype=precision)
        run = _run_torch if backend == "torch" else _run_keras
        return _named(run(model, inputs, precision))


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


class SavedModel:
    """A SavedModel as one of the two that are compared: its endpoints alone, in float32."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.title = str(directory)
        self.reader = "TensorFlow's SavedModel"
        self.notes: list[str] = []

    def outputs(self, inputs: Arrays, precision: str, rounding: Mapping[str, str]) -> Arrays:
        """Returns the outputs of the endpoints, by name."""
        return saved_model.run(self._directory, inputs)


def _program_values(checkpoint: Checkpoint, backend: BackendName) -> tuple[Callable[[str], np.ndarray], str]:
    """Returns the values as the format's own program reads them, where it can; and a note where it fails."""
    source = checkpoint.source
    missing = any(not name.endswith("num_batches_tracked") for name in checkpoint.filled)
    if not source.spec.program or source.spec.backend != backend or missing:
        return checkpoint.value, ""
    try:
        values = source.spec.code.program_values(checkpoint)
    # Other programs may raise anything for a file that is read here.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        note = f"{source.path} is read by this package alone: {source.spec.program} raises {type(error).__name__}: "
        f"{reason}"
        return checkpoint.value, note
    return values or checkpoint.value, ""
