"""ESCI: published Parquet and the excerpt, queries as lists, pooled negatives, and that no test query is trained on."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from flexrec.data import load_esci

REAL_DATA = Path(os.environ.get("FLEXREC_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
EXCERPT = REAL_DATA / "esci"

# (query, query_id, product, locale, label, small, split)
JUDGMENTS = [
    *(("red  shoes", 1, f"P{i}", "us", "ESCI"[i % 4], 1, "train") for i in range(9)),
    *(("Red Shoes", 2, f"P{i}", "us", "E", 1, "train") for i in (20, 21)),
    *(("lamp", 3, f"P{i}", "us", "SI"[i % 2], 1, "train") for i in (4, 9, 10)),
    *(("chair", 4, f"P{i}", "us", "E", 1, "test") for i in (5, 11)),
    ("toast", 5, "P12", "us", "I", 1, "test"),
    ("hard", 6, "P13", "us", "E", 0, "train"),
    ("zapatos", 7, "P1", "es", "E", 1, "train"),
    ("silla", 8, "P5", "es", "E", 1, "test"),
]


def write(folder, judgments=JUDGMENTS, parquet=True, extra=()):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("query", "query_id", "product_id", "product_locale", "esci_label", "small_version", "split")
    products = [(f"P{i}", f"Title {i}\nwith <b>markup</b>" if i != 4 else None, f"Brand {i % 3}") for i in range(30)]
    if not parquet:
        lines = [",".join([*names, "source"]), *(",".join([*map(str, row), "x"]) for row in judgments), *extra]
        (folder / "judgments.csv").write_text("\n".join(lines) + "\n")
        lines = ["product_id,title,brand", *(f'{p},"{t or ""}",{b}' for p, t, b in products)]
        (folder / "products.csv").write_text("\n".join(lines) + "\n")
        return folder
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet_files

    columns = {name: list(values) for name, values in zip(names, zip(*judgments, strict=True), strict=True)}
    columns |= {"example_id": list(range(len(judgments))), "large_version": [1] * len(judgments)}
    parquet_files.write_table(pyarrow.table(columns), folder / "shopping_queries_dataset_examples.parquet")
    rows = [(*p, market) for market in ("us", "es") for p in products]
    table = {
        name: list(values)
        for name, values in zip(
            ("product_id", "product_title", "product_brand", "product_locale"), zip(*rows, strict=True), strict=True
        )
    }
    table |= {"product_description": ["long " * 1000] * len(rows), "product_color": ["red"] * len(rows)}
    parquet_files.write_table(pyarrow.table(table), folder / "shopping_queries_dataset_products.parquet")
    return folder


def judged(dataset, lst):
    return {
        dataset.catalogue.ids[i]: pytest.approx(x)
        for i, x in zip(lst.candidates, lst.interest.tolist(), strict=True)
        if not np.isnan(x)
    }


def test_published_files(tmp_path):
    dataset = load_esci(write(tmp_path), num_candidates=6)
    train = {lst.query: lst for lst in dataset.train}
    assert set(train) == {"red shoes", "lamp"}  # written in two ways, it is one query
    assert [lst.query for lst in dataset.test] == ["chair"]  # toast has no relevant product
    gains = {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}
    expected = {f"P{i}": gains["ESCI"[i % 4]] for i in range(9)} | {"P20": 1.0, "P21": 1.0}
    assert judged(dataset, train["red shoes"]) == expected
    assert len(train["red shoes"].candidates) == 11  # more than num_candidates, all kept
    lamp = train["lamp"]
    assert judged(dataset, lamp) == {"P4": 0.1, "P9": 0.0, "P10": 0.1}
    assert len(lamp.candidates) == 6
    assert dataset.catalogue.titles[dataset.catalogue.index["P9"]] == "Title 9 with <b>markup</b>"
    assert dataset.catalogue.titles[dataset.catalogue.index["P4"]] == "P4"
    assert dataset.catalogue.columns["brand"][dataset.catalogue.index["P9"]] == "Brand 0"
    assert dataset.unobserved == "zero"
    assert dataset.unsupported.keys() == {"interest", "explore", "trend", "diverse"}
    with pytest.raises(ValueError, match=r"the esci data cannot answer the need 'trend': .* ask for the need 'search'"):
        dataset.check_needs(["search", "trend"])
    assert len(lamp.history) == 0
    # How many other training queries a product is judged for.
    popularity = dict(zip((dataset.catalogue.ids[i] for i in lamp.candidates), lamp.popularity.tolist(), strict=True))
    assert popularity.pop("P4") == 1  # of two, its own not counted
    assert (popularity.pop("P9"), popularity.pop("P10")) == (0, 0)
    assert set(popularity.values()) == {1.0}
    notes = " | ".join(dataset.notes)
    assert "1 of 4 queries have no relevant product" in notes
    assert "1 of 2 training queries have fewer than 6 judged products: 3 negatives come from other queries" in notes
    assert "1 of 1 test queries have fewer than 6 judged products: 4 negatives come from other queries" in notes
    assert "products have no title: they are called by their ids" in notes


def test_negatives_of_training_come_from_training_queries_of_the_market(tmp_path):
    dataset = load_esci(write(tmp_path), num_candidates=6, locale=None)
    ids = dataset.catalogue.ids
    of_part = {
        part: {ids[i] for lst in lists for i in lst.candidates}
        for part, lists in (("train", [x for seed in range(9) for x in dataset.resample(seed)]), ("test", dataset.test))
    }
    assert "us/P11" not in of_part["train"]  # judged for a test query only
    assert {lst.query for lst in dataset.test} == {"chair", "silla"}
    for lst in dataset.train + dataset.test:
        assert len({ids[i].split("/")[0] for i in lst.candidates}) == 1
    first, second = ([sorted(x.candidates) for x in dataset.resample(seed)] for seed in (1, 2))
    assert first != second
    assert [sorted(x.candidates) for x in pickle.loads(pickle.dumps(dataset)).resample(1)] == first


def test_versions_locales_and_limits(tmp_path):
    folder = write(tmp_path)
    assert "hard" in {lst.query for lst in load_esci(folder, version="large").train}
    assert [lst.query for lst in load_esci(folder, locale="es").train] == ["zapatos"]
    assert [lst.query for lst in load_esci(folder, max_train_lists=1).train] in (["lamp"], ["red shoes"])
    with pytest.raises(ValueError, match="no judged query of locale 'jp'"):
        load_esci(folder, locale="jp")
    capped = load_esci(folder, num_candidates=4, max_candidates=5)
    for lst in capped.train + capped.test:
        assert len(lst.candidates) <= 5
        assert (lst.interest > 0).any()


def test_whatever_is_judged_for_test_queries_training_stays_the_same(tmp_path):
    before = load_esci(write(tmp_path / "a"), num_candidates=6)
    changed = [
        (q, n, f"P{29 - i % 3}" if s == "test" else p, m, "E" if s == "test" else g, v, s)
        for i, (q, n, p, m, g, v, s) in enumerate(JUDGMENTS)
    ]
    changed.append(("another", 99, "P3", "us", "E", 1, "test"))
    after = load_esci(write(tmp_path / "b", changed), num_candidates=6)

    def in_words(dataset, lists):
        of = dataset.catalogue.ids
        return [
            (
                x.query,
                x.user,
                [of[i] for i in x.candidates],
                np.nan_to_num(x.interest, nan=-1).tolist(),
                x.popularity.tolist(),
            )
            for x in lists
        ]

    assert in_words(before, before.train) == in_words(after, after.train)
    assert in_words(before, before.resample(4)) == in_words(after, after.resample(4))
    assert before.log.interest.tolist() == after.log.interest.tolist()
    assert in_words(before, before.test) != in_words(after, after.test)
    assert not {lst.user for lst in after.test} & set(after.log.users.tolist())


def test_a_query_of_both_parts_is_a_test_query(tmp_path):
    both = [*JUDGMENTS, ("Chair ", 9, "P14", "us", "E", 1, "train")]
    dataset = load_esci(write(tmp_path, both))
    assert "chair" not in {lst.query.casefold() for lst in dataset.train}
    assert judged(dataset, dataset.test[0]) == {"P5": 1.0, "P11": 1.0, "P14": 1.0}


def test_an_excerpt_of_text_and_its_bad_rows(tmp_path):
    bad = ["lamp,3,,us,E,1,train,x", "lamp,3,P9,us,Z,1,train,x", "lamp,3", ",3,P9,us,E,1,train,x"]
    folder = write(tmp_path, parquet=False, extra=bad)
    dataset = load_esci(folder, num_candidates=6)
    assert {lst.query for lst in dataset.train} == {"red shoes", "lamp"}  # as of Parquet: small and us
    assert [lst.query for lst in load_esci(folder, locale="es").test] == ["silla"]
    line = len(JUDGMENTS) + 2
    notes = " | ".join(dataset.notes)
    assert f"line {line}: product_id: expected some text, got ''" in notes
    assert f"line {line + 1}: esci_label: expected E, S, C or I, got 'Z'" in notes
    assert f"line {line + 2}: expected 8 fields" in notes
    with pytest.raises(ValueError, match=rf"judgments\.csv:{line + 2}: expected 8 fields"):
        load_esci(folder, strict=True)


def test_without_a_published_split_queries_are_drawn_each_on_its_own(tmp_path):
    unsplit = [(f"query {i}", i, f"P{i % 30}", "us", "E", 1, "") for i in range(60)]
    one, other = (load_esci(write(tmp_path / str(n), unsplit[:n], parquet=False), num_candidates=3) for n in (60, 40))
    tests = [{lst.query for lst in dataset.test} for dataset in (one, other)]
    assert tests[1] == {query for query in tests[0] if int(query.split()[1]) < 40}
    assert 4 <= len(tests[0]) <= 20


def test_what_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="no ESCI folder at"):
        load_esci(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"no shopping_queries_dataset_examples\.parquet in .*, nor judgments\.csv"
    ):
        load_esci(tmp_path)
    (tmp_path / "shopping_queries_dataset_examples.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="holds a pointer of Git LFS instead of the data"):
        load_esci(tmp_path)
    (tmp_path / "shopping_queries_dataset_examples.parquet").write_text("x" * 100)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        load_esci(tmp_path)
    assert "\n" not in str(caught.value)
    folder = write(tmp_path / "b")
    for options, message in (
        ({"num_candidates": 1}, "num_candidates must be at least 2 and at most max_candidates, got 1 and None"),
        ({"max_candidates": 5}, "num_candidates must be at least 2 and at most max_candidates, got 20 and 5"),
        ({"version": "tiny"}, "version must be one of 'small', 'large'; got 'tiny'"),
        ({"test_fraction": 0.0}, "test_fraction must lie strictly between 0 and 1, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_esci(folder, **options)


def test_the_real_excerpt():
    if not EXCERPT.is_dir():
        pytest.skip(f"no esci in {REAL_DATA}; name its parent folder in FLEXREC_TEST_DATA")
    dataset = load_esci(EXCERPT)
    assert len(dataset.train) + len(dataset.test) == 983 - 184
    assert 100 < len(dataset.test) < 200
    assert not {lst.query.casefold() for lst in dataset.train} & {lst.query.casefold() for lst in dataset.test}
    assert max(len(lst.candidates) for lst in dataset.train + dataset.test) == 99
    assert all(lst.query and (lst.interest > 0).any() for lst in dataset.train + dataset.test)
    assert any(note.startswith("184 of 983 queries have no relevant product") for note in dataset.notes)
