"""Metrics of a list with topics, their swap rewards and scores: against their definitions, term by term."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrec.ops.ranking_metric import Topics, greedy_ranking, ranking_metric
from flexrec.ops.swap_rewards import swap_rewards, swap_rewards_with_variance, swap_scores

CREDITS = ("swap", "noncausal", "independent", "rank", "sequence", "policy")
NAMES = ("alpha_ndcg", "err_ia", "err_ia.6")
Item = tuple[float, tuple[float, ...]]  # its gain, and how much it is about each topic


# ------------------------------------------------------------------------------------------------------ brute force


def alpha_dcg(items: list[Item], weights: tuple[float, ...], top: float, seen: int) -> float:
    """Clarke et al. (2008): the gain of an item is the sum over nuggets of (1 - alpha)^(how often they were read)."""
    value = 0.0
    for rank in range(min(seen, len(items))):
        gain, about = items[rank]
        for c, weight in enumerate(weights):
            unread = math.prod(1.0 - 0.5 * g * m[c] / top for g, m in items[:rank])
            value += weight * unread * gain / top * about[c] / math.log2(rank + 2)
    return value


def greedy_order(items: list[Item], weights: tuple[float, ...], top: float) -> list[Item]:
    """What adds most comes next; ties are not broken alike where items differ, and tests avoid those."""
    order, left = [], list(items)
    while left:
        best = max(
            left, key=lambda item: alpha_dcg([*order, item], weights, top, 99) - alpha_dcg(order, weights, top, 99)
        )
        order.append(best)
        left.remove(best)
    return order


def textbook(name: str, items: list[Item], weights: tuple[float, ...], shown: int) -> float:
    """R of one list in rank order."""
    family, _, n = name.partition("@")
    cutoff = int(n) if n else len(items)
    top = max((gain for gain, _ in items), default=0.0)
    intents = [c for c in range(len(weights)) if any(gain > 0 and about[c] > 0 for gain, about in items)]
    if top == 0.0 or not sum(weights[c] for c in intents):
        return 0.0
    if family == "alpha_ndcg":
        ideal = alpha_dcg(greedy_order(items, weights, top), weights, top, cutoff)
        return alpha_dcg(items, weights, top, min(cutoff, shown)) / ideal
    highest = float(family[7:]) if family[6:] else top
    value = 0.0
    for c in intents:  # a user with one intent reads on until something satisfies it
        left = 1.0
        for rank in range(min(cutoff, shown, len(items))):
            stop = (2.0 ** items[rank][0] - 1) / 2.0**highest * items[rank][1][c]
            value += weights[c] * left * stop / (rank + 1)
            left *= 1.0 - stop
    return value / sum(weights[c] for c in intents)


def brute_scores(name: str, items: list[Item], weights: tuple[float, ...], shown: int) -> np.ndarray:
    scores = np.zeros((len(items), len(items)))
    value = textbook(name, items, weights, shown)
    for k, j in itertools.combinations(range(len(items)), 2):
        other = list(items)
        other[k], other[j] = other[j], other[k]
        scores[k, j] = scores[j, k] = value - textbook(name, other, weights, shown)
    return scores


def brute_rewards(credit: str, scores: np.ndarray, prefixes: list[float], shares: np.ndarray) -> np.ndarray:
    """(K,) rewards from swap scores (K, K) and from R with 0, 1, .. ranks shown, 0 beyond."""
    size, rewards = len(scores), np.zeros(len(scores))
    for k in range(len(prefixes) - 1):
        behind = range(k + 1, size)
        if credit == "swap" and behind:
            rewards[k] = np.mean([scores[k, j] for j in behind])
        elif credit == "noncausal" and size > 1:
            rewards[k] = scores[k].sum() / (size - 1)
        elif credit == "policy":
            total = sum(shares[k, j] for j in behind)
            rewards[k] = sum(shares[k, j] * scores[k, j] for j in behind) / total if total else 0.0
        elif credit == "independent":
            rewards[k] = prefixes[k + 1] - prefixes[k]
        elif credit == "rank":
            rewards[k] = prefixes[-1] - prefixes[k]
        elif credit == "sequence":
            rewards[k] = prefixes[-1]
    return rewards


@st.composite
def batches(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Lists with NaN beyond their lengths: gains and topics that are equal, that are 0, that are anything."""
    rows, size, columns = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**20)))
    # No two different items add the same: the gains are numbers without a simple ratio, or all items are alike.
    gains = np.sqrt(generator.integers(1, 30, (rows, size)) + generator.integers(0, 2) * generator.random((rows, size)))
    gains *= generator.random((rows, size)) < draw(st.sampled_from([0.4, 0.8, 1.0]))
    kind = draw(st.sampled_from(["one", "some", "shares"]))
    about = generator.random((rows, size, columns))
    if kind == "one":
        about = np.eye(columns)[generator.integers(0, columns, (rows, size))]
    elif kind == "some":
        about = np.sqrt(1.0 + np.arange(columns)) / 2.0 * (about < 0.5)
    lengths, num_ranked = generator.integers(0, size + 1, (2, rows))
    outside = np.arange(size) >= lengths[:, None]
    gains[outside], about[outside] = np.nan, np.nan
    shares = generator.random((rows, size, size)) * (generator.random((rows, size, size)) < 0.7)
    weights = generator.random((rows, columns)) + 0.1 if draw(st.booleans()) else np.ones((rows, columns))
    arrays = {"gains": gains, "about": about, "lengths": lengths, "num_ranked": num_ranked}
    return {name: torch.from_numpy(x) for name, x in (arrays | {"shares": shares, "weights": weights}).items()}


def rows_of(batch: dict[str, torch.Tensor]) -> list[tuple[list[Item], tuple[float, ...], int]]:
    found = []
    for i, (n, t) in enumerate(zip(batch["lengths"].tolist(), batch["num_ranked"].tolist(), strict=True)):
        items = list(zip(batch["gains"][i, :n].tolist(), map(tuple, batch["about"][i, :n].tolist()), strict=True))
        found.append((items, tuple(batch["weights"][i].tolist()), min(n, t)))
    return found


def topics_of(batch: dict[str, torch.Tensor]) -> Topics:
    return Topics(batch["about"].flatten(0, 1), None, batch["weights"])


@pytest.mark.parametrize("family", NAMES)
@settings(max_examples=40, deadline=None)
@given(batch=batches(), cutoff=st.sampled_from(["", "@1", "@2", "@3", "@20"]))
def test_all_credits_and_backends_equal_brute_force(family, batch, cutoff):
    name, gains = family + cutoff, batch["gains"]
    options = {"lengths": batch["lengths"], "num_ranked": batch["num_ranked"], "topics": topics_of(batch)}
    lists = rows_of(batch)
    values = torch.tensor([textbook(name, *of_list) for of_list in lists], dtype=torch.float64)
    torch.testing.assert_close(ranking_metric(gains, name, **options), values, rtol=0, atol=1e-12)
    expected = [torch.from_numpy(brute_scores(name, *of_list)) for of_list in lists]
    for backend in ("torch", "numba"):
        scores = swap_scores(gains, name, backend=backend, **options)
        for i, of_list in enumerate(expected):
            n = len(of_list)
            torch.testing.assert_close(scores[i, :n, :n], of_list, rtol=0, atol=1e-12)
            assert scores[i, n:].eq(0).all()
            assert scores[i, :, n:].eq(0).all()
        for credit in CREDITS:
            shares = batch["shares"] if credit == "policy" else None
            rewards = swap_rewards(gains, name, credit=credit, weights=shares, backend=backend, **options)
            for i, (items, weights, shown) in enumerate(lists):
                n = len(items)
                prefixes = [textbook(name, items, weights, t) for t in range(shown + 1)]
                by_hand = brute_rewards(credit, expected[i].numpy(), prefixes, batch["shares"][i].numpy())
                torch.testing.assert_close(rewards[i, :n], torch.from_numpy(by_hand), rtol=0, atol=1e-12)
                assert rewards[i, n:].eq(0).all()


# -------------------------------------------------------------------------------------------------- what is known


def binary(*items: str) -> torch.Tensor:
    """(1, K, C) of items given as the letters of their topics."""
    letters = sorted({letter for item in items for letter in item})
    return torch.tensor([[[float(letter in item) for letter in letters] for item in items]])


def test_binary_judgments_are_counted_as_in_its_paper():
    """G[k] = sum over nuggets of J (1 - alpha)^r, r how often the nugget was read above (Clarke et al. 2008, eq. 9)."""
    documents = ("ab", "b", "b", "", "bc", "d", "ce", "", "", "b")
    value, read = 0.0, dict.fromkeys("abcde", 0)
    for rank, document in enumerate(documents):
        value += sum(0.5 ** read[nugget] for nugget in document) / math.log2(rank + 2)
        for nugget in document:
            read[nugget] += 1
    gains, about = torch.ones(1, 10, dtype=torch.float64), binary(*documents)
    best = greedy_ranking(gains, "alpha_ndcg", topics=about)
    ideal_documents = [documents[i] for i in best[0].tolist()]
    ideal, read = 0.0, dict.fromkeys("abcde", 0)
    for rank, document in enumerate(ideal_documents):
        ideal += sum(0.5 ** read[nugget] for nugget in document) / math.log2(rank + 2)
        for nugget in document:
            read[nugget] += 1
    assert float(ranking_metric(gains, "alpha_ndcg", topics=about)) == pytest.approx(value / ideal, abs=1e-12)


def test_one_topic_that_all_items_have_is_err():
    gains = torch.rand(5, 7, dtype=torch.float64)
    all_of_one = torch.ones(5, 7, 1)
    for name in ("", "@3", ".2@4"):
        options = {"backend": "numba", "lengths": torch.tensor([7, 5, 3, 1, 0])}
        expected = swap_rewards(gains, "err" + name, **options)
        torch.testing.assert_close(swap_rewards(gains, "err_ia" + name, topics=all_of_one, **options), expected)


def test_more_of_the_same_is_worth_less_than_something_new():
    about = binary("a", "a", "b")
    first_alike, first_new = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 2, 1]])
    gains = torch.tensor([[1.0, 0.9, 0.8]])
    values = [
        ranking_metric(gains.gather(1, order), "alpha_ndcg@2", topics=about[0][order])
        for order in (first_alike, first_new)
    ]
    assert values[0] < values[1] == 1.0
    assert swap_rewards(gains, "alpha_ndcg@2", topics=about)[0, 1] < 0  # the second item, that the third should be
    assert greedy_ranking(gains, "alpha_ndcg", topics=about).tolist() == first_new.tolist()


def test_the_ideal_does_not_know_the_ranking():
    """Ties abound, and different choices among them lead to different values."""
    about = binary("cd", "d", "ac", "ac", "bc", "c", "ab")
    gains, generator = torch.ones(1, 7), np.random.default_rng(0)
    values = set()
    for _ in range(50):
        order = torch.from_numpy(generator.permutation(7))[None]
        shuffled = about[0][order]
        top = greedy_ranking(gains, "alpha_ndcg@3", topics=shuffled)
        values.add(round(alpha_dcg([(1.0, tuple(row)) for row in shuffled[0][top[0]].tolist()], (1.0,) * 4, 1.0, 3), 9))
        scores = [swap_scores(gains, "alpha_ndcg@3", topics=shuffled, backend=b) for b in ("torch", "numba")]
        torch.testing.assert_close(*scores, rtol=0, atol=1e-6)
        exchanged = order[:, [4, 1, 2, 3, 0, 5, 6]]
        moved = ranking_metric(gains, "alpha_ndcg@3", topics=about[0][exchanged])
        kept = ranking_metric(gains, "alpha_ndcg@3", topics=shuffled)
        torch.testing.assert_close(kept - moved, scores[0][:, 0, 4], rtol=0, atol=1e-6)
    assert len(values) == 1


def test_items_of_a_catalogue_are_rows_of_its_matrix():
    generator = torch.Generator().manual_seed(0)
    matrix, weights = torch.rand(20, 4, generator=generator), torch.rand(4, generator=generator)
    items, gains = torch.randint(0, 20, (6, 8), generator=generator), torch.rand(6, 8, generator=generator)
    for name, backend in itertools.product(NAMES, ("torch", "numba")):
        one, other = (
            swap_rewards(gains, name, topics=topics, backend=backend)
            for topics in (
                Topics(matrix, items, weights),
                Topics(matrix[items].flatten(0, 1), None, weights.repeat(6, 1)),
            )
        )
        assert torch.equal(one, other)
        assert not torch.equal(one, swap_rewards(gains, name, topics=matrix[items], backend=backend))


def test_topics_of_a_weight_of_0_count_for_nothing():
    gains, about = torch.rand(3, 6), torch.rand(3, 6, 3)
    alone = swap_rewards(gains, "alpha_ndcg@3", topics=about[:, :, :2])
    weighted = Topics(about.flatten(0, 1), weights=torch.tensor([2.0, 2.0, 0.0]))
    torch.testing.assert_close(swap_rewards(gains, "alpha_ndcg@3", topics=weighted), alone)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_what_is_alike_earns_exactly_nothing(backend):
    about = torch.tensor([0.3, 0.0, 0.7]).expand(2, 5, 3)
    for credit in ("swap", "noncausal"):
        rewards = swap_rewards(torch.full((2, 5), 0.7), "alpha_ndcg@3", topics=about, credit=credit, backend=backend)
        assert rewards.eq(0).all()


def test_a_scale_of_the_gains_changes_nothing():
    gains, about = torch.rand(4, 6, dtype=torch.float64), torch.rand(4, 6, 3, dtype=torch.float64)
    one, other = (swap_rewards(gains * scale, "alpha_ndcg@4", topics=about) for scale in (1.0, 1e20))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "alpha_ndcg"}, r"'alpha_ndcg' is of a list with topics: give topics=\(N, K, C\)"),
        ({"metric": "ndcg", "topics": torch.ones(2, 3, 1)}, "topics go with alpha_ndcg and err_ia only"),
        ({"topics": torch.ones(2, 4, 1)}, r"topics must have shape \(2, 3, C\), got \(2, 4, 1\)"),
        ({"topics": torch.ones(2, 3, 0)}, "topics must have at least one column"),
        ({"topics": torch.full((2, 3, 1), 1.5)}, r"topics must lie in \[0.0, 1.0\], got 1.5"),
        ({"topics": torch.full((2, 3, 1), math.nan)}, "topics must be finite"),
        (
            {"topics": Topics(torch.ones(5, 2), torch.full((2, 3), 5))},
            r"the items of topics must lie in \[0, 4\], got 5",
        ),
        ({"topics": Topics(torch.ones(5, 2))}, r"the matrix of topics must have shape \(6, C\)"),
        ({"topics": Topics(torch.ones(6, 2), weights=-torch.ones(2))}, "the weights of topics must lie in"),
        ({"topics": Topics(torch.ones(6, 2), weights=torch.ones(3))}, "the weights of topics must have shape"),
        ({"metric": "alpha_ndcg.7", "topics": torch.ones(2, 3, 1)}, "takes no parameter"),
    ],
)
def test_errors_say_what_to_do(arguments, message):
    for function in (swap_rewards, swap_scores, ranking_metric):
        with pytest.raises(ValueError, match=message):
            function(torch.ones(2, 3), **{"metric": "alpha_ndcg", **arguments})


def test_there_is_no_variance():
    with pytest.raises(ValueError, match="metric 'err_ia' has no reward variance"):
        swap_rewards_with_variance(torch.ones(2, 3), torch.ones(2, 3), "err_ia")
    with pytest.raises(ValueError, match="metric must be one of alpha_ndcg, err_ia"):
        greedy_ranking(torch.ones(2, 3), "ndcg", topics=None)
