"""Prompts: the need in words, what the user had before, the candidates; and how a candidate is spelled in an answer.

A prompt is put together from pieces that are tokenised once each (a title, a wording, the frame of the chat template),
so that building one costs microseconds and a candidate has the same tokens in every list.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flexrec.checks import check_choice
from flexrec.data.lists import Catalogue, RankingList
from flexrec.rankings.state import RankingState, Spelling
from flexrec.task.descriptions import Descriptions, Item, Token, item_token, query_match, title_words, token_id
from flexrec.task.labels import Place, drawn_labels, label_tokens
from flexrec.task.needs import Need, novelty

ENCODINGS = ("index", "label", "title", "item_token", "score")
OF_ONE_TOKEN = ("label", "item_token", "score")

# At most so many candidates are named as rising; their order says how strongly.
MAX_RISING = 8

# The fixed parts of every prompt.
LIKED, SEEN = "\nLiked before:\n", "Seen before:\n"
SEARCHED = "\nSearched for:\n"  # of prompts with a query
RISING, CANDIDATES, RANKING = "Rising now:\n", "Candidates:\n", "Ranking, best first:\n"
# Where there is room to think, in place of the last.
THINKING = "Think first, in a few words: what is asked for, and who has it? Then {end} and the ranking, best first.\n"
# What stands behind a candidate that is scored where it stands.
QUESTION, YES, NO = " | match?", " yes", " no"


def shown_text(show: Sequence[str], title: str, topics: Sequence[str], columns: Mapping[str, Any]) -> str:
    """What prompts say of an item: its title, "category" or columns by name, what is not known left out.

    Example:
        >>> from flexrec.task.prompts import shown_text
        >>> shown_text(("title", "category", "price"), "Oak chair", ["Furniture", "Kitchen"], {"price": 89.9})
        'Oak chair (Furniture, Kitchen; price 89.9)'
    """
    parts = []
    for name in show:
        value = {"title": title, "category": ", ".join(topics)}.get(name, columns.get(name))
        if isinstance(value, float):
            value = "" if np.isnan(value) else f"{name} {value:g}"
        if value not in (None, ""):
            parts.append(str(value))
    if show[0] != "title":
        return "; ".join(parts)
    return parts[0] + (f" ({'; '.join(parts[1:])})" if len(parts) > 1 else "") if parts else ""


def known_columns(catalogue: Catalogue) -> list[str]:
    """What prompts can show of a catalogue's items."""
    return ["title", *(["category"] if catalogue.topic_names else []), *catalogue.columns]


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
        encoding: how an answer names a candidate. "index" ("[12] > [3]", the labels of RankGPT), "label" (a letter or
            two, one token of the vocabulary, drawn anew for every list: :mod:`flexrec.task.labels`), "title" (one
            title a line), "item_token" (one vocabulary entry per item, see :func:`add_item_tokens`) or "score" (not
            at all: each is scored where it stands in the prompt, see :mod:`flexrec.policy.places`).
        show_titles: write titles in the prompt. Always so but for "item_token", where a pretrained model needs them
            to know what an item is, while a model trained on the catalogue does not.
        show: what is shown of an item where its title would be, see :func:`shown_text`.
        max_title_tokens: what is shown is cut to so many tokens.
        show_rising: name the candidates that rise at the moment of the request, and how often they were had in the last
            window and in the one before it (needs about trends read them).
        described: items are several tokens whose rows are summed (:mod:`flexrec.task.descriptions`), of the embedded
            model's tokenizer. For "item_token" only.
        described_needs: needs by what candidates offer to which they are described, too.
        one_pass: the model ranks by its first decision (:mod:`flexrec.decoding.one_pass`): said to who asks it.
        reasoning_end, max_reasoning_tokens: prompts leave room to think, up to this text or so many tokens
            (:mod:`flexrec.rankings.reasoning`). Where it closes a tag, "</think>", prompts end with what opens it.

    Attributes:
        separator, end: token ids between two items of an answer and after the last.
        reasoning: what :func:`flexrec.decoding.sample_rankings` is to be told of reasoning, by argument; empty where
            there is none.

    Raises:
        ValueError: no eos token, or items described under another encoding or by a tokenizer without the tokens for it.

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
        show: Sequence[str] = ("title",),
        max_title_tokens: int | None = None,
        show_rising: bool = True,
        described: bool = False,
        described_needs: Sequence[Need] = (),
        one_pass: bool = False,
        reasoning_end: str | None = None,
        max_reasoning_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.encoding = check_choice("encoding", encoding, ENCODINGS)
        self.show_titles = show_titles or encoding != "item_token"
        self.show = tuple(show)
        if not self.show or (encoding == "title" and "title" not in self.show):
            raise ValueError(f"show must name what a prompt shows, with encoding 'title' also the title, got {show!r}")
        self.max_title_tokens = max_title_tokens
        self.show_rising = show_rising
        self.one_pass = one_pass
        self.described = described
        if described and encoding != "item_token":
            raise ValueError(f"item tokens are described by others: use encoding 'item_token', got {encoding!r}")
        self.described_needs = tuple(described_needs) if described else ()
        names = [need.name for need in self.described_needs]
        self._descriptions = Descriptions(tokenizer, names) if described else None
        self._pieces: dict[str, list[int]] = {}
        self._item_tokens: dict[str, int] = {}
        self._frame = self._chat_frame()
        self.separator: tuple[int, ...] = ()
        self.end: tuple[int, ...] = ()
        self._labels: list[int] = []
        self._answers = self._yes_and_no() if encoding == "score" else (0, 0)
        self.reasoning: dict[str, Any] = {}
        self._asked = self._encode(RANKING)
        self._thinking: list[int] = []
        if reasoning_end is not None and max_reasoning_tokens is not None:
            # As the model's own marker, where it has one.
            marker = tuple(tokenizer.encode(reasoning_end, add_special_tokens=False))
            self.reasoning = {
                "reasoning_end": marker,
                "max_reasoning_tokens": max_reasoning_tokens,
                "num_tokens": len(tokenizer),
            }
            self._asked = self._encode(THINKING.format(end=reasoning_end))
            if reasoning_end.startswith("</"):
                self._thinking = tokenizer.encode("<" + reasoning_end[2:] + "\n", add_special_tokens=False)
        if encoding not in OF_ONE_TOKEN:
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
        interest: Sequence[float] | np.ndarray | None = None,
        rising: Sequence[Item] = (),
        rises: Sequence[Sequence[int]] | np.ndarray | None = None,
        marks: Sequence[tuple[int, ...]] | None = None,
        query: str = "",
    ) -> tuple[list[Token], tuple[int, int]]:
        """Token ids of one prompt, after which the answer begins, and the span (start, end) of the history in it.

        Args:
            wording: the need in words.
            history: oldest first; it is shown as what was liked and what was merely seen, or, where items are
                described, in order with the interest in each.
            interest: (H,) in [0, 1], how much each item of the history was liked, from 1/2 on it was; NaN: that is not
                known. None: of none it is.
            rising: candidates that rise, the strongest first.
            rises: how often each of them was had in the last window and in the one before it; None: that is not said.
            marks: (K,) what else describes the candidates, from :meth:`marks_of`.
            query: what is searched for, in words; empty where nothing is.
        """
        before, after = self._frame
        known = np.asarray([np.nan] * len(history) if interest is None else interest, dtype=np.float32)
        if len(known) != len(history):
            raise ValueError(f"interest must have a value per item of the history, {len(history)}, got {len(known)}")
        ids: list[Token] = [*before]
        if query.strip():
            ids += [*self._encode(wording + SEARCHED), *self._query(query)]
            wording = ""
        if self._descriptions is not None:
            ids += [*self._encode(wording), *self._encode(SEEN)]
            start = len(ids)
            ids += self._listing(history, more=self._descriptions.interests(known))
        elif not history and self.encoding in ("label", "score"):  # whose prompts are lean
            ids += self._encode(wording + "\n")
            start = len(ids)
        else:
            ids += self._encode(wording + LIKED)
            start = len(ids)
            ids += self._listing([item for item, liked in zip(history, known >= 0.5, strict=True) if liked])
            ids += self._encode(SEEN)
            ids += self._listing([item for item, liked in zip(history, known >= 0.5, strict=True) if not liked])
        end = len(ids)
        if self.show_rising:
            ids += [*self._encode(RISING), *self._listing(rising, rises=rises)]
        ids += [*self._encode(CANDIDATES), *self._listing(candidates, named=True, more=marks)]
        if self.encoding != "score":  # whose prompt ends with the last question
            ids += [*self._asked, *after, *self._thinking]
        return ids, (start, end)

    def prompt_of(
        self, lst: RankingList, catalogue: Catalogue, wording: str, *, nameless: Collection[int] = ()
    ) -> tuple[list[Token], tuple[int, int]]:
        """:meth:`prompt` for a list of a data set; items ``nameless`` are shown as if they had no id."""
        strongest = strongest_risers(lst.trend)
        groups = (lst.history, lst.candidates, lst.candidates[strongest])
        history, candidates, rising = (self._items(group, catalogue, nameless) for group in groups)
        return self.prompt(
            wording,
            history,
            candidates,
            interest=lst.history_interest,
            rising=rising,
            rises=None if lst.rises is None else lst.rises[strongest],
            marks=self.marks_in(lst, catalogue),
            query=lst.query,
        )

    def item_of(self, catalogue: Catalogue, index: int) -> Item:
        """An item of a catalogue as prompts show it."""
        title, topics = catalogue.titles[index], catalogue.topics[index]
        if self.show == ("title",) or not self.show_titles:
            return Item(catalogue.ids[index], title, topics)
        columns = {name: catalogue.columns[name][index] for name in self.show if name in catalogue.columns}
        return Item(catalogue.ids[index], title, topics, shown_text(self.show, title, topics, columns))

    def _items(self, indices: np.ndarray, catalogue: Catalogue, nameless: Collection[int]) -> list[Item]:
        items = [(i, self.item_of(catalogue, i)) for i in indices.tolist()]
        return [replace(item, id="") if i in nameless else item for i, item in items]

    def marks_in(self, lst: RankingList, catalogue: Catalogue) -> list[tuple[int, ...]] | None:
        """:meth:`marks_of` for a list of a data set."""
        if not self.described:
            return None
        match = query_match(lst.query, [catalogue.titles[i] for i in lst.candidates])
        offers = [need.offer(lst, catalogue) for need in self.described_needs]
        return self.marks_of(lst.trend, novelty(lst, catalogue), match, offers)

    def candidate_tokens(
        self, candidates: Sequence[Item], marks: Sequence[tuple[int, ...]] | None = None
    ) -> list[list[Token]]:
        """The token sequence by which an answer names each candidate.

        Raises:
            ValueError: a title that tokenises to nothing (encoding "title"), or an item without a token of its own
                (encoding "item_token", unless items are described).
        """
        if self.encoding == "index":
            return [[*self._encode(f"[{i}]")] for i in range(1, len(candidates) + 1)]
        if self.encoding == "score":
            return [[place] for place in self._places(candidates)]
        if self.encoding == "label":
            return [[label] for label in self._labels_of(candidates)]
        if self.encoding == "item_token":
            more = [()] * len(candidates) if marks is None else marks
            return [[self._item_token(item, further)] for item, further in zip(candidates, more, strict=True)]
        sequences = [self._encode(_one_line(item.title)) for item in candidates]
        for item, sequence in zip(candidates, sequences, strict=True):
            if not sequence:
                raise ValueError(
                    f"candidate {item.id!r} has the title {item.title!r}, which gives no tokens: "
                    f"give it a title, or use the encoding 'index'"
                )
        return [[*sequence] for sequence in sequences]

    def candidate_tokens_of(
        self, lst: RankingList, catalogue: Catalogue, *, nameless: Collection[int] = ()
    ) -> list[list[Token]]:
        """:meth:`candidate_tokens` for a list of a data set."""
        return self.candidate_tokens(self._items(lst.candidates, catalogue, nameless), self.marks_in(lst, catalogue))

    def check_answers(self, tokens: list[list[Any]], num_ranked: int | None = None) -> None:
        """Raise a ValueError where rankings of candidates spelled so could not be told apart (see ``RankingState``)."""
        if self.encoding in OF_ONE_TOKEN:
            return
        try:
            RankingState([tokens], **Spelling(self.separator, self.end, num_ranked).of([tokens]))
        except ValueError as error:
            raise ValueError(str(error).replace("candidates[0]", "candidates")) from None

    def marks_of(
        self,
        trend: np.ndarray,
        novelty: np.ndarray,
        match: np.ndarray | None = None,
        offers: Sequence[np.ndarray] = (),
    ) -> list[tuple[int, ...]] | None:
        """:meth:`flexrec.task.descriptions.Descriptions.marks`; None where items are not described."""
        return None if self._descriptions is None else self._descriptions.marks(trend, novelty, match, offers)

    def knows(self, item_id: str) -> bool:
        """Whether an answer can name an item as one that the model was trained with."""
        return self._descriptions is None or self._descriptions.knows(item_id)

    def _query(self, query: str) -> list[int]:
        """A query in tokens of words where there are such, and in pieces of text else."""
        if self._descriptions is None:
            return self._encode(_one_line(query))
        known = ((word, self._descriptions.word(word)) for word in title_words(query))
        return [i for word, own in known for i in (self._encode(f" {word}") if own is None else [own])]

    def _listing(
        self,
        items: Sequence[Item],
        named: bool = False,
        more: Sequence[tuple[int, ...]] | None = None,
        rises: Sequence[Sequence[int]] | np.ndarray | None = None,
    ) -> list[Token]:
        ids: list[Token] = []
        further = [()] * len(items) if more is None else more
        labels = self._labels_of(items) if named and self.encoding == "label" else []
        for i, (item, marks) in enumerate(zip(items, further, strict=True), start=1):
            if labels:
                ids.append(labels[i - 1])
            elif named and self.encoding == "index":
                ids += self._encode(f"[{i}] ")
            if self.encoding == "item_token":
                ids.append(self._item_token(item, marks))
            if self.show_titles:
                if named and self.encoding == "score":
                    ids += self._scored(item)
                    continue
                before = ": " if labels else ""
                if rises is None:
                    ids += self._shown(item, before, "\n")
                else:
                    now, earlier = rises[i - 1]
                    ids += [*self._shown(item, before), *self._encode(f": {now} now, {earlier} before\n")]
        return ids if self.show_titles else [*ids, *self._encode("\n")]

    def _shown(self, item: Item, before: str = "", after: str = "") -> list[int]:
        """What is shown of an item, cut where it is too long, between two pieces of text."""
        text = _one_line(item.title if item.shown is None else item.shown)
        whole = self._encode(before + text + after)
        if self.max_title_tokens is None:
            return whole
        most, end = len(self._encode(before)) + self.max_title_tokens, self._encode(after)
        return whole if len(whole) <= most + len(end) else [*self._encode(before + text)[:most], *end]

    def _scored(self, item: Item) -> list[int]:
        """A candidate and the question after it."""
        return [*self._shown(item, "- "), *self._encode(QUESTION), *self._encode("\n")]

    def _places(self, candidates: Sequence[Item]) -> list[Place]:
        """The questions' last tokens, counted from the prompt's end, where the candidates stand."""
        places: list[Place] = []
        behind = 0
        for item in reversed(candidates):
            places.append(Place(behind + len(self._encode("\n")) + 1, *self._answers))
            behind += len(self._scored(item))
        return places[::-1]

    def _yes_and_no(self) -> tuple[int, int]:
        """The tokens that tell the two answers from each other: of most vocabularies the words."""
        return next((yes, no) for yes, no in zip(self._encode(YES), self._encode(NO), strict=False) if yes != no)

    def _labels_of(self, candidates: Sequence[Item]) -> list[int]:
        if len(candidates) > len(self._labels):
            self._labels = label_tokens(self.tokenizer, len(candidates))
        return drawn_labels(self._labels[: len(candidates)], [item.id for item in candidates])

    def _item_token(self, item: Item, marks: tuple[int, ...]) -> Token:
        if self._descriptions is not None:
            return (*self._descriptions.of(item), *marks)
        own = self._item_tokens.get(item.id)
        if own is None:
            try:
                own = token_id(self.tokenizer, item_token(item.id))
            except ValueError:
                raise ValueError(
                    f"item {item.id!r} has no token of its own: it was not in the catalogue that the model was "
                    f"trained with (encoding 'item_token')"
                ) from None
            self._item_tokens[item.id] = own
        return own

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


def _one_line(title: str) -> str:
    return " ".join(title.split())
