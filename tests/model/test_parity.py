"""Every array that transformers answered for the reference cases is answered alike."""

from functools import cache, lru_cache
from typing import Any

import numpy as np
import pytest

from groupvit_common.model.outputs import GroupViTModelOutput
from tests.support.backends import Backend
from tests.support.paths import REFERENCE

CASES = sorted(path.name for path in (REFERENCE / "transformers").iterdir())

# Largest difference over the array's largest value. float32 has 7 digits; the two programs sum in different orders
# through up to 12 matrix products, and the worst array seen was off by 3e-6. Gradients pass twice as many (seen:
# 1.4e-5).
FLOAT32 = 1e-5
GRADIENT = 1e-4
# The float64 references were computed from the same float32 weights: only rounding at 1e-16 remains (seen: 4e-15).
FLOAT64 = 1e-10


@lru_cache
def expected(case: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "transformers" / case / "expected.npz") as archive:
        return {name: archive[name] for name in archive.files}


def inputs(case: str) -> dict[str, np.ndarray]:
    return {name: expected(case)[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def assert_close(name: str, actual: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    assert actual.shape == wanted.shape, name
    difference = np.abs(actual - wanted).max()
    assert difference <= tolerance * np.abs(wanted).max(), f"{name}: off by {difference:.2e}"


@cache
def loaded(backend: type[Backend], case: str, dtype: str = "float32") -> Any:
    """The model of a case, for tests that leave its values as they are."""
    return backend().load(REFERENCE / "transformers" / case, dtype)


def flat(output: GroupViTModelOutput) -> dict[str, np.ndarray]:
    """The arrays of a full output under the reference's names."""
    arrays = {name: output[name] for name in output if not name.endswith("_model_output")}
    for tower in ("text", "vision"):
        record = output[f"{tower}_model_output"]
        arrays |= {f"{tower}_{name}": record[name] for name in ("last_hidden_state", "pooler_output")}
        for name in ("hidden_states", "attentions"):
            arrays |= {f"{tower}_{name}_{index}": value for index, value in enumerate(record[name])}
    return arrays


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_outputs_equal_the_reference(backend: Backend, case: str, dtype: str) -> None:
    model = loaded(type(backend), case, dtype)
    given, reference = inputs(case), expected(case)
    output = backend.call(model, **given, output_attentions=True, output_hidden_states=True, output_segmentation=True)
    actual = flat(output)
    actual["text_features"] = backend.features(
        model, "text", input_ids=given["input_ids"], attention_mask=given["attention_mask"]
    )
    actual["text_features_no_mask"] = backend.features(model, "text", input_ids=given["input_ids"])
    actual["image_features"] = backend.features(model, "image", pixel_values=given["pixel_values"])

    suffix, tolerance = ("_float64", FLOAT64) if dtype == "float64" else ("", FLOAT32)
    wanted = {
        name.removesuffix("_float64"): array
        for name, array in reference.items()
        if name.endswith("_float64") == (dtype == "float64") and not name.startswith(("grad.", "loss", *given))
    }
    assert len(wanted) >= 4
    for name, array in wanted.items():
        assert_close(name + suffix, actual[name], array, tolerance)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_reference(backend: Backend, case: str) -> None:
    reference = expected(case)
    pairs = min(len(reference["input_ids"]), len(reference["pixel_values"]))
    model = loaded(type(backend), case)
    loss, gradients = backend.loss_and_gradients(model, **{name: array[:pairs] for name, array in inputs(case).items()})
    assert loss == pytest.approx(reference["loss"].item(), rel=FLOAT32)
    wanted = {name.removeprefix("grad."): array for name, array in reference.items() if name.startswith("grad.")}
    assert wanted
    for name, array in wanted.items():
        assert_close(name, gradients[name], array, GRADIENT)
