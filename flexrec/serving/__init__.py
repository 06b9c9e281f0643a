"""A finished run that answers: requests in Python, over HTTP, and on a page."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
