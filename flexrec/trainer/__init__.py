"""Training: what the stages share, supervision, reinforcement, and what a person sees of it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
