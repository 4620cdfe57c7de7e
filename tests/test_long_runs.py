"""What watches and serves a long run: the log, kept weights, micro-batches, fp16, many samples."""
import json
import math
from pathlib import Path

import pytest
import torch

import common
import data
import evaluate
import sample
import test_commands
import train
import weights
from test_commands import assert_equal, checkpoint, losses, read_png, said, trains

in_a_folder_of_its_own = test_commands.in_a_folder_of_its_own  # a fixture, used by every test


def entries(folder="runs/images") -> list[dict]:
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------ the log

def test_every_number_of_the_log_by_hand(monkeypatch):
    """Loss, its thirds of t, norm and its largest, learning rate: from what each step returned."""
    steps, real = [], train.training_step

    def spy(*arguments):
        steps.append(real(*arguments))
        return steps[-1]
    monkeypatch.setattr(train, "training_step", spy)
    trains("--steps", 7, "--log-every", 3, "--clip", 0.5)
    first = 0
    for entry, last in zip(entries(), (3, 6, 7)):
        assert entry["step"] == last
        some = steps[first:last]
        rows = [(t, loss) for losses, ts, _ in some for t, loss in zip(ts.tolist(), losses.tolist())]
        assert entry["loss"] == pytest.approx(sum(loss for _, loss in rows) / len(rows), rel=1e-5)
        # T = 20: the thirds are 1 … 7, 8 … 14 and 15 … 20, since (t − 1) · 3 // 20 changes there.
        for value, (low, high) in zip(entry["loss_thirds"], ((1, 7), (8, 14), (15, 20))):
            these = [loss for t, loss in rows if low <= t <= high]
            assert value == (pytest.approx(sum(these) / len(these), rel=1e-5) if these else None)
        norms = [norm.item() for *_, norm in some]
        assert entry["grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
        assert entry["grad_norm_max"] == pytest.approx(max(norms), rel=1e-6)
        assert entry["lr"] == pytest.approx(1e-3 * min((last - 1) / 3, 1))
        first = last
    assert "last" not in entries()[1] and entries()[2]["last"] is True


def test_images_per_second_count_the_training_alone(monkeypatch):
    """Each step takes one second of a clock that a grid moves on by a hundred."""
    now = [0.0]
    real = train.training_step

    def step(*arguments):
        now[0] += 1
        return real(*arguments)
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train, "training_step", step)
    monkeypatch.setattr(train.Run, "grid", lambda self: now.__setitem__(0, now[0] + 100))
    trains("--steps", 6, "--log-every", 3, "--sample-every", 2)
    assert [e["images_per_s"] for e in entries()] == [4, 4]          # batches of 4 images


def test_the_last_line_of_a_short_run_is_taken_out_again():
    """A run that ends between two lines logs its loss; continued, it has the log of a whole run."""
    trains("--steps", 3, "--log-every", 10)
    assert [e["step"] for e in entries()] == [3]
    trains("--steps", 3, "--log-every", 10)                          # nothing is left to do
    assert [e["step"] for e in entries()] == [3]
    trains("--steps", 7, "--log-every", 5)
    trains("--steps", 7, "--log-every", 5, "--out", "whole")
    assert losses() == losses("whole") and [e["step"] for e in losses()] == [5, 7]


def test_a_damaged_log_is_kept(capsys):
    """Lines that the log cannot have are left out with a word, and the file is kept."""
    for _ in range(2):
        trains("--steps", 4)
        assert not Path("runs/images/log.damaged.jsonl").exists()
    path = Path("runs/images/log.jsonl")
    good = path.read_bytes()
    path.write_bytes(b'{"step": 1\xff\n' + good + b'[1]\n{"step": 99, "loss": 1}\n{"step')
    damaged = path.read_bytes()
    trains("--steps", 4)
    assert path.read_bytes() == good and Path("runs/images/log.damaged.jsonl").read_bytes() == damaged
    assert "damaged lines" in capsys.readouterr().err


def test_loss_png_shows_the_log():
    """The loss over the steps, and that of each third; older lines without thirds are left out."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pyplot, figures = common.pyplot(), []
    train.plot_losses(Path())
    Path("log.jsonl").write_text('{"step": 1, "loss": 9}\n'
                                 '{"step": 2, "loss": 5, "loss_thirds": [8, 4, 3]}\n')
    train.plot_losses(Path())
    assert not Path("loss.png").exists()
    with open("log.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 4, "loss_thirds": [6, 2, 1]}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "close", figures.append)
        train.plot_losses(Path())
    axes, = figures[0].axes
    assert [list(zip(*line.get_data())) for line in axes.lines] == [
        [(2, 8), (5, 6)], [(2, 4), (5, 2)], [(2, 3), (5, 1)], [(2, 5), (5, 4)]]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert Path("loss.png").read_bytes()[1:4] == b"PNG"
    pyplot.close(figures[0])


# ---------------------------------------------------------------------------------------- the grids

@pytest.mark.parametrize("T, variance, flag, seconds, steps", [
    (100, "fixed_small", None, 49, 10), (100, "fixed_small", None, 100, 20),
    (100, "fixed_small", None, 10 ** 4, 100), (100, "fixed_small", 7, 0, 7),
    (2, "fixed_small", None, 0, 2), (10, "learned", None, 0, 10), (11, "learned", None, 0, None),
    (11, "learned", None, 55, 11)])
def test_a_grid_takes_a_tenth_of_the_time(monkeypatch, capsys, T, variance, flag, seconds, steps):
    """As many network calls of half a second as fit into it, ten at least, T at most; the flag
    decides otherwise. The images are 0 … 4 of the run's seed, from its averages, 32 at a time."""
    asked = []

    def draw(trained, n, seed, batch, calls, machine, progress):
        asked.append(calls)
        assert trained.net is run.ema and trained.schedule is run.schedule
        assert (trained.settings, machine, progress.total) == (run.settings, run.machine, 5)
        assert (n, seed, batch, progress.quiet) == (5, 3, 32, False)
        return torch.zeros(5, 3, 8, 8, dtype=torch.uint8)

    def a_call(trained, n, machine):
        return 0.5 if trained.net is run.ema and (n, machine) == (5, run.machine) else None
    monkeypatch.setattr(sample, "draw_samples", draw)
    monkeypatch.setattr(sample, "seconds_of_a_call", a_call)
    run = train.Run({**train.recipe("shapes", 8), "in_channels": 3, "image_size": 8, "channels": 32,
                     "multipliers": [1], "sample_steps": flag, "timesteps": T, "samples": 5,
                     "variance": variance, "seed": 3}, data.shapes(4, 8), Path("here"),
                    common.find_machine("cpu", "fp32"))
    run.seconds = seconds
    run.grid()
    run.grid()                                                   # it is there, and drawn only once
    assert asked == ([steps] if steps else [])
    assert ("--sample-steps" in capsys.readouterr().err) == (steps != T)


def test_the_final_grid_is_drawn_after_all(capsys):
    """A run that was killed before its last grid draws it when the same command is given again."""
    flags = ("--steps", 2, "--samples", 1, "--sample-steps", 2)
    trains(*flags)
    Path("runs/images/samples-0000002.png").unlink()
    trains(*flags)
    assert read_png("runs/images/samples-0000002.png")[0] == (480, 480)


def test_enlarged_pictures_show_the_same_pixels():
    """Every pixel becomes a square of k × k, and the picture is about 480 wide, or as it was."""
    picture = torch.arange(2 * 3 * 5, dtype=torch.uint8).view(1, 6, 5)
    large = sample.enlarged(picture)
    assert large.shape == (1, 6 * 96, 5 * 96) and torch.equal(large[:, ::96, ::96], picture)
    assert (large.view(1, 6, 96, 5, 96) == picture[:, :, None, :, None]).all()
    assert sample.enlarged(torch.zeros(1, 2, 800, dtype=torch.uint8)).shape == (1, 2, 800)


# ------------------------------------------------------------------------------------- kept weights

def test_kept_weights_are_the_averages_of_their_step(capsys):
    """--keep N writes the averages every N steps; sample.py and evaluate.py take them."""
    trains("--steps", 6, "--keep", 2, "--save-every", 4)
    folder = Path("runs/images")
    assert sorted(p.name for p in folder.glob("ema-*")) == [
        f"ema-000000{k}.safetensors" for k in (2, 4, 6)]
    for step, state in ((4, common.load_checkpoint(folder / "checkpoint.prev.pt")),
                        (6, checkpoint())):
        trained = sample.load(folder / f"ema-000000{step}.safetensors")
        assert_equal(dict(trained.net.state_dict()), dict(state["ema"]))
        assert trained.settings == state["settings"] and f"step {step}" in trained.source
        assert not trained.net.training
    name = str(folder / "ema-0000002.safetensors")
    assert sample.main(["--checkpoint", name, "--n", "1", "--steps", "2"]) == 0
    assert evaluate.main(["--checkpoint", name, "--n", "2", "--terms", "2"]) == 0
    assert train.main([*test_commands.TINY, "--init", name, "--steps", "1", "--out", "tuned"]) == 0
    weights.write_safetensors(Path("bad.safetensors"), {"a": torch.ones(1)}, {"ddpm": "{}"})
    assert sample.main(["--checkpoint", "bad.safetensors", "--n", "1"]) == 1
    assert "holds no settings of train.py" in said(capsys)


# -------------------------------------------------------------------------------- micro-batches, fp16

@pytest.mark.parametrize("micro", [1, 3, 99])
def test_micro_batches_are_the_same_step(micro):
    """The gradients of the parts, weighted by their sizes, add up to that of the batch."""
    flags = ("--steps", 3, "--dropout", 0, "--log-every", 3)
    trains(*flags, "--out", "whole")
    trains(*flags, "--out", "parts", "--micro-batch", micro)
    parts = checkpoint("parts")["model"]
    for name, value in checkpoint("whole")["model"].items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=2e-5)
    for key in ("loss", "grad_norm"):
        assert losses("parts")[0][key] == pytest.approx(losses("whole")[0][key], rel=1e-4)


def test_micro_batches_resume_exactly():
    """With dropout, too."""
    flags = ("--micro-batch", 3, "--dropout", 0.3)
    trains("--steps", 4, "--out", "whole", *flags)
    trains("--steps", 2, "--out", "two", *flags)
    trains("--steps", 4, "--out", "two", *flags)
    assert_equal(checkpoint("two"), checkpoint("whole"))
    assert losses("two") == losses("whole")


HALF = [*test_commands.TINY[:-1], "fp16"]


def test_fp16_trains_and_resumes_exactly():
    """The same training as in float32, to the precision of the numbers; the scaler's state is in
    the checkpoint. (float16 has no fast kernels on a CPU, so the runs are short.)"""
    assert train.main([*HALF, "--steps", "4", "--out", "whole"]) == 0
    for steps in ("2", "4"):
        assert train.main([*HALF, "--steps", steps, "--out", "two"]) == 0
    trains("--steps", 4, "--out", "full")
    assert_equal(checkpoint("two"), checkpoint("whole"))
    assert losses("two") == losses("whole")
    for half, full in zip(losses("whole"), losses("full"), strict=True):
        assert half["loss"] == pytest.approx(full["loss"], rel=2e-2) and half != full
    assert checkpoint("whole")["scaler"]["scale"] == 2.0 ** 16 and not checkpoint("full")["scaler"]


def test_fp16_skips_what_is_not_finite(monkeypatch, capsys):
    """A scale that overflows is lowered until it fits; a loss that is never finite ends the run."""
    monkeypatch.setattr(torch.amp.GradScaler.__init__, "__defaults__",
                        ("cuda", 2.0 ** 40, 2.0, 2.0 ** -10, 2000, True))
    assert train.main([*HALF, "--steps", "6", "--log-every", "3"]) == 0
    first, second = losses()
    assert math.isfinite(first["loss"]) and second["grad_norm"] > 0
    assert 1 <= checkpoint()["scaler"]["scale"] < 2.0 ** 40
    real = train.loss_of
    monkeypatch.setattr(train, "loss_of", lambda *a: real(*a) * math.nan)
    small = "--batch-size 1 --multipliers 1 --attention 8 --steps 40 --out nan".split()
    assert train.main([*HALF, *small]) == 1
    assert "step 31: the loss or its gradient is not finite" in said(capsys)


def test_a_change_of_precision_is_told(capsys):
    """A run that is continued in another precision says so."""
    trains("--steps", 1)
    capsys.readouterr()
    assert train.main([*test_commands.TINY[:-1], "bf16", "--steps", "2"]) == 0
    assert "this run was in torch.float32, and goes on in torch.bfloat16" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- many samples

FLAGS = "--checkpoint runs/images --device cpu --precision fp32 --steps 3 --batch-size 2".split()


class Killed(Exception):
    """What ends the drawing in the middle."""


def drawn(monkeypatch, *flags, stop_after: int | None = None) -> tuple[int, list[int]]:
    """Runs sample.py; stops it after some batches. Its status and the images that were drawn."""
    indices = []
    real = sample.Noise

    def noise(seed, batch, *rest):
        if stop_after is not None and len(indices) >= stop_after:
            raise Killed
        indices.extend(batch)
        return real(seed, batch, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(sample, "Noise", noise)
        return sample.main([*FLAGS, *flags]), indices


def test_a_tensor_of_samples_goes_on(monkeypatch, capsys):
    """Drawn in batches into a file that grows; after a stop only the rest is drawn."""
    trains("--steps", 1)
    assert drawn(monkeypatch, "--n", "7", "--out", "whole.pt") == (0, list(range(7)))
    assert drawn(monkeypatch, "--n", "7", "--out", "x.pt", stop_after=4) == (1, [0, 1, 2, 3])
    raw = Path("x.pt.raw")
    raw.write_bytes(raw.read_bytes() + bytes(50))                    # and half an image
    assert not Path("x.pt").exists()
    assert drawn(monkeypatch, "--n", "7", "--out", "x.pt") == (0, [4, 5, 6])
    x, whole = torch.load("x.pt"), torch.load("whole.pt")
    assert x.shape == (7, 3, 8, 8) and (x.int() - whole.int()).abs().max() <= 1
    assert sorted(p.name for p in Path().glob("x.pt*")) == ["x.pt"]
    assert torch.equal(data.read_tensor(Path("x.pt")), x)
    drawn(monkeypatch, "--n", "7", "--out", "x.pt", stop_after=2)
    assert sample.main([*FLAGS, "--n", "7", "--out", "x.pt", "--seed", "5"]) == 1
    assert "tells of other samples" in said(capsys)


def test_a_folder_of_samples_goes_on(monkeypatch, capsys):
    """One PNG for each image; those that are there are not drawn again, and more can be added."""
    trains("--steps", 1)
    assert drawn(monkeypatch, "--n", "3", "--out", "whole.pt")[0] == 0
    assert drawn(monkeypatch, "--n", "3", "--out", "f/", stop_after=2) == (1, [0, 1])
    assert drawn(monkeypatch, "--n", "3", "--out", "f") == (0, [2])
    assert drawn(monkeypatch, "--n", "4", "--out", "f/") == (0, [3])
    whole = torch.load("whole.pt")
    for i in range(3):
        size, pixels, channels = read_png(f"f/{i:06d}.png")
        assert size == (8, 8) and channels == 3
        got = torch.tensor(list(pixels)).view(8, 8, 3).permute(2, 0, 1)
        assert (got - whole[i].int()).abs().max() <= 1
    assert len(list(Path("f").glob("*.png"))) == 4
    for flags in (["--seed", "1"], ["--no-clip"], ["--steps", "4"], ["--variance", "fixed_small"]):
        assert sample.main([*FLAGS, "--n", "4", "--out", "f", *flags]) == 1
        assert "tells of other samples" in said(capsys)


def test_noise_of_images_is_the_same_in_any_batch():
    """Image i of a seed has the same noise wherever it is drawn; no two images share any.

    Kills: a seed of 32 bits, with which images 11105 and 44975 of seed 8 have the same noise."""
    a = sample.Noise(3, [5, 2, 9], (2, 3), "cpu")
    b = sample.Noise(3, [9, 5], (2, 3), "cpu")
    for _ in range(3):
        x, y = a(), b()
        assert torch.equal(x[0], y[1]) and torch.equal(x[2], y[0])
        assert len(torch.cat([x, y]).flatten().unique()) == 18
    same = sample.Noise(8, [11105, 44975], (4,), "cpu")()
    assert common.seed_of(8, "image", 11105) % 2 ** 32 == common.seed_of(8, "image", 44975) % 2 ** 32
    assert not torch.equal(same[0], same[1])


def test_noise_is_standard_normal():
    """Moments, tails and independence of neighbours of 10⁶ numbers, within five standard errors."""
    z = sample.Noise(0, range(1000), (1000,), "cpu")().double()
    n = z.numel() ** 0.5
    assert abs(z.mean()) < 5 / n and abs(z.square().mean() - 1) < 5 * 2 ** 0.5 / n
    assert abs((z ** 3).mean()) < 5 * 15 ** 0.5 / n and abs((z ** 4).mean() - 3) < 5 * 96 ** 0.5 / n
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 5 / n and abs((z[1:] * z[:-1]).mean()) < 5 / n
    for limit, p in ((1, 0.3173), (2, 0.0455), (3, 0.0027)):
        assert abs((z.abs() > limit).double().mean() - p) < 5 * (p / 1e6) ** 0.5 + 5e-5
    assert 4.3 < z.abs().max() < 6.5
