"""Many downloads at once from stores over a folder and over S3, against a bare gRPC stream of the bytes."""

import time

from tests.bench.adapter_files import adapter_name
from tests.bench.bench import SETTLE_SECONDS, Bench
from tests.bench.figures import ratio
from tests.bench.result import Lane, Result

# In this order in the first round; each round begins with another one.
_WAYS = ("folder", "s3", "raw")
_NAMES = {"folder": "store over a folder", "s3": "store over S3", "raw": "bare gRPC stream of the same bytes"}
_TARGET = 0.8


def run(bench: Bench) -> Result:
    clients, downloads = bench.scale.clients, bench.scale.downloads
    found: dict[str, list[float]] = {way: [] for way in _WAYS}
    with bench.peers() as peers:
        peer = peers.need("downloads", "stores", names=[adapter_name(0)])
        megabytes = peer.facts["file_bytes"] * clients * downloads / 1e6
        for way in _WAYS:
            peer.ask(way, clients=clients, downloads=1)
        for number in bench.rounds():
            start = number % len(_WAYS)
            for way in (*_WAYS[start:], *_WAYS[:start]):
                time.sleep(SETTLE_SECONDS)
                found[way].append(megabytes / peer.ask(way, clients=clients, downloads=downloads))
            rates = ", ".join(f"{way} {found[way][number]:.0f} MB/s" for way in _WAYS)
            print(f"  round {number + 1}: {rates}", flush=True)
        return Result(
            figures=tuple(
                ratio(
                    f"downloads at {clients} at once, {_NAMES[way]} / bare stream",
                    found[way],
                    found["raw"],
                    _TARGET,
                )
                for way in ("folder", "s3")
            ),
            lanes=tuple(Lane(_NAMES[way], "MB/s", tuple(found[way])) for way in _WAYS),
            versions=peers.versions(),
            left_out=tuple(peers.left_out),
        )
