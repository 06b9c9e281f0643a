"""The server: what the clients of others get from it, what its own routes say, limits, and how it stops."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from servers import serving

from flexrec import cli
from flexrec.serving import server as module
from flexrec.serving.options import ServeOptions
from flexrec.serving.ranker import Ranker
from flexrec.serving.refused import Refused
from flexrec.serving.rerank import read_reranking
from flexrec.task.needs import get_need

DOCUMENTS = ["Night market", {"text": "Deep sky comets"}, {"title": "Reef steps", "topics": ["diving"]}, "Tango"]


def test_cohere_s_client_of_the_first_version(url):
    cohere = pytest.importorskip("cohere", reason="the extra 'test'")
    asked = cohere.Client(api_key="any", base_url=url)
    found = asked.rerank(query="interest", documents=DOCUMENTS, top_n=3, return_documents=True)
    scores = [one.relevance_score for one in found.results]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    texts = ["Night market", "Deep sky comets", None, "Tango"]
    assert [one.document.text if texts[one.index] else None for one in found.results] == [
        texts[one.index] for one in found.results
    ]
    assert found.meta.api_version.version == "1"
    with pytest.raises(cohere.UnprocessableEntityError) as error:
        asked.rerank(query="interest", documents=[])
    assert error.value.body["path"] == "documents"


def test_cohere_s_client_of_the_second_version(url, dataset, ranker):
    """Titles of the catalogue are its items."""
    cohere = pytest.importorskip("cohere", reason="the extra 'test'")
    titles, ids = dataset.catalogue.titles[4:9], dataset.catalogue.ids[4:9]
    found = cohere.ClientV2(api_key="any", base_url=url).rerank(
        model="a-name", query="What is on the rise?", documents=list(titles)
    )
    (alone,) = ranker.score([{"need": "What is on the rise?", "history": [], "candidates": list(ids)}])
    expected = {n: one["score"] for n, one in enumerate(alone["scores"])}
    assert {one.index: one.relevance_score for one in found.results} == pytest.approx(expected, abs=1e-5)
    assert [one.index for one in found.results] == sorted(expected, key=lambda n: -expected[n])
    assert sum(one.relevance_score for one in found.results) == pytest.approx(1, abs=1e-4)
    assert found.meta.api_version.version == "2"


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_what_clients_of_jina_and_vllm_read(client, path):
    body = {"model": "m", "query": "trend", "documents": DOCUMENTS, "top_n": 2, "return_documents": True}
    answer = client.post(path, json=body).raise_for_status().json()
    assert (answer["model"], answer["object"]) == ("m", "list")
    assert answer["id"]
    assert answer["usage"]["total_tokens"] > 0
    for one in answer["results"]:
        assert set(one) == {"index", "relevance_score", "document"}
        given = DOCUMENTS[one["index"]]
        assert one["document"] == ({"text": given} if isinstance(given, str) else given)
    assert "document" not in client.post(path, json={**body, "return_documents": False}).json()["results"][0]


def test_documents_that_are_the_same_are_worth_the_same(client, dataset):
    title, item_id = dataset.catalogue.titles[3], dataset.catalogue.ids[3]
    documents = [title, "Tango", {"id": item_id}, {"text": title}, "Tango", {"id": item_id, "text": title}]
    results = client.post("/v1/rerank", json={"query": "interest", "documents": documents}).json()["results"]
    scores = {one["index"]: one["relevance_score"] for one in results}
    assert len(scores) == 6
    assert scores[0] == scores[2] == scores[3] == scores[5]
    assert scores[1] == scores[4] != scores[0]
    assert scores[0] + scores[1] == pytest.approx(1, abs=1e-5)


def test_reranking_for_somebody(client, dataset, ranker):
    user, documents = next(iter(ranker.users)), list(dataset.catalogue.titles[:6])
    body = {"query": "interest", "documents": documents}
    nobody, somebody, told = (
        client.post("/rerank", json={**body, **more}).json()["results"]
        for more in ({}, {"user": user}, {"history": ranker.users[user]})
    )
    assert somebody == told != nobody


WRONG = {
    "query": ({"query": 3}, "query: must be what is asked for, in words or a need's name, got 3"),
    "no query": ({"query": None}, "query: must be what is asked for, in words or a need's name, got None"),
    "model": ({"model": []}, "model: must be a string, got a list"),
    "documents": ({"documents": "x"}, "documents: must be a list of 1 to 1000 texts or objects, got a string"),
    "no documents": ({"documents": []}, "documents: must be a list of 1 to 1000 texts or objects, got 0 of them"),
    "many": ({"documents": ["x"] * 1001}, "documents: must be a list of 1 to 1000 texts or objects, got 1001 of them"),
    "a number": (
        {"documents": ["a", 7]},
        "documents[1]: must be a text or an object with a 'text' or a 'title', got a number",
    ),
    "text": ({"documents": ["a", {"text": 7}]}, "documents[1].text: must be a string, got a number"),
    "title": ({"documents": [{"title": None}]}, "documents[0].title: must be a string, got nothing"),
    "empty": ({"documents": ["a", " "]}, "documents[1].text: must be a text that is not empty, got ' '"),
    "id": ({"documents": [{"id": [], "text": "a"}]}, "documents[0].id: must be a string or a whole number, got []"),
    "unknown": (
        {"documents": [{"id": "nobody's"}]},
        "documents[0].text: is missing, and the id \"nobody's\" is not in the run's catalogue",
    ),
    "topics": (
        {"documents": [{"text": "a", "topics": "x"}]},
        "documents[0].topics: must be a list of strings, got 'x'",
    ),
    "top_n": ({"top_n": 0}, "top_n: must be a positive whole number, got 0"),
    "return": ({"return_documents": 1}, "return_documents: must be true or false, got 1"),
    "fields": ({"rank_fields": "title"}, "rank_fields: must be a list of strings, got 'title'"),
    "history": ({"history": 3}, "'history' must be a list of ids or of {'id': .., 'title': ..}, oldest first"),
    "in history": ({"history": ["a", {}]}, "'history[0]' has no 'title', and 'a' is neither an id nor a title"),
    "user": ({"user": "nobody"}, "user 'nobody' is not in the log of this run: give a 'history' instead"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_field_is_named(client, changes, message):
    answer = client.post("/v1/rerank", json={"query": "interest", "documents": ["a", "b"], **changes})
    assert answer.status_code == 422
    said = answer.json()
    assert said["message"].startswith(message)
    path = message.partition(":")[0] if ": must" in message or ": is missing" in message else said["path"]
    assert said["path"] == path
    assert re.match(r"^(user|history|query|model|documents|top_n|return_documents|rank_fields)\b", path)


def test_fields_of_documents_to_read(client):
    documents = [{"title": "Tango", "year": "1999", "text": "never"}, {"title": "Reef"}]
    both = client.post("/rerank", json={"query": "trend", "documents": documents, "rank_fields": ["title", "year"]})
    same = client.post("/rerank", json={"query": "trend", "documents": ["Tango 1999", "Reef"]})
    assert both.json()["results"] == same.json()["results"]


def test_words_are_what_is_searched_for_where_a_run_searches():
    names = ("interest", "search")
    searching = SimpleNamespace(
        needs={name: get_need(name) for name in names},
        info=SimpleNamespace(needs=["search"]),
        items={},
        id_titled=lambda title: None,
    )

    def need_of(query):
        request = read_reranking({"query": query, "documents": ["a"]}, searching).request
        return {name: request[name] for name in ("need", "query") if name in request}

    assert need_of("red shoes") == {"need": "search", "query": "red shoes"}
    assert need_of("shoes") == {"need": "search", "query": "shoes"}
    assert need_of(" interest ") == {"need": "interest"}
    searching.info.needs = ["interest"]
    assert need_of("dragons") == {"need": {"words": "dragons"}}
    assert need_of("0.5 interest + 0.5 search") == {"need": "0.5 interest + 0.5 search"}
    with pytest.raises(Refused, match="must be a JSON object, got a list"):
        read_reranking([], searching)


def test_an_item_without_a_token_is_named_by_its_document(make_run, dataset):
    with serving(Ranker(make_run("item_token"))) as url:
        body = {"query": "interest", "documents": [dataset.catalogue.titles[0], "Never seen"]}
        answer = httpx().post(f"{url}/rerank", json=body)
    assert answer.status_code == 422
    assert answer.json()["path"] == "documents[1]"
    assert "no token of its own" in answer.json()["message"]


def httpx():
    return pytest.importorskip("httpx", reason="the extra 'test'")


def test_ranking_is_that_of_the_ranker(client, dataset, ranker):
    ids = dataset.catalogue.ids
    request = {"need": "trend", "history": list(ids[:3]), "candidates": list(ids[4:9]), "top_n": 4}
    assert client.post("/rank", json=request).json() == ranker.rank([request])[0]
    bad = {**request, "candidates": []}
    answer = client.post("/rank", json=bad)
    assert answer.status_code == 422
    assert answer.json() == {
        "message": "'candidates' must be a list of at least one {'id': .., 'title': ..}",
        "path": "candidates",
    }
    one, wrong, other = client.post("/rank", json=[request, bad, request]).json()
    assert [item["id"] for item in one["ranking"]] == [item["id"] for item in other["ranking"]]
    assert set(wrong) == {"error"}


def test_needs_users_and_items_are_listed(client, dataset, ranker):
    needs = client.get("/needs").json()["needs"]
    assert (
        [need["name"] for need in needs if need["trained"]] == ["interest", "trend"] == [n["name"] for n in needs[:2]]
    )
    assert needs[0]["wording"] == get_need("interest").wordings[0]
    assert "explore" in [need["name"] for need in needs]
    user = next(iter(ranker.users))
    users = client.get("/users", params={"query": user}).json()
    assert users["users"][0] == {"id": user, "items": len(ranker.users[user])}
    assert client.get("/users?limit=3").json()["total"] == len(ranker.users)
    assert len(client.get("/users?limit=3").json()["users"]) == 3
    history = client.get(f"/users/{user}").json()["history"]
    assert [one["id"] for one in history] == [one["id"] for one in ranker.users[user]]
    assert history[0]["title"] == ranker.items[history[0]["id"]].title
    assert client.get("/users/nobody").json() == {"message": "there is no user 'nobody' in the log of this run"}
    assert client.get("/users/nobody").status_code == 404

    item_id, title = dataset.catalogue.ids[7], dataset.catalogue.titles[7]
    for query in (item_id, title, " ".join(reversed(title.upper().split()))):
        found = client.get("/items", params={"query": query}).json()["items"]
        assert found[0] == {"id": item_id, "title": title, "topics": list(dataset.catalogue.topics[7])}
    topic = dataset.catalogue.topic_names[0]
    assert client.get("/items", params={"query": topic, "limit": 1}).json()["total"] > 1
    first, again, other = (client.get(f"/items?sample=9&seed={seed}").json()["items"] for seed in (1, 1, 2))
    assert len({one["id"] for one in first}) == 9
    assert first == again != other
    assert len(client.get("/items?sample=9999").json()["items"]) == 70
    wrong = client.get("/items?sample=-1")
    assert (wrong.status_code, wrong.json()["path"]) == (422, "sample")


def test_what_watches_the_server_is_told(ranker):
    with serving(ranker, ServeOptions(max_wait=100)) as url, httpx().Client(base_url=url) as client:
        assert client.get("/health").json() == {
            "status": "ok",
            "needs": ["interest", "trend"],
            "items": 70,
            "users": len(ranker.users),
            "waiting": 0,
        }
        body = {"query": "trend", "documents": ["a", "b"]}
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: client.post("/v1/rerank", json=body).raise_for_status(), range(4)))
        client.get("/nothing")
        client.get("/users/17")
        text = client.get("/metrics").text
    assert 'flexrec_requests_total{route="/v1/rerank",status="200"} 4.0' in text
    assert 'flexrec_requests_total{route="other",status="404"} 1.0' in text
    assert 'flexrec_requests_total{route="/users/{id}",status=' in text
    assert 'flexrec_request_seconds_count{route="/v1/rerank"} 4.0' in text
    assert "flexrec_queue_length 0.0" in text
    assert "flexrec_batch_size_sum 4.0" in text
    batches = float(re.search(r"flexrec_batch_size_count (\S+)", text)[1])
    assert batches < 4, "what arrives together is ranked together"


def test_limits_of_a_server(ranker, monkeypatch):
    """A full queue, a slow answer, a long body; the server goes on."""
    slow = SimpleNamespace(**{name: getattr(ranker, name) for name in ("items", "users", "needs", "info", "id_titled")})
    slow.rank = slow.score = lambda requests: time.sleep(0.4) or ranker.score(requests)
    body = {"query": "trend", "documents": ["a", "b"]}
    options = ServeOptions(max_batch=1, max_wait=0, queue=1, timeout=0.6, max_body=300)
    with serving(slow, options) as url, ThreadPoolExecutor(4) as threads:

        def ask(n):
            time.sleep(0.05 * n)
            return httpx().post(f"{url}/v1/rerank", json=body)

        answers = list(threads.map(ask, range(3)))
        assert [answer.status_code for answer in answers] == [200, 504, 503]
        assert answers[1].json() == {"message": "there was no answer within 0.6 s"}
        assert answers[2].json()["message"].startswith("1 requests wait already")
        assert int(answers[2].headers["Retry-After"]) >= 1
        time.sleep(0.5)
        long = httpx().post(f"{url}/v1/rerank", json={**body, "query": "x" * 300})
        streamed = httpx().post(
            f"{url}/v1/rerank", content=iter([b"x" * 200] * 3), headers={"Content-Type": "application/json"}
        )
        assert (long.status_code, streamed.status_code) == (413, 413)
        assert long.json() == {"message": "a body has at most 300 bytes"}
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as idle:
            idle.sendall(
                b"POST /rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
            )
            assert b" 408 " in idle.recv(1000)
        assert ask(0).status_code == 200


@pytest.fixture
def started(served):
    """A server in a process of its own, and its address."""
    command = "import sys; from flexrec.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "serve", "--run", str(served), "--port", "0", "--max-batch", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        said = process.stdout.readline()
        yield process, re.search(r"http://\S+?:\d+", said)[0]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_what_is_in_flight(started, number, dataset):
    process, url = started
    ids = dataset.catalogue.ids
    requests = [{"need": "trend", "history": list(ids[:3]), "candidates": list(ids[4:40])}] * 100
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(httpx().post, f"{url}/rank", json=requests, timeout=60)
        while httpx().get(f"{url}/health").json()["waiting"] == 0:
            assert not answer.done()
        process.send_signal(number)
        answers = answer.result().raise_for_status().json()
    assert [len(one["ranking"]) for one in answers] == [36] * 100
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out.splitlines() == ["stopped"]
    assert "Traceback" not in err
    with pytest.raises(httpx().ConnectError):
        httpx().get(f"{url}/health")


def test_mistakes_are_told_in_a_line(served, monkeypatch, capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--run", str(served), "--port", str(port)]) == 2
    assert re.fullmatch(
        rf"flexrec serve: error: cannot listen at 127\.0\.0\.1, port {port} \(.+\): choose another with .*\n",
        capsys.readouterr().err,
    )
    assert cli.main(["serve", "--run", str(tmp_path / "none"), "--port", "0"]) == 2
    assert "is neither the folder of a run nor a repository's name" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert cli.main(["serve", "--run", str(served)]) == 2
    assert ".venv/bin/pip install -e '.[serve]'" in capsys.readouterr().err
    assert cli.main(["serve", "--run", str(served), "--max-batch", "0"]) == 2
    assert "max_batch must be at least 1, got 0" in capsys.readouterr().err


def test_every_option_reaches_the_server(served, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "serve", lambda folder, options: asked.append((folder, options)))
    given = {
        "host": "::1",
        "port": 81,
        "max_batch": 2,
        "max_wait": 1.5,
        "queue": 3,
        "timeout": 4.5,
        "max_body": 99,
    }
    flags = [part for name, value in given.items() for part in ("--" + name.replace("_", "-"), str(value))]
    assert cli.main(["serve", "--run", str(served), *flags]) == 0
    assert cli.main(["serve", "--run", str(served)]) == 0
    assert asked == [(str(served), ServeOptions(**given)), (str(served), ServeOptions())]
    assert json.dumps(given)
