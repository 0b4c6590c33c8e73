"""Training without a framework: recipes, schedules, runs, checkpoints, logs."""

from groupvit_common._exports import exports

__getattr__, __dir__ = exports(__name__, __file__)
