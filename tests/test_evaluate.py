"""Table 1's numbers: an unbiased estimate, the Fréchet distance, the Inception score."""
import contextlib
import gzip
import hashlib
import io
import math
import os
import re
import shlex
import signal
import struct
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ddpm
import evaluate
import sample
from helpers import alpha_bars, CPU, flags_of, free_port, hooked, Inception, random_run, said, T, when_called
from support import data, machine
from support.machine import Noise
from unet import UNet

F64 = torch.float64
pytestmark = [pytest.mark.usefixtures("in_a_folder_of_its_own"),
              pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]


def randn(seed: int, *shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------- likelihood

@given(st.integers(1, 2000), st.integers(1, 300))
def test_strata_cover_2_to_T_once(T, K):
    """Ranges of t, end to end from 2 to T, at most K of them: every term is drawn, none twice."""
    ranges = evaluate.strata(T, K)
    assert [t for a, b in ranges for t in range(a, b + 1)] == list(range(2, T + 1))
    assert len(ranges) <= K


def test_eq05_stratified_estimate_is_unbiased():
    """T = 6: the mean of the estimate over every possible draw of times is the sum of all terms.

    Exact: seeds are tried until each draw has come. Kills: a stratum's weight other than its length,
    L_0 left to chance."""
    s, x0, T = ddpm.make_schedule(6), torch.randint(256, (1, 3)).to(F64) / 127.5 - 1, 6
    noise = lambda times: randn(int(times), 1, 3)
    seen = []

    def model(x, t):
        seen.append(int(t))
        return 0.3 * x

    def term(t: int) -> torch.Tensor:
        times = torch.tensor([t])
        x_t = ddpm.q_sample(s, x0, times, noise(times))
        return ddpm.vlb_term(s, x0, x_t, times, ddpm.p_mean_variance(ddpm.Model(s, model), x_t, times))
    L_0, want = term(1), ddpm.prior_kl(s, x0) + sum(term(t) for t in range(1, T + 1))
    for K in (1, 2, 3, 5):
        drawn, draws = {}, math.prod(b - a + 1 for a, b in evaluate.strata(T, K))
        for seed in range(200):
            seen.clear()
            bound = evaluate.estimate(ddpm.Model(s, model), x0, [5], seed, K, noise)
            drawn[tuple(seen)] = bound.sum(1)
            assert seen[0] == 1
            torch.testing.assert_close(bound[:, 2], L_0)
            if len(drawn) == draws:
                break
        assert len(drawn) == draws
        torch.testing.assert_close(sum(drawn.values()) / draws, want, rtol=1e-10, atol=0)


def rate_distortion(curve, images) -> list[list[float]]:
    """The rows of the file that evaluate.py writes of this curve; its plot has no place to go to."""
    table = io.BytesIO()
    evaluate.rate_distortion(curve, images, Path("images.pt/x.png"), table)
    names, *rows = table.getvalue().decode().splitlines()
    assert names == "t,rate_bits_per_dim,distortion_rmse"
    return [[float(x) for x in row.split(",")] for row in rows]


def test_standard_error_and_rmse_by_hand():
    """Mean 2, deviation √2, error √2/√2; the RMSE of a set is the root of the mean square.

    Kills: a deviation called standard error, the mean of the images' RMSEs."""
    assert evaluate.spread(torch.tensor([1.0, 3.0], dtype=F64)) == "2.000000 ± 1.000000"
    assert evaluate.spread(torch.tensor([1.5], dtype=F64)) == "1.500000"
    curve = torch.tensor([[[1.0, 3.0]], [[2.0, 4.0]]], dtype=F64) * math.log(2)
    (t, rate, rmse), = rate_distortion(curve, torch.zeros(2, 1, 1, 1, dtype=torch.uint8))
    assert t == 1 and rate == pytest.approx(1.5)
    assert rmse == pytest.approx(math.sqrt(12.5) * math.log(2), abs=1e-4)


def times_of(seed: int, index: list[int], K: int = 4) -> list[tuple[int, ...]]:
    """The times of the K + 1 terms that `estimate` draws for each image."""
    def model(x, t):
        seen.append(t.tolist())
        return torch.zeros_like(x)
    seen: list[list[int]] = []
    evaluate.estimate(ddpm.Model(ddpm.make_schedule(1000), model), torch.zeros(len(index), 3), index, seed, K,
                      lambda t: torch.zeros(len(index), 3))
    return list(zip(*seen))


def test_times_are_a_function_of_seed_image_and_stratum():
    """An image has the same times in every batch; another image, seed or stratum has others. They
    stay the same in later versions, so that a published estimate can be had again.

    The last is seen in the place that a time has in its stratum, from 0 to 1, in the two longest: one
    draw for both would give almost the same places."""
    assert times_of(0, [0, 1]) == [(1, 6, 19, 79, 373), (1, 5, 22, 179, 736)]
    a, b = times_of(0, [3, 8])
    assert times_of(0, [8, 3, 8]) == [b, a, b]
    assert len({a, b, *times_of(1, [3, 8]), *times_of(0, [4, 9])}) == 6
    for first, *rest in (a, b):
        assert first == 1 and all(x <= t <= y for t, (x, y) in zip(rest, evaluate.strata(1000, 4)))
    places = [[(t - x) / (y - x) for t, (x, y) in zip(times[3:], evaluate.strata(1000, 4)[2:])]
              for times in times_of(0, list(range(20)))]
    assert sum(abs(one - other) > 0.05 for one, other in places) > 10


@pytest.mark.parametrize("clip", [True, False])
def test_estimate_by_hand(clip):
    """Each term at its time, with x_t of its own noise, and x̂_0 clipped or not, as is asked for.

    Kills: the noise of another image, seed or time; a choice that is not passed on."""
    s, index, x0 = ddpm.make_schedule(1000), [7, 2], torch.tensor([[-1, 0.2, 1], [0.6, -0.2, 0]])
    times = list(zip(*times_of(5, index)))
    lengths = [1] + [b - a + 1 for a, b in evaluate.strata(1000, 4)]
    model, terms = ddpm.Model(s, lambda x, t: 3 * x, clip=clip), []
    for length, ts in zip(lengths, times):
        bar = s.alpha_bars[list(ts)].float()[:, None]
        eps = torch.cat([Noise(5, [i], (3,))(t) for i, t in zip(index, ts)])
        x_t, t = bar.sqrt() * x0 + (1 - bar).sqrt() * eps, torch.tensor(ts)
        p = ddpm.p_mean_variance(model, x_t, t)
        terms.append(length * ddpm.vlb_term(s, x0, x_t, t, p))
    bound = evaluate.estimate(model, x0, index, 5, 4, Noise(5, index, (3,)))
    torch.testing.assert_close(bound[:, 0], ddpm.prior_kl(s, x0))
    torch.testing.assert_close(bound[:, 1], sum(terms[1:]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bound[:, 2], terms[0], rtol=1e-4, atol=1e-5)


def test_estimate_of_one_step_has_no_middle():
    """T = 1: the bound is L_T + L_0."""
    s = ddpm.schedule_from_betas(torch.tensor([0.9], dtype=F64))
    bound = evaluate.estimate(ddpm.Model(s, lambda x, t: x), torch.zeros(2, 3), [0, 1], 0, 5,
                              lambda t: torch.zeros(2, 3))
    assert bound[:, 1].tolist() == [0, 0] and (bound[:, 2] > 0).all()


@pytest.mark.parametrize("T, steps", [(1000, [1000, 900, 800, 500, 100]), (20, [20, 18, 16, 10, 2]),
                                      (3, [3, 2, 1]), (1, [1])])
def test_table_4_is_rows_of_the_file(capsys, T, steps):
    """Reverse steps T, 0.9 T, 0.8 T, 0.5 T and 0.1 T from the last, rounded, none twice.

    Reverse step k is row k of the file. The line above has the numbers of its last row."""
    rows = rate_distortion(randn(T, 4, T, 2).abs(), torch.zeros(4, 3, 2, 2, dtype=torch.uint8))
    first, *lines = capsys.readouterr().out.splitlines()
    assert [row[0] for row in rows] == list(range(T, 0, -1))
    table = [[float(x) for x in line.split()] for line in lines if line.strip()[0].isdigit()]
    assert [int(row[0]) for row in table] == steps
    for step, rate, rmse in table:
        assert rate == pytest.approx(rows[int(step) - 1][1], abs=6e-6)
        assert rmse == pytest.approx(rows[int(step) - 1][2], abs=6e-3)
    numbers = [float(x) for x in re.findall(r"\d+\.\d+", first)]
    assert numbers == pytest.approx(rows[-1][1:], abs=6e-5)


def test_plot_of_rate_and_distortion(capsys):
    """Figure 5: distortion over rate, the numbers of the file. The figure is looked at when it is saved."""
    Figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed").Figure
    figures, table = [], io.BytesIO()
    with when_called({Figure.savefig: lambda frame: figures.append(frame.f_locals["self"])}):
        evaluate.rate_distortion(randn(0, 4, 20, 2).abs(), torch.zeros(4, 3, 2, 2, dtype=torch.uint8),
                                 Path("there/x.png"), table)
    assert Path("there/x.png").stat().st_size > 1000 and not capsys.readouterr().err
    rows = [[float(x) for x in row.split(",")] for row in table.getvalue().decode().splitlines()[1:]]
    axes, = figures[0].axes
    line, = axes.lines
    for i, values in enumerate((line.get_xdata(), line.get_ydata()), 1):
        assert list(values) == pytest.approx([row[i] for row in rows], abs=6e-6)
    assert "rate" in axes.get_xlabel() and "distortion" in axes.get_ylabel()


def test_a_plot_that_fails_is_one_line(capsys):
    """Which does not recommend the matplotlib that is there."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    Path("folder.png").mkdir()
    evaluate.rate_distortion(randn(0, 4, 20, 2).abs(), torch.zeros(4, 3, 2, 2, dtype=torch.uint8), Path("folder.png"), io.BytesIO())
    assert "folder.png" in (err := capsys.readouterr().err) and "pip" not in err and err.count("\n") == 1


def test_without_matplotlib_a_line_says_what_is_missing(capsys):
    """The numbers are there all the same."""
    hidden = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "matplotlib"}
    sys.modules["matplotlib"] = None
    try:
        assert len(rate_distortion(randn(0, 4, 20, 2).abs(), torch.zeros(4, 3, 2, 2, dtype=torch.uint8))) == 20
    finally:
        del sys.modules["matplotlib"]
        sys.modules.update(hidden)
    assert "pip install matplotlib" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- FID, IS

def features(mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Points whose mean is exactly `mean` and covariance exactly root rootᵀ (rank ≤ its
    columns)."""
    k = root.shape[1]
    z = torch.cat([torch.eye(k, dtype=F64), -torch.eye(k, dtype=F64)]) * math.sqrt((2 * k - 1) / 2)
    return mean + z @ root.T


@given(st.integers(0, 999), st.integers(1, 6))
def test_frechet_distance_of_commuting_covariances(seed, k):
    """With common eigenvectors: ‖μ_a − μ_b‖² + Σ (√λ_a − √λ_b)², some λ zero: rank-deficient too.

    Kills: the covariance divided by N, tr C instead of the root's, a root that needs full rank."""
    basis = torch.linalg.qr(randn(seed, 6, 6)).Q
    la, lb = randn(seed + 1, 6).abs(), randn(seed + 2, 6).abs()
    la[k:] = 0
    ma, mb = randn(seed + 3, 6), randn(seed + 4, 6)
    a, b = features(ma, basis * la.sqrt()), features(mb, basis * lb.sqrt())
    want = ((ma - mb) ** 2).sum() + ((la.sqrt() - lb.sqrt()) ** 2).sum()
    assert evaluate.frechet_distance(a, b) == pytest.approx(want.item(), rel=1e-9)
    assert evaluate.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert evaluate.frechet_distance(a[:3], b) == pytest.approx(evaluate.frechet_distance(b, a[:3]))


@given(st.floats(0, math.pi), st.floats(0.1, 4), st.floats(0.1, 4))
def test_frechet_distance_of_a_rotation(angle, p, q):
    """C_b is C_a = diag(p, q) turned: tr (C_a C_b)^½ by the 2×2 formula √(tr M + 2 √det M)."""
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, -s], [s, c]], dtype=F64)
    root = torch.diag(torch.tensor([p, q], dtype=F64).sqrt())
    zero = torch.zeros(2, dtype=F64)
    m = root @ root @ turn @ root @ root @ turn.T
    want = 2 * (p + q) - 2 * math.sqrt(m.trace() + 2 * math.sqrt(max(torch.linalg.det(m).item(), 0)))
    got = evaluate.frechet_distance(features(zero, root), features(zero, turn @ root))
    assert got == pytest.approx(want, rel=1e-8, abs=1e-8)


def test_frechet_distance_of_few_images():
    """More dimensions than images is fine; one image is an error, not a number."""
    a, b = randn(0, 5, 40), randn(1, 300, 40)
    assert evaluate.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert evaluate.frechet_distance(a, b) > 0
    with pytest.raises(ValueError, match="two images"):
        evaluate.frechet_distance(a[:1], b)


def test_frechet_distance_of_two_images_by_hand():
    """Features 0, 2 and 1, 5: means 1 and 3, variances 2 and 8, so 2² + (√2 − √8)² = 6."""
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    assert evaluate.frechet_distance(a, b) == pytest.approx(6)
    assert evaluate.frechet_distance(a.repeat(1, 3), b.repeat(1, 3)) == pytest.approx(18)


def test_inception_score_of_uniform_and_of_one_hot():
    """No information: 1. Every class equally often and surely: the number of classes."""
    uniform, sure = torch.full((40, 8), 1 / 8), torch.eye(8).repeat(10, 1)
    assert evaluate.inception_score(uniform) == pytest.approx((1, 0))
    assert evaluate.inception_score(sure) == pytest.approx((8, 0))
    mixed = torch.cat([sure[:40], uniform])                   # splits 0 … 4 are sure, the rest not
    mean, deviation = evaluate.inception_score(mixed)
    assert mean == pytest.approx(4.5) and deviation == pytest.approx(3.5)
    assert evaluate.inception_score(sure[:10]) == (1, 0)      # a split of one image knows no other


# --------------------------------------------------------------------------------- the command


@pytest.fixture
def network():
    """The network instead of Inception, and 30 samples; no network was trained."""
    torch.save(data.shapes(30, 8, "test"), "made.pt")
    torch.jit.script(Inception()).save("inception.pt")


@pytest.fixture
def run(network):
    """The same, and a run whose networks are random."""
    return random_run()


SCORE = "--fid --inception inception.pt --samples made.pt --dataset images.pt --device cpu".split()


def score(capsys, *flags) -> tuple[float, str, str]:
    """Runs the command: the FID, and what is said on stdout and stderr."""
    assert evaluate.main([*SCORE, *flags]) == 0
    out, err = capsys.readouterr()
    return float(out.split("FID ")[1].split()[0]), out.split("FID ")[1], err


def test_inception_network_is_fetched_once_and_checked(network, server, monkeypatch, capsys):
    """Its file is code: without the right checksum it is not even opened, or the error would be that
    of a file which is no TorchScript."""
    raw = Path("inception.pt").read_bytes()
    server.files["/some/net.pt"] = raw
    address, sha256 = server.address + "/some/net.pt", hashlib.sha256(raw).hexdigest()
    monkeypatch.setattr(evaluate, "INCEPTION", (address, sha256))
    for _ in range(2):
        net = evaluate.load_inception(None, "folder", CPU)
        assert Path("folder/net.pt").read_bytes() == raw and not net.training
    x = data.shapes(3, 8)
    assert torch.equal(net(x, return_features=True), Inception()(x, return_features=True))
    assert server.asked == ["/some/net.pt"]
    assert evaluate.main([*(x for x in SCORE if "inception" not in x), "--data-dir", "new"]) == 0
    assert Path("new/net.pt").read_bytes() == raw
    for other in (raw + b"more", b"no TorchScript"):
        Path("folder/net.pt").write_bytes(other)
        with pytest.raises(ValueError, match="net.pt.*wrong SHA-256"):
            evaluate.load_inception(None, "folder", CPU)
    server.files["/some/net.pt"] = raw + b"more"
    with pytest.raises(OSError, match="net.pt"):
        evaluate.load_inception(None, "other", CPU)
    assert not list(Path("other").iterdir())


def test_inception_network_that_is_named(network, tmp_path):
    """It is opened without a warning. If it is not there, or a folder, nothing is fetched."""
    file = str(tmp_path / "inception.pt")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        net = evaluate.load_inception(file, "nowhere", CPU)
    assert not net.training and not seen and not Path("nowhere").exists()
    for bad in ("none.pt", str(tmp_path)):
        with pytest.raises(ValueError, match=re.escape(bad)):
            evaluate.load_inception(bad, "nowhere", CPU)


class WithoutFlags(torch.nn.Module):
    def forward(self, img):
        return img.float().mean([2, 3])


class Logits(Inception):
    def forward(self, img, return_features: bool = False, no_output_bias: bool = False):
        return img.to(torch.float32).mean([2, 3])


class Integers(Inception):
    def forward(self, img, return_features: bool = False, no_output_bias: bool = False):
        return img.to(torch.int64).sum([2, 3])


class OneRow(Inception):
    def forward(self, img, return_features: bool = False, no_output_bias: bool = False):
        return torch.softmax(img.to(torch.float32).mean([0, 2, 3]), 0)[None]


@pytest.mark.parametrize("kind, said", [(WithoutFlags, "expected at most 2"), (Logits, "no_output_bias does not give probabilities"),
                                        (Integers, "return_features does not give"), (OneRow, "return_features does not give")])
def test_another_network_than_inception_is_refused(kind, said, network, capsys):
    """Its score would be a number, or the error one of TorchScript."""
    torch.jit.script(kind()).save("other.pt")
    assert evaluate.main([*SCORE, "--inception", "other.pt"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not Inception" in line and said in line and "unexpected" not in line


def test_fid_needs_two_images_and_the_inception_score_ten(network, capsys):
    """On either side, whatever the size of the batches."""
    for made, images in ((2, 5), (5, 2), (9, 5), (10, 5)):
        torch.save(data.shapes(made, 8, "test"), "made.pt")
        torch.save(data.shapes(images, 8), "images.pt")
        fid, out, err = score(capsys)
        assert fid > 0 and ("Inception score" in out) == (made == 10)
        assert f"{images}/{images}" in err and f"{made}/{made}" in err
        again, text, _ = score(capsys, "--batch-size", "2")
        assert again == pytest.approx(fid, abs=2e-4) and text.count("\n") == out.count("\n")
    for made, images in ((1, 5), (5, 1)):
        torch.save(data.shapes(made, 8, "test"), "made.pt")
        torch.save(data.shapes(images, 8), "images.pt")
        assert evaluate.main(SCORE) == 1


@pytest.mark.parametrize("shape", [(3, 8, 4), (3, 4, 8), (1, 4, 4)])
def test_samples_and_images_must_have_one_size(network, capsys, shape):
    torch.save(torch.zeros(5, *shape, dtype=torch.uint8), "made.pt")
    assert evaluate.main(SCORE) == 1
    assert str(shape) in capsys.readouterr().err


def test_below_50000_images_on_either_side_there_is_a_warning(network, capsys):
    """With 50,000 on both sides there is none; else it says how many there are."""
    images = torch.randint(256, (50_000, 3, 1, 1), dtype=torch.uint8)
    for made, real in ((50_000, 50_000), (49_999, 50_000), (50_000, 49_999)):
        torch.save(images[:made].clone(), "made.pt")
        torch.save(images[:real].clone(), "images.pt")
        err = score(capsys, "--batch-size", "50000")[2]
        warned = [line for line in err.splitlines() if "50,000" in line]
        assert len(warned) == (min(made, real) < 50_000)
        assert not warned or [f"{made}", f"{real}"] == re.findall(r"(?<!,)\b\d{5}\b", warned[0])


def test_the_line_of_the_fid_names_the_split_and_the_counts(network, capsys):
    """Samples, their bits, images: MNIST has two parts; grey images are repeated to three channels,
    and progress ends at the number of images."""
    torch.save(torch.load("made.pt")[:, :1].repeat(1, 1, 4, 4), "made.pt")
    Path("data/mnist").mkdir(parents=True)
    for name, n in (("train", 3), ("t10k", 4)):
        Path(f"data/mnist/{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(
            struct.pack(">IIII", 2051, n, 28, 28) + bytes(i % 251 for i in range(n * 784))))
    for flags, split, n in ((["--split", "test"], "test", 4), ([], "train", 3)):
        _, out, err = score(capsys, "--dataset", "mnist", *flags)
        counts = [int(x) for x in re.findall(r"\b\d+\b", out.split("(")[1].split(")")[0])]
        assert counts[:3] == [30, 8, n] and split in out.splitlines()[0]
        assert "30/30" in err and f"{n}/{n}" in err


@pytest.mark.parametrize("flags", ["--steps 4 --seed 4 --no-clip --precision fp32",
                                   "--steps 2 --no-ema --precision bf16"])
def test_samples_drawn_here_are_those_of_sample_py(run, capsys, flags):
    """The same flags give the same images to the bit, in batches of the size that is asked for, and
    the same words about them."""
    made, batches = [], []
    flags = f"{flags} --n 3 --device cpu --batch-size 2".split()
    with hooked(UNet, lambda net, x: batches.append(len(x[0]))), hooked(
            torch.jit.ScriptModule, lambda net, x: made.append(x[0])):
        assert sample.main([*flags, "--out", "want.pt"]) == 0
        about = "DDIM" + capsys.readouterr().err.split("DDIM")[1].splitlines()[0]
        alone, steps = batches.copy(), int(flags[1])
        assert evaluate.main([*flags, "--fid", "--inception", "inception.pt"]) == 0
    assert batches == 2 * alone and alone == steps * [2] + steps * [1]
    samples = torch.load("want.pt")                            # each batch is looked at twice
    assert torch.equal(made[0], torch.load("images.pt")[:2])   # Inception is tried before anything is drawn
    assert torch.equal(made[2], samples[:2]) and torch.equal(made[4], samples[2:])
    err = capsys.readouterr().err
    assert "3/3" in err and about in err


@pytest.mark.parametrize("flags, parts", [
    ("--samples a.pt", "--samples --fid"), ("--inception a.pt", "--inception --fid"), ("--steps 3", "--steps --fid"),
    ("--fid --terms 3", "--terms --fid"), ("--fid --samples a.pt --steps 3", "--steps --samples"),
    ("--fid --samples a.pt --n 3", "--n --samples"), ("--split valid", "--split valid"), ("--n 0", "--n 0"),
    ("--terms 0", "--terms 0"), *((f"--fid {flag} ''", f"{flag} blank") for flag in ("--samples", "--inception")),
    ("--out ''", "--out blank")])
def test_flags_that_contradict_each_other(capsys, flags, parts):
    """Or that are out of range: the line names them, and the status is 2."""
    assert evaluate.main(shlex.split(flags)) == 2
    line = said(capsys)
    assert all(part in line for part in parts.split()) and "unexpected" not in line, line


def test_defaults_of_the_flags(capsys):
    """Bits/dim: in 32 bits unless another format is asked for."""
    def chosen(flags):
        args = evaluate.parse(flags.split())
        return args.precision
    assert chosen("") == "fp32" and chosen("--precision bf16") == "bf16"
    assert chosen("--fid") is None and chosen("--fid --precision fp16") == "fp16"
    assert evaluate.main(["--help"]) == 0
    assert evaluate.__doc__.strip() in capsys.readouterr().out


def test_bits_per_dim_command(run, capsys):
    """Parts and their sum, rate and distortion for every t; the estimate agrees with all terms.

    Kills: a rate that is not accumulated, strata whose weights are wrong."""
    assert evaluate.main("--n 16 --device cpu --out curves".split()) == 0
    out = capsys.readouterr().out
    total = float(out.split("bits/dim ≤ ")[1].split()[0])
    parts = [float(out.split(name + " ")[1].split()[0]) for name in ("L_T", "L_{T−1}", "L_0")]
    assert total == pytest.approx(sum(parts), abs=1e-4)
    rows = Path("curves/rate-distortion.csv").read_text().splitlines()
    assert rows[0] == "t,rate_bits_per_dim,distortion_rmse" and len(rows) == 21
    assert [int(row.split(",")[0]) for row in rows[1:]] == list(range(20, 0, -1))
    rates = [float(row.split(",")[1]) for row in rows[1:]]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(sum(parts[:2]), abs=1e-5)
    assert float(rows[-1].split(",")[2]) < float(rows[1].split(",")[2])

    assert evaluate.main("--n 16 --terms 6 --device cpu".split()) == 0
    out = capsys.readouterr().out
    estimate, error = (float(x) for x in out.split("bits/dim ≤ ")[1].split()[:3:2])
    assert abs(estimate - total) < 5 * error
    assert evaluate.main("--terms 19 --n 4 --no-clip --no-ema --device cpu".split()) == 0
    calls = len(evaluate.strata(20, 19)) + 1
    assert {str(calls - 1), str(calls)} <= set(capsys.readouterr().out.split())
    assert evaluate.main("--terms 20 --n 4 --device cpu".split()) == 2 and "--terms 20" in said(capsys)


def bound_by_hand(net, x0, z, clip=True):
    """The terms of Eq. 5 along one chain, by Eqs. 5, 7, 13 and 15 alone: nats, and the RMSE of x̂_0.

    x0: (N, …), z(t): the noise with which x_t is drawn; T = 20, σ_t² = β_t, and σ_1² = β̃_2.
    """
    bar = alpha_bars(T)
    phi = torch.special.log_ndtr
    x = bar[T].sqrt() * x0 + (1 - bar[T]).sqrt() * z(T)
    each = (bar[T] * x0 ** 2 + (1 - bar[T]) - 1 - (1 - bar[T]).log()) / 2
    terms, rmse = [each.flatten(1).sum(1)], []
    for t in range(T, 0, -1):
        a, b = bar[t], bar[t - 1]
        beta, alpha = 1 - a / b, a / b
        x0_hat = (x - (1 - a).sqrt() * net(x.float(), torch.full((len(x),), t)).double()) / a.sqrt()
        x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
        rmse.append(((x0 - x0_hat) * 127.5).square().flatten(1).mean(1).sqrt())

        def mean(x0):
            return (b.sqrt() * beta * x0 + alpha.sqrt() * (1 - b) * x) / (1 - a)
        if t > 1:
            true = beta * (1 - b) / (1 - a)
            each = ((beta / true).log() + (true + (mean(x0) - mean(x0_hat)) ** 2) / beta - 1) / 2
            x = mean(x0) + true.sqrt() * z(t - 1)
        else:
            deviation = ((1 - bar[2] / bar[1]) * (1 - bar[1]) / (1 - bar[2])).sqrt()
            above, below = ((x0 + d / 255 - mean(x0_hat)) / deviation for d in (1, -1))
            above[x0 > 0.999], below[x0 < -0.999] = math.inf, -math.inf
            right = above + below > 0  # the same probability is smaller in the left tail
            above, below = torch.where(right, -below, above), torch.where(right, -above, below)
            each = -phi(above) - torch.log1p(-(phi(below) - phi(above)).exp())
        terms.append(each.flatten(1).sum(1))
    return torch.stack(terms), torch.stack(rmse)


@pytest.mark.parametrize("flags", [[], ["--no-clip"], ["--no-ema", "--seed", "2"]])
def test_every_number_of_the_bound_by_hand(run, capsys, flags):
    """All that evaluate.py prints and writes about Eq. 5 and §4.3, from the equations alone.

    Kills: the last weights instead of the averages, x̂_0 (not) clipped, a mean of the RMSEs."""
    images, seed = torch.load("images.pt")[:5], 2 if "--seed" in flags else 0
    x0 = images.double() / 127.5 - 1
    with torch.no_grad():
        terms, rmse = bound_by_hand(
            run["net" if "--no-ema" in flags else "ema"], x0,
            lambda t: torch.cat([Noise(seed, [i], x0.shape[1:])(t) for i in range(5)]).double(),
            "--no-clip" not in flags)
    bits = terms / (3 * 8 * 8 * math.log(2))
    assert evaluate.main(["--n", "5", "--batch-size", "2", "--device", "cpu", *flags]) == 0
    out = capsys.readouterr().out
    printed = {name: [float(x) for x in out.split(name)[1].split()[:3:2]]
               for name in ("bits/dim ≤", "L_T  ", "L_1 + … + L_{T−1}", "L_0  ")}
    for name, column in zip(printed, (bits.sum(0), bits[0], bits[1:-1].sum(0), bits[-1])):
        want = [column.mean().item(), column.std().item() / 5 ** 0.5]
        assert printed[name] == pytest.approx(want, rel=2e-4, abs=2e-6), name
    rows = [[float(x) for x in row.split(",")]
            for row in Path("rate-distortion.csv").read_text().splitlines()[1:]]
    rate = bits[:-1].mean(1).cumsum(0)
    error = rmse.square().mean(1).sqrt()
    for i, (t, r, d) in enumerate(rows):
        assert t == 20 - i
        assert r == pytest.approx(rate[i].item(), rel=2e-4, abs=2e-6)
        assert d == pytest.approx(error[i].item(), rel=1e-3)


def in_two_processes(job) -> None:
    """job() in two real processes, which torchrun's variables join. They are copies of this one, so
    that they start at once; what they print goes into the files out-0 and out-1."""
    if not hasattr(os, "fork"):
        pytest.skip("Windows copies no processes")
    port, children = free_port(), []
    for rank in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: other threads are not copied
            child = os.fork()
        if not child:
            status = 99
            try:
                signal.alarm(120)
                os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                with open(f"out-{rank}", "w") as out, contextlib.redirect_stdout(out):
                    status = job()
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


@pytest.mark.parametrize("flags", ["--n 5 --seed 1 --batch-size 2", "--n 5 --seed 1 --batch-size 2 --terms 3",
                                   "--fid --inception inception.pt --samples made.pt --batch-size 2"])
def test_two_processes_print_what_one_prints(run, capsys, flags):
    """Bits/dim of five images, rate and distortion, FID and Inception score: each process computes a
    half, in batches of its own, and only the first one prints and writes."""
    torch.save(data.shapes(11, 8), "made.pt")

    def numbers(text: str, folder: str) -> list[float]:
        table = Path(folder, "rate-distortion.csv")
        text = text.split("\n", 1)[1] + (table.read_text() if table.exists() else "")
        table.unlink(missing_ok=True)
        return [float(x) for x in re.findall(r"\d+\.\d+", text)]

    def job() -> int:  # in a folder of its own, with links to all that is here
        folder, files = Path(f"rank-{os.environ['RANK']}"), ("images.pt", "made.pt", "inception.pt", "runs")
        folder.mkdir()
        for name in files:
            (folder / name).symlink_to(Path(name).resolve())
        os.chdir(folder)
        return evaluate.main(words)
    words = [*flags.split(), "--device", "cpu"]
    assert evaluate.main(words) == 0
    one = numbers(capsys.readouterr().out, ".")
    in_two_processes(job)
    assert not Path("out-1").read_text() and not Path("rank-1/rate-distortion.csv").exists()
    assert len(one) >= 3 and numbers(Path("out-0").read_text(), "rank-0") == pytest.approx(one, rel=1e-4, abs=2e-4)
    with pytest.raises(ValueError):
        evaluate.inception_outputs(None, data.shapes(1, 8), CPU._replace(rank=1, world=2), 2, "")


def test_fid_and_inception_score_by_hand(run, capsys):
    """What is printed, from the network's outputs: the distance by eigenvalues, the score by loops.

    Kills: class probabilities with the output bias, one marginal for all splits, the covariances
    divided by N, samples and images exchanged for others."""
    flags = "--fid --inception inception.pt --device cpu --samples made.pt"
    assert evaluate.main(flags.split()) == 0
    out = capsys.readouterr().out
    net = Inception()
    made, images = torch.load("made.pt"), torch.load("images.pt")
    a, b = (net(x, return_features=True).double() for x in (made, images))
    C, D = ((x - x.mean(0)).T @ (x - x.mean(0)) / (len(x) - 1) for x in (a, b))
    roots = torch.linalg.eigvals(C @ D).real.clamp(min=0).sqrt().sum()
    fid = (a.mean(0) - b.mean(0)).square().sum() + C.trace() + D.trace() - 2 * roots
    assert float(out.split("FID ")[1].split()[0]) == pytest.approx(fid.item(), abs=2e-4)
    p, scores = net(made, no_output_bias=True).double(), []
    for i in range(10):
        part = p[3 * i:3 * i + 3]
        marginal = part.sum(0) / 3
        kl = [sum((q * (q / m).log()).item() for q, m in zip(row, marginal)) for row in part]
        scores.append(math.exp(sum(kl) / 3))
    mean = sum(scores) / 10
    deviation = (sum((x - mean) ** 2 for x in scores) / 10) ** 0.5
    text = out.split("Inception score ")[1]
    assert float(text.split()[0]) == pytest.approx(mean, abs=6e-4)
    assert float(text.split()[2]) == pytest.approx(deviation, abs=6e-4)


def test_fid_of_a_set_and_itself_is_0(network, capsys):
    """And of others it is not."""
    torch.save(torch.load("images.pt"), "same.pt")
    assert score(capsys, "--samples", "same.pt")[0] < 1e-4 < score(capsys)[0]


KINDS = {"bound": "--n 4", "estimate": "--n 4 --terms 3", "fid": "--n 12 --fid --inception inception.pt",
         "samples": "--fid --inception inception.pt --samples made.pt"}
CHANGES = {  # the flags, and the kinds of evaluation whose numbers they change
    "--seed 4": {"bound", "estimate", "fid"}, "--no-clip": {"bound", "estimate", "fid"},
    "--no-ema": {"bound", "estimate", "fid"}, "--n 11": {"bound", "estimate", "fid"}, "--steps 3": {"fid"},
    "--terms 4": {"bound", "estimate"}, "--inception inception-2.pt": {"fid", "samples"},
    "--samples more.pt": {"samples"}, "--fid": {"bound"}, "--dataset other.pt": {*KINDS}}
NOTHING = ("--batch-size 3", "--device cpu", "--precision fp32", "--checkpoint runs/images/checkpoint.pt", "--out there",
           "--no-compile", "--compile")
MODES = {"bound": "bits/dim", "estimate": "bits/dim with --terms", "fid": "--fid", "samples": "--fid of --samples"}
PARTS = ("--data-dir there", "--split other", "--skip-bad")
BESIDE = {"--samples more.pt": {"fid"}, "--fid": {"estimate"}}  # they change what is evaluated, and --n or --terms


def refused(kind: str, words: str) -> bool:
    """Whether evaluate.py says of this flag that it has no effect on this kind."""
    flag = words.split()[0].removeprefix("--").replace("no-compile", "compile").replace("-", "_")
    changes = flag == "fid" or flag == "terms" and kind == "bound"
    return kind in BESIDE.get(words, ()) or not changes and flag not in evaluate.READS[MODES[kind]].split()


@pytest.mark.parametrize("kind", KINDS)
def test_every_choice_reaches_every_number(run, monkeypatch, capsys, kind):
    """Each flag of evaluate.py changes the numbers that it must, is refused where it has no meaning,
    and changes no other; samples that are there already have their choices behind them. The flags
    are read off its own parser, so that a new one without a line above fails.

    Kills: a choice that the bound follows and the FID does not, or the reverse."""
    def numbers(*flags) -> list[str]:
        assert evaluate.main([*f"--device cpu {precision} {KINDS[kind]}".split(), *" ".join(flags).split()]) == 0
        return re.findall(r"\d+\.\d{3,}", "".join(capsys.readouterr().out.splitlines(True)[1:]))
    precision = "" if kind == "samples" else "--precision fp32"
    monkeypatch.setattr(machine, "BACKEND", "eager")
    torch.save(torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8), "other.pt")
    torch.save(data.shapes(30, 8), "more.pt")
    torch.jit.script(Inception(2.0)).save("inception-2.pt")
    known, base = flags_of(evaluate.main) - {"--help"}, numbers()
    assert base and known == set(re.findall("--[a-z-]+", " ".join((*CHANGES, *NOTHING, *PARTS))))
    for words in (*CHANGES, *NOTHING):
        if refused(kind, words):
            assert evaluate.main([*KINDS[kind].split(), *words.split()]) == 2, words
            continue
        more = "--inception inception.pt" if words == "--fid" else ""
        found = numbers(words, more)
        close = len(found) == len(base) and [float(x) for x in found] == pytest.approx([float(x) for x in base], rel=2e-4)
        assert close == (kind not in CHANGES.get(words, ())), (words, base, found)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_of_the_folder_and_the_part_that_are_asked_for(network, capsys, kind):
    """MNIST lies in data/ and in another folder, and has two parts: the test images are the default of
    the bound, the training images of FID."""
    random_run(in_channels=1, image_size=32)
    torch.save(torch.load("made.pt")[:12, :1].repeat(1, 1, 4, 4), "made.pt")
    for i, folder in enumerate(("data", "there")):
        Path(folder, "mnist").mkdir(parents=True)
        for j, name in enumerate(("train", "t10k")):
            pixels = bytes((k * (3 + i + 2 * j) + k // 28 * 7) % 251 for k in range(3 * 784))
            Path(folder, "mnist", f"{name}-images-idx3-ubyte.gz").write_bytes(
                gzip.compress(struct.pack(">IIII", 2051, 3, 28, 28) + pixels))
    base = {"bound": "--n 1", "estimate": "--n 1 --terms 2", "fid": "--n 2 --steps 2 --fid --inception inception.pt",
            "samples": KINDS["samples"]}[kind]

    def numbers(*flags) -> list[str]:
        precision = "" if kind == "samples" else "--precision fp32"
        assert evaluate.main([*f"--device cpu {precision} --dataset mnist {base}".split(), *flags]) == 0
        return re.findall(r"\d+\.\d{3,}", capsys.readouterr().out.split("\n", 1)[1])
    usual, other = ("test", "train") if kind in ("bound", "estimate") else ("train", "test")
    found = [numbers(*flags) for flags in ([], ["--data-dir", "there"], ["--split", other])]
    assert len(set(map(tuple, found))) == 3
    assert kind in ("bound", "fid") or numbers("--split", usual, "--data-dir", "data") == found[0]


@pytest.mark.parametrize("flags", ["--split test", "--skip-bad"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_these_data_have_not_cannot_be_chosen(run, capsys, kind, flags):
    """A .pt file has no splits and no pictures that cannot be read; a folder without train/ has no
    splits. Its flag has an effect where it has: see test_data.py."""
    assert evaluate.main(f"{KINDS[kind]} --dataset images.pt {flags}".split()) == 2
    assert flags.split()[0] in said(capsys)
    Path("pictures").mkdir()
    if "split" in flags:
        assert evaluate.main(f"{KINDS[kind]} --dataset pictures {flags}".split()) == 2
        assert "--split test: pictures has no splits" in said(capsys)


@pytest.mark.parametrize("flags, parts", [
    ("--fid --inception cut.pt --samples made.pt", "cut.pt"), ("--fid --inception cut.pt --n 2", "cut.pt"),
    ("--fid --inception made.pt --samples made.pt", "made.pt"), ("--fid --inception none.pt --samples made.pt", "none.pt"),
    ("--fid --inception inception.pt --samples nan.pt", "nan.pt"), ("--fid --samples none.pt", "none.pt"),
    ("--fid --inception inception.pt --samples one.pt", "1"),
    ("--dataset grey.pt", "grey.pt (1,"), ("--n 65", "65 64"), ("--out file", "file"),
    ("--out curve.csv", "curve.csv folder")])
def test_mistakes_are_one_line(run, capsys, flags, parts):
    """A cut Inception file, one that is none or not there, samples that are no images or not there, one
    sample, grey against colour, more images than there are, a place that cannot be written. Those
    that need no network are noticed before any is called, and nothing is written."""
    Path("cut.pt").write_bytes(Path("inception.pt").read_bytes()[:2000])
    torch.save(torch.rand(4, 3, 8, 8) * math.nan, "nan.pt")
    torch.save(data.shapes(1, 8), "one.pt")
    torch.save(data.shapes(3, 8)[:, :1], "grey.pt")
    Path("file").write_bytes(b"")
    calls, before = [], sorted(Path().rglob("*"))
    with hooked(UNet, lambda *_: calls.append(1)):
        assert evaluate.main(["--device", "cpu", *flags.split()]) == 1 + (flags in ("--n 65", "--out curve.csv")) and not calls
    line = said(capsys)
    assert all(part in line for part in parts.split()) and "unexpected" not in line, line
    assert sorted(Path().rglob("*")) == before
