"""Whether a trained model listens: needs asked in words that it was never trained on, and what each asking brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from flexrec.data.lists import RankingList
from flexrec.evaluation.evaluate import metrics_of, rank_examples
from flexrec.evaluation.statistics import HEADLINE, headline_of, rank_metrics
from flexrec.task.examples import Example, RankingTask
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
    *,
    num_ranked: int | None = None,
    bf16: bool = False,
    described: bool = False,
) -> dict[str, dict[str, np.ndarray]]:
    """asked -> measured -> (L,): of every list, ranked under one of a need's unseen wordings, its worth for every need.

    The wordings of a need take turns, list by list. A model that does not listen ranks alike whatever it is asked, and
    brings a need as much under the words of another as under its own.

    Args:
        wordings: of each need that is asked so.
        described: say how far that is on standard error.
    """
    needs = [need for need in task.needs if need.metric is None]
    examples = {need.name: [task.test_example(lst, need) for lst in lists] for need in needs}
    found: dict[str, dict[str, np.ndarray]] = {}
    for need in needs:
        if need.name not in wordings:
            continue
        own = [replace(need, wordings=(wording,)) for wording in wordings[need.name]]
        asked = [task.test_example(lst, own[n % len(own)]) for n, lst in enumerate(lists)]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            rankings = rank_examples(
                model,
                asked,
                task.builder,
                num_ranked=num_ranked,
                description=f"Asking {need.name} in other words" if described else None,
            )
        found[need.name] = {name: _values(of_need, rankings) for name, of_need in examples.items()}
    return found


def _values(examples: Sequence[Example], rankings: Sequence[np.ndarray]) -> np.ndarray:
    """(L,) what the needs of ``examples`` are compared by, of rankings of the same lists."""
    metric = headline_of(metrics_of(examples), HEADLINE)
    values = []
    for example, ranking in zip(examples, rankings, strict=True):
        order = np.concatenate([ranking, np.setdiff1d(np.arange(len(example.gains)), ranking)])
        values.append(rank_metrics(example.gains[order][None], [metric], num_ranked=len(ranking))[metric][0])
    return np.array(values)
