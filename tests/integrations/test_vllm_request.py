"""RankingRequest: what travels to vLLM and back, and what is said of a bad one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from flexrec.integrations.vllm_request import RankingRequest

CANDIDATES = [[10, 11], [12], [13, 14, 15]]
REASONING: dict[str, Any] = {"reasoning_end": [6, 7], "max_reasoning_tokens": 5}


def test_it_travels_as_an_object_and_as_json() -> None:
    request = RankingRequest(CANDIDATES, separator=[3], end=[2], num_ranked=2, **REASONING)
    plain = {"candidates": CANDIDATES, "separator": [3], "end": [2], "num_ranked": 2, **REASONING}
    assert request.extra_args == {"flexrec": plain}
    assert list(request.vllm_xargs) == ["flexrec"]
    assert json.loads(request.vllm_xargs["flexrec"]) == plain
    for extra_args in (request.extra_args, request.vllm_xargs):
        arrived = RankingRequest.from_extra_args(extra_args)
        assert arrived is not None
        assert arrived.extra_args == request.extra_args
    assert RankingRequest(CANDIDATES).extra_args == {"flexrec": {"candidates": CANDIDATES, "separator": [], "end": []}}


def test_arrays_and_tensors_become_plain_integers() -> None:
    request = RankingRequest(
        [np.array([10, 11]), torch.tensor([12])], separator=np.array([3]), end=(2,), num_ranked=np.int64(1)
    )
    assert json.loads(json.dumps(request.extra_args)) == request.extra_args
    assert request.candidates == [[10, 11], [12]]


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}, {"flexrec": None}])
def test_other_requests_are_none(extra_args: Any) -> None:
    assert RankingRequest.from_extra_args(extra_args) is None


BAD = [
    ("{", "flexrec must be JSON where it is a string"),
    ("[" * 100_000, "flexrec must be JSON where it is a string"),
    ("[[1]]", "flexrec must be an object of candidates, separator, .*; got list"),
    (7, "flexrec must be an object of candidates, .*; got int"),
    ({}, "flexrec needs the field candidates"),
    ({"candidates": [[1]], "seperator": [3]}, "unknown field 'seperator'; known are candidates, separator"),
    ({"candidates": "12"}, "flexrec: candidates must be a sequence of token sequences, got str"),
    ({"candidates": 12}, "flexrec: candidates must be a sequence of token sequences, got int"),
    ({"candidates": []}, "flexrec: candidates is empty"),
    ({"candidates": [[1], []]}, r"flexrec: candidates\[1\] is an empty token sequence"),
    ({"candidates": [[1], ["a"]]}, r"flexrec: candidates\[1\]\[0\] must be an integer token id, got str"),
    ({"candidates": [[1], [2.0]]}, r"flexrec: candidates\[1\]\[0\] must be an integer token id, got float"),
    ({"candidates": [[1], [-2]]}, r"flexrec: candidates\[1\] must hold token ids from 0 to 2147483647, got -2"),
    ({"candidates": [[1]], "separator": ", "}, "flexrec: separator must be a sequence of token ids, got str"),
    ({"candidates": [[1]], "end": 2}, "flexrec: end must be a sequence of token ids, got int"),
    ({"candidates": [[1], [1, 2]], "end": [2], "num_ranked": 1}, "candidate 0 is a prefix of candidate 1"),
    ({"candidates": [[1]], "num_ranked": 0}, "num_ranked"),
    ({"candidates": [[1]], "num_ranked": 2}, "num_ranked"),
    ({"candidates": [[1]], "num_ranked": "1"}, "num_ranked must be an int, got str"),
    ({"candidates": [[1]], "num_ranked": True}, "num_ranked must be an int, got bool"),
    ({"candidates": [[1]], "reasoning_end": [5]}, "max_reasoning_tokens"),
    ({"candidates": [[1]], "max_reasoning_tokens": 5}, "reasoning_end"),
    ({"candidates": [[1]], "reasoning_end": "</think>", "max_reasoning_tokens": 5}, "reasoning_end must be a sequence"),
    ({"candidates": [[1]], "reasoning_end": [], "max_reasoning_tokens": 5}, "reasoning_end"),
    ({"candidates": [[1]], "reasoning_end": [5], "max_reasoning_tokens": -1}, "max_reasoning_tokens"),
    ({"candidates": [[1]], "reasoning_end": [5], "max_reasoning_tokens": "9"}, "max_reasoning_tokens must be an int"),
]


@pytest.mark.parametrize(("value", "message"), BAD)
def test_every_mistake_is_a_value_error_that_names_the_field(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankingRequest.from_extra_args({"flexrec": value})


def test_max_tokens_is_what_the_longest_answer_takes() -> None:
    # 10 11 , 12 , 13 14 15 and the end; two of them; a token that stops it where no end is spelled
    assert RankingRequest(CANDIDATES, separator=[3], end=[2]).max_tokens == 9
    assert RankingRequest(CANDIDATES, separator=[3], end=[2], num_ranked=2).max_tokens == 7
    assert RankingRequest(CANDIDATES, separator=[3]).max_tokens == 9
    assert RankingRequest(CANDIDATES, separator=[3], end=[2], **REASONING).max_tokens == 9 + 5 + 2


def test_the_ranking_is_read_behind_the_reasoning() -> None:
    request = RankingRequest(CANDIDATES, separator=[3], end=[2])
    spelled = [12, 3, 13, 14, 15, 3, 10, 11, 2]
    assert request.ranking(spelled).tolist() == [1, 2, 0]
    assert request.ranking((*spelled, 2)).tolist() == [1, 2, 0]
    reasoned = RankingRequest(CANDIDATES, separator=[3], end=[2], **REASONING)
    # A candidate's name in the reasoning is no mention.
    assert reasoned.ranking([10, 11, 6, 6, 7, *spelled]).tolist() == [1, 2, 0]


def test_what_is_no_ranking_is_an_error_and_not_a_repaired_one() -> None:
    request = RankingRequest(CANDIDATES, separator=[3], end=[2])
    reasoned = RankingRequest(CANDIDATES, separator=[3], end=[2], **REASONING)
    for asked, tokens in [
        (request, [12, 3, 13, 14, 15, 3, 10, 11]),  # cut short
        (request, [12, 3, 12, 3, 10, 11, 2]),  # not constrained
        (request, [2]),
        (reasoned, [12, 3, 13, 14, 15, 3, 10, 11, 2]),  # no marker
        (reasoned, []),
    ]:
        with pytest.raises(ValueError, match="is no full ranking of the 3 candidates"):
            asked.ranking(tokens)
    with pytest.raises(ValueError, match=r"token_ids must be those of one completion, \(L,\), got shape \(1, 2\)"):
        request.ranking([[1, 2]])


def test_a_client_needs_no_vllm() -> None:
    code = (
        "import sys, flexrec.integrations.vllm_request; assert not any(m.split('.')[0] == 'vllm' for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
