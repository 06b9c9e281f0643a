"""Rankings as RankGPT and RankLLM write them go unchanged into every reward and into restricted log-probs."""

import itertools
import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import flexrec
from flexrec.data import Catalogue
from flexrec.integrations.openrlhf import MetricReward
from flexrec.integrations.ranking_reward import RankingReward
from flexrec.integrations.verl import compute_score
from flexrec.policy.batch import make_batch
from flexrec.policy.scores import ranking_scores, ranking_states
from flexrec.policy.small_model import build_tokenizer
from flexrec.rankings.text import index_labels, parse_ranking_texts, score_completions

PROMPT = "Rank the passages [1] [2] [3]: "
GAINS = [0.0, 0.5, 1.0]
TEXTS = {"[3] > [1] > [2]": [2, 0, 1], "[2] > [3] > [1]": [1, 2, 0], " [1] > [2] > [3]\n": [0, 1, 2]}
LOOSE = {
    "[3]>[1]>[2]": [2, 0, 1],
    "Sure! The ranking is: [3] > [1] > [2].": [2, 0, 1],
    "[3] > [1]": [2, 0, 1],
    "[3] > [3] > [1] > [2]": [2, 0, 1],
    "1. [3]\n2. [1]\n3. [2]": [2, 0, 1],
    "3 > 1 > 2": [2, 0, 1],
    "[3, 1, 2]": [2, 0, 1],
    "Passage [2] is about [1]; final: [3] > [1] > [2]": [2, 0, 1],
}
NAMED = {"[3] > [1]": 2, "[2]": 1, "I cannot rank these.": 0, "": 0}  # how many items are said; 3 in all others


@pytest.fixture(scope="module")
def tokenizer():
    """Labels are several tokens each."""
    made = build_tokenizer(Catalogue(("a",), ("Alien",), (("space",),)), [PROMPT], vocab_size=290)
    assert len(made.encode("[3] > [1] > [2]")) > 5
    return made


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    made = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(20.0)  # far from uniform
    return made


@pytest.mark.parametrize(
    ("text", "ranking"), {**TEXTS, **LOOSE, "[2]": [1, 0, 2], "": [0, 1, 2], "I cannot rank these.": [0, 1, 2]}.items()
)
def test_every_reward_reads_the_text(text, ranking):
    gains = [GAINS[item] for item in ranking]
    named = NAMED.get(text, 3)
    value = flexrec.ranking_metric(torch.tensor([gains]), "ndcg", num_ranked=named).item()
    assert (value == 0) == (named == 0)
    scored = score_completions([text], None, [GAINS], "ndcg", separator=" > ")
    assert scored.parsed.ranking.tolist() == [ranking]
    assert bool(scored.parsed.valid[0]) == (text in TEXTS)
    torch.testing.assert_close(
        scored.item_rewards, flexrec.swap_rewards(torch.tensor([gains]), "ndcg", num_ranked=named)
    )
    assert RankingReward("ndcg")(completions=[text], gains=[GAINS]) == [pytest.approx(value)]
    score = compute_score("rerank", text, {"gains": GAINS})
    assert (score["score"], score["valid"]) == (pytest.approx(value), float(text in TEXTS))
    result = MetricReward()([PROMPT + text], [PROMPT], [json.dumps({"gains": GAINS})])
    assert result["rewards"].tolist() == [pytest.approx(value)]
    repaired = flexrec.ranking_metric(torch.tensor([gains]), "ndcg").item()
    assert RankingReward("ndcg", invalid="repair")(completions=[text], gains=[GAINS]) == [pytest.approx(repaired)]
    assert compute_score("rerank", text, {"gains": GAINS}, invalid="repair")["score"] == pytest.approx(repaired)
    result = MetricReward(invalid="repair")([PROMPT + text], [PROMPT], [json.dumps({"gains": GAINS})])
    assert result["rewards"].tolist() == [pytest.approx(repaired)]


def scores_of(model, tokenizer, texts):
    """(N,) log-prob of the rankings that the texts hold, over what the remaining labels allow."""
    parsed = parse_ranking_texts(texts, [index_labels(3)] * len(texts), separator=" > ")
    separator = tokenizer.encode(" > ")
    batch = make_batch(
        [tokenizer.encode(PROMPT)] * len(texts),
        [[tokenizer.encode(label) for label in index_labels(3)]] * len(texts),
        parsed.ranking,
        separator=separator,
        end=[tokenizer.eos_token_id],
    )
    return ranking_scores(ranking_states(model, batch), batch).logprobs.sum(1), batch


def test_the_text_gets_the_log_prob_that_the_policy_gives_it(model, tokenizer):
    """By hand: at every token a softmax over those that some ranking continues the same beginning with."""
    labels = [tokenizer.encode(label) for label in index_labels(3)]
    separator = tokenizer.encode(" > ")
    spelled = {}
    for order in itertools.permutations(range(3)):
        tokens = [token for item in order for token in [*labels[item], *separator]][: -len(separator)]
        spelled[order] = [*tokens, tokenizer.eos_token_id]

    def by_hand(order):
        logprob, tokens = 0.0, spelled[order]
        for position, token in enumerate(tokens):
            allowed = sorted({row[position] for row in spelled.values() if row[:position] == tokens[:position]})
            logits = model(torch.tensor([[*tokenizer.encode(PROMPT), *tokens[:position]]])).logits[0, -1]
            logprob += logits[torch.tensor(allowed)].log_softmax(0)[allowed.index(token)].item()
        return logprob

    scores, _ = scores_of(model, tokenizer, list(TEXTS))
    expected = [by_hand(tuple(ranking)) for ranking in TEXTS.values()]
    np.testing.assert_allclose(scores.tolist(), expected, rtol=1e-10)
    everything = [" > ".join(f"[{item + 1}]" for item in order) for order in spelled]
    probabilities = scores_of(model, tokenizer, everything)[0].exp()
    assert probabilities.sum().item() == pytest.approx(1.0)
    assert probabilities.max() > 2 * probabilities.min()


def test_loose_text_is_scored_as_the_ranking_it_means(model, tokenizer):
    meant, _ = scores_of(model, tokenizer, ["[3] > [1] > [2]"])
    loose, _ = scores_of(model, tokenizer, list(LOOSE))
    torch.testing.assert_close(loose, meant.expand(len(LOOSE)))


def test_log_probs_of_texts_can_be_trained_on(model, tokenizer):
    """Rewards and log-probs of one text meet in the loss, rank by rank."""
    texts = list(TEXTS)
    scored = score_completions(texts, None, [GAINS] * 3, "ndcg", separator=" > ")
    _, batch = scores_of(model, tokenizer, texts)
    logprobs = ranking_scores(ranking_states(model, batch), batch).logprobs
    advantages = flexrec.item_advantages(scored.item_rewards.double(), 1)
    mask = torch.ones(logprobs.shape, dtype=torch.bool)
    loss, _ = flexrec.policy_loss(logprobs, None, advantages, mask, loss_agg="sum")
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -advantages)
