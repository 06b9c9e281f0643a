"""ALS and BPR: a list's user solves the criterion of the paper, whom settings are chosen on, what to install."""

import dataclasses
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from flexrec.data.lists import Catalogue, Interactions, RankingDataset, RankingList
from flexrec.evaluation import tuning
from flexrec.evaluation.baselines import Random
from flexrec.evaluation.factorisation import ALS, BPR, ALSSettings, BPRSettings
from flexrec.evaluation.statistics import rank_metrics

needs_implicit = pytest.mark.skipif(find_spec("implicit") is None, reason="needs the extra 'baselines'")


def clusters(seed=0, num_users=120, per_cluster=12, liked_in_log=20):
    """Users have items of one of three clusters; a list has two of theirs and six of the others, no two users alike."""
    rng = np.random.default_rng(seed)
    num_items, rows, lists = 3 * per_cluster, [], []
    for user in range(num_users):
        mine = rng.permutation(per_cluster) + rng.integers(3) * per_cluster
        others = rng.permutation(np.setdiff1d(np.arange(num_items), mine))
        candidates = np.concatenate([mine[:2], others[:6]])
        history_interest = np.where(rng.random(7) < 0.5, np.nan, 1.0).astype(np.float32)
        lists.append(
            RankingList(
                user=user,
                time=1.0,
                history=mine[2:9],
                candidates=candidates,
                interest=(candidates // per_cluster == mine[0] // per_cluster).astype(np.float32),
                popularity=np.zeros(8, dtype=np.float32),
                trend=np.zeros(8, dtype=np.float32),
                history_interest=history_interest,
            )
        )
        rows += [(user, item, 1.0) for item in mine[2:]]
    train = [lst for lst in lists if lst.user < num_users // 2]
    users, items, interest = (np.array(column) for column in zip(*rows, strict=True))
    known = users < num_users // 2
    log = Interactions(users[known], items[known], interest[known].astype(np.float32), np.arange(known.sum()) * 1.0)
    ids = tuple(map(str, range(num_items + 1)))  # the last is in no log
    catalogue = Catalogue(ids, ids, ((),) * len(ids))
    return RankingDataset("clusters", catalogue, log, train, lists[num_users // 2 :], unobserved="zero")


def ndcg(baseline, lists):
    gains = [lst.interest[np.argsort(-baseline.scores(lst), kind="stable")] for lst in lists]
    return rank_metrics(gains, ("ndcg@5",))["ndcg@5"].mean()


@needs_implicit
@pytest.mark.parametrize("make", [ALS, BPR])
def test_they_find_the_clusters_of_users_they_never_saw(make):
    dataset = clusters()
    assert ndcg(Random(), dataset.test) < 0.6
    assert ndcg(make(dataset), dataset.test) > 0.9


@needs_implicit
@pytest.mark.parametrize("weighting", ["implicit", "interest"])
def test_the_user_of_a_list_solves_the_least_squares_of_als(weighting):
    dataset = clusters()
    rng = np.random.default_rng(1)
    felt = rng.random(len(dataset.log)).astype(np.float32)
    dataset = dataclasses.replace(dataset, log=dataclasses.replace(dataset.log, interest=felt))
    settings = ALSSettings(weighting, factors=5, regularization=0.5, alpha=4.0)
    als = ALS(dataset, settings)
    items = als._model.item_factors.astype(np.float64)
    lst = dataset.test[0]
    of_history = np.where(np.isnan(lst.history_interest), felt.mean(), lst.history_interest)
    confidence = np.ones(len(items))
    confidence[lst.history] = 4.0 * (1.0 if weighting == "implicit" else of_history)
    wanted = np.zeros(len(items))
    wanted[lst.history] = 1.0
    left = (items.T * confidence) @ items + 0.5 * np.eye(5)
    user = np.linalg.solve(left, (items.T * confidence) @ wanted)
    np.testing.assert_allclose(als.scores(lst), items[lst.candidates] @ user, rtol=2e-3, atol=2e-4)


@needs_implicit
@pytest.mark.parametrize("liked", [False, True])
def test_the_user_of_a_list_is_where_the_criterion_of_bpr_is_greatest(liked):
    dataset = clusters()
    bpr = BPR(dataset, BPRSettings(liked, factors=4, regularization=0.05))
    lst = dataset.test[0]
    lst = dataclasses.replace(lst, history_interest=np.array([0.25, np.nan, 1, 1, 0, 1, np.nan], dtype=np.float32))
    positive = lst.history[[1, 2, 3, 5, 6]] if liked else lst.history
    drawn = np.random.default_rng(0).choice(bpr._drawn_from, 50)
    negative = drawn[~np.isin(drawn, positive)]

    def criterion(user):
        score = bpr._factors @ user + bpr._biases
        margins = score[positive][:, None] - score[negative]
        return -np.log1p(np.exp(-margins)).mean(1).sum() - len(positive) * 0.05 * user @ user / 2

    found, rng = bpr._user(lst), np.random.default_rng(2)
    for _ in range(50):
        assert criterion(found) > criterion(found + rng.normal(0, 0.02, 4))
    expected = bpr._factors[lst.candidates] @ found + bpr._biases[lst.candidates]
    np.testing.assert_allclose(bpr.scores(lst), expected, rtol=1e-6)


@needs_implicit
@pytest.mark.parametrize("make", [ALS, BPR])
def test_the_user_of_a_list_is_found_by_one_thread(make, monkeypatch):
    """Several wait for one another: a hundred times as long where the machine does something else as well."""
    from threadpoolctl import threadpool_info

    def threads():
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    dataset, used = clusters(), []
    model = make(dataset, ALSSettings() if make is ALS else BPRSettings())
    before = threads()
    owner, name = (type(model._model), "recalculate_user") if make is ALS else (np.linalg, "solve")
    inner = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: used.append(threads()) or inner(*args, **kwargs))
    model.scores(dataset.test[0])
    assert used
    assert all(of_call == {1} for of_call in used)
    assert threads() == before


@needs_implicit
@pytest.mark.parametrize("make", [ALS, BPR])
def test_unknown_items_come_last_and_unknown_histories_say_nothing(make):
    dataset = clusters()
    unknown = len(dataset.catalogue) - 1
    model = make(dataset, ALSSettings() if make is ALS else BPRSettings())
    lst = dataset.test[0]
    popular = np.array([9, 1, 2, 3, 4, 5, 6, 7], dtype=np.float32)
    mixed = dataclasses.replace(lst, candidates=np.array([unknown, *lst.candidates[1:]]), popularity=popular)
    scores = model.scores(mixed)
    assert np.isfinite(scores).all()
    assert scores.argmin() == 0
    assert scores[0] == pytest.approx(scores[1:].min(), abs=1e-6), (
        "as the least of those that are known, not below all reason"
    )
    nothing = dataclasses.replace(mixed, history=np.array([unknown]), history_interest=None)
    assert np.isfinite(model.scores(nothing)).all()


@needs_implicit
@pytest.mark.parametrize("make", [ALS, BPR])
def test_settings_are_chosen_on_users_that_the_fit_was_without(make, monkeypatch):
    dataset, fitted, asked = clusters(), [], []
    monkeypatch.setattr(tuning, "_TUNING_USERS", 7)

    class Spy:
        def __init__(self, part):
            fitted.append(set(part.log.users.tolist()))

        def scores(self, lst):
            asked.append(lst.user)
            return np.arange(len(lst.candidates)) * 1.0

    assert tuning.best_on_other_users([1, 2], dataset, lambda part, settings: Spy(part)) in (1, 2)
    assert [len(users) for users in fitted] == [7, 7]
    assert not set(asked) & fitted[0]
    assert len(set(asked)) == 12, "a fifth of the users"
    assert make(dataset).settings in [make(dataset).settings], "the same every time"


def test_the_best_settings_win():
    dataset = clusters()
    right = lambda lst: lst.interest.astype(np.float64)  # noqa: E731
    scores = lambda lst: [-right(lst), right(lst), 0 * right(lst)]  # noqa: E731
    assert tuning.best_settings(["worst", "best", "none"], dataset.train, "zero", scores) == "best"
    assert tuning.best_settings(["worst"], [], "zero", scores) is None


@pytest.mark.parametrize("make", [ALS, BPR])
def test_without_the_package_it_says_what_to_install(make, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "implicit"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "implicit", None)
    with pytest.raises(
        ImportError, match=rf"'{make.name}' needs the package implicit: .venv/bin/pip install -e '.\[baselines\]'"
    ):
        make(clusters())
