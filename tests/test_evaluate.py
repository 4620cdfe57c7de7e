"""Table 1's numbers: an unbiased estimate, the Fréchet distance, the Inception score."""
import gzip
import hashlib
import math
import os
import re
import struct
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import common
import data
import ddpm
import evaluate
import sample
import test_data
import test_pictures
import train

F64 = torch.float64
CPU = common.find_machine("cpu", "fp32")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def randn(seed: int, *shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------- likelihood

@given(st.integers(1, 2000), st.integers(1, 300))
def test_strata_cover_2_to_T_once(T, K):
    """Ranges of t, end to end from 2 to T, at most K of them: every term is drawn, none twice."""
    ranges = evaluate.strata(T, K)
    assert [t for a, b in ranges for t in range(a, b + 1)] == list(range(2, T + 1))
    assert len(ranges) <= K


def test_eq05_stratified_estimate_is_unbiased(monkeypatch):
    """T = 6: the mean of the estimate over every possible draw of times is the sum of all terms.

    Exact, no sampling. Kills: a stratum's weight other than its length, L_0 left to chance."""
    s, x0 = ddpm.make_schedule(6), torch.randint(256, (2, 3)).to(F64) / 127.5 - 1
    model, T = (lambda x, t: 0.3 * x), 6
    monkeypatch.setattr(evaluate, "keyed_noise", lambda seed, index, t, shape, _: torch.stack(
        [randn(1000 * i + u, *shape) for i, u in zip(index, t)]))

    def term(t: int) -> torch.Tensor:
        eps, times = torch.stack([randn(1000 * i + t, 3) for i in (5, 9)]), torch.full((2,), t)
        x_t = ddpm.q_sample(s, x0, times, eps)
        return ddpm.vlb_term(s, x0, x_t, times, ddpm.p_mean_variance(s, model, x_t, times))

    for K in (1, 2, 3, 5):
        ranges = evaluate.strata(T, K)
        combinations = math.prod(b - a + 1 for a, b in ranges)
        total = torch.zeros(2, dtype=F64)
        for n in range(combinations):
            def pick(seed, what, image, k):
                if k == 0:
                    return 0
                before = math.prod(b - a + 1 for a, b in ranges[:k - 1])
                return n // before % (ranges[k - 1][1] - ranges[k - 1][0] + 1)
            monkeypatch.setattr(evaluate, "seed_of", pick)
            bound = evaluate.estimate(s, model, x0, [5, 9], 0, K)
            torch.testing.assert_close(bound.L_0, term(1))
            total += sum(bound)
        want = ddpm.prior_kl(s, x0) + sum(term(t) for t in range(1, T + 1))
        torch.testing.assert_close(total / combinations, want, rtol=1e-10, atol=0)


def test_standard_error_and_rmse_by_hand(tmp_path, monkeypatch, capsys):
    """Mean 2, deviation √2, error √2/√2; the RMSE of a set is the root of the mean square.

    Kills: a deviation called standard error, the mean of the images' RMSEs."""
    assert evaluate.spread(torch.tensor([1.0, 3.0], dtype=F64)) == "2.000000 ± 1.000000"
    curve = torch.tensor([[[1.0, 3.0]], [[2.0, 4.0]]], dtype=F64) * math.log(2)
    images = torch.zeros(2, 1, 1, 1, dtype=torch.uint8)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    evaluate.rate_distortion(curve, images, tmp_path)
    row = (tmp_path / "rate-distortion.csv").read_text().splitlines()[1].split(",")
    assert row[0] == "1" and float(row[1]) == pytest.approx(1.5)
    assert float(row[2]) == pytest.approx(math.sqrt(12.5) * math.log(2), abs=1e-4)


def test_draws_are_keyed_by_seed_image_and_time():
    """The same image at the same t has the same noise in any batch; nothing else shares it."""
    a = evaluate.keyed_noise(0, [3, 4], [7, 8], (5,), "cpu")
    b = evaluate.keyed_noise(0, [9, 4, 3], [8, 8, 8], (5,), "cpu")
    assert torch.equal(a[1], b[1]) and not torch.equal(a[0], b[2])
    c = evaluate.keyed_noise(1, [4], [8], (5,), "cpu")
    assert len(torch.cat([a, b[[0, 2]], c]).unique(dim=0)) == 5


def times_of(seed: int, index: list[int], K: int = 4) -> list[tuple[int, ...]]:
    """The times of the K + 1 terms that `estimate` draws for each image."""
    def model(x, t):
        seen.append(t.tolist())
        return torch.zeros_like(x)
    seen: list[list[int]] = []
    evaluate.estimate(ddpm.make_schedule(1000), model, torch.zeros(len(index), 3), index, seed, K)
    return list(zip(*seen))


def test_times_are_a_function_of_seed_image_and_stratum(monkeypatch):
    """An image has the same times in every batch; another image, seed or stratum has others.

    The last is seen in strata of the same length, where one draw for all gives the same places."""
    a, b = times_of(0, [3, 8])
    assert times_of(0, [8, 3, 8]) == [b, a, b]
    assert len({a, b, *times_of(1, [3, 8]), *times_of(0, [4, 9])}) == 6
    for first, *rest in (a, b):
        assert first == 1 and all(x <= t <= y for t, (x, y) in zip(rest, evaluate.strata(1000, 4)))
    monkeypatch.setattr(evaluate, "strata", lambda T, K: [(2, 101), (102, 201)])
    assert len({t[2] - t[1] for t in times_of(0, list(range(20)))}) > 10


def test_draws_of_a_seed_stay_the_same_in_later_versions():
    """So that a published estimate can be had again."""
    assert times_of(0, [0, 1]) == [(1, 6, 19, 79, 373), (1, 5, 22, 179, 736)]
    noise = evaluate.keyed_noise(0, [0], [1], (3,), "cpu")
    assert noise.flatten().tolist() == pytest.approx([-0.17582, -0.22726, -0.13738], abs=1e-5)


@pytest.mark.parametrize("clip", [True, False])
def test_estimate_by_hand(clip):
    """Each term at its time, with x_t of its own noise, and x̂_0 clipped or not, as is asked for.

    Kills: the noise of another image, seed or time; a choice that is not passed on."""
    s, index, x0 = ddpm.make_schedule(1000), [7, 2], torch.tensor([[-1, 0.2, 1], [0.6, -0.2, 0]])
    times = list(zip(*times_of(5, index)))
    lengths = [1] + [b - a + 1 for a, b in evaluate.strata(1000, 4)]
    terms = []
    for length, ts in zip(lengths, times):
        bar = s.alpha_bars[list(ts)].float()[:, None]
        x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * evaluate.keyed_noise(5, index, ts, (3,), "cpu")
        t = torch.tensor(ts)
        p = ddpm.p_mean_variance(s, lambda x, t: 3 * x, x_t, t, clip=clip)
        terms.append(length * ddpm.vlb_term(s, x0, x_t, t, p))
    bound = evaluate.estimate(s, lambda x, t: 3 * x, x0, index, 5, 4, clip=clip)
    torch.testing.assert_close(bound.L_T, ddpm.prior_kl(s, x0))
    torch.testing.assert_close(bound.L_middle, sum(terms[1:]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bound.L_0, terms[0], rtol=1e-4, atol=1e-5)


def test_estimate_of_one_step_has_no_middle():
    """T = 1: the bound is L_T + L_0."""
    s = ddpm.schedule_from_betas(torch.tensor([0.9], dtype=F64))
    bound = evaluate.estimate(s, lambda x, t: x, torch.zeros(2, 3), [0, 1], 0, 5)
    assert bound.L_middle.tolist() == [0, 0] and (bound.L_0 > 0).all()


def test_one_image_has_no_standard_error():
    assert evaluate.spread(torch.tensor([1.5], dtype=F64)) == "1.500000"


@pytest.mark.parametrize("T, steps", [(1000, [1000, 900, 800, 500, 100]), (20, [20, 18, 16, 10, 2]),
                                      (3, [3, 2, 1]), (1, [1])])
def test_table_4_is_rows_of_the_file(tmp_path, monkeypatch, capsys, T, steps):
    """Reverse steps T, 0.9 T, 0.8 T, 0.5 T and 0.1 T from the last, rounded, none twice.

    Reverse step k is row k of the file. The line above has the numbers of its last row."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    curve = randn(T, 4, T, 2).abs()
    evaluate.rate_distortion(curve, torch.zeros(4, 3, 2, 2, dtype=torch.uint8), tmp_path)
    first, *lines = capsys.readouterr().out.splitlines()
    rows = [[float(x) for x in row.split(",")]
            for row in (tmp_path / "rate-distortion.csv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == list(range(T, 0, -1))
    table = [[float(x) for x in line.split()] for line in lines if line.strip()[0].isdigit()]
    assert [int(row[0]) for row in table] == steps
    for step, rate, rmse in table:
        assert rate == pytest.approx(rows[int(step) - 1][1], abs=6e-6)
        assert rmse == pytest.approx(rows[int(step) - 1][2], abs=6e-3)
    numbers = [float(x) for x in re.findall(r"\d+\.\d+", first)]
    assert numbers == pytest.approx(rows[-1][1:], abs=6e-5)
    named = [Path(x) for x in lines[-1].split() if "rate-" in x]
    assert named == [tmp_path / "rate-distortion.csv"]


def test_plot_of_rate_and_distortion(tmp_path, monkeypatch, capsys):
    """Distortion and rate over the reverse step, and distortion over rate, with labels that agree.

    It is a PNG of 1,320 × 352 pixels. Nothing is cut off at its edges, and no two parts overlap."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    made, subplots = [], pyplot.subplots
    monkeypatch.setattr(pyplot, "subplots",
                        lambda *a, **b: made.append(subplots(*a, **b)) or made[0])
    curve = randn(0, 4, 20, 2).abs()
    curve[..., 1] *= 50
    evaluate.rate_distortion(curve, torch.zeros(4, 3, 2, 2, dtype=torch.uint8), tmp_path)
    rows = [[float(x) for x in row.split(",")]
            for row in (tmp_path / "rate-distortion.csv").read_text().splitlines()[1:]]
    steps, rate, rmse = zip(*((21 - t, r, d) for t, r, d in rows))
    figure, axes = made[0][0], made[0][0].axes
    for ax, x, y in zip(axes, (steps, steps, rate), (rmse, rate, rmse), strict=True):
        line, = ax.lines
        assert list(line.get_xdata()) == pytest.approx(x, abs=6e-6)
        assert list(line.get_ydata()) == pytest.approx(y, abs=6e-6)
    step, other, bits = (ax.get_xlabel() for ax in axes)
    error, rates, again = (ax.get_ylabel() for ax in axes)
    assert step == other and error == again and bits == rates and len({step, error, bits, ""}) == 4
    raw = (tmp_path / "rate-distortion.png").read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", raw[16:24]) == (1320, 352)
    boxes = [ax.get_tightbbox() for ax in axes]
    edges = [0, *(x for box in boxes for x in (box.x0, box.x1)), figure.bbox.x1]
    assert edges == sorted(edges)
    assert all(0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
    named = {Path(x).name for x in capsys.readouterr().out.split() if "rate-distortion" in x}
    assert named == set(os.listdir(tmp_path)) and not pyplot.get_fignums()


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

    Kills: the covariance divided by N, tr C in place of the root's, a root that needs full rank."""
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
    with pytest.raises(ValueError, match="10 images"):
        evaluate.inception_score(sure[:9])


# --------------------------------------------------------------------------------- the command

class Inception(torch.nn.Module):
    """A stand-in with the original network's interface, for TorchScript."""

    def forward(self, img: torch.Tensor, return_features: bool = False,
                no_output_bias: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8 and img.size(1) == 3
        x = img.to(torch.float32).mean([2, 3]) / 255
        features = torch.cat([x, x * x, x[:, :1] * x[:, 1:2]], 1)
        if return_features:
            return features
        bias = torch.linspace(0, 0 if no_output_bias else 5, features.size(1))
        return torch.softmax(8 * features + bias, 1)


def stand_ins(tmp_path, monkeypatch) -> None:
    """A folder with 64 images, 30 samples, and the network in place of Inception."""
    monkeypatch.chdir(tmp_path)
    torch.save(data.shapes(64, 8), "images.pt")
    torch.save(data.shapes(30, 8, "test"), "made.pt")
    torch.jit.script(Inception()).save("inception.pt")


@pytest.fixture
def network(tmp_path, monkeypatch):
    """The Inception stand-in, 64 images and 30 samples; no network was trained."""
    stand_ins(tmp_path, monkeypatch)


SCORE = "--fid --inception inception.pt --samples made.pt --dataset images.pt --device cpu".split()


def score(capsys, *flags) -> tuple[float, str, str]:
    """Runs the command: the FID, and what is said on stdout and stderr."""
    assert evaluate.main([*SCORE, *flags]) == 0
    out, err = capsys.readouterr()
    return float(out.split("FID ")[1].split()[0]), out.split("FID ")[1], err


def test_inception_network_is_fetched_once_and_checked(network, monkeypatch):
    """Its file is code: without the right checksum it is not even opened."""
    raw, asked = Path("inception.pt").read_bytes(), []
    entry = ("https://x.org/some/net.pt", len(raw), hashlib.sha256(raw).hexdigest())
    monkeypatch.setattr(evaluate, "INCEPTION", entry)

    def fetch(address, path, size, checksum):
        asked.append((address, path, size, checksum))
        path.parent.mkdir()
        path.write_bytes(raw)
    monkeypatch.setattr(data, "fetch", fetch)
    for _ in range(2):
        net, file = evaluate.load_inception(None, "folder", CPU)
        assert file == Path("folder/net.pt") and not net.training
        assert asked == [(entry[0], file, *entry[1:])]
    x = data.shapes(3, 8)
    assert torch.equal(net(x, return_features=True), Inception()(x, return_features=True))
    asked.clear()
    assert evaluate.main([*(x for x in SCORE if "inception" not in x), "--data-dir", "new"]) == 0
    assert [entry[1] for entry in asked] == [Path("new/net.pt")]
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was opened"))
    file.write_bytes(raw + b"more")
    with pytest.raises(ValueError, match="net.pt"):
        evaluate.load_inception(None, "folder", CPU)


def test_inception_network_that_is_named(network, tmp_path):
    """It is opened without a warning. If it is not there, or a folder, nothing is fetched."""
    file = str(tmp_path / "inception.pt")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        net, found = evaluate.load_inception(file, "nowhere", CPU)
    assert found == Path(file) and not seen and not Path("nowhere").exists()
    for bad in ("none.pt", str(tmp_path)):
        with pytest.raises(ValueError, match=re.escape(bad)):
            evaluate.load_inception(bad, "nowhere", CPU)


def seen(monkeypatch) -> list[int]:
    """How many images the Inception network sees, from now on, in each of its runs."""
    counts: list[int] = []
    outputs = evaluate.inception_outputs
    monkeypatch.setattr(evaluate, "inception_outputs", lambda net, images, *rest: (
        counts.append(len(images)) or outputs(net, images, *rest)))
    return counts


def test_features_of_a_data_set_are_computed_once(network, monkeypatch, capsys):
    """They are kept by the images' bytes and shape and by the network's file, and by nothing else.

    Kills: features of other images or of another network taken for these."""
    counts = seen(monkeypatch)
    fid, *_ = score(capsys, "--data-dir", "kept")
    file, = Path("kept").iterdir()
    images = torch.load("images.pt")
    want = Inception()(images, return_features=True).double()
    assert torch.equal(torch.load(file), want) and counts == [30, 64]
    os.rename("made.pt", "again.pt")
    os.link("again.pt", "made.pt")
    assert score(capsys, "--data-dir", "kept", "--batch-size", "7", "--seed", "3")[0] == fid
    assert counts == [30, 64, 30]
    for change in (lambda: torch.save(images.flip(0), "images.pt"),
                   lambda: [torch.save(torch.load(x).view(-1, 3, 4, 16), x)
                            for x in ("images.pt", "made.pt")],
                   lambda: torch.jit.save(torch.jit.load("inception.pt"), "inception.pt",
                                          _extra_files={"note": "another file"})):
        change()
        counts.clear()
        score(capsys, "--data-dir", "kept")
        assert counts == [30, 64]
    assert len(list(Path("kept").iterdir())) == 4


@pytest.mark.parametrize("bad", [
    b"PK", test_data.Deed(), torch.zeros(7), torch.zeros(64, 7, 1), torch.zeros(64, 6),
    torch.zeros(1, 7), "text"],
    ids=["cut", "code", "vector", "cube", "narrow", "one row", "text"])
def test_damaged_features_are_computed_anew(network, monkeypatch, capsys, bad):
    """Whatever lies there in their place: it is named, the FID is right, and the file is mended.

    No code in it is run, even where torch.load trusts every file unless it is told not to."""
    fid, *_ = score(capsys)
    file, = Path("data").iterdir()
    good, counts = torch.load(file), seen(monkeypatch)
    torch.save(bad, file)
    if isinstance(bad, bytes):
        file.write_bytes(bad)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    again, _, err = score(capsys)
    assert again == fid and file.name in err and counts == [30, 64] and not Path("done").exists()
    assert file.name not in score(capsys)[2] and counts == [30, 64, 30]
    assert torch.equal(torch.load(file, weights_only=True), good)


def test_fid_needs_two_images_and_the_inception_score_ten(network, capsys):
    """On either side; with two the features are kept, too."""
    for made, images in ((2, 5), (5, 2), (5, 2)):
        torch.save(data.shapes(made, 8, "test"), "made.pt")
        torch.save(data.shapes(images, 8), "images.pt")
        fid, out, err = score(capsys)
        assert fid > 0 and "Inception score" not in out and "damaged" not in err
        assert f"{images}/{images}" in err or images == 2 and f"{made}/{made}" in err
    assert "2/2" not in err
    for made, images in ((1, 5), (5, 1)):
        torch.save(data.shapes(made, 8, "test"), "made.pt")
        torch.save(data.shapes(images, 8), "images.pt")
        assert evaluate.main(SCORE) == 1
    torch.save(data.shapes(5, 8), "images.pt")
    capsys.readouterr()
    for made in (9, 10):
        torch.save(data.shapes(made, 8, "test"), "made.pt")
        assert ("Inception score" in score(capsys)[1]) == (made == 10)


@pytest.mark.parametrize("shape", [(3, 8, 4), (1, 8, 8), (3, 4, 8)])
def test_samples_and_images_must_have_one_shape(network, capsys, shape):
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
    """MNIST has two parts, each with features of its own; progress ends at the number of images."""
    torch.save(torch.load("made.pt")[:, :1].repeat(1, 1, 4, 4), "made.pt")
    Path("data/mnist").mkdir(parents=True)
    for name, n in (("train", 3), ("t10k", 4)):
        Path(f"data/mnist/{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(
            struct.pack(">IIII", 2051, n, 28, 28) + bytes(i % 251 for i in range(n * 784))))
    for flags, split, n in ((["--split", "test"], "test", 4), ([], "train", 3)):
        _, out, err = score(capsys, "--dataset", "mnist", *flags)
        counts = [int(x) for x in re.findall(r"\b\d+\b", out.split("(")[1].split(")")[0])]
        assert counts == [30, 8, n, 8] and f"{split} split" in out.splitlines()[0]
        assert "30/30" in err and f"{n}/{n}" in err


def test_samples_drawn_here_are_those_of_sample_py(tmp_path, monkeypatch, capsys):
    """The same flags give the same images to the bit, in batches of the size that is asked for."""
    monkeypatch.chdir(tmp_path)
    torch.save(data.shapes(64, 8), "images.pt")
    test_pictures.random_run()
    torch.jit.script(Inception()).save("inception.pt")
    made, batches = [], []
    monkeypatch.setattr(evaluate, "inception_outputs", lambda net, images, *_: made.append(images))
    require = common.require_network
    monkeypatch.setattr(common, "require_network", lambda *a: batches.append(a[3]) or require(*a))
    for flags in ("--steps 4 --seed 4 --no-clip --precision fp32",
                  "--steps 2 --no-ema --precision bf16"):
        flags = f"{flags} --n 3 --device cpu --batch-size 2".split()
        assert sample.main([*flags, "--out", "want.pt"]) == 0
        capsys.readouterr()
        evaluate.main([*flags, "--fid", "--inception", "inception.pt"])
        assert torch.equal(made.pop(), torch.load("want.pt")) and batches[-1] == 2
        assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    "--samples a.pt", "--inception a.pt", "--steps 3", "--fid --terms 3",
    "--fid --samples a.pt --steps 3", "--fid --samples a.pt --n 3", "--split valid", "--n 0"])
def test_flags_that_contradict_each_other(flags):
    with pytest.raises(common.UsageError):
        evaluate.parse(flags.split())


def test_defaults_of_the_flags(capsys):
    """Bits/dim: the test images, in 32 bits unless another format is asked for. FID: the others."""
    def chosen(flags):
        args = evaluate.parse(flags.split())
        return args.split, args.precision
    assert chosen("") == ("test", "fp32") and chosen("--split train") == ("train", "fp32")
    assert chosen("--precision bf16") == ("test", "bf16")
    assert chosen("--fid") == ("train", "auto")
    assert chosen("--fid --split test --precision fp16") == ("test", "fp16")
    assert evaluate.main(["--help"]) == 0
    assert evaluate.__doc__.strip() in capsys.readouterr().out


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A trained nothing, 64 images, and the Inception stand-in."""
    stand_ins(tmp_path, monkeypatch)
    flags = ("--dataset images.pt --channels 32 --multipliers 1 --blocks 1 --attention 8 --steps 3 "
             "--timesteps 20 --batch-size 4 --samples 0 --device cpu --precision fp32")
    assert train.main(flags.split()) == 0


def test_bits_per_dim_command(run, capsys):
    """Parts and their sum, rate and distortion for every t; the estimate agrees with all terms."""
    assert evaluate.main("--device cpu --out curves".split()) == 0
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

    assert evaluate.main("--terms 6 --device cpu".split()) == 0
    out = capsys.readouterr().out
    estimate, error = (float(x) for x in out.split("bits/dim ≤ ")[1].split()[:3:2])
    assert abs(estimate - total) < 5 * error and error < 1
    assert evaluate.main("--terms 1000 --n 4 --no-clip --no-ema --device cpu".split()) == 0
    assert f"{len(evaluate.strata(20, 1000))} strata" in capsys.readouterr().out


def bound_by_hand(net, x0, z, clip=True):
    """The terms of Eq. 5 along one chain, by Eqs. 5, 7, 13 and 15 alone: nats, and the RMSE of x̂_0.

    x0: (N, …), z(t): the noise with which x_t is drawn; T = 20, σ_t² = β_t, and σ_1² = β̃_2.
    """
    bar, T = test_pictures.alpha_bar(), test_pictures.T
    phi = torch.special.ndtr
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
            above = phi((x0 + 1 / 255 - mean(x0_hat)) / deviation)
            below = phi((x0 - 1 / 255 - mean(x0_hat)) / deviation)
            above[x0 > 0.999], below[x0 < -0.999] = 1, 0
            each = -(above - below).clamp(min=1e-300).log()
        terms.append(each.flatten(1).sum(1))
    return torch.stack(terms), torch.stack(rmse)


@pytest.mark.parametrize("flags", [[], ["--no-clip"], ["--no-ema"]])
def test_every_number_of_the_bound_by_hand(tmp_path, monkeypatch, capsys, flags):
    """All that evaluate.py prints and writes about Eq. 5 and §4.3, from the equations alone.

    Kills: the last weights in place of the averages, x̂_0 (not) clipped, a mean of the RMSEs."""
    monkeypatch.chdir(tmp_path)
    torch.save(data.shapes(64, 8), "images.pt")
    nets = test_pictures.random_run()
    images = torch.load("images.pt")[:5]
    x0 = images.double() / 127.5 - 1
    with torch.no_grad():
        terms, rmse = bound_by_hand(
            nets["model" if "--no-ema" in flags else "ema"], x0,
            lambda t: evaluate.keyed_noise(0, range(5), [t] * 5, x0.shape[1:], "cpu").double(),
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


def test_fid_command(run, capsys):
    """Split, counts and rounding are said; statistics are cached; below 50,000 samples it warns."""
    flags = "--fid --inception inception.pt --device cpu --samples made.pt"
    for _ in range(2):
        assert evaluate.main(flags.split()) == 0
        said = capsys.readouterr()
        assert "30 samples, rounded to 8 bits; 64 images of images.pt, which has no splits" in said.out
        assert "Inception score" in said.out and "50,000" in said.err
        fids = said.out.split("FID ")[1].split()[0]
    assert len(list(Path("data").glob("inception-*.pt"))) == 1
    assert evaluate.main("--fid --inception inception.pt --samples images.pt".split()) == 0
    same = float(capsys.readouterr().out.split("FID ")[1].split()[0])
    assert same == pytest.approx(0, abs=1e-4) and float(fids) > 1e-4
    assert evaluate.main("--fid --inception inception.pt --n 12 --steps 4 --device cpu".split()) == 0
    assert "FID" in capsys.readouterr().out


def test_fid_mistakes(run, capsys):
    """A wrong or cut Inception file, NaN or one sample, grey against colour: one line each."""
    Path("cut.pt").write_bytes(Path("inception.pt").read_bytes()[:2000])
    torch.jit.script(torch.nn.Linear(3, 3)).save("wrong.pt")
    torch.save(torch.rand(4, 3, 8, 8) * math.nan, "nan.pt")
    torch.save(data.shapes(1, 8), "one.pt")
    torch.save(data.shapes(3, 8)[:, :1], "grey.pt")
    for flags, match in (("--inception cut.pt --samples made.pt", "TorchScript"),
                         ("--inception wrong.pt --samples made.pt", "not the network expected"),
                         ("--inception inception.pt --samples nan.pt", "images are torch.uint8"),
                         ("--inception inception.pt --samples one.pt", "two images"),
                         ("--inception inception.pt --samples grey.pt", "has images of")):
        assert evaluate.main(["--fid", "--device", "cpu", *flags.split()]) == 1
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert match in err, flags
    torch.save(data.shapes(3, 8)[:, :1], "images.pt")          # grey is repeated to three channels
    assert evaluate.main("--fid --dataset images.pt --samples grey.pt --inception inception.pt "
                         "--device cpu".split()) == 0
