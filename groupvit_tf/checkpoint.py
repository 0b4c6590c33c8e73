"""Loading and saving Keras models: the base class of the three models.

A checkpoint's names and shapes are compared with the model's before any tensor is read, so a model is loaded whole or
not at all. Files are those of `groupvit_torch`: PyTorch's names and layout in safetensors. Keras's own files
(`model.save`, `save_weights`) work too.
"""

import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np

from groupvit_common.checkpoints.directory import Weights, compare_tensors
from groupvit_common.checkpoints.dtypes import cast, float_dtype
from groupvit_common.checkpoints.safetensors_file import array_info, read_arrays
from groupvit_common.compat.model import loading_info
from groupvit_common.errors import InputError
from groupvit_common.model.layout import canonical_axes, canonical_name, from_canonical, to_canonical
from groupvit_common.model.pretrained import Pretrained, check_weights, checked_array, most_stored_dtype
from groupvit_tf.compat.model import TransformersMethods
from groupvit_tf.distributed import Model, refuse_strategy
from groupvit_tf.init import without_initial_values
from groupvit_tf.layers import Tracked

__all__ = ["PreTrainedModel", "canonical_variables", "from_canonical", "is_parameter", "kind", "to_canonical"]

# State of a batch norm that PyTorch keeps as buffers: saved with the parameters, but none of them.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

_ONLY = {
    "device": ((None,), "Keras places the variables: load the model under `with keras.device(...)`"),
    "device_map": ((None, "auto"), "Keras places the variables: load the model under `with keras.device(...)`"),
}


def canonical_variables(model: keras.layers.Layer) -> dict[str, keras.Variable]:
    """Returns the variables of a built model or layer by canonical name, relative to it; no seeds, no metrics."""
    root = f"{model.path or model.name}/"
    return {canonical_name(variable.path.removeprefix(root)): variable for variable in model.weights}


def is_parameter(name: str) -> bool:
    """Returns whether a tensor is trainable; the others are the statistics of batch norms."""
    return not name.endswith(_BUFFERS)


def kind(variable: keras.Variable) -> str:
    """Returns the kind of a variable (`groupvit_common.model.parameters`) as far as the layout depends on it."""
    return "dense" if variable.name == "kernel" else "other"


# What `keras.Model` takes beside `dtype` and `name`. Two more, "inputs" and "outputs", would make Keras give the class
# another base, for the whole process.
_KERAS_OPTIONS = ("trainable", "autocast", "activity_regularizer")


class PreTrainedModel(Pretrained, TransformersMethods, Tracked, Model):
    """A model that is made from a configuration, and comes from and goes to a checkpoint directory or the hub.

    Subclasses take `config` as their constructor's first argument, hand `dtype`, `name` and other keywords of
    `keras.Model` through, and name their layers as the files do. They are known to `keras.models.load_model`.
    """

    def __init__(self, config: Any, *, dtype: Any = None, name: str | None = None, **keras_options: Any) -> None:
        """Args: config: of the class `config_class`; dtype: a dtype or Keras policy, the global policy if None."""
        self._check_config(config)
        unknown = [option for option in keras_options if option not in _KERAS_OPTIONS]
        if unknown:
            raise InputError(
                f"{type(self).__name__} takes no argument {unknown[0]!r}; use from_pretrained for settings"
            )
        refuse_strategy()
        super().__init__(dtype=dtype, name=name or _own_name(type(self)), **keras_options)
        if not _computes(self.variable_dtype) or not _computes(self.compute_dtype):
            raise InputError(
                "float64 on JAX needs its 64-bit mode: set JAX_ENABLE_X64=1 in the environment, or call "
                "jax.config.update('jax_enable_x64', True), before the model is made"
            )
        self.config = config

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        keras.saving.register_keras_serializable(package="groupvit")(cls)

    # -- loading --

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        config: Any = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        output_loading_info: bool = False,
        **overrides: Any,
    ) -> Any:
        """Returns the model of a checkpoint.

        Args:
            pretrained_model_name_or_path: a directory, or "org/name" on the hub. A tower's model also loads from a full
                model's checkpoint.
            config: a configuration, or the directory or name of one, instead of the checkpoint's.
            dtype: of the floating-point variables, a dtype or its name, or a Keras policy such as "mixed_bfloat16";
                Keras's global policy if None, which is float32 unless set; "auto": the dtype in which the file holds
                the most elements. Integer variables keep theirs. `torch_dtype` is its older name.
            output_loading_info: also return which tensors of the file were not used, as transformers does.
            model_args: further arguments of the class's constructor.
            overrides: revision, token, cache_dir, subfolder, local_files_only and force_download, as in
                `groupvit_common.checkpoints.hub.HubLocation`; or settings of the configuration to replace. Keywords of
                transformers that change nothing here (`from_pt`, `trust_remote_code`, ...) are accepted; unsupported
                requests are refused.

        Raises:
            CheckpointError: the checkpoint cannot be found, reached or read, or its tensors are not the model's.
            InputError: an argument that cannot be used.
        """
        policy = _policy(dtype if dtype is not None else torch_dtype)
        opened = cls._opened(pretrained_model_name_or_path, config, overrides, _ONLY)
        with opened as (config, weights, directory):
            with without_initial_values():
                model = cls(config, *model_args, dtype=policy or most_stored_dtype(weights, weights.tensors))
            variables = canonical_variables(model)
            names = check_weights(_tensors(variables), weights, directory, cls.__name__)
            _load(variables, weights, names)
            info = loading_info(names, weights.tensors)
            info.pop("error_msgs")  # of PyTorch alone
        if dtype is not None or torch_dtype is not None:
            config.torch_dtype = model.dtype
        return (model, info) if output_loading_info else model

    @classmethod
    def from_arrays(cls, config: Any, arrays: Mapping[str, np.ndarray], *, dtype: Any = None) -> Self:
        """Returns the model of a configuration with given values.

        Args:
            arrays: NumPy arrays under canonical names (`groupvit_common.model.parameters.manifest`); each is read once,
                so the mapping may compute them. Others are ignored.
            dtype: of the floating-point variables, as for `from_pretrained`.

        Raises:
            InputError: an array is missing, or of another shape.
        """
        with without_initial_values():
            model = cls(config, dtype=dtype)
        model._set_arrays(arrays)
        return model

    def _set_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Gives a model the values that `from_arrays` takes."""
        for name, variable in canonical_variables(self).items():
            array = checked_array(arrays, name, _shape(variable), type(self).__name__)
            variable.assign(cast(from_canonical(kind(variable), array), variable.dtype))

    # -- saving --

    def save_pretrained(
        self,
        save_directory: str | Path,
        saved_model: bool = False,
        version: int = 1,
        push_to_hub: bool = False,
        signatures: None = None,
        max_shard_size: int | str = "5GB",
        create_pr: bool = False,
        safe_serialization: bool | None = True,
        token: str | bool | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, np.ndarray] | None = None,
        repo_id: str | None = None,
        **push_options: Any,
    ) -> None:
        """Writes `config.json` and the weights into a directory, which `groupvit_torch` and transformers read too.

        The checkpoint in the directory is the old one or the new one, whole, whenever the process is killed.

        Args:
            save_directory: made if need be. Weights of an earlier save in it are removed.
            saved_model: only False is possible: see `export`. `version` and `signatures` belong to it.
            is_main_process: False: nothing is written; for training in several processes.
            state_dict: arrays to write instead of the model's own values, under the names and in the layout of the
                files.
            max_shard_size: bytes or "200MB": more than this is spread over several files with an index.
            safe_serialization: only True is possible: `tf_model.h5` is not written.
            push_to_hub: also send the files to the repository `repo_id` (the directory's name if None);
                `push_options` are those of `push_to_hub`.

        Raises:
            CheckpointError: the directory cannot be written, or the hub not reached.
            InputError: an argument that cannot be used; or variables that are not those of the configuration (added
                layers, quantization, ...), or are not finite.
        """
        push_options = self._push_options(safe_serialization, push_to_hub, {**push_options, "create_pr": create_pr})
        if saved_model or signatures is not None:
            raise InputError("saved_model=True and signatures request a SavedModel: call export(directory) for it")
        if not is_main_process:
            return
        variables = canonical_variables(self)
        if state_dict is None:
            found = _tensors(variables)
            self._check_tensors(found, self._expected(), lambda name: not_finite(variables[name]))
            tensors = {name: array_info(shape, dtype) for name, (shape, dtype) in found.items()}
        else:
            compare_tensors(
                {name: shape for name, (shape, _) in self._expected().items()},
                {name: tuple(array.shape) for name, array in state_dict.items()},
                source="state_dict",
                model=type(self).__name__,
            )
            tensors = {name: array_info(array.shape, array.dtype.name) for name, array in state_dict.items()}

        def value(name: str) -> np.ndarray:
            if state_dict is not None:
                return state_dict[name]
            variable = variables[name]
            array = np.asarray(variable)
            return to_canonical(kind(variable), array.astype(np.int64) if array.dtype.kind == "i" else array)

        self._save(
            save_directory,
            tensors,
            value,
            self.dtype,
            max_shard_size,
            push_to_hub,
            repo_id,
            **{"token": token, **push_options},
        )

    def check_finite(self, done: str = "used") -> None:
        variables = canonical_variables(self)
        self._refuse_not_finite(done, (name for name, variable in variables.items() if not_finite(variable)))

    check_finite.__doc__ = Pretrained.check_finite.__doc__

    def _own_tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return _tensors(canonical_variables(self))

    # -- Keras's own files --

    def save(self, filepath: Any, *args: Any, **options: Any) -> None:
        """Writes a `.keras` or `.h5` file, as Keras does. Raises `InputError` if weights are not finite."""
        self.check_finite("saved")
        super().save(filepath, *args, **options)

    def save_weights(self, filepath: Any, *args: Any, **options: Any) -> None:
        """Writes a `.weights.h5` file, as Keras does. Raises `InputError` if weights are not finite."""
        self.check_finite("saved")
        super().save_weights(filepath, *args, **options)

    def save_own_variables(self, store: Any) -> None:
        """Writes the model's own variables into a file of Keras. Raises `InputError` if weights are not finite.

        Keras calls this for `keras.saving.save_model` too, and for a model around this one.
        """
        self.check_finite("saved")
        super().save_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of `from_config`: the configuration, the dtype policy, which layers are frozen, and
        which quantized."""
        from groupvit_tf.quantization import quantized_layers

        quantized = quantized_layers(self._layers_by_path())
        return {
            "config": self.config.to_dict(),
            "name": self.name,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "trainable": self._trainable_flags(),
            **({"quantization": quantized} if quantized else {}),
        }

    @classmethod
    def from_config(cls, config: Any, custom_objects: Mapping[str, Any] | None = None, **keras_options: Any) -> Self:
        """Returns the model of a `get_config` result, which may come with a file. Raises `InputError` for others.

        A configuration, or its dictionary, gives a new model, as in transformers, with `dtype` and other keywords of
        the constructor.
        """
        if isinstance(config, cls.config_class):
            return cls(config, **keras_options)
        if "model_type" in config and "config" not in config:
            return cls(cls.config_class.from_dict(config), **keras_options)
        options = {**config, **keras_options}
        settings, trainable = options.pop("config", None), options.pop("trainable", True)
        trainable = trainable if isinstance(trainable, Mapping) else {"": trainable}
        quantization = options.pop("quantization", {})
        name, policy = options.get("name"), options.get("dtype")
        if isinstance(policy, Mapping):  # as Keras serialises it
            policy = policy.get("config")
            policy = policy.get("name", policy) if isinstance(policy, Mapping) else ()
        wrong = [key for key in options if key not in _constructor_arguments(cls)]
        for key, value, kind in (
            ("config", settings, Mapping),
            ("dtype", policy, str | None),
            ("name", name, str | None),
            ("quantization", quantization, Mapping),
        ):
            wrong += [] if isinstance(value, kind) else [key]
        wrong += [] if all(isinstance(flag, bool) for flag in trainable.values()) else ["trainable"]
        if wrong:
            raise InputError(
                f"the configuration of a {cls.__name__} does not fit: {wrong[0]!r} is not as get_config writes it; "
                "save the model again, or load its weights with from_pretrained"
            )
        options["dtype"] = None if policy is None else _policy(policy)
        model = cls(cls.config_class.from_dict(settings), **options)
        layers = model._layers_by_path()
        for path in trainable:
            if path in layers:
                layers[path].trainable = trainable[path]
        if quantization:
            from groupvit_tf.quantization import quantize_as

            quantize_as(layers, quantization)
        return model

    def export(
        self, filepath: str | Path, format: str = "tf_saved_model", verbose: bool | None = None, **options: Any
    ) -> None:
        """Writes a SavedModel with named endpoints; `options` are those of `groupvit_tf.export.export_saved_model`."""
        if keras.backend.backend() != "tensorflow":
            raise InputError(
                f"a SavedModel is written by TensorFlow, and Keras runs on {keras.backend.backend()}: save_pretrained, "
                "then load and export with KERAS_BACKEND=tensorflow"
            )
        # Keras's own exporter takes a model's last call for its only endpoint, and no records for its outputs.
        if format != "tf_saved_model":
            raise InputError(
                f"format must be 'tf_saved_model', got {format!r}; other formats can be made from a SavedModel"
            )
        unknown = [name for name in options if name != "image_size"]
        if unknown:
            raise InputError(f"export takes no {unknown[0]!r}: the endpoints are fixed but for image_size")
        from groupvit_tf.export import export_saved_model

        export_saved_model(self, filepath, **options)

    def quantize(self, mode: Any = None, config: Any = None, filters: Any = None, **options: Any) -> None:
        """Quantizes dense layers and embeddings in place, as `keras.Model.quantize` does, but for the layers that
        assign patches to groups.

        The model is then for inference: `save` and `save_weights` keep it, `save_pretrained` does not.

        Args:
            mode: "int8" or "int4"; that of `config` if None.
            config: a `keras.quantizers.QuantizationConfig`. Without an `activation_quantizer` weights alone are
                rounded.
            filters: which layers, as Keras documents them.

        Raises:
            InputError: another mode, a model in float16, or a layer that is quantized already.
        """
        from groupvit_tf.quantization import chosen_layers, few_collections  # imports the layers of all models

        is_chosen = chosen_layers(self, mode, filters)
        with few_collections():
            super().quantize(mode, config=config, filters=is_chosen, **options)

    def _layers_by_path(self) -> dict[str, keras.layers.Layer]:
        """Returns the model itself under "", its built layers under their paths, parents before their children."""
        root = f"{self.path}/"
        built = [layer for layer in self._flatten_layers(include_self=False) if layer.path]
        layers = {layer.path.removeprefix(root): layer for layer in built}
        return {"": self} | {path: layers[path] for path in sorted(layers)}

    def _trainable_flags(self) -> dict[str, bool]:
        """Returns `trainable` of the model and of each layer that differs from its parent, parents first."""
        flags: dict[str, bool] = {}
        for path, layer in self._layers_by_path().items():
            parents = [parent for parent in flags if not parent or path.startswith(f"{parent}/")]
            if not parents or flags[max(parents, key=len)] != layer.trainable:
                flags[path] = layer.trainable
        return flags

    # -- the rest of transformers' base class that code relies on --

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Returns the number of elements of the parameters, without those of token and position tables on request."""
        return sum(
            math.prod(variable.shape)
            for name, variable in canonical_variables(self).items()
            if is_parameter(name)
            and (variable.trainable or not only_trainable)
            and not (exclude_embeddings and name.endswith("_embedding.weight"))
        )

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(
            getattr(layer, "gradient_checkpointing", False) for layer in self._flatten_layers(include_self=False)
        )

    def _set_gradient_checkpointing(self, on: bool) -> None:
        for layer in self._flatten_layers(include_self=False):
            if hasattr(layer, "gradient_checkpointing"):
                layer.gradient_checkpointing = on
        # A step that `fit` has traced would keep the old choice.
        self.train_function = None


def _own_name(cls: type) -> str:
    """Returns a default name: "groupvit_model", where Keras would choose "group_vi_t_model"; counted as Keras does."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__.replace("GroupViT", "Groupvit")).lower()
    count = keras.backend.get_uid(words)
    return words if count == 1 else f"{words}_{count - 1}"


def _constructor_arguments(cls: type) -> set[str]:
    """Returns the names of a model class's arguments, with those of the base classes that it passes others on to."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names |= {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
        if base is PreTrainedModel or not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names - {"self", "config"} | set(_KERAS_OPTIONS) - {"trainable"}


def _computes(dtype: str) -> bool:
    """Returns whether Keras's backend has numbers of this type; JAX has float64 only if enabled at its start."""
    if keras.backend.backend() != "jax" or dtype != "float64":
        return True
    import jax

    return bool(jax.config.jax_enable_x64)


def _policy(value: Any) -> keras.DTypePolicy | None:
    """Returns the requested dtype policy; None stands for "auto"."""
    if isinstance(value, str) and value == "auto":
        return None
    name = float_dtype(value)
    try:
        policy = keras.dtype_policies.get(name or value)
        if policy.quantization_mode is None and float_dtype(policy.variable_dtype):
            return policy
    except (ValueError, TypeError, AttributeError):
        pass
    raise InputError(
        "dtype must be 'auto', float32, float64, float16 or bfloat16, or a Keras policy such as 'mixed_bfloat16', "
        f"got {value!r}"
    )


def _shape(variable: keras.Variable) -> tuple[int, ...]:
    """Returns a variable's shape in files."""
    return tuple(int(variable.shape[axis]) for axis in canonical_axes(kind(variable), len(variable.shape)))


def _stored_dtype(variable: keras.Variable) -> str:
    """Returns a variable's dtype in files: its own, but PyTorch counts in int64."""
    return "int64" if variable.dtype.startswith("int") else str(variable.dtype)


def _tensors(variables: Mapping[str, keras.Variable]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns name -> shape and dtype in files."""
    return {name: (_shape(variable), _stored_dtype(variable)) for name, variable in variables.items()}


def not_finite(variable: keras.Variable) -> bool:
    """Returns whether a variable holds NaN or infinite values."""
    array = np.asarray(variable)
    if "float" not in array.dtype.name:
        return False
    # A finite sum has finite terms only, and costs less than a look at each; finite terms may have an infinite sum.
    with np.errstate(all="ignore"):
        return not bool(np.isfinite(array.sum())) and not bool(np.isfinite(array).all())


def _load(variables: Mapping[str, keras.Variable], weights: Weights, names: list[str]) -> None:
    """Fills the variables `names` from the files, one tensor in memory at a time."""
    wanted = set(names)
    for path, stored_names in weights.files.items():
        for name, array in read_arrays(path, [name for name in stored_names if name in wanted]):
            variable = variables[name]
            variable.assign(cast(from_canonical(kind(variable), array), variable.dtype))
