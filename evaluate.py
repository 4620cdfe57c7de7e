"""Table 1, Figure 5 and Table 4: bits/dim, rate and distortion, FID and Inception score.

    python evaluate.py --terms 20                      bits/dim from 21 network calls an image
    python evaluate.py --n 64                          all T terms; rate-distortion.csv, Table 4
    python evaluate.py --fid --n 50000                 FID and Inception score of 50,000 samples
    python evaluate.py --fid --samples samples.pt      the same for images made before

All noise is a function of seed, image and t, so the same command gives the same numbers.
"""
from __future__ import annotations

import contextlib
import hashlib
import io
import math
import sys
import warnings
from pathlib import Path
from typing import Callable

import common  # before torch, because it silences a warning of torch's import

import torch
from torch import Tensor

import data
import ddpm
import sample
from common import Machine, Progress, UsageError, count, seed_of, word
from data import say

INCEPTION = ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
             "inception-2015-12-05.pt", 95_607_719,
             "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4")

# === Bits/dim, rate and distortion ================================================================

def strata(T: int, K: int) -> list[tuple[int, int]]:
    """2 … T cut into at most K ranges (first, last), whose ends are spaced as the logarithm of t.

    L_{t−1} is largest at small t, and the ranges are short there.
    """
    ends = [2]
    for k in range(1, K + 1):
        ends.append(max(ends[-1], round(2 * ((T + 1) / 2) ** (k / K))))
    return [(first, end - 1) for first, end in zip(ends, ends[1:]) if end > first]

def keyed_noise(seed: int, images: list[int], times: list[int], shape, device) -> Tensor:
    """ε for each image at its time, a function of (seed, image, t)."""
    keys = [("bound", i, t) for i, t in zip(images, times)]
    return common.Noise(seed, keys, shape, device)()

def estimate(s: ddpm.Schedule, model: ddpm.Model, x0: Tensor, index: list[int], seed: int, K: int,
             **choices) -> ddpm.Bound:
    """L_T + Σ_k length_k · L_{t_k−1} + L_0, t_k uniform in the k-th of K strata.   [DDPM Eq. 5]

    It is unbiased for Eq. 5, whatever the strata are. x0: 8-bit images (B, …); index: their numbers
    in the data set → (B,) nats each.
    """
    terms = []
    for k, (first, last) in enumerate([(1, 1), *strata(s.T, K)]):
        length = last - first + 1
        times = [first + seed_of(seed, "stratum", i, k) % length for i in index]
        t = torch.tensor(times, device=x0.device)
        x_t = ddpm.q_sample(s, x0, t, keyed_noise(seed, index, times, x0.shape[1:], x0.device))
        p = ddpm.p_mean_variance(s, model, x_t, t, **choices)
        terms.append(length * ddpm.vlb_term(s, x0, x_t, t, p))
    return ddpm.Bound(ddpm.prior_kl(s, x0), sum(terms[1:], torch.zeros_like(terms[0])), terms[0])

def spread(values: Tensor) -> str:
    """Mean ± standard error of the mean."""
    error = f" ± {values.std().item() / math.sqrt(len(values)):.6f}" if len(values) > 1 else ""
    return f"{values.mean().item():.6f}{error}"

@torch.no_grad()
def likelihood(trained: sample.Trained, images: Tensor, machine: Machine, args) -> None:
    """Prints the parts of Eq. 5 in bits/dim. With all T terms, also rate and distortion over t."""
    s, model = trained.schedule.to(machine.device), sample.inference_model(trained.net, machine)
    choices = {**trained.choices, **({"clip": False} if args.no_clip else {})}
    n, mine = len(images), machine.share(len(images))
    progress = Progress(n, "images", quiet=not machine.chief)
    parts = [torch.zeros(0, 3, dtype=torch.float64)]
    curves = [torch.zeros(0, s.T, 2, dtype=torch.float64)]
    for i in range(0, len(mine), args.batch_size):
        index = list(mine[i:i + args.batch_size])
        x0 = data.to_model(images[index]).to(machine.device)
        if args.terms:
            bound = estimate(s, model, x0, index, args.seed, args.terms, **choices)
        else:
            def noise(t: int, index=index, x0=x0) -> Tensor:
                return keyed_noise(args.seed, index, [t] * len(index), x0.shape[1:], x0.device)
            rates, curve = {}, []
            for t, _, x0_hat, rate in ddpm.send(s, model, x0, noise, **choices):
                rates[t] = rate
                if t:
                    curve.append(torch.stack([rate.cpu(), ddpm.distortion(x0, x0_hat).cpu()], 1))
                progress.update(min(n - 1, (i + len(index) * (1 - t / s.T)) * machine.world))
            bound = ddpm.Bound(rates[s.T], rates[1] - rates[s.T], rates[0] - rates[1])
            curves.append(torch.stack(curve, 1))                            # (B, T, 2)
        parts.append(torch.stack(bound, 1).cpu())                           # (B, 3)
        progress.update(min((i + len(index)) * machine.world, n))
    bits = ddpm.bits_per_dim(machine.gather(torch.cat(parts), n), images)
    curve = None if args.terms else machine.gather(torch.cat(curves), n)
    if not machine.chief:
        return
    calls = len(strata(s.T, args.terms)) + 1 if args.terms else s.T
    how = f"{calls - 1} strata, {calls} network calls an image"
    if not args.terms:
        how = f"all {s.T} terms"
    print(f"bits/dim ≤ {spread(bits.sum(1))} (± standard error; {n} images; {how})")
    for name, column in zip(("L_T", "L_1 + … + L_{T−1}", "L_0"), bits.T):
        print(f"  {name:17} {spread(column)}")
    if curve is not None:
        rate_distortion(curve, images, args.out)

def rate_distortion(curve: Tensor, images: Tensor, out: Path) -> None:
    """§4.3: rate (bits/dim) and distortion (RMSE) at every t, as CSV and plot; Table 4's rows."""
    T = curve.shape[1]
    rate = ddpm.bits_per_dim(curve[..., 0].mean(0), images).tolist()
    rmse = curve[..., 1].square().mean(0).sqrt().tolist()  # the root of the mean over all images
    print(f"rate {rate[-1]:.4f} bits/dim at a distortion of RMSE {rmse[-1]:.4f} of 255\n"
          "  reverse step T−t+1   rate bits/dim   RMSE   (Table 4)")
    for step in sorted({max(1, round(T * part)) for part in (1, 0.9, 0.8, 0.5, 0.1)}, reverse=True):
        print(f"  {step:18d}   {rate[step - 1]:13.5f}   {rmse[step - 1]:6.2f}")
    path = out / "rate-distortion.csv"
    with data.written(path) as file:
        file.write(b"t,rate_bits_per_dim,distortion_rmse\n")
        for i, (r, d) in enumerate(zip(rate, rmse)):
            file.write(f"{T - i},{r:.8f},{d:.5f}\n".encode())
    if not (pyplot := common.pyplot()):
        print(f"{path} has every t (for a plot: pip install matplotlib)")
        return
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    step = ("reverse step T − t + 1", range(1, T + 1))
    error, bits = ("distortion (RMSE)", rmse), ("rate (bits/dim)", rate)
    for ax, (x_label, x), (y_label, y) in zip(axes, (step, step, bits), (error, bits, error)):
        ax.plot(x, y)
        ax.set(xlabel=x_label, ylabel=y_label)
        ax.grid(alpha=0.3)
    with data.written(path.with_suffix(".png")) as file:
        figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)
    print(f"{path} and {path.with_suffix('.png')} have every t")

# === FID and Inception score ======================================================================

def frechet_distance(a: Tensor, b: Tensor) -> float:
    """‖μ_a − μ_b‖² + tr(C_a + C_b − 2 (C_a C_b)^½), a and b features (N, F).   [Heusel et al. 2017]

    With centred features A/√(N − 1), whose rows are images, C_a = AᵀA. Then tr (C_a C_b)^½ is the
    sum of the singular values of A Bᵀ, since their squares are the eigenvalues of C_a C_b. This
    needs no matrix square root, and is exact for singular covariances too. A QR factorisation first
    reduces each A to at most F rows. ValueError for N < 2.
    """
    roots, means = [], []
    for x in (a.double(), b.double()):
        if len(x) < 2:
            raise ValueError(f"a covariance needs two images or more, not {len(x)}")
        centred = (x - x.mean(0)) / math.sqrt(len(x) - 1)
        roots.append(torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred)
        means.append(x.mean(0))
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    traces = sum(root.square().sum() for root in roots)
    return ((means[0] - means[1]).square().sum() + traces - 2 * cross).clamp(min=0).item()

def inception_score(p: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y | x) ‖ p(y)) for p (N, classes), in splits: mean, deviation.   [Salimans 2016]

    ValueError if there are fewer images than splits.
    """
    if len(p) < splits:
        raise ValueError(f"the Inception score in {splits} splits needs {splits} images or more, "
                         f"not {len(p)}")
    scores = torch.stack([
        (torch.special.xlogy(q, q) - torch.special.xlogy(q, q.mean(0))).sum(1).mean().exp()
        for q in torch.tensor_split(p.double(), splits)])
    return scores.mean().item(), scores.std(correction=0).item()

def load_inception(path: str | None, data_dir: str, machine: Machine):
    """The original Inception network as TorchScript, given or downloaded; and its file."""
    file = Path(path or Path(data_dir, Path(INCEPTION[0]).name))
    if not path:
        with machine.chief_first():
            if not file.exists():
                data.fetch(INCEPTION[0], file, *INCEPTION[1:])
        if hashlib.sha256(file.read_bytes()).hexdigest() != INCEPTION[2]:  # it is code
            raise ValueError(f"{file} is not {INCEPTION[0]}: delete it, or name it by --inception")
    if not file.is_file():
        raise ValueError(f"no Inception network at {file}")
    warnings.filterwarnings("ignore", message="`torch.jit.load` is deprecated")
    try:
        return torch.jit.load(str(file), map_location=machine.device).eval(), file
    except RuntimeError as error:
        raise ValueError(f"{file} is no TorchScript file, or is cut short: it should be "
                         f"{INCEPTION[0]}") from error

@torch.no_grad()
def inception_outputs(net, images: Tensor, machine: Machine, batch: int, what: str) -> list[Tensor]:
    """Features (N, F) and class probabilities (N, classes) of uint8 images, grey ones as RGB."""
    if len(images) < machine.world:
        raise ValueError(f"{len(images)} images cannot be shared by {machine.world} processes")
    rows, mine = [], machine.share(len(images))
    progress = Progress(len(images), what, quiet=not machine.chief)
    for i in range(0, len(mine), batch):
        x = images[list(mine[i:i + batch])].to(machine.device).expand(-1, 3, -1, -1)
        try:
            rows.append([net(x, return_features=True).cpu().double(),
                         net(x, no_output_bias=True).cpu().double()])
        except RuntimeError as error:
            raise ValueError("the Inception file is not the network expected: "
                             f"{str(error).strip().splitlines()[-1]}") from error
        progress.update(min((i + len(x)) * machine.world, len(images)))
    outputs = [machine.gather(torch.cat(x), len(images)) for x in zip(*rows)]
    if not all(x.dim() == 2 and x.isfinite().all() for x in outputs):
        raise ValueError("the Inception network's outputs are not finite rows of numbers")
    return outputs

def scores(trained, images: Tensor, name: str, split: str, machine: Machine, args) -> None:
    """Prints FID against `images` and the Inception score, of samples that were read or made here.
    """
    made = data.read_tensor(args.samples) if args.samples else None
    net, file = load_inception(args.inception, args.data_dir, machine)
    if made is None:
        progress = Progress(args.n, "samples", quiet=not machine.chief)
        made = sample.draw_samples(trained, args.n, args.seed, args.batch_size, args.steps, machine,
                                   progress, **({"clip": False} if args.no_clip else {}))
    if made.shape[1:] != images.shape[1:]:
        raise ValueError(f"{args.samples} has images of {tuple(made.shape[1:])}, {name} of "
                         f"{tuple(images.shape[1:])}")
    if min(len(made), len(images)) < 2:
        raise ValueError("FID needs two images or more on either side")
    features, probabilities = inception_outputs(net, made, machine, args.batch_size, "samples seen")
    key = seed_of(data.fingerprint(images, tuple(images.shape)),
                  hashlib.sha256(file.read_bytes()).hexdigest())
    cache = Path(args.data_dir, f"inception-{Path(name).stem}-{split}-{key:x}.pt")
    real, new = None, False
    if cache.exists():
        try:
            found = torch.load(cache, weights_only=True)
            if found.dim() != 2 or found.shape[1] != features.shape[1] or len(found) < 2:
                raise ValueError("these are not the features of these images")
            real = found
        except Exception as error:  # torch.load raises many kinds of error for a damaged file
            say(f"{cache} is damaged ({data.first_line(error)}): computed anew")
    if real is None:
        real, _ = inception_outputs(net, images, machine, args.batch_size, "images seen")
        new = True
    if not machine.chief:
        return
    count = f"{len(made)} samples, rounded to 8 bits"
    print(f"FID {frechet_distance(features, real):.4f} ({count}; {len(images)} images of {name}, "
          f"{split + ' split' if split else 'which has no splits'}, 8 bits)")
    if len(made) >= 10:
        mean, deviation = inception_score(probabilities)
        print(f"Inception score {mean:.3f} ± {deviation:.3f} ({count}; deviation over 10 splits)")
    if min(len(made), len(images)) < 50_000:
        say(f"warning: the paper's scores are of 50,000 samples; with {len(made)} samples and "
            f"{len(images)} images FID is biased upwards")
    if new:  # after the result has been printed
        with data.written(cache) as out:
            torch.save(real, out)

# === Files of compress.py =========================================================================

CUTS = (16, 32, 64, 128, 256)
RIVALS = {"WebP, lossless": dict(format="WEBP", lossless=True, quality=100, method=6),
          **{f"WebP, quality {q}": dict(format="WEBP", quality=q, method=6) for q in (1, 50)},
          **{f"JPEG, quality {q}": dict(format="JPEG", quality=q) for q in (5, 25, 75)}}

def files(images: Tensor, encode: Callable, decode: Callable, out: Path) -> None:
    """Prints bytes, bits/dim and RMSE of files, of their beginnings and of other formats.

    encode: a picture, uint8 (C, H, W), → bytes; decode: bytes, or the first of them, → a picture.
    `out` gets what CUTS and all bytes show of the first eight pictures, a row each.
    """
    rows, shown, progress = {}, [], Progress(len(images), "images")
    for i, image in enumerate(images, 1):
        def note(name: str, size: int, decoded: Tensor, image=image) -> None:
            error = (decoded.double() - image.double()).square().mean().item()
            rows.setdefault(name, []).append((size, error))
        content = encode(image)
        for cut in (*CUTS, len(content)):
            try:
                shown.append(decode(content[:cut]))
            except ValueError:  # too few bytes to show anything: grey
                if cut == len(content):
                    raise
                shown.append(torch.full_like(image, 128))
            name = "whole files" if cut == len(content) else f"their first {cut} bytes"
            note(name, min(cut, len(content)), shown[-1])
        note("PNG", len(data.png(image)), image)
        with contextlib.suppress(ImportError):  # without Pillow PNG is the only rival
            from PIL import Image
            size, mode = image.shape[:0:-1], "L" if len(image) == 1 else "RGB"
            picture = Image.frombytes(mode, size, data.raw_bytes(image.permute(1, 2, 0)))
            for name, options in RIVALS.items():
                picture.save(file := io.BytesIO(), **options)
                raw = bytearray(Image.open(file).convert(mode).tobytes())
                again = torch.frombuffer(raw, dtype=torch.uint8).view(*image.shape[1:], -1)
                note(name, len(file.getvalue()), again.permute(2, 0, 1))
        progress.update(i)
    for name, values in rows.items():
        size, error = torch.tensor(values, dtype=torch.float64).mean(0).tolist()
        print(f"{name:22} {size:8.1f} bytes {8 * size / images[0].numel():8.3f} bits/dim   "
              f"RMSE {error ** 0.5:6.2f}")
    columns = len(CUTS) + 1
    sample.write_png(out, sample.enlarged(sample.grid(torch.stack(shown[:8 * columns]), columns)))

# === The command ==================================================================================

def parse(argv):
    """The flags of evaluate.py."""
    parser = common.Parser(__doc__)
    parser.add("--checkpoint", "--no-ema", "--data-dir", "--steps", "--no-clip", "--seed",
               "--batch-size", "--device", "--precision")
    parser.add_argument("--dataset", type=word, help="as in train.py (default: that of the run)")
    parser.add_argument("--split", choices=("train", "test"), help="which images of the data set "
                        "(default: test; train for --fid)")
    parser.add_argument("--n", type=count, help="images (default: all of the split); with "
                        "--fid, samples (default: 50,000)")
    parser.add_argument("--terms", type=count, help="estimate the bound from L_0 and one "
                        "t in each of this many ranges of t (default: compute all T terms)")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of "
                        "rate-distortion.csv (default: the current one)")
    parser.add_argument("--fid", action="store_true", help="FID and Inception score")
    parser.add_argument("--samples", type=Path, help="with --fid: the images, from sample.py --out "
                        "X.pt (default: draw them)")
    parser.add_argument("--inception", type=word, help="with --fid: the TorchScript file (default: "
                        "it is downloaded)")
    args = parser.parse_args(argv)
    if not args.fid and (args.samples or args.inception or args.steps):
        raise UsageError("--samples, --steps and --inception go with --fid")
    if args.fid and args.terms:
        raise UsageError("--terms estimates the bound: leave it out with --fid")
    if args.samples and (args.steps or args.n):
        raise UsageError("--samples are there already: leave out --n and --steps")
    if args.precision == "auto" and not args.fid:
        args.precision = "fp32"
    args.split = args.split or ("train" if args.fid else "test")
    return args

@common.command
def main(argv=None) -> int:
    """Evaluates a trained network: see the text at the head of this file."""
    args = parse(argv)
    machine = common.find_machine(args.device, args.precision)
    args.batch_size = args.batch_size or (256 if machine.device.type == "cuda" else 16)
    trained, settings = None, {}
    if not (args.fid and args.samples and args.dataset):
        trained = sample.load(args.checkpoint, args.data_dir or "data", not args.no_ema, machine)
        settings = trained.settings
    name = args.dataset or settings.get("dataset")
    if not name:
        raise UsageError("--dataset is missing, and the checkpoint names none")
    args.data_dir = args.data_dir or settings.get("data_dir", "data")
    with machine.chief_first():
        images, split, padded = data.load(name, args.data_dir, args.split,
                                          settings.get("image_size"))
    if trained and tuple(images.shape[1:]) != trained.shape:
        raise ValueError(f"the images of {name} are {tuple(images.shape[1:])}, the network's "
                         f"{trained.shape}")
    if machine.chief:
        part = f"{split} split" if split else "which has no splits"
        print(f"{trained.source if trained else args.samples}; {name}, {part}"
              + (", the padded border counted in" if padded else ""))
    if args.fid:
        args.n = args.n or 50_000
        scores(trained, images, name, split, machine, args)
        return 0
    if args.n and args.n > len(images):
        raise ValueError(f"--n {args.n}: {name} has {len(images)} images")
    if not args.terms and machine.chief:
        data.check_writable(args.out / "rate-distortion.csv")
    likelihood(trained, images[:args.n], machine, args)
    return 0

if __name__ == "__main__":
    sys.exit(main())
