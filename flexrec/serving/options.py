"""What ``flexrec serve`` is configured with. Nothing heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from flexrec.checks import check_options, option


@dataclass(frozen=True)
class ServeOptions:
    """What ``flexrec serve`` takes.

    Raises:
        ValueError: a number out of its range.
    """

    host: str = option("127.0.0.1", "address to listen at; 0.0.0.0 for all of this machine's", metavar="ADDRESS")
    port: int = option(8000, "to listen at; 0 for one that is free", low=0, high=65535)
    max_batch: int = option(32, "requests that are ranked together", low=1)
    max_wait: float = option(5.0, "milliseconds that a request waits for others", low=0, metavar="MS")
    queue: int = option(256, "requests that may wait; further ones are answered 503", low=1)
    timeout: float = option(30.0, "seconds after which a request is answered 504", above=0, metavar="S")
    max_body: int = option(4 * 2**20, "bytes of a request; longer ones are answered 413", low=1)

    def __post_init__(self) -> None:
        check_options(self)
