"""TensorFlow SavedModels: programs for TensorFlow Serving. They are written and run; their weights cannot be read."""

from pathlib import Path

import numpy as np

from conversion.checkpoint import Values
from conversion.writing import Job
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.tensorflow_logging import set_environment


def is_saved_model(path: Path) -> bool:
    """Returns whether a path is the directory of a SavedModel."""
    return (path / "saved_model.pb").is_file()


def write(job: Job, directory: Path) -> None:
    """Writes the directory of a SavedModel, which computes in float32.

    Raises:
        InputError: TensorFlow is not installed.
    """
    try:
        from groupvit_tf import GroupViTModel
    except ImportError as error:
        raise InputError("a SavedModel is written by TensorFlow: pip install 'groupvit[tf]'") from error
    arrays = Values(job.checkpoint.tensors, job.value)
    model = GroupViTModel.from_arrays(job.checkpoint.config, arrays, dtype="float32")
    try:
        model.export(directory)
    except Exception as error:
        # TensorFlow's own, for a full disk.
        if type(error).__name__ != "ResourceExhaustedError":
            raise
        raise CheckpointError(f"a SavedModel cannot be written: {str(error).splitlines()[0]}") from error


def run(directory: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the outputs of a SavedModel's endpoints for `conversion.outputs.sample_inputs`, by name, as float64.

    Raises:
        InputError: TensorFlow is not installed, or the SavedModel is not one of groupvit for these inputs.
        CheckpointError: TensorFlow cannot load it.
    """
    set_environment()
    try:
        import tensorflow as tf
    except ImportError as error:
        raise InputError("a SavedModel is run by TensorFlow: pip install 'groupvit[tf]'") from error
    try:
        loaded = tf.saved_model.load(str(directory))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory} cannot be loaded by TensorFlow: {error}") from error
    pixels = tf.constant(inputs["pixel_values"], tf.float32)
    ids, mask = (tf.constant(inputs[name], tf.int32) for name in ("input_ids", "attention_mask"))
    try:
        texts = loaded.text_features(ids, mask)["text_features"]
        images = loaded.image_features(pixels)["image_features"]
        logits = loaded.segment(pixels, texts)["segmentation_logits"] if hasattr(loaded, "segment") else None
    except (AttributeError, ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        raise InputError(
            f"{directory} is no SavedModel of groupvit's, or of another model or image size: "
            f"{str(error).splitlines()[0]}"
        ) from error
    features = {"image features": images, "text features": texts}
    outputs = {name: value / tf.norm(value, axis=-1, keepdims=True) for name, value in features.items()}
    outputs["segmentation logits"] = logits
    return {name: np.asarray(value, np.float64) for name, value in outputs.items() if value is not None}
