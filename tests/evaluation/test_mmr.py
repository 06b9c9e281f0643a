"""Maximal marginal relevance by hand, and its trade-off."""

import numpy as np

from flexrec.data.lists import RankingList
from flexrec.evaluation.mmr import MMR


def make_list(candidates):
    nothing = np.zeros(len(candidates), dtype=np.float32)
    items = np.array(candidates, dtype=np.int64)
    return RankingList(1, 0.0, np.zeros(0, dtype=np.int64), items, nothing, nothing, nothing)


def test_mmr_trades_relevance_for_what_is_unlike():
    """By hand: relevance over its largest, cosines of topics; the first is the most relevant at any trade-off."""
    topics = np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [1.0, 1.0], [0.0, 0.0]])
    candidates, relevance = np.array([0, 1, 2, 3, 4]), np.array([2.0, 1.8, 1.0, 1.2, 0.2])
    assert MMR(topics, 1.0).order(candidates, relevance).tolist() == [0, 1, 3, 2, 4]
    # At 1/2 behind item 0: 0.45 - 0.5, 0.25, 0.3 - 0.5 x 0.707 and 0.05; then behind 2 as well ..
    assert MMR(topics, 0.5).order(candidates, relevance).tolist() == [0, 2, 4, 1, 3]
    reverse = MMR(topics, 0.5).order(candidates[::-1], relevance[::-1])
    assert candidates[::-1][reverse].tolist() == [0, 2, 4, 1, 3], "items are told apart by their topics"


def test_mmr_is_tuned_on_the_lists_it_is_given():
    """Where gains say that topics are to differ, the trade-off falls; where relevance is all, it is 1."""
    topics = np.eye(3)[[0, 0, 0, 1, 2]]
    lists = [make_list(candidates=range(5)), make_list(candidates=range(4))]
    relevances = [np.array([1.0, 0.9, 0.8, 0.6, 0.5]), np.array([1.0, 0.9, 0.8, 0.5])]
    diverse = MMR.tuned(topics, lists, relevances, relevances, "alpha_ndcg@3")
    assert diverse.order(lists[0].candidates, relevances[0])[:3].tolist() == [0, 3, 4]
    of_one_topic = np.ones((5, 1))
    scattered = [np.array([0.0, 0.0, 1.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0, 0.0])]
    alike = MMR.tuned(of_one_topic, lists, [-r.argsort().astype(float) + 5 for r in relevances], scattered, "err_ia@3")
    assert alike.trade_off in MMR.TRADE_OFFS
