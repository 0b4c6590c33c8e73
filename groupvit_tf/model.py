"""GroupViT: two towers, two projections, one temperature (Xu et al., CVPR 2022), behind transformers' interface.

Shapes: B images, N texts, T tokens, H W pixels, G groups, E embedding width (legend in docs/architecture.md).
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from groupvit_common.errors import InputError
from groupvit_common.model.checks import check_batch_norm, check_grouping, check_pairs, check_sample_weight, given
from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from groupvit_tf.checkpoint import PreTrainedModel
from groupvit_tf.data import is_nested_numbers, known
from groupvit_tf.distributed import gather, num_replicas
from groupvit_tf.init import initialise
from groupvit_tf.label_maps import grouping_map, resize_bilinear, unit
from groupvit_tf.layers import Projection, Tensor, wide_dtype
from groupvit_tf.loss import symmetric_cross_entropy
from groupvit_tf.outputs import BaseModelOutputWithPooling, GroupViTModelOutput
from groupvit_tf.text import TextTower, check_ids
from groupvit_tf.vision import VisionTower, check_pixels

# Under which name weights travel to `compute_loss` in the place of targets.
SAMPLE_WEIGHT = "sample_weight"


class GroupViTPreTrainedModel(PreTrainedModel):
    """Base of the three models: initial values, and the forms in which inputs may come.

    A model is called with keywords; or with everything in the first positional argument: a dictionary, a list or tuple in the
    order of `call`'s arguments, or a single tensor. Tensors may be NumPy arrays.
    """

    config_class: ClassVar[type[Any]] = GroupViTConfig
    base_model_prefix: ClassVar[str] = "groupvit"

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._steps = _Steps()

    def init_weights(self) -> None:
        """Draws new initial values for every parameter (see `groupvit_tf.init`)."""
        initialise(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Outside `call`, around which Keras wraps errors into a page of text.
        inputs = self._named(args, kwargs)
        self._check(inputs)
        return super().__call__(**inputs)

    def stateless_call(
        self,
        trainable_variables: Any,
        non_trainable_variables: Any,
        *args: Any,
        return_losses: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As `keras.Model.stateless_call`, with inputs in any form. On JAX this, not `__call__`, is what `fit` runs."""
        inputs = self._named(args, kwargs)
        self._check(inputs)
        return super().stateless_call(
            trainable_variables, non_trainable_variables, return_losses=return_losses, **inputs
        )

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name, those that are None left out."""
        names = list(inspect.signature(self.call).parameters)
        if len(args) == 1 and isinstance(args[0], Mapping):
            named = dict(args[0])
        else:
            if len(args) == 1 and isinstance(args[0], list | tuple) and not is_nested_numbers(args[0]):
                args = args[0]
            elif len(args) == 1 and not kwargs.keys() & {self.main_input_name}:
                args = (*[None] * names.index(self._name_of(args[0])), args[0])
            if len(args) > len(names):
                raise InputError(f"{type(self).__name__} takes at most {len(names)} inputs, got {len(args)}")
            named = {name: value for name, value in zip(names, args, strict=False) if value is not None}
        twice = named.keys() & kwargs.keys()
        unknown = [name for name in (*named, *kwargs) if name not in names]
        if twice or unknown:
            name = unknown[0] if unknown else min(twice)
            raise InputError(
                f"{type(self).__name__} takes no input {name!r}; its inputs are {', '.join(names)}"
                if unknown
                else f"{type(self).__name__} got {name!r} twice, by position and by name"
            )
        every = {**named, **kwargs}
        return {
            name: np.asarray(value) if isinstance(value, list | tuple) and name != "gumbel_noise" else value
            for name, value in every.items()
            if value is not None
        }

    def _name_of(self, tensor: Any) -> str:
        """Which input a tensor is that came alone: pictures have four axes."""
        is_picture = (
            len(getattr(tensor, "shape", ())) == 4 and "pixel_values" in inspect.signature(self.call).parameters
        )
        return "pixel_values" if is_picture else self.main_input_name

    def _check(self, inputs: Mapping[str, Any]) -> None:
        """InputError for inputs that are missing or malformed."""
        names = inspect.signature(self.call).parameters
        if "input_ids" in names:
            config = self.config if isinstance(self.config, GroupViTTextConfig) else self.config.text_config
            given(inputs.get("input_ids"), "input_ids")
        if "pixel_values" in names:
            given(inputs.get("pixel_values"), "pixel_values")
        if "input_ids" in names:
            check_ids(inputs["input_ids"], inputs.get("attention_mask"), config)
        if "pixel_values" in names:
            config = self.config if isinstance(self.config, GroupViTVisionConfig) else self.config.vision_config
            check_pixels(inputs["pixel_values"], config)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.compute_output_spec`, with inputs in any form: the shapes of the outputs."""
        return super().compute_output_spec(**self._named(args, kwargs))

    # -- Keras's training interface: every argument of `keras.Model` does what Keras says, or is refused (tests/groupvit_tf/test_keras_api.py) --

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `keras.Model.compile`, without `loss`, `loss_weights`, `metrics` and `weighted_metrics`: outputs are records, and the
        contrastive loss is the model's own. A subclass whose `call` returns a tensor may be given them.

        Raises:
            InputError: one of these four.
        """
        given = _bound("compile", self, args, kwargs)
        if self._returns_records():
            for name in ("loss", "loss_weights", "metrics", "weighted_metrics"):
                if given.get(name) is not None:
                    raise InputError(
                        f"{type(self).__name__} cannot be compiled with {name}, since it returns a record and not a tensor"
                        f"{self._own_loss}; compile a model of one output, keras.Model(inputs, model(inputs).{self._an_output})"
                    )
        super().compile(**given)

    def compile_from_config(self, config: Mapping[str, Any]) -> None:
        """Compiles the model as `get_compile_config` says, which a `.keras` file holds."""
        # Keras leaves this to classes with a `compile` of their own.
        self.compile(**keras.saving.deserialize_keras_object(dict(config)))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.fit`, for image-text pairs without `y`.

        Args:
            x: inputs in any form of a call; or a `tf.data.Dataset`, a generator, a `keras.utils.PyDataset` or a PyTorch `DataLoader` of
                them; encodings of a processor count as dictionaries.
            sample_weight: `[pairs]`; the loss of each pair is multiplied by its weight before the mean is taken, as in every loss of
                Keras. Data sets yield `(x, {}, weights)`.

        Batches of a single pair, such as a last one, are left out, and a warning says so.

        Raises:
            InputError: what the model cannot take, among it `y`, `class_weight`, and data in which no batch has two pairs.
        """
        given = _bound("fit", self, args, kwargs)
        if given.pop("class_weight", None) is not None:
            raise InputError(
                f"class_weight has no meaning for {type(self).__name__}, which has no classes: give sample_weight"
            )
        x, given["y"] = self._data(given.get("x"), given.get("y"), given.pop("sample_weight", None))
        validation = given.get("validation_data")
        if validation is not None:
            parts = validation if isinstance(validation, list | tuple) else (validation,)
            given["validation_data"] = self._data(*parts)
        if isinstance(x, dict) and self._compares_pairs():
            check_batch_norm(min(_rows(x), given.get("batch_size") or _rows(x)))
        elif not isinstance(x, dict | keras.utils.PyDataset):
            # What cannot be shuffled is not asked to be: Keras warns otherwise.
            given.setdefault("shuffle", False)
        before = self._steps.numbers()
        history = super().fit(**{**given, "x": x})
        alone, together = (now - then for now, then in zip(self._steps.numbers(), before, strict=True))
        if alone and not together:
            check_batch_norm(1)
        if alone:
            warnings.warn(
                "batches of a single pair were left out of training, since there is nothing to tell it apart from: choose a batch "
                "size that leaves more for the last batch, or batch with drop_remainder=True",
                stacklevel=2,
            )
        return history

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.evaluate`; `x` and `sample_weight` as in `fit`. A batch of one pair counts, with a loss of zero."""
        cached = kwargs.pop("_use_cached_eval_dataset", False)  # `fit` asks for validation, whose data it has prepared
        given = _bound("evaluate", self, args, kwargs)
        if cached:
            return super().evaluate(**given, _use_cached_eval_dataset=True)
        x, given["y"] = self._data(given.get("x"), given.get("y"), given.pop("sample_weight", None))
        return super().evaluate(**{**given, "x": x})

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.predict`; `x` as in `fit`."""
        given = _bound("predict", self, args, kwargs)
        return super().predict(**{**given, "x": self._data(given["x"])[0]})

    def train_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: Any = None,
        return_dict: bool = False,
    ) -> Any:
        """As `keras.Model.train_on_batch`; `x` and `sample_weight` as in `fit`, and at least two pairs."""
        if class_weight is not None:
            raise InputError(
                f"class_weight has no meaning for {type(self).__name__}, which has no classes: give sample_weight"
            )
        x, y = self._data(x, y, sample_weight)
        if isinstance(x, dict) and self._compares_pairs():
            check_batch_norm(_rows(x))
        return super().train_on_batch(x, y, return_dict=return_dict)

    def test_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, return_dict: bool = False) -> Any:
        """As `keras.Model.test_on_batch`; `x` and `sample_weight` as in `fit`."""
        x, y = self._data(x, y, sample_weight)
        return super().test_on_batch(x, y, return_dict=return_dict)

    def predict_on_batch(self, x: Any) -> Any:
        """As `keras.Model.predict_on_batch`; `x` as in `fit`."""
        return super().predict_on_batch(self._data(x)[0])

    _own_loss: ClassVar[str] = ""
    """What is to be said of the loss of a class, if it has one."""
    _an_output: ClassVar[str] = "pooler_output"
    """The name of a tensor in the records that it returns."""

    def _returns_records(self) -> bool:
        """Whether outputs are the records of this module: a subclass may return anything."""
        return type(self).call.__module__ == __name__

    def _compares_pairs(self) -> bool:
        """Whether the contrastive loss is what is trained."""
        return False

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """As `keras.Model.compute_loss`; a tower has no loss of its own. Keras calls this."""
        if self._returns_records() and self.loss is None:
            name = type(self).__name__
            raise InputError(
                f"{name} has no loss to train with: train a GroupViTModel, or compile a model of one output with a loss, "
                f"keras.Model(inputs, model(inputs).{self._an_output})"
            )
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def _data(self, x: Any, y: Any = None, sample_weight: Any = None) -> tuple[Any, Any]:
        """What `fit` and its like were given, in a form that Keras takes, checked where the values are known.

        Weights travel as `y`, since Keras drops them where there is none.
        """
        x = known(x)
        if isinstance(x, Mapping | list | tuple) or hasattr(x, "dtype"):
            x = self._named((x,), {})
            self._check(x)
        if not self._returns_records():
            return x, y if sample_weight is None or y is not None else {SAMPLE_WEIGHT: sample_weight}
        _no_targets(y, type(self).__name__)
        if sample_weight is None:
            return x, y if isinstance(y, Mapping) and y else None
        weights = np.asarray(sample_weight)
        if isinstance(x, dict):
            check_sample_weight(weights.shape, _rows(x))
        elif weights.ndim:
            raise InputError("sample_weight goes with arrays: a data set yields it itself, as (x, {}, sample_weight)")
        return x, {SAMPLE_WEIGHT: weights}

    def _flag(self, name: str, value: bool | None) -> bool:
        """A flag of `call`: as given, else the configuration's."""
        return bool(getattr(self.config, name) if value is None else value)


class GroupViTTextModel(GroupViTPreTrainedModel):
    """The text tower by itself."""

    config_class: ClassVar[type[Any]] = GroupViTTextConfig
    main_input_name: ClassVar[str] = "input_ids"
    config: GroupViTTextConfig

    def __init__(self, config: GroupViTTextConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.text_model = TextTower(config, name="text_model", dtype=self.dtype_policy)
        self.build()
        self.init_weights()

    def build(self, input_shape: Any = None) -> None:
        self.text_model.build((None, None))

    def get_input_embeddings(self) -> keras.layers.Embedding:
        return self.text_model.embeddings.token_embedding

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
        """See `TextTower.call`; a tuple of the present fields with `return_dict=False`."""
        output = self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            output_attentions=self._flag("output_attentions", output_attentions),
            output_hidden_states=self._flag("output_hidden_states", output_hidden_states),
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
        self.init_weights()

    def build(self, input_shape: Any = None) -> None:
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
        """See `VisionTower.call`; a tuple of the present fields with `return_dict=False`."""
        output = self.vision_model(
            pixel_values,
            output_attentions=self._flag("output_attentions", output_attentions),
            output_hidden_states=self._flag("output_hidden_states", output_hidden_states),
            training=training,
        )
        return output if self._flag("return_dict", return_dict) else output.to_tuple()


class GroupViTModel(GroupViTPreTrainedModel):
    """Images and texts -> their similarities, and per pixel if asked for.

    `compile(optimizer)` without a loss, then `fit` on batches of dictionaries without `y`: image i belongs to text i, and the
    contrastive loss is taken over the whole batch, under a distribution strategy over the batches of all replicas.
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
        self.init_weights()

    def build(self, input_shape: Any = None) -> None:
        if self.built:
            return
        for layer in (self.text_model, self.vision_model, self.visual_projection, self.text_projection):
            layer.build((None,))  # no layer looks at it, but `summary` at whether there is one
        self.logit_scale = self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(self.config.logit_scale_init_value),
            name="logit_scale",
        )

    def get_input_embeddings(self) -> keras.layers.Embedding:
        return self.text_model.embeddings.token_embedding

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
        """Projected texts `[N, E]`, not normalised.

        That is what transformers 4 returns. With `return_dict=True`: what transformers 5 returns, the tower's record with
        the projected texts as `pooler_output`; the other two flags then add to it.
        """
        check_ids(given(input_ids, "input_ids"), attention_mask, self.config.text_config)
        record = self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            output_attentions=self._flag("output_attentions", output_attentions),
            output_hidden_states=self._flag("output_hidden_states", output_hidden_states),
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
        """Projected images `[B, E]`, not normalised; a record with `return_dict=True` (see `get_text_features`)."""
        check_pixels(given(pixel_values, "pixel_values"), self.config.vision_config)
        record = self.vision_model(
            pixel_values,
            output_attentions=self._flag("output_attentions", output_attentions),
            output_hidden_states=self._flag("output_hidden_states", output_hidden_states),
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
            output_segmentation: also `segmentation_logits` `[B, N, H, W]`, which bring the soft assignments along.
            return_dict: False: a tuple of the present fields.

        Raises:
            InputError: a missing or malformed input, or unequal numbers of images and texts with `return_loss`.
        """
        segment = self._flag("output_segmentation", output_segmentation)
        if segment:
            check_grouping(self.config.vision_config)
        attentions = self._flag("output_attentions", output_attentions) or segment
        hidden_states = self._flag("output_hidden_states", output_hidden_states)
        vision = self.vision_model(
            pixel_values,
            output_attentions=attentions,
            output_hidden_states=hidden_states,
            gumbel_noise=gumbel_noise,
            assign_hard=assign_hard,
            assign_temperature=assign_temperature,
            training=training,
        )
        text = self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            output_attentions=attentions,
            output_hidden_states=hidden_states,
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
            text_model_output=text,
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

    # -- training with `fit` ----------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """The contrastive loss of the batch, or that of `compile(loss=...)` where a subclass was given one. Keras calls this.

        Args:
            sample_weight: `[B]`, see `groupvit_tf.loss.symmetric_cross_entropy`.
        """
        if not self._compares_pairs():
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        _no_targets(y, type(self).__name__)
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
        """A step of `fit`, which a batch of a single pair leaves out: it has no gradient, and no batch statistics. Keras calls this."""
        inputs, _, _ = keras.utils.unpack_x_y_sample_weight(arguments[-1])
        # Under a strategy all replicas take the step, with a gradient of zero: none may leave the others waiting.
        if not self._compares_pairs() or num_replicas() > 1:
            return super().train_step(*arguments)
        pixels = self._named((inputs,), {}).get("pixel_values")
        rows = None if pixels is None else pixels.shape[0]
        if pixels is None or (rows is not None and rows != 1):
            return super().train_step(*arguments)
        if rows == 1:
            return self._leave_out(*arguments)
        import tensorflow as tf  # nowhere else are sizes unknown

        whole = super().train_step
        return tf.cond(tf.shape(pixels)[0] == 1, lambda: self._leave_out(*arguments), lambda: whole(*arguments))

    def _leave_out(self, *arguments: Any) -> Any:
        """What a step returns that changed nothing."""
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

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Adds the share of images whose own text is the most similar of the batch, and the reverse. Keras calls this."""
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
        """`[B, B]` cosine similarities, float32 at least, of images and texts of the batches of all replicas."""
        if not isinstance(output, GroupViTModelOutput):
            raise InputError("fit and evaluate need records: leave return_dict of the configuration at True")
        images, texts = gather(output.image_embeds), gather(output.text_embeds)
        check_pairs(images.shape[0], texts.shape[0])
        wide = wide_dtype(images.dtype)
        return ops.matmul(ops.cast(images, wide), ops.transpose(ops.cast(texts, wide)))


class _Steps:
    """How many steps of `fit` had a single pair and were left out, and how many were taken.

    Its variables are no weights, so no layer may see them. JAX, which has none in a step, counts what it compiles.
    """

    def __init__(self) -> None:
        self.on_tensorflow = keras.backend.backend() == "tensorflow"
        self.alone, self.together = (self._number() for _ in range(2))

    def _number(self) -> Any:
        if not self.on_tensorflow:
            return 0
        return keras.Variable(0, dtype="int32", trainable=False, aggregation="only_first_replica", name="steps")

    def count(self, pairs: Any) -> None:
        """Takes note of a step with so many pairs, over all replicas."""
        if self.on_tensorflow:
            alone = ops.cast(ops.equal(pairs, 1), "int32")
            self.alone.assign_add(alone)
            self.together.assign_add(1 - alone)
        elif pairs == 1:
            self.alone += 1
        else:
            self.together += 1

    def numbers(self) -> tuple[int, int]:
        """Of single pairs, of others."""
        return np.asarray(self.alone).item(), np.asarray(self.together).item()


def _bound(method: str, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call to a method of `keras.Model`, by name. TypeError for those that it has not."""
    bound = inspect.signature(getattr(keras.Model, method)).bind(model, *args, **kwargs)
    return {name: value for name, value in bound.arguments.items() if name not in ("self", "kwargs")}


def _rows(inputs: Mapping[str, Any]) -> int:
    """How many images or texts there are."""
    value = inputs["pixel_values"] if "pixel_values" in inputs else inputs["input_ids"]
    return int(value.shape[0])


def _no_targets(y: Any, model: str) -> None:
    """InputError for targets, which the models have no use for; an empty dictionary is none."""
    if y is None or (isinstance(y, Mapping) and y.keys() <= {SAMPLE_WEIGHT}):
        return
    raise InputError(
        f"{model} takes no y in fit and evaluate: image i belongs to text i; leave it out, or yield an empty dictionary instead"
    )
