"""`python -m tests.faults` injects faults, prints a table and exits with 1 if anything was lost.

The same seed injects the same faults: `python -m tests.faults --seed 7 --only kill_the_training_process`.
"""

import argparse
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

from llm_core.layout import Home
from tests.faults import cancel, catalog_disk, concurrency, damage, disk, forks, hostile, kills, silence, steps
from tests.faults.report import Tally, table


def write_corpus(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, text in enumerate(islice(topics.values(), 24)):
        (folder / f"topic{number:02}.txt").write_text(text)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="seed of the random choices; default: the time")
    parser.add_argument("--only", help="name of one scenario to run")
    parser.add_argument("--share", type=float, default=1.0, help="fraction of the faults to inject, for a shorter run")
    options = parser.parse_args()
    forks.prepare()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = folder / "home"
        damage.prepare_home(write_corpus(folder / "corpus"), home)
        data_dir = Home(home).prepared.root

        def many(count: int) -> int:
            return max(1, round(count * options.share))

        every = max(1, round(1 / options.share))
        scenarios = {
            "kill_the_training_process": lambda at: kills.kill_the_training_process(data_dir, at, many(200), options.seed),
            "kill_two_ranks": lambda at: kills.kill_two_ranks(data_dir, at, many(20), options.seed),
            "kill_dagster_steps": lambda at: steps.kill_dagster_steps(folder / "corpus", at, many(20), options.seed),
            "cancel_torchrun": lambda at: cancel.cancel_torchrun(data_dir, at, many(12), options.seed),
            "cancel_dagster_steps": lambda at: cancel.cancel_dagster_steps(folder / "corpus", at, many(8), options.seed),
            "stop_a_rank": lambda at: silence.stop_a_rank(data_dir, at, many(4), options.seed),
            "cut_the_cable": lambda at: silence.cut_the_cable(data_dir, at, many(3), options.seed),
            "two_trainings": lambda at: concurrency.two_trainings_in_one_folder(data_dir, at, many(10), options.seed),
            "two_preparations": lambda at: concurrency.two_preparations(folder / "corpus", at, many(10), options.seed),
            "file_that_grows": lambda at: concurrency.file_that_grows(folder / "corpus", at, many(10), options.seed),
            "two_dagster_runs": lambda at: concurrency.two_dagster_runs(folder / "corpus", at, many(4), options.seed),
            "damage_files": lambda at: damage.damage_files(home, at, 2 * many(6), options.seed),
            "fail_the_nth_call": lambda at: disk.fail_the_nth_call(folder / "corpus", at, every=every),
            "fail_the_catalog": lambda at: catalog_disk.fail_the_nth_call_of_the_catalog(home, at, every=every),
            "hostile_input": lambda at: hostile.feed(at, many(1 << 30), options.seed, many(500)),
            "fill_the_disk": lambda at: disk.fill_the_disk(folder / "corpus", at),
        }
        if not disk.can_mount(folder / "probe"):
            print("fill_the_disk, cut_the_cable: skipped, they need root to mount a small file system and to create networks")
            del scenarios["fill_the_disk"], scenarios["cut_the_cable"]
        if not catalog_disk.can_trace():
            print("fail_the_catalog: skipped, it needs the command strace")
            del scenarios["fail_the_catalog"]
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
