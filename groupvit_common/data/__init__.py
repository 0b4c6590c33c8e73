"""Training data for both backends: image-caption pairs from files, and synthetic scenes from a seed."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
