"""Programs of towers for eager calls: what was called a few times runs as a graph from then on.

TensorFlow dispatches an eager call operation by operation, and Keras prepares each layer's call: that takes several
times as long as the arithmetic of one image. A call of a tower in evaluation, with known values, is therefore traced
once it has been seen a few times, as `keras.Model.predict` traces its own, and gives the same numbers but for the
rounding of float32.

Everything else is computed eagerly: training, calls under a gradient tape, a strategy or
`tf.config.run_functions_eagerly(True)`, float64, which is for proofs, and towers with layers or `call`s that are not
from here or Keras, whose Python code may do anything. Whatever changes in a layer discards its programs; values of
variables are no part of them.
"""

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras.src.backend.common.stateless_scope import in_stateless_scope

Tensor = Any

# Tracing takes as long as a few eager calls.
CALLS_BEFORE_TRACING = 2
# Of a tower: one for each size of images and each combination of flags. Any number of images, and any texts, share one.
MOST_PROGRAMS = 8

_ATTRIBUTE = "_programs"
_BY_XLA = "_by_xla"
# Keras's private attributes that a call reads; the rest is bookkeeping, and changes with calls.
_OWN = {"_dtype_policy", "_embeddings", "_is_quantized", "_kernel"}


def call_tower(tower: Any, *tensors: Tensor | None, training: bool | None = None, **options: Any) -> Any:
    """Returns what the tower returns: `tower(*tensors, training=training, **options)`."""
    if _traceable(tower, tensors, training, options):
        program = _programs_of(tower).find(tower, tensors, options)
        if program is not None:
            return program(*tensors)
    return tower(*tensors, training=training, **options)


def compile_by_xla(tower: Any) -> None:
    """Has a tower's programs compiled by XLA, each for every number of images that comes."""
    # Keras would track what is set.
    vars(tower)[_BY_XLA] = True


def is_by_xla(tower: Any) -> bool:
    return _BY_XLA in vars(tower)


def _traceable(tower: Any, tensors: tuple[Any, ...], training: bool | None, options: dict[str, Any]) -> bool:
    """Returns whether a graph would do just what the eager call does."""
    if training or keras.backend.backend() != "tensorflow" or tower.compute_dtype == "float64":
        return False
    import tensorflow as tf
    from tensorflow.python.eager import record  # has no public name

    if not tf.executing_eagerly() or tf.config.functions_run_eagerly() or in_stateless_scope():
        return False
    if record.could_possibly_record() or tf.distribute.has_strategy():
        return False
    if not all(value is None or isinstance(value, bool | int | float) for value in options.values()):
        return False
    return all(x is None or (_is_known(x) and 0 not in x.shape) for x in tensors)


def _is_known(x: Any) -> bool:
    """Returns whether these are values of now, of a type that TensorFlow takes as it is."""
    import tensorflow as tf

    return x.dtype.isnative if isinstance(x, np.ndarray) else isinstance(x, tf.Tensor) and hasattr(x, "numpy")


class _Programs:
    """The programs of one tower, the one used last at the end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: list[Any] = []
        self._calls: OrderedDict[Any, int] = OrderedDict()
        self._programs: OrderedDict[Any, Callable[..., Any]] = OrderedDict()

    def __reduce__(self) -> Any:
        # Copies of a model trace their own.
        return _Programs, ()

    def find(self, tower: Any, tensors: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Any] | None:
        """Returns the program for such a call; None until it has been seen a few times, and where there is none."""
        state = _state(tower)
        if state is None:
            return None
        specs = tuple(_spec(tensor) for tensor in tensors)
        key = (specs, tuple(sorted(options.items())))
        with self._lock:
            if len(state) != len(self._state) or not all(map(operator.is_, state, self._state)):
                self._state = state
                self._calls.clear()
                self._programs.clear()
            if key not in self._programs:
                calls = self._calls.pop(key, 0)
                if calls < CALLS_BEFORE_TRACING:
                    self._calls[key] = calls + 1
                    _keep_last(self._calls)
                    return None
                self._programs[key] = _program(tower, specs, options)
                _keep_last(self._programs)
            self._programs.move_to_end(key)
            return self._programs[key]


def _programs_of(tower: Any) -> _Programs:
    found = vars(tower).get(_ATTRIBUTE)
    if found is None:
        found = vars(tower).setdefault(_ATTRIBUTE, _Programs())  # Keras would track what is set
    assert isinstance(found, _Programs)
    return found


def _keep_last(entries: OrderedDict[Any, Any]) -> None:
    while len(entries) > MOST_PROGRAMS:
        entries.popitem(last=False)


def _spec(tensor: Any) -> tuple[tuple[int | None, ...], str] | None:
    """Returns shape and dtype for a program: the sides of images are known, all else is open."""
    if tensor is None:
        return None
    shape = tuple(tensor.shape)
    return (None, *shape[1:]) if len(shape) == 4 else (None,) * len(shape), str(
        keras.backend.standardize_dtype(tensor.dtype)
    )


def _program(tower: Any, specs: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Any]:
    import tensorflow as tf

    def program(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return tower(*(None if spec is None else next(given) for spec in specs), training=False, **options)

    present = [tf.TensorSpec(*spec) for spec in specs if spec is not None]
    # Concrete at once: TensorFlow would count the traces of all towers' programs as those of one function, and warn.
    compiled = is_by_xla(tower) or None
    traced = tf.function(program, autograph=False, jit_compile=compiled).get_concrete_function(*present)
    return lambda *tensors: traced(*(tf.convert_to_tensor(tensor) for tensor in tensors if tensor is not None))


def _state(tower: Any) -> list[Any] | None:
    """Returns all that a trace may depend on, to be compared by identity: the settings and variables of all layers, and
    the values in the configuration. None: a layer is, or was given, somebody else's code."""
    state: list[Any] = [*vars(tower.config).values()]
    for layer in tower._flatten_layers():
        attributes, call = vars(layer), type(layer).call
        if "call" in attributes or not (_ours(type(layer)) and _ours(call)):
            return None
        state += [layer, call, *(value for name, value in attributes.items() if name[0] != "_" or name in _OWN)]
    return state


def _ours(code: Any) -> bool:
    return code.__module__.partition(".")[0] in ("groupvit_tf", "keras")
