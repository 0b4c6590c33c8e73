"""Chat, which transformers' tokenizers and processors have and GroupViT has not."""

from typing import Any, NoReturn

from groupvit_common.errors import InputError

_REFUSAL = "a chat_template is not supported: GroupViT has no chat; write the text itself"


class NoChat:
    """`chat_template`, which is None, and refusals of what needs one."""

    @property
    def chat_template(self) -> None:
        """Returns None. Setting anything else raises `InputError`."""
        return None

    @chat_template.setter
    def chat_template(self, value: Any) -> None:
        if value is not None:
            raise InputError(_REFUSAL)

    def apply_chat_template(self, conversation: Any, *arguments: Any, **keywords: Any) -> NoReturn:
        """Raises `InputError`."""
        raise InputError(_REFUSAL)

    def get_chat_template(self, *arguments: Any, **keywords: Any) -> NoReturn:
        """Raises `InputError`."""
        raise InputError(_REFUSAL)
