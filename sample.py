"""Algorithm 2: sample from a trained network.

    python sample.py --n 64                            averaged weights of the newest run
    python sample.py --n 50000 --out samples.pt        a uint8 tensor (n, C, H, W)
    python sample.py --n 50000 --out samples/          a folder with one PNG for each image
    python sample.py --steps 50                        50 network calls per image instead of T
    python sample.py --steps 50 --sampler ddim         DDIM's steps instead of Algorithm 2's
    python sample.py --progressive                     x̂_0 over time, one row per image (Figure 6)
    python sample.py --shared                          samples that share x_t (Figure 7)
    python sample.py --interpolate                     between images of the data set (Figure 8)
    torchrun --nproc-per-node 8 -- sample.py --n 50000 --out samples.pt          on 8 GPUs

With the same network and flags, image i depends only on the seed and on i: batch size, number of
images, processes and device change it by the network's rounding errors only. The same command again
continues an unfinished folder.
"""
from __future__ import annotations

import functools
import io
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

from support import data
from support.checkpoint import Trained, inference_model, load, weights_hash
from support.command import (Parser, Progress, UsageError, command, float_between, locked, nonblank,
                             path_of, positive_int, reading, say, written)
from support.machine import Machine, Noise, seed_of, start_machine

import torch
from torch import Tensor

import ddpm

# === Algorithm 2 on batches =======================================================================

class Sampler(NamedTuple):
    """How samples are drawn."""
    model: ddpm.Model
    loop: Callable[..., Iterator[ddpm.State]]   # loop(model, x, noise, start=None)
    about: str                                  # the same in words

def choose_sampler(trained: Trained, steps: int | None = None, sampler: str | None = None,
                   eta: float | None = None, variance: str | None = None,
                   clip: bool | None = None) -> Sampler:
    """`ddpm.p_sample_loop` ("ddpm", Algorithm 2) or `ddpm.ddim_loop` ("ddim"), with its choices.

    steps: network calls per image, T by default. sampler: by default Algorithm 2. With fewer steps
    and no `variance` it is DDIM, unless the network was trained with σ_t² = β̃_t: noise of variance
    β_t would remain visible, and a learned variance fits its own steps only. variance, clip: by
    default as trained. UsageError for choices that exclude each other.
    """
    T, learned = trained.s.T, trained.settings["variance"] == "learned"
    steps = T if steps is None else steps
    if steps != T and not 2 <= steps <= T:
        raise UsageError(f"--steps {steps}: choose from 2 to the network's T = {T}")
    if sampler not in (None, "ddpm", "ddim"):
        raise UsageError(f"no sampler is called {sampler!r}: choose ddpm or ddim")
    if learned and (variance or sampler == "ddpm" and steps < T):
        raise UsageError("a learned variance needs all T steps: omit --variance, and use --sampler "
                         "ddim with fewer --steps")
    s = ddpm.respace(trained.s, steps)
    if sampler is None:
        noisy = s.T < T and not variance and trained.settings["variance"] != "fixed_small"
        sampler = "ddim" if noisy or eta is not None else "ddpm"
    if (sampler == "ddpm" and eta is not None) or (sampler == "ddim" and variance):
        raise UsageError("--eta goes with --sampler ddim, --variance with --sampler ddpm")
    model = trained.model
    model = replace(model, s=s, variance=variance or model.variance,
                    clip=model.clip if clip is None else clip)
    calls = f"{s.T} network calls per image" + ("" if model.clip else ", x̂_0 not clipped")
    if sampler == "ddim":
        eta = eta or 0.0
        return Sampler(model, functools.partial(ddpm.ddim_loop, eta=eta),
                       f"DDIM with η = {eta:g}, {calls}")
    return Sampler(model, ddpm.p_sample_loop, f"Algorithm 2 with σ_t² {model.variance}, {calls}")

@torch.no_grad()
def draw_batches(trained: Trained, sampler: Sampler, indices: Sequence[int], seed: int = 0,
                 batch_size: int | None = None, machine: Machine | None = None,
                 progress: Progress | None = None) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Yields batches of the images with these numbers: numbers, uint8 (B, C, H, W) on the CPU.

    Under torchrun each process computes a part of each batch, and all of them get all images.
    """
    machine = machine or start_machine(str(next(trained.net.parameters()).device))
    model, loop, _ = sampler
    share = min(batch_size or (256 if machine.device.type == "cuda" else 16),
                -(-len(indices) // machine.world)) or 1
    size, model = machine.world * share, inference_model(model, machine, share, *trained.shape)
    for i in range(0, len(indices), size):
        batch = indices[i:i + size]
        # A network is compiled for one shape: image 0 fills up the last batch.
        filled = [*batch, *[0] * (size - len(batch))] if machine.compiles else batch
        noise = Noise(seed, filled[machine.share], trained.shape, machine.device)
        for t, x_t, _ in loop(model, noise(0), noise):  # line 1: noise(0) is x_T
            if progress:
                progress.update(i + len(batch) * (1 - t / model.s.T))
        yield batch, machine.gather(data.to_uint8(x_t), len(filled))[:len(batch)]

def draw_samples(trained: Trained, n: int, seed: int = 0, batch_size: int | None = None,
                 machine: Machine | None = None, progress: Progress | None = None,
                 **how) -> Tensor:
    """Images 0 … n − 1 of a seed: uint8 (n, C, H, W) on the CPU. how: as in `choose_sampler`."""
    batches = draw_batches(trained, choose_sampler(trained, **how), range(n), seed, batch_size,
                           machine, progress)
    return torch.cat([images for _, images in batches])

# === The figures ==================================================================================

def progressive(trained: Trained, sampler: Sampler, args, machine) -> Tensor:
    """Figure 6: a row is x̂_0(x_t) at eleven times from T to 1, and x_0 at its end."""
    model, loop, _ = sampler
    s, noise = model.s, Noise(args.seed, range(args.n), trained.shape, machine.device)
    shown = {round(t) for t in torch.linspace(s.T, 1, min(11, s.T)).tolist()} | {0}
    progress, columns = Progress(s.T, "steps", quiet=not machine.is_main), []
    for t, _, x0_hat in loop(model, noise(), noise):
        progress.update(s.T - t)
        if t in shown:
            columns.append(data.to_uint8(x0_hat).cpu())
    return data.tiled(torch.stack(columns, 1).flatten(0, 1), len(columns))

def shared(trained: Trained, sampler: Sampler, args, machine) -> Tensor:
    """Figure 7: a row is x_t, and then samples that share it, for t = T, 3T/4, T/2 and T/4."""
    model, loop, _ = sampler
    if getattr(loop, "keywords", {}).get("eta") == 0:
        raise UsageError("--shared: DDIM with η = 0 draws one image from each x_t; give --eta or "
                         "--sampler ddpm")
    s, noise = model.s, Noise(args.seed, [0], trained.shape, machine.device)
    times = [t for t in {round(s.T * part): 0 for part in (1, 0.75, 0.5, 0.25)} if t > 1]
    x = {t: x_t for t, x_t, _ in loop(model, noise(), noise) if t in times}
    progress, done, rows = Progress(sum(times), "steps", quiet=not machine.is_main), 0, []
    for t in times:
        names = [("shared", t, i) for i in range(args.n)]
        own = Noise(args.seed, names, trained.shape, machine.device)
        for state in loop(model, x[t].expand(args.n, *trained.shape), own, start=t):
            progress.update(done + t - state.t)
        done += t
        rows.append(data.to_uint8(torch.cat([x[t], state.x_t])).cpu())
    return data.tiled(torch.cat(rows), 1 + args.n)

def interpolation(trained: Trained, sampler: Sampler, args, machine) -> Tensor:
    """Figure 8: a row is an image, decoded mixtures for λ = 0, ⅛, …, 1, and the other image."""
    (model, loop, _), name = sampler, args.dataset or trained.settings.get("dataset")
    if not name:
        raise UsageError("--interpolate needs --dataset: the checkpoint names none")
    with machine.main_first():
        images, _ = data.load(name, args.data_dir, "test", trained.settings["image_size"],
                              trained.settings.get("skip_bad", False))
    if tuple(images.shape[1:]) != trained.shape:
        raise ValueError(f"the images of {name} are {tuple(images.shape[1:])}, the network's "
                         f"{trained.shape}")
    start = int((model.s.times - (args.time or trained.s.T // 2)).abs()[1:].argmin()) + 1
    progress, rows = Progress(args.n * start, "steps", quiet=not machine.is_main), []
    pick = torch.Generator().manual_seed(seed_of(args.seed, "pairs"))
    for row, pair in enumerate(torch.randint(len(images), (args.n, 2), generator=pick)):
        x0, other = data.to_model(images[pair]).to(machine.device)[:, None]
        lam = torch.linspace(0, 1, 9, device=machine.device)
        ends = [("end", row, 0), ("end", row, 1)]
        own = Noise(args.seed, [("row", row)], trained.shape, machine.device)
        many = (len(lam), *trained.shape)  # the same noise for every λ
        noise = lambda t, own=own, many=many: own(t).expand(many)
        eps, eps_other = (
            z.expand(many) for z in Noise(args.seed, ends, trained.shape, machine.device)())
        for state in ddpm.interpolate(model, x0.expand(many), other.expand(many), lam, start, eps,
                                      eps_other, noise, loop):
            progress.update(row * start + start - state.t)
        rows.append(data.to_uint8(torch.cat([x0, state.x_t, other])).cpu())
    return data.tiled(torch.cat(rows), len(lam) + 2)

# === The command ==================================================================================

COMMON = "checkpoint no_ema steps no_clip seed device precision n sampler variance eta out "
READS = {  # what is drawn → the flags that matter to it
    "samples": COMMON + "batch_size compile",
    "--progressive": COMMON + "figure", "--shared": COMMON + "figure",
    "--interpolate": COMMON + "figure data_dir time dataset"}

def parse(argv):
    """The flags of sample.py."""
    parser = Parser(__doc__, "--checkpoint", "--no-ema", "--data-dir", "--steps", "--no-clip",
                    "--seed", "--batch-size", "--device", "--precision", "--compile")
    parser.add_argument("--n", type=positive_int, help="how many images (default: 64); rows of "
                        "Figures 6 and 8, samples in a row of Figure 7 (default: 8)")
    parser.add_argument("--sampler", choices=("ddpm", "ddim"), help="Algorithm 2, or DDIM's steps "
                        "(default: ddpm; with fewer steps than T, ddim for a network trained with "
                        "fixed_large, unless --variance is given)")
    parser.add_argument("--variance", choices=("fixed_large", "fixed_small"),
                        help="σ_t² of Algorithm 2: β_t or β̃_t (default: as trained)")
    parser.add_argument("--eta", type=float_between(0, 1), help="η of DDIM (default: 0)")
    parser.add_argument("--out", type=path_of, default=Path("samples.png"), help="a .png file, a "
                        ".pt file for a uint8 tensor, or a folder for PNGs (default: samples.png)")
    figure = parser.add_mutually_exclusive_group()
    for flag, function, what in (
            ("--progressive", progressive, "Figure 6: x̂_0 over time"),
            ("--shared", shared, "Figure 7: samples that share x_t"),
            ("--interpolate", interpolation, "Figure 8: mixtures of two images")):
        figure.add_argument(flag, action="store_const", dest="figure", const=function, help=what)
    parser.add_argument("--time", type=positive_int, help="the t at which --interpolate encodes "
                        "the images (default: T/2)")
    parser.add_argument("--dataset", type=nonblank, help="of --interpolate (default: the run's)")
    names = {None: "samples", progressive: "--progressive", shared: "--shared",
             interpolation: "--interpolate"}
    args = parser.parse_mode(argv, lambda args: names[args.figure], READS)
    if args.out.suffix not in ((".png",) if args.figure else (".png", ".pt", "")):
        raise UsageError(f"--out {args.out}: " + ("a figure is a .png file" if args.figure else
                         "it must end in .png or .pt, or be a folder without a dot in its name"))
    if (args.out / "checkpoint.pt").exists():
        raise UsageError(f"--out {args.out} is the folder of a run: give another")
    args.n = args.n or (8 if args.figure else 64)
    return args

@command
def main(argv=None) -> int:
    """Samples images and writes them: see the text at the head of this file."""
    args = parse(argv)
    machine = start_machine(args.device, args.precision, args.compile)
    machine.agree("command line", {**vars(args), "figure": str(args.figure)[:20]})
    trained = load(args.checkpoint, not args.no_ema, machine)
    machine.agree("weights", lambda: weights_hash(trained).hex())
    if args.time and args.time > trained.s.T:
        raise UsageError(f"--time {args.time} exceeds the network's T = {trained.s.T}")
    sampler = choose_sampler(trained, args.steps, args.sampler, args.eta, args.variance,
                             False if args.no_clip else None)
    if machine.is_main:
        say(f"{trained.source}, T = {trained.s.T}: {sampler.about}")
    if not args.out.suffix:
        with locked(args.out) if machine.is_main else nullcontext():
            draw_folder(trained, sampler, args, machine)
    else:  # the file is opened before the work, and only the main process writes it
        with written(args.out) if machine.is_main else nullcontext(io.BytesIO()) as file:
            if args.figure:
                sampler = sampler._replace(model=inference_model(sampler.model, machine))
                with torch.no_grad():
                    picture = args.figure(trained, sampler, args, machine)
            else:
                progress = Progress(args.n, "samples", quiet=not machine.is_main)
                batches = draw_batches(trained, sampler, range(args.n), args.seed, args.batch_size,
                                       machine, progress)
                picture = torch.cat([images for _, images in batches])
            if args.out.suffix == ".pt":
                torch.save(picture, buffer := io.BytesIO())
                file.write(buffer.getbuffer())
            else:
                file.write(data.png(picture if args.figure else data.tiled(picture)))
    if machine.is_main:  # a folder may have more, of an earlier command
        n = args.n if args.out.suffix else len([*args.out.glob("[0-9]*.png")])
        say(f"{args.out} holds {n} {'row' if args.figure else 'sample'}{'s' * (n > 1)}")
    return 0

def draw_folder(trained: Trained, sampler: Sampler, args, machine: Machine) -> None:
    """A PNG for each image. Keeps what is there if samples.json records the same settings."""
    machine.agree("samples that are there", lambda: sorted(args.out.glob("*.png")))
    note, about = args.out / "samples.json", {
        "weights": weights_hash(trained).hex(), "seed": args.seed, "sampler": sampler.about,
        "precision": str(machine.dtype)}
    missing = [i for i in range(args.n)
               if not data.is_png(args.out / f"{i:06d}.png", trained.shape)]
    if machine.is_main and any(args.out.glob("[0-9]*.png")):
        if not note.exists():
            raise ValueError(f"{args.out} has pictures, and no samples.json that says what they "
                             "are: give another --out")
        with reading(note, "the note of these samples"):
            if json.loads(note.read_bytes()) != about:
                raise ValueError("the folder holds samples with other settings or weights: "
                                 "give another --out")
    elif machine.is_main:
        with written(note) as file:
            file.write(json.dumps(about).encode())
    progress = Progress(len(missing), "samples", quiet=not machine.is_main)
    for batch, images in draw_batches(trained, sampler, missing, args.seed, args.batch_size,
                                      machine, progress):
        for i, image in zip(batch, images) if machine.is_main else ():
            with written(args.out / f"{i:06d}.png") as file:
                file.write(data.png(image))

if __name__ == "__main__":
    sys.exit(main())
