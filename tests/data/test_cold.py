"""Items kept from training: where they are no more, and what is asked of them."""

import dataclasses
import pickle

import numpy as np
import pytest

from flexrec.data import simulate
from flexrec.data.cold import hold_out_items, lists_of_new_items, new_items


@pytest.fixture(scope="module")
def dataset():
    data = simulate(num_users=30, num_items=90, num_topics=4, num_test_users=6, num_candidates=8)
    return dataclasses.replace(data, resample=Again(data.train[::-1]))


class Again:
    def __init__(self, lists):
        self.lists = lists

    def __call__(self, seed):
        return self.lists[seed:]


def test_held_out_items_are_in_no_log_and_no_training_list(dataset):
    held = hold_out_items(dataset, 0.3, seed=1)
    assert not new_items(dataset).any()
    cold = new_items(held)
    assert cold.sum() == 27
    again = pickle.loads(pickle.dumps(held.resample))(2)
    for lists, before in ((held.train, dataset.train), (again, dataset.train[::-1][2:])):
        enough = [whole for whole in before if np.count_nonzero(~cold[whole.candidates]) > 1]
        for lst, whole in zip(lists, enough, strict=True):
            kept, shown = ~cold[whole.candidates], ~cold[whole.history]
            for name in ("candidates", "interest", "popularity", "trend", "truth"):
                np.testing.assert_array_equal(getattr(lst, name), getattr(whole, name)[kept])
            np.testing.assert_array_equal(lst.history, whole.history[shown])
            np.testing.assert_array_equal(lst.history_interest, whole.history_interest[shown])
    assert len(held.log) == np.count_nonzero(~cold[dataset.log.items])
    assert not cold[held.log.items].any()
    assert (held.test, held.catalogue) == (dataset.test, dataset.catalogue), "what is tested on stays as it was"
    assert (new_items(hold_out_items(dataset, 0.3, seed=1)) == cold).all()
    assert (new_items(hold_out_items(dataset, 0.3, seed=2)) != cold).any()


def test_lists_that_lose_nearly_all_candidates_are_left_out(dataset):
    held = hold_out_items(dataset, 0.85, seed=0)
    assert 0 < len(held.train) < len(dataset.train)
    assert min(len(lst.candidates) for lst in held.train) >= 2
    few = dataclasses.replace(dataset, train=dataset.train[:1])
    with pytest.raises(ValueError, match="no training list has two candidates left"):
        hold_out_items(few, 0.99)
    with pytest.raises(ValueError, match=r"share must lie strictly between 0 and 1, got 1\.0"):
        hold_out_items(dataset, 1.0)


def test_lists_of_new_items_have_something_to_rank(dataset):
    cold = new_items(hold_out_items(dataset, 0.3, seed=1))
    found = lists_of_new_items(dataset.test, cold)
    assert len(found) > 5
    by_user = {(lst.user, lst.time): lst for lst in dataset.test}
    for lst in found:
        whole = by_user[lst.user, lst.time]
        inside = cold[whole.candidates]
        np.testing.assert_array_equal(lst.candidates, whole.candidates[inside])
        np.testing.assert_array_equal(lst.truth, whole.truth[inside])
        np.testing.assert_array_equal(lst.history, whole.history)
        assert len(lst.candidates) > 1
    same = [dataclasses.replace(lst, truth=None, interest=np.full(8, np.nan, np.float32)) for lst in dataset.test]
    assert lists_of_new_items(same, cold) == [], "no candidate is known to be better than another"
    one_better = np.full(8, np.nan, dtype=np.float32)
    at = np.flatnonzero(cold[dataset.test[0].candidates])
    one_better[at[0]] = 0.5
    told = dataclasses.replace(dataset.test[0], truth=None, interest=one_better)
    assert len(lists_of_new_items([told], cold)) == (len(at) > 1)
