"""From scores to label maps: options, scores, windows, refinement, results, the predictor, figures."""

from groupvit_common._exports import exports

__getattr__, __dir__ = exports(__name__, __file__)
