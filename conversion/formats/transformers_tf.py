"""TensorFlow weights of transformers' TFGroupViTModel: `tf_model.h5`, or shards."""

from pathlib import Path
from typing import Any

import numpy as np

from conversion.hdf5 import create, has_tensorflow_layout, read_hdf5
from conversion.names import EXTRA, Entry, Naming, Row, T, V, from_parts
from conversion.source import Files, Opened, scalar_text
from conversion.writing import Job, write_sharded
from groupvit_common.errors import InputError
from groupvit_common.model.parameters import Parameter

_STAGES = "vision_model/encoder/stages_._{s}"
_TABLE: tuple[Row, ...] = (
    ("vision_model.embeddings.position_embeddings", "vision_model/embeddings/position_embeddings:0", "same"),
    (V + ".group_token", _STAGES + "/group_token:0", "same"),
    (V + ".group_projector.0.{p}", _STAGES + "/group_projector.0/{p}", "kernel"),
    (V + ".group_projector.1.{path}.{p}", _STAGES + "/group_projector.1/{path}/{p}", "kernel"),
    (V + ".layers.{l}.{path}.{p}", _STAGES + "/layers_._{l}/{path}/{p}", "kernel"),
    (V + ".downsample.{path}.{p}", _STAGES + "/downsample/{path}/{p}", "kernel"),
    ("text_model.embeddings.token_embedding.weight", "text_model/embeddings/token_embedding/weight:0", "same"),
    (
        "text_model.embeddings.position_embedding.weight",
        "text_model/embeddings/position_embedding/embeddings:0",
        "same",
    ),
    (T + ".{path}.{p}", "text_model/encoder/layers_._{l}/{path}/{p}", "kernel"),
    ("visual_projection.{n}.{p}", "visual_projection.{n}/{p}", "kernel"),
    ("text_projection.{n}.{p}", "text_projection.{n}/{p}", "kernel"),
    ("logit_scale", "logit_scale:0", "vector"),
    ("{path}.{p}", "{path}/{p}", "kernel"),
)

# The name that TFGroupViTModel gives itself, and that of the layer which holds all.
_MODEL, _LAYER = "tf_group_vi_t_model", "groupvit"
# An attribute of HDF5 holds up to 64 KiB less its header; Keras spreads longer lists over attributes with numbers.
_MAX_ATTRIBUTE = 64_512


def _leaf(parameter: Parameter, leaf: str) -> str:
    if parameter.kind == "norm":
        return {"weight": "gamma:0", "bias": "beta:0"}[leaf]
    return {"weight": "kernel:0", "running_mean": "moving_mean:0", "running_var": "moving_variance:0"}.get(
        leaf, f"{leaf}:0"
    )


NAMING = Naming(_TABLE, separator="/", leaf=_leaf, lacks=("counter",))


def detect(files: Files) -> bool:
    """Returns whether HDF5 files are those of transformers."""
    return files.once(has_tensorflow_layout)


def read(files: Files) -> Opened:
    """Reads names, shapes and dtypes of HDF5 files of transformers."""
    return Opened([read_hdf5(path, short_name).piece for path in files.paths])


def short_name(place: str) -> str:
    """Returns the name below the model: what follows the last "groupvit/"."""
    return place.rpartition("groupvit/")[2]


def full_name(name: str) -> str:
    """Returns the name that an index has for a tensor of the layer."""
    return f"{_MODEL}/{name}"


def split_tensors(job: Job) -> tuple[dict[str, Entry], dict[str, np.ndarray]]:
    """Returns the tensors by their names within the layer, and the values of those that have no place in the files."""
    found = job.entries(NAMING)
    # The training's temperature is no weight of transformers' model.
    others = [entry for entry in found if entry.parameters[0].kind == "counter" or entry.foreign == EXTRA]
    weights = {f"{_LAYER}/{entry.foreign}": entry for entry in found if entry not in others}
    return weights, {entry.foreign: from_parts(entry, job.value) for entry in others}


def write(job: Job, directory: Path) -> None:
    """Writes a directory with `tf_model.h5` or shards.

    Raises:
        InputError: the weights are bfloat16, which these files do not have.
    """
    weights, others = split_tensors(job)
    last = list(weights)[-1]
    infos = {name: job.info(entry) for name, entry in weights.items()}
    if any(info.dtype == "bfloat16" for info in infos.values()):
        raise InputError("TensorFlow's .h5 files have no bfloat16: pass dtype float32 or float16")

    def write_file(path: Path, names: list[str]) -> None:
        whole = len(names) == len(weights)
        with create(path) as file:
            if whole:
                file.attrs["backend"] = "tensorflow"
                file.attrs["keras_version"] = "2.18.0"  # whose format this is
                file.create_group("top_level_model_weights").attrs["weight_names"] = np.zeros(0)
                file.attrs["layer_names"] = [_LAYER]
                group = file.create_group(_LAYER)
                _write_names(group, "weight_names", [full_name(name) for name in names])
            else:
                _write_names(file, "layer_names", names)
            for name in names:
                array = from_parts(weights[name], job.value)
                (group if whole else file).create_dataset(full_name(name) if whole else name, data=array)
            if last in names:
                for name, value in others.items():
                    file.attrs[name] = scalar_text(value)

    sizes = {name: info.nbytes for name, info in infos.items()}
    write_sharded(job, directory, "tf_model.h5", sizes, write_file, full_name)


def _write_names(group: Any, attribute: str, names: list[str]) -> None:
    count = -(-sum(map(len, names)) // _MAX_ATTRIBUTE)
    for index in range(count):
        part = names[index * len(names) // count : (index + 1) * len(names) // count]
        group.attrs[f"{attribute}{index}" if count > 1 else attribute] = part
