"""Needs: what a user asks of a ranking, in words for the model and as a gain for the reward.

A need turns the interest in each candidate into the gain that the metrics of ``flexrec.metrics`` take. All needs here
have the form

    gain = interest x factor,    factor in [0, 1] known exactly from the list,

so that Var[gain] = factor^2 Var[interest] holds exactly. A need of one's own is a ``Need`` constructed with a name,
some wordings and a function like ``interest_gains``; nothing has to be registered.

A need that names a ``metric`` is about the list as a whole: what an item earns depends on what stands above it, so
that no gain of the item alone says it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from flexrec.checks import check_choice
from flexrec.data.lists import Catalogue, RankingDataset, RankingList
from flexrec.metrics import OF_TOPICS

# (list, catalogue, interest (K,), its variance (K,)) -> gain (K,) float32, its variance (K,) float32
GainFunction: TypeAlias = Callable[
    [RankingList, Catalogue, np.ndarray, np.ndarray],
    tuple[np.ndarray, np.ndarray],
]

# A topic is new where less than this share of the shown history has it: the fewer, the newer.
RARE_TOPIC_SHARE = 0.15


@dataclass(frozen=True)
class Need:
    """What is asked of a ranking.

    Attributes:
        name: short, for command lines and tables.
        wordings: instructions to a recommender that all mean this need; training draws one of them for each prompt.
        gains: ``need.gains(lst, catalogue, interest, variance)`` takes the mean interest (K,) in each candidate and
            the variance (K,) of that knowledge, by candidate, and returns the gains (K,) >= 0 and their variance (K,),
            both float32.
        metric: "alpha_ndcg" or "err_ia" where a ranking is valued as a whole, by the gains and topics of its items,
            with the cutoff of the metric that is trained; None: by that metric.

    Example:
        >>> from flexrec.task import Need
        >>> def short(lst, catalogue, interest, variance):
        ...     factor = np.array([len(catalogue.titles[item]) < 12 for item in lst.candidates], dtype=np.float32)
        ...     return interest * factor, variance * factor**2
        ...
        >>> Need("short titles", ("I am tired of long names.",), short).name
        'short titles'
    """

    name: str
    wordings: tuple[str, ...]
    gains: GainFunction
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.metric is not None:
            check_choice(f"metric of need {self.name!r}", self.metric, OF_TOPICS)
        if not self.name:
            raise ValueError("name of a need must not be empty")
        if not self.wordings or not all(wording.strip() for wording in self.wordings):
            raise ValueError(f"need {self.name!r} must have at least one wording and none that is empty")


def novelty(lst: RankingList, catalogue: Catalogue) -> np.ndarray:
    """(K,) float32 in [0, 1]: how new the topics of each candidate are to the shown history.

    With p(c) the share of the H items of the history that have topic c, and s = ``RARE_TOPIC_SHARE``,

        novelty = mean over the candidate's topics c of max(0, 1 - p(c) / s):

    1 where the history has none of its topics, 0 where every one of them is at least as frequent as s. Of an empty
    history everything is new; an item without topics cannot be said to be new and has novelty 0.
    """
    return novelty_of(lst.history, lst.candidates, catalogue)


def novelty_of(history: np.ndarray, candidates: np.ndarray, catalogue: Catalogue) -> np.ndarray:
    """:func:`novelty` of candidates (K,) to a history (H,), both items of the catalogue."""
    topics = catalogue.topic_matrix
    share = topics[history].mean(axis=0) if len(history) else np.zeros(topics.shape[1], dtype=np.float32)
    topic_novelty = np.maximum(0.0, 1.0 - share / RARE_TOPIC_SHARE)
    of_candidates = topics[candidates]
    return (of_candidates @ topic_novelty / np.maximum(of_candidates.sum(axis=1), 1.0)).astype(np.float32)


def interest_gains(
    lst: RankingList, catalogue: Catalogue, interest: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """gain = interest: rank first what the user will like most."""
    return _scaled(lst, interest, variance, np.ones(len(lst.candidates), dtype=np.float32))


def explore_gains(
    lst: RankingList, catalogue: Catalogue, interest: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """gain = interest x ``novelty``: what the user will like among topics that are new to the history."""
    return _scaled(lst, interest, variance, novelty(lst, catalogue))


def trend_gains(
    lst: RankingList, catalogue: Catalogue, interest: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """gain = interest x ``lst.trend``: what the user will like among that which is rising just now."""
    return _scaled(lst, interest, variance, lst.trend)


def _scaled(
    lst: RankingList, interest: np.ndarray, variance: np.ndarray, factor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    for name, values in (("interest", interest), ("variance", variance)):
        if values.shape != lst.candidates.shape:
            raise ValueError(f"{name} must have shape {lst.candidates.shape}, one per candidate, got {values.shape}")
        if not np.all(values >= 0):  # also false for NaN
            raise ValueError(f"{name} must be non-negative numbers without NaN, got {values}")
    return (interest * factor).astype(np.float32), (variance * factor**2).astype(np.float32)


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
            interest_gains,
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
            explore_gains,
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
            trend_gains,
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
            interest_gains,
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
            interest_gains,
            metric="alpha_ndcg",
        ),
    )
}


def get_need(name: str) -> Need:
    """The need of this name; ValueError listing the known ones if there is none.

    Example:
        >>> from flexrec.task import get_need
        >>> get_need("trend").wordings[0]
        'Promote what is trending: prefer items that are rising in popularity and that the user will like.'
    """
    if name not in NEEDS:
        raise ValueError(f"unknown need {name!r}; known needs: {', '.join(NEEDS)}")
    return NEEDS[name]


def needs_of(dataset: RankingDataset, names: Sequence[str] | None) -> list[Need]:
    """The needs of these names; None: all that value items and that the data can answer.

    Raises:
        ValueError: an unknown name, or a need that the data cannot answer, with the reason.
    """
    if names is None:
        names = [name for name, need in NEEDS.items() if need.metric is None and name not in dataset.unanswerable]
    needs = [get_need(name) for name in names]
    dataset.check_needs(names)
    return needs


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
