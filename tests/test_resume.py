"""Runs that stop, are killed, go on and keep what they have made: nothing is lost, and nothing is mixed."""
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import evaluate
import sample
import train
from helpers import (CPU, FIXED, HERE, SMALL, TINY, as_flags, assert_equal, assert_same_log, checkpoint, log, losses,
                     read_png, run_of, said, trains, when_called)
from support import checkpoint as checkpoints, data
from support.checkpoint import load_checkpoint, save_checkpoint
from support.command import locked

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


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


@pytest.mark.parametrize("dtype, first", [
    (torch.float32, 1), (torch.float32, 3), (torch.float32, 4), (torch.float16, 3)])
def test_a_run_goes_on_to_the_bit(dtype, first):
    """A run that is stopped and continued by another process, whose weights are others until then,
    is the run that was not: weights, averages, Adam, scale. Dropout, micro-batches and flips on.
    The log has a line more, where it was stopped.

    Kills: a state that is not in the checkpoint, steps that no line counts or two do."""
    flags = dict(log_every=4, dropout=0.3, micro_batch=2, batch_size=3, save_every=100, lr=0.1)
    train.train(run_of(dtype, folder="whole", steps=6, **flags), 0)
    train.train(run_of(dtype, folder="two", steps=first, **flags), 0)
    state = load_checkpoint(Path("two/checkpoint.pt"))
    two = run_of(dtype, folder="two", steps=6, **flags)
    with torch.no_grad():
        for p in [*two.net.parameters(), *two.ema.parameters()]:
            p += 1
    assert train.restore(two, state) == first
    train.train(two, first)
    a, b = (load_checkpoint(Path(folder, "checkpoint.pt")) for folder in ("whole", "two"))
    assert_equal(a, b)
    lines, more = log("whole"), log("two")
    assert [line["step"] for line in lines] == [4, 6]
    assert [line["step"] for line in more] == sorted({first, 4, 6})
    share = [(line["step"] - before) * line["loss"] for line, before in zip(more, [0, first, 4])]
    if dtype == torch.float32 and first < 4:
        assert sum(share[:2]) == pytest.approx(4 * lines[0]["loss"])


def test_what_a_checkpoint_is_restored_to(capsys):
    """Only to a run with the same images; another precision is told, and then the scale of fp16
    begins anew."""
    half, full = run_of(torch.float16), run_of()
    half.scaler.load_state_dict({**half.scaler.state_dict(), "scale": 8.0})
    for run, scale in ((half, 8.0), (full, 2.0 ** 16)):
        train.save(run, 3)
        again = run_of(torch.float16)
        assert train.restore(again, load_checkpoint(Path("checkpoint.pt"))) == 3
        assert again.scaler.get_scale() == scale
        err = capsys.readouterr().err
        assert "float32" in err and "float16" in err if run is full else err == ""
    state = load_checkpoint(Path("checkpoint.pt"))
    for images in (data.shapes(4, 8).flip(0), data.shapes(5, 8), data.shapes(4, 8).view(4, 3, 4, 16)):
        with pytest.raises(ValueError, match="images"):
            train.restore(full._replace(images=images, fingerprint=data.fingerprint(images)), state)


FREE = {"dataset": "other.pt", "steps": 5, "micro_batch": 2, "log_every": 71, "save_every": 72, "sample_every": 73,
        "samples": 1, "sample_steps": 2, "keep": 76}


def test_what_may_change_when_a_run_is_resumed(capsys):
    """How long it trains, in which parts, how it is watched, and where the data lie, which are known by
    their content; each other setting is named in the refusal, with both values. What is not said is the run's."""
    path = Path("runs/r/checkpoint.pt")
    run = run_of(folder="runs/r", images=torch.load("images.pt"), dataset="images.pt", steps=4, micro_batch=1,
                 attention=[8], blocks=1, variance="fixed_small")
    stored = run.settings
    train.save(run, 4)
    fixed = {name: value for name, value in FIXED.items() if name not in FREE}
    assert {"skip_bad", *FREE, *fixed} == set(train.SETTINGS) == stored.keys() - {"in_channels", "init"}
    for name, value in fixed.items():
        assert train.main(["--out", "runs/r", *as_flags({name: value})]) == 2
        err = capsys.readouterr().err
        for part in ("--" + name.replace("_", "-"), str(stored[name]), str(value)):
            assert part in err and err.count("\n") == 1
    shutil.copy("images.pt", "other.pt")
    same, cpu = {name: stored[name] for name in fixed}, ["--device", "cpu", "--precision", "fp32"]
    for flags in ({}, {**FREE, **same}):
        assert train.main(["--out", "runs/r", *cpu, *as_flags(flags)]) == 0
        state, want = load_checkpoint(path), {**stored, **flags}
        assert state["step"] == want["steps"]
        assert json.loads(Path("runs/r/settings.json").read_text()) == want
    assert state["settings"] == want


def test_a_batch_may_have_other_parts_when_a_run_is_resumed():
    """--micro-batch is a matter of memory: a run that goes on with another one has the weights of the
    run that did not change it, up to rounding (without dropout, whose masks depend on the parts)."""
    flags = (*SMALL, "--dropout", 0)
    trains(*flags, "--steps", 4, "--out", "whole")
    for steps, more in ((2, ()), (3, ("--micro-batch", 3)), (4, ("--micro-batch", 1))):
        trains(*flags, "--steps", steps, "--out", "parts", *more)
    parts, whole = checkpoint("parts"), checkpoint("whole")
    assert parts["settings"]["micro_batch"] == 1 and parts["step"] == 4
    for key, value in whole["net"].items():
        assert (parts["net"][key] - value).abs().mean() < 1e-5  # one step alone changes them by 10⁻³


RATE = ("--steps", 100, "--lr", 1000)  # which multiplies the weights until float32 has no such number


def test_rescue_goes_on_after_a_nan(capsys):
    """A learning rate that ends in NaN cannot be changed on resume, but with --rescue: the run goes on from
    its last checkpoint with a lower one, and log.jsonl and settings.json say so."""
    trains(*SMALL, "--steps", 2, "--lr", 1000)
    trains(*SMALL, *RATE, expect=1)
    assert "--rescue" in (line := said(capsys)) and "step " in line and checkpoint()["step"] == 2
    lower = (*SMALL, "--steps", 6, "--lr", 1e-5, "--grad-clip", 0.5)
    trains(*lower, expect=2)
    trains(*lower, "--rescue")
    state, entries = checkpoint(), log("runs/images")
    assert state["step"] == 6 and state["settings"]["lr"] == 1e-5 and state["settings"]["grad_clip"] == 0.5
    assert json.loads(Path("runs/images/settings.json").read_text()) == state["settings"]
    assert entries[1] == {"step": 2, "rescued": {"lr": 1e-5, "grad_clip": 0.5}}
    assert [entry["step"] for entry in entries] == [2, 2, 4, 6] and entries[3]["lr"] == pytest.approx(1e-5)
    for more in (("--rescue",), ()):  # the same command again, and without the flag: nothing is rescued again
        trains(*lower, *more)
        assert log("runs/images") == entries


def test_what_rescue_may_change(capsys):
    """Rate, warm-up, clipping and seed of a run that has a checkpoint, and nothing else; without a
    checkpoint it is refused, and leaves no folder."""
    trains(*SMALL, "--steps", 2, "--rescue", expect=2)
    assert "checkpoint.pt" in (line := said(capsys)) and "--rescue" in line and not Path("runs/images").exists()
    trains(*SMALL, "--steps", 1)
    before = Path("runs/images/checkpoint.pt").read_bytes()
    for name, value in {**FIXED, "variance": "fixed_small"}.items():
        if name not in (*FREE, "image_size", "lr", "warmup", "grad_clip", "seed"):
            trains(*SMALL, "--steps", 2, *as_flags({name: value}), "--rescue", expect=2)
            assert "--" + name.replace("_", "-") in said(capsys)
    assert Path("runs/images/checkpoint.pt").read_bytes() == before
    changed = {name: FIXED[name] for name in ("lr", "warmup", "grad_clip", "seed")}
    trains(*SMALL, "--steps", 2, *as_flags(changed), "--rescue")
    assert log("runs/images")[1] == {"step": 1, "rescued": changed}
    assert changed.items() <= checkpoint()["settings"].items()


def test_the_rate_never_jumps_up(capsys):
    """Of a run whose --decay has begun, --steps stays: more of them are one line that says --init, and
    the checkpoint is not touched. Before, there may be more. A run that is done says --init, too."""
    flags, path = ["--out", "runs/r", "--device", "cpu", "--precision", "fp32"], Path("runs/r/checkpoint.pt")
    run = run_of(folder="runs/r", images=torch.load("images.pt"), dataset="images.pt", steps=8, decay=0.5)
    for step, status in ((5, 2), (8, 2), (4, 0)):
        train.save(run, step)
        before = path.read_bytes()
        assert train.main([*flags, "--steps", "10"]) == status
        err = capsys.readouterr().err
        assert status == 0 or ("--init" in err and err.count("\n") == 1 and path.read_bytes() == before)
    assert checkpoint("runs/r")["step"] == 10
    assert train.main(flags) == 0 and "--init runs/r" in said(capsys)


def test_the_same_init_resumes(capsys):
    """A run knows what it began with: the command that began it goes on, also when those weights are gone, and
    so does one that does not say it; other weights are refused, with both names."""
    trains(*SMALL, "--steps", 1, "--out", "first")
    shutil.copytree("first", "other")
    trains(*SMALL, "--steps", 1, "--init", "first", "--out", "r")
    shutil.rmtree("first")
    trains(*SMALL, "--steps", 2, "--init", "first", "--out", "r")
    trains(*SMALL, "--steps", 3, "--out", "r")
    assert checkpoint("r")["step"] == 3 and checkpoint("r")["settings"]["init"] == "first"
    for folder, stored in (("r", "first"), ("other", "None")):
        name = "other" if folder == "r" else "r"
        trains(*SMALL, "--steps", 4, "--init", name, "--out", folder, expect=2)
        line = said(capsys)
        assert all(part in line for part in ("--init", stored, name)), line
        assert checkpoint(folder)["step"] < 4


def test_a_folder_with_the_files_of_another_run_is_refused(capsys):
    """Kept averages or grids without a checkpoint would be taken for those of the new run: one line, and
    nothing is touched."""
    trains(*SMALL, "--steps", 1, "--keep", 1, "--samples", 1, "--sample-steps", 2)
    folder = Path("runs/images")
    (folder / "checkpoint.pt").unlink()
    for name in ("ema-0000001.pt", "samples-0000001.png"):
        other = Path("only", name)
        other.parent.mkdir(exist_ok=True)
        shutil.copy(folder / name, other)
        before = other.read_bytes()
        trains(*SMALL, "--steps", 1, "--out", "only", expect=1)
        assert "--out" in said(capsys) and other.read_bytes() == before
        assert {path.name for path in Path("only").iterdir()} <= {name, ".lock"}
        other.unlink()
    trains(*SMALL, "--steps", 1, "--out", "only")


def test_files_of_later_steps_than_the_checkpoint_are_refused(capsys):
    """An older checkpoint put back, and another rate: the averages and grids of the abandoned steps would pass for
    those of the new ones. A picture of one's own is none of them."""
    flags = [*SMALL, "--keep", 1, "--samples", 1, "--sample-steps", 2, "--sample-every", 1]
    trains(*flags, "--steps", 1)
    folder, old = Path("runs/images"), Path("runs/images/checkpoint.pt").read_bytes()
    (folder / "samples-mine.png").write_bytes(b"")
    trains(*flags, "--steps", 3)
    (folder / "checkpoint.pt").write_bytes(old)
    for name in ("ema-0000003.pt", "ema-0000002.pt", "samples-0000003.png", "samples-0000002.png"):
        trains(*flags, "--steps", 3, "--rescue", "--lr", 1e-5, expect=1)
        assert "later step" in (line := said(capsys)) and "--out" in line
        (folder / name).unlink()
    trains(*flags, "--steps", 3, "--rescue", "--lr", 1e-5)
    assert checkpoint(folder)["ema"].keys() == load_checkpoint(folder / "ema-0000003.pt")["ema"].keys()


def test_a_run_inside_its_pictures_is_refused(capsys):
    """Its first grid would be a picture of the data set when it is resumed."""
    Path("photos").mkdir()
    for out in ("photos", "photos/run", "photos/../photos/a/b"):
        trains("--dataset", "photos", "--out", out, "--steps", 1, expect=2)
        assert "--out" in said(capsys) and not list(Path("photos").iterdir())


def test_log_is_cut_back_to_the_checkpoint(capsys):
    """Lines after the checkpoint, and half a line, are gone when the run goes on; so is a line that
    a power cut has filled with zeros, one of so many brackets that no parser ends, and a file that is half written. A run that has no more to do says which flag gives it more."""
    trains(*SMALL, "--steps", 4)
    before = losses()
    with open("runs/images/log.jsonl", "a") as file:
        file.write('\0\0\0\n' + 10_000 * "[" + '\n{"step": 6, "loss": 9}\n{"step": 8, "lo')
    Path("runs/images/.0123456789abcdef.part").write_bytes(b"half")
    trains(*SMALL, "--steps", 8)
    assert not list(Path("runs/images").glob(".*.part"))
    assert losses()[:2] == before and [e["step"] for e in losses()] == [2, 4, 6, 8]
    assert losses()[2]["loss"] != 9
    for steps, status in ((8, 0), (3, 2)):  # what is done cannot be undone
        trains(*SMALL, "--steps", steps, expect=status)
        assert "--steps" in said(capsys) and checkpoint()["step"] == 8
        assert json.loads(Path("runs/images/settings.json").read_text())["steps"] == 8


@pytest.mark.parametrize("flags", [
    "--image-size 9", "--image-size 8", "--flip --ema 1 --keep 1 --attention 4 8", "--predict x0 --no-ema-ramp",
    "--data-dir elsewhere --micro-batch 3", "--precision bf16 --grad-clip 2"])
def test_the_same_command_again_resumes(flags):
    """What is accepted once is accepted again, and changes nothing when all steps are done."""
    statuses = [train.main([*TINY, "--steps", "2", *flags.split()]) for _ in range(2)]
    assert statuses[0] == statuses[1] and statuses[0] in (0, 1, 2)
    assert Path("runs/images").exists() == (statuses[0] == 0)


def test_the_same_images_by_another_path(capsys):
    """A run knows its images by their content: another path to them goes on, other images do not.
    A folder named by a point gives the run its name."""
    trains(*SMALL, "--steps", 1)
    trains(*SMALL, "--steps", 2, "--dataset", Path("images.pt").resolve())
    assert checkpoint()["step"] == 2
    torch.save(torch.load("images.pt").flip(0), "others.pt")
    before = Path("runs/images/checkpoint.pt").read_bytes()
    for others in ("others.pt", "shapes"):
        assert train.main(f"--dataset {others} --steps 3 --out runs/images --device cpu".split()) == 1
        assert others in said(capsys) and Path("runs/images/checkpoint.pt").read_bytes() == before
    train.main([*TINY, "--dataset", ".", "--steps", "1"])
    assert not Path("runs/checkpoint.pt").exists()


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


# ----------------------------------------------------------------------------------------- one user

def test_a_run_is_locked_before_it_is_read(capsys):
    """While another process has the folder, one line says so, and what that one saves last is what the
    next command goes on from. A state that is not that of the run's network is one line, too."""
    path, flags = Path("runs/r/checkpoint.pt"), ["--out", "runs/r", "--device", "cpu", "--precision", "fp32", *as_flags(
        {"dataset": "images.pt", "channels": 32, "multipliers": [1], "attention": [8], "samples": 0, "steps": 5})]
    run = run_of(folder="runs/r", images=torch.load("images.pt"), dataset="images.pt", attention=[8], steps=5)
    path.write_bytes(b"half a checkpoint")
    with locked(path.parent):
        assert train.main(flags) == 1
        assert "another process uses runs/r" in (err := capsys.readouterr().err) and err.count("\n") == 1
        train.save(run, 4)
    assert train.main(flags[:6]) == 0 and [line["step"] for line in log("runs/r")] == [5]
    state = load_checkpoint(path)
    del state["net"]["conv_in.bias"]
    save_checkpoint(path, {key: value for key, value in state.items() if key != "format"})
    kept = path.read_bytes()
    capsys.readouterr()
    assert train.main([*flags[:6], "--steps", "6"]) == 1 and path.read_bytes() == kept
    assert str(path) in (err := capsys.readouterr().err) and err.count("\n") == 1


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


# --------------------------------------------------------------------------- what belongs to a step

def test_what_is_missing_of_the_last_step_is_made_after_all():
    """A run that was killed after its last checkpoint draws grid and curve and keeps the averages
    when the same command is given again, and trains no more; what is there is not touched, unless it
    is empty."""
    flags = ("--steps", 4, "--samples", 1, "--sample-steps", 2, "--keep", 2, "--log-every", 1)
    trains(*flags)
    made = [path for path in Path("runs/images").iterdir() if path.name.endswith(("0000004.pt", ".png"))]
    assert {"ema-0000004.pt", "samples-0000004.png"} <= {path.name for path in made}
    before = {path: path.read_bytes() for path in made}
    kept, saved = (Path("runs/images", name).stat().st_mtime_ns for name in ("ema-0000002.pt", "checkpoint.pt"))
    lines = log("runs/images")
    for lose in (Path.unlink, lambda path: path.write_bytes(b"")):
        for path in made:
            lose(path)
        trains(*flags)
        assert log("runs/images") == lines and Path("runs/images/checkpoint.pt").stat().st_mtime_ns == saved  # no step
        assert {path: path.read_bytes() for path in made} == before
    assert Path("runs/images/ema-0000002.pt").stat().st_mtime_ns == kept
    assert read_png("runs/images/samples-0000004.png").shape[1:] == (480, 480)


def test_kept_weights_are_the_averages_of_their_step():
    """--keep N writes the averages every N steps, in the format of a checkpoint with nothing but them, and
    leaves what is there as it is; sample.py, evaluate.py and --init take them, and nothing takes them
    for a run that goes on."""
    trains("--steps", 4, "--out", "short")
    trains("--steps", 6, "--keep", 2)
    folder = Path("runs/images")
    assert sorted(p.name for p in folder.glob("ema-*")) == [f"ema-000000{k}.pt" for k in (2, 4, 6)]
    assert checkpoints.load_checkpoint(folder / "ema-0000002.pt").keys() == {"format", "settings", "step", "ema"}
    for step, state in ((4, checkpoint("short")), (6, checkpoint())):
        trained = checkpoints.load(folder / f"ema-000000{step}.pt", machine=CPU)
        assert_equal(dict(trained.net.state_dict()), dict(state["ema"]))
        assert f"step {step}" in trained.source and not trained.net.training
        assert {**trained.settings, "keep": None, "steps": 0} == {**state["settings"], "keep": None, "steps": 0}
    name = str(folder / "ema-0000002.pt")
    assert sample.main(["--checkpoint", name, "--n", "1", "--steps", "2"]) == 0
    assert evaluate.main(["--checkpoint", name, "--n", "2", "--terms", "2"]) == 0
    assert train.main([*TINY, "--init", name, "--steps", "1", "--out", "tuned"]) == 0
    assert_equal(dict(checkpoint("tuned")["net"]), dict(checkpoints.load_checkpoint(Path(name))["ema"]))
    run = run_of(folder="r")
    train.keep(run, 12)
    before = Path("r/ema-0000012.pt").stat()
    run.ema.conv_in.bias.zero_()
    train.keep(run, 12)
    assert Path("r/ema-0000012.pt").stat() == before


def test_kept_weights_have_no_last_weights(capsys):
    """--no-ema is refused for them, by name."""
    trains("--steps", 1, "--keep", 1)
    for name, status in (("ema-0000001.pt", 1), ("checkpoint.pt", 0)):
        assert sample.main(["--checkpoint", f"runs/images/{name}", "--no-ema", "--n", "1", "--steps", "2"]) == status
        assert name in (line := capsys.readouterr().err) and "unexpected" not in line


# ---------------------------------------------------------------------------------- nothing is lost

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
        if what == "name" and name.parent.resolve() == Path("runs/images").resolve():
            assert flushed[inode] == size and told[i + 1][0] == "folder", name
            assert name.name != "checkpoint.pt" or flushed[log[0]] == log[1] > 0
            named.append(name.name)
    assert {"checkpoint.pt": 2, "settings.json": 1, "log.jsonl": 1, "ema-0000002.pt": 1}.items() <= {
        name: named.count(name) for name in named}.items()


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
