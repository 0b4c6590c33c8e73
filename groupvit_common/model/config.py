"""Configurations of a GroupViT, with the names and defaults of transformers.

`config.json` files of every transformers release that knew GroupViT (4.18 to 5.x) are read; keys that mean nothing here
are kept and written back, so that a file survives a round trip (`extra` lists them).
"""

import contextlib
import copy
import inspect
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform, get_origin

from groupvit_common.checkpoints.directory import CONFIG_NAME
from groupvit_common.checkpoints.hub import HubLocation, bundled, push, resolve
from groupvit_common.compat.config import COMPUTED, DEFAULTS, TransformersConfig
from groupvit_common.compat.model import ONLY, WITHOUT_EFFECT, harmless, with_token
from groupvit_common.errors import CheckpointError, InputError, short
from groupvit_common.storage.json_text import json_text, read_json
from groupvit_common.storage.saving import read_lock, write_file, write_text

# Of any width or count in a model; of layers, which are made one by one; of token ids.
_MOST, _MOST_LAYERS, _MOST_IDS = 1 << 20, 1 << 10, (1 << 31) - 1
# Early checkpoints carry this value by mistake; transformers then pools at the largest id, and so do we.
LEGACY_EOS_TOKEN_ID = 2
ACTIVATIONS = ("gelu", "quick_gelu", "gelu_new", "relu", "selu", "silu")


@dataclass_transform(kw_only_default=True)
class _Config(TransformersConfig):
    """Settings as attributes: the class annotations are the fields, their values the defaults."""

    model_type: ClassVar[str]
    # A tower's configuration may be read from a full model's file, where it stands under this key.
    base_config_key: ClassVar[str] = ""

    # Defaults of the model's flags of the same names, as transformers keeps them in every configuration.
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True

    def __init__(self, /, **settings: Any) -> None:
        for name, default in self._defaults().items():
            value = settings.pop(name, default)
            # Own copies: a default or a caller's list must not be shared, and JSON knows lists only.
            setattr(self, name, list(value) if isinstance(value, tuple | list) else value)
        self._keep({key: value for key, value in settings.items() if key not in ("model_type", "extra")})
        self.validate()

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        """Returns field name -> default value, in the order of definition, the class's own fields first."""
        return {
            name: getattr(cls, name)
            for base in cls.__mro__
            for name, annotation in inspect.get_annotations(base).items()
            if hasattr(cls, name) and not _is_class_variable(annotation)
        }

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._written() == other._written()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    @property
    def use_return_dict(self) -> bool:
        """True if models return records: `return_dict`, but not for `torchscript`, whose tracing knows tuples only."""
        return self.return_dict and not self.torchscript

    def validate(self) -> None:
        """Raises `InputError` for values that no model can have. Called by the constructor."""
        for name in ("output_attentions", "output_hidden_states", "return_dict"):
            if not isinstance(getattr(self, name), bool):
                raise self._error(name, "true or false")

    def check_model(self) -> None:
        """Raises `InputError` for values that each may stand in a configuration and of which no model can be made:
        programs written for transformers set one after the other. Called by the constructors of models."""

    # -- in and out --

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """Returns the configuration that `config_dict` (a parsed `config.json`) describes; `overrides` replace single
        settings. With `return_unused_kwargs=True`: that, and those of `overrides` that are no settings.

        A tower's class takes its part out of a full model's dictionary.

        Raises:
            InputError: the dictionary belongs to another kind of model, or holds impossible values.
        """
        settings = dict(config_dict)
        if cls.base_config_key and settings.get("model_type") == GroupViTConfig.model_type:
            full = GroupViTConfig.from_dict(settings)
            settings = getattr(full, cls.base_config_key).to_dict()
        found = settings.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise InputError(
                f"this configuration is of model type {short(found)}; {cls.__name__} reads {cls.model_type!r}"
                + (f" or the {cls.base_config_key} of a {GroupViTConfig.model_type!r}" if cls.base_config_key else "")
            )
        unused = {name: overrides.pop(name) for name in [*overrides] if return_unused_kwargs and not cls._knows(name)}
        config = cls(**{**settings, **overrides})
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def _knows(cls, name: str) -> bool:
        """Returns whether a keyword is a setting, or an attribute that every configuration of transformers has."""
        return name in cls._defaults() or name in DEFAULTS or name in COMPUTED

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns the configuration of a checkpoint: a directory, a `config.json`, or a name on the hub.

        Args:
            pretrained_model_name_or_path: directory, path of a JSON file, or "org/name".
            cache_dir, force_download, local_files_only, token, revision: these and `subfolder` locate it
                (`HubLocation`).
            kwargs: any setting's name overrides that setting; with `return_unused_kwargs=True` the rest is returned
                instead of refused.

        Returns:
            The configuration, or (configuration, unused keywords) with `return_unused_kwargs=True`.

        Raises:
            CheckpointError: there is no such checkpoint, or its `config.json` cannot be read or describes no possible
                model.
            InputError: an unknown keyword.
        """
        place = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
            "revision": revision,
        }
        kwargs = {**place, **with_token(kwargs)} if token is None else {**kwargs, **place}
        return_unused = kwargs.pop("return_unused_kwargs", False)
        location = HubLocation.take(kwargs)
        kwargs = harmless(kwargs, f"{cls.__name__}.from_pretrained", ONLY, WITHOUT_EFFECT)
        overrides = {key: kwargs.pop(key) for key in [*kwargs] if cls._knows(key)}
        if kwargs and not return_unused:
            raise InputError(
                f"{cls.__name__} has no setting {', '.join(map(repr, kwargs))}; settings are "
                f"{', '.join(cls._defaults())}"
            )
        with cls._file(pretrained_model_name_or_path, location) as file:
            config = cls.from_json_file(file, **overrides)
        return (config, kwargs) if return_unused else config

    @staticmethod
    @contextlib.contextmanager
    def _file(name: str | Path, location: HubLocation) -> Iterator[Path]:
        """Yields the `config.json` of a checkpoint, which stays as it is within the block."""
        if isinstance(name, str | os.PathLike) and bundled(name) is None and os.path.isfile(name):  # noqa: PTH113
            yield Path(name)
            return
        directory = resolve(name, patterns=[CONFIG_NAME], required=[CONFIG_NAME], location=location)
        with read_lock(directory) as directory:
            yield directory / CONFIG_NAME

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns what the `config.json` of a checkpoint holds, and the keywords that do not locate it."""
        kwargs = with_token(kwargs)
        location = HubLocation.take(kwargs)
        with cls._file(pretrained_model_name_or_path, location) as file:
            return read_json(file), harmless(kwargs, f"{cls.__name__}.get_config_dict", ONLY, WITHOUT_EFFECT)

    @classmethod
    def from_json_file(cls, json_file: str | Path, **overrides: Any) -> Self:
        """Returns the configuration in one JSON file. Raises as `from_pretrained`, naming the file."""
        path = Path(json_file)
        content = read_json(path)
        try:
            return cls.from_dict(content, **overrides)
        except InputError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, repo_id: str | None = None, **push_options: Any
    ) -> None:
        """Writes `config.json` into `save_directory`, which is made if need be.

        Args:
            push_to_hub: also send it to the repository `repo_id` (the directory's name if None); `push_options` are
                those of `push_to_hub`.

        Raises:
            CheckpointError: it cannot be written. InputError: `save_directory` is a file.
        """
        self.to_json_file(Path(save_directory) / CONFIG_NAME)
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).resolve().name, **push_options)

    def push_to_hub(self, repo_id: str, **push_options: Any) -> str:
        """Sends `config.json` to the hub; `push_options`, errors and result as in `checkpoints.hub.push`."""
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return push(directory, repo_id, **{"commit_message": "Upload config", **with_token(push_options)})

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Writes the JSON text of `to_json_string` to a file. Raises as `save_pretrained`."""
        write_file(Path(json_file_path), partial(write_text, text=self.to_json_string(use_diff)))

    def to_dict(self) -> dict[str, Any]:
        """Returns every setting, the model type and the kept keys, as new plain JSON values."""
        settings = {
            name: value.to_dict() if isinstance(value, _Config) else copy.deepcopy(value)
            for name, value in ((name, getattr(self, name)) for name in self._defaults())
        }
        return {**self._plain_extra(), "model_type": self.model_type, **settings}

    def _written(self) -> dict[str, Any]:
        """Returns what goes into a file: not where the configuration came from."""
        return {name: value for name, value in self.to_dict().items() if name != "_name_or_path"}

    def to_json_string(self, use_diff: bool = True) -> str:
        """Returns the JSON text of all settings, keys sorted. use_diff: False: with transformers' defaults of settings
        that GroupViT does not have."""
        return json_text(self._written() if use_diff else {**DEFAULTS, **self._written()})

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Sets several settings at once and validates the result."""
        for key, value in config_dict.items():
            setattr(self, key, value)
        self.validate()

    # -- checks --

    def _error(self, name: str, expected: str) -> InputError:
        return InputError(f"{type(self).__name__}: {name} must be {expected}, got {short(getattr(self, name))}")

    def _check_integers(self, *names: str, least: int = 1, most: int = _MOST) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise self._error(name, f"an integer of at least {least}")
            if value > most:
                raise self._error(name, f"an integer of at most {most}")

    def _check_numbers(self, *names: str, least: float = 0.0, below: float = math.inf) -> None:
        for name in names:
            value = getattr(self, name)
            if not _is_number(value) or not least <= value < below:
                limit = f"a number of at least {least:g}" + (f" and below {below:g}" if below < math.inf else "")
                raise self._error(name, limit)


def _is_class_variable(annotation: Any) -> bool:
    return get_origin(annotation) is ClassVar


def _is_number(value: object) -> bool:
    # Compared, not converted: an integer may be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class _TowerConfig(_Config):
    """The settings that both towers have."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    dropout: float
    attention_dropout: float
    initializer_range: float
    initializer_factor: float

    def validate(self) -> None:
        super().validate()
        self._check_integers("intermediate_size", "num_attention_heads")
        self._check_integers("hidden_size", least=0)
        self._check_numbers("dropout", "attention_dropout", below=1.0)
        self._check_numbers("layer_norm_eps", "initializer_range", "initializer_factor")
        if self.hidden_act not in ACTIVATIONS:
            raise self._error("hidden_act", f"one of {', '.join(ACTIVATIONS)}")

    def check_model(self) -> None:
        self._check_integers("hidden_size", "num_attention_heads")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"{type(self).__name__}: hidden_size must be a multiple of num_attention_heads, "
                f"got {self.hidden_size} and {self.num_attention_heads}"
            )


class GroupViTTextConfig(_TowerConfig):
    """The text tower: a causal Transformer over byte-pair tokens.

    A text is pooled at `eos_token_id`: at the first end-of-text token; with the value 2, which early checkpoints
    carry by mistake, at the largest token id (transformers' rule for such files).
    """

    model_type: ClassVar[str] = "groupvit_text_model"
    base_config_key: ClassVar[str] = "text_config"

    vocab_size: int = 49408
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407

    def validate(self) -> None:
        super().validate()
        self._check_integers("vocab_size", "max_position_embeddings")
        self._check_integers("num_hidden_layers", least=0, most=_MOST_LAYERS)
        self._check_integers("eos_token_id", least=0, most=_MOST_IDS)


class GroupViTVisionConfig(_TowerConfig):
    """The vision tower: stages of Transformer layers, each but the last ending in a grouping block (paper, section
    3.1).

    Per stage: `depths` layers; `num_group_tokens` learned group tokens (0: no grouping at its end); `num_output_groups`
    groups that it leaves. The last stage has no group tokens, so its `num_output_groups` is not used.
    `num_hidden_layers` is carried for transformers' sake; `depths` decides.
    """

    model_type: ClassVar[str] = "groupvit_vision_model"
    base_config_key: ClassVar[str] = "vision_config"

    hidden_size: int = 384
    intermediate_size: int = 1536
    depths: list[int] = [6, 3, 3]  # noqa: RUF012 - copied for every instance
    num_hidden_layers: int = 12
    num_group_tokens: list[int] = [64, 8, 0]  # noqa: RUF012
    num_output_groups: list[int] = [64, 8, 8]  # noqa: RUF012
    num_attention_heads: int = 6
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    assign_eps: float = 1.0
    assign_mlp_ratio: list[float] = [0.5, 4]  # noqa: RUF012

    def validate(self) -> None:
        super().validate()
        self._check_integers("image_size", "patch_size", "num_channels")
        self._check_numbers("assign_eps")
        if self.image_size % self.patch_size:
            raise InputError(
                f"{type(self).__name__}: image_size must be a multiple of patch_size, "
                f"got {self.image_size} and {self.patch_size}"
            )
        for name in ("depths", "num_group_tokens", "num_output_groups"):
            value = getattr(self, name)
            if (
                not isinstance(value, Sequence)
                or not value
                or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)
            ):
                raise self._error(name, "a non-empty list of integers of at least 0, one per stage")
            most = _MOST_LAYERS if name == "depths" else _MOST
            if max(value) > most or len(value) > _MOST_LAYERS:
                raise self._error(name, f"a list of integers of at most {most}, one per stage")
        depths, tokens, groups = self.depths, self.num_group_tokens, self.num_output_groups
        if not len(depths) == len(tokens) == len(groups):
            raise InputError(
                f"{type(self).__name__}: depths, num_group_tokens and num_output_groups need one entry per stage each, "
                f"got {len(depths)}, {len(tokens)} and {len(groups)} entries"
            )
        for stage, (n_tokens, n_groups) in enumerate(zip(tokens, groups, strict=True)):
            if n_tokens and not n_groups:
                raise InputError(
                    f"{type(self).__name__}: stage {stage} has {n_tokens} group tokens, so its num_output_groups must "
                    "be "
                    "at least 1, got 0"
                )
            if stage and n_tokens and tokens[stage - 1] != groups[stage - 1]:
                # The group projector mixes the earlier stage's tokens, but in transformers' files it is sized by that
                # stage's groups: only equal counts make a model that runs.
                raise InputError(
                    f"{type(self).__name__}: stage {stage} has group tokens of its own, so stage {stage - 1} must have "
                    "as "
                    f"many group tokens as output groups, got {tokens[stage - 1]} and {groups[stage - 1]}"
                )
        ratio = self.assign_mlp_ratio
        if not (isinstance(ratio, Sequence) and len(ratio) == 2 and all(_is_number(r) and r > 0 for r in ratio)):
            raise self._error("assign_mlp_ratio", "two positive numbers (token mixing, channel mixing)")
        if max(ratio) * self.hidden_size > _MOST:
            raise self._error("assign_mlp_ratio", f"numbers that make widths of at most {_MOST}")


class GroupViTConfig(_Config):
    """A whole GroupViT: both towers and the shared embedding space.

    Args:
        text_config, vision_config: a tower's configuration, or its settings as a dictionary; None: the defaults.
        projection_dim: width of the shared embedding.
        projection_intermediate_dim: width of the projections' hidden layer.
        logit_scale_init_value: logarithm of the initial factor on cosine similarities (2.6592 = ln(1 / 0.07)).
        output_segmentation: default of the model's flag of that name.
    """

    model_type: ClassVar[str] = "groupvit"
    sub_configs: ClassVar[dict[str, type[Any]]] = {
        "text_config": GroupViTTextConfig,
        "vision_config": GroupViTVisionConfig,
    }

    text_config: GroupViTTextConfig = None  # type: ignore[assignment]
    vision_config: GroupViTVisionConfig = None  # type: ignore[assignment]
    projection_dim: int = 256
    projection_intermediate_dim: int = 4096
    logit_scale_init_value: float = 2.6592
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    output_segmentation: bool = False

    def __init__(
        self,
        /,
        text_config: "GroupViTTextConfig | Mapping[str, Any] | None" = None,
        vision_config: "GroupViTVisionConfig | Mapping[str, Any] | None" = None,
        **settings: Any,
    ) -> None:
        # Files of transformers 4.18-4.25 may carry the towers under these names instead, or null.
        text_legacy, vision_legacy = settings.pop("text_config_dict", None), settings.pop("vision_config_dict", None)
        super().__init__(
            text_config=_tower(GroupViTTextConfig, text_config, text_legacy),
            vision_config=_tower(GroupViTVisionConfig, vision_config, vision_legacy),
            **settings,
        )

    @classmethod
    def from_text_vision_configs(
        cls, text_config: GroupViTTextConfig, vision_config: GroupViTVisionConfig, **kwargs: Any
    ) -> Self:
        """Returns a full configuration of two towers; `kwargs` are the other settings."""
        return cls(text_config=text_config, vision_config=vision_config, **kwargs)

    def validate(self) -> None:
        super().validate()
        self._check_integers("projection_dim", "projection_intermediate_dim")
        self._check_numbers("initializer_range", "initializer_factor")
        self._check_numbers("logit_scale_init_value", least=-math.inf)
        if not isinstance(self.output_segmentation, bool):
            raise self._error("output_segmentation", "true or false")

    def check_model(self) -> None:
        for tower in (self.text_config, self.vision_config):
            tower.check_model()


def checkpoint_config_text(config: _Config, architecture: str, dtype: str, **settings: Any) -> str:
    """Returns the text of a checkpoint's `config.json`, with the class and the dtype for transformers."""
    content = config._written()
    # transformers 5 writes `dtype` instead of `torch_dtype`, and reads both: two that disagree must not meet.
    content.pop("dtype", None)
    return json_text(content | {"architectures": [architecture], "torch_dtype": dtype} | settings)


C = TypeVar("C", bound=_Config)


def _tower(cls: type[C], settings: C | Mapping[str, Any] | None, legacy: Mapping[str, Any] | None) -> C:
    """Returns a tower's own configuration. As in transformers, the legacy name's settings win, with their defaults."""
    if isinstance(settings, cls) and legacy is None:
        return cls(**settings.to_dict())
    if isinstance(settings, _Config):
        if not isinstance(settings, cls):
            raise InputError(f"expected a {cls.__name__} or a dictionary, got a {type(settings).__name__}")
        settings = settings.to_dict()
    for value in (settings, legacy):
        if value is not None and not isinstance(value, Mapping):
            raise InputError(f"expected a {cls.__name__} or a dictionary, got {short(value)}")
    return cls(**{**(settings or {}), **(cls(**legacy).to_dict() if legacy is not None else {})})
