"""Habits of programs written for transformers with a configuration: attributes of their own, labels, differences.

The host stores settings as plain attributes, lists its fields in `_defaults()`, and has `to_dict`.
"""

import copy
import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

from groupvit_common.errors import InputError, short

# Attributes of every configuration of transformers that no GroupViT uses. Read as these values, written only where set.
DEFAULTS: dict[str, Any] = {
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "bos_token_id": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {0: "LABEL_0", 1: "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_scores": False,
    "pad_token_id": None,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "transformers_version": None,
    "typical_p": 1.0,
    "use_bfloat16": False,
}
# Fields of ours that are attributes of every configuration there too: left out of `to_diff_dict` at these values.
_FLAGS = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
# Attributes that are computed from others, and may be set all the same.
COMPUTED = ("dtype", "name_or_path", "num_labels", "torch_dtype", "_attn_implementation")
# Attributes that belong to a process or machine and not to a model.
_UNWRITTEN = ("_auto_class", "_commit_hash", "_attn_implementation_internal")
_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
_YES, _NO = ("true", "1", "y", "yes"), ("false", "0", "n", "no")


class TransformersConfig:
    """Base of the configurations: whatever is set on one is kept and written, and what is not reads as there."""

    attribute_map: ClassVar[dict[str, str]] = {}
    base_config_key: ClassVar[str] = ""
    has_no_defaults_at_init: ClassVar[bool] = False
    is_composition: ClassVar[bool] = False
    sub_configs: ClassVar[dict[str, type[Any]]] = {}

    # Values of `DEFAULTS` that were read and may have been changed in place, and keys of a file that a method covers.
    _served: dict[str, Any]
    _covered: dict[str, Any]

    def _keep(self, settings: Mapping[str, Any]) -> None:
        """Stores settings that are no fields."""
        self._served, self._covered = {}, {}
        labels = {name: settings[name] for name in ("num_labels", "id2label", "label2id") if name in settings}
        for name, value in settings.items():
            if name in ("num_labels", "id2label"):
                continue
            if name == "name_or_path":
                self.name_or_path = value
            elif (hasattr(type(self), name) and name not in COMPUTED) or name in ("_served", "_covered"):
                self._covered[name] = value
            else:
                setattr(self, name, value)
        if labels.get("id2label") is not None:
            if not isinstance(labels["id2label"], Mapping):
                raise InputError(
                    f"id2label must be a dictionary of numbers and labels, got {short(labels['id2label'])}"
                )
            # Keys are strings in JSON.
            self.id2label = {_number(key): label for key, label in labels["id2label"].items()}
        elif labels.get("num_labels") is not None:
            self.num_labels = labels["num_labels"]
        problem = settings.get("problem_type")
        if problem is not None and problem not in _PROBLEM_TYPES:
            raise InputError(f"problem_type must be one of {', '.join(_PROBLEM_TYPES)}, got {short(problem)}")

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        # Called for names that are neither fields, nor set, nor methods.
        served = self.__dict__.get("_served")
        if name == "_commit_hash":
            return None
        if served is None or name not in DEFAULTS:
            raise AttributeError(f"{type(self).__name__} has no setting {name!r}")
        if isinstance(DEFAULTS[name], dict):
            # May be changed in place.
            return served.setdefault(name, copy.deepcopy(DEFAULTS[name]))
        return DEFAULTS[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __copy__(self) -> Self:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._served, twin._covered = dict(self._served), dict(self._covered)
        return twin

    @property
    def extra(self) -> Mapping[str, Any]:
        """Returns what is kept beside the fields, to read: keys that came with the file, attributes that were set."""
        fields = self._defaults()
        kept = {
            name: value
            for name, value in self.__dict__.items()
            if name not in fields and name not in ("_served", "_covered", *_UNWRITTEN)
        }
        changed = {name: value for name, value in self._served.items() if value != DEFAULTS[name]}
        return MappingProxyType({**self._covered, **changed, **kept})

    def _plain_extra(self) -> dict[str, Any]:
        """Returns `extra` as new values for JSON."""
        return {name: _plain(value) for name, value in self.extra.items()}

    # -- attributes that are computed --

    @property
    def name_or_path(self) -> str:
        """The name or directory that the configuration came from."""
        return self.__dict__.get("_name_or_path", "")

    @name_or_path.setter
    def name_or_path(self, value: Any) -> None:
        self.__dict__["_name_or_path"] = str(value)

    @property
    def num_labels(self) -> int:
        """The number of labels; setting it names them anew."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, number: int) -> None:
        if len(self.id2label) != number:
            self.id2label = {index: f"LABEL_{index}" for index in range(number)}
            self.label2id = {label: index for index, label in self.id2label.items()}

    @property
    def torch_dtype(self) -> Any:
        """The dtype that the file names: PyTorch's own where PyTorch is imported, else its name; None: unknown."""
        value = self.__dict__.get("torch_dtype", self.__dict__.get("dtype"))
        torch = sys.modules.get("torch")
        return getattr(torch, value, value) if torch is not None and isinstance(value, str) else value

    @torch_dtype.setter
    def torch_dtype(self, value: Any) -> None:
        self.__dict__.pop("dtype", None)
        self.__dict__["torch_dtype"] = value

    dtype = torch_dtype  # transformers 5

    @property
    def _attn_implementation(self) -> str:
        return self.__dict__.get("_attn_implementation_internal") or "sdpa"

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | None) -> None:
        self.__dict__["_attn_implementation_internal"] = value

    # -- in and out --

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the settings that differ from transformers' defaults; in a tower's those that differ from a tower's
        defaults, and its model type."""
        common = {**DEFAULTS, **_FLAGS}
        found: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            part = getattr(self, name, None)
            if isinstance(part, TransformersConfig):
                default = type(part)().to_dict()
                found[name] = {
                    key: setting
                    for key, setting in value.items()
                    if key == "model_type" or (setting != default.get(key) if key in default else True)
                }
            elif name not in common or value != common[name]:
                found[name] = value
        return found

    def update_from_string(self, update_str: str) -> None:
        """Sets settings from text such as "hidden_size=64,return_dict=false", converted to the type that each has.

        Raises:
            InputError: an unknown setting, or text that its type cannot have.
        """
        for item in update_str.split(","):
            name, _, text = item.partition("=")
            old = getattr(self, name, self)
            if old is self:
                raise InputError(f"{type(self).__name__} has no setting {name!r}")
            setattr(self, name, _converted(name, old, text))

    def get_text_config(self, decoder: bool = False, encoder: bool = False) -> Any:
        """Returns the text tower's configuration of a full one, else the configuration itself."""
        return getattr(self, "text_config", self)


def _number(key: Any) -> int:
    try:
        return int(key)
    except (TypeError, ValueError):
        raise InputError(f"id2label must have numbers for its keys, got {short(key)}") from None


def _plain(value: Any) -> Any:
    """Returns a new value for JSON: a dtype as its name, objects that can say themselves as dictionaries."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if not isinstance(value, type) and callable(getattr(value, "to_dict", None)):
        return value.to_dict()
    return copy.deepcopy(value)


def _converted(name: str, old: Any, text: str) -> Any:
    """Returns `text` as the type of the setting's present value."""
    if isinstance(old, bool):
        if text.lower() not in (*_YES, *_NO):
            raise InputError(f"{name} must be true or false, got {text!r}")
        return text.lower() in _YES
    if not isinstance(old, int | float | str):
        raise InputError(f"{name} cannot be set from text, because it is {short(old)}: set the attribute itself")
    try:
        return type(old)(text)
    except ValueError:
        raise InputError(f"{name} must be {type(old).__name__}, got {text!r}") from None
