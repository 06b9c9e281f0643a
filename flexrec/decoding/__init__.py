"""Rankings out of a model: sampled, searched for, or out of anybody's generate."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
