"""The critic: how interested a user would be in an item, and how sure that is, where no feedback was collected.

A deep ensemble of small heteroscedastic networks (Lakshminarayanan et al. 2017, arXiv 1612.01474) is fitted on the log.
Each member predicts mean m_e and noise variance s_e^2 of a pair's feedback; the ensemble's prediction is

    mean = avg_e m_e,        variance = avg_e s_e^2 + var_e m_e,

what the feedback scatters by plus what the members disagree on. A user is known to the networks by interactions alone,
never by number, so a user who came after the fit is served like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import track
from torch import nn

from flexrec.data.lists import Catalogue, Interactions, RankingList

_EMBEDDING = 16
_HIDDEN = 32
_BATCH = 1024  # targets, about: whole users are never split
_EPOCH_BUDGET = 1_000_000  # interactions
_LEARNING_RATE = 1e-2
_WEIGHT_DECAY = 1e-1
_SMOOTHING = 2.0  # pseudo-count that draws averages over few interactions towards 0
_BETA_NLL = 0.5
_VALIDATION_SHARE = 0.1
_PREDICT_LISTS = 512  # lists predicted at a time


@dataclass(frozen=True)
class _Pairs:
    """Users' known interactions and the pairs to predict; "rows" number the users of a batch from 0."""

    num_rows: int
    context_rows: torch.Tensor  # (M,) int64
    context_items: torch.Tensor  # (M,) int64
    context_interest: torch.Tensor  # (M,) float32, 0 where not known
    context_known: torch.Tensor  # (E or 1, M) float32, 1 where a member may see the interest
    context_present: torch.Tensor  # (E or 1, M) float32, 1 where a member may see the interaction
    target_rows: torch.Tensor  # (N,) int64
    target_items: torch.Tensor  # (N,) int64
    target_context: torch.Tensor  # (N,) int64, the context entry that is the target itself (to be left out), or -1


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

    def forward(self, pairs: _Pairs) -> tuple[torch.Tensor, torch.Tensor]:
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


class Critic:
    """Predicts mean and variance of the interest in unobserved user-item pairs; made by ``Critic.fit``.

    Example:
        >>> from flexrec.data import simulate
        >>> from flexrec.task import Critic
        >>> data = simulate(num_users=60, num_items=120, num_topics=4, num_test_users=2, num_candidates=6)
        >>> critic = Critic.fit(data.log, data.catalogue, seed=0)
        >>> interest, variance = critic.fill_many(data.train[:1])[0]  # predicted where nothing was observed
        >>> bool(np.isnan(data.train[0].interest).any()), bool(np.isnan(interest).any())
        (True, False)
    """

    def __init__(self, network: _Ensemble, log: Interactions, num_items: int, variance_scale: float) -> None:
        self._network = network
        self._num_items = num_items
        self._variance_scale = variance_scale
        # The log by user: items of user u are self._items[self._starts[u] : self._starts[u + 1]].
        self._items, self._interest = log.items, log.interest
        self._starts = _starts(log.users)

    @classmethod
    def fit(
        cls,
        log: Interactions,
        catalogue: Catalogue,
        *,
        seed: int = 0,
        ensemble: int = 5,
        epochs: int | None = None,
        progress: bool = False,
    ) -> Critic:
        """Fit an ensemble on logged feedback.

        Every interaction is predicted from its user's other ones. Which of these are shown, and of which the interest
        is known, is drawn anew each time, so that the networks serve users with little or no known feedback too. The
        loss is the Gaussian negative log-likelihood weighted by variance^0.5 (beta-NLL, arXiv 2203.09168), without
        which hard pairs would not be learned. A tenth of the log is held out: the epoch with the least squared error
        there is kept, and variances are scaled by one number so that they equal the squared errors there on average.

        Args:
            log: feedback of training users, interest in [0, 1]. Repeated pairs are averaged.
            catalogue: the items, whose topics are used as features.
            seed: of initial weights, batches and the held-out tenth; the same seed gives the same critic.
            ensemble: number of networks.
            epochs: passes over the log. None: 8 to 30, about a million interactions in all; more of them help a little.
            progress: show a progress bar.

        Raises:
            ValueError: fewer than two interactions, an item outside the catalogue, or interest outside [0, 1] or NaN.
        """
        _check_log(log, len(catalogue))
        if epochs is None:
            epochs = int(np.clip(_EPOCH_BUDGET // len(log), 8, 30))
        if ensemble < 1 or epochs < 1:
            raise ValueError(f"ensemble and epochs must be at least 1, got {ensemble} and {epochs}")
        log = _merged(log, len(catalogue))
        rng = np.random.default_rng(seed)
        held_out = np.zeros(len(log), dtype=bool)
        held_out[rng.choice(len(log), size=max(1, round(_VALIDATION_SHARE * len(log))), replace=False)] = True
        seen = _select(log, ~held_out)
        validation = _leave_out_pairs(log, held_out)
        target = torch.from_numpy(log.interest[held_out])

        generator = torch.Generator().manual_seed(seed)
        mean = float(np.clip(seen.interest.mean(), 0.01, 0.99))
        variance = float(np.clip(seen.interest.var(), 1e-3, 0.25))
        network = _Ensemble(ensemble, _topic_shares(catalogue), mean, variance, generator)
        optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        best_error, best_state = np.inf, copy.deepcopy(network.state_dict())
        batches = _user_batches(seen, rng)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, _LEARNING_RATE, total_steps=epochs * len(batches), pct_start=0.1
        )
        for _ in track(range(epochs), description="Fitting the critic", disable=not progress):
            for rows in _user_batches(seen, rng):
                pairs, interest = _training_pairs(seen, rows, ensemble, generator)
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
        predicted_mean, predicted_variance = _mixture(network, validation)
        squared_error = (predicted_mean - target).square().mean().item()
        scale = squared_error / max(predicted_variance.mean().item(), 1e-12)
        return cls(network, log, len(catalogue), scale)

    def predict(self, lst: RankingList) -> tuple[np.ndarray, np.ndarray]:
        """Mean (K,) float32 in [0, 1] and variance (K,) float32 >= 0 of the interest in each candidate.

        What is known of the user is their log (if they were in it) and ``lst.history``, of which the interest may be
        unknown. Feedback of a pair that is predicted is never used for it.
        """
        return self.predict_many([lst])[0]

    def predict_many(self, lists: Sequence[RankingList]) -> list[tuple[np.ndarray, np.ndarray]]:
        """``predict`` for many lists at once."""
        results: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, len(lists), _PREDICT_LISTS):
            chunk = lists[start : start + _PREDICT_LISTS]
            mean, variance = _mixture(self._network, self._list_pairs(chunk))
            ends = np.cumsum([len(lst.candidates) for lst in chunk])[:-1]
            means = np.split(mean.numpy(), ends)
            variances = np.split((self._variance_scale * variance).numpy(), ends)
            results += zip(means, variances, strict=True)
        return results

    def fill(self, lst: RankingList) -> tuple[np.ndarray, np.ndarray]:
        """``lst.interest`` (K,) float32 with 0 variance where observed, the prediction and its variance elsewhere."""
        return self.fill_many([lst])[0]

    def fill_many(self, lists: Sequence[RankingList]) -> list[tuple[np.ndarray, np.ndarray]]:
        """``fill`` for many lists at once."""
        filled = []
        for lst, (mean, variance) in zip(lists, self.predict_many(lists), strict=True):
            observed = ~np.isnan(lst.interest)
            interest = np.where(observed, lst.interest, mean).astype(np.float32)
            filled.append((interest, np.where(observed, 0.0, variance).astype(np.float32)))
        return filled

    def _list_pairs(self, lists: Sequence[RankingList]) -> _Pairs:
        items, interest, known, lengths, own = [], [], [], [], []
        position = np.full(self._num_items, -1, dtype=np.int64)
        start = 0
        for number, lst in enumerate(lists):
            for name, array in (("history", lst.history), ("candidates", lst.candidates)):
                if len(array) and not 0 <= array.min() <= array.max() < self._num_items:
                    raise ValueError(f"lists[{number}].{name} must hold items in [0, {self._num_items}), got {array}")
            in_log = 0 <= lst.user < len(self._starts) - 1
            of_user = slice(*self._starts[lst.user : lst.user + 2]) if in_log else slice(0)
            logged = self._items[of_user]
            unrated = np.setdiff1d(lst.history, logged)
            context = np.concatenate([logged, unrated])
            items.append(context)
            interest.append(np.concatenate([self._interest[of_user], np.zeros(len(unrated), dtype=np.float32)]))
            known.append(np.repeat(np.array([1.0, 0.0], dtype=np.float32), [len(logged), len(unrated)]))
            lengths.append(len(context))
            position[context] = start + np.arange(len(context))
            own.append(position[lst.candidates])
            position[context] = -1
            start += len(context)
        rows = np.arange(len(lists))
        return _Pairs(
            num_rows=len(lists),
            context_rows=torch.from_numpy(np.repeat(rows, lengths)),
            context_items=torch.from_numpy(np.concatenate(items)),
            context_interest=torch.from_numpy(np.concatenate(interest)),
            context_known=torch.from_numpy(np.concatenate(known))[None],
            context_present=torch.ones(1, start),
            target_rows=torch.from_numpy(np.repeat(rows, [len(lst.candidates) for lst in lists])),
            target_items=torch.from_numpy(np.concatenate([lst.candidates for lst in lists])),
            target_context=torch.from_numpy(np.concatenate(own)),
        )


def _topic_shares(catalogue: Catalogue) -> torch.Tensor:
    """(I, C) float32 topics of each item; rows of n topics have length 1, whatever n."""
    topics = torch.from_numpy(catalogue.topic_matrix)
    return topics / topics.sum(1, keepdim=True).clamp(min=1.0).sqrt()


def _beta_nll(mean: torch.Tensor, log_variance: torch.Tensor, interest: torch.Tensor) -> torch.Tensor:
    """Sum over members of the mean beta-NLL; ``mean`` and ``log_variance`` (E, N), ``interest`` (N,)."""
    weight = (_BETA_NLL * log_variance.detach()).exp()
    nll = 0.5 * ((mean - interest).square() * (-log_variance).exp() + log_variance)
    return (weight * nll).mean(1).sum()


@torch.no_grad()
def _mixture(network: _Ensemble, pairs: _Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (N,) and variance (N,) of the members' mixture: average noise plus disagreement."""
    means, log_variances = network(pairs)
    return means.mean(0), log_variances.exp().mean(0) + means.var(0, correction=0)


def _training_pairs(
    log: Interactions, rows: np.ndarray, members: int, generator: torch.Generator
) -> tuple[_Pairs, torch.Tensor]:
    """All interactions of some users, each to be predicted from the others, and their interest (N,)."""
    starts = _starts(log.users)
    lengths = starts[rows + 1] - starts[rows]
    positions = np.repeat(starts[rows] - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
    batch_rows = torch.from_numpy(np.repeat(np.arange(len(rows)), lengths))
    items = torch.from_numpy(log.items[positions])
    interest = torch.from_numpy(log.interest[positions])
    # Each member sees a share of its own of each user's interactions, and the interest of a share of these.
    share = torch.rand(2, members, len(rows), generator=generator).mul_(2.0).clamp_(max=1.0)[:, :, batch_rows]
    shown, rated = (torch.rand(2, members, len(items), generator=generator) < share).float()
    pairs = _Pairs(
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


def _leave_out_pairs(log: Interactions, held_out: np.ndarray) -> _Pairs:
    """The held-out interactions, to be predicted from all others of their users."""
    context = _select(log, ~held_out)
    targets = _select(log, held_out)
    return _Pairs(
        num_rows=int(log.users.max()) + 1,
        context_rows=torch.from_numpy(context.users),
        context_items=torch.from_numpy(context.items),
        context_interest=torch.from_numpy(context.interest),
        context_known=torch.ones(1, len(context)),
        context_present=torch.ones(1, len(context)),
        target_rows=torch.from_numpy(targets.users),
        target_items=torch.from_numpy(targets.items),
        target_context=torch.full((len(targets),), -1),
    )


def _user_batches(log: Interactions, rng: np.random.Generator) -> list[np.ndarray]:
    """Users in random order, cut where about ``_BATCH`` interactions are together."""
    users = rng.permutation(np.unique(log.users))
    sizes = np.diff(_starts(log.users))[users]
    cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // _BATCH)) + 1
    return np.split(users, cuts)


def _starts(users: np.ndarray) -> np.ndarray:
    """(U + 1,) where each user's interactions begin in a log sorted by user."""
    return np.searchsorted(users, np.arange(int(users.max(initial=-1)) + 2))


def _select(log: Interactions, chosen: np.ndarray) -> Interactions:
    return Interactions(log.users[chosen], log.items[chosen], log.interest[chosen], log.times[chosen])


def _merged(log: Interactions, num_items: int) -> Interactions:
    """Sorted by user and item, repeated pairs averaged (with the time of the first)."""
    pairs, first, member = np.unique(log.users * num_items + log.items, return_index=True, return_inverse=True)
    interest = np.bincount(member, log.interest) / np.bincount(member)
    users, items = np.divmod(pairs.astype(np.int64), num_items)
    return Interactions(users, items, interest.astype(np.float32), log.times[first])


def _check_log(log: Interactions, num_items: int) -> None:
    if len(log) < 2:
        raise ValueError(f"log must hold at least 2 interactions to fit a critic on, got {len(log)}")
    if log.users.min() < 0:
        raise ValueError(f"log.users must be >= 0, got {log.users.min()}")
    if not 0 <= log.items.min() <= log.items.max() < num_items:
        raise ValueError(f"log.items must lie in [0, {num_items}), got {log.items.min()} to {log.items.max()}")
    if not np.all((log.interest >= 0) & (log.interest <= 1)):  # also false for NaN
        where = int(np.flatnonzero(~((log.interest >= 0) & (log.interest <= 1)))[0])
        raise ValueError(f"log.interest must lie in [0, 1], got {log.interest[where]} at index {where}")
