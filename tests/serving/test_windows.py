"""Requests of more candidates than a window: what models are asked, and what comes of it."""

import numpy as np
import pytest

from flexrec import cli
from flexrec.decoding.options import STRATEGIES, Decoding
from flexrec.decoding.windows import Plan
from flexrec.serving.ranker import Ranker


@pytest.fixture(scope="module")
def ranker(make_run):
    return Ranker(make_run("item_token", sharp=True, show_titles=False, described=True))


@pytest.fixture
def asked(ranker, monkeypatch):
    """What is decoded: numbers of candidates, and whether in one pass."""
    seen = []
    decode = ranker._decode

    def noted(prompts, candidates, decoding, *args):
        seen.append(([len(of_list) for of_list in candidates], ranker._one_pass(decoding)))
        return decode(prompts, candidates, decoding, *args)

    monkeypatch.setattr(ranker, "_decode", noted)
    return seen


def request_of(dataset, count=30, **more):
    ids = dataset.catalogue.ids
    return {"need": "interest", "history": list(ids[60:63]), "candidates": list(ids[:count]), **more}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_long_list_is_ranked_by_windows(ranker, dataset, asked, strategy):
    requests = [request_of(dataset), request_of(dataset, 7), request_of(dataset, 50, top_n=3)]
    answers = ranker.rank(requests, Decoding(strategy=strategy, window=10, step=4))
    assert answers[1] == ranker.rank([requests[1]])[0], "what fits a window is ranked as ever"
    for n, size in ((0, 30), (2, 50)):
        answer = answers[n]
        assert answer["calls"] == Plan(strategy, 10, 4).calls(size)
        found = [item["id"] for item in answer["ranking"]]
        assert len(found) == (30 if n == 0 else 3)
        assert set(found) <= set(requests[n]["candidates"])
        assert len(set(found)) == len(found)
        assert {frozenset(item) for item in answer["ranking"]} == {frozenset({"id"})}
    assert max(max(sizes) for sizes, _ in asked) <= 10
    in_one_pass = [one_pass for sizes, one_pass in asked]
    assert any(in_one_pass) == (strategy == "prerank")
    asked.clear()
    alone = ranker.rank([requests[0]], Decoding(strategy=strategy, window=10, step=4))
    assert [one_pass for _, one_pass in asked] == ([True, False] if strategy == "prerank" else [False] * len(asked))
    assert alone[0]["ranking"] == answers[0]["ranking"]
    assert list(ranker.stream(requests, Decoding(strategy=strategy, window=10, step=4))) == answers


def test_windows_of_all_requests_are_ranked_together(ranker, dataset, asked):
    ranker.rank([request_of(dataset)] * 4, Decoding(strategy="sliding", window=10, step=5))
    assert [sizes for sizes, _ in asked] == [[10] * 4] * 5


def test_candidates_come_back_as_they_were_given(ranker, dataset):
    """Numbers, dictionaries, titles of the catalogue, with a null for an id or without one, and one twice."""
    ids, titles = dataset.catalogue.ids, dataset.catalogue.titles
    given = [*({"id": n, "title": f"Something new {n}"} for n in range(12)), *ids[:6], {"title": titles[7]}, ids[0]]
    given += [{"id": None, "title": titles[8]}, {"id": None, "title": titles[9]}]
    (answer,) = ranker.rank([request_of(dataset) | {"candidates": given}], Decoding(strategy="tournament", window=5))
    found = [item["id"] for item in answer["ranking"]]
    assert sorted(map(str, found)) == sorted([*map(str, range(12)), *ids[:6], *ids[7:10]])
    assert sum(isinstance(one, int) for one in found) == 12
    assert f"has the id {ids[0]!r} more than once" in answer["warning"]


def test_one_malformed_request_costs_no_other(ranker, dataset):
    bad = [
        request_of(dataset) | {"need": ""},
        request_of(dataset) | {"candidates": [*dataset.catalogue.ids[:20], {"id": "x"}]},
        request_of(dataset) | {"history": "all"},
        request_of(dataset) | {"top_n": -1},
        "no request",
    ]
    answers = ranker.rank([bad[0], request_of(dataset), *bad[1:]], Decoding(strategy="prerank", window=10))
    assert "ranking" in answers.pop(1)
    for answer, said in zip(answers, ("'need'", "no 'title'", "'history'", "top_n", "a request is"), strict=True):
        assert said in answer["error"]


def test_a_list_that_a_model_cannot_hold_at_once_is_ranked(make_run, dataset):
    """512 positions hold no 50 titles."""
    ranker = Ranker(make_run("title"))
    request = request_of(dataset, 50)
    assert "positions" in ranker.rank([request])[0]["error"]
    (answer,) = ranker.rank([request], Decoding(strategy="sliding", window=10))
    assert sorted(item["id"] for item in answer["ranking"]) == sorted(request["candidates"])
    assert "positions" in ranker.rank([request], Decoding(strategy="sliding", window=49))[0]["error"]


def test_the_best_of_a_sharp_model_is_found(ranker, dataset):
    """By first choices of whole lists, which a tournament of pairs agrees with where choices are consistent."""
    request = request_of(dataset, 40)
    scores = {one["id"]: one["score"] for one in ranker.score([request])[0]["scores"]}
    best = sorted(scores, key=scores.get)[-10:]
    for strategy in STRATEGIES:
        (answer,) = ranker.rank([request], Decoding(strategy=strategy, window=20, step=10))
        top = [item["id"] for item in answer["ranking"][:10]]
        assert len(set(top) & set(best)) > 10 * 10 / 40, "no better than chance"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 10}, "those of a strategy, which is not given"),
        ({"strategy": "sliding", "window": 10, "step": 10}, "step must be below window = 10, got 10"),
        ({"strategy": "sliding", "step": 0}, "step must be at least 1"),
        ({"strategy": "all"}, "must be one of"),
        ({"strategy": "sliding", "window": 1}, "window must be at least 2"),
    ],
)
def test_options_that_leave_somebody_out_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**options)


def test_the_command_line_ranks_by_windows(ranker, make_run, dataset, tmp_path, capsys):
    import json

    folder = make_run("item_token", name="cli", show_titles=False, described=True)
    (tmp_path / "requests.jsonl").write_text(json.dumps(request_of(dataset)) + "\n")
    arguments = ["rank", "--run", str(folder), "--input", str(tmp_path / "requests.jsonl")]
    assert cli.main([*arguments, "--strategy", "sliding", "--window", "10", "--step", "5"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["calls"] == 5
    assert np.unique([item["id"] for item in answer["ranking"]]).size == 30
    assert cli.main([*arguments, "--window", "10"]) == 2
    assert "strategy" in capsys.readouterr().err
