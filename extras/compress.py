"""Algorithms 3 and 4 with real bits: lossless files whose first bytes already show the picture.

    python -m extras.compress encode picture.png picture.ddpm     with the newest run's network
    python -m extras.compress decode picture.ddpm picture.png     lossless
    python -m extras.compress decode --bytes 64 picture.ddpm early.png     x̂_0 from 64 bytes
    python -m extras.compress measure --n 20                      sizes, errors of test images

To send a sample of q(x_{t−1} | x_t, x_0) to a receiver who knows only p_θ(x_{t−1} | x_t), both draw
the same candidates from p_θ, and the sender writes the number of one (`choose`). The network runs
in float64 and its outputs are rounded, so both sides compute the same bits. See docs/coding.md.
"""
from __future__ import annotations

import bisect
import contextlib
import copy
import io
import itertools
import math
import sys
import zlib
from dataclasses import replace
from pathlib import Path

from support import data
from support.checkpoint import Trained, load, weights_hash
from support.command import (Parser, Progress, UsageError, command, int_between, path_of,
                             positive_int, reading, say, written)
from support.machine import seed_of, start_machine

import torch
import torch.nn.functional as F
from torch import Tensor

import ddpm

MAGIC, HEADER = b"DDPM\4", 13  # 4: the version; then b, 4 bytes of a hash, 3 of the length
STEPS, CLASSES, BLOCK, BITS = 20, 8, 1024, 16

# === The arithmetic code ==========================================================================

class Code:
    """An arithmetic code, read from `content` or else written, in time linear in its length.

    The symbols so far are an interval of numbers in [0, 1): the bytes `sent`, followed by 16 bytes
    that as an integer lie in [low, low + width), 2^120 ≤ width ≤ 2^128. If low reaches 2^128, it
    carries into `sent`; the carries are kept separately and added at the end.
    """

    def __init__(self, content: bytes | None = None):
        self.low, self.width, self.content = 0, 2 ** 128, content
        self.sent, self.carries = bytearray(), bytearray()

    def __call__(self, frequencies: list[int], symbol: int = 0) -> int:
        """Writes or reads a symbol, and returns it. The frequencies sum to 2^16.

        EOFError if the bytes read so far allow more than one symbol.
        """
        unit = self.width >> BITS
        if self.content is not None:
            known = self.content[len(self.sent):len(self.sent) + 16]
            ends, values = list(itertools.accumulate(frequencies)), (
                int.from_bytes(known.ljust(16, end), "big") for end in (b"\0", b"\xff"))
            symbol, other = (bisect.bisect_right(ends, (x - self.low) % 2 ** 128 // unit)
                             for x in values)
            if symbol != other or symbol == len(ends):
                raise EOFError
        self.low += unit * sum(frequencies[:symbol])
        self.width = unit * frequencies[symbol]
        if self.low >= 2 ** 128:
            self.low, self.carries[-1] = self.low - 2 ** 128, 1
        while self.width < 2 ** 120:
            self.sent.append(self.low >> 120)
            self.carries.append(0)
            self.low, self.width = self.low % 2 ** 120 << 8, self.width << 8
        return symbol

    def to_bytes(self) -> bytes:
        """The fewest bytes that determine a number in the interval, whatever follows them."""
        for n in itertools.count():
            value = -(-self.low >> (less := 128 - 8 * n))                         # rounded up
            if value + 1 << less <= self.low + self.width:
                sent = sum(int.from_bytes(x, "big") for x in (self.sent, self.carries))
                return ((sent << 8 * n) + value).to_bytes(len(self.sent) + n, "big")

def frequencies(p: Tensor) -> Tensor:
    """Positive integers with sum 2^16, as nearly proportional to p (n, …) ≥ 0 as possible."""
    found = (p / p.sum(0) * (2 ** BITS - len(p))).floor().long() + 1
    rest = 2 ** BITS - found.sum(0, keepdim=True)
    return found.scatter_add(0, found.argmax(0, keepdim=True), rest)

# === A sample of q for a receiver who knows p =====================================================

def rounded(x: Tensor) -> Tensor:
    """x rounded to multiples of 2⁻¹⁶, which are the same on every machine."""
    return (x * 2 ** 16).round() / 2 ** 16

# Φ⁻¹ of 65,536 numbers, selected by 16 random bits: torch.randn differs between machines.
NORMAL = rounded(torch.special.ndtri((torch.arange(65536).double() + 0.5) / 65536)).float()

def candidates(key: tuple, block: int, n: int) -> Tensor:
    """z_i ~ N(0, I) for each i of a block: (BLOCK, n), a function of key and block."""
    g = torch.Generator().manual_seed(seed_of("candidates", key, block))
    words = torch.empty(BLOCK * n // 4, dtype=torch.int64).random_(-2 ** 63, None, generator=g)
    return NORMAL[words.view(torch.int16).int() + 32768].view(BLOCK, n)

def choose(key: tuple, delta: Tensor, b: int) -> int:
    """K = argmin_i T_i / w_i for i < 2^b, where w_i is the ratio q/p of the densities at z_i.

    q = N(δ, I), p = N(0, I), and T_1 < T_2 < … are the arrival times of a Poisson process. With
    infinitely many candidates z_K would be a sample of q.   [Li, El Gamal 2018]
    """
    g = torch.Generator().manual_seed(seed_of("arrivals", key))
    waits = torch.empty(2 ** b - 1, dtype=torch.float64).exponential_(generator=g)
    log_w = torch.cat([candidates(key, block, len(delta)) @ delta.float()      # up to a constant
                       for block in range(math.ceil(2 ** b / BLOCK))])
    return int((waits.cumsum(0).log() - log_w[:len(waits)]).argmin()) + 1

def zipf(kl: float, b: int) -> list[int]:
    """Frequencies of the octaves j = ⌊log₂ K⌋ < b: integrals instead of Zipf's sums.

    ∫ x^{−λ} dx from 2^j to 2^{j+1} is ∝ 2^{−j(λ−1)}, where λ = 1 + 1/(KL + (log₂ e)/e + 1).
    """
    return frequencies(2 ** (-torch.arange(b).double() / (kl + 1.5307378))).tolist()

# === Algorithms 3 and 4 ===========================================================================

def transmit(trained: Trained, code: Code, b: int, picture: Tensor | None = None):
    """Algorithm 3 if there is a picture, uint8 (C, H, W), else Algorithm 4, by the same lines.

    `code` writes a symbol, or reads one, and returns it. Yields the states of `ddpm.receive`, which
    both sides compute alike; the last one is the picture.
    """
    T, ratio = trained.s.T, min(125, trained.s.T)
    times = sorted({round(T * ratio ** (i / (STEPS - 1) - 1)) for i in range(STEPS)})
    s = ddpm.respace(trained.s, times)
    net = copy.deepcopy(trained.net).double().requires_grad_(False)
    x, scale = torch.zeros(1, *trained.shape, dtype=torch.float64), 0
    x0 = x if picture is None else data.to_model(picture[None]).double()  # only the sender has it

    def message(t: int, mean: Tensor, sigma: Tensor, wanted: Tensor) -> Tensor:
        """x_t ~ N(wanted, σ²), for a receiver who knows only N(mean, σ²)."""
        nonlocal x, scale
        delta = ((wanted - mean) / sigma).flatten()
        # First the KL, ‖δ‖²/2, in half octaves, which change little from step to step.
        law = frequencies(2.0 ** -(torch.arange(64) - scale).abs()).tolist()
        kl = delta.square().sum().item() / math.log(4)
        scale = code(law, min(63, round(2 * math.log2(1 + kl))))
        chunks = max(1, round((kl := 2 ** (scale / 2) - 1) / max(b - 2, 1)))
        law, z = zipf(kl / chunks, b), torch.zeros(x.numel())
        order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(t))
        for c, part in enumerate(order.chunk(chunks)):
            k = 1 if picture is None else choose((t, c), delta[part], b)
            octave = 2 ** code(law, k.bit_length() - 1)
            k = octave + code([2 ** BITS // octave] * octave, k - octave)
            z[part] = candidates((t, c), (k - 1) // BLOCK, len(part))[(k - 1) % BLOCK]
        x = rounded(mean + sigma * z.view_as(x))
        return x

    def last(mean: Tensor, x0_hat: Tensor) -> Tensor:
        """x_0, exactly, with Eq. 13's 256 probabilities per pixel."""
        contrast = F.max_pool2d(x0_hat, 3, 1, 1) + F.max_pool2d(-x0_hat, 3, 1, 1)
        levels, pixels = data.to_model(torch.arange(256)[:, None]), bytearray(x.numel())
        for part in contrast.flatten().argsort(stable=True).chunk(CLASSES):
            def log_p(x0: Tensor, k: int, part=part) -> Tensor:     # σ_1² = 2^(k − 10) (1 − ᾱ)
                return ddpm.discretized_gaussian_log_likelihood(
                    x0, mean.flatten()[part], (1 - s.alpha_bars[1]) * 2.0 ** (k - 10))
            own = x0.flatten()[part]
            k = code([4096] * 16, max(range(16), key=lambda k: log_p(own, k).sum().item()))
            laws = frequencies(log_p(levels, k).exp()).T.tolist()
            for i, law, pixel in zip(part.tolist(), laws, data.to_uint8(own).tolist()):
                pixels[i] = code(law, pixel)
        check = zlib.crc32(pixels).to_bytes(4, "big")
        if [code([256] * 256, byte) for byte in check] != list(check):
            raise EOFError("the pixels do not match their checksum")
        return data.to_model(torch.frombuffer(pixels, dtype=torch.uint8).view_as(x))

    def receive(t: int, p: ddpm.Reverse) -> Tensor:
        if t == 0:
            return last(rounded(p.mean), rounded(p.x0_hat))
        q = ddpm.q_posterior_mean_variance(s, x0, x, torch.tensor([t + 1]))
        return message(t, rounded(p.mean), p.sigma2.sqrt(), q.mean)

    x_T = message(s.T, x, torch.ones(()), s.alpha_bars[s.T].sqrt() * x0)
    model = replace(trained.model, s=s, net=lambda x, t: rounded(net(x, t)), variance="fixed_small")
    return ddpm.receive(model, x_T, receive)

class BadFile(ValueError):
    """These bytes are not a file of this version and network, or are damaged."""

def header(trained: Trained, b: int, length: int) -> bytes:
    """The header of a file made with this network, before a body of `length` bytes."""
    return MAGIC + bytes([b]) + weights_hash(trained)[:4] + length.to_bytes(3, "big")

def encode(trained: Trained, picture: Tensor, b: int = 12, quiet: bool = True) -> bytes:
    """A picture, uint8 (C, H, W), as the bytes of a file. ValueError for another shape."""
    if tuple(picture.shape) != trained.shape:
        raise ValueError(f"the network takes {trained.shape}, C×H×W, not {tuple(picture.shape)}")
    code, progress = Code(), Progress(STEPS, "steps", quiet=quiet)
    for state in transmit(trained, code, b, picture):
        progress.update(STEPS - state.t)
    return header(trained, b, len(body := code.to_bytes())) + body

def decode(trained: Trained, content: bytes) -> tuple[Tensor, int]:
    """The picture, or x̂_0 of the last x_t that the bytes determine; and its step, 0 if complete.

    BadFile for another file or network, or damage (not in the first part of a file: the checksum
    comes last). EOFError for too few bytes to show anything.
    """
    if content[:5] != MAGIC or len(content) < HEADER or not 1 <= content[5] <= 16:
        raise BadFile(f"not a file of this version, or fewer than its first {HEADER} bytes")
    body, length = content[HEADER:], int.from_bytes(content[10:HEADER], "big")
    if content[:HEADER] != header(trained, content[5], length):
        raise BadFile("made with another network: give its --checkpoint")
    if len(body) > min(length, 4 * STEPS * math.prod(trained.shape)):  # no code is longer
        raise BadFile("damaged")
    code, state = Code(body), None
    with contextlib.suppress(EOFError):
        for state in transmit(trained, code, content[5]):
            pass
    done = bool(state) and state.t == 0
    if done != (len(body) == length) or done and code.to_bytes() != body:
        raise BadFile("damaged")
    if not state:
        raise EOFError(f"{len(content)} bytes are too few to show anything")
    return data.to_uint8(state.x0_hat)[0], state.t

CUTS = (16, 32, 64, 128, 256)
RIVALS = {"PNG": dict(format="PNG", optimize=True),
          "WebP, lossless": dict(format="WEBP", lossless=True, quality=100, method=6),
          **{f"WebP, quality {q}": dict(format="WEBP", quality=q, method=6) for q in (1, 50)},
          **{f"JPEG, quality {q}": dict(format="JPEG", quality=q) for q in (5, 25, 75)}}

def measure(trained: Trained, images: Tensor, b: int) -> Tensor:
    """Prints bytes, bits/dim and RMSE of files, of their first bytes and of other formats.

    Returns a picture: the first eight images, a row each, from each of CUTS and from all bytes.
    """
    Image, _ = data.pillow()
    rows, shown, progress = {}, [], Progress(len(images), "images")
    for i, image in enumerate(images, 1):
        content = encode(trained, image, b)
        for cut in (*CUTS, len(content)):
            shown.append(torch.full_like(image, 128))  # grey: too few bytes to show anything
            with contextlib.suppress(EOFError):
                shown[-1] = decode(trained, content[:cut])[0]
            name = "whole files" if cut == len(content) else f"their first {cut} bytes"
            rows.setdefault(name, []).append((min(cut, len(content)), shown[-1], image))
        mode, raw = "L" if len(image) == 1 else "RGB", data.raw_bytes(image.permute(1, 2, 0))
        picture = Image.frombytes(mode, tuple(image.shape[:0:-1]), raw)
        for name, options in RIVALS.items():
            picture.save(file := io.BytesIO(), **options)
            again = data.pixels(Image.open(file).convert(mode))
            rows.setdefault(name, []).append((len(file.getvalue()), again, image))
        progress.update(i)
    for name, row in rows.items():
        size = sum(length for length, *_ in row) / len(row)
        errors = torch.stack([(x.double() - y.double()).square().mean() for _, x, y in row])
        print(f"{name:22} {size:8.1f} bytes {8 * size / images[0].numel():8.3f} bits/dim   "
              f"RMSE {errors.mean().sqrt():6.2f}")
    columns = len(CUTS) + 1
    return data.tiled(torch.stack(shown[:8 * columns]), columns)

@command
def main(argv=None) -> int:
    """Writes a file, reads one, or measures: see the text at the head of this file."""
    parser = Parser(__doc__, "--checkpoint", "--data-dir")
    parser.add_argument("action", choices=("encode", "decode", "measure"))
    parser.add_argument("files", nargs="*", type=path_of, metavar="FILE", help="the one to read "
                        "and the one to write: a .png and a compressed file, or the reverse")
    parser.add_argument("--b", type=int_between(1, 16), help="2^b candidates (default: 12)")
    parser.add_argument("--bytes", type=positive_int, help="decode only the first N bytes")
    parser.add_argument("--n", type=positive_int, help="images to measure (default: 20)")
    args = parser.parse_intermixed_args(argv)  # allows flags between the files
    if len(args.files) != 2 * (args.action != "measure"):
        raise UsageError("encode and decode take two FILEs, measure none")
    source, target = args.files or (None, Path("compress.png"))
    both = source and source.exists() and target.exists()
    if source == target or both and source.samefile(target):
        raise UsageError(f"{args.action} would overwrite what it reads: give two different FILEs")
    for flag, actions in {"b": "encode measure", "bytes": "decode", "n": "measure"}.items():
        if getattr(args, flag) and args.action not in actions:
            raise UsageError(f"--{flag} has no effect on {args.action}")
    if args.action == "encode" and target.suffix.lower() == ".png" or (
            args.action == "decode" and target.suffix.lower() != ".png"):
        raise UsageError(f"{args.action} {source} {target}: "
                         f"decode writes a .png, encode none")
    trained = load(args.checkpoint, True, start_machine("cpu"))
    if trained.settings["variance"] == "learned":
        raise ValueError("a network with learned variance needs all T steps: too many bits")
    if args.action == "measure" and "dataset" not in trained.settings:
        raise UsageError("measure needs a run of train.py, whose data set has test images")
    with written(target) as file:  # opened before the work
        if args.action == "measure":
            images, _ = data.load(trained.settings["dataset"], args.data_dir, "test",
                                  trained.shape[1], trained.settings.get("skip_bad", False))
            if (args.n or 0) > len(images):
                raise UsageError(f"--n {args.n}: there are {len(images)} test images")
            file.write(data.png(measure(trained, images[:args.n or 20], args.b or 12)))
            said = "shows what the first bytes tell"
        elif args.action == "encode":
            with reading(source, "a PNG"), data.pillow()[0].open(source, formats=["PNG"]) as image:
                lost = {"16 bits": any("16" in part[3] for part in image.tile),
                        "transparency": image.has_transparency_data, "frames": image.is_animated,
                        "a colour profile": "icc_profile" in image.info,
                        "a rotation": image.getexif().get(274, 1) != 1,  # Orientation
                        f"mode {image.mode}": image.mode not in ("L", "RGB")}
                if names := ", ".join(name for name in lost if lost[name]):
                    raise ValueError(f"only 8-bit grey or RGB can be encoded; this has {names}")
                picture = data.pixels(image)
            content = encode(trained, picture, args.b or 12, False)
            file.write(content)
            said = f"has {len(content)} bytes"
        else:
            with reading(source, "a compressed picture"):
                content = source.read_bytes()[:args.bytes]
            try:
                picture, t = decode(trained, content)
            except (BadFile, EOFError) as error:
                raise ValueError(f"{source} cannot be decoded: {error}") from error
            total = HEADER + int.from_bytes(content[10:HEADER], "big")
            if t and not args.bytes:
                raise ValueError(f"{source} is cut off, {len(content)} of {total} bytes: --bytes "
                                 f"{len(content)} shows what they tell")
            file.write(data.png(picture))
            said = f"shows what {len(content)} of {total} bytes tell: " + (
                f"an estimate, x̂_0 at step {t} of {STEPS}" if t else "the pixels, exactly")
    say(f"{target} {said}")
    return 0

if __name__ == "__main__":
    sys.exit(main())
