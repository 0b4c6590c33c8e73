"""Checkpoint directories and the hub: what a checkpoint is on disk, without any model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
