"""Recipes: the settings of a training run.

A recipe is a TOML file. Those in `recipes/` have names, your own are read by path: adding one is adding a file. One may
be based on another (`base = "NAME"`, or a path beside the file) and states only what differs. `settings.changed`
replaces single settings.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from groupvit_common.data.captions.settings import DataSettings
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.evaluation.datasets.registry import ProtocolName
from groupvit_common.storage.reading import read_text
from groupvit_common.training.settings import parse_change, read_settings, with_changes

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model and its initial weights. The defaults are the paper's model.

    `depths`: layers of each stage. `groups`: of each grouping block, with as many group tokens; one block fewer than
    stages. `drop_path`: rate of the last vision layer; the rates rise in a line from 0.

    `logit_scale`: initial factor of similarities, 1 / temperature. `position_amplitude`: position embeddings start as
    waves of this height (0: the model's own initial values).

    `tokenizer`: a checkpoint's directory or name on the hub; empty: trained on the captions, with `vocab_size` entries.
    `text_length`: tokens of the longest text.

    `init_from`: a checkpoint to start from (directory, name on the hub, or "demo"). The model then has its
    configuration and tokenizer (`tokenizer` where it has none). Of the settings above only `image_size` (positions are
    interpolated) and `drop_path` apply; the recipe that is saved with a run has the model's own sizes. `freeze`: parts
    that are not trained; `train_only`: the only parts that are. Both are consecutive components of tensor names:
    "text_model", "group_token", "vision_model.encoder.stages.0".
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 384
    heads: int = 6
    mlp_ratio: int = 4
    depths: tuple[int, ...] = (6, 3, 3)
    groups: tuple[int, ...] = (64, 8)
    drop_path: float = 0.1
    text_width: int = 256
    text_heads: int = 4
    text_layers: int = 12
    text_mlp_ratio: int = 4
    text_length: int = 77
    embedding: int = 256
    projection_width: int = 4096
    initializer_range: float = 0.02
    logit_scale: float = 1 / 0.07
    position_amplitude: float = 0.0
    tokenizer: str = "nvidia/groupvit-gcc-yfcc"
    vocab_size: int = 49408
    init_from: str = ""
    freeze: tuple[str, ...] = ()
    train_only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.groups) + 1:
            raise InputError(
                f"model.depths must have one entry more than model.groups, whose blocks stand between the stages; "
                f"got {list(self.depths)} and {list(self.groups)}"
            )
        if self.freeze and self.train_only:
            raise InputError("model.freeze and model.train_only exclude each other: give one of them")
        sizes = "image_size patch_size width heads mlp_ratio embedding projection_width vocab_size"
        _check_least("model", self, 1, *sizes.split(), "text_width", "text_heads", "text_layers", "text_mlp_ratio")
        _check_least("model", self, 3, "text_length")
        _check_least("model", self, 0, "initializer_range", "position_amplitude")
        for name, least in (("depths", 0), ("groups", 1)):
            if any(number < least for number in getattr(self, name)):
                raise InputError(f"model.{name} must each be at least {least}, got {list(getattr(self, name))}")
        for width, heads in (("width", "heads"), ("text_width", "text_heads")):
            if getattr(self, width) % getattr(self, heads) and not self.init_from:
                raise InputError(
                    f"model.{width} must be a multiple of model.{heads}, "
                    f"got {getattr(self, width)} and {getattr(self, heads)}"
                )
        if self.image_size % self.patch_size and not self.init_from:
            raise InputError(
                f"model.image_size must be a multiple of model.patch_size, got {self.image_size} and {self.patch_size}"
            )
        if not 0 < self.logit_scale < math.inf:
            raise InputError(f"model.logit_scale must be positive, got {self.logit_scale}")
        _check_fraction("model", self, "drop_path")


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """Synthetic scenes (`groupvit_common.data.scenes`): the data of a run that names no other.

    `levels`: one in each step, in the order of `turns`, over and over; `scenes_per_level` scenes from the run's seed.
    Validation scenes are made from `held_out_seed`, `held_out_scenes` a level. `templates`: one is drawn in each step
    for all prompts. `prompts`: class names of each caption for the multi-label loss. `mixed_share`: fraction of each
    batch that is mixed for the objective "groups": part of one image beside part of another (`mixed_quarters`: of
    four), each patch with its own caption. `single_share`: fraction of training scenes with one object.
    `close_up_share`: fraction in which one thing fills the image (`make_scene`). Validation scenes have two to four
    objects. `size`: side of a scene in pixels, which is enlarged to `image_size` (0: as it is), so that a patch of as
    many pixels shows less of it.
    """

    levels: tuple[int, ...] = (1, 2, 3)
    turns: tuple[int, ...] = (1, 2, 3, 2)
    size: int = 0
    scenes_per_level: int = 15_000
    held_out_seed: int = 1_000_003
    held_out_scenes: int = 200
    templates: tuple[str, ...] = ("{}", "a {}", "a {} object", "a photo of a {}.", "a picture of {}.")
    prompts: int = 3
    mixed_share: float = 0.5
    mixed_quarters: bool = False
    single_share: float = 0.0
    close_up_share: float = 0.0

    def __post_init__(self) -> None:
        _check_least("scenes", self, 1, "scenes_per_level", "held_out_scenes")
        _check_least("scenes", self, 0, "held_out_seed", "prompts", "size")
        _check_fraction("scenes", self, "mixed_share", "single_share", "close_up_share")
        if self.single_share + self.close_up_share > 1:
            raise InputError(
                "scenes.single_share and scenes.close_up_share must not exceed 1 together, "
                f"got {self.single_share} and {self.close_up_share}"
            )
        if not self.turns or set(self.turns) != set(self.levels):
            raise InputError(
                f"scenes.turns must name every one of the levels {list(self.levels)} and no other, "
                f"got {list(self.turns)}"
            )


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """The losses and the grouping.

    `kind` "paper": contrastive loss of pooled images and captions, plus `multi_label_weight` times the multi-label
    contrastive loss with the data's prompts of each caption, which has its own temperature. `kind` "groups" (scenes
    only) trains groups against the batch's prompts (`loss.py` of a backend), beyond the paper: `naming_weight` patch
    naming, `claim_weight` prompt claims by `claim_patches` patches each; `ungrouped_weight` the same two for the
    patches that enter the grouping block; `paper_weight` the paper's losses on the pooled images that are not mixed,
    both at the multi-label loss's temperature (the model's is that of groups).

    Grouping is soft until the fraction `hard_from` of the steps, then hard with straight-through gradients; `gumbel`
    adds the paper's noise.
    """

    kind: Literal["paper", "groups"] = "paper"
    multi_label_weight: float = 1.0
    naming_weight: float = 1.0
    claim_weight: float = 1.0
    claim_patches: int = 12
    ungrouped_weight: float = 1.0
    paper_weight: float = 0.0
    hard_from: float = 0.0
    gumbel: bool = True

    def __post_init__(self) -> None:
        _check_least("objective", self, 0, *(f.name for f in fields(self) if f.name.endswith("_weight")))
        _check_least("objective", self, 1, "claim_patches")
        if self.kind == "paper" and self.paper_weight:
            raise InputError(
                "objective.paper_weight is the weight of the paper's losses beside kind=groups, "
                f"got {self.paper_weight} with kind=paper; set it to 0"
            )
        _check_fraction("objective", self, "hard_from")

    @property
    def has_paper_losses(self) -> bool:
        """True if the paper's losses are among the losses."""
        return self.kind == "paper" or self.paper_weight > 0


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Segmentation sets that measure the model, zero-shot, every `run.evaluate_every` steps, besides validation scenes.

    `data`: the sets, as for `groupvit evaluate --data`: "voc:VOCdevkit/VOC2012", "folder:mine". `split`: of each,
    instead of its default. `limit`: number of images of each, the first ones (0: all). `protocol`: as for `--protocol`;
    "usual": that command's default. `background`: a threshold in the place of the protocol's, for sets with a
    background.
    """

    data: tuple[str, ...] = ()
    split: str = ""
    limit: int = 0
    protocol: Literal["usual", ProtocolName] = "usual"
    background: float | None = None

    def __post_init__(self) -> None:
        _check_least("evaluation", self, 0, "limit")
        if self.background is not None:
            _check_fraction("evaluation", self, "background")
        twice = [name for name in self.data if self.data.count(name) > 1]
        if twice:
            raise InputError(f"evaluation.data names {twice[0]} twice")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW, with `weight_decay` where `schedule.has_weight_decay`; gradients clipped to the norm `clip_norm` (0: not
    clipped).

    The weights that are measured and saved are an exponential moving average with decay `ema_decay` (0: the last
    weights).
    """

    learning_rate: float = 1.6e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float = 5.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_fraction("optimizer", self, "ema_decay")
        _check_least("optimizer", self, 0, "learning_rate", "epsilon", "weight_decay", "clip_norm")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optimizer.betas must be at least 0 and below 1, got {list(self.betas)}")


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """The length of the run and the learning rate.

    `batch_size`: images of one step, on all devices together. `steps`: of the run; 0: `epochs` of `images_per_epoch`.
    The rate rises in a line from the fraction `initial_rate` of `learning_rate` over `warmup_steps` (or
    `warmup_epochs`), then falls as a cosine to the fraction `final_rate`.
    """

    batch_size: int = 4096
    steps: int = 0
    epochs: float = 30.0
    images_per_epoch: int = 0
    warmup_steps: int = 0
    warmup_epochs: float = 2.0
    initial_rate: float = 0.0
    final_rate: float = 0.025

    def __post_init__(self) -> None:
        # Batch norm and mixing need several images.
        _check_least("schedule", self, 4, "batch_size")
        _check_least("schedule", self, 0, "steps", "warmup_steps", "epochs", "images_per_epoch", "warmup_epochs")
        _check_fraction("schedule", self, "initial_rate", "final_rate")
        if self.total_steps < 1:
            raise InputError(
                "schedule needs steps, or epochs and images_per_epoch of at least one batch, got "
                f"epochs {self.epochs:g} of {self.images_per_epoch} images for batch_size {self.batch_size}"
            )
        if not self.total_warmup_steps < self.total_steps:
            # Named as they were given.
            by_steps, of_steps = bool(self.warmup_steps), bool(self.steps)
            warmup = (
                f"schedule.warmup_steps {self.warmup_steps}"
                if by_steps
                else f"schedule.warmup_epochs {self.warmup_epochs:g}"
            )
            run = f"schedule.steps {self.steps}" if of_steps else f"schedule.epochs {self.epochs:g}"
            counted = "" if by_steps and of_steps else f" ({self.total_warmup_steps} of {self.total_steps} steps)"
            raise InputError(
                f"{warmup} must be less than {run}{counted}: set {'warmup_steps' if by_steps else 'warmup_epochs'} to "
                "less, such as a twentieth of the run"
            )

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, given as such or in epochs."""
        return self.steps or self._steps_of(self.epochs)

    @property
    def total_warmup_steps(self) -> int:
        return self.warmup_steps or self._steps_of(self.warmup_epochs)

    def _steps_of(self, epochs: float) -> int:
        return int(epochs * self.images_per_epoch / self.batch_size)


Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Computation, logging and checkpoints.

    `seed`: of all randomness. `workers`: processes that decode images, on each rank (scenes need none). `precision`: of
    activations (weights are float32 throughout). `compile`: the towers. `gradient_checkpointing`: trades time for
    memory. `chunk_size`: images in the towers at once on one device (0: its whole part of the batch). Smaller chunks
    need less memory and change no gradient: the losses see the features of the whole batch.

    `log_every`: steps between lines and records. `evaluate_every`: steps between evaluations (0: at the end).
    `save_every`, `save_minutes`: steps and minutes between checkpoints (0: none), of which the last `keep` and, with
    `keep_best`, the best one stay. `max_bad_steps`: training ends after so many skipped steps, whose loss or gradient
    is not finite.

    `tensorboard`: also write event files. `wandb`: name of a Weights & Biases project (empty: none). `peak_tflops`: of
    one device at this precision, for the utilisation (0: known for some devices).
    """

    seed: int = 0
    workers: int = 4
    precision: Precision = "bfloat16"
    compile: bool = False
    gradient_checkpointing: bool = False
    chunk_size: int = 0
    log_every: int = 100
    evaluate_every: int = 2500
    save_every: int = 2500
    save_minutes: float = 0.0
    keep: int = 3
    keep_best: bool = True
    max_bad_steps: int = 10
    tensorboard: bool = False
    wandb: str = ""
    peak_tflops: float = 0.0

    def __post_init__(self) -> None:
        amounts = "seed workers chunk_size save_minutes peak_tflops evaluate_every save_every"
        _check_least("run", self, 0, *amounts.split())
        _check_least("run", self, 1, "log_every", "keep", "max_bad_steps")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one training run, in sections."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings | None = None
    """Captioned images; None: synthetic scenes."""
    scenes: SceneSettings = field(default_factory=SceneSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        if self.run.seed == self.scenes.held_out_seed:
            raise InputError(
                f"run.seed {self.run.seed} is the seed of the validation scenes (scenes.held_out_seed); choose another"
            )
        # With init_from, `with_checkpoint_model` checks.
        if self.objective.kind == "groups" and len(self.model.groups) != 1 and not self.model.init_from:
            raise InputError(
                f"the objective 'groups' trains one grouping block, got model.groups = {list(self.model.groups)}"
            )
        if self.objective.kind == "groups" and self.objective.paper_weight:
            whole = self.schedule.batch_size - self.mixed_images
            if whole < 2:
                raise InputError(
                    "objective.paper_weight compares images that are not mixed: of schedule.batch_size "
                    f"{self.schedule.batch_size} and scenes.mixed_share {self.scenes.mixed_share} remain {whole}, "
                    "at least 2 are needed"
                )
        if self.data is not None and self.objective.kind != "paper":
            raise InputError(
                f"the objective {self.objective.kind!r} is for synthetic scenes; for a run with data set kind=paper"
            )
        if self.data is not None and self.data.image_size != self.model.image_size:
            raise InputError(
                f"data.image_size must be model.image_size, got {self.data.image_size} and {self.model.image_size}; "
                "set both"
            )

    @property
    def scene_size(self) -> int:
        """Side of a scene in pixels."""
        return self.scenes.size or self.model.image_size

    @property
    def mixed_images(self) -> int:
        """Number of mixed images of a batch for the objective "groups": its first ones."""
        return int(self.schedule.batch_size * self.scenes.mixed_share)

    @property
    def multi_label(self) -> bool:
        """True if the multi-label loss is among the losses."""
        prompts = (self.scenes if self.data is None else self.data).prompts
        return self.objective.has_paper_losses and prompts > 0 and self.objective.multi_label_weight > 0

    @property
    def needs_prompts(self) -> bool:
        """True if a loss uses prompts; else they stay out of the text tower, and of its projection's statistics."""
        return self.objective.kind == "groups" or self.multi_label


def _check_least(section: str, settings: Any, least: float, *names: str) -> None:
    for name in names:
        if not least <= getattr(settings, name) < math.inf:
            raise InputError(f"{section}.{name} must be at least {least:g}, got {getattr(settings, name)}")


def _check_fraction(section: str, settings: Any, *names: str) -> None:
    for name in names:
        if not 0.0 <= getattr(settings, name) <= 1.0:
            raise InputError(f"{section}.{name} must lie between 0 and 1, got {getattr(settings, name)}")


# Files


def recipe_names() -> tuple[str, ...]:
    """Returns the names of the recipes in this package."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.toml")))


def get_recipe(name_or_path: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        name_or_path: one of `recipe_names`, or a TOML file.
        changes: settings to replace, such as "optimizer.learning_rate=1e-3" or "learning_rate=1e-3".

    Raises:
        InputError: no such name or file, a file that is no recipe, an impossible setting.
    """
    path = _find(name_or_path, Path())
    # Changes are applied before settings are checked: a file may leave out what they give.
    table = with_changes(Recipe, _table(path, ()), _in_epochs(dict(map(parse_change, changes)), "schedule."))
    try:
        return read_settings(Recipe, table)
    except InputError as error:
        raise InputError(f"recipe {path.stem if path.parent == RECIPES else path}: {error}") from error


def _find(name_or_path: str | Path, beside: Path) -> Path:
    name = str(name_or_path)
    if name in recipe_names():
        return RECIPES / f"{name}.toml"
    path = beside / name
    if path.is_file():
        return path
    if name.endswith(".toml"):
        raise InputError(f"there is no recipe file {path}")
    raise InputError(
        f"no recipe called {name!r}; there are {', '.join(recipe_names())}, or give the path of a TOML file"
    )


def _table(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Returns the content of a recipe file, merged into that of its base."""
    if path in seen:
        raise InputError(f"{path} is based on itself, by way of {', '.join(map(str, seen))}")
    try:
        table = tomllib.loads(read_text(path))
    except CheckpointError as error:
        raise InputError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as TOML: {error}") from error
    base = table.pop("base", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise InputError(f"{path}: base must be the name or path of a recipe, got {base!r}")
    if isinstance(table.get("schedule"), dict):
        table["schedule"] = _in_epochs(table["schedule"])
    return _merged(_table(_find(base, path.parent), (*seen, path)), table)


def _in_epochs(given: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Returns settings to merge into others: a length in epochs replaces one in steps, which would take precedence."""
    names = {name.removeprefix("schedule.") for name in given}
    return {**given, f"{section}steps": 0} if "epochs" in names and "steps" not in names else dict(given)


def _merged(base: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in table.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
