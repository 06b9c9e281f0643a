"""FlexRec: post-train LLMs as recommenders, with a reward for every ranked item.

What stands here, functions of tensors and of rankings, needs no model and no trainer, and is loaded when used. The
rooms around it: ``flexrec.data`` and ``flexrec.task`` make examples, ``flexrec.trainer`` trains, ``flexrec.decoding``
ranks and constrains anybody's ``generate``, ``flexrec.evaluation`` compares, ``flexrec.integrations`` is for other
trainers and engines.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
