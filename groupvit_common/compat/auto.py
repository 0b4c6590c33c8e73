"""Habits of transformers' Auto classes: the class is chosen by the `model_type` of a configuration."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from groupvit_common.checkpoints.directory import CONFIG_NAME
from groupvit_common.checkpoints.hub import HUB_KEYWORDS, HubLocation, bundled, resolve
from groupvit_common.errors import CheckpointError, InputError, short
from groupvit_common.storage.json_text import read_json
from groupvit_common.storage.saving import read_lock


class AutoClass:
    """The base of the Auto classes. `classes`: by what `key`, in a file, says; `register` adds to them."""

    key: ClassVar[str] = "model_type"
    classes: ClassVar[dict[str, type[Any]]] = {}

    def __new__(cls, *unused: Any, **keywords: Any) -> NoReturn:
        raise CheckpointError(f"{cls.__name__} names no checkpoint: call {cls.__name__}.from_pretrained(...)")

    @classmethod
    def _chosen(cls, found: Any, source: object = None) -> type[Any]:
        """Returns the class of what `key` says. Raises `InputError`, or `CheckpointError` where `source` names a
        file."""
        if isinstance(found, str) and found in cls.classes:
            return cls.classes[found]
        error = InputError if source is None else CheckpointError
        raise error(
            f"{'this configuration' if source is None else source} has {cls.key} {short(found)}; "
            f"{cls.__name__} here knows {', '.join(cls.classes)} only"
        )

    @classmethod
    def _register(cls, model_type: str, made: type[Any], exist_ok: bool) -> None:
        if not exist_ok and cls.classes.get(model_type, made) is not made:
            raise InputError(
                f"{model_type!r} is the model type of {cls.classes[model_type].__name__}; pass exist_ok=True to put "
                f"{made.__name__} in its place"
            )
        cls.classes[model_type] = made


class AutoConfigClass(AutoClass):
    """`AutoConfig`: `classes` are those of configurations."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **keywords: Any) -> Any:
        """Returns the configuration of a checkpoint: a directory, a `config.json`, or a name on the hub.

        Keywords and errors as of `GroupViTConfig.from_pretrained`; `CheckpointError` for another kind of model.
        """
        keywords = {name: value for name, value in keywords.items() if name not in ("trust_remote_code", "_from_auto")}
        content = config_content(pretrained_model_name_or_path, keywords)
        made = cls._chosen(content.get("model_type"), pretrained_model_name_or_path)
        return made.from_pretrained(pretrained_model_name_or_path, **keywords)

    @classmethod
    def for_model(cls, model_type: str, *arguments: Any, **settings: Any) -> Any:
        """Returns a configuration of a model type with these settings. Raises `InputError` for other model types."""
        return cls._chosen(model_type)(*arguments, **settings)

    @classmethod
    def register(cls, model_type: str, config: type[Any], exist_ok: bool = False) -> None:
        """Has `config`, a class, made for a model type."""
        cls._register(model_type, config, exist_ok)


class AutoModelClass(AutoClass):
    """`AutoModel` and its like: `classes` are those of models."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *arguments: Any, **keywords: Any) -> Any:
        """Returns the model of a checkpoint, of the class that its configuration asks for.

        Arguments and errors as of that class's `from_pretrained`; `CheckpointError` for another kind of model.
        """
        config = keywords.get("config")
        if config is None or isinstance(config, str | os.PathLike):
            named: Any = pretrained_model_name_or_path if config is None else config
            made = cls._chosen(config_content(named, keywords).get("model_type"), named)
        else:
            made = cls._chosen(getattr(config, "model_type", None))
        return made.from_pretrained(pretrained_model_name_or_path, *arguments, **keywords)

    @classmethod
    def from_config(cls, config: Any, **keywords: Any) -> Any:
        """Returns a model with initial values. Raises `InputError` for the configuration of another kind of model.

        Keywords that choose kernels (`attn_implementation`, `trust_remote_code`) change nothing.
        """
        keywords = {name: value for name, value in keywords.items() if name not in _KERNELS}
        return cls._chosen(getattr(config, "model_type", None))(config, **keywords)

    @classmethod
    def register(cls, config_class: type[Any], model_class: type[Any], exist_ok: bool = False) -> None:
        """Has `model_class` made for the configurations of a class."""
        cls._register(config_class.model_type, model_class, exist_ok)


_KERNELS = ("attn_implementation", "experimental_attn_implementation", "trust_remote_code")


def config_content(name: str | Path, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a checkpoint's `config.json`; `keywords` may say where it is. Raises `CheckpointError`."""
    location = HubLocation.take({key: keywords[key] for key in (*HUB_KEYWORDS, "use_auth_token") if key in keywords})
    if isinstance(name, str | os.PathLike) and bundled(name) is None and os.path.isfile(name):  # noqa: PTH113
        return read_json(Path(name))
    with read_lock(resolve(name, patterns=[CONFIG_NAME], required=[CONFIG_NAME], location=location)) as directory:
        return read_json(directory / CONFIG_NAME)
