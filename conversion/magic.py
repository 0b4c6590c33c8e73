"""Recognition of a weights file by its first bytes, and of files that are no weights."""

import os
from pathlib import Path

from conversion.registry import Container
from groupvit_common.checkpoints.safetensors_file import describe_impostor
from groupvit_common.errors import CheckpointError

# A pickled long integer, with which PyTorch before 1.6 begins its files: 0x1950a86a20f9469cfc6c.
_TORCH_LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"


def container(path: Path) -> Container:
    """Returns the container of the weights file `path`, by its first bytes alone.

    Raises:
        CheckpointError: the file cannot be read, is empty, or holds no weights; names the file and the cause.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(512)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not start:
        raise CheckpointError(f"{path} is empty (0 bytes); download or copy it again")
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if start[:1] == b"\x80" and start[2:14] == _TORCH_LEGACY:
        return "torch-legacy"
    # A header's length may begin with any byte; the header itself is a JSON object.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < max(size, 1 << 32):
        return "safetensors"
    if (meaning := describe_impostor(start)) is not None:
        raise CheckpointError(f"{path} is {meaning}")
    if not start.strip(b"\0"):
        raise CheckpointError(f"{path} begins with zeros: the download or copy did not finish; do it again")
    if start[:1] == b"\x80" or start.startswith(b"(d"):
        raise CheckpointError(f"{path} is a Python pickle, but none that torch.save wrote")
    if all(32 <= byte < 127 or byte in b"\r\n\t" for byte in start):
        raise CheckpointError(f"{path} is a text, not weights; it begins with {start[:40].decode('ascii')!r}")
    raise CheckpointError(
        f"{path} is no weights file that is known here (safetensors, PyTorch, HDF5, Keras), or it is damaged: "
        f"it begins with {start[:8].hex(' ')}"
    )
