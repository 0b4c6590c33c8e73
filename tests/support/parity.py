"""PyTorch against Keras on TensorFlow: the same random weights and inputs into both, and how far apart they come out.

    python -m tests.support.parity

writes docs/parity.md. `tests/model/test_parity_frameworks.py` holds the same computations to tolerances.

Every computation is written once, over a `Side`: both packages have the same files, classes and functions. It draws
what it needs from a generator that starts anew for each side. Everything is drawn in float32, so that float64 sees the
same values. from tests.support.paths import ROOT
"""

import argparse
import datetime
import importlib
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from groupvit_common.model.config import ACTIVATIONS, GroupViTConfig
from groupvit_common.model.outputs import ModelOutput
from tests.support.backends import TF, Arrays, Torch, _numpy
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "parity.md"

# Where a program branches on a number, two correct programs may branch differently if it is near the border: a segment
# that two groups claim alike, a ReLU at zero. Inputs that come nearer than this (float64, relative to the largest
# number of the array) are drawn again. Rounding in float32 moves these numbers by up to 3e-6 of the largest.
ASSIGN_MARGIN = 3e-5
KINK_MARGIN = 3e-6
# Two labels of a pixel are tied if their logits differ by less than this, relative to the largest, in float64.
TIE = 1e-12

# Gradients that are zero by mathematics and rounding noise in practice: biases that what follows takes away again.
_ALWAYS_CANCELLED = (
    "attn.k_proj.bias",  # by the softmax over the keys
    "assign.q_proj.bias",  # by the softmax over the groups, which are the queries there
    "mlp_inter.fc2.bias",  # one number a token: by the layer norm over its channels, as the next
    "group_projector.1.fc2.bias",
)
_CANCELLED_IN_TRAINING = (
    "_projection.0.bias",  # by the batch norm, as is what is added to every text or image in front of it
    "text_model.final_layer_norm.bias",
    "vision_model.layernorm.bias",
)


ZERO = "zero by mathematics"
"""The beginning of the rows of those gradients, which are not compared."""


def has_gradient(name: str, training: bool) -> bool:
    """Returns whether the loss depends on a parameter at all."""
    return not name.endswith(_ALWAYS_CANCELLED + (_CANCELLED_IN_TRAINING if training else ()))


# -- the two sides --


class TorchSide(Torch):
    """PyTorch as the computations see it, in one dtype."""

    package = "groupvit_torch"

    def __init__(self, dtype: str) -> None:
        import torch

        self.torch, self.dtype, self.float = torch, dtype, getattr(torch, dtype)

    def module(self, name: str) -> Any:
        return importlib.import_module(f"{self.package}.{name}")

    def tensor(self, array: Any) -> Any:
        tensor = self.torch.from_numpy(np.array(array))
        return tensor.to(self.float) if tensor.is_floating_point() else tensor

    def make(self, cls: Any, *args: Any) -> Any:
        return cls(*args).to(self.float)

    def weights(self, layer: Any) -> Arrays:
        return {name: _numpy(value).copy() for name, value in layer.state_dict().items()}

    def fill(self, layer: Any, weights: Arrays) -> None:
        layer.load_state_dict({name: self.torch.from_numpy(np.array(value)) for name, value in weights.items()})

    def call_in(self, training: bool, layer: Any, *inputs: Any, **flags: Any) -> Any:
        return layer.train(training)(*inputs, **flags)

    def differentiate(self, function: Callable[..., Any], inputs: list[Any], layer: Any) -> tuple[Any, Arrays]:
        tensors = [self.tensor(array).requires_grad_(np.asarray(array).dtype.kind == "f") for array in inputs]
        if layer is not None:
            layer.zero_grad()
        outputs = function(*tensors)
        total = sum((part * self.tensor(cotangent(part.shape))).sum() for part in _parts(outputs))
        total.backward()
        gradients = {f"input {i}": _numpy(tensor.grad) for i, tensor in enumerate(tensors) if tensor.grad is not None}
        parameters = layer.named_parameters() if layer is not None else ()
        return outputs, gradients | {n: _numpy(p.grad) for n, p in parameters if p.grad is not None}

    # What the packages name differently, or take from their framework.

    def projection(self, *sizes: int) -> Any:
        return self.make(self.module("layers").Projection, *sizes)

    def batch_norm(self, width: int) -> Any:
        return self.make(self.torch.nn.BatchNorm1d, width)

    def layer_norm(self, width: int, eps: float) -> Any:
        return self.make(lambda: self.torch.nn.LayerNorm(width, eps=eps))

    def normalise(self, x: Any) -> Any:
        return self.torch.nn.functional.normalize(x, dim=-1)

    def bilinear(self, x: Any, size: tuple[int, int]) -> Any:
        return self.torch.nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


class TFSide(TF):
    """Keras on TensorFlow as the computations see it, in one dtype."""

    package = "groupvit_tf"

    def __init__(self, dtype: str) -> None:
        import tensorflow as tf

        self.tf, self.dtype = tf, dtype

    def module(self, name: str) -> Any:
        return importlib.import_module(f"{self.package}.{name}")

    def tensor(self, array: Any) -> Any:
        tensor = self.tf.constant(array)
        return self.tf.cast(tensor, self.dtype) if tensor.dtype.is_floating else tensor

    def make(self, cls: Any, *args: Any) -> Any:
        layer = cls(*args, dtype=self.dtype)
        layer.build()
        return layer

    def weights(self, layer: Any) -> Arrays:
        from groupvit_tf.checkpoint import canonical_variables, kind, to_canonical

        return {name: to_canonical(kind(v), v.numpy()).copy() for name, v in canonical_variables(layer).items()}

    def fill(self, layer: Any, weights: Arrays) -> None:
        from groupvit_tf.checkpoint import canonical_variables, from_canonical, kind

        variables = canonical_variables(layer)
        assert set(variables) == set(weights)
        for name, variable in variables.items():
            variable.assign(from_canonical(kind(variable), np.asarray(weights[name])))

    def call_in(self, training: bool, layer: Any, *inputs: Any, **flags: Any) -> Any:
        return layer(*inputs, training=training, **flags)

    def differentiate(self, function: Callable[..., Any], inputs: list[Any], layer: Any) -> tuple[Any, Arrays]:
        from groupvit_tf.checkpoint import canonical_variables, kind, to_canonical

        tensors = [self.tensor(array) for array in inputs]
        with self.tf.GradientTape() as tape:
            watched = {f"input {i}": tensor for i, tensor in enumerate(tensors) if tensor.dtype.is_floating}
            for tensor in watched.values():
                tape.watch(tensor)
            outputs = function(*tensors)
            total = sum(self.tf.reduce_sum(part * self.tensor(cotangent(part.shape))) for part in _parts(outputs))
        variables = {n: v for n, v in (canonical_variables(layer) if layer else {}).items() if v.trainable}
        found = tape.gradient(total, [*watched.values(), *(v.value for v in variables.values())])
        gradients = {name: g for name, g in zip([*watched, *variables], found, strict=True) if g is not None}
        return outputs, {
            name: to_canonical(
                kind(variables[name]) if name in variables else "other", np.asarray(self.tf.convert_to_tensor(g))
            )
            for name, g in gradients.items()
        }

    def projection(self, *sizes: int) -> Any:
        return self.make(self.module("layers").Projection, *sizes)

    def batch_norm(self, width: int) -> Any:
        return self.make(self.module("layers").BatchNorm, width)

    def layer_norm(self, width: int, eps: float) -> Any:
        return self.make(self.module("layers").LayerNorm, width, eps)

    def normalise(self, x: Any) -> Any:
        return self.module("label_maps").unit(x)

    def bilinear(self, x: Any, size: tuple[int, int]) -> Any:
        return self.module("label_maps").resize_bilinear(x, size)


Side = TorchSide | TFSide
SIDES: dict[str, type[Any]] = {"torch": TorchSide, "tf": TFSide}


def cotangent(shape: Any) -> np.ndarray:
    """Returns the start of an output's gradient: fixed numbers, so that no two entries weigh alike."""
    return np.random.default_rng(17).standard_normal(tuple(shape)).astype(np.float32)


def _parts(outputs: Any) -> list[Any]:
    """The tensors of an output that is one, or a tuple of some."""
    return [part for part in (outputs if isinstance(outputs, tuple) else (outputs,)) if part is not None]


# -- what is drawn --


class Draw:
    """Random sizes, weights and inputs. `again` counts the inputs of these sizes that came too near to a border."""

    def __init__(self, seed: int, again: int = 0) -> None:
        self.config = draw_config(np.random.default_rng(seed))
        self.rng = np.random.default_rng([seed, again])

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def gumbel(self, *shape: int) -> np.ndarray:
        return self.rng.gumbel(size=shape).astype(np.float32)

    def sizes(self, count: int, low: int, high: int) -> list[int]:
        """Different ones."""
        return [int(n) for n in self.rng.permutation(np.arange(low, high))[:count]]

    def fill(self, side: Side, layer: Any) -> Any:
        """Gives the layer random weights, and returns it. None is 0 or 1, and no two norms are alike."""
        shapes = {name: value.shape for name, value in side.weights(layer).items()}
        side.fill(layer, {name: self._weight(name, shapes[name]) for name in sorted(shapes)})
        return layer

    def _weight(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        value = self.rng.standard_normal(shape)
        if name.endswith("num_batches_tracked"):
            return np.array(self.rng.integers(1, 100))
        if name.endswith("running_var"):
            value = np.exp(0.3 * value)
        elif name.endswith("logit_scale"):
            value = np.log(10.0) + 0.2 * value
        elif name.endswith(("bias", "running_mean")):
            value = 0.3 * value
        elif len(shape) == 1:
            value = 1 + 0.3 * value
        elif not name.endswith(("token", "position_embeddings", "embedding.weight")):
            value = value / np.sqrt(np.prod(shape[1:]))
        return np.asarray(value, np.float32)

    def texts(self, count: int) -> Arrays:
        """Ids and a mask; texts end early, so that most are padded."""
        config = self.config.text_config
        length = int(self.rng.integers(4, config.max_position_embeddings + 1))
        ends = self.rng.integers(2, length, count)
        ids = self.rng.integers(3, config.vocab_size - 1, (count, length))
        last = np.arange(length) == ends[:, None]
        # With the legacy end token, 2, texts are pooled at their largest id.
        ids[last] = config.vocab_size - 1
        mask = (np.arange(length) <= ends[:, None]).astype(np.int64)
        return {"input_ids": np.where(mask == 1, ids, config.eos_token_id), "attention_mask": mask}

    def images(self, count: int) -> np.ndarray:
        """Tall and wide, never square. Each has colours of its own: images that are alike on average would leave batch
        norm only rounding noise to divide by."""
        config = self.config.vision_config
        rows, columns = (config.patch_size * n for n in self.sizes(2, 2, 7))
        channels = config.num_channels
        return self.normal(count, channels, rows, columns) + 2 * self.normal(count, channels, 1, 1)

    def noise(self, pixels: np.ndarray) -> list[np.ndarray]:
        """For every grouping block."""
        config = self.config.vision_config
        segments = pixels.shape[2] * pixels.shape[3] // config.patch_size**2
        noise = []
        for tokens, groups in zip(config.num_group_tokens, config.num_output_groups, strict=True):
            if tokens:
                noise.append(self.gumbel(len(pixels), groups, segments))
                segments = groups
        return noise


def draw_config(rng: np.random.Generator) -> GroupViTConfig:
    def integer(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    def tower() -> dict[str, Any]:
        heads = integer(2, 4)
        return {
            "num_attention_heads": heads,
            "hidden_size": heads * integer(5, 9),
            "intermediate_size": integer(17, 40),
            "hidden_act": str(rng.choice(sorted(ACTIVATIONS))),
            "layer_norm_eps": float(rng.choice([1e-3, 1e-5, 1e-6, 1e-12])),
        }

    stages = integer(2, 4)
    groups = [integer(2, 9) for _ in range(stages - 1)]
    # Only the last grouping block may have other numbers of tokens and groups (see GroupViTVisionConfig).
    tokens = [*groups[:-1], integer(2, 9)]
    patch = integer(3, 7)
    vocab = integer(30, 60)
    return GroupViTConfig(
        text_config=tower()
        | {
            "vocab_size": vocab,
            "num_hidden_layers": integer(1, 3),
            "max_position_embeddings": integer(7, 14),
            "eos_token_id": 2 if rng.random() < 0.3 else vocab - 1,
        },
        vision_config=tower()
        | {
            "depths": [integer(1, 2) for _ in range(stages)],
            "num_group_tokens": [*tokens, 0],
            "num_output_groups": [*groups, groups[-1]],
            "patch_size": patch,
            "image_size": patch * integer(3, 6),
            "num_channels": integer(1, 4),
            "assign_eps": float(rng.choice([0.5, 1.0])),
            "assign_mlp_ratio": [float(rng.choice([0.5, 0.7])), float(rng.choice([1.5, 4]))],
        },
        projection_dim=integer(11, 30),
        projection_intermediate_dim=integer(20, 50),
    )


# -- the four levels: what each computes, under the names of the table's rows; "row/part" for one of several arrays --


def operations(side: Side, draw: Draw) -> Arrays:
    grouping, layers, loss, segmentation, text = (
        side.module(name) for name in ("grouping", "layers", "loss", "label_maps", "text")
    )
    results: Arrays = {}

    def add(row: str, function: Callable[..., Any], *inputs: Any, layer: Any = None) -> None:
        results.update(_with_gradients(side, row, function, inputs, layer))

    batch, groups, segments, words, width = draw.sizes(5, 3, 12)
    # Segments that two groups claim alike are in the hands of `measure`.
    logits, noise = 2 * draw.normal(batch, groups, segments), draw.gumbel(batch, groups, segments)
    for hard in (False, True):
        kind = "hard" if hard else "soft"
        add(f"assign, {kind}", lambda x, hard=hard: grouping.assign(x, hard=hard), logits)
        add(
            f"assign, {kind}, noise and temperature",
            lambda x, n, hard=hard: grouping.assign(x, noise=n, hard=hard, temperature=0.7),
            logits,
            noise,
        )
    values = 3 * draw.normal(40)
    for name in sorted(ACTIVATIONS):
        add(f"{name}", layers.ACTIVATIONS[name], values)

    vision = draw.config.vision_config
    embeddings = draw.fill(side, side.make(side.module("vision").VisionEmbeddings, vision))
    grid = vision.image_size // vision.patch_size
    for rows, columns in ((grid + 3, grid), (grid - 1, 2 * grid + 1)):
        add(
            "positions of another image size (bicubic)",
            lambda rows=rows, columns=columns: embeddings.positions(rows, columns),
            layer=embeddings,
        )
    maps = draw.normal(batch, words, 3, 5)
    add("maps at the image's size (bilinear)", lambda x: side.bilinear(x, (3 * vision.patch_size, 41)), maps)
    second = draw.rng.dirichlet(np.ones(4), (batch, groups)).astype(np.float32).transpose(0, 2, 1)
    first = draw.rng.dirichlet(np.ones(groups), (batch, 6)).astype(np.float32).transpose(0, 2, 1)
    add("grouping map", lambda a, b: segmentation.grouping_map([a, b], (2, 3)), first, second)

    tokens = draw.texts(batch)
    states = draw.normal(batch, tokens["input_ids"].shape[1], 4)
    for mask in (None, tokens["attention_mask"]):
        bias = text._attention_bias(side.tensor(states), None if mask is None else side.tensor(mask))
        if bias is None:  # PyTorch's kernels know what causal is
            bias = side.module("attention").causal_bias(side.tensor(states), side.tensor(states))[None, None]
        # The lowest number is another one in each dtype.
        results[f"attention bias/{mask is None}"] = _numpy(bias) / np.finfo(side.dtype).max

    norm = draw.fill(side, side.layer_norm(width, vision.layer_norm_eps))
    add("layer norm", norm, 2 + 3 * draw.normal(batch, width), layer=norm)
    add("vectors of length 1", side.normalise, draw.normal(batch, width))

    images, texts, prompts = draw.normal(batch, width), draw.normal(batch, width), draw.normal(batch, 3, width)
    scale = np.float32(7.3)
    add("loss: symmetric_cross_entropy", loss.symmetric_cross_entropy, 4 * draw.normal(batch, batch))
    add("loss: contrastive_loss", loss.contrastive_loss, images, texts, scale)
    add("loss: multi_label_contrastive_loss", loss.multi_label_contrastive_loss, images, prompts, scale)
    vocabulary = draw.normal(words, width)
    group_embeds = draw.normal(batch, groups, width)
    add("loss: group_prompt_logits", loss.group_prompt_logits, group_embeds, vocabulary, scale)
    similarities, assignment = 2 * draw.normal(batch, groups, words), first
    add("loss: patch_naming", loss.patch_naming, similarities, assignment)
    naming = draw.rng.dirichlet(np.ones(words), (batch, segments)).astype(np.float32)
    allowed = draw.rng.random((batch, segments, words)) < 0.5
    add("loss: patch_naming_loss", loss.patch_naming_loss, naming, allowed)
    add("loss: prompt_claim_loss", lambda n, w: loss.prompt_claim_loss(n, w, 2), naming, allowed[:, 0])

    add("image probabilities", segmentation.image_probabilities, images, vocabulary, scale)
    add("label affinity", segmentation.label_affinity, group_embeds, vocabulary, scale)
    add(
        "label affinity, top_k",
        lambda g, w, s, i: segmentation.label_affinity(g, w, s, i, top_k=2),
        group_embeds,
        vocabulary,
        scale,
        images,
    )
    return results


def layers(side: Side, draw: Draw) -> Arrays:
    vision, text = draw.config.vision_config, draw.config.text_config
    modules, grouping = side.module("layers"), side.module("grouping")
    results: Arrays = {}

    def add(
        row: str, layer: Any, *inputs: Any, training: bool | None = None, names: tuple[str, ...] = (), **flags: Any
    ) -> Any:
        # names: of the last inputs, which have a place in no order.
        def call(*tensors: Any) -> Any:
            count = len(tensors) - len(names)
            options = {**dict(zip(names, tensors[count:], strict=True)), **flags}
            if training is None:
                return layer(*tensors[:count], **options)
            return side.call_in(training, layer, *tensors[:count], **options)

        results.update(_with_gradients(side, row, call, inputs, layer))

    def layer_of(cls: Any, *args: Any) -> Any:
        return draw.fill(side, side.make(cls, *args))

    batch, tokens, segments, groups = draw.sizes(4, 3, 10)
    width = vision.hidden_size
    x, y = draw.normal(batch, tokens, width), draw.normal(batch, segments, width)
    bias = draw.normal(batch, 1, tokens, segments)
    attention = layer_of(modules.Attention, vision)
    named = ("encoder_hidden_states", "attention_mask")
    add("Attention", attention, x, y, names=named[:1])
    add("Attention, bias", attention, x, y, bias, names=named)
    add("Attention, bias and output_attentions", attention, x, y, bias, names=named, output_attentions=True)
    add("MLP", layer_of(modules.MLP, vision), x)
    add("MixerMLP", layer_of(modules.MixerMLP, vision, tokens, 13, groups), x)

    states = draw.normal(batch, tokens, text.hidden_size)
    causal = np.triu(np.full((tokens, tokens), np.finfo(np.float32).min, np.float32), 1)[None, None]
    add("EncoderLayer", layer_of(modules.EncoderLayer, vision), x)
    add(
        "EncoderLayer, causal and output_attentions",
        layer_of(modules.EncoderLayer, text),
        states,
        causal,
        output_attentions=True,
    )

    noise = draw.gumbel(batch, groups, segments)
    queries = draw.normal(batch, groups, width)
    add("CrossAttentionLayer", layer_of(grouping.CrossAttentionLayer, vision), queries, y)
    for hard in (False, True):
        kind = "hard" if hard else "soft"
        add(
            f"AssignAttention, {kind}",
            layer_of(grouping.AssignAttention, vision),
            queries,
            y,
            noise,
            hard=hard,
            temperature=0.7,
        )
        block = layer_of(grouping.TokenAssign, vision, tokens, groups)
        add(f"TokenAssign, {kind}", block, y, x, noise, hard=hard, temperature=0.7)

    stages = len(vision.depths)
    for index in (0, stages - 2, stages - 1):
        stage = layer_of(side.module("vision").Stage, vision, index)
        previous = vision.num_output_groups[index - 1] if index else 0
        count = previous or segments
        given = [draw.normal(batch, count, width)]
        if vision.num_group_tokens[index]:
            given += [
                draw.normal(batch, max(previous, 1), width),
                draw.gumbel(batch, vision.num_output_groups[index], count),
            ]
        row = "Stage, last" if index == stages - 1 else "Stage, first" if not index else "Stage, later"
        add(row, stage, *given, training=True, names=("noise",) if vision.num_group_tokens[index] else ())

    hidden = draw.config.projection_intermediate_dim
    rows = draw.normal(batch + 3, hidden) * 2 + 1
    norm = draw.fill(side, side.batch_norm(hidden))
    projection = draw.fill(side, side.projection(width, hidden, draw.config.projection_dim))
    for name, layer, value in (("batch norm", norm, rows), ("Projection", projection, draw.normal(batch + 3, width))):
        add(f"{name}, evaluation", layer, value, training=False)
        add(f"{name}, training", layer, value, training=True)
        for part, state in side.weights(layer).items():
            if part.endswith(("running_mean", "running_var", "num_batches_tracked")):
                results[f"{name}, running statistics/{part}"] = state
    return results


def towers(side: Side, draw: Draw) -> Arrays:
    results: Arrays = {}

    def add(row: str, record: ModelOutput) -> None:
        for field, value in _numpy(record).items():
            arrays = value if isinstance(value, tuple) else (value,)
            results.update({f"{row}: {field}/{index}": array for index, array in enumerate(arrays)})

    text = draw.fill(side, side.make(side.module("text").TextTower, draw.config.text_config))
    ids, mask = draw.texts(4).values()
    positions = draw.rng.integers(0, draw.config.text_config.max_position_embeddings, ids.shape)
    holes = draw.rng.integers(0, 2, ids.shape)
    for row, given in (
        ("text", (ids,)),
        ("text, padding masked", (ids, mask)),
        ("text, positions given, holes in the mask", (ids, holes, positions)),
    ):
        tensors = [side.tensor(value) for value in given] + [None] * (3 - len(given))
        add(row, side.call_in(False, text, *tensors, output_attentions=True, output_hidden_states=True))

    vision = draw.fill(side, side.make(side.module("vision").VisionTower, draw.config.vision_config))
    pixels = draw.images(3)
    noise = [side.tensor(value) for value in draw.noise(pixels)]
    for row, training, options in (
        ("vision", False, {}),
        ("vision, noise", True, {"gumbel_noise": noise}),
        ("vision, noise, soft", True, {"gumbel_noise": noise, "assign_hard": False, "assign_temperature": 0.7}),
    ):
        flags = {"output_attentions": True, "output_hidden_states": True, **options}
        add(row, side.call_in(training, vision, side.tensor(pixels), **flags))
    return results


def model(side: Side, draw: Draw) -> Arrays:
    whole = draw.fill(side, side.build(draw.config, dtype=side.dtype))
    results: Arrays = {}
    # As many texts as there are images would hide a mistaken axis.
    images, texts = draw.sizes(2, 2, 6)
    text, pixels = draw.texts(texts), draw.images(images)
    given = {name: side.tensor(value) for name, value in {**text, "pixel_values": pixels}.items()}
    output = _numpy(side.call_in(False, whole, **given, output_segmentation=True))
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds", "segmentation_logits"):
        results[name] = output[name]
    results["text features"] = side.features(whole, "text", **text)
    results["image features"] = side.features(whole, "image", pixel_values=pixels)

    # Batch norm over two or three rows would leave gradients of rounding noise.
    pairs = 6
    text, pixels = draw.texts(pairs), draw.images(pairs)
    names = list(text)
    noise = draw.noise(pixels)
    for mode, training, options in (
        ("evaluation", False, {}),
        ("training, hard", True, {}),
        ("training, soft", True, {"assign_hard": False, "assign_temperature": 0.7}),
    ):
        if training:
            options["gumbel_noise"] = [side.tensor(value) for value in noise]

        def loss(pixels: Any, *tokens: Any, training: bool = training, options: Any = options) -> Any:
            inputs = {"pixel_values": pixels, **dict(zip(names, tokens, strict=True)), **options}
            return side.call_in(training, whole, **inputs, return_loss=True).loss

        value, gradients = side.differentiate(loss, [pixels, *text.values()], whole)
        results[f"loss, {mode}"] = _numpy(value)
        for name, gradient in gradients.items():
            row = f"gradient of the loss, {mode}" if has_gradient(name, training) else f"{ZERO} in {mode}"
            results[f"{row}/{name}"] = gradient
        if training:
            for name, state in side.weights(whole).items():
                if "running_" in name or "num_batches" in name:
                    results[f"running statistics, {mode}/{name}"] = state
    return results


LEVELS: dict[str, Callable[[Any, Draw], Arrays]] = {
    "operation": operations,
    "layer": layers,
    "tower": towers,
    "model": model,
}


def _with_gradients(side: Side, row: str, function: Callable[..., Any], inputs: Any, layer: Any) -> Arrays:
    outputs, gradients = side.differentiate(function, list(inputs), layer)
    results = {f"{row}/{index}": _numpy(part) for index, part in enumerate(_parts(outputs))}
    # The name that the parameter has in a model, as far as it matters here.
    where = {"Attention": "attn", "AssignAttention": "assign", "Projection": "_projection"}.get(row.split(",")[0], "")
    for name, gradient in gradients.items():
        if has_gradient(f"{where}.{name}", training=row.endswith("training")):
            results[f"{row}, gradient/{name}"] = gradient
    return results


# -- comparing --


@contextmanager
def watched_margins() -> Iterator[list[float]]:
    """Collects how near PyTorch's computations within come to a border, in units of what is allowed (1 is just
    allowed)."""
    import torch
    from torch import nn

    from groupvit_torch import grouping
    from groupvit_torch.layers import ACTIVATIONS, MLP, MixerMLP

    margins = [np.inf]
    plain = grouping.assign

    def relative(distance: Any, values: Any) -> float:
        return float((distance.abs().min() / values.abs().max()).detach())

    def assign(logits: Any, *, noise: Any = None, hard: bool = True, temperature: float = 1.0) -> Any:
        noisy = (logits if noise is None else logits + noise).detach()
        if hard and noisy.shape[1] > 1:
            best, second = noisy.topk(2, dim=1).values.unbind(1)
            margins.append(relative(best - second, noisy) / ASSIGN_MARGIN)
        return plain(logits, noise=noise, hard=hard, temperature=temperature)

    def hook(module: Any, inputs: Any, output: Any) -> None:
        # The inputs of activations with a kink. Batch norm is always followed by a ReLU here.
        if isinstance(module, nn.BatchNorm1d):
            margins.append(relative(output, output) / KINK_MARGIN)
        if isinstance(module, MLP) and module.activation in (ACTIVATIONS["relu"], ACTIVATIONS["selu"]):
            x = inputs[0].transpose(1, 2) if isinstance(module, MixerMLP) else inputs[0]
            with torch.no_grad():
                before = nn.functional.linear(x, module.fc1.weight, module.fc1.bias)
            margins.append(relative(before, before) / KINK_MARGIN)

    handle = nn.modules.module.register_module_forward_hook(hook)
    grouping.assign = assign
    try:
        yield margins
    finally:
        grouping.assign = plain
        handle.remove()


@lru_cache(maxsize=512)
def settled(level: str, seed: int) -> tuple[int, Arrays]:
    """Returns the number of redraws until no input was near a border, and PyTorch's results in float64."""
    for again in range(50):
        with watched_margins() as margins:
            arrays = LEVELS[level](TorchSide("float64"), Draw(seed, again))
        if min(margins) >= 1:
            return again, arrays
    raise AssertionError(f"no inputs of configuration {seed} keep away from the borders")


@lru_cache(maxsize=512)
def both(level: str, seed: int, dtype: str) -> tuple[Arrays, Arrays]:
    """The arrays of a level, or of `half`, in PyTorch and in Keras."""
    compute = half if level == "half" else LEVELS[level]
    again, exact = settled("model" if level == "half" else level, seed)
    torch = exact if dtype == "float64" else compute(TorchSide(dtype), Draw(seed, again))
    tf = compute(TFSide(dtype), Draw(seed, again))
    assert list(torch) == list(tf), set(torch) ^ set(tf)
    return torch, tf


def measure(level: str, seed: int, dtype: str) -> dict[str, float]:
    """Returns the distance of Keras from PyTorch, for every array of a level: the largest difference relative to the
    largest value."""
    torch, tf = both(level, seed, dtype)
    return {name: difference(tf[name], torch[name]) for name in torch if not name.startswith(ZERO)}


def rounding(level: str, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the distances of PyTorch and Keras in float32 are from float64."""
    exact = settled(level, seed)[1]
    torch, tf = (
        {name: difference(value, exact[name]) for name, value in arrays.items() if not name.startswith(ZERO)}
        for arrays in both(level, seed, "float32")
    )
    return torch, tf


def difference(actual: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference over the largest value; of what is equal, infinities among it, none."""
    assert actual.shape == wanted.shape, (actual.shape, wanted.shape)
    with np.errstate(invalid="ignore"):
        distance = np.where(actual == wanted, 0.0, np.abs(actual.astype(np.float64) - wanted))
    largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)
    worst = float(distance.max(initial=0.0)) / (float(largest) or 1.0)
    return worst if np.isfinite(worst) else np.inf


def rows(measured: dict[str, float]) -> dict[str, float]:
    """The worst part of each row."""
    worst: dict[str, float] = {}
    for name, value in measured.items():
        row = name.split("/")[0]
        worst[row] = max(worst.get(row, 0.0), value)
    return worst


# -- what a user sees: label maps; and half precision --


class Agreement(NamedTuple):
    """Pixels (or segments) that two programs label alike, of those compared, and how many tied ones were left aside."""

    alike: int = 0
    compared: int = 0
    tied: int = 0

    def __add__(self, other: "Agreement") -> "Agreement":  # type: ignore[override]
        return Agreement(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def share(self) -> float:
        return self.alike / self.compared


def label_maps(seed: int, dtype: str) -> Agreement:
    """The label of every pixel at full size, the largest of `segmentation_logits`, in both frameworks."""
    exact = settled("model", seed)[1]["segmentation_logits"]
    torch, tf = both("model" if dtype in ("float32", "float64") else "half", seed, dtype)
    best = np.sort(exact, axis=1)
    tied = best[:, -1] - best[:, -2] <= TIE * np.abs(exact).max()
    same = torch["segmentation_logits"].argmax(axis=1) == tf["segmentation_logits"].argmax(axis=1)
    return Agreement(int((same & ~tied).sum()), int((~tied).sum()), int(tied.sum()))


def half(side: Side, draw: Draw) -> Arrays:
    """Returns the compared arrays of models in half precision: evaluation with the soft assignment, so that rounding
    moves values but sends no segment to another group. "segments/..." are the groups that claim them."""
    whole = draw.fill(side, side.build(draw.config, dtype=side.dtype))
    images, texts = draw.sizes(2, 2, 6)
    given = {
        name: side.tensor(value) for name, value in {**draw.texts(texts), "pixel_values": draw.images(images)}.items()
    }
    output = _numpy(side.call_in(False, whole, **given, output_segmentation=True, assign_hard=False))
    results = {
        name: output[name] for name in ("image_embeds", "text_embeds", "logits_per_image", "segmentation_logits")
    }
    claims = output["vision_model_output"]["attentions"]
    return results | {f"segments/{index}": claim.argmax(axis=1) for index, claim in enumerate(claims)}


class HalfRow(NamedTuple):
    """Distances relative to the largest value: each framework's half model from the float32 model (PyTorch's), and the
    two."""

    torch: float
    tf: float
    between: float


def measure_half(seed: int, dtype: str) -> tuple[dict[str, HalfRow], dict[str, Agreement]]:
    """Distances of values, and agreement of the claimed segments with the float32 model's, "PyTorch" and "Keras"."""
    again, _ = settled("model", seed)
    single = half(TorchSide("float32"), Draw(seed, again))
    torch, tf = both("half", seed, dtype)
    values = {
        name: HalfRow(
            difference(torch[name], single[name]), difference(tf[name], single[name]), difference(tf[name], torch[name])
        )
        for name in single
        if not name.startswith("segments")
    }
    claims = {}
    for label, arrays in (("PyTorch", torch), ("Keras", tf)):
        same = np.concatenate([(arrays[n] == single[n]).ravel() for n in single if n.startswith("segments")])
        claims[label] = Agreement(int(same.sum()), same.size)
    return values, claims


def segmenter_maps(count: int, dtype: str) -> Agreement:
    """`Segmenter` with the bundled model on synthetic scenes of several sizes: pixels that get the same label."""
    from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, make_scene

    sizes = ((64, 64), (96, 160), (233, 121))
    images = [make_scene(7, index, 1, sizes[index % len(sizes)]).image for index in range(count)]
    labels = [names[0] for names in LEVELS[1]]
    ground = [names[0] for names in BACKGROUNDS]
    maps = []
    for side in SIDES.values():
        segmenter = importlib.import_module(f"{side.package}.predictor").Segmenter.from_pretrained(
            "demo", labels=labels, background_labels=ground, dtype=dtype, device="cpu"
        )
        maps.append([result.label_map for result in segmenter(images)])
    same = sum(int((one == other).sum()) for one, other in zip(*maps, strict=True))
    return Agreement(same, sum(one.size for one in maps[0]))


def gradients_with_batch_norm_written_out(seed: int) -> float:
    """Returns how far PyTorch's worst gradient in training is from float64, in float32, if batch norm is computed in
    steps as in Keras."""
    from torch import nn

    again, exact = settled("model", seed)
    kernel = nn.BatchNorm1d.forward

    def forward(norm: Any, x: Any) -> Any:
        if not norm.training:
            return kernel(norm, x)
        centred = x - x.mean(dim=0)
        return centred * ((centred.square().mean(dim=0) + norm.eps).rsqrt() * norm.weight) + norm.bias

    nn.BatchNorm1d.forward = forward
    try:
        arrays = model(TorchSide("float32"), Draw(seed, again))
    finally:
        nn.BatchNorm1d.forward = kernel
    return max(
        difference(arrays[name], exact[name]) for name in exact if name.startswith("gradient of the loss, training")
    )


# -- the page --


def _cpu() -> str:
    """The processor's name as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def page(configurations: int, log: Callable[[str], None]) -> str:
    """docs/parity.md."""
    import keras
    import tensorflow as tf
    import torch

    seeds = range(configurations)
    tables, redrawn = [], 0
    for level in LEVELS:
        worst: dict[str, list[float]] = {}
        for seed in seeds:
            columns = [measure(level, seed, "float64"), measure(level, seed, "float32"), *rounding(level, seed)]
            for index, column in enumerate(columns):
                for row, value in rows(column).items():
                    cells = worst.setdefault(row, [0.0] * len(columns))
                    cells[index] = max(cells[index], value)
            redrawn += settled(level, seed)[0]
            log(f"{level}: configuration {seed}")
        lines = [f"| {row} | {' | '.join(f'{cell:.1e}' for cell in cells)} |" for row, cells in worst.items()]
        tables.append("\n".join([f"## {level.capitalize()}s", "", *_TABLE, *lines]))

    maps, values, claims = [], [], []
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        agreement = sum((label_maps(seed, dtype) for seed in seeds), start=Agreement())
        bundled = segmenter_maps(12, dtype)
        maps.append(
            f"| {dtype} | {_percent(agreement)} of {agreement.compared:,} | {agreement.tied} "
            f"| {_percent(bundled)} of {bundled.compared:,} |"
        )
        log(f"label maps: {dtype}")
    for dtype in ("bfloat16", "float16"):
        of_values: dict[str, list[HalfRow]] = {}
        of_claims: dict[str, Agreement] = {}
        for seed in seeds:
            some, shares = measure_half(seed, dtype)
            for name, row in some.items():
                of_values.setdefault(name, []).append(row)
            for name, share in shares.items():
                of_claims[name] = of_claims.get(name, Agreement()) + share
        for name, several in of_values.items():
            for kind, pick in (("median", np.median), ("largest", np.max)):
                torch_, tf_, between = (
                    float(pick([getattr(row, part) for row in several])) for part in HalfRow._fields
                )
                values.append(f"| {dtype} | {name} | {kind} | {torch_:.1e} | {tf_:.1e} | {between:.1e} |")
        claims.append(f"| {dtype} | {_percent(of_claims['PyTorch'])} | {_percent(of_claims['Keras'])} |")
        log(f"half precision: {dtype}")

    return _PAGE.format(
        configurations=configurations,
        written_out=max(gradients_with_batch_norm_written_out(seed) for seed in seeds),
        redrawn=redrawn,
        assign=ASSIGN_MARGIN,
        kink=KINK_MARGIN,
        tie=TIE,
        versions=f"PyTorch {torch.__version__}, TensorFlow {tf.__version__}, Keras {keras.__version__}, "
        f"NumPy {np.__version__}, Python {platform.python_version()}",
        date=datetime.date.today().isoformat(),
        cpu=_cpu(),
        tables="\n\n".join(tables),
        maps="\n".join(maps),
        values="\n".join(values),
        claims="\n".join(claims),
    )


def _percent(agreement: Agreement) -> str:
    """Never rounded up to 100%."""
    return "100%" if agreement.alike == agreement.compared else f"{min(100 * agreement.share, 99.9999):.4f}%"


_TABLE = (
    "| quantity | float64: Keras from PyTorch | float32: Keras from PyTorch | PyTorch from float64 | Keras from "
    "float64 |",
    "|---|---|---|---|---|",
)

_PAGE = """\
# Parity: PyTorch against Keras on TensorFlow

<!-- Written by `make parity`. Do not edit. -->

The same random weights and inputs go into `groupvit_torch` and `groupvit_tf`; each number is the largest difference
between the two, relative to the largest value of PyTorch's array, over {configurations} random configurations: two to
four stages, widths, heads, activations, epsilons and patch sizes of all sorts, tall and wide images, padded texts with
and without mask, the legacy end token, unequal numbers of images and texts. Norms, biases and batch-norm statistics are
random too, so that nothing is trivially 0 or 1. A row is the worst of all its arrays (every layer, every parameter), in
the worst configuration. The last two columns say how far each framework's float32 is from PyTorch's float64: two
correct programs are about as far from one another as from the truth. Inputs and weights are float32 numbers in both
dtypes, noise is explicit. Gradients are those of a weighted sum of the output, or of the loss, for every input and
parameter.

Made by `make parity` (`python -m tests.support.parity`) on {date} with {versions}, on {cpu}.
`tests/model/test_parity_frameworks.py` holds some configurations to tolerances in every test run, and shows that a
deliberate error is noticed; `tests/model/test_parity.py` compares each framework with transformers,
`tests/training/test_training_parity.py` whole training steps.

- **Left out** are gradients that are zero by mathematics, where each framework has rounding noise of its own: biases of
  keys before a softmax, biases before a batch norm in training, and what else a norm takes away again (`has_gradient`
  in `tests/support/parity.py`; a test holds that they are zero).
- **Borders.** Where a program branches on a number, two correct programs may branch differently next to the border.
  Inputs with a segment whose two best groups (noisy logits, float64) are nearer than {assign:.0e} of the largest logit,
  or a ReLU or SELU nearer to zero than {kink:.0e} of the largest, were drawn again: {redrawn} times in all.
- **Gradients in training** differ most in float32, because PyTorch rounds more. The gradient that leaves a batch norm
  sums to zero over the batch; that of PyTorch's kernel for the CPU does so only up to a rounding that grows with the
  mean beside the deviation, while Keras's goes back through the mean itself. Biases in front of it, which meet all
  images alike, see little but that sum. With batch norm written out in PyTorch as it is in Keras, the worst of
  PyTorch's gradients in training comes to {written_out:.1e} of float64's.
- **One number** that is the sum of many parts of either sign, as the gradient of the temperature in "label affinity",
  can be small beside the parts' rounding, in either framework.
- **0.0** stands where both do the same exact steps, as in masks and counters.

{tables}

## Label maps

The fraction of pixels that get the same label in both frameworks. Left: the largest of `segmentation_logits` at full
size, over the configurations above (in half precision with soft assignment, see below); ties, whose two best labels
differ by less than {tie:.0e} of the largest logit in float64, are left aside. Right: `Segmenter` with the bundled model
on twelve synthetic scenes.

| dtype | `segmentation_logits` | ties | `Segmenter` |
|---|---|---|---|
{maps}

## Half precision

A half-precision model is not the float32 model rounded at the end: every layer rounds, to 8 bits in bfloat16 and 11 in
float16, and the frameworks round at different places (fused attention, the dtype of sums). So each framework's half
model is compared with PyTorch's float32 model, and the two with one another: neither should be further away than the
other. Evaluation with the soft assignment, whose values move with rounding; a hard one would jump. Over the
configurations, relative to the largest value:

| dtype | quantity | | PyTorch from float32 | Keras from float32 | Keras from PyTorch |
|---|---|---|---|---|---|
{values}

Segments claimed most by the same group as in the float32 model:

| dtype | PyTorch | Keras |
|---|---|---|
{claims}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.parity", description="Compares the backends; writes docs/parity.md."
    )
    parser.add_argument("--configurations", type=int, default=24, help="how many random configurations (default: 24)")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (default: docs/parity.md)")
    options = parser.parse_args()
    options.out.write_text(page(options.configurations, print), encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
