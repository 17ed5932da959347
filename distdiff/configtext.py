"""The YAML text of a config, read under bounds: each value as YAML reads it, and as the words that were written.

Only plain YAML is taken: mappings, lists, text, numbers, true and false, null, anchors and merge keys. A key that
stands twice, a tag of another kind, a mapping that holds itself and more than :data:`DEEPEST` levels are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from distdiff import received

LARGEST = 1 << 20
"""Bytes of a config file, at most."""

DEEPEST = 32
"""Levels of a config, at most."""

MOST = 10_000
"""Values of a config, at most; what an alias repeats counts each time."""

PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")}
MERGE = "tag:yaml.org,2002:merge"


def read(path: Path) -> tuple[Any, Any]:
    """What a YAML file holds, as values and as words.

    Raises
    ------
    FileNotFoundError
        It is not there.
    ValueError
        It cannot be read, or is not the YAML of a config (line and column named).
    """
    try:
        with received.regular(path) as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"config file {path} cannot be read: {error}") from None
    if len(content) > LARGEST:
        raise ValueError(f"config file {path} has more than {LARGEST:,} bytes, so it is no config")
    try:
        return parsed(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"config file {path} is no UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise ValueError(f"config file {path} is no valid YAML: {error}") from None


def parsed(text: str) -> tuple[Any, Any]:
    """What YAML text holds: the values (dates stay text), and the same tree with each value as it was written.

    Raises
    ------
    ValueError
        The text is no YAML, or more than the plain YAML of a config.

    Examples
    --------
    >>> parsed("{lr: 1.0e-3, resident: no}")
    ({'lr': 0.001, 'resident': False}, {'lr': '1.0e-3', 'resident': 'no'})
    """
    loader = yaml.SafeLoader("")
    try:
        _check_depth(text)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _count(node, {})
        return _both(loader, node)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{_where(error.problem_mark)}{error.problem or error.context}") from None
    except yaml.YAMLError as error:  # characters that are no text
        raise ValueError(str(error).splitlines()[0]) from None
    finally:
        loader.dispose()


def _check_depth(text: str) -> None:
    """Refuse what nests so deep that a parser would run out of stack, or is far too long; events come one at a time."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"{_where(event.start_mark)}more than {DEEPEST} levels")
        if number > 2 * MOST:
            raise ValueError(f"{_where(event.start_mark)}more than {MOST:,} values")


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values under a node, those that aliases repeat counted each time; refuses too many, and a node in itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError(f"{_where(node.start_mark)}a value that holds itself")
        return known[id(node)]
    known[id(node)] = 0
    inside = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
    known[id(node)] = found = 1 + sum(_count(n, known) for n in inside)
    if found > MOST:
        raise ValueError(f"{_where(node.start_mark)}more than {MOST:,} values")
    return found


def _both(loader: yaml.SafeLoader, node: yaml.Node) -> tuple[Any, Any]:
    """A node as a value and as words."""
    if node.tag not in PLAIN:
        raise ValueError(f"{_where(node.start_mark)}the tag {node.tag} has no place in a config")
    if isinstance(node, yaml.MappingNode):
        read, words = {}, {}
        for key, value in _entries(loader, node).items():
            read[key], words[key] = _both(loader, value)
        return read, words
    if isinstance(node, yaml.SequenceNode):
        pairs = [_both(loader, value) for value in node.value]
        return [value for value, _ in pairs], [word for _, word in pairs]
    if node.tag.endswith(("timestamp", "str")):
        return node.value, node.value
    try:
        return loader.construct_object(node), node.value
    except Exception:  # PyYAML's constructors check nothing
        kind = node.tag.rpartition(":")[2]
        raise ValueError(f"{_where(node.start_mark)}{shown(node.value)} cannot be read as {kind}") from None


def _entries(loader: yaml.SafeLoader, node: yaml.MappingNode) -> Mapping[str, yaml.Node]:
    """Values of a mapping by the words of their keys, those of merge keys (``<<``) behind its own."""
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{_where(key.start_mark)}a key must be a word")
        if key.value in seen:
            raise ValueError(f"{_where(key.start_mark)}the key {shown(key.value)} stands twice")
        seen.add(key.value)
    if any(key.tag == MERGE for key, _ in node.value):
        loader.flatten_mapping(node)
    return {key.value: value for key, value in node.value}


def shown(value: Any, most: int = 80) -> str:
    """A value for a message: its Python form, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 20]}... ({len(text):,} characters)"


def _where(mark: Any) -> str:
    """Line and column of a place in the text."""
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
