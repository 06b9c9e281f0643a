"""SASRec: what it is trained on, that it learns what comes next, early stopping, and what it does not know."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from flexrec.data.lists import Catalogue, Interactions, RankingDataset, RankingList
from flexrec.evaluation.sequential import SASRec, training_sequences

NUM_ITEMS = 12


def make_list(history, candidates, user=99, popularity=None):
    size = len(candidates)
    return RankingList(
        user=user,
        time=1.0,
        history=np.array(history, dtype=np.int64),
        candidates=np.array(candidates, dtype=np.int64),
        interest=np.full(size, np.nan, dtype=np.float32),
        popularity=np.zeros(size, dtype=np.float32) if popularity is None else np.array(popularity, dtype=np.float32),
        trend=np.zeros(size, dtype=np.float32),
    )


def cycles(num_users=60, length=30, train=()):
    """Every user goes round the first ten items, in order, from a place of their own; nobody has the last two."""
    users = np.repeat(np.arange(num_users), length)
    items = (users * 7 + np.tile(np.arange(length), num_users)) % 10
    order = np.random.default_rng(0).permutation(len(users))  # by time, users mixed
    order = order[np.argsort(np.tile(np.arange(length), num_users)[order], kind="stable")]
    log = Interactions(users[order], items[order], np.ones(len(users), dtype=np.float32), np.arange(len(users)) * 1.0)
    ids = tuple(map(str, range(NUM_ITEMS)))
    return RankingDataset("cycles", Catalogue(ids, ids, ((),) * NUM_ITEMS), log, list(train), [], unobserved="zero")


@pytest.fixture(scope="module")
def trained():
    return SASRec(cycles(), hidden_size=32, max_epochs=40, batch_size=16, learning_rate=5e-3, max_length=12)


def test_it_ranks_what_comes_next_first(trained):
    for last in range(10):
        history = [(last - k) % 10 for k in range(4, -1, -1)]
        scores = trained.scores(make_list(history, np.arange(10)))
        assert scores.argmax() == (last + 1) % 10
    long = [k % 10 for k in range(95)]  # longer than any window
    assert trained.scores(make_list(long, np.arange(10))).argmax() == 5


def test_scores_are_logits_behind_the_history(trained):
    lst = make_list([3, 4, 5], [6, 2, 9])
    with torch.no_grad():
        logits = trained._model(torch.tensor([[3, 4, 5]])).logits[0, -1]
    np.testing.assert_allclose(trained.scores(lst), logits[[6, 2, 9]].numpy(), rtol=1e-5)
    np.testing.assert_array_equal(trained.scores(make_list([3, 11, 4, 10, 5], [6, 2, 9])), trained.scores(lst))


def test_unknown_items_come_last_and_no_history_is_the_order_of_popularity(trained):
    scores = trained.scores(make_list([3, 4, 5], [11, 6, 2, 10], popularity=[1, 0, 0, 5]))
    assert np.argsort(-scores)[2:].tolist() == [3, 0]
    assert scores[0] == pytest.approx(scores[2], abs=1e-6)
    for history in ([], [11]):
        scores = trained.scores(make_list(history, [2, 11, 4], popularity=[1, 9, 5]))
        assert np.argsort(-scores).tolist() == [1, 2, 0]


def test_it_is_trained_on_the_log_and_on_histories_that_hold_more():
    known = make_list([0, 7], [3], user=0)  # both in the log of user 0, who goes through all of 0..9
    more = make_list([4, 11, 5], [3], user=1)
    newcomer = make_list([1, 2], [3], user=500)
    dataset = cycles(num_users=2, train=[known, more, newcomer])
    of_zero, of_one, of_newcomer = training_sequences(dataset)
    assert [sequence.tolist() for sequence in of_zero] == [[k % 10 for k in range(30)]]
    assert [sequence.tolist() for sequence in of_one] == [[(7 + k) % 10 for k in range(30)], [4, 11, 5]]
    assert [sequence.tolist() for sequence in of_newcomer] == [[1, 2]]


def test_windows_hold_every_step_once():
    model = SASRec(cycles(num_users=2, length=3), hidden_size=8, num_heads=2, max_epochs=0, max_length=4)
    for length in (2, 4, 5, 6, 9, 23):
        sequence = np.arange(length)
        for seed in range(5):
            windows = model._windows([[sequence]], np.random.default_rng(seed))
            steps = [(a, b) for window in windows for a, b in pairwise(window.tolist())]
            assert steps == [(k, k + 1) for k in range(length - 1)]
            assert max(map(len, windows)) <= 5


def test_the_best_epoch_is_kept_and_training_ends_when_it_gets_no_better(monkeypatch):
    errors, states = [3.0, 1.0, 2.0, 2.5, 0.5], []

    def validate(self, windows, batch_size):
        states.append({name: value.clone() for name, value in self._model.state_dict().items()})
        return errors[len(states) - 1]

    monkeypatch.setattr(SASRec, "_validate", validate)
    model = SASRec(cycles(num_users=20), hidden_size=8, max_epochs=9, patience=2)
    assert len(states) == 4, "two epochs in a row were no better than the second"
    for name, value in model._model.state_dict().items():
        torch.testing.assert_close(value, states[1][name])


def test_validation_users_are_not_trained_on_and_the_seed_decides(monkeypatch):
    seen = []
    windows = SASRec._windows

    def spy(self, by_user, rng):
        seen.append({int(sequence[0]) for sequences in by_user for sequence in sequences})
        return windows(self, by_user, rng)

    monkeypatch.setattr(SASRec, "_windows", spy)
    dataset = cycles(num_users=10)  # each begins elsewhere
    models = [SASRec(dataset, hidden_size=8, max_epochs=1, seed=seed) for seed in (0, 0, 1)]
    validated, kept = seen[:2]
    assert len(validated) == 1
    assert not validated & kept
    lst = make_list([1, 2], [3, 4])
    same, again, other = (model.scores(lst).tolist() for model in models)
    assert same == again != other
    assert dataclasses.is_dataclass(lst)
