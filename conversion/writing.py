"""The writing of a result: the checkpoint's values as a format needs them, and directories of transformers' form."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from conversion.checkpoint import Checkpoint
from conversion.names import EXTRA, Entry, Naming, entries
from conversion.source import Info
from groupvit_common.checkpoints.directory import CONFIG_NAME, index_text, plan_shards
from groupvit_common.model.config import checkpoint_config_text
from groupvit_common.storage.saving import write_text


class Job:
    """One result to be written.

    Args:
        checkpoint: the source.
        max_shard_size: see `groupvit_common.checkpoints.directory.plan_shards`.
        companions: files of the tokenizer and the image processor that are copied along.
        progress: called with the bytes written so far and the bytes of all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        max_shard_size: int | str = "5GB",
        companions: Sequence[Path] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.checkpoint, self.max_shard_size = checkpoint, max_shard_size
        self.companions, self.progress = companions, progress
        self.total = sum(info.nbytes for info in checkpoint.tensors.values())
        self.done = 0

    def value(self, name: str) -> np.ndarray:
        """Returns a tensor by its canonical name, and counts it as written."""
        array = self.checkpoint.value(name)
        self.done += array.nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)
        return array

    def entries(self, naming: Naming) -> list[Entry]:
        """Returns the tensors to be written under the names of a format."""
        return entries(naming, self.checkpoint.config, EXTRA in self.checkpoint.tensors)

    def info(self, entry: Entry) -> Info:
        """Returns shape and dtype of a foreign tensor."""
        return Info(entry.shape, self.checkpoint.tensors[entry.parameters[0].name].dtype)

    def config_text(self) -> str:
        """Returns the text of `config.json`."""
        return checkpoint_config_text(self.checkpoint.config, "GroupViTModel", self.checkpoint.dtype)


def write_sharded(
    job: Job,
    directory: Path,
    weights_name: str,
    sizes: Mapping[str, int],
    write: Callable[[Path, list[str]], None],
    full_name: Callable[[str], str] = str,
) -> None:
    """Writes a directory: weights in as many files as they need, an index of several, the configuration and companions.

    Args:
        sizes: name -> bytes.
        write: writes a file with the tensors of these names.
        full_name: tensor's name -> its name in the index.
    """
    directory.mkdir()
    shards = plan_shards(sizes, job.max_shard_size, weights_name)
    for shard in shards:
        write(directory / shard.file_name, shard.tensors)
    if len(shards) > 1:
        named = [shard._replace(tensors=[full_name(name) for name in shard.tensors]) for shard in shards]
        write_text(directory / f"{weights_name}.index.json", index_text(named, sum(sizes.values())))
    write_text(directory / CONFIG_NAME, job.config_text())
    for path in job.companions:
        shutil.copyfile(path, directory / path.name)
