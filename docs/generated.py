"""Pages that are made from the code: ``reference/cli.md`` from the command line, ``reference/configuration.md``."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from distdiff import cli, component, config

NOTE = "<!-- made by docs/generated.py when the site is built; do not edit -->\n"


def write(folder: Path) -> None:
    """Write both pages, where they changed."""
    for name, text in (("cli.md", command_line()), ("configuration.md", configuration())):
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


# -- the command line ----------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its arguments and options."""
    parts = [
        f"{NOTE}# Command line\n\nEvery command, as `distdiff COMMAND --help` prints it. `~` at the start of a path is the home "
        "folder."
    ]
    for words, command in commands(typer.main.get_command(cli.app), ("distdiff",)):
        parts.append(f"## {' '.join(words)}\n\n{_cell(command.help or '')}")
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        line = [*words, *(_placeholder(p) for p in arguments), *(["[OPTIONS]"] if options else [])]
        parts.append(f"```text\n{' '.join(line)}\n```")
        rows = [(f"`{_placeholder(p)}`", "", _cell(getattr(p, "help", "") or "")) for p in arguments]
        rows += [(_names(p), _default(p), _cell(p.help or "")) for p in options]
        if rows:
            parts.append(table(("option", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of a typer application, groups left out."""
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from commands(inner, (*words, name))
    else:
        yield words, command


def _placeholder(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name or "").upper()
    return name + ("..." if parameter.nargs != 1 or getattr(parameter, "multiple", False) else "")


def _names(option: Any) -> str:
    words = "/".join([*option.opts, *option.secondary_opts])
    return f"`{words}`" + (" (required)" if option.required else "")


def _default(option: Any) -> str:
    value = option.default
    if value is None or option.required or value is ... or callable(value) or "UNSET" in repr(value):
        return ""
    return f"`{value}`" if value != "" else ""


# -- the configuration ---------------------------------------------------------------------------------------------


def configuration() -> str:
    """Every key of every section, and the options of every process and denoiser."""
    said = comments(config.shipped()["default"])
    parts = [
        f"{NOTE}# Configuration\n\nOne YAML file is one experiment: `distdiff train --config NAME-OR-FILE section.key=value ...`. In "
        "Python every key is a keyword of `distdiff.train`. Unknown keys and values are refused, and the nearest known one is "
        f"named. Configurations that come with distdiff: {', '.join(f'`{name}`' for name in config.shipped())}."
    ]
    for section, hint in typing.get_type_hints(config.Config).items():
        if dataclasses.is_dataclass(hint):
            parts.append(f"## {section}\n\n{_prose(hint.__doc__ or '')}")
            types = typing.get_type_hints(hint)
            rows = [
                (
                    f"`{section}.{field.name}`",
                    _type(types[field.name]),
                    _value(field),
                    _cell(said.get((section, field.name), "")),
                )
                for field in dataclasses.fields(hint)
            ]
            parts.append(table(("key", "type", "default", "meaning"), rows))
    for section, base, default, given in config.SECTIONS:
        parts.append(
            f"## {section}\n\nOptions depend on `{section}.kind` (default `{default}`); a class of your own is "
            "`mypackage.module:Class`, with `--trust mypackage`."
        )
        for kind in component.kinds(base):
            options = component.complete(base, {"kind": kind}, given=given)
            doc = (component.resolve(base, kind).__doc__ or "").strip().split("\n\n")[0]
            rows = [
                (f"`{section}.{key}`", f"`{value!r}`", _cell(said.get((section, key), "") if kind == default else ""))
                for key, value in options.items()
                if key != "kind"
            ]
            parts.append(f"### {section} {kind}\n\n{_cell(doc)}")
            if rows:
                parts.append(table(("key", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def comments(path: Path) -> dict[tuple[str, str], str]:
    """``(section, key)`` -> the comment behind it, in a YAML file of two levels."""
    found, section = {}, ""
    for line in path.read_text().splitlines():
        if match := re.match(r"(\w+):", line):
            section = match[1]
        elif match := re.match(r"  (\w+):[^#]*#\s*(.*)", line):
            found[section, match[1]] = match[2]
    return found


def _type(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(hint))
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return f"`{re.sub(r'(typing|collections.abc)[.]', '', text)}`".replace("|", "or")


def _value(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    return "(required)"


# -- words ---------------------------------------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in lines)


def _cell(text: str) -> str:
    """One line of markdown from a docstring's words."""
    text = re.sub(r":\w+:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"`\1`", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    text = re.sub(r"(?<![\w`-])(--\w[\w-]*)(?!`)", r"`\1`", text) if "`" not in text else text
    return re.sub(r"(?<![`$\w])\$(?=\w)", r"\\$", " ".join(text.split())).replace("<", "&lt;")


def _prose(text: str) -> str:
    """A docstring's paragraphs up to its first numpy section."""
    lines = [line.strip() for line in text.strip().splitlines()]
    for place, line in enumerate(lines[1:], 1):
        if re.fullmatch(r"-{3,}", line):
            lines = lines[: place - 1]
            break
    return "\n\n".join(_cell(part) for part in "\n".join(lines).split("\n\n") if part.strip())
