"""Everything in groupvit that has one meaning, whatever the framework. Imports neither PyTorch nor TensorFlow."""

import sys

from groupvit_common._exports import exports
from groupvit_common._moved import MovedModules

__getattr__, __dir__ = exports(__name__, __file__)

sys.meta_path.append(MovedModules())
