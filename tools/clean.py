"""How many samples of `train.py --dataset shapes` are one clean disc, square, triangle or ring?

    python tools/clean.py runs/shapes                  samples of this network
    python tools/clean.py samples.pt                   images of sample.py --out samples.pt

A sample is accepted if a picture of the generator's family (one outline of any kind, position and
size, in one colour on another) fits it: the root mean square error is below LIMIT levels, and below
a tenth of the distance between the two colours. The generator's test images are checked, too.
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.checkpoint import load
from support.command import Parser, Progress, command, positive_int
from support.machine import start_machine

import torch
from torch import Tensor

import sample
from support import data

LIMIT = 7.0   # of 255 levels

def fit(images: Tensor) -> tuple[Tensor, Tensor]:
    """The best fit of shape, position, size and two colours: its RMS error and the RMS distance
    between the colours, both in levels of 255, (N,).

    Searches a grid of all shapes, positions and sizes, then finer and finer grids around the best.
    """
    n, c, size, _ = images.shape
    pixels = images.double().flatten(2)                                      # (N, 3, P)
    total = (pixels - pixels.mean(2, keepdim=True)).square().sum((1, 2))
    best = torch.full((n,), float("inf"), dtype=torch.float64)
    place, contrast = torch.zeros(n, 3, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for level in range(6):
        if level == 0:
            axis = torch.linspace(-0.55, 0.55, 23, dtype=torch.float64)
            offsets = torch.cartesian_prod(axis, axis, torch.linspace(0.45, 0.8, 8).double())
        else:
            axis = torch.linspace(-1, 1, 5, dtype=torch.float64) * 0.05 * 0.6 ** level
            offsets = torch.cartesian_prod(axis, axis, axis)
        centres = place.clone()
        for i in range(n if level else 1):
            x, y, r = (offsets + centres[i] if level else offsets).unbind(1)
            masks = data.covers(x, y, r, size).double().flatten(2).flatten(0, 1)     # (4K, P)
            masks = masks - masks.mean(1, keepdim=True)
            length = masks.square().sum(1).sqrt().clamp(min=1e-9)
            masks = masks / length[:, None]
            # Two free colours: a mask explains the squared projection on it, per channel.
            rows = pixels[i:i + 1] if level else pixels
            explained = (rows @ masks.T).square().sum(1)                     # (N or 1, 4K)
            value, index = explained.max(1)
            found = torch.stack([x, y, r], 1).repeat(4, 1)[index]
            error = (total[i:i + 1] if level else total) - value
            rows = slice(i, i + 1) if level else slice(None)
            better = error < best[rows]
            best[rows] = torch.where(better, error, best[rows])
            place[rows] = torch.where(better[:, None], found, place[rows])
            # The projection on a mask is its length times the distance between the colours.
            distance = (value / c).sqrt() / length[index]
            contrast[rows] = torch.where(better, distance, contrast[rows])
    return (best.clamp(min=0) / (c * size * size)).sqrt(), contrast

def clean(error: Tensor, contrast: Tensor) -> Tensor:
    """Which images are one clean shape, by the results of `fit`: (N,) bool."""
    return (error < LIMIT) & (error < contrast / 10)

@command
def main(argv=None) -> int:
    """Judges samples: see the text at the head of this file."""
    parser = Parser(__doc__, "--steps", "--seed", "--device", "--precision")
    parser.add_argument("what", help="a run's folder, a checkpoint, or a .pt file of images")
    parser.add_argument("--n", type=positive_int, default=200, help="(default: 200)")
    args = parser.parse_args(argv)
    machine = start_machine(args.device, args.precision)
    path = Path(args.what)
    if path.suffix == ".pt" and not path.name.startswith(("checkpoint", "ema-")):
        images = data.read_tensor(path)[:args.n]
    else:
        images = sample.draw_samples(load(path, machine=machine), args.n, args.seed, 64, machine,
                                     Progress(args.n, "samples"), steps=args.steps)
    real = data.shapes(args.n, images.shape[2], "test")
    for name, some in (("samples", images), ("real test images", real)):
        error, contrast = fit(some)
        part = clean(error, contrast).double().mean()
        print(f"{part:.1%} of {len(some)} {name} are one clean shape (error: median "
              f"{error.median():.1f}, 95 % below {error.quantile(0.95):.1f} levels; distance "
              f"between the colours: 95 % above {contrast.quantile(0.05):.1f})")
    return 0

if __name__ == "__main__":
    sys.exit(main())
