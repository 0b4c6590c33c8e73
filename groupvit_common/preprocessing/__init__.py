"""Text and images before the model: tokenizer, image processor, image files, labels and prompts."""

from groupvit_common._exports import exports

__getattr__, __dir__ = exports(__name__, __file__)
