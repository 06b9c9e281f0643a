"""FlexRec: post-train LLMs as recommenders, with a reward for every ranked item.

The functions of tensors below need no model and no trainer. The ranking task around them is in the modules
``flexrec.data``, ``needs``, ``prompts``, ``rollout``, ``critic``, ``evaluation``, ``baselines`` and ``trainer``;
``flexrec.decoding.logits_processor`` constrains anybody's ``generate``.
"""

from flexrec.advantages import item_advantages
from flexrec.checks import set_value_checks
from flexrec.evaluation.statistics import Comparison, bootstrap_interval, rank_metrics, relative_change
from flexrec.losses import policy_loss
from flexrec.metrics import ranking_metric, register_metric
from flexrec.ops.all_actions import AllActions, all_actions_objective
from flexrec.ops.ranking_logprobs import (
    RankingLogprobs,
    RankingLogprobsWithKL,
    ranking_kl,
    ranking_logprobs,
    ranking_logprobs_with_kl,
    ranking_probs,
)
from flexrec.ops.restricted_logprobs import restricted_kl, restricted_logprobs, restricted_logprobs_with_kl
from flexrec.ops.swap_rewards import swap_rewards, swap_scores
from flexrec.rankings import (
    CandidateTries,
    EncodedRankings,
    ParsedRankings,
    RankingState,
    encode_rankings,
    inverse_permutation,
    parse_rankings,
    validate_rankings,
)
from flexrec.uncertainty import swap_rewards_with_variance, uncertainty_weights

__version__ = "0.1.0"

__all__ = [
    "AllActions",
    "CandidateTries",
    "Comparison",
    "EncodedRankings",
    "ParsedRankings",
    "RankingLogprobs",
    "RankingLogprobsWithKL",
    "RankingState",
    "all_actions_objective",
    "bootstrap_interval",
    "encode_rankings",
    "inverse_permutation",
    "item_advantages",
    "parse_rankings",
    "policy_loss",
    "rank_metrics",
    "ranking_kl",
    "ranking_logprobs",
    "ranking_logprobs_with_kl",
    "ranking_metric",
    "ranking_probs",
    "register_metric",
    "relative_change",
    "restricted_kl",
    "restricted_logprobs",
    "restricted_logprobs_with_kl",
    "set_value_checks",
    "swap_rewards",
    "swap_rewards_with_variance",
    "swap_scores",
    "uncertainty_weights",
    "validate_rankings",
]
