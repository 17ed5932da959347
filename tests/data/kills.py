"""Processes killed at their n-th file operation, wherever that is."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.utime", "os.truncate")


def ended(work: Callable[[], object], nth: int, begins: Callable[[Callable[[], None]], None]) -> bool:
    """Whether ``work`` came to its end in a child that is killed just before its ``nth`` file operation.

    ``begins`` is given a function to call where the counting is to start.
    """
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 9), "the child failed; its traceback is above"
        return code == 0
    try:
        left = None

        def start() -> None:
            nonlocal left
            left = nth if left is None else left

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if left is None or event not in OPERATIONS:
                return
            if event == "open" and not str(arguments[1]).startswith(("w", "a", "x", "None")):
                return  # read only
            left -= 1
            if left < 0:
                os._exit(9)

        begins(start)
        sys.addaudithook(count)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
