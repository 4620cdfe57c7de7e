"""Peak memory of a training step of the paper's two networks on a CUDA GPU.

    python tools/memory.py                             a table in Markdown; minutes on a CPU

It is computed, not measured: torch's MemTracker follows the step of train.py on fake tensors, which
have a shape and no data. Counted are the weights, their gradients and three averages (Adam's two
and the EMA), the batch, and all that the forward and backward passes keep. Not counted are the data
set (0.14 GiB for CIFAR-10), the allocator's rounding, the workspaces of cuDNN and other kernels,
the CUDA context of about 0.5 GiB, and what torch.compile, the default, saves.
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.checkpoint import build_schedule
from support.command import Parser, command
from support.machine import Machine

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.overrides import TorchFunctionMode

import ddpm
import train
from unet import build_network

class LikeCuda(TorchFunctionMode):
    """Keeps what CUDA keeps (fake CUDA tensors need a torch with CUDA): group norm a copy in NCHW,
    dropout a mask of bytes, and softmax under autocast its result in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.dropout and kwargs["p"]:
            return torch.native_dropout(args[0], kwargs["p"], kwargs["training"])[0]
        if func is F.group_norm:
            args = args[0].contiguous(), *args[1:]
        elif func is torch.Tensor.softmax:
            args = args[0].float(), *args[1:]
        return func(*args, **kwargs or {})

def peak(size: int, n: int, dtype: torch.dtype) -> float:
    """GiB of a training step with n images of this side, after Adam has its averages."""
    device, images = torch.device("cpu"), torch.empty(n, 3, size, size, dtype=torch.uint8)
    settings = train.settle(train.defaults("cifar10", size), {"batch_size": n}, images.shape[1:])
    s, tracker = build_schedule(settings), MemTracker()
    with FakeTensorMode(allow_non_fake_inputs=True), LikeCuda():
        net, ema = build_network(settings), build_network(settings).requires_grad_(False)
        for p in [*net.parameters(), *ema.parameters()]:
            if p.dim() == 4:  # fake weights refuse `net.to`
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        adam = torch.optim.Adam(net.parameters(), fused=True)
        machine = Machine(device, dtype)
        run = train.Run(settings, images, net, net, ddpm.Model(s, machine.network(net)), ema, adam,
                        torch.amp.GradScaler("cpu", enabled=False), machine, Path())
        train.training_step(run, 0)
        tracker.track_external(net, ema, adam)
        with tracker:
            train.training_step(run, 1)
    train.permutation.cache_clear()  # of fake tensors
    return tracker.get_tracker_snapshot("peak")[device]["Total"] / 2 ** 30

@command
def main(argv=None) -> int:
    """Prints the table: see the text at the head of this file."""
    Parser(__doc__).parse_args(argv)
    print("| images | batch | bfloat16 | float32 |\n|---|---|---|---|")
    for size, n in ((32, 128), (32, 64), (32, 32), (256, 4), (256, 2), (256, 1)):
        bf16, fp32 = (peak(size, n, dtype) for dtype in (torch.bfloat16, torch.float32))
        print(f"| {size}×{size} | {n} | {bf16:.1f} GiB | {fp32:.1f} GiB |", flush=True)
    return 0

if __name__ == "__main__":
    sys.exit(main())
