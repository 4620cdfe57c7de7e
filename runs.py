"""What the scripts share: devices, ranks, seeds, checkpoints, pictures, progress, errors.

A mistake of the user is a ValueError or an OSError whose text is one line; `command` prints it.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
import signal
import struct
import sys
import time
import warnings
import zlib
from datetime import timedelta
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

# torch says this once in an environment without NumPy, which nothing here needs.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ddpm
from data import first_line, raw_bytes, to_uint8
from unet import UNet

# ----------------------------------------------------------------------- commands and their flags

class UsageError(ValueError):
    """A mistake in the arguments: exit status 2."""


class Parser(argparse.ArgumentParser):
    """argparse, with one line for a mistake and the defaults in --help."""

    def __init__(self, doc: str):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")

    def machine_flags(self) -> None:
        """--device and --precision, the same for every script."""
        self.add_argument("--device", default="auto", help="cuda, mps, cpu or cuda:N (default: the "
                          "first of these that is there)")
        self.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                          help="of the network's products; auto is bf16 where the hardware "
                          "multiplies it natively (default: auto)")


def ranged(kind: type, low: float, high: float = math.inf, open_low=False) -> Callable:
    """An argparse type: an int or a float from low (excluded if open_low) to high."""
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high if open_low else low <= value <= high) or math.isinf(value):
            bounds = f"{'>' if open_low else '≥'} {low:g}"
            bounds += f" and ≤ {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole number' if kind is int else 'a number'} {bounds}")
        return value
    return convert


def command(main: Callable) -> Callable:
    """Wrap main(argv) → status: a mistake ends in one line on stderr, 2 for arguments, else 1.

    With DDPM_TRACEBACK=1 in the environment the traceback is shown as well.
    """
    script = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run(argv=None) -> int:
        try:
            return main(argv) or 0
        except SystemExit as stop:                      # --help
            return stop.code if isinstance(stop.code, int) else 0
        except KeyboardInterrupt:
            print(f"\n{script}: interrupted", file=sys.stderr)
            return 130
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if os.environ.get("DDPM_TRACEBACK"):
                raise
            text = first_line(error)
            if "out of memory" in text or "can't allocate memory" in text:
                text = "out of memory: a smaller --batch-size needs less"
            print(f"{script}: {text}", file=sys.stderr)
            return 2 if isinstance(error, UsageError) else 1
        finally:
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()
    return run


# --------------------------------------------------------------- device, precision, ranks, seeds

class Machine(NamedTuple):
    """Where a script computes: its device, the type of its products, its place among the ranks."""
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    @property
    def chief(self) -> bool:
        """Whether this is the one rank that writes and speaks."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """The rank's part of n pieces of work: every world-th one."""
        return range(self.rank, n, self.world)

    def gather(self, rows: Tensor, n: int) -> Tensor:
        """Every rank's `rows`, one for each index of its `share`, as one tensor of n rows."""
        if self.world == 1:
            return rows
        whole = torch.zeros(n, *rows.shape[1:], dtype=rows.dtype, device=self.device)
        whole[list(self.share(n))] = rows.to(self.device)
        dist.all_reduce(whole)
        return whole.to(rows.device)

    @contextlib.contextmanager
    def chief_first(self) -> Iterator[None]:
        """The chief runs the block, then the others: one downloads, the others find the file."""
        if self.world > 1 and not self.chief:
            dist.barrier()
        yield
        if self.world > 1 and self.chief:
            dist.barrier()


def machine(device: str = "auto", precision: str = "auto") -> Machine:
    """The machine that --device and --precision name; under torchrun, this rank's part of it."""
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda" and world > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
    try:
        where = torch.device(device)
        torch.zeros(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"no device {device!r} here: {first_line(error)}") from error
    if where.type == "cuda":
        torch.cuda.set_device(where)
        native = torch.cuda.get_device_capability(where) >= (8, 0)
        torch.backends.cudnn.benchmark = True
        # Where float32 is asked for, NVIDIA's 19-bit TF32 is as near to it as training needs.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()
        native = where.type == "cpu" and (has.get("avx512_bf16") or has.get("amx_bf16"))
    bf16 = precision == "bf16" or (precision == "auto" and native)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo",
                                timeout=timedelta(days=1))  # a download may take its time
    return Machine(where, torch.bfloat16 if bf16 else torch.float32, rank, world)


def seed_of(*keys) -> int:
    """A 63-bit seed hashed from what it is for, such as (seed, "step", 17): sums would collide."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "big") >> 1


class Noise:
    """z ~ N(0, I), (B, …), each image from a generator of its own, seeded by (seed, index).

    An image then depends on its index alone, whatever batch it is drawn in.
    """

    def __init__(self, seed: int, indices, shape: tuple[int, ...], device):
        self.generators = [torch.Generator(device).manual_seed(seed_of(seed, "image", i))
                           for i in indices]
        self.shape, self.device = tuple(shape), device

    def __call__(self, t: int | None = None) -> Tensor:
        z = torch.empty(len(self.generators), *self.shape, device=self.device)
        for row, generator in zip(z, self.generators):
            row.normal_(generator=generator)
        return z


# --------------------------------------------------------- settings → network, schedule, samples

class Trained(NamedTuple):
    """A network with what is needed to use it."""
    net: UNet
    schedule: ddpm.Schedule
    settings: dict          # those of train.py
    source: str             # where it comes from, for people

    @property
    def model_settings(self) -> dict:
        """Those of the settings that say which function the network is, and of which chain."""
        return {k: self.settings[k] for k in (
            "in_channels", "image_size", "channels", "multipliers", "blocks", "attention",
            "timesteps", "schedule", "beta_start", "beta_end", "predict", "variance")}

    @property
    def choices(self) -> dict:
        """`predict` and `variance` of `ddpm.p_mean_variance`."""
        return {"predict": self.settings["predict"], "variance": self.settings["variance"]}

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of one image."""
        side = self.settings["image_size"]
        return (self.settings["in_channels"], side, side)


def build_net(s: dict) -> UNet:
    """The U-Net of `settings`; a learned variance doubles its output channels."""
    return UNet(s["in_channels"], s["in_channels"] * (2 if s["variance"] == "learned" else 1),
                s["channels"], tuple(s["multipliers"]), s["blocks"], tuple(s["attention"]),
                s["image_size"], s["dropout"])


def build_schedule(s: dict) -> ddpm.Schedule:
    """The noise schedule of `settings`."""
    return ddpm.make_schedule(s["timesteps"], s["schedule"], s["beta_start"], s["beta_end"])


def runner(net: nn.Module, where: Machine) -> ddpm.Model:
    """ε_θ(x_t, t) with its products in the machine's precision and its output in float32."""
    def model(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(where.device.type, where.dtype, where.dtype != torch.float32):
            return net(x, t).float()
    return model


def sampler(net: nn.Module, where: Machine) -> ddpm.Model:
    """`runner` of a copy for inference, whose weights are cast once, not again in every call."""
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(where.dtype)
    return runner(net, where)


def compiled(net: nn.Module, where: Machine, shape: tuple) -> nn.Module:
    """net through torch.compile, tried on one batch; net itself, and a line, if it fails."""
    fast = torch.compile(net)
    try:
        x = torch.zeros(shape, device=where.device)
        t = torch.ones(len(x), dtype=torch.int64, device=where.device)
        runner(fast, where)(x, t).sum().backward()
        net.zero_grad()
        return fast
    except Exception as error:  # whatever the compiler and its compilers raise
        print(f"going on without torch.compile: {first_line(error)}", file=sys.stderr)
        return net


@torch.no_grad()
def draw_samples(trained: Trained, where: Machine, seed: int, n: int, batch_size: int,
                 steps: int | None = None, progress: Progress | None = None, **choices) -> Tensor:
    """Images 0 … n − 1 of a seed (Algorithm 2): uint8 (n, C, H, W) on the CPU, on every rank."""
    s = trained.schedule if steps is None else ddpm.respace(trained.schedule, steps)
    s, model = s.to(where.device), sampler(trained.net, where)
    mine, out = where.share(n), []
    for i in range(0, len(mine), batch_size):
        noise = Noise(seed, mine[i:i + batch_size], trained.shape, where.device)
        x_T = noise()
        for state in ddpm.p_sample_loop(s, model, x_T, noise, **{**trained.choices, **choices}):
            if progress:
                progress.update(min(n, (i + len(x_T) * (1 - state.t / s.T)) * where.world))
        out.append(to_uint8(state.x_t).cpu())
    rows = torch.cat(out) if out else torch.zeros(0, *trained.shape, dtype=torch.uint8)
    return where.gather(rows, n)


# ------------------------------------------------------------------------- files, never half there

@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the name of `path` when the block ends well."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # gone after the rename; never hide the first error
            part.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """OSError now, not after hours of work, if `path` cannot be written."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def save_checkpoint(path: Path, payload: dict) -> None:
    """torch.save's bytes and their SHA-256, flushed to disk, renamed; the last is kept as .prev.pt.

    OSError if it cannot be written; then the checkpoint that was there still is.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **payload}, buffer)
    with written_aside(path) as part, open(part, "wb") as file:
        file.write(buffer.getbuffer())
        file.write(hashlib.sha256(buffer.getbuffer()).digest())
        file.flush()
        os.fsync(file.fileno())
        if path.exists():
            os.replace(path, previous(path))


def load_checkpoint(path: Path) -> dict:
    """What `save_checkpoint` wrote. ValueError if a byte of it changed or it is something else."""
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.exists() and previous(path).exists():
        path = previous(path)  # a stop fell between the two renames of a save
    if not path.exists():
        raise ValueError(f"no checkpoint at {path}")
    body = verified(path)
    if body is None:
        other, way_out = previous(path), ""
        if other != path and other.exists() and verified(other) is not None:
            way_out = f"; delete it to go on from the one before it, {other}"
        raise ValueError(f"{path} is damaged or no checkpoint of train.py: its checksum does not "
                         f"match{way_out}")
    payload = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version of train.py")
    return payload


FORMAT = "ddpm checkpoint 1"


def verified(path: Path) -> memoryview | None:
    """The bytes before the SHA-256 that ends a checkpoint, or None if it is not theirs."""
    raw = memoryview(path.read_bytes())
    if len(raw) < 32 or hashlib.sha256(raw[:-32]).digest() != raw[-32:]:
        return None
    return raw[:-32]


def previous(path: Path) -> Path:
    """checkpoint.pt → checkpoint.prev.pt"""
    return path if path.stem.endswith(".prev") else path.with_suffix(".prev.pt")


def newest_checkpoint(root: Path = Path("runs")) -> Path:
    """The checkpoint of the run under `root` that saved last."""
    found = sorted(root.glob("*/checkpoint*.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError(f"no run under {root}/: train one first (python train.py --dataset shapes)"
                         " or name a --checkpoint")
    return found[-1].with_name("checkpoint.pt")


def load_trained(path: Path, ema: bool = True) -> Trained:
    """The network of a checkpoint, with its EMA weights unless told otherwise."""
    payload = load_checkpoint(path)
    net = build_net(payload["settings"])
    net.load_state_dict(payload["ema" if ema else "model"])
    source = f"{path}, step {payload['step']}, {'averaged' if ema else 'raw'} weights"
    return Trained(net, build_schedule(payload["settings"]), payload["settings"], source)


# -------------------------------------------------------------------------------------- pictures

def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """uint8 (N, C, H, W) → one picture (C, …) in rows of `columns`, as square as can be."""
    n, c, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cells = torch.zeros(rows * columns, c, height, width, dtype=torch.uint8)
    cells[:n] = images
    cells = cells.view(rows, columns, c, height, width).permute(2, 0, 3, 1, 4)
    return cells.reshape(c, rows * height, columns * width)


def write_png(path: Path, image: Tensor) -> None:
    """uint8 (1 or 3, H, W) → an 8-bit PNG, grey or RGB. OSError if it cannot be written."""
    c, height, width = image.shape
    if image.dtype != torch.uint8 or c not in (1, 3) or not height * width:
        raise ValueError(f"a picture is uint8 (1 or 3, H, W), not {image.dtype} "
                         f"{tuple(image.shape)}")
    lines = torch.zeros(height, 1 + width * c, dtype=torch.uint8)  # byte 0 of a line: no filter
    lines[:, 1:] = image.permute(1, 2, 0).reshape(height, -1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (struct.pack(">I", len(body)) + kind + body
                + struct.pack(">I", zlib.crc32(kind + body)))

    header = struct.pack(">IIBBBBB", width, height, 8, 0 if c == 1 else 2, 0, 0, 0)
    with written_aside(path) as part:
        part.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                         + chunk(b"IDAT", zlib.compress(raw_bytes(lines), 9)) + chunk(b"IEND", b""))


# --------------------------------------------------------------------------- progress and stops

class Progress:
    """One line on stderr: done of total, rate and time left; every 10 s where it is no terminal."""

    def __init__(self, total: float, unit: str, what: str = "", done: float = 0, quiet=False):
        self.total, self.unit, self.what, self.first, self.quiet = total, unit, what, done, quiet
        self.terminal = sys.stderr.isatty()
        self.started = self.shown = time.monotonic()

    def due(self) -> bool:
        """Whether the line may be drawn again."""
        return not self.quiet and time.monotonic() - self.shown >= (0.5 if self.terminal else 10)

    def update(self, done: float, note: str = "", force: bool = False) -> None:
        """Draw the line if it is due (or forced); the last one stays."""
        if self.quiet or not (force or done >= self.total or self.due()):
            return
        now = self.shown = time.monotonic()
        rate = (done - self.first) / max(now - self.started, 1e-9)
        left = clock((self.total - done) / rate) if rate > 0 else "?"
        speed = f"{rate:.1f} {self.unit}/s" if rate >= 0.1 else f"{1 / max(rate, 1e-9):.0f} s each"
        line = f"{self.what} {done:.0f}/{self.total:.0f} {self.unit} {note} {speed}, {left} left"
        end = "" if self.terminal and done < self.total else "\n"
        print(("\r\x1b[K" if self.terminal else "") + " ".join(line.split()), end=end,
              file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as 42 s, 3 min 20 s, 5 h 10 min or 2 d 3 h."""
    s = int(seconds + 0.5)
    for size, small, big, little in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"),
                                     (60, 1, "min", "s")):
        if s >= size:
            return f"{s // size} {big} {s % size // small} {little}"
    return f"{s} s"


class Stop:
    """SIGINT and SIGTERM as a wish, `signal`, that a loop grants; a second one ends at once."""

    def __init__(self):
        self.signal = 0

    def __enter__(self) -> Stop:
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame) -> None:
        """Remember the first signal, and give the second its usual effect."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone; ValueError if another holds it. Freed even by kill −9."""
    check_writable(folder / ".lock")
    with open(folder / ".lock", "w") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows has no fcntl: there nothing guards against a second process
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another process: wait for it, or give this "
                             "run another --out") from None
        yield


def read_log(path: Path) -> list[dict]:
    """The entries of a log.jsonl; a last line that a stop cut short is left out."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def cut_log(path: Path, step: int) -> None:
    """log.jsonl as it was at `step`: a resumed run writes the later lines again."""
    lines = [json.dumps(entry) + "\n" for entry in read_log(path) if entry["step"] <= step]
    with written_aside(path) as part:
        part.write_text("".join(lines))
