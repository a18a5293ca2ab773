"""The command line of a configuration class, with errors that state the remedy."""

import argparse
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar
from unicodedata import category

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, SettingsConfigDict, SettingsError

from llm_core.errors import TextmillError
from llm_core.system import restrict_umask

Options = TypeVar("Options", bound=BaseModel)


class _Help(argparse.HelpFormatter):
    """Omits null defaults: the description explains a missing value."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return (action.help or "").replace(" (default: null)", "")


def describe_invalid(error: ValidationError, prefix: str = "--") -> str:
    """One line per wrong option: its name, the value, and what is allowed."""
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
    """Parses `--field value` for each field of `options`; a wrong flag exits with code 2."""

    class Settings(options, BaseSettings):  # type: ignore[misc, valid-type]
        __doc__ = options.__doc__
        model_config = SettingsConfigDict(cli_implicit_flags=True, cli_prog_name=prog, cli_hide_none_type=True)

        @classmethod
        def settings_customise_sources(cls, *args: Any, **sources: Any) -> tuple[()]:
            """Only the command line: an environment variable with the name of a field must not change a run."""
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
    """Exits at an unknown flag and suggests a similar one."""
    known = ["--help"]
    for name, field in options.model_fields.items():
        aliases = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
        forms = ("--", "--no-") if field.annotation is bool else ("--",)
        known += [f"{form}{alias}" for alias in (name, *aliases) for form in forms]
    for flag in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        if flag not in known:
            similar = get_close_matches(flag, known, n=1, cutoff=0.75)
            hint = f"did you mean {similar[0]}? " if similar else ""
            print(f"{prog}: error: {flag}: no such option; {hint}--help lists them all", file=sys.stderr)
            raise SystemExit(2)


def run_tool(main: Callable[[], None], prog: str) -> None:
    """Runs `main`; a TextmillError becomes one message and its exit code."""
    restrict_umask()
    try:
        main()
    except TextmillError as error:
        print(error_message(error, prog), file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def error_message(error: TextmillError, prog: str) -> str:
    """The message with which a tool exits."""
    return f"{prog}: error: " + printable(str(error), keep="\n")


def printable(text: str, keep: str = "") -> str:
    """Escapes control characters for the terminal: file names and generated text can contain anything.

    Unicode spaces and the characters in `keep` are left as they are.
    """
    return "".join(
        character if character.isprintable() or character in keep or category(character) == "Zs" else repr(character)[1:-1]
        for character in text
    )
