"""Habits of programs written for transformers with a model, beyond calling it: keywords of loading and saving, and
attributes and methods of its base class that need no framework."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from groupvit_common.errors import InputError, short

# Keywords of `from_pretrained` that change nothing here, whatever their value: details of transformers' loader, the
# attention kernel, which is chosen at run time here, and the file's layout, which the file states itself.
WITHOUT_EFFECT = frozenset(
    {
        "attn_implementation",
        "from_pt",
        "low_cpu_mem_usage",
        "max_memory",
        "offload_buffers",
        "offload_folder",
        "offload_state_dict",
        "resume_download",
        "trust_remote_code",
        "use_flash_attention_2",
        "weights_only",
        "_commit_hash",
        "_fast_init",
        "_from_auto",
        "_from_pipeline",
    }
)
# Keywords of `from_pretrained` whose listed values change nothing; any other value is refused with the reason.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "adapter_kwargs": ((None, {}), "adapters are loaded by peft, around the model"),
    "code_revision": ((None, "main"), "no code is loaded with a checkpoint"),
    "from_flax": ((None, False), "Flax's files need conversion first"),
    "from_tf": ((None, False), "TensorFlow's own files need conversion first"),
    "generation_config": ((None,), "the models generate nothing"),
    "gguf_file": ((None,), "only safetensors are read"),
    "ignore_mismatched_sizes": ((None, False), "a model is loaded whole or not at all"),
    "key_mapping": ((None, {}), "rename the tensors with groupvit convert"),
    "load_in_4bit": ((None, False), "quantize the model after loading it"),
    "load_in_8bit": ((None, False), "quantize the model after loading it"),
    "mirror": ((None,), "set the environment variable HF_ENDPOINT"),
    "proxies": ((None, {}), "set the environment variable HTTPS_PROXY"),
    "quantization_config": ((None,), "quantize the model after loading it"),
    "state_dict": ((None,), "load the checkpoint, then call load_state_dict"),
    "tp_plan": ((None,), "a model is loaded onto one device"),
    "use_safetensors": ((None, True), "only safetensors are read"),
    "variant": ((None,), "a checkpoint's files have one name: give a variant a directory or branch of its own"),
}
# The same for `save_pretrained`. Weights are written as safetensors by our own writer, which no function replaces;
# transformers, too, calls `save_function` for pickles only.
SAVE_WITHOUT_EFFECT = frozenset({"save_function", "save_peft_format", "use_temp_dir"})
SAVE_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "save_original_format": ((None, True), "tensors are written under their canonical names"),
    "variant": ((None,), "a checkpoint's files have one name: save a variant into a directory of its own"),
}
# Methods of transformers' base class that request what GroupViT does not have.
REFUSED = {
    "create_model_card": "write the card by hand, or see docs/checkpoints.md",
    "dequantize": "the model is not quantized",
    "generate": "GroupViT generates no text",
    "get_position_embeddings": "they are text_model.embeddings.position_embedding and "
    "vision_model.embeddings.position_embeddings",
    "load_adapter": "adapters are loaded by peft, around the model",
    "prepare_tf_dataset": "make a tf.data.Dataset of the processor's encodings",
    "prune_heads": "heads cannot be taken out: make a configuration with fewer",
    "resize_position_embeddings": "images of any size are taken as they are, and texts have max_position_embeddings",
    "set_output_embeddings": "the model has no head",
}


def harmless(
    keywords: Mapping[str, Any],
    call: str,
    only: Mapping[str, tuple[tuple[Any, ...], str]],
    without_effect: frozenset[str],
) -> dict[str, Any]:
    """Returns the keywords of a call that are not transformers'.

    Raises:
        InputError: one of transformers' requests what is not done here.
    """
    for name, (accepted, reason) in only.items():
        if name in keywords and not any(keywords[name] is value or keywords[name] == value for value in accepted):
            raise InputError(f"{call} cannot do {name}={short(keywords[name])}: {reason}")
    return {name: value for name, value in keywords.items() if name not in only and name not in without_effect}


def with_token(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Returns keywords with `token` in the place of its older name, `use_auth_token`."""
    given = dict(keywords)
    older = given.pop("use_auth_token", None)
    if older not in (None, False):
        given.setdefault("token", older)
    return given


def loading_info(names: Iterator[str] | list[str], stored: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns transformers' account of a loaded checkpoint. A model that lacks tensors is never returned.

    Args:
        names: of the tensors that were read.
        stored: the tensors of the file, by name.
    """
    read = set(names)
    return {
        "missing_keys": [],
        "unexpected_keys": [name for name in stored if name not in read],
        "mismatched_keys": [],
        "error_msgs": [],
    }


def resized(number: int, wanted: int | None, multiple: int | None) -> int:
    """Returns the number of tokens that `resize_token_embeddings` requests. Raises `InputError` for none."""
    for name, value in (("new_num_tokens", wanted), ("pad_to_multiple_of", multiple)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise InputError(f"{name} must be an integer of at least 1, got {value!r}")
    number = number if wanted is None else wanted
    return number if multiple is None else -(-number // multiple) * multiple


def patch_grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """Returns rows and columns of a number of patches on an image of these proportions. Raises `InputError` if they
    make no such grid."""
    scale = (height * width // patches) ** 0.5
    shorter = max(round(min(height, width) / max(scale, 1e-9)), 1)
    if patches % shorter:
        raise InputError(f"{patches} patches make no grid of the proportions {height} x {width}")
    return (patches // shorter, shorter) if height > width else (shorter, patches // shorter)


class TransformersModel:
    """Attributes and methods of transformers' base class that need no framework."""

    framework: ClassVar[str]
    is_parallelizable: ClassVar[bool] = False
    model_parallel: ClassVar[bool] = False
    supports_gradient_checkpointing: ClassVar[bool] = True
    # Read by peft, accelerate and trainers; None as there.
    _auto_class: ClassVar[str | None] = None
    _keep_in_fp32_modules: ClassVar[list[str] | None] = None
    _keys_to_ignore_on_load_missing: ClassVar[list[str] | None] = None
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str] | None] = None
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None
    _no_split_modules: ClassVar[list[str] | None] = None
    _skip_keys_device_placement: ClassVar[list[str] | None] = None
    _tied_weights_keys: ClassVar[list[str] | None] = None
    generation_config: ClassVar[None] = None
    model_tags: ClassVar[list[str] | None] = None
    base_model_prefix: ClassVar[str] = ""
    # What transformers' GroupViT says of kernels and caches. Ours runs PyTorch's kernel without a request.
    _is_stateful: ClassVar[bool] = False
    _supports_cache_class: ClassVar[bool] = False
    _supports_flash_attn_2: ClassVar[bool] = False
    _supports_flex_attn: ClassVar[bool] = False
    _supports_quantized_cache: ClassVar[bool] = False
    _supports_sdpa: ClassVar[bool] = False
    _supports_static_cache: ClassVar[bool] = False

    config: Any

    @property
    def name_or_path(self) -> str:
        """The name or directory that the model was loaded from, else an empty text."""
        return self.config.name_or_path

    @property
    def base_model(self) -> Any:
        """The model within, of a class that holds one under the name `base_model_prefix`; else the model itself."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def warnings_issued(self) -> dict[str, Any]:
        """Warnings that programs have noted as given."""
        # Past `__setattr__`: frameworks would take note of it.
        return self.__dict__.setdefault("_warnings_issued", {})

    @property
    def projection_dim(self) -> int:
        """Width of the shared embedding."""
        return _of_full(self, "projection_dim").projection_dim

    @property
    def projection_intermediate_dim(self) -> int:
        """Width of the projections' hidden layer."""
        return _of_full(self, "projection_intermediate_dim").projection_intermediate_dim

    @property
    def text_embed_dim(self) -> int:
        """Width of the text tower."""
        return _of_full(self, "text_embed_dim").text_config.hidden_size

    @property
    def vision_embed_dim(self) -> int:
        """Width of the vision tower."""
        return _of_full(self, "vision_embed_dim").vision_config.hidden_size

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:
        """Returns a new model of a configuration."""
        make: Any = cls
        return make(config, **harmless(options, f"{cls.__name__}._from_config", ONLY, WITHOUT_EFFECT))

    @classmethod
    def can_generate(cls) -> bool:
        """Returns False: GroupViT generates no text."""
        return False

    def get_output_embeddings(self) -> None:
        """Returns None: the model has no head."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: no two tensors are one."""

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Keeps tags for the hub in `model_tags`, each once."""
        known: list[str] = self.__dict__.setdefault("model_tags", [])
        known += [tag for tag in ([tags] if isinstance(tags, str) else tags) if tag not in known]

    def _refuse(self, name: str) -> Any:
        raise InputError(f"{type(self).__name__} has no {name}: {REFUSED[name]}")


def _of_full(model: Any, name: str) -> Any:
    """Returns the configuration of a full model; a tower's has not this attribute."""
    if not hasattr(model.config, "text_config"):
        raise AttributeError(f"{type(model).__name__} has no attribute {name!r}")
    return model.config


def _refusing(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._refuse(name)

    method.__name__ = name
    method.__doc__ = f"Raises `InputError`: {REFUSED[name]}."
    return method


for _name in REFUSED:
    setattr(TransformersModel, _name, _refusing(_name))
