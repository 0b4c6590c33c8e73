"""Options of segmentation: everything that decides how pixels get labels, in one record.

The `Segmenter`, the commands' flags, the protocols, the journal of an evaluation and the saved JSON derive from its
fields. An option is one field, with its default, the kind of its values, what it acts on and its help text, and the
code that uses it.

Nothing heavy is imported here: `groupvit --help` reads this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from groupvit_common.errors import InputError
from groupvit_common.model.checks import is_number, is_whole_number

if TYPE_CHECKING:
    from groupvit_common.model.config import GroupViTConfig
    from groupvit_common.preprocessing.prompts import Combination

Assignment = Literal["hard", "soft"]
Kind = Literal["flag", "count", "times", "fraction", "positive", "choice", "scales", "distances", "templates"]
"""Kinds of values; the command line has a type for each."""
Scope = Literal["groups", "view", "views", "scores", "detail"]
"""What an option acts on. "groups": the labels of groups, which all their pixels share. "view": the pixels of a view.
"views": how many there are. "scores": those of all pixels, over all views. "detail": the work of another option."""

DEFAULT_MODEL = "nvidia/groupvit-gcc-yfcc"
"""The checkpoint of the `Segmenter` and of the commands, unless another one is named."""

DILATIONS = (1, 2, 4, 8, 12, 24)
"""The dilations of refinement by its authors."""

# Attention over the patches of a larger image takes hours and all memory.
_MAX_SIDE = 8192
# Similarities of up to 100 divided by less are beyond float32 at some point; long before it only the best label counts.
_MIN_TEMPERATURE = 1e-6


def _is_count(value: Any) -> bool:
    return is_whole_number(value) and value >= 1


def _is_positive(value: Any) -> bool:
    return is_number(value) and 0 < value < math.inf


def _are_different(values: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(values, tuple) and bool(values) and all(map(accepts, values)) and len({*values}) == len(values)


# For each kind: the test of a value, and the values in words.
_KINDS: dict[Kind, tuple[Callable[[Any], bool], str]] = {
    "flag": (lambda value: isinstance(value, bool), "True or False"),
    "count": (_is_count, "a whole number of at least 1"),
    "times": (lambda value: is_whole_number(value) and value >= 0, "a whole number of at least 0"),
    "fraction": (lambda value: is_number(value) and 0 <= value <= 1, "a number between 0 and 1"),
    "positive": (_is_positive, "a number above 0"),
    "scales": (lambda value: _are_different(value, _is_positive), "different numbers above 0, such as 0.75, 1, 1.25"),
    "distances": (lambda v: _are_different(v, _is_count), "different whole numbers of at least 1, such as 1, 2"),
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """The properties of an option besides its name, type and default.

    `kind`: of its values, None apart. `help`: its help text. `metavar`: stands for a value in the help of a command.
    `choices`: the values of the kind "choice". `scope`: what it acts on. `command`: the command with the fewest options
    that has it; `classify`, `segment` (and `compare`), `evaluate` have ever more. `default`: its default.
    """

    kind: Kind
    help: str
    metavar: str | None
    choices: tuple[str, ...]
    scope: Scope
    command: Literal["classify", "segment", "evaluate"]
    default: Any = None

    @property
    def optional(self) -> bool:
        """True if None is a value."""
        return self.default is None

    @property
    def moves_pixels(self) -> bool:
        """True if pixels may get another label than their group's by this option."""
        return self.scope in ("view", "views", "scores")

    def is_used(self, value: Any) -> bool:
        """Tells whether a value is not the one that leaves each pixel the label of its group, in one view."""
        if self.kind == "scales":
            return len(value) > 1
        return bool(value != (self.choices[0] if self.kind == "choice" else self.default))

    def checked(self, name: str, given: Any) -> Any:
        """Returns a value with NumPy's numbers as Python's and lists as tuples. Raises `InputError` for one of another
        kind."""
        value = given.tolist() if hasattr(given, "tolist") else given
        if isinstance(value, Iterable) and not isinstance(value, str | bytes | Path):
            value = tuple(value)
        if value is None and self.optional:
            return None
        if self.kind == "templates":
            from groupvit_common.preprocessing.prompts import get_templates

            get_templates(value)
            return value
        if self.kind == "choice":
            accepted, expected = value in self.choices, " or ".join(f'"{choice}"' for choice in self.choices)
        else:
            accepts, expected = _KINDS[self.kind]
            accepted = accepts(value)
        if not accepted:
            raise InputError(f"{name} must be {expected}, got {given!r}")
        return value


def _about(
    kind: Kind,
    scope: Scope,
    help_text: str,
    *,
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    command: Literal["classify", "segment", "evaluate"] = "segment",
) -> dict[str, Option]:
    return {"option": Option(kind, help_text, metavar, choices, scope, command)}


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions:
    """The options of segmentation: how pixels get labels.

    The order of the fields is that of saved settings. Numbers and lists of NumPy become Python's.

    Raises:
        InputError: a value that an option does not take, or options that exclude each other.
    """

    templates: str | int | Path | Sequence[str] = field(default="one", metadata=_about(
        "templates", "groups",
        "sentences around each word: one, seven, eighty, your own with {} in it, or a file of such lines "
        '(default: "a photo of a {}.")', metavar="SET", command="classify",
    ))  # fmt: skip
    normalize_prompts: bool = field(default=True, metadata=_about(
        "flag", "groups", "bring each sentence's embedding to length 1 before a label's are averaged",
        command="evaluate",
    ))  # fmt: skip
    """As in CLIP practice. False: the embeddings as they are, as in the authors' evaluation."""
    background: float | None = field(default=None, metadata=_about(
        "fraction", "groups", "pixels whose best label scores less (0 to 1) become background; "
        "without it every pixel gets a label", metavar="SCORE",
    ))  # fmt: skip
    """Scores are the authors': a squared probability unless `top_k` is given. With `top_k=5` their thresholds mean the
    same here: 0.95 for VOC and COCO, 0.35 for Context."""
    temperature: float = field(default=1.0, metadata=_about(
        "positive", "groups", "above 1 confidence is lower, below 1 higher (default: 1)", metavar="T"
    ))  # fmt: skip
    """Divides the similarities of groups and labels before they become scores. It moves the meaning of a `background`
    threshold and, with soft assignment, the borders."""
    assignment: Assignment | None = field(default=None, metadata=_about(
        "choice", "view",
        "hard: a pixel takes the label of its largest group; soft: labels are weighted by the groups in a "
        "pixel (default: as the model was trained, else hard)", choices=("hard", "soft"),
    ))  # fmt: skip
    """None: the checkpoint's configuration under `segmentation_assignment` (our own key), else hard, as the authors
    do."""
    top_k: int | None = field(default=None, metadata=_about(
        "count", "groups", "only the K labels most like the whole image may appear; "
        "each window, scale and mirrored image ranks its own", metavar="K",
    ))  # fmt: skip
    """None: all labels. The authors use 5."""
    shorter_side: int | None = field(default=None, metadata=_about(
        "count", "groups", "resize images to this shorter side for the model "
        "(default: 448 for a model trained at 224, else its own)", metavar="PIXELS",
    ))  # fmt: skip
    window: int | None = field(default=None, metadata=_about(
        "count", "view", "the model sees windows of the resized image (default: all of it)", metavar="PIXELS"
    ))  # fmt: skip
    """Side of square windows, a multiple of the patch size; scores are averaged where windows overlap. The authors use
    448."""
    stride: int | None = field(default=None, metadata=_about(
        "count", "detail", "from one window to the next (default: half a window)", metavar="PIXELS"
    ))  # fmt: skip
    synonyms: Combination = field(default="mean", metadata=_about(
        "choice", "groups",
        "a label with several words is their mean, or as similar as the most similar of them (default: mean)",
        choices=("mean", "max"), command="classify",
    ))  # fmt: skip
    """One word or definition is one voice in either."""
    flip: bool = field(default=False, metadata=_about(
        "flag", "views", "average the scores with those of the mirrored image"
    ))  # fmt: skip
    scales: tuple[float, ...] = field(default=(1.0,), metadata=_about(
        "scales", "views",
        "average the scores over these multiples of the shorter side, such as 0.75,1,1.25", metavar="A,B,..."
    ))  # fmt: skip
    """With `flip` over all of them and their mirror images. Groups are those of the scale nearest 1."""
    refine: int = field(default=0, metadata=_about(
        "times", "scores", "let labels follow the image's edges (PAMR), so many times, such as 10", metavar="TIMES"
    ))  # fmt: skip
    """At the size at which the model sees the image: `groupvit_common.segmentation.refinement`. Its authors do it 10
    times."""
    refine_dilations: tuple[int, ...] = field(default=DILATIONS, metadata=_about(
        "distances", "detail", "for --refine: the distances of the pixels that it compares, such as 1,2,4 "
        "(default: 1,2,4,8,12,24)", metavar="A,B,...",
    ))  # fmt: skip
    foreground: float | None = field(default=None, metadata=_about(
        "fraction", "scores",
        "a pixel is background unless labels other than background have this fraction (0 to 1) of all "
        "scores, such as 0.8", metavar="SHARE",
    ))  # fmt: skip
    """The best of them then counts. Needs background labels or a `background` threshold. None: the largest score
    counts."""

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            object.__setattr__(self, name, option.checked(name, getattr(self, name)))
        if self.temperature < _MIN_TEMPERATURE:
            raise InputError(
                f"temperature must be at least {_MIN_TEMPERATURE:g}, got {self.temperature:g}: below it scores overflow"
            )
        if self.window is None and self.stride is not None:
            raise InputError(f"a stride of {self.stride} needs windows: give window as well")
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise InputError(
                f"windows of {self.window} pixels need a stride of 1 to {self.window} pixels, got {self.stride}"
            )

    @property
    def needs_scores(self) -> bool:
        """True if even a single view of the whole image is labelled by the scores of its pixels (`Scope` "scores")."""
        return any(o.scope == "scores" and o.is_used(getattr(self, name)) for name, o in OPTIONS.items())

    def for_model(self, config: GroupViTConfig) -> Self:
        """Returns the options with a model's own values in the place of None, templates as sentences, and the scale
        nearest 1 first.

        Raises:
            InputError: a window or an image that the model does not take.
        """
        from groupvit_common.preprocessing.prompts import get_templates

        vision = config.vision_config
        if self.window is not None and self.window % vision.patch_size:
            raise InputError(f"window must be a multiple of the patch size {vision.patch_size}, got {self.window}")
        side = self.shorter_side or (448 if vision.image_size == 224 else vision.image_size)
        largest = round(side * max(self.scales))
        if largest > _MAX_SIDE:
            raise InputError(
                f"shorter_side times the largest of scales is {largest} pixels, expected at most {_MAX_SIDE}: "
                f"the model was trained at {vision.image_size}"
            )
        return replace(
            self,
            templates=get_templates(self.templates),
            assignment=self.assignment or config.extra.get("segmentation_assignment", "hard"),
            shorter_side=side,
            stride=max(1, self.window // 2) if self.stride is None and self.window is not None else self.stride,
            # Pixels are measured at the first scale.
            scales=tuple(sorted(map(float, self.scales), key=lambda scale: abs(math.log(scale)))),
        )

    def check_foreground(self, is_background: Sequence[bool]) -> None:
        """Raises `InputError` if labels, of which these are background, cannot be weighed against a background."""
        has_background = any(is_background) or self.background is not None
        if self.foreground is not None and (all(is_background) or not has_background):
            raise InputError(
                "foreground weighs labels against a background: give labels and background_labels, or a background "
                "threshold"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the options by name, ready for JSON."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            name: list(v) if isinstance(v, tuple) else str(v) if isinstance(v, Path) else v
            for name, v in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the options of `to_dict`; those that are absent have their defaults.

        Raises:
            InputError: a name that is no option, or a value that an option does not take.
        """
        known = {each.name for each in fields(cls)}
        for name in values:
            if name not in known:
                raise InputError(f"there is no segmentation option {name!r}: there are {', '.join(sorted(known))}")
        return cls(**values)


OPTIONS: dict[str, Option] = {
    each.name: replace(each.metadata["option"], default=each.default) for each in fields(SegmentationOptions)
}
"""The options by name, in their order."""
