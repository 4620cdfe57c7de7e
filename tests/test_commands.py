"""train.py, sample.py and evaluate.py as people call them, on a network of a few thousand
weights."""
import copy
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ddpm
import evaluate
import sample
import train
from extras import compress
from helpers import (assert_equal, assert_same_log, checkpoint, CPU, free_port, HERE, hooked, losses,
                     read_png, said, SETTINGS, SMALL, TINY, trains, when_called)
from support import checkpoint as checkpoints
from support import command, data, machine
from support.machine import Machine
from unet import UNet

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


# ---------------------------------------------------------------------------------- the settings


def test_adam_is_the_papers():
    """β₁ = 0.9, β₂ = 0.999, no weight decay, no AMSGrad; all parameters, and no others."""
    run = train.begin(train.parse(TINY), data.shapes(4, 8), {}, CPU, Path("x"))
    group, = run.adam.param_groups
    assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
    assert group["weight_decay"] == 0 and not group["amsgrad"] and not group["maximize"]
    assert {id(p) for p in group["params"]} == {id(p) for p in run.net.parameters()}


# ------------------------------------------------------------------------- train, resume, sample

def test_train_resume_sample(capsys):
    """One command trains, the same goes on to the bit, the next samples; pictures open."""
    trains("--steps", 7, "--out", "a", "--dropout", 0.2)
    trains("--steps", 3, "--out", "b", "--dropout", 0.2)
    trains("--steps", 4, "--out", "b")
    trains("--steps", 7, "--out", "b", "--samples", 3, "--sample-steps", 5)
    a, b = checkpoint("a"), checkpoint("b")
    for changed in ("steps", "samples", "sample_steps"):
        a["settings"].pop(changed), b["settings"].pop(changed)
    assert_equal(a, b)
    assert_same_log("b", "a")
    assert [e["step"] for e in losses("a")] == [2, 4, 6, 7]
    assert [e["step"] for e in losses("b")] == [2, 3, 4, 6, 7]
    assert read_png("b/samples-0000007.png").shape[1:] == (480, 480)

    Path("runs").mkdir()
    os.rename("a", "runs/one")
    capsys.readouterr()
    assert sample.main("--n 5 --batch-size 2 --out x.pt --device cpu --precision fp32".split()) == 0
    assert sample.main("--n 3 --out y.pt --device cpu --precision fp32".split()) == 0
    x, y = torch.load("x.pt"), torch.load("y.pt")
    assert x.shape == (5, 3, 8, 8) and x.dtype == torch.uint8
    assert (x[:3].int() - y.int()).abs().max() <= 1            # whatever the batch size
    assert len(x.flatten(1).unique(dim=0)) == 5
    assert sample.main("--n 5 --seed 1 --steps 7 --no-ema --no-clip --variance fixed_small".split()) == 0
    assert read_png("samples.png").shape[1:] == (16 * 20, 24 * 20)


def test_resume_at_any_step_is_exact():
    """N steps, a stop, N more = 2N steps at once: weights, EMA, optimiser, log; dropout on.

    Kills: a resume that loses the optimiser, the EMA, the data order or a part of the mean loss."""
    flags = (*SMALL, "--dropout", 0.3, "--save-every", 1)
    trains("--steps", 5, "--out", "whole", *flags)
    whole = checkpoint("whole")
    for stop in (1, 4):
        trains("--steps", stop, "--out", f"at{stop}", *flags)
        trains("--steps", 5, "--out", f"at{stop}", *flags)
        assert_equal(checkpoint(f"at{stop}"), whole)
        assert losses(f"at{stop}") == losses("whole")


def test_log_is_cut_back_to_the_checkpoint(capsys):
    """Lines after the checkpoint, and half a line, are gone when the run goes on; so is a line that
    a power cut has filled with zeros. A run that has no more to do says which flag gives it more."""
    trains(*SMALL, "--steps", 4)
    before = losses()
    with open("runs/images/log.jsonl", "a") as file:
        file.write('\0\0\0\n{"step": 6, "loss": 9}\n{"step": 8, "lo')
    trains(*SMALL, "--steps", 8)
    assert losses()[:2] == before and [e["step"] for e in losses()] == [2, 4, 6, 8]
    assert losses()[2]["loss"] != 9
    for steps in (8, 3):
        trains(*SMALL, "--steps", steps)
        assert "--steps" in said(capsys) and checkpoint()["step"] == 8


@pytest.mark.parametrize("flags", [
    "--image-size 9", "--image-size 8", "--flip --ema 1 --keep 1 --attention 4 8", "--predict x0 --no-ema-ramp",
    "--data-dir elsewhere --micro-batch 3", "--precision bf16 --grad-clip 2"])
def test_the_same_command_again_resumes(flags):
    """What is accepted once is accepted again, and changes nothing when all steps are done."""
    statuses = [train.main([*TINY, "--steps", "2", *flags.split()]) for _ in range(2)]
    assert statuses[0] == statuses[1] and statuses[0] in (0, 1, 2)
    assert Path("runs/images").exists() == (statuses[0] == 0)


def test_settings_that_would_change_the_run_are_refused(capsys):
    """A flag that contradicts the checkpoint is named, with both values; what was not said stays;
    steps may change; other images are refused."""
    trains("--steps", 2)
    for flags, names in ((("--seed", 1), "--seed 0 1"), (("--lr", 0.1), "--lr 0.001 0.1"),
                         (("--channels", 64), "--channels 32 64"), (("--no-flip",), "--flip True False"),
                         (("--batch-size", 8), "--batch-size 4 8")):
        trains("--steps", 4, *flags, expect=2)
        line = said(capsys)
        assert all(name in line for name in names.split()), line
    assert train.main("--dataset shapes --out runs/images".split()) == 1
    assert "shapes" in said(capsys)
    assert train.main("--dataset images.pt --steps 3 --device cpu --precision fp32".split()) == 0
    assert checkpoint()["settings"]["lr"] == 1e-3 and checkpoint()["step"] == 3
    torch.save(data.shapes(64, 8).flip(0), "images.pt")
    before = Path("runs/images/checkpoint.pt").read_bytes()
    trains("--steps", 4, expect=1)
    assert "images.pt" in said(capsys)
    assert Path("runs/images/checkpoint.pt").read_bytes() == before


class Seen(nn.Module):
    """A network of one weight, which remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.weight, self.given = nn.Parameter(torch.ones(1)), []

    def forward(self, x, t):
        self.given.append((x, t))
        return self.weight * x


def draws(step: int = 0, images=None, rank: int = 0, world: int = 1, **settings) -> tuple:
    """x_0, t and ε of `training_step`, T = 5, from what its network is given: by Eq. 4 the x_t of black
    images show ε, and then those of the images show x_0."""
    if images is None:
        images = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)  # not its own mirror image
    settings = {"seed": 0, "batch_size": 4096, "flip": True, "grad_clip": 1.0, "lr": 1e-3, "steps": 9, "warmup": 0,
                "decay": 0.0, "ema": 0.9, "ema_ramp": False, "micro_batch": None, "objective": "simple",
                "predict": "eps", **settings}
    s = ddpm.schedule_from_betas([0.3] * 5)

    def given(images) -> tuple[torch.Tensor, torch.Tensor]:
        net = Seen()
        train.training_step(train.Run(settings, images, net, net, ddpm.Model(s, net), Seen(), torch.optim.Adam(net.parameters()),
                                      torch.amp.GradScaler("cpu", enabled=False),
                                      Machine(torch.device("cpu"), torch.float32, rank, world), Path()), step)
        return net.given[0]
    (black, t), (x_t, again) = given(0 * images), given(images)
    assert torch.equal(t, again)
    root, deviation = (x[t].sqrt().float()[:, None, None, None] for x in (s.alpha_bars, 1 - s.alpha_bars))
    eps = (black + root) / deviation
    return (x_t - deviation * eps) / root, t, eps


def test_alg1_draws():
    """t is uniform on 1 … T, both ends drawn; ε standard; half of the images are mirrored.

    Kills: the top t never drawn, t = 0 drawn, noise of another scale."""
    x0, t, eps = draws()
    counts = torch.bincount(t, minlength=6)
    assert counts[0] == 0 and len(counts) == 6
    assert ((counts[1:] - 819.2).abs() < 5 * 26).all()
    assert abs((x0[:, 0, 0, 0] > 0).double().mean() - 0.5) < 5 * 0.5 / 64
    assert set(map(tuple, x0.flatten(1).round(decimals=3).tolist())) == {(-1.0, 1.0), (1.0, -1.0)}
    assert abs(eps.mean()) < 5 / 8192 ** 0.5 and abs(eps.std() - 1) < 0.04


def test_alg1_draws_are_a_function_of_seed_and_step():
    """The same (seed, step) draws the same; another seed or step draws something else; of three
    processes each has every third image.

    Kills: the same draws in every step, seed + step, draws that depend on the part of the batch."""
    first = draws(0, batch_size=9)
    for a, b in zip(first, draws(0, batch_size=9), strict=True):
        assert torch.equal(a, b)
    for rank in range(3):
        for a, b in zip(first, draws(0, rank=rank, world=3, batch_size=9), strict=True):
            assert torch.equal(a[[rank, rank + 3, rank + 6]], b)
    others = [round(draws(step, seed=seed, batch_size=8)[2][0, 0, 0, 0].item(), 4)
              for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2))]
    assert len(set(others)) == 5


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 9))
def test_epochs_are_permutations(n, batch, seed):
    """The batches, end to end, are one permutation of the images after another, each its own."""
    steps = 3 * n // batch + 1
    order = torch.cat([train.batch_indices(seed, n, k, batch) for k in range(steps)])
    epochs = order[:3 * n].view(-1, n) if len(order) >= 3 * n else order[:len(order) // n * n].view(-1, n)
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(n))
    if n > 20 and len(epochs) > 1:
        assert not torch.equal(epochs[0], epochs[1])


def stepped(steps: int):
    """A run after each of its steps, and its weights before that step."""
    run = train.begin(train.parse([*TINY, *map(str, SMALL)]), data.shapes(64, 8), {}, CPU, Path("x"))
    for k in range(steps):
        before = copy.deepcopy(run.net.state_dict())
        train.training_step(run, k)
        yield run, before


def test_ema_follows_the_weights_after_each_step():
    """average_k = d · average_{k−1} + (1 − d) · θ_k; d = 0.9999, or (1 + k)/(10 + k) if smaller.

    Kills: EMA before the optimiser's step, an average that still holds the initial noise."""
    ramp, constant = {"ema": 0.9999, "ema_ramp": True}, {"ema": 0.9999, "ema_ramp": False}
    assert train.ema_decay(ramp, 0) == 0.1 and train.ema_decay(ramp, 10 ** 6) == 0.9999
    assert train.ema_decay(constant, 0) == 0.9999
    want = None
    for step, (run, before) in enumerate(stepped(4), 1):
        want, d, net = want or before, step / (9 + step), run.net.state_dict()
        want = {k: d * want[k] + (1 - d) * v for k, v in net.items()}
        for key, value in run.ema.state_dict().items():
            torch.testing.assert_close(value, want[key], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(run.ema.state_dict()[k], net[k]) for k in want)


def test_warmup_is_linear_from_zero():
    """lr · min(k / warmup, 1) at step k = 0, 1, …, as in the authors' code: so far the weights go along
    Adam's m̂/(√v̂ + ε), and so the log says."""
    rates, name = [], "conv_out.weight"  # the others have no gradient yet
    for step, (run, before) in enumerate(stepped(5), 1):
        weight = run.net.conv_out.weight
        m, v = (run.adam.state[weight][key].double() for key in ("exp_avg", "exp_avg_sq"))
        way = m / (1 - 0.9 ** step) / ((v / (1 - 0.999 ** step)).sqrt() + 1e-8)
        gone = before[name].double() - weight.detach().double()
        rates.append(((gone * way).sum() / way.square().sum()).item())
    assert rates == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3], rel=1e-3, abs=1e-9)
    trains(*SMALL, "--steps", 5, "--log-every", 1)
    assert [entry["lr"] for entry in losses()] == pytest.approx(rates, rel=1e-3, abs=1e-9)


def test_flips_and_clipping_happen():
    """The images that the network is given are those of the step, some of them mirrored; the norm is
    clipped: after one step Adam's averages are 0.1 g.

    Kills: flips drawn and not applied, or upside down; a gradient that is measured and not
    clipped."""
    images, flipped = torch.load("images.pt"), 0
    images[:, :, :, 0] = 255                                   # now no image is its mirror image
    for k in range(4):
        rows = images[train.batch_indices(0, 64, k, 4)]
        for image, source in zip(data.to_uint8(draws(k, images, batch_size=4)[0]), rows, strict=True):
            flip = not torch.equal(image, source)
            assert not flip or torch.equal(image, source.flip(2))
            flipped += flip
    assert 0 < flipped < 16
    trains(*SMALL, "--steps", 1, "--grad-clip", 0.01)
    averages = [state["exp_avg"] for state in checkpoint()["adam"]["state"].values()]
    norm = 10 * torch.cat([x.flatten() for x in averages]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3) and losses()[0]["grad_norm"] > 0.02


def test_training_learns():
    """The loss falls from 1, what predicting 0 costs, to half of it within sixty steps."""
    trains(*SMALL, "--steps", 60, "--log-every", 5, "--batch-size", 16, "--lr", 3e-3)
    assert losses()[0]["loss"] > 0.9 and losses()[-1]["loss"] < 0.5


def test_objective_vlb_logs_the_bound(capsys):
    """--objective vlb: the log shows T × mean + L_T; learned variance trains and samples."""
    trains(*SMALL, "--steps", 2, "--objective", "vlb", "--variance", "learned")
    entry, bar = losses()[0], 5.8674e-11   # ᾱ_20 of β from 0.005 to 0.999 in equal steps
    x0 = torch.load("images.pt").double() / 127.5 - 1
    L_T = (bar * x0 ** 2 - bar - math.log(1 - bar)).mean() / 2 / math.log(2)
    assert entry["bound"] == pytest.approx(20 * entry["loss"] + L_T.item(), rel=1e-9)
    assert checkpoint()["net"]["conv_out.weight"].shape[0] == 6
    assert sample.main(["--n", "1"]) == 0 and evaluate.main(["--n", "2"]) == 0
    capsys.readouterr()
    assert sample.main(["--n", "1", "--steps", "5"]) == 2 and "--steps" in said(capsys)
    assert sample.main(["--n", "1", "--variance", "fixed_small"]) == 2


def test_the_logged_bound_has_its_L_T():
    """`bound` is T times the mean term and L_T, which is no small number where ᾱ_T is not.

    Kills: L_T left out, or taken of other images than the training's."""
    trains(*SMALL, "--steps", 2, "--objective", "vlb", "--timesteps", 60)
    first, last = 1e-4 * 1000 / 60, 0.02 * 1000 / 60
    bar = math.prod(1 - (first + (last - first) * i / 59) for i in range(60))
    x0 = torch.load("images.pt").double() / 127.5 - 1
    L_T = (bar * x0 ** 2 - bar - math.log(1 - bar)).mean().item() / 2 / math.log(2)
    entry = losses()[0]
    assert entry["bound"] - 60 * entry["loss"] == pytest.approx(L_T, rel=1e-3)


def test_the_objective_L_is_not_clipped():
    """A term of L is the weighted error of ε (Eq. 12), also where x̂_0 lies far outside [−1, 1].

    Kills: x̂_0 clipped inside the training objective, which takes away its gradient."""
    given = train.parse([*TINY, *map(str, SMALL), "--objective", "vlb", "--variance", "fixed_small"])
    run = train.begin(given, data.shapes(4, 8), {}, CPU, Path("x"))
    s, g = ddpm.make_schedule(50), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 3, 4, 4, generator=g, dtype=torch.float64).clamp(-1, 1)
    t, wrong = torch.tensor([7, 30, 50]), 5 + eps
    loss = train.OBJECTIVES["vlb"](replace(run.model, s=s, net=lambda x, t: wrong), x0, t, eps)
    bar, before = s.alpha_bars[t], s.alpha_bars[t - 1]
    beta, alpha = 1 - bar / before, bar / before
    weight = beta ** 2 / (2 * beta * (1 - before) / (1 - bar) * alpha * (1 - bar))
    torch.testing.assert_close(loss, weight * 25 / math.log(2))


@pytest.mark.parametrize("predict, variance, objective", [
    ("mean", "learned", "vlb"), ("mean", "fixed_large", "vlb"), ("mean", "fixed_small", "simple"),
    ("eps", "fixed_small", "vlb"), ("x0", "fixed_large", "simple")])
def test_table2_rows_train_sample_and_evaluate(predict, variance, objective, capsys):
    """Every combination of Table 2 (and x_0 prediction) goes through all three commands: a learned
    variance has twice the channels, the loss of the bound is in bits/dim, and so is the result."""
    trains(*SMALL, "--steps", 2, "--predict", predict, "--variance", variance, "--objective", objective)
    assert checkpoint()["net"]["conv_out.bias"].numel() == (6 if variance == "learned" else 3)
    entry, = losses()
    assert ("bound" in entry) == (objective == "vlb") and entry["loss"] > 0
    assert sample.main(["--n", "1"]) == 0
    assert read_png("samples.png").shape[1:] == (480, 480)
    capsys.readouterr()
    assert evaluate.main("--n 2 --terms 3".split()) == 0
    bits = float(re.search(r"bits/dim ≤ ([\d.]+)", capsys.readouterr().out)[1])
    assert 1 < bits < 1000 and (objective == "simple" or bits == pytest.approx(entry["bound"], rel=3))


# ------------------------------------------------------------- a network and a schedule of one's own

class Tokens(nn.Module):
    """A network without any convolution: patches of 2×2 pixels are tokens of a small mixer."""

    def __init__(self, settings: dict):
        super().__init__()
        self.side = settings["image_size"] // 2
        tokens, width = self.side ** 2, 4 * settings["in_channels"]
        self.time = nn.Embedding(settings["timesteps"] + 1, width)
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, width)
        self.across, self.along = nn.Linear(tokens, tokens), nn.Linear(width, width)

    def forward(self, x, t):
        h = nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)      # (B, tokens, 4C)
        h = h + self.time(t)[:, None]
        h = h + self.across(self.norm(h).transpose(1, 2)).transpose(1, 2)
        h = self.last(torch.relu(self.along(self.norm(h))))
        return nn.functional.pixel_shuffle(h.transpose(1, 2).unflatten(2, 2 * [self.side]), 2)


ALL_COMMANDS = """
import importlib, json, sys, torch, train
from extras import compress
from support import checkpoint, machine
status = lambda line: importlib.import_module(line[0]).main(line[1:])
cpu = machine.Machine(torch.device("cpu"), torch.float32)
trained = [status(line) for line in LINES] and checkpoint.load(machine=cpu)
image = torch.load("images.pt")[0]
assert torch.equal(compress.decode(trained, compress.encode(trained, image, 4))[0], image)
run = train.begin(train.parse(LINES[0][1:]), image[None], {}, cpu, "x")
print(json.dumps([run.model.s.alpha_bars.tolist(), trained.s.alpha_bars.tolist(), [status(line) for line in LINES[-1:]]]))
torch.save(trained.net.state_dict(), "loaded.pt")
"""


def test_a_network_and_a_schedule_of_ones_own(tmp_path):
    """In a clone in which `build_network` is another kind of network, and `make_schedule` has a branch
    more, all commands work: training, resuming to the bit, samples, evaluation, compression, in
    either precision and with the ᾱ_t of that schedule; diffusers has no network like it.

    Kills: a command that knows the layers of the U-Net, its settings or their precision, or that
    checks the name of a schedule."""
    def cosine(t: int) -> float:  # ᾱ_t of Nichol and Dhariwal, T = 20
        angle = lambda u: math.cos((u / 20 + 0.008) / 1.008 * math.pi / 2) ** 2
        return angle(t) / angle(0)
    clone = tmp_path / "clone"
    for folder in ("support", "extras"):
        shutil.copytree(HERE / folder, clone / folder)
    for file in HERE.glob("*.py"):
        shutil.copy(file, clone)
    with open(clone / "unet.py", "a") as file:
        file.write(f"\n\n{inspect.getsource(Tokens)}\nbuild_network = Tokens\n")
    betas, source = [min(1 - cosine(t) / cosine(t - 1), 0.999) for t in range(1, 21)], (HERE / "ddpm.py").read_text()
    end = source.index('"""', source.index('"""', source.index("def make_schedule(")) + 3) + 3
    branch = f"\n    if kind == 'cosine':\n        return schedule_from_betas({betas})"
    (clone / "ddpm.py").write_text(source[:end] + branch + source[end:])
    lines = []
    for precision in ("bf16", "fp32"):
        flags = [*TINY, "--schedule", "cosine", "--precision", precision]
        lines += [["train", *flags, "--steps", "6", "--out", f"whole-{precision}"],
                  ["train", *flags, "--steps", "3", "--out", f"runs/{precision}"],
                  ["train", *flags, *"--steps 6 --samples 1 --sample-steps 3 --out".split(), f"runs/{precision}"],
                  ["sample", *f"--n 2 --steps 4 --out {precision}.pt --device cpu --precision {precision}".split()],
                  ["evaluate", "--n", "2", "--terms", "2"]]
    lines += [["extras.weights", "runs/fp32", "folder"]]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", f"LINES = {lines}\n{ALL_COMMANDS}"],
                          capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    *bars, statuses = json.loads(done.stdout.splitlines()[-1])
    assert statuses == [1] and not Path("folder").exists() and "Traceback" not in done.stderr
    for found in bars:
        assert found[:20] == pytest.approx([cosine(t) for t in range(20)])
    assert_equal(dict(torch.load("loaded.pt")), dict(checkpoint("runs/fp32")["ema"]))
    for precision in ("bf16", "fp32"):
        parts, whole = checkpoint(f"runs/{precision}"), checkpoint(f"whole-{precision}")
        assert [name for name in parts["net"] if "weight" in name] == [
            "time.weight", "norm.weight", "last.weight", "across.weight", "along.weight"]
        for part in ("net", "ema", "adam"):
            assert_equal(parts[part], whole[part])
        assert_same_log(f"runs/{precision}", f"whole-{precision}")
        log = losses(f"runs/{precision}")
        assert log[-1]["loss"] < log[0]["loss"] and parts["settings"]["schedule"] == "cosine"
        assert read_png(f"runs/{precision}/samples-0000006.png").shape[1:] == (480, 480)
        x = torch.load(f"{precision}.pt")
        assert x.shape == (2, 3, 8, 8) and not torch.equal(x[0], x[1])


@pytest.mark.skipif(not importlib.util.find_spec("setuptools") or not importlib.util.find_spec("pip"),
                    reason="setuptools or pip is not installed")
def test_the_mathematics_and_the_network_can_be_installed(tmp_path):
    """A wheel of this folder holds ddpm and unet and nothing else; they import outside the clone,
    without the commands."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("pyproject.toml needs setuptools 77 or newer")
    clone = tmp_path / "clone"
    shutil.copytree(HERE, clone, ignore=lambda folder, names: [
        name for name in names if Path(folder) == HERE and name != "support"
        and name not in ("pyproject.toml", "README.md", "LICENSE") and not name.endswith(".py")])
    (tmp_path / "wheels").mkdir()
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    built = subprocess.run([sys.executable, "-c", build, tmp_path / "wheels"], cwd=clone, capture_output=True,
                           text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    wheel, = (tmp_path / "wheels").glob("ddpm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == {"ddpm.py", "unet.py"}
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    code = "import ddpm, unet; print(ddpm.__file__, unet.__file__, ddpm.make_schedule().T)"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path / "elsewhere", text=True,
                         check=True, capture_output=True, timeout=120,
                         env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    assert run.stdout.split() == [str(tmp_path / "site" / "ddpm.py"), str(tmp_path / "site" / "unet.py"), "1000"]


# --------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("flags, status, parts", [
    ("--lr 0", 2, "--lr 0"), ("--lr nan", 2, "--lr nan"), ("--steps -1", 2, "--steps"), ("--ema 1.5", 2, "--ema 1.5"),
    ("--dropout 1", 2, "--dropout"), ("--batch-size x", 2, "--batch-size x"), ("--predict v", 2, "--predict v eps"),
    ("--channels 40", 1, "40 32"), ("--beta-end 0.001", 2, "--beta-end"), ("--timesteps 1", 2, "--timesteps 2"),
    ("--dataset nowhere", 1, "nowhere cifar10 shapes"), ("--device tpu", 2, "--device tpu"),
    ("--step 3", 2, "--step --help"), ("--variance learned", 2, "--variance --objective"),
    ("--attention", 2, "--attention"), ("--attention 16", 2, "--attention 16"), ("--samples -1", 2, "--samples"),
    ("--sample-steps 1", 2, "--sample-steps 2"), ("--schedule cubic", 2, "--schedule cubic linear"),
    ("--init nothing.pt", 1, "nothing.pt"),
    ("--precision tf32", 2, "--precision tf32"), ("--out images.pt", 1, "images.pt")])
def test_train_mistakes_are_one_line(flags, status, parts, capsys):
    """Out of range, senseless together, unknown: one line that names the flag, the value and what
    can be chosen; status 2 for what the flags alone show to be wrong. No folder is left."""
    assert train.main([*TINY, "--steps", "1", *flags.split()]) == status
    err = capsys.readouterr().err.strip()
    assert all(part in err for part in parts.split()), err
    assert len(err.splitlines()) == 1 and "Traceback" not in err and "unforeseen" not in err
    assert not Path("runs/images").exists()


def test_sample_and_evaluate_mistakes_are_one_line(capsys):
    """No run yet, wrong endings, impossible steps, too many images, a dataset of another shape; what
    does not go together. Each line names what is wrong, and nothing is written."""
    assert sample.main([]) == 1 and "runs" in said(capsys)
    trains(*SMALL, "--steps", 1)
    torch.save(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), "grey.pt")
    before = sorted(Path().rglob("*"))
    for main, flags, status, parts in (
            (sample, "--out x.jpg", 2, ".png"), (sample, "--out x.pt --shared", 2, ".png"),
            (sample, "--steps 21", 2, "21 20"), (sample, "--n 0", 2, "--n"),
            (sample, "--checkpoint none.pt", 1, "none.pt"), (sample, "--interpolate --time 21", 2, "21 20"),
            (sample, "--interpolate --dataset grey.pt --time 5", 1, "grey.pt (1,"),
            (sample, "--shared --progressive", 2, "--shared --progressive"), (sample, "--time 5", 2, "--interpolate"),
            (sample, "--dataset grey.pt", 2, "--interpolate"), (sample, "--sampler ddpm --eta 0.5", 2, "--eta ddim"),
            (sample, "--sampler ddim --variance fixed_small", 2, "--variance"), (sample, "--eta 1.5", 2, "--eta"),
            (sample, "--out images.pt/x.png", 1, "images.pt/x.png"), (evaluate, "--out images.pt", 1, "images.pt"),
            (evaluate, "--n 65", 1, "65 64"), (evaluate, "--terms 0", 2, "--terms"),
            (evaluate, "--dataset grey.pt", 1, "grey.pt (1,"), (evaluate, "--samples x.pt", 2, "--fid"),
            (evaluate, "--steps 4", 2, "--fid"), (evaluate, "--fid --terms 3", 2, "--terms --fid"),
            (evaluate, "--fid --samples none.pt", 1, "none.pt"),
            (evaluate, "--fid --samples images.pt --n 3", 2, "--n"),
            (evaluate, "--fid --samples images.pt --inception none.pt", 1, "none.pt")):
        assert main.main(flags.split()) == status, flags
        line = said(capsys)
        assert all(part in line for part in parts.split()) and "unforeseen" not in line, (flags, line)
    assert sorted(Path().rglob("*")) == before


def test_a_place_that_cannot_be_written_is_an_error_before_the_work(capsys):
    """The network is not called once: neither for samples nor for figures, nor for files.

    Kills: hours of work that end with "no such folder"."""
    trains(*SMALL, "--steps", 1)
    Path("file").write_text("")
    Path("folder.png").mkdir()

    calls = []
    for main, flags in ((sample.main, "--n 2 --out file/x.png"), (sample.main, "--n 2 --out file/x.pt"),
                        (sample.main, "--n 2 --out file/folder"), (sample.main, "--n 2 --out folder.png"),
                        (sample.main, "--progressive --out file/x.png"), (sample.main, "--shared --out folder.png"),
                        (compress.main, "encode images.png file/x.ddpm")):
        with hooked(nn.Module, lambda *_: calls.append(1)):
            assert main(flags.split()) == 1 and not calls, flags
        assert "file" in (line := said(capsys)) or "folder.png" in line
        assert "unforeseen" not in line


@pytest.mark.parametrize("call, flags, step, saved, lines", [
    (4, "--log-every 5 --save-every 3", 6, 3, [2, 3, 5]), (2, "--log-every 5 --save-every 9", 4, 2, [2])])
def test_a_step_that_is_not_finite_ends_the_run(capsys, call, flags, step, saved, lines):
    """The step is named, also if its numbers are read some steps later; the checkpoint before it is
    intact, and neither a checkpoint nor a line of the log is written after it."""
    trains(*SMALL, "--steps", 2)
    calls = []
    with hooked(UNet, lambda net, x, y: calls.append(1) or (y * math.nan if len(calls) == call else None), after=True):
        trains(*SMALL, "--steps", 12, *flags.split(), expect=1)
    assert f"step {step}:" in (line := said(capsys)) and "runs/images" in line
    assert checkpoint()["step"] == saved and [entry["step"] for entry in losses()] == lines
    assert all(x.isfinite().all() for x in checkpoint()["net"].values())
    assert {path.name for path in Path("runs/images").iterdir()} <= {
        "checkpoint.pt", "log.jsonl", "loss.png", "settings.json", ".lock"}


# -------------------------------------------------------------------------------- nothing is lost

@given(st.integers(0, 2 ** 40), st.integers(1, 255), st.booleans())
def test_a_damaged_checkpoint_is_refused(tmp_path_factory, where, flip, cut):
    """Cut anywhere or any byte changed: ValueError with its name, never other weights."""
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    checkpoints.save_checkpoint(path, {"step": 2, "settings": SETTINGS, "w": torch.arange(50.0)})
    raw = bytearray(path.read_bytes())
    raw = raw[:where % len(raw)] if cut else raw
    if not cut:
        raw[where % len(raw)] ^= flip
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="checkpoint.pt"):
        checkpoints.load_checkpoint(path)


def test_a_failed_save_leaves_the_last_checkpoint(capsys):
    """A full disk, a rename that fails, a file where the folder should be: one line, nothing
    lost."""
    trains(*SMALL, "--steps", 2)
    resource = pytest.importorskip("resource", reason="Windows has no limits of this kind")
    good, limit = checkpoint(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        trains(*SMALL, "--steps", 4, expect=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "checkpoint.pt" in said(capsys)
    assert_equal(checkpoint(), good)
    assert not list(Path("runs/images").glob(".*.part"))

    def lose(frame) -> None:  # what is about to get its name
        if frame.f_locals["path"].name == "checkpoint.pt":
            os.unlink(frame.f_locals["part"])
    with when_called({os.replace: lose}):
        trains(*SMALL, "--steps", 4, expect=1)
    assert "checkpoint.pt: No such file" in said(capsys)
    assert_equal(checkpoint(), good)
    assert not list(Path("runs/images").glob(".*.part"))
    Path("file").write_text("")
    trains(*SMALL, "--steps", 1, "--out", "file/run", expect=1)
    assert "file" in said(capsys)


TOLD = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
static void tell(const char *what, struct stat *s, const char *name) {
    FILE *file = fopen(getenv("TOLD"), "a");
    fprintf(file, "%s %lu %ld %s\n", what, (unsigned long)s->st_ino, (long)s->st_size, name);
    fclose(file);
}
int fsync(int fd) {
    struct stat s;
    fstat(fd, &s);
    tell(S_ISDIR(s.st_mode) ? "folder" : "file", &s, "-");
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
int rename(const char *a, const char *b) {
    struct stat s;
    if (!stat("runs/images/log.jsonl", &s)) tell("log", &s, "-");
    stat(a, &s);
    tell("name", &s, b);
    return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(a, b);
}
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("gcc"), reason="it needs Linux and gcc")
def test_what_takes_its_name_is_on_the_disk():
    """Before a file takes its final name its bytes are flushed, and after it the folder; the log is
    flushed before the checkpoint that counts on it: a library between Python and the system writes
    down what the system is told.

    Kills: a power cut that leaves a checkpoint with holes, or one beside an empty log."""
    Path("told.c").write_text(TOLD)
    subprocess.run("gcc -shared -fPIC -o told.so told.c -ldl".split(), check=True)
    process = script(*SMALL, "--steps", 4, "--log-every", 1, "--save-every", 2, "--keep", 2,
                     LD_PRELOAD=str(Path("told.so").resolve()), TOLD=str(Path("told").resolve()))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    told = [(what, int(inode), int(size), Path(name)) for what, inode, size, name in
            (line.split(" ", 3) for line in Path("told").read_text().splitlines())]
    flushed, log, named = {}, (0, 0), []
    for i, (what, inode, size, name) in enumerate(told):
        if what == "file":
            flushed[inode] = size
        if what == "log":
            log = inode, size
        if what == "name" and name.parent == Path("runs/images"):
            assert flushed[inode] == size and told[i + 1][0] == "folder", name
            assert name.name != "checkpoint.pt" or flushed[log[0]] == log[1] > 0
            named.append(name.name)
    assert {"checkpoint.pt": 2, "settings.json": 1, "log.jsonl": 1, "ema-0000002.pt": 1}.items() <= {
        name: named.count(name) for name in named}.items()


def test_leftovers_are_cleaned_up():
    """What a kill left half-written is gone after the next start; other people's files are not."""
    trains(*SMALL, "--steps", 1)
    for name in (".0123456789abcdef.part", "film.part", "my.log.part", "notes.txt"):
        Path("runs/images", name).write_bytes(b"half")
    trains(*SMALL, "--steps", 2)
    found = {path.name for path in Path("runs/images").iterdir()}
    assert {"film.part", "my.log.part", "notes.txt"} < found and ".0123456789abcdef.part" not in found


def script(*flags, **environment) -> subprocess.Popen:
    """train.py in a process of its own."""
    return subprocess.Popen([sys.executable, HERE / "train.py", *TINY, *map(str, flags)],
                            stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def wait_for(condition) -> None:
    """Until it is true, a minute at most."""
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def test_a_signal_loses_no_step(capsys):
    """Wherever it comes, in a step, after it, before the next one or in a grid: the checkpoint is
    that of the last step that was begun, the status tells which signal it was, and the same command
    goes on to the bits and the files of an undisturbed run.

    Kills: a stop between two checkpoints that saves none, half a step, a grid that is drawn to its
    end before the command stops, or never."""
    flags = (*SMALL, "--steps", 7, "--dropout", 0.2, "--save-every", 6, "--keep", 4, "--samples", 1,
             "--sample-steps", 2, "--sample-every", 4)
    trains(*flags, "--out", "whole")
    for place, when, number, last in (("training_step", 3, signal.SIGINT, 3), ("log", 1, signal.SIGTERM, 3),
                                      ("draw_grid", 1, signal.SIGINT, 4), ("monotonic", 7, signal.SIGTERM, 4)):
        calls, steps = [], []

        def interrupt(frame, place=place, when=when, number=number, calls=calls, steps=steps) -> None:
            steps.append(1) if frame.f_code is train.training_step.__code__ else None
            if place in (frame.f_code.co_name, "monotonic" if frame.f_code is train.train.__code__ else ""):
                calls.append(1)
                if len(calls) == when:
                    signal.raise_signal(number)
        with when_called(dict.fromkeys((train.training_step, train.log, train.draw_grid, time.monotonic), interrupt)):
            trains(*flags, "--out", place, expect=128 + number)
        assert len(calls) >= when and len(steps) == last           # a grid is not drawn to its end
        assert checkpoint(place)["step"] == last, place
        assert "Traceback" not in capsys.readouterr().err
        trains(*flags, "--out", place)
        assert_equal(checkpoint(place), checkpoint("whole"))
        assert_same_log(place)
        assert {path.name for path in Path(place).iterdir()} == {path.name for path in Path("whole").iterdir()}


def test_a_process_of_its_own_stops_and_says_how_to_go_on(capsys):
    """SIGTERM: the step is finished, the run saved; another process is refused meanwhile, and leaves
    the run as it is."""
    process = script(*SMALL, "--steps", 100_000, "--save-every", 100_000)
    wait_for(lambda: Path("runs/images/log.jsonl").exists() and Path("runs/images/log.jsonl").stat().st_size)
    assert train.main([*TINY, "--steps", "3"]) == 1            # two processes on one folder
    assert "runs/images" in said(capsys)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    step = checkpoint()["step"]
    assert f"step {step};" in err.splitlines()[-1] and "Traceback" not in err
    trains(*SMALL, "--steps", step, "--out", "whole")
    for part in ("net", "ema", "adam"):
        assert_equal(checkpoint()[part], checkpoint("whole")[part])


def test_a_run_that_begins_is_nobody_elses():
    """From before its checkpoint is read, another command with the folder is refused.

    Kills: a checkpoint that is read before the folder is locked, and then believed."""
    trains(*SMALL, "--steps", 2)
    begun, steps = [], []

    def other(frame) -> None:
        if not begun:
            begun.append(1)
            trains(*SMALL, "--steps", 4, expect=1)
    with when_called({checkpoints.load_checkpoint: other, train.training_step: lambda frame: steps.append(frame.f_locals["k"])}):
        status = train.main([*TINY, *map(str, SMALL), "--steps", "6"])
    assert (begun, status, steps) == ([1], 0, [2, 3, 4, 5]) and checkpoint()["step"] == 6


def test_kill_at_random_instants_loses_nothing(long):
    """kill −9 again and again: the run still ends with the bits of an undisturbed one, and with all
    its files: kept averages and grids, also those of steps that a kill came between."""
    steps, kills = (600, 100) if long else (24, 1)
    flags = (*SMALL, "--steps", steps, "--save-every", 3, "--dropout", 0.1, "--keep", steps // 8,
             "--samples", 1, "--sample-steps", 2, "--sample-every", steps // 4)
    trains(*flags, "--out", "whole")
    g, killed, ended = torch.Generator().manual_seed(0), 0, 0
    while killed < kills or not ended:
        instant, file = torch.rand(1, generator=g).item(), Path("killed", "log.jsonl" if long else "checkpoint.pt")
        if killed < kills:
            before = file.stat().st_ino if file.exists() else None
            process = script(*flags, "--out", "killed")
            if not (long and killed % 2):                      # every second one of many comes at any time
                wait_for(lambda: file.exists() and file.stat().st_ino != before)   # a run writes it anew
            try:
                _, err = process.communicate(timeout=4 * instant if long else instant / 4)
                assert process.returncode == 0, err
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
                continue
        else:
            trains(*flags, "--out", "killed")
        assert_equal(checkpoint("killed"), checkpoint("whole"))
        assert losses("killed") == losses("whole")
        files = sorted(path.name for path in Path("killed").iterdir())
        assert files == sorted(path.name for path in Path("whole").iterdir())
        made = [name for name in files if name.startswith(("ema-", "samples-"))]
        assert len(made) == 8 + 4 + bool(steps % (steps // 8))
        for name in made:
            assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes()
        shutil.rmtree("killed")                                # and again, until killed often enough
        ended += 1
    print(f"killed {killed} times; {ended} runs ended with the same bits")


def torchrun(first: list[str], second: list[str]) -> None:
    """train.py, and then sample.py in the same processes, under two gloo ranks on the CPU."""
    Path("both.py").write_text(f"""import os, sys, sample, train
cut = sys.argv.index("then")
assert train.main(sys.argv[1:cut]) == 0
os.environ.update(MASTER_PORT="{free_port()}", TORCHELASTIC_USE_AGENT_STORE="False")  # torchrun's is for one meeting
assert sample.main(sys.argv[cut + 1:]) == 0
""")
    # "--": torchrun would take --n for the beginning of its own --nnodes
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--",
                    "both.py", *first, "then", *second], check=True, timeout=120, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})


def test_two_ranks_are_one_run():
    """The global batch, its images, times and noise do not depend on the number of ranks; nor do the
    samples.

    Kills: the same seed on every rank, images drawn twice, a gradient summed over ranks."""
    flags = [*TINY, "--steps", "4", "--dropout", "0", "--micro-batch", "1"]
    samples = "--checkpoint one --n 5 --steps 5 --device cpu --precision fp32 --out".split()
    assert train.main([*flags, "--out", "one"]) == 0
    torchrun([*flags, "--out", "two"], [*samples, "b.pt"])
    one, two = checkpoint("one"), checkpoint("two")
    for key in one["net"]:
        torch.testing.assert_close(two["net"][key], one["net"][key], rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(two["ema"][key], one["ema"][key], rtol=1e-3, atol=2e-5)
    for a, b in zip(losses("one"), losses("two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["loss_thirds"] == pytest.approx(b["loss_thirds"], rel=1e-4)

    assert sample.main([*samples, "a.pt"]) == 0
    a, b = torch.load("a.pt"), torch.load("b.pt")
    assert a.shape == b.shape and (a.int() - b.int()).abs().max() <= 1
    assert len(b.flatten(1).unique(dim=0)) == 5


def ranks(*folders) -> list[subprocess.Popen]:
    """train.py as so many processes of one run, each in a folder of its own, as on two machines."""
    port, found = free_port(), []
    for rank, folder in enumerate(folders):
        os.makedirs(folder, exist_ok=True)
        shutil.copy("images.pt", folder)
        environment = dict(os.environ, OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE="2",
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        found.append(subprocess.Popen([sys.executable, HERE / "train.py", *TINY,
                                       *map(str, SMALL), "--steps", "4"], cwd=folder,
                                      stderr=subprocess.PIPE, text=True, env=environment))
    return found


def test_machines_without_a_shared_folder():
    """The process of a machine that lacks the folder of the run would begin at step 0 beside one that
    goes on: both end, in one line, and nothing is trained.

    Kills: gradients of different steps that are averaged without a word."""
    trains(*SMALL, "--steps", 2, "--out", "a/runs/images")
    before = Path("a/runs/images/checkpoint.pt").read_bytes()
    for process in ranks("a", "b"):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1 and "agree" in err.splitlines()[-1] and "Traceback" not in err
    assert Path("a/runs/images/checkpoint.pt").read_bytes() == before


def test_a_process_that_waits_for_another_hears_a_signal():
    """Also before they have met, where the waiting is not Python's."""
    process, = ranks("a")
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode != 0


def test_two_commands_do_not_write_one_folder(capsys):
    """While one draws, the other is refused in one line."""
    trains(*SMALL, "--steps", 1)
    flags = "--n 2 --steps 2 --out drawn --device cpu --precision fp32".split()
    assert sample.main(flags) == 0
    kept = {path.name: path.read_bytes() for path in Path("drawn").iterdir()}
    with command.locked(Path("drawn")):
        assert sample.main([*flags[:1], "4", *flags[2:]]) == 1
    assert "drawn" in said(capsys)
    assert {path.name: path.read_bytes() for path in Path("drawn").iterdir()} == kept


def test_a_state_is_that_of_this_network(capsys):
    """A sealed checkpoint whose averages of Adam have another shape is refused before fused Adam
    trusts them; what Adam is set to comes from the code, not from the file."""
    trains(*SMALL, "--steps", 2)
    path, good = Path("runs/images/checkpoint.pt"), checkpoint()
    for wrong in (torch.ones(3), torch.ones(1), torch.ones(100_000)):
        bad = copy.deepcopy(good)
        bad["adam"]["state"][0]["exp_avg"] = wrong
        checkpoints.save_checkpoint(path, {key: value for key, value in bad.items() if key != "format"})
        trains(*SMALL, "--steps", 4, expect=1)
        assert "Adam" in said(capsys)
    bad = copy.deepcopy(good)
    bad["adam"]["param_groups"][0] |= {"betas": (0.5, 0.5), "eps": 1.0, "weight_decay": 9.0}
    checkpoints.save_checkpoint(path, {key: value for key, value in bad.items() if key != "format"})
    trains(*SMALL, "--steps", 4)
    trains(*SMALL, "--steps", 4, "--out", "whole")
    assert_equal(checkpoint()["net"], checkpoint("whole")["net"])
    assert checkpoint()["adam"]["param_groups"][0]["betas"] == (0.9, 0.999)


def test_the_same_images_by_another_path(capsys):
    """A run knows its images by their content: another path to them goes on, other images do not.
    A folder named by a point gives the run its name."""
    trains(*SMALL, "--steps", 1)
    trains(*SMALL, "--steps", 2, "--dataset", Path("images.pt").resolve())
    assert checkpoint()["step"] == 2
    torch.save(torch.load("images.pt").flip(0), "others.pt")
    trains(*SMALL, "--steps", 3, "--dataset", "others.pt", "--out", "runs/images", expect=1)
    assert "others.pt" in said(capsys) and checkpoint()["step"] == 2
    train.main([*TINY, "--dataset", ".", "--steps", "1"])
    assert not Path("runs/checkpoint.pt").exists()


def test_compile_falls_back(monkeypatch):
    """Where torch.compile fails, training goes on without it, with the same numbers; where it works,
    too. The compiler is told that shapes do not change: none of them is a symbol, though the two
    parts of this batch have two shapes."""
    import torch._dynamo
    given = []

    def fails(graph, inputs):
        given.append([])
        raise RuntimeError("no C++ compiler\nand more lines")

    def works(graph, inputs):
        given.append(inputs)
        return graph.forward
    flags = (*SMALL, "--warmup", 0, "--steps", 1, "--batch-size", 5, "--micro-batch", 3, "--dropout", 0)
    trains(*flags, "--out", "plain")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(suppress_errors=False):
        for backend, n in ((fails, 1), (works, 2)):
            given.clear()
            monkeypatch.setattr(machine, "BACKEND", backend)
            trains(*flags, "--compile", "--out", backend.__name__)
            assert len(given) == n and all(isinstance(x, torch.Tensor) for inputs in given for x in inputs)
            assert_equal(checkpoint(backend.__name__), checkpoint("plain"))
    torch._dynamo.reset()


def test_bench_runs(capsys):
    """The benchmark works on a tiny network: speeds, the limit, the peak of memory. No number is
    judged."""
    import bench
    assert bench.main("--channels 32 --multipliers 1 --repeat 1 --batch-size 1 --device cpu".split()) == 0
    out = capsys.readouterr().out
    for text in ("ours +train", "ours +sample", "convolutions +train", "GFLOP/s"):
        assert re.search(text, out)
