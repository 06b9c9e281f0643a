"""Needs: what a user asks of a ranking, in words for the model and as a gain for the reward.

A need turns the interest in each candidate into the gain that the metrics of ``flexrec.metrics`` take. All needs here
have the form

    gain = interest x factor,    factor in [0, 1] known exactly from the list,

so that Var[gain] = factor^2 Var[interest] holds exactly. A need of one's own is a ``Need`` constructed with a name,
some wordings and gains such as ``InterestTimes(factor)``; nothing has to be registered. Needs are mixed by
:mod:`flexrec.task.mixtures`, written without Python by :mod:`flexrec.task.own_needs`, and scored by whoever can score
by :mod:`flexrec.task.judge`.

A need that names a ``metric`` is about the list as a whole: what an item earns depends on what stands above it, so
that no gain of the item alone says it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from flexrec.checks import check_choice, did_you_mean
from flexrec.data.lists import Catalogue, RankingList
from flexrec.metrics import OF_TOPICS

# (list, catalogue, interest (K,), its variance (K,)) -> gain (K,) float32, its variance (K,) float32
GainFunction: TypeAlias = Callable[
    [RankingList, Catalogue, np.ndarray, np.ndarray],
    tuple[np.ndarray, np.ndarray],
]

# (list, catalogue) -> factor (K,) >= 0
FactorFunction: TypeAlias = Callable[[RankingList, Catalogue], np.ndarray]

# A topic is new where less than this share of the shown history has it: the fewer, the newer.
RARE_TOPIC_SHARE = 0.15


@dataclass(frozen=True)
class InterestTimes:
    """The gains of a need whose gain is interest x factor; their variance, factor^2 x that of the interest, is exact.

    Attributes:
        factor: ``factor(lst, catalogue)`` gives (K,) numbers >= 0, by candidate.

    Example:
        >>> from flexrec.task import InterestTimes
        >>> def half(lst, catalogue):
        ...     return np.full(len(lst.candidates), 0.5)
        ...
        >>> InterestTimes(half).factor is half
        True
    """

    factor: FactorFunction

    def __call__(
        self, lst: RankingList, catalogue: Catalogue, interest: np.ndarray, variance: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        check_interest(lst, interest, variance)
        factor = np.asarray(self.factor(lst, catalogue), dtype=np.float32)
        if factor.shape != lst.candidates.shape:
            raise ValueError(f"factor must have shape {lst.candidates.shape}, one per candidate, got {factor.shape}")
        if not np.all((factor >= 0) & np.isfinite(factor)):
            raise ValueError(f"factor must be finite and non-negative, got {factor}")
        return (interest * factor).astype(np.float32), (variance * factor**2).astype(np.float32)


def check_interest(lst: RankingList, interest: np.ndarray, variance: np.ndarray) -> None:
    """Raise a ValueError unless both are (K,), non-negative numbers by candidate."""
    for name, values in (("interest", interest), ("variance", variance)):
        if values.shape != lst.candidates.shape:
            raise ValueError(f"{name} must have shape {lst.candidates.shape}, one per candidate, got {values.shape}")
        if not np.all(values >= 0):  # also false for NaN
            raise ValueError(f"{name} must be non-negative numbers without NaN, got {values}")


@dataclass(frozen=True)
class Need:
    """What is asked of a ranking.

    Attributes:
        name: short, for command lines and tables.
        wordings: instructions to a recommender that all mean this need; training draws one of them for each prompt.
        gains: ``need.gains(lst, catalogue, interest, variance)`` takes the mean interest (K,) in each candidate and
            the variance (K,) of that knowledge, by candidate, and returns the gains (K,) >= 0 and their variance (K,),
            both float32. :class:`InterestTimes` where gains are interest times something.
        phrase: what is wanted, as it stands in the wordings of a mixture after "mostly" or "a little of"; empty: the
            name.
        metric: "alpha_ndcg" or "err_ia" where a ranking is valued as a whole, by the gains and topics of its items,
            with the cutoff of the metric that is trained; None: by that metric.

    Example:
        >>> from flexrec.task import InterestTimes, Need
        >>> def short(lst, catalogue):
        ...     return np.array([len(catalogue.titles[item]) < 12 for item in lst.candidates], dtype=np.float32)
        ...
        >>> Need("short titles", ("I am tired of long names.",), InterestTimes(short)).name
        'short titles'
    """

    name: str
    wordings: tuple[str, ...]
    gains: GainFunction
    phrase: str = ""
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.metric is not None:
            check_choice(f"metric of need {self.name!r}", self.metric, OF_TOPICS)
        if not self.name:
            raise ValueError("name of a need must not be empty")
        if not self.wordings or not all(wording.strip() for wording in self.wordings):
            raise ValueError(f"need {self.name!r} must have at least one wording and none that is empty")

    def offer(self, lst: RankingList, catalogue: Catalogue) -> np.ndarray:
        """(K,) float32: what each candidate is worth to somebody who would like all of them alike, by one half; half of
        the factor, where gains are interest times a factor."""
        half = np.full(len(lst.candidates), 0.5, dtype=np.float32)
        return self.gains(lst, catalogue, half, np.zeros_like(half))[0]

    @property
    def factor(self) -> FactorFunction | None:
        """What interest is multiplied by; None where gains are not of this form."""
        return getattr(self.gains, "factor", None)


def novelty(lst: RankingList, catalogue: Catalogue) -> np.ndarray:
    """(K,) float32 in [0, 1]: how new the topics of each candidate are to the shown history.

    With p(c) the share of the H items of the history that have topic c, and s = ``RARE_TOPIC_SHARE``,

        novelty = mean over the candidate's topics c of max(0, 1 - p(c) / s):

    1 where the history has none of its topics, 0 where every one of them is at least as frequent as s. Of an empty
    history everything is new; an item without topics cannot be said to be new and has novelty 0.
    """
    topics = catalogue.topic_matrix
    share = topics[lst.history].mean(axis=0) if len(lst.history) else np.zeros(topics.shape[1], dtype=np.float32)
    topic_novelty = np.maximum(0.0, 1.0 - share / RARE_TOPIC_SHARE)
    of_candidates = topics[lst.candidates]
    return (of_candidates @ topic_novelty / np.maximum(of_candidates.sum(axis=1), 1.0)).astype(np.float32)


def _everything(lst: RankingList, catalogue: Catalogue) -> np.ndarray:
    return np.ones(len(lst.candidates), dtype=np.float32)


def _rise(lst: RankingList, catalogue: Catalogue) -> np.ndarray:
    return lst.trend


NEEDS: dict[str, Need] = {
    need.name: need
    for need in (
        Need(
            "interest",
            (
                "Rank the candidates by how much this user will enjoy them.",
                "Put what the user is most likely to love at the top.",
                "Order these items so that the ones that match the user's taste best come first.",
                "I just want something I will really like. What should I pick first?",
                "Recommend the items that will interest this user the most.",
                "Sort the list for maximum enjoyment, the surest favourites first.",
            ),
            InterestTimes(_everything),
            phrase="what I will like",
        ),
        Need(
            "explore",
            (
                "Help the user discover new topics: prefer items they will like from areas missing in their history.",
                "I am bored with my usual kind of thing. Show me something different that I would still enjoy.",
                "Rank highest the enjoyable items whose topics the user has rarely or never chosen before.",
                "Broaden this user's horizon with items from unfamiliar topics that suit their taste.",
                "Surprise me with topics I have not explored yet, but keep it to things I would like.",
                "Favour new topics over familiar ones, and among the new ones those with the best chance to please.",
            ),
            InterestTimes(novelty),
            phrase="topics that are new to me",
        ),
        Need(
            "trend",
            (
                "Promote what is trending: prefer items that are rising in popularity and that the user will like.",
                "What is everyone starting to talk about that I would enjoy too?",
                "Rank highest the items that are gaining attention right now and fit this user's taste.",
                "Show me the hottest new favourites, as long as they are my kind of thing.",
                "Put the items on the rise first, among those that would interest this user.",
                "Keep this user up to date with current trends that match their interests.",
            ),
            InterestTimes(_rise),
            phrase="what is on the rise",
        ),
        Need(
            "search",
            (
                "Rank the candidates by how well they answer the search.",
                "Put what the user is looking for at the top.",
                "Order these items so that the best matches of the search come first.",
                "Find what was searched for; what merely goes with it comes later.",
                "Sort the results of this search by how relevant they are.",
                "Which of these did I mean? Exact matches first.",
            ),
            InterestTimes(_everything),
            phrase="what I search for",
        ),
        Need(
            "diverse",
            (
                "Cover as many of the topics this user enjoys as you can, each with something they will like.",
                "Mix it up: do not show me several items of the same kind in a row, but only things I would enjoy.",
                "Give me a varied list of things I like, not ten times the same topic.",
                "Rank the items so that each one adds a topic that those above it lack and that suits the user.",
                "I do not know what I am in the mood for: let the first few differ from each other, and all be good.",
                "Balance the top of the list across this user's interests instead of repeating the strongest one.",
            ),
            InterestTimes(_everything),
            metric="alpha_ndcg",
        ),
    )
}


def get_need(name: str, known: Mapping[str, Need] = NEEDS) -> Need:
    """The need of this name; ValueError listing the ``known`` ones if there is none.

    Example:
        >>> from flexrec.task import get_need
        >>> get_need("trend").wordings[0]
        'Promote what is trending: prefer items that are rising in popularity and that the user will like.'
    """
    if name not in known:
        raise ValueError(f"unknown need {name!r}{did_you_mean(name, known)}; known needs: {', '.join(known)}")
    return known[name]


def observed_interest(lst: RankingList) -> tuple[np.ndarray, np.ndarray]:
    """Mean (K,) and variance (K,), float32, of the interest as logged: no feedback counts as 0, for certain.

    That is right for sampled negatives (``RankingDataset.unobserved == "zero"``). Where feedback was not collected
    ("critic") a critic predicts the missing values: :meth:`flexrec.task.Critic.fill_many`.
    """
    interest = np.nan_to_num(lst.interest, nan=0.0).astype(np.float32)
    return interest, np.zeros_like(interest)


def evaluation_gains(need: Need, lst: RankingList, catalogue: Catalogue) -> np.ndarray:
    """(K,) float32 gains to score a ranking with: from the true interest where it is known, else from the logged one.

    A candidate without feedback then counts as 0.
    """
    if lst.truth is not None:
        interest, variance = lst.truth, np.zeros_like(lst.truth)
    else:
        interest, variance = observed_interest(lst)
    return need.gains(lst, catalogue, interest, variance)[0]
