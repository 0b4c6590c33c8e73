"""Pickled state dicts of PyTorch in canonical names: `pytorch_model.bin`, shards, files of training programs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from conversion.checkpoint import Checkpoint
from conversion.formats import nvlabs
from conversion.formats.native import tensor_array
from conversion.names import CANONICAL
from conversion.source import Files, Opened, Source, parse_config
from conversion.torch_states import plain, read_states, settings_of
from conversion.torch_writer import write_torch_file
from conversion.writing import Job, write_sharded
from groupvit_common.model.config import GroupViTConfig

NAMING = CANONICAL


def detect(files: Files) -> bool:
    """Returns whether files of `torch.save` hold anything except the authors' checkpoint."""
    return not nvlabs.detect(files)


def read(files: Files) -> Opened:
    """Reads the tensors, and the configuration where it is beside the state dict."""

    def config(source: Source) -> GroupViTConfig | None:
        written = plain(settings_of(files).get("config"))
        known = isinstance(written, dict) and written.get("model_type") == "groupvit"
        return parse_config(written, files.main) if known else None

    return read_states(files, NAMING)._replace(config=config)


def write(job: Job, directory: Path) -> None:
    """Writes a directory with `pytorch_model.bin` or shards."""
    infos = job.checkpoint.tensors

    def write_file(path: Path, names: list[str]) -> None:
        write_torch_file(path, lambda state: state, {name: infos[name] for name in names}, job.value)

    write_sharded(job, directory, "pytorch_model.bin", {name: info.nbytes for name, info in infos.items()}, write_file)


def program_values(checkpoint: Checkpoint) -> Callable[[str], np.ndarray]:
    """Returns the values as `torch.load` reads them."""
    import torch

    state: dict[str, Any] = {}
    for path in checkpoint.source.files:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for key in checkpoint.source.choice.at:
            content = content[key]
        state |= content
    stored = checkpoint.source.choice.names
    return lambda name: tensor_array(state[stored[name]]) if stored.get(name) in state else checkpoint.value(name)
