"""Table 1's numbers: an unbiased estimate, the Fréchet distance, the Inception score."""
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import ddpm
import evaluate
import test_pictures
import train

F64 = torch.float64
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
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
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


def test_inception_score_of_uniform_and_of_one_hot():
    """No information: 1. Every class equally often and surely: the number of classes."""
    uniform, sure = torch.full((40, 8), 1 / 8), torch.eye(8).repeat(10, 1)
    assert evaluate.inception_score(uniform) == pytest.approx((1, 0))
    assert evaluate.inception_score(sure) == pytest.approx((8, 0))
    mixed = torch.cat([sure[:40], uniform])                   # splits 0 … 4 are sure, the rest not
    mean, deviation = evaluate.inception_score(mixed)
    assert mean == pytest.approx(4.5) and deviation == pytest.approx(3.5)
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


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A trained nothing, 64 images, and the Inception stand-in."""
    monkeypatch.chdir(tmp_path)
    torch.save(data.shapes(64, 8), "images.pt")
    torch.save(data.shapes(30, 8, "test"), "made.pt")
    torch.jit.script(Inception()).save("inception.pt")
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
