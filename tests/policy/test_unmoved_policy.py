"""The importance ratios of a policy that has not moved are 1, however an answer is spelled, sampled and laid out.

The log-probs that a ranking was sampled with, by our rollout or by transformers' generate with our processor, are held
against those that training computes for it, a row for each ranking or one for all of a prompt, in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from flexrec.data import simulate
from flexrec.decoding import sample as rollouts
from flexrec.decoding.logits_processor import RankingLogitsProcessor
from flexrec.decoding.sample import Rollout, sample_rankings
from flexrec.policy.batch import make_batch
from flexrec.policy.row_tokens import with_summed_rows
from flexrec.policy.scores import ranking_scores, ranking_states, reasoning_logprobs
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.rankings import RankingState
from flexrec.task.descriptions import Token
from flexrec.task.needs import get_need
from flexrec.task.prompts import ENCODINGS, PromptBuilder

GENERATIONS, TEMPERATURE = 4, 1.3


class World(NamedTuple):
    model: Any
    tokenizer: Any
    prompts: list[list[Token]]
    candidates: list[list[list[Token]]]
    spelling: dict[str, Any]


ANSWERED = [encoding for encoding in ENCODINGS if encoding != "score"]  # which has no answers: test_places


@pytest.fixture(scope="module", params=[*ANSWERED, "item_token and descriptions"])
def world(request: pytest.FixtureRequest) -> World:
    """The embedded model and lists of unequal lengths, spelled in one of the encodings."""
    data = simulate(num_users=10, num_items=90, num_topics=4, num_test_users=3, num_candidates=12, seed=0)
    wording = get_need("interest").wordings[0]
    tokenizer = build_tokenizer(data.catalogue, [wording])
    model = build_model(tokenizer, hidden_size=32, num_layers=2).eval()
    with torch.no_grad():  # far from uniform, so that a wrong distribution shows
        model.get_output_embeddings().weight.mul_(10.0)
    encoding, _, described = request.param.partition(" and ")
    builder = PromptBuilder(tokenizer, encoding=encoding, described=bool(described))
    prompts, candidates = [], []
    for lst, size in zip(data.test, (12, 5, 9), strict=False):
        some = lst.reordered(np.arange(size))
        prompts.append(builder.prompt_of(some, data.catalogue, wording)[0])
        candidates.append(builder.candidate_tokens_of(some, data.catalogue))
    assert len({len(prompt) for prompt in prompts}) > 1
    spelling = {"separator": builder.separator, "end": builder.end}
    return World(model, tokenizer, prompts, candidates, spelling)


def by_rollout(world: World, **reasoning: Any) -> Rollout:
    return sample_rankings(
        world.model,
        world.prompts,
        world.candidates,
        num_generations=GENERATIONS,
        temperature=TEMPERATURE,
        generator=torch.Generator().manual_seed(3),
        **world.spelling,
        **reasoning,
    )


def by_generate(world: World, **reasoning: Any) -> Rollout:
    """What generate sampled, with the log-probs that it sampled with; from a model with the rows of sums, if any."""
    model, (prompts, candidates, _) = with_summed_rows(world.model, world.prompts, world.candidates)
    rows = list(range(world.model.config.vocab_size, model.config.vocab_size))  # which reasoning must not name
    world = world._replace(model=model, prompts=prompts, candidates=candidates)
    eos = [world.tokenizer.eos_token_id, *rows]
    processor = RankingLogitsProcessor(world.candidates, eos_token_id=eos, **world.spelling, **reasoning)
    width = max(map(len, world.prompts))
    torch.manual_seed(3)
    out = world.model.generate(
        input_ids=torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in world.prompts]),
        attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in world.prompts]),
        logits_processor=[processor],
        max_new_tokens=processor.max_new_tokens,
        do_sample=True,
        top_k=0,
        temperature=TEMPERATURE,
        num_return_sequences=GENERATIONS,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rankings = processor.rankings(out.sequences)
    said = replace(processor.reasoning(out.sequences), never=tuple(eos[:1])) if reasoning else None
    logprobs = np.zeros(rankings.shape)
    of_reasoning = None if said is None else np.zeros((len(rankings), said.num_sampled.max()))
    by_step = torch.stack([scores.double().log_softmax(dim=1) for scores in out.scores], dim=1)  # (N, steps, V)
    for n, tokens in enumerate(out.sequences[:, width:].tolist()):
        start = 0
        if said is not None:
            start = len(said.tokens[n])
            assert tokens[:start] == said.tokens[n].tolist()
            of_reasoning[n, : said.num_sampled[n]] = by_step[n, range(start), tokens[:start]][: said.num_sampled[n]]
        state = RankingState([world.candidates[n // GENERATIONS]], **world.spelling)
        for step in range(start, len(tokens)):
            if state.done()[0]:
                break
            rank = int((state.rankings() >= 0).sum())
            lp = float(by_step[n, step, tokens[step]])
            if rank < logprobs.shape[1]:
                logprobs[n, rank] += lp
            else:
                assert lp == 0, "behind the last item all is forced"
            state.advance(tokens[step : step + 1])
    return Rollout(rankings, logprobs, said, of_reasoning)


@pytest.mark.parametrize("reasons", [False, True], ids=["ranking", "reasoning"])
@pytest.mark.parametrize("sampler", ["rollout, rows of their own", "rollout, shared rows", "generate"])
def test_ratios_are_one(world: World, sampler: str, reasons: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    share = GENERATIONS if "shared" in sampler else 1
    monkeypatch.setattr(rollouts, "sharing", lambda *args, **kwargs: share)
    reasoning = {}
    if reasons:
        with torch.no_grad():  # a marker that comes by itself in some rows, and is forced in the others
            plain, batch = with_summed_rows(world.model, world.prompts[:1], world.candidates[:1])
            vocabulary = len(world.tokenizer)
            likely = plain(torch.tensor([batch.prompts[0]])).logits[0, -1, :vocabulary].argmax().item()
        reasoning = {"reasoning_end": [likely], "max_reasoning_tokens": 10}
    rollout = by_generate(world, **reasoning) if sampler == "generate" else by_rollout(world, **reasoning)
    assert [int((row >= 0).sum()) for row in rollout.rankings[::GENERATIONS]] == [12, 5, 9]
    sampled_with = torch.as_tensor(rollout.logprobs)
    assert sampled_with.sum() < -50, "not a policy that is sure of everything"
    for per_row in (1, GENERATIONS):
        batch = make_batch(
            world.prompts,
            world.candidates,
            rollout.rankings,
            num_generations=GENERATIONS,
            rankings_per_row=per_row,
            reasoning=rollout.reasoning,
            **world.spelling,
        )
        with torch.no_grad():
            states = ranking_states(world.model, batch)
            ratios = torch.exp(ranking_scores(states, batch, temperature=TEMPERATURE).logprobs - sampled_with)
        torch.testing.assert_close(ratios, torch.ones_like(ratios), rtol=0, atol=1e-5)
        if reasons:
            sampled = rollout.reasoning.num_sampled
            assert len(set(sampled.tolist())) > 1
            logprobs = reasoning_logprobs(states, batch, temperature=TEMPERATURE)
            ratios = torch.exp(logprobs - torch.as_tensor(rollout.reasoning_logprobs))
            torch.testing.assert_close(ratios, torch.ones_like(ratios), rtol=0, atol=1e-5)
            assert not logprobs[~batch.reasoning_mask].any()
            assert (logprobs[batch.reasoning_mask] < 0).all()
