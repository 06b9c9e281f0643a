"""Logs as they are found in the wild: each a small folder written by hand, read to what a person would say it means."""

import gzip
import math
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest

from flexrec.data.interactions import read_interactions
from flexrec.data.options import InteractionsOptions

FORMATS = Path(__file__).parent / "formats"
NAN = "not rated"


def read(name, **options):
    return read_interactions(FORMATS / name, InteractionsOptions(num_test_users=1, **options))


def rows_of(result):
    """{(user id, item id): [interest, ..] in order of time}, NaN as ``NAN``."""
    rows = {}
    for user, item, interest in zip(result.rows.users, result.rows.items, result.rows.interest.tolist(), strict=True):
        value = NAN if math.isnan(interest) else pytest.approx(interest, abs=1e-6)
        rows.setdefault((result.user_ids[user], result.catalogue.ids[item]), []).append(value)
    return rows


def times_of(result):
    """{(user id, item id): the last moment}."""
    return {
        (result.user_ids[u], result.catalogue.ids[i]): t
        for u, i, t in zip(result.rows.users, result.rows.items, result.rows.times.tolist(), strict=True)
    }


def utc(*moment):
    return datetime(*moment, tzinfo=timezone.utc).timestamp()


def note(result, text):
    found = [one for one in result.notes if text in one]
    assert len(found) == 1, (text, result.notes)
    assert "\n" not in found[0]
    return found[0]


def test_book_crossing_semicolons_quotes_latin_1_and_zeros():
    result = read("book_crossing")
    assert rows_of(result) == {
        ("276725", "034545104X"): [NAN],
        ("276726", "0155061224"): [0.0],
        ("276727", "0446520802"): [1.0],
        ("276729", "034545104X"): [(8 - 5.5) / 4.5],
        ("276729", "0155061224"): [NAN],
    }
    assert result.catalogue.titles[1:3] == ('Rites of "Passage"; a reader', "Les Misérables")
    assert result.catalogue.columns["Publisher"][2] == "Éditions du Seuil"
    assert result.catalogue.columns["Year-Of-Publication"].tolist() == ["2002", "2001", "0", "DK Publishing Inc"]
    assert not result.timed
    note(result, "2 ratings are 0: seen, not rated")
    note(result, "divided by ';'")
    assert "line 7: ISBN: expected an id that is among the items, got 'X000000000'" in note(result, "skipped 1 rows")


def test_zeros_may_be_ratings_by_choice():
    result = read("book_crossing", codes={})
    assert rows_of(result)["276725", "034545104X"] == [0.0]


def test_steam_without_a_line_of_names():
    result = read("steam", gain_range=(0.0, 100.0))
    skyrim, left, fallout = "The Elder Scrolls V Skyrim", "Left 4 Dead 2, Gold", "Fallout 4"
    assert rows_of(result) == {
        ("151603712", skyrim): [NAN, 1.0],  # bought, then played for 273 hours
        ("151603712", left): [NAN],
        ("59945701", fallout): [NAN, 0.87],
        ("53875128", fallout): [NAN, 0.005],
    }
    assert set(result.catalogue.titles) == {skyrim, left, fallout}


def test_goodbooks_without_times():
    result = read("goodbooks")
    assert rows_of(result) == {
        ("1", "258"): [1.0],
        ("2", "4081"): [0.5],
        ("2", "260"): [1.0],
        ("2", "258"): [0.0],
        ("4", "260"): [0.0],
    }
    assert not result.timed
    assert result.catalogue.titles[2] == "I am Charlotte Simmons"
    assert result.catalogue.columns["original_publication_year"].tolist() == [2001.0, 1936.0, 1987.0]
    np.testing.assert_array_equal(result.catalogue.columns["isbn"], [143034901.0, 671027034.0, np.nan])


def test_myanimelist_minus_one_is_seen_and_not_rated():
    result = read("myanimelist")
    assert rows_of(result) == {
        ("1", "20"): [NAN],
        ("1", "24"): [1.0],
        ("2", "20"): [(8 - 5.5) / 4.5],
        ("2", "24"): [NAN],
        ("3", "20"): [0.0],
    }
    assert result.catalogue.topics == (("Action", "Comedy", "Shounen"), ("Comedy", "Romance"), ())
    note(result, "2 ratings are -1: seen, not rated")


def test_jester_matrix_with_99_for_nothing():
    result = read("jester")
    assert rows_of(result) == {
        ("1", "1"): [0.0],
        ("1", "2"): [0.879],
        ("1", "5"): [0.0],
        ("2", "1"): [0.408],
        ("2", "5"): [0.0],
        ("2", "7"): [0.636],
        ("3", "2"): [0.995],
        ("3", "7"): [0.0],
        ("3", "100"): [0.25],
    }
    note(result, "291 ratings are 99: no interaction")


def test_tmdb_categories_in_python_and_ids_with_a_point():
    result = read("tmdb")
    assert rows_of(result) == {
        ("1", "862.0"): [0.5],
        ("1", "8844.0"): [0.0],
        ("2", "862.0"): [1.0],
        ("3", "15602.0"): [0.0],
    }
    assert result.catalogue.topics == (("Animation", "Comedy"), ("Adventure",), ())
    assert result.catalogue.columns["overview"][1].startswith("When siblings Judy and Peter")
    note(result, "3 ids of items are written otherwise in ratings.csv")


def test_ids_that_items_and_log_write_differently():
    result = read("other_ids")
    assert set(rows_of(result)) == {("a", "001"), ("a", "42.0"), ("b", "001"), ("b", "42.0"), ("b", "x-1")}
    assert result.catalogue.topics == (("A", "B"), ("A", "C"), ("B",))


@pytest.mark.parametrize(
    ("name", "expected", "topics"),
    [
        (
            "ml_100k",
            {("196", "242"): [0.0], ("186", "302"): [1.0], ("22", "242"): [0.0]},
            (("Comedy",), ("Crime", "Film-Noir", "Mystery", "Thriller"), ()),
        ),
        (
            "ml_25m",
            {("1", "296"): [1.0], ("1", "306"): [0.25], ("2", "296"): [0.0]},
            (("Comedy", "Crime", "Drama"), ("Drama",), ()),
        ),
        (
            "ml_1m",
            {("1", "1193"): [1.0], ("1", "661"): [0.0], ("2", "1193"): [0.5]},
            (("Animation", "Musical"), ("Drama",)),
        ),
    ],
)
def test_movielens_folders(name, expected, topics):
    result = read(name, gain_range=(3.0, 5.0))
    assert rows_of(result) == expected
    assert result.catalogue.topics == topics
    assert result.timed
    if name == "ml_100k":
        assert result.catalogue.titles[2] == "Dél"
        assert times_of(result)["196", "242"] == 881250949


def test_mind_impressions():
    result = read("mind")
    assert rows_of(result) == {
        ("U13740", "N55189"): [1.0],  # from the history, before the user's first impression
        ("U13740", "N42782"): [1.0],
        ("U13740", "N35729"): [1.0, 1.0],  # chosen on the 11th, passed over on the 13th: the strongest counts
        ("U13740", "N20678"): [0.0],
        ("U13740", "N55689"): [1.0],
        ("U91836", "N20678"): [0.0],
        ("U91836", "N39317"): [0.0],
        ("U91836", "N55689"): [1.0],
    }
    times = times_of(result)
    first = utc(2019, 11, 11, 15, 28, 58)
    assert times["U13740", "N20678"] == first
    assert (times["U13740", "N55189"], times["U13740", "N42782"]) == (first - 2, first - 1)
    assert times["U13740", "N55689"] == utc(2019, 11, 13, 9, 5, 58)
    groups = {}
    for user, item, group in zip(result.rows.users, result.rows.items, result.groups, strict=True):
        groups.setdefault(int(group), set()).add((result.user_ids[user], result.catalogue.ids[item]))
    assert groups.pop(-1) == {("U13740", "N55189"), ("U13740", "N42782")}
    assert sorted(map(sorted, groups.values())) == [
        [("U13740", "N20678"), ("U13740", "N35729")],
        [("U13740", "N35729"), ("U13740", "N55689")],
        [("U91836", "N20678"), ("U91836", "N39317"), ("U91836", "N55689")],
    ]
    assert result.catalogue.titles[0] == 'A "quoted start of a title'
    assert result.catalogue.titles[4:] == ("health N20678", "Equal", "Equal")
    assert "line 4: impressions: expected items such as N1-0 N2-1, got 'N35729'" in note(result, "skipped 1 rows")


def test_events_with_words_and_milliseconds():
    result = read("retail_rocket")
    assert rows_of(result) == {
        ("257597", "355908"): [0.3, 0.3],
        ("992329", "248676"): [1.0, 1.0],  # bought, then viewed: what was bought stays bought
        ("111016", "318965"): [0.6],
    }
    assert times_of(result)["111016", "318965"] == 1433221999.827
    note(result, "moments are in milliseconds: converted to seconds")
    assert "line 7: timestamp: expected a moment in milliseconds, got '1433221337'" in note(result, "skipped 1 rows")
    bought = read("retail_rocket", events=["transaction", "addtocart"], event_values={"addtocart": 0.1})
    assert rows_of(bought) == {("992329", "248676"): [1.0], ("111016", "318965"): [pytest.approx(0.1)]}


def test_json_lines():
    result = read("amazon")
    assert rows_of(result) == {
        ("A1", "B001"): [1.0],
        ("A2", "B001"): [0.0],
        ("A1", "B002"): [0.5],
        ("A3", "B002"): [NAN],
    }
    assert result.catalogue.titles == ("Guitar strings", "Tuner")
    assert result.catalogue.topics[0] == ("Musical Instruments", "Strings")
    np.testing.assert_array_equal(result.catalogue.columns["price"], [9.5, np.nan])
    assert """line 5: expected a JSON object, got '{"reviewerID": "A3", "asin":'""" in note(result, "skipped 2 rows")


def test_a_shops_invoices_with_amounts_and_the_month_first():
    result = read("online_retail", gain_range=(0.0, 10.0))
    assert rows_of(result) == {
        ("17850.0", "85123A"): [0.6, 0.8],  # 6, then 2 more
        ("17850.0", "71053"): [0.6],
        ("12583.0", "85123A"): [1.0],
    }
    assert times_of(result)["12583.0", "85123A"] == utc(2010, 12, 14, 10)
    assert "line 4: Quantity: expected a number that is not negative, got '-1'" in note(result, "Quantity")
    assert "line 5: CustomerID: expected an id, got ''" in note(result, "CustomerID")


def test_a_published_split_and_iso_moments():
    result = read("published_split")
    assert result.time_boundary is None
    is_test = {
        (result.user_ids[u], result.catalogue.ids[i]): bool(t)
        for u, i, t in zip(result.rows.users, result.rows.items, result.test, strict=True)
    }
    assert is_test == {
        ("u1", "a"): False,
        ("u1", "b"): False,
        ("u1", "c"): True,
        ("u2", "a"): False,
        ("u2", "b"): True,
    }  # the validation row is left out
    times = times_of(result)
    assert times["u1", "b"] == utc(2020, 1, 2, 3, 4, 5)
    assert times["u2", "b"] == utc(2020, 1, 4, 23) + 0.5
    assert "line 8: split: expected train, validation or test, got 'holdback'" in note(result, "skipped 1 rows")


def write_log(folder, moments, header="user,item,timestamp"):
    lines = [f"u{i % 3},i{i},{moment}" for i, moment in enumerate(moments)]
    (folder / "interactions.csv").write_text("\n".join([header, *lines]) + "\n")
    return folder


@pytest.mark.parametrize(
    ("moments", "options", "seconds"),
    [
        (["1577934245", "1577934246"], {}, [1577934245, 1577934246]),
        (["1577934245000", "1577934246500"], {}, [1577934245, 1577934246.5]),
        (["1577934245000000", "1577934246000000"], {}, [1577934245, 1577934246]),
        (["20200102", "20200103"], {}, [utc(2020, 1, 2), utc(2020, 1, 3)]),
        (["20200102030405", "20200103000000"], {}, [1577934245, utc(2020, 1, 3)]),
        (["202001020304", "202001030000"], {}, [utc(2020, 1, 2, 3, 4), utc(2020, 1, 3)]),
        (["200000000000", "200000060000"], {}, [200_000_000, 200_000_060]),  # in ms: 1976, and no month 00
        (
            ["2020-01-02", "2020-01-02 03:04:05", "2020-01-02T03:04:05.25Z"],
            {},
            [utc(2020, 1, 2), 1577934245, 1577934245.25],
        ),
        (["31/12/2019 23:59", "02/01/2020 03:04"], {}, [utc(2019, 12, 31, 23, 59), utc(2020, 1, 2, 3, 4)]),
        (["31.12.2019", "02.01.2020"], {}, [utc(2019, 12, 31), utc(2020, 1, 2)]),
        (["02/01/2020", "03/01/2020"], {}, [utc(2020, 1, 2), utc(2020, 1, 3)]),
        (["02/01/2020", "03/01/2020"], {"day_first": False}, [utc(2020, 2, 1), utc(2020, 3, 1)]),
        (["12/31/2019", "02/01/2020"], {}, [utc(2019, 12, 31), utc(2020, 2, 1)]),
        (["3", "17"], {}, [3, 17]),
    ],
)
def test_moments_as_they_are_written(tmp_path, moments, options, seconds):
    result = read_interactions(write_log(tmp_path, moments), InteractionsOptions(**options))
    assert sorted(result.rows.times.tolist()) == sorted(seconds)
    assert result.timed


def test_what_is_ambiguous_is_said(tmp_path):
    result = read_interactions(write_log(tmp_path, ["02/01/2020", "03/01/2020"]), InteractionsOptions())
    assert "the day may as well stand second: day_first=False reads them so" in note(result, "moments are dates")


@pytest.mark.parametrize(
    "odd", ["9" * 400, "0", "-5", "1577934246000", "noon", "", "nan", "1e308", "2020-01-02"], ids=lambda text: text[:8]
)
def test_an_odd_moment_is_a_bad_row(tmp_path, odd):
    result = read_interactions(write_log(tmp_path, ["1577934245", odd, "1577934247"]), InteractionsOptions())
    assert sorted(result.rows.times.tolist()) == [1577934245, 1577934247]
    assert "line 3: timestamp: expected a moment in seconds, got" in note(result, "skipped 1 rows")


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "tsv", "tsv.gz", "jsonl", "jsonl.gz", "parquet", "parquet.gz"])
def test_every_kind_of_file_reads_the_same(tmp_path, ending):
    import json

    rows = [("u1", 7, 4.5, 1577934245), ("u2", 8, 3.0, 1577934246), ("u1", 8, 5.0, 1577934247)]
    names = ("user", "item", "rating", "timestamp")
    path = tmp_path / f"interactions.{ending}"
    kind = ending.split(".")[0]
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(
            pyarrow.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), tmp_path / "t"
        )
        content = (tmp_path / "t").read_bytes()
    elif kind == "jsonl":
        content = "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows).encode()
    else:
        comma = "," if kind == "csv" else "\t"
        content = "".join(comma.join(map(str, row)) + "\n" for row in [names, *rows]).encode()
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    result = read_interactions(tmp_path, InteractionsOptions())
    assert rows_of(result) == {("u1", "7"): [0.75], ("u2", "8"): [0.0], ("u1", "8"): [1.0]}
    assert times_of(result)["u1", "8"] == 1577934247


def test_parquet_columns_of_bytes_are_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"user": [b"ann", "J\u00f6rg".encode()], "item": [b"a1", b"a2"]})
    parquet.write_table(table, tmp_path / "log.parquet")
    result = read_interactions(tmp_path, InteractionsOptions())
    assert result.user_ids == ("J\u00f6rg", "ann")
    assert result.catalogue.ids == ("a1", "a2")
