"""Models made faster for inference: narrower dtypes, int8, compilation. Nothing here happens unless it is asked for.

`docs/speed.md` says what to expect.
"""

import copy
import time
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from groupvit_common.errors import InputError
from groupvit_common.model.optimization import (
    BOUND,
    OptimizationReport,
    Optimized,
    check_difference,
    check_request,
    choose_dtype,
    example_pixels,
    example_tokens,
    largest_difference,
)
from groupvit_tf.base import GroupViTPreTrainedModel
from groupvit_tf.checkpoint import canonical_variables, kind, to_canonical
from groupvit_tf.model import GroupViTTextModel, GroupViTVisionModel
from groupvit_tf.programs import compile_by_xla

__all__ = ["features", "optimize"]


def optimize(
    model: Any,
    *,
    dtype: str = "auto",
    compile: bool = False,
    quantize: str | None = None,
    example: Any = None,
    verify: bool | None = None,
    bound: float = BOUND,
) -> Optimized:
    """Returns a copy of a model made ready for inference, and a report: `fast, report = optimize(model)`.

    The model that is given stays as it is.

    Args:
        model: a `GroupViTModel`, `GroupViTVisionModel` or `GroupViTTextModel`.
        dtype: "bfloat16", "float16" or "float32". "auto": bfloat16 where the CPU has instructions for it that
            TensorFlow uses, on a GPU bfloat16, and else float32. One that is named is used wherever the model is; the
            report says where it is slow.
        compile: `predict`, and the image tower where it is called by itself or by a segmenter, run by XLA, which
            compiles once for each number and size of images that keeps coming. JAX always does.
        quantize: "int8": the weights of dense layers and embeddings as whole numbers of eight bits, by `quantize` of
            the model: a quarter of the memory, but slower than float32. On CPUs only. The assignment of patches to
            groups stays in float32.
        example: images `[B, C, H, W]` for `verify`; None: noise, always the same.
        verify: compare the features with the plain model's. None: where the model is quantized.
        bound: the largest accepted difference, relative to the largest feature.

    Raises:
        InputError: an argument that cannot be used, what this machine cannot do, or features beyond the bound.
    """
    if not isinstance(model, GroupViTPreTrainedModel):
        raise InputError(f"optimize takes a model of groupvit_tf, got {type(model).__name__}")
    place, device = _device_of(model)
    check_request(dtype, quantize, device)
    begin = time.perf_counter()
    # What XLA makes of bfloat16 on a CPU, which is all that JAX has, is not known to be faster.
    has_bfloat16 = device != "cpu" or keras.backend.backend() == "tensorflow"
    choice = choose_dtype("float32" if quantize else dtype, device, has_bfloat16=has_bfloat16)
    reason = choice.reason
    with keras.device(place):
        fast = type(model).from_arrays(copy.deepcopy(model.config), _Arrays(model), dtype=choice.dtype)
        if quantize:
            # Inputs stay as they are: TensorFlow and JAX have no fast products of whole numbers on a CPU.
            fast.quantize(config=keras.quantizers.Int8QuantizationConfig(activation_quantizer=None))
            reason = "weights of eight bits, in a quarter of the memory; slower than float32, in which products are"
        if compile:
            fast.compile(jit_compile=True)
            if not isinstance(fast, GroupViTTextModel):
                compile_by_xla(fast.vision_model)
        difference = None
        if verify if verify is not None else quantize is not None:
            images = None if example is None else np.asarray(example, np.float32)
            difference = largest_difference(features(model, images), features(fast, images))
            check_difference(difference, bound, quantize or choice.dtype)
    seconds = time.perf_counter() - begin
    return Optimized(fast, OptimizationReport(choice.dtype, quantize, compile, reason, difference, seconds))


def features(model: Any, pixels: npt.NDArray[np.float32] | None = None) -> list[npt.NDArray[np.float32]]:
    """Returns a model's features of images `[B, E]` and of texts `[N, E]`, as far as it has both, for a comparison.

    Args:
        pixels: `[B, C, H, W]`; None: noise.
    """
    found: list[Any] = []
    if not isinstance(model, GroupViTTextModel):
        is_tower = isinstance(model, GroupViTVisionModel)
        images = example_pixels(model.config if is_tower else model.config.vision_config) if pixels is None else pixels
        found.append((model if is_tower else model.get_image_features)(pixel_values=images, training=False))
    if not isinstance(model, GroupViTVisionModel):
        is_tower = isinstance(model, GroupViTTextModel)
        tokens = example_tokens(model.config if is_tower else model.config.text_config).astype(np.int32)
        found.append((model if is_tower else model.get_text_features)(input_ids=tokens, training=False))
    tensors = [each["pooler_output"] if isinstance(each, Mapping) else each for each in found]
    return [np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32"))) for tensor in tensors]


class _Arrays(Mapping[str, np.ndarray]):
    """The values of a model by canonical name, each made when it is asked for."""

    def __init__(self, model: Any) -> None:
        self._variables = canonical_variables(model)

    def __getitem__(self, name: str) -> np.ndarray:
        variable = self._variables[name]
        return to_canonical(kind(variable), np.asarray(variable))

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)


def _device_of(model: Any) -> tuple[Any, str]:
    """Returns the device of a model's variables, and its kind: "cpu", "gpu", ..."""
    value = model.variables[0].value
    if keras.backend.backend() == "jax":
        place = next(iter(value.devices()))
        return place, place.platform
    return value.device, value.device.split(":")[-2].lower()
