"""`groupvit serve`: a page to click and an API to call, over HTTP."""

from groupvit_common._exports import exports

__getattr__, __dir__ = exports(__name__, __file__)
