"""`from_pretrained`, `save_pretrained` and `push_to_hub` for both backends: keywords, dtypes, configuration, checks.

A backend's base class derives from `Pretrained` and adds what touches tensors.
"""

import contextlib
import copy
import hashlib
import math
import os
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from groupvit_common.checkpoints import hub
from groupvit_common.checkpoints.directory import (
    CONFIG_NAME,
    SAVE_ID,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    Weights,
    compare_tensors,
    find_weights,
    index_text,
    plan_shards,
)
from groupvit_common.checkpoints.dtypes import FLOATS, STORED_DTYPES, most_common_float
from groupvit_common.checkpoints.safetensors_file import (
    PYTORCH_METADATA,
    TensorInfo,
    bytes_of,
    stored_bytes,
    write_arrays,
)
from groupvit_common.compat.config import COMPUTED, DEFAULTS
from groupvit_common.compat.model import (
    ONLY,
    SAVE_ONLY,
    SAVE_WITHOUT_EFFECT,
    WITHOUT_EFFECT,
    TransformersModel,
    harmless,
    with_token,
)
from groupvit_common.errors import CheckpointError, InputError, some
from groupvit_common.model.config import checkpoint_config_text
from groupvit_common.model.parameters import manifest
from groupvit_common.storage.saving import read_lock, write_files, write_text

_PACKAGES = ("groupvit_torch.", "groupvit_tf.")
# A tower's tensors start with one of these; all others of a full model are other parts'.
_TOWER_PREFIXES = ("text_model.", "vision_model.")


def most_stored_dtype(weights: Weights, names: Iterable[str]) -> str:
    """Returns the floating-point dtype of most stored elements of the tensors `names`: the meaning of "auto"."""
    infos = (weights.tensors[name] for name in names)
    return most_common_float((STORED_DTYPES.get(info.dtype, ""), math.prod(info.shape)) for info in infos)


def check_weights(
    expected: Mapping[str, tuple[tuple[int, ...], str]], weights: Weights, source: object, model: str
) -> list[str]:
    """Returns the names of the tensors to read.

    Args:
        expected: the model's tensors, name -> shape and dtype.

    Raises:
        CheckpointError: the file's tensors are not the model's.
    """
    names = check_shapes(expected, {name: info.shape for name, info in weights.tensors.items()}, source, model)
    for name in names:
        stored, dtype = weights.tensors[name].dtype, expected[name][1]
        if stored not in STORED_DTYPES or (STORED_DTYPES[stored] in FLOATS) != (dtype in FLOATS):
            raise CheckpointError(f"{source} does not fit: it holds {name} as {stored}, expected {dtype}")
    return names


def check_shapes(
    expected: Mapping[str, tuple[tuple[int, ...], str]],
    found: Mapping[str, tuple[int, ...]],
    source: object,
    model: str,
) -> list[str]:
    """Does as `check_weights` without a look at dtypes; `found`: name -> shape."""
    prefix = next((prefix for prefix in _TOWER_PREFIXES if all(name.startswith(prefix) for name in expected)), "")
    return compare_tensors(
        {name: shape for name, (shape, _) in expected.items()},
        found,
        source=source,
        model=f"{model} of the configuration",
        prefix=prefix,
    )


def checked_array(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], model: str) -> np.ndarray:
    """Returns one of `arrays`. Raises `InputError` if it is missing or not of this shape."""
    if name not in arrays:
        raise InputError(f"{model}.from_arrays got no array {name}")
    array = arrays[name]
    if array.shape != shape:
        raise InputError(f"{model}.from_arrays got {name} of shape {list(array.shape)}, expected {list(shape)}")
    return array


def _remedy(missing: list[str], added: list[str]) -> str:
    if any("parametrizations." in name or name.endswith(("_orig", "_mask", "_g", "_v")) for name in added):
        return (
            "undo weight normalisation, pruning or other parametrizations first "
            "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove)"
        )
    if any("lora" in name.lower() or "adapter" in name.lower() for name in added):
        return "merge adapters into the weights first, or save them by themselves"
    if any(name.endswith("_scale") or "packed_params" in name for name in added):
        return "save the model before it is quantized"
    if added and not missing:
        return "take off what was added and save it by itself"
    if added:
        return "put back what was replaced, or save the whole with the framework's own functions"
    return (
        "set the configuration to the sizes that the tensors have, or save the whole with the framework's own functions"
    )


class Pretrained(TransformersModel):
    """A model that is made from a configuration, and comes from and goes to a checkpoint directory or the hub."""

    config_class: ClassVar[type[Any]]
    base_model_prefix: ClassVar[str] = ""
    main_input_name: ClassVar[str] = "input_ids"

    config: Any

    @classmethod
    def _check_config(cls, config: object) -> None:
        """Raises `InputError` for anything but a configuration of this class."""
        if not isinstance(config, cls.config_class):
            raise InputError(
                f"{cls.__name__} takes a {cls.config_class.__name__}, got {type(config).__name__}; "
                "use from_pretrained for a name or a directory"
            )
        config.check_model()

    @classmethod
    @contextlib.contextmanager
    def _opened(
        cls,
        name_or_path: Any,
        config: Any,
        keywords: Mapping[str, Any],
        only: Mapping[str, tuple[tuple[Any, ...], str]],
    ) -> Iterator[tuple[Any, Weights, Path]]:
        """Yields the configuration, the weights' headers and the directory of a checkpoint, which stay as they are
        within the block.

        The weights are those of the configuration as far as it goes, so that no model of another size is made.

        Args:
            keywords: of the caller: those of a `HubLocation`, settings of the configuration to replace, or
                transformers'.
            only: further keywords that are accepted with some values only, and why.
        """
        settings = with_token(keywords)
        location = hub.HubLocation.take(settings)
        settings = harmless(settings, f"{cls.__name__}.from_pretrained", {**ONLY, **only}, WITHOUT_EFFECT)
        needed = (WEIGHTS_NAME,) if config is not None else (CONFIG_NAME, WEIGHTS_NAME)
        if config is not None:
            config = cls.config_class.from_pretrained(config) if isinstance(config, str | Path) else config
            config = cls._configuration(config, settings)
        with read_lock(hub.resolve(name_or_path, patterns=needed, required=needed, location=location)) as directory:
            if config is None:
                config = cls._configuration(cls.config_class.from_json_file(directory / CONFIG_NAME), settings)
                try:
                    config.check_model()
                except InputError as error:
                    raise CheckpointError(f"{directory / CONFIG_NAME}: {error}") from error
            weights = find_weights(directory)
            expected = cls._described(config)
            sizes = {name: shape for name, (shape, dtype) in expected.items() if dtype in FLOATS}
            if any(name not in weights.tensors or weights.tensors[name].shape != sizes[name] for name in sizes):
                check_weights(expected, weights, directory, cls.__name__)
            config.name_or_path = name_or_path
            yield config, weights, directory

    @classmethod
    def _given_config(cls, config: Any, keywords: Mapping[str, Any]) -> Any:
        """Returns the configuration of a model whose weights do not come from a checkpoint.

        Args:
            config: a configuration, or the directory or name of one.
            keywords: as of `_opened`.
        """
        if isinstance(config, str | Path):
            return cls.config_class.from_pretrained(config, **keywords)
        cls._check_config(config)
        return cls._configuration(config, harmless(keywords, f"{cls.__name__}.from_pretrained", ONLY, WITHOUT_EFFECT))

    @staticmethod
    def _described(config: Any) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the tensors of a configuration: name -> shape and dtype."""
        return {
            parameter.name: (parameter.shape, "int64" if parameter.kind == "counter" else "float32")
            for parameter in manifest(config).values()
        }

    @classmethod
    def _configuration(cls, config: Any, overrides: Mapping[str, Any]) -> Any:
        settings = config.to_dict()
        unknown = [name for name in overrides if name not in {**settings, **DEFAULTS} and name not in COMPUTED]
        if unknown:
            raise InputError(
                f"{cls.__name__}.from_pretrained knows no keyword {unknown[0]!r}, and {type(config).__name__} has no "
                "such setting"
            )
        if overrides or not isinstance(config, cls.config_class):
            return cls.config_class.from_dict({**settings, **overrides})
        return copy.deepcopy(config)

    @abstractmethod
    def save_pretrained(self, save_directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Writes `config.json` and the weights into a directory."""

    @classmethod
    def _push_options(
        cls, safe_serialization: bool | None, push_to_hub: bool, keywords: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns the keywords of `save_pretrained` that are for `push_to_hub`, those that request something.

        Raises:
            InputError: arguments that request what is not supported.
        """
        if safe_serialization is False:
            raise InputError(
                "safe_serialization=False requests a pickle or tf_model.h5; weights are written as safetensors only"
            )
        options = harmless(with_token(keywords), f"{cls.__name__}.save_pretrained", SAVE_ONLY, SAVE_WITHOUT_EFFECT)
        options = {name: value for name, value in options.items() if value is not None and value is not False}
        if options and not push_to_hub and options.keys() != {"token"}:
            raise InputError(f"{next(iter(options))!r} has a meaning with push_to_hub=True only")
        return options

    def _save(
        self,
        directory: str | Path,
        tensors: Mapping[str, TensorInfo],
        value: Callable[[str], np.ndarray],
        dtype: str,
        max_shard_size: int | str,
        push_to_hub: bool,
        repo_id: str | None,
        **push_options: Any,
    ) -> None:
        """Writes `config.json` and the weights, all files or none; sends them to the hub on request.

        Args:
            tensors: name -> shape and dtype.
            value: a tensor by its name, or its bytes.
            dtype: of the parameters, by name.
            push_to_hub: also send the files to `repo_id` (the directory's name if None).
        """
        directory, metadata = Path(directory), dict(PYTORCH_METADATA)
        sizes = {name: stored_bytes(info) for name, info in tensors.items()}
        shards = plan_shards(sizes, max_shard_size)
        index: dict[str, Callable[[Path], None]] = {}
        if len(shards) > 1:
            # Of the values: a model saved twice gives the same files.
            digest = hashlib.blake2b(digest_size=4)
            for name in sizes:
                digest.update(name.encode())
                digest.update(bytes_of(value(name)).data)
            metadata[SAVE_ID] = digest.hexdigest()
            if any(os.path.lexists(directory / shard.file_name) for shard in shards):
                # Names of its own: at any moment other programs find the old or the new shards behind the index.
                shards = plan_shards(sizes, max_shard_size, mark=metadata[SAVE_ID])
            text = index_text(shards, sum(sizes.values()), metadata[SAVE_ID])
            index[WEIGHTS_INDEX_NAME] = partial(write_text, text=text)
        weights = {
            shard.file_name: partial(
                write_arrays, tensors={name: tensors[name] for name in shard.tensors}, value=value, metadata=metadata
            )
            for shard in shards
        }
        configuration = {CONFIG_NAME: partial(write_text, text=self._config_text(dtype))}
        write_files(directory, {**weights, **configuration, **index}, family="weights")
        if push_to_hub:
            name = repo_id if repo_id is not None else directory.resolve().name
            self.push_to_hub(name, max_shard_size=max_shard_size, **push_options)

    def _check_tensors(
        self,
        tensors: Mapping[str, tuple[tuple[int, ...], str]],
        expected: Mapping[str, tuple[tuple[int, ...], str]],
        not_finite: Callable[[str], bool],
    ) -> None:
        """Raises `InputError` for tensors that `from_pretrained` would refuse, or that no model can use.

        Args:
            tensors: to be saved: name -> shape and dtype.
            expected: of a model of this class and configuration.
            not_finite: whether a tensor, by name, holds NaN or infinite values.
        """
        missing = [name for name in expected if name not in tensors]
        added = [name for name in tensors if name not in expected]
        changed = [
            f"{name} ({list(shape)} {dtype}, expected {list(expected[name][0])} {expected[name][1]})"
            for name, (shape, dtype) in tensors.items()
            if name in expected and (shape != expected[name][0] or (dtype in FLOATS) != (expected[name][1] in FLOATS))
        ]
        problems = [
            f"{len(names)} {kind}: {some(names)}"
            for kind, names in (("missing", missing), ("added", added), ("of another shape or type", changed))
            if names
        ]
        if problems:
            raise InputError(
                f"this {type(self).__name__} cannot be saved, because its tensors are not those of its configuration "
                f"({'; '.join(problems)}): {_remedy(missing, added)}"
            )
        self._refuse_not_finite("saved", filter(not_finite, tensors))

    def _refuse_not_finite(self, done: str, names: Iterable[str]) -> None:
        """Raises `InputError` if tensors `names` hold NaN or infinite values; `done`: what cannot be done with them."""
        bad = list(names)
        if bad:
            raise InputError(
                f"this {type(self).__name__} cannot be {done}, because {len(bad)} of its tensors hold NaN or infinite "
                "values "
                f"({some(bad)}): go back to weights from before they appeared"
            )

    @abstractmethod
    def _own_tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the model's tensors as in files: name -> shape and dtype."""

    def _expected(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the tensors that a checkpoint of this model holds: name -> shape and dtype."""
        described = self._described(self.config)
        if type(self).__module__.startswith(_PACKAGES):
            return described
        # A class of the user's own may have tensors besides, of shapes that its own arguments define.
        return self._own_tensors() | described

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Trades time for memory in training: the backward pass computes layers again. Keywords are ignored."""
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Undoes `gradient_checkpointing_enable`."""
        self._set_gradient_checkpointing(False)

    @abstractmethod
    def _set_gradient_checkpointing(self, on: bool) -> None:
        """Switches gradient checkpointing of all layers."""

    @abstractmethod
    def check_finite(self, done: str = "used") -> None:
        """Raises `InputError` if a weight is NaN or infinite, naming the tensors; `done`: what cannot be done then."""

    def _config_text(self, dtype: str) -> str:
        known = (cls for cls in type(self).__mro__ if cls.__module__.startswith(_PACKAGES))
        return checkpoint_config_text(self.config, next(known, type(self)).__name__, dtype)

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

        See `groupvit_common.checkpoints.hub.push` for the arguments and errors, `save_pretrained` for `max_shard_size`.
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
