"""Checks the options of all stages together, before a run exists."""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import click
import dagster as dg
from dagster._core.system_config.objects import ResolvedRunConfig
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from llm_core.cli import printable
from llm_core.config import TokenizerConfig, TrainConfig, divide_batch, micro_batch_size
from llm_core.corpus import is_url
from llm_core.errors import UserError
from llm_core.evaluation import check_tasks
from llm_core.layout import named_folder
from llm_core.tokenizer import check_engine, check_tokenizer
from pipeline.artifacts.starting_point import RELEASED
from pipeline.assets.checkpoint import CheckpointConfig
from pipeline.assets.evaluation import EvaluationConfig
from pipeline.assets.sample_corpus import sample_corpus
from pipeline.assets.tokenized_shards import TokenizedShardsConfig
from pipeline.assets.trained_tokenizer import TrainedTokenizerConfig
from pipeline.automation.jobs import LINEAGE, PREPARATION
from pipeline.automation.retraining import from_environment
from pipeline.failures import in_run_config
from pipeline.resources import Storage

# The options of each asset that has some.
STAGES: dict[str, type[BaseModel]] = {
    asset.op.name: hints["config"]
    for asset in [sample_corpus, *LINEAGE]
    if "config" in (hints := get_type_hints(asset.op.compute_fn.decorated_fn))  # type: ignore[union-attr]
}


class RunConfigError(click.ClickException):
    """All mistakes in a run configuration, one per line. `dagster job execute` prints it without a traceback."""


def check_before_launch() -> None:
    """Makes Dagster refuse a run configuration with mistakes before the run exists, however it is launched.

    Dagster itself checks names and types, but neither bounds nor combinations: those would fail when their step starts, possibly
    after hours of work. It has no hook for more, so this replaces the function in which the web UI, the command line, sensors and
    schedules all resolve the configuration of a run.
    """
    resolve = ResolvedRunConfig.build
    if hasattr(resolve, "__wrapped__"):
        return

    @functools.wraps(resolve)
    def check_and_resolve(job_def: dg.JobDefinition, run_config: Mapping[str, Any] | None = None) -> ResolvedRunConfig:
        if mistakes := find_mistakes(job_def, run_config or {}):
            raise RunConfigError("\n".join([f"the run configuration does not fit {_named(job_def)}:", *mistakes]))
        return resolve(job_def, run_config)

    ResolvedRunConfig.build = staticmethod(check_and_resolve)  # type: ignore[method-assign]


def find_mistakes(job: dg.JobDefinition, run_config: Mapping[str, Any]) -> list[str]:
    """One line for each mistake in the sections `ops` and `resources`; what is in the others is left to Dagster."""
    sections = _fields(job.run_config_schema.run_config_schema_type)
    mistakes = [f"{name}: no such section{_similar(name, sections)}" for name in run_config if name not in sections]
    resources = {name: getattr(resource, "configurable_resource_cls", None) for name, resource in job.resource_defs.items()}
    configs: dict[str, BaseModel] = {}
    for section, classes in (("ops", STAGES), ("resources", resources)):
        entries, known = run_config.get(section) or {}, _fields(sections[section].config_type)
        if not isinstance(entries, Mapping):
            mistakes.append(f"{section} {entries}: write the options of each as {section}: {{NAME: {{config: {{...}}}}}}")
            continue
        for name in entries:
            if name in known:
                continue
            if name in STAGES and section == "ops":
                mistakes.append(f"{name}: not in {_named(job)}; leave out its options, or launch an asset or job that uses them")
            else:
                mistakes.append(f"{name}: no such {'asset' if section == 'ops' else 'resource'}{_similar(name, known)}")
        for name, stage in classes.items():
            if stage is None or name not in known:
                continue
            options = _options(name, entries.get(name), mistakes)
            if options is not None and (config := _config(section, name, stage, options, mistakes)) is not None:
                configs[name] = config
    if isinstance(storage := configs.get("storage"), Storage):
        storage.in_job(job.name)
    selected = {node.name for node in job.nodes} | resources.keys()
    for name, check in _combinations({name: config for name, config in configs.items() if name in selected}):
        try:
            check()
        except UserError as error:
            mistakes.append(f"{name}: {in_run_config(str(error)).removeprefix(f'{name}.')}")
    return [printable(line) for line in mistakes]


def _named(job: dg.JobDefinition) -> str:
    return "the selected assets" if job.name.startswith("__") else f"the job {job.name}"


def _fields(config_type: Any) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = config_type.fields
    return fields


def _options(name: str, entry: Any, mistakes: list[str]) -> Mapping[str, Any] | None:
    """The options in `NAME: {config: {...}}`; None if they are written otherwise."""
    entry = {} if entry is None else entry
    if isinstance(entry, Mapping) and entry.keys() <= {"config"}:
        options = entry.get("config") or {}
        if isinstance(options, Mapping):
            return options
    mistakes.append(f"{name} {entry}: write its options as {name}: {{config: {{OPTION: VALUE}}}}")
    return None


def _config(section: str, name: str, stage: type[BaseModel], options: Mapping[str, Any], mistakes: list[str]) -> BaseModel | None:
    """The configuration of one stage or resource; None if there are mistakes in it."""
    values, found = {}, []
    for option, value in options.items():
        try:
            values[option] = _resolved(f"{section}.{name}.config.{option}", value)
        except UserError as error:
            found.append(str(error))
    # As Dagster does, take no text for a number, but only from an environment variable.
    literal = {option: value for option, value in values.items() if value == options[option]}
    try:
        _strict(stage).model_validate(literal)
    except ValidationError as error:
        found += [_described(name, stage, dict(problem)) for problem in error.errors()]
    if not found:
        try:
            return stage(**values)
        except ValidationError as error:
            found += [_described(name, stage, dict(problem)) for problem in error.errors()]
    mistakes += found
    return None


def _resolved(option: str, value: Any) -> Any:
    if isinstance(value, list):
        return [from_environment(option, item) for item in value]
    return from_environment(option, value)


@functools.cache
def _strict(stage: type[BaseModel]) -> type[BaseModel]:
    """A model with the same options that converts no types and does not check combinations."""
    fields: dict[str, Any] = {name: (field.rebuild_annotation(), None) for name, field in stage.model_fields.items()}
    settings = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    return create_model(stage.__name__, __config__=settings, **fields)


def _described(name: str, stage: type[BaseModel], problem: Mapping[str, Any]) -> str:
    option = ".".join(str(part) for part in problem["loc"] if isinstance(part, str))
    message = problem["msg"].removeprefix("Value error, ")
    if not option:
        return f"{name}: {message}"
    if problem["type"] == "extra_forbidden":
        others = [other for other, options in STAGES.items() if option in options.model_fields]
        elsewhere = f"; it is an option of {' and '.join(others)}" if others else ""
        return f"{name}.{option}: no such option{elsewhere or _similar(option, stage.model_fields)}"
    return f"{name}.{option} {problem['input']}: {message}{_hint(problem['type'], problem['input'])}"


def _similar(name: Any, known: Collection[str]) -> str:
    similar = get_close_matches(str(name), known, n=1, cutoff=0.75)
    return f"; did you mean {similar[0]}?" if similar else ""


def _hint(problem: str, value: Any) -> str:
    """How to write a value that YAML reads as another type."""
    if problem == "string_type" and not isinstance(value, list | dict | NoneType):
        return "; put it in quotes"
    try:
        number = float(value) if isinstance(value, str | float) else math.nan
    except ValueError:
        return ""
    if problem == "int_type" and number.is_integer():
        return f"; write {int(number)}"
    if problem == "float_type" and math.isfinite(number):
        mantissa, _, exponent = value.strip().lower().partition("e")
        if not exponent:
            return "; remove the quotes"
        return f"; YAML reads it as text, write {mantissa}{'' if '.' in mantissa else '.0'}e{int(exponent):+d}"
    return ""


def _combinations(configs: Mapping[str, BaseModel]) -> Iterator[tuple[str, Callable[[], object]]]:
    """What the library can check of the configurations before anything is read: each check raises UserError."""
    shards, training = configs.get("tokenized_shards"), configs.get("checkpoint")
    if isinstance(storage := configs.get("storage"), Storage):
        yield "storage", lambda: storage.folders
        if configs.keys() & {asset.op.name for asset in PREPARATION}:
            yield "storage", lambda: _check_raw_text_dir(storage)
    if isinstance(tokenizer := configs.get("trained_tokenizer"), TrainedTokenizerConfig):
        yield "trained_tokenizer", lambda: check_tokenizer(tokenizer.stage(TokenizerConfig))
    if isinstance(shards, TokenizedShardsConfig):
        yield "tokenized_shards", lambda: check_engine(shards.engine)
    if isinstance(training, CheckpointConfig):
        yield "checkpoint", lambda: _check_init_from(training)
        if isinstance(shards, TokenizedShardsConfig) and training.train_minutes is None and training.max_epochs is None:
            resolve = functools.partial(training.stage(TrainConfig).resolved, shards.max_length, shards.stride)
            yield "checkpoint", lambda: micro_batch_size(resolve(), training.nproc_per_node)
        elif (batch := training.batch_size) is not None:
            yield "checkpoint", lambda: divide_batch(batch, training.micro_batch_size, training.nproc_per_node)
    if isinstance(evaluation := configs.get("evaluation"), EvaluationConfig) and evaluation.lm_eval_tasks:
        yield "evaluation", lambda: check_tasks(evaluation)


def _check_raw_text_dir(storage: Storage) -> None:
    """Refuses a configured folder that is missing; a URL would cost a request, and the folder of the home is created."""
    if storage.raw_text_dir is None or is_url(storage.raw_text_dir):
        return
    folder = named_folder(storage.raw_text_dir)
    if not folder.is_dir():
        problem = (
            "is a file; name the folder that contains it" if folder.exists() else "no such folder; create it or name another"
        )
        raise UserError(f"storage.raw_text_dir {folder}: {problem}")


def _check_init_from(config: TrainConfig) -> None:
    if config.init_from not in (None, RELEASED) and not Path(config.init_from).exists():
        raise UserError(f"--init_from {config.init_from}: no such checkpoint or run folder; '{RELEASED}' is the released model")
