"""`python -m tests.faults` injects the long set of faults and prints a table; it ends with 1 if anything was lost.

A seed repeats the same faults: `python -m tests.faults --seed 7 --only kill_the_training_process`.
"""

import argparse
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

from tests.faults import damage, disk, forks, kills
from tests.faults.report import Tally, table


def write_corpus(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, text in enumerate(islice(topics.values(), 24)):
        (folder / f"topic{number:02}.txt").write_text(text)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="repeats the faults of an earlier run")
    parser.add_argument("--only", help="one scenario by its name")
    parser.add_argument("--share", type=float, default=1.0, help="share of the long set, for a shorter run")
    options = parser.parse_args()
    forks.prepare()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = folder / "home"
        damage.prepare_home(write_corpus(folder / "corpus"), home)
        data_dir = home / "processed_data"

        def many(count: int) -> int:
            return max(1, round(count * options.share))

        scenarios = {
            "kill_the_training_process": lambda at: kills.kill_the_training_process(data_dir, at, many(200), options.seed),
            "kill_two_ranks": lambda at: kills.kill_two_ranks(data_dir, at, many(20), options.seed),
            "damage_files": lambda at: damage.damage_files(home, at, many(6), options.seed),
            "fail_the_nth_call": lambda at: disk.fail_the_nth_call(folder / "corpus", at, every=max(1, round(1 / options.share))),
            "fill_the_disk": lambda at: disk.fill_the_disk(folder / "corpus", at),
        }
        if not disk.can_mount(folder / "probe"):
            print("fill_the_disk: left out, it needs root to mount a small file system")
            del scenarios["fill_the_disk"]
        tallies: list[Tally] = []
        for scenario, run in scenarios.items():
            if options.only in (None, scenario):
                (folder / scenario).mkdir()
                tallies.append(run(folder / scenario))
                print(f"{scenario}: {tallies[-1].survived} of {tallies[-1].injected} survived", flush=True)
    print("\n" + table(tallies))
    losses = [loss for tally in tallies for loss in tally.losses]
    for loss in losses:
        print(f"lost: {loss}")
    sys.exit(bool(losses))


if __name__ == "__main__":
    main()
