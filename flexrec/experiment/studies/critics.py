"""Critics fitted on what is left of the feedback, and how good they are on users whom they do not know."""

from __future__ import annotations

from typing import Any

import numpy as np

from flexrec.evaluation.critic import critic_quality
from flexrec.experiment.stages import load_dataset
from flexrec.experiment.studies.design import Setting, split_options
from flexrec.experiment.studies.results import of_lists, of_numbers
from flexrec.task.critic import Critic

PARTS = 5  # of the pairs, by popularity and by prediction


class Critics:
    """Called with a ``model``, it is fitted on the setting's data set and asked for all test lists."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        of_data, _ = split_options(setting.start)
        self.dataset = load_dataset(setting.dataset, setting.data, setting.seed, of_data)

    def __call__(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        dataset = self.dataset
        critic = Critic.fit(
            dataset.log,
            dataset.catalogue,
            model=options["model"],
            lists=dataset.train,
            noise=dataset.noise,
            seed=self.setting.seed,
        )
        quality = {name: value for name, value in critic_quality(critic, dataset.test).items() if name != "pairs"}
        interest = np.concatenate([lst.known_interest for lst in dataset.test])
        users = np.concatenate([np.full(len(lst.candidates), lst.user) for lst in dataset.test])
        popularity = np.concatenate([lst.popularity for lst in dataset.test])
        mean, variance = (np.concatenate(part) for part in zip(*critic.predict_many(dataset.test), strict=True))
        known = ~np.isnan(interest)
        interest, users, popularity, mean, variance = (
            values[known] for values in (interest, users, popularity, mean, variance)
        )
        error = mean - interest
        results = of_numbers(quality, of="all")
        for number, part in enumerate(_parts(popularity), 1):
            found = {"rmse": np.sqrt(np.square(error[part]).mean()), "bias": error[part].mean()}
            results += of_numbers(found, of=f"popularity {number}/{PARTS}")
        for number, part in enumerate(_parts(mean), 1):
            found = {"predicted": mean[part].mean(), "found": interest[part].mean()}
            results += of_numbers(found, of=f"prediction {number}/{PARTS}")
        for number, part in enumerate(_parts(variance), 1):
            found = {"predicted sd": np.sqrt(variance[part].mean()), "rmse": np.sqrt(np.square(error[part]).mean())}
            results += of_numbers(found, of=f"sd {number}/{PARTS}")
        results.append(of_lists(np.square(error), users, metric="squared error", of="all"))
        return {"results": results}


def _parts(values: np.ndarray) -> list[np.ndarray]:
    """The pairs in equal parts, those of the smallest values first."""
    return [part for part in np.array_split(np.argsort(values, kind="stable"), PARTS) if len(part)]
