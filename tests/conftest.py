import gc
import os

import numpy as np
import pytest
from hypothesis import settings

from groupvit_common.model.config import GroupViTConfig
from tests.support.backends import BACKENDS, Backend
from tests.support.models import tiny_config, tiny_inputs

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


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]()


@pytest.fixture(name="tiny_config")
def _tiny_config() -> GroupViTConfig:
    return tiny_config()


@pytest.fixture(name="tiny_inputs")
def _tiny_inputs() -> dict[str, np.ndarray]:
    return tiny_inputs()
