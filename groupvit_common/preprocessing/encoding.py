"""Named model inputs, and the checks that the tokenizer and the image processor share."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from groupvit_common.errors import InputError

# Keywords of transformers' from_pretrained that change nothing here, and their accepted values (None: any).
HARMLESS_KEYWORDS: Mapping[str, tuple[Any, ...] | None] = {
    "use_fast": None,  # there is one implementation
    "trust_remote_code": None,  # no code of a checkpoint is ever run
    "resume_download": None,  # huggingface_hub always resumes
    "proxies": (None,),
}
# Settings of transformers' tokenizers, and the values that CLIP's tokenizer has anyway.
HARMLESS_TOKENIZER_KEYWORDS: Mapping[str, tuple[Any, ...] | None] = {
    **HARMLESS_KEYWORDS,
    "add_bos_token": (True,),
    "add_eos_token": (True,),
    "add_prefix_space": (False,),
    "additional_special_tokens": (None, [], ()),
    "do_lower_case": (True,),
    "errors": ("replace",),
    "from_slow": (False,),
    "split_special_tokens": (False,),
    "verbose": None,
}
# Never kept, should a file hold them: older versions of other libraries wrote a caller's access token into their files.
SECRETS = ("token", "use_auth_token")


class BatchEncoding(dict[str, Any]):
    """Named model inputs: a dictionary (so `model(**encoding)` works) whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} in this encoding; it holds {', '.join(self) or 'nothing'}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the PyTorch tensors, in place, as `Tensor.to` does: a device, a dtype or both. Other values stay as
        they are.

        A dtype is given to floating-point tensors only: token ids and masks remain integers.
        """
        with_dtype = [*args, *kwargs.values()]
        for name, value in self.items():
            if not (hasattr(value, "to") and hasattr(value, "is_floating_point")):
                continue
            if value.is_floating_point():
                self[name] = value.to(*args, **kwargs)
                continue
            devices = [item for item in with_dtype if isinstance(item, str | int) or type(item).__name__ == "device"]
            if devices:
                self[name] = value.to(devices[0])
        return self


def check_return_tensors(return_tensors: str | None) -> None:
    """Raises `InputError` unless `return_tensors` is None, "np", "pt" or "tf"."""
    if return_tensors is not None and return_tensors not in ("np", "pt", "tf"):
        raise InputError(f"return_tensors must be None, 'np', 'pt' or 'tf', got {return_tensors!r}")


def to_tensors(array: np.ndarray[Any, Any], return_tensors: str) -> Any:
    """Returns a NumPy array as the requested kind of tensor: itself ("np"), a PyTorch ("pt") or a TensorFlow tensor
    ("tf").

    Integers become int32 for TensorFlow and stay int64 elsewhere, as with transformers.
    """
    if return_tensors == "np":
        return array
    name, extra = ("torch", "torch") if return_tensors == "pt" else ("tensorflow", "tf")
    try:
        framework = importlib.import_module(name)
    except ImportError as error:
        message = (
            f"return_tensors={return_tensors!r} needs {name}, which is not installed: pip install 'groupvit[{extra}]'"
        )
        raise InputError(message) from error
    if name == "torch":
        return framework.from_numpy(array)
    return framework.constant(array.astype(np.int32) if array.dtype == np.int64 else array)


def check_keywords(
    owner: str, given: Mapping[str, Any], valid: Sequence[str], harmless: Mapping[str, tuple[Any, ...] | None]
) -> None:
    """Raises `InputError` for keywords that are neither valid nor harmless, and for other values of a harmless one.

    Values of unknown keywords are not repeated in the message: one may be an access token.
    """
    if "use_auth_token" in given:
        raise InputError("use_auth_token is transformers' former name of an access token; pass token= instead")
    unknown = [name for name in given if name not in valid and name not in harmless]
    if unknown:
        what = "is not a keyword" if len(unknown) == 1 else "are not keywords"
        raise InputError(f"{', '.join(map(repr, unknown))} {what} of the {owner}; these are: {', '.join(valid)}")
    for name, value in given.items():
        values = None if name in valid else harmless[name]
        if values is not None and value not in values:
            raise InputError(f"{name}={value!r} is not supported: the {owner} knows {name}={values[0]!r} only")


def check_text(text: Any) -> str:
    if isinstance(text, str):
        return text
    hint = (
        "; decode bytes first"
        if isinstance(text, bytes)
        else "; images are passed as images="
        if _is_image(text)
        else ""
    )
    raise InputError(f"text must be a string or a list of strings, got {type(text).__name__}{hint}")


def check_texts(text: Any) -> list[str]:
    """Returns one text or several as a list of strings."""
    text = _listed(text)
    if not isinstance(text, list | tuple):
        return [check_text(text)]
    if not text:
        raise InputError("the list of texts is empty; expected a string or a list of strings")
    for position, item in enumerate(text):
        if not isinstance(item, str):
            missing = item is None or item != item  # NaN is unlike itself
            hint = ": it is missing, so leave its row out" if missing is True else ""
            raise InputError(f"text {position} of the list must be a string, got {type(item).__name__}{hint}")
    return list(text)


def _listed(text: Any) -> Any:
    """Returns the column of a table (pandas, Arrow, polars, `datasets`) or an array of one axis as a list, anything
    else as it is."""
    if _is_image(text) or getattr(text, "ndim", 1) > 1:
        return text
    for method in ("tolist", "to_pylist", "to_list"):
        if callable(getattr(text, method, None)):
            return getattr(text, method)()
    plain = isinstance(text, list | tuple | str | bytes | Mapping)
    return list(text) if isinstance(text, Sequence) and not plain else text


def _is_image(value: Any) -> bool:
    return hasattr(value, "getbands") or getattr(value, "ndim", 0) >= 2
