"""Tables in files, as people have them: found by name, opened as they are written, read in chunks of rows.

CSV of any delimiter, TSV, lines of JSON and Parquet, gzipped or not. Every row keeps the line it stands on (in Parquet
its number), and a row that cannot be read goes to ``BadRows``, which stops at once or counts and goes on. Text comes
through Python's own csv module, which knows lines and fields exactly; a chunk at a time is in memory.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

CHUNK = 65536  # rows
ENDINGS = tuple(
    f"{ending}{gz}" for ending in (".csv", ".tsv", ".jsonl", ".parquet", ".txt", ".dat") for gz in ("", ".gz")
)
_SAMPLE = 65536  # characters that the delimiter is seen from
_DELIMITERS = (",", ";", "\t", "|")
# A quote inside a quoted field written as \" instead of "". A field may also end in a backslash: \"; is no sign.
_ESCAPED_QUOTE = re.compile(rb'\\"[^",;\t|\r\n]')


def shown(value: object, limit: int = 60) -> str:
    """A value as messages show it: on one line and not too long."""
    text = repr(value[:limit] if isinstance(value, str) else value)
    long = len(value) > limit if isinstance(value, str) else len(text) > limit
    return text[: limit + 2] + ".." if long else text


@dataclass
class BadRows:
    """Rows that are not what they should be: an error at the first, or counted and reported.

    Attributes:
        strict: raise a ValueError at the first bad row.
        counts: bad rows by (file, reason).
    """

    strict: bool = False
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    first: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, path: Path, line: int, column: str, expected: str, got: object) -> None:
        """Count the row on ``line``, whose ``column`` ("" for the row as a whole) should be as ``expected``."""
        reason = f"{column}: expected {expected}" if column else f"expected {expected}"
        self.reject(path, line, reason, f"{reason}, got {shown(got)}")

    def reject(self, path: Path, line: int, reason: str, message: str) -> None:
        """Count the row on ``line`` under ``reason``; ``message`` says it of this row."""
        if self.strict:
            raise ValueError(f"{path}:{line}: {message}")
        self.counts[path.name, reason] += 1
        self.first.setdefault((path.name, reason), f"{line}: {message}")

    def notes(self) -> list[str]:
        """A sentence for each kind of bad row, the most frequent first."""
        return [
            f"skipped {count} rows of {name}; the first is on line {self.first[name, reason]}"
            for (name, reason), count in self.counts.most_common()
        ]


class Chunk(NamedTuple):
    """Some rows of a table."""

    lines: list[int]
    columns: dict[str, list[Any]]  # by name: text as a stripped str, "" where there is nothing; lists stay lists


@dataclass(frozen=True)
class Table:
    """A table in a file: its columns' names, and its rows as often as they are asked for.

    Attributes:
        named: the names come from the file; else from ``Layout`` or they are the columns' numbers from 1.
        notes: what was found out about how it is written, where that is not the usual.
    """

    path: Path
    names: tuple[str, ...]
    dialect: Dialect | None  # None: no delimited text
    named: bool = True
    notes: tuple[str, ...] = ()

    def chunks(
        self,
        bad: BadRows,
        names: Sequence[str] | None = None,
        where: Mapping[str, Collection[Any]] | None = None,
    ) -> Iterator[Chunk]:
        """Rows in order, with the columns of ``names`` (None: all). Rows of another length are bad.

        ``where`` keeps the rows whose columns hold one of some values; Parquet reads no others. It is for Parquet only.
        """
        wanted = self.names if names is None else tuple(dict.fromkeys(names))
        with errors_of(self.path):
            if ".parquet" in self.path.suffixes:
                yield from _parquet_chunks(self.path, wanted, where or {})
                return
            if where:
                raise ValueError(f"{self.path}: rows are chosen by their values in Parquet files only")
            if ".jsonl" in self.path.suffixes:
                yield from _json_chunks(self.path, wanted, bad)
                return
            assert self.dialect is not None
            width, picked = len(self.names), [self.names.index(name) for name in wanted]
            rows = iter_rows(self.path, self.dialect, bad)
            if self.named:
                next(rows, None)
            expected = f"{width} fields ({', '.join(self.names)})"
            while part := list(islice(rows, CHUNK)):
                if any(len(row) != width for _, row in part):
                    for line, row in part:
                        if len(row) != width:
                            reason = f"expected {expected}"
                            bad.reject(self.path, line, reason, f"{reason}, got {len(row)}: {shown(row, 120)}")
                    part = [entry for entry in part if len(entry[1]) == width]
                if part:
                    columns = {n: [row[i].strip() for _, row in part] for n, i in zip(wanted, picked, strict=True)}
                    yield Chunk([line for line, _ in part], columns)


@dataclass(frozen=True)
class Dialect:
    """How text is divided into rows and fields."""

    encoding: str = "utf-8-sig"
    delimiter: str = ","  # "::" has no quotes
    escape: str | None = None
    quoted: bool = True
    newline: str = "\n"  # "": a carriage return alone ends a line too; else it is a space within one


def find_table(folder: Path, stems: Iterable[str], endings: Sequence[str] = ENDINGS) -> Path | None:
    """The first file in ``folder`` with one of these stems (in any case) and endings, in the order of ``stems``."""
    files = {path.name.casefold(): path for path in sorted(folder.iterdir()) if path.is_file()}
    names = (f"{stem}{ending}" for stem in stems for ending in endings)
    return next((files[name] for name in names if name in files), None)


def open_table(path: Path, dialect: Dialect | None = None) -> Table:
    """See how a file is written.

    Args:
        dialect: how it is written, where that is known; else it is found out.

    Raises:
        ValueError: the file is empty, or no table.
        ImportError: a Parquet file, and pyarrow is not installed.
    """
    with errors_of(path):
        if ".parquet" in path.suffixes:
            return Table(path, tuple(_parquet_file(path).schema_arrow.names), None)
        if ".jsonl" in path.suffixes:
            first = next(_json_chunks(path, None, BadRows()), None)
            if first is None:
                raise ValueError(f"{path}: no rows in it")
            return Table(path, tuple(first.columns), None)
        notes = []
        if dialect is None:
            dialect = sniff(path)
            if dialect.encoding == "latin-1":
                notes.append(f"{path.name} is no UTF-8; read as Latin-1")
            if dialect.delimiter != ("\t" if ".tsv" in path.suffixes else ","):
                notes.append(f"{path.name} is divided by {dialect.delimiter!r}")
        header = next(iter_rows(path, dialect, BadRows(strict=True)), None)
    if header is None:
        raise ValueError(f"{path}: no rows in it")
    stripped = tuple(name.strip() for name in header[1])
    # A column without a name (a pandas index) or with another's is known by its number.
    unique = (n if n and n not in stripped[:i] else str(i + 1) for i, n in enumerate(stripped))
    return Table(path, tuple(unique), dialect, notes=tuple(notes))


def without_header(table: Table) -> Table:
    """The same file read as one without a line of names: its columns are called "1", "2" and so on."""
    return Table(table.path, tuple(map(str, range(1, len(table.names) + 1))), table.dialect, False, table.notes)


def open_bytes(path: Path) -> IO[bytes]:
    """The file's content, decompressed where its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def sniff(path: Path) -> Dialect:
    """Encoding, delimiter and way of quoting: from the whole file, a block at a time, and from its beginning."""
    with open_bytes(path) as file:
        start = file.read(_SAMPLE)
    if start.startswith(b"version https://git-lfs.github.com/"):
        raise ValueError(f"{path}: holds a pointer of Git LFS instead of the data; fetch them with git lfs pull")
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding, escape = "utf-16", None
    elif sum(byte < 32 and byte not in b"\t\n\v\f\r" for byte in start[:1024]) > len(start[:1024]) // 20:
        raise ValueError(f"{path}: is no text, its first bytes are {start[:8]!r}; its ending should say what it is")
    else:
        encoding, escape = _scan(path)
    text = start.decode(encoding, errors="ignore")
    if "::" in text.split("\n", 1)[0]:
        return Dialect(encoding, "::", None, quoted=False)
    newline = "" if "\r" in text and "\n" not in text else "\n"
    delimiter = "\t" if ".tsv" in path.suffixes else max(_DELIMITERS, key=lambda d: _fit(text, d, escape))
    return Dialect(encoding, delimiter, escape, quoted=_quotes_fields(text, delimiter), newline=newline)


def _scan(path: Path) -> tuple[str, str | None]:
    """Encoding ("utf-8-sig", or "latin-1" where that fails), and the character that escapes quotes, of a whole file."""
    decoder, encoding, escape = codecs.getincrementaldecoder("utf-8")(), "utf-8-sig", None
    with open_bytes(path) as file:
        while block := file.read(1 << 20):
            if encoding == "utf-8-sig":
                try:
                    decoder.decode(block)
                except UnicodeDecodeError:
                    encoding = "latin-1"
            if escape is None and _ESCAPED_QUOTE.search(block):
                escape = "\\"
    return encoding, escape


def _quotes_fields(text: str, delimiter: str) -> bool:
    """Whether quotes enclose fields: some begin with one, and those end with one."""
    opened = sum(text.count(f'{before}"') for before in ("\n", delimiter)) + text.startswith('"')
    closed = sum(text.count(f'"{after}') for after in ("\n", "\r\n", delimiter)) + text.endswith('"')
    return delimiter == "," or (opened > 0 and closed >= 0.8 * opened)


def _fit(text: str, delimiter: str, escape: str | None) -> tuple[float, int]:
    """How well a delimiter explains the first rows: the share of them as wide as the first, and that width."""
    lines = text.splitlines(keepends=True)[:100]
    try:
        rows = [row for row in csv.reader(lines, delimiter=delimiter, escapechar=escape) if row]
    except csv.Error:
        return 0.0, 0
    if not rows or len(rows[0]) < 2:
        return 0.0, 0
    # The last row may be cut off by the end of the sample.
    of_same = sum(len(row) == len(rows[0]) for row in rows[:-1]) + 1
    return round(of_same / len(rows), 1), len(rows[0])


def iter_rows(path: Path, dialect: Dialect, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    """(line that the row begins on, its fields) of every row that is not blank; unreadable rows are bad."""
    with open_bytes(path) as binary:
        lines = io.TextIOWrapper(binary, dialect.encoding, newline=dialect.newline)
        text = map(_clean, lines) if dialect.newline else lines
        if dialect.delimiter == "::":
            for number, line in enumerate(text, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n").split("::")
            return
        reader = csv.reader(
            text,
            delimiter=dialect.delimiter,
            escapechar=dialect.escape,
            quoting=csv.QUOTE_MINIMAL if dialect.quoted else csv.QUOTE_NONE,
            strict=dialect.quoted,
        )
        while True:
            number = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                bad.add(path, number, "", "a row that can be read", str(error))
                continue
            if row:
                yield number, row


def _clean(line: str) -> str:
    """A line that the csv reader takes for one row: without NUL, and with no carriage return but at its end."""
    if "\r" in line and "\r" in (body := line.rstrip("\r\n")):
        line = body.replace("\r", " ") + "\n"
    return line.replace("\x00", "") if "\x00" in line else line


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Turn what decompression and decoding raise into a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        broken = (gzip.BadGzipFile, zlib.error, EOFError, UnicodeError, csv.Error)
        if isinstance(error, broken) or type(error).__module__.startswith("pyarrow"):
            raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
        raise


def _text(value: Any) -> Any:
    """A value of JSON or Parquet as text; lists stay lists."""
    if isinstance(value, bytes):  # of a Parquet column that does not say that it is text
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value.strip()
    if value is None:
        return ""
    if isinstance(value, float) and not np.isfinite(value):
        return "" if np.isnan(value) else repr(value)
    if isinstance(value, (list, tuple, dict)):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _json_chunks(path: Path, names: Sequence[str] | None, bad: BadRows) -> Iterator[Chunk]:
    def objects() -> Iterator[tuple[int, dict]]:
        with open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.lstrip(b"\xef\xbb\xbf"))
                except (ValueError, RecursionError):  # no JSON, no UTF-8, too many digits; too many brackets
                    value = None
                if isinstance(value, dict):
                    yield number, value
                else:
                    bad.add(path, number, "", "a JSON object", line[:80].decode("utf-8", "replace").rstrip())

    rows = objects()
    while part := list(islice(rows, CHUNK)):
        found = dict.fromkeys(key for _, row in part for key in row) if names is None else names
        yield Chunk([n for n, _ in part], {name: [_text(row.get(name)) for _, row in part] for name in found})


def parquet() -> Any:
    """pyarrow's module of datasets, or an ImportError that says how to install it."""
    try:
        import pyarrow.dataset
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: .venv/bin/pip install -e '.[parquet]'") from error
    return pyarrow


def _parquet_file(path: Path) -> Any:
    source = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else None
    pyarrow = parquet()
    return pyarrow.parquet.ParquetFile(str(path) if source is None else pyarrow.BufferReader(source))


def _parquet_chunks(path: Path, names: Sequence[str], where: Mapping[str, Collection[Any]]) -> Iterator[Chunk]:
    if path.suffix == ".gz":
        data = parquet().dataset.dataset(_parquet_file(path).read())
    else:
        data = parquet().dataset.dataset(str(path), format="parquet")
    chosen = None
    for name, values in where.items():
        one = parquet().dataset.field(name).isin(list(values))
        chosen = one if chosen is None else chosen & one
    row = 1
    # Little is read ahead: a batch of long descriptions is large.
    for batch in data.to_batches(columns=list(names), filter=chosen, batch_size=CHUNK, batch_readahead=2):
        columns = {name: [_text(v) for v in batch.column(name).to_pylist()] for name in names}
        yield Chunk(list(range(row, row + len(batch))), columns)
        row += len(batch)
