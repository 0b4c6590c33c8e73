"""Tensor work of segmentation, on the device: the grouping map, and group similarities -> label map.

`groupvit_common.postprocess` says what each step means and holds the same functions for NumPy arrays.

Shapes: B images, P = h*w patches, G groups, L labels, E embedding (legend in docs/architecture.md).
"""

from collections.abc import Sequence
from typing import Any

from keras import ops

from groupvit_common.resample import resize_matrix

Tensor = Any
"""A tensor of the framework that Keras runs on."""


def grouping_map(assignments: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Soft assignments of each grouping block, in order, `[B, G1, P]`, `[B, G2, G1]`, ... -> `[B, G, h, w]`.

    The product follows a patch through all blocks (paper, section 4.1; the sum over G is 1 for every patch).
    """
    product = assignments[0]
    for assignment in assignments[1:]:
        product = ops.matmul(assignment, product)
    return ops.reshape(product, (-1, product.shape[1], *grid))


def resize_bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """`[B, N, h, w]`, of known h and w, resized to `size` = (H, W): `[B, N, H, W]` in the same dtype."""
    # The weights of half precision are float32, as in PyTorch.
    dtype = "float64" if maps.dtype == "float64" else "float32"
    down = ops.convert_to_tensor(resize_matrix(maps.shape[2], size[0]), dtype)
    across = ops.convert_to_tensor(resize_matrix(maps.shape[3], size[1]).T, dtype)
    resized = ops.matmul(down, ops.matmul(ops.cast(maps, dtype), across))
    return ops.cast(resized, maps.dtype)
