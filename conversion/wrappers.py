"""The wrappers of training programs: keys above a model's state dict, parts of names, entries that are no weights.

A model is known by its two towers: where names of both begin alike, that beginning is a prefix, whatever it is
(`module.`, `model.`, `student.backbone.`, the name of a layer of Keras), and all names with that prefix are one
model's. Wrappers within names (`_orig_mod`, `_checkpoint_wrapped_module`) are removed first.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from conversion.names import Naming
from conversion.pickle_records import Inert, Tensor, escaped, other_tensor
from groupvit_common.errors import CheckpointError, some

# Parts of names that PyTorch's wrappers add, anywhere: DataParallel and DistributedDataParallel, torch.compile, fully
# sharded training (of today and before 2.0), activation checkpointing, Lightning's Fabric. No model here has parts of
# these names.
_WRAPPERS = frozenset(
    {
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "_original_module",
    }
)
# Entries beside the weights that averages of weights and precision libraries add.
_NO_WEIGHTS = re.compile(r"(^|\.)(n_averaged|_extra_state|initted|step)$")
# Tensors of an optimizer may be called as those of the model.
_OPTIMIZERS = re.compile(r"optim", re.IGNORECASE)
# The root's own name, where a file has other models besides.
_ROOT = "."
_MAX_DEPTH, _MAX_DICTIONARIES, _MAX_MODELS = 4, 10_000, 20
_LISTED = 8

Path = tuple[str, ...]


class Choice(NamedTuple):
    """The model of a file that is to be read.

    Attributes:
        at: the keys, from the outermost, that lead to its state dict; () where the file is one.
        names: name in its naming -> name in the file.
        model: the name for `--key`; models: the names of all, where there are several.
        notes: what was removed from names and left out.
    """

    at: Path
    naming: Naming
    names: Mapping[str, str]
    model: str = _ROOT
    models: tuple[str, ...] = ()
    prefix: str = ""
    notes: tuple[str, ...] = ()


def state_dicts(content: Any, namings: Sequence[Naming]) -> dict[Path, dict[Any, Any]]:
    """Returns the dictionaries within a pickle's content that hold tensors of towers, by the keys that lead to them."""
    towers = "|".join(re.escape(tower) for naming in namings for tower in naming.towers)
    in_a_tower = re.compile(rf"(^|\.)({towers})\.")
    found: dict[Path, dict[Any, Any]] = {}
    queue: list[tuple[Path, Any]] = [((), content)]
    seen: set[int] = set()
    for at, value in queue:
        # Dictionaries of a class of their own.
        value = value.items if isinstance(value, Inert) and value.items else value
        if not isinstance(value, dict) or id(value) in seen or len(seen) == _MAX_DICTIONARIES:
            continue
        seen.add(id(value))
        if any(isinstance(name, str) and _is_tensor(item) and in_a_tower.search(name) for name, item in value.items()):
            found[at] = value
        if len(at) < _MAX_DEPTH:
            queue += [
                ((*at, name), item)
                for name, item in value.items()
                if isinstance(name, str) and isinstance(item, dict | Inert) and not _OPTIMIZERS.search(name)
            ]
    return found


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or other_tensor(value) is not None


def choose(
    states: Mapping[Path, Iterable[str]],
    namings: Sequence[Naming],
    *,
    source: object,
    key: str | None = None,
    first: bool = False,
) -> Choice | None:
    """Returns the model that is chosen of those in a file; None where there is none.

    Args:
        states: the file's state dicts: the keys that lead to each -> the names in it.
        namings: those that the names may follow.
        source: the file's name in an error.
        key: the model's name, one of those that the error lists.
        first: without a key, choose the first of several.

    Raises:
        CheckpointError: there are several models and no key, or none of that name, or two tensors of one name.
    """
    every = [
        choice._replace(at=at)
        for at, names in states.items()
        for naming in namings
        for choice in _models(list(names), naming, source)
    ]
    whole = [choice for choice in every if choice.models] or every[:1]
    if not whole:
        if key is not None:
            raise CheckpointError(f"{source} holds no model that could be chosen by a key (--key {escaped(key)})")
        return None
    inner = Counter(choice.at for choice in whole)
    called = [_name(choice.at, choice.prefix if inner[choice.at] > 1 else "") for choice in whole]
    names = some([repr(escaped(name, 80)) for name in called], _LISTED)
    if key is None:
        if len(whole) > 1 and not first:
            raise CheckpointError(f"{source} holds {len(whole)} models, {names}: choose one with key (--key NAME)")
        number = 0
    else:
        # By the name; or by the prefix or the keys alone, where that is one model's.
        by_part = [n for n, choice in enumerate(whole) if key in (choice.prefix.strip("./"), _name(choice.at, ""))]
        found = [n for n, name in enumerate(called) if name == key] or (by_part if len(by_part) == 1 else [])
        if not found:
            raise CheckpointError(f"{source} holds no model {escaped(key)!r}; there is {names}")
        number = found[0]
    choice = whole[number]._replace(model=called[number], models=tuple(called))
    return _described(choice, list(states[choice.at]), alone=key is not None or len(whole) > 1, source=source)


def _name(at: Path, prefix: str) -> str:
    return ".".join((*at, prefix.strip("./"))).strip(".") or _ROOT


def _models(names: list[str], naming: Naming, source: object) -> Iterator[Choice]:
    """Yields the models among a state dict's names; those with both towers have `models` set, for now. Without such a
    model, yields one that has a part of a tower."""
    dot = naming.separator
    pattern = re.compile(rf"(?:^|{re.escape(dot)})({'|'.join(map(re.escape, naming.towers))}){re.escape(dot)}")
    clean = {name: _unwrapped(name, dot) for name in names}
    seen: dict[str, set[str]] = {}
    for name in clean.values():
        if match := pattern.search(name):
            seen.setdefault(name[: match.start(1)], set()).add(match[1])
    whole = [prefix for prefix, parts in seen.items() if len(parts) == len(naming.towers)]
    if len(whole) > _MAX_MODELS:
        raise CheckpointError(f"{source} holds {len(whole)} models, more than can be told apart")
    # The longest first: "teacher." before "", which all names begin with.
    prefixes = sorted(whole or (seen if len(seen) == 1 else ()), key=len, reverse=True)
    found: dict[str, dict[str, str]] = {prefix: {} for prefix in prefixes}
    for stored, name in clean.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            continue
        twice = found[prefix].setdefault(name.removeprefix(prefix), stored)
        if twice != stored:
            raise CheckpointError(f"{source} holds one tensor twice, as {escaped(twice, 80)} and {escaped(stored, 80)}")
    for prefix in whole or prefixes:
        yield Choice((), naming, found[prefix], prefix=prefix, models=(prefix,) if whole else ())


def _unwrapped(name: str, dot: str) -> str:
    parts = name.split(dot)
    kept = [part for part in parts if part not in _WRAPPERS]
    return name if len(kept) == len(parts) else dot.join(kept)


def _described(choice: Choice, stored: list[str], *, alone: bool, source: object) -> Choice:
    """Returns the choice with all names that are to be accounted for, and notes on what was changed.

    Args:
        alone: whether tensors besides the model's are left out, as they are where it was chosen by its name.
    """
    dot = choice.naming.separator
    names = dict(choice.names)
    own = set(names.values())
    # Those of other models are no concern of this one.
    others = [other for other in stored if other not in own]
    left_out = [name for name in names if _NO_WEIGHTS.search(name)]
    for name in left_out:
        del names[name]
    for other in others:
        if alone or _NO_WEIGHTS.search(other):
            left_out.append(other)
        elif names.setdefault(other, other) != other:
            raise CheckpointError(
                f"{source} holds {escaped(other, 80)} of the model and another tensor of this name beside it: choose "
                "the model "
                f"with key (--key {escaped(choice.prefix.strip('./') or choice.model, 80)}), which leaves the other out"
            )
    notes = [f"chosen of {len(choice.models)} models: {escaped(choice.model, 80)!r}"] if len(choice.models) > 1 else []
    removed = Counter(_removed(own_name, name_there, dot) for own_name, name_there in names.items())
    notes += [f"{what} of {count} tensors removed" for what, count in removed.most_common(_LISTED) if what]
    if left_out:
        notes.append(f"left out: {listed(left_out)}")
    return choice._replace(names=names, notes=tuple(notes))


def _removed(name: str, stored: str, dot: str) -> str:
    """Returns what was removed from a name, in words."""
    if stored == name:
        return ""
    if stored.endswith(name):
        return f"prefix {escaped(stored.removesuffix(name), 80)!r}"
    parts = dict.fromkeys(part for part in stored.split(dot) if part in _WRAPPERS)
    return f"{' and '.join(map(repr, parts))} within the names"


def listed(names: Sequence[str]) -> str:
    """Returns the first few names of a file, escaped, and the number of the others."""
    return some([escaped(name, 80) for name in names], _LISTED)
