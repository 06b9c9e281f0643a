"""Which token may come next: RankingState and RankingLogitsProcessor against what transformers users have today.

Rows rank all of K candidates, index labels or titles of 1 to 12 tokens; a measurement is a number of consecutive steps
in the middle of the rankings, or reading and spelling whole rankings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PrefixConstrainedLogitsProcessor

from bench import peers_rankings as peers
from bench.inputs import SMALL
from flexrec.decoding.logits_processor import RankingLogitsProcessor
from flexrec.rankings import CandidateTries, RankingState, encode_rankings, parse_rankings

ROWS, CANDIDATES, VOCABULARY = (8, 6, 500) if SMALL else (256, 30, 32_000)
PROMPT, STEPS = 20, 2 if SMALL else 16
SEPARATOR, END = VOCABULARY - 2, VOCABULARY - 1
OPTIONS: dict[str, Any] = {"separator": [SEPARATOR], "end": [END]}
SHAPE = f"{ROWS} rows, K={CANDIDATES}"


class Task:
    """Candidates of ROWS prompts, a random ranking of each, and its tokens."""

    def __init__(self, encoding: str) -> None:
        rng = np.random.default_rng(0)
        if encoding == "titles":
            self.candidates = [[title(rng) for _ in range(CANDIDATES)] for _ in range(ROWS)]
        else:
            self.candidates = [[label(k) for k in range(1, CANDIDATES + 1)] for _ in range(ROWS)]
        self.tries = CandidateTries(self.candidates)
        self.rankings = rng.random((ROWS, CANDIDATES)).argsort(axis=1)  # (N, K)
        self.encoded = encode_rankings(self.tries, self.rankings, **OPTIONS)

    @cached_property
    def completions(self) -> list[list[int]]:
        return [tokens.tolist() for tokens in np.split(self.encoded.tokens, self.encoded.offsets[1:-1])]

    @cached_property
    def tokens(self) -> torch.Tensor:
        """(N, L) prompts of zeros, then as many tokens as all rows have."""
        length = min(map(len, self.completions))
        return torch.tensor([[0] * PROMPT + tokens[:length] for tokens in self.completions])

    @property
    def first_step(self) -> int:
        """Width of the tokens at the first measured step: half of the ranking is there."""
        return PROMPT + (self.tokens.shape[1] - PROMPT) // 2

    def prefixes(self) -> list[torch.Tensor]:
        return [self.tokens[:, : self.first_step + step].contiguous() for step in range(STEPS)]


def title(rng: np.random.Generator) -> list[int]:
    """1 to 12 tokens; the first of a thousand, so that now and then two titles begin alike."""
    low = VOCABULARY // 32
    return [int(rng.integers(low)), *rng.integers(low, VOCABULARY - 2, size=rng.integers(12)).tolist()]


def label(k: int) -> list[int]:
    """ "[12]", a token per character."""
    return [10, *(int(digit) for digit in str(k)), 11]


@pytest.fixture(scope="module", params=["titles", "labels"])
def task(request: pytest.FixtureRequest) -> Task:
    return Task(request.param)


@pytest.fixture
def measure(benchmark: Any, task: Task, request: pytest.FixtureRequest) -> Callable[..., None]:
    def measure(
        op: str, method: str, work: Callable[[], Any], begin: Callable[[], Any] | None = None, **extra: Any
    ) -> None:
        """``begin`` comes before every round and is not timed."""
        benchmark.group = f"{op}, {SHAPE}"
        encoding = request.node.callspec.params["task"]
        benchmark.extra_info |= {"op": f"{op}, {encoding}", "shape": SHAPE, "method": method, **extra}
        benchmark.pedantic(work, setup=begin, rounds=2 if SMALL else 5, warmup_rounds=1)

    return measure


# ------------------------------------------------------------------------------------------ inside model.generate


@pytest.mark.parametrize("method", ["ours", "ours_reused_scores", "transformers_prefix_function"])
def test_logits_processor(task: Task, measure: Callable[..., None], method: str) -> None:
    """STEPS calls, each with scores of the whole vocabulary."""
    prefixes = task.prefixes()
    scores = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    function = peers.prefix_function(task.candidates, PROMPT, SEPARATOR, END)
    theirs = PrefixConstrainedLogitsProcessor(function, num_beams=1)
    if method == "transformers_prefix_function":
        processor: Any = theirs
    else:
        processor = RankingLogitsProcessor(
            task.tries, **OPTIONS, prompt_length=PROMPT, reuse_scores=method == "ours_reused_scores"
        )
        expected = theirs(prefixes[0], scores).log_softmax(dim=1)
        torch.testing.assert_close(processor(prefixes[0], scores), expected)

    def work() -> None:
        for prefix in prefixes:
            processor(prefix, scores)

    measure(f"next-token constraint, {STEPS} calls", method, work)


# ---------------------------------------------------------------------------------------------- the state alone


@pytest.mark.parametrize("method", ["ours", "python_state", "python_prefix_function"])
def test_allowed_tokens(task: Task, measure: Callable[..., None], method: str) -> None:
    """STEPS times: read a token per row, say what may come next."""
    prefixes = task.prefixes()
    columns = [prefix[:, -1].numpy() for prefix in prefixes]
    before = prefixes[0][:, PROMPT:-1]
    lists = [column.tolist() for column in columns]
    state = RankingState(task.tries, **OPTIONS)
    roots = [peers.trie(lst) for lst in task.candidates]
    function = peers.prefix_function(task.candidates, PROMPT, SEPARATOR, END)
    python: list[peers.PythonState] = []

    def begin_ours() -> None:
        state.restart()
        state.advance(before.reshape(-1), np.arange(ROWS + 1) * before.shape[1])

    def ours() -> Any:
        for column in columns:
            state.advance(column)
            allowed = state.allowed()
        return allowed

    def begin_python() -> None:
        python[:] = [peers.PythonState(root, SEPARATOR, END) for root in roots]
        for row, tokens in zip(python, before.tolist(), strict=True):
            for token in tokens:
                row.advance(token)

    def python_state() -> Any:
        for column in lists:
            for row, token in zip(python, column, strict=True):
                row.advance(token)
            allowed = [row.allowed() for row in python]
        return allowed

    def python_prefix_function() -> Any:
        for prefix in prefixes:
            allowed = [function(row, tokens) for row, tokens in enumerate(prefix)]
        return allowed

    begin_ours()
    ids, offsets = ours()
    begin_python()
    for theirs in (python_state(), python_prefix_function()):
        assert [sorted(tokens) for tokens in theirs] == [ids.tolist() for ids in np.split(ids, offsets[1:-1])]

    begin, work = {
        "ours": (begin_ours, ours),
        "python_state": (begin_python, python_state),
        "python_prefix_function": (lambda: None, python_prefix_function),
    }[method]
    measure(f"allowed tokens, {STEPS} steps", method, work, begin)


@pytest.mark.parametrize("method", ["ours", "ours_in_new_memory", "xgrammar_items_may_repeat"])
def test_bitmask(task: Task, measure: Callable[..., None], method: str, request: pytest.FixtureRequest) -> None:
    """STEPS times: read a token per row, fill a bitmask of the vocabulary.

    xgrammar cannot say "each of these once": that needs a state for every subset. Its grammar is any of the candidates,
    again and again: it lets items be repeated, which is less than what is asked for.
    """
    prefixes = task.prefixes()
    columns = [prefix[:, -1].numpy() for prefix in prefixes]
    before = prefixes[0][:, PROMPT:-1]
    if method == "xgrammar_items_may_repeat":
        batch = xgrammar_batch(task)

        def begin() -> None:
            for matcher, tokens in zip(batch.matchers, before.tolist(), strict=True):
                matcher.reset()
                assert all(matcher.accept_token(token) for token in tokens)

        def work() -> None:
            for column in columns:
                batch.step(column.tolist())

        measure(f"bitmask, {STEPS} steps", method, work, begin)
        begin()
        work()
        theirs = np.unpackbits(batch.words.numpy().view(np.uint8), axis=1, bitorder="little")
        state = RankingState(task.tries, **OPTIONS)
        seen = prefixes[-1][:, PROMPT:]
        state.advance(seen.reshape(-1), np.arange(ROWS + 1) * seen.shape[1])
        ours = np.unpackbits(state.allowed_bitmask(VOCABULARY).view(np.uint8), axis=1, bitorder="little")
        assert (theirs[:, : ours.shape[1]] >= ours).all()  # whatever may come next it allows, and repetitions too
        return
    state = RankingState(task.tries, **OPTIONS)

    def begin_ours() -> None:
        state.restart()
        state.advance(before.reshape(-1), np.arange(ROWS + 1) * before.shape[1])

    def ours() -> None:
        for column in columns:
            state.advance(column)
            state.allowed_bitmask(VOCABULARY, reuse=method == "ours")

    measure(f"bitmask, {STEPS} steps", method, ours, begin_ours)


class XGrammarBatch:
    """A matcher per row over a vocabulary of made-up strings, and the bitmask that they fill."""

    def __init__(self, task: Task) -> None:
        import xgrammar

        names = [f"<{token}>" for token in range(VOCABULARY)]
        info = xgrammar.TokenizerInfo(names, vocab_size=VOCABULARY, stop_token_ids=[END])
        compiler = xgrammar.GrammarCompiler(info)
        self.words = xgrammar.allocate_token_bitmask(ROWS, VOCABULARY)
        self.matchers = []
        for candidates in task.candidates:
            items = " | ".join('"' + "".join(names[token] for token in tokens) + '"' for tokens in candidates)
            grammar = f'root ::= item ("{names[SEPARATOR]}" item)*\nitem ::= {items}\n'
            self.matchers.append(xgrammar.GrammarMatcher(compiler.compile_grammar(grammar)))
        self.batch = xgrammar.BatchGrammarMatcher()

    def step(self, tokens: list[int]) -> None:
        self.batch.batch_accept_token(self.matchers, tokens)
        self.batch.batch_fill_next_token_bitmask(self.matchers, self.words)


def xgrammar_batch(task: Task) -> XGrammarBatch:
    pytest.importorskip("xgrammar", reason="xgrammar is not installed")
    return XGrammarBatch(task)


# ------------------------------------------------------------------------------------------------ whole rankings


@pytest.mark.parametrize("method", ["ours", "ours_from_arrays", "python"])
def test_prepare_candidates(task: Task, measure: Callable[..., None], method: str) -> None:
    sequences = [tokens for lst in task.candidates for tokens in lst]
    flat = np.concatenate(sequences)
    sequence_offsets = np.cumsum([0, *map(len, sequences)])
    list_offsets = np.arange(0, len(sequences) + 1, CANDIDATES)
    work = {
        "ours": lambda: CandidateTries(task.candidates),
        "ours_from_arrays": lambda: CandidateTries.from_arrays(flat, sequence_offsets, list_offsets),
        "python": lambda: [peers.trie(lst) for lst in task.candidates],
    }[method]
    measure("prepare candidates", method, work)


@pytest.mark.parametrize("kind", ["well-formed", "broken"])
@pytest.mark.parametrize("method", ["ours", "python"])
def test_parse(task: Task, measure: Callable[..., None], method: str, kind: str) -> None:
    """Whole completions; broken ones begin with an unknown token and are searched for mentions."""
    rows = [[3, *tokens] if kind == "broken" else tokens for tokens in task.completions]
    arrays = [np.array(tokens) for tokens in rows]
    roots = [peers.trie(lst) for lst in task.candidates]
    parsed = parse_rankings(arrays, task.tries, **OPTIONS)
    assert parsed.valid.all() == (kind == "well-formed")
    theirs = [peers.parse(tokens, root) for tokens, root in zip(rows, roots, strict=True)]
    np.testing.assert_array_equal(parsed.ranking, theirs)
    work = {
        "ours": lambda: parse_rankings(arrays, task.tries, **OPTIONS),
        "python": lambda: [peers.parse(tokens, root) for tokens, root in zip(rows, roots, strict=True)],
    }[method]
    measure(f"parse {kind} completions", method, work, megabytes=4e-6 * sum(map(len, rows)))


def test_encode(task: Task, measure: Callable[..., None]) -> None:
    measure("encode", "ours", lambda: encode_rankings(task.tries, task.rankings, **OPTIONS))
