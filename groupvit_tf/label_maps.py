"""Tensor work of segmentation, on the device: the grouping map, and the similarities of groups and images to labels.

`groupvit_common.segmentation.scores` says what each step means. The pixels are left to
`groupvit_common.segmentation.label_maps`: in NumPy they take as long as in PyTorch on a CPU core, and a function
compiled for every image size would take longer to compile than to run.

Shapes: B images, P = h*w patches, G groups, L labels, E embedding (legend in docs/architecture.md).
"""

from collections.abc import Sequence

from keras import ops

from groupvit_common.model.resample import resize_matrix
from groupvit_common.segmentation.scores import MAX_LOGIT_SCALE
from groupvit_tf.layers import Tensor, softmax


def grouping_map(assignments: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Soft assignments of each grouping block, in order, `[B, G1, P]`, `[B, G2, G1]`, ... -> `[B, G, h, w]`.

    The product follows a patch through all blocks (paper, section 4.1; the sum over G is 1 for every patch).
    """
    product = assignments[0]
    for assignment in assignments[1:]:
        product = ops.matmul(assignment, product)
    return ops.reshape(product, (-1, product.shape[1], *grid))


def unit(x: Tensor) -> Tensor:
    """Vectors brought to length 1; as in PyTorch, one that is shorter than 1e-12 is divided by that."""
    square = ops.sum(ops.square(x), axis=-1, keepdims=True)
    # The square is bounded, not the root, whose slope at a vector of zeros is not finite.
    return x / ops.sqrt(ops.maximum(square, ops.cast(1e-24, x.dtype)))


def similarity(embeds: Tensor, label_embeds: Tensor) -> Tensor:
    """Cosine similarity of embeddings `[..., E]` and labels `[L, E]`, or the most similar of a label's words
    `[L, K, E]`: `[..., L]`."""
    if len(label_embeds.shape) == 2:
        return ops.matmul(unit(embeds), ops.transpose(unit(label_embeds)))
    labels, words, width = label_embeds.shape
    word_scores = similarity(embeds, ops.reshape(label_embeds, (-1, width)))
    return ops.max(ops.reshape(word_scores, (*embeds.shape[:-1], labels, words)), axis=-1)


def image_probabilities(image_embeds: Tensor, label_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """`[B, E]`, `[L, E]` or `[L, K, E]` -> `[B, L]`: softmax over labels of the scaled cosine similarity."""
    return softmax(ops.minimum(logit_scale, MAX_LOGIT_SCALE) * similarity(image_embeds, label_embeds), axis=-1)


def label_affinity(
    group_embeds: Tensor,
    label_embeds: Tensor,
    logit_scale: Tensor,
    image_embeds: Tensor | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Affinity of groups to labels: `[B, G, E]`, `[L, E]` or `[L, K, E]` -> `[B, G, L]`, each in 0..1.

    `top_k` needs `image_embeds` `[B, E]`; a number of labels or more keeps all. A higher `temperature` makes labels
    more alike.
    """
    scaled = ops.minimum(logit_scale, MAX_LOGIT_SCALE) / temperature * similarity(group_embeds, label_embeds)
    among_all = softmax(scaled, axis=-1)
    count = label_embeds.shape[0]
    if top_k is None or top_k >= count:
        return among_all * among_all
    assert image_embeds is not None, "top_k ranks the labels by the image embedding"
    # Of labels that are equally similar the first ones stay, as in PyTorch.
    best = ops.top_k(similarity(image_embeds, label_embeds), top_k)[1]
    kept = ops.any(ops.one_hot(best, count, dtype="bool"), axis=1)
    return among_all * softmax(ops.where(kept[:, None], scaled, -float("inf")), axis=-1)


def resize_bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """`[B, N, h, w]`, of known h and w, resized to `size` = (H, W): `[B, N, H, W]` in the same dtype."""
    # The weights of half precision are float32, as in PyTorch.
    dtype = "float64" if maps.dtype == "float64" else "float32"
    down = ops.convert_to_tensor(resize_matrix(maps.shape[2], size[0]), dtype)
    across = ops.convert_to_tensor(resize_matrix(maps.shape[3], size[1]).T, dtype)
    resized = ops.matmul(down, ops.matmul(ops.cast(maps, dtype), across))
    return ops.cast(resized, maps.dtype)
