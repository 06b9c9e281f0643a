"""Mixtures of needs: "mostly what I like, a little of something new".

Of needs whose gain is interest x f_i, with weights w_i that sum to 1, a mixture is again a need of this form:

    gain = interest x f,    f = (sum_i w_i f_i / s_i) / m,

where s_i is the root mean square of f_i over the list's candidates and m the largest sum in the list, so that f lies in
[0, 1]. Gain and variance are exact (:class:`flexrec.task.needs.InterestTimes`).

Without s_i a weight would mean little: of the simulator's candidates, the mean factor of ``interest`` is 1, of
``explore`` 0.43 and of ``trend`` 0.09, so that "0.5 interest + 0.5 trend" would be interest. With it, the ideal ranking
of half and half keeps about as much of one need as of the other: of what lies between its ranking by the other need
and its best (NDCG@5 on the simulator's training lists), 0.69 and 0.71 of interest and explore, 0.68 and 0.81 of
interest and trend; without, 0.85 and 0.53, 0.95 and 0.43.
A need that has nothing to offer in a list, all its factors being 0, does not count there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flexrec.data.lists import Catalogue, RankingList
from flexrec.task.needs import NEEDS, InterestTimes, Need, get_need

_WEIGHT = re.compile(
    r"(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<percent>%?)\s*(?:\*\s*)?(?P<name>.*)"
)

# How much of a mixture a share is, in words, from this share on.
_AMOUNTS = (
    (0.85, "almost only"),
    (0.6, "mostly"),
    (0.45, "half of it"),
    (0.25, "some of"),
    (0.12, "a little of"),
    (0.0, "a touch of"),
)
# Wordings of two parts by the share of the larger, from this share on: {a} is the larger one.
_OF_TWO = (
    (
        0.85,
        (
            "Almost only {a}, with a touch of {b}.",
            "I want {a}; of {b} no more than a hint.",
            "Rank by {a}, and let {b} decide only where that leaves it open.",
        ),
    ),
    (
        0.65,
        (
            "Mostly {a}, and a little of {b}.",
            "Above all {a}, but leave some room for {b}.",
            "Show me {a} first of all, with some of {b} mixed in.",
        ),
    ),
    (
        0.55,
        (
            "Somewhat more of {a} than of {b}.",
            "Both {a} and {b}, with the stress on {a}.",
            "A mixture of {a} and {b}, leaning towards {a}.",
        ),
    ),
    (
        0.5,
        (
            "Half {a}, half {b}.",
            "In equal parts {a} and {b}.",
            "Both {a} and {b}: the one counts as much as the other.",
        ),
    ),
)


@dataclass(frozen=True)
class MixedFactor:
    """The factor of a mixture; see the module's docstring.

    Attributes:
        parts: weights, which sum to 1, and needs that have a factor.
    """

    parts: tuple[tuple[float, Need], ...]

    def __call__(self, lst: RankingList, catalogue: Catalogue) -> np.ndarray:
        """(K,) float64 in [0, 1]."""
        mixed = np.zeros(len(lst.candidates))
        for weight, need in self.parts:
            assert need.factor is not None
            factor = np.asarray(need.factor(lst, catalogue), dtype=np.float64)
            mixed += weight * factor / max(np.sqrt(np.mean(factor**2)), 1e-30)
        return mixed / max(mixed.max(initial=0.0), 1e-30)


def parts_of(need: Need) -> tuple[Need, ...]:
    """The needs that a mixture is made of; of any other need itself."""
    if isinstance(need.factor, MixedFactor):
        return tuple(part for _, part in need.factor.parts)
    return (need,)


def mix_needs(parts: Sequence[tuple[float, Need]]) -> Need:
    """A need made of others by weights, with a name such as "0.7 interest + 0.3 explore" and wordings made from theirs.

    Args:
        parts: weights > 0 and needs. Weights are divided by their sum and rounded to three digits; parts stand in the
            order of their weights.

    Raises:
        ValueError: fewer than two needs, one of them twice, a weight that is not positive and finite, or a need whose
            gain is not interest times a factor.

    Example:
        >>> from flexrec.task import get_need, mix_needs
        >>> mostly = mix_needs([(3, get_need("explore")), (7, get_need("interest"))])
        >>> mostly.name
        '0.7 interest + 0.3 explore'
        >>> mostly.wordings[0]
        'Mostly what I will like, and a little of topics that are new to me. (70 % to 30 %)'
    """
    names = [need.name for _, need in parts]
    if len(parts) < 2:
        raise ValueError(f"a mixture needs at least two needs, got {names}")
    for i, (weight, need) in enumerate(parts):
        if not 0 < weight < np.inf:
            raise ValueError(f"the weight of {need.name!r} must be positive and finite, got {weight:g}")
        if need.name in names[:i]:
            raise ValueError(f"{need.name!r} stands in the mixture twice: give it one weight")
        if need.factor is None:
            raise ValueError(f"{need.name!r} cannot be mixed: its gains are not interest times a factor")
        if need.metric is not None:
            raise ValueError(f"{need.name!r} cannot be mixed: it values a list as a whole, by {need.metric}")
        if isinstance(need.factor, MixedFactor):
            raise ValueError(f"{need.name!r} is a mixture itself: name its parts with weights of their own")
    total = sum(weight for weight, _ in parts)
    shares = [(float(f"{weight / total:.3g}"), need) for weight, need in parts]
    shares.sort(key=lambda part: -part[0])
    name = " + ".join(f"{share:g} {need.name}" for share, need in shares)
    total = sum(share for share, _ in shares)  # what the name says is what is meant
    shares = [(share / total, need) for share, need in shares]
    return Need(name, _wordings(shares), InterestTimes(MixedFactor(tuple(shares))))


def find_need(text: str, known: Mapping[str, Need] = NEEDS) -> Need:
    """The need of a name, or a mixture of known ones, as in "0.7 interest + 0.3 explore".

    A part without a weight has the weight 1; weights that do not sum to 1 are normalised, as the name of what is
    returned says.

    Args:
        known: needs by name.

    Raises:
        ValueError: an unknown need, a weight that is no positive number, or what :func:`mix_needs` refuses.

    Example:
        >>> from flexrec.task import find_need
        >>> find_need("2 interest + 1 explore + 1 trend").name
        '0.5 interest + 0.25 explore + 0.25 trend'
    """
    name = text.strip()
    if name in known or not is_mixture(name):
        return get_need(name, known)
    parts = []
    try:
        for part in re.split(r"(?<!\d[eE])\+", name):  # 1e+2 is a number
            weight, given = _weight_and_name(part)
            if not given:
                raise ValueError(f"{part.strip()!r} names no need; expected a weight and a need, 0.3 explore")
            parts.append((weight, get_need(given, known)))
        if len(parts) == 1:
            return parts[0][1]
        order = {need.name: number for number, need in enumerate(known.values())}
        parts.sort(key=lambda part: order[part[1].name])  # that of equal weights is the same whoever writes them
        return mix_needs(parts)
    except ValueError as error:
        raise ValueError(f"need {text!r}: {error}") from None


def is_mixture(text: str) -> bool:
    """Whether a text is meant as weights and names: it has a plus, or begins with a number and has no more words than
    the name of a need."""
    return "+" in text or (_WEIGHT.match(text.strip()) is not None and len(text.split()) <= 2)


def told_apart(needs: Sequence[Need]) -> list[Need]:
    """The needs, and of mixtures only the wordings that no other has: words that mean two needs mean neither."""
    counts = Counter(wording for need in needs for wording in need.wordings)
    return [
        replace(need, wordings=tuple(words for words in need.wordings if counts[words] == 1))
        if isinstance(need.factor, MixedFactor)
        else need
        for need in needs
    ]


def _weight_and_name(part: str) -> tuple[float, str]:
    part = part.strip()
    found = _WEIGHT.fullmatch(part)
    if found is None:
        return 1.0, part
    return float(found["weight"]) / (100 if found["percent"] else 1), found["name"].strip()


def _wordings(shares: Sequence[tuple[float, Need]]) -> tuple[str, ...]:
    """Several, the first and the last with the shares as numbers, by which any two mixtures differ."""
    phrases = [need.phrase or need.name for _, need in shares]
    numbers = [f"{100 * share:.3g} %" for share, _ in shares]
    counted = _listed([f"{number} {phrase}" for number, phrase in zip(numbers, phrases, strict=True)])
    if len(shares) == 2:
        largest = round(shares[0][0], 6)
        templates = next(texts for least, texts in _OF_TWO if largest >= least)
        texts = [template.format(a=phrases[0], b=phrases[1]) for template in templates]
        texts[0] += f" ({' to '.join(numbers)})"
    else:
        amounts = [_amount(share) for share, _ in shares]
        listed = _listed([f"{amount} {phrase}" for amount, phrase in zip(amounts, phrases, strict=True)])
        texts = [f"A mixture: {counted}.", f"{listed[0].upper()}{listed[1:]}.", f"I would like {listed}."]
        equal = max(share for share, _ in shares) - min(share for share, _ in shares) < 0.05
        texts.append(f"In equal parts {_listed(phrases)}." if equal else f"In this order: {_listed(phrases)}.")
    return (*texts, f"Rank the candidates by {counted}.")


def _amount(share: float) -> str:
    return next(words for least, words in _AMOUNTS if share >= least)


def _listed(texts: Sequence[str]) -> str:
    return f"{', '.join(texts[:-1])} and {texts[-1]}"
