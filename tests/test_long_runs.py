"""What watches and serves a long run: the log, grids, kept weights, micro-batches, fp16."""
import json
import math
from pathlib import Path

import pytest
import torch

import evaluate
import sample
import train
from helpers import assert_equal, checkpoint, CPU, losses, read_png, said, SMALL, TINY, trains
from support import checkpoint as checkpoints
from support import command, data
from support.machine import seed_of

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def entries(folder="runs/images") -> list[dict]:
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------ the log

def test_every_number_of_the_log_by_hand():
    """Loss, its thirds of t, norm and its largest, learning rate: from what the same steps return to
    another run, which takes them one by one. A line every N steps, and for the last one."""
    flags = [*TINY, *map(str, SMALL), *"--steps 7 --log-every 3 --grad-clip 0.5".split()]
    assert train.main(flags) == 0
    run, steps = train.begin(train.parse(flags), data.load("images.pt")[0], {}, CPU, Path("other")), []
    run.network.train()
    for k in range(6):
        torch.manual_seed(seed_of(0, "dropout", k, 0))
        steps.append(train.training_step(run, k))
    assert [entry["step"] for entry in entries()] == [3, 6, 7]
    first = 0
    for entry, last in zip(entries()[:2], (3, 6), strict=True):
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


def test_every_checkpoint_has_its_line():
    """The steps since the last line get one before they are saved, so a run that is stopped between
    two lines, and goes on with others, counts each step once.

    Kills: steps before a stop that no line counts, or that one counts twice."""
    trains("--steps", 3, "--log-every", 10)
    first, = entries()
    trains("--steps", 3, "--log-every", 10)                          # nothing is left to do
    assert entries() == [first]
    trains("--steps", 7, "--log-every", 5)
    trains("--steps", 7, "--log-every", 5, "--out", "whole")
    assert [e["step"] for e in entries()] == [3, 5, 7] and [e["step"] for e in entries("whole")] == [5, 7]
    assert losses()[2] == losses("whole")[1]
    assert 3 * first["loss"] + 2 * losses()[1]["loss"] == pytest.approx(5 * losses("whole")[0]["loss"])


# ---------------------------------------------------------------------------- what belongs to a step

def test_what_is_missing_of_the_last_step_is_made_after_all():
    """A run that was killed after its last checkpoint draws grid and curve and keeps the averages
    when the same command is given again, and trains no more; what is there is not touched."""
    flags = ("--steps", 4, "--samples", 1, "--sample-steps", 2, "--keep", 2, "--log-every", 1)
    trains(*flags)
    made = [path for path in Path("runs/images").iterdir() if path.name.endswith(("0000004.pt", ".png"))]
    assert {"ema-0000004.pt", "samples-0000004.png"} <= {path.name for path in made}
    before = {path: path.read_bytes() for path in made}
    kept, saved = (Path("runs/images", name).stat().st_mtime_ns for name in ("ema-0000002.pt", "checkpoint.pt"))
    lines = entries()
    for path in made:
        path.unlink()
    trains(*flags)
    assert entries() == lines and Path("runs/images/checkpoint.pt").stat().st_mtime_ns == saved  # no step was taken
    assert {path: path.read_bytes() for path in made} == before
    assert Path("runs/images/ema-0000002.pt").stat().st_mtime_ns == kept
    assert read_png("runs/images/samples-0000004.png").shape[1:] == (480, 480)


def test_kept_weights_are_the_averages_of_their_step():
    """--keep N writes the averages every N steps; sample.py, evaluate.py and --init take them, and
    nothing takes them for a run that goes on."""
    trains("--steps", 4, "--out", "short")
    trains("--steps", 6, "--keep", 2)
    folder = Path("runs/images")
    assert sorted(p.name for p in folder.glob("ema-*")) == [f"ema-000000{k}.pt" for k in (2, 4, 6)]
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


def test_kept_weights_have_no_last_weights(capsys):
    """--no-ema is refused for them, by name."""
    trains("--steps", 1, "--keep", 1)
    for name, status in (("ema-0000001.pt", 1), ("checkpoint.pt", 0)):
        assert sample.main(["--checkpoint", f"runs/images/{name}", "--no-ema", "--n", "1", "--steps", "2"]) == status
        assert name in (line := capsys.readouterr().err) and "unforeseen" not in line


# -------------------------------------------------------------------------------- micro-batches, fp16

def test_micro_batches_are_the_same_step():
    """The gradients of the parts, weighted by their sizes, add up to that of the batch."""
    flags = (*SMALL, "--steps", 3, "--dropout", 0, "--log-every", 3)
    trains(*flags, "--out", "whole")
    for micro in (1, 3, 99):
        trains(*flags, "--out", f"parts{micro}", "--micro-batch", micro)
        parts = checkpoint(f"parts{micro}")["net"]
        for name, value in checkpoint("whole")["net"].items():
            torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=2e-5)
        for key in ("loss", "grad_norm"):
            assert losses(f"parts{micro}")[0][key] == pytest.approx(losses("whole")[0][key], rel=1e-4)


def test_micro_batches_resume_exactly():
    """With dropout, too."""
    flags = (*SMALL, "--micro-batch", 3, "--dropout", 0.3)
    trains("--steps", 4, "--out", "whole", *flags)
    trains("--steps", 2, "--out", "two", *flags)
    trains("--steps", 4, "--out", "two", *flags)
    assert_equal(checkpoint("two"), checkpoint("whole"))
    assert losses("two") == losses("whole")


HALF = [*TINY[:-1], "fp16", *map(str, SMALL)]


def test_fp16_trains_and_resumes_exactly():
    """The same training as in float32, to the precision of the numbers; the scaler's state is in
    the checkpoint. (float16 has no fast kernels on a CPU, so the runs are short.)"""
    assert train.main([*HALF, "--steps", "4", "--out", "whole"]) == 0
    for steps in ("2", "4"):
        assert train.main([*HALF, "--steps", steps, "--out", "two"]) == 0
    trains(*SMALL, "--steps", 4, "--out", "full")
    assert_equal(checkpoint("two"), checkpoint("whole"))
    assert losses("two") == losses("whole")
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


def test_a_change_of_precision_is_told(capsys):
    """A run that is continued in another precision says so, with both; one that is not says nothing."""
    trains("--steps", 1)
    trains("--steps", 2)
    assert "float32, and" not in capsys.readouterr().err
    assert train.main([*TINY[:-1], "bf16", "--steps", "3"]) == 0
    line, = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: this"))
    assert "torch.float32" in line and "torch.bfloat16" in line and not command.stop.number
