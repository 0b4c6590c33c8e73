"""The model without a framework: configurations, parameters, outputs, checks, loading and saving."""

from groupvit_common._exports import exports

__getattr__, __dir__ = exports(__name__, __file__)
