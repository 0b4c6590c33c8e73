"""Habits of programs written for transformers with a PyTorch model (see `groupvit_common.compat.model`)."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from groupvit_common.compat.model import resized
from groupvit_common.errors import InputError
from groupvit_common.model.checks import given


def flags(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a part's `forward` be called as transformers': flags that are None are the configuration's, and
    `return_dict=False` gives a tuple of the present fields."""
    signature = inspect.signature(forward)
    parameters = [*signature.parameters.values()]
    by_position = [p.name for p in parameters[1:] if p.kind is p.POSITIONAL_OR_KEYWORD] + ["return_dict"]
    main = by_position[0]

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(by_position):
            raise TypeError(f"{type(self).__name__} takes at most {len(by_position)} arguments, got {len(args)}")
        for name, value in zip(by_position, args, strict=False):
            if name in kwargs:
                raise TypeError(f"{type(self).__name__} got {name} twice, by position and by name")
            kwargs[name] = value
        given(kwargs.get(main), main)
        for flag in ("output_attentions", "output_hidden_states"):
            if kwargs.get(flag) is None:
                kwargs[flag] = getattr(self.config, flag)
        return_dict = kwargs.pop("return_dict", None)
        output = forward(self, **kwargs)
        return output if (self.config.use_return_dict if return_dict is None else return_dict) else output.to_tuple()

    keywords = [p for p in parameters if p.kind is not p.POSITIONAL_OR_KEYWORD]
    added = inspect.Parameter("return_dict", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*(p for p in parameters if p not in keywords), added, *keywords]
    )
    return call


class TransformersMethods(nn.Module):
    """Methods of transformers' base class that touch tensors."""

    framework: ClassVar[str] = "pt"
    main_input_name: ClassVar[str]

    config: Any

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Three short texts, as transformers has them."""
        return {"input_ids": torch.tensor([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]])}

    # -- sizes --

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Returns the number of elements of the parameters, without those of token and position tables on request."""
        left_out = {
            f"{name}.weight"
            for name, module in self.named_modules()
            if exclude_embeddings and isinstance(module, nn.Embedding)
        }
        return sum(
            parameter.numel()
            for name, parameter in self.named_parameters()
            if name not in left_out and (parameter.requires_grad or not only_trainable)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Returns the bytes of the parameters, and of the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nelement() * tensor.element_size() for tensor in tensors)

    def estimate_tokens(self, input_dict: Mapping[str, Any]) -> int:
        """Returns the number of elements of the main input, 0 where it is missing."""
        return input_dict[self.main_input_name].numel() if self.main_input_name in input_dict else 0

    def floating_point_ops(self, input_dict: Mapping[str, Any], exclude_embeddings: bool = True) -> int:
        """Returns transformers' estimate of the operations of a training step: six per token and parameter. A poor one
        for images, which it does not count."""
        return 6 * self.estimate_tokens(input_dict) * self.num_parameters(exclude_embeddings=exclude_embeddings)

    # -- initial values --

    def post_init(self) -> None:
        """Draws initial values and obeys `config.gradient_checkpointing`; constructors end with it."""
        self.init_weights()
        if getattr(self.config, "gradient_checkpointing", False):
            self.gradient_checkpointing_enable()
            del self.config.gradient_checkpointing

    def init_weights(self) -> None:
        """Draws new initial values for every parameter (see `groupvit_torch.init`)."""
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        raise NotImplementedError

    def gradient_checkpointing_enable(self) -> None:
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError

    # -- token embeddings --

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Gives the text tower as many tokens, and its configuration; returns the embeddings.

        Args:
            new_num_tokens: None: as many as there are.
            pad_to_multiple_of: rounds the number up to a multiple of this.
            mean_resizing: whether new tokens start as the mean of the old ones, instead of at random with the standard
                deviation `initializer_range`.

        Raises:
            InputError: the model has no token embeddings, or the number is none.
        """
        old = self.get_input_embeddings()
        if not isinstance(old, nn.Embedding):
            raise InputError(f"{type(self).__name__} has no token embeddings to resize")
        if new_num_tokens is None and pad_to_multiple_of is None:
            return old
        config = self.config.get_text_config()
        number = resized(old.num_embeddings, new_num_tokens, pad_to_multiple_of)
        config.vocab_size = number
        if number == old.num_embeddings:
            return old
        weight = old.weight.detach()
        rows = weight.new_empty(max(number - len(weight), 0), weight.shape[1])
        if mean_resizing:
            rows[:] = weight.float().mean(dim=0)
        else:
            rows.normal_(std=config.initializer_range)
        new = nn.Embedding(number, weight.shape[1], _weight=torch.cat([weight[:number], rows]))
        new.weight.requires_grad_(old.weight.requires_grad)
        self.set_input_embeddings(new.train(old.training))
        return new

    def set_input_embeddings(self, value: Any) -> None:
        raise InputError(f"{type(self).__name__} has no token embeddings to set")

    # -- gradients of inputs, for adapters on frozen models --

    def enable_input_require_grads(self) -> None:
        """Makes gradients flow into what the input embeddings return."""

        def require(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.requires_grad_(True)

        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(require)

    def disable_input_require_grads(self) -> None:
        """Undoes `enable_input_require_grads`."""
        self._require_grads_hook.remove()

    # -- masks --

    def invert_attention_mask(self, encoder_attention_mask: Tensor) -> Tensor:
        """Returns a mask `[N, T]` or `[N, S, T]` of ones and zeros as a bias: 0 and the dtype's lowest number."""
        mask = encoder_attention_mask
        mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None, :, :]
        dtype = next(self.parameters()).dtype
        return (1.0 - mask.to(dtype)) * torch.finfo(dtype).min

    def get_extended_attention_mask(
        self, attention_mask: Tensor, input_shape: Any = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Does as `invert_attention_mask`, in a dtype of one's own."""
        if attention_mask.dim() not in (2, 3):
            raise InputError(f"attention_mask must have 2 or 3 axes, got shape {list(attention_mask.shape)}")
        bias = self.invert_attention_mask(attention_mask)
        if dtype is None or dtype == bias.dtype:
            return bias
        return torch.zeros_like(bias, dtype=dtype).masked_fill(bias != 0, torch.finfo(dtype).min)

    def get_head_mask(
        self, head_mask: Tensor | None, num_hidden_layers: int, is_attention_chunked: bool = False
    ) -> Any:
        """Returns `[None]` for every layer: heads are not masked."""
        if head_mask is not None:
            raise InputError("heads are not masked: head_mask must be None")
        return [None] * num_hidden_layers
