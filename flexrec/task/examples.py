"""The ranking task: lists, needs, prompts and feedback put together into examples to train and to evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import Dataset

from flexrec.data.lists import Catalogue, RankingDataset, RankingList
from flexrec.profiling import span
from flexrec.task.critic import Critic
from flexrec.task.descriptions import Token
from flexrec.task.judge import JudgedGains
from flexrec.task.needs import Need, evaluation_gains, observed_interest
from flexrec.task.prompts import PromptBuilder

NAMELESS_SHARE = 0.1  # of the items of a training example, which are shown without their own tokens
GUESSED_SHARE = 0.8  # of training lists, in which a random part of what is not known of the history is guessed


@dataclass(frozen=True)
class LoggedRanking:
    """A ranking that was shown to somebody, and how probable it was to the policy that showed it.

    Example:
        >>> from flexrec.task import LoggedRanking
        >>> shown = LoggedRanking(np.array([2, 0]), np.log([1 / 3, 1 / 2]))  # two of three candidates, at random
        >>> round(float(np.exp(shown.logprobs.sum())), 3)
        0.167
    """

    ranking: np.ndarray  # (T,) integer, index into the candidates
    logprobs: np.ndarray  # (T,) float, of each rank given those before it


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

    prompt: list[Token]
    candidates: list[list[Token]]  # K token sequences
    gains: np.ndarray  # (K,) float32, >= 0
    variance: np.ndarray  # (K,) float32, of the gains: what is not known of them; 0 where they are certain
    history_span: tuple[int, int]  # the history's tokens are prompt[start:end]
    need: str
    user: int
    metric: str | None = None  # of the need, where it values the list as a whole; without cutoff
    topics: np.ndarray | None = None  # (K, C) float32 in [0, 1], what each candidate is about, where there is a metric
    logged: LoggedRanking | None = None  # what was shown, where training is on logs


def prompts_and_candidates(examples: Sequence[Example]) -> tuple[list[list[Token]], list[list[list[Token]]]]:
    """The two columns of examples that models see."""
    return [example.prompt for example in examples], [example.candidates for example in examples]


class RankingTask:
    """Makes examples from lists: which needs, how they are put into words, how missing feedback is filled in.

    Args:
        critic: fills in the interest of candidates without feedback, with its variance; None counts them as 0, as is
            right where they are sampled negatives.

    Raises:
        ValueError: a need that values lists by their topics, of items that have none.

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
        of_topics = next((need for need in needs if need.metric is not None), None)
        if of_topics is not None and not catalogue.topic_names:
            raise ValueError(
                f"the need {of_topics.name!r} values a list by the topics of its items, and no item of these "
                "data has a topic: give the items topics (genres, categories), or leave the need out"
            )
        self.catalogue = catalogue
        self.needs = tuple(needs)
        self.builder = builder
        self.critic = critic

    def ask_judges(self, lists: Sequence[RankingList]) -> None:
        """Ask the judges of needs for all of these lists at once, a batch at a time, so that each is known later."""
        for need in self.needs:
            if isinstance(need.gains, JudgedGains):
                need.gains.prepare(lists, self.catalogue)

    def training_feedback(self, lists: Sequence[RankingList]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(interest (K,), its variance (K,)) of each list, as training may know them; judges are asked."""
        self.ask_judges(lists)
        if self.critic is not None:
            with span("critic"):
                return self.critic.fill_many(lists)
        return [observed_interest(lst) for lst in lists]

    def guessed_histories(self, lists: Sequence[RankingList]) -> list[np.ndarray | None]:
        """The interest (H,) in the history of each list that the critic expects, where histories show interest."""
        if self.critic is None or not self.builder.described:
            return [None] * len(lists)
        histories = [replace(lst, candidates=lst.history) for lst in lists]
        with span("critic"):
            return [mean for mean, _ in self.critic.predict_many(histories)]

    def training_example(
        self,
        lst: RankingList,
        need: Need,
        wording: str,
        feedback: tuple[np.ndarray, np.ndarray],
        *,
        nameless: Collection[int] = (),
    ) -> Example:
        """Items ``nameless`` are shown as new ones are, without their own tokens."""
        gains, variance = need.gains(lst, self.catalogue, *feedback)
        return self._example(lst, need, wording, gains, variance, nameless)

    def test_example(self, lst: RankingList, need: Need) -> Example:
        """With the need's first wording and the gains that results are stated in (true or observed interest)."""
        gains = evaluation_gains(need, lst, self.catalogue)
        return self._example(lst, need, need.wordings[0], gains, np.zeros_like(gains))

    def _example(
        self,
        lst: RankingList,
        need: Need,
        wording: str,
        gains: np.ndarray,
        variance: np.ndarray,
        nameless: Collection[int] = (),
    ) -> Example:
        prompt, history_span = self.builder.prompt_of(lst, self.catalogue, wording, nameless=nameless)
        candidates = self.builder.candidate_tokens_of(lst, self.catalogue, nameless=nameless)
        topics = None if need.metric is None else self.catalogue.topic_matrix[lst.candidates]
        return Example(prompt, candidates, gains, variance, history_span, need.name, lst.user, need.metric, topics)


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
    return replace(dataset, train=left["train"], test=left["test"], resample=resample, notes=tuple(notes))


class TrainingExamples(Dataset):
    """Every training list under every need; wording and the candidates' order are drawn anew each epoch.

    So is, where items are described, which of them are shown as if they were new, and how much of an unknown interest
    in the history is shown as the critic guesses it: where little is known, a model would not learn to read it.

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
        lst, need, feedback, guess = self._pick(index)
        rng = np.random.default_rng([self.seed, self._epoch, index])
        order = rng.permutation(len(lst.candidates))
        wording = need.wordings[rng.integers(len(need.wordings))]
        shuffled, nameless = lst.reordered(order), set()
        if self.task.builder.described:
            shuffled = _guessed(shuffled, guess, rng)
            items = np.concatenate([lst.history, lst.candidates])
            nameless = set(items[rng.random(len(items)) < NAMELESS_SHARE].tolist())
        shown = (feedback[0][order], feedback[1][order])
        return self.task.training_example(shuffled, need, wording, shown, nameless=nameless)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader when an epoch begins."""
        if epoch != self._epoch:
            self._set_lists(self._lists if self._resample is None else self._resample(self.seed + epoch), epoch)

    def _set_lists(self, lists: Sequence[RankingList], epoch: int) -> None:
        self._lists = list(lists)
        self._feedback = self.task.training_feedback(self._lists)
        self._guesses = self.task.guessed_histories(self._lists)
        self._epoch = epoch

    def _pick(self, index: int) -> tuple[RankingList, Need, tuple[np.ndarray, np.ndarray], np.ndarray | None]:
        which, need = divmod(index, len(self.task.needs))
        which %= len(self._lists)
        return self._lists[which], self.task.needs[need], self._feedback[which], self._guesses[which]


def _guessed(lst: RankingList, guess: np.ndarray | None, rng: np.random.Generator) -> RankingList:
    """The list with a random part of the unknown interest in its history, or none, as in ``guess`` (H,)."""
    if guess is None or lst.history_interest is None or rng.random() >= GUESSED_SHARE:
        return lst
    shown = np.isnan(lst.history_interest) & (rng.random(len(guess)) < rng.random())
    return replace(lst, history_interest=np.where(shown, guess, lst.history_interest))
