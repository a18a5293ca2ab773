"""Truncated files and flipped bits, one at a time: the result is still correct, or an error names the file."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from llm_core.config import CorpusConfig, EvaluateConfig, ShardConfig, TokenizerConfig, TrainConfig
from llm_core.corpus import take_snapshot
from llm_core.dataset import build_dataset
from llm_core.errors import DataError
from llm_core.evaluation.evaluator import evaluate_checkpoint
from llm_core.generate import GenerateOptions, continue_prompt
from llm_core.huggingface.directory import export_checkpoint
from llm_core.layout import Home, ModelFolder, RunFolder, checkpoint_manifest
from llm_core.system import sha256_file
from llm_core.tokenizer import prepare_tokenizer
from llm_core.training.run import train
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.database import Database
from pipeline.catalog.rebuild import rebuild
from tests.faults.forks import OPTIONS, outcome, run_forked
from tests.faults.report import Tally

CORPUS, TOKENIZER = CorpusConfig(max_document_bytes=2048), TokenizerConfig(vocab_size=512)
SHARDS = ShardConfig(max_length=64, num_workers=1, shard_bytes=1 << 16)

# The actions after the damage, and the files that each of them reads.
FILES = {
    "prepare and train": [
        "processed_data/tokenizer.json",
        "processed_data/tokenizers/*.json",
        "processed_data/snapshots/*",
        "processed_data/manifests/*.json",
        "processed_data/metadata.json",
        "processed_data/dataset/*.arrow",
        "processed_data/dataset/*.parquet",
    ],
    "resume": [
        "checkpoints/run/checkpoint_step_10.pt",
        "checkpoints/run/checkpoint_step_10.pt.json",
        "checkpoints/run/checkpoint_step_8.pt",
        "checkpoints/run/metrics.jsonl",
        "checkpoints/run/run.json",
        "checkpoints/run/config.json",
        "checkpoints/run/document_steps.parquet",
        "processed_data/metadata.json",
        "processed_data/dataset/*.arrow",
        "processed_data/dataset/*.parquet",
        "processed_data/tokenizers/*[0-9a-f].json",
    ],
    "evaluate": [
        "checkpoints/run/checkpoint_step_10.pt",
        "checkpoints/run/checkpoint_step_10.pt.json",
        "processed_data/tokenizers/*[0-9a-f].json",
        "processed_data/dataset/*.arrow",
        "processed_data/dataset/*.parquet",
        "processed_data/snapshots/*[0-9a-f].json",
        "processed_data/snapshots/*.documents.parquet",
    ],
    "generate": ["checkpoints/run/checkpoint_step_10.pt", "processed_data/tokenizers/*[0-9a-f].json"],
    "export": [
        "checkpoints/run/checkpoint_step_10.pt",
        "checkpoints/run/checkpoint_step_10.pt.json",
        "checkpoints/run/run.json",
        "checkpoints/run/config.json",
        "processed_data/tokenizers/*[0-9a-f].json",
        "processed_data/manifests/*.json",
    ],
    "catalog": ["catalog.duckdb"],
    "catalog log": ["catalog.duckdb.wal"],
    "rebuild": [
        "processed_data/snapshots/*.json",
        "processed_data/snapshots/*.documents.parquet",
        "processed_data/tokenizers/*.report.json",
        "processed_data/manifests/*.json",
        "processed_data/dataset/*.parquet",
        "checkpoints/run/run.json",
        "checkpoints/run/config.json",
        "checkpoints/run/document_steps.parquet",
        "checkpoints/run/checkpoint_step_10.pt.json",
    ],
}


def run_folder(home: Path) -> RunFolder:
    return Home(home).run("run")


def prepare_home(corpus_dir: Path, home: Path) -> None:
    """A home with prepared data, a run interrupted after step 10 of 12, and a catalog of both.

    The last writer of the catalog was killed, so that one transaction is only in the write-ahead log.
    """
    shutil.copytree(corpus_dir, Home(home).raw_text)
    prepare(home)
    run, catalog = run_folder(home), Home(home).catalog
    ended = run_forked(lambda: _train(home, run.root), home / "log")
    assert ended.code == 0, ended.output
    last = run.checkpoint(12)
    for path in (checkpoint_manifest(last), last):
        path.rename(home / path.name)
    rebuild(home, catalog)
    assert run_forked(lambda: _write_and_die(catalog), home / "log").code == -signal.SIGKILL
    assert catalog.with_name(f"{catalog.name}.wal").stat().st_size


def _write_and_die(catalog: Path) -> None:
    with Database(catalog).connect() as connection:
        connection.execute("INSERT INTO dataset_shards VALUES ('logged', 'logged', 0, 0)")
        connection.execute("COMMIT")
        os.kill(os.getpid(), signal.SIGKILL)


def damage_files(home: Path, folder: Path, trials_of_each: int, seed: int) -> Tally:
    """Each kind of file, truncated and with a flipped bit in turn, `trials_of_each` times."""
    tally = Tally("truncated file or flipped bit", seed)
    chosen = random.Random(seed)
    expected = (home / run_folder(home).checkpoint(12).name).read_bytes(), outcome_lines(home)
    for action, patterns in FILES.items():
        shutil.copytree(home, folder / "home", copy_function=shutil.copy2, dirs_exist_ok=True)
        undamaged = _do(action, folder / "home", folder / "work", expected)
        assert undamaged[0] == 0, undamaged[1]
        for pattern in patterns:
            for _ in range(trials_of_each):
                copy = folder / "home"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(home, copy, copy_function=shutil.copy2)
                victim = chosen.choice(sorted(copy.glob(pattern)))
                how = _truncate(victim, chosen) if tally.injected % 2 else _flip(victim, chosen)
                damaged = _do(action, copy, folder / "work", expected)
                tally.count(_problem(damaged, undamaged, victim, f"{action}: {victim.relative_to(copy)} {how}"))
    return tally


def outcome_lines(home: Path) -> list[object]:
    """The metrics of all 12 steps, which metrics.jsonl keeps although the last checkpoint was moved."""
    run = run_folder(home)
    last = run.checkpoint(12)
    shutil.copy(home / last.name, last)
    _, lines = outcome(run.root)
    last.unlink()
    return list(lines)


def _truncate(path: Path, chosen: random.Random) -> str:
    size = chosen.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"cut to {size} bytes"


def _flip(path: Path, chosen: random.Random) -> str:
    content = bytearray(path.read_bytes())
    byte, bit = chosen.randrange(len(content)), chosen.randrange(8)
    content[byte] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {byte} flipped"


def _problem(damaged: tuple[int, str, object], undamaged: tuple[int, str, object], victim: Path, what: str) -> str | None:
    code, output, result = damaged
    if code == 0 and result == undamaged[2]:
        return None
    if victim.name == RunFolder(victim.parent).metrics.name and result == (True, False) and str(victim) in output:
        return None  # cut between two lines: the weights are correct, and the missing metrics are reported
    if victim.name.endswith(".wal"):
        # A log cut between two entries looks like one after a power cut: the state before the entry is correct too.
        if code == 0 and result == str(undamaged[2]).replace(_LOGGED, _NOT_LOGGED):
            return None
        victim = victim.with_suffix("")  # errors in the log name the catalog
    # The error names the file, or the other one of a pair, such as a checkpoint and its manifest.
    stem = victim.name.split(".")[0]
    if code in (2, 3) and stem in output and "Traceback" not in output:
        return None
    return f"{what}: exit code {code}, {'wrong result' if code == 0 else output[-300:]}"


def _do(action: str, home: Path, folder: Path, expected: tuple[bytes, object]) -> tuple[int, str, object]:
    """Does an action in `home`, in a child process. Returns its exit code, output and result."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    work: Callable[[], object] = {
        "prepare and train": lambda: (prepare(home), _train(home, folder / "run")),
        "resume": lambda: _train(home, run_folder(home).root),
        "evaluate": lambda: (folder / "values").write_text(evaluate(home, run_folder(home).checkpoint(10))),
        "generate": lambda: (folder / "values").write_text(_generate(home)),
        "export": lambda: (folder / "values").write_text(_export(home, folder / "model")),
        "catalog": lambda: (folder / "values").write_text(_query(home)),
        "catalog log": lambda: (folder / "values").write_text(_query(home, _LAST)),
        "rebuild": lambda: (folder / "values").write_text(_rebuild(home)),
    }[action]
    ended = run_forked(work, folder / "log")
    if ended.code:
        return ended.code, ended.output, None
    if (folder / "values").is_file():
        return 0, ended.output, (folder / "values").read_text()
    checkpoint, lines = outcome(folder / "run" if action == "prepare and train" else run_folder(home).root)
    return 0, ended.output, (checkpoint == expected[0], lines == expected[1])


def prepare(home: Path) -> None:
    raw, processed = Home(home).raw_text, Home(home).prepared.root
    snapshot = take_snapshot(raw, processed, CORPUS)
    build_dataset(snapshot, prepare_tokenizer(snapshot, raw, processed, TOKENIZER), raw, processed, SHARDS)


def _train(home: Path, run_dir: Path) -> None:
    train(TrainConfig(**OPTIONS), Home(home).prepared.root, run_dir, resume="auto")


def evaluate(home: Path, path: Path) -> str:
    config = EvaluateConfig(max_eval_tokens=512, sample_tokens=2)
    evaluation = evaluate_checkpoint(path, Home(home).prepared.root, config)
    return str([(entry["metric"], entry["value"]) for entry in evaluation["metrics"]])


def _generate(home: Path) -> str:
    folders = {"checkpoint": str(run_folder(home).checkpoint(10)), "data_dir": str(Home(home).prepared.root)}
    return continue_prompt(GenerateOptions(**folders, prompt="The class", max_new_tokens=8))


def _export(home: Path, model_dir: Path) -> str:
    export_checkpoint(run_folder(home).checkpoint(10), Home(home).prepared.root, model_dir, evaluation=None, reason="a test")
    record = ModelFolder(model_dir).record
    return str(sorted((path.name, sha256_file(path)) for path in model_dir.iterdir() if path != record))


_QUERIES = (
    "SELECT run_id, status, config FROM training_runs",
    "SELECT run_id, step, loss, val_loss FROM train_metrics ORDER BY ALL",
    "SELECT checkpoint_id, step, sha256 FROM checkpoints WHERE on_disk ORDER BY ALL",
    "SELECT checkpoint_id, document_id, path, start_byte, end_byte, first_step FROM checkpoint_lineage ORDER BY ALL",
    "SELECT tokenizer_id, bytes_per_token FROM tokenizers ORDER BY ALL",
)
_LAST = "SELECT count(*) AS logged FROM dataset_shards WHERE dataset_id = 'logged'"
_LOGGED, _NOT_LOGGED = "[{'logged': 1}]", "[{'logged': 0}]"


def _query(home: Path, *more: str) -> str:
    catalog = Catalog(Home(home).catalog)
    return str([catalog.query(query) for query in (*_QUERIES, *more)])


def _rebuild(home: Path) -> str:
    """The rows of a rebuilt catalog. A skipped file, which a rebuild reports, counts as an error."""
    problems = rebuild(home, Home(home).catalog)
    if problems:
        raise DataError("; ".join(problems))
    return _query(home)
