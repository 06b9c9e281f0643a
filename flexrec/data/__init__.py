"""Data of the ranking task: catalogue, log and lists; a simulator of them, and loaders of data of all kinds."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
