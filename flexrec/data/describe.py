"""What a data set holds, in numbers and in a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from flexrec.data.lists import Catalogue, RankingDataset, RankingList

_MOST_LISTS = 2000  # that gains are counted in


class DescribedNeed(Protocol):
    """A need as far as a description knows it: its name and its gains."""

    @property
    def name(self) -> str: ...

    @property
    def gains(self) -> Any: ...


class Row(NamedTuple):
    """A line of a description: what is counted, for training and for testing ("" where that is no matter)."""

    what: str
    train: str
    test: str = ""


def describe(dataset: RankingDataset, needs: Iterable[DescribedNeed] = ()) -> list[Row]:
    """Counts, sparsity, lists, lengths, interest and examples per need, as rows to print.

    Args:
        needs: for each, how many lists have a candidate with a positive gain, and how many candidates have one; in a
            random part of the lists where there are more than 2,000. Needs that the data cannot answer are named with
            the reason.

    Example:
        >>> from flexrec.data import describe, simulate
        >>> data = simulate(num_users=4, num_items=80, num_topics=4, num_test_users=1, num_candidates=6)
        >>> describe(data)[1]
        Row(what='items', train='80', test='')
    """
    log, catalogue = dataset.log, dataset.catalogue
    users, per_user = np.unique(log.users, return_counts=True)
    items, per_item = np.unique(log.items, return_counts=True)
    test_users = {lst.user for lst in dataset.test}
    pairs = len(np.unique(log.users.astype(np.int64) * len(catalogue) + log.items))
    topics = sum(bool(names) for names in catalogue.topics)
    rows = [
        Row("data set", dataset.name),
        Row("items", f"{len(catalogue):,}"),
        Row("items with an interaction", f"{len(items):,}"),
        Row("categories", f"{len(catalogue.topic_names):,}"),
        Row("items with a category", f"{topics:,} ({topics / max(1, len(catalogue)):.0%})"),
        Row("columns of the items", ", ".join(catalogue.columns) or "none"),
        Row("users", f"{len(users):,}", f"{len(test_users):,}"),
        Row("interactions", f"{len(log):,}"),
        Row("sparsity", f"{1 - pairs / max(1, len(users) * len(catalogue)):.4%} of pairs of user and item are unknown"),
        Row("interactions of a user", _spread(per_user)),
        Row("interactions with an item", _spread(per_item)),
        Row("period", _period(log.times) if dataset.trend is not None else "no times"),
    ]
    both = (dataset.train, dataset.test)
    queries = [sum(bool(lst.query) for lst in part) for part in both]
    rows += [
        Row("lists", *(f"{len(part):,}" for part in both)),
        Row("candidates of a list", *(_spread([len(lst.candidates) for lst in part]) for part in both)),
        Row("of them with feedback", *(_spread([_known(lst).sum() for lst in part]) for part in both)),
        Row("history of a list", *(_spread([len(lst.history) for lst in part]) for part in both)),
        Row("interest that is known", *(_interest(part) for part in both)),
        *([Row("lists with a query", *(f"{count:,}" for count in queries))] if any(queries) else []),
    ]
    for need in needs:
        if need.name in dataset.unanswerable:
            rows.append(Row(f"need {need.name}", f"not possible: {dataset.unanswerable[need.name]}"))
        else:
            rows.append(Row(f"need {need.name}", *(_examples(need, part, catalogue) for part in both)))
    return rows


def _spread(values: Any) -> str:
    values = np.asarray(values)
    if not len(values):
        return "none"
    if values.min() == values.max():
        return f"{values[0]:g}"
    return f"{values.min():g} to {values.max():g}, median {np.median(values):g}, mean {values.mean():.1f}"


def _period(times: np.ndarray) -> str:
    if not len(times):
        return "none"
    if times[0] < 1e8 or times[-1] > 1e11:
        return f"{times[0]:g} to {times[-1]:g}, in no known unit"
    first, last = (datetime.fromtimestamp(t, timezone.utc).strftime("%Y-%m-%d") for t in (times[0], times[-1]))
    return f"{first} to {last}"


def _known(lst: RankingList) -> np.ndarray:
    return ~np.isnan(lst.interest)


def _interest(lists: Sequence[RankingList]) -> str:
    values = np.concatenate([lst.interest[_known(lst)] for lst in lists]) if lists else np.zeros(0)
    if not len(values):
        return "none"
    return f"mean {values.mean():.2f}, above 0: {np.mean(values > 0):.0%}, 1/2 or more: {np.mean(values >= 0.5):.0%}"


def _examples(need: DescribedNeed, lists: Sequence[RankingList], catalogue: Catalogue) -> str:
    """How many of the lists can be learnt from or scored for a need, and by how many candidates."""
    part, positive = _some(lists), []
    for lst in part:
        interest = np.nan_to_num(lst.known_interest)
        gains, _ = need.gains(lst, catalogue, interest, np.zeros_like(interest))
        positive.append(np.count_nonzero(gains))
    usable = np.count_nonzero(positive)
    of_usable = np.array(positive)[np.array(positive) > 0].mean() if usable else 0.0
    about = "about " if len(part) < len(lists) else ""
    usable_of_all = round(usable / max(1, len(part)) * len(lists))
    return f"{about}{usable_of_all:,} lists, {of_usable:.1f} candidates with a gain in each"


def _some(lists: Sequence[RankingList]) -> Sequence[RankingList]:
    if len(lists) <= _MOST_LISTS:
        return lists
    return [lists[i] for i in np.sort(np.random.default_rng(0).choice(len(lists), _MOST_LISTS, replace=False))]


def draw_description(dataset: RankingDataset, path: str | Path) -> None:
    """Write a figure: interactions per user and item, the lists' lengths, the known interest.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> from flexrec.data import draw_description, simulate
        >>> data = simulate(num_users=4, num_items=80, num_topics=4, num_test_users=1, num_candidates=6)
        >>> draw_description(data, "data.png")
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the figure needs matplotlib: .venv/bin/pip install -e '.[report]'") from error
    figure = Figure(figsize=(10, 7), layout="constrained")
    (counts, lengths), (interest, when) = figure.subplots(2, 2)
    for name, ids in (("users", dataset.log.users), ("items", dataset.log.items)):
        sizes = np.sort(np.unique(ids, return_counts=True)[1])[::-1]
        counts.loglog(np.arange(1, len(sizes) + 1), sizes, label=name)
    counts.set(xlabel="rank", ylabel="interactions", title="interactions of the training log")
    counts.legend()
    lists = [*_some(dataset.train), *_some(dataset.test)]
    groups = {
        "candidates": [len(lst.candidates) for lst in lists],
        "with feedback": [int(_known(lst).sum()) for lst in lists],
        "history": [len(lst.history) for lst in lists],
    }
    top = max(max(of_lists) for of_lists in groups.values()) + 1
    for name, of_lists in groups.items():
        lengths.hist(of_lists, bins=np.arange(0, top + 1) - 0.5, histtype="step", label=name)
    lengths.set(xlabel="items", ylabel="lists", title="lengths of lists")
    lengths.legend()
    interest.hist(dataset.log.interest, bins=np.linspace(0.0, 1.0, 41).tolist())
    interest.set(xlabel="interest", ylabel="interactions", title="interest in the training log")
    in_years = len(dataset.log) and dataset.log.times[0] > 1e8
    times = 1970 + dataset.log.times / (365.2425 * 86400) if in_years else dataset.log.times
    when.hist(times, bins=60)
    when.set(
        xlabel="year" if in_years else "time",
        ylabel="interactions",
        title="when" if dataset.trend is not None else "no times",
    )
    figure.suptitle(dataset.name)
    figure.savefig(path)
