"""What one would write for swap rewards without this package: ndcg, in torch.

Every function takes gains (N, K) and returns what its namesake among the public functions does. Called eagerly, and
under torch.compile. ``backend="torch"`` of our own functions serves as one more, for any metric.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_discounts(gains: Tensor) -> Tensor:
    """(K,)"""
    return 1 / torch.log2(torch.arange(2, gains.shape[1] + 2, dtype=torch.float32, device=gains.device))


def _ideal(gains: Tensor, d: Tensor) -> Tensor:
    """(N, 1) the ideal DCG."""
    return (gains.sort(-1, descending=True).values * d).sum(-1, keepdim=True)


def _behind(gains: Tensor) -> Tensor:
    """(K,) how many candidates are behind each rank, and 1 instead of 0."""
    size = gains.shape[1]
    return torch.arange(size - 1, -1, -1, device=gains.device).clamp(min=1)


def scores_pairwise(gains: Tensor) -> Tensor:
    """(N, K, K): every swap formed, as published (paper: arXiv 2603.11901)."""
    d = log_discounts(gains)
    return (d[:, None] - d) * (gains[:, :, None] - gains[:, None, :]) / _ideal(gains, d)[:, :, None]


def rewards_pairwise(gains: Tensor) -> Tensor:
    """(N, K): the mean over the later ones of every swap."""
    return scores_pairwise(gains).triu(1).sum(-1) / _behind(gains)


def rewards_suffix_sums(gains: Tensor) -> Tensor:
    """(N, K): the same by three suffix sums over centred gains."""
    d = log_discounts(gains)
    x = gains - gains.mean(-1, keepdim=True)

    def behind(y: Tensor) -> Tensor:
        return y.flip(-1).cumsum(-1).flip(-1) - y

    n = torch.arange(gains.shape[1] - 1, -1, -1, device=gains.device)
    sums = d * (n * x - behind(x)) - (x * behind(d) - behind(d * x))
    return sums / _behind(gains) / _ideal(gains, d)


def _coefficients(gains: Tensor) -> Tensor:
    """(K, K) A with r_k Z = sum over j of A_kj g_j: A_kk the mean of d_k - d_j over j > k, A_kj = -(d_k - d_j) / n."""
    d = log_discounts(gains)
    later = (d - d[:, None]).triu(1) / _behind(gains)[:, None]
    return later - torch.diag(later.sum(-1))


def rewards_matmul(gains: Tensor) -> Tensor:
    """(N, K): the linear map from gains to rewards as one matrix product; full lists of one length only."""
    return gains @ _coefficients(gains).t() / _ideal(gains, log_discounts(gains))


def variance_matmul(gains: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) rewards and (N, K) variances, a matrix product each."""
    a, ideal = _coefficients(gains), _ideal(gains, log_discounts(gains))
    return gains @ a.t() / ideal, variance @ (a * a).t() / ideal**2


def policy_pairwise(gains: Tensor, weights: Tensor) -> Tensor:
    """(N, K): every swap formed, and weighted by ``weights`` (N, K, K) over the later ones."""
    later = weights.triu(1)
    return (scores_pairwise(gains) * later).sum(-1) / later.sum(-1).clamp(min=1e-30)


def topic_rewards_by_exchange(gains: Tensor, topics: Tensor, ranks: int) -> Tensor:
    """(N, K) by alpha-nDCG (alpha = 1/2) of topics (N, K, C), computed anew after every exchange of two ranks."""
    n, k = gains.shape
    worth = (gains / gains.amax(-1, keepdim=True))[:, :, None] * topics  # (N, K, C)
    d = log_discounts(gains)[:ranks]

    def value(order: Tensor) -> Tensor:
        """(N,) of the order (N, K)."""
        ordered = worth.gather(1, order[:, :, None].expand_as(worth))[:, :ranks]  # (N, n, C)
        left = (1 - ordered / 2).cumprod(1)
        left = torch.cat([torch.ones_like(left[:, :1]), left[:, :-1]], dim=1)
        return ((ordered * left).sum(-1) * d[: ordered.shape[1]]).sum(-1)

    left, taken, ideal = torch.ones_like(worth[:, 0]), torch.zeros_like(gains), 0.0
    for rank in range(min(ranks, k)):
        adds = torch.einsum("nkc,nc->nk", worth, left) - 1e9 * taken
        best, chosen = adds.max(-1)
        ideal = ideal + best * d[rank]
        taken = taken.scatter(1, chosen[:, None], 1.0)
        left = left * (1 - worth[torch.arange(n), chosen] / 2)
    same = torch.arange(k, device=gains.device).expand(n, k)
    now, rewards = value(same), torch.zeros_like(gains)
    for rank in range(min(ranks, k - 1)):
        for other in range(rank + 1, k):
            order = same.clone()
            order[:, rank], order[:, other] = other, rank
            rewards[:, rank] += (now - value(order)) / (k - 1 - rank)
    return rewards / ideal[:, None]
