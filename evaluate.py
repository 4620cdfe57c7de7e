"""Table 1: the bound in bits/dim, rate and distortion (§4.3, Table 4), FID and Inception score.

    python evaluate.py --terms 20                      bits/dim, a stratified estimate
    python evaluate.py --n 64                          all T terms; rate-distortion.csv, Table 4
    python evaluate.py --fid --n 50000                 FID and Inception score of 50,000 samples
    python evaluate.py --fid --samples samples.pt      of images made before

A draw is a function of (seed, image, t), so two evaluations of one image agree term by term.
"""
from __future__ import annotations

import csv
import hashlib
import math
import sys
import warnings
from pathlib import Path

import runs  # before torch: it quiets a warning of torch's import

import torch
from torch import Tensor

import data
import ddpm
import weights
from runs import UsageError, ranged

INCEPTION = ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
             "inception-2015-12-05.pt", 95_607_719,
             "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4")


# ------------------------------------------------------------------------------------- likelihood

def strata(T: int, K: int) -> list[tuple[int, int]]:
    """2 … T cut into at most K ranges (first, last), their ends spaced as the logarithm of t.

    Σ over ranges of length · L_{t−1}, with t uniform in each, is unbiased for Σ_{t=2}^{T} L_{t−1}
    whatever the cuts; these make the ranges' sums about equal, L_{t−1} falling roughly as 1/t.
    """
    ends = [2]
    for k in range(1, K + 1):
        ends.append(max(ends[-1], round(2 * ((T + 1) / 2) ** (k / K))))
    return [(a, b - 1) for a, b in zip(ends, ends[1:]) if b > a]


def keyed_noise(seed: int, images: list[int], t: int | list[int], shape, device) -> Tensor:
    """ε for each image at its t, from (seed, image, t) alone."""
    times = t if isinstance(t, list) else [t] * len(images)
    keys = [("bound", i, u) for i, u in zip(images, times)]
    return runs.Noise(seed, keys, shape, device)()


def estimate(s: ddpm.Schedule, model: ddpm.Model, x0: Tensor, index: list[int], seed: int, K: int,
             **choices) -> ddpm.Bound:
    """Eq. 5 for each image from L_T, L_0 and one draw of t in each of K strata: unbiased.

    x0: 8-bit images (B, …), the index-th of the data set → (B,) nats each.
    """
    total = torch.zeros(len(x0), dtype=torch.float64)
    pieces = [(1, 1), *strata(s.T, K)]
    for k, (first, last) in enumerate(pieces):
        t = [first + runs.seed_of(seed, "stratum", i, k) % (last - first + 1) for i in index]
        times = torch.tensor(t, device=x0.device)
        x_t = ddpm.q_sample(s, x0, times, keyed_noise(seed, index, t, x0.shape[1:], x0.device))
        p = ddpm.p_mean_variance(s, model, x_t, times, **choices)
        term = ddpm.vlb_term(s, x0, x_t, times, p).cpu()
        if k == 0:
            L_0 = term
        else:
            total += (last - first + 1) * term
    return ddpm.Bound(ddpm.prior_kl(s, x0).cpu(), total, L_0)


def spread(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error


@torch.no_grad()
def likelihood(trained: runs.Trained, images: Tensor, where: runs.Machine, args) -> None:
    """Print Eq. 5 in bits/dim by parts; with all terms, write rate and distortion for every t."""
    s, model = trained.schedule.to(where.device), runs.sampler(trained.net, where)
    choices = {**trained.choices, "clip": not args.no_clip}
    mine, terms = where.share(len(images)), args.terms and min(args.terms, s.T - 1)
    calls = len(strata(s.T, terms)) + 1 if terms else s.T
    progress = runs.Progress(len(images), "images", quiet=not where.chief)
    parts, curves = [], []
    for i in range(0, len(mine), args.batch_size):
        index = list(mine[i:i + args.batch_size])
        x0 = data.to_model(images[index]).to(where.device)
        if terms:
            bound = estimate(s, model, x0, index, args.seed, terms, **choices)
        else:
            def noise(t: int) -> Tensor:
                return keyed_noise(args.seed, index, t, x0.shape[1:], where.device)
            curve = []
            for coded in ddpm.progressive_coding(s, model, x0, noise, **choices):
                if coded.t:
                    curve.append((coded.rate.cpu(), ddpm.distortion(x0, coded.x0).cpu().double()))
                    progress.update((i + len(index) * (1 - coded.t / calls)) * where.world)
            L_T, rate = curve[0][0], curve[-1][0]
            bound = ddpm.Bound(L_T, rate - L_T, coded.rate.cpu() - rate)
            curves.append(torch.stack([torch.stack(point, 1) for point in curve], 1))  # (B, T, 2)
        parts.append(torch.stack([part.cpu() for part in bound], 1))
        progress.update(min((i + len(index)) * where.world, len(images)))
    empty = torch.zeros(0, 3, dtype=torch.float64)
    parts = where.gather(torch.cat([empty, *parts]), len(images))
    bits = ddpm.bits_per_dim(parts, images)
    if not terms:
        curve = where.gather(torch.cat([torch.zeros(0, s.T, 2, dtype=torch.float64), *curves]),
                             len(images))
    if not where.chief:
        return
    (mean, error), each = spread(bits.sum(1)), [spread(column) for column in bits.T]
    how = f"{calls - 1} strata, {calls} network calls an image" if terms else f"all {s.T} terms"
    print(f"bits/dim ≤ {mean:.4f} ± {error:.4f} (standard error; {len(images)} images, {how})")
    print("".join(f"  {name} {m:.6f} ± {e:.6f}" for name, (m, e) in
                  zip(("L_T", "L_1 + … + L_{T−1}", "L_0"), each)))
    if not terms:
        rate_distortion(curve, images, args)


def rate_distortion(curve: Tensor, images: Tensor, args) -> None:
    """§4.3: rate in bits/dim and RMSE at every t, as CSV and as a plot; Table 4's rows."""
    T = curve.shape[1]
    rate = ddpm.bits_per_dim(curve[..., 0].mean(0), images).tolist()
    rmse = curve[..., 1].square().mean(0).sqrt().tolist()  # the root of the mean over images
    path = args.out / "rate-distortion.csv"
    with runs.written_aside(path) as part, open(part, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["t", "rate_bits_per_dim", "distortion_rmse"])
        rows.writerows([T - i, f"{r:.8f}", f"{d:.5f}"] for i, (r, d) in enumerate(zip(rate, rmse)))
    print(f"rate {rate[-1]:.4f} bits/dim at a distortion of RMSE {rmse[-1]:.4f} of 255\n"
          "  reverse step T−t+1   rate bits/dim   RMSE   (Table 4)")
    for step in sorted({max(1, round(T * part)) for part in (1, 0.9, 0.8, 0.5, 0.1)}, reverse=True):
        print(f"  {step:18d}   {rate[step - 1]:13.5f}   {rmse[step - 1]:6.2f}")
    try:
        import matplotlib
    except ImportError:
        print(f"{path} has every t (a plot needs matplotlib: pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    steps = range(1, T + 1)
    time, bits, error = "reverse step T − t + 1", "rate (bits/dim)", "distortion (RMSE)"
    for ax, x, y, labels in ((axes[0], steps, rmse, (time, error)),
                             (axes[1], steps, rate, (time, bits)),
                             (axes[2], rate, rmse, (bits, error))):
        ax.plot(x, y)
        ax.set_xlabel(labels[0])
        ax.set_ylabel(labels[1])
        ax.grid(alpha=0.3)
    with runs.written_aside(args.out / "rate-distortion.png") as part:
        figure.savefig(part, dpi=110, format="png")
    plt.close(figure)
    print(f"{path} and {path.with_suffix('.png')} have every t")


# ---------------------------------------------------------------------------- FID, Inception score

def frechet_distance(a: Tensor, b: Tensor) -> float:
    """‖μ_a − μ_b‖² + tr(C_a + C_b − 2 (C_a C_b)^½), a and b features (N, F).   [Heusel et al. 2017]

    With centred features A/√(N−1), (A may have fewer rows than columns), C_a = AᵀA and
    tr (C_a C_b)^½ is the sum of the singular values of A Bᵀ, since those squared are C_a C_b's
    eigenvalues: no matrix square root, nothing to regularise, exact for singular covariances.
    Each A is first reduced to at most F rows by a QR factorisation. ValueError for N < 2.
    """
    roots, means = [], []
    for x in (a.double(), b.double()):
        if len(x) < 2:
            raise ValueError(f"a covariance needs two images or more, not {len(x)}")
        centred = (x - x.mean(0)) / math.sqrt(len(x) - 1)
        roots.append(torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred)
        means.append(x.mean(0))
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    squares = sum(r.square().sum() for r in roots)
    return ((means[0] - means[1]).square().sum() + squares - 2 * cross).clamp(min=0).item()


def inception_score(p: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y | x) ‖ p(y)), p (N, classes): mean and deviation over splits.   [Salimans 2016]

    ValueError for fewer images than splits.
    """
    if len(p) < splits:
        raise ValueError(f"the Inception score in {splits} splits needs {splits} images or more, "
                         f"not {len(p)}")
    scores = torch.stack([
        (torch.special.xlogy(q, q) - torch.special.xlogy(q, q.mean(0))).sum(1).mean().exp()
        for q in torch.tensor_split(p.double(), splits)])
    return scores.mean().item(), scores.std(correction=0).item()


def load_inception(path: str | None, data_dir: str, where: runs.Machine):
    """The original Inception network as TorchScript, given or downloaded; and its file."""
    file = Path(path or Path(data_dir, Path(INCEPTION[0]).name))
    if not path:
        with where.chief_first():  # every rank comes here, or the chief would wait for ever
            if not file.exists():
                data.fetch(INCEPTION[0], file, *INCEPTION[1:])
    if not file.is_file():
        raise ValueError(f"no Inception network at {file}")
    warnings.filterwarnings("ignore", message="`torch.jit.load` is deprecated")
    try:
        return torch.jit.load(str(file), map_location=where.device).eval(), file
    except RuntimeError as error:
        raise ValueError(f"{file} is no TorchScript file, or cut short: it should be "
                         f"{INCEPTION[0]}") from error


@torch.no_grad()
def inception_outputs(net, images: Tensor, where: runs.Machine, batch: int,
                      what: str) -> tuple[Tensor, Tensor]:
    """Features (N, F) and class probabilities (N, classes) of uint8 images; grey is repeated."""
    if len(images) < where.world:
        raise ValueError(f"{len(images)} images cannot be shared by {where.world} ranks")
    features, probabilities = [], []
    progress = runs.Progress(len(images), what, quiet=not where.chief)
    mine = where.share(len(images))
    for i in range(0, len(mine), batch):
        x = images[list(mine[i:i + batch])].to(where.device).expand(-1, 3, -1, -1)
        try:
            f, p = net(x, return_features=True), net(x, no_output_bias=True)
        except RuntimeError as error:
            raise ValueError("the Inception file is not the network expected: "
                             f"{str(error).strip().splitlines()[-1]}") from error
        features.append(f.cpu().double())
        probabilities.append(p.cpu().double())
        progress.update(min((i + len(x)) * where.world, len(images)))
    outputs = [where.gather(torch.cat(x), len(images)) for x in (features, probabilities)]
    if not all(x.dim() == 2 and x.isfinite().all() for x in outputs):
        raise ValueError("the Inception network's outputs are not finite rows of numbers")
    return outputs[0], outputs[1]


def scores(trained, images: Tensor, name: str, where: runs.Machine, args) -> None:
    """Print the FID against `images` and the Inception score of samples read or made here."""
    made = data.read_tensor(args.samples) if args.samples else None
    net, file = load_inception(args.inception, args.data_dir, where)
    if made is not None:
        if made.shape[1:] != images.shape[1:]:
            raise ValueError(f"{args.samples} has images of {tuple(made.shape[1:])}, {name} of "
                             f"{tuple(images.shape[1:])}")
    else:
        progress = runs.Progress(args.n, "samples", quiet=not where.chief)
        made = runs.draw_samples(trained, where, args.seed, args.n, args.batch_size, args.steps,
                                 progress, clip=not args.no_clip)
    if min(len(made), len(images)) < 2:
        raise ValueError("FID needs two images or more on either side")
    features, probabilities = inception_outputs(net, made, where, args.batch_size, "samples seen")
    key = runs.seed_of(name, args.split, tuple(images.shape),
                       hashlib.sha256(file.read_bytes()).hexdigest(),
                       data.raw_bytes(images[torch.linspace(0, len(images) - 1, 64).long()]))
    cache = Path(args.data_dir, f"inception-{Path(name).stem}-{args.split}-{key:x}.pt")
    real = None
    if cache.exists():
        try:
            real = torch.load(cache, weights_only=True)
        except Exception as error:  # torch.load meets a damaged file in a dozen ways
            print(f"{cache} is damaged ({data.first_line(error)}): computed anew", file=sys.stderr)
    if real is None:
        real, _ = inception_outputs(net, images, where, args.batch_size, "images seen")
        if where.chief:
            with runs.written_aside(cache) as part:
                torch.save(real, part)
    if not where.chief:
        return
    count = f"{len(made)} samples, rounded to 8 bits"
    print(f"FID {frechet_distance(features, real):.4f} ({count}; {len(images)} images of {name}, "
          f"{args.split} split, 8 bits)")
    if len(made) >= 10:
        mean, deviation = inception_score(probabilities)
        print(f"Inception score {mean:.3f} ± {deviation:.3f} ({count}; deviation over 10 splits)")
    if min(len(made), len(images)) < 50_000:
        print(f"warning: the paper's scores are of 50,000 samples; with {len(made)} samples and "
              f"{len(images)} images FID is biased upwards", file=sys.stderr)


@runs.command
def main(argv=None) -> int:
    """Evaluate a trained network: see the module's text."""
    parser = runs.Parser(__doc__)
    parser.add_argument("--checkpoint", help="as in sample.py (default: the newest run)")
    parser.add_argument("--dataset", help="default: the run's")
    parser.add_argument("--data-dir", help="data sets and downloads (default: the run's, or data)")
    parser.add_argument("--split", choices=("train", "test"), help="default: test; train for --fid")
    parser.add_argument("--n", type=ranged(int, 1), help="images (default: all of the split), or "
                        "with --fid samples (default: 50,000)")
    parser.add_argument("--terms", type=ranged(int, 1), help="estimate the bound from L_0 and "
                        "draws of t from this many strata at most (default: all T terms)")
    parser.add_argument("--no-clip", action="store_true", help="leave x̂_0 unclipped")
    parser.add_argument("--no-ema", action="store_true", help="the weights as trained")
    parser.add_argument("--batch-size", type=ranged(int, 1), default=64, help="(default: 64)")
    parser.add_argument("--seed", type=ranged(int, 0), default=0, help="of the draws (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of rate-distortion.csv "
                        "(default: here)")
    parser.add_argument("--fid", action="store_true", help="FID and Inception score")
    parser.add_argument("--samples", type=Path, help="with --fid: images of sample.py --out X.pt")
    parser.add_argument("--steps", type=ranged(int, 2), help="with --fid: network calls a sample")
    parser.add_argument("--inception", help="with --fid: the TorchScript file, if not downloaded")
    parser.machine_flags()
    args = parser.parse_args(argv)
    if not args.fid and (args.samples or args.inception or args.steps):
        raise UsageError("--samples, --steps and --inception go with --fid")
    if args.fid and args.terms:
        raise UsageError("--terms is of the bound: leave out --fid")
    precision = "fp32" if args.precision == "auto" and not args.fid else args.precision
    where = runs.machine(args.device, precision)
    trained = None
    if not (args.fid and args.samples and args.dataset):
        trained = weights.load(args.checkpoint, args.data_dir or "data", not args.no_ema, where)
    settings = trained.settings if trained else {}
    name = args.dataset or settings.get("dataset")
    if not name:
        raise UsageError("--dataset is missing, and the checkpoint names none")
    args.split = args.split or ("train" if args.fid else "test")
    args.data_dir = args.data_dir or settings.get("data_dir", "data")
    with where.chief_first():
        source = data.load(name, args.data_dir, args.split, settings.get("image_size"))
    if trained and tuple(source.images.shape[1:]) != trained.shape:
        raise ValueError(f"the images of {name} are {tuple(source.images.shape[1:])}, the "
                         f"network's {trained.shape}")
    if where.chief:
        padded = ", the padded border counted in" if source.padded else ""
        print(f"{trained.source if trained else args.samples}; {name}, {args.split} split{padded}")
    if args.fid:
        args.n = args.n or 50_000
        scores(trained, source.images, name, where, args)
    else:
        if not args.terms and where.chief:
            runs.check_writable(args.out / "rate-distortion.csv")
        if args.n and args.n > len(source.images):
            raise ValueError(f"--n {args.n}: the {args.split} split of {name} has "
                             f"{len(source.images)} images")
        likelihood(trained, source.images[:args.n or len(source.images)], where, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
