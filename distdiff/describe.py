"""Every key of a config with its value, type and one line of help, read from the docstrings of what it configures."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from distdiff import config as configs
from distdiff.component import complete, kinds, resolve


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a config.

    Attributes
    ----------
    name
        As an override names it: ``optim.lr``.
    value, default
        Of the config that is shown, and without any; ``...`` where there is no default.
    type, help
        In words.
    kind
        Of a component's option: the kind that has it.
    """

    name: str
    value: Any
    default: Any
    type: str
    help: str
    kind: str = ""


def config_keys(name: str | None = None) -> list[Key]:
    """All keys of a config, in the order of its sections; options of the components are those of their kinds.

    Parameters
    ----------
    name
        One of the configs that ship with distdiff, or a YAML file; ``None``: the defaults.

    Raises
    ------
    ValueError
        No such config, or one that is not valid.

    Examples
    --------
    >>> next(key.default for key in config_keys() if key.name == "optim.lr")
    0.001
    """
    shown = configs.load(name, () if name is not None else ("data.store=atlas.zarr",)).as_dict()
    hints = typing.get_type_hints(configs.Config)
    components = {section[0]: section for section in configs.SECTIONS}
    found: list[Key] = []
    for section, hint in hints.items():
        if section not in shown:  # the command-line overrides, which are no key of the file
            continue
        if section in components:
            found += component(components[section], shown[section]["kind"], shown[section])
        else:
            found += _section(section, hint, shown[section])
    return found


def of_other_kinds(shown: Mapping[str, str]) -> list[Key]:
    """Options of the components' other kinds, all but those in ``shown`` (section -> kind)."""
    return [
        key for section in configs.SECTIONS for kind in kinds(section[1]) if kind != shown.get(section[0])
        for key in component(section, kind, None)
    ]  # fmt: skip


def component(section: tuple[str, type, str, int], kind: str, values: Mapping[str, Any] | None) -> list[Key]:
    """Options of one kind of a component; ``values`` of ``None`` are its defaults."""
    name, base, usual, given = section
    cls: type = resolve(base, kind)
    defaults = complete(base, {"kind": kind}, given=given)
    parameters = dict(list(inspect.signature(cls).parameters.items())[given:])
    help_of = _documented(cls)
    choices = getattr(cls, "ALLOWED", {})
    found = [Key(f"{name}.kind", kind, usual, _words(kinds(base)), _first(inspect.getdoc(cls) or ""), kind)]
    for option, parameter in parameters.items():
        default = defaults.get(option, ...)
        type_ = _words(choices[option]) if option in choices else _annotation(parameter.annotation, default)
        value = default if values is None else values.get(option, default)
        found.append(Key(f"{name}.{option}", value, default, type_, help_of.get(option, ""), kind))
    return found


def _section(section: str, cls: Any, values: Mapping[str, Any]) -> list[Key]:
    hints, help_of = typing.get_type_hints(cls), _documented(cls)
    found = []
    for f in dataclasses.fields(cls):
        default: Any = f.default
        if default is dataclasses.MISSING:
            factory: Any = f.default_factory
            default = factory() if factory is not dataclasses.MISSING else ...
        name = f"{section}.{f.name}"
        found.append(Key(name, values[f.name], default, _type(hints[f.name]), help_of.get(f.name, "")))
    return found


def _documented(cls: type) -> dict[str, str]:
    """Parameter -> first sentence of its help, by numpy-style docstrings; of what a class lacks, its bases'."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        text = inspect.cleandoc(each.__dict__.get("__doc__") or "")
        part = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[^\n]*\n-{3,}$|\Z)", text, re.S | re.M)
        if part is None:
            continue
        for entry in re.finditer(r"^(\S[^\n]*)\n((?:[ \t]+[^\n]*\n?|\n)+)", part[1] + "\n", re.M):
            words = _first(textwrap.dedent(entry[2]))
            for name in re.split(r",\s*", entry[1].partition(" : ")[0]):
                if name not in found or not words.startswith("As for "):  # a base says more than "as for ..."
                    found[name] = words
    return found


def _first(text: str) -> str:
    """The first sentence on one line, without markup."""
    line = " ".join(text.split("\n\n")[0].split())
    line = re.sub(r":\w+:`~?(?:[\w.]+\.)?([\w]+)`", r"\1", line).replace("``", "")
    sentence = re.match(r"(.*?[.])(?=\s+[A-Z(]|$)", line)
    line = sentence[1] if sentence else line
    return line if line.endswith("..") else line.removesuffix(".")


def _annotation(annotation: Any, default: Any) -> str:
    if annotation in (inspect.Parameter.empty, "Any", Any):
        return "any" if default is ... or default is None else _type(type(default))
    return annotation.replace("'", "") if isinstance(annotation, str) else _type(annotation)


def _type(hint: Any) -> str:
    """A type in words: ``auto | yes | no``, ``list of str``, ``int``."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return _words(inside)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type(each) for each in inside)
    if origin is tuple:
        return f"list of {_type(inside[0])}" if inside[-1] is ... else f"[{', '.join(map(_type, inside))}]"
    if origin is dict:
        return f"mapping of {_type(inside[0])} to {_type(inside[1])}"
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _words(values: Any) -> str:
    return " | ".join(str(value) or '""' for value in values)


def text(found: list[Key], other: Sequence[Key] = (), *, width: int = 120) -> str:
    """Keys as an aligned table: key, value (and the default where it differs), type; help below a key."""
    wide = max(len(key.name) for key in [*found, *other])
    lines: list[str] = []
    section = ""
    for key in found:
        head = key.name.partition(".")[0]
        if head != section:
            lines += ["", f"{head}" + (f": {key.kind}" if key.kind else "")]
            section = head
        lines += _lines(key, wide, width)
    before = ("", "")
    for key in other:
        component_kind = key.name.partition(".")[0], key.kind
        if component_kind != before:
            name, kind = before = component_kind
            lines += ["", f"{name} of another kind: {name}.kind={kind}"]
        if not key.name.endswith(".kind"):
            lines += _lines(key, wide, width)
    return "\n".join(lines[1:])


def _lines(key: Key, wide: int, width: int) -> list[str]:
    value = f"  {key.name:<{wide}}  {_shown(key.value)}"
    if _shown(key.default) != _shown(key.value) and key.default is not ...:
        value += f"  (default {_shown(key.default)})"
    return [f"{value}  [{key.type}]", *textwrap.wrap(key.help, width, initial_indent=" " * (wide + 4),
                                                    subsequent_indent=" " * (wide + 4))]  # fmt: skip


def _shown(value: Any) -> str:
    """A value as an override would give it."""
    if value is None or value is ...:
        return "null" if value is None else "must be given"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    return '""' if value == "" else str(value)
