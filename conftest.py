"""The judge of implementations: its flag, its table, its place in the tests (tests/judging.py)."""
import math

import pytest

from judging import Judge, __doc__ as interface, load


def pytest_addoption(parser):
    parser.addoption("--implementation", nargs="?", const="", metavar="FILE", help="judge this "
                     "file or module by the paper's theorems; without a value, print the interface")


def pytest_configure(config):
    name = config.getoption("--implementation")
    if name == "":
        print(interface)
        pytest.exit("", returncode=0)
    if name:
        config.option.tbstyle, config.option.reportchars = "no", "N"
        config.option.verbose, config.option.no_header = -1, True
    config.judge = Judge(load(name)) if name else None


def pytest_collection_modifyitems(config, items):
    """With --implementation only what the paper says is judged; the rest is this project's own."""
    if config.getoption("--implementation"):
        items[:] = [item for item in items if "judge" in item.fixturenames]


@pytest.fixture(scope="session")
def judge(request):
    if request.config.judge is None:
        from test_ddpm import Ours
        request.config.judge = Judge(Ours)
        request.config.judge.numpy, request.config.judge.strict = False, True
    return request.config.judge


def pytest_runtest_call(item):
    if "judge" in item.fixturenames:
        item.config.judge.begin(item.name, " ".join(item.function.__doc__.split()))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    yield
    if "judge" in item.fixturenames and call.excinfo and not call.excinfo.errisinstance(
            (AssertionError, pytest.skip.Exception)):
        row = item.config.judge.row
        row["verdict"], row["largest"] = "fails", math.inf
        row["error"] = f"{call.excinfo.typename}: {str(call.excinfo.value).splitlines()[0][:100]}"


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--implementation") and config.judge.rows:
        terminalreporter.write_line("\n" + config.judge.table())
