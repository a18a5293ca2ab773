"""The command line of a configuration class, with errors that state the remedy."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin
from unicodedata import category

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic.fields import FieldInfo

from llm_core.errors import TextmillError
from llm_core.interrupts import exit_interrupted, raise_on_interrupt
from llm_core.system import restrict_umask

Options = TypeVar("Options", bound=BaseModel)

_HELP = ("-h", "--help")


def describe_invalid(error: ValidationError, prefix: str = "--") -> str:
    """One line per wrong option: its name, the value, and what is allowed."""
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"] if isinstance(part, str))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            lines.append(f"{prefix}{name}: missing, it has no default")
            continue
        lines.append(f"{prefix}{name} {_shown(problem['input'])}: {message}" if name else message)
    return "\n".join(lines)


def _shown(value: object) -> str:
    """A value in a message: on one line, and not longer than a few lines of a terminal."""
    text = str(value)
    return printable(text if len(text) <= 200 else text[:200] + "...")


def parse_options(options: type[Options], prog: str, arguments: Sequence[str] | None = None) -> Options:
    """Parses `--name value` or `--name=value` for each field of `options`; a wrong option exits with code 2.

    The argument after a flag is its value, unchanged, even if it begins with "-"; only another flag of the tool means that the
    value is missing. A list takes one item each time its flag is given, or all as JSON. A dictionary is JSON.
    """

    def refuse(message: str) -> NoReturn:
        print(error_message(message, prog), file=sys.stderr)
        raise SystemExit(2)

    flags = {flag: name for name, field in options.model_fields.items() for flag in _flags(name, field)}
    known = [*_HELP, *flags]
    values: dict[str, Any] = {}
    rest = iter(sys.argv[1:] if arguments is None else arguments)
    for argument in rest:
        if argument in _HELP:
            print(_help(options, prog), end="")
            raise SystemExit
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--"):
            refuse(f"{_shown(argument)}: no flag precedes this value; --help lists them all")
        if flag not in flags:
            similar = get_close_matches(flag, known, n=1, cutoff=0.75)
            hint = f"did you mean {similar[0]}? " if similar else ""
            refuse(f"{_shown(flag)}: no such option; {hint}--help lists them all")
        name = flags[flag]
        kind = _kind(options.model_fields[name])
        if kind is bool:
            if equals:
                refuse(f"{_shown(argument)}: takes no value; write --{name} or --no-{name}")
            values[name] = not flag.startswith("--no-")
            continue
        if not equals:
            following = next(rest, None)
            if following is None or following.partition("=")[0] in known:
                meant = f"; if {_shown(following)} is its value, write {flag}={_shown(following)}" if following else ""
                refuse(f"{flag}: its value is missing{meant}")
            value = following
        try:
            if kind is list:
                values.setdefault(name, []).extend(json.loads(value) if value.startswith("[") else [value])
            else:
                values[name] = json.loads(value) if kind is dict else value
        except (ValueError, RecursionError) as error:
            example = '["one", "two"]' if kind is list else '{"name": 1}'
            refuse(f"{flag}: not readable as JSON ({error}); write it like {example}")
    try:
        return options.model_validate(values)
    except ValidationError as error:
        refuse(describe_invalid(error))


def _flags(name: str, field: FieldInfo) -> list[str]:
    """Every spelling of an option; a boolean one has a negative of each."""
    aliases = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
    forms = ("--", "--no-") if _kind(field) is bool else ("--",)
    return [f"{form}{alias}" for alias in dict.fromkeys((name, *aliases)) for form in forms]


def _kind(field: FieldInfo) -> Any:
    """The type of an option without None, bounds and parameters, such as `int` or `list`; Literal for a choice."""
    annotation = _plain(field.annotation)
    return get_origin(annotation) or annotation


def _plain(annotation: Any) -> Any:
    while get_origin(annotation) in (Annotated, Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    return annotation


def _help(options: type[BaseModel], prog: str) -> str:
    """The flags with their values, descriptions and defaults; the description explains a missing default."""
    parser = argparse.ArgumentParser(prog=prog, description=options.__doc__)
    for name, field in options.model_fields.items():
        kind, default = _kind(field), field.get_default()
        text = field.description or ""
        if kind is list:
            text += " Give the flag once for each item, or all items as JSON."
        if field.is_required():
            text += " (required)"
        elif default not in (None, ""):
            text += f" (default: {json.dumps(default) if kind in (list, dict) else default})"
        if kind is bool:
            form: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif kind is Literal:
            form = {"choices": get_args(_plain(field.annotation))}
        else:
            form = {"metavar": {list: "text", dict: "JSON", str: "text"}.get(kind, kind.__name__)}
        flags = [flag for flag in _flags(name, field) if not flag.startswith("--no-")]  # argparse adds the negatives
        parser.add_argument(*flags, help=text.replace("%", "%%"), **form)
    return parser.format_help()


def run_tool(main: Callable[[], None], prog: str, interrupted: str = "nothing was changed") -> None:
    """Runs `main`; a TextmillError becomes one message and its exit code.

    interrupted: what Ctrl-C leaves behind, and how to continue.
    """
    restrict_umask()
    raise_on_interrupt()
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped; {printable(interrupted)}", file=sys.stderr)
        exit_interrupted()
    except TextmillError as error:
        print(error_message(error, prog), file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def error_message(error: TextmillError | str, prog: str) -> str:
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
