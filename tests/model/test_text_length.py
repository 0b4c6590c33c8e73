"""Texts are computed on the columns that pooled states depend on, and these are those of all columns."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest

from groupvit_common.errors import InputError
from groupvit_common.model.config import LEGACY_EOS_TOKEN_ID
from groupvit_common.model.text_length import needed_length, sees_whole_texts
from tests.support.backends import BACKENDS, Backend
from tests.support.models import smallest_config

END, T = 29, 12
# float64 rounding: sums over other numbers of columns.
FLOAT64 = 1e-12

Arrays = dict[str, np.ndarray]


@cache
def made(backend: type[Backend], eos: int = END) -> Any:
    config = smallest_config()
    config.text_config.eos_token_id = eos
    return backend().build(config, dtype="float64")


def texts(*lengths: int, end: int = END) -> np.ndarray:
    """Texts of so many tokens, their end included, padded with the end token."""
    ids = np.random.default_rng(3).integers(3, 27, (len(lengths), T))
    for row, length in enumerate(lengths):
        ids[row, length - 1 :] = end
    return ids


def mask(*spans: tuple[int, int]) -> np.ndarray:
    """1 from the first to the second column of each text, the second excluded."""
    return np.array([[int(first <= column < last) for column in range(T)] for first, last in spans])


def holes(*columns: int) -> np.ndarray:
    full = mask((0, 4), (0, 6))
    full[:, columns] = 0
    return full


LEGACY = texts(4, 6, end=LEGACY_EOS_TOKEN_ID)
LEGACY[:, 5] = 28

# Name -> inputs, and how many columns are needed.
FORMS: dict[str, tuple[Arrays, int]] = {
    "no-mask": ({"input_ids": texts(4, 6)}, 6),
    "integers": ({"input_ids": texts(4, 6), "attention_mask": mask((0, 4), (0, 6))}, 6),
    "booleans": ({"input_ids": texts(4, 6), "attention_mask": mask((0, 4), (0, 6)) == 1}, 6),
    "floats": ({"input_ids": texts(4, 6), "attention_mask": mask((0, 4), (0, 6)) * 0.5}, 6),
    "all-ones": ({"input_ids": texts(4, 6), "attention_mask": mask((0, T), (0, T))}, 6),
    "holes": ({"input_ids": texts(4, 6), "attention_mask": holes(0, 2)}, 6),
    "hidden-ends": ({"input_ids": texts(4, 6), "attention_mask": mask((0, 3), (0, 5))}, 6),
    "tight": ({"input_ids": texts(4, T), "attention_mask": mask((0, 4), (0, T))}, T),
    "one-token": ({"input_ids": texts(1, 1)[:, :1]}, 1),
    "only-ends": ({"input_ids": texts(1, 1), "attention_mask": mask((0, 1), (0, 1))}, 1),
    "no-end": ({"input_ids": texts(T + 1, T + 1), "attention_mask": mask((0, 4), (0, 6))}, 1),
    "left-padding": ({"input_ids": texts(T, T), "attention_mask": mask((5, T), (2, T))}, T),
    # Pooled at padding, which may attend to nothing before it: then what comes later is not without influence.
    "left-padding-with-ends": ({"input_ids": texts(1, 1), "attention_mask": mask((2, 8), (3, 9))}, 9),
    "nothing-attended": ({"input_ids": texts(4, 6), "attention_mask": mask((0, 0), (0, 6))}, 6),
    "nothing-before-the-end": ({"input_ids": texts(4, 3), "attention_mask": mask((4, 7), (0, 3))}, 7),
    "positions": (
        {
            "input_ids": texts(4, 6),
            "attention_mask": mask((0, 4), (0, 6)),
            "position_ids": np.stack([np.arange(T)[::-1], np.arange(T) // 2]),
        },
        6,
    ),
    "positions-of-all": ({"input_ids": texts(4, 6), "position_ids": np.arange(T)[None, ::-1].copy()}, 6),
    "legacy": ({"input_ids": LEGACY, "attention_mask": mask((0, 6), (0, 6))}, 6),
    "legacy-no-mask": ({"input_ids": LEGACY}, 6),
}

# Of Keras's full model, whose eager calls are dear: those that reach another branch of it. The text tower alone
# computes all forms in both backends, and PyTorch's full model too.
KERAS_FORMS = (
    "no-mask", "integers", "booleans", "one-token", "left-padding-with-ends", "nothing-attended", "positions",
    "legacy-no-mask",
)  # fmt: skip


@pytest.fixture
def lengths(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The numbers of columns that the layers of a tower see, call by call."""
    module = f"groupvit_{backend.name}.text"
    bias = __import__(module, fromlist=["_attention_bias"])._attention_bias
    seen: list[int | None] = []

    def spy(x: Any, attention_mask: Any) -> Any:
        seen.append(x.shape[1])
        return bias(x, attention_mask)

    monkeypatch.setattr(f"{module}._attention_bias", spy)
    return seen


@pytest.mark.parametrize("form", FORMS)
def test_features_are_those_of_all_columns(backend: Backend, lengths: list[int | None], form: str) -> None:
    inputs, needed = FORMS[form]
    model = made(type(backend), LEGACY_EOS_TOKEN_ID if "legacy" in form else END)
    features = backend.features(model, "text", **inputs)
    whole = backend.features(model, "text", **inputs, return_dict=True)
    np.testing.assert_allclose(features, whole["pooler_output"], atol=FLOAT64, rtol=0)
    all_columns = inputs["input_ids"].shape[1]
    assert whole["last_hidden_state"].shape[1] == all_columns
    # JAX compiles for each length: it gets steps of 16.
    assert lengths == [all_columns if on_jax(backend) else needed, all_columns]


def on_jax(backend: Backend) -> bool:
    if backend.name != "tf":
        return False
    import keras

    return bool(keras.backend.backend() == "jax")


@pytest.mark.parametrize("form", ["integers", "left-padding-with-ends", "positions", "legacy"])
def test_gradients_are_those_of_all_columns(backend: Backend, lengths: list[int | None], form: str) -> None:
    inputs, needed = FORMS[form]
    model = made(type(backend), LEGACY_EOS_TOKEN_ID if form == "legacy" else END)
    if on_jax(backend):
        pytest.skip("gradients are computed in programs of fixed shapes")
    trimmed, whole = (gradients(backend, model, inputs, return_dict) for return_dict in (None, True))
    assert lengths == [needed, T]
    assert any(np.abs(gradient).max() > 0.01 for gradient in trimmed.values())
    assert_same_gradients(trimmed, whole)


def assert_same_gradients(some: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Rounding in units of the largest: one near 0 is what is left of a sum of large terms."""
    assert some.keys() == others.keys()
    largest = max(np.abs(np.asarray(gradient)).max() for gradient in others.values())
    for name, gradient in some.items():
        np.testing.assert_allclose(gradient, others[name], atol=FLOAT64 * max(1, largest), rtol=0, err_msg=name)


def gradients(backend: Backend, model: Any, inputs: Arrays, return_dict: bool | None) -> Arrays:
    """Of a weighted sum of the features, by the names of the parameters that have one."""
    weights = np.random.default_rng(5).standard_normal((2, 6))

    def total(tensors: dict[str, Any], weights: Any) -> Any:
        found = model.get_text_features(**tensors, return_dict=return_dict)
        return ((found.pooler_output if return_dict else found) * weights).sum()

    if backend.name == "torch":
        import torch

        model.zero_grad()
        total({name: torch.from_numpy(value) for name, value in inputs.items()}, torch.from_numpy(weights)).backward()
        return {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}
    import tensorflow as tf

    with tf.GradientTape() as tape:
        found = model.get_text_features(**inputs, return_dict=return_dict)
        loss = tf.reduce_sum((found.pooler_output if return_dict else found) * weights)
    every = zip(model.trainable_variables, tape.gradient(loss, model.trainable_variables), strict=True)
    return {v.path: tf.convert_to_tensor(g).numpy() for v, g in every if g is not None}


def test_what_is_cut_is_checked_all_the_same(backend: Backend) -> None:
    model = made(type(backend))
    ids = texts(4, 6)
    ids[0, -1] = 30
    for wrong, message in [(ids, "between 0 and 29, got 30"), (np.full((2, 13), END), "1 to 12 tokens, got 13")]:
        with pytest.raises(InputError, match=message):
            backend.features(model, "text", input_ids=wrong)
    with pytest.raises(InputError, match="attention_mask must have the shape"):
        backend.features(model, "text", input_ids=texts(4, 6), attention_mask=mask((0, 6), (0, 6))[:, :9])


PIXELS = np.random.default_rng(6).standard_normal((2, 3, 16, 16))


def test_records_have_all_columns_as_computed_where_they_are_requested(
    backend: Backend, lengths: list[int | None]
) -> None:
    """Their states are those of transformers, padding included."""
    model = made(type(backend))
    for flag in ("output_attentions", "output_hidden_states"):
        out = backend.call(model, input_ids=texts(4, 6), pixel_values=PIXELS, **{flag: True}).text_model_output
        assert out.last_hidden_state.shape == (2, T, 8)
        assert np.abs(out.last_hidden_state).min(axis=-1).all()
    assert lengths == [T, T]


@pytest.mark.parametrize(
    ("backend", "form"),
    [(name, form) for name in sorted(BACKENDS) for form in (KERAS_FORMS if name == "tf" else FORMS)],
    indirect=["backend"],
)
def test_the_full_model_compares_as_with_all_columns(backend: Backend, lengths: list[int | None], form: str) -> None:
    inputs, needed = FORMS[form]
    model = made(type(backend), LEGACY_EOS_TOKEN_ID if "legacy" in form else END)
    inputs = {**inputs, "pixel_values": PIXELS}
    cut = backend.call(model, **inputs, return_loss=True, output_segmentation=True)
    whole = backend.call(
        model, **inputs, return_loss=True, output_segmentation=True, output_attentions=True, output_hidden_states=True
    )
    all_columns = inputs["input_ids"].shape[1]
    assert lengths == [needed, all_columns]
    for name in ("loss", "logits_per_text", "logits_per_image", "text_embeds", "image_embeds", "segmentation_logits"):
        np.testing.assert_allclose(cut[name], whole[name], atol=FLOAT64, rtol=0, err_msg=name)
    one, other = cut.text_model_output, whole.text_model_output
    assert list(one) == ["last_hidden_state", "pooler_output", "attentions"]
    np.testing.assert_allclose(one.pooler_output, other.pooler_output, atol=FLOAT64, rtol=0)
    # Of every text's columns, those that its pooled state depends on; the other texts' may be zeros.
    known = np.arange(all_columns) < needed
    np.testing.assert_allclose(
        one.last_hidden_state, np.where(known[:, None], other.last_hidden_state, 0), atol=FLOAT64, rtol=0
    )
    for some, every in zip(one.attentions, other.attentions, strict=True):
        assert some.shape == every.shape
        # A text that attends to nothing spreads over all columns, also those that were cut.
        sees = (every[..., needed:].sum(axis=-1) < FLOAT64)[..., None] & known[:, None] & known
        np.testing.assert_allclose(np.where(sees, some, 0), np.where(sees, every, 0), atol=FLOAT64, rtol=0)
        assert not some[..., needed:].any()
        assert not some[:, :, needed:].any()


@pytest.mark.parametrize("form", ["integers", "left-padding-with-ends", "positions", "legacy"])
def test_gradients_of_the_loss_are_those_of_all_columns(
    backend: Backend, lengths: list[int | None], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_jax(backend):
        pytest.skip("gradients are computed in programs of fixed shapes")
    inputs, needed = FORMS[form]
    model = made(type(backend), LEGACY_EOS_TOKEN_ID if form == "legacy" else END)
    given = {**inputs, "pixel_values": PIXELS}
    loss, gradients = backend.loss_and_gradients(model, **given)
    monkeypatch.setattr(f"groupvit_{backend.name}.model.without_padding", lambda config, *texts: texts)
    whole_loss, whole = backend.loss_and_gradients(model, **given)
    assert lengths == [needed, T]
    assert abs(loss - whole_loss) < FLOAT64
    assert_same_gradients(gradients, whole)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_lengths_do_not_depend_on_values_where_they_must_not() -> None:
    import torch

    from groupvit_torch.text import without_padding
    from tests.support.backends import Torch

    model = made(Torch)
    short, long = (torch.from_numpy(texts(4, length)) for length in (3, 9))

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.model.get_text_features(input_ids)

    features = Features()
    with torch.no_grad():
        traced = torch.jit.trace(features, (short,))
        torch.testing.assert_close(traced(long), features(long), atol=FLOAT64, rtol=0)
        compiled = torch.compile(features, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(short), features(short), atol=FLOAT64, rtol=0)
    shapes = short.to("meta")
    assert without_padding(model.config.text_config, shapes)[0] is shapes


def test_a_graph_of_tensorflow_is_traced_once_for_all_lengths(lengths: list[int | None], backend: Backend) -> None:
    if backend.name != "tf" or on_jax(backend):
        pytest.skip("graphs of TensorFlow")
    import tensorflow as tf

    model = made(type(backend))
    graph = tf.function(model.get_text_features)
    for length in (3, 9):
        ids = tf.constant(texts(4, length))
        np.testing.assert_allclose(graph(ids), backend.features(model, "text", input_ids=ids), atol=FLOAT64, rtol=0)
    # The graph's length is open.
    assert lengths == [None, 4, 9]
    assert graph.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("xla", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_graphs_of_the_full_model_have_the_gradients_of_all_columns(
    lengths: list[int | None], backend: Backend, xla: bool
) -> None:
    if backend.name != "tf" or on_jax(backend):
        pytest.skip("graphs of TensorFlow")
    import tensorflow as tf

    model = made(type(backend))

    def step(input_ids: Any, attention_mask: Any, all_columns: bool = False) -> Any:
        with tf.GradientTape() as tape:
            out = model(input_ids, PIXELS, attention_mask, return_loss=True, output_hidden_states=all_columns)
        return out, [tf.convert_to_tensor(g) for g in tape.gradient(out.loss, model.trainable_variables)]

    graph = tf.function(step, jit_compile=xla)
    for form in ("integers", "left-padding", "left-padding-with-ends"):
        inputs, needed = FORMS[form]
        out, gradients = graph(**inputs)
        whole, whole_gradients = step(**inputs, all_columns=True)
        paths = [variable.path for variable in model.trainable_variables]
        states, all_states = (record.text_model_output.last_hidden_state.numpy() for record in (out, whole))
        known = (np.arange(T) < needed)[:, None]
        np.testing.assert_allclose(states, np.where(known, all_states, 0), atol=FLOAT64, rtol=0, err_msg=form)
        np.testing.assert_allclose(out.logits_per_text, whole.logits_per_text, atol=FLOAT64, rtol=0, err_msg=form)
        assert_same_gradients(*(dict(zip(paths, of, strict=True)) for of in (gradients, whole_gradients)))
    assert lengths.count(None) == graph.experimental_get_tracing_count()


@pytest.mark.parametrize("xla", [False, True])
def test_graphs_have_the_features_of_all_columns(lengths: list[int | None], backend: Backend, xla: bool) -> None:
    if backend.name != "tf" or on_jax(backend):
        pytest.skip("graphs of TensorFlow")
    import tensorflow as tf

    model = made(type(backend))
    graph = tf.function(lambda ids, mask: model.get_text_features(ids, mask), jit_compile=xla)
    forms = ("integers", "left-padding-with-ends", "holes", "tight", "left-padding", "nothing-before-the-end")
    for form in forms[:2] if xla else forms:  # XLA compiles a program for each
        inputs = FORMS[form][0]
        whole = backend.features(model, "text", **inputs, return_dict=True)["pooler_output"]
        features = graph(inputs["input_ids"], inputs["attention_mask"])
        np.testing.assert_allclose(features, whole, atol=FLOAT64, rtol=0, err_msg=form)
    assert lengths.count(None) == graph.experimental_get_tracing_count()


def test_needed_length_of_every_text() -> None:
    """Against the definition, text by text, on all masks of four columns and all places of the end."""
    bits = (np.arange(16)[:, None] >> np.arange(4)) & 1 == 1
    for place in range(5):
        ids = np.full((1, 4), 5)
        ids[0, place:] = END
        pooled = place % 4 if place < 4 else 0
        for attended in bits:
            later = [column for column in range(4) if attended[column]]
            wanted = pooled if attended[: pooled + 1].any() else max([pooled, *later])
            assert needed_length(ids, attended[None], END) == wanted + 1
            assert sees_whole_texts(ids, attended[None], END) == attended[: pooled + 1].all()


@pytest.mark.parametrize(
    ("form", "for_records", "for_features"),
    [("all-ones", None, None), ("integers", "kept", None), ("hidden-ends", "kept", "kept"), ("no-mask", None, None)],
)
def test_a_mask_that_masks_nothing_is_left_out(form: str, for_records: str | None, for_features: str | None) -> None:
    import torch

    from groupvit_torch.text import without_padding

    inputs = {name: torch.from_numpy(array) for name, array in FORMS[form][0].items()}
    config = smallest_config().text_config
    for only_pooled, wanted in ((False, for_records), (True, for_features)):
        found = without_padding(config, **inputs, only_pooled=only_pooled)[1]
        assert (found is None) == (wanted is None)


def test_keras_fits_and_evaluates_without_padding(
    lengths: list[int | None], backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend.name != "tf" or on_jax(backend):
        pytest.skip("fit is Keras's, and its work on JAX is out of sight")
    monkeypatch.setattr("groupvit_tf.model.TOKEN_STEP", 4)
    model = made(type(backend))
    state = [variable.numpy() for variable in model.variables]
    inputs = {"input_ids": texts(4, 6), "attention_mask": mask((0, 4), (0, 6)), "pixel_values": PIXELS}
    model.compile(run_eagerly=True)
    loss = model.evaluate(inputs, verbose=0)[0]
    # Keras means losses in float32.
    assert loss == pytest.approx(float(backend.call(model, **inputs, return_loss=True).loss), abs=1e-6)
    model.fit(inputs, verbose=0, validation_data=inputs)
    states = model.predict(inputs, verbose=0).text_model_output.last_hidden_state
    assert states.shape == (2, T, 8)
    assert not states[:, 6:].any()
    # The data is cut in steps of four, and each batch to what it needs.
    assert model._without_padding(inputs)["input_ids"].shape == (2, 8)
    assert lengths == [6] * 5
    for variable, value in zip(model.variables, state, strict=True):
        variable.assign(value)
