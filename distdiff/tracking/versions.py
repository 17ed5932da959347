"""Who ran what, with which packages, from which commit."""

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
    """Tags: who ran what, with which packages, from which commit (``-dirty`` where files were changed since)."""
    from distdiff.version import __version__

    tags = {"distdiff": __version__, "python": platform.python_version(), "mlflow.source.type": "LOCAL",
            "mlflow.source.name": Path(sys.argv[0]).name}  # fmt: skip
    with contextlib.suppress(Exception):  # no user of that number in a container
        tags["mlflow.user"] = getpass.getuser()
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tags[package] = importlib.metadata.version(package)
    if commit := _commit(Path(__file__).parents[1]):
        tags["git_commit"] = commit
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
    return tags


def _commit(folder: Path) -> str:
    """Commit of the repository that tracks ``folder``; none for an installed package inside somebody's repository."""
    words = (
        ["ls-files", "--error-unmatch", "__init__.py"],
        ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
    )
    said = ""
    for word in words:
        try:
            out = subprocess.run(["git", *word], cwd=folder, capture_output=True, text=True, timeout=5)
        except (OSError, subprocess.SubprocessError):
            return ""
        if out.returncode:
            return ""
        said = out.stdout.strip()
    return said
