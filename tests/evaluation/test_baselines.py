"""Baselines: scores by hand, no look at test users or at the feedback to be predicted, tuning, no NaN anywhere."""

import dataclasses
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest

from flexrec.data.lists import Catalogue, Interactions, RankingDataset, RankingList
from flexrec.evaluation import tuning as module
from flexrec.evaluation.baselines import BASELINES, Popularity, Random, Trend, order_for
from flexrec.evaluation.factorisation import ALS, BPR
from flexrec.evaluation.neighbours import ItemKNN, KNNSettings, UserKNN
from flexrec.evaluation.sequential import SASRec
from flexrec.evaluation.statistics import rank_metrics
from flexrec.task.needs import NEEDS


def make_list(user=99, history=(), candidates=(0, 1, 2), interest=None, popularity=None, trend=None):
    size = len(candidates)
    return RankingList(
        user=user,
        time=10.0,
        history=np.array(history, dtype=np.int64),
        candidates=np.array(candidates, dtype=np.int64),
        interest=np.array([np.nan] * size if interest is None else interest, dtype=np.float32),
        popularity=np.array([0] * size if popularity is None else popularity, dtype=np.float32),
        trend=np.array([0] * size if trend is None else trend, dtype=np.float32),
    )


def make_dataset(log, num_items, train=(), test=(), unobserved="zero"):
    ids = tuple(str(i) for i in range(num_items))
    users, items, interest = (np.array(column) for column in zip(*log, strict=True))
    interactions = Interactions(users, items, interest.astype(np.float32), np.arange(len(log), dtype=np.float64))
    return RankingDataset(
        name="small",
        catalogue=Catalogue(ids, ids, ((),) * num_items),
        log=interactions,
        train=list(train),
        test=list(test),
        unobserved=unobserved,
    )


# What can be fitted in a moment; als and bpr where implicit is installed.
AVAILABLE = {
    **{name: make for name, make in BASELINES.items() if name not in ("als", "bpr", "sasrec", "bm25", "minilm")},
    **({"als": ALS, "bpr": BPR} if find_spec("implicit") else {}),
    "sasrec": partial(SASRec, hidden_size=16, max_epochs=2),
}

# Users 0..3; items 0 and 1 always together, item 2 with item 3, item 4 known to nobody.
LOG = [(0, 0, 1.0), (0, 1, 0.5), (1, 0, 1.0), (1, 1, 1.0), (2, 2, 1.0), (2, 3, 1.0), (3, 0, 0.2), (3, 3, 1.0)]


def clustered(seed=0, num_users=60, per_cluster=20, lists_per_user=4):
    """Items of three clusters; users like one of them (interest 1 in it, 0.1 outside) and see the others too."""
    rng = np.random.default_rng(seed)
    num_items, log, lists = 3 * per_cluster, [], []
    for user in range(2 * num_users):
        liked = rng.integers(3)
        items = rng.permutation(num_items)
        interest = np.where(items // per_cluster == liked, 1.0, 0.1)
        history = [i for i, y in zip(items[:20], interest[:20], strict=True) if y > 0.5]
        for start in range(20, 20 + 8 * lists_per_user, 8):
            at = slice(start, start + 8)
            lists.append(make_list(user, history, items[at], interest[at], rng.integers(9, size=8), rng.random(8)))
        if user < num_users:
            log += [(user, i, y) for i, y in zip(items[:45], interest[:45], strict=True)]
    train = [lst for lst in lists if lst.user < num_users]
    test = [lst for lst in lists if lst.user >= num_users]
    return make_dataset(log, num_items, train, test)


def ndcg(baseline, lists):
    gains = [lst.interest[np.argsort(-baseline.scores(lst), kind="stable")] for lst in lists]
    return rank_metrics(gains, ("ndcg@5",))["ndcg@5"].mean()


def test_random_is_fixed_per_list_and_uniform():
    lists = [make_list(user=u, history=[u % 7], candidates=np.random.default_rng(u).permutation(5)) for u in range(900)]
    first = [int(np.argmax(Random(3).scores(lst))) for lst in lists]
    assert first == [int(np.argmax(Random(3).scores(lst))) for lst in lists]
    assert first != [int(np.argmax(Random(4).scores(lst))) for lst in lists]
    assert np.abs(np.bincount(first, minlength=5) - 180).max() < 4 * np.sqrt(900 * 0.2 * 0.8)


def test_popularity_and_trend_follow_the_list():
    lst = make_list(popularity=[5, 0, 7], trend=[0.5, 0.9, 0.5])
    assert np.argsort(-Popularity().scores(lst)).tolist() == [2, 0, 1]
    assert np.argsort(-Trend().scores(lst)).tolist() == [1, 2, 0]  # a tie in trend goes to the more popular


def test_trend_ties_never_beat_a_difference_in_trend():
    lst = make_list(popularity=[0, 1000, 3], trend=[0.501, 0.5, 0.5])
    assert np.argsort(-Trend().scores(lst)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("weighting", ["implicit", "interest"])
@pytest.mark.parametrize(("neighbours", "shrinkage"), [(1, 0.0), (2, 3.0), (50, 1.0)])
def test_item_knn_equals_its_formula(weighting, neighbours, shrinkage):
    rng = np.random.default_rng(1)
    pairs = [(u, i) for u in range(12) for i in range(9) if rng.random() < 0.5]
    log = [(u, i, rng.random()) for u, i in pairs]
    matrix = np.zeros((12, 9))
    for u, i, y in log:
        matrix[u, i] = 1.0 if weighting == "implicit" else y
    knn = ItemKNN(make_dataset(log, 9), KNNSettings(weighting, neighbours, shrinkage))
    for user in (5, 99):  # in the log: their row is left out; not in the log
        lst = make_list(user, history=[0, 1, 2, 3], candidates=[4, 5, 6, 7, 8])
        known = np.delete(matrix, user, axis=0) if user == 5 else matrix
        expected = []
        for c in lst.candidates:
            similarities = [
                known[:, c] @ known[:, j] / (np.linalg.norm(known[:, c]) * np.linalg.norm(known[:, j]) + shrinkage)
                for j in lst.history
            ]
            expected.append(sum(sorted(similarities)[-neighbours:]))
        np.testing.assert_allclose(knn.scores(lst), expected, rtol=1e-5)


def test_item_knn_falls_back_to_popularity():
    knn = ItemKNN(make_dataset(LOG, 5), KNNSettings("implicit", 5, 0.0))
    without_history = make_list(history=[], candidates=[0, 4, 2], popularity=[1, 3, 2])
    assert np.argsort(-knn.scores(without_history)).tolist() == [1, 2, 0]
    unknown_item = make_list(history=[0, 4], candidates=[4, 1, 2], popularity=[100, 0, 50])
    assert np.argsort(-knn.scores(unknown_item)).tolist() == [1, 0, 2]


def test_item_knn_does_not_read_the_feedback_it_predicts():
    # User 7 is the only one who saw items 3 and 4 together: without that row nothing connects them.
    dataset = make_dataset([*LOG, (7, 3, 1.0), (7, 4, 1.0)], 5)
    knn = ItemKNN(dataset, KNNSettings("implicit", 5, 0.0))
    own, other = make_list(7, history=[3], candidates=[4, 2]), make_list(8, history=[3], candidates=[4, 2])
    assert knn.scores(own)[0] == 0
    assert knn.scores(other)[0] > 0


def test_every_baseline_is_finite_and_blind_to_feedback_and_test_lists():
    dataset = clustered()
    for name, make in AVAILABLE.items():
        baseline = make(dataset)
        assert baseline.name == name
        blind = make(dataclasses.replace(dataset, test=[]))
        for lst in dataset.test[:20]:
            scores = baseline.scores(lst)
            assert scores.shape == lst.candidates.shape
            assert scores.dtype == np.float64
            assert np.isfinite(scores).all()
            unseen = dataclasses.replace(lst, interest=np.full_like(lst.interest, np.nan))
            np.testing.assert_array_equal(blind.scores(unseen), scores)


def test_lists_of_one_candidate_and_none():
    dataset = clustered()
    for make in AVAILABLE.values():
        baseline = make(dataset)
        assert baseline.scores(make_list(history=[1], candidates=[2])).shape == (1,)
        assert baseline.scores(make_list(history=[1], candidates=[])).shape == (0,)


def test_item_knn_finds_the_clusters_on_users_it_never_saw():
    dataset = clustered()
    knn = ItemKNN(dataset)
    chance = ndcg(Random(), dataset.test)
    assert ndcg(knn, dataset.test) > chance + 0.25
    # Everybody has seen a bit of everything: only the interest tells the clusters apart, and tuning notices.
    assert knn.settings.weighting == "interest"
    assert ndcg(knn, dataset.test) > ndcg(ItemKNN(dataset, KNNSettings("implicit", 20, 0.0)), dataset.test) + 0.1


def test_tuning_with_missing_feedback_compares_observed_candidates_only():
    dataset = clustered()
    rng = np.random.default_rng(2)

    def thinned(lst):
        return dataclasses.replace(lst, interest=np.where(rng.random(8) < 0.5, lst.interest, np.nan))

    sparse = dataclasses.replace(dataset, train=[thinned(lst) for lst in dataset.train], unobserved="critic")
    assert ItemKNN(sparse).settings.weighting == "interest"


def test_tuning_reads_observed_candidates_where_feedback_is_missing(monkeypatch):
    """And counts the others as 0 where they are negatives."""
    seen = []

    def spy(gains, metrics):
        seen.append([row.tolist() for row in gains])
        return {metrics[0]: np.zeros(1)}

    monkeypatch.setattr(module, "rank_metrics", spy)
    train = [
        make_list(7, history=[0], candidates=[1, 2, 3, 4], interest=[np.nan, 0.25, 0.5, np.nan]),
        make_list(8, history=[0], candidates=[1, 2, 3], interest=[0.0, np.nan, 0.0]),
    ]
    for unobserved, expected in (("critic", [0.25, 0.5]), ("zero", [0.0, 0.0, 0.25, 0.5])):
        seen.clear()
        ItemKNN(make_dataset(LOG, 5, train, unobserved=unobserved))
        assert {tuple(sorted(row)) for rows in seen for row in rows} == {tuple(expected)}
        assert {len(rows) for rows in seen} == {1}, "a list in which nothing was liked ranks nothing"


def test_tuning_without_any_feedback_keeps_the_defaults():
    dataset = make_dataset(LOG, 5, train=[make_list(history=[0])])
    assert ItemKNN(dataset).settings == KNNSettings()
    assert ItemKNN(dataclasses.replace(dataset, train=[])).settings == KNNSettings()


@pytest.mark.parametrize("weighting", ["implicit", "interest"])
@pytest.mark.parametrize(("neighbours", "shrinkage"), [(1, 0.0), (3, 2.0), (50, 1.0)])
def test_user_knn_equals_its_formula(weighting, neighbours, shrinkage):
    rng = np.random.default_rng(4)
    log = [(u, i, rng.random()) for u in range(12) for i in range(9) if rng.random() < 0.5]
    matrix, mean = np.zeros((12, 9)), np.mean([np.float32(y) for *_, y in log])
    for u, i, y in log:
        matrix[u, i] = 1.0 if weighting == "implicit" else y
    knn = UserKNN(make_dataset(log, 9), KNNSettings(weighting, neighbours, shrinkage))
    felt = np.array([0.25, np.nan, 1.0, 0.75], dtype=np.float32)
    for user in (5, 99):  # in the log: never their own neighbour; not in the log
        lst = make_list(user, history=[0, 1, 2, 3], candidates=[4, 5, 6, 7, 8])
        lst = dataclasses.replace(lst, history_interest=felt)
        history = np.zeros(9)
        history[:4] = 1.0 if weighting == "implicit" else np.where(np.isnan(felt), mean, felt)
        similar = [
            0.0 if v == user else history @ row / (np.linalg.norm(history) * np.linalg.norm(row) + shrinkage)
            for v, row in enumerate(matrix)
        ]
        nearest = np.argsort(similar)[::-1][:neighbours]
        expected = [sum(similar[v] * matrix[v, c] for v in nearest) for c in lst.candidates]
        np.testing.assert_allclose(knn.scores(lst), expected, rtol=1e-5)


def test_user_knn_finds_the_clusters_and_knows_what_was_not_liked():
    dataset = clustered()
    knn = UserKNN(dataset)
    assert ndcg(knn, dataset.test) > ndcg(Random(), dataset.test) + 0.25
    assert knn.settings.weighting == "interest"
    lst = dataset.test[0]
    disliked = dataclasses.replace(lst, history_interest=np.zeros(len(lst.history), dtype=np.float32))
    popular = np.argsort(-lst.popularity, kind="stable")
    np.testing.assert_array_equal(np.argsort(-knn.scores(disliked), kind="stable"), popular)


def test_items_and_users_that_a_log_does_not_know_cost_nothing():
    """A log of 25 million ratings has 60,000 items and 160,000 users: only what it holds takes memory."""
    log = Interactions(
        users=np.array([0, 160_000, 160_000]),
        items=np.array([5, 5, 59_999]),
        interest=np.ones(3, dtype=np.float32),
        times=np.arange(3.0),
    )
    ids = tuple(map(str, range(60_000)))
    dataset = RankingDataset("wide", Catalogue(ids, ids, ((),) * len(ids)), log, train=[], test=[], unobserved="zero")
    lst = make_list(history=[5], candidates=[59_999, 7])
    for knn in (ItemKNN(dataset), UserKNN(dataset)):
        assert knn.scores(lst)[0] > knn.scores(lst)[1] == 0


def test_a_repeated_pair_counts_by_its_last_feedback():
    dataset = make_dataset([(0, 0, 1.0), (0, 1, 0.25), (1, 2, 1.0), (0, 1, 0.75)], 3)
    knn = ItemKNN(dataset, KNNSettings("interest", 1, 1.0))
    scores = knn.scores(make_list(history=[0], candidates=[1, 2]))
    assert scores[0] == pytest.approx(0.75 / (0.75 + 1))


def test_orders_of_needs():
    """Scores put to [0, 1] within the list, times what the need knows; where that is 0 for all, the factor decides."""

    class Fixed:
        name, scores_interest = "fixed", True

        def scores(self, lst):
            return np.array([-3.0, -1.0, -2.0, -1.5][: len(lst.candidates)])

    catalogue = make_dataset(LOG, 5).catalogue
    lst = make_list(candidates=[0, 1, 2, 3], trend=[1.0, 0.0, 0.75, 0.25])
    assert order_for(NEEDS["interest"], Fixed(), lst, catalogue).tolist() == [1, 3, 2, 0]
    # 0 x 1, 1 x 0, 0.5 x 0.75, 0.75 x 0.25: the last two by gains, the first two by what the need gives.
    assert order_for(NEEDS["trend"], Fixed(), lst, catalogue).tolist() == [2, 3, 0, 1]
    unaware = type("Unaware", (Fixed,), {"scores_interest": False})()
    assert order_for(NEEDS["trend"], unaware, lst, catalogue).tolist() == [1, 3, 2, 0]
    assert len(order_for(NEEDS["trend"], Fixed(), make_list(candidates=[]), catalogue)) == 0
