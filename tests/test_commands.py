"""train.py, sample.py and evaluate.py as people call them, on a network of a few thousand
weights."""
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bench
import common
import ddpm
import evaluate
import sample
import train

HERE = Path(__file__).resolve().parents[1]
TINY = ("--dataset images.pt --channels 32 --multipliers 1 2 --blocks 1 --attention 4 "
        "--timesteps 20 --batch-size 4 --lr 1e-3 --warmup 3 --log-every 2 --save-every 100 "
        "--sample-every 100 --samples 0 --device cpu --precision fp32").split()


SETTINGS = {**train.recipe("shapes", 16), "image_size": 16, "in_channels": 3}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(train.data.shapes(64, 8), "images.pt")


def trains(*flags, expect: int = 0) -> int:
    status = train.main([*TINY, *map(str, flags)])
    assert status == expect
    return status


def checkpoint(folder="runs/images") -> dict:
    return common.load_checkpoint(Path(folder))


def losses(folder="runs/images") -> list[dict]:
    """The lines of the log, without the speed, which is another one every time."""
    lines = Path(folder, "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in lines]


def assert_equal(a, b) -> None:
    """Nested dictionaries and lists of tensors, to the bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def said(capsys) -> str:
    """The last line on stderr; there is no traceback."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


# ---------------------------------------------------------------------------------- the settings

CIFAR10 = {  # §4 and Appendix B; of the released code alone: flips as a choice, warm-up, clipping
    "flip": True, "steps": 800_000, "batch_size": 128, "lr": 2e-4, "warmup": 5000, "clip": 1.0,
    "ema": 0.9999, "dropout": 0.1, "channels": 128, "multipliers": [1, 2, 2, 2], "blocks": 2,
    "attention": [16], "timesteps": 1000, "schedule": "linear", "beta_start": 1e-4,
    "beta_end": 0.02, "predict": "eps", "variance": "fixed_large", "objective": "simple"}
LARGE = {**CIFAR10, "steps": 500_000, "batch_size": 64, "lr": 2e-5, "dropout": 0.0,
         "multipliers": [1, 1, 2, 2, 4, 4], "variance": "fixed_small"}


@pytest.mark.parametrize("flags, side, table", [
    ([], 32, CIFAR10), (["--dataset", "cifar10"], 32, CIFAR10), (["--dataset", "x.pt"], 64, CIFAR10),
    (["--dataset", "mnist"], 32, {**CIFAR10, "flip": False}),
    (["--dataset", "x.pt"], 256, LARGE), (["--dataset", "x.pt", "--lr", "1"], 256, {**LARGE, "lr": 1.0})])
def test_appendix_b_the_papers_settings(flags, side, table):
    """What a run without further flags does is the paper's Appendix B, at 32×32 and at 256×256;
    the optimiser is Adam with its usual β and ε, and its learning rate is the one of the table."""
    images = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    settings = train.settle(train.parse(flags), images, {}, {})
    assert {name: settings[name] for name in table} == table
    assert settings["image_size"] == side and settings["micro_batch"] is None
    assert train.learning_rate(settings, 10 ** 6) == table["lr"]
    assert train.ema_decay(settings, 10 ** 6) == table["ema"]


def test_adam_is_the_papers():
    """β₁ = 0.9, β₂ = 0.999, no weight decay, no AMSGrad; all parameters, and no others."""
    run = train.Run({**SETTINGS, "channels": 32}, train.data.shapes(4), Path("x"),
                    common.find_machine("cpu", "fp32"))
    group, = run.adam.param_groups
    assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
    assert group["weight_decay"] == 0 and not group["amsgrad"] and not group["maximize"]
    assert {id(p) for p in group["params"]} == {id(p) for p in run.model.parameters()}


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
    assert losses("a") == losses("b") and [e["step"] for e in losses("a")] == [2, 4, 6, 7]
    assert read_png("b/samples-0000007.png")[0] == (480, 480)

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
    assert read_png("samples.png")[0] == (24 * 20, 16 * 20)


def test_resume_at_any_step_is_exact():
    """N steps, a stop, N more = 2N steps at once: weights, EMA, optimiser, log; dropout on.

    Kills: a resume that loses the optimiser, the EMA, the data order or a part of the mean loss."""
    flags = ("--dropout", 0.3, "--save-every", 1)
    trains("--steps", 6, "--out", "whole", *flags)
    whole = checkpoint("whole")
    for stop in range(1, 6):
        trains("--steps", stop, "--out", f"at{stop}", *flags)
        trains("--steps", 6, "--out", f"at{stop}", *flags)
        assert_equal(checkpoint(f"at{stop}"), whole)
        assert losses(f"at{stop}") == losses("whole")


def test_log_is_cut_back_to_the_checkpoint(capsys):
    """Lines after the checkpoint, and half a line, are gone when the run goes on."""
    trains("--steps", 4)
    before = losses()
    with open("runs/images/log.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 9}\n{"step": 8, "lo')
    trains("--steps", 8)
    assert losses()[:2] == before and [e["step"] for e in losses()] == [2, 4, 6, 8]
    assert losses()[2]["loss"] != 9
    trains("--steps", 8)
    assert "a larger --steps to continue" in said(capsys)


def test_settings_that_would_change_the_run_are_refused(capsys):
    """A flag that contradicts the checkpoint is named; what was not said stays; steps may
    change."""
    trains("--steps", 2)
    for flags, name in ((("--seed", 1), "--seed 0, not 1"), (("--lr", 0.1), "--lr 0.001, not 0.1"),
                        (("--channels", 64), "--channels 32, not 64"),
                        (("--batch-size", 8), "--batch-size 4, not 8")):
        trains("--steps", 4, *flags, expect=2)
        assert name in said(capsys)
    assert train.main("--dataset shapes --out runs/images".split()) == 2
    assert "--dataset images.pt, not shapes" in said(capsys)
    assert train.main("--dataset images.pt --steps 3 --precision fp32".split()) == 0
    assert checkpoint()["settings"]["lr"] == 1e-3 and checkpoint()["step"] == 3
    payload = checkpoint()
    common.save_checkpoint(Path("runs/images/checkpoint.pt"), {**payload, "data": "other"})
    trains("--steps", 4, expect=1)
    assert "are not those with which the run" in said(capsys)


def draws(monkeypatch, step: int = 0, rows: slice = slice(None), images=None, **settings) -> tuple:
    """x_0, t and ε as `training_step` passes them to the loss, T = 5."""
    if images is None:
        images = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)  # not its own mirror image
    settings = {"seed": 0, "batch_size": 4096, "flip": True, "clip": 1.0, "lr": 1e-3, "warmup": 0,
                "ema": 0.9, "ema_ramp": False, "micro_batch": None, **settings}
    seen, weight = [], torch.ones(1, requires_grad=True)
    with monkeypatch.context() as patch:
        patch.setattr(train, "loss_of", lambda settings, s, model, *drawn: seen.extend(drawn)
                      or (weight ** 2).expand(len(drawn[0])))
        train.training_step(settings, ddpm.make_schedule(5), images, step, rows, None, [weight],
                            [torch.ones(1)], torch.optim.Adam([weight]),
                            torch.amp.GradScaler("cpu", enabled=False))
    return tuple(seen)


def test_alg1_draws(monkeypatch):
    """t is uniform on 1 … T, both ends drawn; ε standard; half of the images are mirrored.

    Kills: the top t never drawn, t = 0 drawn, noise of another scale."""
    x0, t, eps = draws(monkeypatch)
    counts = torch.bincount(t, minlength=6)
    assert counts[0] == 0 and len(counts) == 6
    assert ((counts[1:] - 819.2).abs() < 5 * 26).all()
    assert abs((x0[:, 0, 0, 0] == 1).double().mean() - 0.5) < 5 * 0.5 / 64
    assert set(map(tuple, x0.flatten(1).tolist())) == {(-1.0, 1.0), (1.0, -1.0)}
    assert abs(eps.mean()) < 5 / 8192 ** 0.5 and abs(eps.std() - 1) < 0.04


def test_alg1_draws_are_a_function_of_seed_and_step(monkeypatch):
    """The same (seed, step) draws the same; another seed or step draws something else.

    Kills: the same draws in every step, seed + step, draws that depend on the part of the batch."""
    first = draws(monkeypatch, 0, batch_size=8)
    for a, b in zip(first, draws(monkeypatch, 0, batch_size=8)):
        assert torch.equal(a, b)
    for a, b in zip(first, draws(monkeypatch, 0, slice(2, 5), batch_size=8)):
        assert torch.equal(a[2:5], b)
    others = [draws(monkeypatch, step, seed=seed, batch_size=8)[2][0, 0, 0, 0].item()
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


def test_ema_follows_the_weights_after_each_step():
    """average_k = d · average_{k−1} + (1 − d) · θ_k; d = 0.9999, or (1 + k)/(10 + k) if smaller.

    Kills: EMA before the optimiser's step, an average that still holds the initial noise."""
    ramp, constant = {"ema": 0.9999, "ema_ramp": True}, {"ema": 0.9999, "ema_ramp": False}
    assert train.ema_decay(ramp, 0) == 0.1 and train.ema_decay(ramp, 10 ** 6) == 0.9999
    assert train.ema_decay(constant, 0) == 0.9999
    want = None
    for step in range(1, 5):
        trains("--steps", step)
        state = checkpoint()
        d = train.ema_decay(ramp, step - 1)
        old = want if want else None
        want = {k: v.clone() for k, v in state["model"].items()} if old is None else {
            k: d * old[k] + (1 - d) * v for k, v in state["model"].items()}
        if step == 1:  # lr is 0 at step 0: the weights are the initial ones, and so is their mean
            want = {k: v.clone() for k, v in state["ema"].items()}
        for key, value in state["ema"].items():
            torch.testing.assert_close(value, want[key], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(state["ema"][k], state["model"][k]) for k in want)


def test_warmup_is_linear_from_zero(monkeypatch):
    """lr · min(k / warmup, 1) at step k = 0, 1, …, as in the authors' code."""
    rates = []
    real = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step",
                        lambda self, *a: rates.append(self.param_groups[0]["lr"]) or real(self, *a))
    trains("--steps", 5)
    assert rates == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])


def test_flips_and_clipping_happen(monkeypatch):
    """The images that the loss sees are those of the step, some of them mirrored; the norm is
    clipped.

    Kills: flips drawn and not applied, or upside down; a gradient that is measured and not
    clipped."""
    images = torch.load("images.pt")
    images[:, :, :, 0] = 255                                   # now no image is its mirror image
    torch.save(images, "images.pt")
    seen, norms, real, step = [], [], train.loss_of, torch.optim.Adam.step
    monkeypatch.setattr(train, "loss_of", lambda *a: seen.append(a[3]) or real(*a))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a: norms.append(
        sum(p.grad.square().sum() for p in self.param_groups[0]["params"]).sqrt().item()) or step(self, *a))
    trains("--steps", 4, "--clip", 0.01)
    flipped = 0
    for k, x0 in enumerate(seen):
        rows = train.data.to_model(images[train.batch_indices(0, 64, k, 4)])
        for image, source in zip(x0, rows):
            flip = not torch.equal(image, source)
            assert not flip or torch.equal(image, source[:, :, range(7, -1, -1)])
            flipped += flip
    assert 0 < flipped < 16 and norms == pytest.approx([0.01] * 4, rel=1e-3)


def test_training_learns():
    """The loss falls from 1, what predicting 0 costs, to half of it within sixty steps."""
    trains("--steps", 60, "--log-every", 5, "--batch-size", 16, "--lr", 3e-3)
    assert losses()[0]["loss"] > 0.9 and losses()[-1]["loss"] < 0.5


def test_objective_vlb_logs_the_bound(capsys):
    """--objective vlb: the log shows T × mean + L_T; learned variance trains and samples."""
    trains("--steps", 2, "--objective", "vlb", "--variance", "learned")
    entry, bar = losses()[0], 5.8674e-11   # ᾱ_20 of β from 0.005 to 0.999 in equal steps
    x0 = torch.load("images.pt").double() / 127.5 - 1
    L_T = (bar * x0 ** 2 - bar - math.log(1 - bar)).mean() / 2 / math.log(2)
    assert entry["bound"] == pytest.approx(20 * entry["loss"] + L_T.item(), rel=1e-9)
    assert checkpoint()["model"]["conv_out.weight"].shape[0] == 6
    assert sample.main(["--n", "1"]) == 0 and evaluate.main(["--n", "2"]) == 0
    capsys.readouterr()
    assert sample.main(["--n", "1", "--steps", "5"]) == 2 and "learned" in said(capsys)
    assert sample.main(["--n", "1", "--variance", "fixed_small"]) == 2


def test_the_logged_bound_has_its_L_T():
    """`bound` is T times the mean term and L_T, which is no small number where ᾱ_T is not.

    Kills: L_T left out, or taken of other images than the training's."""
    trains("--steps", 2, "--objective", "vlb", "--timesteps", 60)
    first, last = 1e-4 * 1000 / 60, 0.02 * 1000 / 60
    bar = math.prod(1 - (first + (last - first) * i / 59) for i in range(60))
    x0 = torch.load("images.pt").double() / 127.5 - 1
    L_T = (bar * x0 ** 2 - bar - math.log(1 - bar)).mean().item() / 2 / math.log(2)
    entry = losses()[0]
    assert entry["bound"] - 60 * entry["loss"] == pytest.approx(L_T, rel=1e-3)


def test_the_objective_L_is_not_clipped():
    """A term of L is the weighted error of ε (Eq. 12), also where x̂_0 lies far outside [−1, 1].

    Kills: x̂_0 clipped inside the training objective, which takes away its gradient."""
    settings = {**SETTINGS, "objective": "vlb", "variance": "fixed_small"}
    s, g = ddpm.make_schedule(50), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 3, 4, 4, generator=g, dtype=torch.float64).clamp(-1, 1)
    t, wrong = torch.tensor([7, 30, 50]), 5 + eps
    loss = train.loss_of(settings, s, lambda x, t: wrong, x0, t, eps)
    bar, before = s.alpha_bars[t], s.alpha_bars[t - 1]
    beta, alpha = 1 - bar / before, bar / before
    weight = beta ** 2 / (2 * beta * (1 - before) / (1 - bar) * alpha * (1 - bar))
    torch.testing.assert_close(loss, weight * 25 / math.log(2))


@pytest.mark.parametrize("predict, variance, objective", [
    ("mean", "learned", "vlb"), ("mean", "fixed_large", "vlb"), ("mean", "fixed_small", "simple"),
    ("eps", "fixed_small", "vlb"), ("x0", "fixed_large", "simple")])
def test_table2_rows_train_sample_and_evaluate(predict, variance, objective):
    """Every combination of Table 2 (and x_0 prediction) goes through all three commands."""
    trains("--steps", 2, "--predict", predict, "--variance", variance, "--objective", objective)
    assert sample.main(["--n", "1"]) == 0
    assert evaluate.main("--n 2 --terms 3".split()) == 0


# --------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("flags, match", [
    ("--lr 0", "--lr"), ("--lr nan", "--lr"), ("--steps -1", "--steps"), ("--ema 1.5", "--ema"),
    ("--dropout 1", "--dropout"), ("--batch-size x", "whole number"), ("--predict v", "--predict"),
    ("--channels 40", "multiple of 32"), ("--beta-end 0.001", "larger beta_end"), ("--timesteps 1", "from 2"),
    ("--dataset nowhere", "no data set"), ("--device tpu", "there is none here"), ("--step 3", "unrecognized"),
    ("--variance learned", "--objective vlb"), ("--sample-steps 99", "exceeds"),
    ("--multipliers 1 1 1 1 1 1", "multiple of 32"), ("--attention", "expected at least one"),
    ("--image-size 9", "leave out --image-size"), ("--init nothing.pt", "no checkpoint")])
def test_train_mistakes_are_one_line(flags, match, capsys):
    """Out of range, senseless together, unknown: one line with the way out, status 1 or 2."""
    assert train.main([*TINY, "--steps", "1", *flags.split()]) in (1, 2)
    err = capsys.readouterr().err.strip()
    assert match in err and len(err.splitlines()) == 1 and "Traceback" not in err


def test_sample_and_evaluate_mistakes_are_one_line(capsys):
    """No run yet, wrong endings, impossible steps, too many images, a dataset of another shape."""
    assert sample.main([]) == 1 and "no run under" in said(capsys)
    trains("--steps", 1)
    torch.save(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), "grey.pt")
    for main, flags, match in (
            (sample, "--out x.jpg", ".png"), (sample, "--out x.pt --shared", ".png"),
            (sample, "--steps 21", "exceeds"), (sample, "--n 0", "--n"),
            (sample, "--checkpoint none.pt", "no checkpoint"), (sample, "--interpolate --time 21", "exceeds"),
            (sample, "--interpolate --dataset grey.pt --time 5", "the network's"),
            (sample, "--shared --progressive", "not allowed"), (sample, "--time 5", "go with"),
            (sample, "--out images.pt/x.png", "cannot write"),
            (sample, "--interpolate --n 65", "to mix"), (evaluate, "--out images.pt", "cannot write"),
            (evaluate, "--n 65", "has 64 images"), (evaluate, "--terms 0", "--terms"),
            (evaluate, "--dataset grey.pt", "the network's"), (evaluate, "--samples x.pt", "--fid"),
            (evaluate, "--fid --inception none.pt", "no Inception network")):
        assert main.main(flags.split()) in (1, 2), flags
        assert match in said(capsys), flags


def test_a_step_that_is_not_finite_ends_the_run(capsys, monkeypatch):
    """The step is named, the checkpoint before it is intact, and none is written after it."""
    trains("--steps", 2)
    before = Path("runs/images/checkpoint.pt").read_bytes()
    real = train.loss_of

    def loss_of(*args):
        return real(*args) * (math.nan if args[3].sum() < math.inf and next(count) == 3 else 1)
    count = iter(range(100))
    monkeypatch.setattr(train, "loss_of", loss_of)
    trains("--steps", 12, "--log-every", 5, "--save-every", 3, expect=1)
    assert "step 6: the loss or its gradient is not finite" in said(capsys)
    assert checkpoint()["step"] == 3
    assert common.load_checkpoint(Path("runs/images/checkpoint.prev.pt"))["step"] == 2
    assert len(set(Path("runs/images").glob("*.pt"))) == 2
    assert before == Path("runs/images/checkpoint.prev.pt").read_bytes()


# -------------------------------------------------------------------------------- nothing is lost

@given(st.integers(0, 2 ** 40), st.integers(1, 255), st.booleans())
def test_a_damaged_checkpoint_is_refused(tmp_path_factory, where, flip, cut):
    """Cut anywhere or any byte changed: ValueError that names the one before it, never other
    weights."""
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    for step in (1, 2):
        common.save_checkpoint(path, {"step": step, "settings": SETTINGS, "w": torch.arange(50.0)})
    raw = bytearray(path.read_bytes())
    raw = raw[:where % len(raw)] if cut else raw
    if not cut:
        raw[where % len(raw)] ^= flip
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="checkpoint.prev.pt"):
        common.load_checkpoint(path)
    assert common.load_checkpoint(common.previous(path))["step"] == 1


def test_a_failed_save_leaves_the_last_checkpoint(capsys, monkeypatch):
    """A full disk, a rename that fails, a file where the folder should be: one line, nothing
    lost."""
    trains("--steps", 2)
    resource = pytest.importorskip("resource", reason="Windows has no limits of this kind")
    good, limit = checkpoint(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        trains("--steps", 4, expect=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "cannot write" in said(capsys)
    assert_equal(checkpoint(), good)
    assert not list(Path("runs/images").glob("*.part"))

    real = os.replace

    def fails(a, b):
        if "checkpoint.pt." in str(a):
            raise OSError(28, "No space left on device")
        real(a, b)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        trains("--steps", 4, expect=1)
    assert "No space" in said(capsys)
    assert_equal(checkpoint(), good)                           # now it is checkpoint.prev.pt
    Path("file").write_text("")
    trains("--steps", 1, "--out", "file/run", expect=1)
    assert "file" in said(capsys)


@pytest.mark.skipif(os.name != "posix", reason="a folder cannot be flushed there")
def test_what_takes_its_name_is_on_the_disk(monkeypatch):
    """Before a file takes its final name its bytes are flushed, and after it the folder; the log is
    flushed before the checkpoint that counts on it.

    Kills: a power cut that leaves a checkpoint with holes, or one beside an empty log."""
    flushed, events = {}, []
    sync, replace = os.fsync, os.replace

    def fsync(fd):
        about = os.fstat(fd)
        flushed[about.st_ino] = about.st_size
        events.append("folder" if os.path.isdir(f"/dev/fd/{fd}") else "file")
        sync(fd)

    def rename(source, target):
        if Path(target).name == "checkpoint.pt":
            about, log = os.stat(source), os.stat("runs/images/log.jsonl")
            assert flushed.get(about.st_ino) == about.st_size
            assert flushed.get(log.st_ino) == log.st_size > 0
        replace(source, target)
        events.append(Path(target).name)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    trains("--steps", 4, "--log-every", 1, "--save-every", 2, "--keep", 2)
    for name in ("checkpoint.pt", "settings.json", "ema-0000002.safetensors"):
        places = [i for i, event in enumerate(events) if event == name]
        assert places and all(events[i + 1] == "folder" for i in places), (name, events)


def test_leftovers_are_cleaned_up():
    """What a kill left half-written is gone after the next start; other people's files are not."""
    trains("--steps", 1)
    for name in ("checkpoint.pt.12.part", "checkpoint.prev.pt.3.part", "log.jsonl.12.part",
                 "samples-0000001.png.9.part", "film.part", "my.log.part"):
        Path("runs/images", name).write_bytes(b"half")
    trains("--steps", 2)
    assert {path.name for path in Path("runs/images").glob("*.part")} == {"film.part", "my.log.part"}


def script(*flags, **environment) -> subprocess.Popen:
    """train.py in a process of its own."""
    return subprocess.Popen([sys.executable, HERE / "train.py", *TINY, *map(str, flags)],
                            stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def wait_for(path: Path) -> None:
    """Until the file is there, a minute at most."""
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise TimeoutError(path)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number, status):
    """The step is finished, the run saved; another process is refused meanwhile."""
    process = script("--steps", 100_000, "--save-every", 5)
    wait_for(Path("runs/images/checkpoint.pt"))
    assert train.main([*TINY, "--steps", "3"]) == 1            # two processes on one folder
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    step = checkpoint()["step"]
    assert f"stopped at step {step}; the same command resumes" in err and "Traceback" not in err


def test_kill_at_random_instants_loses_nothing(long):
    """kill −9 again and again: the run still ends with the bits of an undisturbed one."""
    steps, kills = (1500, 100) if long else (40, 1)
    flags = ("--steps", steps, "--save-every", 3, "--dropout", 0.1)
    assert script(*flags, "--out", "whole").wait() == 0
    g, killed, ended = torch.Generator().manual_seed(0), 0, 0
    while killed < kills or not ended:
        process = script(*flags, "--out", "killed")
        try:
            _, err = process.communicate(
                timeout=1.5 + 3 * torch.rand(1, generator=g).item() if killed < kills else 600)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
            continue
        assert process.returncode == 0, err
        assert_equal(checkpoint("killed"), checkpoint("whole"))
        assert losses("killed") == losses("whole")
        shutil.rmtree("killed")                                # and again, until killed often enough
        ended += 1
    print(f"killed {killed} times; {ended} runs ended with the same bits")


def torchrun(script_name: str, *flags) -> None:
    """A script under two gloo ranks on the CPU."""
    # "--": torchrun would take --n for the beginning of its own --nnodes
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                    "--master-port", str(20000 + os.getpid() % 20000), "--", HERE / script_name,
                    *map(str, flags)],
                   check=True, timeout=120, capture_output=True, env={**os.environ,
                                                                      "OMP_NUM_THREADS": "1"})


def test_two_ranks_are_one_run():
    """The global batch, its images, times and noise do not depend on the number of ranks.

    Kills: the same seed on every rank, images drawn twice, a gradient summed over ranks."""
    flags = [*TINY, "--steps", "4", "--dropout", "0"]
    assert train.main([*flags, "--out", "one"]) == 0
    torchrun("train.py", *flags, "--out", "two")
    one, two = checkpoint("one"), checkpoint("two")
    for key in one["model"]:
        torch.testing.assert_close(two["model"][key], one["model"][key], rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(two["ema"][key], one["ema"][key], rtol=1e-3, atol=2e-5)
    for a, b in zip(losses("one"), losses("two")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)

    flags = "--checkpoint one --n 5 --steps 5 --device cpu --precision fp32 --out".split()
    assert sample.main([*flags, "a.pt"]) == 0
    torchrun("sample.py", *flags, "b.pt")
    a, b = torch.load("a.pt"), torch.load("b.pt")
    assert a.shape == b.shape and (a.int() - b.int()).abs().max() <= 1
    assert len(b.flatten(1).unique(dim=0)) == 5


def test_compile_falls_back(capsys, monkeypatch):
    """Where torch.compile fails there is one line, and training goes on without it."""
    def broken(net, **options):
        def forward(*args):
            raise RuntimeError("no C++ compiler\nand more lines")
        return forward
    monkeypatch.setattr(torch, "compile", broken)
    trains("--steps", 1, "--compile")
    assert "training without torch.compile: no C++ compiler\n" in capsys.readouterr().err


def test_bench_runs(capsys):
    """The benchmark works on a tiny network: speeds, the limit, the peak of memory. No number is
    judged."""
    assert bench.main("--channels 32 --multipliers 1 --repeat 1 --batch-size 1 --device cpu".split()) == 0
    out = capsys.readouterr().out
    for text in ("ours         train", "ours         sample", "convolutions train", "GFLOP/s"):
        assert text in out


# --------------------------------------------------------------------------------------- pictures

def read_png(path) -> tuple[tuple[int, int], bytes, int]:
    """An independent decoder of unfiltered 8-bit PNGs: (width, height), pixels, channels."""
    raw = Path(path).read_bytes()
    assert raw[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
    at, body, kinds = 8, b"", []
    while at < len(raw):
        n, = struct.unpack(">I", raw[at:at + 4])
        kind, content = raw[at + 4:at + 8], raw[at + 8:at + 8 + n]
        assert struct.unpack(">I", raw[at + 8 + n:at + 12 + n])[0] == zlib.crc32(kind + content)
        kinds.append(kind)
        if kind == b"IHDR":
            width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", content)
            assert depth == 8 and rest == [0, 0, 0]
        body += content if kind == b"IDAT" else b""
        at += 12 + n
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND"
    channels = {0: 1, 2: 3}[colour]
    lines, stride = zlib.decompress(body), 1 + width * channels
    assert len(lines) == height * stride
    pixels, above = [], bytes(stride - 1)
    for y in range(height):
        kind, *line = lines[y * stride:(y + 1) * stride]
        for i in range(len(line) if kind else 0):  # each byte has a prediction added, by its filter
            left, corner = (line[i - channels], above[i - channels]) if i >= channels else (0, 0)
            guess = left + above[i] - corner
            nearest = min((left, above[i], corner), key=lambda byte: abs(guess - byte))
            line[i] += (0, left, above[i], (left + above[i]) // 2, nearest)[kind]
            line[i] %= 256
        above = bytes(line)
        pixels.append(above)
    return (width, height), b"".join(pixels), channels


@given(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_png_round_trip(tmp_path_factory, c, height, width, seed):
    """Every pixel comes back from an independent decoder."""
    image = torch.randint(256, (c, height, width), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(seed))
    path = tmp_path_factory.mktemp("png") / "x.png"
    sample.write_png(path, image)
    size, pixels, channels = read_png(path)
    assert size == (width, height) and channels == c
    assert list(pixels) == image.permute(1, 2, 0).flatten().tolist()


def test_grid_has_rows_of_columns():
    """Image i is in row i // columns, column i % columns; a square unless told otherwise."""
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 2)
    assert sample.grid(images)[0, ::2, ::2].tolist() == [[0, 1, 2], [3, 4, 0]]
    assert sample.grid(images, 5)[0, 0, ::2].tolist() == [0, 1, 2, 3, 4]

