"""The Shopping Queries data set (ESCI): search queries with judged products; published Parquet files, or an excerpt.

Chandan K. Reddy et al. 2022. Shopping Queries Dataset: A Large-Scale ESCI Benchmark for Improving Product Search.
arXiv 2206.06588, https://github.com/amazon-science/esci-data, Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flexrec.data.interactions import stable_keys
from flexrec.data.items import short_title
from flexrec.data.lists import Catalogue, Interactions, RankingDataset, RankingList
from flexrec.data.options import EsciOptions, takes
from flexrec.data.tables import BadRows, Chunk, Table, find_table, open_table
from flexrec.data.thinning import uniform_hash

GAINS = {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}
_WORDS = {"EXACT": "E", "SUBSTITUTE": "S", "COMPLEMENT": "C", "IRRELEVANT": "I"}
_JUDGMENTS = ("shopping_queries_dataset_examples", "judgments")
_PRODUCTS = ("shopping_queries_dataset_products", "products")
# Published names, and those of the excerpt.
_COLUMNS = {
    "title": ("product_title", "title"),
    "brand": ("product_brand", "brand"),
    "color": ("product_color", "color"),
}
_WITHOUT_HISTORY = "its lists are of search queries and have no history; ask for the need 'search'"
_SEARCH_ONLY = dict.fromkeys(("interest", "explore", "trend", "diverse"), _WITHOUT_HISTORY)


@dataclass
class _Query:
    text: str
    locale: str
    gains: dict[str, float] = field(default_factory=dict)  # by product
    splits: set[str] = field(default_factory=set)


@takes(EsciOptions)
def load_esci(folder: str | Path, options: EsciOptions) -> RankingDataset:
    """A list for each query: the products judged for it, with gain 1, 0.1, 0.01 or 0 for E, S, C and I as interest.

    Where fewer than ``num_candidates`` products are judged the list is filled up with products judged for other queries
    of the same part (training or test) and market; nobody judged these, so that their interest is NaN and counts as 0.
    A list with more judged products keeps them all, up to ``max_candidates``. Queries that differ in case and spaces
    only are one. Queries without a product of positive gain give no list. ``notes`` count all this.

    A "user" is a query: nothing of a test query is trained on. The published split is kept (a query of both parts is a
    test query); queries without a part are drawn by ``test_fraction``, each on its own. Histories are empty, and
    popularity counts the judgments of a product for other training queries.

    Args:
        folder: holds ``shopping_queries_dataset_examples.parquet`` and ``shopping_queries_dataset_products.parquet``,
            or an excerpt's ``judgments.csv`` and ``products.csv``, gzipped or not.
        locale: market, "us", "es" or "jp"; "all" or None: all. Of files without that column all is read.
        version: of the published queries, the harder small part or all.
        max_train_lists, max_test_lists: of more queries a random choice. Only products of chosen queries are read.
        strict: a bad row is an error; else it is skipped, counted and reported.

    Every default stands in ``flexrec.data.options.EsciOptions``.

    Raises:
        FileNotFoundError: no such folder, or a file is not in it.
        ValueError: a file that is not as published; no query to train or to test on; bad arguments.
        ImportError: Parquet files without pyarrow.

    Example:
        >>> from pathlib import Path
        >>> from flexrec.data import load_esci
        >>> folder = Path("esci")
        >>> folder.mkdir()
        >>> names = "query,query_id,product_id,product_locale,esci_label,small_version,split"
        >>> judged = ["red shoes,1,P1,us,E,1,train", "red shoes,1,P2,us,I,1,train", "lamp,2,P3,us,E,1,test"]
        >>> _ = (folder / "judgments.csv").write_text("\\n".join([names, *judged]))
        >>> _ = (folder / "products.csv").write_text("product_id,title,brand\\nP1,Sneaker,A\\nP2,Boot,B\\nP3,Lamp,C\\n")
        >>> data = load_esci(folder, num_candidates=2)
        >>> [lst.query for lst in data.train], data.train[0].interest
        (['red shoes'], array([1., 0.], dtype=float32))
    """
    num_candidates, max_candidates, seed = options.num_candidates, options.max_candidates, options.seed
    locale = None if options.locale == "all" else options.locale
    if num_candidates < 2 or (max_candidates is not None and max_candidates < num_candidates):
        raise ValueError(
            f"num_candidates must be at least 2 and at most max_candidates, got {num_candidates} and {max_candidates}"
        )
    if not 0.0 < options.test_fraction < 1.0:
        raise ValueError(f"test_fraction must lie strictly between 0 and 1, got {options.test_fraction}")
    folder = Path(folder)
    bad = BadRows(options.strict)
    notes: list[str] = []
    queries = _read_judgments(_open(folder, _JUDGMENTS), locale, options.version, bad)
    if not queries:
        raise ValueError(
            f"{folder}: no judged query of locale {locale!r}" + (f"; {bad.notes()[0]}" if bad.counts else "")
        )
    relevant = {key: query for key, query in queries.items() if any(query.gains.values())}
    if len(relevant) < len(queries):
        notes.append(f"{len(queries) - len(relevant)} of {len(queries)} queries have no relevant product: left out")
    train, test = _split(relevant, options.test_fraction, options.max_train_lists, options.max_test_lists, seed)
    for role, part in (("train on", train), ("test on", test)):
        if not part:
            raise ValueError(f"no query to {role} in {folder}, of {len(relevant)} with a relevant product")
    products = list(dict.fromkeys(p for q in (*train, *test) for p in q.gains))
    catalogue = _read_products(_open(folder, _PRODUCTS), products, locale, bad, notes)
    parts = []
    for what, part, first_user in (("training", train, 0), ("test", test, len(train))):
        judged = [_Judged.of(user, query, catalogue) for user, query in enumerate(part, first_user)]
        parts.append(
            _Lists(judged, _judgments_of(train, catalogue), what == "training", num_candidates, max_candidates)
        )
        notes.append(parts[-1].summary(what))
    log = [(user, catalogue.index[p], g) for user, q in enumerate(train) for p, g in q.gains.items()]
    users, items, gains = zip(*log, strict=True)
    return RankingDataset(
        name="esci",
        catalogue=catalogue,
        log=Interactions(np.array(users), np.array(items), np.array(gains, dtype=np.float32), np.zeros(len(log))),
        train=parts[0].draw(seed),
        test=parts[1].draw(seed),
        unobserved="zero",
        resample=parts[0].draw,
        unsupported=_SEARCH_ONLY,
        user_ids=tuple(query.text for query in (*train, *test)),
        notes=(*notes, *bad.notes()),
    )


def _open(folder: Path, stems: Sequence[str]) -> Table:
    if not folder.is_dir():
        raise FileNotFoundError(f"no ESCI folder at {folder}")
    path = find_table(folder, stems)
    if path is None:
        raise FileNotFoundError(f"no {stems[0]}.parquet in {folder}, nor {stems[1]}.csv")
    if path.suffix == ".parquet":
        with open(path, "rb") as file:
            start = file.read(20)
        if start.startswith(b"version https://git"):
            raise ValueError(f"{path}: holds a pointer of Git LFS instead of the data; fetch them with git lfs pull")
    return open_table(path)


def _rows(table: Table, names: Sequence[str], where: dict[str, Collection[object]], bad: BadRows) -> Iterator[Chunk]:
    """Chunks with the columns of ``names`` and the rows of ``where``; of Parquet no other rows are read."""
    if missing := [name for name in names if name not in table.names]:
        raise ValueError(f"{table.path}: has no column {missing[0]}; it has {', '.join(table.names[:12])}")
    where = {name: values for name, values in where.items() if name in table.names}
    if ".parquet" in table.path.suffixes:
        yield from table.chunks(bad, names, where)
        return
    for chunk in table.chunks(bad, [*names, *where]):
        allowed = [{str(v) for v in values} for values in where.values()]
        fields = zip(*(chunk.columns[name] for name in where), strict=True) if where else [()] * len(chunk.lines)
        kept = [i for i, row in enumerate(fields) if all(v in of for v, of in zip(row, allowed, strict=True))]
        yield Chunk([chunk.lines[i] for i in kept], {n: [chunk.columns[n][i] for i in kept] for n in names})


def _read_judgments(table: Table, locale: str | None, version: str, bad: BadRows) -> dict[tuple[str, str], _Query]:
    names = ["query", "product_id", "esci_label", *(n for n in ("product_locale", "split") if n in table.names)]
    where: dict[str, Collection[object]] = {}
    if locale is not None:
        where["product_locale"] = [locale]
    if version == "small":
        where["small_version"] = [1]
    queries: dict[tuple[str, str], _Query] = {}
    for chunk in _rows(table, names, where, bad):
        columns = chunk.columns
        nothing = [""] * len(chunk.lines)
        markets, splits = columns.get("product_locale", nothing), columns.get("split", nothing)
        rows = zip(
            chunk.lines, columns["query"], columns["product_id"], columns["esci_label"], markets, splits, strict=True
        )
        for line, query, product, label, market, split in rows:
            text = " ".join(str(query).split())
            letter = _WORDS.get(str(label).upper(), str(label).upper())
            if not text or not product:
                bad.add(table.path, line, "query" if not text else "product_id", "some text", "")
            elif letter not in GAINS:
                bad.add(table.path, line, "esci_label", "E, S, C or I", label)
            else:
                market = market or ""
                one = queries.setdefault((market, text.casefold()), _Query(text, market))
                # A product is known by its market too. Judged twice, the better judgment holds.
                name = f"{market}/{product}" if locale is None and market else str(product)
                one.gains[name] = max(GAINS[letter], one.gains.get(name, 0.0))
                one.splits.add(str(split))
    return queries


def _split(
    queries: dict[tuple[str, str], _Query],
    test_fraction: float,
    max_train: int | None,
    max_test: int | None,
    seed: int,
) -> tuple[list[_Query], list[_Query]]:
    """Training and test queries in order of their texts; a query's part and choice depend on itself and the seed."""
    keys = sorted(queries)
    of_text = stable_keys(["\t".join(key) for key in keys])
    drawn, order = uniform_hash(seed, of_text), uniform_hash(seed + 1, of_text)
    nothing_but_train = all(query.splits == {"train"} for query in queries.values())
    parts: tuple[list[int], list[int]] = ([], [])
    for i, key in enumerate(keys):
        splits = queries[key].splits
        if "test" in splits:
            is_test = True
        elif "train" in splits and not nothing_but_train:
            is_test = False
        else:
            is_test = bool(drawn[i] < test_fraction)
        parts[is_test].append(i)
    chosen = [
        sorted(sorted(p, key=order.__getitem__)[:most]) for p, most in zip(parts, (max_train, max_test), strict=True)
    ]
    return [queries[keys[i]] for i in chosen[0]], [queries[keys[i]] for i in chosen[1]]


def _read_products(table: Table, products: list[str], locale: str | None, bad: BadRows, notes: list[str]) -> Catalogue:
    found = {role: next((n for n in names if n in table.names), None) for role, names in _COLUMNS.items()}
    columns = {role: name for role, name in found.items() if name is not None}
    if "title" not in columns:
        raise ValueError(f"{table.path}: has no column product_title; it has {', '.join(table.names[:12])}")
    by_market = "product_locale" in table.names
    names = ["product_id", *columns.values(), *(["product_locale"] if by_market else [])]
    wanted_ids = {p.rpartition("/")[2] for p in products}
    where: dict[str, Collection[object]] = {"product_id": wanted_ids}
    if locale is not None:
        where["product_locale"] = [locale]
    wanted = dict.fromkeys(products, ("", "", ""))
    for chunk in _rows(table, names, where, bad):
        fields = (chunk.columns.get(columns.get(role, ""), [""] * len(chunk.lines)) for role in _COLUMNS)
        markets = chunk.columns.get("product_locale", [""] * len(chunk.lines))
        for product, market, title, brand, color in zip(chunk.columns["product_id"], markets, *fields, strict=True):
            name = f"{market}/{product}" if locale is None and market else str(product)
            if name in wanted and not wanted[name][0]:
                wanted[name] = (short_title(str(title)), str(brand), str(color))
    untitled = sum(not title for title, _, _ in wanted.values())
    if untitled:
        notes.append(f"{untitled} of {len(wanted)} products have no title: they are called by their ids")
    titles = tuple(title or product for product, (title, _, _) in wanted.items())
    known = {
        role: np.array([values[i] for values in wanted.values()], dtype=object)
        for i, role in ((1, "brand"), (2, "color"))
    }
    return Catalogue(tuple(wanted), titles, ((),) * len(wanted), known)


class _Judged(NamedTuple):
    """A query with its judged products."""

    user: int
    text: str
    market: str
    items: np.ndarray  # (J,) int64
    gains: np.ndarray  # (J,) float32

    @classmethod
    def of(cls, user: int, query: _Query, catalogue: Catalogue) -> _Judged:
        items = np.array([catalogue.index[product] for product in query.gains])
        return cls(user, query.text, query.locale, items, np.array(list(query.gains.values()), dtype=np.float32))


def _judgments_of(queries: list[_Query], catalogue: Catalogue) -> np.ndarray:
    """(items,) float32: for how many of the queries each product is judged."""
    return np.bincount(
        [catalogue.index[product] for query in queries for product in query.gains], minlength=len(catalogue)
    ).astype(np.float32)


class _Lists:
    """The lists of some queries; the negatives from other queries, and the order, are drawn anew from a seed.

    Args:
        judgments: (items,) see ``_judgments_of``, of training queries.
        counted: whether the queries' own judgments are among them.
    """

    def __init__(
        self,
        queries: list[_Judged],
        judgments: np.ndarray,
        counted: bool,
        num_candidates: int,
        max_candidates: int | None,
    ) -> None:
        self.queries, self.judgments, self.counted = queries, judgments, counted
        self.num_candidates, self.max_candidates = num_candidates, max_candidates
        markets = {query.market for query in queries}
        self.pools = {m: np.unique(np.concatenate([q.items for q in queries if q.market == m])) for m in markets}

    def draw(self, seed: int) -> list[RankingList]:
        return [self._list(query, np.random.default_rng((seed, query.user))) for query in self.queries]

    def _list(self, query: _Judged, rng: np.random.Generator) -> RankingList:
        items, gains = query.items, query.gains
        if self.max_candidates is not None and len(items) > self.max_candidates:
            best, others = int(np.argmax(gains)), rng.permutation(len(items))
            kept = np.concatenate([[best], others[others != best]])[: self.max_candidates]
            items, gains = items[kept], gains[kept]
        pool = np.setdiff1d(self.pools[query.market], query.items)
        pooled = rng.choice(pool, size=min(len(pool), max(0, self.num_candidates - len(items))), replace=False)
        order = rng.permutation(len(items) + len(pooled))
        candidates = np.concatenate([items, pooled])[order]
        own = np.isin(candidates, query.items) if self.counted else False  # what is to be predicted
        return RankingList(
            user=query.user,
            time=0.0,
            history=np.zeros(0, dtype=np.int64),
            candidates=candidates,
            interest=np.concatenate([gains, np.full(len(pooled), np.nan, dtype=np.float32)])[order],
            popularity=self.judgments[candidates] - np.float32(1.0) * own,
            trend=np.zeros(len(candidates), dtype=np.float32),
            query=query.text,
        )

    def summary(self, what: str) -> str:
        missing = [self.num_candidates - len(q.items) for q in self.queries if len(q.items) < self.num_candidates]
        return (
            f"{len(missing)} of {len(self.queries)} {what} queries have fewer than {self.num_candidates} judged "
            f"products: {sum(missing)} negatives come from other queries"
        )
