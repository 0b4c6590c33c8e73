"""Losses. They take features that were gathered from all ranks already; the model and the loop know one device.

The paper's two come first. The others train the groups themselves: on small scenes the paper's losses alone are
satisfied by one group that holds everything (its mean patch tells captions apart), so that no mask emerges.

Shapes: B images, G groups, P patches, E embedding width, W prompts (legend in docs/architecture.md).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from groupvit_common.model.checks import PROBABILITY_FLOOR


def symmetric_cross_entropy(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """The contrastive loss of matching pairs (paper, equations 7 to 9), a float32 (or float64) scalar.

    Args:
        logits: `[B, B]` similarities times temperature, row i and column i belonging together. Half precision is
            widened: the sum of exponentials needs it.
        weights: `[B]`, by which the losses of the pairs are multiplied before their mean over B is taken. A pair of
            weight 0 is still among what the others are told apart from.
    """
    logits = _wide(logits)
    target = torch.arange(len(logits), device=logits.device)
    if weights is None:
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    pairs = F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")
    return (pairs * weights.to(pairs.dtype)).mean() / 2


def contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float) -> Tensor:
    """The loss of pairs, image i and text i (paper, section 3.2, "Image-Text Contrastive Loss").

    Args:
        image_embeds, text_embeds: `[B, E]`, any length.
    """
    image_embeds, text_embeds = _unit(image_embeds), _unit(text_embeds)
    return symmetric_cross_entropy(image_embeds @ text_embeds.T * logit_scale)


def multi_label_contrastive_loss(image_embeds: Tensor, prompt_embeds: Tensor, logit_scale: Tensor | float) -> Tensor:
    """The loss of images and M prompts of each (paper, section 3.2, "Multi-Label Image-Text Contrastive Loss").

    From images, the target is spread evenly over the image's prompts; from prompts, it is their image. Both directions
    count half.

    Args:
        image_embeds: `[B, E]`; prompt_embeds: `[B, M, E]`; any length.
    """
    images, prompts = _unit(image_embeds), _unit(prompt_embeds)
    count, per_image = prompts.shape[:2]
    logits = images @ prompts.flatten(0, 1).T * logit_scale  # [B, B * M]
    target = torch.arange(count, device=logits.device).repeat_interleave(per_image)
    own = F.one_hot(target, count).T.to(logits.dtype) / per_image
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, target)) / 2


def group_prompt_logits(group_embeds: Tensor, prompt_embeds: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Similarities times temperature `[B, G, W]` of groups `[B, G, E]` and the batch's prompts `[W, E]`, any length."""
    return _unit(group_embeds) * logit_scale @ _unit(prompt_embeds).T


def patch_naming(logits: Tensor, assignment: Tensor | None = None) -> Tensor:
    """Each patch's distribution over the prompts `[B, P, W]`, float32 at least.

    Args:
        logits: `[B, G, W]` of `group_prompt_logits`, or `[B, P, W]` if patches are named by themselves.
        assignment: `[B, G, P]` soft, sums to 1 over G: a patch's distribution is that of its groups, weighted by it.
    """
    naming = _wide(logits).softmax(dim=-1)
    return naming if assignment is None else _wide(assignment).transpose(1, 2) @ naming


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
    return -((naming * allowed).sum(dim=-1) + PROBABILITY_FLOOR).log().mean()


def prompt_claim_loss(naming: Tensor, named: Tensor, patches: int) -> Tensor:
    """The loss of finding every prompt of a caption in some patches of its image. Beyond the paper.

    Minus the logarithm of the mean probability of the prompt in the `patches` patches that fit it best, the
    probability being over all prompts of the batch. The claim is made on patches, not on groups: a group that holds
    nothing could otherwise name a thing that it only knows from the rest of the image.

    Args:
        naming: `[B, P, W]` of `patch_naming`; named: bool `[B, W]`, which prompts are in which caption.
    """
    best = naming.topk(min(patches, naming.shape[1]), dim=1).values.mean(dim=1)
    return -((best + PROBABILITY_FLOOR).log() * named).sum() / named.sum().clamp(min=1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_wide(x), dim=-1)
