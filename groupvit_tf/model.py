"""GroupViT: two towers, two projections, one temperature (Xu et al., CVPR 2022), behind transformers' interface.

Shapes: B images, N texts, T tokens, H W pixels, G groups, E embedding width (legend in docs/architecture.md).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from groupvit_common.errors import InputError
from groupvit_common.model.checks import check_grouping, check_pairs, check_sample_weight, given
from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from groupvit_common.model.text_length import TOKEN_STEP
from groupvit_tf.base import SAMPLE_WEIGHT, GroupViTPreTrainedModel
from groupvit_tf.compat.model import replace_layer
from groupvit_tf.distributed import gather, num_replicas
from groupvit_tf.label_maps import grouping_map, resize_bilinear, unit
from groupvit_tf.layers import Projection, Tensor, wide_dtype
from groupvit_tf.loss import symmetric_cross_entropy
from groupvit_tf.outputs import BaseModelOutputWithPooling, GroupViTModelOutput
from groupvit_tf.programs import call_tower
from groupvit_tf.text import TextTower, check_ids, with_padding, without_padding
from groupvit_tf.variables import quick_variables
from groupvit_tf.vision import VisionTower, check_pixels


class GroupViTTextModel(GroupViTPreTrainedModel):
    """The text tower by itself."""

    config_class: ClassVar[type[Any]] = GroupViTTextConfig
    config: GroupViTTextConfig

    def __init__(self, config: GroupViTTextConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.text_model = TextTower(config, name="text_model", dtype=self.dtype_policy)
        self.build()
        self.post_init()

    def build(self, input_shape: Any = None) -> None:
        if not self.built:
            with quick_variables():
                self.text_model.build((None, None))

    def get_input_embeddings(self) -> keras.layers.Embedding:
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: Any) -> None:
        replace_layer(self.text_model.embeddings, "token_embedding", value)

    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool | None = None,
    ) -> BaseModelOutputWithPooling[Tensor] | tuple[Any, ...]:
        """Calls the tower: see `TextTower.call`; a tuple of the present fields with `return_dict=False`."""
        output = call_tower(
            self.text_model,
            input_ids,
            attention_mask,
            position_ids,
            output_attentions=self._flag("output_attentions", output_attentions),
            output_hidden_states=self._flag("output_hidden_states", output_hidden_states),
            return_dict=True,
            training=training,
        )
        return output if self._flag("return_dict", return_dict) else output.to_tuple()


class GroupViTVisionModel(GroupViTPreTrainedModel):
    """The vision tower by itself."""

    config_class: ClassVar[type[Any]] = GroupViTVisionConfig
    main_input_name: ClassVar[str] = "pixel_values"
    config: GroupViTVisionConfig

    def __init__(self, config: GroupViTVisionConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.vision_model = VisionTower(config, name="vision_model", dtype=self.dtype_policy)
        self.build()
        self.post_init()

    def build(self, input_shape: Any = None) -> None:
        if not self.built:
            with quick_variables():
                self.vision_model.build((None, None, None, None))

    def get_input_embeddings(self) -> keras.layers.Layer:
        return self.vision_model.embeddings.patch_embeddings

    def call(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool | None = None,
    ) -> BaseModelOutputWithPooling[Tensor] | tuple[Any, ...]:
        """Calls the tower: see `VisionTower.call`; a tuple of the present fields with `return_dict=False`."""
        output = call_tower(
            self.vision_model,
            pixel_values,
            output_attentions=self._flag("output_attentions", output_attentions),
            output_hidden_states=self._flag("output_hidden_states", output_hidden_states),
            return_dict=True,
            training=training,
        )
        return output if self._flag("return_dict", return_dict) else output.to_tuple()


class GroupViTModel(GroupViTPreTrainedModel):
    """Images and texts -> their similarities, and per pixel on request.

    `compile(optimizer)` without a loss, then `fit` on batches of dictionaries without `y`: image i belongs to text i,
    and the contrastive loss is taken over the whole batch, under a distribution strategy over the batches of all
    replicas.
    """

    config: GroupViTConfig
    _own_loss: ClassVar[str] = ", and trains with a contrastive loss of its own"
    _an_output: ClassVar[str] = "logits_per_image"

    def __init__(self, config: GroupViTConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        policy = self.dtype_policy
        text, vision, hidden = config.text_config, config.vision_config, config.projection_intermediate_dim
        self.text_model = TextTower(text, name="text_model", dtype=policy)
        self.vision_model = VisionTower(vision, name="vision_model", dtype=policy)
        self.visual_projection = Projection(
            vision.hidden_size, hidden, config.projection_dim, name="visual_projection", dtype=policy
        )
        self.text_projection = Projection(
            text.hidden_size, hidden, config.projection_dim, name="text_projection", dtype=policy
        )
        self.image_to_text = keras.metrics.Mean(name="image_to_text_top1")
        self.text_to_image = keras.metrics.Mean(name="text_to_image_top1")
        self.build()
        self.post_init()

    def build(self, input_shape: Any = None) -> None:
        if self.built:
            return
        with quick_variables():
            for layer in (self.text_model, self.vision_model, self.visual_projection, self.text_projection):
                layer.build((None,))  # no layer uses it, but `summary` needs one
        self.logit_scale = self.add_weight(
            shape=(), initializer=keras.initializers.Constant(self.config.logit_scale_init_value), name="logit_scale"
        )

    def get_input_embeddings(self) -> keras.layers.Embedding:
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: Any) -> None:
        replace_layer(self.text_model.embeddings, "token_embedding", value)

    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> Tensor | BaseModelOutputWithPooling[Tensor]:
        """Returns projected texts `[N, E]`, not normalised.

        That is what transformers 4 returns. With `return_dict=True`: what transformers 5 returns, the tower's record
        with the projected texts as `pooler_output`; the other two flags then add to it.
        """
        check_ids(given(input_ids, "input_ids"), attention_mask, self.config.text_config)
        if not return_dict:
            text_config = self.config.text_config
            input_ids, attention_mask, position_ids = without_padding(
                text_config, input_ids, attention_mask, position_ids
            )
        record = call_tower(
            self.text_model,
            input_ids,
            attention_mask,
            position_ids,
            output_attentions=self._flag("output_attentions", output_attentions),
            output_hidden_states=self._flag("output_hidden_states", output_hidden_states),
            return_dict=True,
            training=training,
        )
        record.pooler_output = self.text_projection(record.pooler_output, training=training)
        return record if return_dict else record.pooler_output

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> Tensor | BaseModelOutputWithPooling[Tensor]:
        """Returns projected images `[B, E]`, not normalised; see `get_text_features` for `return_dict`."""
        check_pixels(given(pixel_values, "pixel_values"), self.config.vision_config)
        record = call_tower(
            self.vision_model,
            pixel_values,
            output_attentions=self._flag("output_attentions", output_attentions),
            output_hidden_states=self._flag("output_hidden_states", output_hidden_states),
            return_dict=True,
            training=training,
        )
        record.pooler_output = self.visual_projection(record.pooler_output, training=training)
        return record if return_dict else record.pooler_output

    def call(
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
        training: bool | None = None,
        gumbel_noise: Sequence[Tensor] | None = None,
        assign_hard: bool = True,
        assign_temperature: float = 1.0,
    ) -> GroupViTModelOutput[Tensor] | tuple[Any, ...]:
        """Compares images and texts.

        Args:
            input_ids, attention_mask, position_ids: `[N, T]`, see `TextTower.call`.
            pixel_values, gumbel_noise, assign_hard, assign_temperature: see `VisionTower.call`.
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
        texts = (input_ids, attention_mask, position_ids)
        if not (attentions or hidden_states):
            texts = without_padding(self.config.text_config, *texts)
        vision = call_tower(
            self.vision_model,
            pixel_values,
            output_attentions=attentions or segment,
            output_hidden_states=hidden_states,
            return_dict=True,
            gumbel_noise=gumbel_noise,
            assign_hard=assign_hard,
            assign_temperature=assign_temperature,
            training=training,
        )
        text = call_tower(
            self.text_model,
            *texts,
            output_attentions=attentions or segment,
            output_hidden_states=hidden_states,
            return_dict=True,
            training=training,
        )
        image_embeds = unit(self.visual_projection(vision.pooler_output, training=training))
        text_embeds = unit(self.text_projection(text.pooler_output, training=training))
        logit_scale = ops.cast(ops.exp(self.logit_scale), text_embeds.dtype)
        logits_per_text = ops.matmul(logit_scale * text_embeds, ops.transpose(image_embeds))
        logits_per_image = ops.transpose(logits_per_text)
        output: GroupViTModelOutput[Tensor] = GroupViTModelOutput(
            loss=symmetric_cross_entropy(logits_per_image) if return_loss else None,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_text,
            segmentation_logits=(
                self._segmentation_logits(vision, text_embeds, pixel_values, training) if segment else None
            ),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=with_padding(text, texts[0], input_ids),
            vision_model_output=vision,
        )
        return output if self._flag("return_dict", return_dict) else output.to_tuple()

    def _check(self, inputs: Mapping[str, Any]) -> None:
        super()._check(inputs)
        if inputs.get("return_loss"):
            check_pairs(inputs["pixel_values"].shape[0], inputs["input_ids"].shape[0])

    def _segmentation_logits(
        self,
        vision: BaseModelOutputWithPooling[Tensor],
        text_embeds: Tensor,
        pixel_values: Tensor,
        training: bool | None,
    ) -> Tensor:
        """`[B, N, H, W]`: group-to-text similarities spread over the pixels by the soft grouping.

        The temperature enters twice, as in transformers (docs/differences.md); `Segmenter` does not use these values.
        """
        height, width = pixel_values.shape[-2:]
        patch = self.config.vision_config.patch_size
        states = vision.last_hidden_state
        num_groups = states.shape[1]
        flat = self.visual_projection(ops.reshape(states, (-1, states.shape[2])), training=training)
        groups = unit(ops.reshape(flat, (-1, num_groups, flat.shape[1])))
        scale = ops.cast(ops.exp(self.logit_scale), groups.dtype)
        group_logits = ops.matmul(groups, ops.transpose(text_embeds)) * scale  # [B, G, N]
        # No gradient flows through the map, as in transformers.
        grouping = ops.stop_gradient(grouping_map(vision.attentions or (), (height // patch, width // patch)))
        # Interpolation is linear, so the texts are combined at patch resolution: G x N fewer full-size maps.
        logits = ops.einsum("bgn,bghw->bnhw", group_logits, grouping) * scale
        return resize_bilinear(logits, (height, width))

    # -- training with `fit` --

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Tensor:
        """Returns the contrastive loss of the batch, or that of `compile(loss=...)` where a subclass was given one.
        Keras calls this.

        Args:
            sample_weight: `[B]`, see `groupvit_tf.loss.symmetric_cross_entropy`.
        """
        if not self._compares_pairs():
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        self._refuse_targets(y)
        if sample_weight is None and y:
            sample_weight = y[SAMPLE_WEIGHT]
        similarities = self._global_similarities(y_pred)
        weights = None
        if sample_weight is not None:
            check_sample_weight(tuple(sample_weight.shape), y_pred.image_embeds.shape[0])
            weights = gather(ops.reshape(ops.cast(sample_weight, similarities.dtype), (-1,)))
        if training:
            self._steps.count(ops.shape(similarities)[0])
        scale = ops.exp(ops.cast(self.logit_scale, similarities.dtype))
        # Each replica computes the whole batch's loss; the strategy adds the replicas' gradients up.
        return symmetric_cross_entropy(similarities * scale, weights) / num_replicas()

    def train_step(self, *arguments: Any) -> Any:
        """Takes a step of `fit`, but skips a batch of a single pair, which has no statistics. Keras calls this."""
        inputs, _, _ = keras.utils.unpack_x_y_sample_weight(arguments[-1])
        # Under a strategy all replicas take the step, with a gradient of zero: none may leave the others waiting.
        if not self._compares_pairs() or num_replicas() > 1:
            return super().train_step(*arguments)
        pixels = self._named((inputs,), {}).get("pixel_values")
        rows = None if pixels is None else pixels.shape[0]
        if pixels is None or (rows is not None and rows != 1):
            return super().train_step(*arguments)
        if rows == 1:
            return self._skip_step(*arguments)
        import tensorflow as tf  # nowhere else are sizes unknown

        whole = super().train_step
        return tf.cond(tf.shape(pixels)[0] == 1, lambda: self._skip_step(*arguments), lambda: whole(*arguments))

    def _skip_step(self, *arguments: Any) -> Any:
        """Returns the result of a skipped step."""
        self._steps.count(1)
        if keras.backend.backend() == "tensorflow":
            return self.get_metrics_result()
        state = arguments[0]
        variables = (
            *self.trainable_variables,
            *self.non_trainable_variables,
            *self.optimizer.variables,
            *self.metrics_variables,
        )
        values = [value for part in state for value in part]
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return self.get_metrics_result(), state

    def _compares_pairs(self) -> bool:
        return self.loss is None and self._returns_records()

    def _without_padding(self, x: Any) -> Any:
        # A subclass may use the padding, or states of it.
        if not isinstance(x, dict) or type(self) is not GroupViTModel or not self._compares_pairs():
            return x
        names = ("input_ids", "attention_mask", "position_ids")
        ids, mask, positions = (x.get(name) for name in names)
        shorter = without_padding(self.config.text_config, ids, mask, positions, step=TOKEN_STEP)
        return x | {name: tensor for name, tensor in zip(names, shorter, strict=True) if tensor is not None}

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Adds the fraction of images whose own text is the most similar, and the reverse. Keras calls this."""
        if self._compares_pairs():
            # Without the temperature, which changes no order: while JAX computes metrics, variables have no values.
            similarities = self._global_similarities(y_pred)
            own = ops.arange(ops.shape(similarities)[0])
            for metric, axis in ((self.image_to_text, 1), (self.text_to_image, 0)):
                hits = ops.equal(ops.cast(ops.argmax(similarities, axis=axis), own.dtype), own)
                metric.update_state(ops.cast(hits, "float32"))
        metrics: dict[str, Any] = super().compute_metrics(x, y, y_pred, sample_weight)
        return metrics

    def _global_similarities(self, output: Any) -> Tensor:
        """Returns `[B, B]` cosine similarities, float32 at least, of the images and texts of all replicas."""
        if not isinstance(output, GroupViTModelOutput):
            raise InputError("fit and evaluate need records: leave return_dict of the configuration at True")
        images, texts = gather(output.image_embeds), gather(output.text_embeds)
        check_pairs(images.shape[0], texts.shape[0])
        wide = wide_dtype(images.dtype)
        return ops.matmul(ops.cast(images, wide), ops.transpose(ops.cast(texts, wide)))
