"""From a ``kind`` in a config to a class: the file name is the registry.

``kind: counts`` of a ``Process`` is the one subclass of ``Process`` defined in ``distdiff/process/counts.py``;
``kind: mypackage.mymodule:MyProcess`` works from outside the tree. Adding a process, a denoiser or a baseline is
adding one file.

An address imports a module, that is: runs code. A user's own config may do so; options that come with a model that
somebody sent may not, unless the user trusts the package (:func:`check_trust`).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Untrusted(ValueError):
    """Options ask for code that the user did not say to trust.

    Examples
    --------
    >>> from distdiff.component import Untrusted
    >>> issubclass(Untrusted, ValueError)
    True
    """


def name_list(what: str, given: Iterable[str]) -> tuple[str, ...]:
    """A list of names; a single text, which would be a list of its letters, is refused.

    Raises
    ------
    ValueError
        It is a text.

    Examples
    --------
    >>> from distdiff.component import name_list
    >>> name_list("labels", ["cell_type"])
    ('cell_type',)
    >>> name_list("labels", "cell_type")
    Traceback (most recent call last):
        ...
    ValueError: labels='cell_type': a list of names is wanted, such as labels=['cell_type']
    """
    if isinstance(given, str):
        raise ValueError(f"{what}={given!r}: a list of names is wanted, such as {what}=[{given!r}]")
    return tuple(given)


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known word, else the list of what is known.

    Examples
    --------
    >>> from distdiff.component import nearest
    >>> nearest("cosin", ["cosine", "fisher", "linear"])
    "; did you mean 'cosine'?"
    >>> nearest("quadratic", ["cosine", "fisher"])
    '; known: cosine, fisher'
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"


def kinds(base: type) -> list[str]:
    """Names of the components of ``base``: the modules of the package that defines it.

    Examples
    --------
    >>> from distdiff.component import kinds
    >>> from distdiff.process import Process
    >>> kinds(Process)
    ['blackout', 'counts', 'gaussian', 'jump', 'masked', 'pixels']
    """
    package = importlib.import_module(base.__module__)
    names = (m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return sorted(n for n in names if _subclass_in(base, f"{base.__module__}.{n}") is not None)


def _subclass_in(base: type, module_name: str) -> type | None:
    module = importlib.import_module(module_name)
    found = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, base) and c.__module__ == module_name and not inspect.isabstract(c)
    ]
    if len(found) > 1:
        raise TypeError(f"{module_name} defines {len(found)} components of {base.__name__}; keep one a file")
    return found[0] if found else None


def load(base: type[T], address: str) -> type[T]:
    """The subclass of ``base`` at ``module:Class``.

    Raises
    ------
    ValueError
        No such class there.

    Examples
    --------
    >>> from distdiff.component import load
    >>> from distdiff.process import Process
    >>> load(Process, "distdiff.process.jump:Jump").__name__
    'Jump'
    """
    module_name, _, class_name = address.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:  # the last two: no name, or a relative one
        raise ValueError(f"kind {address!r} cannot be imported: {error or 'no module is named'}") from error
    cls = getattr(module, class_name, None)
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        raise ValueError(f"kind {address!r} is not a subclass of {base.__module__}.{base.__name__}")
    return cls


def modules(options: Any) -> set[str]:
    """Modules that a tree of options would import: of every text with a colon, whatever stands before it.

    Examples
    --------
    >>> from distdiff.component import modules
    >>> modules({"kind": "mypackage.laws:Mine", "schedule": "cosine"})
    {'mypackage.laws'}
    """
    return {text.partition(":")[0] for text in _texts(options) if ":" in text}


def check_trust(options: Any, trust: Sequence[str], where: str) -> None:
    """Refuse options that would import a module outside ``trust``; nothing is imported here.

    Parameters
    ----------
    options
        A tree of mappings, sequences and values that somebody else may have written.
    trust
        Packages or modules that may be imported, their submodules too.
    where
        Where the options come from, for the message.

    Raises
    ------
    Untrusted
        A module that is not trusted (named).

    Examples
    --------
    >>> from distdiff.component import check_trust
    >>> check_trust({"kind": "mypackage.laws:Mine"}, trust=("mypackage",), where="model.json")
    >>> check_trust({"kind": "mypackage.laws:Mine"}, trust=(), where="model.json")
    Traceback (most recent call last):
        ...
    distdiff.component.Untrusted: model.json asks for code of the module 'mypackage.laws', which is not part ...
    """
    trusted = (trust,) if isinstance(trust, str) else tuple(trust)
    for module in sorted(modules(options)):
        if not any(module == name or module.startswith(f"{name}.") for name in trusted):
            package = module.partition(".")[0]
            raise Untrusted(
                f"{where} asks for code of the module {module!r}, which is not part of distdiff, and nothing of it was "
                f"run; if you know that code and trust it, give trust=[{package!r}]"
            )


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _texts(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _texts(value)


def resolve(base: type[T], kind: str) -> type[T]:
    """The class that ``kind`` names.

    Raises
    ------
    ValueError
        No such kind (the nearest one is named), or a class that is no ``base``.

    Examples
    --------
    >>> from distdiff.component import resolve
    >>> from distdiff.process import Process
    >>> resolve(Process, "counts").__name__
    'Counts'
    >>> resolve(Process, "count")
    Traceback (most recent call last):
        ...
    ValueError: unknown process kind 'count'; did you mean 'counts'?
    """
    if not isinstance(kind, str):
        raise ValueError(f"{base.__name__.lower()}: kind must be a name, got {kind!r}")
    if ":" in kind:
        return load(base, kind)
    package = importlib.import_module(base.__module__)
    cls = None
    if kind in {m.name for m in pkgutil.iter_modules(package.__path__)}:
        cls = _subclass_in(base, f"{base.__module__}.{kind}")
    if cls is None:
        raise ValueError(f"unknown {base.__name__.lower()} kind {kind!r}{nearest(kind, kinds(base))}")
    return cls


def complete(base: type, options: Mapping[str, Any], *, given: int = 0) -> dict[str, Any]:
    """``options`` with the constructor's defaults filled in: what to save, so that a later default changes nothing.

    Parameters
    ----------
    given
        Leading constructor arguments that are not options.

    Raises
    ------
    ValueError
        Missing or unknown ``kind``, or an option that its constructor does not take (the nearest one is named).

    Examples
    --------
    >>> from distdiff.component import complete
    >>> from distdiff.process import Process
    >>> complete(Process, {"kind": "masked", "classes": 16})
    {'kind': 'masked', 'schedule': 'cosine', 'classes': 16, 'clamp': False}
    """
    name = base.__name__.lower()
    if "kind" not in options:
        raise ValueError(f"{name}: 'kind' is missing; known: {', '.join(kinds(base))}")
    cls: type = resolve(base, options["kind"])
    allowed = dict(list(inspect.signature(cls).parameters.items())[given:])
    for option in options:
        if option != "kind" and option not in allowed:
            raise ValueError(f"{name} {cls.__name__}: unknown option {option!r}{nearest(option, allowed)}")
    defaults = {k: p.default for k, p in allowed.items() if p.default is not inspect.Parameter.empty}
    return {"kind": options["kind"], **defaults, **options}


def build(base: Any, options: Mapping[str, Any], *args: Any) -> Any:
    """Build the component that ``options`` describe (see :func:`complete`); ``args`` come before the options.

    Examples
    --------
    >>> from distdiff.component import build
    >>> from distdiff.process import Process
    >>> build(Process, {"kind": "jump", "scale": 50}).scale
    50
    """
    chosen = complete(base, options, given=len(args))
    return resolve(base, chosen.pop("kind"))(*args, **chosen)
