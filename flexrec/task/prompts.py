"""Prompts: the need in words, what the user had before, the candidates; and how a candidate is spelled in an answer.

A prompt is put together from pieces that are tokenised once each (a title, a wording, the frame of the chat template),
so that building one costs microseconds and a candidate has the same tokens in every list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexrec.checks import check_choice
from flexrec.data.lists import Catalogue, RankingList
from flexrec.rankings.state import RankingState, Spelling

ENCODINGS = ("index", "title", "item_token")

# At most so many candidates are named as rising; their order says how strongly.
MAX_RISING = 8

# The fixed parts of every prompt.
LIKED, SEEN = "\nLiked before:\n", "Seen before:\n"
RISING, CANDIDATES, RANKING = "Rising now:\n", "Candidates:\n", "Ranking, best first:\n"

# Marks say what a candidate is in this list only: how strongly it rises, how new its topics are to the history.
RISE_LEVELS = np.array([0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], dtype=np.float32)  # a trend from here on is the next
NOVELTY_LEVELS = 5
RISE_MARKS = tuple(f"<rise {level}>" for level in range(1, len(RISE_LEVELS) + 2))  # what does not rise has none
NOVELTY_MARKS = tuple(f"<new {level}>" for level in range(NOVELTY_LEVELS + 1))


@dataclass(frozen=True)
class Item:
    """An item as a prompt shows it.

    Example:
        >>> from flexrec.task import Item
        >>> Item("318", "The Shawshank Redemption").title
        'The Shawshank Redemption'
    """

    id: str
    title: str


def item_token(item_id: str) -> str:
    """The text of the vocabulary entry that stands for one item under ``encoding="item_token"``.

    Example:
        >>> from flexrec.task import item_token
        >>> item_token("318")
        '<item:318>'
    """
    return f"<item:{item_id}>"


def add_item_tokens(model: Any, tokenizer: Any, catalogue: Catalogue) -> int:
    """Give every item of the catalogue a vocabulary entry of its own; returns how many were new.

    The model's embeddings are resized where needed. New rows start at the mean of the old ones plus noise (the
    default of transformers), so they mean nothing before the ``format`` stage has seen the histories.

    Example:
        >>> from flexrec.data import Catalogue
        >>> from flexrec.policy.small_model import build_model, build_tokenizer
        >>> from flexrec.task import add_item_tokens
        >>> few, more = (Catalogue(ids, ids, ((),) * len(ids)) for ids in (("a",), ("a", "b", "c")))
        >>> tokenizer = build_tokenizer(few, [])
        >>> model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
        >>> add_item_tokens(model, tokenizer, more)
        2
    """
    added = tokenizer.add_tokens([item_token(item_id) for item_id in catalogue.ids], special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    return int(added)


class PromptBuilder:
    """Turns a request into prompt tokens, and candidates into the token sequences that an answer is made of.

    Args:
        tokenizer: a Hugging Face tokenizer; its chat template is used when it has one.
        encoding: how an answer names a candidate. "index" ("[12] > [3]", the labels of RankGPT), "title" (one title
            a line) or "item_token" (one vocabulary entry per item, see :func:`add_item_tokens`).
        show_titles: write titles in the prompt. Always so for "index" and "title"; with "item_token" a pretrained
            model needs them to know what an item is, while a model trained on the catalogue does not.
        show_rising: name the candidates that rise at the moment of the request (needs about trends read them).
        marked: describe candidates by marks too (:meth:`marks_of`), vocabulary entries of the embedded model's
            tokenizer whose output rows are added to an item's own. For "item_token" only.

    Attributes:
        separator, end: token ids between two items of an answer and after the last.

    Raises:
        ValueError: no eos token, or marks with another encoding or by a tokenizer that has none.

    Example:
        >>> from flexrec.data import Catalogue
        >>> from flexrec.policy.small_model import build_tokenizer
        >>> from flexrec.task import Item, PromptBuilder
        >>> catalogue = Catalogue(ids=("a", "b"), titles=("Alien", "Amelie"), topics=((), ()))
        >>> tokenizer = build_tokenizer(catalogue, [])
        >>> builder = PromptBuilder(tokenizer, encoding="index", show_rising=False)
        >>> items = [Item("a", "Alien"), Item("b", "Amelie")]
        >>> print(tokenizer.decode(builder.prompt("Something sweet", items[:1], items)[0]), end="")
        <s>Something sweet
        Liked before:
        Seen before:
        Alien
        Candidates:
        [1] Alien
        [2] Amelie
        Ranking, best first:
        >>> tokenizer.decode(builder.candidate_tokens(items)[1])
        '[2]'
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        encoding: str = "index",
        show_titles: bool = True,
        show_rising: bool = True,
        marked: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.encoding = check_choice("encoding", encoding, ENCODINGS)
        self.show_titles = show_titles or encoding != "item_token"
        self.show_rising = show_rising
        self.marked = marked
        if marked and encoding != "item_token":
            raise ValueError(f"marks are added to the rows of item tokens: use encoding 'item_token', got {encoding!r}")
        self._rise_ids, self._novelty_ids = (
            [_token_id(tokenizer, text) for text in texts] if marked else [] for texts in (RISE_MARKS, NOVELTY_MARKS)
        )
        self._pieces: dict[str, list[int]] = {}
        self._item_tokens: dict[str, int] = {}
        self._frame = self._chat_frame()
        self.separator: tuple[int, ...] = ()
        self.end: tuple[int, ...] = ()
        if encoding != "item_token":
            if tokenizer.eos_token_id is None:
                raise ValueError("the tokenizer has no eos token, which ends an answer of encoding 'index' or 'title'")
            self.separator = tuple(self._encode(" > " if encoding == "index" else "\n"))
            self.end = (int(tokenizer.eos_token_id),)

    def prompt(
        self,
        wording: str,
        history: Sequence[Item],
        candidates: Sequence[Item],
        *,
        liked: Sequence[bool] | None = None,
        rising: Sequence[Item] = (),
    ) -> tuple[list[int], tuple[int, int]]:
        """Token ids of one prompt, after which the answer begins, and the span (start, end) of the history in it.

        Args:
            wording: the need in words.
            history: oldest first; it is shown as what was liked and what was merely seen.
            liked: which items of the history were liked; None: none is known to be.
            rising: candidates that rise, the strongest first.
        """
        before, after = self._frame
        marks = [False] * len(history) if liked is None else liked
        ids = [*before, *self._encode(wording + LIKED)]
        start = len(ids)
        ids += self._listing([item for item, mark in zip(history, marks, strict=True) if mark])
        ids += self._encode(SEEN)
        ids += self._listing([item for item, mark in zip(history, marks, strict=True) if not mark])
        end = len(ids)
        if self.show_rising:
            ids += [*self._encode(RISING), *self._listing(rising)]
        ids += [*self._encode(CANDIDATES), *self._listing(candidates, numbered=self.encoding == "index")]
        ids += [*self._encode(RANKING), *after]
        return ids, (start, end)

    def prompt_of(self, lst: RankingList, catalogue: Catalogue, wording: str) -> tuple[list[int], tuple[int, int]]:
        """:meth:`prompt` for a list of a data set."""
        groups = (lst.history, lst.candidates, lst.candidates[strongest_risers(lst.trend)])
        history, candidates, rising = ([Item(catalogue.ids[i], catalogue.titles[i]) for i in group] for group in groups)
        return self.prompt(wording, history, candidates, liked=lst.history_liked.tolist(), rising=rising)

    def candidate_tokens(self, candidates: Sequence[Item]) -> list[list[int]]:
        """The token sequence by which an answer names each candidate.

        Raises:
            ValueError: a title that tokenises to nothing (encoding "title"), or an item without a token of its own
                (encoding "item_token").
        """
        if self.encoding == "index":
            return [self._encode(f"[{i}]") for i in range(1, len(candidates) + 1)]
        if self.encoding == "item_token":
            return [[self._item_token_id(item)] for item in candidates]
        sequences = [self._encode(_one_line(item.title)) for item in candidates]
        for item, sequence in zip(candidates, sequences, strict=True):
            if not sequence:
                raise ValueError(
                    f"candidate {item.id!r} has the title {item.title!r}, which gives no tokens: "
                    f"give it a title, or use the encoding 'index'"
                )
        return sequences

    def candidate_tokens_of(self, lst: RankingList, catalogue: Catalogue) -> list[list[int]]:
        """:meth:`candidate_tokens` for a list of a data set."""
        return self.candidate_tokens([Item(catalogue.ids[i], catalogue.titles[i]) for i in lst.candidates])

    def check_answers(self, tokens: list[list[int]], num_ranked: int | None = None) -> None:
        """Raise a ValueError where rankings of candidates spelled so could not be told apart (see ``RankingState``)."""
        try:
            RankingState([tokens], **Spelling(self.separator, self.end, num_ranked).of([tokens]))
        except ValueError as error:
            raise ValueError(str(error).replace("candidates[0]", "candidates")) from None

    def marks_of(self, trend: np.ndarray, novelty: np.ndarray) -> list[list[int]] | None:
        """What describes each candidate in its list, as token ids; None for a builder without marks.

        Args:
            trend: (K,) in [0, 1], how strongly each candidate rises.
            novelty: (K,) in [0, 1], how new its topics are to the history (:func:`flexrec.task.needs.novelty`).
        """
        if not self.marked:
            return None
        trend, novelty = np.asarray(trend, dtype=np.float32), np.asarray(novelty, dtype=np.float32)
        rise = np.digitize(trend, RISE_LEVELS)
        new = np.ceil(NOVELTY_LEVELS * novelty).astype(np.int64)
        return [
            [*([self._rise_ids[r]] if rises else []), self._novelty_ids[n]]
            for r, n, rises in zip(rise, new, trend > 0, strict=True)
        ]

    def _listing(self, items: Sequence[Item], numbered: bool = False) -> list[int]:
        ids: list[int] = []
        for i, item in enumerate(items, start=1):
            if numbered:
                ids += self._encode(f"[{i}] ")
            if self.encoding == "item_token":
                ids.append(self._item_token_id(item))
            if self.show_titles:
                ids += self._encode(_one_line(item.title) + "\n")
        return ids if self.show_titles else [*ids, *self._encode("\n")]

    def _item_token_id(self, item: Item) -> int:
        token_id = self._item_tokens.get(item.id)
        if token_id is None:
            try:
                token_id = _token_id(self.tokenizer, item_token(item.id))
            except ValueError:
                raise ValueError(
                    f"item {item.id!r} has no token of its own: it was not in the catalogue that the model was "
                    f"trained with (encoding 'item_token')"
                ) from None
            self._item_tokens[item.id] = token_id
        return token_id

    def _encode(self, text: str) -> list[int]:
        """Tokens of a piece of text; a title that spells a special token is read as plain text."""
        ids = self._pieces.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            self._pieces[text] = ids
        return ids

    def _chat_frame(self) -> tuple[list[int], list[int]]:
        """What stands before and after the user's message: the chat template's, else a begin token and nothing."""
        tokenizer = self.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            return ([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []), []
        mark = "\x00message\x00"
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
        )
        before, found, after = text.partition(mark)
        if not found:
            raise ValueError("the tokenizer's chat template does not contain the user's message unchanged")
        return (
            tokenizer.encode(before, add_special_tokens=False),
            tokenizer.encode(after, add_special_tokens=False),
        )


def strongest_risers(trend: np.ndarray) -> np.ndarray:
    """Positions of the candidates that a prompt names as rising, the strongest first: ``trend`` (K,) in [0, 1]."""
    order = np.argsort(-trend, kind="stable")[:MAX_RISING]
    return order[trend[order] > 0]


def _token_id(tokenizer: Any, text: str) -> int:
    """The vocabulary entry that is spelled so."""
    token_id = tokenizer.convert_tokens_to_ids(text)
    if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != text:
        raise ValueError(f"the tokenizer has no token {text!r}")
    return int(token_id)


def _one_line(title: str) -> str:
    return " ".join(title.split())
