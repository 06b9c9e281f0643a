"""What a table of rankers says, in words."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flexrec.evaluation.statistics import Comparison, headline_of, relative_change

BASE, WARM_START, TRAINED = "base", "warm start", "trained"  # the base is the start of all training
Values = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]  # ranker -> need -> metric -> (N,) values per list


def summary(results: Values, users: np.ndarray) -> list[str]:
    """A few sentences: whether what was trained is above everything else, and what reinforcement added.

    A difference counts where its 95 % interval, over users, excludes 0; of a single user there is none.

    Args:
        users: (N,) the user of each list.
    """
    rivals = [name for name in results if name not in (BASE, WARM_START, TRAINED)]

    compared = {need: headline_of(values) for need, values in results[TRAINED].items()}
    metric = " or ".join(dict.fromkeys(compared.values()))

    def against(need: str, other: str) -> Comparison:
        name = compared[need]
        return relative_change(results[TRAINED][need][name], results[other][need][name], clusters=users)

    if len(np.unique(users)) == 1:
        return ["There is one test user: no interval, and nothing that could be said of others."]
    found = {(need, rival): against(need, rival) for need in results[TRAINED] for rival in rivals}
    behind = [(key, c) for key, c in found.items() if c.difference_high < 0]
    open_ = [(key, c) for key, c in found.items() if c.difference_low <= 0 <= c.difference_high]
    sentences = []
    if found and not behind and not open_:
        need, rival = min(found, key=lambda key: found[key].difference)
        sentences.append(
            f"{TRAINED} is above every baseline on every need by {metric}; the closest is {rival} on {need}, "
            f"{_change(found[need, rival])}."
        )
    for (need, rival), change in behind:
        sentences.append(f"On {need}, {rival} is above {TRAINED}: {_change(change)}.")
    for (need, rival), change in open_:
        sentences.append(f"On {need}, {TRAINED} and {rival} cannot be told apart: {_change(change)}.")
    if behind or open_:
        sentences.append("Try more supervision (--listwise-steps) first, then more reinforcement (--steps).")
    if WARM_START in results:
        changes = {need: against(need, WARM_START) for need in results[TRAINED]}
        listed = ", ".join(f"{_change(change)}, p = {change.p_value:.3f} on {need}" for need, change in changes.items())
        sentences.append(f"Reinforcement changed the warm start's {metric} by {listed}.")
        if all(change.difference_low <= 0 <= change.difference_high for change in changes.values()):
            sentences.append("That is no change that can be told from none: the warm start may already say it all.")
    return sentences


def _change(change: Comparison) -> str:
    return f"{change.difference:+.3f} [{change.difference_low:+.3f}, {change.difference_high:+.3f}]"
