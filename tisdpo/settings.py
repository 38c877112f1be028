"""From YAML and `key.sub=value` overrides to nested dataclasses, with an error for everything that is not understood.

A field of a dataclass is read by its type: bool, int, float, str, None, list, dict, tuple, Literal, unions of them, and other dataclasses
(sections). Nothing is guessed and nothing is ignored, but for one thing: a number field takes '1e-3', which YAML 1.1 reads as text.
"""

import dataclasses
import difflib
import inspect
import re
import textwrap
import types
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from tisdpo.errors import InputError
from tisdpo.files import beside

COMMAND_LINE = "command line"
T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML as most people expect it: 1e-3 is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice in one section", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would read as numbers."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


@dataclass(frozen=True)
class _Origin:
    """For messages: the file that values came from, the dotted keys given on the command line, and the dataclass of the whole."""

    file: str
    overridden: frozenset[str]
    root: type

    def of(self, key: str) -> str:
        """The start of a message about a dotted key: "command line: ", "run.yaml: ", or nothing for values from a program."""
        by_hand = any(key == given or key.startswith(given + ".") or given.startswith(key + ".") for given in self.overridden)
        place = COMMAND_LINE if by_hand else self.file
        return f"{place}: " if place else ""


# Reading and writing


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; InputError with line and column for what is not one."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; give the path of a YAML file, such as examples/demo.yaml") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a text file ({error}); give a YAML file") from error
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}{_mark(error)} is not valid YAML: {_problem(error)}; correct it there") from error
    if values is None:
        raise InputError(f"{path} is empty; examples/demo.yaml shows what belongs into it")
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold 'key: value' lines, got {_short(values)}; examples/demo.yaml shows the form")
    return values


def write_yaml(values: dict, path: Path) -> None:
    """Write beside, then rename: the file is complete or not there."""
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    with beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def with_overrides(values: dict, overrides: Iterable[str]) -> tuple[dict, frozenset[str]]:
    """`values` with every `key.sub=value` set (the value is YAML; sections are merged key by key), and the keys that were set."""
    keys = []
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise InputError(f"{COMMAND_LINE}: {override!r} is no setting; write key=value or section.key=value, such as train.steps=100")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise InputError(
                f"{COMMAND_LINE}: the value of {key} is not valid YAML ({_problem(error)}); put text in quotes: {key}='\"...\"'"
            ) from error
        values = merged(values, {key: value})
        keys.append(key)
    return values, frozenset(keys)


def merged(values: dict, changes: dict) -> dict:
    """`values` with `changes` on top, section by section; a key of `changes` may be dotted, such as train.steps."""
    for key, value in changes.items():
        for part in reversed(str(key).split(".")):
            value = {part: value}
        values = _merged(values, value)
    return values


def leaves(values: dict, place: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested sections."""
    found = {}
    for name, value in values.items():
        key = _join(place, name)
        found |= leaves(value, key) if isinstance(value, dict) and value else {key: value}
    return found


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def _mark(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1},"


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]


# From values to dataclasses


def build(kind: type[T], values: dict, *, place: str = "", file: str = "", overridden: Iterable[str] = ()) -> T:
    """A dataclass from a mapping of its fields, sections included.

    place        its dotted key, for messages, e.g. "data.world"
    file         where the values come from, but for the dotted keys in `overridden`, which come from the command line

    InputError for an unknown or missing key, a wrong type, and whatever the dataclass itself refuses with a ValueError.

    >>> build(Weighting, {"upper": 2}, place="weighting").upper
    2.0
    """
    return _build(kind, values, place, _Origin(file, frozenset(overridden), kind))


def _build(kind: type[T], values: Any, place: str, origin: _Origin) -> T:
    if values is None:
        values = {}  # a section whose lines are all commented out
    if not isinstance(values, dict):
        raise InputError(f"{origin.of(place)}{place} must be a section of 'key: value' lines, got {_short(values)}")
    hints, fields = get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            key = _join(place, name)
            raise InputError(f"{origin.of(key)}unknown key {key}; {_hint(str(name), place, fields, origin)}")
    content = {}
    for name, field in fields.items():
        key, section = _join(place, name), _section(hints[name])
        required = field.default is MISSING and field.default_factory is MISSING
        if section is not None and not (values.get(name) is None and not required):
            content[name] = _build(section, values.get(name), key, origin)
        elif name in values and section is None:
            content[name] = _value(values[name], hints[name], key, origin)
        elif required:
            text = field.metadata.get("help", "")
            raise InputError(f"{origin.of(place) if place else origin.of(key)}{key} is missing" + (f"; it is: {text}" if text else ""))
    try:
        return kind(**content)
    except ValueError as error:
        raise InputError(_refused(str(error), place, fields, origin)) from error


def _refused(message: str, place: str, fields: dict, origin: _Origin) -> str:
    """The message of a dataclass with the place of its section. Most start with the name of a field, which then becomes the full key."""
    first = re.match(r"\w*", message)[0]
    key = _join(place, first) if first in fields else place
    # of several settings that contradict each other, the one given by hand is the one to look at
    words = set(re.findall(r"\w+", message))
    named = [given for given in origin.overridden if given.startswith(place) and given.rsplit(".", 1)[-1] in words]
    return f"{origin.of(named[0] if named else key)}{place}{('.' if first in fields else ': ') if place else ''}{message}"


def _section(hint) -> type | None:
    """The dataclass in a type that is one, or one or None."""
    members = [m for m in (get_args(hint) if _is_union(hint) else (hint,)) if is_dataclass(m)]
    return members[0] if members else None


def _is_union(hint) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _value(value: Any, hint, key: str, origin: _Origin) -> Any:
    try:
        return _converted(value, hint)
    except TypeError as error:
        quoting = "; text that looks like something else needs quotes" if _takes_text(hint) and value is not None else ""
        raise InputError(f"{origin.of(key)}{key} must be {_name(hint)}, got {_short(value)}{quoting}") from error


def _converted(value: Any, hint) -> Any:
    """`value` as the type `hint` wants it, or TypeError."""
    form = get_origin(hint)
    if _is_union(hint):
        for member in get_args(hint):
            try:
                return _converted(value, member)
            except TypeError:
                continue
    elif form is Literal:
        if value in get_args(hint):
            return value
    elif form is list:
        if isinstance(value, list | tuple):
            return [_converted(v, get_args(hint)[0]) for v in value]
    elif form is tuple:
        if isinstance(value, list | tuple) and len(value) == len(get_args(hint)):
            return tuple(_converted(v, member) for v, member in zip(value, get_args(hint)))
    elif hint is float:
        return _number(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, hint):
        return value
    raise TypeError


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise TypeError from None
    if number != number:  # NaN compares with nothing, so no range check would see it
        raise TypeError
    return number


def _name(hint) -> str:
    """A type in words."""
    form, arguments = get_origin(hint), get_args(hint)
    if _is_union(hint):
        return " or ".join(_name(member) for member in arguments)
    if form is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if form is list:
        return f"a list, [a, b, ...], each {_name(arguments[0])}"
    if form is tuple:
        return f"a list of {len(arguments)}, each {_name(arguments[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a section of 'key: value' lines"}
    return words.get(hint, "null")


def _takes_text(hint) -> bool:
    return hint is str or (_is_union(hint) and str in get_args(hint))


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# What a wrong key may have meant


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that is spelled most alike, or None if none is alike."""
    found = difflib.get_close_matches(name.replace("-", "_"), list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def _hint(name: str, place: str, fields: Iterable[str], origin: _Origin) -> str:
    """The key of this name in another section, or the most alike of this section, or all that there are."""
    elsewhere = [key for key in _keys(origin.root, "") if key.rsplit(".", 1)[-1] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    close = nearest(name, fields)
    return f"did you mean {_join(place, close)}?" if close else f"known there: {', '.join(fields)}"


def _keys(kind: type, place: str) -> Iterator[str]:
    """All dotted keys of a dataclass and its sections."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key, section = _join(place, field.name), _section(hints[field.name])
        yield from [key] if section is None else _keys(section, key)


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else str(name)


# Help


def settings_text(kind: type, place: str = "", width: int = 110) -> str:
    """All keys of a dataclass, section by section, with their defaults and help texts; `place` is its own dotted key."""
    sections = {kind: [place]}
    for section in _sections(kind, place):
        sections.setdefault(section[0], []).append(section[1])
    return "\n\n".join(_section_text(section, keys, sections, width) for section, keys in sections.items())


def _sections(kind: type, place: str) -> Iterator[tuple[type, str]]:
    for name, hint in get_type_hints(kind).items():
        section = _section(hint)
        if section is not None:
            yield section, _join(place, name)
            yield from _sections(section, _join(place, name))


def _section_text(kind: type, keys: list[str], sections: dict[type, list[str]], width: int) -> str:
    """The keys of one dataclass under a title; what it inherits from another section is not said twice."""
    fields = [f for f in dataclasses.fields(kind) if _section(get_type_hints(kind)[f.name]) is None]
    document = inspect.cleandoc(kind.__doc__).splitlines()
    parent = next((s for s in sections if s is not kind and issubclass(kind, s)), None)
    title = f"{', '.join(f'{key}.*' for key in keys)}: {document[0]}" if keys[0] else document[0]
    lines = [title]
    if parent is not None:
        inherited = {f.name for f in dataclasses.fields(parent)}
        fields = [f for f in fields if f.name not in inherited]
        lines[0] += f" It has the keys of {sections[parent][-1]}.* and"
    if all("help" in f.metadata for f in fields):
        return "\n".join(lines + [_line(f, width) for f in fields])
    body = [line for line in document[1:] if not line.startswith("Raises")]
    defaults = ", ".join(f"{f.name}={_inline(f.default)}" for f in fields)
    return "\n".join(
        [
            *lines,
            *textwrap.wrap(f"defaults: {defaults}", width, initial_indent="  ", subsequent_indent="  "),
            *(f"  {b}".rstrip() for b in body),
        ]
    ).rstrip()


def _line(field: dataclasses.Field, width: int) -> str:
    start = f"  {field.name:<18}"
    help = f"{field.metadata['help']} ({_default(field)})"
    lines = textwrap.wrap(help, width - len(start), break_on_hyphens=False)
    return start + ("\n" + " " * len(start)).join(lines)


def _default(field: dataclasses.Field) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return "required"
    value = field.default if field.default is not MISSING else field.default_factory()
    return f"default: {_inline(value)}"


def _inline(value: Any) -> str:
    """A value as it is written on the command line."""
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=1000).removesuffix("...\n").strip()
