"""Algorithm 1: train ε_θ.

    python train.py --dataset cifar10                  the paper's run, into runs/cifar10/
    python train.py --dataset shapes                   minutes on a CPU, no download
    python train.py --dataset cifar10                  again: goes on where it stopped
    torchrun --nproc-per-node 8 train.py               the same run, its batch over 8 GPUs

Every image, flip, time and noise of step k is drawn from (seed, k) alone, so a run that was
stopped and resumed is the run that was not.
"""
from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import os
import sys
from pathlib import Path

import runs  # before torch: it quiets a warning of torch's import

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import ddpm
import weights
from runs import UsageError
from settings import SETTINGS, parse, settle

# ------------------------------------------------------------------------- what a step is made of

@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int, device) -> Tensor:
    """Epoch e's order of the n images, drawn from (seed, e)."""
    g = torch.Generator().manual_seed(runs.seed_of(seed, "epoch", epoch))
    return torch.randperm(n, generator=g).to(device)


def batch_indices(seed: int, n: int, step: int, batch: int, device="cpu") -> Tensor:
    """The images of step `step`: the epochs' permutations, one after another, cut into batches."""
    a, b = step * batch, (step + 1) * batch
    return torch.cat([permutation(seed, e, n, device)[max(a - e * n, 0):b - e * n]
                      for e in range(a // n, (b - 1) // n + 1)])


def draw_step(s: dict, step: int, shape: tuple, generator: torch.Generator) -> tuple:
    """Flips, t ~ U{1 … T} and ε ~ N(0, I) of the whole batch, from (seed, step) alone."""
    g, n = generator.manual_seed(runs.seed_of(s["seed"], "step", step)), s["batch_size"]
    flips = torch.rand(n, generator=g, device=g.device) < 0.5
    t = torch.randint(1, s["timesteps"] + 1, (n,), generator=g, device=g.device)
    return flips, t, torch.randn(n, *shape, generator=g, device=g.device)


def loss_of(s: dict, schedule: ddpm.Schedule, model: ddpm.Model, x0: Tensor, t: Tensor,
            eps: Tensor) -> Tensor:
    """(B,): Eq. 14, or that t's term of Eq. 5 in bits/dim, x̂_0 not clipped (Table 2's L)."""
    if s["objective"] == "simple":
        return ddpm.loss_simple(schedule, model, x0, t, eps, s["predict"])
    x_t = ddpm.q_sample(schedule, x0, t, eps)
    p = ddpm.p_mean_variance(schedule, model, x_t, t, s["predict"], s["variance"], clip=False)
    return ddpm.bits_per_dim(ddpm.vlb_term(schedule, x0, x_t, t, p), x0)


def ema_decay(decay: float, step: int) -> float:
    """The paper's decay is constant, 0.9999: it remembers 10,000 steps.

    A shorter run would mostly average its own beginning, so here it ramps up as the run grows; from
    step 90,000 on it is the paper's.
    """
    return min(decay, (1 + step) / (10 + step))


# ---------------------------------------------------------------------------------------- the run

class Run:
    """Algorithm 1 on this machine: the state that a checkpoint holds, and the loop over it."""

    def __init__(self, settings: dict, images: Tensor, folder: Path, where: runs.Machine):
        self.s, self.folder, self.where, device = settings, folder, where, where.device
        self.schedule = runs.build_schedule(settings).to(device)
        torch.manual_seed(runs.seed_of(settings["seed"], "init"))
        self.net = runs.build_net(settings).to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.params, self.averages = list(self.net.parameters()), list(self.ema.parameters())
        self.adam = torch.optim.Adam(self.params, lr=settings["lr"], fused=device.type != "mps")
        self.step = self.summed = 0                     # steps done; steps in loss_sum
        self.saved = -1                                 # the step of the last checkpoint
        self.loss_sum = torch.zeros((), device=device)  # since the last line of the log
        self.bad = torch.tensor(-1, device=device)      # the first step that was not finite
        fits = device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4
        self.images = images.to(device) if fits else images
        sample = images[torch.linspace(0, len(images) - 1, 64).long()]
        self.data = f"{tuple(images.shape)} {hashlib.sha256(data.raw_bytes(sample)).hexdigest()}"
        L_T = ddpm.prior_kl(self.schedule, data.to_model(sample).to(device))
        self.L_T = ddpm.bits_per_dim(L_T, sample).mean().item()
        self.side_channel = dist.new_group(backend="gloo") if where.world > 1 else None

    def restore(self, state: dict) -> None:
        """Take the run up where a checkpoint left it. ValueError if the images are not the same."""
        if state["data"] != self.data:
            raise ValueError(f"the images of {self.s['dataset']} are not those that the run in "
                             f"{self.folder} began with")
        self.net.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.adam.load_state_dict(state["adam"])
        self.step, self.summed = state["step"], state["summed"]
        self.loss_sum.copy_(state["loss_sum"])
        self.saved = self.step

    def save(self) -> None:
        """Write the checkpoint, unless it is there or a step since the last was not finite."""
        self.check()
        if self.saved == self.step:
            return
        self.saved, loss_sum = self.step, self.loss_sum.clone()
        if self.where.world > 1:
            dist.all_reduce(loss_sum)
        if self.where.chief:
            runs.save_checkpoint(self.folder / "checkpoint.pt", {
                "settings": self.s, "step": self.step, "model": self.net.state_dict(),
                "ema": self.ema.state_dict(), "adam": self.adam.state_dict(),
                "loss_sum": loss_sum / self.where.world, "summed": self.summed, "data": self.data})

    def check(self) -> None:
        """ValueError naming the first step whose loss or gradient was not finite, if there is one.

        Such a step leaves weights that are not finite, and every later loss shows it: asking when
        a loss is printed, and before every save, is soon enough.
        """
        if (bad := self.bad.item()) >= 0:
            last = f"is of step {self.saved}" if self.saved >= 0 else "does not exist yet"
            raise ValueError(f"step {bad}: the loss or its gradient is not finite. The checkpoint "
                             f"in {self.folder} {last}; try a lower --lr with another --out")

    def sample(self) -> None:
        """A grid of images from the averaged weights and noise that is the same every time."""
        if self.s["samples"]:
            trained = runs.Trained(self.ema, self.schedule, self.s, "")
            progress = runs.Progress(self.s["samples"], "samples", quiet=not self.where.chief)
            images = runs.draw_samples(trained, self.where, self.s["seed"], self.s["samples"], 32,
                                       self.s["sample_steps"], progress)
            if self.where.chief:
                path = self.folder / f"samples-{self.step:07d}.png"
                runs.write_png(path, runs.grid(images))
                print(f"{path} shows {len(images)} samples", file=sys.stderr)

    def log(self) -> None:
        """A line of log.jsonl: the mean loss since the last, over all ranks."""
        self.check()
        if self.where.world > 1:
            dist.all_reduce(self.loss_sum)
        loss = self.loss_sum.item() / self.summed / self.where.world
        entry = {"step": self.step, "loss": loss}
        if self.s["objective"] == "vlb":
            entry["bound"] = self.s["timesteps"] * loss + self.L_T  # bits/dim, unbiased for Eq. 5
        if self.where.chief:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
        self.loss_sum.zero_()
        self.summed = 0

    def stopped(self, stop: runs.Stop) -> bool:
        """Whether any rank was told to stop; all learn of it at the same step."""
        if self.where.world > 1:
            flag = torch.tensor(stop.signal)
            dist.all_reduce(flag, dist.ReduceOp.MAX, self.side_channel)
            stop.signal = int(flag)
        return stop.signal != 0

    def train(self, engine: nn.Module, stop: runs.Stop) -> None:
        """Algorithm 1 from step `self.step` to the last, or to a signal."""
        s, where = self.s, self.where
        device, model = where.device, runs.runner(engine, where)
        generator, share = torch.Generator(device), s["batch_size"] // where.world
        mine = slice(where.rank * share, (where.rank + 1) * share)
        progress = runs.Progress(s["steps"], "steps", done=self.step, quiet=not where.chief)
        while self.step < s["steps"] and not self.stopped(stop):
            k = self.step
            index = batch_indices(s["seed"], len(self.images), k, s["batch_size"],
                                  self.images.device)[mine]
            x0 = data.to_model(self.images[index].to(device, non_blocking=True))
            flips, t, eps = draw_step(s, k, self.images.shape[1:], generator)
            if s["flip"]:
                x0 = torch.where(flips[mine, None, None, None], x0.flip(3), x0)
            torch.manual_seed(runs.seed_of(s["seed"], "dropout", k, where.rank))

            engine.train()
            loss = loss_of(s, self.schedule, model, x0, t[mine], eps[mine]).mean()
            self.adam.zero_grad()
            loss.backward()
            # Ho et al.'s code clips before the mean over replicas; here it is the mean's norm.
            norm = nn.utils.clip_grad_norm_(self.params, s["clip"])
            for group in self.adam.param_groups:
                group["lr"] = s["lr"] * min(k / max(s["warmup"], 1), 1) if s["warmup"] else s["lr"]
            self.adam.step()
            with torch.no_grad():
                get_ema_multi_avg_fn(ema_decay(s["ema"], k))(self.averages, self.params, None)

            # Nothing is read back before it is printed: the device never waits for the host.
            self.step, self.summed, loss = k + 1, self.summed + 1, loss.detach()
            self.loss_sum += loss
            sound = loss.isfinite() & norm.isfinite()
            self.bad = torch.where((self.bad < 0) & ~sound, self.step, self.bad)

            if progress.due() or self.step == s["steps"]:
                progress.update(self.step, f"loss {self.loss_sum.item() / self.summed:.4f}", True)
                self.check()
            if self.step % s["log_every"] == 0:
                self.log()
            if self.step % s["save_every"] == 0:
                self.save()
            if self.step % s["sample_every"] == 0 and self.step < s["steps"]:
                self.sample()
        self.save()


@runs.command
def main(argv=None) -> int:
    """Train, or go on training: see the module's text."""
    given = parse(argv, __doc__)
    name = given.get("dataset", SETTINGS["dataset"][0])
    folder = given.get("out") or Path("runs", Path(name).stem)
    where = runs.machine(given.pop("device"), given.pop("precision"))
    if given["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    with runs.Stop() as stop, runs.locked(folder) if where.chief else contextlib.nullcontext():
        path = folder / "checkpoint.pt"
        resumed = path.exists() or runs.previous(path).exists()
        state = runs.load_checkpoint(path) if resumed else {}
        before = state.get("settings", {})
        if before and before["dataset"] != given.get("dataset", before["dataset"]):
            raise UsageError(f"this run has --dataset {before['dataset']}, not {given['dataset']}: "
                             "give a new run another --out")
        if given["init"] and resumed:
            raise UsageError(f"--init begins a run, and {folder} has one: give another --out")
        with where.chief_first():
            known = {**before, **given}  # what is not said stays as the checkpoint has it
            images = data.load(known.get("dataset", name), known.get("data_dir", "data"),
                               image_size=known.get("image_size")).images
        init = None
        if given["init"]:
            init = weights.load(given["init"], given.get("data_dir", "data"), True, where)
        settings = settle(given, images, before, init.model_settings if init else {})
        if settings["batch_size"] % where.world:
            raise UsageError(f"--batch-size {settings['batch_size']} cannot be shared evenly by "
                             f"{where.world} ranks")
        run = Run(settings, images, folder, where)
        if resumed:
            run.restore(state)
        elif init:
            run.net.load_state_dict(init.net.state_dict())
            run.ema.load_state_dict(init.net.state_dict())
        if where.chief:
            for leftover in folder.glob("*.part"):
                leftover.unlink()
            runs.cut_log(folder / "log.jsonl", run.step)
            parameters = sum(p.numel() for p in run.params)
            print(f"{settings['dataset']}: {len(images)} images of {tuple(images.shape[1:])}, "
                  f"{parameters:,} parameters, {where.device.type} in {where.dtype}, {where.world} "
                  f"rank{'s' * (where.world > 1)}, from step {run.step}", file=sys.stderr)
            if run.step < settings["steps"] < settings["warmup"]:
                print(f"--warmup: the learning rate rises for {settings['warmup']} steps, longer "
                      "than the run", file=sys.stderr)
        if run.step >= settings["steps"]:
            print(f"{folder} has had its {run.step} steps; a larger --steps goes on",
                  file=sys.stderr)
            return 0
        engine = run.net
        if given["compile"] if given["compile"] is not None else where.device.type == "cuda":
            share = settings["batch_size"] // where.world
            engine = runs.compiled(engine, where, (share, *images.shape[1:]))
        if where.world > 1:
            engine = nn.parallel.DistributedDataParallel(engine)
        run.train(engine, stop)
        if run.stopped(stop):
            print(f"stopped at step {run.step}; the same command goes on", file=sys.stderr)
            return 128 + stop.signal
        run.sample()
    return 0


if __name__ == "__main__":
    sys.exit(main())
