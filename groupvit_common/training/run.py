"""What a training run is made of besides the framework: its data, its measures, its files, and where it stands.

A backend's `train` makes a `Run`, feeds the model with its batches, tells it each step's loss and gives it the model to save.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groupvit_common.checkpoints.directory import CONFIG_NAME, WEIGHTS_NAME, find_weights
from groupvit_common.checkpoints.hub import resolve
from groupvit_common.checkpoints.safetensors_file import read_arrays
from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, Scene, make_scene
from groupvit_common.errors import CheckpointError, GroupViTError, InputError
from groupvit_common.evaluation.datasets.segmentation import SegmentationSet, open_sets
from groupvit_common.evaluation.metrics import confusion_matrix, mean_iou
from groupvit_common.evaluation.segmentation import (
    Place,
    Settings,
    default_protocol,
    evaluate_segmentation,
    protocol_settings,
)
from groupvit_common.model.config import GroupViTConfig
from groupvit_common.preprocessing.image_processor import GroupViTImageProcessor
from groupvit_common.preprocessing.processor import PROCESSOR_FILES, GroupViTProcessor, missing_parts
from groupvit_common.preprocessing.prompts import Label
from groupvit_common.preprocessing.tokenizer import CLIPTokenizer
from groupvit_common.storage.json_text import finite
from groupvit_common.storage.locks import FolderLock
from groupvit_common.storage.saving import read_lock, write_files, write_text
from groupvit_common.training import checkpoints as run_state
from groupvit_common.training.checkpoints import Checkpoints, RunState
from groupvit_common.training.log import duration
from groupvit_common.training.recipe import (
    EvaluationSettings,
    ModelSettings,
    Recipe,
    get_recipe,
    is_too_fast,
    of_checkpoint,
)
from groupvit_common.training.scene_batches import Batch, CaptionedImages, SceneBatches, batches
from groupvit_common.training.settings import changed, read_settings, to_table, to_toml

MEASURES_NAME = "training.json"
RECIPE_NAME = "recipe.toml"
LOCK_NAME = ".training.lock"
BAD_BATCH_NAME = "bad_batch.npz"
MULTI_LABEL_SCALE = "multi_label_logit_scale"

# A grouping that tells nothing: (nearly) one group for all patches, or the same map for every image.
FEW_GROUPS = 1.5
LIKE_MAPS = 0.98

_FINETUNE_RATE = 1.6e-5
_IMAGES_AT_ONCE = 8  # pictures or windows of a segmentation set


class Interrupted(GroupViTError):
    """A signal asked a run to stop. It has saved where it stands. `rank`: of the process, the first one being 0."""

    def __init__(self, message: str, number: int, rank: int = 0) -> None:
        super().__init__(message)
        self.signal, self.rank = number, rank


class Segmenter(Protocol):
    """What measuring needs of either backend's `Segmenter`."""

    def set_labels(self, labels: Any, background_labels: Any = ..., /) -> Any: ...

    def iter(self, images: Iterable[Any], /) -> Iterator[Any]: ...


class Model(Protocol):
    """What saving needs of either backend's model."""

    def save_pretrained(self, directory: Path, /) -> Any: ...


class Stream(Protocol):
    """Batches without end that know where they are: `SceneBatches`, `groupvit_common.data.captions.stream.CaptionStream`."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...


Evaluate = Callable[[Any], Mapping[str, float]]
"""A segmenter of the model as it is -> measures by name, more being better; their mean decides which checkpoint is the best."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. `mean_iou`: level -> mean IoU of the held-out scenes, in percent, beside that of the untrained model and of
    the most frequent class everywhere; `losses`: one a step, of this process; `bad_steps`: how many were left out because a loss
    or gradient was no number; `rank`: of this process, the first one being 0."""

    directory: Path
    mean_iou: dict[int, float]
    untrained_mean_iou: dict[int, float]
    majority_mean_iou: dict[int, float]
    losses: tuple[float, ...]
    minutes: float
    bad_steps: int = 0
    rank: int = 0


class Feed:
    """A stream's batches, made ready for the device; the next one may be fetched while a step is computed.

    Args:
        prepare: what is done to a batch, such as moving it to the device.
    """

    def __init__(self, stream: Stream, prepare: Callable[[Any], Any]) -> None:
        self.stream = stream
        self.batches = iter(stream)
        self.prepare = prepare
        self.ahead: list[Any] = []
        self.before: dict[str, Any] = {}

    def take(self) -> Any:
        """The next batch."""
        return self.ahead.pop() if self.ahead else self.prepare(next(self.batches))

    def look_ahead(self) -> None:
        """Fetches the batch that `take` returns next."""
        if not self.ahead:
            self.before = self.stream.state_dict()
            self.ahead.append(self.prepare(next(self.batches)))

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch taken."""
        return self.before if self.ahead else self.stream.state_dict()

    def close(self) -> None:
        """Ends what the stream has running."""
        close = getattr(self.batches, "close", None)
        if close is not None:
            close()


@dataclass
class Run:
    """One run: what it trains on, where it writes, what it has measured so far. Made by `begin`.

    backend: name and version of the framework, threads: how many it computes with; both only for the record. rank, world: which
    of how many processes this is; the first one alone writes and tells. resumed: the checkpoint that it goes on from. sets: of the
    recipe's `evaluation`, `of_sets` their measures in percent.
    """

    recipe: Recipe
    directory: Path
    pictures: Mapping[int, CaptionedImages]
    processor: GroupViTProcessor
    backend: str
    threads: int
    log: Callable[[str], None]
    started: float
    majority: dict[int, float]
    untrained: dict[int, float] = field(default_factory=dict)
    measured: dict[int, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    rank: int = 0
    world: int = 1
    resumed: RunState | None = None
    resumed_from: Path | None = None
    evaluate: Evaluate | None = None
    evaluated: dict[str, float] = field(default_factory=dict)
    sets: Sequence[tuple[str, SegmentationSet, Settings]] = ()
    of_sets: dict[str, float] = field(default_factory=dict)
    step: int = 0
    bad_steps: int = 0
    stop_signal: int = 0
    lock: FolderLock | None = None

    @classmethod
    def begin(
        cls,
        recipe: Recipe | str,
        out_dir: str | Path,
        *,
        seed: int | None = None,
        log: Callable[[str], None] = print,
        backend: str = "",
        threads: int = 0,
        rank: int = 0,
        world: int = 1,
        resume: str | Path = "never",
        evaluate: Evaluate | None = None,
    ) -> Run:
        """Makes the folder, the scenes and the tokenizer, and finds what is to be continued. Nobody else writes there until `close`.

        Args:
            resume: "never"; "auto", from the newest valid checkpoint in the folder if there is one; or a checkpoint's path.
            evaluate: besides the held-out scenes, for runs on other data.

        Raises:
            InputError: an unknown recipe, a folder that cannot be made, one in which another training writes, one with an unfinished run
                that is not to be continued, a segmentation set that is not there.
            CheckpointError: a checkpoint that cannot be continued, a tokenizer or model to start from that cannot be found.
        """
        recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
        recipe = recipe if seed is None else changed(recipe, {"run.seed": seed})
        if recipe.schedule.batch_size % world:
            raise InputError(
                f"schedule.batch_size must be a multiple of the number of processes, got {recipe.schedule.batch_size} for {world}"
            )
        if recipe.model.init_from:
            recipe = of_checkpoint(recipe, GroupViTConfig.from_pretrained(recipe.model.init_from))
        sets = open_evaluation(recipe.evaluation)
        if recipe.data is None:
            for level in recipe.scenes.levels:  # as large as they are to be: refused before there are thousands of them
                make_scene(recipe.run.seed, 0, level, (recipe.scene_size, recipe.scene_size))
        directory = Path(out_dir)
        started = time.monotonic()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {directory} for the model: {error}") from error
        log = log if rank == 0 else _silent
        # The first process stands for all.
        lock = FolderLock(directory, LOCK_NAME, "training", log) if rank == 0 else None
        try:
            path = run_state.find(directory, resume, log=log)
            pictures = _scenes(recipe, log) if recipe.data is None else {}
            captions = [caption for level in pictures.values() for caption in level.captions]
            processor = start_processor(recipe, captions)
            majority = majority_mean_iou(recipe) if recipe.data is None else {}
            run = cls(recipe, directory, pictures, processor, backend, threads, log, started, majority)
            run.rank, run.world, run.evaluate, run.sets, run.lock = rank, world, evaluate, sets, lock
            if path is not None:
                run._continue(path)
            elif is_too_fast(recipe):
                log(
                    f"optimizer.learning_rate {recipe.optimizer.learning_rate:g} is for training from scratch, and this run starts from "
                    f"{recipe.model.init_from}: its training may be undone; the recipe finetune has {_FINETUNE_RATE:g}"
                )
            if rank == 0:
                run.checkpoints.clean()
                if path is None:
                    run.checkpoints.clear()
                write_files(directory, {RECIPE_NAME: lambda file: write_text(file, to_toml(recipe))})
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return run

    def close(self) -> None:
        """Lets other trainings write into the folder."""
        if self.lock is not None:
            self.lock.release()

    def _continue(self, path: Path) -> None:
        self.resumed, self.resumed_from = run_state.load(path), path
        values = self.resumed.values
        self.step, self.bad_steps = self.resumed.step, values["bad_steps"]
        self.started -= 60 * values["minutes"]
        self.untrained, self.measured = (
            {int(level): math.nan if value is None else value for level, value in values[name].items()}
            for name in ("untrained", "measured")
        )
        self.log(f"continuing from {path} at step {self.step}")
        for name, old, new in _differences(_as_read_now(values["recipe"]), to_table(self.recipe)):
            self.log(f"{name} was {old!r} before, now {new!r}")

    @property
    def checkpoints(self) -> Checkpoints:
        settings = self.recipe.run
        return Checkpoints(
            self.directory,
            keep=settings.keep,
            keep_best=settings.keep_best,
            log=self.log,
            required=run_state.RUN_VALUES,
        )

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.started) / 60

    def batches(self) -> Iterator[Batch[NDArray[Any]]]:
        """The batches of a run on scenes, the same for the same seed whatever the backend."""
        return batches(self.recipe, self.pictures, self.processor, np.random.default_rng(self.recipe.run.seed))

    def stream(self) -> Stream:
        """The batches of this process, from where the run stands."""
        recipe = self.recipe
        stream: Stream
        if recipe.data is None:
            stream = SceneBatches(recipe, self.pictures, self.processor, rank=self.rank, world=self.world)
        else:
            from groupvit_common.data.captions.stream import CaptionStream

            stream = CaptionStream(
                recipe.data,
                self.processor,
                batch_size=recipe.schedule.batch_size // self.world,
                seed=recipe.run.seed,
                rank=self.rank,
                world=self.world,
                workers=recipe.run.workers,
            )
        if self.resumed is not None:
            with run_state.restoring(self.resumed_from):
                stream.load_state_dict(self._place_in_data(self.resumed.values["ranks"]))
        return stream

    def _place_in_data(self, ranks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        if len(ranks) == self.world or self.recipe.data is None:
            # On scenes all processes draw the same.
            state: Mapping[str, Any] = ranks[self.rank if len(ranks) == self.world else 0]["data"]
            return state
        epoch = min(rank["data"]["epoch"] for rank in ranks)
        self.log(
            f"the run was of {len(ranks)} processes, now of {self.world}: data goes on from the beginning of epoch {epoch}"
        )
        return {"epoch": epoch}

    def measure_untrained(self, segmenter: Segmenter, parameters: int) -> None:
        """`parameters`: how many numbers the model learns."""
        if self.recipe.data is None:
            self.measured = self.untrained = measure(segmenter, self.recipe)
        start = "at the start" if self.recipe.model.init_from else "untrained"
        found = f"; {start}: {percentages(self.untrained)}" if self.untrained else ""
        self.log(f"{parameters / 1e6:.2f} million parameters{found}")

    # -- steps ------------------------------------------------------------------------------------------------------------

    def took_step(self, loss: float) -> None:
        """Notes a step's loss. GroupViTError: it is no number, and going on would only spoil what was saved."""
        self.losses.append(loss)
        self.step += 1
        if not math.isfinite(loss):
            raise self._no_number(f"the loss is {loss}", "")
        every = self.recipe.run.log_every
        if self.step % every == 0:
            mean = np.mean(self.losses[-every:])
            self.log(f"step {self.step}/{self.recipe.schedule.total_steps}  loss {mean:.3f}  {self.minutes:.1f} min")

    def left_out_step(self, loss: float, norm: float, batch: Mapping[str, NDArray[Any]]) -> None:
        """Notes a step that changed no weights, since its loss or the norm of its gradient is no number.

        Args:
            batch: what it was about, saved for inspection when the run ends here.

        Raises:
            GroupViTError: there were as many as the recipe allows.
        """
        self.losses.append(loss)
        self.step += 1
        self.bad_steps += 1
        what = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        allowed = self.recipe.run.max_bad_steps
        if self.bad_steps < allowed:
            self.log(f"step {self.step} left out: {what} ({self.bad_steps} of at most {allowed})")
            return
        place = self.directory / (BAD_BATCH_NAME if self.world == 1 else f"{self.rank}-{BAD_BATCH_NAME}")
        np.savez(place, allow_pickle=False, **dict(batch))
        raise self._no_number(what, f" ({self.bad_steps} such steps); its batch is in {place}")

    def _no_number(self, what: str, more: str) -> GroupViTError:
        return GroupViTError(
            f"{what} at step {self.step}{more}: try a lower learning_rate than {self.recipe.optimizer.learning_rate:g} or "
            f"precision float32; what {self.directory} holds is from before"
        )

    def evaluates_now(self) -> bool:
        """Whether the model is measured after this step."""
        return self._every(self.recipe.run.evaluate_every) or self.finished

    def saves_now(self, minutes_since: float) -> bool:
        """Whether a checkpoint is written after this step. minutes_since: the last one."""
        settings = self.recipe.run
        by_time = bool(settings.save_minutes) and minutes_since >= settings.save_minutes
        return self._every(settings.save_every) or by_time or self.finished

    @property
    def finished(self) -> bool:
        return self.step >= self.recipe.schedule.total_steps

    def _every(self, steps: int) -> bool:
        return steps > 0 and self.step % steps == 0

    # -- signals ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Within, SIGTERM and Ctrl-C set `stop_signal`, so that the run can save and end; a second Ctrl-C ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _: object) -> None:
            self.stop_signal = number
            signal.signal(signal.SIGINT, before[signal.SIGINT])

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def interrupted(self, number: int, saved: bool) -> Interrupted:
        """What a run ends with that a signal stopped."""
        name = signal.Signals(number).name
        how = "saved; continue with --resume auto" if saved else "not saved"
        return Interrupted(f"stopped by {name} at step {self.step}, {how}", number, self.rank)

    # -- files ------------------------------------------------------------------------------------------------------------

    @property
    def measures_here(self) -> bool:
        """Whether `save` is for this process too: each has its share of segmentation sets, the rest is the first one's."""
        return self.rank == 0 or bool(self.sets)

    def save(self, model: Model, segmenter: Segmenter, place: Place | None = None) -> None:
        """Measures a model through a segmenter that holds it, and writes it with its processor and its measures.

        Args:
            place: of this process among those that measure the same model together; None: alone.
        """
        self._measure_sets(segmenter, place)
        if self.rank:
            return
        if self.recipe.data is None:
            self.measured = measure(segmenter, self.recipe)
            self.log(f"step {self.step}: {percentages(self.measured)}  {self.minutes:.1f} min")
        if self.evaluate is not None:
            self.evaluated = dict(self.evaluate(segmenter))
            self.log(f"step {self.step}: {', '.join(f'{name} {value:.4g}' for name, value in self.evaluated.items())}")
        record = {
            "recipe": to_table(self.recipe),
            "steps": self.step,
            "bad_steps": self.bad_steps,
            "minutes": round(self.minutes, 1),
            "backend": self.backend,
            "threads": self.threads,
            "mean_iou": _rounded(self.measured),
            "untrained_mean_iou": _rounded(self.untrained),
            "majority_mean_iou": _rounded(self.majority),
            "evaluated": self.evaluated,
            "sets": {name: round(value, 1) for name, value in self.of_sets.items()},
        }
        text = json.dumps(finite(record), indent=2) + "\n"
        try:
            model.save_pretrained(self.directory)
            self.processor.save_pretrained(self.directory)
            write_files(self.directory, {MEASURES_NAME: lambda path: write_text(path, text)})
        except CheckpointError as error:
            if self.finished:
                raise
            self.log(f"step {self.step}: the model is not saved, the run goes on: {error}")

    def _measure_sets(self, segmenter: Any, place: Place | None) -> None:
        """Percent. Each process segments its share of the pictures, the first one sums, exactly."""
        for name, data, settings in self.sets:
            started = time.monotonic()
            self.of_sets = {key: value for key, value in self.of_sets.items() if key.partition("/")[2] != name}
            like_it = settings.segmenter(segmenter, _IMAGES_AT_ONCE)
            try:
                result = evaluate_segmentation(like_it, data, place=place)
            except InputError as error:
                # On every process alike. Days of training are worth more than one measurement.
                self.log(f"step {self.step}: {name} is not measured, the run goes on: {error}")
                continue
            if result is None:
                continue
            scores = {f"{measure}/{name}": 100 * value for measure, value in result.scores().items()}
            self.of_sets |= {key: value for key, value in scores.items() if math.isfinite(value)}
            seconds = time.monotonic() - started
            self.log(
                f"step {self.step}: {name} {scores[f'mean_iou/{name}']:.1f} (mean IoU, %; {result.images} images, {duration(seconds)})"
            )

    def measures(self) -> dict[str, float]:
        """What was measured last, by the names of its records."""
        of_scenes = {f"mean_iou/level_{level}": value for level, value in self.measured.items()}
        return of_scenes | self.of_sets | self.evaluated

    def measure_of_now(self) -> float | None:
        """How good the model was found at this very step: the mean of mean IoUs and of what `evaluate` said. None without one of the
        sets: a mean of others would be no measure to compare by."""
        names = [f"mean_iou/{name}" for name, _, _ in self.sets]
        if not all(name in self.of_sets for name in names):
            return None
        of_sets = [self.of_sets[name] for name in names]
        found = [*self.measured.values(), *of_sets, *self.evaluated.values()]
        return float(np.mean(found)) if found and self.evaluates_now() else None

    def save_checkpoint(
        self,
        write_model: Callable[[Path], None],
        arrays: Mapping[str, NDArray[Any]],
        values: Mapping[str, Any],
        ranks: Sequence[Mapping[str, Any]],
    ) -> bool:
        """Writes where the run stands; whether it could. A disk that is full is told and no reason to end a run.

        Args:
            write_model: writes the model into a directory; arrays, values: the framework's; ranks: of each process, the place in
                the data under "data", and what else is its own.
        """

        def write(directory: Path) -> None:
            write_model(directory)
            self.processor.save_pretrained(directory)

        own = {
            "recipe": to_table(self.recipe),
            "finished": self.finished,
            "bad_steps": self.bad_steps,
            "minutes": self.minutes,
            "untrained": self.untrained,
            "measured": self.measured,
            "ranks": list(ranks),
        }
        state = RunState(self.step, {**values, **own}, arrays, self.measure_of_now())
        try:
            path = self.checkpoints.save(state, write)
        except CheckpointError as error:
            if self.finished:
                raise
            self.log(f"{error}; the run goes on")
            return False
        self.log(f"step {self.step}: saved {path}")
        return True

    def result(self) -> TrainResult:
        return TrainResult(
            self.directory,
            self.measured,
            self.untrained,
            self.majority,
            tuple(self.losses),
            self.minutes,
            self.bad_steps,
            self.rank,
        )


def open_evaluation(settings: EvaluationSettings) -> list[tuple[str, SegmentationSet, Settings]]:
    """The sets of a recipe, each with its name in records and how it is evaluated.

    Raises:
        InputError: no such set, or files that are missing.
    """
    opened = []
    for spelled in settings.data:
        kind = spelled.partition(":")[0]
        protocol = default_protocol(kind) if settings.protocol == "usual" else settings.protocol
        how = protocol_settings(protocol, kind)
        for data in open_sets(spelled, split=settings.split or None, limit=settings.limit or None, names=how.names):
            # As `groupvit evaluate` has it: a threshold where there is a background, and no words for it.
            threshold = how.background if settings.background is None else settings.background
            by_threshold = data.has_background and not data.background_labels
            if by_threshold and threshold is None:
                raise InputError(f"{spelled} has a background class: give evaluation.background, a threshold for it")
            opened.append((spelled, data, replace(how, background=threshold if by_threshold else None)))
    kinds = [data.kind for _, data, _ in opened]
    return [(spelled if kinds.count(data.kind) > 1 else data.kind, data, how) for spelled, data, how in opened]


def _silent(line: str) -> None:
    """The log of all processes but the first."""


def _as_read_now(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe of a checkpoint with the defaults of settings that are newer than it; as it is if it has others that are gone."""
    try:
        return to_table(read_settings(Recipe, table))
    except InputError:
        return table


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in {**old, **new}:
        one, other = old.get(key), new.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{where}{key}.")
        elif one != other:
            yield f"{where}{key}", one, other


def _scenes(recipe: Recipe, log: Callable[[str], None]) -> dict[int, CaptionedImages]:
    scenes = recipe.scenes
    log(f"making {scenes.scenes_per_level} scenes for each of the levels {', '.join(map(str, scenes.levels))}")
    return {
        level: CaptionedImages.scenes(
            recipe.run.seed,
            scenes.scenes_per_level,
            level,
            recipe.scene_size,
            single_share=scenes.single_share,
            close_up_share=scenes.close_up_share,
        )
        for level in scenes.levels
    }


def matches(pattern: str, name: str) -> bool:
    """Whether a tensor's name has a run of components: "text_model", "group_token", "encoder.stages.0"."""
    return f".{pattern.strip('.')}." in f".{name}."


def learnt(names: Collection[str], settings: ModelSettings) -> set[str]:
    """Which of these parameters a recipe's model learns. InputError for a pattern that fits none, or if nothing is left."""
    for pattern in (*settings.freeze, *settings.train_only):
        if not any(matches(pattern, name) for name in names):
            parts = sorted({name.split(".")[0] for name in names})
            raise InputError(
                f"no parameter is called {pattern!r}; there are those of {', '.join(parts)}, and parts of them such as group_token"
            )

    def fits(patterns: Iterable[str], name: str) -> bool:
        return any(matches(pattern, name) for pattern in patterns)

    if settings.train_only:
        found = {name for name in names if fits(settings.train_only, name)}
    else:
        found = {name for name in names if not fits(settings.freeze, name)}
    if not found:
        raise InputError(f"model.freeze leaves nothing to train: {list(settings.freeze)}")
    return found


def multi_label_scale(source: str) -> float | None:
    """The multi-label loss's temperature, as the logarithm of its factor, of a checkpoint that a run of this package wrote."""
    files = (CONFIG_NAME, WEIGHTS_NAME)
    with read_lock(resolve(source, patterns=files, required=files)) as directory:
        for path, names in find_weights(directory).files.items():
            if MULTI_LABEL_SCALE in names:
                return float(dict(read_arrays(path, [MULTI_LABEL_SCALE]))[MULTI_LABEL_SCALE])
    return None


def start_processor(recipe: Recipe, captions: Sequence[str]) -> GroupViTProcessor:
    """The processor of a run: that of the checkpoint or tokenizer it names, for the recipe's image size, else a learnt one."""
    settings = recipe.model
    if not (settings.init_from or settings.tokenizer):
        if recipe.data is not None:
            raise InputError(
                'model.tokenizer is empty, and only on made scenes a tokenizer is learnt; name one, such as "nvidia/groupvit-gcc-yfcc"'
            )
        return make_processor(recipe, captions)
    processor = _named_processor(settings.init_from, settings.tokenizer)
    if not settings.init_from:
        processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, settings.text_length)
    images, side = processor.image_processor, settings.image_size
    if images.crop_size != {"height": side, "width": side}:
        size = {"height": side, "width": side} if "height" in images.size else {"shortest_edge": side}
        given = {**images.to_dict(), "size": size, "crop_size": {"height": side, "width": side}}
        processor.image_processor = GroupViTImageProcessor.from_dict(given)
    return processor


def _named_processor(init_from: str, tokenizer: str) -> GroupViTProcessor:
    """That of the checkpoint to start from or, where it has none or there is no such checkpoint, of `model.tokenizer`."""
    lacking = ""
    if init_from:
        directory = resolve(init_from, patterns=(CONFIG_NAME, *PROCESSOR_FILES))
        if not (lacking := missing_parts(directory)):
            return GroupViTProcessor.from_pretrained(directory)
    remedy = (
        "name a folder or a model on the hub that has a tokenizer and an image processor in the setting model.tokenizer"
    )
    if lacking and not tokenizer:
        raise CheckpointError(f"{init_from} has {lacking}: {remedy}")
    try:
        return GroupViTProcessor.from_pretrained(tokenizer)
    except CheckpointError as error:
        lacking = f"{init_from} has {lacking}, and " if lacking else ""
        raise CheckpointError(f"{lacking}model.tokenizer cannot be used ({error}): {remedy}") from error


def grouping_measures(assignment: NDArray[Any], *, of_patches: bool = True) -> dict[str, float]:
    """Whether a grouping tells anything, from the soft assignment `[B, G, S]` of some images.

    groups_in_use: groups that hold a segment, on the mean over images: 1 where one group takes all.
    assignment_entropy: of the groups' shares of an image's segments, 1 where all are as large, 0 where one takes all.
    map_likeness: how many patches are in the same group as the patch at the same place of another image: 1 for equal maps. Not for a
    later block, whose segments are groups and have no place (`of_patches` False).
    """
    images, groups, _ = assignment.shape
    chosen = assignment.argmax(axis=1)  # [B, S]
    shares = np.stack([(chosen == group).mean(axis=1) for group in range(groups)], axis=1)
    logarithm = np.log(np.where(shares > 0, shares, 1.0))
    measures = {
        "groups_in_use": float((shares > 0).sum(axis=1).mean()),
        "assignment_entropy": float(-(shares * logarithm).sum(axis=1).mean() / max(math.log(groups), 1e-9)),
    }
    if images > 1 and of_patches:
        measures["map_likeness"] = float((chosen == np.roll(chosen, 1, axis=0)).mean())
    return measures


def collapse(measures: Mapping[str, float]) -> str:
    """What is wrong with a grouping of these measures, in a sentence; empty if nothing is."""
    if measures["groups_in_use"] < FEW_GROUPS:
        return f"the grouping has collapsed: {measures['groups_in_use']:.2g} groups hold all patches of an image"
    if measures.get("map_likeness", 0.0) > LIKE_MAPS:
        return f"the grouping has collapsed: maps of different images are alike in {measures['map_likeness']:.0%} of the patches"
    return ""


def make_processor(recipe: Recipe, captions: Sequence[str]) -> GroupViTProcessor:
    """A tokenizer learnt from captions and templates, and an image processor that keeps pictures of the trained size."""
    sentences = [template.format(caption) for template in recipe.scenes.templates for caption in captions[:2000]]
    tokenizer = CLIPTokenizer.train(sentences, recipe.model.vocab_size, model_max_length=recipe.model.text_length)
    side = recipe.model.image_size
    images = GroupViTImageProcessor(size={"height": side, "width": side}, crop_size={"height": side, "width": side})
    return GroupViTProcessor(images, tokenizer)


def measure(segmenter: Segmenter, recipe: Recipe) -> dict[int, float]:
    """Mean IoU in percent for each level of the recipe's held-out scenes, background left out of the mean.

    Measured as a user would get it: the level's classes with their synonyms are the labels, the names of the backgrounds are
    background labels.
    """
    return {
        level: 100.0 * mean_iou(scene_confusion(segmenter, held_out_scenes(recipe, level)), background=0)
        for level in recipe.scenes.levels
    }


def held_out_scenes(recipe: Recipe, level: int) -> list[Scene]:
    """The scenes of a level that the recipe never trains on."""
    size = (recipe.scene_size, recipe.scene_size)
    return [
        make_scene(recipe.scenes.held_out_seed, index, level, size) for index in range(recipe.scenes.held_out_scenes)
    ]


def majority_mean_iou(recipe: Recipe) -> dict[int, float]:
    """What `measure` would say of a model that calls every pixel of a level by its most frequent class."""
    result = {}
    for level in recipe.scenes.levels:
        masks = np.stack([scene.mask for scene in held_out_scenes(recipe, level)])
        classes = len(LEVELS[level]) + 1
        most = 1 + int(np.bincount(masks.ravel(), minlength=classes)[1:].argmax())
        confusion = confusion_matrix(masks, np.full_like(masks, most), classes, ignore_index=None)
        result[level] = 100.0 * mean_iou(confusion, background=0)
    return result


def scene_confusion(segmenter: Segmenter, scenes: Sequence[Scene]) -> NDArray[np.int64]:
    """Confusion matrix of scenes of one level: rows the masks, columns what the segmenter says; 0 is background."""
    classes = LEVELS[scenes[0].level]
    segmenter.set_labels([Label(names[0], names[1:]) for names in classes], [Label(n[0], n[1:]) for n in BACKGROUNDS])
    confusion = np.zeros((len(classes) + 1,) * 2, np.int64)
    results = segmenter.iter(Image.fromarray(scene.image) for scene in scenes)
    for scene, result in zip(scenes, results, strict=True):
        confusion += confusion_matrix(scene.mask, result.label_map, len(classes) + 1, ignore_index=None)
    return confusion


def percentages(measured: Mapping[int, float]) -> str:
    return ", ".join(f"level {level} {value:.1f}" for level, value in measured.items()) + " (mean IoU, %)"


def _rounded(measured: Mapping[int, float]) -> dict[str, float]:
    return {str(level): round(value, 1) for level, value in measured.items()}
