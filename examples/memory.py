"""The most memory that `mmpipe run` takes, beside what its plan names, for folders of several sizes.

    python examples/memory.py CONFIG MEDIA --items 1000 100000 [--set KEY=VALUE]…

A folder of N items is made of links to the files of MEDIA, over and over under new names. Each run is one of the
command line; all its processes are looked at up to ten times a second, and what several share is counted once (Pss in
/proc/PID/smaps_rollup: Linux alone). `peak`: all of it; `files`: mapped libraries and weights in it, which the system
can take back without writing them anywhere. `plan`: weights, packed copies, pool and workspaces, as run.json has them;
what `import torch` alone takes here is told first. Nothing is kept between runs but what was compiled and captured; the
first run of all, in which that happens, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

LOOK_S = 0.1
NOT_PLANNED = ("decoding", "processes")  # bounds on what comes beside the plan
MB = 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("media", type=Path)
    parser.add_argument("--items", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(arguments)
    alone, _ = peak([sys.executable, "-c", "import torch"])
    print(f"import torch alone: {alone / MB:,.0f} MB\n")
    print("| items | processes | items/s | plan, MB | plan + 300 | peak | files |\n|---|---|---|---|---|---|---|")
    settings = [part for value in ["runtime.cache=off", *given.set] for part in ("--set", value)]
    command = [sys.executable, "-m", "mmpipe", "run", given.config, *settings]
    with tempfile.TemporaryDirectory() as made:
        out = Path(made, "out")
        for number, items in enumerate([min(given.items), *given.items]):
            folder = Path(made, str(items))
            if not folder.exists():
                links(given.media, folder, items)
            whole, files = peak([*command, "--input", str(folder), "--output", str(out), "--mode", "overwrite"])
            if number:
                told = json.loads((out / "run.json").read_text(encoding="utf-8"))
                print(row(told, whole, files), flush=True)
    return 0


def links(media: Path, folder: Path, items: int) -> None:
    """`items` items, of the files of `media` that have one stem each."""
    stems: dict[str, list[Path]] = {}
    for path in sorted(path for path in media.iterdir() if path.is_file()):
        stems.setdefault(path.stem, []).append(path)
    folder.mkdir(parents=True)
    for number, paths in enumerate(islice(cycle(stems.values()), items)):
        for path in paths:
            os.symlink(path.absolute(), folder / f"item-{number:07d}{path.suffix}")


def peak(command: Sequence[str]) -> tuple[int, int]:
    """Run it → (bytes that it and its children had at most, bytes of mapped files then). Raises CalledProcessError."""
    highest = (0, 0)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:  # what goes wrong is read where it is told
        while process.poll() is None:
            began = time.perf_counter()
            found = [had(pid) for pid in family(process.pid)]
            highest = max(highest, (sum(all_ for all_, _ in found), sum(files for _, files in found)))
            time.sleep(max(LOOK_S, 4 * (time.perf_counter() - began)))  # counting pages takes time of a core
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return highest


def family(pid: int) -> Iterator[int]:
    """A process and all that came of it."""
    yield pid
    try:
        children = [path.read_text(encoding="ascii") for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it has ended
        return
    for child in " ".join(children).split():
        yield from family(int(child))


def had(pid: int) -> tuple[int, int]:
    """(bytes in memory, of which of mapped files): pages that n processes share count 1/n in each."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return 0, 0
    found = {name: 1024 * int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return found.get("Pss", 0), found.get("Pss_File", 0)


def row(run: dict, whole: int, files: int) -> str:
    resolved = run["resolved"]
    plan = sum(size for name, size in resolved["memory"].items() if name not in NOT_PLANNED)
    figures = [plan / MB, plan / MB + 300, whole / MB, files / MB]
    told = " | ".join(f"{figure:,.0f}" for figure in figures)
    return f"| {run['rows']:,} | {resolved['processes']} | {run['items_per_second']:.0f} | {told} |"


if __name__ == "__main__":
    sys.exit(main())
