"""From scores to label maps: options, scores, windows, refinement, results, the predictor, figures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
