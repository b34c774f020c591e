"""Rules for all layers: root-only tests are skipped without root, SIGTERM tears fixtures down like Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import Phase, settings

from tests.lab.drivers import DEFAULT, DRIVERS, driven_by

# In CI the same examples every time and few; `--hypothesis-profile=long` looks for new ones for hours. Failures are not
# explained: that may take as long as a hundred times the examples.
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink)
settings.register_profile("ci", derandomize=True, database=None, deadline=None, phases=_PHASES)
settings.register_profile("long", max_examples=100 * 500, deadline=None, phases=_PHASES)
settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # A shell starts background jobs with SIGINT ignored, and programs under test would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        signal.signal(signal.SIGTERM, interrupt)


@pytest.fixture(scope="module", params=DRIVERS)
def fs_driver(request: pytest.FixtureRequest) -> Iterator[str]:
    """What serves the images of each daemon that the test does not choose for: see `tests.lab.drivers`."""
    with driven_by(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _no_driver_but_its_own(request: pytest.FixtureRequest) -> Iterator[None]:
    """Beside tests that are driven, whose fixtures stay for all of their module, others run as if alone."""
    if {"fs_driver", "node"} & set(request.fixturenames):
        yield
    else:
        with driven_by(DEFAULT):
            yield


@pytest.fixture(autouse=True)
def _log_level_as_before() -> Iterator[None]:
    """Programs that a test runs in this process set the root's level as their command line says."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failure shows the logs of the nodes under test. In CI `tests/run` has installed what there is a package of: a
    test that is skipped for want of it has failed."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.failed and (lab := sys.modules.get("tests.lab.stack")) is not None:
        report.sections += [("what the node said", said) for said in lab.last_words()]
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if "not installed" in reason:
            report.outcome = "failed"
            report.longrepr = f"{reason}, and tests/run installs it"


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
