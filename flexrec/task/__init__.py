"""The ranking task: needs in words, prompts, the critic that fills in feedback, examples to train and evaluate on."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
