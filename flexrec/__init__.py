"""FlexRec: post-train LLMs as recommenders, with a reward for every ranked item.

The functions of tensors below need no model and no trainer. The ranking task around them is in the rooms
``flexrec.data``, ``task``, ``policy``, ``decoding``, ``trainer``, ``evaluation`` and ``experiment``;
``flexrec.decoding.RankingLogitsProcessor`` constrains anybody's ``generate``. A name is loaded when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
