"""Table 1, Figure 5 and Table 4: bits/dim, rate and distortion, FID and Inception score.

    python evaluate.py --terms 20                      bits/dim from 21 network calls per image
    python evaluate.py --n 64                          all T terms; rate-distortion.csv, Table 4
    python evaluate.py --fid --n 50000                 FID and Inception score of 50,000 samples
    python evaluate.py --fid --samples samples.pt      the same for existing samples

All noise is a function of seed, image and t: the same command gives the same numbers.
"""
from __future__ import annotations

import hashlib
import math
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from support import data
from support.checkpoint import Trained, inference_model, load, weights_hash
from support.command import (Parser, Progress, UsageError, command, nonblank, one_line, path_of,
                             plain, positive_int, reading, say, written)
from support.machine import Machine, Noise, seed_of, start_machine

import torch
from torch import Tensor

import ddpm
import sample

INCEPTION = ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
             "inception-2015-12-05.pt",
             "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4")

# === Bits/dim, rate and distortion ================================================================

def strata(T: int, K: int) -> list[tuple[int, int]]:
    """Cuts 2 … T into at most K ranges (first, last), evenly spaced in log t.

    So they are short at small t, where L_{t−1} is largest.
    """
    ends = [2]
    for k in range(1, K + 1):
        ends.append(max(ends[-1], round(2 * ((T + 1) / 2) ** (k / K))))
    return [(first, end - 1) for first, end in zip(ends, ends[1:]) if end > first]

def estimate(model: ddpm.Model, x0: Tensor, index: range, seed: int, K: int,
             noise: Noise) -> Tensor:
    """L_T + Σ_k length_k · L_{t_k−1} + L_0, t_k uniform in the k-th of K strata.   [DDPM Eq. 5]

    Unbiased for Eq. 5 with any strata. x0: 8-bit images (B, …); index: their numbers in the data
    set; noise: theirs → (B, 3) nats: L_T, L_1 + … + L_{T−1}, L_0.
    """
    s, terms = model.s, []
    for k, (first, last) in enumerate([(1, 1), *strata(s.T, K)]):
        length = last - first + 1
        t = torch.tensor([first + seed_of(seed, "stratum", i, k) % length for i in index],
                         device=x0.device)
        x_t = ddpm.q_sample(s, x0, t, noise(t))
        p = ddpm.p_mean_variance(model, x_t, t)
        terms.append(length * ddpm.vlb_term(s, x0, x_t, t, p))
    middle = sum(terms[1:], torch.zeros_like(terms[0]))
    return torch.stack([ddpm.prior_kl(s, x0), middle, terms[0]], 1)

def spread(values: Tensor) -> str:
    """Mean ± standard error of the mean."""
    error = f" ± {values.std().item() / math.sqrt(len(values)):.6f}" if len(values) > 1 else ""
    return f"{values.mean().item():.6f}{error}"

@torch.no_grad()
def likelihood(trained: Trained, images: Tensor, machine: Machine, args, table) -> None:
    """Prints the parts of Eq. 5 in bits/dim and, with all T terms, writes rate and distortion over
    t to the file `table`."""
    model = inference_model(trained.model, machine)
    if args.no_clip:
        model = replace(model, clip=False)
    s = model.s
    n, mine = len(images), range(len(images))[machine.share]
    progress = Progress(n, "images", quiet=not machine.is_main)
    parts = [torch.zeros(0, 3, dtype=torch.float64)]
    curves = [torch.zeros(0, s.T, 2, dtype=torch.float64)]
    for i in range(0, len(mine), args.batch_size):
        index = mine[i:i + args.batch_size]
        x0 = data.to_model(images[list(index)]).to(machine.device)
        noise = Noise(args.seed, index, trained.shape, machine.device)
        if args.terms:
            bound = estimate(model, x0, index, args.seed, args.terms, noise)
        else:
            rates, curve = {}, []
            for t, _, x0_hat, rate in ddpm.send(model, x0, noise):
                rates[t] = rate
                if t:
                    curve.append(torch.stack([rate.cpu(), ddpm.distortion(x0, x0_hat).cpu()], 1))
                progress.update(min(n - 1, (i + len(index) * (1 - t / s.T)) * machine.world))
            bound = torch.stack([rates[s.T], rates[1] - rates[s.T], rates[0] - rates[1]], 1)
            curves.append(torch.stack(curve, 1))                            # (B, T, 2)
        parts.append(bound.cpu())
        progress.update(min((i + len(index)) * machine.world, n))
    bits = ddpm.bits_per_dim(machine.gather(torch.cat(parts), n), images)
    if not bits.isfinite().all():
        raise ValueError("the bound is not finite: the network's output is not")
    curve = None if args.terms else machine.gather(torch.cat(curves), n)
    if not machine.is_main:
        return
    K = len(strata(s.T, args.terms)) if args.terms else None
    how = f"{K} strata, {K + 1} network calls per image" if K else f"all {s.T} terms"
    print(f"bits/dim ≤ {spread(bits.sum(1))} (± standard error; {n} images; {how})")
    for name, column in zip(("L_T", "L_1 + … + L_{T−1}", "L_0"), bits.T):
        print(f"  {name:17} {spread(column)}")
    if curve is not None:
        rate_distortion(curve, images, args.out / "rate-distortion.png", table)

def rate_distortion(curve: Tensor, images: Tensor, plot: Path, table) -> None:
    """§4.3: writes rate (bits/dim) and distortion (RMSE) at every t, plots them, prints Table 4."""
    T = curve.shape[1]
    rate = ddpm.bits_per_dim(curve[..., 0].mean(0), images).tolist()
    rmse = curve[..., 1].square().mean(0).sqrt().tolist()  # root of the mean over all images
    print(f"rate {rate[-1]:.4f} bits/dim at a distortion of RMSE {rmse[-1]:.4f} of 255\n"
          "  reverse step T−t+1   rate bits/dim   RMSE   (Table 4)")
    for step in sorted({max(1, round(T * part)) for part in (1, 0.9, 0.8, 0.5, 0.1)}, reverse=True):
        print(f"  {step:18d}   {rate[step - 1]:13.5f}   {rmse[step - 1]:6.2f}")
    table.write(b"t,rate_bits_per_dim,distortion_rmse\n")
    for t, r, d in zip(range(T, 0, -1), rate, rmse):
        table.write(f"{t},{r:.8f},{d:.5f}\n".encode())

    def draw(axes) -> None:
        axes.plot(rate, rmse)
        axes.set(xlabel="rate (bits/dim)", ylabel="distortion (RMSE)")
    if not data.plot(plot, draw):
        say("no plot: pip install matplotlib")

# === FID and Inception score ======================================================================

def frechet_distance(a: Tensor, b: Tensor) -> float:
    """‖μ_a − μ_b‖² + tr(C_a + C_b − 2 (C_a C_b)^½), a and b features (N, F).   [Heusel et al. 2017]

    Let A be the centred features over √(N − 1), a row per image: C_a = AᵀA. Then tr (C_a C_b)^½ is
    the sum of the singular values of A Bᵀ, because their squares are the eigenvalues of C_a C_b.
    This needs no matrix square root and is exact for singular covariances too. A QR factorisation
    first reduces each A to at most F rows. ValueError for N < 2.
    """
    roots, means = [], []
    for x in (a.double(), b.double()):
        if len(x) < 2:
            raise ValueError(f"a covariance needs at least two images, not {len(x)}")
        centred = (x - x.mean(0)) / math.sqrt(len(x) - 1)
        roots.append(torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred)
        means.append(x.mean(0))
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    traces = sum(root.square().sum() for root in roots)
    return ((means[0] - means[1]).square().sum() + traces - 2 * cross).clamp(min=0).item()

def inception_score(p: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y | x) ‖ p(y)), p (N, classes), N ≥ splits: mean, deviation.   [Salimans 2016]"""
    scores = torch.stack([
        (torch.special.xlogy(q, q) - torch.special.xlogy(q, q.mean(0))).sum(1).mean().exp()
        for q in torch.tensor_split(p.double(), splits)])
    return scores.mean().item(), scores.std(correction=0).item()

def load_inception(path: str | None, data_dir: str, machine: Machine):
    """The original Inception network as TorchScript: from `path`, or downloaded and verified."""
    file = Path(path or Path(data_dir, Path(INCEPTION[0]).name))
    if not path:
        with machine.main_first():
            data.fetch(INCEPTION[0], file, INCEPTION[1])
    warnings.filterwarnings("ignore", message="`torch.jit.load` is deprecated")
    with reading(file, f"the TorchScript network of {INCEPTION[0]}"):
        if not path and hashlib.sha256(file.read_bytes()).hexdigest() != INCEPTION[1]:
            raise ValueError("wrong SHA-256, and the file is code: delete it")
        return torch.jit.load(str(file), map_location=machine.device).eval()

@torch.no_grad()
def inception_outputs(net, images: Tensor, machine: Machine, batch: int, what: str,
                      *wanted: str) -> list[Tensor]:
    """The network's outputs for uint8 images, grey ones as RGB, called with each of these flags:
    return_features gives features (N, F), no_output_bias class probabilities (N, classes)."""
    if len(images) < machine.world:
        raise ValueError(f"{len(images)} images are too few for {machine.world} processes")
    rows, mine = [], range(len(images))[machine.share]
    progress = Progress(len(images), what, quiet=not machine.is_main)
    for i in range(0, len(mine), batch):
        x = images[list(mine[i:i + batch])].to(machine.device).expand(-1, 3, -1, -1)
        try:
            rows.append([net(x, **{flag: True}).cpu() for flag in wanted])
            for flag, y in zip(wanted, rows[-1]):
                if (y.shape[:1] != x.shape[:1] or y.dim() != 2 or not y.is_floating_point()
                        or not y.isfinite().all()):
                    raise ValueError(f"{flag} does not give a finite row of numbers per image")
                if flag == "no_output_bias" and (
                        y.min() < 0 or (y.double().sum(1) - 1).abs().max() > 1e-3):
                    raise ValueError(f"{flag} does not give probabilities")
        except Exception as error:  # of somebody's TorchScript
            raise ValueError(f"this network is not Inception: {one_line(error)}") from error
        progress.update(min((i + len(x)) * machine.world, len(images)))
    return [machine.gather(torch.cat(x).double(), len(images)) for x in zip(*rows)]

def scores(net, made: Tensor, images: Tensor, about: str, machine: Machine, args) -> None:
    """Prints the Inception score of the samples `made`, and their FID against `images`."""
    features, probabilities = inception_outputs(net, made, machine, args.batch_size, "samples seen",
                                                "return_features", "no_output_bias")
    real, = inception_outputs(net, images, machine, args.batch_size, "images seen",
                              "return_features")
    if not machine.is_main:
        return
    count = f"{len(made)} samples, rounded to 8 bits"
    print(f"FID {frechet_distance(features, real):.4f} ({count}; {len(images)} images of {about})")
    if len(made) >= 10:
        mean, deviation = inception_score(probabilities)
        print(f"Inception score {mean:.3f} ± {deviation:.3f} ({count}; deviation over 10 splits)")
    if min(len(made), len(images)) < 50_000:
        say(f"warning: the paper uses 50,000 samples; with {len(made)} samples and "
            f"{len(images)} images FID is biased upwards")

# === The command ==================================================================================

DATA = "data_dir dataset split skip_bad batch_size device "
NETWORK = "checkpoint no_ema no_clip seed precision n "
READS = {  # what is evaluated → the flags that it uses
    "bits/dim": DATA + NETWORK + "out", "bits/dim with --terms": DATA + NETWORK + "terms",
    "--fid": DATA + NETWORK + "fid steps compile inception out",
    "--fid of --samples and --dataset": DATA + "fid samples inception",
    "--fid of --samples": DATA + "fid samples inception checkpoint"}

def parse(argv):
    """The flags of evaluate.py."""
    parser = Parser(__doc__, "--checkpoint", "--no-ema", "--data-dir", "--steps", "--no-clip",
                    "--seed", "--batch-size", "--device", "--precision", "--compile")
    parser.add_argument("--dataset", type=nonblank, help="as in train.py (default: the run's)")
    parser.add_argument("--split", choices=tuple(data.SPLITS), help="split of the data set; "
                        "val/, valid/ or validation/ in a folder is its val split, and its test "
                        "split if there is no test/ (default: test; train for --fid)")
    parser.add_argument("--skip-bad", action="store_true", help="skip the pictures of a folder "
                        "that cannot be read (default: as in the run)")
    parser.add_argument("--n", type=positive_int, help="number of images (default: all); "
                        "with --fid, of samples (default: 50,000)")
    parser.add_argument("--terms", type=positive_int, help="estimate the bound from L_0 and one "
                        "t in each of this many ranges of t (default: compute all T terms)")
    parser.add_argument("--out", type=path_of, default=Path("."), help="folder for "
                        "rate-distortion.csv (default: the current one)")
    parser.add_argument("--fid", action="store_true", help="FID and Inception score")
    parser.add_argument("--samples", type=path_of, help="with --fid: existing samples, a .pt file "
                        "of sample.py or a folder of pictures (default: draw them)")
    parser.add_argument("--inception", type=nonblank, help="with --fid: the TorchScript file "
                        "(default: download it)")
    def mode(args) -> str:
        if args.fid and args.samples:
            return f"--fid of --samples{' and --dataset' * bool(args.dataset)}"
        return "--fid" if args.fid else f"bits/dim{' with --terms' * bool(args.terms)}"
    args = parser.parse_mode(argv, mode, READS)
    if args.out.suffix in (".csv", ".pt"):
        raise UsageError(f"--out {args.out}: a folder, in which the files have their own names")
    if not args.fid:
        args.precision = args.precision or "fp32"
    return args

@command
def main(argv=None) -> int:
    """Evaluates a trained network: see the text at the head of this file."""
    args = parse(argv)
    machine = start_machine(args.device, args.precision, args.compile)
    machine.agree("command line", vars(args))
    args.batch_size = args.batch_size or (256 if machine.device.type == "cuda" else 16)
    trained, settings = None, {}
    made = (data.read_samples(args.samples, args.data_dir, args.skip_bad) if args.samples else None)
    if made is None or not args.dataset:
        trained = load(args.checkpoint, not args.no_ema, machine)
        settings = trained.settings
    name = args.dataset or settings.get("dataset")
    side = settings.get("image_size") if made is None else made.shape[2]
    if not name:
        raise UsageError("--dataset is missing, and the checkpoint names none")
    if args.skip_bad and not any(Path(x).is_dir() for x in (name, args.samples) if x):
        raise UsageError("--skip-bad has no effect: there is no folder of pictures")
    with machine.main_first():
        images, about = data.load(
            name, args.data_dir, args.split or ("train" if args.fid else "test"), side,
            args.skip_bad or settings.get("skip_bad", False), exact=bool(args.split))
    machine.agree("weights, images or samples", lambda: (
        trained and weights_hash(trained).hex(),
        [data.fingerprint(x) for x in (images, made) if x is not None]))
    if args.terms and args.terms > trained.s.T - 1:
        raise UsageError(f"--terms {args.terms}: L_1 … L_(T−1) are {trained.s.T - 1} terms")
    shape = trained.shape if made is None else tuple(made.shape[1:])
    first = 0 if made is None else 1  # Inception sees grey images as RGB
    if tuple(images.shape[1 + first:]) != shape[first:]:
        raise ValueError(f"images of {name} are {tuple(images.shape[1:])}, those of "
                         f"{args.samples or trained.source} {shape}")
    if machine.is_main:
        print(plain(f"{args.samples or trained.source}; {name}, {about}"))
    if args.fid:
        net = load_inception(args.inception, args.data_dir, machine)
        if made is None:
            n = args.n or 50_000
            how = dict(steps=args.steps, clip=False if args.no_clip else None)
            if machine.is_main:
                say(sample.choose_sampler(trained, **how).about)
            inception_outputs(net, images[:max(2, machine.world)], machine, 2, "tried",
                              "return_features", "no_output_bias")  # before hours of work
            progress = Progress(n, "samples", quiet=not machine.is_main)
            made = sample.draw_samples(trained, n, args.seed, args.batch_size, machine, progress,
                                       **how)
            try:
                scores(net, made, images, f"{name}, {about}", machine, args)
            except BaseException:
                if machine.is_main:
                    with written(args.out / "fid-samples.pt") as file:
                        torch.save(made, file)
                    say(f"the samples are kept: --samples {args.out / 'fid-samples.pt'}")
                raise
            return 0
        scores(net, made, images, f"{name}, {about}", machine, args)
        return 0
    if args.n and args.n > len(images):
        raise UsageError(f"--n {args.n}: {name} has {len(images)} images")
    table = args.out / "rate-distortion.csv"  # opened before the work
    with written(table) if machine.is_main and not args.terms else nullcontext() as file:
        likelihood(trained, images[:args.n], machine, args, file)
    return 0

if __name__ == "__main__":
    sys.exit(main())
