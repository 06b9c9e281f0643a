"""``flexrec serve``: a ranker behind an address, until it is told to stop."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flexrec.serving.app import make_app, require_serving
from flexrec.serving.options import ServeOptions
from flexrec.serving.ranker import Ranker


def serve(folder: str | Path, options: ServeOptions, say: Callable[[str], None] | None = None) -> None:
    """Answer requests with a run until SIGTERM or SIGINT, then finish what is in flight.

    Args:
        folder: of a run, or a repository's name at the hub.
        say: is told where it answers, and that it has stopped; by default standard output is.

    Raises:
        ImportError: the extra ``serve`` is not installed.
        OSError: the address cannot be listened at.
        FileNotFoundError, ValueError: what loading the run raises.
    """
    require_serving()
    import uvicorn

    tell: Callable[[str], None] = say or partial(print, flush=True)
    listening = _bound(options.host, options.port)
    with listening:
        ranker = Ranker.from_pretrained(folder)
        config = uvicorn.Config(
            make_app(ranker, options),
            log_level="warning",
            access_log=False,
            server_header=False,
            # As long as a request may take, and a little.
            timeout_graceful_shutdown=int(options.timeout) + 5,
        )

        class Server(uvicorn.Server):
            async def startup(self, sockets: Any = None) -> None:
                await super().startup(sockets)
                tell(f"{folder} answers at {_url(listening)} (a page to try it; /v1/rerank, /rank); Ctrl-C stops it")

        server = Server(config)
        # uvicorn finishes what is in flight at a signal, and raises it again at the end. It was handled by then.
        previous = {
            number: signal.signal(number, lambda *_: setattr(server, "should_exit", True))
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            server.run(sockets=[listening])
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    tell("stopped")


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address, before anything is loaded for it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise OSError(
            f"cannot listen at {host}, port {port} ({error.strerror or error}): choose another with --host or --port"
        ) from None
    return bound


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
