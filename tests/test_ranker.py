"""Ranking with a trained run: its prompts are those that were trained, and every option reaches the decoding."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from flexrec.data import Catalogue, simulate
from flexrec.decoding.sample import Rollout
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.run_folder import RunFolder, RunInfo
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.serving import ranker as module
from flexrec.serving.ranker import Decoding, Ranker
from flexrec.task.descriptions import Item
from flexrec.task.examples import RankingTask
from flexrec.task.mixtures import find_need
from flexrec.task.needs import Need, get_need, novelty
from flexrec.task.own_needs import make_needs
from flexrec.task.prompts import PromptBuilder, strongest_risers

SIZES = {"num_users": 24, "num_items": 70, "num_topics": 4, "num_test_users": 6, "num_candidates": 8}
MAX_HISTORY = 5


@pytest.fixture(scope="module")
def dataset():
    return simulate(**SIZES, observed_share=0.6, history_length=MAX_HISTORY)


@pytest.fixture(scope="module", params=["item_token", "descriptions", "index", "title"])
def run(request, tmp_path_factory, dataset):
    """The folder of a run with an untrained model, and the prompt builder that it was trained with."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    folder.mkdir()
    tokenizer = build_tokenizer(dataset.catalogue, get_need("trend").wordings)
    model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
    described = request.param == "descriptions"
    encoding = "item_token" if described else request.param
    builder = PromptBuilder(
        tokenizer, encoding=encoding, show_titles=encoding != "item_token", show_rising=True, described=described
    )
    config = ExperimentConfig(output=str(folder), num_ranked=6, temperature=0.6)
    RunFolder(folder).save(
        model, tokenizer, RunInfo.of(config, builder, dataset, [get_need("interest"), get_need("trend")]), dataset
    )
    return folder, builder


class Spy:
    """Stands for a function that decodes; every item is as probable as its rank says, the order that of the indices."""

    def __init__(self, rows=1):
        self.rows, self.calls = rows, []

    def __call__(self, model, prompts, candidates, **options):
        self.calls.append((prompts, candidates, options))
        rows = len(prompts) * (options.get("num_beams") or options.get("num_generations") or 1)
        shown = 3
        rankings = np.stack([np.roll(np.arange(shown), n) for n in range(rows)])
        logprobs = np.log(np.linspace(0.1, 0.9, rows * shown)).reshape(rows, shown)
        return Rollout(rankings, logprobs)


@pytest.fixture
def decoded(monkeypatch):
    spies = {"sample": Spy(), "search": Spy()}
    monkeypatch.setattr(module, "sample_rankings", spies["sample"])
    monkeypatch.setattr(module, "search_rankings", spies["search"])
    monkeypatch.setattr(module, "first_choices", lambda model, prompts, candidates, **_: [FIRST] * len(prompts))
    return spies


FIRST = np.linspace(0.2, 0.05, 8)


def as_request(lst, dataset, need="trend"):
    ids = dataset.catalogue.ids
    return {
        "need": need,
        "history": [
            {"id": ids[item], "interest": None if np.isnan(interest) else float(interest)}
            for item, interest in zip(lst.history, lst.history_interest, strict=True)
        ],
        "candidates": [{"id": ids[item]} for item in lst.candidates],
    }


def with_saved_trend(lst, dataset):
    """The list as it would stand at the end of the log: of trends, a run knows those of then."""
    trend, rises = dataset.trend[lst.candidates].round(4), dataset.rises[lst.candidates]
    return dataclasses.replace(lst, trend=trend, rises=rises)


def test_served_prompts_are_those_that_were_trained(run, dataset, decoded):
    """Histories in order, what was liked apart from what was seen, rising candidates, titles, the need's words."""
    folder, builder = run
    ranker = Ranker(folder)
    task = RankingTask(dataset.catalogue, [get_need("trend")], builder)
    lists = [with_saved_trend(lst, dataset) for lst in dataset.test]
    examples = [task.test_example(lst, get_need("trend")) for lst in lists]
    ranker.rank([as_request(lst, dataset) for lst in lists])
    ((prompts, candidates, options),) = decoded["sample"].calls
    assert prompts == [example.prompt for example in examples]
    assert candidates == [example.candidates for example in examples]
    assert (options["separator"], options["end"]) == (builder.separator, builder.end)
    liked = [lst.history_liked for lst in lists]
    assert any(marks.any() and not marks.all() for marks in liked)
    assert any((lst.trend > 0).sum() > 1 for lst in lists)


def test_a_long_history_is_its_latest_part(run, dataset, decoded):
    ranker = Ranker(run[0])
    lst = with_saved_trend(max(dataset.test, key=lambda lst: len(lst.history)), dataset)
    assert len(lst.history) == MAX_HISTORY
    request = as_request(lst, dataset)
    others = [i for i in dataset.catalogue.ids if i not in {entry["id"] for entry in request["history"]}]
    longer = {**request, "history": [*({"id": i, "liked": True} for i in others[:4]), *request["history"]]}
    ranker.rank([request, longer])
    first, second = decoded["sample"].calls[0][0]
    assert first == second
    ranker.rank([{**request, "history": request["history"][:-1]}])
    assert decoded["sample"].calls[1][0] != [first]


def test_a_logged_user_has_the_latest_events_of_the_log(run, dataset, decoded):
    folder, builder = run
    ranker = Ranker(folder)
    log, user = dataset.log, int(dataset.log.users[-1])
    rows = np.flatnonzero(log.users == user)[-MAX_HISTORY:]
    candidates = [i for i in range(70) if i not in log.items[rows]][:8]
    lst = with_saved_trend(dataset.test[0], dataset)
    lst = dataclasses.replace(
        lst,
        history=log.items[rows],
        history_interest=log.interest[rows],
        candidates=np.array(candidates),
        trend=dataset.trend[candidates].round(4),
        rises=dataset.rises[candidates],
    )
    request = {"need": "trend", "user": user, "candidates": [dataset.catalogue.ids[i] for i in candidates]}
    ranker.rank([request])
    expected, _ = builder.prompt_of(lst, dataset.catalogue, get_need("trend").wordings[0])
    assert decoded["sample"].calls[0][0] == [expected]


def test_ids_alone_were_liked_and_words_are_taken_as_they_are(run, dataset, decoded):
    folder, builder = run
    ranker = Ranker(folder)
    ids = dataset.catalogue.ids
    items = list(map(Item, ids, dataset.catalogue.titles, dataset.catalogue.topics))
    request = {"need": "What is on the rise?", "history": list(ids[:3]), "candidates": list(ids[60:64])}
    disliked = {**request, "history": [ids[0], {"id": ids[1], "liked": False}, {"id": ids[2]}]}
    named = {**request, "need": "trend"}
    ranker.rank([request, disliked, named])
    order = sorted(range(60, 64), key=lambda i: -round(float(dataset.trend[i]), 4))
    rising = [items[i] for i in order if dataset.trend[i] > 0.0001]
    lst = dataclasses.replace(dataset.test[0], history=np.arange(3), candidates=np.arange(60, 64))
    marks = builder.marks_of(dataset.trend[60:64].round(4), novelty(lst, dataset.catalogue))
    expected = [
        builder.prompt(words, items[:3], items[60:64], interest=liked, rising=rising, marks=marks)[0]
        for words, liked in (
            ("What is on the rise?", [True] * 3),
            ("What is on the rise?", [True, False, True]),
            (get_need("trend").wordings[0], [True] * 3),
        )
    ]
    assert decoded["sample"].calls[0][0] == expected
    if builder.encoding != "item_token":
        told = {"id": ids[60], "title": "Another  title"}
        ranker.rank([{**request, "candidates": [told, *ids[68:70]]}])
        candidates = [Item(ids[60], "Another title"), *items[68:70]]
        rising = sorted(candidates, key=lambda item: -round(float(dataset.trend[ids.index(item.id)]), 4))
        rising = [item for item in rising if dataset.trend[ids.index(item.id)] > 0.0001]
        prompt, _ = builder.prompt(request["need"], items[:3], candidates, interest=[True] * 3, rising=rising)
        assert decoded["sample"].calls[1][0] == [prompt]


def test_a_run_is_decoded_as_it_was_trained_unless_told_otherwise(run, dataset, decoded):
    ranker = Ranker(run[0])
    request = as_request(dataset.test[0], dataset)
    generator = torch.Generator()

    def options(which="sample", **asked):
        ranker.rank([request], Decoding(**asked), generator=generator)
        found = decoded[which].calls[-1][2]
        return {name: value for name, value in found.items() if name not in ("separator", "end")}

    common = {"num_ranked": 6, "temperature": 0.6}
    sampled = {"num_generations": 1, "greedy": True, "top_p": 1.0, "one_pass": False, "generator": generator}
    assert options() == common | sampled
    assert options(num_ranked=2) == common | sampled | {"num_ranked": 2}
    assert options(best_of=4) == common | sampled | {"num_generations": 4, "greedy": False}
    assert options(temperature=2.0) == common | sampled | {"temperature": 2.0, "greedy": False}
    assert options(top_p=0.5) == common | sampled | {"top_p": 0.5, "greedy": False}
    assert options(mode="one-pass") == common | sampled | {"one_pass": True}
    assert options("search", num_beams=3, num_ranked=2) == {**common, "num_ranked": 2, "num_beams": 3}
    assert len(decoded["search"].calls) == 1


def test_the_best_of_beams_and_of_samples_is_the_answer(run, dataset, decoded):
    """With its own probabilities, under the candidates' ids."""
    ranker = Ranker(run[0])
    lists = dataset.test[:2]
    requests = [as_request(lst, dataset) for lst in lists]
    ids = [[dataset.catalogue.ids[i] for i in lst.candidates] for lst in lists]
    probabilities = np.linspace(0.1, 0.9, 18).reshape(6, 3)

    def answer(of, row):
        order = np.roll(np.arange(3), row)
        return {
            "ranking": [
                {
                    "id": ids[of][c],
                    "probability": pytest.approx(p, abs=1e-6),
                    "score": pytest.approx(FIRST[c], abs=1e-6),
                }
                for c, p in zip(order, probabilities[row], strict=True)
            ]
        }

    # Beams come best first; of samples the last has the largest probabilities.
    assert ranker.rank(requests, Decoding(num_beams=3)) == [answer(0, 0), answer(1, 3)]
    assert ranker.rank(requests, Decoding(best_of=3)) == [answer(0, 2), answer(1, 5)]


def test_new_items_are_ranked_by_title_and_topics(run, dataset, decoded):
    """They come with a request, or with a catalogue of one's own; only where items are described."""
    folder, builder = run
    ids, topics = dataset.catalogue.ids, dataset.catalogue.topics[0]
    told = {"id": "new", "title": dataset.catalogue.titles[0], "topics": list(topics)}
    request = {"need": "interest", "history": [told, ids[1]], "candidates": [told, ids[2], ids[3]]}
    if builder.encoding == "item_token" and not builder.described:
        assert "item 'new' has no token of its own" in Ranker(folder).rank([request])[0]["error"]
        return
    item = Item("new", dataset.catalogue.titles[0], topics)
    history = [item, Item(ids[1], *known(dataset, ids[1]))]
    candidates = [item, *(Item(i, *known(dataset, i)) for i in ids[2:4])]
    trend = np.append(0.0, dataset.trend[2:4].round(4))
    lst = dataclasses.replace(dataset.test[0], history=np.array([0, 1]), candidates=np.array([0, 2, 3]))
    marks = builder.marks_of(trend, novelty(lst, dataset.catalogue))
    Ranker(folder).rank([request])
    rising = [candidates[j] for j in strongest_risers(trend)]
    words = get_need("interest").wordings[0]
    prompt, _ = builder.prompt(words, history, candidates, interest=[1, 1], rising=rising, marks=marks)
    ((prompts, found, _),) = decoded["sample"].calls
    assert (prompts, found) == ([prompt], [builder.candidate_tokens(candidates, marks)])
    if builder.described:
        unknown = builder.tokenizer.convert_tokens_to_ids("<unknown item>")
        assert [token[0] == unknown for (token,) in found[0]] == [True, False, False]
    by_id = {**request, "history": ["new", ids[1]], "candidates": ["new", ids[2], ids[3]]}
    assert "'candidates[0]' has no 'title'" in Ranker(folder).rank([by_id])[0]["error"]
    Ranker(folder, Catalogue(("new",), (item.title,), (topics,))).rank([by_id])
    assert [call[:2] for call in decoded["sample"].calls] == [([prompt], found)] * 2


def known(dataset, item_id):
    at = dataset.catalogue.index[item_id]
    return dataset.catalogue.titles[at], dataset.catalogue.topics[at]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"interest": 1.5}, "'interest' of 'history[0]' must lie in [0, 1] or be null, got 1.5"),
        ({"interest": True}, "'interest' of 'history[0]' must lie in [0, 1] or be null, got True"),
        ({"interest": 0.5, "liked": True}, "'history[0]' says 'liked' and 'interest': give one of the two"),
        ({"topics": "horror"}, "the topics of 'history[0]' must be a list of strings, got 'horror'"),
        ({"topics": [1]}, "the topics of 'history[0]' must be a list of strings, got [1]"),
    ],
)
def test_what_a_history_says_wrongly_is_named(run, dataset, decoded, entry, message):
    ids = dataset.catalogue.ids
    request = {"need": "interest", "history": [{"id": ids[0], **entry}], "candidates": [ids[1], ids[2]]}
    assert Ranker(run[0]).rank([request]) == [{"error": message}]


def test_the_model_of_the_folder_answers(run):
    """The weights that were saved, and the trend of the catalogue file."""
    folder, builder = run
    ranker = Ranker(folder)
    expected = build_model(builder.tokenizer, hidden_size=16, num_layers=1, num_heads=2).state_dict()
    for name, value in ranker.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert not ranker.model.training
    assert ranker._trend == json.loads((folder / "catalogue.json").read_text())["trend"] != {}


@pytest.fixture(scope="module")
def with_own_needs(tmp_path_factory, dataset):
    """The folder of an embedded run with a mixture and a need from a file."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    folder.mkdir()
    (cheap,) = make_needs(
        [{"name": "short ones", "wordings": ["I want short titles.", "Few words."], "gain": "interest * 2"}]
    )
    needs = [get_need("interest"), find_need("0.7 interest + 0.3 explore"), cheap]
    tokenizer = build_tokenizer(
        dataset.catalogue, [wording for need in needs for wording in need.wordings], needs=["short ones"]
    )
    model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
    builder = PromptBuilder(
        tokenizer, encoding="item_token", show_titles=False, show_rising=False, described=True, described_needs=[cheap]
    )
    config = ExperimentConfig(output=str(folder))
    RunFolder(folder).save(model, tokenizer, RunInfo.of(config, builder, dataset, needs), dataset)
    return folder


@pytest.mark.parametrize(
    ("need", "wording", "warning"),
    [
        ("interest", get_need("interest").wordings[0], None),
        ("short ones", "I want short titles.", None),
        (" 0.7 interest + 0.3 explore ", find_need("0.7 interest + 0.3 explore").wordings[0], None),
        ("Few words.", "Few words.", None),
        ("Which titles will this user love the most?", None, None),
        (
            "7 interest + 3 explore",
            find_need("0.7 interest + 0.3 explore").wordings[0],
            "need '7 interest + 3 explore' is '0.7 interest + 0.3 explore': weights are made to sum to 1",
        ),
        (
            "trend",
            get_need("trend").wordings[0],
            "the run was not trained on the need 'trend': it knows interest, 0.7 interest + 0.3 explore, short ones",
        ),
        (
            "0.5 interest + 0.5 short ones",
            None,
            "the run was not trained on the need '0.5 interest + 0.5 short ones': it knows interest,",
        ),
        (
            "Irgendetwas gegen lange Winterabende, bitte",
            "Irgendetwas gegen lange Winterabende, bitte",
            "5 of the 5 words of the need are new to the model (irgendetwas, gegen, lange, winterabende, bitte): it "
            "was trained on the needs interest, 0.7 interest + 0.3 explore, short ones and understands words like "
            "those of their wordings",
        ),
        ("Salt + pepper", "Salt + pepper", "2 of the 2 words of the need are new to the model (salt, pepper)"),
    ],
)
def test_a_need_that_was_not_trained_is_answered_with_a_warning(
    with_own_needs, dataset, decoded, need, wording, warning
):
    ranker = Ranker(with_own_needs)
    (answer,) = ranker.rank([as_request(dataset.test[0], dataset, need)])
    assert answer["ranking"]
    assert ("warning" in answer) == (warning is not None)
    if warning:
        assert answer["warning"].startswith(warning)
    if wording:
        prompt = [token for token in decoded["sample"].calls[0][0][0] if isinstance(token, int)]
        shown = ranker.builder.tokenizer.decode(prompt)
        assert wording in shown


@pytest.mark.parametrize(
    ("need", "message"),
    [
        (
            "intrest",
            "unknown need 'intrest'; did you mean 'interest'?; known needs: interest, ",
        ),
        ("0.7 interest + 0.3 short one", "unknown need 'short one'; did you mean 'short ones'?"),
        ("0.7 interest + -0.3 explore", "the weight of 'explore' must be positive"),
    ],
)
def test_a_need_that_is_none_is_an_error(with_own_needs, dataset, need, message):
    (answer,) = Ranker(with_own_needs).rank([as_request(dataset.test[0], dataset, need)])
    assert message in answer["error"]
    assert "ranking" not in answer


def test_needs_made_in_python_are_handed_over(with_own_needs, dataset, decoded):
    mine = Need("mine", ("It must be mine.",), get_need("interest").gains)
    info = json.loads((with_own_needs / "flexrec.json").read_text())
    request = as_request(dataset.test[0], dataset, "mine")
    assert "unknown need 'mine'" in Ranker(with_own_needs).rank([request])[0]["error"]
    ranker = Ranker(with_own_needs, needs=[mine])
    assert "it knows" in ranker.rank([request])[0]["warning"]
    ranker.info = dataclasses.replace(ranker.info, needs=[*info["needs"], "mine"])
    assert "warning" not in ranker.rank([request])[0]


def test_pretrained_models_are_not_warned_of_words(with_own_needs, dataset, decoded):
    ranker = Ranker(with_own_needs)
    ranker.info = dataclasses.replace(ranker.info, model="Qwen/Qwen2.5-0.5B-Instruct")
    (answer,) = ranker.rank([as_request(dataset.test[0], dataset, "Irgendetwas gegen lange Winterabende")])
    assert "warning" not in answer


def test_candidates_are_described_by_needs_of_ones_own_as_in_training(tmp_path, dataset, decoded):
    """By columns, categories, titles and popularity, which the run's folder remembers; new items have no columns."""
    rng = np.random.default_rng(0)
    columns = {
        "unit price": np.where(np.arange(70) % 9, rng.random(70) * 50, np.nan),
        "brand": np.array(["Acme" if n % 3 else "" for n in range(70)], dtype=object),
        "weight": np.ones(70),
    }
    catalogue = dataclasses.replace(dataset.catalogue, columns=columns)
    topic = catalogue.topic_names[0]
    needs = make_needs(
        [
            {"name": "cheap", "wordings": "Cheap.", "gain": "interest * exp(-unit_price / 20)"},
            {
                "name": "known",
                "wordings": "Known.",
                "gain": f"interest * popularity if '{topic}' in category else 0.01",
            },
            {"name": "branded", "wordings": "Acme.", "gain": "interest * (default(brand, 'x') == 'acme')"},
        ]
    )
    tokenizer = build_tokenizer(catalogue, ["Cheap."], needs=[need.name for need in needs])
    model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
    options = {"encoding": "item_token", "show_titles": False, "show_rising": False}
    builder = PromptBuilder(tokenizer, described=True, described_needs=needs, **options)
    data = dataclasses.replace(dataset, catalogue=catalogue)
    info = RunInfo.of(ExperimentConfig(output=str(tmp_path)), builder, data, needs)
    RunFolder(tmp_path).save(model, tokenizer, info, data)
    assert set(json.loads((tmp_path / "catalogue.json").read_text())["columns"]) == {"unit price", "brand"}
    popularity = np.bincount(dataset.log.items, minlength=70).astype(np.float32)
    lists = [
        dataclasses.replace(with_saved_trend(lst, dataset), popularity=popularity[lst.candidates])
        for lst in dataset.test[:3]
    ]
    ranker = Ranker(tmp_path)
    ranker.rank([as_request(lst, dataset, "cheap") for lst in lists])
    ((_, candidates, _),) = decoded["sample"].calls
    assert candidates == [builder.candidate_tokens_of(lst, catalogue) for lst in lists]
    named = {
        text for of_list in candidates for (ids,) in of_list for text in tokenizer.convert_ids_to_tokens(list(ids))
    }
    assert len([text for text in named if text.startswith("<need:")]) > 6

    new = {"id": "new", "title": "A new one", "topics": [topic]}
    ranker.rank([{"need": "cheap", "history": [], "candidates": [new, *catalogue.ids[1:3]]}])
    ((first, *_),) = decoded["sample"].calls[1][1]
    assert "<need:cheap 0>" in tokenizer.convert_ids_to_tokens(list(first[0]))
    table = Catalogue(("new",), ("A new one",), ((topic,),), {"unit price": np.array([0.0])})
    Ranker(tmp_path, table).rank([{"need": "cheap", "history": [], "candidates": ["new", *catalogue.ids[1:3]]}])
    ((first, *_),) = decoded["sample"].calls[2][1]
    assert "<need:cheap 12>" in tokenizer.convert_ids_to_tokens(list(first[0]))


def test_misspelt_keys_and_repeated_candidates_are_warned_of_and_cost_nothing(run, dataset, decoded):
    ranker = Ranker(run[0])
    a, b, c, d = dataset.catalogue.ids[:4]
    request = {"need": "interest", "history": [d], "candidates": [a, {"id": b}, a, c, {"id": a}], "session": 7}
    assert "warning" not in ranker.rank([{**request, "candidates": [a, b, c]}])[0]
    (answer,) = ranker.rank([{**request, "canditates": [], "quary": "x"}])
    assert sorted(one["id"] for one in answer["ranking"]) == sorted([a, b, c])
    assert f"'candidates' has the id {a!r} more than once: the first counts" in answer["warning"]
    assert "'canditates' means nothing in a request and was ignored: 'candidates'?" in answer["warning"]
    assert "'quary' means nothing in a request and was ignored: 'query'?" in answer["warning"]
    assert "session" not in answer["warning"]
    assert len(decoded["sample"].calls[-1][1][0]) == 3
