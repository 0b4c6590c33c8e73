"""Losses of both backends: the paper's against the authors' numbers, the groups' against a second, slower way of
computing them, and one backend against the other, gradients included."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support import paths
from tests.support.backends import Backend

# What the authors' code answered once in float32: features, losses, and the gradients of its two log-temperatures,
# whose values are those of its checkpoint.
REFERENCE = paths.REFERENCE / "nvlabs" / "losses.npz"
FLOAT32 = 1e-6
EXACT = 1e-12  # two orders of summation in float64

Array = np.ndarray[Any, Any]


class Losses:
    """The functions of a backend's `loss.py`, on arrays."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module = pytest.importorskip(f"groupvit_{name}.loss")

    def __getattr__(self, function: str) -> Callable[..., Array]:
        return lambda *arguments: self.with_gradients(function, *arguments)[0]

    def with_gradients(self, function: str, *arguments: Any) -> tuple[Array, list[Array]]:
        """A function's value, and the gradients of its sum in every floating-point array among the arguments."""
        chosen = [i for i, a in enumerate(arguments) if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
        if self.name == "torch":
            import torch

            tensors = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arguments]
            for i in chosen:
                tensors[i].requires_grad_()
            value = getattr(self.module, function)(*tensors)
            value.sum().backward()
            return value.detach().numpy(), [tensors[i].grad.numpy() for i in chosen]
        return self._keras(function, arguments, chosen, graph=False)

    def _keras(
        self, function: str, arguments: tuple[Any, ...], chosen: list[int], graph: bool, jit: bool = False
    ) -> tuple[Array, list[Array]]:
        import tensorflow as tf

        arrays = {i: tf.constant(a) for i, a in enumerate(arguments) if isinstance(a, np.ndarray)}

        def compute(arrays: dict[int, Any]) -> Any:
            with tf.GradientTape() as tape:
                watched = [arrays[i] for i in chosen]
                tape.watch(watched)
                value = getattr(self.module, function)(*(arrays.get(i, a) for i, a in enumerate(arguments)))
            return value, tape.gradient(value, watched)

        if graph:
            unknown = {i: tf.TensorSpec([None] * len(a.shape), a.dtype) for i, a in arrays.items()}
            compute = tf.function(compute, input_signature=[unknown], jit_compile=jit)
        value, gradients = compute(arrays)
        return value.numpy(), [gradient.numpy() for gradient in gradients]


@pytest.fixture
def losses(backend: Backend) -> Losses:
    return Losses(backend.name)


@pytest.mark.parametrize(
    ("function", "texts", "value", "scale"),
    [
        ("contrastive_loss", "text_x", "contrastive_loss", "logit_scale"),
        ("multi_label_contrastive_loss", "text_multi_label_x", "multi_label_loss", "multi_label_logit_scale"),
    ],
)
def test_the_papers_losses_and_their_slope_are_the_authors(losses, function, texts, value, scale):
    with np.load(REFERENCE) as reference:
        images, prompts = (reference[name].astype(np.float64) for name in ("image_x", texts))
        temperature = np.exp(np.float64(reference[scale]))
        result, (*_, slope) = losses.with_gradients(function, images, prompts, np.array(temperature))
        assert result == pytest.approx(float(reference[value]), rel=FLOAT32)
        # Of the logarithm, as the authors keep it.
        assert temperature * slope == pytest.approx(float(reference[f"grad.{scale}"]), rel=FLOAT32)


def test_one_prompt_a_caption_makes_multi_label_the_plain_loss(losses):
    images, texts = np.random.default_rng(0).standard_normal((2, 5, 8))
    plain = losses.contrastive_loss(images, texts, 7.0)
    assert losses.multi_label_contrastive_loss(images, texts[:, None], 7.0) == pytest.approx(plain, abs=EXACT)


@pytest.fixture
def scene():
    """Logits [B, G, W], assignment [B, G, P], words of each patch's caption [B, P, W], words of each caption [B, W]."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 4, 5)) * 3
    assignment = softmax(rng.standard_normal((3, 4, 6)), axis=1)
    named = np.array([[1, 1, 0, 0, 1], [0, 1, 1, 0, 0], [1, 0, 0, 1, 0]], bool)
    allowed = named[:, None].repeat(6, axis=1)
    allowed[0, 3:] = named[1]
    return logits, assignment, allowed, named


def softmax(x: Array, axis: int) -> Array:
    return np.exp(x) / np.exp(x).sum(axis=axis, keepdims=True)


def test_patch_naming_is_a_distribution_of_the_groups_names(losses, scene):
    logits, assignment, _, _ = scene
    naming = losses.patch_naming(logits, assignment)
    np.testing.assert_allclose(naming, np.einsum("bgp,bgw->bpw", assignment, softmax(logits, -1)), atol=EXACT)
    np.testing.assert_allclose(naming.sum(-1), 1.0, atol=EXACT)


def test_patch_naming_loss_patch_by_patch(losses, scene):
    logits, assignment, allowed, _ = scene
    naming = losses.patch_naming(logits, assignment)
    each = [
        -np.log(sum(naming[b, p, w] for w in range(5) if allowed[b, p, w]) + 1e-6) for b in range(3) for p in range(6)
    ]
    assert losses.patch_naming_loss(naming, allowed) == pytest.approx(np.mean(each), abs=EXACT)


def test_prompt_claim_loss_prompt_by_prompt(losses, scene):
    logits, assignment, _, named = scene
    naming = losses.patch_naming(logits, assignment)
    each = [-np.log(np.sort(naming[b, :, w])[-2:].mean() + 1e-6) for b in range(3) for w in range(5) if named[b, w]]
    assert losses.prompt_claim_loss(naming, named, 2) == pytest.approx(np.mean(each), abs=EXACT)


def test_right_names_cost_nothing_and_a_summary_of_the_image_does(losses):
    """Two images, two things each. Groups that hold one thing and say it beat groups that all say 'one of both'."""
    assignment = np.broadcast_to(np.array([[1.0, 1, 0, 0], [0, 0, 1, 1]]), (2, 2, 4)).copy()
    named = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool)
    right, summary = np.full((2, 2, 2, 4), -30.0)
    for image, (first, second) in enumerate(((0, 1), (2, 3))):
        right[image, 0, first] = right[image, 1, second] = 30.0
        summary[image, :, first] = summary[image, :, second] = 30.0
    right, summary = (losses.patch_naming(logits, assignment) for logits in (right, summary))
    zero = 1e-5  # the constant that keeps logarithms finite
    assert losses.patch_naming_loss(right, named[:, None]) == pytest.approx(0, abs=zero)
    assert losses.patch_naming_loss(summary, named[:, None]) == pytest.approx(0, abs=zero)
    assert losses.prompt_claim_loss(right, named, 2) == pytest.approx(0, abs=zero)
    assert losses.prompt_claim_loss(summary, named, 2) == pytest.approx(np.log(2), abs=zero)


def test_a_group_without_patches_claims_nothing(losses):
    assignment = np.array([[[1.0, 1.0], [0.0, 0.0]]])
    logits = np.array([[[-30.0, 30.0], [30.0, -30.0]]])  # the empty group says the right word
    naming = losses.patch_naming(logits, assignment)
    assert losses.prompt_claim_loss(naming, np.array([[True, False]]), 1) > 10


def test_group_prompt_logits_are_scaled_cosines(losses):
    rng = np.random.default_rng(0)
    groups, prompts = rng.standard_normal((2, 3, 4)), rng.standard_normal((5, 4))
    lengths = np.linalg.norm(groups, axis=-1)[..., None] * np.linalg.norm(prompts, axis=-1)
    np.testing.assert_allclose(
        losses.group_prompt_logits(groups, prompts, 9.0), 9 * groups @ prompts.T / lengths, atol=EXACT
    )


def test_half_precision_is_widened(losses):
    rng = np.random.default_rng(0)
    logits, prompts = rng.standard_normal((2, 4, 4)).astype(np.float16)
    assert losses.symmetric_cross_entropy(logits).dtype == np.float32
    assert losses.group_prompt_logits(logits[None], prompts, 9.0).dtype == np.float32
    assert losses.contrastive_loss(logits, prompts, 9.0).dtype == np.float32
    assert losses.patch_naming(logits[None]).dtype == np.float32


def cases() -> dict[str, tuple[Any, ...]]:
    """Arguments of every loss, also with fewer patches than a claim asks for, and without a claim."""
    rng = np.random.default_rng(1)
    images, captions = rng.standard_normal((2, 4, 6))
    naming = softmax(rng.standard_normal((4, 10, 7)) * 3, axis=-1)
    named, allowed = rng.random((4, 7)) < 0.4, rng.random((4, 10, 7)) < 0.5
    scale = np.array(7.3)
    return {
        "symmetric_cross_entropy": (rng.standard_normal((5, 5)) * 4,),
        "contrastive_loss": (images, captions, scale),
        "multi_label_contrastive_loss": (images, rng.standard_normal((4, 2, 6)), scale),
        "group_prompt_logits": (rng.standard_normal((4, 3, 6)), rng.standard_normal((7, 6)), scale),
        "patch_naming": (rng.standard_normal((4, 3, 7)), softmax(rng.standard_normal((4, 3, 10)), axis=1)),
        "patch_naming_loss": (naming, allowed),
        "prompt_claim_loss": (naming, named, 3),
        "prompt_claim_loss of all patches": (naming, named, 12),
        "prompt_claim_loss of no prompt": (naming, named & False, 3),
    }


# XLA for what it may not know: sorting, sizes that depend on others.
@pytest.mark.parametrize(
    ("case", "way"),
    [
        *((case, "graph") for case in cases()),
        ("prompt_claim_loss", "xla"),
        ("multi_label_contrastive_loss", "xla"),
        ("patch_naming", "eager"),
    ],
)
def test_both_backends_agree_in_value_and_gradient(case, way):
    """In a graph that knows no size, too."""
    function, arguments = case.split()[0], cases()[case]
    value, gradients = Losses("torch").with_gradients(function, *arguments)
    chosen = [i for i, a in enumerate(arguments) if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
    ours, slopes = Losses("tf")._keras(function, arguments, chosen, graph=way != "eager", jit=way == "xla")
    np.testing.assert_allclose(ours, value, atol=EXACT)
    for slope, gradient in zip(slopes, gradients, strict=True):
        np.testing.assert_allclose(slope, gradient, atol=EXACT)


def test_a_vector_of_zeros_has_a_slope(losses):
    """PyTorch's: vectors shorter than 1e-12 are divided by that instead of their length."""
    images, captions = np.random.default_rng(0).standard_normal((2, 3, 4))
    _, (wanted, _) = losses.with_gradients("contrastive_loss", images, captions, 5.0)
    _, (slope, _) = losses.with_gradients("contrastive_loss", images * [[1], [0], [1]], captions, 5.0)
    _, (tiny, _) = losses.with_gradients("contrastive_loss", images * [[1], [1e-14], [1]], captions, 5.0)
    assert abs(slope[1]).max() == pytest.approx(abs(tiny[1]).max(), rel=0.1)  # the small vector has begun to turn
    assert abs(slope[1]).max() > 1e10 * abs(wanted[1]).max()
