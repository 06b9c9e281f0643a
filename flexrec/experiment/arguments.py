"""Options as arguments of a command line, and as a YAML file that says the same.

Both are made of the dataclasses that hold the options, which say of every field what it is for and which values it
takes. Nothing heavy is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from flexrec.checks import did_you_mean, flag_of
from flexrec.data.columns import read_yaml
from flexrec.data.options import OPTIONS, said_of
from flexrec.experiment.config import ExperimentConfig

_DATA = "data: "  # what options of data sets are called among the arguments, so that they meet no others
_OF_A_RUN = ("output", "resume", "dry_run")  # what a file that repeats a run does not say


def add_options(
    parser: argparse.ArgumentParser,
    options: type,
    names: Sequence[str] | None = None,
    *,
    default: str | None = None,
    required: bool = True,
) -> None:
    """An argument for every field of a dataclass made with ``flexrec.checks.option``; what is not given is not set.

    Args:
        names: these fields only.
        default: what their defaults are, if not those of the dataclass.
        required: whether those without a default must be given.
    """
    types = get_type_hints(options)
    # What a class has of its own comes before what it inherits.
    for one in sorted(fields(options), key=lambda one: one.name not in options.__annotations__):
        if "help" not in one.metadata or (names is not None and one.name not in names):
            continue
        _add_option(parser, one, types[one.name], dest=one.name, text=_help(one, default), required=required)


def add_data_options(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """An argument for every option that the loader of some data set takes; :func:`given_data_options` reads them."""
    group = parser.add_argument_group("options of data sets")
    for name in dict.fromkeys(one.name for dataset in reversed(OPTIONS) for one in said_of(dataset)):
        of = {dataset: one for dataset in OPTIONS for one in said_of(dataset) if one.name == name}
        *_, (last, one) = of.items()
        text = _help_of(of, default)
        choices = [choice for other in of.values() for choice in other.metadata.get("choices", ())]
        annotation = get_type_hints(OPTIONS[last])[name]
        _add_option(group, one, annotation, dest=_DATA + name, text=text, choices=tuple(dict.fromkeys(choices)))


def _help_of(of: dict[str, Field[Any]], default: str | None) -> str:
    """What an option of data sets is for, which of them take it, and its default in each."""
    fields_of = list(of.values())
    text = "" if len(of) == len(OPTIONS) else f"of {', '.join(of)}: "
    if default is not None or len({one.default for one in fields_of}) == 1:
        return text + _help(fields_of[0], default)
    what, _, where_none = str(fields_of[0].metadata["help"]).partition("; default: ")
    said = (f"{dataset} {where_none if one.default is None else shown(one.default)}" for dataset, one in of.items())
    return f"{text}{what} (default: {', '.join(said)})"


def _add_option(
    parser: Any,
    one: Field[Any],
    annotation: Any,
    *,
    dest: str,
    text: str,
    choices: Sequence[str] | None = None,
    required: bool = True,
) -> None:
    """The argument of a command line that a dataclass's field describes."""
    kind = _kind(annotation)
    of_many = get_origin(kind) in (tuple, Collection)
    settings: dict[str, Any] = {"dest": dest, "default": argparse.SUPPRESS, "help": text}
    if one.default is MISSING and required:
        settings["required"] = True
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif choices or "choices" in one.metadata:
        settings["choices"] = choices or one.metadata["choices"]
    elif of_many and get_origin(kind) is tuple and ... not in get_args(kind):  # so many of them, no more and no less
        settings |= {"nargs": len(get_args(kind)), "type": get_args(kind)[0], "metavar": one.metadata["metavar"]}
    else:
        settings["metavar"] = one.metadata.get("metavar", {int: "N", float: "X"}.get(kind, "NAME"))
        settings |= {"nargs": "+", "action": "extend"} if of_many else {"type": kind}
    names = [flag_of(one)]
    if dest.startswith(_DATA):  # messages of loaders name the arguments of Python
        names = list(dict.fromkeys([*names, "--" + one.name.replace("_", "-")]))
    argument = parser.add_argument(*names, **settings)
    argument.help = text  # Python 3.10 adds a default of its own to switches


def _kind(annotation: Any) -> Any:
    """``T`` of ``T | None``, a text where that is one of several kinds, and any other type as it is."""
    if get_origin(annotation) is UnionType:
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return str if str in kinds else kinds[0]
    return annotation


def _help(one: Field[Any], default: str | None) -> str:
    """What an option is for, and its default, which the text names itself where it is nothing."""
    text = str(one.metadata["help"])
    if default is not None:
        text = f"{text.partition('; default:')[0]} (default: {default})"
    elif one.default is not None and one.default is not MISSING and one.default != ():  # which the text names itself
        text += f" (default: {shown(one.default)})"
    return text.replace("%", "%%")


def shown(value: Any) -> str:
    """A value of an option as a person would say it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def given(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """The fields of a dataclass that stand on the command line."""
    found = {one.name: getattr(arguments, one.name) for one in fields(options) if one.name in arguments}
    return {name: tuple(dict.fromkeys(v)) if isinstance(v, list) else v for name, v in found.items()}


def given_data_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of data sets that stand on the command line."""
    found = {name.removeprefix(_DATA): value for name, value in vars(arguments).items() if name.startswith(_DATA)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}


def read_options(path: Path) -> dict[str, Any]:
    """The fields of an :class:`ExperimentConfig` that a YAML file gives, and ``data_options``.

    A file has the names of the command line, with - or _, and its values: ``steps: 40``, ``need: [interest, trend]``,
    ``profile: true``; null is as good as nothing. Relative paths are so from where the command is called.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no YAML, no mapping, a name that is none of an option, a value that the option does not take.
    """
    content = read_yaml(path, "--config")
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold options and their values, as in 'steps: 40', got {content!r}")
    if twice := _twice(path):
        raise ValueError(f"{path}: {twice!r} stands twice")
    parser = _Parser(path)
    add_options(parser, ExperimentConfig, required=False)
    add_data_options(parser)
    flags = {flag.removeprefix("--"): action for action in parser._actions for flag in action.option_strings}
    tokens: list[str] = []
    mappings: dict[str, Any] = {}
    seen: dict[str, str] = {}
    for key, value in content.items():
        name = str(key).replace("_", "-")
        action = flags.get(name)
        if action is None or name.startswith("no-"):
            raise ValueError(f"{path}: there is no option {key!r}{did_you_mean(name, flags)}")
        if action.dest in seen:
            raise ValueError(f"{path}: {key!r} says again what {seen[action.dest]!r} said")
        seen[action.dest] = str(key)
        if isinstance(value, dict) and action.dest.startswith(_DATA):
            mappings[action.dest.removeprefix(_DATA)] = value  # which the data set reads itself
        elif value is not None:
            tokens += _tokens(path, name, action, value)
    arguments = parser.parse_args(tokens)
    return {**given(arguments, ExperimentConfig), "data_options": {**given_data_options(arguments), **mappings}}


def options_text(config: ExperimentConfig) -> str:
    """Every option of a run as the text of such a file, but for its folder."""
    import yaml

    of_run = [one for one in fields(config) if "help" in one.metadata and one.name not in _OF_A_RUN]
    content = {flag_of(one).removeprefix("--"): _plain(getattr(config, one.name)) for one in of_run}
    if config.dataset in OPTIONS:
        of_data = {one.name: one for one in said_of(config.dataset)}
        for name, value in config.data_options.items():
            if name in of_data:
                content[flag_of(of_data[name]).removeprefix("--")] = _plain(value)
    head = "# flexrec train --config THIS_FILE --output DIR repeats the run, with any options beside it changed.\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


class _Parser(argparse.ArgumentParser):
    """One whose errors are those of a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._path = path

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self._path}: {message}")


def _twice(path: Path) -> str | None:
    """The first name that a YAML file has twice, of which readers take the last without a word."""
    import yaml

    node = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    return next((name for n, name in enumerate(names) if name in names[:n]), None)


def _tokens(path: Path, name: str, action: argparse.Action, value: Any) -> list[str]:
    """What a value of a file would be on the command line."""
    flag = f"--{name}"
    switch = isinstance(action, argparse.BooleanOptionalAction)
    if switch != isinstance(value, bool):
        expected = "true or false" if switch else "no such value; quote words such as 'no'"
        raise ValueError(f"{path}: {name} takes {expected}, got {value!r}")
    if switch:
        return [flag if value else f"--no-{name}"]
    if isinstance(value, (dict, list)):
        if action.nargs is None or isinstance(value, dict):
            raise ValueError(f"{path}: {name} takes one value, got {value!r}")
        return [flag, *map(str, value)]
    return [flag, str(value)] if action.nargs is not None else [f"{flag}={value}"]


def _plain(value: Any) -> Any:
    """A value as YAML has it."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, Path):
        return str(value)
    return [_plain(one) for one in value] if isinstance(value, Collection) and not isinstance(value, str) else value
