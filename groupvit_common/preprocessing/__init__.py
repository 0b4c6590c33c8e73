"""Text and images before the model: tokenizer, image processor, image files, labels and prompts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
