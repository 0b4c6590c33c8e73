"""The segmenter: images and labels -> label maps. `groupvit_common.segmentation.predictor` holds what is not Keras."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from groupvit_common.errors import InputError
from groupvit_common.model.optimization import Optimized
from groupvit_common.segmentation.encoded import Blocks
from groupvit_common.segmentation.options import DEFAULT_MODEL
from groupvit_common.segmentation.predictor import DEMO_MODEL, BaseSegmenter
from groupvit_common.segmentation.scores import Floats
from groupvit_tf.label_maps import grouping_map, image_probabilities, label_affinity
from groupvit_tf.layers import Tensor, wide_dtype
from groupvit_tf.model import GroupViTModel
from groupvit_tf.programs import is_by_xla
from groupvit_tf.vision import check_pixels

__all__ = ["DEFAULT_MODEL", "DEMO_MODEL", "Segmenter"]

# Images that one program takes: their dtype and, on JAX, height and width, with XLA their number too.
Kind = tuple[int | str, ...]
# Pixels -> the result of `Segmenter._encode_eagerly`.
Encode = Callable[[Floats], tuple[Tensor, Tensor, list[Tensor]]]

# Tracing the model takes as long as some ten calls without: a photo or two are answered sooner without.
_CALLS_BEFORE_TRACING = 2
# JAX and XLA make a program for each size, which takes seconds and megabytes: for a size that keeps coming.
_CALLS_BEFORE_COMPILING = 4
_MOST_TRACED = 16


class Segmenter(BaseSegmenter):
    __doc__ = BaseSegmenter.__doc__
    model: GroupViTModel

    @classmethod
    def _device(cls, wanted: Any) -> str:
        there = _devices()
        if wanted is None:
            return next((name for name in there if not name.startswith("cpu")), "cpu:0")
        name = str(wanted).lower().replace("cuda", "gpu")
        name = name if ":" in name else f"{name}:0"
        if name not in there:
            raise InputError(
                f"the device {str(wanted)!r} cannot be used here (one such as 'cpu' or 'cuda:0' can): "
                f"Keras on {keras.backend.backend()} sees {', '.join(there)}"
            )
        return name

    @classmethod
    def _load(cls, directory: Path, dtype: Any, device: Any) -> GroupViTModel:
        with keras.device(device):
            return GroupViTModel.from_pretrained(directory, dtype="float32" if dtype is None else dtype)

    @classmethod
    def _optimized(cls, model: GroupViTModel, request: Mapping[str, Any]) -> Optimized:
        # Imported here: most runs do without.
        from groupvit_tf.optimize import optimize

        return optimize(model, **request)

    def _ready(self, model: GroupViTModel) -> GroupViTModel:
        model.check_finite()
        self._calls: Counter[Kind] = Counter()
        self._traced: dict[Kind, Encode] = {}
        self._tracing = threading.Lock()
        value = model.logit_scale.value
        # In JAX a distributed variable is on several devices.
        self._place = next(iter(value.devices())) if keras.backend.backend() == "jax" else value.device
        return model

    def _embed_texts(self, tokens: Mapping[str, npt.NDArray[np.int64]]) -> Floats:
        # TensorFlow's CPU library complains about 64-bit integers.
        inputs: dict[str, Any] = {name: ids.astype(np.int32) for name, ids in tokens.items()}
        with self._on_device():
            return _numpy(_wide(self.model.get_text_features(**inputs)))

    def _classify(self, pixels: Floats, label_embeds: Floats) -> Floats:
        with self._on_device():
            _, images, _ = self._encode_images(pixels)
            labels = ops.cast(ops.convert_to_tensor(label_embeds), images.dtype)
            return _numpy(image_probabilities(images, labels, self._scale()))

    def _group(self, pixels: Floats, label_embeds: Floats) -> tuple[Floats, Floats, Floats]:
        with self._on_device():
            groups, images, block_maps = self._encode_images(pixels)
            return *self._compared(groups, images, label_embeds), _numpy(block_maps[-1])

    def _blocks(self, pixels: Floats) -> Blocks:
        with self._on_device():
            groups, images, block_maps = self._encode_images(pixels)
            return _numpy(groups), _numpy(images), [_numpy(maps) for maps in block_maps]

    def _compare(
        self, group_embeds: Floats, image_embeds: Floats, grouping: Floats, label_embeds: Floats
    ) -> tuple[Floats, Floats, Floats]:
        with self._on_device():
            groups, images = ops.convert_to_tensor(group_embeds), ops.convert_to_tensor(image_embeds)
            return *self._compared(groups, images, label_embeds), grouping

    def _embed_images(self, pixels: Floats) -> Floats:
        with self._on_device():
            return _numpy(self._encode_images(pixels)[1])

    def _encode_images(self, pixels: Floats) -> tuple[Tensor, Tensor, list[Tensor]]:
        """`_encode_eagerly`, in a traced function once enough images came: TensorFlow has one for all sizes."""
        check_pixels(pixels, self.model.config.vision_config)
        by_jax = keras.backend.backend() == "jax"
        if not by_jax and is_by_xla(self.model.vision_model):
            # A program of this number and size of images, once they keep coming.
            kind = (*pixels.shape, str(pixels.dtype))
            if self._has_come(kind, _CALLS_BEFORE_COMPILING):
                return self._program(kind, lambda: self._traced_by_tf(pixels, by_xla=True))(pixels)
        kind = (*(pixels.shape[2:] if by_jax else ()), str(pixels.dtype))
        if self._has_come(kind, _CALLS_BEFORE_COMPILING if by_jax else _CALLS_BEFORE_TRACING):
            return self._program(kind, self._traced_by_jax if by_jax else lambda: self._traced_by_tf(pixels))(pixels)
        return self._encode_eagerly(ops.convert_to_tensor(pixels))

    def _has_come(self, kind: Kind, times: int) -> bool:
        """Counts a call; returns whether there were more than so many before it."""
        self._calls[kind] += 1
        return self._calls[kind] > times

    def _program(self, kind: Kind, make: Callable[[], Encode]) -> Encode:
        # One thread traces at a time; what it made stays whole for others, whatever is put out meanwhile.
        with self._tracing:
            if kind not in self._traced:
                if len(self._traced) == _MOST_TRACED:
                    del self._traced[next(iter(self._traced))]
                self._traced[kind] = make()
            return self._traced[kind]

    def _traced_by_tf(self, pixels: Floats, *, by_xla: bool = False) -> Encode:
        import tensorflow as tf

        # XLA compiles for one shape; a graph of TensorFlow has any.
        shape = pixels.shape if by_xla else (None, pixels.shape[1], None, None)
        signature = [tf.TensorSpec(shape, pixels.dtype)]
        return tf.function(self._encode_eagerly, input_signature=signature, autograph=False, jit_compile=by_xla or None)

    def _traced_by_jax(self) -> Encode:
        import jax

        variables = self.model.variables

        # The variables as arguments: what a function only refers to, JAX compiles into it.
        @jax.jit
        def encode(values: Sequence[Tensor], pixels: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return self._encode_eagerly(pixels)

        return lambda pixels: encode([variable.value for variable in variables], ops.convert_to_tensor(pixels))

    def _encode_eagerly(self, pixels: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Images `[B, 3, H, W]` -> embeddings of groups `[B, G, E]` and images `[B, E]`, grouping map of each block."""
        with self._on_device():
            vision = self.model.vision_model(pixels, output_attentions=True, return_dict=True, training=False)
            states = vision.last_hidden_state
            groups = self.model.visual_projection(ops.reshape(states, (-1, states.shape[2])), training=False)
            groups = ops.reshape(groups, (-1, states.shape[1], groups.shape[1]))
            images = self.model.visual_projection(vision.pooler_output, training=False)
            patch = self.model.config.vision_config.patch_size
            height, width = ops.shape(pixels)[2:]
            grid = (height // patch, width // patch)
            assignments = [_wide(a) for a in vision.attentions or ()]
            block_maps = [grouping_map(assignments[: i + 1], grid) for i in range(len(assignments))]
            return _wide(groups), _wide(images), block_maps

    def _compared(self, groups: Tensor, images: Tensor, label_embeds: Floats) -> tuple[Floats, Floats]:
        """Embeddings of groups `[B, G, E]` and images `[B, E]`, labels -> probabilities `[B, L]`, affinities
        `[B, G, L]`."""
        labels, scale = ops.cast(ops.convert_to_tensor(label_embeds), images.dtype), self._scale()
        affinity = label_affinity(groups, labels, scale, images, self.options.top_k, self.options.temperature)
        return _numpy(image_probabilities(images, labels, scale)), _numpy(affinity)

    def _on_device(self) -> Any:
        """The device of the model's variables: TensorFlow takes the first accelerator otherwise."""
        return keras.device(self._place)

    def _scale(self) -> Tensor:
        return ops.exp(_wide(self.model.logit_scale))


def _devices() -> list[str]:
    """Keras's names of the devices there are: "cpu:0", "gpu:0", ..."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return [":".join(device.name.lower().split(":")[-2:]) for device in tf.config.list_logical_devices()]
    import jax

    every = {*jax.devices(), *jax.devices("cpu")}
    return sorted(f"{device.platform}:{device.id}" for device in every)


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32."""
    return ops.cast(x, wide_dtype(x.dtype))


def _numpy(x: Tensor) -> Floats:
    array: Floats = ops.convert_to_numpy(x)
    return array
