"""Whether a trained model listens: needs asked in words that it was never trained on, and what each asking brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flexrec.data.lists import RankingList
from flexrec.evaluation.evaluate import Evaluation
from flexrec.evaluation.statistics import headline_of
from flexrec.task.examples import RankingTask
from flexrec.task.needs import Need


def kept_from_training(needs: Sequence[Need], count: int) -> tuple[list[Need], dict[str, tuple[str, ...]]]:
    """The needs without the last ``count`` of their wordings, and these by need; each keeps at least one to train on.

    Example:
        >>> from flexrec.experiment.wordings import kept_from_training
        >>> from flexrec.task import get_need
        >>> (seen,), unseen = kept_from_training([get_need("interest")], 2)
        >>> len(seen.wordings), unseen["interest"][-1]
        (4, 'Sort the list for maximum enjoyment, the surest favourites first.')
    """
    counts = [min(count, len(need.wordings) - 1) for need in needs]
    seen = [
        replace(need, wordings=need.wordings[: len(need.wordings) - n]) for need, n in zip(needs, counts, strict=True)
    ]
    return seen, {
        need.name: need.wordings[len(need.wordings) - n :] for need, n in zip(needs, counts, strict=True) if n
    }


def measure_unseen(
    model: Any,
    task: RankingTask,
    lists: Sequence[RankingList],
    wordings: Mapping[str, Sequence[str]],
    evaluation: Evaluation,
    *,
    described: bool = False,
) -> dict[str, dict[str, np.ndarray]]:
    """asked -> measured -> (L,): of every list, ranked under one of a need's unseen wordings, its worth for every need.

    The wordings of a need take turns, list by list. A model that does not listen ranks alike whatever it is asked, and
    brings a need as much under the words of another as under its own.

    Args:
        wordings: of each need that is asked so.
        evaluation: of the lists under every need of the task.
        described: say how far that is on standard error.
    """
    needs = [need for need in task.needs if need.metric is None]
    found: dict[str, dict[str, np.ndarray]] = {}
    for need in needs:
        if need.name not in wordings:
            continue
        own = [replace(need, wordings=(wording,)) for wording in wordings[need.name]]
        asked = [task.test_example(lst, own[n % len(own)]) for n, lst in enumerate(lists)]
        rankings = evaluation.rank(model, asked, f"Asking {need.name} in other words" if described else None)
        values = evaluation.of_rankings(dict.fromkeys(evaluation.tests, rankings))
        found[need.name] = {one.name: values[one.name][headline_of(values[one.name])] for one in needs}
    return found
