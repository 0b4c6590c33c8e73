"""The text tower: token ids -> a causal Transformer -> the state at the end-of-text token.

Shapes: N texts, T tokens, D width (legend in docs/architecture.md).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import is_tracing
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from groupvit_common.model.checks import check_id_range, check_input_ids, given
from groupvit_common.model.config import LEGACY_EOS_TOKEN_ID, GroupViTTextConfig
from groupvit_common.model.text_length import needed_length, sees_whole_texts
from groupvit_torch.attention import causal_bias
from groupvit_torch.compat.model import flags
from groupvit_torch.layers import EncoderLayer
from groupvit_torch.outputs import BaseModelOutput, BaseModelOutputWithPooling


class TextEmbeddings(nn.Module):
    def __init__(self, config: GroupViTTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    @property
    def position_ids(self) -> Tensor:
        """Returns all positions `[1, most tokens]`."""
        weight = self.position_embedding.weight
        return torch.arange(len(weight), device=weight.device)[None]

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        tokens = self.token_embedding(given(input_ids, "input_ids")) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            positions = self.position_embedding.weight[: tokens.shape[1]]
        else:
            positions = self.position_embedding(position_ids)
        return tokens + positions


class TextEncoder(nn.Module):
    def __init__(self, config: GroupViTTextConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    @flags
    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        *,
        is_causal: bool = False,
    ) -> BaseModelOutput[Tensor]:
        """Applies the layers to embeddings `[N, T, D]`; masks and `is_causal` as in `Attention`. Returns the
        fields of `TextTower`'s record."""
        x = inputs_embeds
        hidden_states = [x] if output_hidden_states else []
        attentions: list[Tensor] = []
        settings: dict[str, Any] = {"output_attentions": output_attentions, "is_causal": is_causal}
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                outputs = checkpoint(layer, x, attention_mask, causal_attention_mask, use_reentrant=False, **settings)
            else:
                outputs = layer(x, attention_mask, causal_attention_mask, **settings)
            x = outputs[0]
            hidden_states += [x] if output_hidden_states else ()
            attentions += outputs[1:] if output_attentions else ()
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class TextTower(nn.Module):
    """Token ids -> pooled text."""

    def __init__(self, config: GroupViTTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = TextEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @flags
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPooling[Tensor]:
        """Args:
            input_ids: `[N, T]` integers; attention_mask: `[N, T]`, 1 for tokens, 0 for padding; position_ids: `[N, T]`.

        Returns:
            `last_hidden_state` `[N, T, D]`, `pooler_output` `[N, D]`; `attentions`: per layer `[N, heads, T, T]`;
            `hidden_states`: the embeddings, then every layer's output.
        """
        check_ids(input_ids, attention_mask, self.config)
        x = self.embeddings(input_ids, position_ids)
        encoded = self.encoder(
            x,
            _attention_bias(x, attention_mask),
            is_causal=attention_mask is None,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        x = self.final_layer_norm(encoded.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=x[torch.arange(x.shape[0], device=x.device), self.end_of_text(input_ids)],
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    @property
    def eos_token_id(self) -> int:
        return self.config.eos_token_id

    def end_of_text(self, input_ids: Tensor) -> Tensor:
        """Returns position `[N]` of each text's first end-of-text token (0 where there is none)."""
        eos = self.config.eos_token_id
        score = input_ids if eos == LEGACY_EOS_TOKEN_ID else input_ids == eos
        return score.int().argmax(dim=-1)


def check_ids(input_ids: Tensor, attention_mask: Tensor | None, config: GroupViTTextConfig) -> None:
    """Raises `InputError` for ids that the tower cannot read. Their range is checked on the CPU only."""
    if is_tracing():
        return
    is_integer = not (input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool)
    mask_shape = None if attention_mask is None else attention_mask.shape
    check_input_ids(input_ids.shape, str(input_ids.dtype), is_integer, mask_shape, config)
    if input_ids.device.type == "cpu" and input_ids.numel() and not torch.compiler.is_compiling():
        check_id_range(int(input_ids.min()), int(input_ids.max()), config)


def without_padding(
    config: GroupViTTextConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    only_pooled: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the inputs of a tower without the columns at their end that change no pooled state, views of them; and
    without a mask that masks nothing, since causal attention alone is faster.

    On a GPU that costs a wait for the ids. Where lengths must not depend on values (graphs, programs, shapes without
    values), the inputs as they are.

    Args:
        only_pooled: no other state is used: what a mask hides after the end of its text then counts as nothing, too.
    """
    check_ids(input_ids, attention_mask, config)
    whole = input_ids.shape[1]
    # Positions may come in a shape that the tower refuses.
    if not _has_values(input_ids) or (position_ids is not None and position_ids.shape[-1] != whole):
        return input_ids, attention_mask, position_ids
    ids, attended = input_ids.cpu().numpy(), None
    if attention_mask is not None:
        if not _has_values(attention_mask):
            return input_ids, attention_mask, position_ids
        attended = (attention_mask != 0).cpu().numpy()
    length = needed_length(ids, attended, config.eos_token_id)
    if attended is not None and (
        attended[:, :length].all() or (only_pooled and sees_whole_texts(ids, attended, config.eos_token_id))
    ):
        attention_mask = None
    return (
        input_ids[:, :length],
        None if attention_mask is None else attention_mask[:, :length],
        None if position_ids is None else position_ids[..., :length],
    )


def with_padding(output: BaseModelOutputWithPooling[Tensor], cut: int) -> BaseModelOutputWithPooling[Tensor]:
    """Returns a tower's record with zeros at the columns that `without_padding` left out, `cut` in number."""
    if not cut:
        return output
    states, attentions = F.pad(output.last_hidden_state, (0, 0, 0, cut)), output.attentions
    if attentions is not None:
        attentions = tuple(F.pad(weights, (0, cut, 0, cut)) for weights in attentions)
    return BaseModelOutputWithPooling({**output, "last_hidden_state": states, "attentions": attentions})


def _has_values(x: Tensor) -> bool:
    """Returns whether numbers may be read from a tensor now."""
    if torch.compiler.is_compiling() or is_tracing() or type(x) is not Tensor or x.is_meta or not x.numel():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _attention_bias(x: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Returns the logits' bias `[N, 1, T, T]`: the dtype's lowest number where attention is masked. None without a
    mask: kernels know what causal is."""
    if attention_mask is None:
        return None
    hidden = (attention_mask == 0)[:, None, None, :]
    # The two lowest numbers may add up to -inf; no row is -inf throughout, because a token's bias to itself is finite.
    bias = causal_bias(x, x)[None, None]
    return bias + torch.zeros_like(bias).masked_fill(hidden, torch.finfo(x.dtype).min)
