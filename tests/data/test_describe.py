"""What a data set holds, in rows and in a figure."""

import numpy as np
import pytest

from flexrec.data import Catalogue, Interactions, RankingDataset, RankingList, describe, draw_description
from flexrec.task.needs import NEEDS


def make_list(user, interest, query=""):
    return RankingList(
        user=user,
        time=1.6e9,
        history=np.array([0]),
        candidates=np.arange(len(interest)),
        interest=np.array(interest, dtype=np.float32),
        popularity=np.ones(len(interest), dtype=np.float32),
        trend=np.zeros(len(interest), dtype=np.float32),
        query=query,
    )


def make_dataset():
    catalogue = Catalogue(("a", "b", "c", "d"), ("A", "B", "C", "D"), (("x",), ("y",), ("x", "z"), ()))
    log = Interactions(
        np.array([0, 0, 1]),
        np.array([0, 1, 0]),
        np.array([1.0, 0.0, 0.5], np.float32),
        np.array([1.5e9, 1.55e9, 1.6e9]),
    )
    train = [make_list(0, [1.0, np.nan, 0.25, 0.0]), make_list(1, [0.0, np.nan])]
    test = [make_list(7, [0.5, 0.5, np.nan], query="red")]
    return RankingDataset(
        "made",
        catalogue,
        log,
        train,
        test,
        "zero",
        unsupported={"trend": "there are no times"},
        trend=np.zeros(4, np.float32),
    )


def test_rows_say_what_was_counted():
    rows = {row.what: (row.train, row.test) for row in describe(make_dataset(), NEEDS.values())}
    assert rows["items"] == ("4", "")
    assert rows["items with an interaction"] == ("2", "")
    assert rows["categories"] == ("3", "")
    assert rows["items with a category"] == ("3 (75%)", "")
    assert rows["users"] == ("2", "1")
    assert rows["interactions"] == ("3", "")
    assert rows["sparsity"][0].startswith("62.5000%")
    assert rows["interactions of a user"][0] == "1 to 2, median 1.5, mean 1.5"
    assert rows["period"][0] == "2017-07-14 to 2020-09-13"
    assert rows["lists"] == ("2", "1")
    assert rows["candidates of a list"] == ("2 to 4, median 3, mean 3.0", "3")
    assert rows["of them with feedback"] == ("1 to 3, median 2, mean 2.0", "2")
    assert rows["interest that is known"][0] == "mean 0.31, above 0: 50%, 1/2 or more: 25%"
    assert rows["lists with a query"] == ("0", "1")
    assert rows["need interest"] == (
        "1 lists, 2.0 candidates with a gain in each",
        "1 lists, 2.0 candidates with a gain in each",
    )
    # Only b's topic y and c's z are new to a history of a.
    assert rows["need explore"][1] == "1 lists, 1.0 candidates with a gain in each"
    assert rows["need trend"] == ("not possible: there are no times", "")


def test_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    draw_description(make_dataset(), tmp_path / "data.png")
    assert (tmp_path / "data.png").read_bytes().startswith(b"\x89PNG")
