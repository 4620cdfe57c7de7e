"""Algorithm 1: train ε_θ.

    python train.py --dataset cifar10                  the paper's settings, into runs/cifar10/
    python train.py --dataset cifar10                  the same command again resumes it
    python train.py --dataset shapes                   minutes on a CPU, no download
    python train.py --dataset shapes --help            every setting, with its value for shapes
    torchrun --nproc-per-node 8 train.py               the same batches, spread over 8 GPUs

The images, t and ε of step k depend only on the seed and on k; the dropout masks depend on the
process, too. So a resumed run is bit-identical to an uninterrupted one on the same machine with the
same number of threads (on CUDA with --deterministic).
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
from pathlib import Path

import common  # before torch, because it silences a warning of torch's import

import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import ddpm
import sample
import unet
import weights
from common import UsageError, seed_of
from data import say

# === Settings =====================================================================================
# The defaults are the paper's CIFAR-10 run (§4, Appendix B). The warm-up and the clipping are those
# of the released code. ema_ramp is in neither. RECIPES lists what differs for other data sets.

SETTINGS = {
    # name: (default, meaning); common.KINDS has the types and ranges
    "dataset": ("cifar10", f"{', '.join(data.NAMES)}, a .pt file or a folder of pictures"),
    "data_dir": ("data", "folder of the data sets, and of downloads"),
    "image_size": (None, "side in pixels, for a folder of pictures (256) or shapes (16)"),
    "flip": (True, "mirror each image at random, with probability 1/2"),
    "steps": (800_000, "training steps in all"),
    "batch_size": (128, "images in a step, summed over all processes"),
    "micro_batch": (None, "images computed at a time, to save memory: the same step, except "
                    "for rounding and dropout's masks"),
    "lr": (2e-4, "learning rate of Adam"),
    "warmup": (5000, "steps in which the learning rate rises from 0"),
    "clip": (1.0, "largest norm of the gradient; larger ones are scaled down"),
    "ema": (0.9999, "decay of the averaged weights, which sampling uses"),
    "ema_ramp": (True, "start the decay at 0.1 and raise it to --ema; without it the decay is "
                 "constant, as in the released code"),
    "dropout": (0.1, "probability of dropout in each residual block"),
    "channels": (128, "width of the U-Net's first level, a multiple of 32"),
    "multipliers": ([1, 2, 2, 2], "width of each level of the U-Net, as a multiple of --channels"),
    "blocks": (2, "residual blocks in each level on the way down (one more on the way up)"),
    "attention": ([16], "resolutions in pixels with self-attention"),
    "timesteps": (1000, "T, the number of time steps"),
    "schedule": ("linear", "β_t from beta_start to beta_end in equal steps of β (linear) or of √β "
                 "(quadratic), or always beta_end"),
    "beta_start": (1e-4, "β_1; multiplied by 1000/T if T is not 1000"),
    "beta_end": (0.02, "β_T; multiplied by 1000/T if T is not 1000"),
    "predict": ("eps", "what the network predicts: ε (eps), x_0 (x0), μ̃_t (mean); §3.2, Table 2"),
    "variance": ("fixed_large", "σ_t²: β_t (fixed_large), β̃_t (fixed_small), or predicted by the "
                 "network (learned); §3.2, Table 2"),
    "objective": ("simple", "L_simple (simple; Eq. 14), or the bound L (vlb; Eq. 5)"),
    "seed": (0, "seed of all random numbers"),
    "log_every": (100, "steps between two lines of log.jsonl"),
    "save_every": (5000, "steps between two checkpoints"),
    "sample_every": (25_000, "steps between two grids of samples"),
    "samples": (64, "images in a grid; 0 draws no grids"),
    "sample_steps": (None, "network calls for each image of a grid (default: what a tenth of the "
                     "training time so far allows, ten at least)"),
    "keep": (None, "steps between two files with the averaged weights (default: only checkpoint.pt "
             "has them)"),
}
RECIPES = {
    "mnist": dict(flip=False),
    "fashion_mnist": dict(flip=False),
    "shapes": dict(steps=2000, batch_size=32, lr=1e-3, warmup=100, ema=0.998, dropout=0.0,
                   channels=64, multipliers=[1, 2], blocks=1, attention=[8], variance="fixed_small",
                   save_every=500, sample_every=500, samples=36, sample_steps=100),
}
# CelebA-HQ and LSUN, 256×256 (§4, Appendix B). LSUN took 1.2 to 2.4 million steps, and LSUN Bedroom
# was not flipped. The variance is that of the released code.
RECIPE_256 = dict(multipliers=list(unet.SETTINGS_256["multipliers"]), dropout=0.0, steps=500_000,
                  batch_size=64, lr=2e-5, variance="fixed_small", samples=16)
MAY_CHANGE = {"data_dir", "steps", "log_every", "save_every", "sample_every", "samples",
              "sample_steps", "keep"}  # when a run is resumed

# === Algorithm 1 ==================================================================================

def training_step(settings: dict, s: ddpm.Schedule, images: Tensor, k: int, rows: slice,
                  model: ddpm.Model, params: list[Tensor], averages: list[Tensor],
                  adam: torch.optim.Adam, scaler: torch.amp.GradScaler) -> tuple:
    """Lines 2 to 5 of the box, for step k = 0, 1, …; `Run.train` repeats them.   [DDPM Alg. 1]

    images: the data set, uint8; rows: the part of the batch that this process computes (every
    process draws the whole batch, so the draws do not depend on the number of processes); model:
    ε_θ, whose parameters are `params`; averages: their averages, which sampling uses; scaler:
    torch's gradient scaler, which does nothing unless --precision is fp16. Returns the loss and the
    time of each row, and the norm of the gradient.
    """
    n, device = settings["batch_size"], s.betas.device
    generator = torch.Generator(device).manual_seed(seed_of(settings["seed"], "step", k))
    # 2: x_0 ~ q(x_0)
    index = batch_indices(settings["seed"], len(images), k, n, images.device)
    x0 = data.to_model(images[index[rows]].to(device, non_blocking=True))
    flip = torch.rand(n, generator=generator, device=device)[rows] < 0.5
    if settings["flip"]:
        x0 = torch.where(flip[:, None, None, None], x0.flip(3), x0)
    # 3: t ~ Uniform({1, …, T})
    t = torch.randint(1, s.T + 1, (n,), generator=generator, device=device)[rows]
    # 4: ε ~ N(0, I)
    eps = torch.randn(n, *images.shape[1:], generator=generator, device=device)[rows]
    # 5: take a gradient descent step on ∇_θ ‖ε − ε_θ(√ᾱ_t x_0 + √(1 − ᾱ_t) ε, t)‖²
    #    (the step is Adam's; the gradient is clipped first)
    adam.zero_grad()
    losses = []
    for part in torch.arange(len(t), device=device).split(settings["micro_batch"] or len(t)):
        losses.append(loss_of(settings, s, model, x0[part], t[part], eps[part]))
        scaler.scale(losses[-1].mean() * (len(part) / len(t))).backward()
    scaler.unscale_(adam)
    norm = nn.utils.clip_grad_norm_(params, settings["clip"])
    for group in adam.param_groups:
        group["lr"] = learning_rate(settings, k)
    scaler.step(adam)
    scaler.update()
    # Appendix B: average ← average + (1 − decay) · (θ − average)
    torch._foreach_lerp_(averages, params, 1 - ema_decay(settings, k))
    return torch.cat(losses).detach(), t, norm

def loss_of(settings: dict, s: ddpm.Schedule, model: ddpm.Model, x0: Tensor, t: Tensor,
            eps: Tensor) -> Tensor:
    """L_simple (Eq. 14), or with --objective vlb the term of Eq. 5 for each t in bits/dim.  → (B,)

    Over t, the mean of that term is (L − L_T)/T. As for the L of Table 2, x̂_0 is not clipped here.
    """
    if settings["objective"] == "simple":
        return ddpm.loss_simple(s, model, x0, t, eps, settings["predict"])
    x_t = ddpm.q_sample(s, x0, t, eps)
    p = ddpm.p_mean_variance(s, model, x_t, t, settings["predict"], settings["variance"],
                             clip=False)
    return ddpm.bits_per_dim(ddpm.vlb_term(s, x0, x_t, t, p), x0)

def learning_rate(settings: dict, k: int) -> float:
    """lr · min(k / warmup, 1), as in the released code, which counts k from 0."""
    return settings["lr"] * (min(k / settings["warmup"], 1) if settings["warmup"] else 1)

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
    """The images of step k. Each epoch is a new permutation of all n images; the epochs are joined,
    and step k takes the k-th batch."""
    first, last = k * batch, (k + 1) * batch
    return torch.cat([permutation(seed, e, n, device)[max(first - e * n, 0):last - e * n]
                      for e in range(first // n, (last - 1) // n + 1)])

# === The run around it ============================================================================

class Run:
    """A training run: the state that its checkpoint holds, and the loop over `training_step`."""

    def __init__(self, settings: dict, images: Tensor, folder: Path, machine: common.Machine):
        self.settings, self.folder, self.machine = settings, folder, machine
        device = machine.device
        self.schedule = common.build_schedule(settings).to(device)
        torch.manual_seed(seed_of(settings["seed"], "init"))
        self.model = common.build_network(settings).to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.params, self.averages = list(self.model.parameters()), list(self.ema.parameters())
        self.adam = torch.optim.Adam(self.params, lr=settings["lr"], fused=device.type != "mps")
        self.scaler = torch.amp.GradScaler(device.type, enabled=machine.dtype == torch.float16)
        self.step, self.saved = 0, -1               # steps done, and those in the last checkpoint
        # Sums since the last line of the log: steps, loss, norm, the losses in each third of the
        # times 1 … T, and their numbers.
        self.sums = torch.zeros(9, device=device)
        self.largest = torch.zeros((), device=device)           # norm since the last line
        self.skipped = torch.zeros((), device=device)           # steps in a row, not finite
        self.bad = torch.tensor(-1, device=device)              # the step at which the run failed
        self.seconds, self.seconds_logged = 0.0, 0.0            # of training, in this process
        fits = device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4
        self.images = images.to(device) if fits else images
        last = len(images) - 1
        some = images[torch.linspace(0, last, 64).long().clamp(max=last)]
        shape = tuple(images.shape)
        self.fingerprints = [data.fingerprint(images, shape), data.fingerprint(some, shape)]
        L_T = ddpm.prior_kl(self.schedule, data.to_model(some).to(device))
        self.L_T = ddpm.bits_per_dim(L_T, some).mean().item()
        self.cpu_group = dist.new_group(backend="gloo") if machine.world > 1 else None

    def restore(self, state: dict) -> None:
        """Continues from a checkpoint. ValueError if the images are not those of the run."""
        if state["data"] not in self.fingerprints:  # the second is that of older checkpoints
            raise ValueError(f"the images of {self.settings['dataset']} are not those with which "
                             f"the run in {self.folder} began")
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.adam.load_state_dict(state["adam"])
            self.step = self.saved = state["step"]
            if "sums" in state:
                self.sums.copy_(state["sums"])
                self.largest.copy_(state["largest"])
            else:  # an older checkpoint, which knows only the loss
                self.sums[:3] = torch.tensor([state["summed"], state["loss_sum"], math.nan])
            if self.scaler.is_enabled() and state.get("scaler"):
                self.scaler.load_state_dict(state["scaler"])
        except Exception as error:  # torch raises many kinds of error
            raise ValueError(f"the checkpoint in {self.folder} holds no whole state of its run: "
                             f"{data.first_line(error)}") from error
        before = state.get("dtype", str(self.machine.dtype))
        if before != str(self.machine.dtype) and self.machine.chief:
            say(f"warning: this run was in {before}, and goes on in {self.machine.dtype}")

    def save(self) -> None:
        """Writes the checkpoint of this step, if it was not written yet. Raises what `check` does.
        """
        self.check()
        if self.saved == self.step:
            return
        self.saved, sums = self.step, self.sums.clone()
        if self.machine.world > 1:
            dist.all_reduce(sums)
        if self.machine.chief:
            common.save_checkpoint(self.folder / "checkpoint.pt", {
                "settings": self.settings, "step": self.step, "model": self.model.state_dict(),
                "ema": self.ema.state_dict(), "adam": self.adam.state_dict(),
                "sums": sums / self.machine.world, "largest": self.largest,
                "scaler": self.scaler.state_dict(), "data": self.fingerprints[0],
                "dtype": str(self.machine.dtype)})

    def check(self) -> None:
        """ValueError naming the step at which a loss or gradient that is not finite ended the run.

        Reading the value waits for the device. So this is called only before a line of the log or
        of the progress, and before a save.
        """
        if (bad := self.bad.item()) >= 0:
            last = f"is of step {self.saved}" if self.saved >= 0 else "does not exist yet"
            raise ValueError(f"step {bad}: the loss or its gradient is not finite. The checkpoint "
                             f"in {self.folder} {last}; try a lower --lr with another --out")

    def count(self, losses: Tensor, t: Tensor, norm: Tensor) -> None:
        """Adds a step to the sums for the next line of the log, if it was finite.

        With fp16 a step that is not finite leaves the weights as they are and lowers the scale of
        the gradients. Only a long row of such steps is a divergence.
        """
        loss, losses = losses.mean().float(), losses.float()
        finite = loss.isfinite() & norm.isfinite()
        self.skipped = torch.where(finite, 0, self.skipped + 1)
        allowed = 30 if self.scaler.is_enabled() else 0
        self.bad = torch.where((self.bad < 0) & (self.skipped > allowed), self.step, self.bad)
        third = (t - 1) * 3 // self.schedule.T
        zeros = torch.zeros(3, device=t.device)
        new = torch.cat([torch.stack([torch.ones_like(loss), loss, norm]),
                         zeros.index_add(0, third, losses),
                         zeros.index_add(0, third, torch.ones_like(losses))])
        self.sums += torch.where(finite, new, 0)
        self.largest = torch.where(finite, torch.maximum(self.largest, norm), self.largest)

    def log(self, last: bool = False) -> None:
        """Appends the means since the last line, over all processes, to log.jsonl.

        last: the run ends between two lines. A resumed run takes this line out again.
        """
        self.check()
        sums, n = self.sums.clone(), self.machine.world
        if n > 1:
            dist.all_reduce(sums)
        steps, loss, norm, *thirds = sums.tolist()
        steps = max(steps, 1)
        entry = {"step": self.step, "loss": loss / steps,
                 "loss_thirds": [a / b if b else None for a, b in zip(thirds[:3], thirds[3:])],
                 "lr": learning_rate(self.settings, self.step - 1),
                 "grad_norm": norm / steps if math.isfinite(norm) else None,
                 "grad_norm_max": self.largest.item(),
                 "images_per_s": round(steps / n * self.settings["batch_size"]
                                       / max(self.seconds - self.seconds_logged, 1e-9), 3)}
        if self.settings["objective"] == "vlb":  # an estimate of L, in bits/dim
            entry["bound"] = self.settings["timesteps"] * entry["loss"] + self.L_T
        if last:
            entry["last"] = True
        if self.machine.chief:
            path = self.folder / "log.jsonl"
            with data.naming(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint that counts on it
        self.sums.zero_()
        self.largest.zero_()
        self.seconds_logged = self.seconds

    def keep(self) -> None:
        """Writes the averaged weights to a file of their own."""
        if self.machine.chief:
            path = self.folder / f"ema-{self.step:07d}.safetensors"
            settings = json.dumps({"settings": self.settings, "step": self.step})
            weights.write_safetensors(path, self.ema.state_dict(), {"ddpm": settings})

    def grid(self) -> None:
        """Draws a grid of samples with the averaged weights, always from the same noise.

        Unless --sample-steps says how many network calls to make, it is the number that takes a
        tenth of the time for which this command has trained so far, but ten calls at least.
        """
        settings, machine, n = self.settings, self.machine, self.settings["samples"]
        path = self.folder / f"samples-{self.step:07d}.png"
        if not n or path.exists():
            return
        trained = sample.Trained(self.ema, self.schedule, settings, "")
        T, steps = settings["timesteps"], settings["sample_steps"]
        if not steps:
            one_call = sample.seconds_of_a_call(trained, n, machine)
            affordable = torch.tensor(0.1 * self.seconds / one_call)
            if machine.world > 1:
                dist.all_reduce(affordable, dist.ReduceOp.MIN, self.cpu_group)
            steps = max(2, min(T, max(10, int(affordable))))
            if steps < T and settings["variance"] == "learned":
                if machine.chief:
                    say(f"no grid at step {self.step}: a learned variance needs all {T} network "
                        f"calls, too many for the time so far (--sample-steps {T} draws it)")
                return
        if machine.chief:
            say(f"drawing {n} samples with {steps} network calls each"
                + (" (--sample-steps changes that)" if steps < T else ""))
        images = sample.draw_samples(trained, n, settings["seed"], 32, steps, machine,
                                     common.Progress(n, "samples", quiet=not machine.chief))
        if machine.chief:
            sample.write_png(path, sample.enlarged(sample.grid(images)))
            say(f"{path} shows {n} samples")
            plot_losses(self.folder)

    def train(self, engine: nn.Module) -> None:
        """Algorithm 1 from step `self.step` to the last one. A signal raises KeyboardInterrupt."""
        settings, machine = self.settings, self.machine
        part = settings["batch_size"] // machine.world
        rows = slice(machine.rank * part, (machine.rank + 1) * part)
        model = machine.model(engine.train())
        progress = common.Progress(settings["steps"], "steps", self.step, quiet=not machine.chief)
        while self.step < settings["steps"]:  # 1: repeat … 6: until converged
            common.signals.deferred, started = True, time.monotonic()  # until the step is complete
            torch.manual_seed(seed_of(settings["seed"], "dropout", self.step, machine.rank))
            losses, t, norm = training_step(settings, self.schedule, self.images, self.step, rows,
                                            model, self.params, self.averages, self.adam,
                                            self.scaler)
            self.step += 1
            self.count(losses, t, norm)
            last = self.step == settings["steps"]
            if progress.due() or last:
                self.check()
                steps, loss = self.sums[:2].tolist()
                progress.update(self.step, f"loss {loss / max(steps, 1):.4f}", force=True)
            self.seconds += time.monotonic() - started
            if self.step % settings["log_every"] == 0:
                self.log()
            if self.step % settings["save_every"] == 0 or last:
                self.save()
            if last and self.step % settings["log_every"]:
                self.log(last)
            if settings["keep"] and self.step % settings["keep"] == 0:
                self.keep()
            common.signals.deferred = False
            stop = torch.tensor(common.signals.number)
            if machine.world > 1:  # all processes learn it in the same step
                dist.all_reduce(stop, dist.ReduceOp.MAX, self.cpu_group)
            if stop:
                raise KeyboardInterrupt
            if self.step % settings["sample_every"] == 0 and not last:
                self.grid()

def plot_losses(folder: Path) -> None:
    """loss.png: the loss of log.jsonl over the steps, and that of each third of t; log axes."""
    if not (pyplot := common.pyplot()):
        return
    log = folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    entries = [entry for entry in map(json.loads, lines) if "loss_thirds" in entry]
    if len(entries) < 2:
        return
    figure, ax = pyplot.subplots(figsize=(7, 4), layout="constrained")
    steps = [entry["step"] for entry in entries]
    for i, name in enumerate(("t ≤ T/3", "T/3 < t ≤ 2T/3", "t > 2T/3")):
        ax.plot(steps, [entry["loss_thirds"][i] for entry in entries], linewidth=1, label=name)
    ax.plot(steps, [entry["loss"] for entry in entries], color="black", label="all t")
    ax.set(xscale="log", yscale="log", xlabel="step", ylabel="loss")
    ax.grid(alpha=0.3)
    ax.legend()
    with data.written(folder / "loss.png") as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)

def cut_log(path: Path, step: int, goes_on: bool) -> None:
    """Removes the lines after `step` from log.jsonl, since the resumed run writes them again.

    If there are lines that are no entries, the file as it was is kept under another name.
    """
    damaged, aside = False, path.with_name("log.damaged.jsonl")
    path.touch()
    if data.size_of(path) > 2 ** 30:
        raise ValueError(f"{path} has {data.size_of(path)} bytes: move it away to continue the run")
    with data.written(path) as kept, open(path, "rb") as lines:
        for line in lines:
            entry = re.match(rb'\{"step": (\d+), .*\}\n$', line)
            last = goes_on and line.endswith(b'"last": true}\n')
            if entry and int(entry[1]) <= step and not last:
                kept.write(line)
            # A last line without its end is normal after a kill; any other bad line is damage.
            damaged |= not entry and line.endswith(b"\n")
        if damaged:
            shutil.copyfile(path, aside)
            say(f"{path} has damaged lines: they are left out, and the file is kept as {aside}")

def compiled(net: nn.Module, machine: common.Machine, shape: tuple) -> nn.Module:
    """net through torch.compile, tried on one batch; net itself, with a message, if that fails."""
    if machine.chief:
        say("compiling the network, which takes about a minute …")
    fast = torch.compile(net, dynamic=False)  # the shape of a batch is always the same
    try:
        x = torch.zeros(shape, device=machine.device)
        t = torch.ones(len(x), dtype=torch.int64, device=machine.device)
        machine.model(fast)(x, t).sum().backward()
        net.zero_grad()
        return fast
    except Exception as error:  # the compilers raise many kinds of error
        say(f"training without torch.compile: {data.first_line(error)}")
        return net

# === The command ==================================================================================

def recipe(dataset: str, side: int | None) -> dict:
    """The default settings for this data set and this side of its images."""
    if side is None and Path(dataset).is_dir():
        side = 256
    changes = RECIPE_256 if (side or 0) >= 256 else RECIPES.get(dataset, {})
    return {**{name: default for name, (default, _) in SETTINGS.items()}, **changes}

def parse(argv) -> dict:
    """The flags that were given. A setting that was not given has no entry, because its default
    depends on the data and the checkpoint."""
    first = common.Parser("", add_help=False)  # the data set decides on the other defaults
    first.add_argument("--dataset", type=common.word, default=SETTINGS["dataset"][0])
    first.add_argument("--image-size", type=common.KINDS["image_size"])
    known = first.parse_known_args(argv)[0]
    parser = common.Parser(f"{__doc__}\nThe defaults are those for --dataset {known.dataset}.")
    for name, value in recipe(known.dataset, known.image_size).items():
        kind, meaning = common.KINDS[name], SETTINGS[name][1]
        options = {"type": kind, "choices": getattr(kind, "values", None)}
        if kind is common.switch:
            options = {"action": argparse.BooleanOptionalAction}
        if name in common.LISTS:
            options["nargs"], value = "+", " ".join(map(str, value))
        text = meaning if value is None else f"{meaning} (default: {value})"
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=text,
                            **options)
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/DATASET)")
    parser.add_argument("--init", type=common.word, help="start from these weights (anything "
                        "that sample.py --checkpoint accepts)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="use torch.compile (default: on CUDA only)")
    parser.add_argument("--deterministic", action="store_true",
                        help="bit-identical results on CUDA too, at some loss of speed")
    parser.add("--device", "--precision")
    return vars(parser.parse_args(argv))

def settle(given: dict, images: Tensor, stored: dict, init: dict) -> dict:
    """The settings of the run: the recipe, changed by --init, the checkpoint and the flags in turn.

    given: the flags; stored: the checkpoint's settings; init: those of the network of --init.
    UsageError if a flag contradicts the checkpoint or --init, or settings contradict each other.
    """
    name, side = given.get("dataset", SETTINGS["dataset"][0]), images.shape[2]
    given = {key: value for key, value in given.items() if key in SETTINGS}
    shape = dict(in_channels=images.shape[1], image_size=side)
    settings = {**recipe(name, side), **init, **stored, **given, **shape}
    common.judged(settings, "this run")
    levels = len(settings["multipliers"])
    if unknown := set(given.get("attention", [])) - {side // 2 ** level for level in range(levels)}:
        raise UsageError(f"--attention {min(unknown)}: no level of the U-Net has that resolution")
    T, steps = settings["timesteps"], settings["sample_steps"]
    learned = settings["variance"] == "learned"
    if "sample_steps" not in given and steps and (learned or steps > T):
        settings["sample_steps"] = steps = None  # the recipe's value does not fit
    for key in init:
        if settings[key] != init[key]:
            raise UsageError(f"--init has {key} {init[key]}, this run {settings[key]}")
    for key in stored:
        if key not in MAY_CHANGE and settings[key] != stored[key]:
            raise UsageError(f"this run has --{key.replace('_', '-')} {stored[key]}, not "
                             f"{settings[key]}: give a new run another --out")
    if learned and (settings["objective"] != "vlb" or settings["predict"] == "x0"):
        raise UsageError("--variance learned needs --objective vlb, since L_simple does not depend "
                         "on the variance, and --predict eps or mean (Table 2)")
    if learned and steps and steps < T:
        raise UsageError("--sample-steps: a learned variance can only be sampled with all steps")
    if steps and steps > T:
        raise UsageError(f"--sample-steps {steps} exceeds T = {T}")
    if images.shape[3] != side or side % 2 ** (levels - 1):
        raise UsageError(f"images of {side}×{images.shape[3]}: a U-Net of {levels} levels needs "
                         f"squares whose side is a multiple of {2 ** (levels - 1)}")
    return settings

@common.command
def main(argv=None) -> int:
    """Trains, or resumes training: see the text at the head of this file."""
    given = parse(argv)
    name = given.get("dataset", SETTINGS["dataset"][0])
    folder = given["out"] or Path("runs", Path(name).stem)
    if folder.is_file():
        raise UsageError(f"--out {folder} is a file: name a folder")
    machine = common.find_machine(given["device"], given["precision"])
    if given["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    with common.locked(folder) if machine.chief else contextlib.nullcontext():
        path = folder / "checkpoint.pt"
        resumed = path.exists() or common.previous(path).exists()
        state = common.load_checkpoint(path) if resumed else {}
        stored, init = state.get("settings", {}), None
        if stored and stored["dataset"] != given.get("dataset", stored["dataset"]):
            raise UsageError(f"this run has --dataset {stored['dataset']}, not {given['dataset']}: "
                             "give a new run another --out")
        with machine.chief_first():
            known = {**stored, **given}  # a flag that is not given keeps the checkpoint's value
            images = data.load(known.get("dataset", name), known.get("data_dir", "data"),
                               image_size=known.get("image_size")).images
        if given["init"] and not resumed:
            init = sample.load(given["init"], given.get("data_dir", "data"), machine=machine)
        settings = settle(given, images, stored, init.model_settings if init else {})
        if settings["batch_size"] % machine.world:
            raise UsageError(f"--batch-size {settings['batch_size']} cannot be shared evenly by "
                             f"{machine.world} processes")
        # in memory: the weights, their averages and gradients, and two averages of Adam's
        part = settings["batch_size"] // machine.world
        part = min(part, settings["micro_batch"] or part)
        common.require_network(settings, machine, 5, part, True)
        run = Run(settings, images, folder, machine)
        if resumed:
            run.restore(state)
        elif init:
            run.model.load_state_dict(init.net.state_dict())
            run.ema.load_state_dict(init.net.state_dict())
        if machine.chief:
            begin(run)
        engine = run.model
        if given["compile"] or (given["compile"] is None and machine.device.type == "cuda"):
            engine = compiled(engine, machine, (part, *images.shape[1:]))
        if machine.world > 1:
            engine = nn.parallel.DistributedDataParallel(engine)
        try:
            run.train(engine)
            run.grid()
        except KeyboardInterrupt:
            run.save()
            if machine.chief:
                say(f"stopped at step {run.step}; the same command resumes")
            return 128 + common.signals.number
    return 0

def begin(run: Run) -> None:
    """Cleans up after a kill, and shows the settings: on stderr and in settings.json."""
    settings, machine, folder = run.settings, run.machine, run.folder
    for leftover in folder.iterdir():
        if re.fullmatch(r"(checkpoint.*|settings|log|loss|samples-\d+|ema-\d+)\.\w+\.\d+\.part",
                        leftover.name):
            leftover.unlink()
    cut_log(folder / "log.jsonl", run.step, run.step < settings["steps"])
    with data.written(folder / "settings.json") as file:
        file.write((json.dumps(settings, indent=2) + "\n").encode())
    parameters = sum(p.numel() for p in run.params)
    say(f"{settings['dataset']}: {len(run.images):,} images of "
        f"{'×'.join(map(str, run.images.shape[1:]))}; network of {parameters:,} parameters; "
        f"{machine.device} in {str(machine.dtype)[6:]}; {machine.world} process"
        + "es" * (machine.world > 1))
    text = ", ".join(f"{name} {value}" for name, value in settings.items())
    say(textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="  "))
    if run.step >= settings["steps"]:
        say(f"{folder} has done all its {run.step} steps; give a larger --steps to continue")
    elif settings["steps"] < settings["warmup"]:
        say(f"warning: the learning rate rises for --warmup {settings['warmup']} steps, longer "
            "than the whole run")
    threads = torch.get_num_threads()
    if machine.device.type == "cpu" and threads > 1 and hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]  # programs that wanted to compute in the last minute
        if load > os.cpu_count():
            say(f"warning: other programs keep this machine busy (load {load:.1f}); {threads} "
                "threads that wait for each other may then be slower than OMP_NUM_THREADS=1")

if __name__ == "__main__":
    sys.exit(main())
