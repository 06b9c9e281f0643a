"""The ensemble of a critic: small heteroscedastic networks (Lakshminarayanan et al. 2017, arXiv 1612.01474).

Each member predicts mean m_e and noise variance s_e^2 of a pair's feedback; the ensemble's prediction is

    mean = avg_e m_e,        variance = avg_e s_e^2 + var_e m_e,

what the feedback scatters by plus what the members disagree on.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from flexrec.data.lists import Catalogue, Interactions
from flexrec.profiling import progress as told
from flexrec.task.critic_pairs import Evidence, Pairs, starts_of, topic_shares

_EMBEDDING = 16
_HIDDEN = 32
_BATCH = 1024  # targets, about: whole users are never split
_EPOCH_BUDGET = 1_000_000  # interactions
_LEARNING_RATE = 1e-2
_WEIGHT_DECAY = 1e-1
_SMOOTHING = 2.0  # pseudo-count that draws averages over few interactions towards 0
_BETA_NLL = 0.5


class Ensemble:
    """Networks fitted on a log; a :class:`flexrec.task.critic_pairs.CriticModel`."""

    def __init__(self, network: _Ensemble) -> None:
        self.network = network

    @classmethod
    def fit(
        cls,
        evidence: Evidence,
        rng: np.random.Generator,
        *,
        seed: int,
        members: int = 5,
        epochs: int | None = None,
        progress: bool = False,
    ) -> Ensemble:
        """Every interaction is predicted from its user's other ones. Which of these are shown, and of which the
        interest is known, is drawn anew each time, so that the networks serve users with little or no known feedback
        too. The loss is the Gaussian negative log-likelihood weighted by variance^0.5 (beta-NLL, arXiv 2203.09168),
        without which hard pairs would not be learned. The epoch with the least squared error on what is held out is
        kept.
        """
        seen, watched, validation = evidence.log, evidence.watched, evidence.held_out
        if epochs is None:
            epochs = int(np.clip(_EPOCH_BUDGET // (len(seen) + len(evidence.interest)), 8, 30))
        target = torch.from_numpy(evidence.interest)
        generator = torch.Generator().manual_seed(seed)
        mean = float(np.clip(seen.interest.mean(), 0.01, 0.99))
        variance = float(np.clip(seen.interest.var(), 1e-3, 0.25))
        network = _Ensemble(members, topic_shares(evidence.catalogue), mean, variance, generator)
        optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        best_error, best_state = np.inf, copy.deepcopy(network.state_dict())
        batches = _user_batches(seen, rng)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, _LEARNING_RATE, total_steps=epochs * len(batches), pct_start=0.1
        )
        for _ in told("Fitting the critic", range(epochs), unit="epoch", shown=progress):
            for rows in _user_batches(seen, rng):
                pairs, interest = _training_pairs(seen, rows, members, generator)
                if len(watched):
                    pairs = _with_watched(pairs, watched, rows, members, generator)
                predicted, log_variance = network(pairs)
                loss = _beta_nll(predicted, log_variance, interest)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                error = (network(validation)[0].mean(0) - target).square().mean().item()
            if error < best_error:
                best_error, best_state = error, copy.deepcopy(network.state_dict())
        network.load_state_dict(best_state)
        return cls(network)

    @torch.no_grad()
    def predict(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        means, log_variances = self.network(pairs)
        variance = log_variances.exp().mean(0) + means.var(0, correction=0)  # average noise plus disagreement
        return means.mean(0).numpy(), variance.numpy()

    def to_arrays(self) -> dict[str, np.ndarray]:
        state = {name: value.numpy() for name, value in self.network.state_dict().items()}
        return {**state, "global_mean": np.array(self.network.global_mean)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], catalogue: Catalogue) -> Ensemble:
        members, mean = len(arrays["item_embedding"]), float(arrays["global_mean"])
        network = _Ensemble(members, topic_shares(catalogue), mean, 1.0, torch.Generator())
        network.load_state_dict({n: torch.from_numpy(a) for n, a in arrays.items() if n != "global_mean"})
        return cls(network)


class _Ensemble(nn.Module):
    """E networks side by side: every parameter has a leading dimension E, every layer is one batched product."""

    topics: torch.Tensor  # (I, C)

    def __init__(self, size: int, topics: torch.Tensor, mean: float, variance: float, generator: torch.Generator):
        super().__init__()
        items, num_topics = topics.shape

        def normal(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(size, *shape, generator=generator))

        self.register_buffer("topics", topics)
        self.global_mean = mean
        self.item_embedding = normal(items, _EMBEDDING, scale=0.1)
        # Topics start orthogonal (as far as there is room), and the user as the sum of surprise x embedding: then the
        # product of user and item is the user's summed surprise at items that share the item's topics.
        bases = torch.randn(size, max(num_topics, _EMBEDDING), _EMBEDDING, generator=generator)
        self.topic_embedding = nn.Parameter(torch.linalg.qr(bases).Q[:, :num_topics].contiguous())
        self.item_bias = nn.Parameter(torch.zeros(size, items))
        user_width, pair_width = 2 * _EMBEDDING + 3, 3 * _EMBEDDING + 3
        self.user_weight = normal(user_width, _EMBEDDING, scale=0.1 * user_width**-0.5)
        self.user_weight.data[:, _EMBEDDING : 2 * _EMBEDDING] += torch.eye(_EMBEDDING)
        self.hidden_weight = normal(pair_width, _HIDDEN, scale=(2 / pair_width) ** 0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(size, 1, _HIDDEN))
        self.out_weight = normal(_HIDDEN, 2, scale=0.1 * _HIDDEN**-0.5)
        start = torch.tensor([np.log(mean / (1 - mean)), np.log(variance)], dtype=torch.float32)
        self.out_bias = nn.Parameter(start.repeat(size, 1, 1))

    def forward(self, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (E, N) in (0, 1) and log-variance (E, N) of every target."""
        members = len(self.item_embedding)
        items = self.item_embedding + self.topics @ self.topic_embedding  # (E, I, D)

        # What each interaction adds to its user: [embedding, surprise x embedding, surprise, 1, known].
        history = items[:, pairs.context_items]  # (E, M, D)
        present = pairs.context_present.expand(members, -1)  # (E, M)
        known = pairs.context_known.expand(members, -1) * present  # (E, M)
        surprise = (pairs.context_interest - self.global_mean) * known  # (E, M)
        parts = torch.cat(
            [
                history * present.unsqueeze(-1),
                history * surprise.unsqueeze(-1),
                torch.stack([surprise, present, known], -1),
            ],
            -1,
        )  # (E, M, 2D + 3)
        sums = parts.new_zeros(members, pairs.num_rows, parts.shape[-1]).index_add(1, pairs.context_rows, parts)
        # A target in the log is no evidence about itself; -1 is the row of zeros at the end.
        own = nn.functional.pad(parts, (0, 0, 0, 1))[:, pairs.target_context]  # (E, N, 2D + 3)
        sums = sums[:, pairs.target_rows] - own  # (E, N, 2D + 3)
        count, num_known = sums[..., -2:-1].clamp(min=0), sums[..., -1:].clamp(min=0)  # (E, N, 1)
        statistics = torch.cat([sums[..., -3:-2] / (num_known + _SMOOTHING), count.log1p(), num_known.log1p()], -1)
        user = torch.cat(
            [
                sums[..., :_EMBEDDING] / (count + _SMOOTHING),
                sums[..., _EMBEDDING : 2 * _EMBEDDING] / (num_known + _SMOOTHING).sqrt(),
                statistics,
            ],
            -1,
        )  # (E, N, 2D + 3)
        user = torch.bmm(user, self.user_weight)  # (E, N, D)

        item = items[:, pairs.target_items]  # (E, N, D)
        features = torch.cat([user, item, user * item, statistics], -1)  # (E, N, 3D + 3)
        hidden = torch.relu(torch.baddbmm(self.hidden_bias, features, self.hidden_weight))  # (E, N, H)
        out = torch.baddbmm(self.out_bias, hidden, self.out_weight)  # (E, N, 2)
        logits = out[..., 0] + self.item_bias[:, pairs.target_items] + (user * item).sum(-1)  # (E, N)
        return logits.sigmoid(), out[..., 1].clamp(-9.0, 0.0)


def _beta_nll(mean: torch.Tensor, log_variance: torch.Tensor, interest: torch.Tensor) -> torch.Tensor:
    """Sum over members of the mean beta-NLL; ``mean`` and ``log_variance`` (E, N), ``interest`` (N,)."""
    weight = (_BETA_NLL * log_variance.detach()).exp()
    nll = 0.5 * ((mean - interest).square() * (-log_variance).exp() + log_variance)
    return (weight * nll).mean(1).sum()


def _training_pairs(
    log: Interactions, rows: np.ndarray, members: int, generator: torch.Generator
) -> tuple[Pairs, torch.Tensor]:
    """All interactions of some users, each to be predicted from the others, and their interest (N,)."""
    starts = starts_of(log.users)
    lengths = starts[rows + 1] - starts[rows]
    positions = np.repeat(starts[rows] - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
    batch_rows = torch.from_numpy(np.repeat(np.arange(len(rows)), lengths))
    items = torch.from_numpy(log.items[positions])
    interest = torch.from_numpy(log.interest[positions])
    # Each member sees a share of its own of each user's interactions, and the interest of a share of these.
    share = torch.rand(2, members, len(rows), generator=generator).mul_(2.0).clamp_(max=1.0)[:, :, batch_rows]
    shown, rated = (torch.rand(2, members, len(items), generator=generator) < share).float()
    pairs = Pairs(
        num_rows=len(rows),
        context_rows=batch_rows,
        context_items=items,
        context_interest=interest,
        context_known=rated,
        context_present=shown,
        target_rows=batch_rows,
        target_items=items,
        target_context=torch.arange(len(items)),
    )
    return pairs, interest


def _with_watched(
    pairs: Pairs, watched: np.ndarray, users: np.ndarray, members: int, generator: torch.Generator
) -> Pairs:
    """The pairs of ``users``, whose context holds what they watched too, of interest unknown; each member sees a share
    of its own."""
    row_of = np.full(int(max(users.max(), watched[:, 0].max())) + 1, -1)
    row_of[users] = np.arange(len(users))
    chosen = watched[row_of[watched[:, 0]] >= 0]
    rows = torch.from_numpy(row_of[chosen[:, 0]])
    items = torch.from_numpy(chosen[:, 1])
    share = torch.rand(members, len(users), generator=generator).mul_(1.5).clamp_(max=1.0)[:, rows]
    shown = (torch.rand(members, len(items), generator=generator) < share).float()
    return replace(
        pairs,
        context_rows=torch.cat([pairs.context_rows, rows]),
        context_items=torch.cat([pairs.context_items, items]),
        context_interest=torch.cat([pairs.context_interest, torch.zeros(len(items))]),
        context_known=torch.cat([pairs.context_known, torch.zeros(members, len(items))], dim=1),
        context_present=torch.cat([pairs.context_present, shown], dim=1),
    )


def _user_batches(log: Interactions, rng: np.random.Generator) -> list[np.ndarray]:
    """Users in random order, cut where about ``_BATCH`` interactions are together."""
    users = rng.permutation(np.unique(log.users))
    sizes = np.diff(starts_of(log.users))[users]
    cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // _BATCH)) + 1
    return np.split(users, cuts)
