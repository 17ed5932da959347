"""Tags of a run: user, program, versions of packages, git commit."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

PACKAGES = ("torch", "accelerate", "deepspeed", "numpy", "zarr", "anndata", "mlflow")


def versions() -> dict[str, str]:
    """Return the tags of a run: user, program, versions of packages, git commit (``-dirty``: files were changed since).

    Examples
    --------
    >>> "python" in versions() and "torch" in versions()
    True
    """
    from distdiff.version import __version__

    tags = {"distdiff": __version__, "python": platform.python_version(), "mlflow.source.type": "LOCAL",
            "mlflow.source.name": Path(sys.argv[0]).name}  # fmt: skip
    with contextlib.suppress(Exception):  # a container may have no name for the user's number
        tags["mlflow.user"] = getpass.getuser()
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tags[package] = importlib.metadata.version(package)
    if commit := _commit(Path(__file__).parents[1]):
        tags["git_commit"] = commit
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
    return tags


def _commit(folder: Path) -> str:
    """Commit of the repository that tracks ``folder``; empty for a package installed in another repository."""
    commands = (
        ["ls-files", "--error-unmatch", "__init__.py"],
        ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
    )
    answer = ""
    for command in commands:
        try:
            out = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=5)
        except (OSError, subprocess.SubprocessError):
            return ""
        if out.returncode:
            return ""
        answer = out.stdout.strip()
    return answer
