"""The bookkeeping of rankings in plain Python, as one writes it for transformers' prefix function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Candidates = Sequence[Sequence[Sequence[int]]]


@dataclass
class Node:
    """Of a trie of dicts; ``items`` lie at or below it, ``ends`` are those that end at it."""

    children: dict[int, Node] = field(default_factory=dict)
    items: set[int] = field(default_factory=set)
    ends: list[int] = field(default_factory=list)


def trie(candidates: Sequence[Sequence[int]]) -> Node:
    root = Node()
    for item, tokens in enumerate(candidates):
        node = root
        node.items.add(item)
        for token in tokens:
            node = node.children.setdefault(token, Node())
            node.items.add(item)
        node.ends.append(item)
    return root


class PythonState:
    """One ranking of all candidates in progress; separator and end are one token each, which no candidate holds."""

    def __init__(self, root: Node, separator: int, end: int) -> None:
        self.root, self.separator, self.end = root, separator, end
        self.left = set(root.items)
        self.node = root
        self.after_item = False

    def advance(self, token: int) -> None:
        if token in (self.separator, self.end):
            if not self.after_item:  # a longer candidate was still possible
                self.place()
            self.after_item = False
            return
        self.node = self.node.children[token]
        if self.left.intersection(self.node.items) <= set(self.node.ends):
            self.place()
            self.after_item = True

    def place(self) -> None:
        self.left.remove(next(item for item in self.node.ends if item in self.left))
        self.node = self.root

    def allowed(self) -> list[int]:
        if self.after_item:
            return [self.separator if self.left else self.end]
        tokens = [token for token, child in self.node.children.items() if not child.items.isdisjoint(self.left)]
        if not self.left.isdisjoint(self.node.ends):
            tokens.append(self.separator if len(self.left) > 1 else self.end)
        return tokens


def prefix_function(
    candidates: Candidates, prompt_length: int, separator: int, end: int
) -> Callable[[int, torch.Tensor], list[int]]:
    """For ``prefix_allowed_tokens_fn``: called with a row's tokens, which it has to walk from the beginning.

    No state is carried from call to call, because the rows of a beam search change places between them.
    """
    roots = [trie(lst) for lst in candidates]

    def allowed(batch_id: int, input_ids: torch.Tensor) -> list[int]:
        state = PythonState(roots[batch_id], separator, end)
        for token in input_ids[prompt_length:].tolist():
            state.advance(token)
        return state.allowed()

    return allowed


def parse(tokens: Sequence[int], root: Node) -> list[int]:
    """First mentions, the longest match at every place, then what is missing."""
    ranking: dict[int, None] = {}
    at = 0
    while at < len(tokens):
        node, found, length = root, None, 1
        for depth, token in enumerate(tokens[at:], start=1):
            child = node.children.get(token)
            if child is None:
                break
            node = child
            if node.ends:
                found, length = node.ends[0], depth
        if found is not None:
            ranking.setdefault(found)
        at += length
    return [*ranking, *sorted(root.items - ranking.keys())]
