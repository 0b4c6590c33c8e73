"""Loading and saving PyTorch models: the base class of the three models.

A checkpoint's names and shapes are compared with the model's before any tensor is read, so a model is loaded whole or
not at all. What is read and written is safetensors; pickles are not touched.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from groupvit_common.checkpoints.directory import Weights, compare_tensors
from groupvit_common.checkpoints.dtypes import STORED_DTYPES, float_dtype
from groupvit_common.checkpoints.safetensors_file import TensorInfo, array_info, read_into
from groupvit_common.compat.model import loading_info
from groupvit_common.errors import CheckpointError, InputError
from groupvit_common.model.pretrained import Pretrained, check_shapes, check_weights, checked_array, most_stored_dtype
from groupvit_torch.compat.model import TransformersMethods

# safetensors' names of types -> PyTorch's.
_STORED = STORED_DTYPES | {
    "BOOL": "bool",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class PreTrainedModel(Pretrained, TransformersMethods):
    """A model that is made from a configuration, and comes from and goes to a checkpoint directory or the hub.

    Subclasses take `config` alone as their constructor's argument, and name their tensors as the files do.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._check_config(config)
        self.config = config

    # -- loading --

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *model_args: Any,
        config: Any = None,
        state_dict: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: Any = None,
        output_loading_info: bool = False,
        **overrides: Any,
    ) -> Any:
        """Returns the model of a checkpoint, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a directory, or "org/name" on the hub. A tower's model also loads from a full
                model's checkpoint.
            config: a configuration, or the directory or name of one, instead of the checkpoint's.
            state_dict: tensors to take instead of the checkpoint's, which then only gives the configuration, if any.
            dtype: of the floating-point tensors, a torch.dtype or its name; float32 if None; "auto": the one in which
                the file holds the most elements. Integer tensors keep theirs. `torch_dtype` is its older name.
            device: where the tensors go; the CPU if None. `device_map` is accepted for a single device, and "auto" for
                the first GPU if there is one.
            output_loading_info: also return which tensors of the file were not used, as transformers does.
            model_args: further arguments of the class's constructor.
            overrides: revision, token, cache_dir, subfolder, local_files_only and force_download, as in
                `groupvit_common.checkpoints.hub.HubLocation`; or settings of the configuration to replace. Keywords of
                transformers that change nothing here (`low_cpu_mem_usage`, `attn_implementation`, `trust_remote_code`,
                ...) are accepted; unsupported requests are refused.

        Raises:
            CheckpointError: the checkpoint cannot be found, reached or read, or its tensors are not the model's.
            InputError: an argument that cannot be used.
        """
        read_as = _dtype(dtype if dtype is not None else torch_dtype)
        wanted_device = _device(device, device_map)
        if state_dict is not None:
            config = cls._given_config(pretrained_model_name_or_path if config is None else config, overrides)
            model = cls._empty(config, *model_args)
            shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
            names = check_shapes(_tensors(model.state_dict()), shapes, "state_dict", cls.__name__)
            tensors = {name: _placed(state_dict[name], read_as, wanted_device) for name in names}
            info = loading_info(names, state_dict)
        else:
            opened = cls._opened(pretrained_model_name_or_path, config, overrides, {})
            with opened as (config, weights, directory):
                model = cls._empty(config, *model_args)
                names = check_weights(_tensors(model.state_dict()), weights, directory, cls.__name__)
                tensors = _read(weights, names, read_as, wanted_device)
                info = loading_info(names, weights.tensors)
        model._assign(tensors)
        if dtype is not None or torch_dtype is not None:
            config.torch_dtype = _name(model.dtype)
        return (model.eval(), info) if output_loading_info else model.eval()

    @classmethod
    def from_arrays(
        cls, config: Any, arrays: Mapping[str, np.ndarray], *, dtype: torch.dtype | str | None = None
    ) -> Self:
        """Returns the model of a configuration with given values, on the CPU, in evaluation mode.

        Args:
            arrays: NumPy arrays under canonical names (`groupvit_common.model.parameters.manifest`); each is read once,
                so the mapping may compute them. Others are ignored.
            dtype: of the floating-point tensors; float32 if None.

        Raises:
            InputError: an array is missing, or of another shape.
        """
        read_as = _dtype(torch.float32 if dtype is None else dtype)
        model = cls._empty(config)
        tensors: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            value = _tensor(checked_array(arrays, name, tuple(tensor.shape), cls.__name__))
            tensors[name] = value.to(read_as if tensor.is_floating_point() else tensor.dtype)
        model._assign(tensors)
        return model.eval()

    @classmethod
    def _empty(cls, config: Any, *model_args: Any) -> Self:
        """Returns a model without storage and initial values: every tensor is about to be replaced."""
        with torch.device("meta"), _NoInit():
            return cls(config, *model_args)

    def _assign(self, tensors: dict[str, Tensor]) -> None:
        """Replaces the tensors of a model on the meta device. A step counter that the file lacks starts at 0."""
        device = next(iter(tensors.values())).device
        for name, tensor in self.state_dict().items():
            if name not in tensors:
                tensors[name] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        self.load_state_dict(tensors, assign=True)
        left = [name for name, tensor in (*self.named_parameters(), *self.named_buffers()) if tensor.is_meta]
        assert not left, f"tensors that no checkpoint holds: {left}"

    # -- saving --

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_function: Any = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool | None = True,
        variant: None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        repo_id: str | None = None,
        **push_options: Any,
    ) -> None:
        """Writes `config.json` and the weights into a directory, which transformers reads too.

        The checkpoint in the directory is the old one or the new one, whole, whenever the process is killed.

        Args:
            save_directory: made if need be. Weights of an earlier save in it are removed.
            is_main_process: False: nothing is written; for training in several processes.
            state_dict: tensors to write instead of the model's own, under the names of the files.
            max_shard_size: bytes or "200MB": more than this is spread over several files with an index.
            safe_serialization: only True is possible: pickles are not written.
            push_to_hub: also send the files to the repository `repo_id` (the directory's name if None);
                `push_options` are those of `push_to_hub`.
            save_function, save_peft_format: have no effect, as in transformers where files are safetensors; variant:
                only None is possible.

        Raises:
            CheckpointError: the directory cannot be written, or the hub not reached.
            InputError: an argument that cannot be used; or tensors that are not those of the configuration (adapters,
                weight normalisation, another head, ...), are not finite, or have no values.
        """
        push_options = self._push_options(safe_serialization, push_to_hub, {**push_options, "variant": variant})
        if not is_main_process:
            return
        if state_dict is None:
            state: dict[str, Tensor] = self.state_dict()
        else:
            compare_tensors(
                {name: shape for name, (shape, _) in self._expected().items()},
                {name: tuple(tensor.shape) for name, tensor in state_dict.items()},
                source="state_dict",
                model=type(self).__name__,
            )
            state = dict(state_dict)
        empty = [name for name, tensor in state.items() if isinstance(tensor, Tensor) and tensor.is_meta]
        if empty:
            raise InputError(f"{empty[0]} is on the meta device and has no values to save")
        if state_dict is None:
            self._check_tensors(_tensors(state), self._expected(), lambda name: not_finite(state[name]))
        tensors = {name: array_info(shape, dtype) for name, (shape, dtype) in _tensors(state).items()}
        self._save(
            save_directory,
            tensors,
            lambda name: _bytes(state[name]),
            _name(self.dtype),
            max_shard_size,
            push_to_hub,
            repo_id,
            **{"token": token, **push_options},
        )

    def check_finite(self, done: str = "used") -> None:
        state = self.state_dict()
        self._refuse_not_finite(done, (name for name, tensor in state.items() if not_finite(tensor)))

    check_finite.__doc__ = Pretrained.check_finite.__doc__

    def _own_tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return _tensors(self.state_dict())

    # -- the rest of transformers' base class that code relies on --

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the first floating-point parameter."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """Returns the device of the first parameter."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def _set_gradient_checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                setattr(module, "gradient_checkpointing", on)  # noqa: B010 - a plain flag; nn.Module types it as a tensor


class _NoInit(TorchFunctionMode):
    """Makes `torch.nn.init` do nothing: on the meta device it takes a second of imports for nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def _read(weights: Weights, names: list[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
    """Returns the tensors `names`, floating-point ones as `dtype` (None: the one that most elements are stored in).

    They are read, not mapped: a file that another program cuts or writes to would change or end the process of a
    mapped model.
    """
    if dtype is None:
        dtype = getattr(torch, most_stored_dtype(weights, names))
    wanted, tensors = set(names), {}
    for path, stored_names in weights.files.items():
        read: dict[str, Tensor] = {}

        def memory(name: str, info: TensorInfo, path: Path = path, read: dict[str, Tensor] = read) -> np.ndarray:
            stored = getattr(torch, _STORED.get(info.dtype, ""), None)
            if stored is None:
                raise CheckpointError(f"{path} holds {name} as {info.dtype}; {', '.join(_STORED)} can be read")
            read[name] = torch.empty(info.shape, dtype=stored)
            return read[name].reshape(-1).view(torch.uint8).numpy()

        for name in read_into(path, wanted.intersection(stored_names), memory):
            tensors[name] = _cast(read.pop(name), dtype).to(device)
    return tensors


def _placed(tensor: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """Returns a copy of a caller's tensor; dtype None: the tensor's own."""
    return _cast(tensor.detach(), dtype, copy=True).to(device)


def _cast(tensor: Tensor, dtype: torch.dtype | None, *, copy: bool = False) -> Tensor:
    return tensor.to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype, copy=copy)


def _tensor(array: np.ndarray) -> Tensor:
    """Returns an array of any float or integer type as a tensor; PyTorch does not know the bfloat16 of `ml_dtypes`."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _bytes(tensor: Tensor) -> np.ndarray:
    """Returns a tensor's bytes as they are stored; NumPy has no bfloat16."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _tensors(state: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns name -> shape and dtype.

    A quantized module's other entries have no shape, and their class for a dtype.
    """
    return {
        name: (tuple(value.shape), _name(value.dtype)) if isinstance(value, Tensor) else ((), type(value).__name__)
        for name, value in state.items()
    }


def not_finite(tensor: Any) -> bool:
    """Returns whether a tensor holds NaN or infinite values."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return False
    # A finite sum has finite terms only, and costs a tenth of a look at each; finite terms may have an infinite sum.
    return not bool(torch.isfinite(tensor.detach().sum())) and not bool(torch.isfinite(tensor).all())


def _dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """Returns the requested dtype; None stands for "auto"."""
    if value is None:
        return torch.float32
    if isinstance(value, str) and value == "auto":
        return None
    name = float_dtype(value)
    if name is None:
        raise InputError(f"dtype must be 'auto', float32, float64, float16 or bfloat16, got {value!r}")
    return getattr(torch, name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(device: Any, device_map: Any) -> torch.device:
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device is None and device_map == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device is None:
        device = "cpu" if device_map is None else device_map
    return usable_device(device)


def usable_device(wanted: Any) -> torch.device:
    """Returns the device of a name such as 'cuda:0'. Raises `InputError` for one that cannot be used."""
    try:
        # Devices differ: some raise when they are named, others when they are used.
        probe = torch.zeros(1, device=wanted)
        probe.item()
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the device {str(wanted)!r} cannot be used here (one such as 'cpu' or 'cuda:0' can): {reason}"
        ) from error
    return probe.device
