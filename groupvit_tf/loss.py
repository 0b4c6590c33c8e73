"""Losses. They take features that were gathered from all replicas already; the model knows one device.

The paper's two come first. The others train the groups themselves: on small scenes the paper's losses alone are
satisfied by one group that holds everything (its mean patch tells captions apart), so that no mask emerges.

The same functions as in `groupvit_torch.loss`. Sizes may be unknown while a graph is traced.

Shapes: B images, G groups, P patches, E embedding width, W prompts (legend in docs/architecture.md).
"""

from typing import Any

from keras import ops

from groupvit_common.model.checks import PROBABILITY_FLOOR
from groupvit_tf.label_maps import unit
from groupvit_tf.layers import mean, wide_dtype

Tensor = Any  # of whatever backend Keras runs on


def symmetric_cross_entropy(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """The contrastive loss of matching pairs (paper, equations 7 to 9), a float32 (or float64) scalar.

    Args:
        logits: `[B, B]` similarities times temperature, row i and column i belonging together. Half precision is
            widened: the sum of exponentials needs it.
        weights: `[B]`, by which the losses of the pairs are multiplied before their mean over B is taken. A pair of
            weight 0 is still among what the others are told apart from.
    """
    return _both_directions(_wide(logits), 1, weights)


def contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float) -> Tensor:
    """The loss of pairs, image i and text i (paper, section 3.2, "Image-Text Contrastive Loss").

    Args:
        image_embeds, text_embeds: `[B, E]`, any length.
    """
    image_embeds, text_embeds = _unit(image_embeds), _unit(text_embeds)
    return symmetric_cross_entropy(image_embeds @ ops.transpose(text_embeds) * _like(image_embeds, logit_scale))


def multi_label_contrastive_loss(image_embeds: Tensor, prompt_embeds: Tensor, logit_scale: Tensor | float) -> Tensor:
    """The loss of images and M prompts of each (paper, section 3.2, "Multi-Label Image-Text Contrastive Loss").

    From images, the target is spread evenly over the image's prompts; from prompts, it is their image. Both directions
    count half.

    Args:
        image_embeds: `[B, E]`; prompt_embeds: `[B, M, E]`; any length.
    """
    images, prompts = _unit(image_embeds), _unit(prompt_embeds)
    _, per_image, width = ops.shape(prompts)
    logits = images @ ops.transpose(ops.reshape(prompts, (-1, width))) * _like(images, logit_scale)  # [B, B * M]
    return _both_directions(logits, per_image)


def group_prompt_logits(group_embeds: Tensor, prompt_embeds: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Similarities times temperature `[B, G, W]` of groups `[B, G, E]` and the batch's prompts `[W, E]`, any length."""
    groups = _unit(group_embeds)
    return groups * _like(groups, logit_scale) @ ops.transpose(_unit(prompt_embeds))


def patch_naming(logits: Tensor, assignment: Tensor | None = None) -> Tensor:
    """Each patch's distribution over the prompts `[B, P, W]`, float32 at least.

    Args:
        logits: `[B, G, W]` of `group_prompt_logits`, or `[B, P, W]` if patches are named by themselves.
        assignment: `[B, G, P]` soft, sums to 1 over G: a patch's distribution is that of its groups, weighted by it.
    """
    naming = ops.softmax(_wide(logits), axis=-1)
    return naming if assignment is None else ops.transpose(_wide(assignment), (0, 2, 1)) @ naming


def patch_naming_loss(naming: Tensor, allowed: Tensor) -> Tensor:
    """The loss of naming every patch by a word of its own caption, and by no other word of the batch. Beyond the paper.

    Which of the caption's words is meant remains open: the loss is minus the logarithm of the probability that they
    hold together. Over many captions only the word that always comes with a patch's appearance can be right (learning
    from partial labels; MIL-NCE, Miech et al. 2020, contrasts with several positives in the same way). Where images are
    mixed, each patch answers to the caption of the image that it came from, so a name must follow from the patch's
    surroundings and not from a summary of the whole image.

    Args:
        naming: `[B, P, W]` of `patch_naming`; allowed: bool `[B, P, W]` (or `[B, 1, W]`), the words of each patch's
            caption.
    """
    return -mean(ops.log(ops.sum(naming * _like(naming, allowed), axis=-1) + PROBABILITY_FLOOR))


def prompt_claim_loss(naming: Tensor, named: Tensor, patches: int) -> Tensor:
    """The loss of finding every prompt of a caption in some patches of its image. Beyond the paper.

    Minus the logarithm of the mean probability of the prompt in the `patches` patches that fit it best, the
    probability being over all prompts of the batch. The claim is made on patches, not on groups: a group that holds
    nothing could otherwise name a thing that it only knows from the rest of the image.

    Args:
        naming: `[B, P, W]` of `patch_naming`; named: bool `[B, W]`, which prompts are in which caption.
    """
    total = ops.shape(naming)[1]  # a number, or a tensor where a graph does not know it yet
    count = min(patches, total) if isinstance(total, int) else ops.minimum(patches, total)
    best = mean(ops.top_k(ops.transpose(naming, (0, 2, 1)), count)[0], axis=-1)
    weights = _like(naming, named)
    return -ops.sum(ops.log(best + PROBABILITY_FLOOR) * weights) / ops.maximum(ops.sum(weights), 1.0)


def _both_directions(logits: Tensor, per_image: int, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of `[B, B * M]` logits along either axis, the M columns of image i sharing its target."""
    count = ops.shape(logits)[0]
    both = ops.log_softmax(logits, axis=1) + ops.log_softmax(logits, axis=0)
    own = mean(ops.reshape(both, (count, -1, per_image)), axis=2)
    pairs = ops.diagonal(own)
    return -mean(pairs if weights is None else pairs * _like(pairs, weights)) / 2


def _wide(x: Tensor) -> Tensor:
    x = ops.convert_to_tensor(x)
    return ops.cast(x, wide_dtype(x.dtype))


def _like(x: Tensor, value: Tensor | float) -> Tensor:
    return ops.cast(value, x.dtype)


def _unit(x: Tensor) -> Tensor:
    return unit(_wide(x))
