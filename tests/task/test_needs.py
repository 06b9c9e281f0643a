"""Needs: their formulas by hand, exact variances, and gains that are there for most lists of both data sets."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flexrec.data import load_movielens, simulate
from flexrec.data.lists import Catalogue, RankingList
from flexrec.task.needs import (
    NEEDS,
    RARE_TOPIC_SHARE,
    Need,
    evaluation_gains,
    get_need,
    novelty,
    observed_interest,
)

REAL_DATA = Path(os.environ.get("FLEXREC_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))

CATALOGUE = Catalogue(
    ids=tuple("abcdef"),
    titles=tuple("ABCDEF"),
    topics=(("news",), ("sport",), ("news", "music"), (), ("music",), ("sport", "art")),
)


def make_list(**changes) -> RankingList:
    given = {
        "user": 0,
        "time": 1.0,
        # 10 items: news 9 times (0.9), sport once (0.1), music never.
        "history": np.array([0] * 9 + [1]),
        "candidates": np.array([0, 1, 2, 3, 4, 5]),
        "interest": np.array([1.0, 0.5, np.nan, 0.25, np.nan, 0.0], dtype=np.float32),
        "popularity": np.ones(6, dtype=np.float32),
        "trend": np.array([0.0, 0.5, 1.0, 0.2, 0.0, 0.1], dtype=np.float32),
    }
    return RankingList(**{**given, **changes})


def test_novelty_by_hand():
    # Topics of the candidates: news is frequent (novelty 0), music and art are absent (1), sport is rare.
    sport = 1 - 0.1 / RARE_TOPIC_SHARE
    assert 0 < sport < 1
    np.testing.assert_allclose(
        novelty(make_list(), CATALOGUE), [0, sport, (0 + 1) / 2, 0, 1, (sport + 1) / 2], rtol=1e-5
    )


def test_novelty_of_an_empty_history_and_of_items_without_topics():
    assert novelty(make_list(history=np.zeros(0, dtype=np.int64)), CATALOGUE).tolist() == [1, 1, 1, 0, 1, 1]
    bare = Catalogue(CATALOGUE.ids, CATALOGUE.titles, ((),) * 6)
    assert novelty(make_list(), bare).tolist() == [0] * 6


@pytest.mark.parametrize("name", ["interest", "explore", "trend"])
def test_gain_is_interest_times_the_factor_and_variance_the_variance_of_that(name):
    lst = make_list()
    factor = {"interest": np.ones(6), "explore": novelty(lst, CATALOGUE), "trend": lst.trend}[name]
    rng = np.random.default_rng(0)
    interest, variance = rng.random(6).astype(np.float32), rng.random(6).astype(np.float32) / 10
    gains, gain_variance = get_need(name).gains(lst, CATALOGUE, interest, variance)
    assert gains.dtype == gain_variance.dtype == np.float32
    np.testing.assert_allclose(gains, interest * factor, rtol=1e-6)
    # Var[c X] by sampling X, not by the formula: 200,000 draws.
    sampled = interest + np.sqrt(variance) * rng.normal(size=(200_000, 6))
    np.testing.assert_allclose(gain_variance, (sampled * factor).var(axis=0), rtol=0.02, atol=1e-12)


@pytest.mark.parametrize(
    ("interest", "variance", "message"),
    [
        (np.zeros(5), np.zeros(6), r"interest must have shape \(6,\), one per candidate, got \(5,\)"),
        (np.zeros(6), np.zeros((6, 1)), r"variance must have shape \(6,\), one per candidate, got \(6, 1\)"),
        (np.full(6, np.nan), np.zeros(6), "interest must be non-negative numbers without NaN"),
        (np.full(6, -0.1), np.zeros(6), "interest must be non-negative"),
        (np.zeros(6), np.full(6, -0.1), "variance must be non-negative"),
    ],
)
def test_gains_refuse_bad_input(interest, variance, message):
    for need in NEEDS.values():
        with pytest.raises(ValueError, match=message):
            need.gains(make_list(), CATALOGUE, interest, variance)


def test_needs_by_name():
    assert list(NEEDS) == ["interest", "explore", "trend", "search", "diverse"]
    assert [name for name, need in NEEDS.items() if need.metric is not None] == ["diverse"]
    for name, need in NEEDS.items():
        assert get_need(name) is need
        assert need.name == name
        assert len(set(need.wordings)) >= 5
        again = pickle.loads(pickle.dumps(need))
        assert again == need
    everything = [wording for need in NEEDS.values() for wording in need.wordings]
    assert len(set(everything)) == len(everything)
    with pytest.raises(ValueError, match="unknown need 'nice'; known needs: interest, explore, trend, search"):
        get_need("nice")


def test_a_need_of_ones_own():
    def popular(lst, catalogue, interest, variance):
        return interest * (lst.popularity > 0), variance * (lst.popularity > 0)

    need = Need("popular", ("Show me what everyone likes.",), popular)
    lst = make_list(popularity=np.array([1, 0, 0, 0, 0, 0], dtype=np.float32))
    assert evaluation_gains(need, lst, CATALOGUE).tolist() == [1, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="name of a need must not be empty"):
        replace(need, name="")
    for wordings in ((), ("Good.", " ")):
        with pytest.raises(ValueError, match="need 'popular' must have at least one wording and none that is empty"):
            replace(need, wordings=wordings)
    with pytest.raises(ValueError, match="metric of need 'popular' must be one of 'alpha_ndcg', 'err_ia'; got 'ndcg'"):
        replace(need, metric="ndcg")


def test_observed_interest_counts_no_feedback_as_nothing():
    lst = make_list()
    interest, variance = observed_interest(lst)
    assert interest.tolist() == [1, 0.5, 0, 0.25, 0, 0]
    assert variance.tolist() == [0] * 6
    assert interest.dtype == variance.dtype == np.float32
    assert np.isnan(lst.interest[2])  # the list itself is left as it was


def test_evaluation_takes_the_truth_where_it_is_known():
    truth = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=np.float32)
    known, unknown = make_list(truth=truth), make_list()
    np.testing.assert_array_equal(evaluation_gains(get_need("interest"), known, CATALOGUE), truth)
    np.testing.assert_allclose(evaluation_gains(get_need("trend"), known, CATALOGUE), truth * known.trend)
    assert evaluation_gains(get_need("trend"), unknown, CATALOGUE).tolist() == pytest.approx([0, 0.25, 0, 0.05, 0, 0])


@pytest.mark.parametrize("name", list(NEEDS))
def test_most_simulated_lists_offer_something_to_every_need(name, simulated):
    lists = simulated.train + simulated.test
    gains = np.array([evaluation_gains(NEEDS[name], lst, simulated.catalogue) for lst in lists])
    # The truth is never exactly 0: a gain worth speaking of is asked for.
    assert (gains.max(axis=1) > 0.1).mean() > 0.7


@pytest.mark.parametrize("name", list(NEEDS))
def test_most_real_lists_offer_something_to_every_need(name, movielens):
    for lists in (movielens.train, movielens.test):
        offered = [evaluation_gains(NEEDS[name], lst, movielens.catalogue).any() for lst in lists]
        assert np.mean(offered) > 0.7


@pytest.fixture(scope="module")
def simulated():
    return simulate(num_users=300, num_test_users=60)


@pytest.fixture(scope="module")
def movielens():
    if not (REAL_DATA / "ml-latest-small").is_dir():
        pytest.skip(f"no ml-latest-small in {REAL_DATA}; name its parent folder in FLEXREC_TEST_DATA")
    return load_movielens(REAL_DATA / "ml-latest-small", lists_per_user=4)
