"""Losses: the paper's against the authors' numbers, the groups' against a second, slower way of computing them."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from groupvit_torch import loss as L  # noqa: E402

# What the authors' code answered once in float32: features, losses, and the gradients of its two log-temperatures, whose values
# are those of its checkpoint.
REFERENCE = Path(__file__).parent / "reference" / "nvlabs" / "losses.npz"
FLOAT32 = 1e-6
EXACT = 1e-12  # two orders of summation in float64


@pytest.mark.parametrize(
    ("function", "texts", "value", "scale"),
    [
        (L.contrastive_loss, "text_x", "contrastive_loss", "logit_scale"),
        (L.multi_label_contrastive_loss, "text_multi_label_x", "multi_label_loss", "multi_label_logit_scale"),
    ],
)
def test_the_papers_losses_and_their_slope_are_the_authors(function, texts, value, scale):
    with np.load(REFERENCE) as reference:
        images, prompts = (torch.from_numpy(reference[name]).double() for name in ("image_x", texts))
        log_scale = torch.tensor(float(reference[scale]), dtype=torch.float64, requires_grad=True)
        result = function(images, prompts, log_scale.exp())
        result.backward()
        assert float(result.detach()) == pytest.approx(float(reference[value]), rel=FLOAT32)
        assert float(log_scale.grad) == pytest.approx(float(reference[f"grad.{scale}"]), rel=FLOAT32)


def test_one_prompt_a_caption_makes_multi_label_the_plain_loss():
    images, texts = torch.randn(2, 5, 8, dtype=torch.float64)
    plain = L.contrastive_loss(images, texts, 7.0)
    assert float(L.multi_label_contrastive_loss(images, texts[:, None], 7.0)) == pytest.approx(float(plain), abs=EXACT)


@pytest.fixture
def scene():
    """Logits [B, G, W], assignment [B, G, P], words of each patch's caption [B, P, W], words of each caption [B, W]."""
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5, dtype=torch.float64) * 3
    assignment = torch.randn(3, 4, 6, dtype=torch.float64).softmax(dim=1)
    named = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 0, 0], [1, 0, 0, 1, 0]], dtype=torch.bool)
    allowed = named[:, None].repeat(1, 6, 1)
    allowed[0, 3:] = named[1]
    return logits, assignment, allowed, named


def test_patch_naming_is_a_distribution_of_the_groups_names(scene):
    logits, assignment, _, _ = scene
    naming = L.patch_naming(logits, assignment)
    expected = np.einsum("bgp,bgw->bpw", assignment.numpy(), torch.softmax(logits, -1).numpy())
    np.testing.assert_allclose(naming.numpy(), expected, atol=EXACT)
    np.testing.assert_allclose(naming.sum(-1).numpy(), 1.0, atol=EXACT)


def test_patch_naming_loss_patch_by_patch(scene):
    logits, assignment, allowed, _ = scene
    naming = L.patch_naming(logits, assignment).numpy()
    each = [
        -np.log(sum(naming[b, p, w] for w in range(5) if allowed[b, p, w]) + 1e-6) for b in range(3) for p in range(6)
    ]
    assert float(L.patch_naming_loss(L.patch_naming(logits, assignment), allowed)) == pytest.approx(
        np.mean(each), abs=EXACT
    )


def test_prompt_claim_loss_prompt_by_prompt(scene):
    logits, assignment, _, named = scene
    naming = L.patch_naming(logits, assignment).numpy()
    each = [-np.log(np.sort(naming[b, :, w])[-2:].mean() + 1e-6) for b in range(3) for w in range(5) if named[b, w]]
    assert float(L.prompt_claim_loss(L.patch_naming(logits, assignment), named, 2)) == pytest.approx(
        np.mean(each), abs=EXACT
    )


def test_right_names_cost_nothing_and_a_summary_of_the_image_does():
    """Two images, two things each. Groups that hold one thing and say it beat groups that all say 'one of both'."""
    assignment = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]).expand(2, 2, 4)
    named = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    right = torch.full((2, 2, 4), -30.0)
    summary = torch.full((2, 2, 4), -30.0)
    for image, (first, second) in enumerate(((0, 1), (2, 3))):
        right[image, 0, first] = right[image, 1, second] = 30.0
        summary[image, :, first] = summary[image, :, second] = 30.0
    allowed = named[:, None]
    zero = 1e-5  # the constant that keeps logarithms finite
    assert float(L.patch_naming_loss(L.patch_naming(right, assignment), allowed)) == pytest.approx(0, abs=zero)
    assert float(L.patch_naming_loss(L.patch_naming(summary, assignment), allowed)) == pytest.approx(0, abs=zero)
    assert float(L.prompt_claim_loss(L.patch_naming(right, assignment), named, 2)) == pytest.approx(0, abs=zero)
    assert float(L.prompt_claim_loss(L.patch_naming(summary, assignment), named, 2)) == pytest.approx(
        np.log(2), abs=zero
    )


def test_a_group_without_patches_claims_nothing():
    assignment = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    named = torch.tensor([[True, False]])
    logits = torch.tensor([[[-30.0, 30.0], [30.0, -30.0]]])  # the empty group says the right word
    assert float(L.prompt_claim_loss(L.patch_naming(logits, assignment), named, 1)) > 10


def test_half_precision_is_widened():
    logits = torch.randn(4, 4)
    assert L.symmetric_cross_entropy(logits.half()).dtype == torch.float32
    assert L.group_prompt_logits(torch.randn(2, 3, 4).half(), torch.randn(5, 4).half(), 9.0).dtype == torch.float32
    assert L.contrastive_loss(logits.bfloat16(), logits.bfloat16(), 9.0).dtype == torch.float32


def test_group_prompt_logits_are_scaled_cosines():
    groups, prompts = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    logits = L.group_prompt_logits(groups, prompts, 9.0)
    for b in range(2):
        for g in range(3):
            for w in range(5):
                cosine = torch.cosine_similarity(groups[b, g], prompts[w], dim=0)
                assert float(logits[b, g, w]) == pytest.approx(9 * float(cosine), abs=EXACT)
