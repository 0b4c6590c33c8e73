"""Conversion of a checkpoint from any format to any other.

`Checkpoint` is the canonical view between the two formats. A result appears under its name when it is complete, not
before.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conversion.checkpoint import COMPANIONS, Checkpoint, opened_source, read
from conversion.destination import check_destination, replacement, target_of
from conversion.registry import FormatSpec, target_format
from conversion.report import REPORT_NAME, report_path, report_text
from conversion.verify import Verification
from conversion.verify import verify as compare
from conversion.writing import Job
from groupvit_common.checkpoints import hub
from groupvit_common.checkpoints.directory import parse_size
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.storage.names import list_files
from groupvit_common.storage.saving import write_text


@dataclass
class Conversion:
    """The result of a conversion.

    Attributes:
        source_format, format: names in `conversion.registry.FORMATS`.
        target: the value of `--to`.
        files: those written.
        report: `conversion_report.json`, which is one of `files` where the result is a directory.
        verification: None if there was none.
        address: of the commit on the hub, if it was sent there.
        notes: for the user, a sentence each.
    """

    source: Path
    source_format: str
    destination: Path
    format: str
    target: str
    files: list[Path]
    report: Path
    verification: Verification | None = None
    address: str | None = None
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    destination: str | Path,
    to: str | None = None,
    *,
    config: GroupViTConfig | str | Path | None = None,
    revision: str | None = None,
    key: str | None = None,
    dtype: str | None = None,
    verify: bool = True,
    max_shard_size: int | str | None = None,
    processor: str | Path | None = None,
    push: str | None = None,
    overwrite: bool = False,
    allow_missing: Iterable[str] = (),
    opened: Callable[[Checkpoint], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes the checkpoint `source` as another format, with a report (`conversion_report.json`).

    Args:
        source, config, revision, key, dtype, allow_missing: see `conversion.checkpoint.read`.
        destination: a directory for "native" (and "transformers", which is the same), "transformers-tf",
            "transformers-tf-safetensors", "pytorch" and "savedmodel"; a file for "nvlabs" (.pth) and "keras" (.keras or
            .weights.h5).
        to: one of `conversion.registry.TARGETS`; None: by the destination's ending, a directory ("native") where it has
            none.
        verify: compare the result with the source before it gets its name, see `conversion.verify.verify`. A result
            that is not the same model is an error, and is not kept.
        max_shard_size: of the formats of transformers: bytes, or "200MB"; 5 GB if None.
        processor: the directory, or "org/name" on the hub, whose tokenizer and image processor go along, instead of
            those beside the source. Only directories hold them.
        push: "org/name" on the hub, to which the result is sent too.
        overwrite: whether what is at the destination may be replaced. It is until the new one is complete.
        opened: called with the source when its format is known.
        progress: called with the bytes written so far and the bytes of all.

    Raises:
        CheckpointError: see `read`; or the destination cannot be written, or is there and `overwrite` is not given; or
            the result is not the same model, or cannot be sent to the hub.
        InputError: an argument is invalid, or the target format has no such model.
    """
    by_ending, to = to is None, target_of(destination, to)
    destination, allow_missing = Path(destination), list(allow_missing)
    spec = target_format(to, destination.name)
    _check_arguments(to, spec, dtype, max_shard_size, processor)
    check_destination(destination, is_file=bool(spec.endings), overwrite=overwrite, to=to)
    with opened_source(source, revision, config=config, key=key) as found:
        checkpoint = read(found, config=config, dtype=dtype, allow_missing=allow_missing)
        if any(destination.resolve() in (file.resolve(), *file.resolve().parents) for file in found.files):
            raise InputError(f"{destination} holds the source itself; write to another place")
        if opened is not None:
            opened(checkpoint)
        result = Conversion(found.path, found.format, destination, spec.name, to, [], destination)
        result.notes = _notes(checkpoint)
        companions: list[Path] = []
        if spec.weights:
            companions, note = _companions(checkpoint, processor)
            result.notes.append(note)
        job = Job(checkpoint, "5GB" if max_shard_size is None else max_shard_size, companions, progress)
        # Keras knows its files by their endings.
        with replacement(destination, next((end for end in spec.endings if destination.name.endswith(end)), "")) as new:
            try:
                spec.code.write(job, new)
            except InputError as error:
                if not (by_ending and spec.endings):
                    raise
                raise InputError(
                    f"{error}; {destination.name} has that format's ending: name a directory for safetensors"
                ) from error
            if verify:
                result.verification = _verified(checkpoint, new, destination, allow_missing)
            text = report_text(checkpoint, new, destination, to, result.verification, result.notes)
            if not spec.endings:
                write_text(new / REPORT_NAME, text)
    result.report = report_path(destination) if spec.endings else destination / REPORT_NAME
    if spec.endings:
        try:
            write_text(result.report, text)
        except OSError as error:
            raise CheckpointError(
                f"{destination} is complete, but {result.report} cannot be written: {error}"
            ) from error
        result.files = [destination]
    else:
        result.files = [destination / name for name in list_files(destination, folders=True)]
    if push is not None:
        result.address = _push(result, push)
    return result


def _check_arguments(
    to: str, spec: FormatSpec, dtype: str | None, max_shard_size: int | str | None, processor: str | Path | None
) -> None:
    if max_shard_size is not None:
        parse_size(max_shard_size)
        if not spec.weights:
            raise InputError(f"{to} is never in shards: leave max_shard_size (--max-shard-size) out")
    if to == "savedmodel" and dtype not in (None, "float32"):
        raise InputError(f"a SavedModel computes in float32: leave dtype (--dtype) {dtype} out")
    if processor is not None and not spec.weights:
        raise InputError(f"{to} has no place for a tokenizer and an image processor: leave processor (--processor) out")


def _verified(checkpoint: Checkpoint, new: Path, destination: Path, allow_missing: Sequence[str]) -> Verification:
    # As stored: the effect of another dtype is reported, not judged.
    before = read(checkpoint.source, config=checkpoint.config, allow_missing=allow_missing)
    # With the configuration that was written, not the one that is known.
    verification = compare(before, new)
    verification.b = str(destination)
    verification.notes = [note.replace(str(new), str(destination)) for note in verification.notes]
    if not verification.passed:
        raise CheckpointError(
            "the result is not the same model as its source, and was not kept (without verification, --no-verify, it "
            "is): " + "; ".join(line.strip() for line in verification.lines())
        )
    return verification


def _companions(checkpoint: Checkpoint, processor: str | Path | None) -> tuple[list[Path], str]:
    """Returns the files of the tokenizer and the image processor that go along, and a note about them."""
    directory = checkpoint.source.files[0].parent
    if processor is not None:
        directory = hub.resolve(processor, patterns=COMPANIONS)
    found = [directory / name for name in COMPANIONS if (directory / name).is_file()]
    if not found:
        return [], (
            "there is no tokenizer and no image processor beside the source, which texts and images need: pass "
            "processor (--processor), a directory or a name on the hub"
        )
    note = f"with it: {', '.join(path.name for path in found)}"
    try:
        tokens = len(GroupViTProcessor.from_pretrained(directory).tokenizer)
        known = checkpoint.config.text_config.vocab_size
        if tokens > known:
            raise InputError(f"the tokenizer in {directory} has {tokens} tokens, and the model knows {known}")
    except (CheckpointError, InputError) as error:
        if processor is not None:
            raise
        note += f", which cannot be used as they are: {error}"
    return found, note


def _push(result: Conversion, repository: str) -> str:
    """Sends the result to the hub; returns the address of the commit."""
    message = f"Upload {result.target} weights, converted from {result.source_format}"
    try:
        if result.destination.is_dir():
            return hub.push(result.destination, repository, commit_message=message, folders=True)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / result.destination.name).symlink_to(result.destination.resolve())
            (Path(folder) / REPORT_NAME).symlink_to(result.report.resolve())
            return hub.push(folder, repository, commit_message=message)
    except CheckpointError as error:
        raise CheckpointError(f"{result.destination} is complete, but {error}") from error


def _notes(checkpoint: Checkpoint) -> list[str]:
    counters = [name for name in checkpoint.filled if name.endswith(".num_batches_tracked")]
    others = [name for name in checkpoint.filled if name not in counters]
    notes = [*checkpoint.source.choice.notes]
    notes += [f"{name} was missing and has a default value now" for name in others]
    if counters:
        notes.append("the source counts no batches of its batch norms: the counters are 0, which changes no output")
    return notes
