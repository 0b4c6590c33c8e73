"""Everything in groupvit that has one meaning, whatever the framework. Imports neither PyTorch nor TensorFlow."""

import sys

import lazy_loader

from groupvit_common._moved import MovedModules

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

sys.meta_path.append(MovedModules())
