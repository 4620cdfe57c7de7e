"""The machine: device, precision, processes, and random numbers that depend on none of them."""
from __future__ import annotations

import contextlib
import hashlib
import operator
import os
import signal
from datetime import timedelta
from typing import Callable, Iterator, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support import winograd
from support.command import UsageError, one_line, say

BACKEND = "inductor"  # of torch.compile

class Machine(NamedTuple):
    """The device and precision of this process, and its rank among the processes of torchrun."""
    device: torch.device
    dtype: torch.dtype  # of convolutions and matrix products
    rank: int = 0
    world: int = 1      # number of processes
    compiles: bool | None = None    # --compile or --no-compile, if given

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """The items that this process handles: every world-th one."""
        return slice(self.rank, None, self.world)

    def gather(self, mine: Tensor, n: int) -> Tensor:
        """All n rows, on the CPU, of which each process has those of its `share`."""
        if self.world == 1:
            return mine.cpu()
        rows = torch.zeros(n, *mine.shape[1:], dtype=mine.dtype)
        rows[self.share] = mine.cpu()
        dist.all_reduce(rows)
        return rows

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block first: it downloads a file that the others then find."""
        patient = None if self.world == 1 else dist.new_group(
            backend="gloo", timeout=timedelta(days=1))
        if not self.is_main:
            dist.barrier(patient)
        yield
        if self.is_main and self.world > 1:
            dist.barrier(patient)

    def agree(self, on: str, *what) -> None:
        """ValueError in every process unless all pass the same `what`; `on` names it. A callable
        counts by its result, and is not called in a single process."""
        if self.world == 1:
            return
        what = [x() if callable(x) else x for x in what]
        mine = torch.tensor([seed_of(on, *what, str(self.dtype), torch.__version__)])
        if len(self.gather(mine, self.world).unique()) > 1:
            raise ValueError(f"the processes differ in {on}, precision or torch version")

    def placed(self, net: nn.Module) -> nn.Module:
        """`net` itself on this device, in the layout and with the convolutions that are fast."""
        return winograd.fast(net).to(self.device, memory_format=torch.channels_last)

    def network(self, net: Callable) -> Callable[[Tensor, Tensor], Tensor]:
        """`net` in this machine's precision, with float32 output."""
        def call(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
                out = net(x, t)
            if not isinstance(out, Tensor):
                raise TypeError(f"the network returned {type(out).__name__}, not a tensor")
            return out.float()
        return call

    def compiled(self, net: nn.Module, *shape: int, default: bool = False) -> nn.Module:
        """`net` through torch.compile for batches of this shape, with --compile or by default.

        It is tried once, forward and, in training, backward. If that fails in any process (without
        a C compiler, say), all go on without it: one that ran another program would wait for
        exchanges that the others do not make.
        """
        if not (default if self.compiles is None else self.compiles):
            return net
        try:
            fast = torch.compile(net, backend=BACKEND, dynamic=False)
            x = torch.zeros(shape, device=self.device)
            alone = getattr(net, "no_sync", contextlib.nullcontext)  # others may have failed
            with alone():
                y = self.network(fast)(x, torch.ones(len(x), device=self.device).long())
                if y.requires_grad:
                    y.sum().backward()
            works = True
        except Exception as error:  # compilers raise many kinds of error
            say(f"warning: torch.compile failed, going on without it: {one_line(error)}")
            works = False
        return fast if self.gather(torch.tensor([works]).int(), self.world).all() else net

def start_machine(device: str | None = None, precision: str | None = None,
                  compiles: bool | None = None) -> Machine:
    """The machine that the flags select, connected to the other processes of torchrun.

    The default precision is bfloat16 where the hardware has it, else float16 on CUDA of capability
    7 (V100, T4), TF32 on older CUDA, float32 elsewhere. UsageError if there is no such machine.
    """
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
        raise UsageError("RANK and WORLD_SIZE must be set together: torchrun sets both")
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError as error:
        raise UsageError(f"RANK and WORLD_SIZE are numbers: {error}") from error
    if not 0 <= rank < world:
        raise UsageError(f"RANK={rank} is not one of WORLD_SIZE={world} processes")
    if device is None:
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda" and world > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
    try:
        found = torch.zeros(1, device=device).device  # a tensor's device has its index, "cuda:0"
    except Exception as error:  # each kind of device raises its own
        raise UsageError(f"--device {device} is not available: {one_line(error)}") from error
    if cuda := found.type == "cuda":
        torch.cuda.set_device(found)
        major, _ = torch.cuda.get_device_capability(found)
        best = "bf16" if major >= 8 else "fp16" if major == 7 else "tf32"
        torch.backends.cudnn.benchmark = True
        tf32 = precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    else:
        cpu = getattr(torch.cpu, "get_capabilities", dict)() if found.type == "cpu" else {}
        best = "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "fp32"
    if precision == "tf32" and not cuda:
        raise UsageError("--precision tf32 needs an NVIDIA GPU: use bf16 or fp32")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision or best, torch.float32)
    if world > 1 and not dist.is_initialized():
        # The wait for the others is in C++, where Python's signal handlers do not run.
        handlers = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                    timeout=timedelta(minutes=10))
        except (RuntimeError, ValueError) as error:  # ValueError: MASTER_ADDR is missing
            raise OSError(f"{world} processes cannot connect: {one_line(error)}") from error
        for n, handler in handlers.items():
            signal.signal(n, handler)
    return Machine(found, dtype, rank, world, compiles)

def seed_of(*keys) -> int:
    """63 bits, hashed from what the seed is for, such as (seed, "step", 17).

    With a sum, seed + step, runs with neighbouring seeds would share random numbers. (torch's CPU
    generator uses 32 of these bits.) Integers of all types count by their value.
    """
    keys = integers(keys)
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "big") >> 1

def integers(key):
    """The key with all its integers, such as those of NumPy or torch, as Python's."""
    if isinstance(key, (tuple, list)):
        return type(key)(map(integers, key))
    return operator.index(key) if hasattr(key, "__index__") else key

def mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64: a bijection in which every output bit depends on every input
    bit. Products are modulo 2^64. [Steele, Lea, Flood 2014]
    """
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - 2 ** 64)   # >> copies the sign
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - 2 ** 64)
    return x ^ (x >> 31 & (1 << 33) - 1)

class Noise:
    """z ~ N(0, I), (B, …), counter-based, not sequential: z of image i at time t is a function of
    (seed, i, t, element) alone, so it is the same in any batch and process, on any device.

    indices: the i, numbers or other names. noise(t) is the z of `ddpm.p_sample_loop`, t one number
    or one per image; noise(0) is x_T.
    """

    def __init__(self, seed: int, indices, shape: tuple[int, ...], device="cpu"):
        self.shape, self.device, seed = tuple(shape), torch.device(device), operator.index(seed)
        place = "cpu" if self.device.type == "mps" else device  # MPS has no float64
        images = [seed_of(seed, "image", i) for i in indices]
        self.images = torch.tensor(images, dtype=torch.int64, device=place)
        self.elements = mixed(torch.arange(1, 1 + torch.Size(shape).numel(), device=place))

    def __call__(self, t: int | Tensor = 0) -> Tensor:
        if isinstance(t, Tensor) and t.dim() and not t.is_floating_point():
            t = t.to(self.images)  # int64: int32 would overflow
        else:                      # torch.as_tensor would wait for the device
            t = torch.full_like(self.images, operator.index(t))
        streams = mixed(self.images + (2 * t + 1) * (0x9E3779B97F4A7C15 - 2 ** 64))
        bits = mixed(streams[:, None] ^ self.elements)
        # 52 bits: with 53 the largest would round to u = 1.
        u = ((bits >> 12 & (1 << 52) - 1).double() + 0.5) / 2 ** 52      # uniform on (0, 1)
        return torch.special.ndtri(u).float().view(-1, *self.shape).to(self.device)
