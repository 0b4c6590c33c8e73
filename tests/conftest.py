import gc
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings

from groupvit_common.model.config import GroupViTConfig
from tests.support.backends import BACKENDS, Backend
from tests.support.models import tiny_config, tiny_inputs

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.support.browser import Pages

# The same examples in every run: a change is judged by what it changes. HYPOTHESIS_PROFILE=default draws others.
settings.register_profile("same", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


# What is made until all tests are known stays until the end: the garbage collector would find nothing.
gc.disable()


def pytest_collection_finish() -> None:
    """Spares the garbage collector what two frameworks and all tests have made, and lets it look for what tests leave
    once in many objects: a graph is made of tens of thousands that all stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()
    rewrite_graphs(False)


def rewrite_graphs(rewrite: bool) -> None:
    """Whether TensorFlow rewrites graphs for speed before their first run (Grappler): half of what it costs to start
    one, and most graphs of tests run once."""
    if "tensorflow" in sys.modules:
        options = {"disable_meta_optimizer": not rewrite}
        sys.modules["tensorflow"].config.optimizer.set_experimental_options(options)


@pytest.fixture
def rewritten_graphs() -> Iterator[None]:
    """As in a user's process: for tests of what graphs compute, or of how many there are."""
    rewrite_graphs(True)
    yield
    rewrite_graphs(False)


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]()


@pytest.fixture(name="tiny_config")
def _tiny_config() -> GroupViTConfig:
    return tiny_config()


@pytest.fixture(name="tiny_inputs")
def _tiny_inputs() -> dict[str, np.ndarray]:
    return tiny_inputs()


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    """Headless Chromium; without one the test is skipped."""
    from tests.support.browser import launched

    with launched() as browser:
        yield browser


@pytest.fixture
def pages(chromium: "Browser") -> Iterator["Pages"]:
    """Pages in Chromium, `pages.open(url)`: a test fails by what goes wrong in them."""
    from tests.support.browser import Pages

    opened = Pages(chromium)
    yield opened
    opened.close()
