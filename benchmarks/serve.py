"""Load test of `proclip serve` on loopback: requests a second and their times, one by one and from many clients at once.

    pip install "proclip-transformers[serve]"
    python benchmarks/serve.py quickstart-output/proclip --requests 500 --clients 32 --json serve.json

Each request holds one text, as a search page sends it. The peer is the same server asked by one client, so that no request shares a batch.
"""

import argparse
import http.client
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit


TEXTS = [
    f"{colour} {thing} {place}"
    for colour in ("a red", "a small green", "an old", "two yellow", "a very large white")
    for thing in ("fox", "house by the sea", "sailing boat", "train with three wagons", "apple")
    for place in ("", "at dusk", "seen from above, with rain on the roofs", "in a drawing by a child")
]


def ask(address: str, numbers: "itertools.count[int]", last: int, seconds: list[float]) -> None:
    """One client: asks for text after text over one connection until all requests are taken."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    while (number := next(numbers)) < last:
        body = json.dumps({"input": TEXTS[number % len(TEXTS)]})
        start = time.perf_counter()
        connection.request("POST", "/v1/embeddings", body)
        response = connection.getresponse()
        answer = response.read()
        seconds.append(time.perf_counter() - start)
        if response.status != 200:
            raise SystemExit(f"status {response.status}: {answer.decode()}")


def load(address: str, requests: int, clients: int) -> dict[str, float]:
    """Requests a second, and the median and 99th percentile of their times in milliseconds."""
    seconds: list[float] = []
    numbers = itertools.count()
    threads = [threading.Thread(target=ask, args=(address, numbers, requests, seconds)) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = time.perf_counter() - start
    if len(seconds) != requests:
        raise SystemExit(f"{requests - len(seconds)} of {requests} requests got no answer")
    percentiles = statistics.quantiles(seconds, n=100)
    return {"requests/s": requests / total, "p50 ms": 1000 * percentiles[49], "p99 ms": 1000 * percentiles[98]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="such as quickstart-output/proclip")
    parser.add_argument("--requests", type=int, default=500, help="requests of each measurement (default 500)")
    parser.add_argument("--clients", type=int, default=32, help="clients at once (default 32)")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    args = parser.parse_args()
    command = [sys.executable, "-m", "trainers.cli", "serve", args.checkpoint, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[-1]
            load(address, 10, 1)  # warms up
            one, many = (load(address, args.requests, clients) for clients in (1, args.clients))
        finally:
            server.terminate()
    print(f"{'':12} {'1 client':>10} {f'{args.clients} clients':>12}")
    for name in one:
        print(f"{name:12} {one[name]:10,.1f} {many[name]:12,.1f}")
    if args.json:
        rows = [
            {
                "name": f"{args.clients} clients: {name}",
                "ours": many[name],
                "peer": one[name],
                "ratio": many[name] / one[name] if name == "requests/s" else one[name] / many[name],
                "unit": name,
            }
            for name in one
        ]
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
