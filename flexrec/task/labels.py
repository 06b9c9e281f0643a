"""How the candidates of one list are told apart by nothing that they are: by labels, or by where they stand.

Labels are single tokens of a tokenizer. Which candidate gets which is drawn from the candidates' ids, so that "A" is
neither the first nor the best of a list, and a list has the same labels whenever it is shown.
"""

from __future__ import annotations

import string
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np


class Place(NamedTuple):
    """Where a candidate is read in its prompt (:mod:`flexrec.policy.places`), instead of a token that would name it.

    Example:
        >>> from flexrec.policy.places import are_places
        >>> from flexrec.task.labels import Place
        >>> are_places([[[Place(before_end=9, yes=5, no=6)], [Place(before_end=2, yes=5, no=6)]]])
        True
    """

    before_end: int  # the state is that of the token so many before the prompt's end, 1 being the last
    yes: int  # token ids
    no: int


def label_tokens(tokenizer: Any, count: int) -> list[int]:
    """``count`` ids of the tokens "A", "B", .., "AA", "AB", .., of those that the tokenizer has as one token.

    Raises:
        ValueError: it has fewer.

    Example:
        >>> from flexrec.data import Catalogue
        >>> from flexrec.policy.small_model import build_tokenizer
        >>> from flexrec.task.labels import label_tokens
        >>> tokenizer = build_tokenizer(Catalogue(("a",), ("Alien",), ((),)), [])
        >>> tokenizer.decode(label_tokens(tokenizer, 3))
        'ABC'
    """
    found: dict[int, None] = {}  # in order, each once
    for text in _texts():
        if len(found) == count:
            break
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id and tokenizer.decode(ids).strip() == text:
            found[int(ids[0])] = None
    if len(found) < count:
        raise ValueError(
            f"encoding 'label' needs a token for each of {count} candidates, and the tokenizer has {len(found)} of one "
            f"or two letters: use encoding 'index', or fewer candidates"
        )
    return list(found)


def _texts() -> Iterator[str]:
    letters = string.ascii_uppercase
    yield from letters
    for alphabet in (letters, string.ascii_lowercase):
        yield from (first + second for first in alphabet for second in alphabet)


def drawn_labels(labels: Sequence[int], ids: Sequence[str]) -> list[int]:
    """A label for each of the candidates with these ids, of as many ``labels``."""
    seed = zlib.crc32("\n".join(ids).encode())
    return [labels[i] for i in np.random.default_rng(seed).permutation(len(ids))]
