"""Requests a second and their latency, of ``flexrec serve`` on loopback with 1, 8 and 32 clients.

    python bench/load.py RUN                        about half a minute
    python bench/load.py RUN --seconds 1 --clients 1 4 --json load.json

Starts the server on a free port, as a user would, and asks from as many threads as there are clients, each over a
connection of its own, the next request when the last is answered. Requests are for users of the run, with candidates
drawn from its catalogue. Clients take their share of the machine's cores, too.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 1.0  # seconds that do not count
COMMAND = "import sys; from flexrec.cli import main; sys.exit(main())"


def requests_of(run: Path, path: str, candidates: int, count: int = 64) -> list[bytes]:
    """Bodies for a path, drawn from what the run knows."""
    draw = random.Random(0)
    ids = json.loads((run / "catalogue.json").read_text(encoding="utf-8"))["ids"]
    users = list(json.loads((run / "histories.json").read_text(encoding="utf-8")))
    need = json.loads((run / "flexrec.json").read_text(encoding="utf-8"))["needs"][0]
    made = []
    for _ in range(count):
        chosen = draw.sample(ids, min(candidates, len(ids)))
        whose: dict[str, Any] = {"user": draw.choice(users)} if users else {"history": []}
        if path == "/rank":
            made.append({"need": need, "candidates": chosen, **whose})
        else:
            made.append({"query": need, "documents": [{"id": one} for one in chosen], **whose})
    return [json.dumps(one).encode() for one in made]


def ask(address: str, path: str, bodies: list[bytes], until: float, took: list[tuple[float, float]]) -> None:
    """One client: seconds of each answer, with when it came."""
    connection = http.client.HTTPConnection(address, timeout=60)
    n = threading.get_ident()
    while (start := time.perf_counter()) < until:
        n += 1
        connection.request("POST", path, bodies[n % len(bodies)], {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path} answered {answer.status}")
        took.append((time.perf_counter(), time.perf_counter() - start))
    connection.close()


def measure(address: str, path: str, bodies: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """A row of the table."""
    start = time.perf_counter()
    took: list[list[tuple[float, float]]] = [[] for _ in range(clients)]
    threads = [
        threading.Thread(target=ask, args=(address, path, bodies, start + WARM_UP + seconds, one)) for one in took
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = sorted(s for one in took for at, s in one if start + WARM_UP <= at <= start + WARM_UP + seconds)
    if not counted:
        raise RuntimeError(f"no answer of {path} came within {seconds} s")
    return {
        "path": path,
        "clients": clients,
        "requests_per_second": round(len(counted) / seconds, 1),
        "p50_ms": round(1000 * counted[len(counted) // 2], 1),
        "p99_ms": round(1000 * counted[min(len(counted) - 1, int(0.99 * len(counted)))], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each row, after a second of warm-up")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    server = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", "--run", str(arguments.run), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        cwd=ROOT,
    )
    try:
        assert server.stdout is not None
        found = re.search(r"http://([^/ ]+)", server.stdout.readline())
        if found is None:
            raise SystemExit("the server did not start; what it said is above")
        print("| path | clients | requests/s | p50 ms | p99 ms |\n|---|---|---|---|---|", flush=True)
        rows = []
        for path in ("/v1/rerank", "/rank"):
            bodies = requests_of(arguments.run, path, arguments.candidates)
            for clients in arguments.clients:
                row = measure(found[1], path, bodies, clients, arguments.seconds)
                rows.append(row)
                print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
    finally:
        server.terminate()
        server.wait(30)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
