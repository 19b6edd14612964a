"""How fast a drain to S3 is beside a plain multipart client, and how much memory it takes; not part of the test suite.

    python -m tests.tiers.measure_drain [--server moto|gateway] [--mebibytes 512] [--repeat 5] [--json FILE]

Both send the same file to the same server in turns.  The plain client is boto3's transfer manager with ten threads; the
drain verifies what it reads and proves what arrives, the client does neither.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from bench.levels import SCHEMA
from bench.machine import facts
from ckptengine.operations.drain import Drain, DrainSettings
from ckptengine.operations.draining.transfer import DrainFile
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.loop import IoLoop
from ckptengine.tiers.remote import RemoteTier

from . import services

NAME = "step-000000001/rank-00000-a000001-n0001.bin"
PART_BYTES = DrainSettings().part_bytes


def anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return sum(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def drain_once(loop: IoLoop, source: Path, endpoint: str, size: int) -> dict[str, float]:
    url, options = f"s3://ckpt/{uuid.uuid4().hex}", services.s3_options(endpoint)
    target = loop.run(RemoteTier.open(url, options=options))
    drain = Drain(LocalTier(source), target, loop)
    before, peak, stop = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            peak[0] = max(peak[0], anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    cpu_s, started_s = time.process_time(), time.perf_counter()
    drain.submit(1, [DrainFile(NAME, size)], None).result()
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    stop.set()
    watcher.join()
    drain.close()
    loop.run(target.delete(NAME))
    loop.run(target.close())
    return {"mb_per_s": size / wall_s / 1e6, "cpu_s": cpu_s, "peak_mib": peak[0] / (1 << 20)}


def client_once(source: Path, endpoint: str, size: int) -> dict[str, float]:
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=services.USER,
        aws_secret_access_key=services.SECRET,
        region_name="us-east-1",
        config=Config(max_pool_connections=64, request_checksum_calculation="when_required"),
    )
    transfer = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=10)
    key = uuid.uuid4().hex
    cpu_s, started_s = time.process_time(), time.perf_counter()
    client.upload_file(str(source / NAME), "ckpt", key, Config=transfer)
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    client.delete_object(Bucket="ckpt", Key=key)
    client.close()
    return {"mb_per_s": size / wall_s / 1e6, "cpu_s": cpu_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", choices=("moto", "gateway"), default="gateway")
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    size = arguments.mebibytes << 20
    loop = IoLoop()
    samples: dict[str, list[dict[str, float]]] = {"client": [], "drain": []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        (source / NAME).parent.mkdir(parents=True)
        with (source / NAME).open("wb") as file:
            for _ in range(arguments.mebibytes):
                file.write(os.urandom(1 << 20))
        with getattr(services, arguments.server)(Path(folder)) as endpoint:
            if arguments.server == "moto":
                loop.run(services.make_bucket(endpoint))
            for _ in range(arguments.repeat):
                samples["client"].append(client_once(source, endpoint, size))
                samples["drain"].append(drain_once(loop, source, endpoint, size))
        machine = facts(Path(folder))
    loop.close()
    medians = {who: statistics.median(one["mb_per_s"] for one in taken) for who, taken in samples.items()}
    ratio = medians["drain"] / medians["client"]
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "levels": "drain",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "figures": {
            "server": arguments.server,
            "size_bytes": size,
            "median_mb_per_s": medians,
            "ratio": ratio,
            "peak_mib": max(one["peak_mib"] for one in samples["drain"]),
            "samples": samples,
        },
        "floors": {"ratio": {"floor": ">= 0.8", "met": ratio >= 0.8}},
    }
    text = json.dumps(result, indent=1) + "\n"
    if arguments.json:
        arguments.json.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
