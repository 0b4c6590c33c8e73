"""A Keras model, `.keras`, as groupvit_tf's GroupViTModel saves it: a zip archive of weights and settings."""

import json
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conversion.checkpoint import Checkpoint
from conversion.formats import keras_weights
from conversion.hdf5 import MAX_CONFIG, read_hdf5
from conversion.pickle_records import escaped
from conversion.source import Files, Opened, parse_config
from conversion.torch_file import zip_members
from conversion.writing import Job
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.storage.json_text import parse_json

NAMING = keras_weights.NAMING


def detect(files: Files) -> bool:
    """Returns True: no other format has this container."""
    return True


def read(files: Files) -> Opened:
    """Reads the settings, and names, shapes and dtypes of the weights."""
    settings = _settings(files)
    window = zip_members(files.main)["model.weights.h5"]
    piece = read_hdf5(files.main, window=window).piece
    return Opened([piece], config=lambda source: parse_config(settings, files.main))


def _settings(files: Files) -> Mapping[str, Any]:
    """Returns the configuration of the GroupViTModel that a Keras model is, or has among its layers."""
    path, members = files.main, zip_members(files.main)
    if "config.json" not in members:
        raise CheckpointError(f"{path} is no .keras file: it has no config.json")
    begin, length = members["config.json"]
    with path.open("rb") as file:
        file.seek(begin)
        content = parse_json(file.read(min(length, MAX_CONFIG)), f"config.json of {path}")
    found: list[Any] = []
    queue: list[Any] = [content]
    for value in queue:
        if isinstance(value, dict) and value.get("class_name") in ("GroupViTModel", "TFGroupViTModel"):
            found.append(value.get("config"))
        else:
            queue += [
                item for item in (value.values() if isinstance(value, dict) else value) if isinstance(item, dict | list)
            ]
    if not found:
        name = content.get("class_name")
        raise CheckpointError(
            f"{path} holds a {escaped(str(name), 80)}; the GroupViTModel of groupvit_tf can be converted"
        )
    if len(found) > 1:
        raise CheckpointError(f"{path} holds {len(found)} GroupViTModels: convert the weights of one, saved alone")
    settings = found[0].get("config") if isinstance(found[0], dict) else None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is damaged: its config.json has no configuration")
    return settings


def write(job: Job, path: Path) -> None:
    """Writes a file as Keras's own `save` does for a GroupViTModel that is neither compiled nor frozen.

    Raises:
        InputError: the weights have several floating-point dtypes.
    """
    types = sorted({dtype for _, dtype in job.checkpoint.tensors.values() if "float" in dtype})
    if len(types) > 1:
        raise InputError(
            f"a .keras file has one type for all its numbers, and there are {', '.join(types)}: pass dtype (--dtype)"
        )
    policy = {"name": job.checkpoint.dtype}
    content = {
        "module": "groupvit_tf.model",
        "class_name": "GroupViTModel",
        "config": {
            "config": job.checkpoint.config.to_dict(),
            "name": "group_vi_t_model",
            "dtype": {"module": "keras", "class_name": "DTypePolicy", "config": policy, "registered_name": None},
            "trainable": {"": True},
        },
        "registered_name": "groupvit>GroupViTModel",
        "build_config": {"shapes_dict": {}},
        "compile_config": {},
    }
    metadata = {"keras_version": "3.12.0", "date_saved": time.strftime("%Y-%m-%d@%H:%M:%S")}
    weights = path.with_name(f"{path.name}.weights.h5")
    try:
        keras_weights.write(job, weights)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("metadata.json", json.dumps(metadata))
            archive.writestr("config.json", json.dumps(content))
            archive.write(weights, "model.weights.h5")
    finally:
        weights.unlink(missing_ok=True)


def program_values(checkpoint: Checkpoint) -> Callable[[str], np.ndarray] | None:
    """Returns the values as `keras.saving.load_model` reads them; None for a part of a larger model."""
    if checkpoint.source.choice.prefix:
        return None
    import keras

    import groupvit_tf  # noqa: F401 - registers the model's class

    return keras_weights.model_values(keras.saving.load_model(checkpoint.source.files[0], compile=False))
