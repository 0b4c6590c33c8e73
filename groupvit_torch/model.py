"""GroupViT: two towers, two projections, one temperature (Xu et al., CVPR 2022), behind transformers' interface.

Shapes: B images, N texts, T tokens, H W pixels, G groups, E embedding width (legend in docs/architecture.md).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groupvit_common.model.checks import check_grouping, check_pairs, given
from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from groupvit_torch.base import GroupViTPreTrainedModel
from groupvit_torch.label_maps import grouping_map
from groupvit_torch.layers import Projection
from groupvit_torch.loss import symmetric_cross_entropy
from groupvit_torch.outputs import BaseModelOutputWithPooling, GroupViTModelOutput
from groupvit_torch.text import TextTower, with_padding, without_padding
from groupvit_torch.vision import VisionTower


class GroupViTTextModel(GroupViTPreTrainedModel):
    """The text tower by itself."""

    config_class: ClassVar[type[Any]] = GroupViTTextConfig
    config: GroupViTTextConfig

    def __init__(self, config: GroupViTTextConfig) -> None:
        super().__init__(config)
        self.text_model = TextTower(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.text_model.embeddings.token_embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling[Tensor] | tuple[Any, ...]:
        """Calls the tower: see `TextTower.forward`; a tuple of the present fields with `return_dict=False`."""
        output = self.text_model(
            given(input_ids, "input_ids"),
            attention_mask,
            position_ids,
            output_attentions=self._flag("output_attentions", output_attentions),
            output_hidden_states=self._flag("output_hidden_states", output_hidden_states),
            return_dict=True,
        )
        return output if self._flag("return_dict", return_dict) else output.to_tuple()


class GroupViTVisionModel(GroupViTPreTrainedModel):
    """The vision tower by itself."""

    config_class: ClassVar[type[Any]] = GroupViTVisionConfig
    main_input_name: ClassVar[str] = "pixel_values"
    config: GroupViTVisionConfig

    def __init__(self, config: GroupViTVisionConfig) -> None:
        super().__init__(config)
        self.vision_model = VisionTower(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.embeddings.patch_embeddings

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling[Tensor] | tuple[Any, ...]:
        """Calls the tower: see `VisionTower.forward`; a tuple of the present fields with `return_dict=False`."""
        output = self.vision_model(
            given(pixel_values, "pixel_values"),
            output_attentions=self._flag("output_attentions", output_attentions),
            output_hidden_states=self._flag("output_hidden_states", output_hidden_states),
            return_dict=True,
        )
        return output if self._flag("return_dict", return_dict) else output.to_tuple()


class GroupViTModel(GroupViTPreTrainedModel):
    """Images and texts -> their similarities, and per pixel on request."""

    config: GroupViTConfig

    def __init__(self, config: GroupViTConfig) -> None:
        super().__init__(config)
        text, vision, hidden = config.text_config, config.vision_config, config.projection_intermediate_dim
        self.text_model = TextTower(text)
        self.vision_model = VisionTower(vision)
        self.visual_projection = Projection(vision.hidden_size, hidden, config.projection_dim)
        self.text_projection = Projection(text.hidden_size, hidden, config.projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.text_model.embeddings.token_embedding = value

    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Tensor | BaseModelOutputWithPooling[Tensor]:
        """Returns projected texts `[N, E]`, not normalised.

        That is what transformers 4 returns. With `return_dict=True`: what transformers 5 returns, the tower's record
        with the projected texts as `pooler_output`; the other two flags then add to it.
        """
        input_ids = given(input_ids, "input_ids")
        if not return_dict:
            text_config = self.config.text_config
            input_ids, attention_mask, position_ids = without_padding(
                text_config, input_ids, attention_mask, position_ids, only_pooled=True
            )
        record = self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            output_attentions=self._flag("output_attentions", output_attentions),
            output_hidden_states=self._flag("output_hidden_states", output_hidden_states),
            return_dict=True,
        )
        record.pooler_output = self.text_projection(record.pooler_output)
        return record if return_dict else record.pooler_output

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Tensor | BaseModelOutputWithPooling[Tensor]:
        """Returns projected images `[B, E]`, not normalised; see `get_text_features` for `return_dict`."""
        record = self.vision_model(
            given(pixel_values, "pixel_values"),
            output_attentions=self._flag("output_attentions", output_attentions),
            output_hidden_states=self._flag("output_hidden_states", output_hidden_states),
            return_dict=True,
        )
        record.pooler_output = self.visual_projection(record.pooler_output)
        return record if return_dict else record.pooler_output

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_segmentation: bool | None = None,
        return_dict: bool | None = None,
        *,
        gumbel_noise: Sequence[Tensor] | None = None,
        assign_hard: bool = True,
        assign_temperature: float = 1.0,
    ) -> GroupViTModelOutput[Tensor] | tuple[Any, ...]:
        """Compares images and texts.

        Args:
            input_ids, attention_mask, position_ids: `[N, T]`, see `TextTower.forward`.
            pixel_values, gumbel_noise, assign_hard, assign_temperature: see `VisionTower.forward`.
            return_loss: also the symmetric contrastive loss; image i then belongs to text i, so B must equal N.
            output_segmentation: also `segmentation_logits` `[B, N, H, W]`, which implies `output_attentions`.
            return_dict: False: a tuple of the present fields.

        Unless attentions or hidden states are requested, padding at the end of all texts is not computed: there, the
        text tower's states (and attentions, of `output_segmentation`) are zeros.

        Raises:
            InputError: a missing or malformed input, or unequal numbers of images and texts with `return_loss`.
        """
        segment = self._flag("output_segmentation", output_segmentation)
        if segment:
            check_grouping(self.config.vision_config)
        attentions = self._flag("output_attentions", output_attentions)
        hidden_states = self._flag("output_hidden_states", output_hidden_states)
        input_ids, pixel_values = given(input_ids, "input_ids"), given(pixel_values, "pixel_values")
        if return_loss:
            check_pairs(len(pixel_values), len(input_ids))
        texts = (input_ids, attention_mask, position_ids)
        if not (attentions or hidden_states):
            # Before a GPU is busy with the images: the ids are waited for.
            texts = without_padding(self.config.text_config, *texts)
        vision = self.vision_model(
            pixel_values,
            output_attentions=attentions or segment,
            output_hidden_states=hidden_states,
            return_dict=True,
            gumbel_noise=gumbel_noise,
            assign_hard=assign_hard,
            assign_temperature=assign_temperature,
        )
        text = self.text_model(*texts, attentions or segment, hidden_states, return_dict=True)
        image_embeds = F.normalize(self.visual_projection(vision.pooler_output), dim=-1)
        text_embeds = F.normalize(self.text_projection(text.pooler_output), dim=-1)
        logit_scale = self.logit_scale.exp()
        logits_per_text = logit_scale * text_embeds @ image_embeds.T
        output: GroupViTModelOutput[Tensor] = GroupViTModelOutput(
            loss=symmetric_cross_entropy(logits_per_text.T) if return_loss else None,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            segmentation_logits=self._segmentation_logits(vision, text_embeds, pixel_values) if segment else None,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=with_padding(text, input_ids.shape[1] - texts[0].shape[1]),
            vision_model_output=vision,
        )
        return output if self._flag("return_dict", return_dict) else output.to_tuple()

    def _segmentation_logits(
        self, vision: BaseModelOutputWithPooling[Tensor], text_embeds: Tensor, pixel_values: Tensor
    ) -> Tensor:
        """`[B, N, H, W]`: group-to-text similarities spread over the pixels by the soft grouping.

        The temperature enters twice, as in transformers (docs/differences.md); `Segmenter` does not use these values.
        """
        height, width = pixel_values.shape[-2:]
        patch = self.config.vision_config.patch_size
        states = vision.last_hidden_state
        groups = self.visual_projection(states.flatten(0, 1)).unflatten(0, (-1, states.shape[1]))
        scale = self.logit_scale.exp()
        group_logits = F.normalize(groups, dim=-1) @ text_embeds.T * scale  # [B, G, N]
        # No gradient flows through the map, as in transformers.
        with torch.no_grad():
            grouping = grouping_map(vision.attentions or (), (height // patch, width // patch))  # [B, G, h, w]
        # Interpolation is linear, so the texts are combined at patch resolution: G x N fewer full-size maps.
        logits = torch.einsum("bgn,bghw->bnhw", group_logits, grouping) * scale
        return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
