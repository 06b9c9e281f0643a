"""The ranking task: lists, needs, prompts and feedback put together into examples to train and to evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import Dataset

from flexrec.data.lists import Catalogue, RankingDataset, RankingList
from flexrec.profiling import span
from flexrec.task.critic import Critic
from flexrec.task.needs import Need, evaluation_gains, novelty, observed_interest
from flexrec.task.prompts import PromptBuilder


@dataclass(frozen=True)
class Example:
    """One prompt with its candidates and what each of them is worth; arrays are by candidate.

    Example:
        >>> from flexrec.task import Example
        >>> gains, certain = np.array([0.0, 1.0], dtype=np.float32), np.zeros(2, dtype=np.float32)
        >>> example = Example([1, 2, 3], [[10], [11, 12]], gains, certain, history_span=(1, 2), need="interest", user=7)
        >>> example.candidates[example.gains.argmax()]
        [11, 12]
    """

    prompt: list[int]
    candidates: list[list[int]]  # K token sequences
    gains: np.ndarray  # (K,) float32, >= 0
    variance: np.ndarray  # (K,) float32, of the gains; 0 where the feedback was observed
    history_span: tuple[int, int]  # the history's tokens are prompt[start:end]
    need: str
    user: int
    marks: list[list[int]] | None = None  # K lists of token ids that describe a candidate in this list


def prompts_and_candidates(examples: Sequence[Example]) -> tuple[list[list[int]], list[list[list[int]]]]:
    """The two columns of examples that models see."""
    return [example.prompt for example in examples], [example.candidates for example in examples]


def marks_of(examples: Sequence[Example]) -> list[list[list[int]]] | None:
    """The marks of the examples' candidates; None where they have none. Some with and some without is a ValueError."""
    marks = [example.marks for example in examples if example.marks is not None]
    if marks and len(marks) < len(examples):
        raise ValueError(f"{len(marks)} of {len(examples)} examples have marks: give them to all, or to none")
    return marks or None


class RankingTask:
    """Makes examples from lists: which needs, how they are put into words, how missing feedback is filled in.

    Args:
        critic: fills in the interest of candidates without feedback, with its variance; None counts them as 0, as is
            right where they are sampled negatives.

    Example:
        >>> from flexrec.data import simulate
        >>> from flexrec.policy.small_model import build_tokenizer
        >>> from flexrec.task import PromptBuilder, RankingTask, get_need
        >>> data = simulate(num_users=8, num_items=80, num_topics=4, num_test_users=2, num_candidates=6)
        >>> need = get_need("interest")
        >>> tokenizer = build_tokenizer(data.catalogue, need.wordings)
        >>> task = RankingTask(data.catalogue, [need], PromptBuilder(tokenizer, encoding="item_token"))
        >>> len(task.test_example(data.test[0], need).candidates)
        6
    """

    def __init__(
        self, catalogue: Catalogue, needs: Sequence[Need], builder: PromptBuilder, critic: Critic | None = None
    ) -> None:
        self.catalogue = catalogue
        self.needs = tuple(needs)
        self.builder = builder
        self.critic = critic

    def training_feedback(self, lists: Sequence[RankingList]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(interest (K,), its variance (K,)) of each list, as training may know them."""
        if self.critic is not None:
            with span("critic"):
                return self.critic.fill_many(lists)
        return [observed_interest(lst) for lst in lists]

    def training_example(
        self, lst: RankingList, need: Need, wording: str, feedback: tuple[np.ndarray, np.ndarray]
    ) -> Example:
        gains, variance = need.gains(lst, self.catalogue, *feedback)
        return self._example(lst, need, wording, gains, variance)

    def test_example(self, lst: RankingList, need: Need) -> Example:
        """With the need's first wording and the gains that results are stated in (true or observed interest)."""
        gains = evaluation_gains(need, lst, self.catalogue)
        return self._example(lst, need, need.wordings[0], gains, np.zeros_like(gains))

    def _example(self, lst: RankingList, need: Need, wording: str, gains: np.ndarray, variance: np.ndarray) -> Example:
        prompt, history_span = self.builder.prompt_of(lst, self.catalogue, wording)
        candidates = self.builder.candidate_tokens_of(lst, self.catalogue)
        marks = self.builder.marks_of(lst.trend, novelty(lst, self.catalogue)) if self.builder.marked else None
        return Example(prompt, candidates, gains, variance, history_span, need.name, lst.user, marks)


def answerable(dataset: RankingDataset, builder: PromptBuilder, num_ranked: int | None = None) -> RankingDataset:
    """The data set without the lists whose candidates no answer could name, or not so that rankings can be told apart.

    Its ``notes`` count them, and say what is wrong with the first.

    Raises:
        ValueError: nothing is left to train or to test on.
    """
    notes = list(dataset.notes)

    def kept(lists: Sequence[RankingList]) -> tuple[list[RankingList], str]:
        good, reason = [], ""
        for lst in lists:
            try:
                builder.check_answers(builder.candidate_tokens_of(lst, dataset.catalogue), num_ranked)
            except ValueError as error:
                reason = reason or str(error)
            else:
                good.append(lst)
        if not good:
            raise ValueError(f"no list of the {dataset.name} data can be answered: {reason}")
        return good, reason

    left = {}
    for purpose, lists in {"train": dataset.train, "test": dataset.test}.items():
        left[purpose], reason = kept(lists)
        if reason:
            notes.append(
                f"{len(lists) - len(left[purpose])} of {len(lists)} lists to {purpose} on are left out: {reason}"
            )
    draw = dataset.resample
    resample = None if draw is None else lambda seed: kept(draw(seed))[0]
    return replace(dataset, **left, resample=resample, notes=tuple(notes))


class TrainingExamples(Dataset):
    """Every training list under every need; wording and the candidates' order are drawn anew each epoch.

    Args:
        lists: the lists of the first epoch.
        resample: gives the lists of a later epoch (new cut points and negatives); None keeps the first ones.

    Example:
        >>> from flexrec.data import simulate
        >>> from flexrec.policy.small_model import build_tokenizer
        >>> from flexrec.task import PromptBuilder, RankingTask, TrainingExamples, get_need
        >>> data = simulate(num_users=8, num_items=80, num_topics=4, num_test_users=2, num_candidates=6)
        >>> need = get_need("interest")
        >>> tokenizer = build_tokenizer(data.catalogue, need.wordings)
        >>> task = RankingTask(data.catalogue, [need], PromptBuilder(tokenizer, encoding="item_token"))
        >>> examples = TrainingExamples(task, data.train, seed=3)
        >>> before = examples[0].prompt
        >>> examples.set_epoch(1)
        >>> examples[0].prompt == before  # words and order are drawn anew
        False
    """

    def __init__(
        self,
        task: RankingTask,
        lists: Sequence[RankingList],
        *,
        resample: Callable[[int], Sequence[RankingList]] | None = None,
        seed: int = 0,
    ) -> None:
        if not lists:
            raise ValueError("there are no training lists")
        self.task = task
        self.seed = seed
        self._resample = resample
        self._size = len(lists) * len(task.needs)
        self._set_lists(lists, epoch=0)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        lst, need, feedback = self._pick(index)
        rng = np.random.default_rng([self.seed, self._epoch, index])
        order = rng.permutation(len(lst.candidates))
        wording = need.wordings[rng.integers(len(need.wordings))]
        shuffled = lst.reordered(order)
        return self.task.training_example(shuffled, need, wording, (feedback[0][order], feedback[1][order]))

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader when an epoch begins."""
        if epoch != self._epoch:
            self._set_lists(self._lists if self._resample is None else self._resample(self.seed + epoch), epoch)

    def _set_lists(self, lists: Sequence[RankingList], epoch: int) -> None:
        self._lists = list(lists)
        self._feedback = self.task.training_feedback(self._lists)
        self._epoch = epoch

    def _pick(self, index: int) -> tuple[RankingList, Need, tuple[np.ndarray, np.ndarray]]:
        which, need = divmod(index, len(self.task.needs))
        which %= len(self._lists)
        return self._lists[which], self.task.needs[need], self._feedback[which]
