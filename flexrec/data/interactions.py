"""Any log of interactions that a person has, from files to a data set to train on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from flexrec.data.build import build_dataset, choose_test_users, why_few_lists
from flexrec.data.columns import parse_columns
from flexrec.data.impressions import Shown, build_from_impressions
from flexrec.data.interest import Gain, interest_of
from flexrec.data.items import Codes, ItemIndex, bare_catalogue, read_items
from flexrec.data.layouts import LOG_STEMS, find_items, find_log, open_source
from flexrec.data.lists import Catalogue, Interactions, RankingDataset
from flexrec.data.log import Log, read_log
from flexrec.data.options import InteractionsOptions, takes
from flexrec.data.tables import BadRows
from flexrec.data.thinning import uniform_hash
from flexrec.data.values import id_order

DAY = 24 * 60 * 60  # seconds
FEW_LISTS = 100


@takes(InteractionsOptions)
def load_interactions(folder: str | Path, options: InteractionsOptions) -> RankingDataset:
    """A data set from a folder with a log of interactions and, if there is one, a table of its items.

    The log is a file such as ``interactions.csv`` (or .tsv, .jsonl, .parquet, each gzipped or not; ``ratings``,
    ``events``, ``behaviors`` and other usual names too) with a user and an item in each row, and any of: a rating, a
    watch ratio, an amount, a click (0 or 1), the word of an event; a timestamp; a split; the impression that a row
    belongs to, or whole impressions ("N1-0 N2-1"). The items are a file such as ``items.csv`` (``movies``, ``books``,
    ``news`` ..) with an id and any of title, text, categories and further columns. Columns are found by their usual
    names (``flexrec.data.columns``), and moments, codes and written forms by what they are; the data set's ``notes``
    say what was found, and what was skipped.

    Args:
        folder: the folder, or the log itself.
        columns: which columns are what, where their names do not tell: "user=customer,item=sku", a YAML file or a
            mapping; see ``flexrec.data.columns.parse_columns``.
        log_file, items_file: names of the files in the folder, where they are not the usual ones.
        events: read only these kinds of events; None: all.
        event_values, gain, gain_range, threshold, codes: how feedback becomes interest, see
            ``flexrec.data.interest.Gain``; ``gain_range`` are its low and high.
        day_first: whether in 03/04/2020 the day is 3; None: as the file tells.
        strict: a bad row is an error; else it is skipped, counted and reported.
        negatives: candidates without feedback are drawn by popularity or uniformly, or a list is one impression of the
            log: what was shown and passed over are its negatives.
        num_candidates, num_positives, history_length, min_history: of a list, see ``flexrec.data.build.ListBuilder``.
            With negatives="impressions" ``num_candidates`` is the most that a list has.
        split: "given": as the log's column of splits says (validation rows are left out); "user" and "time": see
            ``build_dataset``. None: "given" where there is such a column, else "user".
        test_fraction, num_test_users, time_quantile: see ``build_dataset``.
        lists_per_user, test_lists_per_user, max_train_lists, max_test_lists: see ``build_dataset``.
        trend_days: length of the windows in which trends are seen; None: 30 days, or a tenth of the training log where
            that is less. Where moments are of no known unit it is in theirs.
        seed: of the split, the lists and, in a log without times, the order of each user's events.

    Without times the order of events is not known: each user's are put into an order drawn from the seed, popularity
    counts what lies before a list's place in it, and nothing can be said of trends.

    Raises:
        FileNotFoundError: no such folder, or no log in it.
        ValueError: files that cannot be read as such tables, a bad row with ``strict``, too few events for any list,
            bad arguments; always on one line, naming file, line, column, what was got and expected where it applies.
        ImportError: a Parquet file without pyarrow.

    Example:
        >>> from pathlib import Path
        >>> from flexrec.data import load_interactions
        >>> rng, shop = np.random.default_rng(0), Path("shop")
        >>> shop.mkdir()
        >>> bought = [(user, item) for user in range(20) for item in rng.permutation(30)[:20]]
        >>> rows = [f"{user},{item},{rng.integers(1, 6)},{10**9 + 999 * n}" for n, (user, item) in enumerate(bought)]
        >>> _ = (shop / "interactions.csv").write_text("\\n".join(["user,item,rating,timestamp", *rows]))
        >>> data = load_interactions(shop, num_candidates=8)
        >>> len(data.catalogue), len(data.test) > 0
        (30, True)
    """
    read = read_interactions(folder, options)
    window = _trend_window(read.rows.times[read.training], options.trend_days) if read.timed else None
    notes = list(read.notes)
    if options.negatives == "impressions":
        if window is None or read.groups is None:
            raise ValueError(f"negatives='impressions' needs times and what was passed over, and {folder} has none")
        shown = Shown(read.rows, read.groups, read.told)
        when: dict[str, Any] = {"trend_window": window, "time_boundary": read.time_boundary}
        dataset = build_from_impressions("interactions", read.catalogue, shown, options, test_rows=read.test, **when)
    else:
        # What was shown in an impression and passed over is no interaction.
        chosen = np.ones(len(read.rows), dtype=bool) if not read.has_impressions else read.told != 0
        dataset = build_dataset(
            "interactions",
            read.catalogue,
            read.rows.select(chosen),
            test_rows=read.test[chosen],
            split="user" if read.time_boundary is None else "time",
            num_positives=options.num_positives,
            negatives=options.negatives,
            trend_window=window,
            time_boundary=read.time_boundary,
            **options.of_lists(),
        )
    if len(dataset.train) < FEW_LISTS:
        num_positives = 1 if options.negatives == "impressions" else options.num_positives
        why = why_few_lists(dataset.log, options.min_history, num_positives)
        notes.append(f"only {len(dataset.train)} lists to train on. {why}")
    return replace(dataset, noise=read.noise, user_ids=read.user_ids, notes=tuple(notes))


@dataclass(frozen=True)
class ReadInteractions:
    """What a folder holds, read; M rows in order of time.

    Attributes:
        catalogue: the items.
        user_ids: public ids of the users.
        rows: all interactions; interest is NaN where an item was seen and not rated.
        told: (M,) float32, the interest that each row tells by itself, whatever its user did with the item before.
        test: (M,) bool, the rows to test on.
        timed: whether the times are the log's own; else they are drawn, see ``in_order_of_time``.
        time_boundary: with split="time", the moment before which training lies.
        groups: (M,) int64, which rows were shown together; or None.
        has_impressions: whether the log says so itself; else rows of one user and moment are taken together.
        noise: of the interest, estimated from repeats; 0 where that cannot be.
        notes: what was found and what was skipped.
    """

    catalogue: Catalogue
    user_ids: tuple[str, ...]
    rows: Interactions
    told: np.ndarray
    test: np.ndarray
    timed: bool
    time_boundary: float | None
    groups: np.ndarray | None
    has_impressions: bool
    noise: float
    notes: tuple[str, ...]

    @property
    def training(self) -> np.ndarray:
        """(M,) bool: the rows that something may be fitted on."""
        return ~self.test if self.time_boundary is None else ~self.test & (self.rows.times < self.time_boundary)


def read_interactions(folder: str | Path, options: InteractionsOptions) -> ReadInteractions:
    """Read a folder without drawing lists; options and errors are those of ``load_interactions``."""
    low, high = options.gain_range or (None, None)
    # Texts have become mappings.
    codes, event_values = cast("dict[float, str]", options.codes), cast("dict[str, float]", options.event_values)
    gain = Gain(options.gain, low, high, options.threshold, codes, event_values)
    mapping, split, seed = parse_columns(options.columns), options.split, options.seed
    bad = BadRows(options.strict)
    notes: list[str] = []
    log_path, items_path = find_files(Path(folder), options.log_file, options.items_file)
    index: Codes | ItemIndex = Codes()
    if items_path is not None:
        named = dict(mapping.items)
        table = open_source(items_path, named)
        if "id" not in named and set(mapping.interactions.get("item", ())) & set(table.names):
            named["id"] = mapping.interactions["item"]  # both tables call it alike
        catalogue = read_items(table, named, bad, notes)
        index = ItemIndex(catalogue.ids)
    source = open_source(log_path, mapping.interactions)
    notes += source.table.notes
    log = read_log(
        source,
        mapping.interactions,
        index,
        bad,
        notes,
        events=options.events,
        day_first=options.day_first,
        with_splits=split in (None, "given"),
    )
    if items_path is None:
        catalogue, log = _items_of_log(log, index)
    log, test = _split(log, options)
    log, test, timed = in_order_of_time(log, test, catalogue.ids, seed)
    assert log.times is not None
    boundary, training = None, ~test
    if split == "time":
        if not timed:
            raise ValueError(f"split='time' needs times, and {log_path} has none")
        boundary = float(np.quantile(log.times[~test], options.time_quantile, method="higher"))
        training = ~test & (log.times < boundary)
    kept, interest, told, noise = interest_of(log, training, test, gain, notes)
    log = log.select(kept)
    assert log.times is not None
    return ReadInteractions(
        catalogue=catalogue,
        user_ids=tuple(log.user_ids),
        rows=Interactions(log.users.astype(np.int64), log.items.astype(np.int64), interest[kept], log.times),
        told=told[kept],
        test=test[kept],
        timed=timed,
        time_boundary=boundary,
        groups=_groups(log, timed),
        has_impressions=log.groups is not None,
        noise=noise,
        notes=(*notes, *bad.notes()),
    )


def find_files(folder: Path, log_file: str | None, items_file: str | None) -> tuple[Path, Path | None]:
    """The log and the items of a folder; see ``load_interactions``."""
    if folder.is_file():
        folder, log_file = folder.parent, folder.name
        items = None
    elif folder.is_dir():
        items = find_items(folder)
    else:
        raise FileNotFoundError(f"there is no folder {folder}")
    for name in (log_file, items_file):
        if name is not None and not (folder / name).is_file():
            raise FileNotFoundError(f"there is no file {name} in {folder}")
    log = folder / log_file if log_file is not None else find_log(folder)
    if log is None:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise FileNotFoundError(
            f"no log of interactions in {folder}: expected a file such as interactions.csv, with one of the names "
            f"{', '.join(LOG_STEMS[:9])} and .csv, .tsv, .jsonl or .parquet, gzipped or not; there is {there}"
        )
    if items_file is not None:
        items = folder / items_file
    return log, None if items == log else items


def _items_of_log(log: Log, codes: Mapping[str, int]) -> tuple[Catalogue, Log]:
    """A catalogue of the ids that the log names, in an order that the order of rows has no part in."""
    ids = id_order(codes)
    rank = np.empty(len(ids), dtype=np.int32)
    rank[[codes[item_id] for item_id in ids]] = np.arange(len(ids))
    return bare_catalogue(ids), replace(log, items=rank[log.items])


def _split(log: Log, options: InteractionsOptions) -> tuple[Log, np.ndarray]:
    """The log, without validation rows where it says which are, and which of its rows are to test on."""
    if options.split != "given" and (options.split is not None or log.splits is None):
        tested = choose_test_users(log.users, options.test_fraction, options.num_test_users, options.seed)
        return replace(log, splits=None), tested[log.users]
    if log.splits is None:
        raise ValueError("split='given' needs a column that says train or test, which the log does not have")
    kept = log.splits != 2
    test = (log.splits == 1)[kept]
    if not 0 < np.count_nonzero(test) < len(test):
        raise ValueError(
            f"of {len(log)} rows {np.count_nonzero(test)} are to test on, {np.count_nonzero(~test)} to train on and "
            f"{np.count_nonzero(~kept)} for validation, as the column of splits says (0, 1 and 2 are train, validation "
            f"and test): some must be to test on, and some to train on; split='user' draws them instead"
        )
    log = log.select(kept)
    return log, test


def in_order_of_time(log: Log, test: np.ndarray, item_ids: Collection[str], seed: int) -> tuple[Log, np.ndarray, bool]:
    """The log and its test rows sorted by time, and whether its times are times; where it has none they are drawn.

    Drawn times lie in [0, 1), those of the test rows of a given split in [1, 2). A row's time depends on the seed and
    the ids of its user and its item alone, so that no other row has a part in it.
    """
    timed = log.times is not None
    if not timed:
        users, items = stable_keys(log.user_ids), stable_keys(item_ids)
        drawn = uniform_hash(seed, users[log.users], items[log.items])
        log = replace(log, times=drawn if log.splits is None else np.add(drawn, test))
    order = np.lexsort((log.items, log.users, log.times))  # type: ignore[arg-type]
    return log.select(order), test[order], timed


def stable_keys(ids: Collection[str]) -> np.ndarray:
    """(n,) uint64 from the text of the ids alone."""
    digests = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in ids)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _trend_window(times: np.ndarray, trend_days: float | None) -> float:
    """In the unit of the times: seconds, or where they are small numbers no known one."""
    in_seconds = np.median(times) > 1e8
    if trend_days is not None:
        return trend_days * DAY if in_seconds else trend_days
    tenth = float(times.max() - times.min()) / 10 or 1.0
    return min(30.0 * DAY, tenth) if in_seconds else tenth


def _groups(log: Log, timed: bool) -> np.ndarray | None:
    """(M,) which rows were shown together, to one user: by impression, else by user and moment; -1 for none."""
    if log.groups is not None:
        keys = np.stack([log.groups, np.where(log.groups < 0, 0, log.users)])
        groups = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
        return np.where(log.groups < 0, -1, groups)
    if log.feedback not in ("clicked", "event") or not timed:
        return None
    assert log.times is not None
    return np.unique(np.stack([log.users.astype(np.float64), log.times]), axis=1, return_inverse=True)[1].reshape(-1)
