"""The path of every file on disk; no other module spells one.

    Home          the folder TEXTMILL_HOME
    PreparedData  what data preparation writes: --output_dir of that tool, --data_dir of the others
    RunFolder     one training run: --save_dir
    ModelFolder   one exported model, a Hugging Face directory

Ids read from files are not trusted: a path that would leave its folder raises DataError.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_core.errors import UserError
from llm_core.system import inside, is_unicode

# The job, the release line, and the folder in the home in which the quickstart keeps its text and prepared data.
QUICKSTART = "quickstart"

# The folder of the sample corpus in the raw text of the quickstart.
SAMPLE_CORPUS = "sample_corpus"

_CHECKPOINT_MANIFEST = re.compile(r"checkpoint_step_(\d+)\.pt\.json")


class _Fixed:
    """A path below the root of a folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: Any, owner: type) -> Path:
        root: Path = folder.root
        return root / self.name


class _ById:
    """Files named by an id: a function from the id to the path."""

    def __init__(self, folder: str, suffix: str) -> None:
        self.folder, self.suffix = folder, suffix

    def __get__(self, folder: Any, owner: type) -> Callable[[str], Path]:
        return lambda identifier: inside(folder.root / self.folder, identifier + self.suffix)


@dataclass(frozen=True)
class PreparedData:
    """Snapshots, tokenizers, token shards and dataset manifests under one folder."""

    root: Path

    metadata = _Fixed("metadata.json")  # the manifest of the current dataset, with its window length and stride
    tokenizer = _Fixed("tokenizer.json")  # a copy of the current tokenizer
    frozen_tokenizers = _Fixed("tokenizers/frozen.json")  # which tokenizer each configuration keeps
    current_snapshot = _Fixed("snapshots/current.json")  # pointer to the newest snapshot
    scan = _Fixed("snapshots/file_index.parquet")  # cache: size, times and inode of each raw file at the last scan
    signatures = _Fixed("snapshots/signatures.parquet")  # cache: the MinHash signature of each document

    snapshot = _ById("snapshots", ".json")
    snapshot_files = _ById("snapshots", ".files.parquet")
    snapshot_documents = _ById("snapshots", ".documents.parquet")
    tokenizer_file = _ById("tokenizers", ".json")
    tokenizer_report = _ById("tokenizers", ".report.json")
    drift_report = _ById("tokenizers", ".tried.json")  # cache: bytes per token on text newer than the tokenizer
    manifest = _ById("manifests", ".json")
    shard = _ById("dataset", ".arrow")
    shard_index = _ById("dataset", ".parquet")

    def snapshots(self) -> list[Path]:
        return [path for path in self.root.glob("snapshots/*.json") if path != self.current_snapshot]

    def tokenizer_reports(self) -> list[Path]:
        return list(self.root.glob("tokenizers/*.report.json"))

    def manifests(self) -> list[Path]:
        return list(self.root.glob("manifests/*.json"))

    def shards(self) -> list[Path]:
        return list(self.root.glob("dataset/*.arrow"))

    def artifacts(self) -> dict[str, list[Path]]:
        """Files of every artifact by kind, referring files first: the order in which they can be removed."""
        patterns = {
            "manifests": ("manifests/*.json",),
            "snapshots": ("snapshots/*.json", "snapshots/*.files.parquet", "snapshots/*.documents.parquet"),
            "tokenizers": ("tokenizers/*.report.json", "tokenizers/*.json"),
            "shards": ("dataset/*.arrow", "dataset/*.parquet"),
            "half-written files": ("**/.*.tmp",),
        }
        kept = self.pointers_and_caches()
        return {
            kind: [
                path
                for path in dict.fromkeys(path for glob in globs for path in sorted(self.root.glob(glob)))
                if path not in kept
            ]
            for kind, globs in patterns.items()
        }

    def pointers_and_caches(self) -> set[Path]:
        return {self.current_snapshot, self.scan, self.signatures, self.frozen_tokenizers}

    def all_files(self) -> list[Path]:
        """Every file in the folders of this layout, including those of other programs."""
        folders = (self.root / name for name in ("manifests", "snapshots", "tokenizers", "dataset"))
        return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())

    def named(self, name: str) -> Path:
        """The file that a manifest names, relative to this folder."""
        return inside(self.root, name)

    def name_of(self, path: Path) -> str:
        """The inverse of `named`."""
        return path.relative_to(self.root).as_posix()


@dataclass(frozen=True)
class RunFolder:
    """Checkpoints, metrics and records of one training run."""

    root: Path

    record = _Fixed("run.json")
    config = _Fixed("config.json")
    metrics = _Fixed("metrics.jsonl")
    log = _Fixed("training.log")  # output of torchrun and its ranks under Dagster
    document_steps = _Fixed("document_steps.parquet")  # the step that first reads each document
    known_documents = _Fixed("known_documents.parquet")  # the documents that the parents of the run have read
    later_checkpoints = _Fixed("set_aside")  # folder of checkpoints newer than the one that the run was resumed from

    def plan(self, request_id: str) -> Path:
        """What train_minutes became."""
        return inside(self.root, f"plan_{request_id}.json")

    def checkpoint(self, step: int) -> Path:
        return self.root / f"checkpoint_step_{step}.pt"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """The step and file of each checkpoint, with or without a manifest."""
        files = self.root.glob("checkpoint_step_*.pt")
        return [(step, path) for path in files if (step := step_of_manifest(checkpoint_manifest(path))) is not None]

    def checkpoint_manifests(self) -> list[Path]:
        """The manifest of each checkpoint, the newest first; nothing is read."""
        found = [(step, path) for path in self.root.glob("*.json") if (step := step_of_manifest(path)) is not None]
        return [path for _, path in sorted(found, reverse=True)]

    def evaluation(self, step: int, evaluation_id: str) -> Path:
        return self.root / f"evaluation_step_{step}_{evaluation_id}.json"

    def evaluation_documents(self, step: int, evaluation_id: str) -> Path:
        """The sums of an evaluation over each document."""
        return self.root / f"evaluation_step_{step}_{evaluation_id}.documents.parquet"

    def loss_curve(self, step: int) -> Path:
        return self.root / f"loss_curve_step_{step}.png"

    def picture(self, name: str, version: str) -> Path:
        return self.root / f"{name}_{version}.png"

    def trace(self, rank: int) -> Path:
        return self.root / f"trace_rank{rank}.json"

    def temporary_export(self, step: int) -> Path:
        """Hugging Face directory of a checkpoint that is not released."""
        return self.root / f".checkpoint_step_{step}.exported"

    def removable(self) -> list[Path]:
        """What garbage collection removes of a run, in order: all but its records, which the catalog is rebuilt from."""
        weights = ("checkpoint_step_*.pt", "set_aside", ".checkpoint_step_*.exported")
        large = ("known_documents.parquet", "trace_rank*.json", "evaluation_step_*", ".*.tmp", ".ranks-*")
        found = (path for glob in (*weights, *large) for path in sorted(self.root.glob(glob)))
        results = set(self.root.glob("evaluation_step_*.json"))
        return [*self.checkpoint_manifests(), *(path for path in found if path not in results)]


def checkpoint_manifest(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".json")


def step_of_manifest(path: Path) -> int | None:
    """The step in the name of a checkpoint's manifest; None for any other file."""
    match = _CHECKPOINT_MANIFEST.fullmatch(path.name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class ModelFolder:
    """An exported model."""

    root: Path

    record = _Fixed("textmill.json")  # the lineage of the model and the SHA-256 of every other file
    config = _Fixed("config.json")
    generation_config = _Fixed("generation_config.json")
    special_tokens_map = _Fixed("special_tokens_map.json")
    tokenizer_config = _Fixed("tokenizer_config.json")
    tokenizer = _Fixed("tokenizer.json")
    weights = _Fixed("model.safetensors")
    card = _Fixed("README.md")


@dataclass(frozen=True)
class Home:
    """Everything that the pipeline writes.

    The quickstart has its own text, prepared data and pointers, so that it changes nothing of what is made from the user's text.
    Runs, models and the catalog are shared: an id is a hash of content.
    """

    root: Path
    quickstart: bool = False  # the paths are those of the quickstart

    @property
    def of_quickstart(self) -> "Home":
        return Home(self.root, quickstart=True)

    @property
    def raw_text(self) -> Path:
        return self._text / "raw_text_data"

    @property
    def prepared(self) -> PreparedData:
        return PreparedData(self._text / "processed_data")

    def all_prepared(self) -> list[PreparedData]:
        """The prepared data of the user's text and that of the quickstart, where there is any."""
        folders = [Home(self.root).prepared, self.of_quickstart.prepared]
        return [folder for folder in folders if folder.root.is_dir()]

    checkpoints = _Fixed("checkpoints")
    models = _Fixed("models")
    catalog = _Fixed("catalog.duckdb")
    retraining_config = _Fixed("configs/retrain.yaml")  # configuration of the runs that the sensor and the schedule launch

    @property
    def current_checkpoint(self) -> Path:
        """Pointer to the checkpoint that the newest training ended with."""
        return self.checkpoints / _of_line("current_checkpoint", self._line)

    @property
    def current_evaluation(self) -> Path:
        """Pointer to the newest evaluation."""
        return self.checkpoints / _of_line("current_evaluation", self._line)

    def run(self, run_id: str) -> RunFolder:
        return RunFolder(inside(self.checkpoints, run_id))

    def plan(self, plan_id: str) -> RunFolder:
        """The folder in which a run with train_minutes is planned, before its id is known."""
        return RunFolder(inside(self.root / "plans", plan_id))

    def runs(self) -> list[RunFolder]:
        return [RunFolder(path.parent) for path in self.checkpoints.glob("*/run.json")]

    def evaluations(self) -> list[Path]:
        return list(self.checkpoints.glob("*/evaluation_step_*.json"))

    def model(self, model_id: str) -> ModelFolder:
        return ModelFolder(inside(self.models, model_id))

    def model_folders(self) -> list[ModelFolder]:
        return [ModelFolder(path.parent) for path in self.models.glob("*/textmill.json")]

    def released(self, line: str | None) -> Path:
        """Pointer to the released model of a release line."""
        return self.models / _of_line("released", line)

    def decision(self, line: str | None) -> Path:
        """The snapshot that the newest release decision of a line was based on."""
        return self.models / _of_line("decision", line)

    def release_lines(self) -> dict[str | None, Path]:
        """The pointer of each release line; the line without a name is None."""
        pointers = sorted(self.models.glob("released*.json"))
        return {path.stem.removeprefix("released").removeprefix("_") or None: path for path in pointers}

    @property
    def _text(self) -> Path:
        return self.root / QUICKSTART if self.quickstart else self.root

    @property
    def _line(self) -> str | None:
        return QUICKSTART if self.quickstart else None


def named_folder(folder: str) -> Path:
    """The absolute path of a folder that a user names; `~` is the user's own folder. Raises UserError if it is not UTF-8."""
    if not is_unicode(folder):
        raise UserError(f"{folder}: the name of this folder is not UTF-8; rename it")
    return Path(os.path.expanduser(folder)).resolve()  # noqa: PTH111 (a Path raises for an unknown user)


def _of_line(name: str, line: str | None) -> str:
    return f"{name}.json" if line is None else f"{name}_{line}.json"
