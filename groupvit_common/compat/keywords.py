"""Keywords of programs written for transformers: values that are enumerations, and names that nobody here knows."""

import enum
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from groupvit_common.errors import InputError, short

# As alike as "do_resise" and "do_resize", and less than "pad_size" and "size".
_ALIKE = 0.85

Harmless = Mapping[str, tuple[Any, ...] | None]
"""Keywords without effect here, and the values for which that is right (None: any)."""


class ChannelDimension(enum.StrEnum):
    """Values of `data_format` and `input_data_format`, by name."""

    FIRST = "channels_first"
    LAST = "channels_last"


def plain(value: Any) -> Any:
    """Returns the value of an enumeration's member, such as transformers' `TensorType` has, anything else as it is."""
    return value.value if isinstance(value, enum.Enum) else value


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that another is most probably meant to be; None if there is none."""
    import difflib  # needed for mistakes alone

    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=_ALIKE)), None)


def check_unknown(owner: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises `InputError` for a name that is nearly a known one; warns of others, which have no effect.

    Values are not repeated in the message: one may be an access token.
    """
    known = list(known)
    for name in names:
        if alike := nearest(name, known):
            raise InputError(
                f"{name!r} is not a keyword of the {owner} (did you mean {alike!r}?); these are: {', '.join(known)}"
            )
        warnings.warn(f"{name!r} is not a keyword of the {owner} and has no effect", stacklevel=4)


def drop_harmless(owner: str, given: Mapping[str, Any], harmless: Harmless) -> dict[str, Any]:
    """Returns keywords without those of a table. Raises `InputError` for other values of these."""
    for name in given.keys() & harmless.keys():
        values = harmless[name]
        if values is not None and not any(given[name] is value or given[name] == value for value in values):
            raise InputError(
                f"{name}={short(given[name])} is not supported: the {owner} knows {name}={values[-1]!r} only"
            )
    return {name: value for name, value in given.items() if name not in harmless}
