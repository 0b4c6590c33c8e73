"""Results in the formats of other tools: COCO, supervision, FiftyOne, Label Studio. docs/adapters.md describes each."""

from groupvit_common._exports import exports

__getattr__, __dir__ = exports(__name__, __file__)
