"""The Keras package on JAX, in a process of its own in which neither TensorFlow nor PyTorch can be imported.

`python -m tests.groupvit_tf.test_jax DIRECTORY PART` is that process. `make test-jax` also runs the tests of all
backends with JAX.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.model.test_parity import FLOAT32, FLOAT64, assert_close, expected, flat, inputs
from tests.support.backends import TF, Torch, _numpy
from tests.support.models import smallest_config, smallest_inputs
from tests.support.paths import REFERENCE, ROOT

Arrays = dict[str, np.ndarray]

CASE = "legacy_eos"
FLAGS = {"output_attentions": True, "output_hidden_states": True, "output_segmentation": True}
# Three training steps in float64, whose batch norm over four rows enlarges rounding (seen: 1.2e-10).
STEPS = 1e-8

needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason='JAX is not installed: "groupvit[jax]"')


def noise() -> list[np.ndarray]:
    return [np.random.default_rng(5).gumbel(size=(4, 4, 4))]


def run(part: str, directory: Path, **environment: str) -> dict[str, Any]:
    """Returns the process's output; it leaves arrays in the directory."""
    command = [sys.executable, "-m", "tests.groupvit_tf.test_jax", str(directory), part]
    root = str(ROOT)
    # Nearly all of the time goes into compiling, which is quicker without optimisations.
    jax = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = {**os.environ, **jax, "PYTHONPATH": root, **environment}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=directory)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stderr == ""  # nothing on the terminal that a user did not ask for
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def arrays(path: Path) -> Arrays:
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture(scope="module")
def torch_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights that PyTorch made, and what PyTorch answers."""
    torch = pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("jax")
    torch.manual_seed(0)
    backend = Torch()
    model = backend.build(smallest_config())
    model.save_pretrained(directory)
    np.savez(directory / "torch.npz", **flat(backend.call(model, **smallest_inputs(), **FLAGS)))

    model = model.double().train()
    given = backend._tensors(model, {**smallest_inputs(), "gumbel_noise": noise()})
    loss = model(**given, return_loss=True).loss
    loss.backward()
    gradients = {f"gradient {name}": parameter.grad.numpy() for name, parameter in model.named_parameters()}
    buffers = {f"after {name}": buffer.numpy() for name, buffer in model.named_buffers()}
    np.savez(directory / "torch_step.npz", loss=loss.detach().numpy(), **gradients, **buffers)
    return directory


@pytest.fixture(scope="module")
def quick(torch_directory: Path) -> dict[str, Any]:
    return run("quick", torch_directory)


@needs_jax
def test_outputs_equal_the_reference(quick: dict[str, Any], torch_directory: Path) -> None:
    reference = expected(CASE)
    for dtype, suffix, tolerance in (("float32", "", FLOAT32), ("float64", "_float64", FLOAT64)):
        found = arrays(torch_directory / f"{dtype}.npz")
        wanted = {
            name.removesuffix("_float64"): value
            for name, value in reference.items()
            if name.endswith("_float64") == bool(suffix) and name.removesuffix("_float64") in found
        }
        assert len(wanted) >= 4
        for name, value in wanted.items():
            assert_close(name + suffix, found[name], value, tolerance)


@needs_jax
def test_pytorch_and_jax_are_one_function(quick: dict[str, Any], torch_directory: Path) -> None:
    found, wanted = (arrays(torch_directory / f"{name}.npz") for name in ("jax", "torch"))
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert_close(name, found[name], value, FLOAT32)


@needs_jax
def test_pytorch_and_jax_take_the_same_training_step(quick: dict[str, Any], torch_directory: Path) -> None:
    """In float64, with the noise given: the loss, every gradient, and what batch norm remembers."""
    found, wanted = (arrays(torch_directory / f"{name}_step.npz") for name in ("jax", "torch"))
    assert set(found) == set(wanted)
    largest = max(np.abs(value).max() for name, value in wanted.items() if name.startswith("gradient"))
    for name, value in wanted.items():
        # Some gradients are zero but for rounding.
        limit = FLOAT64 * (largest if name.startswith("gradient") else np.abs(value).max())
        assert np.abs(found[name] - value).max() <= limit, name


@needs_jax
def test_fit_evaluate_and_predict(quick: dict[str, Any]) -> None:
    assert quick["history"] == ["image_to_text_top1", "loss", "text_to_image_top1"]
    assert quick["steps"] == 30
    assert quick["loss after"] < quick["loss before"] - 0.1
    assert quick["batches counted"] == 30
    assert quick["loss before"] == pytest.approx(quick["loss of a call"], rel=FLOAT32)
    assert quick["prediction"] == "GroupViTModelOutput"
    assert quick["prediction off by"] < FLOAT32


@needs_jax
def test_what_jax_cannot_do_is_said_in_a_sentence(quick: dict[str, Any]) -> None:
    assert quick["errors"] == {
        "float64": "float64 on JAX needs its 64-bit mode: set JAX_ENABLE_X64=1 in the environment, or call "
        "jax.config.update('jax_enable_x64', True), before the model is made",
        "export": "a SavedModel is written by TensorFlow, and Keras runs on jax: save_pretrained, then load and export "
        "with "
        "KERAS_BACKEND=tensorflow",
        "bad ids": "input_ids must lie between 0 and 29, got 77; do the tokenizer and the model belong together?",
        "bad data": "pixel_values is missing: this model needs it",
    }


@needs_jax
@pytest.mark.slow
def test_the_rest_of_what_keras_offers(torch_directory: Path) -> None:
    answer = run("thorough", torch_directory, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert answer["devices"] == 2
    assert answer["files"] == {"model.keras": 0, "model.weights.h5": 0, "save_pretrained": 0}
    assert answer["gradient checkpointing"] < FLOAT64
    assert answer["forms of inputs"] == 0
    assert answer["generator"] == ["image_to_text_top1", "loss", "text_to_image_top1"]
    assert answer["mixed_bfloat16"] == ["float32", True]
    # One batch over two devices is the batch on one.
    assert answer["devices of a variable"] == 2
    assert answer["two devices: loss"] < FLOAT32  # Keras averages losses in float32
    assert answer["two devices: weights"] < STEPS
    assert answer["moved"] > 1e-3


# -- the process --


class Absent:
    """Makes packages impossible to import."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in ("tensorflow", "torch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def save(path: Path, values: Arrays) -> None:
    np.savez(path, **values)


def reference_outputs(backend: TF, dtype: str) -> Arrays:
    """The reference case, compiled as a whole."""
    import jax

    model = backend.load(REFERENCE / "transformers" / CASE, dtype)
    given = inputs(CASE)
    state = [variable.value for variable in model.non_trainable_variables]
    call = jax.jit(lambda parameters: model.stateless_call(parameters, state, **given, **FLAGS)[0])
    return flat(_numpy(call([variable.value for variable in model.trainable_variables])))


def step(backend: TF, directory: Path) -> Arrays:
    """Loss, gradients and batch-norm statistics of a training step in float64."""
    import jax

    model = backend.load(directory, "float64")

    def loss(parameters: list[Any], state: list[Any]) -> Any:
        output, after = model.stateless_call(
            parameters, state, **smallest_inputs(), gumbel_noise=noise(), return_loss=True, training=True
        )
        return output.loss, after

    variables = [[v.value for v in part] for part in (model.trainable_variables, model.non_trainable_variables)]
    (value, after), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(*variables)
    paths = [variable.path for variable in model.trainable_variables]
    named = backend._canonical(model, dict(zip(paths, gradients, strict=True)))
    for variable, new in zip(model.non_trainable_variables, after, strict=True):
        variable.assign(new)
    weights = backend.weights(model)
    return {
        "loss": np.asarray(value),
        **{f"gradient {name}": gradient for name, gradient in named.items()},
        **{f"after {name}": array for name, array in weights.items() if name not in named},
    }


def message(function: Any) -> str:
    from groupvit_common.errors import InputError

    try:
        function()
    except InputError as error:
        return str(error)
    return "no error"


def quick_checks(directory: Path) -> dict[str, Any]:
    import jax
    import keras

    from groupvit_tf import GroupViTModel

    given, answer = smallest_inputs(), {}
    # First as JAX starts, without 64-bit numbers.
    backend = object.__new__(TF)
    save(directory / "float32.npz", reference_outputs(backend, "float32"))
    model = backend.load(directory)
    save(directory / "jax.npz", flat(backend.call(model, **given, **FLAGS)))
    answer["errors"] = {
        "float64": message(lambda: GroupViTModel(smallest_config(), dtype="float64")),
        "export": message(lambda: model.export(directory / "saved_model")),
        "bad ids": message(lambda: model(**{**given, "input_ids": given["input_ids"] * 0 + 77})),
        "bad data": message(lambda: model.fit({"input_ids": given["input_ids"]})),
    }
    prediction = model.predict(given, batch_size=4, verbose=0)
    answer["prediction"] = type(prediction).__name__
    called = backend.call(model, **given, return_loss=True)
    answer["prediction off by"] = float(np.abs(prediction.logits_per_image - called.logits_per_image).max())
    answer["loss of a call"] = float(called.loss)

    keras.utils.set_random_seed(0)
    model.compile(keras.optimizers.SGD(0.05))
    answer["loss before"] = model.evaluate(given, batch_size=4, verbose=0, return_dict=True)["loss"]
    history = model.fit(given, batch_size=4, epochs=30, verbose=0).history
    answer["history"], answer["steps"] = sorted(history), int(model.optimizer.iterations)
    answer["loss after"] = model.evaluate(given, batch_size=4, verbose=0, return_dict=True)["loss"]
    answer["batches counted"] = int(backend.weights(model)["visual_projection.1.num_batches_tracked"])

    jax.config.update("jax_enable_x64", True)
    save(directory / "float64.npz", reference_outputs(backend, "float64"))
    save(directory / "jax_step.npz", step(backend, directory))
    return answer


def thorough_checks(directory: Path) -> dict[str, Any]:
    import jax
    import keras

    from groupvit_tf import GroupViTModel

    backend, given, answer = object.__new__(TF), smallest_inputs(), {}
    keras.utils.set_random_seed(0)
    model = backend.load(directory)
    wanted = backend.call(model, **given).logits_per_image

    def off(other: Any) -> float:
        return float(np.abs(backend.call(other, **given).logits_per_image - wanted).max())

    model.save(directory / "model.keras")
    model.save_weights(directory / "model.weights.h5")
    model.save_pretrained(directory / "copy")
    weights = GroupViTModel(smallest_config())
    weights.load_weights(directory / "model.weights.h5")
    copies = (keras.saving.load_model(directory / "model.keras"), weights, backend.load(directory / "copy"))
    answer["files"] = dict(zip(("model.keras", "model.weights.h5", "save_pretrained"), map(off, copies), strict=True))

    ids, pixels, mask = (given[name] for name in ("input_ids", "pixel_values", "attention_mask"))
    forms = [
        model(given),
        model([ids, pixels, mask]),
        model(pixels, input_ids=ids, attention_mask=mask),
        model({name: jax.numpy.asarray(value) for name, value in given.items()}),
        model(ids.astype(np.int32), pixels.astype(np.float64), mask.tolist()),
    ]
    answer["forms of inputs"] = max(float(np.abs(form.logits_per_image - wanted).max()) for form in forms)

    # A generator of dictionaries, and gradient checkpointing within it.
    model.gradient_checkpointing_enable()
    model.compile("sgd")
    answer["generator"] = sorted(model.fit((given for _ in range(3)), steps_per_epoch=2, verbose=0).history)

    half = GroupViTModel(smallest_config(), dtype="mixed_bfloat16")
    half.compile("adamw")
    losses = half.fit(given, batch_size=4, epochs=2, verbose=0).history["loss"]
    answer["mixed_bfloat16"] = [half.logit_scale.dtype, bool(np.isfinite(losses).all())]

    jax.config.update("jax_enable_x64", True)
    answer["devices"] = len(jax.devices())
    results = []
    for distribution in (None, keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"])):
        keras.distribution.set_distribution(distribution)
        trained = without_noise(backend.load(directory, "float64"))
        trained.compile(keras.optimizers.SGD(0.05))
        loss = trained.fit(given, batch_size=4, epochs=3, shuffle=False, verbose=0).history["loss"]
        answer["devices of a variable"] = len(trained.logit_scale.value.devices())
        results.append((np.array(loss), backend.weights(trained)))
    keras.distribution.set_distribution(None)
    (alone, one), (together, two) = results
    answer["two devices: loss"] = float(np.abs(together / alone - 1).max())
    answer["two devices: weights"] = max(
        float(np.abs(two[name] - one[name]).max() / max(np.abs(one[name]).max(), 1e-2)) for name in one
    )
    start = backend.weights(model)
    answer["moved"] = max(float(np.abs(one[name] - start[name]).max()) for name in one if "num_batches" not in name)

    plain = step(backend, directory)
    enabled, load = GroupViTModel.gradient_checkpointing_enable, TF.load

    def saving(self: TF, *args: Any) -> Any:
        model = load(self, *args)
        enabled(model)
        return model

    TF.load = saving  # type: ignore[method-assign]
    answer["gradient checkpointing"] = max(
        float(np.abs(value - plain[name]).max()) for name, value in step(backend, directory).items()
    )
    return answer


def without_noise(model: Any) -> Any:
    """The model, drawing no noise in training: two devices would not draw what one draws."""
    call = model.vision_model.call
    model.vision_model.call = lambda *args, **kwargs: call(*args, **{**kwargs, "gumbel_noise": [np.zeros((1, 1, 1))]})
    return model


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent())  # type: ignore[arg-type]
    checks = {"quick": quick_checks, "thorough": thorough_checks}
    print(json.dumps(checks[sys.argv[2]](Path(sys.argv[1]))))
