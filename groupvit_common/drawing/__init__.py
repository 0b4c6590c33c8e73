"""Arrays in, images out: palettes and a canvas. Knows no result."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
