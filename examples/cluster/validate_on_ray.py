# SPDX-License-Identifier: Apache-2.0
"""Validate a bundle in shards on a Ray cluster, and judge all shards together.

    python examples/cluster/validate_on_ray.py BUNDLE --data DATA --against BUNDLE --shards 16 --max-drop 0.6 --certify

Without --address it starts a cluster on this machine. On many machines (`ray start --head`, `ray start --address …`),
give --address auto; every machine needs perceiver-export, BUNDLE, DATA and the reference at the same paths. If a worker
dies, its shard runs again on another. All other options are passed to `validate --merge`. The files of shards stay in
--parts, and a second run judges only the shards without a file, so use a new folder for each validation.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import ray

from perceiver_export.calibration import ValidateOptions, validate_shard
from perceiver_export.calibration.validation.shards import encode_shard
from perceiver_export.runtimes.files import write_bytes

_COMMAND = [sys.executable, "-m", "perceiver_export.exporter.cli"]


def judge(bundle: str, data: str, shard: tuple[int, int], options: ValidateOptions) -> bytes:
    """Judge one shard on a worker; return the content of its file."""
    return encode_shard(validate_shard(bundle, data, shard, options))


def main() -> None:
    """Run the shards as tasks, then merge their files here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    for name in ("--data", "--against"):
        parser.add_argument(name, required=True)
    parser.add_argument("--parts", type=Path, default=Path("parts"), help="folder for the files of shards")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--address", help="address of a running cluster; by default a new one with two workers here")
    given, gates = parser.parse_known_args()
    if given.address:
        ray.init(given.address)
    else:
        ray.init(num_cpus=2 * given.threads, include_dashboard=False)
    named = (given.bundle, given.data, given.against)  # workers have another current directory
    bundle, data, against = (str(Path(name).resolve()) if Path(name).exists() else name for name in named)
    options = ValidateOptions(against=against, samples=given.samples, threads=given.threads)
    task = ray.remote(num_cpus=given.threads, max_retries=3)(judge)
    given.parts.mkdir(parents=True, exist_ok=True)
    files = {index: given.parts / f"part{index}of{given.shards}.json" for index in range(1, given.shards + 1)}
    waiting = {
        task.remote(bundle, data, (index, given.shards), options): index
        for index, file in files.items()
        if not file.exists()
    }
    while waiting:
        for done in ray.wait(list(waiting))[0]:
            index = waiting.pop(done)
            write_bytes(files[index], ray.get(done))
            print(f"shard {index}/{given.shards} is done, {len(waiting)} to go", file=sys.stderr)
    command = [*_COMMAND, "validate", given.bundle, *map(str, files.values()), "--merge", "--against", given.against]
    code = subprocess.run([*command, *gates], check=False).returncode
    ray.shutdown()
    sys.exit(code)


if __name__ == "__main__":
    main()
