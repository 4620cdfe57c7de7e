"""The judge of implementations (its flag, its table, its place in the tests: tests/judging.py), and
the tests that run on a GPU, too, where there is one."""
import contextlib
import math

import simulated_cuda  # noqa: F401  (before torch)

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

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


torch.backends.cudnn.allow_tf32 = False  # float32 is compared with the decimals of float32


class On(TorchFunctionMode):
    """What is made without a device is made on the CPU, so it has the same numbers, and moved."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.makers = device, _device_constructors()

    def __torch_function__(self, function, types, given=(), named=None):
        made = function(*given, **(named or {}))
        if function not in self.makers or (named or {}).get("device") is not None:
            return made
        if made.is_leaf and made.requires_grad and made.device.type != self.device:
            return made.detach().to(self.device).requires_grad_()
        return made.to(self.device)


def pytest_generate_tests(metafunc):
    """The theorems and the tests of the network run on the CPU and on the GPU, if there is one."""
    if torch.cuda.is_available() and not metafunc.config.getoption("--implementation") and (
            metafunc.module.__name__ in ("test_ddpm", "test_unet")):
        metafunc.fixturenames.append("device")
        metafunc.parametrize("device", ["cpu", "cuda"])


@pytest.hookimpl(hookwrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    device = getattr(pyfuncitem, "callspec", None) and pyfuncitem.callspec.params.get("device")
    with On(device) if device == "cuda" else contextlib.nullcontext():
        yield


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
