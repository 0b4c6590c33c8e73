"""Weights of a Keras model, `.weights.h5`, as `save_weights` of groupvit_tf's GroupViTModel writes them.

Keras's own files hold no configuration; those that are written here hold it in an attribute, which Keras ignores.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from conversion.checkpoint import Checkpoint
from conversion.hdf5 import CONFIG_ATTRIBUTE, create, has_tensorflow_layout, read_hdf5
from conversion.names import EXTRA, Naming, Row, T, V, from_parts
from conversion.source import Files, Opened, Source, parse_config, scalar_text
from conversion.writing import Job
from groupvit_common.errors import InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.model.parameters import Parameter
from groupvit_common.storage.json_text import parse_json

_STAGES = "layers/vision_tower/encoder/stages/stage{s}"
_TABLE: tuple[Row, ...] = (
    ("vision_model.embeddings.position_embeddings", "layers/vision_tower/embeddings/vars/0", "same"),
    (V + ".group_token", _STAGES + "/vars/0", "same"),
    (V + ".group_projector.0.{p}", _STAGES + "/group_projector/norm/{p}", "kernel"),
    (V + ".group_projector.1.{path}.{p}", _STAGES + "/group_projector/mixer/{path}/{p}", "kernel"),
    (V + ".layers.{l}.{path}.{p}", _STAGES + "/layers/encoder_layer{l}/{path}/{p}", "kernel"),
    (V + ".downsample.{path}.{p}", _STAGES + "/downsample/{path}/{p}", "kernel"),
    (T + ".{path}.{p}", "layers/text_tower/encoder/layers/encoder_layer{l}/{path}/{p}", "kernel"),
    ("vision_model.{path}.{p}", "layers/vision_tower/{path}/{p}", "kernel"),
    ("text_model.{path}.{p}", "layers/text_tower/{path}/{p}", "kernel"),
    ("visual_projection.0.{p}", "layers/projection/hidden/{p}", "kernel"),
    ("visual_projection.1.{p}", "layers/projection/norm/{p}", "kernel"),
    ("visual_projection.3.{p}", "layers/projection/output_layer/{p}", "kernel"),
    ("text_projection.0.{p}", "layers/projection_1/hidden/{p}", "kernel"),
    ("text_projection.1.{p}", "layers/projection_1/norm/{p}", "kernel"),
    ("text_projection.3.{p}", "layers/projection_1/output_layer/{p}", "kernel"),
    ("logit_scale", "vars/0", "same"),
)


def _leaf(parameter: Parameter, leaf: str) -> str:
    return f"vars/{('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked').index(leaf)}"


# Keras numbers layers of one class: stage, stage_1, stage_2.
NAMING = Naming(
    _TABLE,
    number=lambda n: "" if n == "0" else f"_{n}",
    separator="/",
    leaf=_leaf,
    towers=("layers/text_tower", "layers/vision_tower"),
)


def detect(files: Files) -> bool:
    """Returns whether HDF5 files are those of Keras 3."""
    return not files.once(has_tensorflow_layout)


def read(files: Files) -> Opened:
    """Reads names, shapes and dtypes of a file of Keras, and its configuration if this package wrote it."""
    opened = [read_hdf5(path) for path in files.paths]

    def config(source: Source) -> GroupViTConfig | None:
        text = opened[0].config
        return (
            None if text is None else parse_config(parse_json(text, f"{CONFIG_ATTRIBUTE} of {files.main}"), files.main)
        )

    return Opened([file.piece for file in opened], config=config)


def write(job: Job, path: Path) -> None:
    """Writes a file of weights."""
    with create(path) as file:
        file.attrs[CONFIG_ATTRIBUTE] = json.dumps(job.checkpoint.config.to_dict())
        for entry in job.entries(NAMING):
            array = from_parts(entry, job.value)
            if entry.foreign == EXTRA:
                file.attrs[EXTRA] = scalar_text(array)
            elif entry.parameters[0].kind == "counter":
                if int(array) > np.iinfo(np.int32).max:
                    raise InputError(f"Keras counts batches in int32, and {entry.parameters[0].name} is {int(array)}")
                file.create_dataset(entry.foreign, data=array.astype(np.int32))
            elif array.dtype.name == "bfloat16":
                # HDF5 has no such numbers; Keras writes their bytes, with a note.
                raw = np.ascontiguousarray(array).reshape(-1).view("V2").reshape(array.shape)
                file.create_dataset(entry.foreign, data=raw).attrs["dtype"] = "bfloat16"
            else:
                file.create_dataset(entry.foreign, data=array)


def program_values(checkpoint: Checkpoint) -> Callable[[str], np.ndarray] | None:
    """Returns the values as Keras's `load_weights` reads them; None for a part of a larger model."""
    if checkpoint.source.choice.prefix:
        return None
    from groupvit_tf import GroupViTModel

    types = {info.dtype for info in checkpoint.tensors.values()}
    dtype = next(name for name in ("float64", "float32", "bfloat16", "float16") if name in types)
    model = GroupViTModel(checkpoint.config, dtype=dtype)
    model.load_weights(checkpoint.source.files[0])
    return model_values(model)


def model_values(model: Any) -> Callable[[str], np.ndarray]:
    """Returns a Keras model's values by their canonical names."""
    from groupvit_tf.checkpoint import canonical_variables, kind, to_canonical

    variables = canonical_variables(model)
    return lambda name: to_canonical(kind(variables[name]), np.asarray(variables[name]))
