"""The formats of exported models, a row each. Only the standard library is imported here: the command line lists them.

A new format is a row of `FORMATS`, a function in its backend's `export.py`, and one in `conversion.exports.runtimes`.
"""

from dataclasses import dataclass
from typing import Literal

BackendName = Literal["torch", "tf"]


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """A format.

    Attributes:
        name: the value of `--to`.
        title: for people.
        suffix: of each part's file; "" for a folder.
        beside: suffixes of further files of a part.
        backend: which writes it.
        packages: modules that must be installed, besides the backend's, and the extra that installs them.
        dtypes: what `--dtype` may be.
        dynamic: what may differ from call to call; the rest is as in the configuration.
        runtime: which runs it here.
    """

    name: str
    title: str
    suffix: str
    backend: BackendName
    runtime: str
    beside: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    extra: str = ""
    dtypes: tuple[str, ...] = ("float32",)
    dynamic: tuple[str, ...] = ("B", "N", "T", "L", "H", "W")


# fmt: off
FORMATS = (
    ExportFormat(
        name="onnx", title="ONNX", suffix=".onnx", backend="torch", runtime="onnxruntime",
        packages=("onnx", "onnxscript", "onnxruntime"), extra="onnx", dtypes=("float32", "float16", "int8"),
    ),
    ExportFormat(
        name="openvino", title="OpenVINO IR", suffix=".xml", beside=(".bin",), backend="torch", runtime="openvino",
        packages=("onnx", "onnxscript", "openvino"), extra="openvino", dtypes=("float32", "float16"),
    ),
    ExportFormat(
        name="torch-export", title="a torch.export program", suffix=".pt2", backend="torch", runtime="torch",
        dtypes=("float32", "float16"),
    ),
    ExportFormat(
        name="aoti", title="an AOTInductor package, compiled for this machine", suffix=".pt2", backend="torch",
        runtime="AOTInductor",
    ),
    ExportFormat(
        name="savedmodel", title="a TensorFlow SavedModel", suffix="", backend="tf", runtime="TensorFlow",
    ),
    ExportFormat(
        name="litert", title="LiteRT (TensorFlow Lite)", suffix=".tflite", backend="tf", runtime="LiteRT",
        dtypes=("float32", "float16", "int8"), packages=("ai_edge_litert",), extra="litert",
    ),
)
# fmt: on


def get_format(name: str) -> ExportFormat:
    """Returns the row of this name."""
    return next(row for row in FORMATS if row.name == name)
