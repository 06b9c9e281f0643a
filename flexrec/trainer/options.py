"""What reinforcement is configured with, said once: the trainer's arguments, the command line and the run's folder are
made from it. Nothing heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from flexrec.checks import check_options, option
from flexrec.decoding.options import MODES
from flexrec.metrics import BASELINES, CREDITS, IMPORTANCE_LEVELS, OF_TOPICS, SCALES, parse_metric

CORRECTED = "all_actions_corrected"
OF_ALL_ACTIONS = ("all_actions", CORRECTED)
TRAINER_CREDITS = (*OF_ALL_ACTIONS, *CREDITS)


@dataclass
class TrainerOptions:
    """Options of :class:`flexrec.trainer.FlexRecTrainer`; names as in TRL's ``GRPOConfig``.

    Raises:
        ValueError: an option outside of its choices or its range, or options that contradict each other.
    """

    credit: str = option("all_actions", "how the metric's value is credited to ranked items", choices=TRAINER_CREDITS)
    tilt: float | None = option(
        None,
        "of all_actions: exponential utility with this temperature, in metric units; default: the expected value",
        above=0,
    )
    metric: str = option("ndcg", "the metric to maximise; ranks beyond its cutoff are not trained")
    num_generations: int = option(1, "rankings sampled per prompt", low=1, metavar="G")
    num_iterations: int = option(1, "updates made with the same rankings", low=1)
    num_ranked: int | None = option(
        None, "rank only the best T candidates; default: up to the metric's cutoff, or all", low=1, metavar="T"
    )
    temperature: float = option(1.0, "of the policy, in sampling and in log-probs", above=0)
    baseline: str = option("none", "what rewards are compared with", choices=BASELINES)
    scale: str = option("batch", "what advantages are divided by", choices=SCALES)
    uncertainty: str = option(
        "none", "weight rewards by their certainty, per rollout or item", choices=("none", "rollout", "item")
    )
    shuffle_weights: bool = option(
        False, "the control of --uncertainty: its weights, each given to another rollout or item by chance"
    )
    pessimism: float = option(
        0.0, "take so many standard deviations off the gains, which stay at least 0", low=0, metavar="KAPPA"
    )
    sample_gains: bool = option(
        False, "draw gains from what is known of them anew at every step, instead of their mean"
    )
    epsilon_low: float = option(0.2, "lower clip range of the importance ratio", low=0)
    epsilon_high: float | None = option(None, "upper clip range; default: as the lower", low=0)
    importance_level: str = option("item", "importance ratios per item, token or sequence", choices=IMPORTANCE_LEVELS)
    beta: float = option(
        0.0, "weight of the exact KL to the policy that reinforcement starts from (paper: 0.01)", low=0
    )
    entropy_coef: float = option(0.005, "weight of the entropy bonus (paper: 0.005)", low=0)
    mode: str = option(
        "decode",
        "decode a ranking item by item, or draw all of it from the distribution of its first item, in one pass over "
        "the prompt",
        choices=MODES,
    )
    share_prompts: bool = option(
        True, "train on the rankings of one prompt in rows that hold it once, where the model allows it"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.metric.partition("@")[0].partition(".")[0] in OF_TOPICS:
            raise ValueError(
                f"metric={self.metric!r} values a list by its topics, which are those of a need: train a need that has "
                f"this metric, such as diverse, and give the metric of all other needs, such as 'ndcg@10'"
            )
        if self.mode == "one-pass" and self.importance_level == "token":
            raise ValueError("mode='one-pass' spells no tokens: it takes importance_level='item' or 'sequence'")
        if self.shuffle_weights and self.uncertainty == "none":
            raise ValueError("shuffle_weights shuffles the weights of uncertainty='rollout' or 'item', got 'none'")
        if self.baseline == "rank" and self.num_generations == 1:
            raise ValueError("baseline='rank' compares the rollouts of one prompt: it needs num_generations > 1")
        if self.credit == CORRECTED:
            if self.num_iterations > 1 or self.tilt is not None:
                raise ValueError(
                    f"credit={CORRECTED!r} is the gradient of the expected value where rankings were sampled: it takes "
                    f"num_iterations=1 and no tilt, got num_iterations={self.num_iterations}, tilt={self.tilt}"
                )
            check_sum_over_items(self.metric)
        if self.credit in OF_ALL_ACTIONS and (self.baseline != "none" or self.scale not in ("batch", "none")):
            raise ValueError(
                f"credit={self.credit!r} is its own baseline: it takes baseline='none' and scale='batch' or 'none', "
                f"got baseline={self.baseline!r}, scale={self.scale!r}"
            )


def check_sum_over_items(metric: str) -> None:
    """Raise a ValueError if the corrected all-actions credit is not of ``metric``."""
    if (definition := parse_metric(metric).definition).form != "linear":
        raise ValueError(
            f"credit={CORRECTED!r} needs a metric that is a sum over items, such as ndcg@10 or recall@5, got "
            f"{metric!r}, whose form is {definition.form}"
        )
