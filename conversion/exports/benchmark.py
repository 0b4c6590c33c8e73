"""Speed, size and agreement of a model in memory and of its exported files, on this machine: `groupvit benchmark`."""

from __future__ import annotations

import importlib
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from conversion.checkpoint import opened_source, read
from conversion.exports.agreement import difference, embeddings, scenes, texts
from conversion.exports.export import REPORT_NAME, build_model, disk_size, export
from conversion.exports.formats import FORMATS, BackendName, get_format
from conversion.exports.runtimes import Arrays, Runner, open_file, set_threads
from conversion.outputs import installed
from groupvit_common.errors import CheckpointError, GroupViTError, InputError
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.segmentation.parts import Part, parse_parts
from groupvit_common.storage.json_text import read_json

ROUNDS = 15
LABELS = 10
"""Labels of a segmenter's call."""
# The first calls trace, choose kernels and get memory.
_WARM_UP = 3
# Threads of a pool spin for some milliseconds after a call, on the cores that the next call needs.
_PAUSE = 0.005
_MODELS: dict[str, BackendName] = {"PyTorch": "torch", "Keras": "tf"}
_FORMATS = tuple(row.name for row in FORMATS)
_MAPS = ("label_map", "group_map")


@dataclass(frozen=True)
class Row:
    """One program for one part and one size of inputs.

    Attributes:
        bytes: of the part on disk; None: a model in memory.
        milliseconds: of a call, the median. ratio: that over the first program's.
        difference: the largest of a value from the model's, over the largest value.
        pixels: the share of pixels with another label or group; None: there are no maps.
        error: the reason why there are no figures.
    """

    program: str
    part: str = ""
    inputs: str = ""
    bytes: int | None = None
    milliseconds: float | None = None
    ratio: float | None = None
    difference: float | None = None
    pixels: float | None = None
    error: str = ""


@dataclass
class Benchmark:
    """The result of a benchmark. processor: its name; rounds: calls of each program for each size."""

    source: str
    parameters: int
    processor: str
    threads: int
    rounds: int
    rows: list[Row] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """Yields the table as lines for people."""
        yield (
            f"{self.source}: {self.parameters:,} parameters; {self.processor}, {self.threads} "
            f"thread{'s' if self.threads > 1 else ''}; median of {self.rounds} calls in turn"
        )
        yield from table(self.rows)


@dataclass(frozen=True)
class _Program:
    """A model in memory or an export. open: returns what runs a part, and its bytes on disk."""

    name: str
    open: Callable[[Part], tuple[Runner, int | None]]


def benchmark(
    source: str | Path,
    formats: str | Sequence[str] = _FORMATS,
    *,
    parts: str | Sequence[str] = ("segment",),
    sizes: Sequence[tuple[int, int]] = (),
    batches: Sequence[int] = (1,),
    models: Sequence[BackendName] | None = None,
    threads: int | None = None,
    rounds: int = ROUNDS,
    config: GroupViTConfig | str | Path | None = None,
    revision: str | None = None,
    key: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Benchmark:
    """Measures a model in memory and its exports, all in this process, call by call in turn.

    Args:
        source, config, revision, key: see `conversion.checkpoint.read`.
        formats: names in `conversion.exports.formats.FORMATS`, each perhaps with a dtype: "onnx:int8"; or folders of
            `export`. What is named is exported into a temporary folder.
        parts: some of image, text, segment.
        sizes: heights and widths of images; none: the configuration's.
        batches: numbers of images, and of texts of a text encoder.
        models: the backends whose model in memory comes first; None: those that are installed.
        threads: of every runtime; None: as many as PyTorch takes, or cores.
        rounds: calls of each program for each size.
        progress: called with what is done next.

    Returns:
        A row for each program, part and size. What fails, or lacks a package, is a row that has the reason.

    Raises:
        CheckpointError: the source cannot be read.
        InputError: an argument is invalid.
    """
    entries = [entry.strip() for entry in formats.split(",")] if isinstance(formats, str) else list(formats)
    _check(entries, batches, threads, rounds)
    told = progress or (lambda step: None)
    models = models if models is not None else [backend for backend in _MODELS.values() if installed(backend)]
    threads = threads or _default_threads()
    with opened_source(source, revision, config=config, key=key) as found, _torch_threads(threads):
        checkpoint = read(found, config=config)
        has_groups = any(checkpoint.config.vision_config.num_group_tokens)
        wanted = parse_parts(parts, has_groups=has_groups, has_labels=False)
        cases = {part.name: list(_cases(part, checkpoint.config, sizes, batches)) for part in wanted}
        result = Benchmark(str(source), checkpoint.num_parameters(), _processor(), threads, rounds)
        programs: list[_Program] = []
        failed: list[Row] = []

        def add(name: str, make: Callable[[], _Program]) -> None:
            told(f"preparing {name}")
            try:
                programs.append(make())
            # Other programs may raise anything, and the others are still to be measured.
            except Exception as error:
                failed.append(Row(name, error=reason(error)))

        def in_memory(name: str) -> _Program:
            set_threads(_MODELS[name], threads)
            model = build_model(checkpoint, _MODELS[name])
            code = importlib.import_module(f"groupvit_{_MODELS[name]}.export")
            return _Program(name, lambda part: (code.runner(model, part), None))

        def exported(entry: str, folder: Path) -> _Program:
            name, _, dtype = entry.partition(":")
            if name not in _FORMATS:
                return _of_folder(Path(entry), entry, threads)
            backend = get_format(name).backend
            if installed(backend):
                set_threads(backend, threads)
            export(
                source, folder, name, parts=parts, dtype=dtype or "float32", config=config, revision=revision, key=key,
                verify=False,
            )  # fmt: skip
            return _of_folder(folder, entry, threads)

        with TemporaryDirectory(prefix="groupvit-benchmark-") as temporary:
            for name, backend in _MODELS.items():
                if backend in models:
                    add(name, partial(in_memory, name))
            for index, entry in enumerate(entries):
                add(entry, partial(exported, entry, Path(temporary) / f"{index}"))
            for part in wanted:
                told(f"measuring {part.name}")
                result.rows += _rows(part, programs, cases[part.name], rounds)
        result.rows += failed
    return result


def parse_models(models: str) -> list[BackendName] | None:
    """Returns the backends of "torch,tf", "none" or "installed": None.

    Raises:
        InputError: something else.
    """
    if models == "installed":
        return None
    names = [] if models == "none" else [name.strip() for name in models.split(",")]
    if not set(names) <= set(_MODELS.values()):
        raise InputError(f"models must be torch, tf, torch,tf, none or installed, got {models!r}")
    return [backend for backend in _MODELS.values() if backend in names]


def _check(entries: list[str], batches: Sequence[int], threads: int | None, rounds: int) -> None:
    for entry in entries:
        if entry.partition(":")[0] not in _FORMATS and not Path(entry).is_dir():
            raise InputError(f"formats must be some of {', '.join(_FORMATS)}, or folders of exports, got {entry!r}")
    if len(set(entries)) < len(entries):
        raise InputError(f"formats must be named once each, got {', '.join(entries)}")
    if not batches or min(batches) < 1:
        raise InputError(f"batches must be whole numbers from 1, got {', '.join(map(str, batches)) or 'none'}")
    if rounds < 1 or (threads is not None and threads < 1):
        raise InputError(f"rounds and threads must be at least 1, got {rounds} and {threads}")


def _of_folder(folder: Path, name: str, threads: int) -> _Program:
    report = read_json(folder / REPORT_NAME)
    try:
        row, metadata = get_format(report["format"]), report["metadata"]
        labels, preprocess = metadata["labels"], metadata.get("preprocess", False)
    except (KeyError, StopIteration, TypeError) as error:
        raise CheckpointError(
            f"{folder / REPORT_NAME} is not the report of an export: export the model again"
        ) from error

    def open_part(part: Part) -> tuple[Runner, int]:
        path = folder / f"{part.name}{row.suffix}"
        if not path.exists():
            raise CheckpointError(f"{folder} has no {path.name}: export that part too")
        if part.name == "segmenter" and labels is not None:
            raise InputError(f"{path} has labels inside, and the model in memory has none: export it without labels")
        if preprocess and part.name != "text_encoder":
            raise InputError(f"{path} resizes images, and the model in memory does not: export it without preprocess")
        return open_file(row, path, threads)[0], disk_size(path)

    return _Program(name, open_part)


def _cases(
    part: Part, config: GroupViTConfig, sizes: Sequence[tuple[int, int]], batches: Sequence[int]
) -> Iterator[tuple[str, Arrays]]:
    if part.name == "text_encoder":
        longest = config.text_config.max_position_embeddings
        for count in batches:
            yield f"{count} x {longest}", texts(config, count, longest)
        return
    vision = config.vision_config
    patch = vision.patch_size
    for height, width in sizes or [(vision.image_size, vision.image_size)]:
        if height % patch or width % patch or min(height, width) < 2 * patch:
            raise InputError(
                f"sides of images must be multiples of {patch} from {2 * patch}, got {height}x{width}: choose others"
            )
        for count in batches:
            inputs: Arrays = {"pixel_values": scenes(count, vision.num_channels, height, width)}
            if "text_embeds" in part.inputs:
                inputs["text_embeds"] = embeddings(np.random.default_rng(0), LABELS, config.projection_dim)
            yield f"{count} x {height} x {width}", inputs


def _rows(part: Part, programs: Sequence[_Program], cases: Sequence[tuple[str, Arrays]], rounds: int) -> Iterator[Row]:
    runners: dict[str, Runner] = {}
    sizes: dict[str, int | None] = {}
    errors: dict[str, str] = {}
    for program in programs:
        try:
            runners[program.name], sizes[program.name] = program.open(part)
        except Exception as error:
            errors[program.name] = reason(error)
    for inputs, arrays in cases:
        found = measure(runners, arrays, rounds)
        for row in compare_rows(part, inputs, found):
            yield Row(**asdict(row) | {"bytes": sizes[row.program]})
    for name, why in errors.items():
        yield Row(name, part.name, error=why)


@dataclass(frozen=True)
class Measured:
    """Median milliseconds of a call, and the outputs of the first."""

    milliseconds: float
    outputs: Arrays


def measure(
    runners: Mapping[str, Runner],
    inputs: Arrays,
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    pause: Callable[[float], object] = time.sleep,
) -> dict[str, Measured | str]:
    """Calls each program once a round, another one first in each round; returns its figures, or why it failed."""
    found: dict[str, Measured | str] = {}
    outputs: dict[str, Arrays] = {}
    for name, run in runners.items():
        try:
            # A runtime may return the memory that it uses again.
            outputs[name] = {key: np.array(value) for key, value in run(inputs).items()}
            for _ in range(_WARM_UP - 1):
                run(inputs)
        except Exception as error:
            found[name] = reason(error)
    names = [*outputs]
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            if name in found:
                continue
            pause(_PAUSE)
            try:
                begun = clock()
                runners[name](inputs)
                times[name].append(1e3 * (clock() - begun))
            except Exception as error:
                found[name] = reason(error)
    for name in names:
        found.setdefault(name, Measured(statistics.median(times[name] or [0.0]), outputs[name]))
    return {name: found[name] for name in runners}


def compare_rows(part: Part, inputs: str, found: Mapping[str, Measured | str]) -> Iterator[Row]:
    """Yields a row for each program: the first that ran is what the others are compared with."""
    first = next((each for each in found.values() if isinstance(each, Measured)), None)
    for name, each in found.items():
        if isinstance(each, str) or first is None:
            yield Row(name, part.name, inputs, error=str(each))
            continue
        values = {
            output: difference(output, first.outputs, each.outputs, "float32")[0]
            for output in part.outputs
            if output in first.outputs
        }
        maps = [value for output, value in values.items() if output in _MAPS]
        yield Row(
            name,
            part.name,
            inputs,
            milliseconds=each.milliseconds,
            ratio=each.milliseconds / first.milliseconds,
            difference=max((value for output, value in values.items() if output not in _MAPS), default=0.0),
            pixels=max(maps) if maps else None,
        )


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yields rows as lines for people; what failed comes last."""
    from conversion.describe import size

    heads = ["part", "inputs", "program", "on disk", "ms", "ratio", "difference", "pixels"]
    cells = [
        [
            row.part,
            row.inputs,
            row.program,
            "" if row.bytes is None else size(row.bytes),
            f"{row.milliseconds:.2f}",
            f"{row.ratio:.2f}",
            f"{row.difference:.1e}",
            "" if row.pixels is None else f"{row.pixels:.2%}",
        ]
        for row in rows
        if row.milliseconds is not None
    ]
    widths = [max(len(line[column]) for line in [heads, *cells]) for column in range(len(heads))]
    for line in [heads, *cells] if cells else []:
        yield "  ".join(
            text.ljust(width) if column < 3 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
    for row in rows:
        if row.error:
            yield f"{' '.join(filter(None, (row.program, row.part, row.inputs)))}: {row.error}"


def reason(error: Exception) -> str:
    """Returns an error as one short line."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
    return line if isinstance(error, GroupViTError) and line else f"{type(error).__name__}: {line}"


def _default_threads() -> int:
    if find_spec("torch") is None:
        return os.cpu_count() or 1
    import torch

    return torch.get_num_threads()


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Puts PyTorch's number of threads back afterwards. AOTInductor compiles for the number that is set."""
    if find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor() -> str:
    """Returns the processor's name."""
    try:
        named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        named = None
    return named.group(1) if named else platform.processor() or platform.machine()
