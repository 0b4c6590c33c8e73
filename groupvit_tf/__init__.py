"""GroupViT in Keras 3, under the names of transformers' TensorFlow GroupViT, with and without their `TF` prefix.

Code written for transformers runs after changing `from transformers import ...` to `from groupvit_tf import ...`.
The names are in `__init__.pyi`.
"""

import os

from groupvit_common._exports import exports
from groupvit_common.model.checks import check_keras_backend
from groupvit_common.tensorflow_logging import tensorflow_start_up

with tensorflow_start_up():
    # Before Keras, which would first import a backend that need not be there.
    check_keras_backend(os.environ.get("KERAS_BACKEND") or "tensorflow")
    import keras

    check_keras_backend(keras.backend.backend())
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Searches for GPUs now, so that a missing one is not reported in the middle of a user's work.
        tf.config.list_physical_devices()

__getattr__, __dir__ = exports(__name__, __file__)

# Keras finds classes in its files that are registered.
import groupvit_tf.model  # noqa: E402, F401
