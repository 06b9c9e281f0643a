"""Baselines: scores by hand, no look at test users or at the feedback to be predicted, tuning, no NaN anywhere."""

import dataclasses

import numpy as np
import pytest

from flexrec.data.lists import Catalogue, Interactions, RankingDataset, RankingList
from flexrec.evaluation import baselines as module
from flexrec.evaluation.baselines import BASELINES, MMR, ItemKNN, KNNSettings, Popularity, Random, Trend
from flexrec.evaluation.statistics import rank_metrics


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
    for name, make in BASELINES.items():
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
    for make in BASELINES.values():
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


def test_mmr_trades_relevance_for_what_is_unlike():
    """By hand: relevance over its largest, cosines of topics; the first is the most relevant at any trade-off."""
    topics = np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [1.0, 1.0], [0.0, 0.0]])
    candidates, relevance = np.array([0, 1, 2, 3, 4]), np.array([2.0, 1.8, 1.0, 1.2, 0.2])
    assert MMR(topics, 1.0).order(candidates, relevance).tolist() == [0, 1, 3, 2, 4]
    # At 1/2 behind item 0: 0.45 - 0.5, 0.25, 0.3 - 0.5 x 0.707 and 0.05; then behind 2 as well ..
    assert MMR(topics, 0.5).order(candidates, relevance).tolist() == [0, 2, 4, 1, 3]
    reverse = MMR(topics, 0.5).order(candidates[::-1], relevance[::-1])
    assert candidates[::-1][reverse].tolist() == [0, 2, 4, 1, 3], "items are told apart by their topics"


def test_mmr_is_tuned_on_the_lists_it_is_given():
    """Where gains say that topics are to differ, the trade-off falls; where relevance is all, it is 1."""
    topics = np.eye(3)[[0, 0, 0, 1, 2]]
    lists = [make_list(candidates=range(5)), make_list(candidates=range(4))]
    relevances = [np.array([1.0, 0.9, 0.8, 0.6, 0.5]), np.array([1.0, 0.9, 0.8, 0.5])]
    diverse = MMR.tuned(topics, lists, relevances, relevances, "alpha_ndcg@3")
    assert diverse.order(lists[0].candidates, relevances[0])[:3].tolist() == [0, 3, 4]
    of_one_topic = np.ones((5, 1))
    scattered = [np.array([0.0, 0.0, 1.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0, 0.0])]
    alike = MMR.tuned(of_one_topic, lists, [-r.argsort().astype(float) + 5 for r in relevances], scattered, "err_ia@3")
    assert alike.trade_off in MMR.TRADE_OFFS
