"""Speed: images/s in training, milliseconds per image and network call in sampling, the limit.

    python tools/bench.py                              the paper's CIFAR-10 network, batch 8
    python tools/bench.py --batch-size 32 --precision fp32
    python tools/bench.py --vs diffusers               UNet2DModel in the same loops, alternately
    python tools/bench.py --vs pytorch-ddpm --clones FOLDER    and networks of other reproductions

FOLDER has clones of github.com/pesser/pytorch_diffusion, w86763777/pytorch-ddpm, tqch/ddpm-torch.

A training step is forward, backward, clipping, Adam and averaging. All networks run in the same
precision, under torch.autocast with channels_last; for sampling their weights are cast once. The
limit is the speed of the U-Net's convolutions alone, in that precision.
"""
from __future__ import annotations

import platform
import statistics
import sys
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.checkpoint import inference_model
from support.command import Parser, Progress, command, positive_int
from support.machine import Machine, start_machine

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ddpm
import unet

class From0(nn.Module):
    """A network whose times start at 0, as a function of the paper's t."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        out = self.net(x, t - 1)
        return getattr(out, "sample", out)

def diffusers(c: int, m: list[int]) -> nn.Module:
    """UNet2DModel with c channels and the multipliers m, like those below."""
    from diffusers import UNet2DModel
    down = [f"{'Attn' if level == 1 else ''}DownBlock2D" for level in range(len(m))]
    return UNet2DModel(sample_size=32, block_out_channels=[c * k for k in m],
                       down_block_types=down, attention_head_dim=None, norm_eps=1e-6, dropout=0.1,
                       up_block_types=[kind.replace("Down", "Up") for kind in down[::-1]],
                       downsample_padding=0, flip_sin_to_cos=False, freq_shift=1)

def pytorch_diffusion(c: int, m: list[int]) -> nn.Module:
    """pesser's network."""
    from pytorch_diffusion.model import Model
    return Model(ch=c, out_ch=3, ch_mult=tuple(m), num_res_blocks=2, attn_resolutions=(16,),
                 dropout=0.1, in_channels=3, resolution=32)

def pytorch_ddpm(c: int, m: list[int]) -> nn.Module:
    """w86763777's network."""
    from model import UNet
    return UNet(T=1000, ch=c, ch_mult=m, attn=[1], num_res_blocks=2, dropout=0.1)

def ddpm_torch(c: int, m: list[int]) -> nn.Module:
    """tqch's network."""
    package = sys.modules["ddpm_torch"] = types.ModuleType("ddpm_torch")  # theirs needs more
    package.__path__ = [f"{sys.path[-1]}/ddpm_torch"]
    from ddpm_torch.models.unet import UNet
    return UNet(3, c, 3, m, 2, [level == 1 for level in range(len(m))], drop_rate=0.1)

RIVALS = {"diffusers": diffusers, "pytorch_diffusion": pytorch_diffusion,
          "pytorch-ddpm": pytorch_ddpm, "ddpm-torch": ddpm_torch}

def jobs_of(net: nn.Module, machine: Machine, x: torch.Tensor, compile: bool) -> tuple:
    """A training step, and one network call of the sampler."""
    t = torch.randint(1, 1001, (len(x),), device=machine.device)
    params = list(net.parameters())
    averages = [p.detach().clone() for p in params]
    adam = torch.optim.Adam(params, lr=1e-6, fused=machine.device.type != "mps")
    model = machine.network(torch.compile(net, dynamic=False) if compile else net)
    sampler = inference_model(ddpm.Model(ddpm.make_schedule(), net), machine).net

    def train():
        net.train()
        loss = (model(x, t) - x).square().mean()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        adam.step()
        torch._foreach_lerp_(averages, params, 1e-4)

    def call():
        net.eval()
        with torch.no_grad():
            sampler(x, t)
    return train, call

def limits(net: unet.UNet, machine: Machine, x: torch.Tensor) -> tuple:
    """The network's convolutions alone: forward and backward, and forward."""
    work = []

    def note(conv: nn.Conv2d, inputs: tuple, _) -> None:
        alone = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                          conv.padding)
        y = torch.randn_like(inputs[0], dtype=machine.dtype)
        work.append((alone.to(machine.device, machine.dtype, memory_format=torch.channels_last),
                     y.contiguous(memory_format=torch.channels_last).requires_grad_()))

    hooks = [m.register_forward_hook(note) for m in net.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        net(x, torch.ones(len(x), dtype=torch.int64, device=x.device))
    for hook in hooks:
        hook.remove()

    def both_ways():
        for conv, y in work:
            out = conv(y)
            out.backward(torch.ones_like(out))
            conv.weight.grad = conv.bias.grad = y.grad = None

    def forward():
        with torch.no_grad():
            for conv, y in work:
                conv(y)
    return both_ways, forward

def seconds(job, machine: Machine) -> float:
    """How long a job takes, with the device synchronized before and after."""
    def wait():
        if machine.device.type != "cpu":
            getattr(torch, machine.device.type).synchronize()
    wait()
    start = time.perf_counter()
    job()
    wait()
    return time.perf_counter() - start

def saved_memory(job) -> float:
    """GiB that the forward pass keeps for the backward pass, weights included."""
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        job()
    return sum(kept.values()) / 2 ** 30

@command
def main(argv=None) -> int:
    """Measures: see the text at the head of this file."""
    parser = Parser(__doc__, "--device", "--precision")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="(default: 8)")
    parser.add_argument("--repeat", type=positive_int, default=5, help="rounds (default: 5)")
    parser.add_argument("--channels", type=positive_int, default=128, help="(default: 128)")
    parser.add_argument("--multipliers", type=positive_int, nargs="+", default=[1, 2, 2, 2],
                        help="(default: 1 2 2 2)")
    parser.add_argument("--compile", action="store_true", help="torch.compile for training")
    parser.add_argument("--vs", choices=RIVALS, nargs="+", default=[], help="compare with these")
    parser.add_argument("--clones", type=Path, default=Path(), help="folder of their clones")
    args = parser.parse_args(argv)
    machine, n = start_machine(args.device, args.precision), args.batch_size
    x = torch.randn(n, 3, 32, 32, device=machine.device)
    net = unet.UNet(channels=args.channels, multipliers=tuple(args.multipliers))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x[:1].cpu(), torch.ones(1, dtype=torch.int64))
    gflop = counter.get_total_flops() / 1e9
    rivals = {"ours": jobs_of(machine.placed(net), machine, x, args.compile)}
    for name in args.vs:
        sys.path.append(str(args.clones / name))
        theirs = From0(RIVALS[name](args.channels, args.multipliers))
        theirs = theirs.to(machine.device, memory_format=torch.channels_last)
        rivals[name] = jobs_of(theirs, machine, x, args.compile)
    rivals["convolutions"] = limits(net, machine, x)
    memory = {name: saved_memory(train) for name, (train, _) in rivals.items()}
    times = {(name, what): [] for name in rivals for what in (0, 1)}
    progress = Progress(args.repeat + 1, "rounds")
    for turn in range(args.repeat + 1):  # alternately, so that a noisy minute slows all
        for name, what in times:
            took = seconds(rivals[name][what], machine)
            if turn:
                times[name, what].append(took)
        progress.update(turn + 1)

    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if machine.device.type == "cuda":
        name = torch.cuda.get_device_name(machine.device)
    elif info.exists():
        name = info.read_text().split("model name\t: ")[-1].splitlines()[0]
    print(f"{name}, {torch.get_num_threads()} threads; torch {torch.__version__}; "
          f"{str(machine.dtype)[6:]}; batch {n}; {gflop:.2f} GFLOP forward per image; medians of "
          f"{args.repeat} (lowest – highest)")
    for (name, what), took in times.items():
        values = sorted((n / t, 1e3 * t / n)[what] for t in took)
        speed = (3, 1)[what] * n * gflop / statistics.median(took)
        ratio = statistics.median(t / own for t, own in zip(took, times["ours", what]))
        print(f"{name:17} {('train', 'sample')[what]:6} {statistics.median(values):8.2f} "
              f"{('images/s', 'ms per image')[what]:12} ({values[0]:.2f} – {values[-1]:.2f})  "
              f"{speed:6.0f} GFLOP/s  {ratio:.2f} × the time of ours")
    print("kept for the backward pass: " + ", ".join(f"{name} {size:.2f} GiB"
                                                     for name, size in memory.items()))
    return 0

if __name__ == "__main__":
    sys.exit(main())
