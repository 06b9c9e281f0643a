"""The reward file of OpenRLHF: copy it, set the options, and pass it as ``--reward.remote_url /path/to/reward.py``.

The label of a prompt (``--data.label_key label``) is the ground truth of its list, which examples/verl/prepare.py
writes with ``--format openrlhf``. Needs nothing but FlexRec; docs/openrlhf.md has a whole command.
"""

from flexrec.integrations.openrlhf import MetricReward

reward_func = MetricReward(metric="ndcg", separator=" > ")
