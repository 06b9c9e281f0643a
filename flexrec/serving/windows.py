"""Requests with more candidates than a model ranks well at once, or can hold: ranked window by window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flexrec.decoding.options import Decoding
from flexrec.decoding.windows import Plan, Window, rank_by_windows

Request = dict[str, Any]
Rank = Callable[[list[Request], Decoding], list[dict[str, Any]]]


def rank_in_windows(
    requests: Sequence[Request],
    candidates: Sequence[Sequence[Any]],
    decoding: Decoding,
    rank: Rank,
) -> list[dict[str, Any]]:
    """An answer for each request: ``{"ranking": [{"id"}, ..], "calls": windows that were ranked}`` with warnings, or
    ``{"error": why}``.

    Args:
        candidates: of each request, each once, with ids that tell them apart.
        rank: answers plain requests.
    """
    assert decoding.strategy is not None
    plan = Plan(decoding.strategy, decoding.window, decoding.step or decoding.window // 2)
    plainly = replace(decoding, strategy=None, window=Decoding.window, step=None, num_ranked=None)
    at_first_sight = replace(plainly, mode="one-pass")
    errors: dict[int, str] = {}
    warnings: dict[int, str] = {}

    def order(windows: list[Window]) -> list[np.ndarray]:
        found: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(windows)
        for alone in (True, False):
            some = [i for i, window in enumerate(windows) if window.alone == alone]
            if not some:
                continue
            asked = []
            for of_list, chosen, _ in (windows[i] for i in some):
                asked.append({**requests[of_list], "candidates": [candidates[of_list][c] for c in chosen]})
            how = at_first_sight if plan.strategy == "prerank" and not alone else plainly
            for i, answer in zip(some, rank(asked, how), strict=True):
                found[i] = _places(answer, windows[i], candidates[windows[i].list], errors, warnings)
        return found

    orders, calls = rank_by_windows([len(of_request) for of_request in candidates], plan, order)
    return [
        {"error": errors[n]}
        if n in errors
        else {
            "ranking": [{"id": given_id(of_request[c])} for c in ranking[: decoding.num_ranked]],
            "calls": count,
            **({"warning": warnings[n]} if n in warnings else {}),
        }
        for n, (of_request, ranking, count) in enumerate(zip(candidates, orders, calls, strict=True))
    ]


def given_id(candidate: Any) -> Any:
    """The id of a candidate as it came; None where it has none."""
    return candidate.get("id") if isinstance(candidate, dict) else candidate


def _places(
    answer: dict[str, Any],
    window: Window,
    candidates: Sequence[Any],
    errors: dict[int, str],
    warnings: dict[int, str],
) -> np.ndarray:
    """The order of a window in places of it, as it stood where there is none."""
    if "error" in answer:
        errors.setdefault(window.list, answer["error"])
        return np.arange(len(window.candidates))
    if "warning" in answer:
        warnings.setdefault(window.list, answer["warning"])
    place = {str(given_id(candidates[c])): i for i, c in enumerate(window.candidates)}
    ranked = [place[str(item["id"])] for item in answer["ranking"]]
    return np.array([*ranked, *(i for i in range(len(window.candidates)) if i not in set(ranked))], dtype=np.int64)
