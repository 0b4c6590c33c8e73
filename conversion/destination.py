"""The destination of a result: what may be replaced, and a result that gets its name only when it is whole."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conversion.checkpoint import COMPANIONS
from conversion.registry import FORMATS, TARGETS, WEIGHTS_NAMES, target_endings
from conversion.report import REPORT_NAME
from groupvit_common.checkpoints.directory import CONFIG_NAME
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.storage.saving import flush, weights_pattern

# What a directory may hold to be replaced: what `convert` writes into one, nothing else that somebody may miss.
_OWN = re.compile(
    "|".join(
        [weights_pattern(name) for name in WEIGHTS_NAMES]
        + [re.escape(name) for name in (CONFIG_NAME, REPORT_NAME, *COMPANIONS)]
    )
)
# Endings of files of models and archives, which no directory has on purpose. Other endings ("v1.5") are part of a name.
_FILE_ENDINGS = re.compile(
    r"\.(pth|pt|pt2|pte|ptl|th|ckpt|bin|safetensors|h5|hdf5|he5|keras|onnx|tflite|pb|pbtxt|msgpack|pkl|pickle|joblib|npz|npy|"
    r"mat|json|jsonl|toml|yaml|yml|xml|csv|txt|gguf|ggml|mlmodel|mlpackage|mlmodelc|engine|plan|trt|torchscript|mar|params|"
    r"pdparams|pdiparams|weights|caffemodel|zip|tar|gz|tgz|bz2|xz|zst|7z|rar|jpg|jpeg|png|index|data)",
    re.IGNORECASE,
)
_KERAS_INSTEAD = (
    "Keras's weights end in .weights.h5, and transformers-tf (--to transformers-tf) writes tf_model.h5 into a directory"
)
_PYTORCH_INSTEAD = (
    "the authors' format ends in .pth, and pytorch (--to pytorch) writes pytorch_model.bin into a directory"
)
# The advice for endings whose formats are directories here.
_INSTEAD = {
    ".safetensors": "native writes model.safetensors into a directory",
    ".bin": "pytorch (--to pytorch) writes pytorch_model.bin into a directory",
    ".h5": _KERAS_INSTEAD,
    ".hdf5": _KERAS_INSTEAD,
    ".pt": _PYTORCH_INSTEAD,
    ".ckpt": _PYTORCH_INSTEAD,
    ".pb": "savedmodel (--to savedmodel) writes a directory",
}
_OF_SAVED_MODEL = ("saved_model.pb", "fingerprint.pb", "keras_metadata.pb", "variables", "assets")


def target_of(destination: str | Path, to: str | None) -> str:
    """Returns the format to write, one of `TARGETS`: `to`, or the one of the destination's ending.

    A directory has a name without an ending of model files, or one that ends in a slash, or is there already.

    Raises:
        InputError: no format that is written has such a name, or another format than `to`.
    """
    if to is not None and to not in TARGETS:
        raise InputError(f"a checkpoint is converted to one of {', '.join(TARGETS)}, got {to!r}")
    name = Path(destination).name
    by_ending = next((spec.targets[0] for spec in FORMATS if spec.endings and name.endswith(spec.endings)), None)
    if to is not None and (ends := target_endings(to)):
        if by_ending != to:
            raise InputError(f"{to} is a file: give it a name that ends in {' or '.join(ends)}, not {name!r}")
        return to
    ending = Path(name).suffix
    if (
        str(destination).endswith(("/", os.sep))
        or _is_directory(Path(destination))
        or not _FILE_ENDINGS.fullmatch(ending)
    ):
        return to or "native"
    if to is None and by_ending is not None:
        return by_ending
    if to is not None:
        raise InputError(
            f"{to} is a directory, and {name!r} ends as a file does: give it another name"
            + (f", or leave {to} (--to) out for {by_ending}" if by_ending is not None else "")
        )
    instead = _INSTEAD.get(ending.lower())
    raise InputError(
        f"no format that is written here ends in {ending}"
        + (f": {instead}" if instead else "")
        + "; name a directory, or a file that ends in "
        + ", ".join(end for spec in FORMATS for end in spec.endings)
    )


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def check_is_folder(destination: Path, to: str) -> None:
    """Raises `InputError` for a name that ends as files of models do, of a folder that is not there."""
    if _FILE_ENDINGS.fullmatch(destination.suffix) and not _is_directory(destination):
        raise InputError(f"{to} is written as a folder, and {destination.name!r} ends as a file does: name a folder")


def check_destination(
    destination: Path, *, is_file: bool, overwrite: bool, to: str, own: re.Pattern[str] = _OWN, by: str = "conversion"
) -> None:
    """Refuses a destination that cannot be written, or that holds files which must not be replaced.

    own: names of files that a result of this kind has; by: what writes them.

    Raises:
        CheckpointError: it is there, and `overwrite` is not given; or it cannot be read.
        InputError: `overwrite` would not replace a checkpoint.
    """
    try:
        link, there, directory = destination.is_symlink(), destination.exists(), destination.is_dir()
        names = sorted(item.name for item in destination.iterdir()) if directory else []
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error.strerror or error}") from error
    if not (link or there):
        return
    if not overwrite:
        raise CheckpointError(f"{destination} is there already; pass overwrite (--overwrite) to replace it")
    if link:
        raise InputError(f"{destination} is a symbolic link, which is not replaced; name what it points to")
    if directory == is_file:
        kinds = ("a file", "a directory") if is_file else ("a directory", "a file")
        raise InputError(f"{to} is {kinds[0]}, and {destination} is {kinds[1]}")
    known = _OF_SAVED_MODEL if "saved_model.pb" in names else ()
    others = [name for name in names if not own.fullmatch(name) and name not in known]
    if others:
        raise InputError(
            f"{destination} holds what no {by} writes "
            f"({', '.join(others[:5])}{', ...' if len(others) > 5 else ''}), "
            "and would be replaced as a whole; choose another directory"
        )


@contextmanager
def replacement(destination: Path, suffix: str = "") -> Iterator[Path]:
    """Yields a hidden path beside `destination`, which gets that name when the block ends without an exception.

    What had the name before is lost only then. After an exception nothing is left, not even a folder that was made.

    Args:
        suffix: of the hidden name, for writers that depend on it.

    Raises:
        CheckpointError: it cannot be written.
    """
    new = destination.parent / f".{destination.name}.{secrets.token_hex(4)}{suffix}"
    made: list[Path] = []
    done = False
    try:
        made = [folder for folder in (destination.parent, *destination.parent.parents) if not folder.exists()]
        destination.parent.mkdir(parents=True, exist_ok=True)
        yield new
        # On the disk before the name is given: a power failure must not leave a whole name on half a file.
        for path in (*(new.rglob("*") if new.is_dir() else ()), new):
            flush(path)
        _put(new, destination)
        flush(destination.parent)
        done = True
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {reason(error)}") from error
    finally:
        remove(new)
        if not done:
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()


def reason(error: OSError) -> str:
    """Returns the cause of a failed write in a line; HDF5's library wraps the system's message into many lines."""
    found = re.search(r"error message = '([^']+)'", str(error))
    return found[1] if found else error.strerror or (str(error).splitlines() or [""])[0]


def _put(new: Path, destination: Path) -> None:
    if not destination.is_dir():
        new.replace(destination)
        return
    if _exchanged(new, destination):
        # The old one has the hidden name now, and is removed with it.
        return
    old = new.with_name(f"{new.name}.old")
    destination.rename(old)
    try:
        new.rename(destination)
    except BaseException:
        # Also an interruption between the two.
        old.rename(destination)
        raise
    remove(old)


def _exchanged(one: Path, other: Path) -> bool:
    """Swaps the names of two directories at once, so that each has one at any moment; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux's, or an old one; Windows
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(exchange)) == 0)


def remove(path: Path) -> None:
    """Removes a file or a directory if it is there; what cannot be removed stays."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
