"""Files truncated and bits flipped, one at a time: the result is right all the same, or refused with the name of the file."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from llm_core.config import CorpusConfig, EvaluateConfig, ShardConfig, TokenizerConfig, TrainConfig
from llm_core.corpus import take_snapshot
from llm_core.errors import DataError
from llm_core.export import export_checkpoint
from llm_core.files import sha256_file
from llm_core.generate import GenerateOptions, continue_prompt
from llm_core.judge import evaluate_checkpoint
from llm_core.shards import build_dataset
from llm_core.tokenizer_store import prepare_tokenizer
from llm_core.train import train
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.database import Database
from pipeline.catalog.rebuild import rebuild
from tests.faults.forks import OPTIONS, outcome, run_forked
from tests.faults.report import Tally

STEP_10 = "checkpoints/run/checkpoint_step_10.pt"
CORPUS, TOKENIZER = CorpusConfig(max_document_bytes=2048), TokenizerConfig(vocab_size=512)
SHARDS = ShardConfig(max_length=64, num_workers=1, shard_bytes=1 << 16)

# What is done after the damage, and the files that it reads.
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
        "checkpoints/run/latest.json",
        "checkpoints/run/metrics.jsonl",
        "checkpoints/run/run.json",
        "checkpoints/run/config.json",
        "checkpoints/run/document_steps.parquet",
        "processed_data/metadata.json",
        "processed_data/dataset/*.arrow",
        "processed_data/dataset/*.parquet",
        "processed_data/tokenizers/*[0-9a-f].json",
    ],
    "judge": [
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
        "checkpoints/run/document_steps.parquet",
        "checkpoints/run/checkpoint_step_10.pt.json",
    ],
}


def prepare_home(corpus_dir: Path, home: Path) -> None:
    """A home with prepared data, a run that was interrupted after step 10 of 12, and a catalog that knows of both.

    The catalog's last writer was killed, so that one of its transactions stands in the write-ahead log alone.
    """
    shutil.copytree(corpus_dir, home / "raw_text_data")
    prepare(home)
    ended = run_forked(lambda: _train(home, home / "checkpoints/run"), home / "log")
    assert ended.code == 0, ended.output
    for name in ("checkpoint_step_12.pt.json", "checkpoint_step_12.pt"):
        (home / "checkpoints/run" / name).rename(home / name)
    rebuild(home, home / "catalog.duckdb")
    assert run_forked(lambda: _write_and_die(home / "catalog.duckdb"), home / "log").code == -signal.SIGKILL
    assert (home / "catalog.duckdb.wal").stat().st_size


def _write_and_die(catalog: Path) -> None:
    with Database(catalog).connect() as connection:
        connection.execute("INSERT INTO dataset_shards VALUES ('logged', 'logged', 0, 0)")
        connection.execute("COMMIT")
        os.kill(os.getpid(), signal.SIGKILL)


def damage_files(home: Path, folder: Path, trials_of_each: int, seed: int) -> Tally:
    """Each kind of file, truncated and with one bit flipped, `trials_of_each` times."""
    tally = Tally("file truncated or a bit flipped", seed)
    chosen = random.Random(seed)
    whole = (home / "checkpoint_step_12.pt").read_bytes(), outcome_lines(home)
    for action, patterns in FILES.items():
        shutil.copytree(home, folder / "home", copy_function=shutil.copy2, dirs_exist_ok=True)
        right = _answer(action, folder / "home", folder / "answer", whole)
        assert right[0] == 0, right[1]
        for pattern in patterns:
            for trial in range(2 * trials_of_each):
                copy = folder / "home"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(home, copy, copy_function=shutil.copy2)
                victim = chosen.choice(sorted(copy.glob(pattern)))
                how = _truncate(victim, chosen) if trial % 2 else _flip(victim, chosen)
                answer = _answer(action, copy, folder / "answer", whole)
                tally.count(_problem(answer, right, victim, f"{action}: {victim.relative_to(copy)} {how}"))
    return tally


def outcome_lines(home: Path) -> list[object]:
    """The logged losses of the whole run, which metrics.jsonl still holds after its last checkpoint was taken away."""
    run_dir = home / "checkpoints/run"
    shutil.copy(home / "checkpoint_step_12.pt", run_dir)
    _, lines = outcome(run_dir)
    (run_dir / "checkpoint_step_12.pt").unlink()
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


def _problem(answer: tuple[int, str, object], right: tuple[int, str, object], victim: Path, what: str) -> str | None:
    code, output, result = answer
    if code == 0 and result == right[2]:
        return None
    if victim.name == "metrics.jsonl" and result == (True, False) and str(victim) in output:
        return None  # cut between two lines: trained as it was to be, and said which losses are no longer on record
    if victim.name.endswith(".wal"):
        # Cut between two of its entries, a log is one that a power cut left: the state before the entry is whole as well.
        if code == 0 and result == str(right[2]).replace(_LOGGED, _NOT_LOGGED):
            return None
        victim = victim.with_suffix("")  # the log is a part of the catalog, under whose name it is spoken of
    # A refusal names the file, or for a pair of files that belong together the other one.
    stem = victim.name.split(".")[0]
    if code in (2, 3) and stem in output and "Traceback" not in output:
        return None
    return f"{what}: code {code}, {'another result' if code == 0 else output[-300:]}"


def _answer(action: str, home: Path, folder: Path, whole: tuple[bytes, object]) -> tuple[int, str, object]:
    """Does one thing in `home`, in a process of its own. Returns its exit code, what it printed and what came out."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    work: Callable[[], object] = {
        "prepare and train": lambda: (prepare(home), _train(home, folder / "run")),
        "resume": lambda: _train(home, home / "checkpoints/run"),
        "judge": lambda: (folder / "values").write_text(judge(home, home / STEP_10)),
        "generate": lambda: (folder / "values").write_text(_generate(home)),
        "export": lambda: (folder / "values").write_text(_export(home, folder / "model")),
        "catalog": lambda: (folder / "values").write_text(_ask(home)),
        "catalog log": lambda: (folder / "values").write_text(_ask(home, _LAST)),
        "rebuild": lambda: (folder / "values").write_text(_rebuild(home)),
    }[action]
    ended = run_forked(work, folder / "log")
    if ended.code:
        return ended.code, ended.output, None
    if (folder / "values").is_file():
        return 0, ended.output, (folder / "values").read_text()
    checkpoint, lines = outcome(folder / "run" if action == "prepare and train" else home / "checkpoints/run")
    return 0, ended.output, (checkpoint == whole[0], lines == whole[1])


def prepare(home: Path) -> None:
    raw, processed = home / "raw_text_data", home / "processed_data"
    snapshot = take_snapshot(raw, processed, CORPUS)
    build_dataset(snapshot, prepare_tokenizer(snapshot, raw, processed, TOKENIZER), raw, processed, SHARDS)


def _train(home: Path, run_dir: Path) -> None:
    train(TrainConfig(**OPTIONS), home / "processed_data", run_dir, resume="auto")


def judge(home: Path, path: Path) -> str:
    config = EvaluateConfig(max_eval_tokens=512, sample_tokens=2)
    return str(
        [(entry["metric"], entry["value"]) for entry in evaluate_checkpoint(path, home / "processed_data", config)["metrics"]]
    )


def _generate(home: Path) -> str:
    options = {"checkpoint": str(home / STEP_10), "data_dir": str(home / "processed_data"), "prompt": "The class"}
    return continue_prompt(GenerateOptions(**options, max_new_tokens=8))


def _export(home: Path, model_dir: Path) -> str:
    export_checkpoint(home / STEP_10, home / "processed_data", model_dir, evaluation=None, reason="a test")
    return str(sorted((path.name, sha256_file(path)) for path in model_dir.iterdir() if path.name != "textmill.json"))


_QUESTIONS = (
    "SELECT run_id, status, config FROM training_runs",
    "SELECT run_id, step, loss, val_loss FROM train_metrics ORDER BY ALL",
    "SELECT checkpoint_id, step, sha256 FROM checkpoints WHERE on_disk ORDER BY ALL",
    "SELECT checkpoint_id, document_id, path, start_byte, end_byte, first_step FROM checkpoint_lineage ORDER BY ALL",
    "SELECT tokenizer_id, bytes_per_token FROM tokenizers ORDER BY ALL",
)


_LAST = "SELECT count(*) AS logged FROM dataset_shards WHERE dataset_id = 'logged'"
_LOGGED, _NOT_LOGGED = "[{'logged': 1}]", "[{'logged': 0}]"


def _ask(home: Path, *more: str) -> str:
    catalog = Catalog(home / "catalog.duckdb")
    return str([catalog.query(question) for question in (*_QUESTIONS, *more)])


def _rebuild(home: Path) -> str:
    """What could not be read is left out and named, which counts as refused; without that the rows are the same."""
    problems = rebuild(home, home / "catalog.duckdb")
    if problems:
        raise DataError("; ".join(problems))
    return _ask(home)
