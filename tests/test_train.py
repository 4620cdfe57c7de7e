"""The parts of train.py one by one: each number, seed and decision, recomputed by hand."""
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch

import common
import data
import ddpm
import sample
import test_commands
import train
from common import seed_of
from test_commands import assert_equal, draws, trains

in_a_folder_of_its_own = test_commands.in_a_folder_of_its_own  # a fixture, used by every test
PAPER = {  # and what it does not say: how a run is watched
    **test_commands.CIFAR10, "dataset": "cifar10", "data_dir": "data", "image_size": None,
    "seed": 0, "micro_batch": None, "ema_ramp": True, "log_every": 100, "save_every": 5000,
    "sample_every": 25_000, "samples": 64, "sample_steps": None, "keep": None}
HUGE = {**PAPER, **test_commands.LARGE, "samples": 16}
SHAPES = {**PAPER, "steps": 2000, "batch_size": 32, "lr": 1e-3,
          "warmup": 100, "ema": 0.998, "dropout": 0.0, "channels": 64, "multipliers": [1, 2],
          "blocks": 1, "attention": [8], "variance": "fixed_small", "save_every": 500,
          "sample_every": 500, "samples": 36, "sample_steps": 100}


def run_of(dtype=torch.float32, rank=0, world=1, images=None, **changes) -> train.Run:
    """A run with a small network, in the folder of the test."""
    settings = {**SHAPES, "in_channels": 3, "image_size": 8, "channels": 32, "multipliers": [1],
                "timesteps": 20, "batch_size": 2, "warmup": 4, **changes}
    images = data.shapes(4, 8) if images is None else images
    machine = common.Machine(torch.device("cpu"), dtype, rank, world)
    return train.Run(settings, images, Path(), machine)


def log() -> list[dict]:
    return [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------- the settings

@pytest.mark.parametrize("name, side, table", [
    ("cifar10", None, PAPER), ("x.pt", 255, PAPER), ("shapes", 16, SHAPES), ("shapes", 256, HUGE),
    ("mnist", 32, {**PAPER, "flip": False}), ("fashion_mnist", None, {**PAPER, "flip": False}),
    (".", None, HUGE), (".", 64, PAPER)])
def test_recipes(name, side, table):
    """All default settings of each data set; a folder has pictures of 256×256 unless told so."""
    assert train.recipe(name, side) == table


@pytest.mark.parametrize("flags, table", [("--dataset shapes", SHAPES), ("--image-size 256", HUGE)])
def test_help_shows_every_setting_with_its_value(flags, table, capsys, monkeypatch):
    """--help has the defaults of the data set that is named, and the words that can be chosen."""
    monkeypatch.setenv("COLUMNS", "500")                           # so that no word is broken
    assert train.main([*flags.split(), "--help"]) == 0
    entries = capsys.readouterr().out.split("\noptions:")[1].split("\n  --")
    shown = {entry.split()[0].rstrip(","): " ".join(entry.split()) for entry in entries}
    for name, value in table.items():
        entry, (_, meaning) = shown[name.replace("_", "-")], train.SETTINGS[name]
        value = " ".join(map(str, value)) if isinstance(value, list) else value
        assert meaning + (f" (default: {value})" if value is not None else "") in entry
        assert (value is None) == (f"{meaning} (default: " not in entry)
    assert "{linear,quadratic,constant}" in shown["schedule"] and "{" not in shown["lr"]


def test_a_flag_that_is_not_given_has_no_entry():
    others = {"out": None, "init": None, "compile": None, "deterministic": False, "device": "auto",
              "precision": "auto"}
    assert train.parse([]) == others
    assert train.parse("--no-flip --attention 8 4 --lr 1".split()) == {
        **others, "flip": False, "attention": [8, 4], "lr": 1.0}


LEARNED = {"variance": "learned", "objective": "vlb"}


def settled(given=(), stored=(), init=(), shape=(1, 3, 16, 16)) -> dict:
    return train.settle({"dataset": "shapes", **dict(given)}, torch.zeros(shape, dtype=torch.uint8),
                        dict(stored), dict(init))


def test_flags_go_before_the_checkpoint_the_checkpoint_before_init_and_init_before_the_recipe():
    images = {"in_channels": 3, "image_size": 16}
    assert settled({"out": "x"}) == {**SHAPES, "dataset": "shapes", **images}
    assert settled(shape=(1, 1, 8, 8))["in_channels"] == 1
    assert settled(init={"channels": 96})["channels"] == 96
    assert settled({"steps": 7}, {"steps": 5, "keep": 3})["steps"] == 7
    assert settled(stored={"steps": 5, "lr": 0.5})["lr"] == 0.5


def test_what_may_change_when_a_run_is_resumed():
    """How long it trains, how it is watched, and where the data lie; each other setting is named in
    the refusal, with both values."""
    free = {"data_dir", "steps", "log_every", "save_every", "sample_every", "samples",
            "sample_steps", "keep"}
    fixed = {"flip": False, "batch_size": 6, "micro_batch": 3, "lr": 0.5, "warmup": 9, "clip": 3.0,
             "ema": 0.5, "ema_ramp": False, "dropout": 0.25, "channels": 96, "multipliers": [2],
             "blocks": 7, "attention": [16], "timesteps": 300, "schedule": "quadratic",
             "beta_start": 0.01, "beta_end": 0.5, "predict": "x0", "variance": "fixed_large",
             "objective": "vlb", "seed": 8}
    assert {*free, *fixed} == set(SHAPES) - {"dataset", "image_size"}
    stored = settled()
    for name, value in fixed.items():
        with pytest.raises(common.UsageError) as refusal:
            settled({name: value}, stored)
        for part in ("--" + name.replace("_", "-"), str(stored[name]), str(value)):
            assert part in str(refusal.value)
        assert settled({name: stored[name]}, stored) == stored
    changed = {"data_dir": "x", **dict.fromkeys(free - {"data_dir"}, 30)}
    assert settled(changed, stored) == {**stored, **changed}


@pytest.mark.parametrize("given, init, shape, parts", [
    ({"attention": [16, 4]}, {}, 16, ["attention", "4"]), ({"attention": [2, 4, 8]}, {}, 8, ["2"]),
    ({"channels": 32}, {"channels": 96}, 16, ["channels", "96", "32"]),
    ({"variance": "learned"}, {}, 16, ["learned"]), ({"sample_steps": 1001}, {}, 16, ["1001"]),
    ({**LEARNED, "predict": "x0"}, {}, 16, ["--predict"]), ({"lr": "x"}, {}, 16, ["lr", "x"]),
    ({**LEARNED, "sample_steps": 999}, {}, 16, ["--sample-steps"]),
    ({"multipliers": [1, 1, 1]}, {}, 10, ["10×10", "4"]),
    ({"multipliers": [1, 1]}, {}, 9, ["9×9", "2"]), ({}, {}, (16, 8), ["16×8"])])
def test_settings_that_contradict_each_other_are_refused(given, init, shape, parts):
    """The refusal has the numbers that do not fit."""
    sides = shape if isinstance(shape, tuple) else (shape, shape)
    with pytest.raises(ValueError) as refusal:
        settled(given, init=init, shape=(1, 3, *sides))
    assert all(part in str(refusal.value) for part in parts)


@pytest.mark.parametrize("given, side", [
    ({"multipliers": [1, 1, 1], "attention": [12, 6, 3]}, 12), ({"multipliers": [1]}, 9),
    ({"objective": "vlb", "predict": "x0"}, 16), ({"sample_steps": 1000}, 16),
    ({**LEARNED, "sample_steps": 1000}, 16), ({**LEARNED, "predict": "mean"}, 16)])
def test_settings_that_fit_are_taken(given, side):
    settings = settled(given, shape=(1, 3, side, side))
    assert {name: settings[name] for name in given} == given


def test_a_recipes_sample_steps_give_way():
    """The 100 calls of a grid of shapes stay where they fit, and give way where they do not."""
    for given, steps in (({}, 100), ({"timesteps": 100}, 100), ({"timesteps": 99}, None),
                         (LEARNED, None), ({"dataset": "cifar10"}, None)):
        assert settled(given)["sample_steps"] == steps
    assert settled({"sample_steps": 30})["sample_steps"] == 30


# -------------------------------------------------------------------------------------- Algorithm 1

@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned"])
@pytest.mark.parametrize("predict", ["eps", "x0", "mean"])
def test_eq05_and_eq14_for_every_choice(predict, variance):
    """L_simple is the mean square error of what is predicted; a term of L is the Gaussian KL in
    bits/dim, of means by Eq. 7 and the variance that was chosen. In double precision, t > 1."""
    s, g, t = ddpm.make_schedule(30), torch.Generator().manual_seed(0), torch.tensor([2, 9, 30])
    x0, eps, *out = torch.randn(4, 3, 2, 4, 4, generator=g, dtype=torch.float64)
    net = torch.cat(out, 1) if variance == "learned" else out[0]
    column = lambda c: c[:, None, None, None]
    bar, before = column(s.alpha_bars[t]), column(s.alpha_bars[t - 1])
    x_t, alpha = bar.sqrt() * x0 + (1 - bar).sqrt() * eps, bar / before

    def mean(x):  # Eq. 7
        return (before.sqrt() * (1 - alpha) * x + alpha.sqrt() * (1 - before) * x_t) / (1 - bar)
    settings = {"objective": "simple", "predict": predict, "variance": variance}
    if variance != "learned":
        target = {"eps": eps, "x0": x0, "mean": mean(x0)}[predict]
        torch.testing.assert_close(train.loss_of(settings, s, lambda *_: net, x0, t, eps),
                                   (target - net).square().mean((1, 2, 3)))
    small = (1 - alpha) * (1 - before) / (1 - bar)
    v = {"fixed_large": 1 - alpha, "fixed_small": small, "learned": out[1].exp()}[variance]
    x0_hat = (x_t - (1 - bar).sqrt() * out[0]) / bar.sqrt() if predict == "eps" else out[0]
    off = mean(x0) - (out[0] if predict == "mean" else mean(x0_hat))
    kl = ((v / small).log() + (small + off ** 2) / v - 1) / 2
    settings["objective"] = "vlb"
    torch.testing.assert_close(train.loss_of(settings, s, lambda *_: net, x0, t, eps),
                               kl.mean((1, 2, 3)) / math.log(2))


def test_learning_rates_and_decays():
    """lr · min(k/warmup, 1) and min(ema, (1 + k)/(10 + k)); each constant without its ramp."""
    settings = {"lr": 0.5, "warmup": 4, "ema": 0.25, "ema_ramp": True}
    rates = [train.learning_rate(settings, k) for k in (0, 1, 2, 4, 5, 9)]
    assert rates == [0, .125, .25, .5, .5, .5]
    assert [train.ema_decay(settings, k) for k in range(4)] == [1 / 10, 2 / 11, 3 / 12, 0.25]
    constant = {**settings, "warmup": 0, "ema_ramp": False}
    assert train.learning_rate(constant, 0) == 0.5 and train.ema_decay(constant, 0) == 0.25


def test_alg1_draws_by_hand(monkeypatch):
    """The images of step 3 are the last three of the third order of five, and the first of the
    fourth; flips, t and ε come in this order from the generator of (seed, "step", 3)."""
    images = torch.arange(5 * 12, dtype=torch.uint8).view(5, 1, 3, 4)
    order = [torch.randperm(5, generator=torch.Generator().manual_seed(seed_of(7, "epoch", e)))
             for e in range(4)]
    rows = images[torch.cat(order)[12:16]].float() / 127.5 - 1
    g = torch.Generator().manual_seed(seed_of(7, "step", 3))
    flip = torch.rand(4, generator=g) < 0.5
    t, eps = torch.randint(1, 6, (4,), generator=g), torch.randn(4, 1, 3, 4, generator=g)
    x0 = torch.stack([row[:, :, [3, 2, 1, 0]] if f else row for row, f in zip(rows, flip)])
    assert flip.any() and not flip.all()
    for flips, x in ((True, x0), (False, rows)):
        got = draws(monkeypatch, 3, images=images, seed=7, batch_size=4, flip=flips)
        assert_equal(list(got), [x, t, eps])


@pytest.mark.parametrize("micro, scale", [
    (None, None), (1, None), (3, None), (8, 2.0 ** 10), (5, 4.0)])
def test_alg1_a_step_by_hand(monkeypatch, micro, scale):
    """With plain gradient descent for Adam: the gradient is the mean over the batch in whatever
    parts and at whatever scale, its norm is the one before clipping, and the average follows."""
    w, average, parts = torch.tensor([2.0], requires_grad=True), [torch.tensor([7.0])], []

    def loss_of(settings, s, model, x0, t, eps):
        parts.append(len(t))
        return w * x0[:, 0, 0, 0]
    monkeypatch.setattr(train, "loss_of", loss_of)
    images = torch.arange(80, 88, dtype=torch.uint8).view(8, 1, 1, 1)
    settings = {"seed": 0, "batch_size": 8, "flip": True, "clip": 0.25, "lr": 0.5, "warmup": 4,
                "ema": 0.75, "ema_ramp": False, "micro_batch": micro}
    sgd = torch.optim.SGD([w], lr=9.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    losses, t, norm = train.training_step(settings, ddpm.make_schedule(5), images, 2, slice(None),
                                          None, [w], average, sgd, scaler)
    mean = 83.5 / 127.5 - 1                                        # each image is there once
    assert parts == {None: [8], 1: [1] * 8, 3: [3, 3, 2], 8: [8], 5: [5, 3]}[micro]
    assert not losses.requires_grad and losses.mean().item() == pytest.approx(2 * mean)
    assert norm.item() == pytest.approx(-mean) and len(t) == len(losses) == 8
    assert w.item() == pytest.approx(2 + 0.25 * 0.25, abs=1e-5)  # lr · 2/4 times the clipped −0.25
    assert average[0].item() == pytest.approx(0.75 * 7 + 0.25 * w.item())


# -------------------------------------------------------------------------------- a run, its counts

def test_a_run_begins_with_the_weights_of_its_seed():
    """Network and average are the initialisation from (seed, "init"); only the network learns. The
    memory has the channels last, and Adam's step is fused, both of which only make it faster."""
    run = run_of(seed=3, lr=0.25)
    torch.manual_seed(seed_of(3, "init"))
    want = common.build_network(run.settings).state_dict()
    assert_equal(dict(run.model.state_dict()), dict(want))
    assert_equal(dict(run.ema.state_dict()), dict(want))
    assert {p.requires_grad for p in run.averages} == {False}
    assert {p.requires_grad for p in run.params} == {True}
    assert not {p.data_ptr() for p in run.averages} & {p.data_ptr() for p in run.params}
    assert run.model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert run.adam.defaults["fused"] and run.adam.defaults["lr"] == 0.25
    assert run.step == 0 and run.saved < 0 and run.seconds == run.seconds_logged == 0


def test_the_fingerprint_of_older_checkpoints_is_of_64_images():
    """Evenly spaced from the first to the last: here every second one. L_T is taken of them."""
    images, shape = data.shapes(127, 8), (127, 3, 8, 8)
    run = run_of(images=images, timesteps=60)
    assert run.fingerprints == [data.fingerprint(x, shape) for x in (images, images[::2])]
    L_T = ddpm.prior_kl(run.schedule, data.to_model(images[::2])).mean() / (192 * math.log(2))
    assert run.L_T == pytest.approx(L_T.item())


def test_counts_by_hand():
    """The thirds of 1 … 20 are 1 … 7, 8 … 14 and 15 … 20. A step whose loss or gradient is not
    finite counts nothing, and the first one ends the run."""
    run, inf = run_of(), math.inf
    for run.step, losses, ts, norm in ((1, [1.0, 2.0, 4.0], [1, 7, 8], 3.0),
                                       (2, [8.0, 16.0, 1.0], [14, 15, 20], 2.0)):
        run.count(torch.tensor(losses), torch.tensor(ts), torch.tensor(norm))
        run.check()
    want = [2, (7 + 25) / 3, 5, 3, 12, 17, 2, 2, 2]
    assert run.sums.tolist() == pytest.approx(want) and run.largest == 3
    for run.step, loss, norm in ((3, inf, 9.0), (4, 1.0, inf), (5, 1.0, 1.0)):
        run.count(torch.tensor([loss]), torch.tensor([1]), torch.tensor(norm))
        assert run.bad == 3
        if run.step < 5:
            assert run.sums.tolist() == pytest.approx(want) and run.largest == 3
    for run.saved, write in ((2, run.log), (0, run.save), (-1, run.save)):
        with pytest.raises(ValueError) as refusal:
            write()
        numbers = ["3"] if run.saved < 0 else ["3", str(run.saved)]  # -1: there is no checkpoint
        assert re.findall(r"\d+", str(refusal.value)) == numbers
    assert not os.path.exists("log.jsonl") and not os.path.exists("checkpoint.pt")


def test_fp16_fails_at_the_31st_bad_step_in_a_row():
    run = run_of(torch.float16)
    for run.step in range(1, 72):
        finite = run.step in (1, 31)  # one in between, and the row begins anew
        run.count(torch.tensor([1.0 if finite else math.nan]), torch.tensor([5]), torch.ones(()))
        assert run.bad == (62 if run.step >= 62 else -1)
    assert run.sums[:3].tolist() == [2, 2, 2]


def test_a_line_of_the_log_by_hand():
    """Means over its steps; None for a third without a time; the sums begin anew after it."""
    run = run_of(objective="vlb")
    run.step, run.seconds, run.seconds_logged = 3, 0.75, 0.5
    run.sums.copy_(torch.tensor([3.0, 6, 12, 4, 0, 9, 2, 0, 6]))
    run.largest.fill_(8)
    run.log()
    run.step, run.seconds = 4, 1.5
    run.log(True)
    first = {"step": 3, "loss": 2, "loss_thirds": [2, None, 1.5], "lr": 1e-3 * 2 / 4,
             "grad_norm": 4, "grad_norm_max": 8, "images_per_s": 24, "bound": 20 * 2 + run.L_T}
    assert log() == [first, {**first, "step": 4, "loss": 0, "loss_thirds": [None] * 3,
                             "lr": 1e-3 * 3 / 4, "grad_norm": 0, "grad_norm_max": 0,
                             "images_per_s": 2.667, "bound": run.L_T, "last": True}]


# ----------------------------------------------------------------------------------------- the loop

def stub(monkeypatch, seconds: float = 0.0) -> list:
    """Steps that only take `seconds` of a clock of their own; what each is given."""
    calls, now = [], [0.0]

    def step(settings, s, images, k, rows, *rest):
        calls.append((k, rows, torch.initial_seed(), common.signals.deferred))
        now[0] += seconds
        return torch.ones(2), torch.tensor([1, 20]), torch.tensor(3.0)
    monkeypatch.setattr(train, "training_step", step)
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    return calls


@pytest.mark.parametrize("first, steps, want", [
    (0, 13, {"log": [5, 10, (13, True)], "save": [4, 8, 12, 13], "keep": [3, 6, 9, 12],
             "grid": [6, 12]}),
    (7, 12, {"log": [10, (12, True)], "save": [8, 12], "keep": [9, 12], "grid": []}),
    (0, 5, {"log": [5], "save": [4, 5], "keep": [3], "grid": []}), (5, 5, {})])
def test_which_steps_log_save_keep_and_draw(monkeypatch, first, steps, want):
    """Every N-th one, counted from the first of the run; the last one saves and logs, and its grid
    is not drawn in the loop. A grid may be interrupted, and a step may not."""
    calls, seen = stub(monkeypatch), {name: [] for name in want}
    run = run_of(steps=steps, log_every=5, save_every=4, keep=3, sample_every=6)
    run.step = first
    for name in ("log", "save", "keep", "grid"):
        def record(*last, name=name):
            assert common.signals.deferred is (name != "grid")
            seen[name].append((run.step, *last) if last else run.step)
        monkeypatch.setattr(run, name, record)
    run.train(run.model)
    assert seen == want and not common.signals.deferred
    assert calls == [(k, slice(0, 2), seed_of(0, "dropout", k, 0), True)
                     for k in range(first, steps)]


@pytest.mark.parametrize("due, updates", [(True, [2, 3, 4]), (False, [4])])
def test_the_progress_tells_of_the_steps_of_this_command(monkeypatch, due, updates):
    """It counts from the step that was resumed, and the last step is always shown."""
    shown = []
    monkeypatch.setattr(common.Progress, "due", lambda self: due)
    monkeypatch.setattr(common.Progress, "update", lambda self, done, *_, **__: shown.append(
        (done, self.first, self.total, self.quiet)))
    stub(monkeypatch)
    run = run_of(steps=4)
    run.step = 1
    run.train(run.model)
    assert shown == [(done, 1, 4, False) for done in updates]


def test_the_speed_is_that_of_the_steps_since_the_last_line(monkeypatch):
    """Three steps of 7/64 s with 2 images each are 6/(21/64) = 18.286 images/s, in every line."""
    stub(monkeypatch, 7 / 64)
    run_of(steps=8, log_every=3).train(run_of().model)
    assert [entry["images_per_s"] for entry in log()] == [18.286] * 3


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_by_hand(monkeypatch, rank):
    """Each takes its half of the batch and its own dropout; the log has the means over both and the
    images of both; the chief alone writes; a signal to either stops both, and the slower of them
    decides on the calls of a grid."""
    asked, calls_of_a_grid, op = set(), [], train.dist.ReduceOp

    def all_reduce(x, kind=op.SUM, group=None):
        asked.add((kind, group))
        x.mul_(2) if kind == op.SUM else x.fill_(12 if kind == op.MIN else calls[-1][0] == 3)
    monkeypatch.setattr(train.dist, "new_group", lambda backend: backend)
    monkeypatch.setattr(train.dist, "all_reduce", all_reduce)
    calls = stub(monkeypatch, 0.5)
    run = run_of(rank=rank, world=2, batch_size=4, log_every=2, save_every=2, keep=2, timesteps=100,
                 sample_steps=None, samples=1)
    with pytest.raises(KeyboardInterrupt):
        run.train(run.model)
    assert calls == [(k, slice(2 * rank, 2 * rank + 2), seed_of(0, "dropout", k, rank), True)
                     for k in range(4)]
    assert run.step == run.saved == 4
    run.count(torch.ones(2), torch.tensor([1, 20]), torch.tensor(3.0))
    run.step = 5
    run.save()
    monkeypatch.setattr(sample, "seconds_of_a_call", lambda *_: 1e-9)
    monkeypatch.setattr(sample, "draw_samples", lambda *given: (
        calls_of_a_grid.append((given[4], given[6].quiet))
        or torch.zeros(1, 3, 8, 8, dtype=torch.uint8)))
    run.grid()
    assert calls_of_a_grid == [(12, rank == 1)]
    assert asked - {(op.SUM, None)} == {(op.MAX, "gloo"), (op.MIN, "gloo")}
    if rank:
        assert {path.name for path in Path().iterdir()} == {"images.pt"}
    else:
        assert [(e["loss"], e["grad_norm"], e["images_per_s"]) for e in log()] == [(1, 3, 8)] * 2
        sums = common.load_checkpoint(Path("checkpoint.pt"))["sums"]
        assert sums.tolist() == [1, 1, 3, 2, 0, 0, 2, 0, 0]
        assert Path("ema-0000004.safetensors").exists() and Path("samples-0000005.png").exists()


# ------------------------------------------------------------------------------ around the training

def test_a_checkpoint_of_an_older_version_goes_on(capsys):
    """It knows the sum of the losses alone, not its precision, and its images by 64 of them."""
    old, new = run_of(), run_of(seed=1, images=data.shapes(127, 8))
    old.step = 3
    old.save()
    state = common.load_checkpoint(Path("checkpoint.pt"))
    for name in ("sums", "largest", "dtype", "scaler"):
        del state[name]
    new.restore({**state, "summed": 2, "loss_sum": 6.0, "data": new.fingerprints[1]})
    assert_equal(dict(new.model.state_dict()), dict(old.model.state_dict()))
    assert new.step == new.saved == 3
    new.log()
    assert log()[0]["loss"] == 3 and log()[0]["grad_norm"] is None
    assert capsys.readouterr().err == ""


def test_the_scale_of_fp16_goes_on(capsys):
    """It is in the checkpoint, and begins anew for a run that was in another precision."""
    half, full = run_of(torch.float16), run_of()
    half.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for run, scale in ((half, 8.0), (full, 2.0 ** 16)):
        run.step += 1
        run.save()
        again = run_of(torch.float16)
        again.restore(common.load_checkpoint(Path("checkpoint.pt")))
        assert again.scaler.get_scale() == scale
        assert ("float32" in capsys.readouterr().err) == (run is full)
    with pytest.raises(ValueError):
        full.restore({"data": full.fingerprints[0]})


def test_a_log_of_more_than_a_gibibyte_is_refused(monkeypatch):
    path = Path("log.jsonl")
    for size in (2 ** 30, 2 ** 30 + 1):
        monkeypatch.setattr(data, "size_of", lambda path: size)
        if size == 2 ** 30:
            train.cut_log(path, 0, True)
    with pytest.raises(ValueError, match=str(2 ** 30 + 1)):
        train.cut_log(path, 0, True)


@pytest.mark.parametrize("changes, threads, load, words", [
    ({"steps": 4}, 1, 99, []), ({"steps": 3}, 2, 4, ["--warmup"]), ({"steps": 4}, 2, 4.5, ["OMP"]),
    ({"steps": 0}, 3, 4.5, ["--steps", "OMP"])])
def test_what_a_run_warns_of_at_its_start(monkeypatch, capsys, changes, threads, load, words):
    """A warm-up that is longer than the run, a run that is done, and threads on a busy machine."""
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 99 if load == 4 else 0, 0), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    run = run_of(**changes)
    train.begin(run)
    err = capsys.readouterr().err
    assert [word for word in ("--warmup", "--steps", "OMP") if word in err] == words
    assert Path("settings.json").read_text() == json.dumps(run.settings, indent=2) + "\n"


def test_compile_is_tried_on_one_batch(monkeypatch):
    """Of the shape and type of the training's, with a backward pass of which nothing is left.

    The shapes are fixed, which the compiler is told: else dropout's differ from layer to layer."""
    seen, run = [], run_of()

    def fast(x, t):
        seen.append((*x.shape, *t.tolist(), t.dtype))
        return run.model(x, t)
    monkeypatch.setattr(torch, "compile", lambda net, dynamic: (
        fast if net is run.model and dynamic is False else None))
    assert train.compiled(run.model, run.machine, (2, 3, 8, 8)) is fast
    assert seen == [(2, 3, 8, 8, 1, 1, torch.int64)]
    assert all(p.grad is None for p in run.params)


def test_init_starts_from_the_averages_of_another_run():
    """Network and average are those averages, also after step 0, whose learning rate is 0."""
    other = run_of(multipliers=[1, 2], attention=[4])
    for average in other.averages:
        average += 0.5
    other.save()
    trains("--steps", 1, "--init", "checkpoint.pt", "--out", "new")
    state = test_commands.checkpoint("new")
    assert_equal(dict(state["model"]), dict(other.ema.state_dict()))
    assert_equal(dict(state["ema"]), dict(other.ema.state_dict()))
    assert state["settings"]["variance"] == "fixed_small"
