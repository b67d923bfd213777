# SPDX-License-Identifier: Apache-2.0
"""Docstrings in the form that Transformers uses, for a parser of Google's form."""

import re

from griffe import Class, Extension, Function, Object


_TYPES = r"`(?P<type>[^`]+)`(?P<more>(?:,? (?:or )?`[^`]+`)*)"
# name (`int`, *optional*, defaults to 1): text
_FIELD = re.compile(
    r"^(?P<indent> *)(?P<name>\*{0,2}\w+) \(" + _TYPES + r"(?P<rest>[^()]*(?:\([^()]*\)[^()]*)*)\):(?P<text>.*)$"
)
# `torch.Tensor` of shape `(batch_size, 2)`: text
_RESULT = re.compile(r"^(?P<indent> +)" + _TYPES + r"(?P<rest> of shape `[^`]+`)?: (?P<text>.*)$")
# several names with one explanation
_NAMES = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*)$")
# [`MomaConfig`], [`~MomaVQModel.forward`]
_REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![(\[])")
_HEADINGS = ("Args:", "Attributes:", "Parameters:")


def readable(text: str, defaults: bool) -> str:
    """The docstring with plain types, a heading before fields that have none, and lists as Markdown wants them.

    Args:
        text: the docstring.
        defaults: whether to keep defaults, which no signature shows.
    """
    lines = _REFERENCE.sub(r"`\1`", text).splitlines()
    if not any(line.strip() in _HEADINGS for line in lines):
        lines = _with_heading(lines)
    lines = [_plain_field(line, defaults) for given in lines for line in _split_names(given)]
    return "\n".join(_with_space_before_lists(lines))


def _with_heading(lines):
    """Fields at the margin, as `auto_docstring` wants them, become a section of their own."""
    start = next((number for number, line in enumerate(lines) if _FIELD.match(line)), None)
    if start is None or lines[start].startswith(" "):
        return lines
    rest = range(start, len(lines))
    stop = next((n for n in rest if lines[n] and lines[n][0] != " " and not _FIELD.match(lines[n])), len(lines))
    return [*lines[:start], "Args:", *("    " + line for line in lines[start:stop]), "", *lines[stop:]]


def _split_names(line):
    found = _NAMES.match(line)
    return [f"{found['indent']}{name}: {found['text']}" for name in found["names"].split(", ")] if found else [line]


def _plain_field(line, defaults):
    found = _FIELD.match(line)
    if found:
        name = f"{found['name']} ({_plain_type(found)})"
        note = found["rest"].replace(", *optional*", "")
        note = note.replace("defaults to", "Default:") if defaults else re.sub(r", defaults to .*", "", note)
    else:
        found = _RESULT.match(line)
        if not found:
            return line
        name, note = _plain_type(found), found["rest"] or ""
    note = note.strip(" ,")
    text = found["text"].strip()
    if note:
        note = f" {note[:1].upper()}{note[1:]}" + (":" if text[:1].islower() else ".")
    return f"{found['indent']}{name}:{note}{' ' + text if text else ''}"


def _plain_type(found):
    return " | ".join([found["type"], *re.findall(r"`([^`]+)`", found["more"])])


def _with_space_before_lists(lines):
    spaced = []
    for line in lines:
        starts_list = line.lstrip().startswith("- ") and spaced and spaced[-1].strip()
        if starts_list and not spaced[-1].lstrip().startswith("- ") and not _in_list(spaced, line):
            spaced.append("")
        spaced.append(line)
    return spaced


def _in_list(before, line):
    """Whether the lines since the last empty one hold an item of the same list."""
    indent = line[: len(line) - len(line.lstrip())]
    for earlier in reversed(before):
        if not earlier.strip():
            return False
        if earlier.startswith(f"{indent}- "):
            return True
    return False


class TransformersDocstrings(Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **kwargs) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if isinstance(obj, (Class, Function)) and obj.docstring:
            obj.docstring.value = readable(obj.docstring.value, defaults=isinstance(obj, Class))
