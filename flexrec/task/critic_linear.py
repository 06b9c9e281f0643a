"""Two plain models of a critic, beside the ensemble of networks: factors with a Bayesian last layer, and neighbours.

Both predict the surprise of a pair, its feedback minus what the item has on average, from the user's other surprises,
and both know that a user chose what is in a history: an interaction of unknown interest counts as a surprise of a fixed
size, with a fixed weight, the two that predict best what is held out of those users of whom nothing else is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from flexrec.data.lists import Catalogue, Interactions
from flexrec.task.critic_pairs import Evidence, Pairs, topic_shares

_FACTORS = 8
_ROUNDS = 4  # of alternating between users and items
_DAMPING = 5.0  # observations that an item's mean counts as at 0
_RIDGE = 10.0  # the same of its factors
_NEIGHBOURS = 1.0  # similarity that the prior of a neighbourhood counts as
_CHOSEN = tuple(product((0.1, 0.2, 0.3, 0.4), (0.02, 0.05, 0.1, 0.2)))  # sizes and weights of unknown interest


class _Items(NamedTuple):
    """What both models know of the items."""

    mean: torch.Tensor  # () of the log
    offset: torch.Tensor  # (I,) what an item has beside the mean
    offset_variance: torch.Tensor  # (I,)
    features: torch.Tensor  # (I, F)

    @classmethod
    def of(cls, log: Interactions, features: torch.Tensor) -> _Items:
        """Means of the log, drawn towards the mean of all."""
        items, interest = torch.from_numpy(log.items), torch.from_numpy(log.interest).double()
        mean = interest.mean()
        count = torch.zeros(len(features), dtype=torch.float64).index_add(0, items, torch.ones_like(interest))
        total = torch.zeros(len(features), dtype=torch.float64).index_add(0, items, interest - mean)
        return cls(mean, total / (count + _DAMPING), interest.var() / (count + _DAMPING), features)

    def surprise(self, items: torch.Tensor, interest: torch.Tensor) -> torch.Tensor:
        return interest.double() - self.mean - self.offset[items]


class _Chosen(NamedTuple):
    """What an interaction of unknown interest counts as."""

    surprise: float = 0.0
    weight: float = 0.0  # of one of known interest


def _context(pairs: Pairs, items: _Items, chosen: _Chosen) -> tuple[torch.Tensor, torch.Tensor]:
    """Surprise and weight (M,) of every interaction of the context."""
    known = pairs.context_known.mean(0) > 0.5
    surprise = torch.where(known, items.surprise(pairs.context_items, pairs.context_interest), chosen.surprise)
    return surprise, torch.where(known, 1.0, chosen.weight).double() * pairs.context_present.mean(0)


def _of_strangers(evidence: Evidence) -> Pairs:
    """The held-out pairs, to be predicted from what their users watched alone."""
    users, items = (torch.from_numpy(column) for column in evidence.watched.T)
    return replace(
        evidence.held_out,
        context_rows=users,
        context_items=items,
        context_interest=torch.zeros(len(users)),
        context_known=torch.zeros(1, len(users)),
        context_present=torch.ones(1, len(users)),
        num_rows=max(evidence.held_out.num_rows, int(users.max()) + 1),
    )


def _choose(model: Factorization | Neighbours, evidence: Evidence) -> None:
    """Give the model what unknown interest counts as, where users of the log watched something."""
    if not len(evidence.watched):
        return
    strangers, errors = _of_strangers(evidence), []
    for surprise, weight in _CHOSEN:
        model.chosen = _Chosen(surprise, weight)
        errors.append(np.square(model.predict(strangers)[0] - evidence.interest).mean())
    model.chosen = _Chosen(*_CHOSEN[int(np.argmin(errors))])


def _in_range(items: _Items, mean: torch.Tensor, variance: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of a linear model: an interest in [0, 1] varies the less the nearer its mean is to an end."""
    kept = mean.clamp(0.01, 0.99)
    scaled = variance * kept * (1 - kept) / (items.mean * (1 - items.mean))
    return kept.float().numpy(), scaled.float().numpy()


_Model = TypeVar("_Model", bound="_Linear")


@dataclass(eq=False)
class _Linear:
    """What both models keep.

    Attributes:
        items: means and features of the items.
        chosen: what unknown interest counts as.
    """

    items: _Items
    chosen: _Chosen = field(default=_Chosen(), kw_only=True)

    def to_arrays(self) -> dict[str, np.ndarray]:
        others = {one.name: np.asarray(getattr(self, one.name)) for one in fields(self) if one.name != "items"}
        return {**{name: value.numpy() for name, value in self.items._asdict().items()}, **others}

    @classmethod
    def from_arrays(cls: type[_Model], arrays: dict[str, np.ndarray], catalogue: Catalogue) -> _Model:
        items = _Items(*(torch.from_numpy(arrays[name]) for name in _Items._fields))
        own = {one.name: arrays[one.name] for one in fields(cls) if one.name not in ("items", "chosen")}
        others = {name: torch.from_numpy(array) if array.ndim else float(array) for name, array in own.items()}
        return cls(items, chosen=_Chosen(*arrays["chosen"].tolist()), **others)


@dataclass(eq=False)
class Factorization(_Linear):
    """Matrix factorisation whose last layer, the users' weights of the items' features, is Bayesian.

    A surprise is w_u f_i + noise, f_i being 1, the item's topics and factors that are learnt from the log by
    alternating least squares; w_u has a normal prior, whose mean and covariance are those of all users (empirical
    Bayes). So the prediction of a pair is a normal distribution, exactly, with what a single interaction adds to it.
    A :class:`flexrec.task.critic_pairs.CriticModel`.
    """

    prior_mean: torch.Tensor
    prior: torch.Tensor
    noise: float

    @classmethod
    def fit(cls, evidence: Evidence, seed: int) -> Factorization:
        log, topics = evidence.log, topic_shares(evidence.catalogue).double()
        generator = torch.Generator().manual_seed(seed)
        factors = 0.3 * torch.randn(len(topics), _FACTORS, generator=generator, dtype=torch.float64)
        items = _Items.of(log, torch.cat([torch.ones(len(topics), 1, dtype=torch.float64), topics, factors], 1))
        width = items.features.shape[1]
        users, rows = np.unique(log.users, return_inverse=True)
        at, of = torch.from_numpy(rows), torch.from_numpy(log.items)
        surprise = items.surprise(of, torch.from_numpy(log.interest))
        model = cls(items, torch.zeros(width, dtype=torch.float64), 0.05 * torch.eye(width, dtype=torch.float64), 0.05)
        for _ in range(_ROUNDS):
            features = model.items.features
            mean, covariance = model._posterior(len(users), at, of, surprise, torch.ones_like(surprise))
            left = surprise - (features[of] * mean[at]).sum(1)
            # The expected squared error of the log, whose weights are not known for certain either.
            spread = torch.einsum("ni,nij,nj->n", features[of], covariance[at], features[of])
            model.noise = float((left.square() + spread).mean())
            model.prior_mean = mean.mean(0)
            about = mean - model.prior_mean
            model.prior = covariance.mean(0) + about.T @ about / len(users)
            # Factors of the items, by ridge regression of what topics leave on the users' weights.
            weights = mean[at, -_FACTORS:]  # (M, F)
            rest = left + (features[of, -_FACTORS:] * weights).sum(1)
            scale = model.prior[-_FACTORS:, -_FACTORS:].diagonal().mean()
            gram = torch.zeros(len(features), _FACTORS, _FACTORS, dtype=torch.float64)
            gram.index_add_(0, of, weights[:, :, None] * weights[:, None])
            moment = torch.zeros(len(features), _FACTORS, dtype=torch.float64).index_add(0, of, weights * rest[:, None])
            learnt = torch.linalg.solve(gram + _RIDGE * scale * torch.eye(_FACTORS, dtype=torch.float64), moment)
            model.items = items._replace(features=torch.cat([features[:, :-_FACTORS], learnt], 1))
        _choose(model, evidence)
        return model

    def _posterior(
        self, rows: int, at: torch.Tensor, of: torch.Tensor, surprise: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (R, F) and covariance (R, F, F) of users' weights, by interactions: row, item, surprise, weight."""
        features = self.items.features[of]
        precision = torch.linalg.inv(self.prior)
        told = weight / self.noise
        gram = torch.zeros(rows, *self.prior.shape, dtype=torch.float64)
        gram.index_add_(0, at, told[:, None, None] * features[:, :, None] * features[:, None])
        moment = torch.zeros(rows, len(self.prior), dtype=torch.float64)
        moment.index_add_(0, at, (told * surprise)[:, None] * features)
        covariance = torch.linalg.inv(precision + gram)
        return torch.einsum("rij,rj->ri", covariance, precision @ self.prior_mean + moment), covariance

    def predict(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        surprise, weight = _context(pairs, self.items, self.chosen)
        mean, covariance = self._posterior(pairs.num_rows, pairs.context_rows, pairs.context_items, surprise, weight)
        features = self.items.features[pairs.target_items]  # (N, F)
        expected = (features * mean[pairs.target_rows]).sum(1)
        doubt = torch.einsum("ni,nij,nj->n", features, covariance[pairs.target_rows], features)
        # Without the pair's own interaction: what a normal distribution is when one observation is taken out of it.
        own = torch.cat([weight, weight.new_zeros(1)])[pairs.target_context] / self.noise  # -1 is the zero at the end
        told = torch.cat([surprise, surprise.new_zeros(1)])[pairs.target_context]
        kept = (1 - own * doubt).clamp(min=1e-6)
        expected, doubt = (expected - own * doubt * told) / kept, doubt / kept
        items = self.items
        expected = items.mean + items.offset[pairs.target_items] + expected
        return _in_range(items, expected, doubt + items.offset_variance[pairs.target_items] + self.noise)


@dataclass(eq=False)
class Neighbours(_Linear):
    """Item neighbours: the mean surprise of the user's items that are like the candidate, and their variance about it.

    Items are alike by their topics and by who liked them (directions of the log's surprises, by a truncated singular
    value decomposition): s = max(0, cosine)^2. With S the summed similarity, the variance is that of the neighbours
    about their mean, drawn towards the log's, plus the log's divided by S, each with a prior of S = 1.
    A :class:`flexrec.task.critic_pairs.CriticModel`.
    """

    variance: float

    @classmethod
    def fit(cls, evidence: Evidence, seed: int) -> Neighbours:
        log, topics = evidence.log, topic_shares(evidence.catalogue).double()
        items = _Items.of(log, topics)
        surprise = items.surprise(torch.from_numpy(log.items), torch.from_numpy(log.interest))
        users, rows = np.unique(log.users, return_inverse=True)
        table = torch.sparse_coo_tensor(
            torch.from_numpy(np.stack([log.items, rows])), surprise, (len(topics), len(users)), check_invariants=False
        ).coalesce()
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(len(users), _FACTORS, generator=generator, dtype=torch.float64)
        for _ in range(_ROUNDS):  # subspace iteration
            directions = torch.linalg.qr(table.T @ (table @ directions)).Q
        by_users = table @ directions
        parts = [part / part.norm(dim=1, keepdim=True).clamp(min=1e-9) for part in (topics, by_users)]
        model = cls(items._replace(features=torch.cat(parts, 1) / 2**0.5), float(surprise.var()))
        _choose(model, evidence)
        return model

    def predict(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        surprise, weight = _context(pairs, self.items, self.chosen)
        # Every target beside every interaction of its row.
        order = torch.argsort(pairs.context_rows, stable=True)
        count = torch.bincount(pairs.context_rows, minlength=pairs.num_rows)
        start = torch.cumsum(count, 0) - count
        of_target = count[pairs.target_rows]
        target = torch.repeat_interleave(torch.arange(len(of_target)), of_target)
        within = torch.arange(len(target)) - torch.repeat_interleave(torch.cumsum(of_target, 0) - of_target, of_target)
        context = order[start[pairs.target_rows][target] + within]
        features = self.items.features
        alike = (features[pairs.target_items[target]] * features[pairs.context_items[context]]).sum(1).clamp(min=0) ** 2
        alike = alike * weight[context] * (context != pairs.target_context[target])

        def summed(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(of_target), dtype=torch.float64).index_add(0, target, values)

        similarity = summed(alike) + _NEIGHBOURS
        expected = summed(alike * surprise[context]) / similarity
        about = summed(alike * (surprise[context] - expected[target]).square())
        spread = (about + _NEIGHBOURS * self.variance) / similarity
        items = self.items
        mean = items.mean + items.offset[pairs.target_items] + expected
        variance = spread + self.variance / similarity + items.offset_variance[pairs.target_items]
        return _in_range(items, mean, variance)
