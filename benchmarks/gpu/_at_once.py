"""A pytest plugin: what failed is printed at once, as this run may be cut before pytest's own report."""

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.duration > 3:
        print(f"\n{report.duration:.0f} s {report.when}", end=" ", flush=True)
    if report.failed:
        print("\n" + "\n".join(report.longreprtext.splitlines()[-25:]), flush=True)
