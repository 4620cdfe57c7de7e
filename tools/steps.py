"""Which sampler makes the best pictures from 20, 50 and 100 network calls?

    python tools/steps.py --checkpoint runs/fashion_mnist --data-dir data

Quality is the Fréchet distance between 2,000 samples and the 10,000 test images in the features of
a small classifier, trained here on the labels of Fashion-MNIST in two minutes. It is not FID:
compare it only within one table. Error bars are the standard deviation over 200 bootstrap samples.
The samples are kept in --out, so that a stopped run continues; steps.png needs matplotlib.
"""
from __future__ import annotations

import functools
import gzip
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.checkpoint import load, weights_hash
from support.command import Parser, Progress, command, positive_int, reading, written
from support.machine import start_machine

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evaluate
import sample
from support import data

N = 2000
SAMPLERS = {  # Algorithm 2 with one of its variances, or `ddpm.ddim_loop`
    "β_t": {"variance": "fixed_large"}, "β̃_t": {"variance": "fixed_small"},
    "η = 0.5": {"eta": 0.5}, "η = 0": {"eta": 0.0}}

def labels(folder: Path, split: str) -> Tensor:
    """The labels of Fashion-MNIST: an IDX file with an 8-byte header and a byte per label."""
    name = f"{'train' if split == 'train' else 't10k'}-labels-idx1-ubyte.gz"
    places = [folder / "fashion_mnist" / name, folder / name]
    path = next((place for place in places if place.exists()), places[0])
    with reading(path, "labels in IDX format"), gzip.open(path) as file:
        return torch.frombuffer(bytearray(file.read()[8:]), dtype=torch.uint8).long()

class Classifier(nn.Module):
    """Three convolutions, a layer of 64 features, ten classes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*[layer for a, b in ((1, 32), (32, 64), (64, 64)) for layer in (
            nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.ReLU(), nn.MaxPool2d(2))],
            nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU())
        self.classes = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(data.to_model(images))

def classifier(images: Tensor, wanted: Tensor, epochs: int = 3) -> Classifier:
    """A classifier of the images, trained with Adam."""
    torch.manual_seed(0)
    net = Classifier()
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    progress = Progress(epochs * len(images), "images of the classifier")
    for epoch in range(epochs):
        for i, index in enumerate(torch.randperm(len(images)).split(128)):
            loss = F.cross_entropy(net.classes(net(images[index])), wanted[index])
            adam.zero_grad()
            loss.backward()
            adam.step()
            progress.update(epoch * len(images) + (i + 1) * 128, f"loss {loss.item():.3f}")
    return net.eval()

def distance(features: Tensor, real: Tensor) -> tuple[float, float]:
    """The Fréchet distance, and its standard deviation over bootstrap samples of the features."""
    g = torch.Generator().manual_seed(0)
    several = [evaluate.frechet_distance(features[torch.randint(len(features), (len(features),),
                                                                generator=g)], real)
               for _ in range(200)]
    return evaluate.frechet_distance(features, real), torch.tensor(several).std().item()

def draw(rows: list[dict], axes) -> None:
    """Distance against seconds per image, a curve per sampler."""
    for name in SAMPLERS:
        some = [row for row in rows if row["sampler"] == name]
        axes.errorbar([row["seconds"] for row in some], [row["distance"] for row in some],
                      [row["error"] for row in some], marker="o", capsize=3, label=name)
        for row in some if name == "β̃_t" else ():
            axes.annotate(f"{row['steps']} calls", (row["seconds"], row["distance"]), fontsize=8,
                          xytext=(4, -12), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="seconds per image", ylabel="Fréchet distance")
    axes.legend()

@command
def main(argv=None) -> int:
    """Prints the table and draws the curve: see the text at the head of this file."""
    parser = Parser(__doc__, "--checkpoint", "--data-dir", "--device", "--precision")
    parser.add_argument("--out", type=Path, default=Path("steps"), help="folder (default: steps)")
    parser.add_argument("--steps", type=positive_int, nargs="+", default=[20, 50, 100],
                        help="network calls (default: 20 50 100)")
    args = parser.parse_args(argv)
    machine = start_machine(args.device, args.precision)
    train, test = (data.load("fashion_mnist", args.data_dir, split)[0]
                   for split in ("train", "test"))
    kept = args.out / "classifier.pt"
    if kept.exists():
        net = Classifier().eval()
        net.load_state_dict(torch.load(kept, weights_only=True))
    else:
        net = classifier(train, labels(Path(args.data_dir), "train"))
        with written(kept) as file:
            torch.save(net.state_dict(), file)
    with torch.no_grad():
        features = {split: torch.cat([net(x) for x in images.split(500)])
                    for split, images in (("train", train[:N]), ("test", test))}
        right = net.classes(features["test"]).argmax(1) == labels(Path(args.data_dir), "test")
    print(f"the classifier is right for {right.double().mean():.1%} of the test images")
    print("2,000 training images instead of samples: {:.3f} ± {:.3f}".format(
        *distance(features["train"], features["test"])), flush=True)
    trained, rows = load(args.checkpoint, True, machine), []
    for steps in args.steps:
        for name, sampler in SAMPLERS.items():
            (key, value), = sampler.items()
            path = args.out / f"{weights_hash(trained).hex()[:8]}-{steps}-{key}-{value}.pt"
            if not path.exists():
                made = sample.draw_samples(trained, N, 0, 100, machine, Progress(N, "samples"),
                                           steps=steps, **sampler)
                with written(path) as file:
                    torch.save(made, file)
            with torch.no_grad():
                made = torch.cat([net(x) for x in data.read_tensor(path).split(500)])
            value, error = distance(made, features["test"])
            rows.append({"steps": steps, "sampler": name, "distance": value, "error": error})
            print(f"{steps:4} calls, {name:8} {value:8.3f} ± {error:.3f}", flush=True)
    for _ in range(3):  # alternately, so that a noisy minute slows all
        for row in rows:
            started = time.monotonic()
            sample.draw_samples(trained, 16, 0, 16, machine, steps=row["steps"],
                                **SAMPLERS[row["sampler"]])
            row.setdefault("times", []).append((time.monotonic() - started) / 16)
    for row in rows:
        row["seconds"] = statistics.median(row.pop("times"))
        print(f"{row['steps']:4} calls, {row['sampler']:8} {row['seconds']:.3f} s per image")
    (args.out / "steps.json").write_text(json.dumps(rows), encoding="utf-8")
    data.plot(args.out / "steps.png", functools.partial(draw, rows))
    return 0

if __name__ == "__main__":
    sys.exit(main())
