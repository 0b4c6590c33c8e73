"""The report of a conversion: source and result, versions of programs, every file's hash, and the comparison."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from conversion.checkpoint import Checkpoint
from conversion.verify import Verification
from groupvit_common.errors import CheckpointError
from groupvit_common.storage.json_text import read_json
from groupvit_common.storage.names import list_files

REPORT_NAME = "conversion_report.json"
_PACKAGES = ("groupvit", "numpy", "h5py", "ml_dtypes", "safetensors", "torch", "tensorflow", "keras",
             "onnx", "onnxruntime", "openvino", "ai_edge_litert")  # fmt: skip


def report_path(file: Path) -> Path:
    """Returns the path of the report about a file: `conversion_report.json` beside it, or FILE.conversion_report.json
    where another file's report has that name."""
    path = file.parent / REPORT_NAME
    if not path.exists():
        return path
    try:
        about = read_json(path)["result"]["path"]
    except (CheckpointError, KeyError, TypeError):
        about = None
    return path if about == file.name else file.with_name(f"{file.name}.{REPORT_NAME}")


def report_text(
    checkpoint: Checkpoint,
    written: Path,
    destination: Path,
    to: str,
    verification: Verification | None,
    notes: list[str],
) -> str:
    """Returns the report as JSON.

    Args:
        written: the result's present path.
        destination: its final path.
    """
    source = checkpoint.source
    names = list_files(written, folders=True) if written.is_dir() else [written.name]
    files = {name: written / name for name in names} if written.is_dir() else {destination.name: written}
    content = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "source": {
            "path": source.path.name,
            "format": source.format,
            "files": {file.name: file_entry(file) for file in source.files},
        },
        "result": {
            "path": destination.name,
            "format": to,
            "dtype": checkpoint.dtype,
            "parameters": checkpoint.num_parameters(),
            "files": {name: file_entry(file) for name, file in files.items()},
        },
        "config": checkpoint.config.to_dict(),
        "notes": notes,
        "verification": None if verification is None else verification.to_dict(),
        "versions": {"python": platform.python_version()} | versions(),
    }
    # JSON has no infinity.
    return json.dumps(_finite(content), indent=2) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value


def file_entry(path: Path) -> dict[str, Any]:
    """Returns a file's size and hash."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def versions() -> dict[str, str]:
    """Returns the versions of the packages that have a part in results, of those that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
