"""Examples: what training may know, what results are stated in, and what changes from epoch to epoch."""

from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
from transformers import TrainerCallback

from flexrec.data import simulate
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.task.examples import RankingTask, TrainingExamples
from flexrec.task.needs import NEEDS, get_need, novelty
from flexrec.task.prompts import PromptBuilder
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer


@pytest.fixture(scope="module")
def world():
    dataset = simulate(num_users=40, num_items=90, num_topics=4, num_test_users=5, num_candidates=8)
    tokenizer = build_tokenizer(dataset.catalogue, [w for need in NEEDS.values() for w in need.wordings])
    builder = PromptBuilder(tokenizer, encoding="item_token", show_titles=False)
    return dataset, builder


class HalfCritic:
    """Fills every gap with an interest of 1/2 and a variance of 1/10."""

    def fill_many(self, lists):
        gaps = [np.isnan(lst.interest) for lst in lists]
        return [
            (np.where(gap, 0.5, lst.interest).astype(np.float32), np.where(gap, 0.1, 0.0).astype(np.float32))
            for lst, gap in zip(lists, gaps, strict=True)
        ]


def test_training_examples_know_the_feedback_and_test_examples_the_truth(world):
    dataset, builder = world
    lst, interest = dataset.train[0], get_need("interest")
    observed = ~np.isnan(lst.interest)
    plain = RankingTask(dataset.catalogue, [interest], builder)
    example = plain.training_example(lst, interest, "words", plain.training_feedback([lst])[0])
    np.testing.assert_array_equal(example.gains, np.where(observed, lst.interest, 0.0))
    assert not example.variance.any()
    filled = RankingTask(dataset.catalogue, [interest], builder, HalfCritic())
    example = filled.training_example(lst, interest, "words", filled.training_feedback([lst])[0])
    np.testing.assert_array_equal(example.gains[~observed], 0.5)
    np.testing.assert_allclose(example.variance, np.where(observed, 0.0, 0.1))
    np.testing.assert_array_equal(filled.test_example(lst, interest).gains, lst.truth)


def test_gains_follow_the_candidates_when_their_order_changes(world):
    dataset, builder = world
    task = RankingTask(dataset.catalogue, list(NEEDS.values()), builder, HalfCritic())
    examples = TrainingExamples(task, dataset.train, seed=3)
    assert len(examples) == len(NEEDS) * len(dataset.train)
    orders = set()
    for epoch in range(3):
        examples.set_epoch(epoch)
        for index in range(len(NEEDS)):  # the needs of the first list
            example = examples[index]
            assert example.need == list(NEEDS)[index]
            lst, need = dataset.train[0], get_need(example.need)
            token_of = builder.candidate_tokens_of(lst, dataset.catalogue)
            gains, variance = need.gains(lst, dataset.catalogue, *HalfCritic().fill_many([lst])[0])
            for token, gain, var in zip(token_of, gains, variance, strict=True):
                place = example.candidates.index(token)
                assert (example.gains[place], example.variance[place]) == (gain, var)
                assert example.metric == need.metric
                if need.metric is not None:
                    item = lst.candidates[token_of.index(token)]
                    np.testing.assert_array_equal(example.topics[place], dataset.catalogue.topic_matrix[item])
            assert example.prompt == examples[index].prompt, "an example is the same whenever it is asked for"
            orders.add(tuple(map(tuple, example.candidates)))
    assert len(orders) > 3


def test_a_need_about_topics_is_for_items_that_have_some(world):
    dataset, builder = world
    plain = replace(dataset.catalogue, topics=((),) * len(dataset.catalogue))
    with pytest.raises(ValueError, match="the need 'diverse' values a list by the topics of its items, and no item"):
        RankingTask(plain, [get_need("interest"), get_need("diverse")], builder)
    assert RankingTask(plain, [get_need("interest")], builder).test_example(dataset.test[0], get_need("interest"))


@pytest.fixture(scope="module")
def described(world):
    tokenizer = build_tokenizer(world[0].catalogue, NEEDS["interest"].wordings)
    builder = PromptBuilder(tokenizer, encoding="item_token", show_titles=False, show_rising=False, described=True)
    return world[0], builder, lambda token: tokenizer.convert_ids_to_tokens(list(token))


class Guesses(HalfCritic):
    """Expects of every pair the same."""

    def __init__(self, interest):
        self.interest = interest

    def predict_many(self, lists):
        return [(np.full(len(lst.candidates), self.interest, dtype=np.float32), None) for lst in lists]


def test_marks_follow_the_candidates_and_say_the_list_s_trend_and_novelty(described):
    dataset, builder, _ = described
    task = RankingTask(dataset.catalogue, [get_need("trend")], builder)
    examples = TrainingExamples(task, dataset.train, seed=3)
    seen = set()
    for index, lst in enumerate(dataset.train[:20]):
        marks = builder.marks_of(lst.trend, novelty(lst, dataset.catalogue))
        test = task.test_example(lst, get_need("trend"))
        for (token,), item, of_item in zip(test.candidates, lst.candidates, marks, strict=True):
            assert token[0] == builder.tokenizer.convert_tokens_to_ids(f"<item:{dataset.catalogue.ids[item]}>")
            assert token[-len(of_item) :] == of_item
        gains = dict(zip([token[1:] for (token,) in test.candidates], test.gains, strict=True))
        shuffled = examples[index]
        assert {token[1:] for (token,) in shuffled.candidates} == set(gains), "an item may lose its own token only"
        seen |= {mark for of_item in marks for mark in of_item}
    assert len(seen) > 6, "levels of both kinds"


def test_some_items_of_training_examples_have_no_token_of_their_own(described):
    """A tenth, drawn anew for each example, and the same in the prompt as in the answer; none in test examples."""
    dataset, builder, texts = described
    task = RankingTask(dataset.catalogue, [get_need("interest")], builder)
    examples = TrainingExamples(task, dataset.train, seed=3)
    nameless, names = [], []
    for example in (examples[index] for index in range(len(dataset.train))):
        own = [texts(token)[0] == "<unknown item>" for (token,) in example.candidates]
        listed = [token for token in example.prompt[example.history_span[1] :] if isinstance(token, tuple)]
        assert listed == [token for (token,) in example.candidates]
        start, end = example.history_span
        nameless += own + [texts(token)[0] == "<unknown item>" for token in example.prompt[start : end - 1]]
        names.append(tuple(own))
    assert 0.08 < np.mean(nameless) < 0.12
    assert len(set(names)) > 5
    for lst in dataset.test:
        example = task.test_example(lst, get_need("interest"))
        shown = [token for token in example.prompt if isinstance(token, tuple)]
        assert not any("<unknown item>" in texts(token) for token in shown)


def test_unknown_interest_in_histories_is_guessed_in_part(described):
    """In four of five training lists; what is known stays, and without a critic nothing is guessed."""
    dataset, builder, texts = described

    def levels(critic):
        task = RankingTask(dataset.catalogue, [get_need("interest")], builder, critic)
        examples = TrainingExamples(task, dataset.train, seed=3)
        for index, lst in enumerate(dataset.train):
            start, end = examples[index].history_span
            shown = [texts(token)[-1] for token in examples[index].prompt[start : end - 1]]
            yield lst.history_interest, [text if text.startswith("<interest") else None for text in shown]

    guessed_lists, guessed, unknown = 0, 0, 0
    for interest, shown in levels(Guesses(0.3)):
        assert [s for s, x in zip(shown, interest, strict=True) if not np.isnan(x)] == [
            f"<interest {min(int(4 * x), 3) + 1}>" for x in interest if not np.isnan(x)
        ]
        guesses = [s for s, x in zip(shown, interest, strict=True) if np.isnan(x)]
        assert set(guesses) <= {None, "<interest 2>"}
        guessed_lists += any(guesses)
        guessed += sum(s is not None for s in guesses)
        unknown += len(guesses)
    assert 0.6 < guessed_lists / len(dataset.train) < 0.9
    assert 0.3 < guessed / unknown < 0.5, "four fifths of the lists, half of each on average"
    for interest, shown in levels(None):
        assert [s is None for s in shown] == np.isnan(interest).tolist()


def test_test_examples_ask_in_the_first_wording_and_are_not_guessed(world):
    dataset, builder = world
    need = get_need("trend")
    task = RankingTask(dataset.catalogue, [need], builder, HalfCritic())
    lst = replace(dataset.test[1], truth=None, user=77)
    example = task.test_example(lst, need)
    assert (example.prompt, example.history_span) == builder.prompt_of(lst, dataset.catalogue, need.wordings[0])
    assert example.candidates == builder.candidate_tokens_of(lst, dataset.catalogue)
    np.testing.assert_array_equal(example.gains, np.nan_to_num(lst.interest) * lst.trend)
    assert not example.variance.any()
    assert (example.need, example.user) == ("trend", 77)


def test_training_examples_ask_in_the_wording_that_was_drawn(world):
    dataset, builder = world
    need = get_need("explore")
    lst = dataset.train[2]
    task = RankingTask(dataset.catalogue, [need], builder)
    example = task.training_example(lst, need, "Words", task.training_feedback([lst])[0])
    assert (example.prompt, example.history_span) == builder.prompt_of(lst, dataset.catalogue, "Words")
    assert (example.need, example.user) == ("explore", lst.user)


def drawn(examples, builder, dataset, indices):
    """(wording, order of the candidates) of each example, read off its prompt and candidates."""
    found = []
    for index in indices:
        example, lst = examples[index], dataset.train[index]
        tokens = builder.candidate_tokens_of(lst, dataset.catalogue)
        order = [tokens.index(candidate) for candidate in example.candidates]
        (wording,) = [
            wording
            for wording in get_need(example.need).wordings
            if builder.prompt_of(lst.reordered(np.array(order)), dataset.catalogue, wording)[0] == example.prompt
        ]
        found.append((wording, order))
    return found


def test_wordings_and_orders_are_those_of_seed_epoch_and_index(world):
    dataset, builder = world
    need = get_need("interest")
    task = RankingTask(dataset.catalogue, [need], builder)
    indices = range(20)

    def draws(seed, epoch):
        examples = TrainingExamples(task, dataset.train, seed=seed)
        examples.set_epoch(epoch)
        return drawn(examples, builder, dataset, indices)

    assert draws(3, 1) == draws(3, 1)
    found = [draws(3, 1), draws(4, 1), draws(3, 0), draws(1, 3)]
    for i, one in enumerate(found):
        assert one not in found[:i]
        orders = [order for _, order in one]
        assert all(order not in orders[:i] for i, order in enumerate(orders))
        assert len({order[0] for order in orders}) > 4, "the first candidate may stand anywhere"
    assert {wording for one in found for wording, _ in one} == set(need.wordings)


def test_new_lists_come_with_feedback_of_their_own(world):
    """Of fewer lists than before, the first come again."""
    dataset, builder = world
    task = RankingTask(dataset.catalogue, [get_need("interest")], builder, HalfCritic())
    later = dataset.train[5:8]
    asked = []
    examples = TrainingExamples(task, dataset.train[:4], resample=lambda seed: asked.append(seed) or later, seed=7)
    examples.set_epoch(0)
    assert asked == []
    examples.set_epoch(2)
    examples.set_epoch(2)
    assert asked == [9]
    assert len(examples) == 4
    for index, lst in enumerate([*later, later[0]]):
        ((interest, variance),) = HalfCritic().fill_many([lst])
        tokens = builder.candidate_tokens_of(lst, dataset.catalogue)
        example = examples[index]
        order = [tokens.index(candidate) for candidate in example.candidates]
        np.testing.assert_array_equal(example.gains, interest[order])
        np.testing.assert_array_equal(example.variance, variance[order])
        assert example.user == lst.user


def test_lists_are_drawn_anew_each_epoch_and_the_loader_says_when(world, tmp_path):
    dataset, builder = world
    drawn = []

    def resample(seed):
        drawn.append(seed)
        return dataset.train[::-1]

    task = RankingTask(dataset.catalogue, [get_need("interest")], builder)
    examples = TrainingExamples(task, dataset.train[:16], resample=resample, seed=7)
    config = partial(FlexRecConfig, output_dir=str(tmp_path), report_to="none", save_strategy="no", use_cpu=True)
    args = config(max_steps=4, per_device_train_batch_size=8, disable_tqdm=True, logging_steps=1)

    class Epochs(TrainerCallback):
        seen: ClassVar[list[int]] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.seen.append(len(drawn))

    model = build_model(builder.tokenizer, hidden_size=16, num_layers=1, num_heads=2)
    FlexRecTrainer(model, args, examples, callbacks=[Epochs()]).train()
    assert drawn == [8]
    assert Epochs.seen == [0, 0, 1, 1]


def test_no_lists_is_an_error(world):
    dataset, builder = world
    with pytest.raises(ValueError, match="no training lists"):
        TrainingExamples(RankingTask(dataset.catalogue, [get_need("interest")], builder), [])
