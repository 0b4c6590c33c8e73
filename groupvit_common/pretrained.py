"""What `from_pretrained`, `save_pretrained` and `push_to_hub` mean, for both backends: keywords, dtypes, configuration, checks.

A backend's base class derives from `Pretrained` and adds what touches tensors.
"""

import json
import math
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from groupvit_common import hub
from groupvit_common.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    Weights,
    compare_tensors,
    find_weights,
    index_text,
    is_weights_file,
    plan_shards,
)
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.files import write_files, write_text

# Tensors of a full model that a tower's model does not have are the other parts'; a tower's own start with one of these.
_TOWER_PREFIXES = ("text_model.", "vision_model.")

# The floating-point dtypes of a model: the names by which they are asked for, and those of safetensors.
_DTYPES = {
    "float32": "float32",
    "float": "float32",
    "float64": "float64",
    "double": "float64",
    "float16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
}
_STORED_DTYPES = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16"}
_STORED_INTEGERS = ("I64", "I32", "I16", "I8", "U8")

# Keywords of transformers' `from_pretrained` that change nothing here, whatever their value: how its loader works inside, the
# choice of an attention kernel, which is made at run time here, and whose layout the file has, which it says itself.
_WITHOUT_EFFECT = frozenset(
    {
        "attn_implementation",
        "from_pt",
        "low_cpu_mem_usage",
        "resume_download",
        "trust_remote_code",
        "weights_only",
        "_fast_init",
    }
)
# Keywords whose named values ask for nothing that is not done anyway; any other value is refused with the reason.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_safetensors": ((None, True), "only safetensors are read"),
    "from_tf": ((None, False), "TensorFlow's own files need conversion first"),
    "from_flax": ((None, False), "Flax's files need conversion first"),
    "ignore_mismatched_sizes": ((None, False), "a model is loaded whole or not at all"),
    "output_loading_info": ((None, False), "a checkpoint that does not fit is an error that lists the tensors"),
    "proxies": ((None,), "set the environment variable HTTPS_PROXY"),
}


def wanted_dtype(value: object) -> str | None:
    """The name of the floating-point dtype that a framework's dtype or its name asks for; None for anything else."""
    return _DTYPES.get(str(value).removeprefix("torch."))


def most_stored_dtype(weights: Weights, names: Iterable[str]) -> str:
    """The floating-point dtype in which the file holds most elements of the tensors `names`: what "auto" means."""
    counts: dict[str, int] = {}
    for name in names:
        info = weights.tensors[name]
        stored = _STORED_DTYPES.get(info.dtype)
        if stored is not None:
            counts[stored] = counts.get(stored, 0) + math.prod(info.shape)
    return max(counts, key=lambda key: counts[key], default="float32")


def check_weights(
    expected: Mapping[str, tuple[tuple[int, ...], str]], weights: Weights, source: object, model: str
) -> list[str]:
    """The names of the tensors to read.

    Args:
        expected: the model's tensors, name -> shape and dtype.

    Raises:
        CheckpointError: the file's tensors are not the model's.
    """
    prefix = next((prefix for prefix in _TOWER_PREFIXES if all(name.startswith(prefix) for name in expected)), "")
    names = compare_tensors(
        {name: shape for name, (shape, _) in expected.items()},
        {name: info.shape for name, info in weights.tensors.items()},
        source=source,
        model=f"{model} of the configuration",
        prefix=prefix,
    )
    for name in names:
        stored, dtype = weights.tensors[name].dtype, expected[name][1]
        if stored not in (_STORED_DTYPES if dtype in _DTYPES else _STORED_INTEGERS):
            raise CheckpointError(f"{source} does not fit: it holds {name} as {stored}, expected {dtype}")
    return names


def checked_array(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], model: str) -> np.ndarray:
    """One of `arrays`. Raises `InputError` if it is missing or not of this shape."""
    if name not in arrays:
        raise InputError(f"{model}.from_arrays got no array {name}")
    array = arrays[name]
    if array.shape != shape:
        raise InputError(f"{model}.from_arrays got {name} of shape {list(array.shape)}, expected {list(shape)}")
    return array


class Pretrained:
    """A model that is made from a configuration, and comes from and goes to a checkpoint directory or the hub."""

    config_class: ClassVar[type[Any]]
    base_model_prefix: ClassVar[str] = ""
    main_input_name: ClassVar[str] = "pixel_values"

    config: Any

    @classmethod
    def _check_config(cls, config: object) -> None:
        """Raises `InputError` for anything but a configuration of this class."""
        if not isinstance(config, cls.config_class):
            raise InputError(
                f"{cls.__name__} takes a {cls.config_class.__name__}, got {type(config).__name__}; "
                "use from_pretrained for a name or a directory"
            )

    @classmethod
    def _find(
        cls,
        name_or_path: str | Path,
        config: Any,
        keywords: Mapping[str, Any],
        only: Mapping[str, tuple[tuple[Any, ...], str]],
        **where: Any,
    ) -> tuple[Any, Weights, Path]:
        """The configuration, the weights' headers and the directory of a checkpoint.

        Args:
            keywords: those of the caller that are left: settings of the configuration to replace, or transformers'.
            only: further keywords that are accepted with some values only, and why.
            where: see `groupvit_common.hub.resolve`.
        """
        settings = dict(keywords)
        for name, (accepted, reason) in {**_ONLY, **only}.items():
            if name in settings and not any(settings[name] is value for value in accepted):
                raise InputError(f"{cls.__name__}.from_pretrained cannot do {name}={settings[name]!r}: {reason}")
            settings.pop(name, None)
        settings = {name: value for name, value in settings.items() if name not in _WITHOUT_EFFECT}
        needed = (WEIGHTS_NAME,) if config is not None else (CONFIG_NAME, WEIGHTS_NAME)
        directory = hub.resolve(name_or_path, patterns=needed, required=needed, **where)
        return cls._configuration(directory if config is None else config, settings), find_weights(directory), directory

    @classmethod
    def _configuration(cls, source: Any, overrides: Mapping[str, Any]) -> Any:
        config = cls.config_class.from_pretrained(source) if isinstance(source, str | Path) else source
        settings = config.to_dict()
        unknown = [name for name in overrides if name not in settings]
        if unknown:
            raise InputError(
                f"{cls.__name__}.from_pretrained knows no keyword {unknown[0]!r}, and {type(config).__name__} has no such setting"
            )
        if overrides or not isinstance(config, cls.config_class):
            return cls.config_class.from_dict({**settings, **overrides})
        return config

    @abstractmethod
    def save_pretrained(self, save_directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Writes `config.json` and the weights into a directory."""

    @staticmethod
    def _check_saving(safe_serialization: bool, push_to_hub: bool, push_options: Mapping[str, Any]) -> None:
        """Raises `InputError` for arguments of `save_pretrained` that ask for what is not done."""
        if not safe_serialization:
            raise InputError(
                "safe_serialization=False asks for a pickle or tf_model.h5; weights are written as safetensors only"
            )
        if push_options and not push_to_hub:
            raise InputError(f"{next(iter(push_options))!r} has a meaning with push_to_hub=True only")

    def _save(
        self,
        directory: str | Path,
        sizes: Mapping[str, int],
        write: Callable[[list[str], Path], None],
        dtype: str,
        max_shard_size: int | str,
    ) -> None:
        """Writes `config.json` and the weights, all files or none.

        Args:
            sizes: the tensors, name -> bytes.
            write: writes the tensors of these names into a weights file.
            dtype: of the parameters, by name.
        """
        shards = plan_shards(sizes, max_shard_size)
        writers: dict[str, Callable[[Path], None]] = {
            shard.file_name: partial(write, shard.tensors) for shard in shards
        }
        if len(shards) > 1:
            writers[WEIGHTS_INDEX_NAME] = partial(write_text, text=index_text(shards, sum(sizes.values())))
        writers[CONFIG_NAME] = partial(write_text, text=self._config_text(dtype))
        write_files(Path(directory), writers, obsolete=is_weights_file)

    def _config_text(self, dtype: str) -> str:
        """`config.json` with what transformers wants to know besides: the class and the dtype."""
        ours = ("groupvit_torch.", "groupvit_tf.")
        known = (cls for cls in type(self).__mro__ if cls.__module__.startswith(ours))
        settings = self.config.to_dict()
        # transformers 5 writes `dtype` instead of `torch_dtype`, and reads both: two that disagree must not meet.
        settings.pop("dtype", None)
        settings["architectures"] = [next(known, type(self)).__name__]
        settings["torch_dtype"] = dtype
        return json.dumps(settings, indent=2, sort_keys=True) + "\n"

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str = "Upload model",
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
    ) -> str:
        """Sends the model's configuration and weights to the hub; returns the address of the commit or pull request.

        See `groupvit_common.hub.push` for the arguments and errors, `save_pretrained` for `max_shard_size`.
        """
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, max_shard_size=max_shard_size)
            return hub.push(
                directory,
                repo_id,
                token=token,
                private=private,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
