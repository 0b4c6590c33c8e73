"""Loading and saving PyTorch models: the base class of the three models.

A checkpoint's names and shapes are compared with the model's before any tensor is read, so a model is loaded whole or not at
all. What is read and written is safetensors; pickles are not touched.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from groupvit_common import hub
from groupvit_common.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    Weights,
    compare_tensors,
    find_weights,
    index_text,
    plan_shards,
    write_files,
)
from groupvit_common.errors import CheckpointError, InputError

# Tensors of a full model that a tower's model does not have are the other parts'; a tower's own start with one of these.
_TOWER_PREFIXES = ("text_model.", "vision_model.")

_DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "float64": torch.float64,
    "double": torch.float64,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
_STORED_DTYPES = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}

# Keywords of transformers' `from_pretrained` that change nothing here, whatever their value: how its loader works inside, and
# the choice of an attention kernel, which is made at run time here.
_WITHOUT_EFFECT = frozenset(
    {"attn_implementation", "low_cpu_mem_usage", "resume_download", "trust_remote_code", "weights_only", "_fast_init"}
)
# Keywords whose named values ask for nothing that is not done anyway; any other value is refused with the reason.
_ONLY = {
    "use_safetensors": ((None, True), "only safetensors are read"),
    "from_tf": ((None, False), "TensorFlow's own files need conversion first"),
    "from_flax": ((None, False), "Flax's files need conversion first"),
    "ignore_mismatched_sizes": ((None, False), "a model is loaded whole or not at all"),
    "output_loading_info": ((None, False), "a checkpoint that does not fit is an error that lists the tensors"),
    "proxies": ((None,), "set the environment variable HTTPS_PROXY"),
}


class PreTrainedModel(nn.Module):
    """A model that is made from a configuration, and comes from and goes to a checkpoint directory or the hub.

    Subclasses take `config` alone as their constructor's argument, and name their tensors as the files do.
    """

    config_class: ClassVar[type[Any]]
    base_model_prefix: ClassVar[str] = ""
    main_input_name: ClassVar[str] = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise InputError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, got {type(config).__name__}; "
                "use from_pretrained for a name or a directory"
            )
        self.config = config

    # -- loading ----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        subfolder: str = "",
        local_files_only: bool = False,
        force_download: bool = False,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: Any = None,
        **overrides: Any,
    ) -> Self:
        """The model of a checkpoint, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a directory, or "org/name" on the hub. A tower's model also loads from a full
                model's checkpoint.
            config: a configuration, or the directory or name of one, instead of the checkpoint's.
            revision, token, cache_dir, subfolder, local_files_only, force_download: see `groupvit_common.hub.resolve`.
            dtype: of the floating-point tensors, a torch.dtype or its name; float32 if None; "auto": the one in which the
                file holds the most elements. Integer tensors keep theirs. `torch_dtype` is its older name.
            device: where the tensors go; the CPU if None. `device_map` is accepted for a single device, and "auto" for the
                first GPU if there is one.
            overrides: settings of the configuration to replace. Keywords of transformers that change nothing here
                (`low_cpu_mem_usage`, `attn_implementation`, `trust_remote_code`, ...) are accepted; those that ask for what is
                not done are refused.

        Raises:
            CheckpointError: the checkpoint cannot be found, reached or read, or its tensors are not the model's.
            InputError: an argument that cannot be used.
        """
        wanted_dtype = _dtype(dtype if dtype is not None else torch_dtype)
        wanted_device = _device(device, device_map)
        overrides = _settings(cls.__name__, overrides)
        needed = (WEIGHTS_NAME,) if config is not None else (CONFIG_NAME, WEIGHTS_NAME)
        directory = hub.resolve(
            pretrained_model_name_or_path,
            patterns=needed,
            required=needed,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            subfolder=subfolder,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        config = cls._configuration(directory if config is None else config, overrides)
        weights = find_weights(directory)
        # No storage and no initial values: every tensor is about to be replaced.
        with torch.device("meta"), _NoInit():
            model = cls(config)
        names = model._check(weights, directory)
        model._assign(_read(weights, names, wanted_dtype, wanted_device))
        return model.eval()

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

    def _check(self, weights: Weights, source: object) -> list[str]:
        """The names of the tensors to read. Raises `CheckpointError` if the file's are not this model's."""
        state = self.state_dict()
        prefix = next((prefix for prefix in _TOWER_PREFIXES if all(name.startswith(prefix) for name in state)), "")
        names = compare_tensors(
            {name: tuple(tensor.shape) for name, tensor in state.items()},
            {name: info.shape for name, info in weights.tensors.items()},
            source=source,
            model=f"{type(self).__name__} of the configuration",
            prefix=prefix,
        )
        for name in names:
            stored = weights.tensors[name].dtype
            if stored.startswith(("F", "BF")) != state[name].is_floating_point():
                raise CheckpointError(
                    f"{source} does not fit: it holds {name} as {stored}, expected {state[name].dtype}"
                )
        return names

    def _assign(self, tensors: dict[str, Tensor]) -> None:
        """Replaces the tensors of a model on the meta device. A step counter that the file lacks starts at 0."""
        device = next(iter(tensors.values())).device
        for name, tensor in self.state_dict().items():
            if name not in tensors:
                tensors[name] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        self.load_state_dict(tensors, assign=True)
        left = [name for name, tensor in (*self.named_parameters(), *self.named_buffers()) if tensor.is_meta]
        assert not left, f"tensors that no checkpoint holds: {left}"

    # -- saving -----------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | bool | None = None,
        **push_options: Any,
    ) -> None:
        """Writes `config.json` and the weights into a directory, which transformers reads too.

        All files are written before the first replaces an older one, so a save that fails leaves the old checkpoint.

        Args:
            save_directory: made if need be. Weights of an earlier save in it are removed.
            is_main_process: False: nothing is written; for training in several processes.
            state_dict: tensors to write instead of the model's own, under the same names.
            max_shard_size: bytes or "200MB": more than this is spread over several files with an index.
            safe_serialization: only True is possible: pickles are not written.
            push_to_hub: also send the files to the repository `repo_id` (the directory's name if None);
                `push_options` are those of `push_to_hub`.

        Raises:
            CheckpointError: the directory cannot be written, or the hub not reached.
            InputError: an argument that cannot be used.
        """
        if not safe_serialization:
            raise InputError("safe_serialization=False asks for a pickle; weights are written as safetensors only")
        if push_options and not push_to_hub:
            raise InputError(f"{next(iter(push_options))!r} has a meaning with push_to_hub=True only")
        if not is_main_process:
            return
        state = self.state_dict()
        if state_dict is not None:
            compare_tensors(_shapes(state), _shapes(state_dict), source="state_dict", model=type(self).__name__)
            state = dict(state_dict)
        empty = [name for name, tensor in state.items() if tensor.is_meta]
        if empty:
            raise InputError(f"{empty[0]} is on the meta device and has no values to save")
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
        shards = plan_shards(sizes, max_shard_size)

        writers: dict[str, Callable[[Path], None]] = {
            shard.file_name: partial(_write, state=state, names=shard.tensors) for shard in shards
        }
        if len(shards) > 1:
            writers[WEIGHTS_INDEX_NAME] = partial(_write_text, text=index_text(shards, sum(sizes.values())))
        writers[CONFIG_NAME] = partial(_write_text, text=self._config_text())
        write_files(Path(save_directory), writers)
        if push_to_hub:
            name = repo_id if repo_id is not None else Path(save_directory).resolve().name
            self.push_to_hub(name, token=token, max_shard_size=max_shard_size, **push_options)

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

    def _config_text(self) -> str:
        """`config.json` with what transformers wants to know besides: the class and the dtype."""
        known = (
            cls
            for cls in type(self).__mro__
            if cls.__module__.startswith("groupvit_torch.") and cls is not PreTrainedModel
        )
        settings = self.config.to_dict()
        # transformers 5 writes `dtype` instead of `torch_dtype`, and reads both: two that disagree must not meet.
        settings.pop("dtype", None)
        settings["architectures"] = [next(known, type(self)).__name__]
        settings["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        return json.dumps(settings, indent=2, sort_keys=True) + "\n"

    # -- the rest of transformers' base class that code relies on ---------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating-point parameter."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the parameters hold."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Trades time for memory in training: layers are computed again on the way back. Keywords are accepted, not used."""
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Undoes `gradient_checkpointing_enable`."""
        self._set_gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def _set_gradient_checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                setattr(module, "gradient_checkpointing", on)  # noqa: B010 - a plain flag; nn.Module types it as a tensor


class _NoInit(TorchFunctionMode):
    """Makes `torch.nn.init` do nothing. On the meta device it has nothing to do, but takes a second of imports for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def _read(weights: Weights, names: list[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
    """The tensors `names`, floating-point ones as `dtype` (None: the one that most elements are stored in)."""
    if dtype is None:
        counts: dict[torch.dtype, int] = {}
        for name in names:
            stored = _STORED_DTYPES.get(weights.tensors[name].dtype)
            if stored is not None:
                counts[stored] = counts.get(stored, 0) + torch.Size(weights.tensors[name].shape).numel()
        dtype = max(counts, key=lambda key: counts[key], default=torch.float32)
    wanted, tensors = set(names), {}
    for path, stored_names in weights.files.items():
        try:
            with safe_open(path, framework="pt") as file:
                for name in stored_names:
                    if name in wanted:
                        tensor = file.get_tensor(name)
                        # A copy: the file may be replaced or removed while the model lives.
                        tensors[name] = tensor.to(
                            device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype, copy=True
                        )
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return tensors


def _write(path: Path, state: Mapping[str, Tensor], names: list[str]) -> None:
    # Copies: safetensors takes neither tensors that share memory nor strided ones.
    tensors = {name: torch.clone(state[name].detach().cpu(), memory_format=torch.contiguous_format) for name in names}
    try:
        # `format` is how transformers knows whose layout this is.
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"{path.parent} cannot be written: {error}") from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype asked for; None stands for "auto"."""
    if value is None:
        return torch.float32
    if value == "auto":
        return None
    found = _DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if found not in _DTYPES.values():
        raise InputError(f"dtype must be 'auto', float32, float64, float16 or bfloat16, got {value!r}")
    return found


def _device(device: Any, device_map: Any) -> torch.device:
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device is None and device_map == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device is None:
        device = "cpu" if device_map is None else device_map
    return usable_device(device)


def usable_device(wanted: Any) -> torch.device:
    """The device of a name such as 'cpu' or 'cuda:0'. Raises `InputError` for one that is not there or no device at all."""
    try:
        # The only question that every device answers: some raise when asked for, others when used.
        probe = torch.zeros(1, device=wanted)
        probe.item()
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the device {str(wanted)!r} cannot be used here (one such as 'cpu' or 'cuda:0' can): {reason}"
        ) from error
    return probe.device


def _settings(model: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords that may be settings: transformers' own are dropped, or refused if they ask for something else."""
    for name, (accepted, reason) in _ONLY.items():
        if name in keywords and not any(keywords[name] is value for value in accepted):
            raise InputError(f"{model}.from_pretrained cannot do {name}={keywords[name]!r}: {reason}")
    return {name: value for name, value in keywords.items() if name not in _ONLY and name not in _WITHOUT_EFFECT}
