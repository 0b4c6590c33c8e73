"""Training data for both backends: image-caption pairs from files, and synthetic scenes from a seed."""

from groupvit_common._exports import exports

__getattr__, __dir__ = exports(__name__, __file__)
