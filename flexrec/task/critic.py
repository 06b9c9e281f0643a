"""The critic: how interested a user would be in an item, and how sure that is, where no feedback was collected.

A model (:data:`MODELS`) is fitted on the log and predicts a pair's feedback, mean and variance. A user is known to it
by interactions alone, never by number, so a user who came after the fit is served like any other. The critic adds what
feedback says of that model (:mod:`flexrec.task.calibration`): where there are lists of training users, by how much its
means are wrong because feedback in the log was chosen by the user, and in any case how much of its variance is
ignorance of the expected interest, which is what counts, and how much the noise of an observation, which is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flexrec.checks import check_choice
from flexrec.data.lists import Catalogue, Interactions, RankingList
from flexrec.task.calibration import (
    UNCHANGED,
    Calibration,
    beta_quantiles,
    calibrated,
    fit_calibration,
    fit_shares,
    noise_share,
    shares,
)
from flexrec.task.critic_ensemble import Ensemble
from flexrec.task.critic_linear import Factorization, Neighbours
from flexrec.task.critic_pairs import (
    CriticModel,
    Evidence,
    check_log,
    leave_out_pairs,
    merged,
    num_known,
    pairs_of_lists,
    watched_pairs,
    with_nothing_known,
)
from flexrec.task.needs import novelty

_PLAIN: dict[str, type[Factorization] | type[Neighbours]] = {"mf": Factorization, "knn": Neighbours}
MODELS: dict[str, type[Ensemble] | type[Factorization] | type[Neighbours]] = {"ensemble": Ensemble, **_PLAIN}

_VALIDATION_SHARE = 0.1
_PREDICT_LISTS = 512  # lists predicted at a time
_FILE = "critic.npz"


class Critic:
    """Predicts mean and variance of the interest in unobserved user-item pairs; made by ``Critic.fit``.

    The variance is that of the expected interest: what the critic does not know of it. The noise of feedback around
    the expected interest is no part of it, where it is known (``noise``).

    Attributes:
        calibration: what was learnt from feedback about the model's means and variances.
        fuse: ``fill`` weighs what was observed against the prediction, each by its precision; otherwise, and where the
            noise of feedback is not known, what was observed is taken for certain.

    Example:
        >>> from flexrec.data import simulate
        >>> from flexrec.task import Critic
        >>> data = simulate(num_users=60, num_items=120, num_topics=4, num_test_users=2, num_candidates=6)
        >>> critic = Critic.fit(data.log, data.catalogue, seed=0)
        >>> interest, variance = critic.fill_many(data.train[:1])[0]  # predicted where nothing was observed
        >>> bool(np.isnan(data.train[0].interest).any()), bool(np.isnan(interest).any())
        (True, False)
        >>> low, high = critic.interval(data.test[0], 0.8)  # each interest lies between them with this probability
        >>> bool((low < high).all())
        True
    """

    def __init__(
        self,
        model: CriticModel,
        log: Interactions,
        catalogue: Catalogue,
        calibration: Calibration | None = None,
        *,
        fuse: bool = True,
    ) -> None:
        self.model = model
        self.calibration = calibration or Calibration()
        self.fuse = fuse
        self._log, self._catalogue = log, catalogue  # the log is sorted by user and item

    @classmethod
    def fit(
        cls,
        log: Interactions,
        catalogue: Catalogue,
        *,
        model: str = "ensemble",
        lists: Sequence[RankingList] = (),
        noise: float = 0.0,
        fuse: bool = True,
        seed: int = 0,
        ensemble: int = 5,
        epochs: int | None = None,
        progress: bool = False,
    ) -> Critic:
        """Fit a model on logged feedback, and calibrate it.

        A tenth of the log is held out of the model's fit. Its variances are calibrated there: on the pairs that lists
        hold, or on all of them where there are no lists, each predicted twice, with what is known of its user and as
        of a user of whom no feedback is known.

        Args:
            log: feedback of training users, interest in [0, 1]. Repeated pairs are averaged.
            catalogue: the items, whose topics are used as features.
            model: "ensemble", neural networks (:mod:`flexrec.task.critic_ensemble`); "mf", matrix factorisation with a
                Bayesian last layer, or "knn", neighbours among the items (:mod:`flexrec.task.critic_linear`).
            lists: lists of training users, whose feedback, where there is some, was collected whether they liked an
                item or not (``RankingDataset.unobserved == "critic"``; never sampled negatives). Their histories are
                shown in training too, of interest unknown, and means are calibrated on their feedback.
            noise: mean variance of a logged interest around the expected one. 0: not known; what was logged is taken
                for the expected interest, and the critic's variances are those of feedback.
            fuse: see :class:`Critic`.
            seed: of initial weights, batches and the held-out tenth; the same seed gives the same critic.
            ensemble: number of networks, of the model of this name.
            epochs: its passes over the log. None: 8 to 30, about a million interactions in all; more help a little.
            progress: show a progress bar.

        Raises:
            ValueError: fewer than two interactions, an item outside the catalogue, interest outside [0, 1] or NaN, or
                an unknown model.
        """
        check_log(log, len(catalogue))
        check_choice("model", model, tuple(MODELS))
        if ensemble < 1 or (epochs is not None and epochs < 1):
            raise ValueError(f"ensemble and epochs must be at least 1, got {ensemble} and {epochs}")
        if not 0 <= noise < 0.25:
            raise ValueError(f"noise must lie in [0, 0.25), a variance of values in [0, 1]; got {noise}")
        log = merged(log, len(catalogue))
        rng = np.random.default_rng(seed)
        held_out = np.zeros(len(log), dtype=bool)
        held_out[rng.choice(len(log), size=max(1, round(_VALIDATION_SHARE * len(log))), replace=False)] = True
        seen = log.select(~held_out)
        evidence = Evidence(
            catalogue=catalogue,
            log=seen,
            watched=watched_pairs(lists, seen, len(catalogue)),
            held_out=leave_out_pairs(log, held_out),
            interest=log.interest[held_out],
        )
        fitted: CriticModel
        if model == "ensemble":
            fitted = Ensemble.fit(evidence, rng, seed=seed, members=ensemble, epochs=epochs, progress=progress)
        else:
            fitted = _PLAIN[model].fit(evidence, seed)
        critic = cls(fitted, log, catalogue, fuse=fuse)
        observed = [lst for lst in lists if not np.isnan(lst.interest).all()]
        if observed:
            critic._calibrate_on_lists(observed, log.select(held_out), noise)
        else:
            critic._calibrate_on_log(evidence, noise)
        return critic

    def _calibrate_on_lists(self, lists: Sequence[RankingList], held_out: Interactions, noise: float) -> None:
        """Means on all feedback, each pair predicted without itself; variances on that which no model was fitted on."""
        raw, of_strangers = self._predict_raw(lists), self._predict_raw(lists, strangers=True)
        interest = np.concatenate([lst.interest for lst in lists])
        new = np.concatenate([novelty(lst, self._catalogue) for lst in lists])
        known = ~np.isnan(interest)
        means = fit_calibration(raw[0][known], new[known], interest[known])
        pairs = np.concatenate([lst.user * len(self._catalogue) + lst.candidates for lst in lists])
        unseen = known & np.isin(pairs, held_out.users * len(self._catalogue) + held_out.items)
        if not unseen.any():  # so few are better than none
            unseen = known
        self._calibrate([raw, of_strangers], means, new, unseen, interest, noise)

    def _calibrate_on_log(self, evidence: Evidence, noise: float) -> None:
        """Variances on the held-out tenth; there is no history to which something could be new."""
        predicted = [
            (*self.model.predict(pairs), num_known(pairs) == 0)
            for pairs in (evidence.held_out, with_nothing_known(evidence.held_out))
        ]
        size = len(evidence.interest)
        self._calibrate(predicted, UNCHANGED, np.zeros(size), np.ones(size, dtype=bool), evidence.interest, noise)

    def _calibrate(
        self,
        predicted: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
        means: np.ndarray,
        new: np.ndarray,
        chosen: np.ndarray,
        interest: np.ndarray,
        noise: float,
    ) -> None:
        """The model's means, variances and whether nothing is known, by several views of the same pairs, of which
        ``chosen`` count."""
        new, interest = new[chosen], interest[chosen]
        views = [(mean[chosen], variance[chosen], nothing[chosen]) for mean, variance, nothing in predicted]
        right = [calibrated(mean, new, means) for mean, _, _ in views]
        nu = noise_share(right[0], interest, noise)
        variance = fit_shares(
            np.concatenate(right),
            np.concatenate([shares(mean, variance) for mean, variance, _ in views]),
            np.tile(new, len(views)),
            np.concatenate([nothing for _, _, nothing in views]),
            np.tile(interest, len(views)),
            nu,
        )
        self.calibration = Calibration(means, variance, nu)

    def _predict_raw(
        self, lists: Sequence[RankingList], strangers: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The model's mean and variance of all candidates of all lists, and whether no feedback of the user is known;
        as of users who are not in the log if they are ``strangers``."""
        log = self._log.select(np.zeros(0, dtype=np.int64)) if strangers else self._log
        parts = []
        for start in range(0, len(lists), _PREDICT_LISTS):
            pairs = pairs_of_lists(lists[start : start + _PREDICT_LISTS], log, len(self._catalogue))
            parts.append((*self.model.predict(pairs), num_known(pairs) == 0))
        mean, variance, nothing_known = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return mean, variance, nothing_known

    def predict(self, lst: RankingList) -> tuple[np.ndarray, np.ndarray]:
        """Mean (K,) float32 in [0, 1] and variance (K,) float32 >= 0 of the interest in each candidate.

        What is known of the user is their log (if they were in it) and ``lst.history``, of which the interest may be
        unknown. Feedback of a pair that is predicted is never used for it.
        """
        return self.predict_many([lst])[0]

    def predict_many(self, lists: Sequence[RankingList]) -> list[tuple[np.ndarray, np.ndarray]]:
        """``predict`` for many lists at once."""
        if not lists:
            return []
        raw, variance, nothing_known = self._predict_raw(lists)
        new = np.concatenate([novelty(lst, self._catalogue) for lst in lists])
        mean = calibrated(raw, new, self.calibration.mean)
        ignorance = self.calibration.ignorance(mean, shares(raw, variance), new, nothing_known)
        ends = np.cumsum([len(lst.candidates) for lst in lists])[:-1]
        return list(zip(np.split(mean, ends), np.split(ignorance, ends), strict=True))

    def interval(self, lst: RankingList, level: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
        """Low and high (K,): the expected interest in each candidate lies between them with probability ``level``.

        The ends leave (1 - level) / 2 on either side of the Beta distribution that has the predicted mean and variance.
        """
        return self.interval_many([lst], level)[0]

    def interval_many(self, lists: Sequence[RankingList], level: float = 0.8) -> list[tuple[np.ndarray, np.ndarray]]:
        """``interval`` for many lists at once."""
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {level}")
        if not lists:
            return []
        mean, variance = (np.concatenate(parts) for parts in zip(*self.predict_many(lists), strict=True))
        bounds = beta_quantiles(mean, variance, ((1 - level) / 2, (1 + level) / 2)).astype(np.float32)
        ends = np.cumsum([len(lst.candidates) for lst in lists])[:-1]
        return list(zip(np.split(bounds[:, 0], ends), np.split(bounds[:, 1], ends), strict=True))

    def fill(self, lst: RankingList) -> tuple[np.ndarray, np.ndarray]:
        """The prediction and its variance, (K,) float32 both; where observed, ``lst.interest`` with variance 0.

        Where the noise of an observation is known, what was observed is fused with the prediction by precision: v being
        the variance of the prediction and s that of the noise, (v observed + s predicted) / (v + s), of variance
        v s / (v + s).
        """
        return self.fill_many([lst])[0]

    def fill_many(self, lists: Sequence[RankingList]) -> list[tuple[np.ndarray, np.ndarray]]:
        """``fill`` for many lists at once."""
        filled = []
        for lst, (mean, ignorance) in zip(lists, self.predict_many(lists), strict=True):
            observed = ~np.isnan(lst.interest)
            noise = self.calibration.noise_of(mean, ignorance) if self.fuse else np.zeros_like(mean)
            trust = ignorance / (ignorance + noise)
            fused = trust * np.nan_to_num(lst.interest) + (1 - trust) * mean
            interest = np.where(observed, fused, mean).astype(np.float32)
            filled.append((interest, np.where(observed, trust * noise, ignorance).astype(np.float32)))
        return filled

    def save(self, folder: str | Path) -> Path:
        """Write the critic into a folder, as one file of arrays, and return its path. The catalogue is not written."""
        path = Path(folder) / _FILE
        name = next(name for name, kind in MODELS.items() if isinstance(self.model, kind))
        log, calibration = self._log, self.calibration
        np.savez_compressed(
            path,
            allow_pickle=False,
            model=np.array(name),
            fuse=np.array(self.fuse),
            num_items=np.array(len(self._catalogue)),
            **{f"log/{name}": getattr(log, name) for name in ("users", "items", "interest", "times")},
            **{f"calibration/{name}": np.asarray(getattr(calibration, name)) for name in ("mean", "variance", "noise")},
            **{f"model/{name}": array for name, array in self.model.to_arrays().items()},
        )
        return path

    @classmethod
    def load(cls, folder: str | Path, catalogue: Catalogue) -> Critic:
        """The critic that ``save`` wrote, for the catalogue that it was fitted with.

        Raises:
            FileNotFoundError: there is none in ``folder``.
            ValueError: the catalogue has another number of items.
        """
        path = Path(folder) / _FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no critic: it has no {path.name}")
        with np.load(path, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
        if arrays["num_items"] != len(catalogue):
            raise ValueError(
                f"catalogue must have the {arrays['num_items']} items that the critic was fitted with, "
                f"got {len(catalogue)}"
            )
        model = MODELS[str(arrays["model"])].from_arrays(_part(arrays, "model/"), catalogue)
        calibration = _part(arrays, "calibration/")
        return cls(
            model,
            Interactions(**_part(arrays, "log/")),
            catalogue,
            Calibration(calibration["mean"], calibration["variance"], float(calibration["noise"])),
            fuse=bool(arrays["fuse"]),
        )


def _part(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
