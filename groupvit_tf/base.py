"""The base of the three Keras models: the forms in which inputs may come, and Keras's training interface.

Every argument of `keras.Model.compile`, `fit` and their like does as Keras documents, or is refused in a sentence
(tests/groupvit_tf/test_keras_api.py).
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from groupvit_common.errors import InputError
from groupvit_common.model.checks import check_batch_norm, check_sample_weight, given
from groupvit_common.model.config import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from groupvit_tf.checkpoint import PreTrainedModel
from groupvit_tf.data import is_nested_numbers, known
from groupvit_tf.init import initialise
from groupvit_tf.layers import Tensor
from groupvit_tf.text import check_ids
from groupvit_tf.vision import check_pixels

# Under which name weights travel to `compute_loss` in the place of targets.
SAMPLE_WEIGHT = "sample_weight"
# Keyword of calls within a functional model.
_WITHOUT_TRAINING = "without_training"


class GroupViTPreTrainedModel(PreTrainedModel):
    """Base of the three models: initial values, and the forms in which inputs may come.

    A model is called with keywords; or with everything in the first positional argument: a dictionary, a list or tuple
    in the order of `call`'s arguments, or a single tensor. Tensors may be NumPy arrays.
    """

    config_class: ClassVar[type[Any]] = GroupViTConfig
    base_model_prefix: ClassVar[str] = "groupvit"

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._steps = _Steps()

    def init_weights(self) -> None:
        """Draws new initial values for every parameter (see `groupvit_tf.init`)."""
        initialise(self, self.config.initializer_factor)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Outside `call`, around which Keras wraps errors into a page of text.
        without_training = kwargs.pop(_WITHOUT_TRAINING, False)
        inputs = self._named(args, kwargs)
        if without_training:
            inputs["training"] = False
        self._check(inputs)
        output = super().__call__(**inputs)
        if inputs.get("training") is False:
            self._remember_without_training(inputs)
        return output

    def _remember_without_training(self, inputs: Mapping[str, Any]) -> None:
        """Keeps `training=False` of a call that becomes part of a functional model.

        Keras 3 calls the layers of such a model with the model's own `training`, whatever they were called with.
        """
        if any(isinstance(value, keras.KerasTensor) for value in keras.tree.flatten(dict(inputs))):
            self._inbound_nodes[-1].arguments.kwargs[_WITHOUT_TRAINING] = True

    def stateless_call(
        self,
        trainable_variables: Any,
        non_trainable_variables: Any,
        *args: Any,
        return_losses: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Does as `keras.Model.stateless_call`, with inputs in any form. On JAX `fit` runs this, not `__call__`."""
        inputs = self._named(args, kwargs)
        self._check(inputs)
        return super().stateless_call(
            trainable_variables, non_trainable_variables, return_losses=return_losses, **inputs
        )

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns all arguments by name, without those that are None."""
        names = list(inspect.signature(self.call).parameters)
        if len(args) == 1 and isinstance(args[0], Mapping):
            named = dict(args[0])
        else:
            if len(args) == 1 and isinstance(args[0], list | tuple) and not is_nested_numbers(args[0]):
                args = args[0]
            elif len(args) == 1 and self._name_of(args[0]) not in kwargs:
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
        """Returns the name of the input that a single tensor is: images have four axes."""
        is_image = len(getattr(tensor, "shape", ())) == 4 and "pixel_values" in inspect.signature(self.call).parameters
        return "pixel_values" if is_image else self.main_input_name

    def _check(self, inputs: Mapping[str, Any]) -> None:
        """Raises `InputError` for inputs that are missing or malformed."""
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
        """Does as `keras.Model.compute_output_spec`, with inputs in any form: the shapes of the outputs."""
        return super().compute_output_spec(**self._named(args, kwargs))

    # -- Keras's training interface --

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Does as `keras.Model.compile`, without `loss`, `loss_weights`, `metrics` and `weighted_metrics`: outputs are
        records, and the contrastive loss is the model's own. A subclass whose `call` returns a tensor may be given
        them.

        Raises:
            InputError: one of these four.
        """
        given = _bound("compile", self, args, kwargs)
        if self._returns_records():
            for name in ("loss", "loss_weights", "metrics", "weighted_metrics"):
                if given.get(name) is not None:
                    raise InputError(
                        f"{type(self).__name__} cannot be compiled with {name}, since it returns a record and not a "
                        "tensor"
                        f"{self._own_loss}; compile a model of one output, keras.Model(inputs, "
                        f"model(inputs).{self._an_output})"
                    )
        super().compile(**given)

    def compile_from_config(self, config: Mapping[str, Any]) -> None:
        """Compiles the model as the `get_compile_config` in a `.keras` file requests."""
        # Keras leaves this to classes with a `compile` of their own.
        self.compile(**keras.saving.deserialize_keras_object(dict(config)))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Does as `keras.Model.fit`, for image-text pairs without `y`.

        Args:
            x: inputs in any form of a call; or a `tf.data.Dataset`, a generator, a `keras.utils.PyDataset` or a PyTorch
                `DataLoader` of them; encodings of a processor count as dictionaries.
            sample_weight: `[pairs]`; the loss of each pair is multiplied by its weight before the mean is taken, as in
                every loss of Keras. Data sets yield `(x, {}, weights)`.

        Batches of a single pair, such as a last one, are skipped with a warning.

        Raises:
            InputError: what the model cannot take, among it `y`, `class_weight`, and data in which no batch has two
                pairs.
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
            validation_x, validation_y = self._data(*parts)
            given["validation_data"] = self._without_padding(validation_x), validation_y
        if isinstance(x, dict) and self._compares_pairs():
            check_batch_norm(min(_rows(x), given.get("batch_size") or _rows(x)))
        elif not isinstance(x, dict | keras.utils.PyDataset):
            # Keras warns of a request to shuffle such data.
            given.setdefault("shuffle", False)
        before = self._steps.numbers()
        history = super().fit(**{**given, "x": self._without_padding(x)})
        alone, together = (now - then for now, then in zip(self._steps.numbers(), before, strict=True))
        if alone and not together:
            check_batch_norm(1)
        if alone:
            warnings.warn(
                "batches of a single pair were skipped in training, because the loss needs other pairs to compare "
                "with: choose a batch "
                "size that leaves more for the last batch, or batch with drop_remainder=True",
                stacklevel=2,
            )
        return history

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Does as `keras.Model.evaluate`; data as in `fit`. A batch of one pair counts, with a loss of zero."""
        cached = kwargs.pop("_use_cached_eval_dataset", False)  # `fit` asks for validation, whose data it has prepared
        given = _bound("evaluate", self, args, kwargs)
        if cached:
            return super().evaluate(**given, _use_cached_eval_dataset=True)
        x, given["y"] = self._data(given.get("x"), given.get("y"), given.pop("sample_weight", None))
        return super().evaluate(**{**given, "x": self._without_padding(x)})

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Does as `keras.Model.predict`; `x` as in `fit`."""
        given = _bound("predict", self, args, kwargs)
        return super().predict(**{**given, "x": self._data(given["x"])[0]})

    def train_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, class_weight: Any = None, return_dict: bool = False
    ) -> Any:
        """Does as `keras.Model.train_on_batch`; `x` and `sample_weight` as in `fit`, and at least two pairs."""
        if class_weight is not None:
            raise InputError(
                f"class_weight has no meaning for {type(self).__name__}, which has no classes: give sample_weight"
            )
        x, y = self._data(x, y, sample_weight)
        if isinstance(x, dict) and self._compares_pairs():
            check_batch_norm(_rows(x))
        return super().train_on_batch(x, y, return_dict=return_dict)

    def test_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, return_dict: bool = False) -> Any:
        """Does as `keras.Model.test_on_batch`; `x` and `sample_weight` as in `fit`."""
        x, y = self._data(x, y, sample_weight)
        return super().test_on_batch(x, y, return_dict=return_dict)

    def predict_on_batch(self, x: Any) -> Any:
        """Does as `keras.Model.predict_on_batch`; `x` as in `fit`."""
        return super().predict_on_batch(self._data(x)[0])

    _own_loss: ClassVar[str] = ""
    """The remark on a class's own loss in an error."""
    _an_output: ClassVar[str] = "pooler_output"
    """The name of a tensor in the records that it returns."""

    def _returns_records(self) -> bool:
        """Returns whether outputs are the records of `groupvit_tf.model`: a subclass may return anything."""
        return type(self).call.__module__ == "groupvit_tf.model"

    def _compares_pairs(self) -> bool:
        """Returns whether the model is trained with its contrastive loss."""
        return False

    def _without_padding(self, x: Any) -> Any:
        """Returns the data of `fit` and `evaluate` without what changes neither loss nor metrics."""
        return x

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Tensor:
        """Does as `keras.Model.compute_loss`; a tower has no loss of its own. Keras calls this."""
        if self._returns_records() and self.loss is None:
            name = type(self).__name__
            raise InputError(
                f"{name} has no loss to train with: train a GroupViTModel, or compile a model of one output with a "
                "loss, "
                f"keras.Model(inputs, model(inputs).{self._an_output})"
            )
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def _data(self, x: Any, y: Any = None, sample_weight: Any = None) -> tuple[Any, Any]:
        """Returns the data of `fit` and its like in a form that Keras takes, checked where the values are known.

        Weights travel as `y`, since Keras drops them where there is none.
        """
        x = known(x)
        if isinstance(x, Mapping | list | tuple) or hasattr(x, "dtype"):
            x = self._named((x,), {})
            self._check(x)
        if not self._returns_records():
            return x, y if sample_weight is None or y is not None else {SAMPLE_WEIGHT: sample_weight}
        self._refuse_targets(y)
        if sample_weight is None:
            return x, y if isinstance(y, Mapping) and y else None
        weights = np.asarray(sample_weight)
        if isinstance(x, dict):
            check_sample_weight(weights.shape, _rows(x))
        elif weights.ndim:
            raise InputError("sample_weight goes with arrays: a data set yields it itself, as (x, {}, sample_weight)")
        return x, {SAMPLE_WEIGHT: weights}

    def _refuse_targets(self, y: Any) -> None:
        """Raises `InputError` for targets, which the models have no use for; an empty dictionary is none."""
        if y is None or (isinstance(y, Mapping) and y.keys() <= {SAMPLE_WEIGHT}):
            return
        raise InputError(
            f"{type(self).__name__} takes no y in fit and evaluate: image i belongs to text i; leave it out, or yield "
            "an empty dictionary instead"
        )

    def _flag(self, name: str, value: bool | None) -> bool:
        """Returns a flag of `call`: as given, else the configuration's."""
        if value is None:
            value = getattr(self.config, "use_return_dict" if name == "return_dict" else name)
        return bool(value)


class _Steps:
    """Numbers of the skipped steps of `fit`, which had a single pair, and of the others.

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
        """Returns the numbers of skipped and of other steps."""
        return np.asarray(self.alone).item(), np.asarray(self.together).item()


def _bound(method: str, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call to a method of `keras.Model`, by name. Raises `TypeError` for unknown ones."""
    bound = inspect.signature(getattr(keras.Model, method)).bind(model, *args, **kwargs)
    return {name: value for name, value in bound.arguments.items() if name not in ("self", "kwargs")}


def _rows(inputs: Mapping[str, Any]) -> int:
    """Returns the number of images or texts."""
    value = inputs["pixel_values"] if "pixel_values" in inputs else inputs["input_ids"]
    return int(value.shape[0])
