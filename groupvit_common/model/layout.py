"""Names and axes of tensors in files (transformers' PyTorch names, the canonical ones) and Keras.

A Keras variable's path below its model is the canonical name but for the last part, and only kernels have other axes:
files keep `[out, in, ...]`, Keras `[..., in, out]`, where `...` are a convolution's height and width.
"""

import numpy as np

# Last part of a Keras path -> last part of the canonical name. Others are called alike.
_LEAVES = {
    "kernel": "weight",
    "gamma": "weight",
    "embeddings": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# Kinds of `groupvit_common.model.parameters` that Keras keeps as kernels.
_KERNELS = ("dense", "conv")


def canonical_name(path: str) -> str:
    """Returns the canonical name of a Keras path below the model: "text_projection.0/kernel" ->
    "text_projection.0.weight"."""
    *parents, leaf = path.split("/")
    return ".".join([*parents, _LEAVES.get(leaf, leaf)])


def canonical_axes(kind: str, rank: int) -> tuple[int, ...]:
    """Returns a canonical tensor's axes in Keras's order: (1, 0) of a dense weight, (3, 2, 0, 1) of a convolution's."""
    return (rank - 1, rank - 2, *range(rank - 2)) if kind in _KERNELS else tuple(range(rank))


def to_canonical(kind: str, value: np.ndarray) -> np.ndarray:
    """Returns a Keras tensor in the layout of files, a view. `kind`: see `groupvit_common.model.parameters`."""
    return value.transpose(canonical_axes(kind, value.ndim))


def from_canonical(kind: str, value: np.ndarray) -> np.ndarray:
    """Returns a tensor in Keras's layout: the reverse of `to_canonical`."""
    return value.transpose(np.argsort(canonical_axes(kind, value.ndim)))
