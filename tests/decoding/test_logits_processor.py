"""RankingLogitsProcessor inside transformers' generate: every ranking complete, every log-prob the policy's own."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2Config,
    Qwen2ForCausalLM,
    TemperatureLogitsWarper,
)

from flexrec.decoding.logits_processor import RankingLogitsProcessor
from flexrec.decoding.sample import sample_rankings
from flexrec.policy.batch import make_batch
from flexrec.policy.scores import ranking_scores, ranking_states
from flexrec.rankings import CandidateTries, RankingState, parse_rankings, validate_rankings

VOCAB = 60
PAD, SEPARATOR, EOS = 0, 50, 52
PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 1]]


def model_of(kind: str) -> Any:
    small = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    if kind == "qwen2":
        model: Any = Qwen2ForCausalLM(Qwen2Config(**small, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**small, tie_word_embeddings=False))
    with torch.no_grad():  # far from uniform, so that a wrong distribution shows
        model.get_output_embeddings().weight.mul_(8.0)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of("llama")


def titles(seed: int) -> list[list[list[int]]]:
    """Lists of 5 to 7 titles of 1 to 12 tokens, which share beginnings."""
    rng = np.random.default_rng(seed)
    return [[rng.integers(10, 13, size=rng.integers(1, 13)).tolist() for _ in range(5 + p)] for p in range(3)]


LABELS = [[[40, *(20 + int(digit) for digit in str(k)), 41] for k in range(8, 8 + size)] for size in (5, 4, 6)]
SINGLE = [[[10], [11], [12], [13]], [[20], [21], [10]], [[30]]]
TWICE_AND_PREFIXES = [[[10], [10, 11], [10], [10, 11, 12]], [[20], [20]], [[10, 10, 10], [10, 10], [10]]]
ENCODINGS = {"titles": titles(0), "labels": LABELS, "single": SINGLE, "twice and prefixes": TWICE_AND_PREFIXES}


def padded_prompts() -> dict[str, torch.Tensor]:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, processor: RankingLogitsProcessor, *before: LogitsProcessor, **options: Any) -> Any:
    torch.manual_seed(1)
    return model.generate(
        **padded_prompts(),
        logits_processor=LogitsProcessorList([*before, processor]),
        max_new_tokens=processor.max_new_tokens,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


def completions(sequences: torch.Tensor) -> list[list[int]]:
    """What was generated, up to the end of sequence."""
    rows = sequences[:, padded_prompts()["input_ids"].shape[1] :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def policy_logprobs(
    model: Any, candidates: Any, rankings: np.ndarray, num_generations: int, temperature: float = 1.0
) -> torch.Tensor:
    batch = make_batch(PROMPTS, candidates, rankings, separator=[SEPARATOR], end=[EOS], num_generations=num_generations)
    with torch.no_grad():
        scores = ranking_scores(ranking_states(model, batch), batch, temperature=temperature)
    return scores.logprobs.sum(dim=1)


# ---------------------------------------------------------------------------------------------------- inside generate


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_sampled_rankings_have_the_logprobs_of_the_policy(kind: str, encoding: str, temperature: float) -> None:
    """Importance ratios of a policy that has not moved are 1."""
    model, candidates, generations = model_of(kind), ENCODINGS[encoding], 4
    processor = RankingLogitsProcessor(candidates, separator=[SEPARATOR], end=[EOS])
    out = generate(model, processor, do_sample=True, top_k=0, temperature=temperature, num_return_sequences=generations)

    rows = completions(out.sequences)
    options: dict[str, Any] = {"separator": [SEPARATOR], "end": [EOS], "num_generations": generations}
    parsed = parse_rankings(rows, candidates, **options)
    assert parsed.valid.all()
    rankings = processor.rankings(out.sequences)
    np.testing.assert_array_equal(rankings, parsed.ranking)
    sizes = np.repeat([len(c) for c in candidates], generations)
    validate_rankings(rankings, sizes)
    np.testing.assert_array_equal((rankings >= 0).sum(axis=1), sizes)

    sampled = torch.zeros(len(rows), dtype=torch.float64)
    for step, scores in enumerate(out.scores):
        logprobs = scores.double().log_softmax(dim=1)
        for row, tokens in enumerate(rows):
            if step < len(tokens):
                sampled[row] += logprobs[row, tokens[step]]
    ratio = (policy_logprobs(model, candidates, rankings, generations, temperature) - sampled).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_greedy_search_agrees_with_the_rollout(model: Any, encoding: str) -> None:
    candidates = ENCODINGS[encoding]
    processor = RankingLogitsProcessor(candidates, separator=[SEPARATOR], end=[EOS])
    out = generate(model, processor, do_sample=False)
    own = sample_rankings(model, PROMPTS, candidates, separator=[SEPARATOR], end=[EOS], greedy=True)
    np.testing.assert_array_equal(processor.rankings(out.sequences), own.rankings)


def test_scores_are_restricted_logprobs_and_forced_tokens_have_zero(model: Any) -> None:
    processor = RankingLogitsProcessor(LABELS, separator=[SEPARATOR], end=[EOS])
    out = generate(model, processor, do_sample=False, output_logits=True)
    state = RankingState(LABELS, separator=[SEPARATOR], end=[EOS])
    for scores, logits, tokens in zip(out.scores, out.logits, out.sequences[:, 5:].T, strict=True):
        ids, offsets = state.allowed()
        for row, (a, b) in enumerate(itertools.pairwise(offsets)):
            allowed = ids[a:b].tolist() or [EOS]
            expected = torch.full((VOCAB,), -torch.inf)
            expected[allowed] = logits[row, allowed].log_softmax(dim=0)
            torch.testing.assert_close(scores[row], expected)
            assert len(allowed) > 1 or scores[row, allowed[0]] == 0
        state.advance(tokens)
    assert state.done().all()


@pytest.mark.parametrize("encoding", ["titles", "labels", "single"])
def test_as_many_beams_as_rankings_find_them_all(model: Any, encoding: str) -> None:
    """Three candidates have six rankings: six beams must return each once, scored and ordered by its log-prob."""
    candidates = [(ENCODINGS[encoding][p] + [[14], [15, 16], [16]])[:3] for p in range(3)]
    processor = RankingLogitsProcessor(candidates, separator=[SEPARATOR], end=[EOS], num_beams=6)
    out = generate(model, processor, num_beams=6, num_return_sequences=6, length_penalty=0.0, do_sample=False)
    rankings = processor.rankings(out.sequences)
    for found in rankings.reshape(3, 6, 3):
        assert sorted(map(tuple, found.tolist())) == list(itertools.permutations(range(3)))
    logprobs = policy_logprobs(model, candidates, rankings, 6)
    torch.testing.assert_close(out.sequences_scores, logprobs, rtol=0, atol=1e-4)
    assert (out.sequences_scores.view(3, 6).diff(dim=1) <= 0).all()


@pytest.mark.parametrize("encoding", ["titles", "labels", "twice and prefixes"])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 0}])
def test_beams_that_are_reordered_hold_rankings(model: Any, encoding: str, options: dict[str, Any]) -> None:
    candidates = [[*c, [33], [34, 35]] for c in ENCODINGS[encoding]]
    processor = RankingLogitsProcessor(candidates, separator=[SEPARATOR], end=[EOS], num_beams=4)
    out = generate(model, processor, num_beams=4, num_return_sequences=3, length_penalty=0.0, **options)
    rows = completions(out.sequences)
    assert parse_rankings(rows, candidates, separator=[SEPARATOR], end=[EOS], num_generations=3).valid.all()
    logprobs = policy_logprobs(model, candidates, processor.rankings(out.sequences), 3)
    torch.testing.assert_close(out.sequences_scores, logprobs, rtol=0, atol=1e-4)


def test_beams_find_better_rankings_than_greedy_search(model: Any) -> None:
    candidates = ENCODINGS["titles"]
    greedy = RankingLogitsProcessor(candidates, separator=[SEPARATOR], end=[EOS])
    first = greedy.rankings(generate(model, greedy, do_sample=False).sequences)
    beams = RankingLogitsProcessor(candidates, separator=[SEPARATOR], end=[EOS], num_beams=8)
    out = generate(model, beams, num_beams=8, length_penalty=0.0, do_sample=False)
    best = policy_logprobs(model, candidates, beams.rankings(out.sequences), 1)
    assert (best >= policy_logprobs(model, candidates, first, 1) - 1e-4).all()
    assert (best > policy_logprobs(model, candidates, first, 1) + 1e-4).any()


@pytest.mark.parametrize("top_p", [0.3, 0.8])
def test_top_p_and_temperature_work_inside_the_allowed_set(model: Any, top_p: float) -> None:
    """Of the allowed tokens the most probable ones that reach p are left, however little the model gives them all."""
    candidates = [[[k] for k in range(20, 30)]]  # one list for all prompts
    processor = RankingLogitsProcessor(candidates, separator=[SEPARATOR], end=[EOS])
    out = generate(
        model,
        processor,
        do_sample=True,
        top_k=0,
        top_p=top_p,
        temperature=1.3,
        num_return_sequences=5,
        output_logits=True,
    )
    state = RankingState(candidates, separator=[SEPARATOR], end=[EOS], num_generations=15)
    dropped = 0
    for scores, logits, tokens in zip(out.scores, out.logits, out.sequences[:, 5:].T, strict=True):
        ids, offsets = state.allowed()
        for row, (a, b) in enumerate(itertools.pairwise(offsets)):
            allowed = ids[a:b] if b > a else np.array([EOS])
            probabilities = (logits[row, allowed] / 1.3).softmax(dim=0).numpy()
            order = np.argsort(-probabilities)
            kept = order[: int(np.searchsorted(probabilities[order].cumsum(), top_p)) + 1]
            assert set(torch.isfinite(scores[row]).nonzero()[:, 0].tolist()) == set(allowed[kept].tolist())
            dropped += len(allowed) - len(kept)
        state.advance(tokens)
    assert dropped > 0


def test_the_first_ranks_only_and_an_end_that_generate_adds(model: Any) -> None:
    """num_ranked by prompt; no end of our own, so that the end of sequence follows the last item."""
    candidates = ENCODINGS["labels"]
    processor = RankingLogitsProcessor(candidates, separator=[SEPARATOR], num_ranked=[2, 1, 3], eos_token_id=EOS)
    assert processor.max_new_tokens == 3 * 4 + 2 + 1
    out = generate(model, processor, do_sample=True, num_return_sequences=2)
    rankings = processor.rankings(out.sequences)
    np.testing.assert_array_equal((rankings >= 0).sum(axis=1), [2, 2, 1, 1, 3, 3])
    rows = completions(out.sequences)
    assert all(row[-1] == EOS for row in rows)
    parsed = parse_rankings(
        [row[:-1] for row in rows], candidates, separator=[SEPARATOR], num_ranked=[2, 2, 1, 1, 3, 3], num_generations=2
    )
    assert parsed.valid.all()


def test_a_finished_ranking_goes_on_with_the_first_end_of_sequence() -> None:
    processor = RankingLogitsProcessor(SINGLE[:1], num_ranked=1, prompt_length=1, eos_token_id=[EOS, SEPARATOR])
    scores = processor(torch.tensor([[1, 12]]), torch.zeros(1, VOCAB))
    assert scores.isfinite().nonzero().tolist() == [[0, EOS]]


def test_a_processor_may_serve_several_calls(model: Any) -> None:
    """As long as prompts are as wide: rows that begin again are read again, other numbers of rows as well."""
    processor = RankingLogitsProcessor(ENCODINGS["titles"], separator=[SEPARATOR], end=[EOS])
    first = generate(model, processor, do_sample=False).sequences
    four = generate(model, processor, do_sample=True, num_return_sequences=4).sequences
    assert torch.equal(first, generate(model, processor, do_sample=False).sequences)
    assert (processor.rankings(four) >= 0).any(axis=1).all()


def test_stopped_before_the_end_ranks_are_open(model: Any) -> None:
    processor = RankingLogitsProcessor(SINGLE, separator=[SEPARATOR], end=[EOS])
    sequences = model.generate(**padded_prompts(), logits_processor=[processor], max_new_tokens=3, do_sample=False)
    np.testing.assert_array_equal((processor.rankings(sequences) >= 0).sum(axis=1), [2, 2, 1])


# ---------------------------------------------------------------------------------------------------- call by call


def walk(candidates: Any, num_steps: int, rng: np.random.Generator) -> list[int]:
    """The first tokens of a random ranking, then padding."""
    state = RankingState([candidates], separator=[SEPARATOR], end=[EOS])
    tokens: list[int] = []
    while len(tokens) < num_steps and not state.done().all():
        tokens.append(int(rng.choice(state.allowed()[0])))
        state.advance(tokens[-1:])
    return tokens + [PAD] * (num_steps - len(tokens))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from(sorted(ENCODINGS)))
def test_any_history_of_calls_gives_what_a_new_processor_gives(seed: int, reuse: bool, encoding: str) -> None:
    """Rows grow, are swapped, replaced, and get shorter: only what they hold now counts."""
    rng = np.random.default_rng(seed)
    candidates = ENCODINGS[encoding]
    processor = RankingLogitsProcessor(
        candidates, separator=[SEPARATOR], end=[EOS], prompt_length=2, reuse_scores=reuse
    )
    rows = [walk(candidates[n // 2], 40, rng) for n in range(6)]
    for _ in range(8):
        num_steps = int(rng.integers(0, 12))
        for n in np.flatnonzero(rng.random(6) < 0.3):
            rows[n] = walk(candidates[n // 2], 40, rng)
        input_ids = torch.tensor([[7, 7, *row[:num_steps]] for row in rows])
        scores = torch.randn(6, VOCAB)
        new = RankingLogitsProcessor(candidates, separator=[SEPARATOR], end=[EOS], prompt_length=2)
        before = scores.clone()
        assert torch.equal(processor(input_ids, scores), new(input_ids, scores))
        assert torch.equal(scores, before)


def test_reused_scores_are_the_same_tensor() -> None:
    processor = RankingLogitsProcessor([[[1], [2]]], end=[EOS], prompt_length=0, reuse_scores=True)
    first = processor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, VOCAB))
    assert first[0].isfinite().nonzero()[:, 0].tolist() == [1, 2]
    assert processor(torch.tensor([[2]]), torch.zeros(1, VOCAB)) is first
    assert first[0].isfinite().nonzero()[:, 0].tolist() == [1]
    assert processor(torch.tensor([[2]]), torch.zeros(1, VOCAB + 1)).shape == (1, VOCAB + 1)


def test_scores_that_somebody_holds_are_not_written_again() -> None:
    processor = RankingLogitsProcessor(SINGLE, separator=[SEPARATOR], end=[EOS], prompt_length=1)
    rng = np.random.default_rng(0)
    rows = [walk(SINGLE[n], 8, rng) for n in range(3)]
    held = []
    for steps in range(3):
        result = processor(torch.tensor([[7, *row[:steps]] for row in rows]), torch.randn(3, VOCAB))
        held.append((result[:, 1:], result[:, 1:].clone()))  # a view: the tensor itself is gone
        del result
    assert all(torch.equal(view, kept) for view, kept in held)
    assert len({view.data_ptr() for view, _ in held}) == 3


def test_scores_that_nobody_holds_are_written_again_where_something_changes() -> None:
    """Two in turn, as generate holds one until it has the next; what somebody has written to is not used again."""
    processor = RankingLogitsProcessor([[[1], [2], [3]]], end=[EOS], prompt_length=0)
    scores, places = torch.zeros(1, VOCAB), []
    result = None
    for _ in range(4):
        result = processor(torch.zeros(1, 0, dtype=torch.int64), scores)
        places.append(result.data_ptr())
    assert places[:2] == places[2:]
    assert result is not None
    result.fill_(5.0)
    del result
    after = processor(torch.tensor([[2]]), scores), processor(torch.tensor([[2]]), scores)
    for one in after:
        assert one[0].isfinite().nonzero()[:, 0].tolist() == [1, 3]


def test_scores_in_inference_mode() -> None:
    """Where nothing counts what is written, nothing is used again."""
    processor = RankingLogitsProcessor([[[1], [2]]], end=[EOS], prompt_length=0)
    with torch.inference_mode():
        for _ in range(3):
            result = processor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, VOCAB))
            assert result[0].isfinite().nonzero()[:, 0].tolist() == [1, 2]
            result.fill_(5.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_keep_their_dtype(dtype: torch.dtype) -> None:
    processor = RankingLogitsProcessor([[[1], [2]]], end=[EOS])
    result = processor(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, VOCAB, dtype=dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result[0, 1:3].exp().sum(), torch.ones((), dtype=dtype), rtol=0, atol=1e-2)


def test_candidates_may_be_prepared() -> None:
    tries = CandidateTries(SINGLE)
    scores = torch.randn(3, VOCAB)
    prompts = torch.zeros(3, 1, dtype=torch.int64)
    expected = RankingLogitsProcessor(SINGLE, end=[EOS])(prompts, scores)
    assert torch.equal(RankingLogitsProcessor(tries, end=[EOS])(prompts, scores), expected)


# --------------------------------------------------------------------------------------------------------- mistakes


class Forbid(LogitsProcessor):
    """Sets a token's score to -inf in one row from one step on."""

    def __init__(self, token: int, row: int, width: int) -> None:
        self.token, self.row, self.width = token, row, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        if input_ids.shape[1] >= self.width:
            scores[self.row, self.token] = -torch.inf
        return scores


def test_a_row_without_a_continuation_raises(model: Any) -> None:
    """Never unconstrained: the separator is all that may follow an item."""
    processor = RankingLogitsProcessor(SINGLE, separator=[SEPARATOR], end=[EOS])
    with pytest.raises(ValueError, match=r"row 1, step 1: the allowed tokens \[50\] have scores \[-inf\]"):
        generate(model, processor, Forbid(SEPARATOR, row=1, width=6), do_sample=False)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_raise(bad: float) -> None:
    processor = RankingLogitsProcessor(SINGLE, end=[EOS])
    scores = torch.zeros(3, VOCAB)
    scores[2, 30] = bad
    with pytest.raises(ValueError, match=r"row 2, step 0: the allowed tokens \[30\] have scores"):
        processor(torch.zeros(3, 1, dtype=torch.int64), scores)


def test_a_token_that_was_not_allowed_raises_and_the_processor_recovers() -> None:
    processor = RankingLogitsProcessor(SINGLE, end=[EOS], prompt_length=1)
    scores = torch.randn(3, VOCAB)
    good = torch.tensor([[1, 10], [1, 20], [1, 30]])
    expected = processor(good, scores)
    with pytest.raises(ValueError, match=r"row 1, step 1: token 20 is not allowed; allowed: 10, 21 .*first 1 tokens"):
        processor(torch.tensor([[1, 11, 10], [1, 20, 20], [1, 30, 52]]), scores)
    assert torch.equal(processor(good, scores), expected)


def test_a_beam_of_probability_zero_may_hold_anything() -> None:
    processor = RankingLogitsProcessor(SINGLE, end=[EOS], prompt_length=0, num_beams=2)
    rows = torch.tensor([[10], [59], [20], [21], [30], [0]])
    result = processor(rows, torch.zeros(6, VOCAB))
    assert [row.isfinite().nonzero()[:, 0].tolist() for row in result] == [
        [11, 12, 13],
        [EOS],
        [10, 21],
        [10, 20],
        [EOS],
        [EOS],
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RankingLogitsProcessor(SINGLE), "eos_token_id must be given where end is empty"),
        (lambda: RankingLogitsProcessor(SINGLE, end=[EOS], num_beams=0), "num_beams must be at least 1, got 0"),
        (lambda: RankingLogitsProcessor([[[1]], []], end=[EOS]), r"candidates\[1\] is empty"),
        (lambda: RankingLogitsProcessor([], end=[EOS]), "a multiple of the 0 lists"),
        (lambda: RankingLogitsProcessor(SINGLE, end=[EOS], num_ranked=9), "num_ranked must lie between 1 and"),
        (
            lambda: RankingLogitsProcessor(SINGLE, end=[EOS])(torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 60)),
            "rows must be a multiple of the 3 lists of candidates, got 4",
        ),
        (
            lambda: RankingLogitsProcessor(SINGLE, end=[EOS])(torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 52)),
            "scores are those of 52 tokens, but .* hold token 52",
        ),
        (
            lambda: RankingLogitsProcessor(SINGLE, end=[EOS], prompt_length=2)(
                torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 60)
            ),
            "input_ids are 1 wide, less than prompt_length=2",
        ),
        (
            lambda: RankingLogitsProcessor(SINGLE, end=[EOS]).rankings(torch.zeros(3, 1, dtype=torch.int64)),
            "prompt_length is known after the first call",
        ),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_processor_comes_before_generates_own_warpers(model: Any) -> None:
    """What the documentation says about the order, which is transformers' to change."""
    processor = RankingLogitsProcessor(SINGLE, separator=[SEPARATOR], end=[EOS])
    out = generate(model, processor, do_sample=True, top_k=0, temperature=0.5, output_logits=True)
    state = RankingState(SINGLE, separator=[SEPARATOR], end=[EOS])
    ids, offsets = state.allowed()
    warped = TemperatureLogitsWarper(0.5)(None, out.logits[0][0, ids[: offsets[1]]].log_softmax(dim=0))
    torch.testing.assert_close(out.scores[0][0, ids[: offsets[1]]], warped)
