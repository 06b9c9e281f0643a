"""Reranking as the clients of Cohere, Jina and vLLM speak it, in terms of a ranker's requests.

The query is the need: a known name, a mixture, or words. Where a run was trained to search, words are what is searched
for. Documents are items of the run's catalogue where they have an id or a title of one, and new items by their text
otherwise. Beyond what those clients send, ``user`` or ``history`` say for whom it is.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from flexrec.serving.ranker import Ranker
from flexrec.serving.refused import Refused
from flexrec.serving.requests import shown
from flexrec.task.mixtures import is_mixture

MAX_DOCUMENTS = 1000
SEARCH = "search"  # the need that takes a query of its own


class Reranking(NamedTuple):
    """A body that was understood."""

    request: dict[str, Any]  # for the ranker, whose candidates are the documents, each once
    candidate: list[int]  # of every document
    documents: list[Any]
    top_n: int | None
    return_documents: bool
    model: str


def read_reranking(body: Any, ranker: Ranker) -> Reranking:
    """What a body asks for; a Refused names the field that is not as it must be."""
    if not isinstance(body, dict):
        raise Refused(422, f"the body must be a JSON object, got {_kind(body)}")
    query = body.get("query")
    if not isinstance(query, str) or not query.strip():
        raise Refused.at("query", f"must be what is asked for, in words or a need's name, got {shown(query)}")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise Refused.at("model", f"must be a string, got {_kind(model)}")
    given = body.get("documents")
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_DOCUMENTS:
        got = f"{len(given)} of them" if isinstance(given, list) else _kind(given)
        raise Refused.at("documents", f"must be a list of 1 to {MAX_DOCUMENTS} texts or objects, got {got}")
    top_n = body.get("top_n")
    if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1):
        raise Refused.at("top_n", f"must be a positive whole number, got {shown(top_n)}")
    return_documents = body.get("return_documents")
    if return_documents is not None and not isinstance(return_documents, bool):
        raise Refused.at("return_documents", f"must be true or false, got {shown(return_documents)}")
    fields = body.get("rank_fields")
    if fields is not None and (not isinstance(fields, list) or not all(isinstance(one, str) for one in fields)):
        raise Refused.at("rank_fields", f"must be a list of strings, got {shown(fields)}")

    candidates: list[Any] = []
    at: dict[Any, int] = {}
    candidate = []
    for n, document in enumerate(given):
        key, entry = _candidate(document, f"documents[{n}]", fields, ranker)
        if key not in at:
            at[key] = len(candidates)
            candidates.append(entry)
        candidate.append(at[key])
    request = {**_need(query, ranker), **_asker(body), "candidates": candidates}
    return Reranking(request, candidate, given, top_n, bool(return_documents), model or "flexrec")


def _candidate(document: Any, where: str, fields: list[str] | None, ranker: Ranker) -> tuple[Any, Any]:
    """What makes a document the same as another, and the candidate that it is."""
    if isinstance(document, str):
        document = {"text": document}
    if not isinstance(document, dict):
        raise Refused.at(where, f"must be a text or an object with a 'text' or a 'title', got {_kind(document)}")
    item_id = document.get("id")
    if item_id is not None and (isinstance(item_id, bool) or not isinstance(item_id, (str, int))):
        raise Refused.at(f"{where}.id", f"must be a string or a whole number, got {shown(item_id)}")
    name, text = _text(document, where, fields)
    topics = document.get("topics", [])
    if not isinstance(topics, list) or not all(isinstance(topic, str) for topic in topics):
        raise Refused.at(f"{where}.topics", f"must be a list of strings, got {shown(topics)}")
    told = {"topics": topics} if topics else {}
    known = ranker.items
    if item_id is not None and str(item_id) in known:
        return str(item_id), {"id": str(item_id), **({"title": text} if text else {}), **told}
    if not text:
        asked = f"{where}.{name}"
        if item_id is not None and name not in document:
            raise Refused.at(asked, f"is missing, and the id {shown(item_id)} is not in the run's catalogue")
        raise Refused.at(asked, f"must be a text that is not empty, got {shown(document.get(name))}")
    if (found := ranker.id_titled(text)) is not None:
        return found, {"id": found, **told}
    key = (text, tuple(topics))
    return key, {"id": _free(where, known), "title": text, **told}


def _text(document: Mapping[str, Any], where: str, fields: list[str] | None) -> tuple[str, str]:
    """By which key a document is read, and what is there."""
    names = [name for name in fields or () if name in document]
    names = names or ["text" if "text" in document or "title" not in document else "title"]
    for name in names:
        if not isinstance(document.get(name, ""), str):
            raise Refused.at(f"{where}.{name}", f"must be a string, got {_kind(document[name])}")
    return names[0], " ".join(document.get(name, "").strip() for name in names).strip()


def _free(name: str, known: Mapping[str, Any]) -> str:
    """The name, or one like it, that no item has as its id."""
    while name in known:
        name += "'"
    return name


def _need(query: str, ranker: Ranker) -> dict[str, Any]:
    """The need that a query is."""
    known, name = ranker.needs, query.strip()
    if name in known and name != SEARCH:
        return {"need": name}
    if SEARCH in ranker.info.needs:
        return {"need": SEARCH, "query": query}
    return {"need": name} if is_mixture(name) and any(one in name for one in known) else {"need": {"words": query}}


def _asker(body: Mapping[str, Any]) -> dict[str, Any]:
    """For whom it is: nobody known, if the body does not say."""
    return {name: body[name] for name in ("user", "history") if name in body} or {"history": []}


def response_of(asked: Reranking, answer: Mapping[str, Any], version: str) -> dict[str, Any]:
    """What the clients parse: documents by their index, the most relevant first."""
    if "error" in answer:
        raise Refused.by_ranker(answer["error"].replace("'need'", "'query'"))
    scores = [answer["scores"][c]["score"] for c in asked.candidate]
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], n))[: asked.top_n]
    results = [{"index": n, "relevance_score": scores[n], **_document(asked, n)} for n in order]
    return {
        "id": str(uuid.uuid4()),
        "model": asked.model,
        "object": "list",
        "results": results,
        "usage": {"prompt_tokens": answer["tokens"], "total_tokens": answer["tokens"]},
        "meta": {
            "api_version": {"version": version},
            "billed_units": {"search_units": 1},
            **({"warnings": [answer["warning"]]} if "warning" in answer else {}),
        },
    }


def _document(asked: Reranking, n: int) -> dict[str, Any]:
    if not asked.return_documents:
        return {}
    document = asked.documents[n]
    return {"document": {"text": document} if isinstance(document, str) else document}


def _kind(value: Any) -> str:
    """What a value is in JSON's words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "nothing"}
    return kinds.get(type(value), "a number")
