"""train.py: its settings, each number, seed and decision of a step, the loop and its log, recomputed by hand."""
import contextlib
import copy
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import ddpm
import evaluate
import sample
import train
from helpers import (CPU, FIXED, SMALL, TINY, alpha_bars, as_flags, assert_equal, begin, checkpoint, log, losses,
                     processes, random_run, read_png, run_of, said, trains)
from support import checkpoint as checkpoints, data, machine
from support.checkpoint import load_checkpoint
from support.command import UsageError, stop
from support.machine import Machine, seed_of
from unet import build_network

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
PAPER = {  # §4 and Appendix B; of the released code alone: flips as a choice, warm-up, clipping
    "flip": True, "steps": 800_000, "batch_size": 128, "lr": 2e-4, "warmup": 5000, "decay": 0.0,
    "grad_clip": 1.0, "ema": 0.9999, "dropout": 0.1, "channels": 128, "multipliers": [1, 2, 2, 2], "blocks": 2,
    "attention": [16], "timesteps": 1000, "schedule": "linear", "beta_start": 1e-4,
    "beta_end": 0.02, "predict": "eps", "variance": "fixed_large", "objective": "simple",
    # and what it does not say: how a run is watched
    "dataset": "cifar10", "skip_bad": False, "image_size": None, "seed": 0, "micro_batch": None, "ema_ramp": True, "log_every": 100,
    "save_every": 5000, "sample_every": 25_000, "samples": 64, "sample_steps": 50, "keep": None}
HUGE = {**PAPER, "steps": 500_000, "batch_size": 64, "lr": 2e-5, "dropout": 0.0,
         "multipliers": [1, 1, 2, 2, 4, 4], "variance": "fixed_small", "samples": 16}
SHAPES = {**PAPER, "dataset": "shapes", "steps": 1600, "batch_size": 16, "lr": 5e-3,
          "warmup": 100, "decay": 0.6, "ema": 0.99, "dropout": 0.0, "channels": 64, "multipliers": [1, 1],
          "blocks": 1, "attention": [], "timesteps": 500, "schedule": "quadratic", "variance": "fixed_small",
          "save_every": 800, "sample_every": 800, "samples": 16, "sample_steps": 50}


@pytest.fixture(autouse=True)
def no_signal():
    """Each test begins without a signal."""
    yield
    stop.number, stop.later = 0, False


# ------------------------------------------------------------------------------------- the settings

LEARNED = {"variance": "learned", "objective": "vlb"}


def settled(given=(), stored=(), init=(), shape=(1, 3, 16, 16)) -> dict:
    given = {"dataset": "shapes", **dict(given)}
    base = {**train.defaults(given["dataset"], shape[2]), **dict(init), **dict(stored)}
    return train.settle(base, given, shape[1:])


@pytest.mark.parametrize("flags, side, table", [
    ("", 32, PAPER), ("--dataset cifar10", 32, PAPER), ("--dataset x.pt", 64, PAPER), ("--dataset x.pt", 255, {**PAPER, "attention": []}),
    ("--dataset mnist", 32, {**PAPER, "flip": False}), ("--dataset fashion_mnist", 32, {**PAPER, "flip": False}),
    ("--dataset x.pt", 256, HUGE), ("--dataset .", 1024, {**HUGE, "attention": []}), ("--dataset x.pt --lr 1", 256, {**HUGE, "lr": 1.0}),
    ("--dataset shapes", 16, SHAPES), ("--dataset shapes", 256, HUGE)])
def test_appendix_b_the_papers_settings(flags, side, table):
    """What a run without further flags does is the paper's Appendix B, at 32×32 and at 256×256, for each
    kind of images, with attention where a level has 16×16 pixels; the learning rate and the decay of the averages are the ones of the table."""
    given = train.parse(flags.split())
    settings = train.settle(train.defaults(given.get("dataset"), side), given, (3, side, side))
    assert settings == {**table, "dataset": given.get("dataset", "cifar10"), "in_channels": 3, "image_size": side,
                        "init": None}
    assert table["decay"] or train.learning_rate(settings, 10 ** 6) == table["lr"]
    assert train.ema_decay(settings, 10 ** 6) == table["ema"]


WHOLE = {"image_size": (1, 4096), "steps": (1, 10 ** 9), "batch_size": (1, 10 ** 6),
         "micro_batch": (1, 10 ** 9), "warmup": (0, 10 ** 9), "channels": (1, 4096),
         "multipliers": (1, 64), "blocks": (1, 32), "attention": (1, 4096),
         "timesteps": (2, 10 ** 5), "seed": (0, 2 ** 63 - 1), "log_every": (1, 10 ** 4),
         "save_every": (1, 10 ** 9), "sample_every": (1, 10 ** 9), "keep": (1, 10 ** 9),
         "samples": (0, 10 ** 4), "sample_steps": (2, 10 ** 5)}
REAL = {"lr": (1e-12, 1000), "grad_clip": (1e-12, 1e9), "decay": (0, 1), "ema": (0, 1), "dropout": (0, 0.99),
        "beta_start": (1e-12, 0.999), "beta_end": (1e-12, 0.999)}
WORDS = {"predict": ("eps", "x0", "mean"), "objective": ("simple", "vlb"),
         "variance": ("fixed_large", "fixed_small", "learned")}


def test_every_flag_has_its_type_and_its_range():
    """Both ends of a range are taken, and what lies beyond is refused, as is anything else."""
    def parsed(name, *words):
        return train.parse(["--" + name.replace("_", "-"), *map(str, words)])[name]

    def refused(name, *words):
        with pytest.raises(UsageError, match="--" + name.replace("_", "-") + "|: -inf"):  # which looks like a flag
            parsed(name, *words)
    for name, (low, high) in {**WHOLE, **REAL}.items():
        kind, beyond = (int, (low - 1, high + 1, "1.5")) if name in WHOLE else (
            float, (math.nextafter(low, -1), math.nextafter(high, math.inf)))
        for end in (low, high):
            value = parsed(name, end)
            assert value == ([end] if name in ("multipliers", "attention") else end)
            assert type(value) in (kind, list)
        for text in (*beyond, "x", "nan", "inf", "-inf"):
            refused(name, text)
        if name not in ("multipliers", "attention"):
            refused(name)
    for name in ("multipliers", "attention"):
        assert parsed(name, 4, 8, 1) == [4, 8, 1] and parsed(name) == []
        refused(name, 4, 0)
    for name, words in WORDS.items():
        assert [parsed(name, word) for word in words] == list(words)
        refused(name, "other")
    switches, texts = ("flip", "ema_ramp", "skip_bad"), ("dataset", "schedule")
    for name in switches:
        flag = name.replace("_", "-")
        assert train.parse([f"--{flag}"])[name] is True and train.parse([f"--no-{flag}"])[name] is False
    assert [parsed(name, "any thing") for name in (*texts, "init", "data_dir")] == ["any thing"] * 4
    for name in (*texts, "init"):
        refused(name, " ")
    assert {*WHOLE, *REAL, *WORDS, *switches, *texts} == set(train.SETTINGS)


def test_help_shows_every_setting_with_its_value(capsys, monkeypatch):
    """--help has each meaning and the paper's value, and what differs for other data sets."""
    monkeypatch.setenv("COLUMNS", "500")                           # so that no word is broken
    assert train.main(["--help"]) == 0
    options, _, epilog = capsys.readouterr().out.split("\noptions:")[1].partition("\n\n")
    shown = {entry.split()[0].rstrip(","): " ".join(entry.split()) for entry in options.split("\n  --")}
    for name, (value, _, meaning) in train.SETTINGS.items():
        entry = shown[name.replace("_", "-")]
        assert meaning + (f" (default: {value})" if value is not None else "") in entry
        assert (value is None) == (f"{meaning} (default: " not in entry)
    assert all(word in shown[name] for name, words in WORDS.items() for word in words)
    assert len(train.RECIPES) == 4
    for recipe in train.RECIPES.values():
        assert all(f"{key} {value}" in " ".join(epilog.split()) for key, value in recipe.items())


def test_a_flag_that_is_not_given_has_no_entry():
    others = {"out": None, "compile": None, "deterministic": False, "rescue": False, "device": None,
              "precision": None, "data_dir": "data"}
    assert train.parse([]) == others
    assert train.parse("--no-flip --attention 8 4 --lr 1 --no-compile".split()) == {
        **others, "flip": False, "attention": [8, 4], "lr": 1.0, "compile": False}


def test_flags_go_before_the_checkpoint_the_checkpoint_before_init_and_init_before_the_recipe():
    images = {"in_channels": 3, "image_size": 16, "init": None}
    assert settled({"out": "x"}) == {**SHAPES, **images}
    assert settled({"init": "other"})["init"] == "other"
    assert settled(shape=(1, 1, 8, 8))["in_channels"] == 1
    assert settled(init={"channels": 96})["channels"] == 96
    assert settled({"steps": 7}, {"steps": 5, "keep": 3})["steps"] == 7
    stored = settled(stored={"steps": 5, "lr": 0.5, "channels": 96}, init={"channels": 96})
    assert (stored["steps"], stored["lr"], stored["channels"]) == (5, 0.5, 96)


def test_where_the_images_of_a_run_are_looked_for():
    """Those of the training, in the folder of the data, with the side of the run that goes on; CIFAR-10
    if none are named. The folder of the run has the name of the data, unless it is said."""
    small = [*"--device cpu --precision fp32 --channels 32 --multipliers 1 --blocks 1 --samples 0".split(),
             *"--batch-size 1 --steps".split()]
    for name in ("b.pt", "c.d.pt"):
        shutil.copy("images.pt", name)
    with tarfile.open("cifar-10-binary.tar.gz", "w:gz") as archive:  # of which only the training images are there
        for i in range(1, 6):
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i}.bin")
            entry.size = 3073
            archive.addfile(entry, io.BytesIO(bytes([i] * 3073)))
    for place in ("data", "there"):
        Path(place).mkdir()
        shutil.copy("cifar-10-binary.tar.gz", place)
    for steps, flags, folder in ((1, [], "cifar10"), (2, ["--data-dir", "there"], "cifar10"),
                                 (1, ["--dataset", "b.pt", "--attention", "8"], "b"),
                                 (1, ["--dataset", "c.d.pt"], "c.d"),
                                 (1, ["--dataset", "shapes", "--image-size", "8", "--decay", "0"], "shapes"),
                                 (2, ["--dataset", "shapes"], "shapes")):
        assert train.main([*small, str(steps), *flags]) == 0
        state = load_checkpoint(Path("runs", folder, "checkpoint.pt"))
        assert state["step"] == steps
        shutil.rmtree("data", ignore_errors=True)
        if folder != "cifar10":
            assert state["data"] == data.fingerprint(
                data.shapes(8192, 8) if folder == "shapes" else torch.load("b.pt"))


def test_flags_that_contradict_the_network_of_init_are_refused(capsys):
    """The refusal has the setting and both values; nothing is left of the folder."""
    random_run("init")
    for flags, parts in (("--channels 64", ["--init", "channels", "32", "64"]),
                         ("--dataset shapes", ["--init", "image_size", "8", "16"])):
        assert train.main(["--init", "init", "--dataset", "images.pt", "--out", "new", *flags.split()]) == 2
        err = capsys.readouterr().err
        assert all(part in err for part in parts) and err.count("\n") == 1 and not Path("new").exists(), err


@pytest.mark.parametrize("given, init, shape, parts", [
    ({"attention": [16, 4]}, {}, 16, ["--attention", "4"]), ({"attention": [2, 4, 8]}, {}, 8, ["--attention", "2"]),
    ({"variance": "learned"}, {}, 16, ["--variance", "--objective"]),
    ({"variance": "learned", "predict": "mean"}, {}, 16, ["--objective"]), ({}, {}, (16, 8), ["16×8"]),
    ({"image_size": 32}, {}, 16, ["16×16", "--image-size"]), ({"multipliers": []}, {}, 16, ["--multipliers"])])
def test_settings_that_contradict_each_other_are_refused(given, init, shape, parts):
    """The refusal has the flags and the numbers that do not fit."""
    sides = shape if isinstance(shape, tuple) else (shape, shape)
    with pytest.raises(UsageError) as refusal:
        settled(given, init=init, shape=(1, 3, *sides))
    assert all(part in str(refusal.value) for part in parts)


@pytest.mark.parametrize("given, side", [
    ({"multipliers": [1, 1, 1], "attention": [12, 6, 3]}, 12), ({"multipliers": [1]}, 9), ({"image_size": 9}, 9),
    ({"objective": "vlb", "predict": "x0"}, 16), ({"sample_steps": 10 ** 5}, 16),
    (LEARNED, 16), ({**LEARNED, "predict": "x0"}, 16), ({**LEARNED, "predict": "mean"}, 16)])
def test_settings_that_fit_are_taken(given, side):
    settings = settled(given, shape=(1, 3, side, side))
    assert {name: settings[name] for name in given} == given


@pytest.mark.parametrize("flags, status, parts", [
    ("--lr 0", 2, "--lr 0"), ("--predict score", 2, "--predict score eps"), ("--channels 40", 2, "--channels 40 32"),
    ("--beta-end 0.001", 2, "--beta-end"), ("--dataset nowhere", 2, "nowhere cifar10 shapes"),
    ("--skip-bad", 2, "--skip-bad folder"),
    ("--ema 1 --no-ema-ramp", 2, "--ema"), ("--multipliers 1 1 1 1 1", 2, "--image-size --multipliers"),
    ("--device tpu", 2, "--device tpu"), ("--step 3", 2, "--step --help"),
    ("--variance learned", 2, "--variance --objective"), ("--attention 16", 2, "--attention 16"),
    ("--schedule cubic", 2, "--schedule cubic linear"), ("--init nothing.pt", 1, "nothing.pt"),
    ("--precision tf32", 2, "--precision tf32"), ("--out images.pt", 1, "images.pt")])
def test_train_mistakes_are_one_line(flags, status, parts, capsys):
    """Out of range, senseless together, unknown: one line that names the flag, the value and what
    can be chosen; status 2 for what the flags alone show to be wrong. No folder is left."""
    assert train.main([*TINY, "--steps", "1", *flags.split()]) == status
    err = capsys.readouterr().err.strip()
    assert all(part in err for part in parts.split()), err
    assert len(err.splitlines()) == 1 and "Traceback" not in err and "unexpected" not in err
    assert not Path("runs/images").exists()


# -------------------------------------------------------------------------------------- Algorithm 1

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
        train.training_step(train.Run(settings, images, net, net, ddpm.Model(s, net), Seen(),
                                      torch.optim.Adam(net.parameters()), torch.amp.GradScaler("cpu", enabled=False),
                                      Machine(torch.device("cpu"), torch.float32, rank, world), Path(), "", []), step)
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


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned"])
@pytest.mark.parametrize("predict", ["eps", "x0", "mean"])
def test_eq05_and_eq14_for_every_choice(predict, variance):
    """L_simple is the mean square error of what is predicted; a term of L is the Gaussian KL in
    bits/dim, of means by Eq. 7 and the variance that was chosen. In double precision, t > 1.

    x̂_0 lies far outside [−1, 1], and is not clipped."""
    s, g, t = ddpm.make_schedule(30), torch.Generator().manual_seed(0), torch.tensor([2, 9, 30])
    x0, eps, *out = torch.randn(4, 3, 2, 4, 4, generator=g, dtype=torch.float64)
    net = torch.cat(out, 1) if variance == "learned" else out[0]
    column = lambda c: c[:, None, None, None]
    bar, before = column(s.alpha_bars[t]), column(s.alpha_bars[t - 1])
    x_t, alpha = bar.sqrt() * x0 + (1 - bar).sqrt() * eps, bar / before

    def mean(x):  # Eq. 7
        return (before.sqrt() * (1 - alpha) * x + alpha.sqrt() * (1 - before) * x_t) / (1 - bar)

    def model(x, times):
        torch.testing.assert_close(x, x_t)
        assert times.tolist() == t.tolist()
        return net
    model = ddpm.Model(s, model, predict, variance, clip=False)
    if variance != "learned":
        target = {"eps": eps, "x0": x0, "mean": mean(x0)}[predict]
        torch.testing.assert_close(ddpm.loss_simple(model, x0, t, eps), (target - net).square().mean((1, 2, 3)))
    small = (1 - alpha) * (1 - before) / (1 - bar)
    v = {"fixed_large": 1 - alpha, "fixed_small": small, "learned": out[1].exp()}[variance]
    x0_hat = (x_t - (1 - bar).sqrt() * out[0]) / bar.sqrt() if predict == "eps" else out[0]
    off = mean(x0) - (out[0] if predict == "mean" else mean(x0_hat))
    kl = ((v / small).log() + (small + off ** 2) / v - 1) / 2
    torch.testing.assert_close(ddpm.loss_vlb(model, x0, t, eps), kl.mean((1, 2, 3)) / math.log(2))


def test_learning_rates_and_decays():
    """lr · min(k/warmup, 1) and min(ema, (1 + k)/(10 + k)); each constant without its ramp. In the
    last part of the steps the rate falls linearly, to where the step after the last would have 0."""
    settings = {"lr": 0.5, "warmup": 4, "decay": 0.0, "steps": 10, "ema": 0.25, "ema_ramp": True}
    rates = [train.learning_rate(settings, k) for k in (0, 1, 2, 4, 5, 9)]
    assert rates == [0, .125, .25, .5, .5, .5]
    assert [train.ema_decay(settings, k) for k in range(4)] == [1 / 10, 2 / 11, 3 / 12, 0.25]
    falls = {**settings, "decay": 0.5}
    assert [train.learning_rate(falls, k) for k in (1, 4, 5, 6, 9)] == pytest.approx([.125, .5, .5, .4, .1])
    both = [train.learning_rate({**falls, "decay": 1.0}, k) for k in (0, 2, 3, 5)]
    assert both == pytest.approx([0, .25, .35, .25])
    constant = {**settings, "warmup": 0, "ema_ramp": False}
    assert train.learning_rate(constant, 0) == 0.5 and train.ema_decay(constant, 0) == 0.25


def stepped(steps: int):
    """A run after each of its steps, and its weights before that step."""
    run = begin(train.parse([*TINY, *map(str, SMALL)]), data.shapes(64, 8), {}, CPU, Path("x"))
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


def test_adam_is_the_papers():
    """β₁ = 0.9, β₂ = 0.999, no weight decay, no AMSGrad; all parameters, and no others."""
    run = begin(train.parse(TINY), data.shapes(4, 8), {}, CPU, Path("x"))
    group, = run.adam.param_groups
    assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
    assert group["weight_decay"] == 0 and not group["amsgrad"] and not group["maximize"]
    assert {id(p) for p in group["params"]} == {id(p) for p in run.net.parameters()}


def test_the_objective_L_is_not_clipped():
    """A term of L is the weighted error of ε (Eq. 12), also where x̂_0 lies far outside [−1, 1].

    Kills: x̂_0 clipped inside the training objective, which takes away its gradient."""
    given = train.parse([*TINY, *map(str, SMALL), "--objective", "vlb", "--variance", "fixed_small"])
    run = begin(given, data.shapes(4, 8), {}, CPU, Path("x"))
    s, g = ddpm.make_schedule(50), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 3, 4, 4, generator=g, dtype=torch.float64).clamp(-1, 1)
    t, wrong = torch.tensor([7, 30, 50]), 5 + eps
    loss = train.OBJECTIVES["vlb"](replace(run.model, s=s, net=lambda x, t: wrong), x0, t, eps)
    bar, before = s.alpha_bars[t], s.alpha_bars[t - 1]
    beta, alpha = 1 - bar / before, bar / before
    weight = beta ** 2 / (2 * beta * (1 - before) / (1 - bar) * alpha * (1 - bar))
    torch.testing.assert_close(loss, weight * 25 / math.log(2))


class Line(torch.nn.Module):
    """ε_θ(x, t) = a x + b t, two parameters, of which the gradient is known."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.tensor(x)) for x in (0.5, -0.25))
        self.alone, self.calls = False, []

    def forward(self, x, t):
        self.calls.append(self.alone)
        return self.a * x + self.b * t.view(-1, 1, 1, 1)

    @contextlib.contextmanager
    def no_sync(self):
        self.alone = True
        yield
        self.alone = False


@pytest.mark.parametrize("flip, micro, scale, rank, world", [
    (True, None, None, 0, 1), (False, 1, None, 0, 1), (True, 3, 2.0 ** 10, 0, 1),
    (True, 8, None, 0, 1), (True, 1, None, 1, 2)])
def test_alg1_three_steps_by_hand(flip, micro, scale, rank, world):
    """Three steps of training, the 5th to the 7th, with numbers alone: the images of the joined orders of all
    epochs, flips, t and ε in this order from the generator of (seed, "step", k); x_t by Eq. 4; the
    gradient of Eq. 14, its norm, clipping; Adam; the warm-up; the averages. In whatever parts, at
    whatever scale, and for the second of two processes its own half, whose gradients are exchanged once.

    Kills: averages before the step, 1 − decay for the decay, Adam with another β or ε, a norm
    measured after clipping, parts that are not weighted by their sizes."""
    images = torch.arange(5 * 12, dtype=torch.uint8).view(5, 1, 3, 4) * 4
    settings = {**SHAPES, "seed": 7, "batch_size": 8, "flip": flip, "grad_clip": 0.5, "lr": 0.1,
                "warmup": 7, "ema": 0.6, "micro_batch": micro}
    net, bar = Line(), alpha_bars(20)
    model = ddpm.Model(ddpm.make_schedule(20, beta_end=0.012), net, clip=False)
    run = train.Run(settings, images, net, net, model, copy.deepcopy(net), torch.optim.Adam(net.parameters()),
                    torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None),
                    CPU._replace(rank=rank, world=world), Path(), "", [])
    order = torch.cat([torch.randperm(5, generator=torch.Generator().manual_seed(seed_of(7, "epoch", e)))
                       for e in range(14)])
    theta, average, m, v = [0.5, -0.25], [0.5, -0.25], [0, 0], [0, 0]
    flipped = 0
    for n, k in enumerate((5, 6, 7), 1):
        g = torch.Generator().manual_seed(seed_of(7, "step", k))
        x0 = images[order[8 * k:8 * k + 8]].double() / 127.5 - 1
        mirror = torch.rand(8, generator=g) < 0.5
        times, eps = torch.randint(1, 21, (8,), generator=g), torch.randn(8, 1, 3, 4, generator=g).double()
        if flip:
            flipped += int(mirror.sum())
            x0[mirror] = x0[mirror][:, :, :, [3, 2, 1, 0]]
        a = bar[times].view(-1, 1, 1, 1)
        x_t, column = (a.sqrt() * x0 + (1 - a).sqrt() * eps)[rank::world], times.view(-1, 1, 1, 1)[rank::world]
        r = eps[rank::world] - theta[0] * x_t - theta[1] * column
        grad = [(-2 * r * x_t).mean().item(), (-2 * r * column).mean().item()]
        norm = math.hypot(*grad)
        lr, decay = 0.1 * min(k / 7, 1), min(0.6, (1 + k) / (10 + k))
        for i in (0, 1):
            clipped = grad[i] * min(1, 0.5 / norm)
            m[i], v[i] = 0.9 * m[i] + 0.1 * clipped, 0.999 * v[i] + 0.001 * clipped ** 2
            theta[i] -= lr * m[i] / (1 - 0.9 ** n) / (math.sqrt(v[i] / (1 - 0.999 ** n)) + 1e-8)
            average[i] = decay * average[i] + (1 - decay) * theta[i]
        losses, t, got = train.training_step(run, k)
        assert t.tolist() == times[rank::world].tolist() and not losses.requires_grad
        torch.testing.assert_close(losses.double(), r.square().mean((1, 2, 3)), rtol=1e-5, atol=1e-6)
        assert got.item() == pytest.approx(norm, rel=1e-4)
        assert [net.a.item(), net.b.item()] == pytest.approx(theta, rel=1e-4)
        assert [run.ema.a.item(), run.ema.b.item()] == pytest.approx(average, rel=1e-4)
    parts = math.ceil(8 / world / (micro or 8))
    assert net.calls == ([world > 1] * (parts - 1) + [False]) * 3
    assert not flip or 4 < flipped < 20


BASE = {"dataset": "images.pt", "steps": 3, "log_every": 9, "save_every": 9, "sample_every": 9, "samples": 1,
        "sample_steps": 2, "batch_size": 4, "lr": 1e-3, "warmup": 1, "grad_clip": 0.01, "ema": 0.9, "dropout": 0.1,
        "channels": 32, "multipliers": [1], "blocks": 1, "timesteps": 20, "beta_end": 0.018, "objective": "vlb"}
OTHER = {**FIXED, "dataset": "other.pt", "steps": 4, "micro_batch": 3, "log_every": 2, "save_every": 2, "sample_every": 2,
         "samples": 2, "sample_steps": 20, "keep": 2, "channels": 64, "blocks": 2, "attention": [8],
         "timesteps": 30, "variance": "fixed_small", "objective": "simple", "ema": 0.05}
WATCHED = {"log_every": "log.jsonl", "sample_every": "samples-0000002.png", "samples": "samples-0000003.png",
           "sample_steps": "samples-0000003.png", "keep": "ema-0000002.pt"}


def trained(folder: str, **changes) -> tuple[dict, dict]:
    """The averages and the files, without what the clock says, of a run by the command."""
    assert train.main(["--out", folder, "--device", "cpu", "--precision", "fp32", *as_flags({**BASE, **changes})]) == 0
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir()
             if path.suffix != ".json" and path.name not in ("loss.png", "checkpoint.pt")}
    files["log.jsonl"] = [{**line, "images_per_s": 0} for line in log(folder)]
    return load_checkpoint(Path(folder, "checkpoint.pt"))["ema"], files


def test_every_setting_reaches_the_training():
    """Three steps by the command, with dropout: another value of a setting gives other averages, or,
    if it says how a run is watched, another file and the same averages.

    Kills: a setting that is lost between the flag and the step, or drawn into it."""
    for i, name in enumerate(("images.pt", "other.pt")):
        torch.save(data.shapes(64, 8, ("train", "test")[i]), name)
    assert OTHER.keys() == train.SETTINGS.keys() - {"skip_bad"}
    want, files = trained("base")
    for name in sorted(OTHER.keys() - {"image_size"}):  # a tensor has its size
        got, found = trained(name, **{name: OTHER[name]})
        if name in WATCHED or name == "save_every":
            assert_equal(got, want)
            changed = {key for key in files.keys() | found if files.get(key) != found.get(key)}
            assert WATCHED.get(name, "log.jsonl") in changed, name
        else:
            assert got.keys() != want.keys() or any(
                got[key].shape != want[key].shape or (got[key] - want[key]).abs().max() > 1e-6 for key in want), name


def test_bad_pictures_of_a_folder_are_left_out_if_asked(capsys):
    """A folder with a picture that cannot be read is refused by its name; with --skip-bad, the others are
    trained on, and this may be said when the run goes on."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for name in ("a.png", "b.png"):
        Path("pictures").mkdir(exist_ok=True)
        image.new("RGB", (8, 8), "red").save(f"pictures/{name}")
    Path("pictures/c.png").write_bytes(b"no picture")
    flags = (*SMALL, "--dataset", "pictures", "--image-size", 8, "--out", "r")
    trains(*flags, "--steps", 1, expect=1)
    assert "c.png" in said(capsys)
    for steps in (1, 2):
        trains(*flags, "--steps", steps, "--skip-bad")
        assert "2 images" in capsys.readouterr().err and checkpoint("r")["step"] == steps
    assert checkpoint("r")["settings"]["skip_bad"] is True
    trains(*flags, "--steps", 1, expect=2)  # fewer steps than it has
    assert "--steps 1" in said(capsys) and json.loads(Path("r/settings.json").read_text())["steps"] == 2


@pytest.mark.parametrize("flags, side, want", [
    ("", 28, []), ("", 32, [16]), ("--attention", 32, []), ("--attention", 28, []), ("--attention 14 28", 28, [14, 28])])
def test_attention_is_where_a_level_has_its_resolution(flags, side, want, capsys):
    """What is printed and stored is what the network has: nothing where no level has 16×16 pixels, or
    with --attention alone. The same command resumes."""
    torch.save(data.shapes(4, side), "images.pt")
    base = "--dataset images.pt --channels 32 --multipliers 1 1 --blocks 1 --batch-size 1 --samples 0 --steps 1 --device cpu"
    for _ in range(2):
        assert train.main([*base.split(), *flags.split()]) == 0
        assert f"attention {want}," in " ".join(capsys.readouterr().err.split())
    state = checkpoint()
    assert json.loads(Path("runs/images/settings.json").read_text())["attention"] == state["settings"]["attention"] == want
    plain = build_network({**state["settings"], "attention": []}).state_dict().keys()
    assert (state["net"].keys() > plain) == bool(want)


# ------------------------------------------------------------------------------- a run at its start

def test_a_run_begins_with_the_weights_of_its_seed():
    """Network and average are the initialisation from (seed, "init"); only the network learns. The
    memory has the channels last, and Adam's step is fused, both of which only make it faster."""
    run = run_of(seed=3, lr=0.25)
    torch.manual_seed(seed_of(3, "init"))
    want = build_network(run.settings).state_dict()
    assert_equal(dict(run.net.state_dict()), dict(want))
    assert_equal(dict(run.ema.state_dict()), dict(want))
    assert run.network is run.net and not run.scaler.is_enabled()
    assert run_of(torch.float16).scaler.is_enabled() and not run_of(torch.bfloat16).scaler.is_enabled()
    assert {p.requires_grad for p in run.ema.parameters()} == {False}
    assert {p.requires_grad for p in run.net.parameters()} == {True}
    assert not {p.data_ptr() for p in run.ema.parameters()} & {p.data_ptr() for p in run.net.parameters()}
    assert run.net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert run.adam.defaults["fused"] and {id(p) for p in run.adam.param_groups[0]["params"]} == {
        id(p) for p in run.net.parameters()}
    s = ddpm.make_schedule(20, "quadratic", 2e-4, 0.03)
    other = run_of(schedule="quadratic", beta_start=2e-4, beta_end=0.03)
    assert torch.equal(other.model.s.alpha_bars, s.alpha_bars)


@pytest.mark.parametrize("changes, world, part", [
    ({"batch_size": 7}, 2, "--batch-size"), ({"beta_end": 1e-4}, 1, "--beta-end"),
    ({"schedule": "nonsense"}, 1, "--schedule"), ({"channels": 40}, 1, "40")])
def test_a_run_that_cannot_begin(changes, world, part):
    """A batch that two processes cannot share, a schedule that leaves the image, an unknown one."""
    given = {"init": None, "dataset": "shapes", "multipliers": [1], **changes}
    with pytest.raises(ValueError, match=part) as refusal:
        begin(given, data.shapes(4, 8), {}, CPU._replace(world=world), Path())
    assert isinstance(refusal.value, UsageError) or part == "40"


def test_init_starts_from_the_averages_of_another_run():
    """Network and average are those averages; flags that say otherwise are refused. The settings of
    the network are the other run's, those of the training are not; a checkpoint goes before it."""
    other = run_of(folder="other", multipliers=[1, 2], attention=[4], predict="x0", lr=0.5)
    for average in other.ema.parameters():
        average += 0.5
    train.save(other, 0)
    given = {"init": "other", "dataset": "shapes", "data_dir": "there"}
    new = begin(given, data.shapes(4, 8), {}, CPU, Path("new"))
    for net in (new.net, new.ema):
        assert_equal(dict(net.state_dict()), dict(other.ema.state_dict()))
    assert new.settings["predict"] == "x0" and new.settings["lr"] == 5e-3
    assert {p.requires_grad for p in new.net.parameters()} == {True}
    with pytest.raises(UsageError, match="predict"):
        begin({**given, "predict": "eps"}, data.shapes(4, 8), {}, CPU, Path("new"))
    shutil.rmtree("other")
    resumed = begin(given, data.shapes(4, 8), new.settings, CPU, Path("new"))
    assert resumed.settings == new.settings


def test_compile_is_tried_on_one_batch(monkeypatch, capsys):
    """Of the shape of the training's, with a backward pass; not on a machine that does not compile.
    Where either of them fails, a line says so and the network is used as it is.

    The shapes are fixed, which the compiler is told: else dropout's differ from layer to layer."""
    seen, back, error = [], [], None

    def gradient(grad):  # is asked for in the backward pass
        back.append(tuple(grad.shape))
        if error:
            raise error

    def backend(graph, inputs):
        seen.append(next(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.shape[1:] == (3, 8, 8)))
        assert all(type(side) is int for x in inputs for side in x.shape)

        def program(*given):
            results = graph.forward(*given)
            results[0].register_hook(gradient)
            return results
        return program
    monkeypatch.setattr(machine, "BACKEND", backend)
    torch._dynamo.reset()
    given, images = {"init": None, "dataset": "shapes", "channels": 32, "multipliers": [1], "batch_size": 5}, data.shapes(4, 8)
    for compiles, flags, sizes in ((False, {}, []), (None, {}, []), (True, {}, [5]), (True, {"micro_batch": 2}, [2]),
                                   (True, {"micro_batch": 9}, [])):  # 5 again, of which there is a program
        run = begin({**given, **flags}, images, {}, CPU._replace(compiles=compiles), Path())
        assert seen == [(n, 3, 8, 8) for n in sizes]
        assert back == [(min(5, flags.get("micro_batch", 5)), 3, 8, 8)] * bool(compiles)
        assert (run.network is run.net) == (not compiles)
        seen.clear(), back.clear()
    assert capsys.readouterr().err == ""
    error = RuntimeError("no compiler here\nand more lines")
    for text in ("no compiler here and more lines", "no such one"):
        run = begin(given, images, {}, CPU._replace(compiles=True), Path())
        assert run.network is run.net
        assert text in (err := capsys.readouterr().err) and err.count("\n") == 1
        monkeypatch.setattr(machine, "BACKEND", "no such one")


def test_a_network_that_cannot_see_t_is_warned_of(capsys):
    """One channel in each group of the normalisation in every level: t, which is added to it, is lost."""
    for changes, warns in (({}, True), ({"multipliers": [1, 2]}, False), ({"channels": 64}, False)):
        train.describe(run_of(**changes), 0, "")
        assert ("cannot see t" in capsys.readouterr().err) == warns


@pytest.mark.parametrize("steps, done, flag", [
    (4, 0, None), (3, 0, "--warmup"), (3, 3, "--steps"), (3, 4, "--steps"), (9, 3, None)])
def test_what_a_run_says_at_its_start(capsys, steps, done, flag):
    """Every setting, on stderr and in settings.json; a warm-up that is longer than the run, a run
    that is done. Gone are what a kill left half-written, and the lines of the log after this step;
    other people's files are not."""
    run = run_of(steps=steps)
    lines = [{"step": 3, "loss": 0.5}, {"step": 4, "loss": 1}]
    Path("log.jsonl").write_text(f'{json.dumps(lines[0])}\n{{"st\n3\n[]\n{{}}\nnull\n{{"step": "x"}}\n'
                                 f'{json.dumps(lines[1])}\n{{"step": 2')
    for name in (".0123.part", "film.part", ".part.txt"):
        Path(name).touch()
    train.prepare(run, done)
    assert run.entries == log()
    train.describe(run, done, "all pictures")
    err = capsys.readouterr().err
    assert {f for f in ("--warmup", "--steps") if f in err} == ({flag} if flag else set())
    for name, value in run.settings.items():
        assert f"{name} {value}" in " ".join(err.split())
    assert f"{sum(p.numel() for p in run.net.parameters()):,}" in err and "float32" in err
    assert "all pictures" in err and "cannot see t" in err
    assert json.loads(Path("settings.json").read_text()) == run.settings
    assert log() == [line for line in lines if line["step"] <= done]
    assert {path.name for path in Path().iterdir()} == {
        "film.part", ".part.txt", "settings.json", "log.jsonl", "images.pt"}


# ---------------------------------------------------------------------------------- what is trained

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
    assert sample.main(["--n", "1", "--steps", "5"]) == 0 and "DDIM" in capsys.readouterr().err
    assert sample.main(["--n", "1", "--steps", "5", "--sampler", "ddpm"]) == 2 and "--steps" in said(capsys)
    assert sample.main(["--n", "1", "--variance", "fixed_small"]) == 2


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


HALF = [*TINY[:-1], "fp16", *map(str, SMALL)]


def test_fp16_trains_as_float32_does():
    """The same training as in float32, to the precision of the numbers; the scaler's state is in
    the checkpoint. (float16 has no fast kernels on a CPU, so the runs are short.)"""
    assert train.main([*HALF, "--steps", "4", "--out", "whole"]) == 0
    trains(*SMALL, "--steps", 4, "--out", "full")
    for half, full in zip(losses("whole"), losses("full"), strict=True):
        assert half["loss"] == pytest.approx(full["loss"], rel=2e-2) and half != full
    assert checkpoint("whole")["scaler"]["scale"] == 2.0 ** 16 and not checkpoint("full")["scaler"]


def altered(folder: str, **parts) -> dict:
    """The checkpoint of this run with other values of its parts, as it is then on the disk."""
    state = {key: value for key, value in checkpoint(folder).items() if key != "format"}
    for part, values in parts.items():
        state[part] = {**state[part], **values}
    checkpoints.save_checkpoint(Path(folder, "checkpoint.pt"), state)
    return checkpoint(folder)


def test_fp16_skips_what_is_not_finite(capsys):
    """A scale that overflows is lowered until it fits; a loss that is never finite ends the run, and
    names the first such step since the last line of the log. The weights stay as they were."""
    small = ["--batch-size", "1", "--save-every", "5", "--out", "nan"]
    assert train.main([*HALF, *small, "--steps", "1"]) == 0
    altered("nan", scaler={"scale": 2.0 ** 40, "backoff_factor": 2.0 ** -10})
    assert train.main([*HALF, *small, "--steps", "5", "--log-every", "9"]) == 0
    _, entry = losses("nan")
    assert entry["step"] == 5 and math.isfinite(entry["loss"]) and entry["grad_norm"] > 0
    assert 2.0 ** 4 <= checkpoint("nan")["scaler"]["scale"] < 2.0 ** 40
    # A weight that float16 does not have. 2^−3 halved 11 times is below 10⁻⁴, which the 16th step reaches;
    # it is noticed when the 20th would be saved, and the last line of the log was that of the 15th.
    state = altered("nan", scaler={"scale": 2.0 ** -3, "backoff_factor": 0.5}, net={
        "conv_in.bias": torch.full((32,), 1e30)})
    assert train.main([*HALF, *small, "--steps", "60", "--log-every", "50"]) == 1
    assert "step 16:" in said(capsys) and checkpoint("nan")["step"] == 15
    assert_equal(dict(checkpoint("nan")["net"]), dict(state["net"]))
    assert checkpoint("nan")["scaler"]["scale"] == 2.0 ** -13 > 1e-4


# ----------------------------------------------------------------------------------------- the loop

class Watched(Line):
    """A network of two parameters. before(k) runs in the call of step k, and `grid()` in each call of a
    grid; change(y) is what it returns."""
    step, before, grid, change = 0, staticmethod(lambda k: None), staticmethod(lambda: None), staticmethod(lambda y: y)

    def forward(self, x, t):
        if self.training:
            self.before(self.step)
            self.step += 1
            return self.change(super().forward(x, t))
        self.grid()
        return super().forward(x, t)

    def __deepcopy__(self, memo):
        other = type(self)()
        other.load_state_dict(self.state_dict())
        other.before, other.grid, other.change = self.before, self.grid, self.change
        return other


def watched(first: int = 0, machine=CPU, dtype=torch.float32, **changes) -> train.Run:
    """A run of that network, whose next step is `first`."""
    run = run_of(dtype, **{"samples": 1, "sample_steps": 2, **changes})
    net = Watched()
    net.step = first
    machine = machine._replace(dtype=dtype)
    model = replace(run.model, net=machine.network(net))
    return run._replace(net=net, network=net, model=model, ema=copy.deepcopy(net).eval().requires_grad_(False),
                        adam=torch.optim.Adam(net.parameters()), machine=machine)


def on_disk(folder: Path) -> dict:
    """What tells that something was written: the number of lines of the log, times of files."""
    path = folder / "log.jsonl"
    return {"log": len(path.read_text().splitlines()) if path.exists() else 0,
            **{name: max((file.stat().st_mtime_ns for file in folder.glob(pattern)), default=0) for name, pattern in (
                ("save", "checkpoint.pt"), ("keep", "ema-*.pt"), ("plot", "loss.png"), ("grid", "samples-*.png"))}}


def happens(run: train.Run, first: int) -> tuple[int, list[str]]:
    """Trains from this step: the steps that are done, and what happens, in the words of the names above.

    What is written between two steps is named in one order, whatever it was in."""
    made, state, done = [], on_disk(run.folder), first

    def look():
        nonlocal state
        now = on_disk(run.folder)
        made.extend(name for name in now if now[name] != state[name])
        if now["log"] != state["log"]:
            assert now["log"] == state["log"] + 1 and log(run.folder)[-1]["step"] == done
        for name, pattern in (("keep", "ema-"), ("grid", "samples-")):
            newest = max(run.folder.glob(f"{pattern}*"), default=None)
            assert now[name] == state[name] or newest.stem == f"{pattern}{done:07d}"
        if now["save"] != state["save"]:
            assert load_checkpoint(run.folder / "checkpoint.pt")["step"] == done
        state = now

    def before(k):
        nonlocal done
        look()
        assert k == done and stop.later and torch.initial_seed() == seed_of(0, "dropout", k, run.machine.rank)
        done += 1
        made.append(str(done))
        if signalled == done:
            os.kill(os.getpid(), signal.SIGTERM)

    def grid():  # what belongs to a step comes after its checkpoint, and a signal need not wait
        assert not stop.later
        look()
    signalled = run.settings.get("signalled")
    run.net.before, run.ema.grid = before, grid
    last = train.train(run, first)
    look()
    return last, made


@contextlib.contextmanager
def signals():
    """As in a command, whose handler has the signals."""
    kept = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for n, handler in kept.items():
            signal.signal(n, handler)


PLOTS = bool(importlib.util.find_spec("matplotlib"))


@pytest.mark.parametrize("first, steps, every, want", [
    (0, 2, (1, 1, 1, 1), "1 log save keep plot grid 2 log save keep plot grid"),
    (0, 13, (5, 4, 3, 6), "1 2 3 log save keep 4 log save plot 5 log 6 log save keep grid 7 8 log save plot "
            "9 log save keep 10 log 11 12 log save keep plot grid 13 log save plot grid"),
    (6, 9, (5, 4, 3, 6), "keep grid 7 8 log save plot 9 log save keep plot grid"),
    (8, 10, (5, 4, 3, 6), "plot 9 log save keep 10 log save plot grid"),
    (0, 1, (9, 9, None, 9), "1 log save plot grid"), (5, 5, (5, 4, 3, 6), "plot grid"),
    (12, 12, (5, 4, 3, 6), "keep plot grid")])
def test_which_steps_log_save_keep_and_draw(first, steps, every, want):
    """Every N-th one, counted from the first of the run; before what belongs to a step is made, it
    is saved, and the last one is; before it is saved, it has its line in the log. What belongs to the step
    that is resumed is made first. Each step has the dropout of (seed, step). A signal waits for a step and
    its files, and not for a grid."""
    run = watched(first, steps=steps, **dict(zip(("log_every", "save_every", "keep", "sample_every"), every)))
    run.entries.extend([{"step": 1, "loss": 1, "loss_thirds": [1, 1, 1]}] * 2)  # so that there is a curve
    last, made = happens(run, first)
    assert last == steps
    assert " ".join(made) == (want if PLOTS else want.replace(" plot", "").replace("plot ", ""))


@pytest.mark.parametrize("blocked, made", [("log.jsonl", []), ("checkpoint.pt", ["log.jsonl"])])
def test_a_step_has_its_line_before_it_is_saved_and_is_saved_before_its_files(blocked, made):
    """Where the one cannot be written, the other is not there, nor anything that comes after it."""
    run = watched(folder="r", steps=4, log_every=2, save_every=2, keep=2, sample_every=2)
    Path("r", blocked).mkdir()
    with pytest.raises(OSError, match=blocked):
        train.train(run, 0)
    assert sorted(path.name for path in Path("r").iterdir()) == sorted([blocked, *made])


def test_a_signal_ends_the_run_after_its_step_and_saves_it():
    """That step's line of the log, too; what else belongs to it is made when the run goes on."""
    run = watched(steps=9, log_every=2, save_every=2, keep=2, sample_every=2)
    run.settings["signalled"] = 2
    with signals():
        assert happens(run, 0) == (2, ["1", "2", "log", "save"])
    assert stop.number == signal.SIGTERM


def wrong(kind: int):
    """A network's result of which the loss or the gradient is not finite, and the other one is."""
    def change(y):
        if kind < 2:  # the loss alone
            y = y + (math.nan, math.inf)[kind]
            y.register_hook(torch.ones_like)
        else:
            y.register_hook(lambda grad: grad * (math.nan, math.inf)[kind - 2])
        return y
    return change


def test_a_number_that_is_not_finite_is_noticed_before_it_is_written():
    """Whether it is the loss or the norm, NaN or ∞, in whatever step, and whatever is due when: no
    line of the log, checkpoint, kept file or grid is of this step or a later one, and it is named.

    Kills: a check that is left out for one of them."""
    names = ("log_every", "save_every", "keep", "sample_every")
    every = [(1, 9, None, 9), (9, 2, None, 9), (9, 9, 2, 9), (9, 9, 3, 9), (9, 9, None, 3), (2, 9, 3, 9), (9, 9, None, 9)]
    for i, (bad, some) in enumerate(itertools.product((1, 2, 3, 4, 5), every)):
        folder = Path(f"{bad} {some}")
        run = watched(folder=folder, steps=7, **dict(zip(names, some)))
        run.net.before = lambda k: setattr(run.net, "change", wrong((bad + i) % 4)) if k + 1 >= bad else None
        with pytest.raises(ValueError, match=f"step {bad}:") as error:
            train.train(run, 0)
        assert str(folder) in str(error.value)
        steps = [line["step"] for line in log(folder)] if (folder / "log.jsonl").exists() else []
        steps += [int(path.stem[-7:]) for path in folder.glob("*-0*")]
        if (folder / "checkpoint.pt").exists():
            steps.append(load_checkpoint(folder / "checkpoint.pt")["step"])
        assert all(step < bad for step in steps)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_tells_of_the_steps_of_this_command():
    """It counts from the step that was resumed, and the last step is always shown; on a terminal what
    comes between, twice a second."""
    def shown(stream, seconds):
        run = watched(1, steps=3, samples=0)
        run.net.before = lambda k: time.sleep(seconds)
        with contextlib.redirect_stderr(stream):
            train.train(run, 1)
        return stream.getvalue()
    assert re.findall(r"(\d+/\d+) steps loss [\d.]+ [\d.]+ steps/s", shown(io.StringIO(), 0)) == ["3/3"]
    lines = re.findall(r"(\d+/\d+) steps loss [\d.]+ ([\d.]+) (steps/s|s each)", shown(Terminal(), 0.51))
    assert [line for line, *_ in lines] == ["2/3", "3/3"]
    assert all(unit == "s each" or float(rate) <= 2 for _, rate, unit in lines)


def test_the_speed_is_that_of_the_steps_since_the_last_line():
    """Slow steps do not slow the next line, and grids take no time of it. 2 images in each step."""
    run = watched(steps=6, log_every=3, sample_every=3, sample_steps=2)
    run.net.before = lambda k: time.sleep(0.3 if k < 3 else 0.02)
    run.ema.grid = lambda: time.sleep(0.25)
    train.train(run, 0)
    slow, fast = (entry["images_per_s"] for entry in log())
    assert 2 < slow <= 2 / 0.3 and 2 / 0.15 < fast <= 2 / 0.02


# -------------------------------------------------------------------- records, the log and pictures

def records_of(*steps) -> list[tuple]:
    """(losses, times, norm) of each step as tensors."""
    return [(torch.tensor(losses), torch.tensor(t), torch.tensor(norm)) for losses, t, norm in steps]


def test_a_line_of_the_log_by_hand():
    """Means over all images of its steps; the thirds of 1 … 20 are 1 … 7, 8 … 14 and 15 … 20, and
    None where there was no such time. With fp16 a step that is not finite counts nothing."""
    run = run_of(steps=9, batch_size=3)
    steps = [([1.0, 2.0, 4.0], [1, 7, 8], 3.0), ([8.0, 16.0, 1.0], [14, 15, 20], 2.0)]
    train.log(run, 3, records_of(*steps), 0.25)
    train.log(run, 4, records_of(([5.0, 6.0, 10.0], [8, 14, 9], 8.0)), 1.5)
    bad = [([math.inf] * 3, [1, 9, 20], math.inf), ([1.0] * 3, [1, 9, 20], math.nan)]
    train.log(run, 5, records_of(bad[0], *steps, bad[1]), 2.0)
    first = {"step": 3, "loss": 32 / 6, "loss_thirds": [1.5, 6, 8.5], "lr": 5e-3 * 2 / 4,
             "grad_norm": 2.5, "grad_norm_max": 3, "images_per_s": 24}
    second = {"step": 4, "loss": 7, "loss_thirds": [None, 7, None], "lr": 5e-3 * 3 / 4,
              "grad_norm": 8, "grad_norm_max": 8, "images_per_s": 2}
    third = {**first, "step": 5, "lr": 5e-3, "images_per_s": 6}
    for entry, want in zip(log(), (first, second, third), strict=True):
        assert entry.keys() == want.keys()
        for key, value in want.items():
            assert entry[key] == (pytest.approx(value) if key != "loss_thirds" or None not in value else value)


def test_every_number_of_the_log_by_hand():
    """Loss, its thirds of t, norm and its largest, learning rate: from what the same steps return to
    another run, which takes them one by one. A line every N steps, and for the last one."""
    flags = [*TINY, *map(str, SMALL), *"--steps 7 --log-every 3 --grad-clip 0.5".split()]
    assert train.main(flags) == 0
    run, steps = begin(train.parse(flags), data.load("images.pt")[0], {}, CPU, Path("other")), []
    run.network.train()
    for k in range(6):
        torch.manual_seed(seed_of(0, "dropout", k, 0))
        steps.append(train.training_step(run, k))
    assert [entry["step"] for entry in log("runs/images")] == [3, 6, 7]
    first = 0
    for entry, last in zip(log("runs/images")[:2], (3, 6), strict=True):
        assert entry["step"] == last
        some = steps[first:last]
        rows = [(t, loss) for losses, ts, _ in some for t, loss in zip(ts.tolist(), losses.tolist())]
        assert len(rows) == 12
        assert entry["loss"] == pytest.approx(sum(loss for _, loss in rows) / len(rows), rel=1e-5)
        # T = 20: the thirds are 1 … 7, 8 … 14 and 15 … 20, since (t − 1) · 3 // 20 changes there.
        for value, (low, high) in zip(entry["loss_thirds"], ((1, 7), (8, 14), (15, 20)), strict=True):
            these = [loss for t, loss in rows if low <= t <= high]
            assert value == (pytest.approx(sum(these) / len(these), rel=1e-5) if these else None)
        norms = [norm.item() for *_, norm in some]
        assert max(norms) > 0.5                                      # before it was clipped
        assert entry["grad_norm"] == pytest.approx(sum(norms) / 3, rel=1e-5)
        assert entry["grad_norm_max"] == pytest.approx(max(norms), rel=1e-5)
        assert entry["lr"] == pytest.approx(1e-3 * min((last - 1) / 3, 1))
        first = last


def test_a_row_of_steps_that_fp16_skips_can_be_logged():
    """A whole interval of them, as in the first steps of a run: the line is JSON without NaN, its
    numbers are None, and the plot leaves them out."""
    run = run_of(torch.float16, batch_size=1)
    train.log(run, 1, records_of(([math.nan], [3], math.inf)), 1.0)
    train.log(run, 2, records_of(([2.0], [3], 4.0)), 1.0)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in Path("log.jsonl").read_text().splitlines()]
    assert [(line["loss"], line["grad_norm"], line["grad_norm_max"]) for line in lines] == [(None,) * 3, (2, 4, 4)]
    assert lines[0]["loss_thirds"] == [None] * 3
    train.plot_losses(run)


def test_the_bound_in_the_log_is_that_of_the_training_images():
    """T times the mean term and L_T of the first 64 images, by its formula: for a schedule where it
    is no small number."""
    images = data.shapes(70, 8)
    run = run_of(objective="vlb", timesteps=60, images=images)
    train.log(run, 3, records_of(([1.0, 3.0], [1, 60], 8.0)), 1.0)
    bar, x0 = run.model.s.alpha_bars[60].item(), images[:64].double() / 127.5 - 1
    L_T = (bar * x0 ** 2 - bar - math.log(1 - bar)).mean().item() / 2 / math.log(2)
    assert log()[0]["bound"] - 120 == pytest.approx(L_T, rel=1e-4) and L_T > 1e-6


def test_the_mean_loss_that_is_shown():
    """Of the last hundred steps; fp16's bad ones are left out. A row of 29 of those is survived."""
    run = run_of()
    steps = records_of(*[([float(k)], [1], 1.0) for k in range(150)])
    assert train.check(run, 150, steps) == pytest.approx(99.5)
    steps += records_of(([math.nan], [1], math.nan))
    half = run._replace(scaler=torch.amp.GradScaler("cpu"))
    assert train.check(half, 151, steps) == pytest.approx(100)
    for bad in range(1, 30):  # each halves the scale
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (16 - bad))
        train.check(half._replace(scaler=scaler), 151, steps)
    with pytest.raises(ValueError, match="step 151:"):
        train.check(half._replace(scaler=torch.amp.GradScaler("cpu", init_scale=2.0 ** -14)), 151, steps)
    with pytest.raises(ValueError, match="step 151:"):
        train.check(run, 151, steps)


def test_fp16_leaves_the_weights_where_a_step_is_not_finite():
    """And halves the scale; the thirtieth such step ends the run, and the weights are as before."""
    run = watched(dtype=torch.float16, steps=31, warmup=0, log_every=100)
    train.training_step(run, 0)
    before = [run.net.a.item(), run.net.b.item()]
    assert before != [0.5, -0.25] and run.scaler.get_scale() == 2.0 ** 16
    run.net.change = lambda y: y * math.nan
    with pytest.raises(ValueError, match="step 2:"):
        train.train(run, 1)
    assert [run.net.a.item(), run.net.b.item()] == before and run.scaler.get_scale() == 2.0 ** (16 - 30)


class Begun(Exception):
    """What ends a run in its first step."""


def test_two_processes_by_hand(capsys):
    """Each has the losses of every second image: the log has those of all, in their order, and only
    the first one writes and says anything. A signal to one of them stops both."""
    all_of = records_of(([1.0, 2.0, 3.0, 4.0], [1, 8, 15, 20], 5.0), ([5.0, 6.0, 7.0, 8.0], [2, 9, 16, 3], 7.0))
    run = run_of(batch_size=4, steps=5)

    def job(machine):
        mine = run._replace(machine=machine, folder=Path(f"{machine.rank}"))
        mine.folder.mkdir()
        train.log(mine, 2, [(loss[machine.share], t[machine.share], norm) for loss, t, norm in all_of], 1.0)
        train.save(mine, 2)
        other = mine._replace(machine=machine._replace(dtype=torch.bfloat16))
        capsys.readouterr()
        step = train.restore(other, {**load_checkpoint(Path("checkpoint.pt"))})
        return sorted(path.name for path in mine.folder.iterdir()), step, "bfloat16" in capsys.readouterr().err
    train.save(run, 2)
    assert processes(job) == [(["checkpoint.pt", "log.jsonl"], 2, True), ([], 2, False)]
    Path("one").mkdir()
    train.log(run._replace(folder=Path("one")), 2, all_of, 1.0)
    assert log("0") == log("one")

    def goes_on(machine):
        run = watched(4, machine, folder=f"run {machine.rank}", batch_size=4, steps=9, keep=2, sample_every=2, save_every=2)
        seeds = []

        def before(k):
            seeds.append(torch.initial_seed())
            raise Begun
        run.net.before = before
        capsys.readouterr()
        with pytest.raises(Begun):
            train.train(run, 4)
        files, stop.later = sorted(path.name for path in run.folder.iterdir()), True
        err = capsys.readouterr().err
        with signals():
            if machine.rank:
                os.kill(os.getpid(), signal.SIGTERM)
            Path(f"again {machine.rank}").mkdir()
            return files, seeds, err != "", train.train(run._replace(folder=Path(f"again {machine.rank}")), 4), stop.number
    assert processes(goes_on) == [
        (["ema-0000004.pt", "samples-0000004.png"], [seed_of(0, "dropout", 4, 0)], True, 4, signal.SIGTERM),
        ([], [seed_of(0, "dropout", 4, 1)], False, 4, signal.SIGTERM)]
    assert [path.name for path in Path("again 0").iterdir()] == ["ema-0000004.pt"]


def test_a_signal_that_comes_while_the_processes_ask_is_not_lost():
    """Between what this process has said and what all have answered: it counts in the next step, and
    all of them stop together.

    Kills: an answer that overwrites what came meanwhile."""
    def job(machine):
        peer = machine.gather(torch.tensor([os.getpid()]), 2)[0]
        if machine.rank:  # the first one waits in the exchange when its signal comes
            time.sleep(0.3)
            os.kill(int(peer), signal.SIGTERM)
            time.sleep(0.1)
        answers = [(train.stopped(machine), stop.number)]
        return [*answers, (train.stopped(machine), stop.number)]

    def with_handler(machine):
        stop.later = True
        with signals():
            return job(machine)
    assert processes(with_handler) == [[(False, 15), (True, 15)], [(False, 0), (True, 15)]]
    stop.number = 15
    assert train.stopped(CPU) is True


def test_averages_have_the_buffers_of_their_network():
    """What a layer such as BatchNorm has counted is no weight, and no average is sampled without it.

    Kills: averaged weights beside statistics of the first step."""
    run = run_of(steps=9)
    for net in (run.net, run.ema):
        net.register_buffer("counted", torch.zeros(2))
    run.net.counted += 3
    train.training_step(run, 0)
    assert run.ema.counted.tolist() == [3, 3] and not run.ema.training


@pytest.mark.parametrize("T, variance, flag, calls", [
    (20, "fixed_small", 7, 7), (20, "fixed_small", 20, 20), (20, "fixed_large", 50, 20),
    (20, "learned", 7, 7), (20, "learned", 50, 20), (2, "fixed_small", 50, 2)])
def test_the_network_calls_of_a_grid(capsys, T, variance, flag, calls):
    """As many as the setting says, T at most, also where the variance is learned; of the averages,
    32 images at a time."""
    class Grid(torch.nn.Module):
        seen = []  # of all copies

        def forward(self, x, t):
            self.seen.append((len(x), t[0].item()))
            return torch.cat([0 * x] * (1 + (variance == "learned")), 1)
    more = LEARNED if variance == "learned" else {"variance": variance}
    run = run_of(timesteps=T, sample_steps=flag, samples=33, **more)
    train.draw_grid(run._replace(ema=Grid()), 3)
    seen = Grid.seen
    assert [x[0] for x in seen] == [32] * calls + [1] * calls
    assert (seen[0][1], seen[calls - 1][1]) == (T, 1) and "33/33" in capsys.readouterr().err


def test_grids_of_equal_weights_are_equal():
    """The same noise in every grid, whatever the network, the step and the rest of the settings: two
    pictures differ by the averages alone. What is there is not drawn again, unless it is damaged or of
    another number of images; and no images are no grid.

    Kills: noise of the step, or of the generator of training."""
    run, other = run_of(samples=3, sample_steps=2), run_of(folder="b", samples=3, sample_steps=2, lr=0.5, dropout=0.5)
    with torch.no_grad():
        other.net.conv_in.weight += 1
    train.draw_grid(run, 3)
    torch.rand(7)
    train.draw_grid(other, 999)
    first, second = Path("samples-0000003.png"), Path("b/samples-0000999.png")
    assert first.read_bytes() == second.read_bytes()
    third = run_of(folder="c", samples=3, sample_steps=2, seed=1)
    third.ema.load_state_dict(run.ema.state_dict())
    train.draw_grid(third, 3)
    assert Path("c/samples-0000003.png").read_bytes() != first.read_bytes()
    kept = first.stat().st_ino
    train.draw_grid(run, 3)
    assert first.stat().st_ino == kept
    for content in (b"", first.read_bytes()[:200], data.png(torch.zeros(3, 480, 480, dtype=torch.uint8)[:, 1:])):
        first.write_bytes(content)
        train.draw_grid(run, 3)
        assert first.read_bytes() == second.read_bytes()
    train.draw_grid(run_of(samples=0), 4)
    assert not Path("samples-0000004.png").exists()


def test_loss_png_shows_the_log():
    """The loss over the steps, and that of each third, on logarithmic axes; an entry without losses is
    left out, and a single one is no curve. Here each curve is a power of the step, which such axes make straight;
    they are told apart by their colours, in the order of the legend."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib import colors, image
    steps, curves = (1, 2, 4, 16), (lambda k: 8 / k, lambda k: 2, lambda k: k, lambda k: 4 * k ** -0.5)
    lines = [{"step": k, "loss": curves[3](k), "loss_thirds": [curve(k) for curve in curves[:3]]} for k in steps]
    run, rescued = run_of(), {"step": 3, "rescued": {"lr": 9}}
    for entries in ([], lines[:1], [*lines[:1], rescued]):
        train.plot_losses(run._replace(entries=entries))
        assert not Path("loss.png").exists()
    train.plot_losses(run._replace(entries=[*lines[:2], rescued, *lines[2:]]))
    picture = image.imread("loss.png")
    picture = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.float32).view(picture.shape)[..., :3]
    points = [((picture - torch.tensor(colors.to_rgb(f"C{i}"))).abs().amax(2) < 0.02).nonzero() for i in range(4)]
    left, right = (f(torch.cat([f(p[:, 1], 0).values[None] for p in points]), 0).values.item() for f in (torch.min, torch.max))

    def height(i, k):  # of curve i over the place of step k on a logarithmic axis
        at = left + (right - left) * math.log(k, 16)
        return points[i][(points[i][:, 1] - at).abs() < 3, 0].double()
    low, high = height(0, 16).median(), height(2, 16).median()    # 0.5 and 16
    for i, curve in enumerate(curves):
        for k in (1, 8, 16):
            want = low + (high - low) * math.log2(curve(k) / 0.5) / 5
            assert (height(i, k) - want).abs().min() < 4, (i, k)
