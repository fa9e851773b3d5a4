"""Command-line options from the fields of the option dataclasses: their names, defaults and help exist only there.

A field `quant_policy: Literal[0, 4, 8] = option(0, "...")` becomes `--quant-policy {0,4,8}`; underscores in an option's
name are read as dashes; an unknown option or value names the nearest known one, another server's option ours.
"""

import argparse
import dataclasses
import difflib
import types
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from .foreign_options import NEEDLESS, OUR_NAMES

Config = TypeVar("Config")


class OptionParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence on stderr with exit status 2 and a suggestion."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`; options that do not exist end the program with the nearest known name."""
        namespace, unknown = self.parse_known_args([_with_dashes(argument) for argument in argv])
        if unknown:
            self.error(self._describe_unknown(unknown[0]))
        return namespace

    def _describe_unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected argument {argument!r}; see {self.prog} --help"
        name = argument.split("=", 1)[0]
        if OUR_NAMES.get(name) in self._option_string_actions:
            return f"unknown option {name}: here it is {OUR_NAMES[name]}; see {self.prog} --help"
        if name in NEEDLESS and "--session-len" in self._option_string_actions:
            return f"unknown option {name}: {NEEDLESS[name]}; leave it out"
        return f"unknown option {name}{suggestion(name, self._option_string_actions)}; see {self.prog} --help"


class _HelpFormatter(argparse.HelpFormatter):
    """Help with room for long option names and each default at the end of its line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.help or "%(default)" in action.help or action.default in (None, argparse.SUPPRESS, (), []):
            return action.help
        return action.help if action.nargs == 0 and not action.default else f"{action.help} (default: %(default)s)"


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the known word nearest to `word`, or nothing when none is near."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


def add_options(
    parser: argparse.ArgumentParser, config_type: type, *, title: str, only: Collection[str] | None = None
) -> None:
    """Add an option for each field of the dataclass `config_type`, or for those in `only`, in a group of this title."""
    group = parser.add_argument_group(title)
    hints = get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        if only is not None and field.name not in only:
            continue
        name = "--" + field.name.replace("_", "-")
        text = field.metadata["help"].replace("%", "%%")
        kind = _without_none(hints[field.name])
        if kind is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        elif get_origin(kind) is Literal:
            choices = get_args(kind)
            metavar = "{" + ",".join(map(str, choices)) + "}"
            group.add_argument(name, type=_one_of(choices), metavar=metavar, default=field.default, help=text)
        elif get_origin(kind) is tuple:
            group.add_argument(name, nargs="+", metavar=_metavar(field), default=field.default, help=text)
        else:
            group.add_argument(name, type=reader(kind), metavar=_metavar(field), default=field.default, help=text)


def read_options(config_type: type[Config], namespace: argparse.Namespace) -> Config:
    """Build the dataclass `config_type` from the options that `add_options` added for it."""
    names = [field.name for field in dataclasses.fields(config_type) if field.name in namespace]  # type: ignore[arg-type]
    values = {name: getattr(namespace, name) for name in names}
    return config_type(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def reader(kind: Any) -> Callable[[str], Any]:
    """Return what reads a value of this kind; a kind of our own explains itself when it cannot."""
    if kind in (int, float, str):
        return kind  # type: ignore[no-any-return]

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _metavar(field: "dataclasses.Field[Any]") -> str:
    return field.name.rsplit("_", 1)[-1].upper()


def _with_dashes(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _one_of(choices: tuple[Any, ...]) -> Callable[[str], Any]:
    by_text = {str(choice).lower(): choice for choice in choices}

    def convert(text: str) -> Any:
        if text.lower() in by_text:
            return by_text[text.lower()]
        known = ", ".join(map(str, choices))
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {known}{suggestion(text.lower(), by_text)}")

    return convert
