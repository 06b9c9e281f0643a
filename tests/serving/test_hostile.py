"""Hostile bodies: each gets an answer that says what is wrong, and the server goes on."""

import json

import pytest

JSON = {"Content-Type": "application/json"}


def good(dataset, **changes):
    ids = dataset.catalogue.ids
    return {"need": "interest", "history": list(ids[:2]), "candidates": list(ids[3:6]), **changes}


def text(request):
    return json.dumps(request).encode()


HOSTILE = {
    "nothing": (lambda d: b"", 400, "no valid JSON"),
    "half of it": (lambda d: text(good(d))[:40], 400, "no valid JSON"),
    "more after it": (lambda d: text(good(d)) * 2, 400, "Extra data"),
    "invalid UTF-8": (lambda d: b'{"need": "\xff\xfe"}', 400, "no valid UTF-8: byte 0xff"),
    "UTF-16": (lambda d: json.dumps(good(d)).encode("utf-16"), 400, "no valid UTF-8"),
    "nesting": (lambda d: b"[" * 100_000, 400, "nested too deeply"),
    "nesting in an object": (lambda d: b'{"need":' * 50_000, 400, "nested too deeply"),
    "a long integer": (lambda d: b'{"need": ' + b"7" * 5000 + b"}", 400, "integer"),
    "NaN": (lambda d: b'{"need": "interest", "candidates": [NaN]}', 400, "NaN is no number"),
    "infinity": (lambda d: b'{"need": "interest", "candidates": [-Infinity]}', 400, "-Infinity is no number"),
    "a large float": (
        lambda d: b'{"need": "interest", "history": [1e999], "candidates": ["v00001"]}',
        422,
        "must be an id",
    ),
    "a key twice": (lambda d: b'{"need": "a", "need": "b"}', 400, "the key 'need' stands more than once"),
    "a lone surrogate": (lambda d: text(good(d, need="\udfff please now")), 400, "surrogate"),
    "a lone surrogate as a key": (lambda d: text(good(d, **{"\ud800": 1})), 400, "surrogate"),
    "a text": (lambda d: b'"hello"', 422, "must be a request, a JSON object, or a list of such"),
    "a number": (lambda d: b"17", 422, "must be a request"),
    "null": (lambda d: b"null", 422, "must be a request"),
    "an empty list": (lambda d: b"[]", 422, "must be a request"),
    "an empty object": (lambda d: b"{}", 422, "must be a request"),
    "no candidates": (lambda d: text(good(d, candidates=[])), 422, "'candidates' must be a list"),
    "candidates in words": (lambda d: text(good(d, candidates="all")), 422, "'candidates' must be a list"),
    "candidates as an object": (lambda d: text(good(d, candidates={"0": "a"})), 422, "'candidates' must be a list"),
    "a list as an id": (lambda d: text(good(d, candidates=[{"id": ["8"]}])), 422, "'candidates[0].id' must be an id"),
    "null as a candidate": (lambda d: text(good(d, candidates=[None])), 422, "'candidates[0]' must be an id"),
    "a need as a number": (lambda d: text(good(d, need=7)), 422, "'need' must be the name"),
    "thousands of candidates": (
        lambda d: text(good(d, candidates=[{"id": str(i), "title": "x"} for i in range(5000)])),
        422,
        "512 positions",
    ),
    "a long title": (lambda d: text(good(d, candidates=[{"id": "a", "title": "word " * 20_000}])), None, ""),
    "a long need": (lambda d: text(good(d, need="word " * 20_000)), 422, "512 positions"),
    "a long body": (lambda d: text(good(d, more="x" * (5 * 2**20))), 413, "a body has at most 4194304 bytes"),
    "many requests": (lambda d: text([good(d)] * 300), 413, "a list of requests has at most 256, got 300"),
    "a wrong top_n": (lambda d: text(good(d, top_n=1e9)), 422, "'top_n' must be a positive whole number"),
}


@pytest.mark.parametrize(("make", "status", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_body_is_answered(client, dataset, make, status, message):
    answer = client.post("/rank", content=make(dataset), headers=JSON)
    assert answer.status_code == (status or answer.status_code)
    assert answer.status_code < 500
    assert answer.headers["content-type"] == "application/json"
    said = answer.json()
    if status is not None:
        assert message in said["message"]
        assert len(said["message"]) < 400
        assert "\n" not in said["message"]
    assert set(said) <= {"message", "path", "ranking", "warning"}
    assert client.post("/rank", json=good(dataset)).status_code == 200, "the server goes on"


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
@pytest.mark.parametrize("name", [name for name, (_, status, _) in HOSTILE.items() if status == 400])
def test_reranking_takes_no_other_json(client, dataset, name, path):
    make, status, message = HOSTILE[name]
    answer = client.post(path, content=make(dataset), headers=JSON)
    assert answer.status_code == status
    assert message in answer.json()["message"]


def test_a_bad_request_of_a_list_costs_no_other(client, dataset):
    bad = [7, None, [], {}, good(dataset, candidates=[]), good(dataset, need="no-such-need")]
    answers = client.post("/rank", json=[good(dataset), *bad, good(dataset)]).json()
    assert "ranking" in answers[0]
    assert answers[0] == answers[-1]
    assert all(set(answer) == {"error"} for answer in answers[1:-1])


KINDS = [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x" * 99]


@pytest.mark.parametrize("kind", KINDS)
def test_bodies_that_are_not_said_to_be_json(client, dataset, kind):
    """Among them all that a page of another site could send without asking."""
    headers = {} if kind is None else {"Content-Type": kind}
    answer = client.post("/rank", content=text(good(dataset)), headers=headers)
    assert answer.status_code == 415
    assert answer.json()["message"].startswith("the content type must be application/json")
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    accepted = client.post("/rank", content=text(good(dataset)), headers=headers)
    assert accepted.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v3/rerank", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/users/%00", 404),
        ("GET", "/users/" + "x" * 5000, 404),
        ("GET", "/rank", 405),
        ("PUT", "/v1/rerank", 405),
        ("DELETE", "/users/1", 405),
        ("POST", "/", 405),
        ("OPTIONS", "/rank", 405),
        ("GET", "/items?limit=nan", 422),
        ("GET", "/items?sample=" + "9" * 5000, 422),
        ("GET", "/users?limit=-1", 422),
        ("GET", "/items?query=%ff%fe&limit=1", 200),
        ("HEAD", "/health", 200),
    ],
)
def test_paths_and_methods(client, method, path, status):
    answer = client.request(method, path)
    assert answer.status_code == status
    if status >= 400:
        assert set(answer.json()) <= {"message", "path"}
        assert len(answer.json()["message"]) < 6000
    if status == 405:
        assert answer.headers["allow"]
