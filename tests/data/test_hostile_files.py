"""Bad rows, odd text, hostile files and arguments that cannot be: each an answer on one line."""

import sys
from pathlib import Path

import pytest

from flexrec.data import load_interactions

sys.path.insert(0, str(Path(__file__).parent))
from shop_logs import NUM_ITEMS, load, make_rows, write


def test_odd_text_stops_nothing(tmp_path):
    write(tmp_path, make_rows(), items=False)
    titles = [
        '"two\nlines"',
        "tab\tin it",
        "",
        "Equal",
        "Equal",
        '"a ""quote"""',
        "\u202enormal",
        "\x00null",
        "x" * 10_000,
    ]
    lines = [f"i{i},{titles[i % len(titles)]},{'A' if i % 2 else ''}" for i in range(NUM_ITEMS)]
    (tmp_path / "items.csv").write_text("\n".join(["id,title,categories", *lines]) + "\n")
    dataset = load(tmp_path)
    shown = dataset.catalogue.titles
    assert shown[:6] == ("two lines", "tab in it", "i2", "Equal", "Equal", 'a "quote"')
    assert shown[7] == "null"
    assert len(shown[8]) == 200
    assert all(title and "\n" not in title for title in shown)
    assert any("are cut to 200 characters" in note for note in dataset.notes)


BAD_ROWS = [
    ("u1,i1", "expected 4 fields"),
    ("u1,i1,5,1600000000,extra", "expected 4 fields"),
    (",i1,5,1600000000", "user: expected an id, got ''"),
    ("u1,,5,1600000000", "item: expected an id, got ''"),
    ("u1,i99,5,1600000000", "item: expected an id that is among the items, got 'i99'"),
    ("u1,i1,good,1600000000", "rating: expected a number, got 'good'"),
    ("u1,i1,1e999,1600000000", "rating: expected a number, got '1e999'"),
    ("u1,i1,5,yesterday", "timestamp: expected a moment in seconds, got 'yesterday'"),
    ("u1,i1,5,160", "timestamp: expected a moment in seconds, got '160'"),  # cut off
    (f"u1,i1,{'9' * 5000},1600000000", "rating: expected a number, got '9999"),
    ('u1,"i1,5,1600000000', "expected a row that can be read, got 'unexpected end of data'"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message[:40] for _, message in BAD_ROWS])
def test_a_bad_row_is_counted_or_stops(tmp_path, row, message):
    rows = make_rows()
    folder = write(tmp_path, rows)
    with open(folder / "interactions.csv", "a") as file:
        file.write(row)
    dataset = load(folder)
    (note,) = [one for one in dataset.notes if one.startswith("skipped")]
    assert note.startswith(f"skipped 1 rows of interactions.csv; the first is on line {len(rows) + 2}: ")
    assert message in note
    assert len(note) < 300
    with pytest.raises(ValueError, match=rf"interactions\.csv:{len(rows) + 2}: ") as caught:
        load(folder, strict=True)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_bad_in_items(tmp_path):
    folder = write(tmp_path, make_rows())
    with open(folder / "items.csv", "a") as file:
        file.write("i3,Again,A\n,No id,B\n")
    dataset = load(folder)
    assert len(dataset.catalogue) == NUM_ITEMS
    (skipped,) = [note for note in dataset.notes if note.startswith("skipped")]
    assert skipped == ("skipped 2 rows of items.csv; the first is on line 32: id: expected an id of its own, got 'i3'")
    with pytest.raises(ValueError, match=r"items\.csv:32: id: expected an id of its own, not that of line 5, got 'i3'"):
        load(folder, strict=True)


HOSTILE = {
    "empty": ("interactions.csv", b"", "no rows in it"),
    "a header alone": ("interactions.csv", b"user,item\n", "no interactions in it"),
    "binary": ("interactions.csv", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" * 9, "is no text, its first bytes are"),
    "a zip": ("interactions.csv", b"PK\x03\x04\x14\x00\x00\x00\x08\x00", "is no text, its first bytes are"),
    "no gzip": ("interactions.csv.gz", b"user,item\n1,2\n", "cannot be read: Not a gzipped file"),
    "other columns": ("interactions.csv", b"a,b\n1,2\n", r"none of its columns is known as user: 'a', 'b'; name it"),
    "no items": ("interactions.csv", b"user,b\n1,2\n", r"none of its columns is known as item: 'user', 'b'"),
    "no names": ("interactions.csv", b"1,2\n3,4\n", "by its number, user=1"),
    "unknown events": (
        "events.csv",
        b"user,item,event\n1,2,zap\n2,2,zap\n",
        "events of no known worth: 'zap'; say what",
    ),
    "one user": ("interactions.csv", b"user,item\n1,2\n1,3\n", "at least one user must remain to train on"),
    "nothing good": ("interactions.csv", b"user,item,rating\n1,2,x\n2,2,y\n", "no interactions in it: skipped 2 rows"),
    "no JSON": ("interactions.jsonl", b"user,item\n1,2\n", "no rows in it"),
    "brackets": ("interactions.jsonl", b'{"user": ' + b"[" * 100_000 + b"\n", "no rows in it"),
    "no parquet": ("interactions.parquet", b"user,item\n1,2\n", "cannot be read"),
    "a pointer": (
        "interactions.csv",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        "pointer of Git LFS",
    ),
    "a wide table": ("interactions.csv", b",".join(b"c%d" % i for i in range(5000)) + b"\n", "and 4970 more"),
    "a long name": ("interactions.csv", b"x" * 100_000 + b",item\n1,2\n", r"known as user: 'x+\.\.', 'item'"),
    "a long field": ("interactions.csv", b"user,item\n" + b"x" * 200_000 + b',"2\n', "field larger than field limit"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_files_give_one_line(tmp_path, name):
    file, content, message = HOSTILE[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_interactions(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_missing_folders_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_interactions(tmp_path / "nowhere")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no log of interactions in .*, gzipped or not; there is notes\.md"):
        load_interactions(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file shop\.csv in"):
        load_interactions(tmp_path, log_file="shop.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "user=nope"}, r"interactions\.csv: has no column 'nope' for user; its columns are 'user', 'item'"),
        ({"columns": "buyer=user"}, "columns: unknown role 'buyer'; expected one of user, item, rating"),
        ({"columns": "user"}, "columns must look like user=customer,item=sku"),
        ({"columns": {"user": ["a", "b"]}}, "columns: user must be one column"),
        ({"columns": {"items": {"user": "a"}}}, "columns: in items, unknown role 'user'; expected one of id, title"),
        ({"columns": 7}, "columns must map roles to names of columns, got 7"),
        ({"gain": "log"}, "gain must be one of 'linear', 'threshold', 'quantile'; got 'log'"),
        ({"gain_range": (5, 1)}, "gain_range must rise, got 5 to 1"),
        ({"codes": {0.0: "maybe"}}, r"codes\[0.0\] must be one of 'seen', 'missing'"),
        ({"event_values": {"buy": 2.0}}, r"event_values must lie in \[0, 1\], got 2.0 for 'buy'"),
        ({"events": ["buy"]}, r"events=\['buy'\] needs a column of events"),
        ({"negatives": "hard"}, "negatives must be one of 'popularity', 'uniform', 'impressions'; got 'hard'"),
        ({"negatives": "impressions"}, "negatives='impressions' needs times and what was passed over"),
        ({"split": "given"}, "split='given' needs a column that says train or test"),
        ({"split": "random"}, "split must be one of 'given', 'user', 'time'; got 'random'"),
        ({"test_fraction": 2.0}, "test_fraction must lie strictly between 0 and 1, got 2.0"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, make_rows()), **options)


def test_yaml_that_cannot_be(tmp_path):
    write(tmp_path, make_rows())
    with pytest.raises(FileNotFoundError, match=r"columns: there is no file .*columns\.yaml"):
        load(tmp_path, columns=tmp_path / "columns.yaml")
    (tmp_path / "columns.yaml").write_text("user: [a\nitem: {")
    with pytest.raises(ValueError, match=r"columns\.yaml: is no YAML: ") as caught:
        load(tmp_path, columns=tmp_path / "columns.yaml")
    assert "\n" not in str(caught.value)
