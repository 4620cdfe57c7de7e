"""Which weights, which noise and which times reach every picture: recomputed from the paper alone.

The network of these tests has random weights, and others as its averages, so that the pictures of
the one are far from those of the other, and clipping acts at every step.
"""
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import struct
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

import ddpm
import sample
import train
from helpers import (CPU, SIDE, SMALL, SMALL_NET, T, alpha_bars, begin, cells, flags_of, processes, random_run, read_png,
                     said, trains)
from support import checkpoint, command, data, machine
from support.checkpoint import Trained, save_checkpoint
from support.command import UsageError
from support.machine import Noise, seed_of
from unet import UNet

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
FLAGS = "--checkpoint runs/images --device cpu --precision fp32 --seed 3".split()


def chain(net, x, z, start=None, clip=True, variance="fixed_large", times=None, eta=None,
          T=T) -> list:
    """Algorithm 2 by Eqs. 7 and 15: (t, x_t, x̂_0 of x_t) for t = start … 1, and (0, x_0, x_0).

    With η, DDIM's step instead: x̂_0 at t − 1 with noise, of which σ² is new. times: 0, τ_1 …;
    z(t): the noise that leads from t to t − 1."""
    bar, states = alpha_bars(T), []
    times = times or list(range(T + 1))
    for i in range(start or len(times) - 1, 0, -1):
        t, a, b = times[i], bar[times[i]], bar[times[i - 1]]
        with torch.no_grad():
            eps = net(x.float(), torch.full((len(x),), t)).double()
        beta, alpha = 1 - a / b, a / b
        sigma2 = small = beta * (1 - b) / (1 - a)
        if variance == "learned":
            eps, log = eps.chunk(2, 1)
            sigma2 = log.exp()
        elif variance == "fixed_large":
            sigma2 = beta
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x0 = x0.clamp(-1, 1) if clip else x0
        states.append((i, x, x0))
        if eta is None:
            x = (b.sqrt() * beta * x0 + alpha.sqrt() * (1 - b) * x) / (1 - a)
        else:
            sigma2 = eta ** 2 * small
            eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
            x = b.sqrt() * x0 + (1 - b - sigma2).clamp(min=0).sqrt() * eps
        x = x + sigma2 ** 0.5 * z(i) if i > 1 and eta != 0 else x
    return [*states, (0, x, x)]


def levels(x) -> torch.Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round().int()


def noise(*names, seed=3) -> Noise:
    return Noise(seed, names, (3, SIDE, SIDE))


def assert_alike(got, want) -> None:
    """The same to half a level on average; a wrong picture is off by more than five."""
    assert got.shape == want.shape
    assert (got.int() - want.int()).abs().float().mean() < 0.5


def test_a_compiled_network_is_compiled_once(run, monkeypatch):
    """For all batches of one command, the shorter last one too, for all samplers, and for the copies
    of later commands; the images are those without a compiler, and those of one process."""
    compiled, trained = [], Trained(run["ema"], ddpm.make_schedule(T), SMALL_NET, "")

    def backend(graph, inputs):
        compiled.append([x.shape for x in inputs if x.dim() == 4 and x.shape[1:] == trained.shape])
        return graph.forward
    monkeypatch.setattr(machine, "BACKEND", backend)
    torch._dynamo.reset()
    for how in ({"steps": 5, "eta": 0.5}, {}):
        want = sample.draw_samples(trained, 5, 3, 2, CPU, **how)
        for n in (5, 4, 3):
            got = sample.draw_samples(trained, n, 3, 2, CPU._replace(compiles=True), **how)
            assert_alike(got, want[:n])
    assert compiled == [[(2, 3, SIDE, SIDE)]]

    def job(machine):
        compiled.clear()
        return sample.draw_samples(trained, 5, 3, 2, machine._replace(compiles=True)), list(compiled)
    for got, graphs in processes(job):
        assert_alike(got, want)
        assert graphs in ([], [[(2, 3, SIDE, SIDE)]])


def test_the_tests_can_tell(run):
    """The control: averages or not, clipping or not, other noise, another variance, one t more:
    each changes the pictures of this network by far more than `assert_alike` allows."""
    z = noise(0)
    base = levels(chain(run["ema"], z(), z)[-1][1])
    for net, options, name in (("net", {}, 0), ("ema", {"clip": False}, 0), ("ema", {"eta": 0}, 0),
                               ("ema", {"variance": "fixed_small"}, 0), ("ema", {}, 1),
                               ("ema", {"start": T - 1}, 0), ("ema", {"times": [0, 1, 10, 20]}, 0)):
        z = noise(name)
        other = levels(chain(run[net], z(), z, **options)[-1][1])
        assert (other - base).abs().float().mean() > 5
    z, later = noise(0), lambda t: noise(0)(t - 1)
    assert (levels(chain(run["ema"], z(), later)[-1][1]) - base).abs().float().mean() > 5


FEW = [0, 1, 10, 20]  # the times of three steps, and 0
CHOICES = [  # flags, the network, and what they are in `chain`
    ([], "ema", {}), (["--no-ema"], "net", {}), (["--no-clip"], "ema", {"clip": False}),
    (["--variance", "fixed_small"], "ema", {"variance": "fixed_small"}),
    (["--steps", "3"], "ema", {"times": FEW, "eta": 0}),
    (["--steps", "3", "--eta", "0.5"], "ema", {"times": FEW, "eta": 0.5}),
    (["--steps", "3", "--sampler", "ddpm"], "ema", {"times": FEW}),
    (["--sampler", "ddim", "--no-clip"], "ema", {"eta": 0, "clip": False}),
    (["--sampler", "ddim", "--eta", "1"], "ema", {"variance": "fixed_small"})]


@pytest.mark.parametrize("flags, net, options", CHOICES)
def test_samples(run, capsys, flags, net, options):
    """sample.py: image i with the noise of (seed, i), whatever the size of the batches, from the
    averaged weights by Algorithm 2 or what the flags say; and so it stands on stderr.

    Kills: the last weights, noise of another time, x̂_0 (not) clipped, β of all T steps."""
    z = noise(*range(3))
    want = levels(chain(run[net], z(), z, **options)[-1][1])
    assert sample.main([*FLAGS, "--n", "3", "--batch-size", "2", "--out", "x.pt", *flags]) == 0
    x = torch.load("x.pt")
    assert x.dtype == torch.uint8
    assert_alike(x, want)
    about = {"--variance": "fixed_small", "--eta": flags[-1:][0] if flags else ""}
    err = capsys.readouterr().err
    assert all(word in err for flag, word in about.items() if flag in flags)
    assert ("η" in err) == ("--sampler ddim" in " ".join(flags) or options.get("eta") is not None)
    assert re.search(rf"\b{len(options.get('times', range(T + 1))) - 1} network calls", err)


def test_samples_as_one_picture(run):
    """Four cells of 8 × 8 pixels, enlarged by 30, of which the last is black; of another seed."""
    z = noise(*range(3), seed=4)
    assert sample.main([*FLAGS, "--n", "3", "--out", "x.png", "--seed", "4"]) == 0
    assert_alike(cells("x.png", 2, 30), torch.cat([
        levels(chain(run["ema"], z(), z)[-1][1]), torch.zeros(1, 3, SIDE, SIDE).int()]))


WORDS = ("fixed_large", "fixed_small")


@pytest.mark.parametrize("learned", [*WORDS, "learned"])
def test_every_choice_of_a_sampler(learned):
    """For a network trained with each variance, and T = 4: which choices are refused, which chain
    the others are (DDIM, where η is given or with fewer steps and σ_t² = β_t or learned, unless
    something was said), and that what is said of two samplers differs if they do, and only then."""
    names, z = {}, torch.randn(5, 2, 1, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    s = ddpm.make_schedule(4, beta_end=0.012)

    def model(x, t):
        out = x * (1 + t[:, None, None, None] / 3)
        return torch.cat([out, out * 0.1 - 1], 1) if learned == "learned" else out
    trained = Trained(None, s, {"predict": "eps", "variance": learned}, "")
    for steps, sampler, eta, variance, clip in itertools.product(
            (None, 2, 4, 5), (None, "ddpm", "ddim"), (None, 0.0, 0.5), (None, *WORDS), (None, False)):
        how, few = dict(steps=steps, sampler=sampler, eta=eta, variance=variance, clip=clip), steps == 2
        if (steps == 5 or (learned == "learned" and (variance or few and sampler == "ddpm")) or (sampler == "ddim" and variance)
                or (eta is not None and (sampler == "ddpm" or variance))):
            with pytest.raises(UsageError):
                sample.choose_sampler(trained, **how)
            continue
        ddim = eta is not None or sampler == "ddim" or (
            few and not sampler and not variance and learned != "fixed_small")
        kind = {"eta": eta or 0} if ddim else {"variance": variance or learned}
        options = {"times": [0, 1, 4] if few else [*range(5)], "clip": clip is None, **kind}
        if learned == "learned":
            options["variance"] = "learned"
        found = sample.choose_sampler(trained, **how)
        net = lambda x, t: model(x.float(), t)
        *_, state = found.loop(replace(found.model, net=net), z[0], lambda t: z[t])
        want = chain(model, z[0], lambda t: z[t], T=4, **options)[-1][1]
        torch.testing.assert_close(state.x_t, want, rtol=1e-5, atol=1e-5)
        said = (*kind.items(), few, clip)
        assert names.setdefault(found.about, said) == said, how
        assert ("η" in found.about) == ddim and (ddim or kind["variance"] in found.about)
    assert len(set(names.values())) == len(names)


def test_a_network_trained_without_clipping_is_sampled_without():
    """As a scheduler of diffusers tells; `clip` goes before it."""
    settings = {"predict": "eps", "variance": "fixed_large", "clip": False}
    trained = Trained(None, ddpm.make_schedule(4), settings, "")
    for clip, value in ((None, 3.0), (False, 3.0), (True, 1.0)):
        model, loop, _ = sample.choose_sampler(trained, clip=clip, sampler="ddim")
        state = next(loop(replace(model, net=lambda x, t: 0 * x), 3 * model.s.alpha_bars[4:].sqrt(), None))
        assert state.x0_hat.item() == pytest.approx(value)


def test_the_command_does_not_clip_what_was_trained_without(run):
    """No flag means as trained: then the samples are those of --no-clip, and with a network that was
    trained with clipping they are others."""
    flags = "--n 2 --sampler ddpm --out".split()
    path, found = Path("runs/images/checkpoint.pt"), {}
    for clip in (True, False):
        save_checkpoint(path, {"settings": {**SMALL_NET, "clip": clip}, "step": 1, "ema": run["ema"].state_dict()})
        for more in ([], ["--no-clip"]):
            assert sample.main([*FLAGS, *flags, "x.pt", *more]) == 0
            found[clip, bool(more)] = torch.load("x.pt").int()
    assert torch.equal(found[False, False], found[False, True])
    assert torch.equal(found[True, True], found[False, True])
    assert (found[True, False] - found[True, True]).abs().max() > 3


def test_grids_during_training(run):
    """A run's grids are samples of its averaged weights, from the noise of its seed; all T steps
    where --sample-steps is T or more, and then Algorithm 2's."""
    nets = [begin({"init": None, "sample_steps": steps, "samples": 4, "seed": 3},
                        torch.load("images.pt"), SMALL_NET, CPU, Path(f"{steps}")) for steps in (T, 3, 99)]
    z = noise(*range(4))
    for training, options in zip(nets, ({}, {"times": FEW, "eta": 0}, {})):
        training.net.load_state_dict(run["net"].state_dict())
        training.ema.load_state_dict(run["ema"].state_dict())
        train.draw_grid(training, 7)
        assert_alike(cells(training.folder / "samples-0000007.png", 2, 30),
                     levels(chain(run["ema"], z(), z, **options)[-1][1]))


# -------------------------------------------------------------------------------------- the figures

@pytest.mark.parametrize("flags, options, shown", [
    ([], {}, [20, 18, 16, 14, 12, 10, 9, 7, 5, 3, 1, 0]),   # T − 1.9 i, rounded, and 0
    (["--no-clip", "--variance", "fixed_small"], {"clip": False, "variance": "fixed_small"},
     [20, 18, 16, 14, 12, 10, 9, 7, 5, 3, 1, 0]),
    (["--steps", "3", "--eta", "0.5"], {"times": FEW, "eta": 0.5}, [3, 2, 1, 0])])
def test_fig6_x0_hat_over_time(run, flags, options, shown):
    """A row is x̂_0 at eleven times from T to 1, and at last x_0, of one and the same chain.

    Kills: x_t instead of x̂_0, the last column missing, columns in another order."""
    assert sample.main([*FLAGS, "--n", "2", "--progressive", "--out", "f.png", *flags]) == 0
    z = noise(0, 1)
    states = {t: x0 for t, _, x0 in chain(run["ema"], z(), z, **options)}
    want = torch.stack([levels(states[t]) for t in shown], 1).flatten(0, 1)
    assert_alike(cells("f.png", len(shown), 480 // len(shown) // SIDE), want)


@pytest.mark.parametrize("flags, options, times", [
    ([], {}, [20, 15, 10, 5]),
    (["--steps", "4", "--eta", "1"], {"times": [0, 1, 7, 14, 20], "eta": 1}, [4, 3, 2]),
    (["--steps", "2", "--sampler", "ddpm"], {"times": [0, 1, 20]}, [2])])
def test_fig7_samples_that_share_x_t(run, flags, options, times):
    """A row is x_t of one chain, then samples from that same x_t, each with noise of its own.

    Kills: the same noise for every sample, a chain that starts at another t, x_t left out, a row twice."""
    assert sample.main([*FLAGS, "--n", "2", "--shared", "--out", "f.png", *flags]) == 0
    z = noise(0)
    x = {t: x_t for t, x_t, _ in chain(run["ema"], z(), z, **options)}
    rows = []
    for t in times:
        own = noise(("shared", t, 0), ("shared", t, 1))
        ends = chain(run["ema"], x[t].expand(2, -1, -1, -1), own, start=t, **options)[-1][1]
        assert t == 1 or (levels(ends[0]) - levels(ends[1])).abs().float().mean() > 1
        rows.append(levels(torch.cat([x[t], ends])))
    assert_alike(cells("f.png", 3, 20), torch.cat(rows))


@pytest.mark.parametrize("flags, options, start", [
    ([], {}, 10), (["--time", "15", "--no-clip"], {"clip": False}, 15),
    (["--time", "12", "--steps", "3"], {"times": FEW, "eta": 0}, 2),   # the nearest of 1, 10 and 20
    (["--steps", "3"], {"times": FEW, "eta": 0}, 2),                   # half of T, not of the steps
    (["--time", "20", "--steps", "3", "--sampler", "ddpm"], {"times": FEW}, 3)])
def test_fig8_interpolation(run, flags, options, start):
    """A row: x_0, then (1 − λ) x_t + λ x'_t decoded for λ = 0, ⅛ … 1, and x'_0; t = T/2 by default.

    Kills: λ turned round, one noise for both ends, another noise for each λ."""
    assert sample.main([*FLAGS, "--n", "2", "--interpolate", "--out", "f.png", *flags]) == 0
    images, pick = torch.load("images.pt"), torch.Generator().manual_seed(seed_of(3, "pairs"))
    a = alpha_bars(T)[options.get("times", range(T + 1))[start]]
    for row, pair in enumerate(torch.randint(64, (2, 2), generator=pick).tolist()):
        ends = images[pair].double() / 127.5 - 1
        x, other = a.sqrt() * ends + (1 - a).sqrt() * noise(("end", row, 0), ("end", row, 1))()
        mixed = torch.stack([x + (other - x) * i / 8 for i in range(9)])
        z = noise(("row", row))
        last = chain(run["ema"], mixed, z, start=start, **options)[-1][1]
        want = torch.cat([images[pair[:1]].int(), levels(last), images[pair[1:]].int()])
        assert_alike(cells("f.png", 11, 5)[11 * row:11 * (row + 1)], want)


def test_the_images_that_are_mixed(run, capsys):
    """Those of the test split of the data that were named, or else of the run's, at the network's
    size. Images of another shape, and a network that names no data, are one line."""
    real, file = torch.load("images.pt"), Path("runs/images/checkpoint.pt")
    flags = "--device cpu --precision fp32 --seed 3 --interpolate --n 1 --steps 2 --time 1".split()

    def ends(*more, n, side=SIDE):  # the two images of the row, and which of n they are
        assert sample.main([*flags, "--out", "mixed.png", *more]) == 0
        columns = read_png("mixed.png")[:, :, ::max(1, round(480 / (11 * side)))]
        k = columns.shape[1] // side
        columns = columns[:, ::k].unfold(2, side, side).permute(2, 0, 1, 3)
        pick = torch.Generator().manual_seed(seed_of(3, "pairs"))
        return columns[[0, 10]], torch.randint(n, (1, 2), generator=pick)[0]
    torch.save(real.flip(0), "a.pt")
    for more, images in (([], real), (["--dataset", "a.pt"], real.flip(0)),
                         (["--dataset", "shapes"], data.shapes(1024, SIDE, "test"))):
        found, pair = ends(*more, n=len(images))
        assert torch.equal(found, images[pair].int())
    torch.save(real[:, :1], "grey.pt")
    assert sample.main([*flags, "--dataset", "grey.pt"]) == 1 and "grey.pt" in capsys.readouterr().err
    state = checkpoint.load_checkpoint(file)
    del state["settings"]["dataset"]
    save_checkpoint(file, state)
    found, pair = ends("--dataset", "a.pt", n=64)
    assert torch.equal(found, real.flip(0)[pair].int())
    assert sample.main(flags) == 2 and "--dataset" in capsys.readouterr().err
    assert sample.main([*flags, "--time", str(T + 1)]) == 2 and "--time" in capsys.readouterr().err
    random_run(dataset="mnist", in_channels=1, image_size=32, attention=[])   # of which only the test split is there
    digits = torch.randint(256, (5, 1, 28, 28), dtype=torch.uint8)
    Path("there").mkdir()
    Path("there", data.FILES["mnist"][1][1][0]).write_bytes(gzip.compress(
        struct.pack(">4I", 2051, 5, 28, 28) + data.raw_bytes(digits)))
    found, pair = ends("--data-dir", "there", n=5, side=32)
    assert torch.equal(found, torch.nn.functional.pad(digits, (2, 2, 2, 2))[pair].int())


# -------------------------------------------------------------------------------------- many images

class Watched(torch.nn.Module):
    """ε_θ = 0. It keeps what it is given, over all copies of it."""
    seen = []

    def forward(self, x, t):
        self.seen.append((x, t))
        return 0 * x


def numbers(x, seed: int, shape=(3, SIDE, SIDE)) -> list[int]:
    """Which images begin with these x_T."""
    every = Noise(seed, range(40), shape)()
    return [(every == one).flatten(1).all(1).nonzero().item() for one in x]


def test_the_batches_of_images():
    """16 at a time on a CPU, and so many for each process, which draws every second one."""
    trained = Trained(Watched(), ddpm.make_schedule(2), SMALL_NET, "")

    def asked():  # each batch has T = 2 calls
        batches = [numbers(x, 7) for x, _ in Watched.seen[::2]]
        assert all((t == 2 - i % 2).all() for i, (_, t) in enumerate(Watched.seen))
        Watched.seen.clear()
        return batches
    Watched.seen.clear()
    for indices, size, want in ((range(40), None, [range(16), range(16, 32), range(32, 40)]),
                                ([3, 9, 4], None, [(3, 9, 4)]), (range(1, 6), 2, [(1, 2), (3, 4), (5,)])):
        drawn = list(sample.draw_batches(trained, sample.choose_sampler(trained), indices, 7, size, CPU))
        assert asked() == [[*batch] for batch in want]
        assert [tuple(batch) for batch, _ in drawn] == [tuple(batch) for batch in want]
        assert all(len(x) == len(batch) for batch, x in drawn)

    def job(machine):
        shapes = [tuple(x.shape) for _, x in sample.draw_batches(trained, sample.choose_sampler(trained), range(5), 7, 1, machine)]
        return shapes, asked()
    first, second = processes(job)
    assert first == ([(2, 3, 8, 8)] * 2 + [(1, 3, 8, 8)], [[0], [2], [4]]) and second[0] == first[0]
    assert [batch for batch in second[1] if batch] == [[1], [3]]
    assert sample.draw_samples(trained, 34, 7, 17, CPU).shape == (34, *trained.shape)
    assert asked() == [[*range(17)], [*range(17, 34)]]


def test_two_processes_draw_the_images_of_one(small):
    """In their order, whatever the size of the batches; both have all of them."""
    one = sample.draw_samples(small, 5, 7, 5, CPU, steps=2)
    for two in processes(lambda machine: [sample.draw_samples(small, 5, 7, size, machine, steps=2) for size in (1, 2, 3)]):
        assert all((images.int() - one.int()).abs().max() <= 1 for images in two)
    assert len(one.flatten(1).unique(dim=0)) == 5


def drawn(*flags, stop_after: int | None = None) -> tuple[int, list[int]]:
    """Runs sample.py; a signal comes when so many images are drawn. Its status and the images that were."""
    indices, last = [], []

    def watch(module, given):
        if not isinstance(module, UNet):
            return
        x, t = given
        if not last or t[0] > last[-1]:  # a new batch
            if stop_after is not None and len(indices) >= stop_after:
                os.kill(os.getpid(), signal.SIGINT)
            seed = int(flags[flags.index("--seed") + 1]) if "--seed" in flags else 3
            indices.extend(numbers(x, seed))
        last.append(t[0].item())
    hook = torch.nn.modules.module.register_module_forward_pre_hook(watch)
    try:
        status = sample.main([*FLAGS, "--steps", "3", "--batch-size", "2", *map(str, flags)])
    finally:
        hook.remove()
    return status, indices


def contents(folder="f") -> dict:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_folder_of_samples_goes_on(run):
    """A PNG for each image: what is missing is drawn and what is there is kept, to the byte; the
    images are those of a tensor."""
    assert drawn("--n", 4, "--out", "whole.pt", "--batch-size", 4) == (0, [0, 1, 2, 3])
    assert drawn("--n", 3, "--out", "f", stop_after=2) == (130, [0, 1])
    before = contents()
    assert sorted(before) == [".lock", "000000.png", "000001.png", "samples.json"]
    assert json.loads(before["samples.json"]).keys() == {"weights", "seed", "sampler", "precision"}
    assert drawn("--n", 3, "--out", "f/") == (0, [2])
    Path("f/000001.png").unlink()
    assert drawn("--n", 4, "--out", "f") == (0, [1, 3])
    assert drawn("--n", 2, "--out", "f") == (0, [])
    assert len(contents()) == 6 and contents()["000000.png"] == before["000000.png"]
    for i, image in enumerate(torch.load("whole.pt").int()):
        assert (read_png(f"f/{i:06d}.png") - image).abs().max() <= 1


def test_two_processes_fill_one_folder(small, capsys):
    """The first one writes all files and says so; the second draws its half and writes nothing."""
    args = types.SimpleNamespace(n=3, seed=7, batch_size=1)

    def job(machine):
        args.out = Path(f"f{machine.rank}")
        sample.draw_folder(small, sample.choose_sampler(small, 2), args, machine)
        return args.out.exists() and sorted(contents(args.out)), capsys.readouterr().err != ""
    assert processes(job) == [(["000000.png", "000001.png", "000002.png", "samples.json"], True), (False, False)]
    assert contents("f0")["000001.png"] == data.png(sample.draw_samples(small, 2, 7, 1, CPU, steps=2)[1])


def test_drawing_in_inference_mode_leaves_the_network_usable(small):
    """Its copy for sampling is kept, and the weights of now are loaded into it each time."""
    for here in (CPU, CPU._replace(dtype=torch.bfloat16)):
        with torch.inference_mode():
            first = sample.draw_samples(small, 2, 0, 2, here, steps=2)
        assert torch.equal(first, sample.draw_samples(small, 2, 0, 2, here, steps=2))


def test_samples_do_not_lie_among_the_files_of_a_run(run, capsys):
    """There the grids would be scored with them."""
    before = sorted(Path("runs/images").iterdir())
    assert sample.main("--n 2 --steps 2 --device cpu --out runs/images".split()) == 2
    assert "runs/images is the folder of a run" in capsys.readouterr().err.splitlines()[-1]
    assert {*Path("runs/images").iterdir()} - {*before} <= {Path("runs/images/.lock")}


def test_unknown_choices_from_python_are_refused(small):
    """A sampler by another name is no Algorithm 2; no number of steps means another."""
    for how, part in (({"sampler": "DDIM"}, "DDIM"), ({"sampler": "euler"}, "euler"), ({"steps": 0}, "0"), ({"steps": 1}, "1"),
                      ({"sampler": "ddim", "eta": 5.0}, "5"), ({"eta": -1}, "-1")):
        with pytest.raises(ValueError, match=part):
            sample.draw_samples(small, 1, 0, 1, CPU, **how)


def test_samples_of_another_kind_are_not_mixed(run, capsys):
    """Of another seed, sampler, precision or other weights, or of what no readable note tells: these
    are refused, nothing is drawn, and the folder stays as it is."""
    Path("f").mkdir()
    assert drawn("--n", 1, "--out", "f") == (0, [0])
    before = contents()

    def refused(*flags):
        capsys.readouterr()
        assert drawn("--n", 3, "--out", "f", *flags) == (1, [])
        assert "--out" in (err := capsys.readouterr().err) or "samples.json" in err
    for flags in (["--seed", 1], ["--no-clip"], ["--steps", 4], ["--variance", "fixed_small"],
                  ["--sampler", "ddpm"], ["--eta", 0.5], ["--no-ema"], ["--precision", "bf16"]):
        refused(*flags)
        assert contents() == before
    state = checkpoint.load_checkpoint(Path("runs/images/checkpoint.pt"))
    save_checkpoint(Path("runs/images/checkpoint.pt"), {**state, "step": 2})  # the same weights
    assert drawn("--n", 1, "--out", "f") == (0, [])
    state["ema"]["conv_in.bias"][0] += 1e-3
    save_checkpoint(Path("runs/images/checkpoint.pt"), state)
    refused()
    for note in (b"{", b"[]", None):
        Path("f/samples.json").write_bytes(note) if note else Path("f/samples.json").unlink()
        refused()


def test_a_tensor_of_samples_is_whole_or_not_there(run):
    """After a stop in the middle nothing of it is left, and what was there before is still there."""
    Path("x.pt").write_bytes(b"before")
    here = sorted(os.listdir())
    assert drawn("--n", 5, "--out", "x.pt", stop_after=2) == (130, [0, 1])
    assert Path("x.pt").read_bytes() == b"before" and sorted(os.listdir()) == here


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


# ------------------------------------------------------------------------------- pictures and flags

@given(st.integers(1, 12), st.sampled_from([1, 3]), st.integers(1, 4), st.sampled_from([1, 3, 30, 161, 300]),
       st.none() | st.integers(1, 13))
def test_every_cell_of_a_grid(n, c, height, width, columns):
    """Image i is in row i // columns and column i % columns; cells beyond the last are black. Each
    pixel is a square, and the picture as wide as can be nearest to 480, whatever its height."""
    images = torch.randint(1, 256, (n, c, height, width), dtype=torch.uint8)
    picture = data.tiled(images, columns)
    columns = columns or min(k for k in range(1, 13) if k * k >= n)
    rows, small = (n + columns - 1) // columns, columns * width
    k = picture.shape[2] // small
    assert k == 1 or abs(k * small - 480) <= min(abs((k - 1) * small - 480), abs((k + 1) * small - 480))
    assert k > 1 or 2 * small - 480 >= 480 - small
    assert picture.shape == (c, k * rows * height, k * small) and picture.dtype == torch.uint8
    pixels = picture[:, ::k, ::k]
    assert (picture.view(c, rows * height, k, small, k) == pixels[:, :, None, :, None]).all()
    for i in range(rows * columns):
        y, x = i // columns * height, i % columns * width
        cell = pixels[:, y:y + height, x:x + width]
        assert torch.equal(cell, images[i]) if i < n else not cell.any()


def test_flags_and_their_defaults():
    """64 images, or 8 rows of a figure; a figure is a PNG."""
    for flags, n, figure in (
            ("", 64, None), ("--n 1", 1, None), ("--eta 0 --steps 3", 64, None),
            ("--progressive", 8, sample.progressive), ("--shared", 8, sample.shared),
            ("--interpolate --time 3 --dataset a", 8, sample.interpolation),
            ("--shared --n 3", 3, sample.shared)):
        args = sample.parse(flags.split())
        assert (args.n, args.figure, args.out) == (n, figure, Path("samples.png"))
        assert (args.seed, args.device, args.precision) == (0, None, None)
        assert (args.no_ema, args.no_clip) == (False, False)
    for out in ("a.pt", "a", "a.png"):
        assert sample.parse(["--out", out]).out == Path(out)


@pytest.mark.parametrize("flags, status, parts", [
    ("--out x.jpg", 2, ".png"), ("--out x.pt --shared", 2, ".png"), ("--out a --shared", 2, ".png"), ("--n 0", 2, "--n"),
    ("--steps 21", 2, "21 20"), ("--checkpoint none.pt", 1, "none.pt"), ("--interpolate --time 21", 2, "21 20"),
    ("--interpolate --dataset grey.pt --time 5", 1, "grey.pt (1,"), ("--shared --progressive", 2, "--shared --progressive"),
    ("--time 5", 2, "--interpolate"), ("--shared --time 3", 2, "--interpolate"), ("--dataset grey.pt", 2, "--interpolate"),
    ("--progressive --dataset a", 2, "--interpolate"), ("--sampler ddpm --eta 0.5", 2, "--eta ddim"),
    ("--sampler ddim --variance fixed_small", 2, "--variance"), ("--eta 1.1", 2, "--eta"), ("--eta -0.1", 2, "--eta"),
    ("--sampler euler", 2, "--sampler euler"), ("--steps 1", 2, "--steps 1"), ("--variance learned", 2, "--variance learned"),
    ("--out images.pt/x.png", 1, "images.pt/x.png")])
def test_mistakes_are_one_line(run, capsys, flags, status, parts):
    """Wrong endings, impossible steps, a dataset of another shape, what does not go together: each line
    names what is wrong, and nothing is written."""
    torch.save(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), "grey.pt")
    before = sorted(Path().rglob("*"))
    assert sample.main(flags.split()) == status
    line = said(capsys)
    assert all(part in line for part in parts.split()) and "unexpected" not in line, line
    assert sorted(Path().rglob("*")) == before


def test_without_a_run_there_is_nothing_to_sample(capsys):
    assert sample.main([]) == 1 and "runs" in said(capsys)


# ---------------------------------------------------------------------- every choice, every picture

CHOICES = {"--seed": "--seed 4", "--steps": "--steps 5", "--sampler": "--sampler ddim",
           "--eta": "--eta 0.5", "--variance": "--variance fixed_small", "--no-clip": "--no-clip",
           "--no-ema": "--no-ema", "--n": "--n 3", "--time": "--time 5", "--dataset": "--dataset other.pt"}
NEUTRAL = {"--batch-size": "--batch-size 1", "--data-dir": "--data-dir elsewhere", "--device": "--device cpu",
           "--precision": "--precision fp32", "--no-compile": "--no-compile", "--checkpoint": "--checkpoint runs/images/checkpoint.pt"}
PICTURES = {"grid": "--out x.png", "tensor": "--out x.pt", "folder": "--out x", "--progressive": "--progressive --out x.png",
            "--shared": "--shared --out x.png", "--interpolate": "--interpolate --out x.png"}


def made(kind: str, *more: str) -> list:
    """What sample.py makes: the pixels of a picture, of a tensor, or of each file of a folder."""
    for leftover in Path().glob("x*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    assert sample.main([*FLAGS, "--n", "1", *PICTURES[kind].split(), *" ".join(more).split()]) == 0
    path, = Path().glob("x*")
    if path.is_dir():
        return [read_png(file) for file in sorted(path.glob("*.png"))]
    return [torch.load(path).int() if path.suffix == ".pt" else read_png(path)]


@pytest.mark.parametrize("kind", PICTURES)
def test_every_choice_reaches_every_picture(run, kind):
    """Each flag of sample.py changes what it must and nothing else; the flags are read off its own
    help, so that a new one without a line above fails.

    Kills: a choice that a figure does not follow, or that is lost on the way to one."""
    torch.save(torch.load("images.pt").flip(0), "other.pt")
    base = made(kind)
    assert flags_of(sample.main) == {*CHOICES, *NEUTRAL, *PICTURES, "--out", "--help", "--compile"} - {"grid", "tensor", "folder"}
    reads = sample.READS.get(kind, sample.READS["samples"]).split()

    def refused(flag: str, words: str) -> bool:  # as it has no effect there
        if flag.removeprefix("--").replace("no-compile", "compile").replace("-", "_") in reads:
            return False
        assert sample.main([*FLAGS, *PICTURES[kind].split(), *words.split()]) == 2, flag
        return True
    for flag, words in NEUTRAL.items():
        if not refused(flag, words) and kind in ("grid", "--interpolate"):
            assert all((a - b).abs().max() <= 1 for a, b in zip(base, made(kind, words), strict=True)), flag
    for flag, words in CHOICES.items():
        if refused(flag, words):
            continue
        if kind == "--shared" and flag in ("--steps", "--sampler"):   # with η = 0 all samples would be one
            assert sample.main([*FLAGS, *PICTURES[kind].split(), *words.split()]) == 2, flag
            words += " --eta 0.5"
        other = made(kind, words)
        assert len(other) != len(base) or any(
            a.shape != b.shape or (a - b).abs().max() > 3 for a, b in zip(base, other)), flag
