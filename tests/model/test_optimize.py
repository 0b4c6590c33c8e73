"""`optimize`: what is chosen for which machine, and models that compute nearly the same."""

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from groupvit_common.errors import InputError
from groupvit_common.model import optimization
from groupvit_common.model.optimization import (
    OptimizationReport,
    check_difference,
    check_request,
    choose_dtype,
    largest_difference,
    optimization_request,
)
from groupvit_common.model.parameters import manifest
from tests.support.backends import Backend
from tests.support.models import smallest_config

AMX = frozenset({"avx2", "avx512_bf16", "amx_bf16"})
ZEN5 = frozenset({"avx2", "avx512_bf16"})
NONE = frozenset({"avx2"})
# bfloat16 has eight bits; the smallest model's few layers add up some of its rounding.
BFLOAT16 = 0.05


@pytest.mark.parametrize(
    ("wanted", "device", "flags", "dtype", "reason"),
    [
        ("auto", "cpu", AMX, "bfloat16", "this CPU has AMX"),
        ("auto", "cpu", ZEN5, "bfloat16", "this CPU has AVX512-BF16"),
        ("auto", "cpu", NONE, "float32", "no instructions for bfloat16"),
        ("bfloat16", "cpu", NONE, "bfloat16", "slower than float32"),
        ("bfloat16", "cpu", AMX, "bfloat16", "has AMX"),
        ("float16", "cpu", AMX, "float16", "slower than float32"),
        ("float32", "cpu", AMX, "float32", "as requested"),
        ("auto", "cuda", NONE, "bfloat16", "on cuda"),
        ("auto", "mps", NONE, "float16", "on mps"),
        ("float16", "cuda", NONE, "float16", "as requested"),
    ],
)
def test_the_dtype_is_that_of_the_machine(wanted, device, flags, dtype, reason):
    choice = choose_dtype(wanted, device, flags=flags)
    assert choice.dtype == dtype
    assert reason in choice.reason


def test_a_library_or_device_without_bfloat16_is_not_asked_for_it():
    assert choose_dtype("auto", "cpu", has_bfloat16=False, flags=AMX).dtype == "float32"
    assert choose_dtype("auto", "cuda", has_bfloat16=False).dtype == "float16"


@pytest.mark.parametrize(
    ("dtype", "quantize", "device", "message"),
    [
        ("int4", None, "cpu", "dtype must be one of auto, float32"),
        ("auto", "int4", "cpu", "quantize must be None or 'int8'"),
        ("bfloat16", "int8", "cpu", "leave dtype='bfloat16' out"),
        ("auto", "int8", "cuda", "is for CPUs"),
    ],
)
def test_what_cannot_be_done_is_refused(dtype, quantize, device, message):
    with pytest.raises(InputError, match=message):
        check_request(dtype, quantize, device)


def test_a_users_words_become_a_request():
    assert optimization_request("bfloat16", fast=False) is None
    assert optimization_request("int8", fast=False) == {"quantize": "int8"}
    assert optimization_request(None, fast=True) == {"dtype": "auto"}
    assert optimization_request("half", fast=True) == {"dtype": "float16"}


def test_differences_are_relative_and_nan_is_beyond_any_bound():
    one = np.array([1.0, -4.0])
    assert largest_difference([one, one], [one, one + np.array([0.0, 0.2])]) == pytest.approx(0.05)
    broken = largest_difference([one], [one * np.nan])
    with pytest.raises(InputError, match="more than the bound"):
        check_difference(broken, 1e9, "int8")


def test_a_report_says_what_why_and_the_cost():
    plain = OptimizationReport("float32", None, False, "this CPU has none", None, 0.1)
    assert str(plain) == "float32 (this CPU has none): as without optimization"
    measured = OptimizationReport("float32", "int8", True, "why", 0.0123, 1.25)
    assert str(measured).startswith("int8, compiled (why): features differ by up to 1.2% of the largest, measured")
    assert "1 to 4%" in str(OptimizationReport("bfloat16", None, False, "why", None, 0.0))


def module(backend: Backend) -> ModuleType:
    return importlib.import_module(f"groupvit_{backend.name}.optimize")


@cache
def made(backend: Backend) -> Any:
    """A model with weights that differ enough for its groups to be no near ties."""
    generator = np.random.default_rng(5)
    weights = {
        parameter.name: np.abs(values) if parameter.name.endswith("running_var") else values
        for parameter in manifest(smallest_config()).values()
        for values in [generator.normal(0, 0.3, parameter.shape).astype(np.float32)]
        if parameter.kind != "counter"
    }
    counters = {
        p.name: np.zeros(p.shape, np.int64) for p in manifest(smallest_config()).values() if p.kind == "counter"
    }
    weights["logit_scale"] = np.float32(2.3).reshape(())
    return backend.build(smallest_config(), weights | counters)


def test_bfloat16_where_the_cpu_has_it(backend, monkeypatch):
    monkeypatch.setattr(optimization, "cpu_flags", lambda: AMX)
    model, kind = made(backend), module(backend)
    before = backend.weights(model)
    fast, report = kind.optimize(model, verify=True)
    assert (report.dtype, report.quantize, report.compiled) == ("bfloat16", None, False)
    assert "bfloat16" in str(fast.dtype)
    assert 0 < report.difference < BFLOAT16
    after = backend.weights(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert set(backend.weights(fast)) == set(before)


def test_float32_stays_where_nothing_is_faster(backend, monkeypatch):
    monkeypatch.setattr(optimization, "cpu_flags", lambda: NONE)
    model, kind = made(backend), module(backend)
    fast, report = kind.optimize(model)
    assert report.is_plain
    for plain, same in zip(kind.features(model), kind.features(fast), strict=True):
        # Sums depend on where a tensor begins in memory.
        np.testing.assert_allclose(plain, same, rtol=1e-5, atol=1e-6)


def test_features_beyond_the_bound_are_refused(backend):
    with pytest.raises(InputError, match="bfloat16 changes this model's features by up to"):
        module(backend).optimize(made(backend), dtype="bfloat16", verify=True, bound=1e-6)


def test_only_models_are_optimized(backend):
    with pytest.raises(InputError, match=r"optimize takes a model of groupvit_\w+, got str"):
        module(backend).optimize("demo")
