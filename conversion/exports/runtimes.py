"""Exported files in the programs that they are for: named NumPy arrays in and out.

Each function opens a file and returns a function of its inputs. A package that is missing is told by `check_installed`
beforehand.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from conversion.exports.formats import BackendName, ExportFormat
from groupvit_common.errors import InputError
from groupvit_common.tensorflow_logging import litert_start_up, set_environment

Arrays = dict[str, np.ndarray]
Runner = Callable[[Mapping[str, np.ndarray]], Arrays]

_BACKENDS = {"torch": "torch", "tf": "tensorflow"}


def check_installed(row: ExportFormat) -> None:
    """Raises `InputError` where a package that writes or runs the format is missing."""
    if importlib.util.find_spec(_BACKENDS[row.backend]) is None:
        raise InputError(f'{row.name} is written by the other backend: pip install "groupvit[{row.backend}]"')
    missing = [name for name in row.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'{row.name} needs {", ".join(missing)}: pip install "groupvit[{row.extra}]"')


def open_file(row: ExportFormat, path: Path, threads: int | None = None) -> tuple[Runner, dict[str, Any]]:
    """Returns a function that runs a file, and what the file says of itself.

    Args:
        threads: of a call; None: the runtime's default. PyTorch and TensorFlow have one number for the process, see
            `set_threads`. An AOTInductor package has the number of when it was compiled.

    Raises:
        InputError: see `set_threads`.
    """
    if threads is not None and row.runtime in ("torch", "AOTInductor", "TensorFlow"):
        set_threads(row.backend, threads)
    run, metadata = _OPEN[row.name](path, threads)
    return (run if row.backend == "torch" else _with_int32(run)), metadata


def set_threads(backend: BackendName, threads: int) -> None:
    """Sets the number of threads of a framework, for the process.

    Raises:
        InputError: TensorFlow has computed already, with another number.
    """
    if backend == "torch":
        import torch

        torch.set_num_threads(threads)
        return
    # It starts TensorFlow without its noise.
    importlib.import_module("groupvit_tf")
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
    except RuntimeError as error:
        raise InputError(
            f"TensorFlow runs already and keeps its number of threads, got {threads}: set it in a new process"
        ) from error


def _with_int32(file: Runner) -> Runner:
    """Gives a file token ids in the dtype that it takes."""

    def run(inputs: Mapping[str, np.ndarray]) -> Arrays:
        return file({k: v.astype(np.int32) if v.dtype == np.int64 else v for k, v in inputs.items()})

    return run


def _onnx(path: Path, threads: int | None) -> tuple[Runner, dict[str, Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]

    def run(inputs: Mapping[str, np.ndarray]) -> Arrays:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return run, json.loads(session.get_modelmeta().custom_metadata_map["groupvit"])


def _openvino(path: Path, threads: int | None) -> tuple[Runner, dict[str, Any]]:
    import openvino

    model = openvino.Core().read_model(str(path))
    # In the precision of the source: CPUs that can would compute in bfloat16.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads or 0}
    compiled = openvino.compile_model(model, "CPU", options)

    def run(inputs: Mapping[str, np.ndarray]) -> Arrays:
        found = compiled(dict(inputs))
        # A tensor that is two outputs has two names.
        return {name: np.asarray(found[port]) for port in compiled.outputs for name in port.get_names()}

    return run, json.loads(model.get_rt_info(["groupvit"]).value)


def _torch_export(path: Path, threads: int | None) -> tuple[Runner, dict[str, Any]]:
    import torch

    extra = {"groupvit": ""}
    module = torch.export.load(path, extra_files=extra).module()
    return _of_tensors(module), json.loads(extra["groupvit"])


def _aoti(path: Path, threads: int | None) -> tuple[Runner, dict[str, Any]]:
    from torch._inductor import aoti_load_package

    package = aoti_load_package(str(path))
    return _of_tensors(package), json.loads(package.get_metadata()["groupvit"])


def _of_tensors(module: Callable[..., Any]) -> Runner:
    import torch

    def run(inputs: Mapping[str, np.ndarray]) -> Arrays:
        with torch.no_grad():
            found = module(**{name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in found.items()}

    return run


def _saved_model(path: Path, threads: int | None) -> tuple[Runner, dict[str, Any]]:
    set_environment()
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    serve = loaded.signatures["serving_default"]

    def run(inputs: Mapping[str, np.ndarray]) -> Arrays:
        found = serve(**{name: tf.constant(value) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in found.items()}

    # TensorFlow keeps the interpreter's objects alive only with what they came from.
    run.loaded = loaded  # type: ignore[attr-defined]
    return run, json.loads((path / "assets.extra" / "groupvit.json").read_text(encoding="utf-8"))


def _litert(path: Path, threads: int | None) -> tuple[Runner, dict[str, Any]]:
    interpreter_module = importlib.import_module("ai_edge_litert.interpreter")
    interpreter = interpreter_module.Interpreter(model_path=str(path), num_threads=threads)
    signature = interpreter.get_signature_runner()
    # The first call chooses kernels, and says so.
    start = iter([litert_start_up()])

    def run(inputs: Mapping[str, np.ndarray]) -> Arrays:
        with next(start, nullcontext()):
            return dict(signature(**inputs))

    with zipfile.ZipFile(path) as archive:
        return run, json.loads(archive.read("groupvit.json"))


_OPEN: dict[str, Callable[[Path, int | None], tuple[Runner, dict[str, Any]]]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "torch-export": _torch_export,
    "aoti": _aoti,
    "savedmodel": _saved_model,
    "litert": _litert,
}
