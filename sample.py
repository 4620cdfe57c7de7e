"""Algorithm 2: sample from a trained network.

    python sample.py --n 64                            the newest run's EMA weights → samples.png
    python sample.py --n 50000 --out samples.pt        a uint8 tensor (n, C, H, W)
    python sample.py --steps 100                       100 network calls an image in place of T
    python sample.py --progressive                     x̂_0 over time, a row an image (Figure 6)
    python sample.py --shared                          samples that share x_t (Figure 7)
    python sample.py --interpolate                     between images of the data set (Figure 8)

Image i is a function of (seed, i), whatever the batch size.
"""
from __future__ import annotations

import sys
from pathlib import Path

import runs  # before torch: it quiets a warning of torch's import

import torch
from torch import Tensor

import data
import ddpm
import weights
from runs import UsageError, ranged


def progressive(trained: runs.Trained, s: ddpm.Schedule, model: ddpm.Model, args, where) -> Tensor:
    """Figure 6: x̂_0(x_t) at eleven times from T to 1, then x_0: args.n rows of 12."""
    noise = runs.Noise(args.seed, range(args.n), trained.shape, where.device)
    shown = set(torch.linspace(s.T, 1, min(11, s.T)).round().int().tolist()) | {0}
    progress, cells = runs.Progress(s.T, "steps", quiet=not where.chief), []
    for t, _, x0 in ddpm.p_sample_loop(s, model, noise(), noise, **args.choices):
        progress.update(s.T - t)
        if t in shown:
            cells.append(data.to_uint8(x0))
    return runs.grid(torch.stack(cells, 1).flatten(0, 1).cpu(), len(cells))


def shared(trained: runs.Trained, s: ddpm.Schedule, model: ddpm.Model, args, where) -> Tensor:
    """Figure 7: for t = T, 3T/4, T/2, T/4 a row: x_t, then args.n samples that share it."""
    noise = runs.Noise(args.seed, [0], trained.shape, where.device)
    times = [max(1, round(s.T * part)) for part in (1, 0.75, 0.5, 0.25)]
    parents = {t: x_t for t, x_t, _ in ddpm.p_sample_loop(s, model, noise(), noise, **args.choices)
               if t in times}
    progress, cells = runs.Progress(sum(times), "steps", quiet=not where.chief), []
    for row, t in enumerate(times):
        names = [("shared", t, i) for i in range(args.n)]
        each = runs.Noise(args.seed, names, trained.shape, where.device)
        x_t = parents[t].expand(args.n, *trained.shape)
        for state in ddpm.p_sample_loop(s, model, x_t, each, start=t, **args.choices):
            progress.update(sum(times[:row]) + t - state.t)
        cells.append(data.to_uint8(torch.cat([parents[t], state.x_t])))
    return runs.grid(torch.cat(cells).cpu(), 1 + args.n)


def interpolation(trained: runs.Trained, s: ddpm.Schedule, model: ddpm.Model, args,
                  where) -> Tensor:
    """Figure 8: args.n rows: an image, its decodings mixed with another's (λ = 0 … 1), that one."""
    name = args.dataset or trained.settings.get("dataset")
    if not name:
        raise UsageError("--interpolate needs --dataset: the checkpoint names none")
    with where.chief_first():
        images = data.load(name, args.data_dir or trained.settings.get("data_dir", "data"), "test",
                           trained.settings["image_size"]).images
    if tuple(images.shape[1:]) != trained.shape:
        raise ValueError(f"the images of {name} are {tuple(images.shape[1:])}, the network's "
                         f"{trained.shape}")
    if args.n > len(images):
        raise ValueError(f"--n {args.n}: {name} has {len(images)} images to mix")
    start = int((s.times - args.time).abs()[1:].argmin()) + 1
    progress, rows = runs.Progress(args.n * start, "steps", quiet=not where.chief), []
    pick = torch.Generator().manual_seed(runs.seed_of(args.seed, "pairs"))
    pairs = torch.randint(len(images), (args.n, 2), generator=pick)
    for row, pair in enumerate(pairs):
        x0, other = data.to_model(images[pair]).to(where.device)[:, None]
        lam = torch.linspace(0, 1, 9, device=where.device)
        names = [("end", row, 0), ("end", row, 1)]
        ends = runs.Noise(args.seed, names, trained.shape, where.device)
        eps, eps_other = ends()[:, None]     # the same two draws for every λ
        fresh = runs.Noise(args.seed, [("row", row)], trained.shape, where.device)
        many = (len(lam), *trained.shape)
        for state in ddpm.interpolate(s, model, x0.expand(many), other.expand(many), lam, start,
                                      eps, eps_other, fresh, **args.choices):
            progress.update(row * start + start - state.t)
        rows.append(data.to_uint8(torch.cat([x0, state.x_t, other])))
    return runs.grid(torch.cat(rows).cpu(), len(lam) + 2)


def parse(argv):
    """The flags of sample.py."""
    parser = runs.Parser(__doc__)
    parser.add_argument("--checkpoint", help="a checkpoint.pt, its folder, a diffusers folder, a "
                        ".safetensors file or a hub name (default: the newest run)")
    parser.add_argument("--n", type=ranged(int, 1), help="images (64), or rows of a figure (8)")
    parser.add_argument("--batch-size", type=ranged(int, 1), help="images at a time (default: 256 "
                        "on CUDA, else 16)")
    parser.add_argument("--steps", type=ranged(int, 2), help="network calls an image, at times "
                        "evenly spaced from 1 to T (default: all T)")
    parser.add_argument("--variance", choices=("fixed_large", "fixed_small"),
                        help="σ_t² (default: as trained)")
    parser.add_argument("--seed", type=ranged(int, 0), default=0, help="other images (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help=".png, or .pt for a "
                        "uint8 tensor (default: samples.png)")
    parser.add_argument("--no-clip", action="store_true", help="leave x̂_0 as it is, as Algorithm "
                        "2 does; the authors' code clips it to [−1, 1]")
    parser.add_argument("--no-ema", action="store_true", help="the weights as trained, unaveraged")
    figure = parser.add_mutually_exclusive_group()
    for flag, function, what in (
            ("--progressive", progressive, "x̂_0 over time (Figure 6)"),
            ("--shared", shared, "samples that share x_t (Figure 7)"),
            ("--interpolate", interpolation, "between two images (Figure 8)")):
        figure.add_argument(flag, action="store_const", dest="figure", const=function, help=what)
    parser.add_argument("--time", type=ranged(int, 1), help="the t at which --interpolate encodes "
                        "(default: T/2)")
    parser.add_argument("--dataset", help="for --interpolate (default: the run's)")
    parser.add_argument("--data-dir", help="data sets and downloads (default: the run's, or data)")
    parser.machine_flags()
    args = parser.parse_args(argv)
    figure = args.figure
    if args.out.suffix not in (".png", ".pt") or (figure and args.out.suffix == ".pt"):
        raise UsageError(f"--out {args.out} must end in .png" + ("" if figure else " or .pt"))
    if figure is not interpolation and (args.time or args.dataset):
        raise UsageError("--time and --dataset go with --interpolate")
    args.n = args.n or (8 if figure else 64)
    return args, figure


@runs.command
def main(argv=None) -> int:
    """Sample images and write them: see the module's text."""
    args, figure = parse(argv)
    where = runs.machine(args.device, args.precision)
    trained = weights.load(args.checkpoint, args.data_dir or "data", not args.no_ema, where)
    settings = trained.settings
    if args.variance and settings["variance"] == "learned":
        raise UsageError("--variance: this network's variance is learned, and it has no other")
    if args.steps and settings["variance"] == "learned" and args.steps < settings["timesteps"]:
        raise UsageError("--steps: a network with learned variance is sampled with all its steps")
    if args.steps and args.steps > settings["timesteps"]:
        raise UsageError(f"--steps {args.steps} exceeds the network's T = {settings['timesteps']}")
    args.time = args.time or max(1, settings["timesteps"] // 2)
    if args.time > settings["timesteps"]:
        raise UsageError(f"--time {args.time} exceeds the network's T = {settings['timesteps']}")
    args.choices = {**trained.choices, "clip": not args.no_clip}
    if args.variance:
        args.choices["variance"] = args.variance
    if where.chief:
        runs.check_writable(args.out)
        print(f"{trained.source}, T = {settings['timesteps']}", file=sys.stderr)

    if figure:
        s = ddpm.respace(trained.schedule, args.steps or trained.schedule.T).to(where.device)
        with torch.no_grad():
            picture = figure(trained, s, runs.sampler(trained.net, where), args, where)
    else:
        batch = args.batch_size or (256 if where.device.type == "cuda" else 16)
        progress = runs.Progress(args.n, "samples", quiet=not where.chief)
        images = runs.draw_samples(trained, where, args.seed, args.n, batch, args.steps, progress,
                                   **args.choices)
        picture = runs.grid(images)
    if where.chief:
        if args.out.suffix == ".pt":
            with runs.written_aside(args.out) as part, open(part, "wb") as file:
                torch.save(images, file)
        else:
            runs.write_png(args.out, picture)
        print(f"{args.out} holds {args.n} " + ("row" if figure else "sample")
              + "s" * (args.n > 1), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
