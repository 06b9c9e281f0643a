"""A judge is asked once for each list, in batches; its answers are gains on a stated scale, and checked."""

import re

import numpy as np
import pytest

from flexrec.data import simulate
from flexrec.policy.small_model import build_tokenizer
from flexrec.task import JudgedGains, Need, PromptBuilder, RankingTask, TrainingExamples, find_need


@pytest.fixture(scope="module")
def data():
    return simulate(num_users=8, num_items=80, num_topics=4, num_test_users=2, num_candidates=6)


class Judge:
    """The longer a title, the better; with a variance where asked."""

    def __init__(self, answer=None):
        self.answer, self.calls = answer, []

    def __call__(self, words, histories, candidates):
        assert len(histories) == len(candidates)
        self.calls.append((words, histories, candidates))
        if self.answer is not None:
            return [self.answer] * len(candidates)
        return [[len(title) for title in titles] for titles in candidates]


def test_scores_become_gains_on_the_stated_scale(data):
    judge, lst = Judge(), data.test[0]
    gains, variance = JudgedGains(judge, "Long.", low=-10, high=40)(lst, data.catalogue, None, None)
    titles = [data.catalogue.titles[item] for item in lst.candidates]
    np.testing.assert_allclose(gains, [(len(title) + 10) / 50 for title in titles], rtol=1e-6)
    assert not variance.any()
    assert gains.dtype == variance.dtype == np.float32
    assert judge.calls == [("Long.", [[data.catalogue.titles[item] for item in lst.history]], [titles])]


def test_variances_are_scaled_too(data):
    answer = (np.arange(6.0), np.full(6, 4.0))
    gains, variance = JudgedGains(Judge(answer), "W.", low=0, high=10)(data.test[0], data.catalogue, None, None)
    np.testing.assert_allclose(gains, np.arange(6) / 10, rtol=1e-6)
    np.testing.assert_allclose(variance, 0.04, rtol=1e-6)


def test_a_pair_of_scores_is_not_taken_for_scores_and_variances(data):
    two = data.test[0].reordered(np.array([1, 0]))
    gains, variance = JudgedGains(Judge((0.25, 0.5)), "W.")(two, data.catalogue, None, None)
    np.testing.assert_allclose(gains, [0.25, 0.5])
    assert not variance.any()


def test_it_is_asked_once_whatever_the_order(data):
    judge, lst = Judge(), data.test[0]
    judged = JudgedGains(judge, "Long.", high=40)
    order = np.array([3, 1, 5, 0, 2, 4])
    first, _ = judged(lst, data.catalogue, None, None)
    second, _ = judged(lst.reordered(order), data.catalogue, None, None)
    np.testing.assert_array_equal(second, first[order])
    assert len(judge.calls) == 1
    judged(data.test[1], data.catalogue, None, None)
    assert len(judge.calls) == 2


def test_lists_that_are_known_to_come_are_asked_for_in_batches(data):
    judge = Judge()
    judged = JudgedGains(judge, "Long.", high=40, batch_size=5)
    judged(data.train[0], data.catalogue, None, None)
    judged.prepare(data.train[:12], data.catalogue)
    assert [len(histories) for _, histories, _ in judge.calls] == [1, 5, 5, 1]
    for lst in data.train[:12]:
        judged(lst, data.catalogue, None, None)
    assert len(judge.calls) == 4


def test_a_file_remembers(tmp_path, data):
    path, judge = tmp_path / "cache" / "judged.jsonl", Judge()
    before = [JudgedGains(judge, "Long.", high=40, cache=path)(lst, data.catalogue, None, None) for lst in data.test]
    with path.open("ab") as file:
        file.write(b'["half a li')  # a run was stopped here
    other = Judge([0.0] * 6)
    again = JudgedGains(other, "Long.", high=40, cache=path)
    for lst, expected in zip(data.test, before, strict=True):
        np.testing.assert_array_equal(again(lst, data.catalogue, None, None), expected)
    assert not other.calls
    again(data.train[0], data.catalogue, None, None)
    assert len(JudgedGains(other, "Long.", cache=path)._known) == len(data.test) + 1
    JudgedGains(other, "Short.", cache=path)(data.test[0], data.catalogue, None, None)
    assert len(other.calls) == 2, "other words are another question"
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, line 1: is no judgment"):
        JudgedGains(judge, "Long.", cache=path)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([0.5] * 5, "the judge's scores of the list of user 8 at time {time} must have shape (6,), one per candidate"),
        ([[0.5] * 6], "must have shape (6,), one per candidate, got (1, 6)"),
        ([0.1, 0.2, 0.3, np.nan, 0.1, 0.1], "must be finite and at least 0, got nan for candidate 3"),
        ([0.1, -0.2, 0.3, 0.1, 0.1, 0.1], "must be finite and at least 0, got -0.2 for candidate 1"),
        ("six no", "must be numbers, got 'six no'"),
        (([0.5] * 6, [0.1] * 5), "the judge's variances of the list of user 8"),
        (([0.5] * 6, [-0.1] * 6), "variances of the list of user 8 at time {time} must be finite and at least 0"),
    ],
)
def test_errors_name_the_list(data, answer, message):
    lst = data.test[0]
    with pytest.raises(ValueError, match=re.escape(message.format(time=f"{lst.time:g}"))):
        JudgedGains(Judge(answer), "W.")(lst, data.catalogue, None, None)


def test_answers_for_other_lists_are_refused(data):
    with pytest.raises(ValueError, match="was asked for 1 lists and answered for 2"):
        JudgedGains(lambda *asked: [[0.5] * 6] * 2, "W.")(data.test[0], data.catalogue, None, None)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (1.0, 0.0), (0.0, np.inf), (np.nan, 1.0)])
def test_scales_that_are_none(scale):
    with pytest.raises(ValueError, match="low and high must be finite and high above low"):
        JudgedGains(Judge(), "W.", low=scale[0], high=scale[1])


def test_training_asks_in_batches_before_it_begins(data):
    judge = Judge()
    words = "Long titles."
    need = Need("long", (words,), JudgedGains(judge, words, high=40, batch_size=100))
    builder = PromptBuilder(build_tokenizer(data.catalogue, [words]), encoding="index")
    task = RankingTask(data.catalogue, [need, find_need("interest")], builder)
    examples = TrainingExamples(task, data.train)
    assert len(judge.calls) == 1
    for index in range(0, len(examples), 2):
        example = examples[index]
        assert example.need == "long"
        assert example.gains.max() <= 1
    examples.set_epoch(1)
    _ = examples[0]
    assert len(judge.calls) == 1


def test_it_cannot_be_mixed():
    need = Need("long", ("Long.",), JudgedGains(Judge(), "Long."))
    with pytest.raises(ValueError, match="'long' cannot be mixed"):
        find_need("long + interest", {"long": need, "interest": find_need("interest")})
