"""GroupViT in PyTorch, under the names of transformers' GroupViT.

Code written for transformers runs after changing `from transformers import ...` to `from groupvit_torch import ...`.
The names are in `__init__.pyi`; PyTorch is imported with the first that needs it.
"""

from groupvit_common._exports import exports

__getattr__, __dir__ = exports(__name__, __file__)
