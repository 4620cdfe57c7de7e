"""Algorithm 2 as a film: x_t of 16 samples, from noise to images.

    pip install pillow
    python tools/film.py runs/shapes --out film.png
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import data
from support.checkpoint import inference_model, load
from support.command import Parser, Progress, command, positive_int, say, written
from support.machine import Noise, start_machine

import torch

from sample import choose_sampler

@command
def main(argv=None) -> int:
    """Draws samples with all T steps and writes evenly spaced ones as an animated PNG."""
    parser = Parser(__doc__, "--seed", "--device", "--precision")
    parser.add_argument("checkpoint", help="a checkpoint or its folder")
    parser.add_argument("--n", type=positive_int, default=16, help="samples (default: 16)")
    parser.add_argument("--frames", type=positive_int, default=28, help="frames (default: 28)")
    parser.add_argument("--out", type=Path, default=Path("film.png"), help="(default: film.png)")
    args = parser.parse_args(argv)
    from PIL import Image
    machine = start_machine(args.device, args.precision)
    trained = load(args.checkpoint, machine=machine)
    model, loop, about = choose_sampler(trained)
    model, s = inference_model(model, machine), model.s
    say(about)
    noise = Noise(args.seed, range(args.n), trained.shape, machine.device)
    shown = {round(t) for t in torch.linspace(s.T, 0, args.frames).tolist()}
    progress, frames = Progress(s.T, "steps"), []
    with written(args.out) as file, torch.no_grad():
        for t, x_t, _ in loop(model, noise(0), noise):
            progress.update(s.T - t)
            if t in shown:
                picture = data.tiled(data.to_uint8(x_t).cpu() & 0xF8, 8)  # 5 bits are enough
                frame = picture.expand(3, -1, -1).permute(1, 2, 0)
                frames.append(Image.frombytes("RGB", frame.shape[1::-1], data.raw_bytes(frame)))
        # The first frame, too, shows the samples: some viewers show no other.
        frames[-1].save(file, format="PNG", save_all=True, append_images=frames, loop=0,
                        optimize=True, duration=[900, *[70] * (len(frames) - 1), 2500])
    say(f"{args.out} has {len(frames)} frames")
    return 0

if __name__ == "__main__":
    sys.exit(main())
