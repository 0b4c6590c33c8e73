"""Export of a model from any checkpoint to files for other runtimes, each proved against the model."""

from __future__ import annotations

import errno
import importlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from conversion.checkpoint import MODEL_CARD, Checkpoint, Values, opened_source, read
from conversion.destination import check_destination, check_is_folder, replacement
from conversion.exports.agreement import Agreement, compare
from conversion.exports.formats import FORMATS, BackendName, ExportFormat, get_format
from conversion.exports.runtimes import Arrays, Runner, check_installed, open_file
from conversion.report import file_entry, versions
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.preprocessing.processor import GroupViTProcessor, check_fit, missing_parts
from groupvit_common.preprocessing.prompts import Label
from groupvit_common.segmentation.options import SegmentationOptions
from groupvit_common.segmentation.parts import (
    LABEL_OPTIONS,
    PARTS,
    Part,
    ProgramSettings,
    check_image_processor,
    check_program_options,
    parse_parts,
)
from groupvit_common.segmentation.preparation import Preparation
from groupvit_common.storage.names import list_files
from groupvit_common.storage.saving import write_text

REPORT_NAME = "export_report.json"
_OWN = re.compile(rf"({'|'.join(part.name for part in PARTS.values())})(\.\w+)?|{re.escape(REPORT_NAME)}")


@dataclass
class Export:
    """The result of an export.

    Attributes:
        files: of each part; report: `export_report.json`.
        agreements: empty if nothing was verified.
        notes: for the user, a sentence each.
    """

    source: Path
    destination: Path
    format: str
    files: dict[str, Path] = field(default_factory=dict)
    agreements: list[Agreement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def report(self) -> Path:
        return self.destination / REPORT_NAME


def export(
    source: str | Path,
    destination: str | Path,
    to: str,
    *,
    parts: str | Sequence[str] = tuple(PARTS),
    dtype: str = "float32",
    labels: str | Iterable[str | Label] | None = None,
    background_labels: str | Iterable[str | Label] = (),
    preprocess: bool = False,
    config: GroupViTConfig | str | Path | None = None,
    processor: str | Path | None = None,
    revision: str | None = None,
    key: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    written: Callable[[str, Path, list[Agreement]], None] | None = None,
    **options: Any,
) -> Export:
    """Writes a folder with a file for each part of a model, and `export_report.json`.

    Args:
        source, config, revision, key: see `conversion.checkpoint.read`.
        destination: the folder. It appears when it is whole.
        to: a name in `conversion.exports.formats.FORMATS`.
        parts: some of image, text, segment.
        dtype: of the weights: float32, float16 or int8, as far as the format has it. Inputs and outputs are float32.
        labels, background_labels: put into the segmenter, which then has no input for texts.
        preprocess: the image encoder and the segmenter take images as they are, RGB, uint8 `[B, H, W, 3]` of any size,
            instead of `pixel_values`, and resize and normalise them as `Segmenter` does. Maps have the images' sizes.
        processor: the directory, or "org/name" on the hub, of the tokenizer for `labels` and the image processor for
            `preprocess`; None: those beside the source.
        verify: run each file in its own runtime, on images of three sizes; one that is not the model is an error.
        overwrite: whether an export that is at the destination may be replaced.
        written: called with each part's name, file and agreements.
        options: of `SegmentationOptions`: assignment, temperature and top_k of the segmenter; with labels templates,
            normalize_prompts, synonyms and background; with preprocess shorter_side.

    Raises:
        CheckpointError: the source cannot be read, the destination cannot be written or is there, or a file is not the
            model.
        InputError: an argument is invalid, a package is missing, or the format cannot hold this.
    """
    row = _row(to, dtype)
    destination = Path(destination)
    check_is_folder(destination, to)
    check_destination(destination, is_file=False, overwrite=overwrite, to=to, own=_OWN, by="export")
    if labels is None and (background_labels or options.get("background") is not None):
        raise InputError("a background needs labels in the segmenter: pass labels too")
    chosen = SegmentationOptions.from_dict(options)
    check_installed(row)
    with opened_source(source, revision, config=config, key=key) as found:
        checkpoint = read(found, config=config)
        if destination.resolve() in (found.path.resolve(), *found.path.resolve().parents):
            raise InputError(f"{destination} holds the source itself: export to another folder")
        has_groups = any(checkpoint.config.vision_config.num_group_tokens)
        wanted = parse_parts(parts, has_groups=has_groups, has_labels=labels is not None)
        check_program_options(chosen, wanted, has_labels=labels is not None, preprocess=preprocess)
        needed = ["labels"] * (labels is not None) + ["preprocess"] * preprocess
        own_processor = _processor(found.path, processor, needed=needed)
        model = build_model(checkpoint, row.backend)
    settings = _settings(
        row, model, own_processor, chosen, labels=labels, background_labels=background_labels, preprocess=preprocess
    )
    result = Export(found.path, destination, to)
    metadata = _metadata(checkpoint, own_processor, settings, dtype)
    with replacement(destination) as new:
        new.mkdir()
        for part in wanted:
            path = new / f"{part.name}{row.suffix}"
            with _room(new, 4 * checkpoint.num_parameters()):
                _write(row, model, part, settings, path, metadata | _interface(part.of(settings)))
            agreements = _verified(row, model, part, settings, path, dtype) if verify else []
            result.files[part.name] = destination / path.name
            result.agreements += agreements
            if written is not None:
                written(part.name, path, agreements)
        write_text(new / REPORT_NAME, _report(result, new, metadata))
    return result


def disk_size(path: Path) -> int:
    """Returns the bytes of a part: its file or folder, and the files beside it that belong to it."""
    files = {path, *path.parent.glob(f"{path.stem}.*")} if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _row(to: str, dtype: str) -> ExportFormat:
    names = [row.name for row in FORMATS]
    if to not in names:
        raise InputError(f"a model is exported to one of {', '.join(names)}, got {to!r}")
    row = get_format(to)
    if dtype not in row.dtypes:
        raise InputError(f"{to} is written in {' or '.join(row.dtypes)} here, not in {dtype}: choose another --dtype")
    return row


def build_model(checkpoint: Checkpoint, backend: BackendName) -> Any:
    """Returns a checkpoint as a float32 model of a backend."""
    return importlib.import_module(f"groupvit_{backend}").GroupViTModel.from_arrays(
        checkpoint.config, Values(checkpoint.tensors, checkpoint.value), dtype="float32"
    )


def _processor(path: Path, processor: str | Path | None, *, needed: Sequence[str]) -> GroupViTProcessor | None:
    if processor is not None:
        return GroupViTProcessor.from_pretrained(processor)
    directory = path if path.is_dir() else path.parent
    lacking = missing_parts(directory)
    if not lacking:
        return GroupViTProcessor.from_pretrained(directory)
    if needed:
        raise CheckpointError(
            f"{path} has {lacking}, for {' and '.join(needed)}: name a checkpoint that has them (--processor)"
        )
    return None


def _settings(
    row: ExportFormat, model: Any, processor: GroupViTProcessor | None, options: SegmentationOptions, *,
    labels: Any, background_labels: Any, preprocess: bool,
) -> ProgramSettings:  # fmt: skip
    options, baked, images = options.for_model(model.config), None, None
    if labels is not None:
        assert processor is not None
        check_fit(processor, model.config)
        segmenter = importlib.import_module(f"groupvit_{row.backend}").Segmenter(
            model, processor, labels=labels, background_labels=background_labels,
            **{name: getattr(options, name) for name in LABEL_OPTIONS},
        )  # fmt: skip
        baked = segmenter.baked_labels()
    if preprocess:
        assert processor is not None
        vision = model.config.vision_config
        check_image_processor(processor.image_processor, vision.num_channels)
        images = Preparation.of(options, processor.image_processor, vision.patch_size).image_processors[0]
    return ProgramSettings(options=options, labels=baked, image_processor=images)


def _write(
    row: ExportFormat, model: Any, part: Part, settings: ProgramSettings, path: Path, metadata: dict[str, Any]
) -> None:
    code = importlib.import_module(f"groupvit_{row.backend}.export")
    code.write(row.name, model, part, settings, path, metadata)


@contextmanager
def _room(folder: Path, wanted: int) -> Iterator[None]:
    """Raises `OSError` for a failure of a writer where `wanted` bytes have no room: not all of them say so."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        if shutil.disk_usage(folder).free < wanted:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _verified(
    row: ExportFormat, model: Any, part: Part, settings: ProgramSettings, path: Path, dtype: str
) -> list[Agreement]:
    file, _ = open_file(row, path)
    source = _source(row, model, part, settings)
    found = list(compare(part.of(settings), model.config, source, file, dtype, fixed="H" not in row.dynamic))
    failed = next((each for each in found if not each.passed), None)
    if failed is not None:
        raise CheckpointError(
            f"{path.name} is not the model: its {failed.output} for {failed.sizes} differs by {failed.difference:.1e}, "
            f"expected at most {failed.bound:.1e}; nothing is kept"
        )
    return found


def _source(row: ExportFormat, model: Any, part: Part, settings: ProgramSettings) -> Runner:
    """Returns what runs a part in the model itself, on images that the image processor prepared."""
    code, processor = importlib.import_module(f"groupvit_{row.backend}.export"), settings.image_processor
    plain = replace(settings, image_processor=None)

    def run(inputs: Mapping[str, np.ndarray]) -> Arrays:
        rest = dict(inputs)
        if "images" not in rest:
            return dict(code.run(model, part, plain, rest))
        assert processor is not None
        images = rest.pop("images")
        pixels = processor([*images], return_tensors="np", input_data_format="channels_last")["pixel_values"]
        more = {"size": images.shape[1:3]} if part.name == "segmenter" else {}
        return dict(code.run(model, part, plain, {"pixel_values": pixels, **rest}, **more))

    return run


def _interface(part: Part) -> dict[str, Any]:
    """Returns a file's metadata of its part."""
    inputs, outputs = (
        {name: f"{dtype} [{axes.replace(' ', ', ')}]" for name, (dtype, axes) in each.items()}
        for each in (part.inputs, part.outputs)
    )
    return {"part": part.name, "inputs": inputs, "outputs": outputs}


def _metadata(
    checkpoint: Checkpoint, processor: GroupViTProcessor | None, settings: ProgramSettings, dtype: str
) -> dict[str, Any]:
    images = None if processor is None else processor.image_processor
    options, baked = settings.options, settings.labels
    return {
        "format": "groupvit",
        "dtype": dtype,
        "patch_size": checkpoint.config.vision_config.patch_size,
        "image_size": checkpoint.config.vision_config.image_size,
        "max_tokens": checkpoint.config.text_config.max_position_embeddings,
        "image_mean": None if images is None else list(images.image_mean),
        "image_std": None if images is None else list(images.image_std),
        "shorter_side": options.shorter_side,
        "preprocess": settings.image_processor is not None,
        "labels": None if baked is None else list(baked.names),
        "background": options.background,
        "assignment": options.assignment,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "licence": licence(checkpoint.source.path),
        "versions": versions(),
    }


def licence(path: Path) -> str:
    """Returns the licence that the model card beside a checkpoint names, or "unknown"."""
    card = (path if path.is_dir() else path.parent) / MODEL_CARD
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
    except (OSError, UnicodeError):
        text = ""
    # YAML in front of the text; "other" has its name beside it.
    front = re.match(r"---\r?\n(.*?)\r?\n---\s", text, re.DOTALL)
    named = dict(
        re.findall(r"^(license(?:_name)?):[ \t]*['\"]?([^'\"\r\n#]+)", front[1] if front else "", re.MULTILINE)
    )
    name = named.get("license", "").strip()
    return (named.get("license_name", name) if name == "other" else name).strip() or "unknown"


def _report(result: Export, written: Path, metadata: dict[str, Any]) -> str:
    content = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "source": result.source.name,
        "format": result.format,
        "files": {name: file_entry(written / name) for name in list_files(written, folders=True)},
        "metadata": metadata,
        "verification": [each.to_dict() for each in result.agreements],
        "machine": {"python": platform.python_version(), "processor": platform.machine()},
        "notes": result.notes,
    }
    return json.dumps(content, indent=2) + "\n"
