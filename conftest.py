"""The tests that run on a GPU, too, where there is one."""
import contextlib

import simulated_cuda  # noqa: F401  (before torch)

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

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
    if torch.cuda.is_available() and metafunc.module.__name__ in ("test_ddpm", "test_unet"):
        metafunc.fixturenames.append("device")
        metafunc.parametrize("device", ["cpu", "cuda"])


@pytest.hookimpl(hookwrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    device = getattr(pyfuncitem, "callspec", None) and pyfuncitem.callspec.params.get("device")
    with On(device) if device == "cuda" else contextlib.nullcontext():
        yield
