"""Published sets, protocols, metrics, and reports of their results."""

from groupvit_common._exports import exports

__getattr__, __dir__ = exports(__name__, __file__)
