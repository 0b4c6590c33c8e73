"""Where a result goes: what may be replaced, and how the result gets its name only when it is whole."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conversion.checkpoint import COMPANIONS
from conversion.report import REPORT_NAME
from groupvit_common.checkpoint import CONFIG_NAME
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.files import flush

# What a directory may hold to be replaced: what `convert` writes into one, nothing else that somebody may miss.
_OWN = re.compile(
    r"(model\.safetensors|pytorch_model\.bin|tf_model\.h5)(\.index\.json)?"
    r"|(model|pytorch_model|tf_model)-\d{5}-of-\d{5}\.(safetensors|bin|h5)|"
    + "|".join(map(re.escape, (CONFIG_NAME, REPORT_NAME, *COMPANIONS)))
)
_OF_SAVED_MODEL = ("saved_model.pb", "fingerprint.pb", "keras_metadata.pb", "variables", "assets")


def check_destination(destination: Path, *, is_file: bool, overwrite: bool, to: str) -> None:
    """Refuses a destination that cannot be written, or holds what may not be replaced.

    Raises:
        CheckpointError: it is there, and `overwrite` is not given; or it cannot be looked at.
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
    others = [name for name in names if not _OWN.fullmatch(name) and name not in known]
    if others:
        raise InputError(
            f"{destination} holds what no conversion writes ({', '.join(others[:5])}{', ...' if len(others) > 5 else ''}), "
            "and would be replaced as a whole; choose another directory"
        )


@contextmanager
def replacement(destination: Path, suffix: str = "") -> Iterator[Path]:
    """A hidden path beside `destination` to write to, which gets that name when the block ends without an exception; what had the
    name before is lost only then. With an exception nothing is left, nor any folder that was made.

    Args:
        suffix: of the hidden name, for writers that go by it.

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
    """Why something could not be written, in a line; HDF5's library wraps the system's words into many of its own."""
    found = re.search(r"error message = '([^']+)'", str(error))
    return found[1] if found else error.strerror or (str(error).splitlines() or [""])[0]


def _put(new: Path, destination: Path) -> None:
    if not destination.is_dir():
        new.replace(destination)
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


def remove(path: Path) -> None:
    """Removes a file or a directory if it is there; what cannot be removed stays."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
