"""Named model inputs, and the checks that the tokenizer and the image processor share."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from groupvit_common.compat.encoding import EncodingHabits
from groupvit_common.errors import InputError, short

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
    "chat_template": (None,),
    "config": None,  # whose tokenizer it is
    "do_lower_case": (True,),
    "errors": ("replace",),
    "from_slow": None,  # there is one vocabulary
    "gguf_file": (None,),
    "processor_class": None,
    "special_tokens_map_file": None,
    "tokenizer_class": None,
    "tokenizer_type": (None, "clip"),
    "use_auth_token": (None,),
    "verbose": None,
}
# Never kept, should a file hold them: older versions of other libraries wrote a caller's access token into their files.
SECRETS = ("token", "use_auth_token")


class BatchEncoding(EncodingHabits):
    """Named model inputs: a dictionary (so `model(**encoding)` works) whose keys are attributes too.

    `BatchEncoding(data, encoding, tensor_type)`: named inputs, the `tokenizers.Encoding` of each text if there are
    texts, and a kind of tensor to turn the inputs into. What an encoding knows of its texts is in
    `groupvit_common.compat.encoding`.
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no {name!r} in this encoding; it holds {', '.join(self) or 'nothing'}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data" or name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self[name] = value

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> Self:
        """Turns lists into tensors, in place: "np", "pt" or "tf"; `prepend_batch_axis` makes a batch of one of them."""
        if tensor_type is None:
            return self
        check_return_tensors(tensor_type)
        kind = str(getattr(tensor_type, "value", tensor_type))
        for name, value in list(self.items()):
            if not prepend_batch_axis and _is_tensor(value, kind):
                continue
            try:
                array = _as_array([value] if prepend_batch_axis else value, ragged=kind == "np")
                self[name] = to_tensors(array if array.size else array.astype(np.int64), kind)
            except InputError:
                raise
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"{name!r} cannot become one tensor ({error}); rows of one length are needed: pass padding=True "
                    "and truncation=True to the tokenizer"
                ) from error
        return self


def _as_array(value: Any, *, ragged: bool) -> np.ndarray[Any, Any]:
    """Returns an array; with `ragged` rows of different lengths become an array of arrays."""
    rows = value if ragged and isinstance(value, list) else []
    if rows and all(isinstance(row, list | np.ndarray) for row in rows) and len({len(row) for row in rows}) > 1:
        array = np.empty(len(rows), dtype=object)
        array[:] = [np.asarray(row) for row in rows]
        return array
    return np.asarray(value)


def _is_tensor(value: Any, kind: str) -> bool:
    package = {"np": "numpy", "pt": "torch", "tf": "tensorflow"}[kind]
    return hasattr(value, "shape") and any(
        base.__module__.partition(".")[0] == package for base in type(value).__mro__[:-1]
    )


def check_return_tensors(return_tensors: str | None) -> None:
    """Raises `InputError` unless `return_tensors` is None, "np", "pt" or "tf"."""
    if return_tensors is not None and getattr(return_tensors, "value", return_tensors) not in ("np", "pt", "tf"):
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
    if given.get("use_auth_token") is not None and "use_auth_token" not in valid:
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


def check_inputs(text: Any, text_pair: Any, words: bool) -> tuple[bool, list[Any], bool]:
    """Returns whether a call has one text, its texts as a list, and whether any is a pair.

    A text is a string or, with `words`, a list of strings; a pair is a tuple of two.
    """
    if isinstance(text, str) and not words and not text_pair:
        return True, [text], False
    text, text_pair = _listed(text), _listed(text_pair)
    check_words: Any = _check_words if words else check_text
    if words:
        single = not (isinstance(text, list | tuple) and text and isinstance(text[0], list | tuple))
    else:
        single = not isinstance(text, list | tuple)
    if single:
        first = check_words(text)
        return True, [(first, check_words(text_pair)) if text_pair else first], bool(text_pair)
    if text_pair is not None:
        if not isinstance(text_pair, list | tuple) or len(text_pair) != len(text):
            size = len(text_pair) if isinstance(text_pair, list | tuple) else type(text_pair).__name__
            raise InputError(f"{len(text)} texts need as many second ones in text_pair, got {size}")
        pairs = [(check_words(one), check_words(other)) for one, other in zip(text, text_pair, strict=True)]
        return False, pairs, bool(pairs)
    nested = str if not words else list | tuple
    if any(_is_pair(item, nested) for item in text):
        return False, [_pair_or_text(item, nested, check_words) for item in text], True
    return False, [check_words(item) for item in text] if words else check_texts(text), False


def _is_pair(item: Any, part: Any) -> bool:
    return isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(each, part) for each in item)


def _pair_or_text(item: Any, part: Any, check: Any) -> Any:
    return (check(item[0]), check(item[1])) if _is_pair(item, part) else check(item)


def _check_words(text: Any) -> list[str]:
    if not isinstance(text, list | tuple) or not all(isinstance(word, str) for word in text):
        raise InputError(f"with is_split_into_words a text is a list of words (strings), got {short(text)}")
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


def as_plain(ids: Any) -> Any:
    """Returns an array of a list, an array or a tensor on any device."""
    return np.asarray(ids.detach().cpu() if hasattr(ids, "detach") else ids)


def as_ids(ids: Any) -> np.ndarray[Any, Any]:
    """Returns ids of any kind (integer, list, array, tensor on any device) as an int64 array."""
    array = as_plain(ids)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"token ids must be integers, got {array.dtype if array.dtype != object else 'a ragged list'}")
    return array.astype(np.int64)
