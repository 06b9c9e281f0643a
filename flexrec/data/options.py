"""What the loaders of data sets take, said once: their keyword arguments, the command line and what a run remembers of
its data are made from it. Nothing heavy is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass, fields
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from flexrec.checks import check_options, flag_of, option
from flexrec.data.columns import parse_columns

_SPLITS = ("user", "time")
_candidates = partial(option, help="length of a list", low=1, flag="candidates")
_relevant = partial(
    option, help="of a list's candidates, how many are the user's next items", low=1, flag="relevant", metavar="N"
)
_history = partial(option, help="the most items that a history shows", low=1, flag="history")
_min_history = partial(option, help="the least items before a list", low=1)
_split = partial(
    option,
    help="train and test on different users, in addition before and after a moment, or as the log has it; "
    "default: given where the log has a column of splits, else user",
)
_test_fraction = partial(option, help="share of the users (esci: of the queries without a part) to test on")
_lists_per_user = partial(option, help="at most so many training lists of a user", low=1)
_max_train_lists = partial(option, help="of more training lists a random choice; default: all", low=1)
_max_test_lists = partial(option, help="of more test lists a random choice; default: all", low=1)
_trend_days = partial(
    option, help="days of the windows that trends compare; default: 30, or a tenth of the log", above=0
)
_strict = partial(option, help="a bad row is an error; else it is skipped, counted and reported")


@dataclass(kw_only=True)
class ListOptions:
    """How lists are cut from a log and whom they are tested on, as :func:`flexrec.data.build_dataset` takes it.

    Fields made by ``flexrec.checks.option`` are options of the command line; the others are for Python alone.
    """

    num_candidates: int = _candidates(30)
    history_length: int = _history(20)
    min_history: int = _min_history(10)
    lists_per_user: int = _lists_per_user(32)
    test_lists_per_user: int = 10
    max_train_lists: int | None = _max_train_lists(None)
    max_test_lists: int | None = _max_test_lists(None)
    test_fraction: float = _test_fraction(0.2)
    num_test_users: int | None = None
    trend_smoothing: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self)

    def of_lists(self) -> dict[str, Any]:
        """The options of this class by name."""
        return {one.name: getattr(self, one.name) for one in fields(ListOptions)}


@dataclass(kw_only=True)
class MovieLensOptions(ListOptions):
    """Arguments of :func:`flexrec.data.load_movielens`."""

    num_positives: int = _relevant(10)
    split: Literal["user", "time"] = _split("user", choices=_SPLITS)
    time_quantile: float = 0.8
    trend_days: float = _trend_days(180.0)
    strict: bool = _strict(True)


@dataclass(kw_only=True)
class KuaiRecOptions(ListOptions):
    """Arguments of :func:`flexrec.data.load_kuairec`."""

    feedback: int = option(100, "per cent of the feedback that is kept: 100, 30, 10 or 3", metavar="{100,30,10,3}")
    matrix: Literal["big", "small"] | None = option(
        None,
        "the big or the small one of the published matrices; default: big, where it is there",
        choices=("big", "small"),
    )
    watched_twice: float = 2.0
    split: Literal["user", "time"] = _split("user", choices=_SPLITS)
    time_quantile: float = 0.8
    lists_per_user: int = _lists_per_user(8)
    test_lists_per_user: int = 3
    max_train_lists: int | None = _max_train_lists(20_000)
    max_test_lists: int | None = _max_test_lists(2_000)
    trend_days: float = _trend_days(1.0)
    strict: bool = _strict(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feedback not in FEEDBACK:
            raise ValueError(f"feedback must be one of {', '.join(map(str, FEEDBACK))} per cent, got {self.feedback}")


FEEDBACK = (100, 30, 10, 3)


@dataclass(kw_only=True)
class InteractionsOptions(ListOptions):
    """Arguments of :func:`flexrec.data.load_interactions`.

    ``columns``, ``event_values`` and ``codes`` are mappings, or texts such as "user=customer,item=sku".
    """

    columns: str | Path | Mapping[str, Any] | None = option(
        None,
        "which columns are what, as in user=customer,item=sku, or a .yaml file that says it; default: by usual names",
        metavar="TEXT_OR_YAML",
    )
    log_file: str | None = option(None, "name of the log in the folder; default: the usual ones", metavar="NAME")
    items_file: str | None = option(None, "name of the table of items; default: the usual ones", metavar="NAME")
    events: Collection[str] | None = option(None, "read only events of these words; default: all", metavar="WORD")
    event_values: str | Mapping[str, float] | None = option(
        None,
        "what events are worth, as in view=0.1,order=1; default: by the usual words",
        metavar="TEXT",
    )
    gain: Literal["linear", "threshold", "quantile"] = option(
        "linear",
        "interest grows from the low end of --gain-range to the high one, is 1 from --threshold on, or is the share "
        "of weaker feedback",
        choices=("linear", "threshold", "quantile"),
    )
    gain_range: tuple[float, float] | None = option(
        None, "feedback of interest 0 and of interest 1; default: by the kind of feedback", metavar=("LOW", "HIGH")
    )
    threshold: float | None = option(None, "feedback from which on interest is 1; default: by the kind of feedback")
    codes: str | Mapping[float, str] | None = option(
        None,
        "ratings that are none, as in 0=seen,99=missing; default: found out",
        metavar="TEXT",
    )
    day_first: bool | None = option(None, "in 03/04/2020 the day is 3; default: as the file tells")
    negatives: Literal["popularity", "uniform", "impressions"] = option(
        "popularity",
        "the other candidates of a list: by popularity, uniformly, or what was shown with the chosen ones",
        choices=("popularity", "uniform", "impressions"),
    )
    num_positives: int = _relevant(5)
    min_history: int = _min_history(3)
    split: Literal["given", "user", "time"] | None = _split(None, choices=("given", *_SPLITS))
    time_quantile: float = 0.8
    max_train_lists: int | None = _max_train_lists(50_000)
    max_test_lists: int | None = _max_test_lists(5_000)
    trend_days: float | None = _trend_days(None)
    strict: bool = _strict(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        mapping = parse_columns(self.columns)
        self.columns = {"interactions": dict(mapping.interactions), "items": dict(mapping.items)}
        if self.events is not None:
            self.events = (self.events,) if isinstance(self.events, str) else tuple(self.events)
        if self.gain_range is not None:
            low, high = _two(self.gain_range)
            self.gain_range = (low, high)
        self.event_values = _pairs("event_values", "view=0.1,order=1", self.event_values, lambda k, v: (k, float(v)))
        self.codes = _pairs("codes", "0=seen,99=missing", self.codes, lambda k, v: (float(k), v))


@dataclass(kw_only=True)
class EsciOptions:
    """Arguments of :func:`flexrec.data.load_esci`."""

    locale: str | None = option("us", "market: us, es or jp; all for all of them", metavar="MARKET")
    version: Literal["small", "large"] = option(
        "small", "the harder small part of the published queries, or all of them", choices=("small", "large")
    )
    num_candidates: int = _candidates(20)
    max_candidates: int | None = option(None, "of more judged products in a list so many; default: all", low=2)
    test_fraction: float = _test_fraction(0.2)
    max_train_lists: int | None = _max_train_lists(5_000)
    max_test_lists: int | None = _max_test_lists(1_000)
    strict: bool = _strict(False)
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(kw_only=True)
class SimulatedOptions:
    """The arguments of :func:`flexrec.data.simulate` that are options of the command line."""

    num_candidates: int = _candidates(30)
    history_length: int = _history(20)
    max_train_lists: int | None = _max_train_lists(None)
    observed_share: float = option(0.1, "share of the feedback that is collected", above=0, high=1)
    missing: Literal["random", "exposure"] = option(
        "random", "which feedback that is: by chance, or of what was exposed", choices=("random", "exposure")
    )

    def __post_init__(self) -> None:
        check_options(self)


OPTIONS: dict[str, type[Any]] = {
    "simulated": SimulatedOptions,
    "movielens": MovieLensOptions,
    "kuairec": KuaiRecOptions,
    "esci": EsciOptions,
    "interactions": InteractionsOptions,
}


def all_data_options(dataset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a data set by name: as ``given``, the others by default.

    Raises:
        ValueError: an option that the data set does not take, or a value that it does not take.

    Example:
        >>> from flexrec.data.options import all_data_options
        >>> all_data_options("simulated", {"num_candidates": 8})["history_length"]
        20
    """
    taken = [one.name for one in said_of(dataset)]
    for name in given:
        if name not in taken:
            of = {other: one for other in OPTIONS for one in said_of(other) if one.name == name}
            flag = flag_of(next(iter(of.values()))) if of else name
            hint = f"it is one of {', '.join(of)}" if of else f"its options are {', '.join(taken) or 'none'}"
            raise ValueError(f"{flag} is no option of --dataset {dataset}: {hint}")
    chosen = OPTIONS[dataset](**given) if taken else None
    return {name: getattr(chosen, name) for name in taken}


def said_of(dataset: str) -> list[Field[Any]]:
    """The fields of a data set's options that are options of the command line, the list's own first."""
    return [one for one in fields(OPTIONS[dataset]) if "help" in one.metadata] if dataset in OPTIONS else []


_P = ParamSpec("_P")
_Options = TypeVar("_Options")
_Dataset = TypeVar("_Dataset")


def takes(
    options: Callable[_P, _Options],
) -> Callable[[Callable[[str | Path, _Options], _Dataset]], Callable[Concatenate[str | Path, _P], _Dataset]]:
    """Gives a loader the fields of ``options`` as its keyword arguments, in place of the object it is written for."""

    def with_keywords(load: Callable[[str | Path, _Options], _Dataset]) -> Callable[..., _Dataset]:
        @wraps(load)
        def loader(folder: str | Path, *args: _P.args, **kwargs: _P.kwargs) -> _Dataset:
            return load(folder, options(*args, **kwargs))

        shown = inspect.signature(load)
        folder = next(iter(shown.parameters.values()))
        keywords = inspect.signature(options).parameters.values()
        loader.__signature__ = shown.replace(parameters=[folder, *keywords])  # type: ignore[attr-defined]
        return loader

    return with_keywords


def _two(values: Any) -> tuple[float, float]:
    if not isinstance(values, Collection) or len(values) != 2:
        raise ValueError(f"gain_range must be two numbers, its low and its high end, got {values!r}")
    low, high = values
    return low, high


def _pairs(name: str, example: str, given: Any, read: Callable[[str, str], tuple[Any, Any]]) -> dict[Any, Any] | None:
    """A mapping from itself, or from a text of pairs."""
    if given is None:
        return None
    if isinstance(given, str):
        given = dict((part.rpartition("=")[::2]) for part in given.split(",") if part.strip())
    try:
        return dict(read(key.strip() if isinstance(key, str) else key, value) for key, value in given.items())
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{name} must look like {example}, got {given!r}") from None
