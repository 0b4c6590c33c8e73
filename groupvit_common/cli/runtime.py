"""The runtime of the commands: backends, labels, folders, and the images with their results."""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import importlib.util
import os
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groupvit_common.cli import terminal
from groupvit_common.cli.arguments import given
from groupvit_common.cli.shares import Share
from groupvit_common.cli.terminal import OK, SOME_FAILED
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.segmentation.figures import FIGURES
from groupvit_common.segmentation.options import OPTIONS, SegmentationOptions

if TYPE_CHECKING:
    from groupvit_common.preprocessing.prompts import Label
    from groupvit_common.segmentation.predictor import BaseSegmenter
    from groupvit_common.segmentation.result import Segmentation

DEFAULT_OUT = "groupvit_out"
COMPARE_END = "_compare.png"
# Backend -> the module that it needs, and its name for people.
_BACKENDS = {"torch": ("torch", "PyTorch"), "tf": ("keras", "TensorFlow")}
# From this number of images on, a progress bar is shown.
_MANY = 4


# -- backends ----------------------------------------------------------------------------------------------------------


class BackendMissingError(InputError):
    """A backend is not installed. `backend` None: none is."""

    exit_code = CheckpointError.exit_code

    def __init__(self, backend: str | None) -> None:
        if backend is None:
            super().__init__(
                'this command needs PyTorch or TensorFlow: pip install "groupvit[torch]" or "groupvit[tf]"'
            )
        else:
            super().__init__(f'this command needs {backend_title(backend)}: pip install "groupvit[{backend}]"')


def backend_title(backend: str) -> str:
    """Returns a backend's name for people."""
    return _BACKENDS[backend][1]


def installed_backends() -> list[str]:
    """Returns the backends whose frameworks are installed."""
    return [name for name, (module, _) in _BACKENDS.items() if importlib.util.find_spec(module) is not None]


def choose_backend(backend: str | None) -> str:
    """Returns a backend, the first that is installed for None.

    Raises:
        BackendMissingError: it is not installed, or none is.
    """
    installed = installed_backends()
    if not installed or (backend is not None and backend not in installed):
        raise BackendMissingError(backend)
    return backend or installed[0]


def backend_module(backend: str | None, name: str) -> Any:
    """Returns a module of a backend, see `choose_backend`."""
    backend = choose_backend(backend)
    if backend == "tf":
        from groupvit_common.tensorflow_logging import set_environment

        set_environment()
    with _without_garbage_collection(_BACKENDS[backend][0]):
        return importlib.import_module(f"groupvit_{backend}.{name}")


@contextmanager
def _without_garbage_collection(framework: str) -> Iterator[None]:
    """Collects no garbage while a framework is imported for the first time, and never looks at what it has made.

    It makes half a million objects, which stay. To look at them takes a second of TensorFlow's six.
    """
    if framework in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    gc.freeze()


def load_segmenter(options: argparse.Namespace, **others: Any) -> BaseSegmenter:
    """Returns the segmenter of a command's flags. `others`: keywords of `from_pretrained`, which replace flags."""
    keywords = {name: getattr(options, name) for name in ("model", "backend", "processor", "device", "dtype", "fast")}
    keywords |= given(options, (*OPTIONS, "batch_size", "max_pixels")) | others
    segmenter_class = backend_module(keywords.pop("backend"), "predictor").Segmenter
    segmenter: BaseSegmenter = segmenter_class.from_pretrained(keywords.pop("model"), **keywords)
    note_optimization(segmenter)
    return segmenter


def note_optimization(segmenter: BaseSegmenter) -> None:
    """Prints what --fast or --dtype int8 has chosen."""
    if segmenter.optimization is not None:
        terminal.note(f"computing in {segmenter.optimization}")


# -- labels and folders ------------------------------------------------------------------------------------------------


def read_request(options: argparse.Namespace) -> tuple[tuple[Label, ...], tuple[Label, ...]]:
    """Returns the labels and the background labels; checks the options, so that faults are found before a model is
    loaded.

    Raises:
        InputError: labels or options are missing or invalid.
    """
    from groupvit_common.preprocessing.prompts import parse_labels, read_labels

    if options.labels is None and options.labels_file is None:
        raise InputError('no labels: name them with --labels "cat, couch" or --labels-file FILE')
    if (options.labels or "").rstrip().endswith(",") and not all(map(os.path.exists, options.photos)):
        raise InputError('--labels ends with a comma: put all labels between quotes, as in --labels "cat, couch"')
    labels = () if options.labels is None else parse_labels(options.labels)
    from_file = read_labels(options.labels_file) if options.labels_file is not None else ()
    SegmentationOptions(**given(options, OPTIONS))
    return parse_labels([*labels, *from_file]), read_background_labels(options)


def read_background_labels(options: argparse.Namespace) -> tuple[Label, ...]:
    """Returns the labels of --background-labels; () for a command without it."""
    from groupvit_common.preprocessing.prompts import parse_labels

    words = getattr(options, "background_labels", "")
    return parse_labels(words) if words else ()


def output_names(paths: Sequence[Path], out: Path) -> dict[Path, str]:
    """Returns a name for each image's files in `out`: its stem, numbered where that is taken or would overwrite an
    input image, and shortened where the system has a limit."""
    from groupvit_common.segmentation.result import CLIP_ENDS, RESULT_ENDS
    from groupvit_common.storage.names import fit_name, name_key

    real = [os.path.realpath(path) for path in paths]
    # With their folders: label maps of a clip replace a folder.
    given = {name_key(name) for path in real for name in (path, path.rpartition(os.sep)[0])}
    folder = os.path.realpath(out)
    ends = (*RESULT_ENDS, *CLIP_ENDS, COMPARE_END, *(f"_{mode}.png" for mode in FIGURES))
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        name, number = fit_name(path.stem, ends, out), 1
        while name_key(name) in taken or any(name_key(f"{folder}{os.sep}{name}{end}") in given for end in ends):
            number += 1
            name = fit_name(f"{path.stem}-{number}", ends, out)
        taken.add(name_key(name))
        names[path] = name
    return names


def check_writable(folder: Path) -> None:
    """Raises `InputError` for a folder that cannot be made or written into, without making it."""
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise InputError(f"cannot write into the folder {folder}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot write into the folder {folder}: {os.strerror(errno.EACCES)}")


def make_writable(folder: Path) -> None:
    """Makes a folder.

    Raises:
        InputError: it cannot be made or written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write into the folder {folder}: {terminal.reason(error)}") from error


def listed_files(name: str | None) -> list[str]:
    """Returns the lines of the file of --from-file, "-" for standard input, as names of files.

    Between names there are line ends, or zero bytes as `find -print0` writes them. Empty lines are passed over.

    Raises:
        InputError: the file cannot be read, or has no names.
    """
    if name is None:
        return []
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"--from-file {name} cannot be read: {terminal.reason(error)}") from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    lines = content.split(b"\0") if b"\0" in content else content.splitlines()
    names = [os.fsdecode(line) for line in lines if line.strip()]
    if not names:
        raise InputError(f"--from-file {name} names no files: one a line is expected")
    return names


def _mention_clips(folder: Path) -> None:
    """Warns of the clips in a folder, of which images alone are taken.

    Raises:
        InputError: there are no images in it.
    """
    from groupvit_common.preprocessing.images import image_suffixes
    from groupvit_common.segmentation.clips import CLIP_SUFFIXES
    from groupvit_common.storage.names import is_hidden, list_files

    names = [name for name in list_files(folder) if not is_hidden(name)]
    suffixes = [Path(name).suffix.lower() for name in names]
    clips = [suffix for suffix in suffixes if suffix in CLIP_SUFFIXES]
    if not clips:
        return
    found = f"{len(clips)} video{'s' if len(clips) > 1 else ''}"
    hint = f'name clips themselves, as with the pattern "{folder}/*{clips[0]}"'
    if not any(suffix in image_suffixes() for suffix in suffixes):
        raise InputError(f"no images in the folder {folder}, but {found}: {hint}")
    terminal.warn(f"left out in the folder {folder}: {found}; {hint}")


# -- images ------------------------------------------------------------------------------------------------------------


class ImageRun:
    """The images of one command: their paths, failures, a line about each, and a progress bar for many.

    Args:
        options: of the command.
        only_prints: no files are written, so the command ends when stdout is lost.
        share: the process's, of images and clips; failures to find them are the first process's.
        takes_clips: clips, in files that are named or match a pattern, are kept apart; else they are images.

    Attributes:
        paths: the images of this process; `clips`: its clips.
        inputs, every_clip: those of all processes.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        *,
        only_prints: bool = False,
        share: Share | None = None,
        takes_clips: bool = False,
    ) -> None:
        from groupvit_common.preprocessing.image_files import distinct, expand

        self._json: bool = options.json
        self._only_prints = only_prints
        self._share = share = Share() if share is None else share
        self._bar: terminal.Bar | None = None
        self._failed = 0
        there: dict[Path, bool] = {}
        names = list(dict.fromkeys([*options.photos, *listed_files(options.from_file)]))
        for name in names:
            try:
                is_folder = Path(name).is_dir()
                if is_folder and takes_clips:
                    _mention_clips(Path(name))
                found = expand([name])
            except (InputError, OSError) as error:
                if len(names) == 1 and isinstance(error, InputError):
                    raise
                self._fail_to_find(Path(name), error if isinstance(error, InputError) else terminal.reason(error))
                continue
            for path in found:
                # `os.path` calls a path that cannot be read missing, whatever the cause.
                if os.path.exists(path):  # noqa: PTH110
                    there[path] = takes_clips and not is_folder
                else:
                    self._fail_to_find(path, f"there is no file {path}")
        self.inputs = distinct(there)
        clips: set[Path] = set()
        if takes_clips:
            from groupvit_common.segmentation.clips import is_clip

            clips = {path for path in self.inputs if there[path] and is_clip(path)}
        self.paths = share.of([path for path in self.inputs if path not in clips])
        self.every_clip = [path for path in self.inputs if path in clips]
        self.clips = share.of(self.every_clip)
        self._every = self._failed + len(self.paths) + len(self.clips)

    def __enter__(self) -> None:
        if len(self.paths) >= _MANY:
            self._bar = self.bar(len(self.paths), "image")

    def __exit__(self, *unused: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def bar(self, total: int | None, unit: str, title: str = "") -> terminal.Bar:
        """Returns a progress bar, which the first of several processes shows."""
        return terminal.Bar(total, unit, title=title, shows=self._share.rank == 0)

    def pending(self, paths: Sequence[Path] | None = None) -> Iterator[Path]:
        """Yields these inputs, or the images; ends when the results could not be printed."""
        for path in self.paths if paths is None else paths:
            if self._only_prints and terminal.is_lost():
                return
            yield path

    def segmented(self, segmenter: BaseSegmenter) -> Iterator[tuple[Path, Segmentation]]:
        """Yields the results of all images that can be segmented; those of one size go through the model together."""
        opened = deque[Path]()

        def sources() -> Iterator[Path]:
            for path in pending:
                opened.append(path)
                yield path

        pending = self.pending()
        while True:
            try:
                for result in segmenter.iter(sources(), on_error=lambda _, error: self.fail(opened.popleft(), error)):
                    path = opened.popleft()
                    yield path, result
                return
            except Exception as error:
                if not opened or not (isinstance(error, InputError) or terminal.is_out_of_memory(error)):
                    raise
            # One by one, those of the failed batch and behind it: only one of them may be at fault.
            while opened:
                path, alone = opened.popleft(), None
                with self.attempt(path):
                    alone = segmenter(path)
                if alone is not None:
                    yield path, alone

    @contextmanager
    def attempt(self, path: Path) -> Iterator[None]:
        """Reports an error within the block; the command goes on with the other images."""
        try:
            yield
        except InputError as error:
            self.fail(path, error)
        except Exception as error:
            if not terminal.is_out_of_memory(error):
                raise
            self.fail(path, f"{path}: out of memory; try a smaller --shorter-side, or --device cpu")

    def done(self, record: dict[str, Any], line: str) -> None:
        """Prints the result of an image."""
        if self._json:
            terminal.print_json(record)
        else:
            terminal.print_lines(line)
        self._step()

    def skip(self, paths: Iterable[Path]) -> None:
        """Leaves out images and clips."""
        some = set(paths)
        self.paths = [path for path in self.paths if path not in some]
        self.clips = [path for path in self.clips if path not in some]

    @property
    def failed(self) -> int:
        """The number of failures so far."""
        return self._failed

    def fail(self, path: Path, reason: object, *, printed: bool = False) -> None:
        """Prints the failure of an image. `printed`: its record has been printed, and says it."""
        self._failed += 1
        from groupvit_common.preprocessing.images import TooLargeError

        text = str(reason) if str(path) in str(reason) else f"{path}: {reason}"
        text += " (--max-pixels)" if isinstance(reason, TooLargeError) else ""
        terminal.error(text)
        if self._json and not printed:
            terminal.print_json({"source": str(path), "error": text})
        self._step()

    def _fail_to_find(self, path: Path, reason: object) -> None:
        if self._share.rank == 0:
            self.fail(path, reason)

    def code(self) -> int:
        """Returns the exit code; prints the number of failures, of several images."""
        if self._failed and self._every > 1:
            kind = "images and clips" if self.clips else "images"
            terminal.error(f"{self._failed} of {self._every} {kind} failed")
        return SOME_FAILED if self._failed else OK

    def _step(self) -> None:
        if self._bar is not None:
            self._bar.advance()
