"""Tests and measures the program on a GPU, in under nine minutes; the next call continues.

    python tools/gpu.py --out gpu                      all parts without a result in gpu/
    python tools/gpu.py --again tests "train bf16"     repeat these
    python tools/gpu.py --train 8 --data-dir data      8 minutes of the paper's network on
                                                       Fashion-MNIST, then its samples and scores;
                                                       the next call continues the training
    python tools/gpu.py --rehearse                     the same code on a CPU, with tiny networks

The results are kept in gpu.json, and as a table in gpu.md. --train writes the averaged weights in
bfloat16 to part-00, part-01, …; `cat part-?? > weights.pt` makes a file of them for sample.py
--checkpoint and train.py --init. If the run has no checkpoint, the training starts from them, with
a new Adam and a new warm-up.
"""
from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support.checkpoint import Trained, build_schedule, load, load_checkpoint, save_checkpoint
from support.command import (Parser, Progress, command, float_between, one_line, positive_int, say,
                             written)
from support import machine
from support.machine import start_machine

import torch

import bench
import evaluate
import sample
import steps
import train
import unet
from support import data

PAPER_STEPS, PAPER_SECONDS, GFLOP = 21, 17, 12.44  # TPU v3-8: steps/s, s per 256 samples; forward
TESTED = ["tests/test_machine.py"]
OURS = functools.partial(unet.UNet, 3, 3)  # channels, multipliers
TINY = dict(channels=32, multipliers=[1], timesteps=4)

def run(*words, limit: float = 240) -> str:
    """Runs a Python command in its own process. Returns its last line; ValueError if it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, timeout=limit, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    last = (done.stdout.strip() or "no output").splitlines()[-1]
    if done.returncode:
        raise ValueError(f"{' '.join(map(str, words[:3]))}: {last}")
    return last

def call(main, *words) -> str:
    """Returns what a command of this program prints. ValueError if it fails."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        if status := main([*map(str, words)]):
            raise ValueError(f"{main.__module__}.py exited with {status}")
    return text.getvalue()

def card(args) -> dict:
    """The GPU and the versions of its software."""
    found = {"torch": torch.__version__, "CUDA": torch.version.cuda}
    if args.cuda:
        about = torch.cuda.get_device_properties(args.device)
        found |= {"card": about.name, "capability": f"{about.major}.{about.minor}",
                  "GiB": about.total_memory / 2 ** 30}
    if shutil.which("nvidia-smi"):
        words = "nvidia-smi --query-gpu=driver_version --format=csv,noheader".split()
        found["driver"] = subprocess.check_output(words, text=True, timeout=60).strip()
    return found

def matmul(args) -> dict:
    """TFLOP/s of a large matrix product in each precision."""
    def rate(precision: str, n: int) -> float:
        machine = start_machine(args.device, precision)
        a, b = torch.randn(2, n, n, device=machine.device, dtype=machine.dtype)
        took = min(bench.seconds(lambda: [a @ b for _ in range(10)], machine) for _ in range(3))
        return 10 * 2 * n ** 3 / took / 1e12
    some = args.pick(["bf16", *["tf32"] * args.cuda, "fp32", "fp16"], ["bf16", "fp32"])
    return {precision: rate(precision, args.pick(8192, 128)) for precision in some}

def measure(net, machine, x, compiled: bool, repeat: int) -> dict:
    """Training steps of a network: the first two, which may compile, the rate, the memory."""
    torch._dynamo.reset()
    if cuda := machine.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    job, _ = bench.jobs_of(net, machine, x, compiled)
    first = bench.seconds(lambda: [job() for _ in range(2)], machine)
    each = bench.seconds(lambda: [job() for _ in range(repeat)], machine) / repeat
    memory = torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else bench.saved_memory(job)
    return {"steps/s": 1 / each, "GiB": memory, "s of the first two steps": first}

def training(precision: str, who: str, compiled: bool, args) -> dict:
    """The paper's network at batch 128, or that of diffusers with the same settings."""
    machine, batch = start_machine(args.device, precision), args.pick(128, 2)
    shape = args.pick((128, (1, 2, 2, 2)), (32, (1,)))
    net = OURS(*shape) if who == "ours" else bench.From0(bench.diffusers(*shape))
    x = torch.randn(batch, 3, 32, 32, device=machine.device)
    found = measure(net, machine, x, compiled, args.pick(20, 1))
    if rate := args.results.get("matmul", {}).get(precision):
        found["% of the matrix product"] = found["steps/s"] * 3 * GFLOP * batch / rate / 10
    return found | {"times a TPU v3-8": found["steps/s"] / PAPER_STEPS}

def sampling(compiled: bool, args) -> dict:
    """Algorithm 2 with 1,000 calls for 256 images, by an untrained network: as fast as any."""
    machine, n = start_machine(args.device, None, compiled), args.pick(256, 2)
    settings = {name: default for name, (default, *_) in train.SETTINGS.items()} | {
        "in_channels": 3, "image_size": 32} | args.pick({}, TINY)
    net = unet.build_network(settings).to(machine.device, memory_format=torch.channels_last)
    trained = Trained(net.eval(), build_schedule(settings), settings, "")
    progress = Progress(n, "samples")
    first = bench.seconds(lambda: sample.draw_samples(trained, n, 0, n, machine, steps=2), machine)
    took = bench.seconds(lambda: sample.draw_samples(trained, n, 0, n, machine, progress), machine)
    return {f"s for {n} samples": took, "hours for 50,000": took / n * 50_000 / 3600,
            "s of the first two calls": first, "times a TPU v3-8": PAPER_SECONDS / took * n / 256}

def resume(flag: str, args) -> dict:
    """Whether a run in two parts equals an uninterrupted one, with --deterministic."""
    folder, k = args.out / "resume", args.pick(20, 2)
    shutil.rmtree(folder, ignore_errors=True)
    for name, n in (("whole", 2 * k), ("parts", k), ("parts", 2 * k)):
        run("train.py", "--dataset", "shapes", "--deterministic", flag, "--dropout", 0.1,
            "--decay", 0, "--steps", n, "--samples", 0, "--out", folder / name,
            "--device", args.device,
            *args.pick([], ["--channels", 32, "--multipliers", 1, "--batch-size", 2]))
    one, two = (load_checkpoint(folder / name / "checkpoint.pt") for name in ("whole", "parts"))
    differ = [key for part in ("net", "ema") for key, x in one[part].items()
              if not torch.equal(x, two[part][key])]
    if differ:
        raise ValueError(f"{len(differ)} tensors differ, the first is {differ[0]}")
    return {f"steps {k} + {k} equal {2 * k}": "to the bit"}

def tests(args) -> dict:
    """The tests that use the device."""
    words = args.pick(TESTED, ["tests/test_unet.py", "-k", "embedded"])
    return {"pytest": run("-m", "pytest", "-q", "-p", "no:cacheprovider", *words)}

def large(args) -> dict:
    """Two training steps of the network for 256×256 images, batch 8."""
    machine = start_machine(args.device)
    size, side = args.pick((128, (1, 1, 2, 2, 4, 4)), (32, (1, 1))), args.pick(256, 16)
    x = torch.randn(args.pick(8, 1), 3, side, side, device=machine.device)
    return measure(OURS(*size, image_size=side, dropout=0.0), machine, x, False, 2)

def profile(args) -> dict:
    """The five slowest operations of a training step: milliseconds without nested calls."""
    machine, n = start_machine(args.device), args.pick(3, 1)
    x = torch.randn(args.pick(128, 2), 3, 32, 32, device=machine.device)
    job, _ = bench.jobs_of(OURS(*args.pick((), (32, (1,)))), machine, x, False)
    bench.seconds(lambda: [job() for _ in range(2)], machine)
    with torch.profiler.profile() as seen:
        bench.seconds(lambda: [job() for _ in range(n)], machine)
    name = "self_device_time_total" if args.cuda else "self_cpu_time_total"
    rows = [(getattr(e, name), e.key) for e in seen.key_averages() if e.key.startswith("aten::")]
    return {key: time / n / 1e3 for time, key in sorted(rows)[:-6:-1]}

PARTS = {"card": card, "matmul": matmul,
         "train bf16 compiled": functools.partial(training, "bf16", "ours", True),
         "train bf16": functools.partial(training, "bf16", "ours", False),
         "sample compiled": functools.partial(sampling, True), "tests": tests,
         "resume": functools.partial(resume, "--no-compile"), "large": large, "profile": profile,
         "sample": functools.partial(sampling, False),
         "resume compiled": functools.partial(resume, "--compile")}
for precision in ("bf16", "tf32", "fp32", "fp16"):  # the less important ones last
    for who in ("diffusers", "ours"):
        for compiled in (False, True):
            name = f"{'train' if who == 'ours' else who} {precision}{' compiled' * compiled}"
            PARTS.setdefault(name, functools.partial(training, precision, who, compiled))

def fashion(args) -> dict:
    """Trains for --train minutes, then evaluates the averaged weights; the next call resumes."""
    folder, joined, flags = args.out / "fashion", args.out / "weights.pt", []
    parts = sorted(args.out.glob("part-??"))
    if args.rehearse:  # a few images of noise
        args.data_dir, n = str(args.out / "data"), 20
        noise = random.Random(0).randbytes(784 * n)
        for name in ("train", "t10k"):
            for kind, head, body in (
                    ("images-idx3", struct.pack(">4I", 2051, n, 28, 28), noise),
                    ("labels-idx1", bytes(8), bytes(i % 10 for i in range(n)))):
                with written(args.out / f"data/fashion_mnist/{name}-{kind}-ubyte.gz") as file:
                    file.write(gzip.compress(head + body))
        flags = ["--channels", 32, "--multipliers", 1, "--timesteps", 4, "--batch-size", 2]
    if parts and not (folder / "checkpoint.pt").exists():
        joined.write_bytes(b"".join(part.read_bytes() for part in parts))
        flags = [*flags[4:], "--init", joined]  # --init has its channels and multipliers
        say("no checkpoint: this run starts from the joined weights, with a new Adam and warm-up")
    words = ["train.py", "--dataset", "fashion_mnist", "--data-dir", args.data_dir, "--out", folder,
             "--save-every", 1000, "--device", args.device, *flags]
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60 * args.train)
    process.send_signal(signal.SIGINT)  # it finishes its step and saves
    if process.wait(300) not in (0, 128 + signal.SIGINT):
        raise ValueError(f"train.py exited with {process.returncode}")
    state = load_checkpoint(folder / "checkpoint.pt")
    small = {name: x.bfloat16() if x.is_floating_point() else x for name, x in state["ema"].items()}
    save_checkpoint(joined, {"settings": state["settings"], "step": state["step"], "ema": small})
    raw, size = joined.read_bytes(), int(args.part_mb * 10 ** 6)
    for part in parts:
        part.unlink()
    for i in range(0, len(raw), size):
        (args.out / f"part-{i // size:02d}").write_bytes(raw[i:i + size])
    found, n = {"steps": state["step"]}, args.pick(steps.N, 4)
    same = ["--checkpoint", folder, "--device", args.device]
    call(sample.main, *same, "--n", args.pick(64, 2), "--out", args.out / "fashion.png")
    same += ["--data-dir", args.data_dir]
    text = call(evaluate.main, *same, "--terms", 10 if n > 4 else 2, "--n", min(n, 1000))
    found["likelihood"] = next(line for line in text.splitlines() if "bits/dim" in line)
    machine = start_machine(args.device)
    images, test = (data.load("fashion_mnist", args.data_dir, x)[0] for x in ("train", "test"))
    net = steps.classifier(images, steps.labels(Path(args.data_dir), "train"))
    trained = load(folder, machine=machine)
    made = sample.draw_samples(trained, n, 0, None, machine, Progress(n, "samples"))
    torch.save(made, args.out / "fashion.pt")
    with torch.no_grad():
        features, real = (torch.cat([net(x) for x in some.split(500)]) for some in (made, test))
    found["Fréchet distance"] = "{:.2f} ± {:.2f}".format(*steps.distance(features, real))
    if (inception := Path(args.data_dir, Path(evaluate.INCEPTION[0]).name)).exists():
        text = call(evaluate.main, *same, "--fid", "--samples", args.out / "fashion.pt",
                    "--inception", inception)
        found[f"FID of {n}"] = text.splitlines()[-1]
    return found

def report(args) -> None:
    """Writes the results, as JSON and as a table."""
    with written(args.out / f"{args.name}.json") as file:
        file.write(json.dumps(args.results, indent=2, ensure_ascii=False).encode())
    rows = [f"| {part} | " + "; ".join(f"{key}: {value:.4g}" if isinstance(value, float) else
            f"{key}: {value}" for key, value in found.items()) + " |"
            for part, found in args.results.items()]
    with written(args.out / f"{args.name}.md") as file:
        file.write("\n".join(["| part | result |", "|---|---|", *rows, ""]).encode())

@command
def main(argv=None) -> int:
    """Runs the parts: see the text at the head of this file."""
    parser = Parser(__doc__, "--data-dir", "--device")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder (default: gpu)")
    parser.add_argument("--again", nargs="+", default=[], choices=PARTS, metavar="PART",
                        help=f"repeat these: {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float_between(0, 1e4), default=7, help="start no part "
                        "later than this (default: 7)")
    parser.add_argument("--train", type=float_between(0, 1e4), metavar="MINUTES", help="train on "
                        "Fashion-MNIST for so long instead of running parts")
    parser.add_argument("--part-mb", type=positive_int, default=20, help="size of a part in MB "
                        "(default: 20)")
    parser.add_argument("--rehearse", action="store_true", help="tiny networks on the CPU")
    args = parser.parse_args(argv)
    args.device = args.device or ("cpu" if args.rehearse else "cuda")
    args.cuda = start_machine(args.device).device.type == "cuda"
    args.data_dir = str(Path(args.data_dir).resolve())
    args.pick = lambda whole, tiny: tiny if args.rehearse else whole
    if args.rehearse:
        machine.BACKEND = "aot_eager"
    args.out, args.name = args.out.resolve(), args.pick("gpu", "rehearsal")
    kept = args.out / f"{args.name}.json"
    args.results = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    parts = PARTS if args.train is None else {"fashion": fashion}
    failed, began = 0, time.monotonic()
    skipped = args.pick(["tf32"] * (not args.cuda), ["tf32", "fp32", "fp16", "resume compiled"])
    for name, part in parts.items():
        if (name in args.results and name not in args.again and part is not fashion) or any(
                word in name for word in skipped):
            continue
        if time.monotonic() - began > 60 * args.minutes:
            say(f"{name} is left for the next call")
            continue
        started = time.monotonic()
        try:
            args.results[name] = part(args)
            report(args)
            say(f"{name}: {args.results[name]}, {time.monotonic() - started:.0f} s")
        except Exception as error:  # continue with the other parts
            failed += 1
            say(f"{name} failed after {time.monotonic() - started:.0f} s: {one_line(error)}")
    if args.results:
        print((args.out / f"{args.name}.md").read_text("utf-8"))
    return int(failed > 0)

if __name__ == "__main__":
    sys.exit(main())
