"""Where a candidate and the separator begin another candidate the longest decides, for state and parser alike."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from flexrec.rankings import RankingState, encode_rankings, parse_rankings
from flexrec.rankings.text import parse_ranking_texts

sys.path.insert(0, str(Path(__file__).parent))

from enumeration import Language, csr_rows

SEQUENCES = [list(s) for size in (1, 2, 3) for s in itertools.product((1, 2), repeat=size)]


@pytest.mark.parametrize("separator", [[], [2], [1, 2]], ids=str)
@pytest.mark.parametrize("num_ranked", [1, 2, 3])
def test_every_ranking_of_every_small_list(separator: list[int], num_ranked: int) -> None:
    """All lists of three sequences of up to three tokens, all rankings: what may come next, and what was said."""
    languages = [
        Language([list(tokens) for tokens in lst], separator, [9], num_ranked)
        for lst in itertools.combinations(SEQUENCES, 3)
    ]
    rows = [(language, spelled) for language in languages for spelled in language.spellings]
    candidates = [language.candidates for language, _ in rows]
    options = {"separator": separator, "end": [9], "num_ranked": num_ranked}
    completions = [spelled.tokens for _, spelled in rows]
    read = [language.read(spelled.tokens).ranking for language, spelled in rows]

    continuations: dict[tuple[int, tuple[int, ...]], set[int]] = {}
    for language, spelled in rows:
        for i, token in enumerate(spelled.tokens):
            continuations.setdefault((id(language), tuple(spelled.tokens[:i])), set()).add(token)
    state = RankingState(candidates, **options)
    for position in range(max(map(len, completions))):
        for (language, spelled), allowed in zip(rows, csr_rows(*state.allowed()), strict=True):
            if position < len(spelled.tokens):
                assert allowed == sorted(continuations[id(language), tuple(spelled.tokens[:position])])
            else:
                assert allowed == []
        state.advance([tokens[position] if position < len(tokens) else 0 for tokens in completions])
    assert state.done().all()
    np.testing.assert_array_equal(state.rankings(), read)
    parsed = parse_rankings(completions, candidates, **options)
    assert parsed.valid.all()
    np.testing.assert_array_equal(parsed.ranking, read)

    # Rankings that are read as themselves are spelled; they are nearly all.
    own = [i for i, ((_, spelled), ranking) in enumerate(zip(rows, read, strict=True)) if spelled.ranking == ranking]
    assert len(own) > 0.9 * len(rows)
    encoded = encode_rankings([candidates[i] for i in own], [read[i] for i in own], **options)
    assert csr_rows(encoded.tokens, encoded.offsets) == [completions[i] for i in own]
    for i in sorted(set(range(len(rows))) - set(own)):
        with pytest.raises(ValueError, match="row 0 is spelled as another ranking is, which has a longer candidate"):
            encode_rankings([candidates[i]], [rows[i][1].ranking], **options)


def test_a_candidate_that_another_one_and_the_separator_begin() -> None:
    candidates = [[[5, 6], [5, 6, 10, 7], [7]]]
    state = RankingState(candidates, separator=[10])
    state.advance([5, 6, 10], [0, 3])
    assert state.allowed()[0].tolist() == [5, 7]  # on with the second, or the next item
    assert state.rankings().tolist() == [[-1, -1, -1]]
    with pytest.raises(ValueError, match="row 0, step 3: token 6 is not allowed; allowed: 5, 7"):
        state.advance([6])
    assert state.allowed()[0].tolist() == [5, 7]
    state.advance([5])
    assert state.rankings().tolist() == [[0, -1, -1]]
    np.testing.assert_array_equal(state.forced()[0], [6, 10, 7, 10, 7])
    state.advance(*state.forced())
    assert state.rankings().tolist() == [[0, 1, 2]]
    # The first, then the third, then the second is spelled as the second, the first, the third is.
    assert parse_rankings([[5, 6, 10, 7, 10, 5, 6, 10, 7]], candidates, separator=[10]).ranking.tolist() == [[1, 0, 2]]


def test_an_error_takes_back_readings_too() -> None:
    """Row 0 reads on in one way, or in two, before row 1 is fed what it may not be: both are as they were."""
    candidates = [[[5, 6], [5, 6, 10, 7], [7], [8]]] * 2
    for before, run in itertools.product(([], [5, 6], [5, 6, 10]), ([5, 6, 10, 5], [5, 6, 10, 7], [5, 6, 10, 8, 10])):
        if before != run[: len(before)]:
            continue
        state, twin = (RankingState(candidates, separator=[10], end=[9], num_ranked=3) for _ in range(2))
        for one in (state, twin):
            one.advance([*before, 8], [0, len(before), len(before) + 1])
        rest = run[len(before) :]
        with pytest.raises(ValueError, match="row 1, step 1: token 3 is not allowed"):
            state.advance([*rest, 3], [0, len(rest), len(rest) + 1])
        for tokens in [*rest, None]:
            for ask in (RankingState.allowed, RankingState.forced, RankingState.rankings):
                for mine, theirs in zip(ask(state), ask(twin), strict=True):
                    np.testing.assert_array_equal(mine, theirs)
            if tokens is not None:
                for one in (state, twin):
                    one.advance([tokens], [0, 1, 1])


TITLES = ["The Matrix", "The Matrix Reloaded", "The Matrix > Reloaded", "Alien"]


@pytest.mark.parametrize("separator", [" > ", ", ", " ", "\n"])
@pytest.mark.parametrize("num_ranked", [None, 2, 1])
def test_titles_of_an_ordinary_catalogue(separator: str, num_ranked: int | None) -> None:
    for ranking in itertools.permutations(range(4), num_ranked or 4):
        text = separator.join(TITLES[item] for item in ranking)
        parsed = parse_ranking_texts([text], [TITLES], separator=separator, num_ranked=num_ranked)
        assert parsed.valid.tolist() == [True], text
        assert parsed.ranking.tolist() == [list(ranking)], text


def test_titles_are_sampled_and_read_alike() -> None:
    rng = np.random.default_rng(0)
    titles = [[[ord(c) for c in title] for title in TITLES]]
    seen = set()
    for num_ranked in (2, 4):
        options = {"separator": [ord(c) for c in " > "], "end": [0], "num_ranked": num_ranked, "num_generations": 400}
        state = RankingState(titles, **options)
        said: list[str] = [""] * 400
        while not state.done().all():
            tokens = [int(rng.choice(ids)) if ids else 0 for ids in csr_rows(*state.allowed())]
            said = [text + chr(token) * (token > 0) for text, token in zip(said, tokens, strict=True)]
            state.advance(tokens)
        parsed = parse_ranking_texts(said, [TITLES], separator=" > ", num_ranked=num_ranked, num_generations=400)
        assert parsed.valid.all()
        np.testing.assert_array_equal(parsed.ranking, state.rankings())
        seen |= set(said)
    assert len(seen) == 12 + 24


def test_an_end_that_cannot_be_told_is_an_error_of_its_list() -> None:
    """Whether "The Matrix" is finished, and not beginning "The Matrix Reloaded", only the end of a text says."""
    titles = [[[1], [2]], [[5, 6], [5, 6, 7], [8]]]
    with pytest.raises(ValueError, match=r"candidates\[1\]: candidate 0 is a prefix of candidate 1, .* without an end"):
        RankingState(titles, separator=[9], num_ranked=2)
    parsed = parse_rankings([[1, 9, 2], [8, 9, 5, 6]], titles, separator=[9], num_ranked=2)
    assert parsed.valid.all()
    assert parsed.ranking.tolist() == [[0, 1], [2, 0]]
    assert len(RankingState(titles, separator=[9], num_ranked=2, end=[3])) == 2
