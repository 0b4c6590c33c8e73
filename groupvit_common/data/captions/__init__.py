"""Image-caption pairs from shards, tables and folders, as a stream of batches that can be resumed."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
