"""A model and small sets that the tests of evaluations share."""

import importlib
from functools import cache

import numpy as np
import pytest
from PIL import Image

from tests.support.checkpoints import random_checkpoint
from tests.support.evaluation import SIZES, WORDS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("evaluation") / "model", seed=1)


@pytest.fixture(scope="session")
def bases(checkpoint):
    """Returns the segmenter of a backend, given its name."""

    @cache
    def base(backend):
        module = importlib.import_module(f"groupvit_{backend}.predictor")
        return module.Segmenter.from_pretrained(checkpoint, device="cpu")

    return base


@pytest.fixture(scope="session")
def torch_base(bases):
    return bases("torch")


@pytest.fixture(scope="session")
def demo():
    """The bundled model in PyTorch."""
    return importlib.import_module("groupvit_torch").Segmenter.from_pretrained("demo", device="cpu")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A set of six images with blocks of colour; class 4 is nowhere, and some pixels are ignored."""
    root = tmp_path_factory.mktemp("sets") / "folder"
    rng = np.random.default_rng(6)
    for number, size in enumerate(SIZES):
        image = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)[: size[0], : size[1]]
        mask = np.kron(rng.choice([0, 1, 2, 3, 255], (4, 4)), np.ones((16, 16))).astype(np.uint8)[: size[0], : size[1]]
        for kind, array in (("images", image), ("masks", mask)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / kind / f"{number}.png")
    (root / "classes.txt").write_text("\n".join(WORDS))
    return root


@pytest.fixture(scope="session")
def classes(tmp_path_factory):
    """Four folders of images; two classes share a word."""
    root = tmp_path_factory.mktemp("classification") / "set"
    rng = np.random.default_rng(8)
    for number in range(12):
        path = root / "val" / f"n0000000{number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((12, 12, 1))).astype(np.uint8)).save(path)
    (root / "classes.txt").write_text("cat\ncouch, sofa\ncat\ndog\n")
    return root
