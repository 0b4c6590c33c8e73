"""`BatchFeature`: what an image processor returns, a dictionary with transformers' attributes and methods."""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np

from groupvit_common.compat.keywords import plain
from groupvit_common.errors import InputError


class NamedInputs(dict[str, Any]):
    """A dictionary of a model's inputs, as transformers' `BatchFeature` and `BatchEncoding` are."""

    @property
    def data(self) -> Self:
        """Returns the dictionary that this is; assigning replaces its content."""
        return self

    @data.setter
    def data(self, values: Mapping[str, Any]) -> None:
        values = dict(values)
        self.clear()
        self.update(values)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the PyTorch tensors, in place, as `Tensor.to` does: a device, a dtype or both. Other values stay.

        A dtype is given to floating-point tensors only.
        """
        first = args[0] if args else None
        device = kwargs.get("device", None if type(first).__name__ == "dtype" else first)
        if device is not None and not (isinstance(device, str | int) or type(device).__name__ == "device"):
            raise InputError(f"to() takes a device or a dtype, got {type(device).__name__}")

        def moved(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(moved(item) for item in value)
            if not (hasattr(value, "to") and hasattr(value, "is_floating_point")):
                return value
            if value.is_floating_point():
                return value.to(*args, **kwargs)
            if device is None:
                return value
            return value.to(device=device, non_blocking=kwargs.get("non_blocking", False))

        self.update({name: moved(value) for name, value in self.items()})
        return self


class BatchFeature(NamedInputs):
    """Named model inputs: a dictionary (so `model(**features)` works) whose keys are attributes too.

    Args:
        data: the values by name.
        tensor_type: convert them, see `convert_to_tensors`.
        skip_tensor_conversion: names that are left as they are.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        tensor_type: Any = None,
        skip_tensor_conversion: Iterable[str] | None = None,
    ) -> None:
        super().__init__(data or {})
        self.convert_to_tensors(tensor_type, skip_tensor_conversion)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} among these features: {', '.join(self) or 'there are none'}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),), self.__dict__ or None

    def copy(self) -> Self:
        """Returns a new object with the same values."""
        return type(self)(self)

    def convert_to_tensors(self, tensor_type: Any = None, skip_tensor_conversion: Iterable[str] | None = None) -> Self:
        """Converts lists and arrays to tensors, in place: "np", "pt" or "tf"; None changes nothing.

        Texts, dictionaries and None stay as they are.
        """
        kind = plain(tensor_type)
        if kind is None:
            return self
        if kind not in _CONVERTERS:
            raise InputError(f"tensor_type must be None, 'np', 'pt' or 'tf', got {tensor_type!r}")
        skipped = set(skip_tensor_conversion or ())
        for name, value in self.items():
            if name not in skipped and _is_numeric(value):
                try:
                    self[name] = _CONVERTERS[kind](value)
                except (ValueError, TypeError) as error:
                    raise InputError(
                        f"{name} cannot become one tensor: its items differ in shape or kind ({error}); "
                        "give them one size, or leave return_tensors out"
                    ) from error
        return self


def _is_numeric(value: Any) -> bool:
    """Returns whether a value can be a tensor: a number, an array, or lists of them."""
    while isinstance(value, list | tuple):
        if not value:
            return True
        value = value[0]
    return not (value is None or isinstance(value, str | bytes | Mapping))


def _numpy(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, list | tuple) and value and hasattr(value[0], "detach"):
        value = [item.detach().cpu().numpy() for item in value]
    elif hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        return np.asarray(value)
    except ValueError:  # items of different lengths
        array = np.empty(len(value), dtype=object)
        array[:] = [np.asarray(item) for item in value]
        return array


def _framework(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"this needs {name}, which is not installed: pip install 'groupvit[{extra}]'") from error


def _torch(value: Any) -> Any:
    torch = _framework("torch", "torch")
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
        return torch.stack(list(value))
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else torch.from_numpy(_for_torch(value))


def _for_torch(value: Any) -> np.ndarray[Any, Any]:
    array = np.asarray(value)
    # Python's numbers: torch.tensor makes them float32.
    plain_numbers = array.dtype == np.float64 and not _has_arrays(value)
    return array.astype(np.float32) if plain_numbers else array


def _has_arrays(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return hasattr(value, "dtype")


def _tensorflow(value: Any) -> Any:
    tensorflow = _framework("tensorflow", "tf")
    return value if tensorflow.is_tensor(value) else tensorflow.constant(value)


_CONVERTERS = {"np": _numpy, "pt": _torch, "tf": _tensorflow}
