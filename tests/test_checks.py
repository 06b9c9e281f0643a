"""Options that say of themselves which values they take."""

from dataclasses import dataclass

import pytest

from flexrec.checks import check_options, option


@dataclass
class Options:
    kind: str = option("a", "one of two", choices=("a", "b"))
    count: int = option(1, "at least one", low=1)
    rate: float | None = option(None, "positive", above=0)
    share: float = option(0.5, "a share", above=0, high=1)
    seed: int = option(0, "a seed", low=0, high=9)
    width: float = option(3.0, "more than two", above=2)
    anything: float = 0.0

    def __post_init__(self):
        check_options(self)


def test_values_within_their_range_are_taken():
    Options()
    Options(kind="b", count=1, rate=1e-300, share=1.0, seed=9, anything=float("nan"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "c"}, "kind must be one of 'a', 'b'; got 'c'"),
        ({"kind": None}, "kind must be one of 'a', 'b'; got None"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"rate": 0.0}, "rate must be positive, got 0.0"),
        ({"rate": float("nan")}, "rate must be finite, got nan"),
        ({"rate": float("inf")}, "rate must be finite, got inf"),
        ({"share": 0.0}, r"share must lie in \(0, 1\], got 0.0"),
        ({"share": 1.5}, r"share must lie in \(0, 1\], got 1.5"),
        ({"seed": -1}, r"seed must lie in \[0, 9\], got -1"),
        ({"seed": 10}, r"seed must lie in \[0, 9\], got 10"),
        ({"width": 2.0}, "width must exceed 2, got 2.0"),
    ],
)
def test_any_other_is_named(given, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Options(**given)
