"""The settings of a training run: the paper's values, and what each data set changes.

A checkpoint holds the settings of its run, so nothing is asked twice.
"""
from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

import data
import runs
import unet
from runs import UsageError, ranged

# The defaults are the paper's CIFAR-10 run; RECIPES has what differs.
count, positive = ranged(int, 1), ranged(float, 0, open_low=True)
share = ranged(float, 0, 0.999, open_low=True)
SETTINGS = {
    # name: (default, type, meaning)
    "dataset": ("cifar10", str, f"{', '.join(data.NAMES)}, a .pt file or a folder of images"),
    "data_dir": ("data", str, "where data sets are, and downloads go"),
    "image_size": (None, count, "side of shapes (32) or of a folder's images (256)"),
    "flip": (True, bool, "random horizontal flips; off for digits and clothes"),
    "steps": (800_000, count, "training steps in all"),
    "batch_size": (128, count, "images a step, over all ranks"),
    "lr": (2e-4, positive, "Adam's learning rate"),
    "warmup": (5000, ranged(int, 0), "steps over which it rises from 0; in the authors' code only"),
    "clip": (1.0, positive, "largest norm of the gradient; in the authors' code only"),
    "ema": (0.9999, ranged(float, 0, 1), "decay of the averaged weights"),
    "dropout": (0.1, ranged(float, 0, 0.99), "in every residual block"),
    "channels": (128, count, "base width of the U-Net, a multiple of 32"),
    "multipliers": ([1, 2, 2, 2], count, "width of each level over the base width"),
    "blocks": (2, count, "residual blocks a level"),
    "attention": ([16], count, "resolutions with self-attention"),
    "timesteps": (1000, count, "T"),
    "schedule": ("linear", ("linear", "quadratic", "constant"), "of β"),
    "beta_start": (1e-4, share, "β_1 at T = 1000; scaled by 1000/T for another T"),
    "beta_end": (0.02, share, "β_T at T = 1000; likewise"),
    "predict": ("eps", ("eps", "x0", "mean"), "what the network predicts (§3.2, Table 2)"),
    "variance": ("fixed_large", ("fixed_large", "fixed_small", "learned"), "σ_t² (§3.2, Table 2)"),
    "objective": ("simple", ("simple", "vlb"), "Eq. 14, or Eq. 5 in bits/dim"),
    "seed": (0, ranged(int, 0), "of everything drawn"),
    "log_every": (100, count, "steps between lines of log.jsonl"),
    "save_every": (5000, count, "steps between checkpoints"),
    "sample_every": (25_000, count, "steps between grids of samples"),
    "samples": (64, ranged(int, 0), "images in a grid; 0 for no grids"),
    "sample_steps": (None, ranged(int, 2), "network calls for a grid (default: all T)"),
}
MAY_CHANGE = {"data_dir", "steps", "log_every", "save_every", "sample_every", "samples",
              "sample_steps"}
RECIPES = {
    "mnist": dict(flip=False),
    "fashion_mnist": dict(flip=False),
    "shapes": dict(steps=2000, batch_size=32, lr=5e-4, warmup=200, ema=0.995, dropout=0.0,
                   channels=64, multipliers=[1, 2, 2], blocks=1, variance="fixed_small",
                   save_every=500, sample_every=1000, samples=36, sample_steps=250),
}
RECIPE_256 = dict(multipliers=list(unet.SETTINGS_256["multipliers"]), dropout=0.0, steps=500_000,
                  batch_size=64, lr=2e-5, variance="fixed_small", samples=16)  # §4, Appendix B


def parse(argv, doc: str) -> dict:
    """The flags that were given, and no others: defaults depend on the data and the checkpoint."""
    parser = runs.Parser(doc + "\nThe defaults shown are the paper's CIFAR-10 run; shapes, digits, "
                         "clothes and\n256×256 images have recipes of their own (settings.py).")
    for name, (default, kind, what) in SETTINGS.items():
        flag, text = "--" + name.replace("_", "-"), f"{what} (default: {default})"
        if default is None:
            text = what
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(kind, tuple):
            options = {"choices": kind}
        else:
            options = {"type": kind, "nargs": "+"} if isinstance(default, list) else {"type": kind}
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **options)
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/DATASET)")
    parser.add_argument("--init", help="begin with these weights, as sample.py's --checkpoint")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="torch.compile (default: on CUDA only)")
    parser.add_argument("--deterministic", action="store_true",
                        help="the same bits every time on CUDA too, some speed less")
    parser.machine_flags()
    return vars(parser.parse_args(argv))


def settle(given: dict, images: Tensor, before: dict, init: dict) -> dict:
    """The settings of this run: the checkpoint's, or the data set's recipe with the architecture of
    --init, and what was given.

    UsageError if a flag contradicts the checkpoint, or two of them each other.
    """
    defaults = {name: default for name, (default, *_) in SETTINGS.items()}
    name = given.get("dataset", defaults["dataset"])
    recipe = RECIPE_256 if images.shape[2] >= 256 else RECIPES.get(name, {})
    shape = dict(in_channels=images.shape[1], image_size=images.shape[2])
    given = {k: v for k, v in given.items() if k in SETTINGS}
    s = {**(before or {**defaults, **recipe, **init}), **given, **shape}
    if "sample_steps" not in given and (s["variance"] == "learned"
                                        or (s["sample_steps"] or 0) > s["timesteps"]):
        s["sample_steps"] = None  # the recipe's does not fit
    for key in init:
        if s[key] != init[key]:
            raise UsageError(f"--init has {key} {init[key]}, this run {s[key]}")
    for key in before:
        if key not in MAY_CHANGE and s[key] != before[key]:
            raise UsageError(f"this run has --{key.replace('_', '-')} {before[key]}, not {s[key]}: "
                             "give a new run another --out")
    if s["variance"] == "learned" and (s["objective"] != "vlb" or s["predict"] == "x0"):
        raise UsageError("a learned variance goes with --objective vlb and --predict eps or mean "
                         "(Table 2): L_simple has no variance in it")
    if s["sample_steps"] and s["variance"] == "learned" and s["sample_steps"] < s["timesteps"]:
        raise UsageError("a learned variance is sampled with all steps: leave out --sample-steps")
    if (s["sample_steps"] or 0) > s["timesteps"]:
        raise UsageError(f"--sample-steps {s['sample_steps']} exceeds T = {s['timesteps']}")
    side, least = images.shape[2:], 2 ** (len(s["multipliers"]) - 1)
    if side[0] != side[1] or side[0] % least:
        raise UsageError(f"images of {side[0]}×{side[1]}: the U-Net's {len(s['multipliers'])} "
                         f"levels need squares whose side is a multiple of {least}")
    return s
