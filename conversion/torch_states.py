"""State dicts in files of `torch.save`: which there are, which is the model, and what else the files hold."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from conversion.names import Naming
from conversion.pickle_records import Inert, Tensor, escaped, other_tensor, shown
from conversion.registry import FORMATS
from conversion.source import Files, Info, Opened, Piece, check_names, whole
from conversion.torch_file import TorchFile, claimed_bytes, read_torch_file
from conversion.wrappers import Choice, listed, state_dicts
from groupvit_common.errors import CheckpointError

# Where files of torch.save keep the state dict, if it is not all that they hold.
_STATE_KEYS = ("model", "state_dict", "model_state_dict")
_MAX_OTHERS = 100
_MAX_DEPTH = 20  # of nested settings
_MAX_VALUES = 100_000

States = dict[tuple[str, ...], dict[Any, Any]]


class TorchContent(NamedTuple):
    """Files of `torch.save`: the state dicts in each, by the keys that lead to them, and the model that is chosen."""

    files: list[TorchFile]
    states: list[States]
    choice: Choice | None


def read_content(files: Files) -> TorchContent:
    """Reads everything except the tensors' values, and chooses the model.

    Raises:
        CheckpointError: a file cannot be read, or holds no state dict, or several models.
    """
    namings = [spec.code.NAMING for spec in FORMATS if spec.container == "torch"]
    torch_files = [read_torch_file(path) for path in files.paths]
    states = [_states(file, namings) for file in torch_files]
    named = [{at: _tensor_names(state) for at, state in each.items()} for each in states]
    if len(named) > 1:
        # A shard may hold a part of one tower alone.
        together: dict[tuple[str, ...], list[str]] = {
            (): [name for each in named for names in each.values() for name in names]
        }
        return TorchContent(torch_files, states, files.choose(together, namings))
    return TorchContent(torch_files, states, files.choose(named[0], namings))


def read_states(files: Files, naming: Naming) -> Opened:
    """Reads the tensors of the chosen model.

    Raises:
        CheckpointError: its tensors cannot be read.
    """
    content = files.once(read_content)
    choice, single = content.choice, len(content.files) == 1
    pieces = [
        _piece(file, states, choice.at if choice is not None and single else next(iter(states)))
        for file, states in zip(content.files, content.states, strict=True)
    ]
    return Opened(pieces, choice or whole(naming, [name for piece in pieces for name in piece.tensors]))


def settings_of(files: Files) -> Mapping[Any, Any]:
    """Returns what the first file holds beside the state dict, if it is a dictionary."""
    content = files.once(read_content).files[0].content
    return content if isinstance(content, dict) else {}


def _states(file: TorchFile, namings: Sequence[Naming]) -> dict[tuple[str, ...], dict[Any, Any]]:
    """Returns the state dicts in a file, by the keys that lead to each: at least one, which need not be this model's.

    Raises:
        CheckpointError: nothing in it is a state dict.
    """
    found = state_dicts(file.content, namings)
    if found:
        return found
    state, at = file.content, tuple[str, ...]()
    for key in _STATE_KEYS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state, at = state[key], (*at, key)
    if isinstance(state, dict) and "param_groups" in state and "state" in state:
        raise CheckpointError(f"{file.path} holds an optimizer's state and no model's: name the file of the model")
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        what = "a dictionary with other keys than names" if isinstance(state, dict) else shown(state)
        raise CheckpointError(
            f"{file.path} holds {what}, not a state dict: a dictionary of tensors (`model.state_dict()`), or one under "
            "'model'"
        )
    if not state:
        raise CheckpointError(f"{file.path} holds no state dict: it is empty")
    for name, value in state.items():
        if not isinstance(value, Tensor) and other_tensor(value) is None:
            raise CheckpointError(f"{file.path} holds no state dict: {shown(name)} is {shown(value)}, not a tensor")
    return {at: state}


def _tensor_names(state: Mapping[Any, Any]) -> list[str]:
    return [
        name
        for name, value in state.items()
        if isinstance(name, str) and (isinstance(value, Tensor) or other_tensor(value) is not None)
    ]


def _piece(file: TorchFile, states: States, at: tuple[str, ...]) -> Piece:
    """Returns the tensors of one of a file's state dicts."""
    state = states[at]
    records = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    tensors = {name: Info(record.shape, record.dtype) for name, record in records.items()}
    tensors |= {name: Info((), other_tensor(state[name]) or "") for name in _tensor_names(state) if name not in records}
    check_names(tensors, file.path)
    limit = claimed_bytes(file.path)
    claimed = sum(file.cost(record) for record in records.values())
    if claimed > limit:
        raise CheckpointError(
            f"{file.path} is damaged: its {len(records)} tensors would take {claimed} bytes of storages that they "
            f"share, and the file justifies {limit}"
        )
    if tensors and all(info.shape == (0,) for info in tensors.values()):
        raise CheckpointError(
            f"{file.path} holds names without values, as of DeepSpeed's ZeRO stage 3: put the weights together with "
            "the zero_to_fp32.py beside it, and convert its result"
        )
    skipped = [name if isinstance(name, str) else shown(name) for name in state if name not in tensors]
    notes = [f"read from {'.'.join(map(escaped, at))!r}"] if at and at[-1] not in _STATE_KEYS else []
    notes += [f"left out: {listed(skipped)}"] if skipped else []
    return Piece(
        tensors, lambda name: file.read(records[name]), _others(file.content, at[0]) if at else (), tuple(notes)
    )


def _others(content: dict[Any, Any], chosen: str) -> tuple[str, ...]:
    """Returns what is beside the weights (under the key `chosen`): keys, and the values of numbers and texts."""
    others = []
    for key, value in content.items():
        if key == chosen:
            continue
        name = escaped(key) if isinstance(key, str) else shown(key)
        if isinstance(value, str) and len(value) <= 40:
            name += f" {escaped(value)}"
        elif isinstance(value, int | float):
            name += f" {shown(value)}"
        others.append(name)
    more = len(others) - _MAX_OTHERS
    return (*others[:_MAX_OTHERS], *([f"{more} more"] if more > 0 else []))


def plain(value: Any) -> Any:
    """Returns pickled settings (OmegaConf, mmcv, dictionaries) as plain values; anything unknown becomes None."""
    return _plain(value, iter(range(_MAX_VALUES)), 0)


def _plain(value: Any, budget: Iterator[int], depth: int) -> Any:
    # Shared values may nest to astronomical numbers; real settings do not.
    if depth > _MAX_DEPTH or next(budget, None) is None:
        return None
    if isinstance(value, Inert):
        state = value.state if isinstance(value.state, dict) else {}
        # OmegaConf: a container keeps its nodes in `_content`, a node its value in `_val`; mmcv's Config: `_cfg_dict`.
        # Anything else is a class derived from dict or list, or one with attributes.
        for key in ("_content", "_val", "_cfg_dict"):
            if key in state:
                return _plain(state[key], budget, depth + 1)
        value = value.items or value.elements or state
    if isinstance(value, dict):
        return {key: _plain(item, budget, depth + 1) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [_plain(item, budget, depth + 1) for item in value]
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        # No setting's value, and Python will not print all of them.
        return shown(value)
    return value if isinstance(value, str | int | float | bool) else None
