"""Sphinx configuration: ``sphinx-build -W docs build/site`` (the extra ``docs``)."""

import os
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))
sys.path.insert(0, str(DOCS.parent))

import generated  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

from distdiff.version import __version__  # noqa: E402

project = "distdiff"
author = "The distdiff developers"
copyright = "The distdiff developers, BSD-3-Clause"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build", "jupyter_execute", "**/.ipynb_checkpoints"]
templates_path: list[str] = []

html_theme = "sphinx_book_theme"
html_title = f"distdiff {__version__}"
html_theme_options = {
    "home_page_in_toc": False,
    "show_toc_level": 2,
    "use_download_button": False,
    "navbar_persistent": [],
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
if local := os.environ.get(
    "DISTDIFF_DOCS_MATHJAX"
):  # a copy of MathJax's tex-chtml.js below _static, without the network
    mathjax_path = local

# pages: MyST markdown; tutorials: MyST notebooks, which run while the site is built
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
# off: pages without outputs, seconds; short: trainings of a tenth of the cells, to see that all cells of a page run
EXECUTE = os.environ.get("DISTDIFF_DOCS_EXECUTE", "cache")
nb_execution_mode = {"short": "force"}.get(EXECUTE, EXECUTE)
nb_execution_cache_path = str(DOCS.parent / "build" / ".jupyter_cache")
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]

# the Python interface
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False
suppress_warnings = ["mystnb.unknown_mime_type"]
if nb_execution_mode == "off":  # the lexer of a cell is known once its kernel ran
    suppress_warnings.append("myst-nb.lexer")


def shorter(app: Sphinx, page: str, source: list[str]) -> None:
    """Let the trainings of a tutorial see a tenth of their cells."""
    if page.startswith("tutorials/"):
        source[0] = re.sub(r"(\bcells=\d+_\d\d)0\b", r"\1", source[0])


def setup(app: Sphinx) -> None:
    """Write the pages that are made from the code: the command line and the configuration."""
    generated.write(DOCS / "reference")
    if EXECUTE == "short":
        app.connect("source-read", shorter)
