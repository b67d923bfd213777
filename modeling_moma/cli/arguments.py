# SPDX-License-Identifier: Apache-2.0
"""The command line of a subcommand from a dataclass: its docstring is the help, its types are the checks."""

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin

from ..errors_moma import InputError
from ..utils.fields import annotations, choices, descriptions, read_field, read_fields, refuse_unknown


T = TypeVar("T")


@dataclass(frozen=True)
class Flag:
    """What the type of a field does not say of its flag, in `Annotated`.

    Args:
        metavar (`str`, *optional*):
            what stands for the value in help; by default the name of the flag, or its choices.
        is_positional (`bool`, *optional*, defaults to `False`):
            an argument by its place, and no flag.
        is_repeated (`bool`, *optional*, defaults to `False`):
            a list whose values each have the flag before them, and not all behind one.
        name (`str`, *optional*):
            of the flag, where it is not that of the field.
        one_of (`str`, *optional*):
            name of a group of flags of which at most one may be given.
        section (`str`, *optional*):
            for a field that has no flag of its own, but is given as `--set section.field=value`.
    """

    metavar: str | None = None
    is_positional: bool = False
    is_repeated: bool = False
    name: str | None = None
    one_of: str | None = None
    section: str | None = None


# fields by the command line, over those of a file or over defaults
Changes = Annotated[list[str], Flag(metavar="SECTION.FIELD=VALUE")]


class FlagParser(argparse.ArgumentParser):
    """A parser of the fields of a dataclass."""

    def __init__(self, kind: type, required: Iterable[str] = (), **options: Any):
        super().__init__(argument_default=argparse.SUPPRESS, allow_abbrev=False, **options)
        self.kind = kind
        holders: dict[str, Any] = {}
        set_fields: dict[str, str] = {}
        for entry in dataclasses.fields(kind):
            flag, holder = flag_of(kind, entry.name), self
            if flag.section is not None:
                set_fields[title_of(kind, entry.name)] = help_of(kind, entry)
                continue
            if flag.one_of is not None:
                holder = holders.get(flag.one_of) or self.add_mutually_exclusive_group(
                    required=flag.one_of in required
                )
                holders[flag.one_of] = holder
            names, how = argument_of(kind, entry)
            holder.add_argument(*names, **how)
        if set_fields:
            help_text = "; ".join(f"{title}: {meaning}" for title, meaning in set_fields.items())
            self.add_argument("--set", metavar="SECTION.FIELD=VALUE", action="extend", nargs="+", help=help_text)
        self.set_fields = {title: title.rpartition(".")[2] for title in set_fields}

    def read(self, arguments: list[str] | None = None) -> dict[str, Any]:
        """Return the values that a command line gives, by field; end the program where one is not what it may be."""
        return self.checked(vars(self.parse_args(arguments)))

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Texts of a command line, or of a part of it, as their fields take them; see [`read`]."""
        try:
            if self.set_fields:
                changes = dict(split_change(change) for change in given.get("set", ()))
                refuse_unknown(changes, self.set_fields, "--set", "this command")
                given = {name: value for name, value in given.items() if name != "set"}
                given |= {self.set_fields[title]: value for title, value in changes.items()}
            return {
                name: read_field(self.kind, name, value, title_of(self.kind, name)) for name, value in given.items()
            }
        except InputError as error:
            self.error(str(error))


def parse_fields(kind: type[T], description: str | None, arguments: list[str] | None = None, **options: Any) -> T:
    """Return a dataclass of a command line."""
    return kind(**FlagParser(kind, description=description, **options).read(arguments))


def read_changes(kind: type[T], section: str, changes: Iterable[str]) -> T:
    """Return a dataclass with the fields that `--set section.field=value` changes."""
    given = dict(split_change(change) for change in changes)
    known = {f"{section}.{entry.name}": entry.name for entry in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    refuse_unknown(given, known, "--set", "this command")
    return read_fields(kind, {known[title]: value for title, value in given.items()}, f"--set {section}")


def split_change(change: str) -> tuple[str, str]:
    """Return the place of a field, with its section, and its value."""
    place, equals, value = change.partition("=")
    if "." not in place or not equals:
        raise InputError(f"--set {change!r}: it is no section.field=value.")
    return place, value


def flag_of(kind: type, name: str) -> Flag:
    """Return what the type of a field says of its flag."""
    return next((part for part in get_args(annotations(kind)[name]) if isinstance(part, Flag)), Flag())


def title_of(kind: type, name: str) -> str:
    """Return what a field is called on the command line."""
    flag = flag_of(kind, name)
    if flag.section is not None:
        return f"{flag.section}.{name}"
    return flag.metavar or name.upper() if flag.is_positional else flag.name or f"--{name.replace('_', '-')}"


def argument_of(kind: type, entry: dataclasses.Field) -> tuple[list[str], dict[str, Any]]:
    """Names and options with which argparse gets to know a field. Values stay texts, which [`read_field`] reads."""
    annotation, flag, title = annotations(kind)[entry.name], flag_of(kind, entry.name), title_of(kind, entry.name)
    how: dict[str, Any] = {"help": help_of(kind, entry)}
    if isinstance(entry.default, bool):
        return [title], {**how, "dest": entry.name, "action": "store_false" if entry.default else "store_true"}
    if flag.metavar is not None:
        how["metavar"] = flag.metavar
    elif choices(annotation):
        how["choices"] = [str(choice) for choice in choices(annotation)]
    if flag.is_repeated:
        how["action"] = "append"
    elif is_list(annotation):
        how |= {"action": "extend", "nargs": "+"}
    is_required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    if flag.is_positional:
        return [entry.name], how if is_required else {**how, "nargs": "?"}
    return [title], {**how, "dest": entry.name, "required": is_required}


def help_of(kind: type, entry: dataclasses.Field) -> str:
    """Return what the docstring says of a field, with its default where it has one to tell."""
    text = descriptions(kind).get(entry.name, "").rstrip(".")
    has_default = not isinstance(entry.default, bool) and entry.default not in (dataclasses.MISSING, None, "")
    if has_default and not flag_of(kind, entry.name).is_positional:
        text = f"{text} (default: {entry.default})".strip()
    return text.replace("%", "%%")


def is_list(annotation: Any) -> bool:
    """Return whether a type is that of lists, or of lists and something else."""
    return get_origin(annotation) in (list, tuple) or any(is_list(part) for part in get_args(annotation))
