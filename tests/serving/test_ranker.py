"""The ranker as a package's front: found by name, saved, streamed, asked for titles and for the best few."""

import dataclasses
import itertools
import json

import huggingface_hub
import numpy as np
import pytest

import flexrec
from flexrec.data import Catalogue
from flexrec.decoding.options import Decoding
from flexrec.decoding.sample import search_rankings
from flexrec.experiment.card import card_of
from flexrec.experiment.results import Results
from flexrec.experiment.run_folder import RunFolder, RunInfo
from flexrec.serving import ranker as module
from flexrec.serving.ranker import Ranker


def requests_of(dataset, **more):
    """Of several lengths."""
    ids = dataset.catalogue.ids
    return [
        {"need": "interest", "history": list(ids[n : n + 3]), "candidates": list(ids[10 : 15 + n]), **more}
        for n in range(4)
    ]


def test_scores_are_probabilities_of_being_first(run, dataset):
    """As the first rank's are when every ranking of one item is looked at, whatever else is in the batch."""
    ranker = Ranker(run)
    requests = requests_of(dataset)
    answers = ranker.score(requests)
    for request, answer in zip(requests, answers, strict=True):
        scores = {one["id"]: one["score"] for one in answer["scores"]}
        assert list(scores) == request["candidates"]
        assert sum(scores.values()) == pytest.approx(1, abs=1e-4)
        read = ranker._read(request, Decoding(), None)
        if ranker.info.encoding != "score":
            count = len(request["candidates"])
            options = {"separator": ranker.builder.separator, "end": ranker.builder.end, "temperature": 0.5}
            found = search_rankings(
                ranker.model, [read.prompt], [read.tokens], num_beams=4 * count, num_ranked=1, **options
            )
            expected = {read.ids[c]: p for (c,), (p,) in zip(found.rankings, np.exp(found.logprobs), strict=True) if p}
            assert scores == pytest.approx(expected, abs=2e-4)
        assert ranker.score([request])[0]["scores"] == [
            {"id": i, "score": pytest.approx(p, abs=1e-5)} for i, p in scores.items()
        ]
        assert answer["tokens"] == len(read.prompt)
    for answer, ranked in zip(answers, ranker.rank(requests), strict=True):
        scores = {one["id"]: one["score"] for one in answer["scores"]}
        assert {one["id"]: one["score"] for one in ranked["ranking"]} == pytest.approx(scores, abs=1e-5)
        first = ranked["ranking"][0]
        assert first["score"] == pytest.approx(first["probability"], abs=1e-3)
        assert ranked["ranking"][-1]["probability"] == 1


def test_scores_come_after_what_was_reasoned(make_run, dataset):
    """As the probability of the first item does, which is the same number."""
    ranker = Ranker(make_run("index", sharp=True, reasoning_end="</think>", max_reasoning_tokens=3))
    requests = requests_of(dataset)
    for answer, scored in zip(ranker.rank(requests), ranker.score(requests), strict=True):
        first = answer["ranking"][0]
        assert first["score"] == pytest.approx(first["probability"], abs=1e-4)
        assert {one["id"]: one["score"] for one in scored["scores"]}[first["id"]] == pytest.approx(
            first["score"], abs=1e-4
        )


def test_a_sharper_question_has_sharper_scores(ranker, dataset):
    request = requests_of(dataset)[0]
    hot, cold = (ranker.rank([request], Decoding(temperature=t, best_of=1))[0]["ranking"] for t in (5.0, 0.05))
    assert max(one["score"] for one in cold) > 2 * max(one["score"] for one in hot)


def test_the_best_so_many_are_the_first_of_all(run, dataset, monkeypatch):
    """Of the call, or of a request, which comes before; the model ranks no more than that."""
    ranker = Ranker(run)
    requests = requests_of(dataset)
    everything = ranker.rank(requests)
    asked = []
    sample = module.sample_rankings

    def spy(*args, **options):
        asked.append(options["num_ranked"])
        return sample(*args, **options)

    monkeypatch.setattr(module, "sample_rankings", spy)
    best = ranker.rank([{**requests[0], "top_n": 1}, *requests[1:]], top_n=3)
    for n, one, whole in zip((1, 3, 3, 3), best, everything, strict=True):
        assert [item["id"] for item in one["ranking"]] == [item["id"] for item in whole["ranking"][:n]]
    assert asked == [3]
    assert len(ranker.rank(requests[:1], Decoding(best_of=3), top_n=2)[0]["ranking"]) == 2
    assert asked == [3, None]
    assert len(ranker.rank(requests[:1], top_n=99)[0]["ranking"]) == 5


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "3"])
def test_a_wrong_top_n_is_named(ranker, dataset, value):
    (answer,) = ranker.rank([{**requests_of(dataset)[0], "top_n": value}])
    assert answer == {"error": f"'top_n' must be a positive whole number, got {value!r}"}


def test_titles_stand_for_the_one_item_that_has_them(served, dataset):
    titles, ids = dataset.catalogue.titles, dataset.catalogue.ids
    null = {"id": None}
    twice = Catalogue(("new", "twin"), ("A new one", "A new one"), ((), ()))
    ranker = Ranker(served, twice)
    by_id = {"need": "trend", "history": list(ids[:2]), "candidates": list(ids[5:8])}
    by_title = {
        "need": "trend",
        "history": [titles[0], {"title": titles[1]}],
        "candidates": [titles[5], {"title": titles[6]}, {"title": titles[7], **null}],
    }
    assert len(set(titles)) == len(titles)
    one, other = ranker.rank([by_id, by_title])
    named = {titles[5]: ids[5]}
    assert [named.get(item["id"], item["id"]) for item in other["ranking"]] == [item["id"] for item in one["ranking"]]
    errors = [
        ranker.rank([{**by_id, "history": [entry]}])[0]["error"]
        for entry in ("A new one", {"title": "A new one"}, "Nothing of ours", {"title": "Nothing of ours"}, null)
    ]
    ambiguous = "'history[0]': 2 items have the title 'A new one': give one of the ids 'new', 'twin'"
    unknown = (
        "'history[0]' has no 'title', and 'Nothing of ours' is neither an id nor a title of the run's catalogue: give "
        "{'id': .., 'title': ..}"
    )
    assert errors == [ambiguous, ambiguous, unknown, unknown, "'history[0]' has no 'id'"]
    (answer,) = ranker.rank([{**by_id, "history": [{"id": "other", "title": "A new one"}]}])
    assert "ranking" in answer


def test_one_word_may_be_an_instruction(ranker, dataset):
    request = requests_of(dataset)[0]
    assert "unknown need 'dragons'" in ranker.rank([{**request, "need": "dragons"}])[0]["error"]
    assert "ranking" in ranker.rank([{**request, "need": {"words": "dragons"}}])[0]
    assert "'need' must be" in ranker.rank([{**request, "need": {"words": " "}}])[0]["error"]
    assert "'need' must be" in ranker.rank([{**request, "need": {"text": "dragons"}}])[0]["error"]


def test_a_stream_is_answered_in_order_before_its_end(ranker, dataset):
    requests = requests_of(dataset)
    bad = {"need": "interest", "history": [], "candidates": []}
    taken = []

    def endless():
        for n in itertools.count():
            taken.append(n)
            yield bad if n % 5 == 4 else requests[n % 5]

    expected = ranker.rank([*requests, bad])
    tokens = max(len(ranker._read(request, Decoding(), None).prompt) for request in requests)
    answers = list(itertools.islice(ranker.stream(endless(), batch_tokens=3 * tokens), 10))
    assert len(taken) < 20
    for answer, alone in zip(answers, [*expected, *expected], strict=True):
        if "error" in alone:
            assert answer == alone
        else:
            assert [i["id"] for i in answer["ranking"]] == [i["id"] for i in alone["ranking"]]
    assert list(ranker.stream([])) == []
    assert [len(one["ranking"]) for one in ranker.stream(requests, top_n=2)] == [2] * 4
    assert len(list(ranker.stream([bad] * 200))) == 200


def test_a_request_that_is_none_costs_no_other(ranker, dataset):
    first, second = ranker.rank(["hello", requests_of(dataset)[0]])
    assert first == {"error": "a request is a dictionary, got str"}
    assert "ranking" in second


def test_what_is_saved_answers_as_the_run_does_and_holds_nothing_else(run, dataset, tmp_path):
    ranker = Ranker.from_pretrained(run)
    (run / "log.jsonl").write_text("{}\n")
    ranker.save_pretrained(tmp_path / "out" / "mine")
    names = {path.name for path in (tmp_path / "out" / "mine").iterdir()}
    assert names >= {"README.md", "flexrec.json", "catalogue.json", "histories.json", "config.json", "tokenizer.json"}
    assert not names & {"log.jsonl", "experiment.json", "config.yaml", "data.json", "metrics.json", "critic.npz"}
    assert b"somewhere" not in b"".join(path.read_bytes() for path in (tmp_path / "out" / "mine").iterdir())
    again = flexrec.Ranker.from_pretrained(tmp_path / "out" / "mine")
    user = next(iter(ranker.users))
    requests = [*requests_of(dataset), {"need": "trend", "user": user, "candidates": list(dataset.catalogue.ids[:6])}]
    assert again.rank(requests) == ranker.rank(requests)
    again.save_pretrained(tmp_path / "third", histories=False)
    assert (tmp_path / "third" / "README.md").read_text() == (tmp_path / "out" / "mine" / "README.md").read_text()
    third = Ranker(tmp_path / "third")
    assert third.rank(requests[:4]) == ranker.rank(requests[:4])
    assert "is not in the log of this run" in third.rank(requests[4:])[0]["error"]
    with pytest.raises(FileExistsError, match="is not empty: choose another folder"):
        ranker.save_pretrained(tmp_path / "third")


def test_a_repository_of_the_hub_is_fetched_by_its_name(served, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def fetch(name, *, revision):
        asked.append((name, revision))
        return str(served)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert Ranker.from_pretrained("somebody/films", revision="v2").info.needs == ["interest", "trend"]
    assert asked == [("somebody/films", "v2")]
    for name in ("nowhere", "./some/where", "/no/where", tmp_path / "runs"):
        with pytest.raises(FileNotFoundError, match="is neither the folder of a run nor a repository's name"):
            Ranker.from_pretrained(name)
    assert len(asked) == 1

    def unreachable(name, *, revision):
        raise ConnectionError("no route to the hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError) as error:
        Ranker.from_pretrained("somebody/films")
    assert "\n" not in str(error.value)
    assert "somebody/films" in str(error.value)
    assert "no route to the hub" in str(error.value)


def test_the_card_has_the_results_with_intervals(make_run, dataset):
    folder = make_run("item_token", name="films")
    rng = np.random.default_rng(0)
    users = np.arange(40)
    base = rng.random(40) / 4
    per_list = {
        "base": {need: {"ndcg@5": base} for need in ("interest", "trend")},
        "trained": {need: {"ndcg@5": base + 0.5 + rng.random(40) / 4} for need in ("interest", "trend")},
        "item|knn": {need: {"ndcg@5": base + 0.25} for need in ("interest", "trend")},
    }
    results = Results(users, per_list)
    run = RunFolder(folder)
    info = dataclasses.replace(RunInfo.load(folder), model="owner/some-model")
    run.write_results({}, results)
    card = card_of(run, info)
    assert card == card_of(run, info, results.to_json())
    change = results.compare("trained", "item|knn", "trend")
    assert (
        f"| trend | item\\|knn | {change.mean_base:.3f} | "
        f"{change.difference:+.3f} [{change.difference_low:+.3f}, {change.difference_high:+.3f}] |" in card
    )
    assert f"| trend | **trained** | **{change.mean_new:.3f}** | |" in card
    assert card.startswith("---\nlibrary_name: flexrec\n")
    assert "base_model: owner/some-model\n---\n" in card
    assert "license" not in card
    assert "simulated" in card
    assert f"{len(dataset.catalogue)} items" in card
    assert 'Ranker.from_pretrained("films")' in card
    (use,) = [part.partition("```")[0] for part in card.split("```python\n")[1:]]
    request = json.loads(use.partition("request = ")[2].partition("\n")[0].replace("'", '"'))
    assert len(Ranker(folder).rank([request])[0]["ranking"]) == 3
    of_one = Results(
        users[:1], {k: {n: {m: v[:1]} for n, x in of.items() for m, v in x.items()} for k, of in per_list.items()}
    )
    assert "nan" not in card_of(run, info, of_one.to_json()).partition("## Results")[2]
