"""How good a critic is: its error, its likelihood, and how often its intervals hold what they say they hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexrec.data.lists import RankingList
from flexrec.task.critic import Critic

LEVELS = (0.5, 0.8, 0.95)
ALL_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
BINS = 10


def critic_quality(critic: Critic, lists: Sequence[RankingList]) -> dict[str, float]:
    """Measures of a critic's predictions against the expected interest where that is known, else against the feedback.

    Args:
        lists: of users who are not in the critic's log, as a rule.

    Returns:
        "rmse"; "bias", mean prediction minus mean interest; "nll", the mean negative log-likelihood of the normal
        distributions of the predicted means and variances; "coverage@50" and so on, the share of interests inside of
        ``Critic.interval`` of that level, in per cent; "pairs", how many were compared. Without anything to compare
        with, "pairs" alone.

    Example:
        >>> from flexrec.data import simulate
        >>> from flexrec.evaluation import critic_quality
        >>> from flexrec.task import Critic
        >>> data = simulate(num_users=60, num_items=120, num_topics=4, num_test_users=2, num_candidates=6)
        >>> critic = Critic.fit(data.log, data.catalogue, lists=data.train, noise=data.noise)
        >>> critic_quality(critic, data.test)["pairs"]
        36
    """
    interest = np.concatenate([lst.known_interest for lst in lists])
    known = ~np.isnan(interest)
    quality: dict[str, float] = {"pairs": int(known.sum())}
    if not known.any():
        return quality
    mean, variance = (np.concatenate(parts)[known] for parts in zip(*critic.predict_many(lists), strict=True))
    error = mean - interest[known]
    quality["rmse"] = float(np.sqrt(np.square(error).mean()))
    quality["bias"] = float(error.mean())
    quality["nll"] = float(0.5 * (np.log(2 * np.pi * variance) + np.square(error) / variance).mean())
    for level in LEVELS:
        quality[f"coverage@{100 * level:g}"] = 100 * _coverage(critic, lists, interest, level)
    return {name: round(value, 4) for name, value in quality.items()}


def critic_reliability(critic: Critic, lists: Sequence[RankingList]) -> dict[str, list[dict[str, float]]]:
    """What a reliability plot is drawn of, against the same interest as :func:`critic_quality`.

    Returns:
        "intervals": a "level" and the share "inside" of intervals of that level; "bins": of the predictions from the
        lowest tenth to the highest, mean "predicted" and mean "interest", and how many "pairs". Without anything to
        compare with, both are empty.

    Example:
        >>> from flexrec.data import simulate
        >>> from flexrec.evaluation.critic import critic_reliability
        >>> from flexrec.task import Critic
        >>> data = simulate(num_users=60, num_items=120, num_topics=4, num_test_users=2, num_candidates=6)
        >>> critic = Critic.fit(data.log, data.catalogue, lists=data.train, noise=data.noise)
        >>> [point["level"] for point in critic_reliability(critic, data.test)["intervals"]][-2:]
        [0.9, 0.95]
    """
    interest = np.concatenate([lst.known_interest for lst in lists])
    known = np.flatnonzero(~np.isnan(interest))
    if not len(known):
        return {"intervals": [], "bins": []}
    predicted = np.concatenate([mean for mean, _ in critic.predict_many(lists)])
    tenths = np.array_split(known[np.argsort(predicted[known], kind="stable")], min(BINS, len(known)))
    return {
        "intervals": [
            {"level": level, "inside": round(_coverage(critic, lists, interest, level), 4)} for level in ALL_LEVELS
        ],
        "bins": [
            {
                "predicted": round(float(predicted[pairs].mean()), 4),
                "interest": round(float(interest[pairs].mean()), 4),
                "pairs": len(pairs),
            }
            for pairs in tenths
        ],
    }


def _coverage(critic: Critic, lists: Sequence[RankingList], interest: np.ndarray, level: float) -> float:
    """The share of known interests inside of the critic's intervals of a level."""
    known = ~np.isnan(interest)
    low, high = (np.concatenate(ends)[known] for ends in zip(*critic.interval_many(lists, level), strict=True))
    return float(((low <= interest[known]) & (interest[known] <= high)).mean())
