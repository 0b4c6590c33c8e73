"""Arrays in, images out: palettes and a canvas. Knows no result."""

from groupvit_common._exports import exports

__getattr__, __dir__ = exports(__name__, __file__)
