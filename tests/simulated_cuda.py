"""A CUDA device without a GPU: whole commands run on it, with real numbers.

    with simulated(capability=(7, 5)) as waits:
        assert train.main("--dataset shapes --steps 2 --no-compile".split()) == 0
    assert waits["item"] == 0

A tensor there says `cuda:0` and holds a CPU tensor, which computes. The Python code of torch.cuda
is the real one, over a false driver; autograd, autocast and the device guard are the real C++. As
on CUDA, tensors of two devices do not mix (a CPU scalar may join), a table on the CPU cannot be
indexed from there, a generator draws on its own device only, `set_device` wants an index, and a
saved tensor remembers where it was. `waits` counts, by kind, what would wait for a GPU.

Not covered: compilers, several processes and NCCL, streams, speed, memory, the random numbers and
the rounding of CUDA's kernels, errors that CUDA reports later than they happen. Made for the CPU
build of one version of torch, and imported before it; MISSING says why it is not there.
"""
import collections
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

VERSION, SOURCE, LINUX = "2.13.0", Path(__file__).with_suffix(".cpp"), sys.platform == "linux"
LOADED = LINUX and hasattr(ctypes.CDLL(None), "simulated_cuda")  # by an earlier import
LIBRARIES = Path(importlib.util.find_spec("torch").origin).parent / "lib"  # found, and not imported yet
MISSING = (None if LOADED else "it needs Linux" if not LINUX else "torch was imported first" if "torch" in sys.modules
           else f"it is made for torch {VERSION}" if not importlib.metadata.version("torch").startswith(VERSION)
           else "this torch is built with CUDA" if (LIBRARIES / "libtorch_cuda.so").exists()
           else None if shutil.which("g++") else "there is no g++")
if not LOADED and not MISSING:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "simulated_cuda.so")
        subprocess.run(["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{LIBRARIES.parent}/include", "-o", built,
                        SOURCE, f"-L{LIBRARIES}", "-lc10", "-ltorch_cpu"], check=True)
        for library in (LIBRARIES / "libc10.so", LIBRARIES / "libtorch_cpu.so", built):
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda:0")
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
MOVES = {"_to_copy", "copy_", "lift_fresh"}
SLOW = {"convolution", "convolution_backward", "mm", "addmm", "bmm"}
WAITS = {"_local_scalar_dense": "item", "is_nonzero": "item", "equal": "equal", "nonzero": "nonzero",
         "masked_select": "mask", "_unique2": "unique", "unique_dim": "unique"}
waits = collections.Counter()

class Remote(Tensor):
    """A tensor on the simulated device: `here` is the CPU tensor that holds its numbers."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here):
        return Tensor._make_wrapper_subclass(cls, here.size(), strides=here.stride(), dtype=here.dtype,
                                             storage_offset=here.storage_offset(), device=CUDA)

    def __init__(self, here):
        self.here = here

    def __repr__(self):
        return f"Remote({self.here})"

    def __reduce_ex__(self, protocol):  # in a file it is a tensor of cuda:0
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, (
            self.here.detach(), self.dtype, str(CUDA), self.requires_grad)

    def __tensor_flatten__(self):  # so that nn.Module.to swaps it in
        return ["here"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return Remote(inner["here"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

def mapped(change, x):
    """x with its tensors changed, in lists, tuples and dictionaries too."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, dict):
        return {key: mapped(change, value) for key, value in x.items()}
    return type(x)(mapped(change, y) for y in x) if isinstance(x, (tuple, list)) else x

def tensors_of(*given) -> list[Tensor]:
    mapped((found := []).append, given)
    return found

def is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"

def compute(func, args, kwargs):
    """An operation in which the device takes part: judged as CUDA would, computed on the CPU."""
    name, to = func._schema.name.partition("::")[2], kwargs.get("device")
    tensors = tensors_of(args, kwargs)
    there = [x for x in tensors if isinstance(x, Remote)]
    here = [x for x in tensors if not isinstance(x, Remote)]
    result_there = is_cuda(to) if to is not None else bool(there)
    if is_cuda(to) and torch.device(to).index not in (None, 0):
        raise RuntimeError("CUDA error: invalid device ordinal")
    if there and here and name in INDEXING and not isinstance(args[0], Remote):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if there and here and name in INDEXING:
        waits["to device"] += 1
    elif there and name not in MOVES and any(x.dim() for x in here):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
                           f"and cpu! ({func})")
    if there and (kind := WAITS.get(name)):
        waits[kind] += 1
    if there and name in INDEXING and any(x.dtype == torch.bool for x in tensors[1:]):
        waits["mask"] += 1
    if name in MOVES:
        source, target = (args[1], isinstance(args[0], Remote)) if name == "copy_" else (args[0], result_there)
        if isinstance(source, Remote) != target:
            waits["to device" if target else "to cpu"] += 1
    back = {id(x.here): x for x in there}  # an operation in place returns its own argument
    args, kwargs = mapped(lambda x: getattr(x, "here", x), (args, {**kwargs, **({"device": "cpu"} if to else {})}))
    out = on_cpu(func, name, args, kwargs)
    if not result_there:
        return out
    return mapped(lambda x: back[id(x)] if id(x) in back else Remote(x), out)

def on_cpu(func, name, args, kwargs):
    """func; in float32, and rounded afterwards, where the CPU lacks a kernel for 16 bits, or a fast one."""
    if name in ("_softmax", "_log_softmax") and args[2]:  # from 16 bits to float32
        args = (args[0].float(), args[1], False)
    if name in ("_softmax_backward_data", "_log_softmax_backward_data") and args[3] != args[0].dtype:
        return func(*args[:3], args[0].dtype).to(args[3])
    half = {x.dtype for x in tensors_of(args)} & {torch.half, torch.bfloat16}
    if len(half) != 1 or func._schema.is_mutable:
        return func(*args, **kwargs)
    if name not in SLOW:
        with contextlib.suppress(NotImplementedError):
            return func(*args, **kwargs)
    args, kwargs = mapped(lambda x: x.float() if x.dtype in half else x, (args, kwargs))
    return mapped(lambda x: x.to(*half) if x.dtype == torch.float32 else x, func(*args, **kwargs))

class Everywhere(TorchDispatchMode):
    """Catches what has no tensor of the device among its arguments: factories, copies to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_cuda(kwargs.get("device")) or any(isinstance(x, Remote) for x in tensors_of(args, kwargs)):
            return compute(func, args, kwargs)
        return func(*args, **kwargs)

class Functions(TorchFunctionMode):
    """What C++ cannot tell: a generator draws on its own device only (there, all are the CPU's), and a
    list of numbers is a copy to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.tolist:
            args = (args[0].cpu(),)
        if (generator := kwargs.get("generator")) is not None:
            x = args[0] if args and isinstance(args[0], Tensor) else None
            device = kwargs.get("device") or (torch.device("cpu") if x is None else x.device)
            if is_cuda(device) != is_cuda(generator.device):
                raise RuntimeError(f"Expected a '{torch.device(device).type}' device type for generator but found "
                                   f"'{generator.device.type}'")
        return func(*args, **kwargs)

class Generator(torch._C.Generator):
    """torch.Generator, which on the simulated device is one of the CPU that says otherwise."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, device="cpu")
        generator.place = CUDA if is_cuda(device) else torch.device(device)
        return generator

    @property
    def device(self):
        return self.place

def set_driver_device(index: int) -> None:
    if index != 0:
        raise RuntimeError("CUDA error: invalid device ordinal")

def load(real, f, map_location=None, **options):
    """torch.load and torch.jit.load: what is asked for on the device is read on the CPU, and moved."""
    found = real(f, map_location="cpu" if is_cuda(map_location) else map_location, **options)
    if not is_cuda(map_location):
        return found
    for module in found.modules() if isinstance(found, torch.jit.ScriptModule) else []:
        for name, x in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            module._c.setattr(name, Remote(x.detach()))
    return mapped(lambda x: x if isinstance(x, Remote) else Remote(x), found)

@contextlib.contextmanager
def simulated(capability=(8, 0), memory=80 * 2 ** 30):
    """Inside, torch.cuda has one device of this compute capability. Gives the counter of waits."""
    import torch._dynamo  # which looks for more of CUDA when it is imported
    driver = dict(_cuda_getDeviceCount=lambda: 1, _cuda_init=lambda: None, _cuda_setDevice=set_driver_device,
                  _cuda_getDevice=lambda: 0, _cuda_isInBadFork=lambda: False, _cuda_resetPeakMemoryStats=lambda i: None,
                  _cuda_memoryStats=lambda i: {}, _cuda_emptyCache=lambda: None,
                  _cuda_synchronize=lambda: waits.update(["synchronize"]))
    about = types.SimpleNamespace(name="simulated", major=capability[0], minor=capability[1], total_memory=memory,
                                  multi_processor_count=108)
    changes = [(torch._C, name, value) for name, value in driver.items()] + [
        (torch.cuda, "_get_device_properties", lambda i: about), (torch.cuda, "_initialized", True),
        (torch.cuda, "_exchange_device", lambda i: 0), (torch.cuda, "_maybe_exchange_device", lambda i: 0),
        (torch.cuda, "cudart", lambda: types.SimpleNamespace(cudaMemGetInfo=lambda i: (memory, memory))),
        (torch.version, "cuda", "13.0"), (torch, "Generator", Generator),
        (torch.cuda, "default_generators", (Generator("cuda"),)),
        (torch, "load", lambda *a, real=torch.load, **k: load(real, *a, **k)),
        (torch.jit, "load", lambda *a, real=torch.jit.load, **k: load(real, *a, **k))]
    kept = [(owner, name, owner.__dict__.get(name, changes)) for owner, name, _ in changes]
    waits.clear()
    try:
        for change in changes:
            setattr(*change)
        torch._C._set_only_lift_cpu_tensors(True)
        with Everywhere(), Functions():
            yield waits
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        for owner, name, value in kept:
            delattr(owner, name) if value is changes else setattr(owner, name, value)
