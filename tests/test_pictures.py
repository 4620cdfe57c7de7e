"""Which weights, which noise and which times reach every picture: recomputed from the paper alone.

The network of these tests has random weights, and others as its averages, so that the pictures of
the one are far from those of the other, and clipping acts at every step.
"""
import json
import math
import os
import re
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import common
import data
import sample
import test_commands
import train
from sample import Noise
from test_commands import checkpoint, read_png, trains

in_a_folder_of_its_own = test_commands.in_a_folder_of_its_own  # a fixture, used by every test
T, SIDE = 20, 8
FLAGS = "--checkpoint runs/images --device cpu --precision fp32 --seed 3".split()


def random_run() -> dict:
    """A run folder whose networks are random: the trained network, and the averaged one."""
    trains("--steps", 1)
    state, g = checkpoint(), torch.Generator().manual_seed(0)
    for name in ("model", "ema"):
        for key, value in state[name].items():
            value += 0.05 * torch.randn(value.shape, generator=g)
            if key.startswith("conv_out"):
                value += 0.1 * torch.randn(value.shape, generator=g)
    common.save_checkpoint(Path("runs/images/checkpoint.pt"), state)
    nets = {}
    for name in ("model", "ema"):
        nets[name] = common.build_network(state["settings"]).eval()
        nets[name].load_state_dict(state[name])
    return nets


@pytest.fixture
def run():
    return random_run()


def alpha_bar() -> torch.Tensor:
    """ᾱ_0 … ᾱ_T for T = 20: β in equal steps from 10⁻⁴ · 50 to 0.02 · 50, which 0.999 limits."""
    beta = torch.linspace(0.005, 0.999, T, dtype=torch.float64)
    return torch.cat([torch.ones(1), (1 - beta).cumprod(0)]).double()


def chain(net, x, z, start=None, clip=True, small=False, times=None, eta=None) -> list:
    """Algorithm 2 by Eqs. 7 and 15: (t, x_t, x̂_0 of x_t) for t = start … 1, and (0, x_0, x_0).

    With η, DDIM's step in its place: x̂_0 at t − 1 with noise, of which σ² is new."""
    bar = alpha_bar()
    times = times or list(range(T + 1))
    start = start or len(times) - 1
    states = []
    for i in range(start, 0, -1):
        t, a, b = times[i], bar[times[i]], bar[times[i - 1]]
        with torch.no_grad():
            eps = net(x.float(), torch.full((len(x),), t))
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x0 = x0.clamp(-1, 1) if clip else x0
        states.append((i, x, x0))
        beta, alpha = 1 - a / b, a / b
        mean = (b.sqrt() * beta * x0 + alpha.sqrt() * (1 - b) * x) / (1 - a)
        variance = beta * (1 - b) / (1 - a) if small or eta else beta
        if eta is not None:
            variance, eps = eta ** 2 * variance * (i > 1), (x - a.sqrt() * x0) / (1 - a).sqrt()
            x = b.sqrt() * x0 + (1 - b - variance).clamp(min=0).sqrt() * eps
            x = x + variance.sqrt() * z() if eta and i > 1 else x
            continue
        x = mean + (variance.sqrt() * z() if i > 1 else 0)
    return [*states, (0, x, x)]


def levels(x) -> torch.Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round().int()


def cells(path, columns: int, k: int) -> torch.Tensor:
    """The cells of a picture, rows first: (N, C, 8, 8), enlarged by k before."""
    (width, height), pixels, c = read_png(path)
    image = torch.tensor(list(pixels)).view(height, width, c)
    assert torch.equal(image, image[::k, ::k].repeat_interleave(k, 0).repeat_interleave(k, 1))
    image = image[::k, ::k].permute(2, 0, 1)
    assert image.shape[2] == columns * SIDE
    return image.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE).permute(1, 2, 0, 3, 4).flatten(0, 1)


def noise(*names) -> Noise:
    return Noise(3, names, (3, SIDE, SIDE), "cpu")


def assert_alike(got, want) -> None:
    """The same to half a level on average; a wrong picture is off by more than five."""
    assert got.shape == want.shape
    assert (got.int() - want.int()).abs().float().mean() < 0.5


def test_the_tests_can_tell(run):
    """The control: averages or not, clipping or not, other noise, another variance, one t more:
    each changes the pictures of this network by far more than `assert_alike` allows."""
    z = noise(0)
    base = levels(chain(run["ema"], z(), z)[-1][1])
    for net, options, name in (("model", {}, 0), ("ema", {"clip": False}, 0),
                               ("ema", {"small": True}, 0), ("ema", {}, 1),
                               ("ema", {"start": T - 1}, 0)):
        z = noise(name)
        other = levels(chain(run[net], z(), z, **options)[-1][1])
        assert (other - base).abs().float().mean() > 5


def test_samples(run):
    """sample.py: image i from the averaged weights by Algorithm 2, with the noise of (seed, i)."""
    for seed, flags, net, options in (
            (3, [], "ema", {}), (3, ["--no-ema"], "model", {}),
            (3, ["--no-clip"], "ema", {"clip": False}), (4, ["--seed", "4"], "ema", {}),
            (3, ["--variance", "fixed_small"], "ema", {"small": True}),
            (3, ["--steps", "3"], "ema", {"times": [0, 1, 10, 20], "eta": 0}),
            (3, ["--steps", "3", "--eta", "0.5"], "ema", {"times": [0, 1, 10, 20], "eta": 0.5}),
            (3, ["--eta", "1"], "ema", {"small": True}), (3, ["--eta", "0"], "ema", {"eta": 0}),
            (3, ["--steps", "3", "--variance", "fixed_large"], "ema", {"times": [0, 1, 10, 20]})):
        z = Noise(seed, range(3), (3, SIDE, SIDE), "cpu")
        want = levels(chain(run[net], z(), z, **options)[-1][1])
        assert sample.main([*FLAGS, "--n", "3", "--batch-size", "2", "--out", "x.pt", *flags]) == 0
        assert_alike(torch.load("x.pt"), want)
    assert sample.main([*FLAGS, "--n", "3", "--out", "x.png", *flags]) == 0
    assert_alike(cells("x.png", 2, 30)[:3], want)


def test_grids_during_training(run, monkeypatch):
    """A run's grids are samples of its averaged weights, from the noise of its seed; all T steps
    where --sample-steps is T."""
    settings = {**checkpoint()["settings"], "seed": 3, "samples": 4, "sample_steps": T}
    training = train.Run(settings, data.read_tensor(Path("images.pt")), Path("."),
                         common.find_machine("cpu", "fp32"))
    training.model.load_state_dict(run["model"].state_dict())
    training.ema.load_state_dict(run["ema"].state_dict())
    training.grid()
    z = noise(*range(4))
    assert_alike(cells("samples-0000000.png", 2, 30), levels(chain(run["ema"], z(), z)[-1][1]))


def test_fig6_x0_hat_over_time(run):
    """A row is x̂_0 at eleven times from T to 1, and at last x_0, of one and the same chain.

    Kills: x_t in place of x̂_0, the last column missing, columns in another order."""
    assert sample.main([*FLAGS, "--n", "2", "--progressive", "--out", "f.png"]) == 0
    z = noise(0, 1)
    states = {t: x0 for t, _, x0 in chain(run["ema"], z(), z)}
    shown = [20, 18, 16, 14, 12, 10, 9, 7, 5, 3, 1, 0]   # T − 1.9 i, rounded, and 0
    assert len(shown) == 12
    want = torch.stack([levels(states[t]) for t in shown], 1).flatten(0, 1)
    assert_alike(cells("f.png", 12, 5), want)


def test_fig7_samples_that_share_x_t(run):
    """A row is x_t of one chain, then samples from that same x_t, each with noise of its own.

    Kills: the same noise for every sample, a chain that starts at another t, x_t left out."""
    assert sample.main([*FLAGS, "--n", "2", "--shared", "--out", "f.png"]) == 0
    z = noise(0)
    x = {t: x_t for t, x_t, _ in chain(run["ema"], z(), z)}
    rows = []
    for t in (20, 15, 10, 5):
        own = noise(("shared", t, 0), ("shared", t, 1))
        ends = chain(run["ema"], x[t].expand(2, -1, -1, -1), own, start=t)[-1][1]
        assert (levels(ends[0]) - levels(ends[1])).abs().float().mean() > 1
        rows.append(levels(torch.cat([x[t], ends])))
    assert_alike(cells("f.png", 3, 20), torch.cat(rows))


@pytest.mark.parametrize("flags, times, start", [
    ([], None, 10), (["--time", "15"], None, 15),
    (["--time", "12", "--steps", "3"], [0, 1, 10, 20], 2)])   # the nearest of 1, 10 and 20
def test_fig8_interpolation(run, flags, times, start):
    """A row: x_0, then (1 − λ) x_t + λ x'_t decoded for λ = 0, ⅛ … 1, and x'_0; t = T/2 by default.

    Kills: λ turned round, one noise for both ends, another noise for each λ."""
    assert sample.main([*FLAGS, "--n", "2", "--interpolate", "--out", "f.png", *flags]) == 0
    images = torch.load("images.pt")
    assert len(images) == 64
    pick = torch.Generator().manual_seed(common.seed_of(3, "pairs"))
    a = alpha_bar()[(times or range(T + 1))[start]]
    for row, pair in enumerate(torch.randint(64, (2, 2), generator=pick).tolist()):
        ends = images[pair].double() / 127.5 - 1
        x, other = a.sqrt() * ends + (1 - a).sqrt() * noise(("end", row, 0), ("end", row, 1))()
        mixed = torch.stack([x + (other - x) * i / 8 for i in range(9)])
        z = noise(("row", row))
        last = chain(run["ema"], mixed, z, start=start, times=times)[-1][1]
        want = torch.cat([images[pair[:1]].int(), levels(last), images[pair[1:]].int()])
        assert_alike(cells("f.png", 11, 5)[11 * row:11 * (row + 1)], want)


def test_kept_averages_are_what_the_file_samples(run):
    """A file of --keep samples as the averages of its checkpoint do."""
    settings = json.dumps({"settings": checkpoint()["settings"], "step": 1})
    sample.weights.write_safetensors(Path("ema-1.safetensors"), checkpoint()["ema"],
                                     {"ddpm": settings})
    flags = ["--n", "2", "--device", "cpu", "--precision", "fp32", "--seed", "3", "--out", "x.pt"]
    assert sample.main(["--checkpoint", "ema-1.safetensors", *flags]) == 0
    z = noise(0, 1)
    assert_alike(torch.load("x.pt"), levels(chain(run["ema"], z(), z)[-1][1]))


# ------------------------------------------------------------------------------ a trained network

CPU = common.Machine(torch.device("cpu"), torch.float32)
SMALL = {**test_commands.SETTINGS, "channels": 32, "multipliers": [1], "blocks": 1, "attention": [8],
         "image_size": SIDE, "timesteps": T}


def small_run(folder="runs/small", **changes) -> dict:
    """A checkpoint of a network that no training has touched, and the averages are 1 more."""
    state = common.build_network({**SMALL, **changes}).state_dict()
    payload = {"step": 12, "settings": {**SMALL, **changes}, "model": state,
               "ema": {key: value + 1 for key, value in state.items()}}
    common.save_checkpoint(Path(folder, "checkpoint.pt"), payload)
    return payload


def test_what_is_loaded_of_a_checkpoint(monkeypatch):
    """The averages unless told otherwise, on the best machine here, for evaluation; what it is in
    words is in every samples.json, so the words stay. Convolutions run faster in channels_last."""
    state, asked = small_run(), []
    monkeypatch.setattr(common, "find_machine", lambda: asked.append("machine") or CPU)
    for trained, which, words in (
            (sample.load("runs/small"), "ema", "averaged"), (sample.load(), "ema", "averaged"),
            (sample.load(ema=False), "model", "last"),
            (sample.load(Path("runs/small/checkpoint.pt"), machine=CPU), "ema", "averaged")):
        path = "runs/small" if asked[3:] == [] and not asked[1:] else trained.source.split(",")[0]
        assert trained.source == f"{path}, step 12, {words} weights" and trained.shape == (3, SIDE, SIDE)
        assert all(torch.equal(value, state[which][key]) for key, value in trained.net.state_dict().items())
        assert trained.settings == state["settings"] and not trained.net.training
        assert trained.net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(trained.schedule.alpha_bars, common.build_schedule(SMALL).alpha_bars)
    assert asked == ["machine"] * 3
