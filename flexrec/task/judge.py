"""Gains from somebody who judges: a language model that is asked, a scorer, a table of ratings, a person.

A judge is any callable ``judge(words, histories, candidates)`` for a batch of lists: what is asked for, in words; for
each list the titles of the user's history, oldest first; and those of its K candidates. It returns for each list the
scores (K,) of its candidates, or a pair of scores (K,) and their variances (K,). Nothing is known of it but that, so
that its gains are told to a model by rewards alone, and needs of this kind are not mixed with others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from flexrec.data.lists import Catalogue, RankingList

Judge: TypeAlias = Callable[[str, list[list[str]], list[list[str]]], Sequence[Any]]


class JudgedGains:
    """The gains of a need as a judge says them, who is asked once for each list: what a ``Need``'s ``gains`` may be.

    A score s becomes the gain (s - low) / (high - low), and its variance is scaled accordingly; 0 where the judge says
    none. The interest that is logged or estimated plays no part.

    Args:
        judge: see the module's docstring.
        words: what it is asked; a need's first wording, say.
        low, high: the scores that are gains of 0 and of 1. No score may be below ``low``.
        batch_size: lists that it is asked for together, where many are known to come (:meth:`prepare`).
        cache: a file of judgments, a line of JSON each, to which those that are new are appended: another run asks for
            none of them again. It is known by words, history and candidates; give each judge a file of its own.
            None: judgments are kept in memory.

    Raises:
        ValueError: ``high`` not above ``low``; later, scores of another shape, not finite, or below ``low``.

    Example:
        >>> from flexrec.data import simulate
        >>> from flexrec.task import JudgedGains, Need
        >>> def short_titles(words, histories, candidates):
        ...     return [[40 - len(title) for title in titles] for titles in candidates]
        ...
        >>> words = "I am tired of long names."
        >>> need = Need("short titles", (words,), JudgedGains(short_titles, words, low=0, high=40))
        >>> data = simulate(num_users=4, num_items=80, num_topics=4, num_test_users=1, num_candidates=6)
        >>> gains, variance = need.gains(data.test[0], data.catalogue, None, None)
        >>> gains.shape, float(variance.max())
        ((6,), 0.0)
    """

    def __init__(
        self,
        judge: Judge,
        words: str,
        *,
        low: float = 0.0,
        high: float = 1.0,
        batch_size: int = 16,
        cache: str | Path | None = None,
    ) -> None:
        if not -np.inf < low < high < np.inf:
            raise ValueError(f"low and high must be finite and high above low, got {low} and {high}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.judge, self.words, self.low, self.high, self.batch_size = judge, words, low, high, batch_size
        self.cache = None if cache is None else Path(cache)
        self._known: dict[str, dict[str, list[float]]] = {}  # list: title: score, variance
        if self.cache is not None and self.cache.is_file():
            self._known = _read(self.cache)

    def prepare(self, lists: Sequence[RankingList], catalogue: Catalogue) -> None:
        """Ask for the lists that are not judged yet, ``batch_size`` at a time."""
        asked = {key: lst for lst in lists if (key := self._key(lst, catalogue)) not in self._known}
        keys = list(asked)
        for start in range(0, len(keys), self.batch_size):
            self._ask({key: asked[key] for key in keys[start : start + self.batch_size]}, catalogue)

    def __call__(
        self, lst: RankingList, catalogue: Catalogue, interest: np.ndarray | None, variance: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gains (K,) and their variance (K,), float32."""
        key = self._key(lst, catalogue)
        if key not in self._known:
            self._ask({key: lst}, catalogue)
        judged = self._known[key]
        scores = np.array([judged[catalogue.ids[item]] for item in lst.candidates]).reshape(-1, 2)  # (K, 2)
        width = self.high - self.low
        return ((scores[:, 0] - self.low) / width).astype(np.float32), (scores[:, 1] / width**2).astype(np.float32)

    def _key(self, lst: RankingList, catalogue: Catalogue) -> str:
        """What is judged, whatever the order of the candidates."""
        history = [catalogue.titles[item] for item in lst.history]
        candidates = sorted((catalogue.ids[item], catalogue.titles[item]) for item in lst.candidates)
        return hashlib.sha256(json.dumps([self.words, history, candidates]).encode()).hexdigest()[:32]

    def _ask(self, lists: dict[str, RankingList], catalogue: Catalogue) -> None:
        histories = [[catalogue.titles[item] for item in lst.history] for lst in lists.values()]
        candidates = [[catalogue.titles[item] for item in lst.candidates] for lst in lists.values()]
        answers = list(self.judge(self.words, histories, candidates))
        if len(answers) != len(lists):
            raise ValueError(f"the judge was asked for {len(lists)} lists and answered for {len(answers)}")
        for (key, lst), answer in zip(lists.items(), answers, strict=True):
            scores, variances = self._checked(answer, lst)
            values = zip(lst.candidates, scores.tolist(), variances.tolist(), strict=True)
            self._known[key] = {catalogue.ids[item]: [score, variance] for item, score, variance in values}
        if self.cache is not None:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with self.cache.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([key, self._known[key]]) + "\n" for key in lists)

    def _checked(self, answer: Any, lst: RankingList) -> tuple[np.ndarray, np.ndarray]:
        """Scores and variances (K,) float64; a ValueError that names the list."""
        where = f"of the list of user {lst.user} at time {lst.time:g}"
        is_pair = isinstance(answer, tuple) and len(answer) == 2 and np.ndim(answer[0]) > 0
        scores, variances = answer if is_pair else (answer, None)
        found = []
        for name, values, least in (("scores", scores, self.low), ("variances", variances, 0.0)):
            if values is None:
                values = np.zeros(len(lst.candidates))
            try:
                values = np.asarray(values, dtype=np.float64)
            except (TypeError, ValueError):
                raise ValueError(f"the judge's {name} {where} must be numbers, got {str(values)[:80]!r}") from None
            if values.shape != lst.candidates.shape:
                raise ValueError(
                    f"the judge's {name} {where} must have shape {lst.candidates.shape}, one per candidate, got "
                    f"{values.shape}"
                )
            wrong = np.flatnonzero(~(np.isfinite(values) & (values >= least)))
            if len(wrong):
                raise ValueError(
                    f"the judge's {name} {where} must be finite and at least {least:g}, got {values[wrong[0]]:g} for "
                    f"candidate {wrong[0]}"
                )
            found.append(values)
        return found[0], found[1]


def _read(path: Path) -> dict[str, dict[str, list[float]]]:
    known = {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):  # a run was stopped while it wrote
        path.write_bytes(whole)
    for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
        try:
            key, judged = json.loads(line)
            known[str(key)] = {str(item): [float(s), float(v)] for item, (s, v) in judged.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: is no judgment ({error}): delete the line or the file") from None
    return known
