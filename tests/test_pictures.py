"""Which weights, which noise and which times reach every picture: recomputed from the paper alone.

The network of these tests has random weights, and others as its averages, so that the pictures of
the one are far from those of the other, and clipping acts at every step.
"""
import json
import math
import os
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


# ------------------------------------------------------------------------------- a trained network

CPU = common.Machine(torch.device("cpu"), torch.float32)
SMALL = {**test_commands.SETTINGS, "channels": 32, "multipliers": [1], "blocks": 1,
         "attention": [8], "image_size": SIDE, "timesteps": T}


@pytest.fixture(scope="module")
def small():
    """A network that no training has touched."""
    net = common.build_network(SMALL).eval()
    return sample.Trained(net, common.build_schedule(SMALL), SMALL, "a source")


def assert_has(net, state) -> None:
    test_commands.assert_equal(dict(net.state_dict()), dict(state))


def test_what_is_loaded_of_a_checkpoint(small, monkeypatch):
    """The averages unless told otherwise, on the best machine here, for evaluation. What it is in
    words stands in every samples.json, so the words stay. channels_last makes convolutions fast."""
    state, asked = small.net.state_dict(), []
    ema = {key: value + 1 for key, value in state.items()}
    common.save_checkpoint(Path("runs/x/checkpoint.pt"), {"step": 12, "settings": SMALL,
                                                          "model": state, "ema": ema})
    monkeypatch.setattr(common, "find_machine", lambda: asked.append("machine") or CPU)
    monkeypatch.setattr(common, "require_network", lambda *x: asked.append(x[1]))
    file, folder = Path("runs/x/checkpoint.pt"), Path("runs/x")
    for words, path, weights, which in (
            (("runs/x",), folder, ema, "averaged"), ((), file, ema, "averaged"),
            ((None, "data", False), file, state, "last"),
            ((file, "data", True, CPU), file, ema, "averaged")):
        trained = sample.load(*words)
        assert trained.source == f"{path}, step 12, {which} weights"
        assert_has(trained.net, weights)
        assert trained.settings == SMALL and trained.shape == (3, SIDE, SIDE)
        assert not any(module.training for module in trained.net.modules())
        assert trained.net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(trained.schedule.alpha_bars, small.schedule.alpha_bars)
    assert asked == ["machine", CPU] * 3 + [CPU]


def test_where_weights_are_looked_for(small, monkeypatch):
    """Files and folders of diffusers are read where they are; only a name of the form of the hub's
    is downloaded, to the folder hub of the data."""
    asked = []
    monkeypatch.setattr(sample.weights, "read_header", lambda path: (asked.append(path), {}))
    monkeypatch.setattr(sample.weights, "download", lambda *x: asked.append(x) or Path("new"))
    monkeypatch.setattr(sample.weights, "from_diffusers",
                        lambda path: asked.append(path) or small[:1] + small[2:])
    for name in ("flat/config.json", "deep/unet/config.json"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text("{}")
    for words, want in (
            (("a.safetensors",), [Path("a.safetensors")] * 2), (("a.bin",), [Path("a.bin")]),
            (("flat",), [Path("flat")]), (("deep",), [Path("deep")]),
            (("some.one/mo-del_1.5",), [("some.one/mo-del_1.5", Path("data/hub")), Path("new")]),
            ((Path("-a/b"), "there"), [("-a/b", Path("there/hub")), Path("new")])):
        asked.clear()
        assert sample.load(*words, machine=CPU)[2:] == (SMALL, "a source") and asked == want
    asked.clear()
    for name in ("someone/model.pt", "flat/model", "model", "a/b/c", "xa/b y"):
        with pytest.raises(ValueError):
            sample.load(name, machine=CPU)
    assert asked == []


def test_the_newest_run_is_the_one_that_saved_last():
    """Not the last one by name; a run that has only the checkpoint before the last counts, too."""
    with pytest.raises(ValueError, match="elsewhere"):
        sample.newest_checkpoint(Path("elsewhere"))
    for when, file in ((1, "c/checkpoint.pt"), (3, "a/checkpoint.pt"), (2, "b/checkpoint.prev.pt"),
                       (9, "d/other.pt"), (5, "b/checkpoint.prev.pt")):
        Path("runs", file).parent.mkdir(parents=True, exist_ok=True)
        Path("runs", file).touch()
        os.utime(Path("runs", file), (when, when))
        want = {1: "c", 2: "a", 3: "a", 9: "a", 5: "b"}[when]
        assert sample.newest_checkpoint() == Path("runs", want, "checkpoint.pt")


def test_weights_must_fit_their_settings(small, monkeypatch):
    """Memory is asked for twice the weights, since they are there already, and for one image."""
    asked, state = [], small.net.state_dict()
    monkeypatch.setattr(common, "require_network", lambda *given: asked.append(given))
    assert_has(sample.network_with(state, SMALL, Path("x.pt"), CPU), state)
    assert asked == [(SMALL, CPU, 2, 1, False)]
    for wrong in (None, {}, {**state, "more": torch.ones(1)}):
        with pytest.raises(ValueError, match="x.pt"):
            sample.network_with(wrong, SMALL, Path("x.pt"), CPU)


def test_kept_weights_tell_their_settings(small, monkeypatch):
    """Another file is none of train.py's; one whose settings or weights are unsound is refused."""
    path, state, asked = Path("k.safetensors"), small.net.state_dict(), []
    monkeypatch.setattr(common, "require_network", lambda *x: asked.append(x[1]))

    def kept(about, state=state):
        sample.weights.write_safetensors(path, state, about and {"ddpm": json.dumps(about)})
        return sample.kept_weights(path, CPU)
    net, settings, source = kept({"settings": SMALL, "step": 12})
    assert settings == SMALL and source == f"{path}, step 12, averaged weights"
    assert_has(net, state)
    assert asked == [CPU]
    assert kept(None) is None and sample.kept_weights(Path("k.bin"), CPU) is None
    for about in ([1], {"step": 1}, {"settings": SMALL}, {"settings": SMALL, "step": "x"},
                  {"settings": SMALL, "step": None}, {"settings": {}, "step": 1},
                  {"settings": {**SMALL, "lr": -1}, "step": 1}):
        with pytest.raises(ValueError, match="k.safetensors"):
            kept(about)
    for wrong in ({"a": torch.ones(1)}, {**state, "conv_in.bias": torch.full((32,), math.nan)}):
        with pytest.raises(ValueError, match="k.safetensors"):
            kept({"settings": SMALL, "step": 12}, wrong)


def test_weights_are_cast_once_in_a_copy(small):
    """Those of convolutions and matrix products; the normalisation stays float32."""
    seen, net = [], sample.copy.deepcopy(small.net).train()
    hook = torch.nn.Module.register_forward_hook
    machine = CPU._replace(dtype=torch.bfloat16)
    net.apply(lambda module: hook(module, lambda module, x, y: seen.append(module)))
    x = sample.inference_model(net, machine)(torch.zeros(1, *small.shape), torch.ones(1))
    assert x.dtype == torch.float32 and seen and not any(module.training for module in seen)
    for module in seen:
        for weight in module.parameters(recurse=False):
            cast = isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
            assert weight.dtype == (torch.bfloat16 if cast else torch.float32)
    assert all(weight.dtype == torch.float32 for weight in net.parameters()) and net.training


# ------------------------------------------------------------------------------------ many images

@pytest.mark.parametrize("options, variance, want", [
    ({}, "fixed_large", None), ({"steps": T}, "fixed_large", None),
    ({"steps": 5}, "fixed_large", 0.0), ({"steps": 5}, "fixed_small", None),
    ({"steps": 5, "variance": "fixed_large"}, "fixed_large", None),
    ({"steps": 5, "eta": 0.5}, "fixed_large", 0.5), ({"eta": 0.0}, "fixed_small", 0.0),
    ({"clip": False}, "fixed_small", None)])
def test_which_steps_are_taken(small, monkeypatch, options, variance, want):
    """With fewer steps than T and σ² = β those of DDIM with η = 0, unless something was said."""
    def loop(s, model, x, noise, *eta, **choices):
        taken.append((s.T, *eta, choices))
        yield 0, x, x
    taken, trained = [], small._replace(settings={**SMALL, "variance": variance})
    monkeypatch.setattr(common, "require_network", lambda *_: None)
    monkeypatch.setattr(sample.ddpm, "p_sample_loop", loop)
    monkeypatch.setattr(sample.ddpm, "ddim_loop", loop)
    list(sample.draw_batches(trained, 0, 1, machine=CPU, **options))
    choices = {"predict": "eps", "variance": variance, "clip": options.get("clip", True)}
    assert taken == [(options.get("steps", T), *([] if want is None else [want]), choices)]


def test_the_batches_of_images(small, monkeypatch):
    """16 at a time on a CPU, from the first one asked for; their memory is asked for before. Images
    of a tensor are three times in memory."""
    asked = []
    monkeypatch.setattr(common, "require_network", lambda *given: asked.append(given[1:]))
    monkeypatch.setattr(sample, "Noise", lambda seed, mine, *_: asked.append((seed, *mine)) or (
        lambda: torch.zeros(len(mine), *small.shape)))
    monkeypatch.setattr(sample.ddpm, "p_sample_loop", lambda s, model, x, *_, **__: [(0, x, x)])
    for first, n, size, want in ((0, 40, None, [range(16), range(16, 32), range(32, 40)]),
                                 (3, 5, None, [range(3, 5)]), (1, 6, 2, [(1, 2), (3, 4), (5,)])):
        asked.clear()
        sizes = [len(x) for x in sample.draw_batches(small, first, n, 7, size, machine=CPU)]
        assert asked == [(CPU, 1, min(n, size or 16), False)] + [(7, *batch) for batch in want]
        assert sizes == [len(batch) for batch in want]
    monkeypatch.setattr(common, "require", lambda need, what: asked.append((need, what)))
    assert sample.draw_samples(small, 1234, 5, 617, machine=CPU).shape == (1234, *small.shape)
    assert asked[-4][0] == 3 * 1234 * 3 * SIDE ** 2 and "1,234" in asked[-4][1]
    assert asked[-2][:2] == (5, 0) and len(asked[-1]) == 618


def test_the_time_of_a_call_is_measured_once_it_is_warm(small, monkeypatch):
    """The second call on up to 32 images, times the batches of one process."""
    now, calls = [0.0], []

    def model(x, t):
        calls.append((len(x), t.tolist()))
        now[0] += 50 if len(calls) % 2 else 2
        return x
    monkeypatch.setattr(sample, "inference_model", lambda net, machine: model)
    monkeypatch.setattr(sample.time, "monotonic", lambda: now[0])
    for n, world, seconds in ((5, 1, 2), (32, 1, 2), (33, 1, 4), (100, 1, 8), (100, 2, 4)):
        assert sample.seconds_of_a_call(small, n, CPU._replace(world=world)) == seconds
        assert calls[-1] == calls[-2] == (min(n, 32), [1] * min(n, 32))


def many(small, monkeypatch, out, n, has=None, **flags) -> list:
    """Draws into `out` with batches of two images full of their number; what was asked for.

    It stops after `has` images."""
    asked = []

    def batches(trained, first, n, *given, **choices):
        asked.append((trained, first, n, *given[:4], given[5:], choices))
        for i in range(first, n, 2):
            if has is not None and i >= has:
                raise InterruptedError
            numbers = torch.arange(i, min(n, i + 2), dtype=torch.uint8)
            yield numbers.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    args = types.SimpleNamespace(**{"out": Path(out), "n": n, "seed": 5, "batch_size": 2,
                                    "steps": None, "eta": None, "choices": {}, **flags})
    monkeypatch.setattr(sample, "draw_batches", batches)
    try:
        sample.draw_many(small, CPU, args)
    except InterruptedError:
        pass
    return asked


@pytest.mark.parametrize("n, first", [(3, 3), (4, 4), (5, 4), (9, 4)])
@pytest.mark.parametrize("out", ["x.pt", "folder"])
def test_samples_go_on_where_they_ended(small, monkeypatch, out, n, first):
    """With four images there: fewer, as many or more. The file beside them tells how they are
    drawn, and goes with the unfinished tensor."""
    flags = {"steps": 7, "eta": 0.5, "choices": {"clip": False}}
    many(small, monkeypatch, out, 9, has=4, **flags)
    note = Path("x.pt.json" if out == "x.pt" else "folder/samples.json")
    about = {"source": "a source", "seed": 5, "steps": 7, "shape": [3, 8, 8], "eta": 0.5,
             "predict": "eps", "variance": "fixed_small", "clip": False}
    assert json.loads(note.read_text()) == about
    if out == "x.pt":
        with open("x.pt.raw", "ab") as file:
            file.write(bytes(191))  # all but one byte of an image
    asked, = many(small, monkeypatch, out, n, **flags)
    assert asked == (small, first, n, 5, 2, 7, CPU, (0.5,), {"clip": False})
    if out == "x.pt":
        assert torch.load("x.pt")[:, 0, 0, 0].tolist() == list(range(n))
        assert torch.load("x.pt").shape == (n, 3, 8, 8)
        assert not Path("x.pt.raw").exists() and not note.exists()
    else:
        files = sorted(Path("folder").glob("*.png"))
        assert [read_png(file)[1][0] for file in files] == list(range(max(n, 4)))
        assert [file.name for file in files] == [f"{i:06d}.png" for i in range(max(n, 4))]
    many(small, monkeypatch, "other", 1)
    assert json.loads(Path("other/samples.json").read_text())["steps"] == T


def test_pictures_of_which_no_file_tells_are_left_alone(small, monkeypatch):
    many(small, monkeypatch, "folder", 1)
    Path("folder/samples.json").unlink()
    with pytest.raises(ValueError, match="folder"):
        many(small, monkeypatch, "folder", 2)


def test_samples_of_another_kind_are_not_mixed(small, monkeypatch):
    """Of another seed, or of a kind that no file tells: these are refused, or drawn anew."""
    Path("x.pt.raw").write_bytes(bytes(192 * 3))
    assert many(small, monkeypatch, "x.pt", 4, has=2)[0][1] == 0
    for out in ("x.pt", "folder"):
        many(small, monkeypatch, out, 4, has=2)
        with pytest.raises(ValueError, match=f"{out}.*json"):
            many(small, monkeypatch, out, 4, seed=6)
    Path("y.pt.raw").mkdir()
    with pytest.raises(OSError, match="y.pt.raw"):
        many(small, monkeypatch, "y.pt", 1)


# ------------------------------------------------------------------------- figures, pictures, flags

def test_the_images_that_are_mixed(small, monkeypatch):
    """Those of the test split of the data that were named, or else of the run's; at most all."""
    asked, images = [], torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)
    monkeypatch.setattr(data, "load", lambda *x: asked.append(x) or data.Data(images, "test"))

    def mixed(n, stored, dataset=None, data_dir=None):
        args = types.SimpleNamespace(n=n, seed=0, time=1, choices=small.choices, dataset=dataset,
                                     data_dir=data_dir)
        settings = {key: SMALL[key] for key in SMALL.keys() - {"dataset", "data_dir"}}
        return sample.interpolation(small._replace(settings={**settings, **stored}), small.schedule,
                                    lambda x, t: x, args, CPU)
    run = {"dataset": "b", "data_dir": "d"}
    for stored, named, place in ((run, ("a", "c"), ("a", "c")), (run, (), ("b", "d")),
                                 ({}, ("a",), ("a", "data"))):
        assert mixed(2, stored, *named).shape == (3, 2 * SIDE, 11 * SIDE)
        assert asked.pop() == (*place, "test", SIDE)
    with pytest.raises(common.UsageError):
        mixed(2, {})
    with pytest.raises(ValueError):
        mixed(3, run)


def test_figures_of_very_short_chains(small, monkeypatch):
    """With T = 2 Figure 7 shares x_2 twice and then x_1, and Figure 6 has three columns."""
    s, starts, real = sample.ddpm.make_schedule(2), [], sample.ddpm.p_sample_loop
    monkeypatch.setattr(sample.ddpm, "p_sample_loop", lambda *given, **options: starts.append(
        options.get("start")) or real(*given, **options))
    args = types.SimpleNamespace(n=2, seed=0, choices=small.choices)
    model = lambda x, t: x
    assert sample.shared(small, s, model, args, CPU).shape == (3, 4 * 8, 3 * 8)
    assert starts == [None, 2, 2, 1, 1]
    assert sample.progressive(small, s, model, args, CPU).shape == (3, 2 * 8, 3 * 8)


@given(st.integers(1, 12), st.sampled_from([1, 3]), st.integers(1, 4), st.integers(1, 4),
       st.none() | st.integers(1, 13))
def test_every_cell_of_a_grid(n, c, height, width, columns):
    """Image i is in row i // columns and column i % columns; cells beyond the last are black."""
    images = torch.randint(1, 256, (n, c, height, width), dtype=torch.uint8)
    picture = sample.grid(images, columns)
    columns = columns or min(k for k in range(1, 13) if k * k >= n)
    rows = (n + columns - 1) // columns
    assert picture.shape == (c, rows * height, columns * width) and picture.dtype == torch.uint8
    for i in range(rows * columns):
        y, x = i // columns * height, i % columns * width
        cell = picture[:, y:y + height, x:x + width]
        assert torch.equal(cell, images[i]) if i < n else not cell.any()


@pytest.mark.parametrize("width, k", [(1, 480), (7, 69), (320, 2), (321, 1), (961, 1), (3000, 1)])
def test_how_much_a_picture_is_enlarged(width, k):
    """To the width nearest to 480, whatever the height is."""
    picture = torch.randint(256, (3, 2, width), dtype=torch.uint8)
    large = sample.enlarged(picture)
    assert large.shape == (3, 2 * k, k * width)
    assert torch.equal(large[:, ::k, ::k], picture)
    assert (large.view(3, 2, k, width, k) == picture[:, :, None, :, None]).all()


def test_flags_and_their_defaults():
    """64 images, or 8 rows of a figure; a figure is a PNG; η and Algorithm 2 exclude each other."""
    for flags, n, figure in (
            ("", 64, None), ("--n 1", 1, None), ("--eta 0 --steps 3", 64, None),
            ("--progressive", 8, sample.progressive), ("--shared", 8, sample.shared),
            ("--interpolate --time 3 --dataset a", 8, sample.interpolation),
            ("--shared --n 3", 3, sample.shared)):
        args = sample.parse(flags.split())
        assert (args.n, args.figure, args.out) == (n, figure, Path("samples.png"))
        assert (args.seed, args.device, args.precision) == (0, "auto", "auto")
        assert (args.no_ema, args.no_clip) == (False, False)
    for out in ("a.pt", "a", "a.png"):
        assert sample.parse(["--out", out]).out == Path(out)
    for flags in ("--out a.jpg", "--out a.pt --shared", "--out a --shared", "--time 3",
                  "--dataset a", "--shared --time 3", "--progressive --dataset a", "--eta 1.1",
                  "--eta 0 --variance fixed_small", "--eta 0 --shared", "--n 0",
                  "--shared --progressive"):
        with pytest.raises(common.UsageError):
            sample.parse(flags.split())
