"""What is told to who asks wrongly, or too much."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PATH = re.compile(r"'((?:need|query|user|history|candidates|documents|top_n)\b[\w.\[\]]*)'")


class Refused(Exception):
    """A request that is not answered: the status, where in its body the mistake is (or nothing), and what it is."""

    def __init__(self, status: int, message: str, path: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.path, self.headers = status, message, path, dict(headers or {})

    @classmethod
    def at(cls, path: str, message: str) -> Refused:
        """Of a field that is not as it must be."""
        return cls(422, f"{path}: {message}", path)

    @classmethod
    def by_ranker(cls, error: str) -> Refused:
        """With an error of the ranker, which names the field that it speaks of, if any."""
        found = _PATH.search(error)
        return cls(422, error, found[1] if found else "")

    def body(self) -> dict[str, str]:
        return {"message": self.message, **({"path": self.path} if self.path else {})}
