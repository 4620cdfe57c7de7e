"""Speed: images a second in training, milliseconds an image and step in sampling, and the limit.

    python bench.py                                    the paper's CIFAR-10 network
    python bench.py --vs diffusers                     and UNet2DModel through the same loops
    python bench.py --batch-size 32 --precision fp32

A training step is forward, backward, clipping, Adam and EMA. The limit is what the machine does on
the U-Net's own convolutions, and on a square matrix product, in the same precision and run.
"""
from __future__ import annotations

import platform
import resource
import statistics
import subprocess
import sys
import time

import runs  # before torch: it quiets a warning of torch's import

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import unet
from runs import UsageError, ranged


class Contestant:
    """A network with its training step and its sampling step."""

    def __init__(self, name: str, net: nn.Module, where: runs.Machine, args, x: torch.Tensor):
        self.name, self.x, self.where = name, x, where
        ours = name == "ours"
        self.net = net.to(where.device, memory_format=torch.channels_last if ours
                          else torch.contiguous_format)
        self.t = torch.randint(1, 1001, (len(x),), device=where.device)
        self.params = list(net.parameters())
        self.ema = [p.detach().clone() for p in self.params]
        self.adam = torch.optim.Adam(self.params, lr=1e-6, fused=ours or None)
        self.average = get_ema_multi_avg_fn(0.9999)
        engine = torch.compile(net) if ours and args.compile else net
        if ours:
            self.model, self.sampler = runs.runner(engine, where), runs.sampler(net, where)
        else:
            self.model = self.sampler = lambda x, t: net(x, t - 1).sample

    def train(self) -> None:
        """Forward, backward, clip, Adam, EMA."""
        self.net.train()
        loss = (self.model(self.x, self.t) - self.x).square().mean()
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.adam.step()
        with torch.no_grad():
            self.average(self.ema, self.params, None)

    def sample(self) -> None:
        """One network call of the sampler."""
        self.net.eval()
        with torch.no_grad():
            self.sampler(self.x, self.t)


def seconds(work, where: runs.Machine) -> float:
    """How long one call takes, the device's queue emptied before and after."""
    def wait():
        if where.device.type in ("cuda", "mps"):
            getattr(torch, where.device.type).synchronize()
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def convolutions(net: unet.UNet, x: torch.Tensor, where: runs.Machine) -> list:
    """Every convolution of the network with an input of its shape: the limit's work."""
    found, hooks = [], []

    def note(m: nn.Conv2d, inputs: tuple, _) -> None:
        alone = nn.Conv2d(m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding)
        alone = alone.to(where.device, where.dtype, memory_format=torch.channels_last)
        y = torch.randn_like(inputs[0], dtype=where.dtype)
        found.append((alone, y.contiguous(memory_format=torch.channels_last).requires_grad_()))

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        net(x, torch.ones(len(x), dtype=torch.int64, device=x.device))
    for hook in hooks:
        hook.remove()
    return found


def limits(net: unet.UNet, x: torch.Tensor, where: runs.Machine, flops: float) -> dict:
    """name → (FLOP, job): the convolutions alone, forward and both ways; a matrix product."""
    work = convolutions(net, x, where)

    def forward():
        with torch.no_grad():
            for conv, y in work:
                conv(y)

    def backward():
        for conv, y in work:
            out = conv(y)
            out.backward(torch.ones_like(out))
            conv.weight.grad = conv.bias.grad = y.grad = None

    def product():
        a @ b
    a, b = (torch.randn(2048, 2048, device=where.device, dtype=where.dtype) for _ in range(2))
    return {name: (count, job) for name, count, job in (
        ("convolutions, forward", flops, forward), ("convolutions, both ways", 3 * flops, backward),
        ("matrix product", 2 * 2048 ** 3, product))}


def processor(where: runs.Machine) -> str:
    """The name of the device, with threads or gigabytes."""
    if where.device.type == "cuda":
        return torch.cuda.get_device_name(where.device)
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if "model name" in line), name)
    return f"{name}, {torch.get_num_threads()} threads"


def peak(where: runs.Machine) -> float:
    """The largest memory so far in GiB: of the device, or of this process."""
    if where.device.type == "cuda":
        return torch.cuda.max_memory_allocated(where.device) / 2 ** 30
    if sys.platform == "linux":  # ru_maxrss would begin with that of the process that started this
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin"
                                                                else 2 ** 20)


def theirs(args) -> nn.Module:
    """UNet2DModel of diffusers with the same settings."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise UsageError("--vs diffusers needs diffusers: pip install diffusers") from error
    attend = [32 // 2 ** level in (16,) for level in range(len(args.multipliers))]
    down = [("Attn" if a else "") + "DownBlock2D" for a in attend]
    return UNet2DModel(
        sample_size=32, block_out_channels=[args.channels * m for m in args.multipliers],
        down_block_types=down, up_block_types=[k.replace("Down", "Up") for k in reversed(down)],
        attention_head_dim=None, norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False,
        freq_shift=1, dropout=0.1)


@runs.command
def main(argv=None) -> int:
    """Measure: see the module's text."""
    parser = runs.Parser(__doc__)
    parser.add_argument("--batch-size", type=ranged(int, 1), default=8, help="(default: 8)")
    parser.add_argument("--repeat", type=ranged(int, 1), default=5, help="medians are of these (5)")
    parser.add_argument("--channels", type=ranged(int, 32), default=128, help="base width (128)")
    parser.add_argument("--multipliers", type=ranged(int, 1), nargs="+", default=[1, 2, 2, 2],
                        help="of the network (1 2 2 2)")
    parser.add_argument("--compile", action="store_true", help="this project's network compiled")
    parser.add_argument("--vs", choices=("diffusers",), help="another network in turn, float32")
    parser.add_argument("--memory-of", choices=("ours", "diffusers"), help=runs.argparse.SUPPRESS)
    parser.machine_flags()
    args = parser.parse_args(argv)
    where = runs.machine(args.device, args.precision)
    x = torch.randn(args.batch_size, 3, 32, 32, device=where.device)
    net = unet.UNet(channels=args.channels, multipliers=tuple(args.multipliers))
    if args.memory_of:  # a process of its own, since a process's peak never falls
        if args.memory_of == "diffusers":
            net = theirs(args)
        one = Contestant(args.memory_of, net, where, args, x)
        one.train(), one.train()
        print(f"{peak(where):.3f}")
        return 0

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x[:1].cpu(), torch.ones(1, dtype=torch.int64))
    flops = counter.get_total_flops() * args.batch_size
    rivals = [Contestant("ours", net, where, args, x)]
    if args.vs:
        rivals.append(Contestant("diffusers", theirs(args), where, args, x))
    limit = limits(net, x, where, flops)
    jobs = {f"{r.name} {what}": getattr(r, what) for r in rivals for what in ("train", "sample")}
    jobs.update({name: job for name, (_, job) in limit.items()})
    times: dict[str, list[float]] = {name: [] for name in jobs}
    progress = runs.Progress(args.repeat + 1, "rounds")
    for turn in range(args.repeat + 1):  # in turn, so that a noisy minute hits all alike
        for name, job in jobs.items():
            took = seconds(job, where)
            if turn:
                times[name].append(took)
        progress.update(turn + 1)

    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"{processor(where)}; torch {torch.__version__}; ours in {where.dtype}; "
          f"batch {args.batch_size}; medians of {args.repeat}, (lowest – highest)\n"
          f"forward {flops / args.batch_size / 1e9:.2f} GFLOP an image")
    n = args.batch_size
    for r in rivals:
        for what, unit, scale in (("train", "images/s", lambda s: n / s),
                                  ("sample", "ms an image and step", lambda s: 1e3 * s / n)):
            values = sorted(scale(s) for s in times[f"{r.name} {what}"])
            print(f"{r.name + ' ' + what:18} {scale(median[f'{r.name} {what}']):8.2f} {unit} "
                  f"({values[0]:.2f} – {values[-1]:.2f})")
    speed = {name: limit[name][0] / median[name] / 1e9 for name in limit}
    for name, value in speed.items():
        print(f"{name:24} {value:8.0f} GFLOP/s")
    for what, name, times_flops in (("train", "convolutions, both ways", 3),
                                    ("sample", "convolutions, forward", 1)):
        own = times_flops * flops / median[f"ours {what}"] / 1e9
        print(f"ours {what}: {own:.0f} GFLOP/s, {own / speed[name]:.0%} of the {name}")
        if args.vs:
            ratio = statistics.median(b / a for a, b in zip(times[f"ours {what}"],
                                                            times[f"diffusers {what}"]))
            print(f"ours {what}: {ratio:.2f} × diffusers")
    flags = [f"--batch-size={n}", f"--channels={args.channels}", f"--device={args.device}",
             f"--precision={args.precision}", "--multipliers", *map(str, args.multipliers)]
    for r in rivals:
        answer = subprocess.run([sys.executable, __file__, "--memory-of", r.name, *flags],
                                capture_output=True, text=True)
        if answer.returncode:
            raise RuntimeError(answer.stderr.strip())
        print(f"{r.name} train: peak memory {float(answer.stdout):.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
