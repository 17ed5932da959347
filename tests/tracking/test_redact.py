from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distdiff import tracking
from distdiff.tracking.redact import RedactingFilter, redacted
from tests.tracking.runs import a_run

SIGNS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="@/?#'\"\\:%"), min_size=1)


@given(user=SIGNS, password=SIGNS, scheme=st.sampled_from(["http", "https", "postgresql+psycopg2", "mysql", "s3"]))
def test_no_password_of_a_url_is_left_and_all_else_is(user, password, scheme):
    text = f"request to {scheme}://{user}:{password}@host:5000/api failed (models:/pbmc@champion)"
    assert redacted(text) == f"request to {scheme}://host:5000/api failed (models:/pbmc@champion)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://me:se/cret@host/x", "http://host/x"),
        ("postgresql://me:se/c@ret@host/db", "postgresql://host/db"),
        ("http://token@host", "http://host"),
        ("'https://me:p@h:1' and https://a:b@c", "'https://h:1' and https://c"),
        ("postgresql://host/db?user=me&password=secret&x=1", "postgresql://host/db?user=me&password=***&x=1"),
        ("http://host:5000/#/models/a@champion", "http://host:5000/#/models/a@champion"),
        ("http://[::1]:5000/a@b", "http://[::1]:5000/a@b"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("s3://bucket/a@b:c", "s3://bucket/a@b:c"),
        ("me@host.org: http://host", "me@host.org: http://host"),
    ],
)
def test_urls(text, expected):
    assert redacted(text) == expected


def test_log_lines_and_their_tracebacks_are_redacted():
    try:
        raise OSError("http://me:secret@host is gone")
    except OSError as error:
        record = logging.LogRecord("mlflow", logging.ERROR, "", 1, "%s failed", ("http://me:secret@host",),
                                   (type(error), error, error.__traceback__))  # fmt: skip
    assert RedactingFilter().filter(record)
    text = logging.Formatter().format(record)
    assert "secret" not in text
    assert "http://host is gone" in text


@pytest.mark.parametrize("uri", ["http://me:hunter-2@127.0.0.1:9", "postgresql://me:hunter-2@127.0.0.1:9/db"])
def test_nothing_that_is_printed_logged_stored_or_raised_has_the_password(here, monkeypatch, capfd, caplog, model, uri):
    """Of a server that refuses, and of a database whose driver is not installed (or refuses)."""
    import traceback

    from typer.testing import CliRunner

    from distdiff import cli, quickstart
    from distdiff.experiment import Outcome

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    caplog.set_level(logging.DEBUG)
    with a_run() as run:
        run.metrics({"loss": 1.0}, 1)
        run.register("pbmc", model, score=1.0, data="abc")
    assert run.spool.n_unsent
    raised = []
    for call in (lambda: tracking.sync("run"), lambda: tracking.fetch("models:/pbmc@champion"),
                 lambda: tracking.sync("run", uri=uri, anew=True)):  # fmt: skip
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises((ValueError, RuntimeError)) as error:
            call()
        raised += traceback.format_exception(error.value)
    raised.append(repr(CliRunner().invoke(cli.app, ["mlflow", "sync", "run", "--uri", uri]).exception))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    quickstart._paths(here, here / "umap.png", Outcome(here, None), 1.0)
    printed = capfd.readouterr()
    stored = [path.read_bytes().decode(errors="replace") for path in here.rglob("*") if path.is_file()]
    for text in (printed.out, printed.err, caplog.text, *raised, *stored):
        assert "hunter-2" not in text
    assert "127.0.0.1:9" in printed.out
