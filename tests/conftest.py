"""What all tests share: how they are reported, and how hypothesis works."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("house", deadline=None, max_examples=40, print_blob=True)
settings.load_profile("house")


_NEEDS = {
    "real": "the public checkpoints and data sets: set CAUSAL_COMPRESS_SHARED to the folder that holds them",
    "browser": "a browser: apt-get install chromium, and pip install 'causal-compress[dev]'",
}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly which tests on real data or in a browser did not run: a green line alone would hide it."""
    for kind, needs in _NEEDS.items():
        skipped = [report for report in terminalreporter.stats.get("skipped", []) if kind in report.keywords]
        if not skipped:
            continue
        terminalreporter.section(f"{len(skipped)} {kind.upper()} TESTS DID NOT RUN", sep="!", red=True, bold=True)
        for report in skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            terminalreporter.write_line(f"{report.nodeid}: {reason.removeprefix('Skipped: ')}")
        terminalreporter.write_line(f"They need {needs}.")
