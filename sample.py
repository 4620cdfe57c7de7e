"""Algorithm 2: sample from a trained network.

    python sample.py --n 64                            averaged weights of the newest run
    python sample.py --n 50000 --out samples.pt        a uint8 tensor (n, C, H, W)
    python sample.py --n 50000 --out samples/          a folder with one PNG for each image
    python sample.py --steps 50                        50 network calls an image in place of T, by
                                                       default with DDIM's steps (see --eta)
    python sample.py --progressive                     x̂_0 over time, one row an image (Figure 6)
    python sample.py --shared                          samples that share x_t (Figure 7)
    python sample.py --interpolate                     between images of the data set (Figure 8)
    torchrun --nproc-per-node 8 -- sample.py --n 50000 --out samples.pt          on 8 GPUs

With the same network and flags, image i depends only on the seed, on i and on the kind of device.
The batch size changes it by rounding errors only. The same command again continues an unfinished
tensor or folder.
"""
from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Iterator, NamedTuple

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
        """The settings of the network and of its noise schedule."""
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

    name: a checkpoint.pt or its folder, an ema-*.safetensors of train.py --keep, a folder in the
    layout of diffusers, a .safetensors or .bin file of diffusers, or ORGANISATION/MODEL on the hub,
    which is downloaded once to data_dir/hub; by default the run in runs/ that saved last. ema: take
    the averaged weights of a checkpoint. ValueError or OSError if it cannot be used.
    """
    machine = machine or common.find_machine()
    path = newest_checkpoint() if name is None else Path(name)
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) and not path.parent.is_dir()
    if path.suffix in (".safetensors", ".bin") or (path / "config.json").exists() or (
            path / "unet" / "config.json").exists():
        net, settings, source = kept_weights(path, machine) or weights.from_diffusers(path)
    elif path.exists() or path.suffix == ".pt" or not on_hub:
        state = common.load_checkpoint(path)
        settings = state["settings"]
        net = network_with(state.get("ema" if ema else "model"), settings, path, machine)
        source = f"{path}, step {state['step']}, {'averaged' if ema else 'last'} weights"
    else:
        with machine.chief_first():
            folder = weights.download(str(name), Path(data_dir) / "hub")
        net, settings, source = weights.from_diffusers(folder)
    net = net.to(machine.device, memory_format=torch.channels_last).eval()
    return Trained(net, common.build_schedule(settings), settings, source)

def network_with(state: dict, settings: dict, path: Path, machine: Machine) -> nn.Module:
    """The network of `settings` with the weights `state`, or ValueError."""
    common.require_network(settings, machine, 2, 1, False)
    net = common.build_network(settings)
    try:
        net.load_state_dict(state)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: its weights do not fit its settings") from error
    return net

def kept_weights(path: Path, machine: Machine) -> tuple | None:
    """Network, settings and source of a file of train.py --keep, or None for another file."""
    if path.suffix != ".safetensors":
        return None
    state, metadata = weights.read_header(path)
    if "ddpm" not in metadata:
        return None
    try:
        about = json.loads(metadata["ddpm"])
        settings, step = about["settings"], int(about["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no settings of train.py") from error
    common.judged(settings, str(path), common.REQUIRED)
    net = network_with(weights.finite(state, path), settings, path, machine)
    return net, settings, f"{path}, step {step}, averaged weights"

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
def draw_batches(trained: Trained, first: int, n: int, seed: int = 0, batch_size: int | None = None,
                 steps: int | None = None, machine: Machine | None = None,
                 progress: Progress | None = None, eta: float | None = None,
                 **choices) -> Iterator[Tensor]:
    """Images first … n − 1 of a seed, by `ddpm.p_sample_loop`, in batches: uint8 (B, C, H, W).

    steps: network calls for each image, T by default. eta: take the steps of `ddpm.ddim_loop` with
    this η in place of Algorithm 2. With fewer steps than T, σ_t² = β_t leaves visible noise; so
    then the default of a network with that variance is η = 0. choices: these override entries of
    `trained.choices`.
    Under torchrun each process computes a batch, and all of them get all images, on the CPU.
    """
    machine = machine or common.find_machine(str(next(trained.net.parameters()).device))
    s = trained.schedule if steps is None else ddpm.respace(trained.schedule, steps)
    few = s.T < trained.schedule.T and trained.settings["variance"] == "fixed_large"
    if eta is None and few and "variance" not in choices:
        eta = 0.0
    s, model = s.to(machine.device), inference_model(trained.net, machine)
    batch_size = min(n, batch_size or (256 if machine.device.type == "cuda" else 16))
    common.require_network(trained.settings, machine, 1, batch_size, False)
    for i in range(first, n, batch_size * machine.world):
        batch = range(i, min(n, i + batch_size * machine.world))
        mine = [batch[j] for j in machine.share(len(batch))]
        noise = Noise(seed, mine, trained.shape, machine.device)
        if eta is None:
            states = ddpm.p_sample_loop(s, model, noise(), noise, **{**trained.choices, **choices})
        else:
            states = ddpm.ddim_loop(s, model, noise(), noise, eta, **{**trained.choices, **choices})
        for t, x_t, _ in states:
            if progress:
                progress.update(min(n, i + len(batch) * (1 - t / s.T)))
        yield machine.gather(data.to_uint8(x_t).cpu(), len(batch))

def draw_samples(trained: Trained, n: int, *arguments, **options) -> Tensor:
    """Images 0 … n − 1 of a seed: uint8 (n, C, H, W) on the CPU. Arguments as in `draw_batches`."""
    common.require(3 * n * math.prod(trained.shape), f"{n:,} images")
    return torch.cat(list(draw_batches(trained, 0, n, *arguments, **options)))

@torch.no_grad()
def seconds_of_a_call(trained: Trained, n: int, machine: Machine) -> float:
    """Estimated seconds of one network call for each of n images, in batches of 32."""
    model = inference_model(trained.net, machine)
    x = torch.zeros(min(n, 32), *trained.shape, device=machine.device)
    t = torch.ones(len(x), dtype=torch.int64, device=machine.device)
    model(x, t)
    started = time.monotonic()
    model(x, t).sum().item()
    return (time.monotonic() - started) * math.ceil(n / 32 / machine.world)

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

def enlarged(picture: Tensor) -> Tensor:
    """Each pixel becomes a square, so that the picture is about 480 pixels wide, or wider."""
    k = max(1, round(480 / picture.shape[2]))
    return picture.repeat_interleave(k, 1).repeat_interleave(k, 2)

def write_png(path: Path, image: Tensor) -> None:
    """Writes uint8 (1 or 3, H, W) as a PNG."""
    content = data.png(image)
    with data.written(path) as file:
        file.write(content)

# === The command ==================================================================================

def parse(argv):
    """The flags of sample.py."""
    parser = common.Parser(__doc__)
    parser.add("--checkpoint", "--no-ema", "--data-dir", "--steps", "--no-clip", "--seed",
               "--batch-size", "--device", "--precision")
    parser.add_argument("--n", type=count, help="how many images (default: 64); "
                        "rows of Figures 6 and 8, samples in a row of Figure 7 (default: 8)")
    parser.add_argument("--variance", choices=("fixed_large", "fixed_small"),
                        help="σ_t²: β_t or β̃_t (default: as trained)")
    parser.add_argument("--eta", type=common.number(float, 0, 1), help="take DDIM's steps with "
                        "this η (default: 0 for fewer steps than T of a network trained with "
                        "fixed_large; else Algorithm 2)")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="a .png file, a .pt "
                        "file for a uint8 tensor, or a folder for PNGs (default: samples.png)")
    figure = parser.add_mutually_exclusive_group()
    for flag, function, what in (
            ("--progressive", progressive, "Figure 6: x̂_0 over time"),
            ("--shared", shared, "Figure 7: samples that share x_t"),
            ("--interpolate", interpolation, "Figure 8: mixtures of two images")):
        figure.add_argument(flag, action="store_const", dest="figure", const=function, help=what)
    parser.add_argument("--time", type=count, help="the t at which --interpolate encodes "
                        "the images (default: T/2)")
    parser.add_argument("--dataset", type=word, help="the images of --interpolate (default: the "
                        "run's)")
    args = parser.parse_args(argv)
    if args.out.suffix not in ((".png",) if args.figure else (".png", ".pt", "")):
        raise UsageError(f"--out {args.out}: " + ("a figure is a .png file" if args.figure else
                         "it must end in .png or .pt, or be a folder without a point in its name"))
    if args.figure is not interpolation and (args.time or args.dataset):
        raise UsageError("--time and --dataset go with --interpolate")
    if args.eta is not None and (args.variance or args.figure):
        raise UsageError("--eta replaces Algorithm 2: leave out --variance and the figures")
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
    args.choices = dict(trained.choices) if args.figure else {}
    if args.no_clip:
        args.choices["clip"] = False
    if args.variance:
        args.choices["variance"] = args.variance
    if machine.chief:
        if args.out.suffix:
            data.check_writable(args.out)
        say(f"{trained.source}, T = {T}")

    if args.figure:
        common.require_network(trained.settings, machine, 1, args.n, False)
        common.require(50 * args.n * math.prod(trained.shape), f"a figure of {args.n:,} rows")
        s = ddpm.respace(trained.schedule, args.steps or T).to(machine.device)
        with torch.no_grad():
            picture = args.figure(trained, s, inference_model(trained.net, machine), args, machine)
    elif args.out.suffix == ".png":
        progress = Progress(args.n, "samples", quiet=not machine.chief)
        picture = grid(draw_samples(trained, args.n, args.seed, args.batch_size, args.steps,
                                    machine, progress, args.eta, **args.choices))
    else:
        draw_many(trained, machine, args)
    if machine.chief:
        if args.out.suffix == ".png":
            write_png(args.out, enlarged(picture))
        say(f"{args.out} holds {args.n} {'row' if args.figure else 'sample'}{'s' * (args.n > 1)}")
    return 0

def draw_many(trained: Trained, machine: Machine, args) -> None:
    """Samples into a folder of PNGs, or into a .pt file by way of a file beside it that grows.

    Only one batch is in memory. What is there already is not drawn again, if it was drawn in the
    same way: samples.json in the folder, or a .json beside the tensor, says how.
    """
    tensor = args.out.suffix == ".pt"
    raw, size = args.out.with_name(args.out.name + ".raw"), math.prod(trained.shape)
    note = args.out.with_name(args.out.name + ".json") if tensor else args.out / "samples.json"
    about = {"source": trained.source, "seed": args.seed, "steps": args.steps or trained.schedule.T,
             "shape": list(trained.shape), "eta": args.eta, **trained.choices, **args.choices}
    found = weights.read_json(note)
    if found is not None and found != about:
        raise ValueError(f"{note} tells of other samples: delete it and them, or give another "
                         "--out")
    first = 0
    if not (tensor or found) and (args.out / "000000.png").exists():
        raise ValueError(f"{args.out} has pictures of which no samples.json tells: give another "
                         "--out")
    if tensor and found and raw.exists():
        first = min(args.n, data.size_of(raw) // size)
    while not tensor and (args.out / f"{first:06d}.png").exists() and first < args.n:
        first += 1
    if machine.chief:
        with data.written(note) as file:
            file.write(json.dumps(about).encode())
        with data.naming(raw) if tensor else contextlib.nullcontext():
            if tensor:
                with open(raw, "ab") as file:
                    file.truncate(first * size)  # half an image, as a kill leaves it
    progress = Progress(args.n, "samples", first, quiet=not machine.chief)
    for images in draw_batches(trained, first, args.n, args.seed, args.batch_size, args.steps,
                               machine, progress, args.eta, **args.choices):
        if machine.chief and tensor:
            with data.naming(raw), open(raw, "ab") as file:
                file.write(data.raw_bytes(images))
        elif machine.chief:
            for i, image in enumerate(images, first):
                write_png(args.out / f"{i:06d}.png", image)
        first += len(images)
    if machine.chief and tensor:
        images = torch.from_file(str(raw), size=args.n * size, dtype=torch.uint8)
        with data.written(args.out) as file:
            torch.save(images.view(args.n, *trained.shape), file)
        raw.unlink()
        note.unlink()

if __name__ == "__main__":
    sys.exit(main())
