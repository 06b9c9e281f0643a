"""Users and items, to be searched by who tries a ranker out."""

from __future__ import annotations

import random
from typing import Any

from flexrec.serving.ranker import Ranker
from flexrec.task.descriptions import Item

MOST = 200  # that are listed at once


class Lookup:
    """What a ranker knows, by a part of its name."""

    def __init__(self, ranker: Ranker) -> None:
        self._items = ranker.items
        self._folded = [(item, _folded(item)) for item in self._items.values()]
        self._histories = ranker.users
        self._users = sorted(ranker.users, key=_by_number)
        trained = set(ranker.info.needs)
        self.needs = [
            {"name": name, "wording": need.wordings[0], "trained": name in trained}
            for name, need in ranker.needs.items()
        ]

    def users(self, query: str, limit: int) -> dict[str, Any]:
        """Users whose ids have the query in them, exactly that first."""
        found = [user for user in self._users if query in user]
        found.sort(key=lambda user: user != query)
        listed = [{"id": user, "items": len(self._histories[user])} for user in found[:limit]]
        return {"users": listed, "total": len(found)}

    def history(self, user: str) -> dict[str, Any] | None:
        """What a user had, with titles, oldest first; None where nobody has this id."""
        if user not in self._histories:
            return None
        history = [
            {**_shown(self._items[event["id"]]), "interest": event["interest"]}
            for event in self._histories[user]
            if event["id"] in self._items
        ]
        return {"id": user, "history": history}

    def items(self, query: str, limit: int) -> dict[str, Any]:
        """Items whose id is the query, and those with all its words in title or topics."""
        words = query.casefold().split()
        found = [item for item, text in self._folded if item.id == query or all(word in text for word in words)]
        found.sort(key=lambda item: item.id != query)
        return {"items": [_shown(item) for item in found[:limit]], "total": len(found)}

    def sample(self, size: int, seed: int | None) -> dict[str, Any]:
        """So many items, drawn."""
        drawn = random.Random(seed).sample(list(self._items.values()), min(size, len(self._items)))
        return {"items": [_shown(item) for item in drawn], "total": len(self._items)}


def _shown(item: Item) -> dict[str, Any]:
    return {"id": item.id, "title": item.title, "topics": list(item.topics)}


def _folded(item: Item) -> str:
    return " ".join([item.title, *item.topics]).casefold()


def _by_number(user: str) -> tuple[int, str]:
    """10 behind 9."""
    return (int(user) if user.isascii() and user.isdecimal() and len(user) < 18 else 10**18, user)
