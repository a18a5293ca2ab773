"""From a stage's configuration class to its command line, with errors that a person can act on."""

import argparse
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar
from unicodedata import category

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, SettingsConfigDict, SettingsError

from llm_core.errors import TextmillError
from llm_core.files import keep_others_from_writing

Options = TypeVar("Options", bound=BaseModel)

_MEANT = {
    "lr": "--learning_rate",
    "epochs": "--max_steps",
    "num_train_epochs": "--max_steps",
    "gradient_accumulation": "--micro_batch_size",
    "gradient_accumulation_steps": "--micro_batch_size",
    "seq_len": "--max_length",
    "block_size": "--max_length",
}
"""What flags of other programs are called here: by their letters they resemble something else."""

_OF_DATA_PREPARATION = ("vocab_size", "num_workers")


class _Help(argparse.HelpFormatter):
    """Leaves out defaults that say nothing: the description tells what the absence of a value means."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return (action.help or "").replace(" (default: null)", "")


def describe_invalid(error: ValidationError, prefix: str = "--") -> str:
    """One line per wrong option: its name, the value given and what would be right."""
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"] if isinstance(part, str))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            lines.append(f"{prefix}{name}: missing, it has no default")
            continue
        lines.append(f"{prefix}{name} {problem['input']}: {message}" if name else message)
    return "\n".join(lines)


def parse_options(options: type[Options], prog: str, arguments: Sequence[str] | None = None) -> Options:
    """Reads `--field value` for each field of `options`; a wrong flag ends the program with code 2."""

    class Settings(options, BaseSettings):  # type: ignore[misc, valid-type]
        __doc__ = options.__doc__
        model_config = SettingsConfigDict(cli_implicit_flags=True, cli_prog_name=prog, cli_hide_none_type=True)

        @classmethod
        def settings_customise_sources(cls, *args: Any, **sources: Any) -> tuple[()]:
            """The command line alone: an environment variable named like a field must not change a run."""
            return ()

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _refuse_unknown(options, prog, arguments)
    try:
        source: Any = CliSettingsSource(Settings, formatter_class=_Help, cli_exit_on_error=False)
        parsed = CliApp.run(Settings, arguments, source)
    except ValidationError as error:
        print(f"{prog}: error: {describe_invalid(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except SettingsError as error:
        field, _, reason = str(error).removeprefix("Parsing error encountered for ").partition(": ")
        message = reason if field == "error parsing CLI" else f"--{field}: not readable as JSON ({reason})"
        print(f"{prog}: error: {message.removeprefix('argument ')}", file=sys.stderr)
        raise SystemExit(2) from None
    return options.model_validate(parsed.model_dump())


def _refuse_unknown(options: type[BaseModel], prog: str, arguments: Sequence[str]) -> None:
    """Ends the program where a flag is none of ours, with the one that was meant and not with all there are."""
    known = ["--help"]
    for name, field in options.model_fields.items():
        aliases = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
        forms = ("--", "--no-") if field.annotation is bool else ("--",)
        known += [f"{form}{alias}" for alias in (name, *aliases) for form in forms]
    for flag in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        if flag not in known:
            meant = _meant(flag, known)
            print(f"{prog}: error: {flag}: no such option; {meant}--help lists them all", file=sys.stderr)
            raise SystemExit(2)


def _meant(flag: str, known: Sequence[str]) -> str:
    name = flag[2:].replace("-", "_")
    if name in _OF_DATA_PREPARATION:
        return "it is an option of llm_core.data_prep_tool; "
    here = _MEANT.get(name)
    similar = [here] if here in known else get_close_matches(flag, known, n=1, cutoff=0.75)
    return f"did you mean {similar[0]}? " if similar else ""


def run_tool(main: Callable[[], None], prog: str) -> None:
    """Runs `main`, turning our own errors into one message and their exit code."""
    keep_others_from_writing()
    try:
        main()
    except TextmillError as error:
        print(error_message(error, prog), file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def error_message(error: TextmillError, prog: str) -> str:
    """What a tool says of an error before it ends."""
    return f"{prog}: error: " + printable(str(error), keep="\n")


def printable(text: str, keep: str = "") -> str:
    """A text for the terminal. A file's name or a model's words may hold anything: no control character may act there.

    Spaces of every script stay as they are, and so do the characters in `keep`.
    """
    return "".join(
        character if character.isprintable() or character in keep or category(character) == "Zs" else repr(character)[1:-1]
        for character in text
    )
