"""What a run hands back, in the form that is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

DIGITS = 4  # of stored values


def of_lists(values: np.ndarray, users: Sequence[int] | np.ndarray, *, metric: str, **labels: str) -> dict[str, Any]:
    """A result of test lists: the metric's mean over the lists, and each user's own.

    Args:
        values: (L,) of the metric.
        users: (L,) whose list each is.

    Returns:
        ``labels``, ``metric``, ``mean``, ``units`` (the users, ascending), ``values`` (each one's mean), and ``counts``
        of their lists unless all have as many.

    Example:
        >>> from flexrec.experiment.studies.results import of_lists
        >>> of_lists(np.array([0.25, 0.75, 1.0]), [7, 7, 9], metric="ndcg@5")["values"]
        [0.5, 1.0]
    """
    units, member, counts = np.unique(np.asarray(users), return_inverse=True, return_counts=True)
    of_units = np.bincount(member, values) / counts
    result: dict[str, Any] = {
        **labels,
        "metric": metric,
        "mean": round(float(np.mean(values)), 5),
        "units": units.tolist(),
        "values": np.round(of_units, DIGITS).tolist(),
    }
    if len(set(counts.tolist())) > 1:
        result["counts"] = counts.tolist()
    return result


def of_numbers(metrics: dict[str, float], **labels: str) -> list[dict[str, Any]]:
    """Results without units, one for each metric."""
    return [{**labels, "metric": name, "mean": round(float(value), 5)} for name, value in metrics.items()]
