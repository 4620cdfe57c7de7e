"""Algorithm 2: sample from a trained network.

    python sample.py --n 64                            averaged weights of the newest run
    python sample.py --n 50000 --out samples.pt        a uint8 tensor (n, C, H, W)
    python sample.py --steps 100                       100 network calls an image in place of T
    python sample.py --progressive                     x̂_0 over time, one row an image (Figure 6)
    python sample.py --shared                          samples that share x_t (Figure 7)
    python sample.py --interpolate                     between images of the data set (Figure 8)
    torchrun --nproc-per-node 8 -- sample.py --n 50000 --out samples.pt          on 8 GPUs

Image i is a function of the seed, of i and of the kind of device. The batch size changes it by
rounding errors only.
"""
from __future__ import annotations

import copy
import math
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import common  # before torch, because it silences a warning of torch's import

import torch
from torch import Tensor, nn

import data
import ddpm
import weights
from common import Machine, Noise, Progress, UsageError, count, word
from data import say
from unet import UNet

# === A trained network ============================================================================

class Trained(NamedTuple):
    """A network in evaluation mode, with what is needed to use it."""
    net: UNet
    schedule: ddpm.Schedule
    settings: dict          # those of train.py
    source: str             # where it comes from, in words

    @property
    def model_settings(self) -> dict:
        """The settings that say which function the network is, and of which chain."""
        return {name: self.settings[name] for name in (
            "in_channels", "image_size", "channels", "multipliers", "blocks", "attention",
            "timesteps", "schedule", "beta_start", "beta_end", "predict", "variance", "clip_sample")
            if name in self.settings}

    @property
    def choices(self) -> dict:
        """predict, variance and clip of `ddpm.p_mean_variance`."""
        return {"predict": self.settings["predict"], "variance": self.settings["variance"],
                "clip": self.settings.get("clip_sample", True)}

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of one image."""
        side = self.settings["image_size"]
        return (self.settings["in_channels"], side, side)

def load(name: str | Path | None = None, data_dir: str | Path = "data", ema: bool = True,
         machine: Machine | None = None) -> Trained:
    """A trained network on the machine's device (by default the best one here).

    name: a checkpoint.pt or its folder, a folder in the layout of diffusers, a .safetensors or .bin
    file, or ORGANISATION/MODEL on the hub, which is downloaded once to data_dir/hub; by default the
    run in runs/ that saved last. ema: take the averaged weights of a checkpoint. ValueError or
    OSError if it cannot be used.
    """
    machine = machine or common.find_machine()
    path = newest_checkpoint() if name is None else Path(name)
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) and not path.parent.is_dir()
    if path.suffix in (".safetensors", ".bin") or (path / "config.json").exists() or (
            path / "unet" / "config.json").exists():
        net, settings, source = weights.from_diffusers(path)
    elif path.exists() or path.suffix == ".pt" or not on_hub:
        state = common.load_checkpoint(path)
        settings = state["settings"]
        common.require_network(settings, machine, 2, 1, False)
        net = common.build_network(settings)
        try:
            net.load_state_dict(state["ema" if ema else "model"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: its weights do not fit its settings") from error
        source = f"{path}, step {state['step']}, {'averaged' if ema else 'last'} weights"
    else:
        with machine.chief_first():
            folder = weights.download(str(name), Path(data_dir) / "hub")
        net, settings, source = weights.from_diffusers(folder)
    net = net.to(machine.device, memory_format=torch.channels_last).eval()
    return Trained(net, common.build_schedule(settings), settings, source)

def newest_checkpoint(root: Path = Path("runs")) -> Path:
    """The checkpoint of the run under `root` that saved last."""
    found = sorted(root.glob("*/checkpoint*.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no run under {root}/: train one first (python train.py --dataset shapes)"
                         " or name a --checkpoint")
    return found[-1].with_name("checkpoint.pt")

def inference_model(net: nn.Module, machine: Machine) -> ddpm.Model:
    """ε_θ(x_t, t) for sampling: a copy of `net` whose weights are cast once, not in every call."""
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(machine.dtype)
    return machine.model(net)

# === Algorithm 2 on batches =======================================================================

@torch.no_grad()
def draw_samples(trained: Trained, n: int, seed: int = 0, batch_size: int | None = None,
                 steps: int | None = None, machine: Machine | None = None,
                 progress: Progress | None = None, **choices) -> Tensor:
    """Images 0 … n − 1 of a seed, by `ddpm.p_sample_loop`: uint8 (n, C, H, W) on the CPU.

    steps: network calls for each image, T by default. choices: these replace `trained.choices`.
    Under torchrun the processes share the work, and each of them gets all images.
    """
    machine = machine or common.find_machine(str(next(trained.net.parameters()).device))
    s = trained.schedule if steps is None else ddpm.respace(trained.schedule, steps)
    s, model = s.to(machine.device), inference_model(trained.net, machine)
    batch_size = min(n, batch_size or (256 if machine.device.type == "cuda" else 16))
    common.require_network(trained.settings, machine, 1, batch_size, False)
    common.require(3 * n * math.prod(trained.shape), f"{n:,} images")
    mine, out = machine.share(n), []
    for i in range(0, len(mine), batch_size):
        noise = Noise(seed, mine[i:i + batch_size], trained.shape, machine.device)
        x_T = noise()
        for t, x_t, _ in ddpm.p_sample_loop(s, model, x_T, noise, **{**trained.choices, **choices}):
            if progress:
                progress.update(min(n, (i + len(x_T) * (1 - t / s.T)) * machine.world))
        out.append(data.to_uint8(x_t).cpu())
    rows = torch.cat(out) if out else torch.zeros(0, *trained.shape, dtype=torch.uint8)
    return machine.gather(rows, n)

# === The figures ==================================================================================

def progressive(trained: Trained, s: ddpm.Schedule, model: ddpm.Model, args, machine) -> Tensor:
    """Figure 6: a row is x̂_0(x_t) at eleven times from T to 1, and x_0 at its end."""
    noise = Noise(args.seed, range(args.n), trained.shape, machine.device)
    shown = {round(t) for t in torch.linspace(s.T, 1, min(11, s.T)).tolist()} | {0}
    progress, columns = Progress(s.T, "steps", quiet=not machine.chief), []
    for t, _, x0_hat in ddpm.p_sample_loop(s, model, noise(), noise, **args.choices):
        progress.update(s.T - t)
        if t in shown:
            columns.append(data.to_uint8(x0_hat))
    return grid(torch.stack(columns, 1).flatten(0, 1), len(columns))

def shared(trained: Trained, s: ddpm.Schedule, model: ddpm.Model, args, machine) -> Tensor:
    """Figure 7: a row is x_t, and then samples that share it, for t = T, 3T/4, T/2 and T/4."""
    noise = Noise(args.seed, [0], trained.shape, machine.device)
    times = [max(1, round(s.T * part)) for part in (1, 0.75, 0.5, 0.25)]
    x = {t: x_t for t, x_t, _ in ddpm.p_sample_loop(s, model, noise(), noise, **args.choices)
         if t in times}
    progress, done, rows = Progress(sum(times), "steps", quiet=not machine.chief), 0, []
    for t in times:
        names = [("shared", t, i) for i in range(args.n)]
        own = Noise(args.seed, names, trained.shape, machine.device)
        for state in ddpm.p_sample_loop(s, model, x[t].expand(args.n, *trained.shape), own, start=t,
                                        **args.choices):
            progress.update(done + t - state.t)
        done += t
        rows.append(data.to_uint8(torch.cat([x[t], state.x_t])))
    return grid(torch.cat(rows), 1 + args.n)

def interpolation(trained: Trained, s: ddpm.Schedule, model: ddpm.Model, args, machine) -> Tensor:
    """Figure 8: a row is an image, decoded mixtures for λ = 0, ⅛, …, 1, and the other image."""
    name = args.dataset or trained.settings.get("dataset")
    if not name:
        raise UsageError("--interpolate needs --dataset: the checkpoint names none")
    with machine.chief_first():
        images = data.load(name, args.data_dir or trained.settings.get("data_dir", "data"), "test",
                           trained.settings["image_size"]).images
    if tuple(images.shape[1:]) != trained.shape:
        raise ValueError(f"the images of {name} are {tuple(images.shape[1:])}, the network's "
                         f"{trained.shape}")
    if args.n > len(images):
        raise ValueError(f"--n {args.n}: {name} has {len(images)} images to mix")
    start = int((s.times - args.time).abs()[1:].argmin()) + 1
    progress, rows = Progress(args.n * start, "steps", quiet=not machine.chief), []
    pick = torch.Generator().manual_seed(common.seed_of(args.seed, "pairs"))
    for row, pair in enumerate(torch.randint(len(images), (args.n, 2), generator=pick)):
        x0, other = data.to_model(images[pair]).to(machine.device)[:, None]
        lam = torch.linspace(0, 1, 9, device=machine.device)
        ends = [("end", row, 0), ("end", row, 1)]
        eps, eps_other = Noise(args.seed, ends, trained.shape, machine.device)()[:, None]
        noise = Noise(args.seed, [("row", row)], trained.shape, machine.device)
        many = (len(lam), *trained.shape)
        for state in ddpm.interpolate(s, model, x0.expand(many), other.expand(many), lam, start,
                                      eps, eps_other, noise, **args.choices):
            progress.update(row * start + start - state.t)
        rows.append(data.to_uint8(torch.cat([x0, state.x_t, other])))
    return grid(torch.cat(rows), len(lam) + 2)

# === Pictures =====================================================================================

def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """uint8 (N, C, H, W) → one picture (C, …) in rows of `columns`; as square as possible."""
    n, c, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cells = torch.zeros(rows * columns, c, height, width, dtype=torch.uint8)
    cells[:n] = images
    cells = cells.view(rows, columns, c, height, width).permute(2, 0, 3, 1, 4)
    return cells.reshape(c, rows * height, columns * width)

def write_png(path: Path, image: Tensor) -> None:
    """Writes uint8 (1 or 3, H, W) as an 8-bit PNG, grey or RGB."""
    c, height, width = image.shape
    if image.dtype != torch.uint8 or c not in (1, 3) or not height * width:
        raise ValueError(f"a picture is uint8 (1 or 3, H, W), not {image.dtype} "
                         f"{tuple(image.shape)}")
    lines = torch.zeros(height, 1 + width * c, dtype=torch.uint8)  # byte 0 of a line: no filter
    lines[:, 1:] = image.permute(1, 2, 0).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if c == 1 else 2, 0, 0, 0)
    with data.written(path) as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(data.raw_bytes(lines), 9)),
                           (b"IEND", b"")):
            check = zlib.crc32(kind + body)
            file.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check))

# === The command ==================================================================================

def parse(argv):
    """The flags of sample.py."""
    parser = common.Parser(__doc__)
    parser.add("--checkpoint", "--no-ema", "--data-dir", "--steps", "--no-clip", "--seed",
               "--batch-size", "--device", "--precision")
    parser.add_argument("--n", type=count, help="how many images (default: 64), or rows "
                        "or columns of a figure (default: 8)")
    parser.add_argument("--variance", choices=("fixed_large", "fixed_small"),
                        help="σ_t²: β_t or β̃_t (default: as trained)")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="a .png file, or a "
                        ".pt file for a uint8 tensor (default: samples.png)")
    figure = parser.add_mutually_exclusive_group()
    for flag, function, what in (
            ("--progressive", progressive, "Figure 6: x̂_0 over time"),
            ("--shared", shared, "Figure 7: samples that share x_t"),
            ("--interpolate", interpolation, "Figure 8: mixtures of two images")):
        figure.add_argument(flag, action="store_const", dest="figure", const=function, help=what)
    parser.add_argument("--time", type=count, help="the t at which --interpolate encodes "
                        "the images (default: T/2)")
    parser.add_argument("--dataset", type=word, help="images for --interpolate (default: the run's)")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".png", ".pt") or (args.figure and args.out.suffix == ".pt"):
        raise UsageError(f"--out {args.out} must end in .png" + ("" if args.figure else " or .pt"))
    if args.figure is not interpolation and (args.time or args.dataset):
        raise UsageError("--time and --dataset go with --interpolate")
    args.n = args.n or (8 if args.figure else 64)
    return args

@common.command
def main(argv=None) -> int:
    """Samples images and writes them: see the text at the head of this file."""
    args = parse(argv)
    machine = common.find_machine(args.device, args.precision)
    trained = load(args.checkpoint, args.data_dir or "data", not args.no_ema, machine)
    T, learned = trained.schedule.T, trained.settings["variance"] == "learned"
    if args.variance and learned:
        raise UsageError("--variance: this network predicts its own variance")
    if args.steps and learned and args.steps < T:
        raise UsageError("--steps: a network with learned variance is sampled with all its steps")
    args.time = args.time or max(1, T // 2)
    for flag, value in (("--steps", args.steps), ("--time", args.time)):
        if value and value > T:
            raise UsageError(f"{flag} {value} exceeds the network's T = {T}")
    args.choices = dict(trained.choices)
    if args.no_clip:
        args.choices["clip"] = False
    if args.variance:
        args.choices["variance"] = args.variance
    if machine.chief:
        data.check_writable(args.out)
        say(f"{trained.source}, T = {T}")

    if args.figure:
        common.require_network(trained.settings, machine, 1, args.n, False)
        common.require(50 * args.n * math.prod(trained.shape), f"a figure of {args.n:,} rows")
        s = ddpm.respace(trained.schedule, args.steps or T).to(machine.device)
        with torch.no_grad():
            picture = args.figure(trained, s, inference_model(trained.net, machine), args, machine)
    else:
        progress = Progress(args.n, "samples", quiet=not machine.chief)
        images = draw_samples(trained, args.n, args.seed, args.batch_size, args.steps, machine,
                              progress, **args.choices)
        picture = grid(images)
    if machine.chief:
        if args.out.suffix == ".pt":
            with data.written(args.out) as file:
                torch.save(images, file)
        else:
            write_png(args.out, picture)
        say(f"{args.out} holds {args.n} {'row' if args.figure else 'sample'}{'s' * (args.n > 1)}")
    return 0

if __name__ == "__main__":
    sys.exit(main())
