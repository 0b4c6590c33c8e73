"""TensorFlow weights of transformers in `model.safetensors`, or shards, with the metadata `format: tf`."""

from pathlib import Path

from conversion.formats import transformers_tf
from conversion.formats.native import has_tensorflow_layout, read_pieces
from conversion.names import from_parts
from conversion.source import Files, Opened, scalar_text
from conversion.writing import Job, write_sharded
from groupvit_common.checkpoints.directory import WEIGHTS_NAME
from groupvit_common.checkpoints.safetensors_file import array_info, write_arrays

NAMING = transformers_tf.NAMING


def detect(files: Files) -> bool:
    """Returns whether files of safetensors have TensorFlow's layout."""
    return has_tensorflow_layout(files)


def read(files: Files) -> Opened:
    """Reads the headers of files in TensorFlow's layout."""
    return Opened(read_pieces(files, transformers_tf.short_name))


def write(job: Job, directory: Path) -> None:
    """Writes a directory with `model.safetensors` or shards."""
    weights, others = transformers_tf.split_tensors(job)
    infos = {name: job.info(entry) for name, entry in weights.items()}
    last = list(weights)[-1]

    def write_file(path: Path, names: list[str]) -> None:
        metadata = {"format": "tf"}
        if last in names:
            metadata |= {name: scalar_text(value) for name, value in others.items()}
        tensors = {name: array_info(*infos[name]) for name in names}
        write_arrays(path, tensors, lambda name: from_parts(weights[name], job.value), metadata)

    write_sharded(
        job, directory, WEIGHTS_NAME, {name: info.nbytes for name, info in infos.items()}, write_file,
        transformers_tf.full_name,
    )  # fmt: skip
