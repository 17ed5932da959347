"""Remove user names and passwords from addresses, error messages and log lines."""

from __future__ import annotations

import logging
import re
import traceback

_USER_INFO = re.compile(
    r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)"
    r"(?:[^\s/?#'\"]*@"  # user:password@ without a slash
    r"|[^\s/:@?#\['\"]*:(?!\d+(?:[/?#]|\b))[^\s'\"]*@)"  # a password that holds a slash; a port is no password
)
_SECRET_PARAMETER = re.compile(r"(?P<name>[?&](?:password|passwd|pwd|token|secret)=)[^\s&'\"]+", re.IGNORECASE)

LONGEST = 160
"""Most characters of an error message that a log line repeats."""


def redacted(text: object) -> str:
    """Return a text without the user name and the password of each URL in it.

    Examples
    --------
    >>> redacted("API request to http://me:secret@host:5000/api failed")
    'API request to http://host:5000/api failed'
    >>> redacted("models:/pbmc@champion of http://host:5000/a@b")
    'models:/pbmc@champion of http://host:5000/a@b'
    """
    return _SECRET_PARAMETER.sub(r"\g<name>***", _USER_INFO.sub(r"\g<scheme>", str(text)))


def short(error: BaseException) -> str:
    r"""Return the class and the first line of an error, redacted and cut to :data:`LONGEST` characters.

    Examples
    --------
    >>> short(OSError("http://me:secret@host is gone\nmore"))
    'OSError: http://host is gone'
    """
    lines = redacted(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:LONGEST]}" if lines else type(error).__name__


class RedactingFilter(logging.Filter):
    """Redact the message and the traceback of every log record that passes a handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record; never drop it."""
        record.msg, record.args = redacted(record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = redacted("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return True


def redact_logs(name: str) -> None:
    """Add a :class:`RedactingFilter` to the handlers of a logger, once to each."""
    for handler in logging.getLogger(name).handlers:
        if not any(isinstance(found, RedactingFilter) for found in handler.filters):
            handler.addFilter(RedactingFilter())
