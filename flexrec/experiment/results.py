"""What a run has measured: every metric of every test list, and what a person reads of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from flexrec.evaluation.baselines import BASELINES
from flexrec.evaluation.statistics import (
    HEADLINE,
    METRICS,
    Comparison,
    bootstrap_interval,
    comparison_table,
    headline_of,
    relative_change,
)
from flexrec.evaluation.summary import BASE, TRAINED, WARM_START, summary

CRITIC = "critic"
REINFORCEMENT = "reinforcement"  # what a table calls the difference that it made


@dataclass
class Results:
    """Per-list metrics of every system and need, and the seconds every stage took. ``print`` shows table and summary.

    Example:
        >>> from flexrec.experiment import Results
        >>> values = {"base": [0.2, 0.4, 0.3], "warm start": [0.3, 0.5, 0.5], "trained": [0.4, 0.6, 0.5]}
        >>> per_list = {name: {"interest": {"ndcg@5": np.array(v)}} for name, v in values.items()}
        >>> results = Results(np.array([7, 8, 9]), per_list)
        >>> round(results.compare("trained", "warm start", "interest").difference, 3)
        0.067
        >>> results.table().row_count  # the need, three rankers, and what reinforcement changed
        5
    """

    users: np.ndarray  # (L,) user of each test list
    per_list: dict[str, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)  # system, need, metric: (L,)
    seconds: dict[str, float] = field(default_factory=dict)
    new_items: Results | None = None  # of the lists of new items alone, where there are enough
    # Asked in words never trained on, and measured by: (L,)
    unseen_wordings: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    critic: dict[str, float] = field(default_factory=dict)  # how good it is (``evaluation.critic``), where there is one

    @property
    def start(self) -> str:
        """What reinforcement started from."""
        return WARM_START if WARM_START in self.per_list else BASE

    def means(self, system: str) -> dict[str, dict[str, float]]:
        return {
            need: {metric: float(values.mean()) for metric, values in metrics.items()}
            for need, metrics in self.per_list[system].items()
        }

    def compare(self, new: str, base: str, need: str, metric: str = HEADLINE) -> Comparison:
        """Paired comparison over the test lists, lists of one user resampled together."""
        values = self.per_list
        return relative_change(values[new][need][metric], values[base][need][metric], clusters=self.users)

    def table(self, title: str | None = None, width: int | None = None) -> Table:
        """Rankers by need, their means and changes against the base, and what reinforcement changed, for a terminal;
        where its ``width`` is given, with the metrics that fit."""
        users = len(set(self.users.tolist()))
        of_all = f"{len(self.users)} lists of {users} test users never trained on; changes are against the base"
        return comparison_table(
            self.per_list,
            clusters=self.users,
            pairs={REINFORCEMENT: (TRAINED, self.start)},
            title=title or of_all,
            caption=self._how_to_read(),
            width=width,
        )

    def table_of_wordings(self) -> Table:
        """What the trained model's lists are worth for each need, where each is asked in words never trained on."""
        names = list(self.unseen_wordings)
        table = Table(
            "asked, in words never trained on",
            title="Does it listen? Mean worth of its lists for each need",
            caption="a model that does not has the same numbers in all rows; [95 % intervals] over users",
        )
        for name in names:
            table.add_column(f"worth for {name}", justify="right")
        for asked, values in self.unseen_wordings.items():
            low_high = {name: bootstrap_interval(v, clusters=self.users) for name, v in values.items()}
            cells = [f"{values[n].mean():.3f} [{low_high[n][0]:.3f}, {low_high[n][1]:.3f}]" for n in names]
            table.add_row(asked, *cells)
        return table

    def summary(self) -> list[str]:
        """What the table says, in sentences."""
        return summary(self.per_list, self.users)

    def __str__(self) -> str:
        console = Console(width=120, no_color=True)
        with console.capture() as text:
            console.print(self.table())
            for sentence in self.summary():
                console.print(sentence)
        return text.get()

    def to_json(self) -> dict[str, Any]:
        """Means, changes and seconds as metrics.json states them."""
        stages = [name for name in (BASE, WARM_START) if name in self.per_list]
        baselines = [name for name in self.per_list if name not in (*stages, TRAINED)]
        needs, new = self.per_list[BASE], self.new_items
        return {
            **{name: self.means(name) for name in (*stages, TRAINED)},
            "baselines": {name: self.means(name) for name in baselines},
            **{
                f"changes_{metric}": {
                    need: {other: asdict(self.compare(TRAINED, other, need, metric)) for other in (*stages, *baselines)}
                    for need, values in needs.items()
                    if headline_of(values) == metric
                }
                for metric in dict.fromkeys((HEADLINE, *map(headline_of, needs.values())))
            },
            "change_by_reinforcement": {
                need: {
                    metric: asdict(self.compare(TRAINED, self.start, need, metric))
                    for metric in dict.fromkeys((headline_of(needs[need]), *METRICS))
                    if metric in needs[need]
                }
                for need in needs
            },
            **({"unseen wordings": self._of_wordings()} if self.unseen_wordings else {}),
            **({"critic": self.critic} if self.critic else {}),
            **({} if new is None else {"new items": {name: new.means(name) for name in new.per_list}}),
            "seconds": {name: round(seconds, 2) for name, seconds in self.seconds.items()},
        }

    def _of_wordings(self) -> dict[str, dict[str, dict[str, float]]]:
        return {
            asked: {name: stated(values, self.users) for name, values in of_needs.items()}
            for asked, of_needs in self.unseen_wordings.items()
        }

    def _how_to_read(self) -> str | None:
        known = [n for n in self.per_list if n == CRITIC or getattr(BASELINES.get(n), "scores_interest", False)]
        difference = f"{REINFORCEMENT}: {TRAINED} minus {self.start}"
        if not known or set(self.per_list[BASE]) == {"interest"}:
            return difference
        return f"{difference}. {', '.join(known)}: the interest they estimate x what the need multiplies it by"


def stated(values: np.ndarray, users: np.ndarray) -> dict[str, float]:
    """A metric's mean over lists, with the 95 % interval over users."""
    low, high = bootstrap_interval(values, clusters=users)
    return {"mean": float(values.mean()), "low": low, "high": high}
