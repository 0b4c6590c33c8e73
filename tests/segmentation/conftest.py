"""Models and their traces that tests share."""

import importlib
from collections import Counter
from functools import lru_cache

import pytest


@pytest.fixture(scope="module")
def shared_traces():
    """In Keras segmenters of one model share what was traced: a trace takes as long as many calls, and tests make many
    segmenters."""
    predictor = importlib.import_module("groupvit_tf.predictor")
    ready, shared = predictor.Segmenter._ready, {}

    def ready_with_traces(segmenter, model):
        ready(segmenter, model)
        # The model is kept, so that no other has its id.
        _, segmenter._calls, segmenter._traced = shared.setdefault(id(model), (model, Counter(), {}))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor.Segmenter, "_ready", ready_with_traces)
        yield


@lru_cache
def segmenter_with_demo(name, dtype="float32"):
    """A backend's segmenter with the bundled model."""
    return importlib.import_module(f"groupvit_{name}.predictor").Segmenter.from_pretrained(
        "demo", device="cpu", dtype=dtype
    )


@pytest.fixture(scope="session")
def demo():
    """Makes segmenters of the bundled model, which is loaded once: backend, options -> segmenter."""

    def made(name, dtype="float32", **options):
        base = segmenter_with_demo(name, dtype)
        return type(base)(base.model, base.processor, **options)

    return made
