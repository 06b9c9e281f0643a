"""Random arguments to every public function: a result, a ValueError or a TypeError; no NaN from what is ordinary."""

import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from random import Random

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import flexrec
import flexrec.decoding
import flexrec.evaluation
import flexrec.rankings
from flexrec.rankings import text

sys.path.insert(0, str(Path(__file__).parent))

import calls

CPU_SECONDS = float(os.environ.get("FLEXREC_FUZZ", "1"))  # for a function
HANGS_AFTER = 120  # seconds, a call
CALLS = {
    flexrec.swap_rewards: partial(calls.of_lists, credit=True),
    flexrec.swap_rewards_with_variance: partial(calls.of_lists, credit=True, variance=True),
    flexrec.swap_scores: calls.of_lists,
    flexrec.ranking_metric: partial(calls.of_lists, backend=False),
    flexrec.rank_metrics: calls.of_rank_metrics,
    flexrec.ranking_logprobs: partial(calls.of_rankings, extra="values"),
    flexrec.ranking_logprobs_with_kl: partial(calls.of_rankings, extra="kl"),
    flexrec.ranking_kl: partial(calls.of_rankings, extra="reference"),
    flexrec.ranking_probs: partial(calls.of_rankings, backend=False),
    flexrec.all_actions_objective: partial(calls.of_rankings, extra="objective"),
    flexrec.restricted_logprobs: calls.of_sets,
    flexrec.restricted_logprobs_with_kl: partial(calls.of_sets, extra="kl"),
    flexrec.restricted_kl: partial(calls.of_sets, extra="reference"),
    flexrec.item_advantages: calls.of_advantages,
    flexrec.uncertainty_weights: calls.of_weights,
    flexrec.policy_loss: calls.of_loss,
    flexrec.bootstrap_interval: calls.of_bootstrap,
    flexrec.relative_change: calls.of_change,
    flexrec.RankingState: calls.of_state,
    flexrec.CandidateTries: lambda rng: {"candidates": calls.lists_of_tokens(rng)},
    flexrec.parse_rankings: calls.of_parser,
    flexrec.encode_rankings: calls.of_encoder,
    flexrec.inverse_permutation: calls.of_permutations,
    flexrec.validate_rankings: calls.of_permutations,
    text.parse_ranking_texts: calls.of_text,
    text.score_completions: calls.of_scores,
    text.item_values_to_tokens: calls.of_tokens,
    flexrec.decoding.Decoding: calls.of_decoding,
    flexrec.decoding.RankingLogitsProcessor: calls.of_processor,
}
# Results and what they are made of; what takes a function, a model or a tokenizer has tests of its own.
OTHERS = {"AllActions", "Comparison", "EncodedRankings", "ParsedRankings", "RankingLogprobs", "RankingLogprobsWithKL"}
NO_INTERVAL = {flexrec.bootstrap_interval}  # NaN where there is one user
OTHERS |= {
    "Ranker",
    "Topics",
    "register_metric",
    "set_value_checks",
    "Candidates",
    "Spelling",
    "TokenIds",
    "step_states",
}


def test_every_name_is_called_here_or_known_not_to_be():
    named = {function.__name__ for function in CALLS} | OTHERS
    assert set(flexrec.__all__) | set(flexrec.rankings.__all__) <= named


def numbers(value):
    """Every array of numbers in a value."""
    if isinstance(value, torch.Tensor):
        if value.layout == torch.strided and not value.is_meta:
            yield value.detach().to(torch.float64 if value.is_floating_point() else value.dtype).resolve_neg().numpy()
    elif isinstance(value, (np.ndarray, float)):
        yield np.asarray(value)
    elif isinstance(value, dict):
        yield from numbers(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from numbers(one)


def is_ordinary(arguments):
    """Whether all numbers are finite, and far from where products overflow."""
    floating = [array for array in numbers(tuple(arguments.values())) if array.dtype.kind == "f"]
    return all(np.isfinite(array).all() and (np.abs(array) < 1e4).all() for array in floating)


def has_nan(result):
    return any(np.isnan(array).any() for array in numbers(result) if array.dtype.kind == "f")


@pytest.fixture(autouse=True)
def alarm():
    """Python is told when a call takes too long."""
    if not hasattr(signal, "SIGALRM"):
        yield lambda seconds: None
        return

    def hangs(number, frame):
        raise AssertionError(f"a call takes more than {HANGS_AFTER} seconds")

    before = signal.signal(signal.SIGALRM, hangs)
    yield signal.alarm
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_a_result_or_an_error_that_says_why(function, alarm):
    begin = time.process_time()

    @hypothesis.settings(
        max_examples=int(150 * CPU_SECONDS),
        derandomize=True,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.integers(0, 2**32), st.sampled_from([0, 0, 1, 1, 2]))
    def attack(seed, num_spoilt):
        if time.process_time() - begin > CPU_SECONDS:
            return
        rng = Random(seed)
        torch.manual_seed(seed)
        arguments = CALLS[function](rng)
        for name in rng.sample(sorted(arguments), min(num_spoilt, len(arguments))):
            arguments[name] = calls.spoil(rng, arguments[name])
        try:
            alarm(HANGS_AFTER)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = function(**arguments)
        except (ValueError, TypeError):
            return
        except Exception as error:
            raise AssertionError(f"seed {seed}: {arguments} gives {type(error).__name__}: {error}") from error
        finally:
            alarm(0)
        if function not in NO_INTERVAL:
            assert not (is_ordinary(arguments) and has_nan(result)), f"seed {seed}: {arguments} gives {result}"

    attack()
