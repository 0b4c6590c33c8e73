"""Texts of a batch -> tokens, cut to a limit and filled up to a common length."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from groupvit_common.compat.tokenizer import pad_row
from groupvit_common.errors import InputError, short

# transformers writes 1e30 for "no limit"; anything above this is taken so.
NO_LIMIT = 10**20

_PADDING = {True: "longest", False: "", None: "", "do_not_pad": "", "longest": "longest", "max_length": "max_length"}
_TRUNCATION = {
    True: "longest_first", False: "", "do_not_truncate": "",
    "longest_first": "longest_first", "only_first": "only_first", "only_second": "only_second",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The lengths that a call cuts texts to and fills them up to.

    truncation: "longest_first", "only_first" or "only_second" of a pair; "": nothing is cut.
    padding: "longest" of the batch or "max_length"; "": nothing is filled up.
    limit: tokens to cut to, special ones included, and to fill up to with "max_length".
    stride: tokens that the parts of a text that is cut share.
    multiple: the padded length becomes a multiple of it.
    side, cut_side: "right" or "left", where padding goes, and where a text is cut.
    """

    truncation: str = ""
    padding: str = ""
    limit: int | None = None
    stride: int = 0
    multiple: int | None = None
    side: str = "right"
    cut_side: str = "right"

    def width(self, lengths: Sequence[int]) -> int | None:
        """Returns the length to fill texts of these lengths up to; None: as they are."""
        if not self.padding:
            return None
        width = self.limit if self.padding == "max_length" and self.limit is not None else max(lengths, default=0)
        return width if not self.multiple else -(-width // self.multiple) * self.multiple


def lengths_of_call(
    *,
    padding: Any,
    truncation: Any,
    max_length: Any,
    least: int,
    longest: int,
    side: str,
    cut_side: str,
    stride: int = 0,
    multiple: int | None = None,
    truncation_strategy: Any = None,
    pad_to_max_length: bool | None = None,
) -> Lengths:
    """Returns what the keywords of a call mean.

    Args:
        least: the smallest `max_length`, as many as there are special tokens.
        longest: the tokenizer's `model_max_length`.
        truncation_strategy, pad_to_max_length: names of transformers before 3.0 for `truncation` and `padding`.
    """
    if truncation is None and max_length is not None and padding in (False, None):
        truncation = truncation_strategy or True
    elif truncation is None:
        truncation = truncation_strategy or False
    if padding in (False, None) and pad_to_max_length:
        padding = "longest" if max_length is None else "max_length"
    pad_mode, cut_mode = _mode("padding", padding, _PADDING), _mode("truncation", truncation, _TRUNCATION)
    check_side("padding_side", side)
    check_side("truncation_side", cut_side)
    for name, number in (("stride", stride), ("pad_to_multiple_of", multiple or 0)):
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 0:
            raise InputError(f"{name} must be a number of tokens, got {short(number)}")

    limit = None if longest >= NO_LIMIT else longest
    if max_length is not None:
        if isinstance(max_length, bool) or not isinstance(max_length, int | np.integer) or max_length < least:
            raise InputError(f"max_length must be an integer of at least {least} tokens, got {max_length!r}")
        limit = int(max_length)
    elif limit is None and (cut_mode or pad_mode == "max_length"):
        warnings.warn(
            "this tokenizer's model_max_length sets no limit: nothing is cut or padded to it; pass max_length",
            stacklevel=4,
        )
        cut_mode, pad_mode = "", "" if pad_mode == "max_length" else pad_mode
    if multiple and cut_mode and pad_mode and limit is not None and limit % multiple:
        raise InputError(
            f"texts cut to {limit} tokens cannot be padded to a multiple of {multiple}; pass a max_length that is one"
        )
    return Lengths(
        truncation=cut_mode,
        padding=pad_mode,
        limit=limit,
        stride=int(stride),
        multiple=multiple or None,
        side=side,
        cut_side=cut_side,
    )


def check_side(name: str, side: Any) -> None:
    if side not in ("right", "left"):
        raise InputError(f"{name} must be 'right' or 'left', got {short(side)}")


def _mode(name: str, value: Any, meanings: dict[Any, str]) -> str:
    plain = getattr(value, "value", value)  # a member of transformers' enumerations
    if isinstance(plain, bool | str | None) and plain in meanings:
        return meanings[plain]
    allowed = ", ".join(repr(choice) for choice in meanings if choice is not None)
    raise InputError(f"{name} must be one of {allowed}, got {value!r}")


def kept_lengths(lengths: Sequence[int], room: int, strategy: str) -> list[int]:
    """Returns how many tokens of a text, or of each of a pair, are kept so that they are `room` together."""
    if room == 0:
        return [0] * len(lengths)
    surplus = sum(lengths) - room
    if strategy == "longest_first":
        if len(lengths) == 1:
            return [room]
        # The shorter text stays whole if it takes no more than half of the room.
        shorter = min(lengths)
        if 2 * shorter > room:
            small, large = room // 2, room - room // 2
        else:
            small, large = shorter, room - shorter
        return [small, large] if lengths[0] <= lengths[1] else [large, small]
    position = 0 if strategy == "only_first" else 1
    if position >= len(lengths):
        raise InputError("truncation='only_second' needs a second text, text_pair; pass truncation=True for one text")
    if lengths[position] <= surplus:
        raise InputError(
            f"truncation={strategy!r} cannot remove {surplus} tokens from a text of {lengths[position]}; "
            "pass truncation=True to cut both, or a larger max_length"
        )
    kept = list(lengths)
    kept[position] -= surplus
    return kept


def encode_texts(
    backend: Tokenizer, items: Sequence[Any], add_special_tokens: bool, words: bool, lengths: Lengths
) -> list[Encoding]:
    """Returns the tokens of texts, cut as `lengths` says; what is cut off is in their `overflowing`.

    Args:
        items: texts (strings, or with `words` lists of strings), or pairs of texts as tuples.
    """
    try:
        encodings = backend.encode_batch(items, words, add_special_tokens)
    except (TypeError, UnicodeEncodeError) as error:
        raise InputError(f"a text cannot be encoded as UTF-8 ({error}): remove its lone surrogates") from error
    if lengths.truncation and lengths.limit is not None:
        for position, encoding in enumerate(encodings):
            if len(encoding) > lengths.limit:
                encodings[position] = _encode_cut(backend, items[position], add_special_tokens, words, lengths)
    return encodings


def _encode_cut(backend: Tokenizer, item: Any, add_special_tokens: bool, words: bool, lengths: Lengths) -> Encoding:
    """Returns the tokens of a text or a pair, cut so that they and the special tokens around them are the limit."""
    texts = item if isinstance(item, tuple) else (item,)
    parts = [backend.encode(text, is_pretokenized=words, add_special_tokens=False) for text in texts]
    special = backend.num_special_tokens_to_add(len(parts) == 2) if add_special_tokens else 0
    room = (lengths.limit or 0) - special
    for part, kept in zip(parts, kept_lengths([len(part) for part in parts], room, lengths.truncation), strict=True):
        if kept >= len(part):
            continue
        if 0 < kept <= lengths.stride:
            raise InputError(f"stride={lengths.stride} must be less than the {kept} tokens that are left of a text")
        part.truncate(kept, stride=lengths.stride, direction=lengths.cut_side)
    if len(parts) == 2 and not add_special_tokens:
        parts[1] = _of_no_sequence(parts[1])
    return backend.post_process(parts[0], parts[1] if len(parts) == 2 else None, add_special_tokens)


def _of_no_sequence(encoding: Encoding) -> Encoding:
    """Returns an encoding that does not call itself the first text: merged without special tokens, the pair would lose
    the first one's place."""
    bare = Encoding()
    state = json.loads(encoding.__getstate__()) | {"sequence_ranges": {}}
    bare.__setstate__(json.dumps(state).encode())
    return bare


def fields_of_encodings(
    encodings: list[Encoding],
    filling: Mapping[str, Any] | None,
    *,
    token_type_ids: bool,
    attention_mask: bool,
    special_tokens_mask: bool,
    offset_mapping: bool,
    overflow: bool,
    length: bool,
) -> tuple[dict[str, list[Any]], list[Encoding]]:
    """Returns named lists with a row for each text, and the rows' encodings.

    Args:
        filling: the keywords of `Encoding.pad`; None: nothing is filled up.
        overflow: parts that were cut off are rows too.
    """
    fields: dict[str, list[Any]]
    samples = list(range(len(encodings)))
    if token_type_ids or special_tokens_mask or offset_mapping or overflow:
        for encoding in encodings if filling else ():
            encoding.pad(**filling)  # type: ignore[arg-type]
        if overflow:
            parts = [[encoding, *encoding.overflowing] for encoding in encodings]
            samples = [sample for sample in samples for _ in parts[sample]]
            encodings = [encoding for each in parts for encoding in each]
        wanted = {
            "input_ids": ("ids", True),
            "token_type_ids": ("type_ids", token_type_ids),
            "attention_mask": ("attention_mask", attention_mask),
            "special_tokens_mask": ("special_tokens_mask", special_tokens_mask),
            "offset_mapping": ("offsets", offset_mapping),
        }
        fields = {
            name: [getattr(encoding, attribute) for encoding in encodings]
            for name, (attribute, asked) in wanted.items()
            if asked
        }
    else:
        # The usual case: to fill up the encodings and read them would take twice as long.
        rows: list[Any] = [encoding.ids for encoding in encodings]
        masks: list[Any] = [[1] * len(row) for row in rows] if attention_mask else []
        if filling:
            width, side = filling["length"], filling["direction"]
            masks = [pad_row(mask, width, 0, side) for mask in masks]
            rows = [pad_row(row, width, filling["pad_id"], side) for row in rows]
        fields = {"input_ids": rows} | ({"attention_mask": masks} if attention_mask else {})
    if length:
        fields["length"] = [len(row) for row in fields["input_ids"]]
    if overflow:
        fields["overflow_to_sample_mapping"] = samples
    return fields, encodings
