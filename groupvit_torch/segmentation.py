"""Tensor work of segmentation, on the device: the grouping map, and group similarities -> label map.

Shapes: B images, P = h*w patches, G groups (legend in docs/architecture.md).
"""

from collections.abc import Sequence

from torch import Tensor


def grouping_map(assignments: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Soft assignments of each grouping block, in order, `[B, G1, P]`, `[B, G2, G1]`, ... -> `[B, G, h, w]`.

    The product follows a patch through all blocks (paper, section 4.1; the sum over G is 1 for every patch).
    """
    product = assignments[0]
    for assignment in assignments[1:]:
        product = assignment @ product
    return product.unflatten(-1, grid)
