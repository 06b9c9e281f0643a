"""KuaiRec, from a folder in the format in which its authors publish it, or a sample of it.

Chongming Gao et al. 2022. KuaiRec: A Fully-observed Dataset and Insights for Evaluating Recommender Systems. CIKM '22.
https://doi.org/10.1145/3511808.3557220, https://kuairec.com, CC BY-SA 4.0.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from flexrec.data.build import build_dataset, choose_test_users
from flexrec.data.interactions import DAY, in_order_of_time
from flexrec.data.interest import Gain, interest_of
from flexrec.data.items import ItemIndex, read_items
from flexrec.data.layouts import open_source
from flexrec.data.lists import Catalogue, Interactions, RankingDataset
from flexrec.data.log import read_log
from flexrec.data.options import KuaiRecOptions, takes
from flexrec.data.tables import BadRows, find_table
from flexrec.data.thinning import Thinning

_LOG_COLUMNS = {"user": ("user_id",), "item": ("video_id",), "watch_ratio": ("watch_ratio",)}
_ITEM_FILES = ("kuairec_caption_category", "items", "item_categories")
# Published names first, then those of the sample.
_CAPTIONS, _CATEGORIES = ("caption",), (("first_level_category_name",), ("category1_en",), ("category1",), ("feat",))


@takes(KuaiRecOptions)
def load_kuairec(folder: str | Path, options: KuaiRecOptions) -> RankingDataset:
    """Lists of the next ``num_candidates`` videos that a user watched, all with feedback, some of it withheld.

    The interest of a view is clip(watch ratio / ``watched_twice``, 0, 1): a video watched to its end counts 1/2, one
    watched twice 1 (the authors take a watch ratio above 2 for a like). Topics are the categories of the first level;
    titles are captions. All candidates were watched, so that no negative is sampled; a share of the feedback is
    withheld and belongs to pairs of a user and a video drawn from the seed: it is NaN in lists and their histories,
    absent from the log (``unobserved="critic"``), and kept as ``RankingList.truth`` for scoring. Its noise is estimated
    from what training users watched again. Trends compare the last ``trend_days`` days with those before. How lists
    are cut and split: see ``flexrec.data.build``.

    Args:
        folder: holds ``big_matrix.csv`` or ``small_matrix.csv`` and, for captions and categories,
            ``kuairec_caption_category.csv`` (else ``item_categories.csv``, whose categories are numbers), itself or in
            a folder ``data``; or a sample's ``interactions.csv`` and ``items.csv``. Each may be gzipped.
        feedback: per cent of the feedback that is kept: 100, 30, 10 or 3.
        matrix: the big one (13 % of all pairs, as the platform recommended) or the small one (nearly all pairs of
            1,411 users and 3,327 videos). None: the big one if it is there.
        strict: a bad row is an error; else it is skipped, counted and reported.

    The other arguments, and every default, stand in ``flexrec.data.options.KuaiRecOptions``.

    A sample without times has no order: see ``flexrec.data.interactions.load_interactions``. Then nothing can be said
    of trends, and ``split="time"`` is refused. Views without a time in a matrix that has times are skipped and counted.

    Raises:
        FileNotFoundError: no such folder, or no matrix in it.
        ValueError: a file that is not as published; too few views; bad arguments.

    Example:
        >>> from pathlib import Path
        >>> from flexrec.data import load_kuairec
        >>> rng, folder = np.random.default_rng(0), Path("kuairec")
        >>> folder.mkdir()
        >>> views = [(user, video) for user in range(20) for video in rng.permutation(30)[:20]]
        >>> rows = [f"{user},{video},{rng.random():.2f},{10**9 + 999 * n}" for n, (user, video) in enumerate(views)]
        >>> _ = (folder / "big_matrix.csv").write_text("\\n".join(["user_id,video_id,watch_ratio,timestamp", *rows]))
        >>> videos = [f"{video},[{video % 3}]" for video in range(30)]
        >>> _ = (folder / "item_categories.csv").write_text("\\n".join(["video_id,feat", *videos]))
        >>> data = load_kuairec(folder, num_candidates=5, min_history=3)
        >>> len(data.catalogue), data.unobserved
        (30, 'zero')
    """
    folder = Path(folder)
    bad = BadRows(options.strict)
    notes: list[str] = []
    catalogue = _read_videos(folder, bad, notes)
    named = ("big_matrix", "small_matrix", "interactions") if options.matrix is None else (f"{options.matrix}_matrix",)
    source = open_source(_find(folder, named))
    for (name,) in _LOG_COLUMNS.values():
        if name not in source.names:
            raise ValueError(f"{source.path}: has no column {name}; it is no matrix of KuaiRec")
    columns = {**_LOG_COLUMNS, **({"timestamp": ("timestamp",)} if "timestamp" in source.names else {})}
    log = read_log(source, columns, ItemIndex(catalogue.ids), bad, notes, with_splits=False)
    test = choose_test_users(log.users, options.test_fraction, options.num_test_users, options.seed)[log.users]
    log, test, timed = in_order_of_time(log, test, catalogue.ids, options.seed)
    assert log.times is not None
    if options.split == "time" and not timed:
        raise ValueError(f"split='time' needs times, and {source.path} has none")
    kept, interest, _, noise = interest_of(log, ~test, test, Gain(high=options.watched_twice), notes)
    log, test, interest = log.select(kept), test[kept], interest[kept]
    assert log.times is not None
    views = Interactions(log.users.astype(np.int64), log.items.astype(np.int64), interest, log.times)
    dataset = build_dataset(
        "kuairec",
        catalogue,
        views,
        trend_window=options.trend_days * DAY if timed else None,
        split=options.split,
        time_quantile=options.time_quantile,
        test_rows=test,
        num_positives=options.num_candidates,
        thinning=Thinning(options.feedback / 100, options.seed) if options.feedback < 100 else None,
        **options.of_lists(),
    )
    return replace(dataset, noise=noise, user_ids=tuple(log.user_ids), notes=(*notes, *bad.notes()))


def _find(folder: Path, stems: tuple[str, ...]) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"no KuaiRec folder at {folder}")
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    found = next(filter(None, (find_table(place, (stem,)) for stem in stems for place in places)), None)
    if found is None:
        raise FileNotFoundError(f"none of {', '.join(f'{stem}.csv' for stem in stems)} in {folder} or its folder data")
    return found


def _read_videos(folder: Path, bad: BadRows, notes: list[str]) -> Catalogue:
    """Captions and categories; rows that the line breaks in captions have broken are bad rows."""
    source = open_source(_find(folder, _ITEM_FILES))
    if "video_id" not in source.names:
        raise ValueError(f"{source.path}: has no column video_id; it is no table of KuaiRec's videos")
    categories = next((names for names in _CATEGORIES if names[0] in source.names), ())
    columns = {"id": ("video_id",), **({"categories": categories} if categories else {})}
    if _CAPTIONS[0] in source.names:
        columns["title"] = _CAPTIONS
    return read_items(source, columns, bad, notes)
