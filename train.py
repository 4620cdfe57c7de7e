"""Algorithm 1: train ε_θ.

    python train.py --dataset cifar10                  the paper's settings, into runs/cifar10/
    python train.py --dataset cifar10                  the same command again resumes it
    python train.py --dataset shapes                   minutes on a CPU, no download
    torchrun --nproc-per-node 8 -- train.py            the same batches, spread over 8 GPUs

With the same data and batch size, the images, t and ε of step k depend only on the seed, on k and
on the kind of device; the dropout masks depend on the process, too. So a resumed run is the same as
an uninterrupted one to the bit, on the same machine and threads (on CUDA with --deterministic).
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

from support import data
from support.checkpoint import (Trained, build_schedule, load, load_checkpoint, save_checkpoint,
                                weights_hash)
from support.command import (Parser, Progress, UsageError, command, float_between, int_between,
                             locked, nonblank, path_of, positive_int, reading, say, seed, stop,
                             written)
from support.machine import Machine, seed_of, start_machine

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import ddpm
import sample
from unet import build_network

# === Settings =====================================================================================
# One line each: name, default, type and range, meaning. The defaults are the paper's CIFAR-10 run
# (§4, Appendix B); the warm-up and the gradient clipping are those of the released code; ema_ramp
# is in neither. To add a setting, add a line: flag, help and checkpoint follow. If it shapes the
# network, also list its name in `Trained.model_settings`.

SETTINGS = {
    "dataset": ("cifar10", nonblank, f"{', '.join(data.NAMES)}, a .pt file, a folder of pictures "
                "(of its train/, if test/ or val/ is beside it)"),
    "skip_bad": (False, bool, "go on without the pictures of a folder that cannot be read"),
    "image_size": (None, int_between(1, 4096), "side of a folder's pictures (256), of shapes (16)"),
    "flip": (True, bool, "mirror each image at random, with probability 1/2"),
    "steps": (800_000, positive_int, "training steps in all"),
    "batch_size": (128, int_between(1, 10 ** 6), "images in a step, summed over all processes"),
    "micro_batch": (None, positive_int, "images per forward pass; gradients are accumulated"),
    "lr": (2e-4, float_between(1e-12, 1000), "learning rate of Adam"),
    "warmup": (5000, int_between(0, 10 ** 9), "steps in which the learning rate rises from 0"),
    "decay": (0.0, float_between(0, 1), "the last part of --steps in which the rate falls to 0"),
    "grad_clip": (1.0, float_between(1e-12, 1e9), "maximum norm; larger gradients are rescaled"),
    "ema": (0.9999, float_between(0, 1), "decay of the averaged weights, which sampling uses"),
    "ema_ramp": (True, bool, "warm the EMA decay up: (1 + k)/(10 + k) in step k, at most --ema"),
    "dropout": (0.1, float_between(0, 0.99), "probability of dropout in each residual block"),
    "channels": (128, int_between(1, 4096), "width of the U-Net's first level, a multiple of 32"),
    "multipliers": ([1, 2, 2, 2], [int_between(1, 64)], "width of each level, times --channels"),
    "blocks": (2, int_between(1, 32), "residual blocks per level on the way down; up: one more"),
    "attention": ([16], [int_between(1, 4096)], "resolutions in pixels with self-attention; none "
                  "with --attention alone"),
    "timesteps": (1000, int_between(2, 10 ** 5), "T, the number of time steps"),
    "schedule": ("linear", nonblank, "linear, quadratic or constant β_t, see ddpm.make_schedule"),
    "beta_start": (1e-4, float_between(1e-12, 0.999), "β_1; multiplied by 1000/T if T is not 1000"),
    "beta_end": (0.02, float_between(1e-12, 0.999), "β_T; multiplied by 1000/T if T is not 1000"),
    "predict": ("eps", tuple(ddpm.PREDICTIONS), "what the network predicts: ε, x_0 or μ̃_t"),
    "variance": ("fixed_large", ddpm.VARIANCES, "σ_t²: β_t or β̃_t, or predicted by the network "
                 "(Table 2)"),
    "objective": ("simple", ("simple", "vlb"), "L_simple (Eq. 14), or the bound L (Eq. 5)"),
    "seed": (0, seed, "seed of all random numbers"),
    "log_every": (100, int_between(1, 10_000), "steps between two lines of log.jsonl"),
    "save_every": (5000, positive_int, "steps between two checkpoints"),
    "sample_every": (25_000, positive_int, "steps between two grids of samples"),
    "samples": (64, int_between(0, 10_000), "images in a grid; 0 draws no grids"),
    "sample_steps": (50, int_between(2, 10 ** 5), "network calls per image of a grid, at most T"),
    "keep": (None, positive_int, "steps between two files ema-*.pt with the averaged weights"),
}
RECIPES = {  # what differs for other data sets, and for images of 256×256 pixels or more
    "mnist": dict(flip=False),
    "fashion_mnist": dict(flip=False),
    "shapes": dict(steps=1600, batch_size=16, lr=5e-3, warmup=100, decay=0.6, ema=0.99,
                   dropout=0.0, channels=64, multipliers=[1, 1], blocks=1, attention=[],
                   timesteps=500, schedule="quadratic", variance="fixed_small", save_every=800,
                   sample_every=800, samples=16, sample_steps=50),
    # CelebA-HQ and LSUN (§4, Appendix B). LSUN took 1.2 to 2.4 million steps, and LSUN Bedroom was
    # not flipped. The released code's variance.
    "256×256": dict(multipliers=[1, 1, 2, 2, 4, 4], dropout=0.0, steps=500_000, batch_size=64,
                    lr=2e-5, variance="fixed_small", samples=16),
}
MAY_CHANGE = {"dataset", "skip_bad", "steps", "micro_batch", "log_every", "save_every",
              "sample_every", "samples", "sample_steps", "keep"}  # when a run is resumed
RESCUE = {"lr", "grad_clip", "warmup", "seed"}                    # only with --rescue

# === Algorithm 1 ==================================================================================

class Run(NamedTuple):
    """What a training run works with."""
    settings: dict
    images: Tensor                  # the data set, uint8
    net: nn.Module                  # with the parameters θ
    network: nn.Module              # net, wrapped in DDP and torch.compile
    model: ddpm.Model               # p_θ, with this network in the precision of the machine
    ema: nn.Module                  # with the averages of θ, which sampling uses
    adam: torch.optim.Adam
    scaler: torch.amp.GradScaler    # does nothing unless the precision is fp16
    machine: Machine
    folder: Path
    fingerprint: str                # of the images
    entries: list[dict]             # of log.jsonl

def training_step(run: Run, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lines 2 to 5 of the box, for step k = 0, 1, …; `train` repeats them.   [DDPM Alg. 1]

    Every process draws the whole batch and computes its share of it. Returns, for the log, the
    losses and times of the images of this process, and the norm of the gradient before clipping.
    """
    T, n, share = run.model.s.T, run.settings["batch_size"], run.machine.share
    draws = dict(generator=generator(run, k), device=run.machine.device)
    # 2: x_0 ~ q(x_0), mirrored with probability 1/2 (Appendix B)
    x0 = batch(run, k, torch.rand(n, **draws) < 0.5)
    # 3: t ~ Uniform({1, …, T})
    t = torch.randint(1, T + 1, (n,), **draws)[share]
    # 4: ε ~ N(0, I)
    eps = torch.randn(n, *run.images.shape[1:], **draws)[share]
    # 5: take a gradient descent step on ∇_θ ‖ε − ε_θ(√ᾱ_t x_0 + √(1 − ᾱ_t) ε, t)‖²
    losses = gradient(run, x0, t, eps)
    norm = descend(run, k)
    #    and average the weights (Appendix B)
    average(run, k)
    return losses, t, norm

def train(run: Run, step: int) -> int:
    """Algorithm 1 from `step` to the last step or a signal. Returns the completed steps."""
    settings, machine, records, seconds = run.settings, run.machine, [], 0.0
    progress = Progress(settings["steps"], "steps", step, quiet=not machine.is_main)
    run.network.train()

    def due(*names: str) -> bool:
        return step > 0 and any(settings[name] and step % settings[name] == 0 for name in names)

    stop.later = True  # a signal waits until a step is complete and saved
    while True:  # 1: repeat
        last = step >= settings["steps"]
        # The files of a step come after its checkpoint; a resumed run first writes what is missing.
        if machine.is_main and due("keep"):
            keep(run, step)
        if machine.is_main and (last or due("save_every")):
            plot_losses(run)
        if last or due("sample_every"):
            if stopped(machine):
                return step
            stop.later = False  # the step is saved, and drawing takes long
            try:
                draw_grid(run, step)
            except KeyboardInterrupt:
                return step
            stop.later = True
        if last:  # 6: until converged
            return step
        started = time.monotonic()
        torch.manual_seed(seed_of(settings["seed"], "dropout", step, machine.rank))
        records.append(training_step(run, step))  # 2 to 5
        step += 1
        ended = stopped(machine)
        saves = ended or step == settings["steps"] or due("save_every", "sample_every", "keep")
        if saves or progress.due() or due("log_every"):
            progress.update(step, f"loss {check(run, step, records):.4f}")
        seconds += time.monotonic() - started
        if saves or due("log_every"):
            log(run, step, records, seconds)
            records, seconds = [], 0.0
        if saves:
            save(run, step)
        if ended:
            return step

# === Its parts ====================================================================================

OBJECTIVES = {"simple": ddpm.loss_simple, "vlb": ddpm.loss_vlb}

def generator(run: Run, k: int) -> torch.Generator:
    """The random numbers of step k."""
    seed = seed_of(run.settings["seed"], "step", k)
    return torch.Generator(run.machine.device).manual_seed(seed)

def batch(run: Run, k: int, mirrored: Tensor) -> Tensor:
    """The x_0 of step k here: (B, C, H, W) in [−1, 1], mirrored where `mirrored` (n,) is true."""
    settings, images, share = run.settings, run.images, run.machine.share
    index = batch_indices(settings["seed"], len(images), k, len(mirrored), images.device)[share]
    x0 = data.to_model(images[index].to(run.machine.device))
    flip = mirrored[share, None, None, None]
    return torch.where(flip, x0.flip(3), x0) if settings["flip"] else x0

def gradient(run: Run, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """∇_θ of the mean loss, into the .grad of the parameters; returns the losses (B,).

    With --micro-batch gradients accumulate over parts; the processes exchange them after the last.
    """
    run.adam.zero_grad()
    loss_of, losses = OBJECTIVES[run.settings["objective"]], []
    parts = range(0, len(t), run.settings["micro_batch"] or len(t))
    for i in parts:
        part = slice(i, i + parts.step)
        waits = run.machine.world > 1 and i != parts[-1]
        with run.network.no_sync() if waits else contextlib.nullcontext():
            loss = loss_of(run.model, x0[part], t[part], eps[part])
            run.scaler.scale(loss.sum() / len(t)).backward()
        losses.append(loss.detach())
    return torch.cat(losses)

def descend(run: Run, k: int) -> Tensor:
    """A step of Adam, the gradient clipped as in the released code. Returns its norm before
    clipping."""
    run.scaler.unscale_(run.adam)
    norm = nn.utils.clip_grad_norm_(run.net.parameters(), run.settings["grad_clip"])
    run.adam.param_groups[0]["lr"] = learning_rate(run.settings, k)
    run.scaler.step(run.adam)
    run.scaler.update()
    return norm

def average(run: Run, k: int) -> None:
    """average ← average + (1 − decay) · (θ − average).   [DDPM Appendix B]"""
    update = get_ema_multi_avg_fn(ema_decay(run.settings, k))
    update(list(run.ema.parameters()), list(run.net.parameters()), k)
    for kept, now in zip(run.ema.buffers(), run.net.buffers()):  # are copied, not averaged
        kept.copy_(now)

def learning_rate(settings: dict, k: int) -> float:
    """lr · min(k / warmup, 1), as in the released code, which counts k from 0.

    With --decay it falls to 0 at the end, which is not in the paper, but helps short runs.
    """
    rise, fall = settings["warmup"], settings["decay"] * settings["steps"]
    return settings["lr"] * min(k / rise if rise else 1,
                                (settings["steps"] - k) / fall if fall else 1, 1)

def ema_decay(settings: dict, k: int) -> float:
    """min(decay, (1 + k)/(10 + k)) after step k, or the decay itself with --no-ema-ramp.

    A decay of 0.9999 averages over 10,000 steps, and a shorter run would mostly average its own
    beginning. The released code's decay is constant; this one reaches 0.9999 near step 90,000.
    """
    return min(settings["ema"], (1 + k) / (10 + k)) if settings["ema_ramp"] else settings["ema"]

@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int, device) -> Tensor:
    """The order of the n images in an epoch, drawn from (seed, epoch)."""
    generator = torch.Generator().manual_seed(seed_of(seed, "epoch", epoch))
    return torch.randperm(n, generator=generator).to(device)

def batch_indices(seed: int, n: int, k: int, batch: int, device="cpu") -> Tensor:
    """The images of step k. Each epoch is a new permutation of all n images; the epochs are
    concatenated, and step k takes the k-th slice."""
    first, last = k * batch, (k + 1) * batch
    return torch.cat([permutation(seed, e, n, device)[max(first - e * n, 0):last - e * n]
                      for e in range(first // n, (last - 1) // n + 1)])

def stopped(machine: Machine) -> bool:
    """Whether any process has received a signal; all agree on it at the same step."""
    agreed = torch.tensor(stop.number)
    if machine.world > 1:
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
    stop.number = max(stop.number, int(agreed))  # one that came meanwhile is for the next step
    return int(agreed) > 0

# === Checkpoint, log and grid =====================================================================

def check(run: Run, step: int, records: list[tuple]) -> float:
    """The mean loss of the last steps. ValueError if it, or the gradient, is not finite.

    records: what `training_step` returned since the last line of the log. With fp16 a step that is
    not finite leaves the weights as they are and halves the scale of the gradients; many such
    steps in a row drive the scale to 0. Reading the numbers waits for the device.
    """
    bad = lambda record: not (record[0].mean() + record[2]).isfinite()
    if run.scaler.get_scale() < 1e-4 if run.scaler.is_enabled() else bad(records[-1]):
        first = step - len(records) + 1 + [bad(record) for record in records].index(True)
        raise ValueError(f"step {first}: the loss or its gradient is not finite. To go on from the "
                         f"checkpoint in {run.folder}, if any, add --rescue and a lower --lr or "
                         "--grad-clip")
    return torch.cat([loss for loss, *_ in records[-100:]]).nanmean().item()

PARTS = ("net", "ema", "adam", "scaler")  # of the state, each with a state_dict

def save(run: Run, step: int) -> None:
    """Writes the checkpoint of this step."""
    state = {name: getattr(run, name).state_dict() for name in PARTS}
    state |= {"settings": run.settings, "step": step, "dtype": str(run.machine.dtype),
              "data": run.fingerprint}
    if run.machine.is_main:
        save_checkpoint(run.folder / "checkpoint.pt", state)

def keep(run: Run, step: int) -> None:
    """Writes the averaged weights to a file of their own, unless they are there, undamaged."""
    path = run.folder / f"ema-{step:07d}.pt"
    with contextlib.suppress(ValueError):
        load_checkpoint(path)
        return
    save_checkpoint(path, {"settings": run.settings, "step": step, "ema": run.ema.state_dict()})

def restore(run: Run, state: dict) -> int:
    """Continues from a checkpoint. Returns its step. ValueError if the images are others."""
    if state["data"] != run.fingerprint:
        raise ValueError(f"the images of {run.settings['dataset']} are not those with which the "
                         f"run in {run.folder} began (or it is of an older version, which compared "
                         f"them in another way): to train on with them give --init {run.folder} "
                         "and another --out")
    if state["dtype"] != str(run.machine.dtype) and run.machine.is_main:
        say(f"warning: this run was in {state['dtype']}, and goes on in {run.machine.dtype}")
    parameters, groups = list(run.net.parameters()), run.adam.state_dict()["param_groups"]
    for i, averages in state["adam"]["state"].items():
        if any(x.shape != parameters[i].shape for key, x in averages.items() if key != "step"):
            raise ValueError("Adam's averages are not those of this network")
    state["adam"]["param_groups"] = groups  # those of the code
    for name in PARTS:
        if state[name]:  # the scaler's is empty unless it is fp16's
            getattr(run, name).load_state_dict(state[name])
    return state["step"]

def note(run: Run, entry: dict) -> None:
    """Appends an entry to log.jsonl, flushed before the checkpoint that relies on it."""
    run.entries.append(entry)
    path = run.folder / "log.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # such as a full disk
        raise OSError(f"cannot write {path}: {error.strerror}") from error

def log(run: Run, step: int, records: list[tuple], seconds: float) -> None:
    """Appends the means of the records, over the images of all processes, to log.jsonl."""
    settings, s, n = run.settings, run.model.s, run.settings["batch_size"]
    losses, t, norm = (torch.stack(x, -1) for x in zip(*records))
    losses, t, norm = run.machine.gather(losses, n), run.machine.gather(t, n), norm.cpu()
    losses, t, norm = (x[..., norm.isfinite()] for x in (losses, t, norm))  # fp16 skips the others
    thirds = [losses[(t - 1) * 3 // s.T == i] for i in range(3)]
    mean, *means, norms = (x.mean().item() if x.numel() else None for x in (losses, *thirds, norm))
    entry = {"step": step, "loss": mean, "loss_thirds": means,
             "lr": learning_rate(settings, step - 1), "grad_norm": norms,
             "grad_norm_max": norm.max().item() if len(norm) else None,
             "images_per_s": round(len(records) * n / max(seconds, 1e-9), 3)}
    if settings["objective"] == "vlb" and len(norm):  # an estimate of L, in bits/dim
        some = data.to_model(run.images[:64])
        L_T = ddpm.bits_per_dim(ddpm.prior_kl(s, some.to(s.betas.device)), some).mean().item()
        entry["bound"] = s.T * mean + L_T
    if run.machine.is_main:
        note(run, entry)

def log_entries(folder: Path) -> list[dict]:
    """The entries of log.jsonl. Skips lines that are not valid, as a kill may leave one."""
    path, entries = folder / "log.jsonl", []
    for line in path.read_text("utf-8-sig", "replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            entry = json.loads(line)
            if entry["step"] > 0:
                entries.append(entry)
    return entries

def plot_losses(run: Run) -> None:
    """loss.png: the loss of log.jsonl over the steps, and that of each third of t; log axes."""
    folder, entries = run.folder, [entry for entry in run.entries if "loss_thirds" in entry]

    def draw(axes) -> None:
        losses = zip(*(entry["loss_thirds"] + [entry["loss"]] for entry in entries))
        for values, name in zip(losses, ("t ≤ T/3", "T/3 < t ≤ 2T/3", "t > 2T/3", "all t")):
            axes.plot([entry["step"] for entry in entries], values, label=name)
        axes.set(xscale="log", yscale="log", xlabel="step", ylabel="loss")
        axes.legend()
    if len(entries) > 1:
        data.plot(folder / "loss.png", draw)

def draw_grid(run: Run, step: int) -> None:
    """Samples with the averaged weights, unless they are there: the same noise in every grid."""
    settings, machine, n = run.settings, run.machine, run.settings["samples"]
    path = run.folder / f"samples-{step:07d}.png"
    blank = torch.zeros(n, *run.images.shape[1:], dtype=torch.uint8)
    if n and not data.is_png(path, data.tiled(blank).shape):
        images = sample.draw_samples(
            Trained(run.ema, run.model.s, settings, ""), n, settings["seed"], 32, machine,
            Progress(n, "samples", quiet=not machine.is_main),
            steps=min(settings["sample_steps"], run.model.s.T))
        if machine.is_main:
            with written(path) as file:
                file.write(data.png(data.tiled(images)))
            say(f"{path} shows {n} samples")

# === The command ==================================================================================

def parse(argv) -> dict:
    """The flags that were given. A setting that was not given has no entry, because its default
    depends on the data and the checkpoint."""
    recipes = (f"For {name} the defaults differ: " + ", ".join(
        f"{key} {value}" for key, value in recipe.items()) for name, recipe in RECIPES.items())
    parser = Parser(__doc__, "--data-dir", "--device", "--precision", "--compile", epilog="\n".join(
        textwrap.fill(text, 98) for text in recipes))
    for name, (default, kind, meaning) in SETTINGS.items():
        options = ({"action": argparse.BooleanOptionalAction} if kind is bool else
                   {"choices": kind} if isinstance(kind, tuple) else
                   {"nargs": "*", "type": kind[0]} if isinstance(kind, list) else {"type": kind})
        text = meaning if default is None else f"{meaning} (default: {default})"
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=text,
                            **options)
    parser.add_argument("--out", type=path_of, help="folder of the run (default: runs/DATASET)")
    parser.add_argument("--init", type=nonblank, default=argparse.SUPPRESS, help="start from these "
                        "weights (whatever sample.py --checkpoint accepts)")
    parser.add_argument("--rescue", action="store_true", help="go on from the checkpoint with "
                        f"another {', '.join('--' + x.replace('_', '-') for x in sorted(RESCUE))}")
    parser.add_argument("--deterministic", action="store_true",
                        help="bit-identical results on CUDA too, at some loss of speed")
    return vars(parser.parse_args(argv))

def defaults(name: str, side: int) -> dict:
    """The settings of a new run without further flags: the paper's, or those of a recipe."""
    recipe = RECIPES.get("256×256" if side >= 256 else name, {})
    return {key: default for key, (default, *_) in SETTINGS.items()} | recipe | {"init": None}

def settle(base: dict, given: dict, shape: tuple[int, int, int]) -> dict:
    """The settings of the run: `base`, changed by the flags that were given.

    base: the checkpoint's settings, or for a new run the defaults and those of --init. shape: C, H,
    W of an image. UsageError if settings contradict each other or the images.
    """
    c, height, width = shape
    settings = base | {key: value for key, value in given.items() if key in (*SETTINGS, "init")} | {
        "in_channels": c, "image_size": height}
    levels = [height // 2 ** level for level in range(len(settings["multipliers"]))]
    if unknown := set(given.get("attention", [])) - set(levels):
        raise UsageError(f"--attention {min(unknown)}: no level of the U-Net has that resolution")
    settings["attention"] = [side for side in settings["attention"] if side in levels]
    if not levels:
        raise UsageError("--multipliers needs one number per level")
    if settings["variance"] == "learned" and settings["objective"] == "simple":
        raise UsageError("--variance learned needs --objective vlb: L_simple does not depend on it")
    if settings["ema"] == 1 and not settings["ema_ramp"]:
        raise UsageError("--ema 1 --no-ema-ramp: the average would keep the first weights for ever")
    if settings["channels"] % 32:
        raise UsageError(f"--channels {settings['channels']}: must be a multiple of 32")
    if height != width or given.get("image_size", height) != height:
        raise UsageError(f"{settings['dataset']} has images of {height}×{width}: they must be "
                         "squares, and of --image-size")
    return settings

def decide(given: dict, shape: tuple, stored: dict, machine: Machine) -> tuple:
    """Settings, schedule and network of a run, from its flags, the shape of an image and, if it is
    resumed, the checkpoint's settings. UsageError or ValueError for invalid flags."""
    init = load(given["init"], machine=machine) if given.get("init") and not stored else None
    name = given.get("dataset", SETTINGS["dataset"][0])
    own = init.model_settings if init else {}
    settings = settle(defaults(name, shape[1]) | own | stored, given, shape)
    for key, value in own.items():
        if settings[key] != value:
            raise UsageError(f"--init has {key} {value}, not {settings[key]}")
    if settings["batch_size"] % machine.world:
        raise UsageError(f"--batch-size {settings['batch_size']} cannot be shared evenly by "
                         f"{machine.world} processes")
    try:
        s = build_schedule(settings).to(machine.device)
    except ValueError as error:
        raise UsageError(f"--schedule, --timesteps, --beta-start, --beta-end: {error}") from error
    if settings["image_size"] % 2 ** (n := len(settings["multipliers"]) - 1):
        raise UsageError(f"--image-size {settings['image_size']} cannot be halved {n} times, as "
                         f"{n + 1} --multipliers ask")
    torch.manual_seed(seed_of(settings["seed"], "init"))
    net = build_network(settings)
    if init:
        net.load_state_dict(init.net.state_dict())
    return settings, s, net

def begin(decided: tuple, images: Tensor, machine: Machine, folder: Path) -> Run:
    """The run that `decide` has decided, before its first step."""
    settings, s, net = decided
    net = machine.placed(net)
    network = nn.parallel.DistributedDataParallel(net) if machine.world > 1 else net
    part = settings["batch_size"] // machine.world
    part = min(part, settings["micro_batch"] or part)
    cuda = machine.device.type == "cuda"
    network = machine.compiled(network, part, *images.shape[1:], default=cuda)
    fingerprint = data.fingerprint(images)
    if cuda and images.nbytes < torch.cuda.mem_get_info()[0] / 4:
        images = images.to(machine.device)
    adam = torch.optim.Adam(net.parameters(), fused=machine.device.type != "mps")
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    model = ddpm.Model(s, machine.network(network), settings["predict"], settings["variance"],
                       clip=False)  # clipping is for sampling only
    return Run(settings, images, net, network, model, ema, adam, scaler, machine, folder,
               fingerprint, [])

def prepare(run: Run, step: int) -> None:
    """The run's folder: settings.json, no leftovers of a kill, no line of the log after `step`."""
    for leftover in run.folder.glob(".*.part"):
        leftover.unlink()
    with written(run.folder / "settings.json") as file:
        file.write((json.dumps(run.settings, indent=2) + "\n").encode())
    run.entries[:] = [entry for entry in log_entries(run.folder) if entry["step"] <= step]
    with written(run.folder / "log.jsonl") as file:
        file.writelines(f"{json.dumps(entry)}\n".encode() for entry in run.entries)

def describe(run: Run, step: int, about: str) -> None:
    """Prints what will be trained, with all settings."""
    settings, machine = run.settings, run.machine
    say(f"{settings['dataset']}, {about}: {len(run.images):,} images of "
        f"{'×'.join(map(str, run.images.shape[1:]))}; network of "
        f"{sum(p.numel() for p in run.net.parameters()):,} parameters; {machine.device} in "
        f"{str(machine.dtype)[6:]}; processes: {machine.world}")
    text = ", ".join(f"{name} {value}" for name, value in settings.items())
    say(textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="  "))
    if settings["channels"] * max(settings["multipliers"]) == 32:
        say("warning: 32 channels in every level: each group of the normalisation is one channel, "
            "and the network cannot see t")
    if step >= settings["steps"]:
        say(f"{run.folder} has done all its {step} steps; " + (
            f"its learning rate has fallen to 0: train on with --init {run.folder} and another "
            "--out" if settings["decay"] else "give a larger --steps to continue"))
    elif settings["steps"] < settings["warmup"]:
        say(f"warning: the learning rate rises for --warmup {settings['warmup']} steps, longer "
            "than the whole run")

@command
def main(argv=None) -> int:
    """Trains, or resumes training: see the text at the head of this file."""
    given = parse(argv)
    name = given.get("dataset", SETTINGS["dataset"][0])
    folder = given["out"] or Path("runs", Path(name.removesuffix(".pt")).resolve().name)
    if Path(name).is_dir() and folder.resolve().is_relative_to(Path(name).resolve()):
        raise UsageError(f"--out {folder} lies in {name}: its grids would become pictures of the "
                         "data set: give an --out elsewhere")
    if given.get("skip_bad") and not Path(name).is_dir():
        raise UsageError("--skip-bad has no effect: --dataset is no folder of pictures")
    machine = start_machine(given["device"], given["precision"], given["compile"])
    machine.agree("command line", given)
    if given["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    path = folder / "checkpoint.pt"
    with locked(folder) if machine.is_main else contextlib.nullcontext():
        state = load_checkpoint(path) if path.exists() else {}
        if state and "adam" not in state:
            raise ValueError(f"{path} has weights alone, and no run to resume: to start from them "
                             f"give --init {folder} and another --out")
        stored = state.get("settings", {})
        changes = {key: given[key] for key in stored.keys() & given.keys()
                   if given[key] != stored[key]}
        for key in changes.keys() - MAY_CHANGE - (RESCUE if given["rescue"] else set()):
            raise UsageError(f"this run has --{key.replace('_', '-')} {stored[key]}, not "
                             f"{given[key]}: give a new run another --out")
        if given["rescue"] and not state:
            raise UsageError(f"--rescue: there is no {path} to go on from")
        if state and given.get("steps", state["step"]) < state["step"]:
            raise UsageError(f"--steps {given['steps']}: this run has done {state['step']}")
        if "steps" in changes and state["step"] > (1 - stored["decay"]) * stored["steps"]:
            raise UsageError("--steps: the learning rate of this run has begun to fall (--decay), "
                             f"and would jump up: give --init {folder} and another --out")
        later = f"{state['step']:07d}" if state else ""
        for file in [*folder.glob("ema-[0-9]*.pt"), *folder.glob("samples-[0-9]*.png")]:
            if file.stem.split("-")[1] > later:
                raise ValueError(f"{file} is of a later step than the checkpoint, if any: give "
                                 "another --out, or delete it")
        known = {"dataset": name, "image_size": None, "skip_bad": False, **stored, **given}
        shape = data.shape(known["dataset"], known["image_size"])
        decided = decide(given, shape, stored, machine)  # before hours of decoding
        with machine.main_first():
            images, about = data.load(known["dataset"], known["data_dir"], "train",
                                      known["image_size"], known["skip_bad"])
        run, step = begin(decided, images, machine, folder), 0
        if state:
            with reading(path, "the state of this run"):
                step = restore(run, state)
        now = Trained(run.net, run.model.s, run.settings, "")
        machine.agree("settings, weights or data", step, run.settings, run.fingerprint,
                      lambda: weights_hash(now).hex())
        if machine.is_main:
            prepare(run, step)
            if rescued := {key: changes[key] for key in RESCUE & changes.keys()}:
                note(run, {"step": step, "rescued": rescued})
            describe(run, step, about)
        step = train(run, step)
    if stop.number:
        if machine.is_main:
            say(f"stopped at step {step}; the same command resumes")
        return 128 + stop.number
    return 0

if __name__ == "__main__":
    sys.exit(main())
