"""The checkpoint formats, one row each. Only the standard library is imported here: the command line lists them.

A new format is a row of `FORMATS` and a module in `conversion.formats` with

    NAMING                        the names and layout of its tensors (`conversion.names.Naming`)
    detect(files) -> bool         whether files in the row's container are of this format
    read(files) -> Opened         the tensors of the files (`conversion.source`)
    write(job, path)              the result, a file or a directory (`conversion.writing.Job`)
    program_values(checkpoint)    the values as the format's own program reads them, where the row names a program

Names of files, `--to`, help and the hub follow from the row. A format in a container of its own needs besides: the name
of the container in `Container`, and its first bytes in `conversion.magic.container`.
"""

import re
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

BackendName = Literal["torch", "tf"]
# "torch" is "zip" or "torch-legacy", and "keras" is "zip": see `conversion.source.Files.container`.
Container = Literal["safetensors", "hdf5", "zip", "torch-legacy", "keras", "torch", "directory"]


@dataclass(frozen=True, kw_only=True)
class FormatSpec:
    """A checkpoint format.

    Attributes:
        name: in reports, `inspect --json` and Python.
        title: a description for people.
        module: in `conversion.formats`.
        container: what its files are packed in; a "directory" cannot be read as weights.
        targets: the values of `--to` that write it.
        help: the line about `--to`; "" where another row's line includes this format.
        weights: the weights' file in a directory; "" for a format that is one file.
        endings: of the names of files that are written.
        others: shell patterns of further names of files that are read.
        backend: the framework that its programs belong to.
        program: a program that reads the format, for verification; "" for none.
    """

    name: str
    title: str
    module: str
    container: Container
    targets: tuple[str, ...]
    help: str = ""
    weights: str = ""
    endings: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    backend: BackendName = "torch"
    program: str = ""

    @property
    def code(self) -> Any:
        """Returns the format's module, imported when it is needed."""
        return import_module(f"conversion.formats.{self.module}")


# Of the same weights in several formats in a repository on the hub the first is taken: the safest and the quickest. A
# local directory with several is refused.
# fmt: off
FORMATS = (
    FormatSpec(
        name="safetensors", module="native", container="safetensors", targets=("native", "transformers"),
        weights="model.safetensors", program="safetensors",
        title="safetensors in PyTorch's layout (groupvit, transformers)",
        help="a directory with config.json and model.safetensors, for groupvit and transformers",
    ),
    FormatSpec(
        name="pytorch", module="pytorch", container="torch", targets=("pytorch",),
        weights="pytorch_model.bin", others=("pytorch_model_fsdp.bin", "*.pt", "*.ckpt"), program="torch.load",
        title="a pickled state dict of PyTorch (pytorch_model.bin)",
        help="a directory with pytorch_model.bin",
    ),
    FormatSpec(
        name="transformers-tf", module="transformers_tf", container="hdf5", targets=("transformers-tf",),
        weights="tf_model.h5", backend="tf",
        title="TensorFlow weights of transformers (tf_model.h5)",
        help="a directory with tf_model.h5, for transformers' TFGroupViTModel",
    ),
    FormatSpec(
        name="transformers-tf-safetensors", module="transformers_tf_safetensors", container="safetensors",
        targets=("transformers-tf-safetensors",), weights="model.safetensors", backend="tf",
        title="safetensors in TensorFlow's layout (transformers)",
        help="the same with model.safetensors",
    ),
    FormatSpec(
        name="keras", module="keras", container="keras", targets=("keras",),
        endings=(".keras",), backend="tf", program="keras.saving.load_model",
        title="a Keras model (.keras)",
        help="a file, NAME.keras or NAME.weights.h5",
    ),
    FormatSpec(
        name="keras-weights", module="keras_weights", container="hdf5", targets=("keras",),
        endings=(".weights.h5",), backend="tf", program="load_weights",
        title="the weights of a Keras model (.weights.h5)",
    ),
    FormatSpec(
        name="nvlabs", module="nvlabs", container="torch", targets=("nvlabs",),
        endings=(".pth",),
        title="the authors' own checkpoint (.pth)",
        help="a file, NAME.pth, for the authors' code",
    ),
    FormatSpec(
        name="savedmodel", module="saved_model", container="directory", targets=("savedmodel",),
        backend="tf",
        title="a TensorFlow SavedModel, which is a program: it runs, its weights cannot be taken out",
        help="a directory for TensorFlow Serving",
    ),
)
# fmt: on
TARGETS = tuple(dict.fromkeys(target for spec in FORMATS for target in spec.targets))
# File names of weights in directories.
WEIGHTS_NAMES = tuple(dict.fromkeys(spec.weights for spec in FORMATS if spec.weights))
# Endings of all names of files that are read, and of their indexes: a repository on the hub has no such name.
_NAMES = (name for spec in FORMATS for name in (spec.weights, *spec.endings, *spec.others) if name)
FILE_ENDINGS = tuple(dict.fromkeys((".json", *(f".{name.rpartition('.')[2]}" for name in _NAMES))))
# Files that are, or begin, a checkpoint; an index stands for its shards.
WEIGHTS = re.compile(
    "|".join(
        [rf"({'|'.join(map(re.escape, WEIGHTS_NAMES))})(\.index\.json)?"]
        + [rf".+{re.escape(ending)}" for spec in FORMATS for ending in spec.endings]
        + [re.escape(pattern).replace(r"\*", ".+") for spec in FORMATS for pattern in spec.others]
    )
)


def get_format(name: str) -> FormatSpec:
    """Returns the row of this name."""
    return next(spec for spec in FORMATS if spec.name == name)


def target_endings(target: str) -> tuple[str, ...]:
    """Returns the endings of the files that a value of `--to` writes; () where it writes a directory."""
    return tuple(ending for spec in FORMATS if target in spec.targets for ending in spec.endings)


def target_format(target: str, name: str) -> FormatSpec:
    """Returns the row that writes a file or directory of this name for a value of `--to`."""
    specs = [spec for spec in FORMATS if target in spec.targets]
    return next((spec for spec in specs if spec.endings and name.endswith(spec.endings)), specs[0])
