"""`flexrec rank` on hostile lines: each gets an error with its number, and costs no other line."""

import io
import json
import sys

import pytest

from flexrec import cli
from flexrec.data import simulate
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.run_folder import RunFolder, RunInfo
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.serving import ranker as module
from flexrec.serving.ranker import Ranker
from flexrec.task.needs import get_need
from flexrec.task.prompts import PromptBuilder


@pytest.fixture(scope="module")
def dataset():
    return simulate(num_users=24, num_items=70, num_topics=4, num_test_users=6, num_candidates=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset):
    """A run whose model has 256 positions."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    tokenizer = build_tokenizer(dataset.catalogue, get_need("interest").wordings)
    model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2, max_length=256)
    builder = PromptBuilder(tokenizer, encoding="index")
    RunFolder(folder).save(
        model,
        tokenizer,
        RunInfo.of(ExperimentConfig(output=str(folder)), builder, dataset, [get_need("interest")]),
        dataset,
    )
    return folder


def good(dataset, **changes):
    ids = dataset.catalogue.ids
    return {"need": "interest", "history": list(ids[:2]), "candidates": [{"id": i} for i in ids[3:6]], **changes}


def line(request):
    return json.dumps(request).encode()


HOSTILE = {
    "invalid UTF-8": (lambda d: b'{"need": "interest", "title": "\xff\xfe"}', "no valid UTF-8: byte 0xff"),
    "nesting": (lambda d: b"[" * 100_000, "nested too deeply"),
    "a long integer": (lambda d: b'{"need": ' + b"7" * 5000 + b"}", "integer"),
    "NaN": (lambda d: b'{"need": "interest", "candidates": [NaN]}', "NaN is no number"),
    "a lone surrogate in a title": (
        lambda d: line(good(d, candidates=[{"id": d.catalogue.ids[3], "title": "\ud800"}])),
        "surrogate",
    ),
    "a lone surrogate in the need": (lambda d: line(good(d, need="\udfff please now")), "surrogate"),
    "a lone surrogate in an id": (lambda d: line(good(d, history=["\ud801"])), "surrogate"),
    "thousands of candidates": (
        lambda d: line(good(d, candidates=[{"id": str(i), "title": "x"} for i in range(5000)])),
        "256 positions",
    ),
    "a long title": (
        lambda d: line(good(d, candidates=[{"id": d.catalogue.ids[3], "title": "word " * 2000}])),
        "256 positions",
    ),
    "a list as an id": (lambda d: line(good(d, candidates=[{"id": ["8"]}])), "'candidates[0].id' must be an id"),
    "a boolean as an id": (lambda d: line(good(d, candidates=[True])), "'candidates[0]' must be an id"),
    "a fraction as an id": (lambda d: line(good(d, candidates=[{"id": 1.5}])), "must be an id"),
    "a boolean as a user": (
        lambda d: line({k: v for k, v in good(d, user=True).items() if k != "history"}),
        "'user' must be an id",
    ),
    "liked in words": (
        lambda d: line(good(d, history=[{"id": d.catalogue.ids[0], "liked": "false"}])),
        "'liked' of 'history[0]' must be true or false, got 'false'",
    ),
    "no object": (lambda d: b"17", "a request is a JSON object, got int"),
}


@pytest.mark.parametrize(("make", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_line_costs_no_other(run, dataset, tmp_path, capsys, make, message):
    source, target = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    source.write_bytes(line(good(dataset)) + b"\n" + make(dataset) + b"\n\n" + line(good(dataset)) + b"\n")
    assert cli.main(["rank", "--run", str(run), "--input", str(source), "--output", str(target)]) == 1
    first, bad, last = [json.loads(one) for one in target.read_text(encoding="utf-8").splitlines()]
    assert (first["line"], bad["line"], last["line"]) == (1, 2, 4)
    assert first["ranking"] == last["ranking"]
    assert len(first["ranking"]) == 3
    assert set(bad) == {"line", "error"}
    assert message in bad["error"]
    assert len(bad["error"]) < 400
    assert f"line 2: {bad['error']}" in capsys.readouterr().err


def test_a_line_too_long_to_hold_is_passed_over(run, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "MAX_LINE", 400)
    source, target = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    source.write_bytes(b" " * 2000 + b"\n" + line(good(dataset)) + b"\n" + b"x" * 401)
    assert cli.main(["rank", "--run", str(run), "--input", str(source), "--output", str(target)]) == 1
    answers = [json.loads(one) for one in target.read_text().splitlines()]
    assert [answer["line"] for answer in answers] == [1, 2, 3]
    too_long = "a request has at most 400 bytes"
    assert [answer.get("error") for answer in answers] == [too_long, None, too_long]


def test_a_byte_order_mark_is_read_and_ids_are_kept_as_they_came(run, dataset, tmp_path, monkeypatch):
    """Through pipes whose encoding is another; what is written is UTF-8."""
    name = "Ærøskøbing 映画"
    ids = dataset.catalogue.ids
    request = good(dataset, candidates=[{"id": ids[3]}, {"id": 991, "title": "Number"}, {"id": name, "title": name}])
    text = json.dumps(request, ensure_ascii=False)
    source = io.BytesIO(b"\xef\xbb\xbf" + text.encode() + b"\n")
    target = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(source, encoding="ascii"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(target, encoding="ascii"))
    assert cli.main(["rank", "--run", str(run), "--input", "-"]) == 0
    (answer,) = [json.loads(one) for one in target.getvalue().decode("utf-8").splitlines()]
    assert {item["id"] for item in answer["ranking"]} == {ids[3], 991, name}


def test_what_is_decoded_together_is_bounded(run, dataset, monkeypatch):
    """By tokens, not by lines: the answers are those of each request alone."""
    ranker = Ranker(run)
    ids = dataset.catalogue.ids
    requests = [good(dataset, candidates=[{"id": i} for i in ids[3 : 5 + n % 3]]) for n in range(7)]
    alone = [ranker.rank([request])[0] for request in requests]
    sizes = []
    sample = module.sample_rankings

    def spy(model, prompts, *args, **options):
        sizes.append(len(prompts) * max(map(len, prompts)))
        return sample(model, prompts, *args, **options)

    monkeypatch.setattr(module, "sample_rankings", spy)
    monkeypatch.setattr(module, "MAX_TOKENS", 200)
    together = ranker.rank(requests)
    assert len(sizes) > 1
    assert all(size <= 200 for size in sizes)
    for one, other in zip(together, alone, strict=True):
        assert [item["id"] for item in one["ranking"]] == [item["id"] for item in other["ranking"]]
