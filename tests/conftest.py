"""Rules for all layers: root-only tests are skipped without root, SIGTERM tears fixtures down like Ctrl-C."""

from __future__ import annotations

import os
import signal

import pytest


def pytest_configure(config: pytest.Config) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if not hasattr(config, "workerinput"):
        signal.signal(signal.SIGTERM, interrupt)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0 and os.path.exists("/dev/fuse"):
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="root: needs root and /dev/fuse"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if steps := os.environ.get("NYDUS_STEPS"):
        terminalreporter.section("before the tests")
        terminalreporter.write_line(steps)
