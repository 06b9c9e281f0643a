"""Estimators of the policy gradient measured without sampling: every ranking of a short list is enumerated.

For a policy whose probabilities are known, the expectation of an estimator over all K! rankings is its direction, and
can be held against the gradient of the expected metric; what a single ranking adds to it is its noise. The estimators
are made by the package's own functions: the logits stand in place of a model's states.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexrec.experiment.studies.design import Setting
from flexrec.experiment.studies.results import of_lists
from flexrec.metrics import CREDITS
from flexrec.ops.all_actions import all_actions_objective
from flexrec.ops.ranking_logprobs import ranking_logprobs, ranking_probs
from flexrec.ops.ranking_metric import ranking_metric
from flexrec.ops.swap_rewards import swap_rewards

BASELINES = ("", ", mean", ", mean and spread")  # subtracted per rank, and divided by
ALL_ACTIONS: dict[str, dict[str, Any]] = {
    "all_actions": {},
    "all_actions, tilt 0.1": {"tilt": 0.1},
    "all_actions_corrected, any order": {"foresight": 0.0},
    "all_actions_corrected, race": {"foresight": 1.0},
    "all_actions_corrected": {"foresight": "auto"},
}
POLICIES = ("plackett-luce", "stepwise", "pairs", "prefixes", "trigger")
NEGLIGIBLE = 1e-9
MEAN_OF = 64


@dataclass(frozen=True)
class Measures:
    """An estimator against the true gradient.

    Attributes:
        cosine: between its expectation and the true gradient.
        bias: distance of the two, relative to the true one. An estimator may be a multiple of the gradient: its
            expectation is scaled to be nearest.
        sign_errors: share of the parameters that it moves the wrong way.
        snr: length of its expectation over the root of its total variance, of one ranking.
        noise: the root of the total variance, relative to the true gradient, scaled as for the bias.
        error: of the mean over ``MEAN_OF`` rankings: sqrt(bias^2 + noise^2 / MEAN_OF).
    """

    cosine: float
    bias: float
    sign_errors: float
    snr: float
    noise: float
    error: float


class Enumeration:
    """All rankings of K items under a policy, whose logits are parameters.

    Policies, of increasing dependence on what stands above: "plackett-luce", a logit for each item; "stepwise", for
    each rank and item; "pairs", the same and for each pair of an item and one that stands above it; "prefixes", for
    each prefix and item; and "trigger", of the last kind, with item 0 of gain 0 whose choice at the first rank makes
    the policy order the others well, and badly otherwise.

    Args:
        strength: of the dependence ("pairs"), else of the logits: their standard deviation.
    """

    def __init__(self, size: int, policy: str, strength: float, rng: np.random.Generator) -> None:
        self.rankings = torch.tensor(list(permutations(range(size))))  # (N, K)
        self.size, self.policy = size, policy
        prefixes: dict[tuple[int, ...], int] = {}
        rows = self.rankings.tolist()
        prefix = [[prefixes.setdefault(tuple(row[:k]), len(prefixes)) for k in range(size)] for row in rows]
        self.prefix = torch.tensor(prefix)  # (N, K) which prefix stands above each rank
        self.gains = torch.from_numpy(rng.random(size) * (rng.random(size) < 0.8))  # (K,) by item
        if not self.gains.any():
            self.gains[0] = 1.0
        self.parameters = [torch.from_numpy(x) for x in self._drawn(strength, prefixes, rng)]
        if policy == "trigger":
            self.gains = torch.tensor([0.0, 1.0, *[0.1] * (size - 2)], dtype=torch.float64)
            ordered = torch.stack([self.gains if p[:1] == (0,) else -self.gains for p in prefixes])
            ordered[0] = 0.0
            self.parameters = [strength * ordered]
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.logits = self._logits()  # (N, K, K) by rank and item
        self.candidates = torch.arange(size).expand(len(rows), size).contiguous()
        self.arguments = (self.logits, torch.eye(size, dtype=torch.float64), self.candidates, self.rankings)
        self.logprobs = ranking_logprobs(*self.arguments).logprobs  # (N, K)
        self.probability = self.logprobs.detach().sum(1).exp()  # (N,)

    def _drawn(self, strength: float, prefixes: dict[tuple[int, ...], int], rng: np.random.Generator) -> list[Any]:
        size = self.size
        if self.policy == "plackett-luce":
            return [strength * rng.normal(size=size)]
        if self.policy == "stepwise":
            return [strength * rng.normal(size=(size, size))]
        if self.policy == "pairs":
            return [rng.normal(size=(size, size)), strength * rng.normal(size=(size, size))]
        return [strength * rng.normal(size=(len(prefixes), size))]

    def _logits(self) -> Tensor:
        first = self.parameters[0]
        shape = (*self.rankings.shape, self.size)
        if self.policy == "plackett-luce":
            return first.expand(shape)
        if self.policy == "stepwise":
            return first[None].expand(shape)
        if self.policy == "pairs":
            above = self.parameters[1][self.rankings].cumsum(1)  # of the items up to each rank
            return first[None] + torch.nn.functional.pad(above[:, :-1], (0, 0, 1, 0))
        return first[self.prefix]

    def in_rank_order(self) -> Tensor:
        """(N, K) gains."""
        return self.gains[self.rankings]

    def moments(self, objective: Tensor) -> tuple[Tensor, Tensor]:
        """Of the gradient of a ranking's own objective (N, K), summed over its ranks: its mean (parameters,) over all
        rankings, and the mean of its squared length."""
        # A ranking's objective depends on its own logits alone, so that one pass gives the gradients of all in these.
        (of_logits,) = torch.autograd.grad(objective.sum(), self.logits, retain_graph=True)  # (N, K, K)
        if self.policy in ("prefixes", "trigger"):  # whose parameters are many, of which a ranking has few
            mean = of_logits.new_zeros(len(self.parameters[0]), self.size)
            mean.index_add_(0, self.prefix.flatten(), (self.probability[:, None, None] * of_logits).flatten(0, 1))
            return mean.flatten(), self.probability @ of_logits.square().sum((1, 2))
        each = self._of_parameters(of_logits)
        return self.probability @ each, self.probability @ each.square().sum(1)

    def _of_parameters(self, of_logits: Tensor) -> Tensor:
        """(N, parameters) from gradients in the logits (N, K, K)."""
        if self.policy == "plackett-luce":
            return of_logits.sum(1)
        if self.policy == "stepwise":
            return of_logits.flatten(1)
        below = of_logits.flip(1).cumsum(1).flip(1) - of_logits  # (N, K, K) what stands below each rank
        of_pairs = torch.zeros_like(of_logits).scatter_(1, self.rankings[..., None].expand_as(below), below)
        return torch.cat([of_logits.flatten(1), of_pairs.flatten(1)], 1)

    def true_gradient(self, metric: str) -> Tensor:
        """(parameters,) of the expected metric."""
        value = ranking_metric(self.in_rank_order(), metric)  # (N,)
        return self.moments(self.logprobs * value[:, None])[0]

    def objective(self, credit: str, metric: str) -> Tensor:
        """(N, K) what an estimator of this name differentiates."""
        gains = self.in_rank_order()
        if credit in ALL_ACTIONS:
            hidden, weight, candidates, rankings = self.arguments
            # Of two prompts with all rankings each: how far to trust a guess is for one to say of the other.
            twice = (torch.cat([hidden, hidden]), weight, candidates[:2], torch.cat([rankings, rankings]))
            found = all_actions_objective(*twice, torch.cat([gains, gains]), metric, **ALL_ACTIONS[credit])
            return found.objective[: len(rankings)]
        name, _, baseline = credit.partition(", ")
        weights = ranking_probs(*self.arguments).detach() if name == "policy" else None
        rewards = swap_rewards(gains, metric, credit=name, weights=weights)
        if baseline:  # those of as many rankings as one likes
            rewards = rewards - self.probability @ rewards
        if baseline == "mean and spread":
            spread = (self.probability @ rewards.square()).sqrt()
            rewards = torch.where(spread > NEGLIGIBLE, rewards / spread.clamp(min=NEGLIGIBLE), 0.0)
        return self.logprobs * rewards

    def measures(self, credit: str, metric: str, true: Tensor) -> Measures:
        """How an estimator does against the true gradient."""
        expected, mean_square = self.moments(self.objective(credit, metric))
        spread = (mean_square - expected.square().sum()).clamp(min=NEGLIGIBLE**2).sqrt()
        scale = (expected @ true) / expected.square().sum()
        counted = true.abs() > NEGLIGIBLE
        wrong = (expected.sign() != true.sign())[counted].double().mean()
        bias, noise = float((scale * expected - true).norm() / true.norm()), float(scale.abs() * spread / true.norm())
        return Measures(
            cosine=float(torch.nn.functional.cosine_similarity(expected, true, dim=0)),
            bias=bias,
            sign_errors=float(wrong),
            snr=float(expected.norm() / spread),
            noise=noise,
            error=float((bias**2 + noise**2 / MEAN_OF) ** 0.5),
        )


def credits() -> list[str]:
    return [*ALL_ACTIONS, *(f"{name}{baseline}" for name in CREDITS for baseline in BASELINES)]


class Estimators:
    """Called with a ``policy`` and a ``strength``, it measures every credit on ``instances`` of random gains and logits
    of lists of ``size`` items, for each of ``metrics``."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def __call__(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        options = {**self.setting.start, **options}
        found: dict[tuple[str, str], list[Measures]] = {}
        instances = 1 if options["policy"] == "trigger" else options["instances"]
        for instance in range(instances):
            rng = np.random.default_rng([self.setting.seed, instance])
            enumeration = Enumeration(options["size"], options["policy"], options["strength"], rng)
            for metric in options["metrics"]:
                true = enumeration.true_gradient(metric)
                for credit in credits():
                    found.setdefault((metric, credit), []).append(enumeration.measures(credit, metric, true))
        return {
            "results": [
                of_lists(
                    np.array([getattr(one, measure) for one in of_instances]),
                    np.arange(instances),
                    metric=measure,
                    credit=credit,
                    objective=metric,
                )
                for (metric, credit), of_instances in found.items()
                for measure in Measures.__dataclass_fields__
            ]
        }
