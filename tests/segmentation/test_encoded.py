"""Images that the model has seen before their labels are known: `Segmenter.encode`, `with_labels` and embeddings."""

import importlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from groupvit_common.errors import InputError
from groupvit_common.preprocessing.processor import GroupViTProcessor
from groupvit_common.preprocessing.prompts import Label
from groupvit_common.segmentation.encoded import EncodedImage
from groupvit_common.segmentation.label_encoder import KnownLabels
from tests.segmentation.test_segmenter import BATCHED, LABELS, OTHER, picture, same
from tests.support.backends import BACKENDS
from tests.support.checkpoints import random_checkpoint

pytestmark = pytest.mark.usefixtures("shared_traces")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("encoded") / "model", 11, (12, 6))


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def made(request, checkpoint):
    """Makes segmenters over one model."""
    backend = BACKENDS[request.param]()
    model, processor = backend.load(checkpoint), GroupViTProcessor.from_pretrained(checkpoint)
    segmenter = importlib.import_module(f"groupvit_{backend.name}.predictor").Segmenter
    return lambda **options: segmenter(model, processor, **{"labels": LABELS, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"assignment": "soft", "background": 0.2},
        {"background_labels": "couch", "top_k": 2, "temperature": 2.0},
        {"window": 16, "stride": 8, "assignment": "soft"},
        {"window": 64},
        {"flip": True, "scales": (0.5, 1), "refine": 2, "synonyms": "max", "foreground": 0.6, "background": 0.1},
    ],
    ids=["hard", "soft", "words", "windows", "small", "views"],
)
def test_an_encoded_image_is_segmented_as_the_image(made, options):
    segmenter = made(**options)
    encoded = segmenter.encode(picture())
    result, plain = segmenter(encoded), segmenter(picture())
    same(result, plain)
    np.testing.assert_allclose(result.group_scores, plain.group_scores, atol=BATCHED)
    assert (result.image.size, result.group_labels) == ((60, 40), plain.group_labels)
    details, expected = segmenter.details(encoded), segmenter.details(picture())
    for one, other in zip(details.group_maps, expected.group_maps, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(details.similarity, expected.similarity, atol=BATCHED)
    assert segmenter.classify(encoded) == segmenter.classify(picture())
    maps = zip(segmenter.threshold_maps(encoded, [0.3]), segmenter.threshold_maps(picture(), [0.3]), strict=True)
    assert all((one == other).all() for one, other in maps)


def test_many_images_are_encoded_together_and_keep_no_more_than_their_own(made):
    segmenter = made()
    images = [picture(0), picture(1, (40, 60)), picture(2)]
    every = segmenter.encode(images)
    for one, image in zip(segmenter(every), images, strict=True):
        same(one, segmenter(image))
    first = every[0]
    assert isinstance(first, EncodedImage)
    assert first.group_counts == (12, 6)
    arrays = [first.views[0].group_embeds, first.views[0].image_embeds, *first.views[0].block_maps]
    assert all(array.base is None for array in arrays)
    assert first.nbytes == 4 * 60 * 40 + first.pixels.nbytes + sum(array.nbytes for array in arrays)


def test_other_labels_and_options_over_the_same_model(made):
    base = made()
    encoded = base.encode(picture())
    other = base.with_labels(OTHER, "cat", assignment="soft", background=0.1)
    same(other(encoded), made(labels=OTHER, background_labels="cat", assignment="soft", background=0.1)(picture()))
    assert [label.name for label in base.labels] == ["cat", "couch", "remote control"]
    same(base(encoded), base(picture()))
    assert (other.model, other.assignment, base.assignment) == (base.model, "soft", "hard")


def test_segmenters_over_one_model_remember_the_same_labels(made, monkeypatch):
    base, texts = made(), []
    embed = base._encode_labels._embed_texts
    monkeypatch.setattr(base, "_embed_texts", lambda tokens: texts.extend(tokens["input_ids"]) or embed(tokens))
    base.options = base.options
    base.with_labels(["dog", "cat"])
    assert len(texts) == 1
    base.with_labels(["cat", "dog"], background=0.5).set_labels("dog")
    base.with_labels("dog", temperature=2.0)
    assert len(texts) == 1
    other = base.with_labels("dog", templates=["{}"])
    assert len(texts) == 2
    assert not np.allclose(other._label_set.embeds, base.with_labels("dog")._label_set.embeds)


def test_what_is_remembered_is_bounded(made):
    base = made()
    known = base.known_labels = KnownLabels(4000)
    base.options = base.options
    names = [f"label {number}" for number in range(40)]
    whole = base.with_labels(names)._label_set.embeds
    assert 0 < len(known) < 20
    assert 0 < known.nbytes <= 4000
    np.testing.assert_allclose(base.with_labels(names)._label_set.embeds, whole, atol=BATCHED)
    assert known.nbytes <= 4000


def test_requests_in_several_threads(made):
    base = made()
    images, sets = [picture(0), picture(1)], [["cat"], OTHER]
    encoded = base.encode(images)
    expected = [[base.with_labels(labels)(image) for labels in sets] for image in images]
    jobs = [(index, number) for _ in range(3) for index in range(2) for number in range(2)]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda job: base.with_labels(sets[job[1]])(encoded[job[0]]), jobs)
        for (index, number), result in zip(jobs, results, strict=True):
            same(result, expected[index][number])


def test_what_does_not_fit(made):
    base = made()
    encoded = base.encode(picture())
    with pytest.raises(InputError, match="encoded with flip=False, the segmenter has True: encode the image again"):
        base.with_labels("cat", flip=True)(encoded)
    with pytest.raises(InputError, match="encoded with window=None"):
        base.with_labels("cat", window=16).details(encoded)
    with pytest.raises(InputError, match="no segmentation option 'colour'"):
        base.with_labels("cat", colour=1)
    with pytest.raises(InputError, match="there are no labels"):
        made(labels=None)(encoded)
    other = EncodedImage(encoded.loaded, encoded.pixels, encoded.views, encoded.preparation, None)
    with pytest.raises(InputError, match="another model's"):
        base(other)
    with pytest.raises(InputError, match="at least one"):
        base.with_labels("")


def test_embeddings_have_length_1_and_compare_as_classify_does(made):
    base = made(labels=["cat", "dog"])
    images = base.embed_images([picture(0), picture(1), base.encode(picture(0))])
    texts = base.embed_texts(["a photo of a cat.", "a photo of a dog."])
    for each in (images, texts):
        np.testing.assert_allclose(np.linalg.norm(each, axis=1), 1, atol=BATCHED)
    np.testing.assert_allclose(images[2], images[0], atol=BATCHED)
    np.testing.assert_allclose(texts, base._label_set.embeds, atol=BATCHED)
    assert base._label_set.labels == (Label("cat"), Label("dog"))
    scaled = np.exp(base.model.logit_scale.detach().numpy() if hasattr(base.model.logit_scale, "detach")
                    else np.asarray(base.model.logit_scale)) * images @ texts.T  # fmt: skip
    expected = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(base.probabilities([picture(0), picture(1)]), expected[:2], atol=10 * BATCHED)
    assert base.embed_images([]).shape == base.embed_texts([]).shape == (0, images.shape[1])
    for bad in ("cat", ["cat", 1]):
        with pytest.raises(InputError, match="texts must be a list of texts"):
            base.embed_texts(bad)
