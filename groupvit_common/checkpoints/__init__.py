"""Checkpoint directories and the hub: what a checkpoint is on disk, without any model."""

from groupvit_common._exports import exports

__getattr__, __dir__ = exports(__name__, __file__)
