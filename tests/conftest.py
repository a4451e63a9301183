"""What all tests share: how they are reported, and how hypothesis works."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("house", deadline=None, max_examples=40, print_blob=True)
settings.load_profile("house")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly which tests on real data did not run: a green line alone would hide it."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "real" in report.keywords]
    if not skipped:
        return
    terminalreporter.section(f"{len(skipped)} REAL TESTS DID NOT RUN", sep="!", red=True, bold=True)
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.write_line(f"{report.nodeid}: {reason.removeprefix('Skipped: ')}")
    terminalreporter.write_line(
        "They need the public checkpoints and data sets: set CAUSAL_COMPRESS_SHARED to the folder that holds them."
    )
