"""Image-caption pairs from shards, tables and folders, as a stream of batches that can be resumed."""

from groupvit_common._exports import exports

__getattr__, __dir__ = exports(__name__, __file__)
