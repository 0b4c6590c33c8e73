"""Special and added tokens of transformers' tokenizers: attributes, ids, and additions to the vocabulary."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tokenizers import AddedToken, Tokenizer

from groupvit_common.errors import InputError, short

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ADDITIONAL = "additional_special_tokens"


class _Special:
    """A special token: a string or None, or the list of additional ones; set as a string or an AddedToken."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: Any, owner: type | None = None) -> Any:
        if tokenizer is None:
            return self
        value = tokenizer._special_tokens_map.get(self.name)
        if self.name == ADDITIONAL:
            return [str(token) for token in value or ()]
        return None if value is None else str(value)

    def __set__(self, tokenizer: Any, value: Any) -> None:
        many = self.name == ADDITIONAL
        values = [] if value is None else list(value) if many and isinstance(value, list | tuple) else [value]
        for token in values:
            if not isinstance(token, str | AddedToken) or not str(token):
                raise InputError(f"{self.name} must be a non-empty string or an AddedToken, got {short(token)}")
        tokenizer._special_tokens_map[self.name] = values if many else value


class _SpecialId:
    """The id of a special token; None if the tokenizer has none. A token that the vocabulary lacks has the id of the
    unknown token."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.token = name.removesuffix("_ids").removesuffix("_id")

    def __get__(self, tokenizer: Any, owner: type | None = None) -> Any:
        if tokenizer is None:
            return self
        token = getattr(tokenizer, self.token)
        return None if token is None else tokenizer.convert_tokens_to_ids(token)

    def __set__(self, tokenizer: Any, value: Any) -> None:
        setattr(tokenizer, self.token, None if value is None else tokenizer.convert_ids_to_tokens(value))


class SpecialTokens:
    """Special tokens as attributes (strings or None) with their ids, and tokens that are added to a vocabulary."""

    SPECIAL_TOKENS_ATTRIBUTES: ClassVar[list[str]] = [*SPECIAL_TOKENS, ADDITIONAL]

    bos_token, bos_token_id = _Special(), _SpecialId()
    eos_token, eos_token_id = _Special(), _SpecialId()
    unk_token, unk_token_id = _Special(), _SpecialId()
    sep_token, sep_token_id = _Special(), _SpecialId()
    pad_token, pad_token_id = _Special(), _SpecialId()
    cls_token, cls_token_id = _Special(), _SpecialId()
    mask_token, mask_token_id = _Special(), _SpecialId()
    additional_special_tokens, additional_special_tokens_ids = _Special(), _SpecialId()

    # Of the class that derives from this one.
    _backend: Tokenizer
    _special_tokens_map: dict[str, Any]
    convert_tokens_to_ids: Any
    convert_ids_to_tokens: Any

    @property
    def extra_special_tokens(self) -> list[str]:
        """`additional_special_tokens` as transformers 5 calls them."""
        return list(self.additional_special_tokens)

    @extra_special_tokens.setter
    def extra_special_tokens(self, tokens: Sequence[str | AddedToken]) -> None:
        self.additional_special_tokens = tokens

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        return {name: value for name in self.SPECIAL_TOKENS_ATTRIBUTES if (value := getattr(self, name))}

    @property
    def special_tokens_map_extended(self) -> dict[str, Any]:
        """`special_tokens_map` with an AddedToken, which has a token's flags, where there is one."""
        return {name: value for name in self.SPECIAL_TOKENS_ATTRIBUTES if (value := self._special_tokens_map.get(name))}

    @property
    def all_special_tokens_extended(self) -> list[Any]:
        unique: dict[str, Any] = {}
        for value in self.special_tokens_map_extended.values():
            for token in value if isinstance(value, list) else [value]:
                unique.setdefault(str(token), token)
        return list(unique.values())

    @property
    def all_special_tokens(self) -> list[str]:
        """The distinct special tokens."""
        return [str(token) for token in self.all_special_tokens_extended]

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids, in the same order."""
        ids: list[int] = self.convert_tokens_to_ids(self.all_special_tokens)
        return ids

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens (strings or AddedTokens) that are found in a text before it is cut into words; returns how many
        are new.

        They get the next ids: a model needs `resize_token_embeddings(len(tokenizer))`.
        """
        tokens = list(new_tokens) if isinstance(new_tokens, list | tuple) else [new_tokens] if new_tokens else []
        for token in tokens:
            if not isinstance(token, str | AddedToken):
                raise InputError(f"a token to add must be a string or an AddedToken, got {type(token).__name__}")
        add = self._backend.add_special_tokens if special_tokens else self._backend.add_tokens
        self.__dict__.pop("_other_backend", None)
        return int(add(tokens))

    def add_special_tokens(
        self,
        special_tokens_dict: Mapping[str, Any],
        replace_additional_special_tokens: bool = True,
        replace_extra_special_tokens: bool | None = None,
    ) -> int:
        """Sets special tokens by the names of their attributes and adds them to the vocabulary; returns how many are
        new.

        `replace_extra_special_tokens` is the name in transformers 5 of `replace_additional_special_tokens`: whether
        additional ones take the place of those before or join them.
        """
        replace = (
            replace_additional_special_tokens if replace_extra_special_tokens is None else replace_extra_special_tokens
        )
        to_add: list[AddedToken] = []
        for given_name, value in (special_tokens_dict or {}).items():
            name = ADDITIONAL if given_name == "extra_special_tokens" else given_name
            if name not in self.SPECIAL_TOKENS_ATTRIBUTES:
                raise InputError(
                    f"{name!r} is no special token; these are: {', '.join(self.SPECIAL_TOKENS_ATTRIBUTES)}"
                )
            if name == ADDITIONAL and not isinstance(value, list | tuple):
                raise InputError(f"{name} must be a list of tokens, got {short(value)}")
            tokens = [_special(name, token) for token in (value if name == ADDITIONAL else [value])]
            if name != ADDITIONAL:
                setattr(self, name, tokens[0])
            elif replace and tokens:
                setattr(self, name, tokens)
            else:
                tokens = [token for token in tokens if token.content not in self.additional_special_tokens]
                setattr(self, name, [*self._special_tokens_map.get(name, ()), *tokens])
            to_add += [token for token in tokens if token not in to_add]
        return self.add_tokens(to_add, special_tokens=True)

    def sanitize_special_tokens(self) -> int:
        return self.add_tokens(self.all_special_tokens_extended, special_tokens=True)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Id -> token of those that stand beside the byte-pair vocabulary."""
        return dict(sorted(self._backend.get_added_tokens_decoder().items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return {token.content: index for index, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        return self.added_tokens_encoder

    def _take_flags(self) -> None:
        """Gives special tokens the flags that they have in the vocabulary."""
        flags = self.added_tokens_encoder
        tokens = self.added_tokens_decoder
        for name, value in self._special_tokens_map.items():
            if isinstance(value, str) and value in flags:
                self._special_tokens_map[name] = tokens[flags[value]]
            elif isinstance(value, list):
                self._special_tokens_map[name] = [tokens[flags[token]] if token in flags else token for token in value]


def renamed_token(token: AddedToken, content: str, special: bool | None = None) -> AddedToken:
    """Returns an added token with the flags of another."""
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special if special is None else special,
    )


def _special(name: str, token: Any) -> AddedToken:
    """Returns a special token to add; a string is found as it is written, in upper or lower case."""
    if isinstance(token, AddedToken):
        return token
    if not isinstance(token, str) or not token:
        raise InputError(f"{name} must be a non-empty string or an AddedToken, got {short(token)}")
    return AddedToken(token, special=True, normalized=False)
