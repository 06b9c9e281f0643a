"""How a policy's answer is to be found: what ``flexrec rank`` takes. Nothing heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from flexrec.checks import check_options, option

MODES = ("decode", "one-pass")


@dataclass(frozen=True)
class Decoding:
    """How a policy's answer is found. By default greedily: at every rank the most probable item.

    Attributes:
        num_beams: with more than one, beam search for the most probable ranking.
        best_of: sample so many rankings and answer with the most probable of them.
        temperature, top_p: sample at this temperature (default: that of training), and among the most probable tokens
            that reach ``top_p`` together. Either makes an answer a sample.
        num_ranked: rank the first so many only (default: as in training).
        mode: "decode" item by item, or rank in "one-pass" over the prompt, by the distribution of the first item
            (default: as in training).

    Example:
        >>> from flexrec.decoding import Decoding
        >>> Decoding().samples, Decoding(best_of=8).samples
        (False, True)
    """

    num_beams: int = option(1, "search for the most probable ranking with B beams", low=1, metavar="B")
    best_of: int = option(1, "sample N rankings, answer with the most probable", low=1)
    temperature: float | None = option(None, "sample at this temperature; default: that of training", above=0)
    top_p: float | None = option(
        None,
        "sample among the most probable items that reach P together; default: do not",
        above=0,
        high=1,
        metavar="P",
    )
    num_ranked: int | None = option(None, "rank the best T only; default: as in training", low=1, metavar="T")
    mode: str | None = option(
        None,
        "decode a ranking item by item, or rank by the distribution of its first item, in one pass over the prompt; "
        "default: as in training",
        choices=MODES,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.num_beams > 1 and self.samples:
            raise ValueError("num_beams searches and best_of, temperature and top_p sample: choose one of the two")

        if self.mode == "one-pass" and (self.num_beams > 1 or self.top_p is not None):
            raise ValueError("mode 'one-pass' decodes nothing: it takes no num_beams and no top_p")

    @property
    def samples(self) -> bool:
        """Whether chance has a part in the answer."""
        return self.best_of > 1 or self.temperature is not None or self.top_p is not None
