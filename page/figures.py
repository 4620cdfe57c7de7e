"""The pictures of the page, from a trained network and images on which it was not trained.

    python page/figures.py --checkpoint runs/mine --dataset test.pt

Written to page/images, where page/page.py finds them: the chain in both directions (the
paper's Figure 2), x_t with what the network says of it, the beginnings of files, some
terms of the bound, the loss by thirds of t, and points in two dimensions (`paths`, `demo`).
"""
from __future__ import annotations

import argparse
import functools
import json
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support import data
from support.checkpoint import Trained, inference_model, load
from support.command import Parser, command, nonblank, say, written
from support.machine import Machine, Noise, start_machine

import torch
from torch import Tensor

import ddpm
import mistakes
import sample
import train
from extras import compress

OUT = ROOT / "page" / "images"
TIMES = [1, *range(50, 1001, 50)]          # of the frames of x_t
CUTS = [16, 24, 32, 48, 64, 96, 128, 192]  # bytes of a file
STEPS = (10, 50, 1000)

def small(picture: Tensor, width: int) -> Tensor:
    """A picture of `data.tiled`, which enlarges each pixel, at its own width."""
    k = picture.shape[2] // width
    return picture[:, ::k, ::k]

def tiled(images: Tensor, columns: int) -> Tensor:
    """`data.tiled` with a pixel for each pixel."""
    return small(data.tiled(images, columns), columns * images.shape[3])

def chain(trained: Trained, model: ddpm.Model, x0: Tensor) -> Tensor:
    """Figure 2: a row is x_0, x_t by the steps of Eq. 2 up to x_T, and Algorithm 2 from there."""
    s, n, shown = trained.s, len(x0), [0, 100, 200, 300, 500, 1000]
    noise, x, columns = Noise(2, range(n), trained.shape), x0, [x0]
    for t in range(1, s.T + 1):
        x = ddpm.q_step(s, x, ddpm._all(t, x), noise(t))
        columns += [x] if t in shown else []
    noise = Noise(0, range(n), trained.shape)
    for t, x_t, _ in sample.choose_sampler(trained).loop(s, model, x, noise):
        columns += [x_t] if t in shown[:-1] else []
    return tiled(data.to_uint8(torch.stack(columns, 1).flatten(0, 1)), len(columns))

def over_time(trained: Trained, machine: Machine) -> Tensor:
    """Figure 6, of sample.py: eleven times and the sample."""
    args = argparse.Namespace(seed=0, n=4)
    sampler = sample.choose_sampler(trained)
    sampler = sampler._replace(model=inference_model(sampler.model, machine))
    picture = sample.progressive(trained, sampler, args, machine)
    return small(picture, 12 * trained.shape[2])

def forward(trained: Trained, model: ddpm.Model, x0: Tensor) -> Tensor:
    """A column for each of TIMES; for each image the rows x_t, ε, ε_θ(x_t, t) and x̂_0."""
    s, rows = trained.s, []
    eps = Noise(1, range(len(x0)), trained.shape)()
    for t in TIMES:
        now = ddpm._all(t, x0)
        x_t = ddpm.q_sample(s, x0, now, eps)
        p = ddpm.p_mean_variance(model, x_t, now)
        rows.append(torch.stack([x_t, eps / 3, model.net(x_t, now) / 3, p.x0_hat], 1).flatten(0, 1))
    return tiled(data.to_uint8(torch.stack(rows, 1).flatten(0, 1)), len(TIMES))

def beginnings(trained: Trained, images: Tensor) -> tuple[Tensor, list[int]]:
    """A row for each image: what the first CUTS bytes show, and all of it; the lengths."""
    shown, lengths = [], []
    for image in images:
        content = compress.encode(trained, image)
        shown += [compress.decode(trained, content[:cut])[0] for cut in (*CUTS, len(content))]
        lengths.append(len(content))
    return tiled(torch.stack(shown), len(CUTS) + 1), lengths

def terms(trained: Trained, model: ddpm.Model, x0: Tensor) -> dict:
    """Some of the L_{t−1}, and L_T, in bits/dim: the mean over the images, one x_t for each."""
    s, found = trained.s, []
    for t in sorted({round(1000 ** (i / 40)) for i in range(41)}):
        now = ddpm._all(t, x0)
        x_t = ddpm.q_sample(s, x0, now, Noise(3, range(len(x0)), trained.shape)(t))
        p = ddpm.p_mean_variance(model, x_t, now)
        term = ddpm.bits_per_dim(ddpm.vlb_term(s, x0, x_t, now, p), x0).mean().item()
        found.append([t, float(f"{term:.3g}")])
    L_T = ddpm.bits_per_dim(ddpm.prior_kl(s, x0), x0).mean().item()
    return {"terms": found, "L_T": float(f"{L_T:.2g}")}

class Spiral:
    """Data in two dimensions, for which ε_θ is known: 64 narrow Gaussians along a spiral.

    x_t is a mixture of Gaussians N(√ᾱ_t m_k, (ᾱ_t v + 1 − ᾱ_t) I), and so the best network is
    E[ε | x_t] = √(1 − ᾱ_t) Σ_k r_k (x_t − √ᾱ_t m_k) / (ᾱ_t v + 1 − ᾱ_t), where r_k is the
    probability of the k-th one given x_t.
    """

    def __init__(self, s: ddpm.Schedule):
        angle = torch.linspace(0.6, 3.6 * torch.pi, 64, dtype=torch.float64)
        radius = 0.9 * angle / angle.max()
        self.s, self.v = s, 0.02 ** 2
        self.m = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        bar = self.s.alpha_bars[t][:, None]
        variance = bar * self.v + 1 - bar
        away = x[:, None] - bar[:, None].sqrt() * self.m                       # (B, 64, 2)
        r = (-away.square().sum(2) / (2 * variance)).softmax(1)
        return (1 - bar).sqrt() * (r[:, :, None] * away).sum(1) / variance

def panel(x: Tensor) -> Tensor:
    """Points (n, 2) as a picture of 120×120, from −1.2 to 1.2."""
    shown = torch.full((1, 120, 120), 255, dtype=torch.uint8)
    i, j = ((x.clamp(-1.19, 1.19) + 1.2) * 50).long().unbind(1)
    shown[0, 119 - j, i] = 0
    return shown

def paths(n: int = 400) -> Tensor:
    """n points that were drawn; a row for each number of steps and a column for each sampler."""
    s, panels, loop, ddim = ddpm.make_schedule(), [], ddpm.p_sample_loop, ddpm.ddim_loop
    samplers = {"β_t": (loop, "fixed_large"), "β̃_t": (loop, "fixed_small"),
                "η = 0.5": (functools.partial(ddim, eta=0.5), "fixed_small"),
                "η = 0": (ddim, "fixed_small")}
    x_T = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for steps in STEPS:
        for loop, variance in samplers.values():
            model = ddpm.Model(ddpm.respace(s, steps), Spiral(s), variance=variance)
            g = torch.Generator().manual_seed(1)
            noise = lambda t, g=g: torch.randn(n, 2, generator=g, dtype=torch.float64)
            *_, end = loop(model, x_T, noise)
            panels.append(panel(end.x_t))
    return tiled(torch.stack(panels), len(samplers))

def with_lines(replacements: list) -> types.ModuleType:
    """ddpm.py with wrong lines instead of right ones."""
    sys.modules["wrong"] = module = types.ModuleType("wrong")  # where dataclasses look for types
    exec(mistakes.wrong_source("ddpm.py", replacements), vars(module))
    return module

def demo(n: int = 400) -> Tensor:
    """Where page/demo.js does not run: n points that the right lines and three wrong ones draw."""
    g = torch.Generator().manual_seed(0)
    x_T, *z = torch.randn(1001, n, 2, generator=g, dtype=torch.float64)
    panels = []
    for name, steps in ((None, 1000), ("σ_t² instead of σ_t", 1000), (
            "√ᾱ_t instead of √α_t in Eq. 7", 1000), ("the network given i instead of τ_i", 50)):
        program = with_lines(mistakes.MISTAKES[name][2] if name else [])
        s = program.make_schedule()
        model = program.Model(program.respace(s, steps), Spiral(s), variance="fixed_small",
                              clip=False)
        *_, end = program.p_sample_loop(model, x_T, lambda t: z[t - 1])
        panels.append(panel(end.x_t))
    return tiled(torch.stack(panels), len(panels))

@command
@torch.no_grad()
def main(argv=None) -> int:
    """Writes the pictures: see the text at the head of this file."""
    parser = Parser(__doc__, "--data-dir")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the run")
    parser.add_argument("--dataset", type=nonblank, required=True, help="images for the pictures")
    args = parser.parse_args(argv)
    machine = start_machine("cpu", "fp32")
    trained = load(args.checkpoint, machine=machine)
    model = inference_model(trained.model, machine)
    images, _ = data.load(args.dataset, args.data_dir, "test", trained.shape[1])
    some = images[[0, 2, 3, 6, 9, 11, 18, 19]]
    x0 = data.to_model(some)
    numbers = {"times": TIMES, "cuts": CUTS, "steps": STEPS,
               "alpha_bars": [round(x, 6) for x in trained.s.alpha_bars[::20].tolist()],
               "loss": [[e["step"], *(float(f"{x:.4g}") for x in e["loss_thirds"])]
                        for e in train.log_entries(args.checkpoint)],
               **terms(trained, model, data.to_model(images[:32]))}
    files, numbers["bytes"] = beginnings(trained, some[:4])
    pictures = {"chain": chain(trained, model, x0), "forward": forward(trained, model, x0[[0, 6]]),
                "progress": over_time(trained, model, machine), "files": files, "paths": paths(),
                "demo": demo()}
    for name, picture in pictures.items():
        with written(OUT / f"{name}.png") as file:
            file.write(data.png(picture))
    with written(OUT / "numbers.json") as file:
        file.write(json.dumps(numbers, ensure_ascii=False).encode())
    say(f"{OUT} holds the pictures of the page")
    return 0

if __name__ == "__main__":
    sys.exit(main())
