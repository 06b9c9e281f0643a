"""Feedback of the simulator that is missing not at random: what was shown at the top, and looked at, has more."""

import numpy as np
import pytest

from flexrec.data import simulator as module
from flexrec.data.simulator import simulate

SMALL = {"num_users": 200, "num_items": 150, "num_topics": 6, "num_test_users": 5}


@pytest.fixture(scope="module")
def pair():
    return [simulate(**SMALL, observed_share=0.2, missing=missing) for missing in ("random", "exposure")]


def test_attention_falls_with_the_rank_and_has_the_share():
    ranks = np.tile(np.arange(1, 31), 50)
    for share in (0.03, 0.1, 0.3, 0.9, 1.0):
        found = module._attention(ranks, share)
        assert found.mean() == pytest.approx(share)
        inside = found < 1
        np.testing.assert_allclose((found * ranks)[inside], (found * ranks).max(initial=0, where=inside))
    assert (module._attention(ranks, 0.3)[ranks == 1] == 1).all(), "at 30 % the first is looked at by all"


def test_exposure_shows_what_is_popular_and_liked_first(monkeypatch):
    """The worlds are the same, to the feedback that there is: kept or not by the ranks as computed here."""
    kept = []
    attention = module._attention

    def spy(ranks, share):
        kept.append((ranks, share))
        return attention(ranks, share)

    monkeypatch.setattr(module, "_attention", spy)
    seen = []
    watch = module._watch

    def spy_on_watching(world, taste, times, rng):
        items, pages = watch(world, taste, times, rng)
        seen.append((world, taste, times, items, pages))
        return items, pages

    monkeypatch.setattr(module, "_watch", spy_on_watching)
    data = simulate(**SMALL, observed_share=0.2, missing="exposure")
    world, taste, times, items, pages = seen[0]
    (of_watches, share), (of_lists, _), *_ = kept
    assert share == 0.2
    score = world.log_popularity + 0.5 * taste[:, None]  # (U, days, I)
    for lst, found in zip(data.train, of_lists, strict=True):
        order = np.argsort(-score[lst.user, int(lst.time)][lst.candidates])
        expected = np.empty(30, dtype=np.int64)
        expected[order] = 1 + np.arange(30)
        np.testing.assert_array_equal(found, expected)
    views = iter(of_watches)
    for user in range(200):
        distinct = np.sort(np.unique(items[user], return_index=True)[1])
        for view in distinct:
            of_page = score[user, int(times[user, view]), pages[user, view]]
            assert next(views) == 1 + (of_page > score[user, int(times[user, view]), items[user, view]]).sum()
    assert next(views, None) is None


def test_what_is_left_says_too_much_good(pair):
    by_chance, exposed = pair
    for data in pair:
        observed = ~np.isnan(np.concatenate([lst.interest for lst in data.train]))
        assert observed.mean() == pytest.approx(0.2, abs=0.01)
    for one, other in zip(*(data.train for data in pair), strict=True):
        np.testing.assert_array_equal(one.candidates, other.candidates)
        np.testing.assert_array_equal(one.truth, other.truth)
        both = ~np.isnan(one.interest) & ~np.isnan(other.interest)
        np.testing.assert_array_equal(one.interest[both], other.interest[both])
    truths = [np.concatenate([lst.truth for lst in data.train]) for data in pair]
    kept = [
        truth[~np.isnan(np.concatenate([lst.interest for lst in data.train]))].mean()
        for truth, data in zip(truths, pair, strict=True)
    ]
    assert kept[0] == pytest.approx(truths[0].mean(), abs=0.02)
    assert kept[1] > truths[1].mean() + 0.1
    counts = [np.bincount(data.log.items, minlength=150) for data in pair]
    assert counts[1].std() > 1.3 * counts[0].std(), "popular items have most of the feedback"
    assert by_chance.log.interest.mean() + 0.05 < exposed.log.interest.mean()


def test_unknown_ways_of_missing_are_named():
    with pytest.raises(ValueError, match="missing must be one of 'random', 'exposure'; got 'never'"):
        simulate(**SMALL, missing="never")
