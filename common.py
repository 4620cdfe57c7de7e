"""What the scripts share: flags, errors, the machine, random numbers, checkpoints, progress.

A mistake of the user is raised as a ValueError or an OSError whose text is one line. `command`
prints that line, and nothing else.
"""
from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import hashlib
import io
import math
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

# torch says this once in an environment without NumPy, which nothing here needs.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

try:
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn

    import ddpm
    from data import check_writable, first_line, say, size_of, written
    from unet import UNet
except KeyboardInterrupt:  # these imports take seconds
    raise SystemExit(130) from None

# === Flags, errors and signals ====================================================================

class UsageError(ValueError):
    """A mistake in the arguments: exit status 2."""

class Parser(argparse.ArgumentParser):
    """argparse with errors as UsageError. The text at the head of a script begins its --help."""

    def __init__(self, text: str, **options):
        super().__init__(description=text, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        wrong = message.partition("unrecognized arguments: ")[2].split(" ")[0].partition("=")[0]
        flags = self._option_string_actions if wrong.startswith("-") else ()
        near = difflib.get_close_matches(wrong, flags, 1)
        raise UsageError(f"{message} ({f'did you mean {near[0]}?' if near else 'see --help'})")

    def add(self, *names: str) -> None:
        """Adds flags of FLAGS, which several scripts have."""
        for name in names:
            self.add_argument(name, **FLAGS[name])

def number(kind: type, low: float, high: float, above: bool = False) -> Callable:
    """A judge of values: an int or a float from `low` (not `low` itself if `above`) to `high`.

    It converts the text of a flag, and takes other values only if they are of the right type.
    """
    def judge(value):
        try:
            found = kind(value) if isinstance(value, str) else value
            fits = type(found) is kind or (kind is float and type(found) is int)
        except ValueError:
            fits = False
        if not fits or not low <= found <= high or (above and found == low):
            bounds = f"{'above' if above else 'from'} {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(
                f"{shown(value)} is not {'a whole number' if kind is int else 'a number'} {bounds}")
        return found
    judge.range = (kind, low, high, above)
    return judge

def one_of(*values: str) -> Callable:
    """A judge of values: one of these words."""
    def judge(value):
        if value not in values:
            raise argparse.ArgumentTypeError(f"{shown(value)} is not one of {', '.join(values)}")
        return value
    judge.values = values
    return judge

def word(value) -> str:
    """A judge of values: a text that is not empty."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise argparse.ArgumentTypeError(f"{shown(value)} is no name")
    return value

def switch(value) -> bool:
    """A judge of values: True or False."""
    if type(value) is not bool:
        raise argparse.ArgumentTypeError(f"{shown(value)} is neither True nor False")
    return value

def shown(value) -> str:
    """A value from outside, in at most 60 printable characters."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10 ** 30 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."

# What a setting of a run may be, wherever it comes from: a flag, a checkpoint, a configuration of
# diffusers. A list has such elements, and at most LONGEST of them.
positive, count = number(float, 0, 1000, above=True), number(int, 1, 10 ** 9)
fraction, LONGEST = number(float, 0, 0.999, above=True), 8
KINDS = {
    "dataset": word, "data_dir": word, "image_size": number(int, 1, 4096), "flip": switch,
    "steps": count, "batch_size": number(int, 1, 10 ** 6), "lr": positive,
    "warmup": number(int, 0, 10 ** 9), "clip": number(float, 0, 1e9, above=True),
    "ema": number(float, 0, 1), "ema_ramp": switch, "dropout": number(float, 0, 0.99),
    "channels": number(int, 32, 4096), "multipliers": number(int, 1, 64),
    "blocks": number(int, 1, 32), "attention": number(int, 1, 4096),
    "timesteps": number(int, 2, 10 ** 5), "schedule": one_of("linear", "quadratic", "constant"),
    "beta_start": fraction, "beta_end": fraction, "predict": one_of("eps", "x0", "mean"),
    "variance": one_of("fixed_large", "fixed_small", "learned"),
    "objective": one_of("simple", "vlb"), "seed": number(int, 0, 2 ** 63 - 1), "log_every": count,
    "save_every": count, "sample_every": count, "samples": number(int, 0, 10 ** 4),
    "sample_steps": number(int, 2, 10 ** 5), "micro_batch": number(int, 1, 10 ** 6), "keep": count,
    "in_channels": number(int, 1, 3),
    "clip_sample": switch,
}
LISTS = {"multipliers", "attention"}
OPTIONAL = {"image_size", "sample_steps", "micro_batch", "keep"}  # these may be None
# Older checkpoints lack three of them, and clip_sample is there only for weights of diffusers.
REQUIRED = KINDS.keys() - {"ema_ramp", "micro_batch", "keep", "clip_sample"}

def judged(settings, place: str, needed=()) -> dict:
    """`settings`, if each of them is what KINDS says. ValueError names the first that is not.

    needed: the names of those that must be there.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"{place} holds no settings")
    if missing := sorted(set(needed) - set(settings)):
        raise ValueError(f"{place} lacks the setting {missing[0]}")
    for name, value in settings.items():
        if name not in KINDS:
            raise ValueError(f"{place} has a setting {shown(name)}, which is not known here")
        if value is None and name in OPTIONAL:
            continue
        if name in LISTS and not (isinstance(value, list) and 0 < len(value) <= LONGEST):
            raise ValueError(f"{place}: {name} is {shown(value)}, not a list of 1 to {LONGEST}")
        for one in value if name in LISTS else [value]:
            try:
                if KINDS[name](one) != one:  # the judges of flags take numbers as text
                    raise argparse.ArgumentTypeError(f"{shown(one)} is a text, not a number")
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{place}: {name} {error}") from error
    return settings

FLAGS = {
    "--checkpoint": dict(type=word, help="a checkpoint.pt, its folder, a diffusers folder, a "
                         ".safetensors file or a name on the hub (default: the newest run)"),
    "--no-ema": dict(action="store_true", help="the last weights, not their average"),
    "--data-dir": dict(type=word, help="folder of data and downloads (default: the run's or data)"),
    "--steps": dict(type=KINDS["sample_steps"], help="network calls for each sample, at times "
                    "evenly spaced from T to 1 (default: all T)"),
    "--no-clip": dict(action="store_true", help="do not clip x̂_0 to [−1, 1] (the paper has no "
                      "clipping; the authors' code clips)"),
    "--seed": dict(type=KINDS["seed"], default=0, help="seed of all random numbers (default: 0)"),
    "--batch-size": dict(type=KINDS["batch_size"], help="images computed at a time (default: 256 "
                         "on CUDA, else 16)"),
    "--device": dict(type=word, default="auto", help="cuda, cuda:N, mps or cpu (default: the first "
                     "of cuda, mps, cpu that is there)"),
    "--precision": dict(choices=("auto", "bf16", "fp16", "tf32", "fp32"), default="auto",
                        help="the number format of convolutions and matrix products (default: bf16 "
                        "if the hardware has it, else tf32 on CUDA, else fp32; for bits/dim always "
                        "fp32)"),
}

def command(main: Callable) -> Callable:
    """Wraps main(argv) → exit status, so that every failure prints one line on stderr.

    The status is 2 for a mistake in the arguments, 128 + its number for a signal, and 1 for
    anything else. What was foreseen is a ValueError or an OSError with a text of its own; any other
    exception is named as it is. DDPM_TRACEBACK=1 in the environment shows the traceback.
    """
    script = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run(argv=None) -> int:
        signals.number, signals.deferred = 0, False
        for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 gets ? for ≤
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        handlers = {n: signal.signal(n, signals.arrive) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            return main(argv) or 0
        except SystemExit as stop:  # --help
            return stop.code if isinstance(stop.code, int) else 0
        except KeyboardInterrupt:
            say(f"{script}: stopped")
            return 128 + (signals.number or signal.SIGINT)
        except Exception as error:
            if os.environ.get("DDPM_TRACEBACK"):
                raise
            text = first_line(error)
            if "out of memory" in text or "can't allocate memory" in text:
                text = "out of memory: a smaller --batch-size or smaller --channels needs less"
            elif not isinstance(error, (ValueError, OSError)):
                text = f"unforeseen {type(error).__name__}: {text}"[:250] + (
                    " (DDPM_TRACEBACK=1 shows where)")
            say(f"{script}: {text}")
            return 2 if isinstance(error, UsageError) else 1
        finally:
            for n, handler in handlers.items():
                signal.signal(n, handler)
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()
    return run

class Signals:
    """SIGINT and SIGTERM: the first raises KeyboardInterrupt, a second one ends the process.

    While `deferred` is true, the first only sets `number`; the program asks for it and stops later.
    """
    number, deferred = 0, False

    def arrive(self, number: int, frame) -> None:
        """The handler of both signals."""
        self.number = number
        for n in (signal.SIGINT, signal.SIGTERM):
            signal.signal(n, signal.SIG_DFL)
        if os.environ.get("RANK", "0") == "0":
            say("\nstopping; a second signal ends at once")
        if not self.deferred:
            raise KeyboardInterrupt

signals = Signals()

# === The machine: device, precision, processes ====================================================

class Machine(NamedTuple):
    """The device and precision of this process, and its place among the processes of torchrun."""
    device: torch.device
    dtype: torch.dtype  # of convolutions and matrix products
    rank: int = 0       # the process of rank 0 is the chief, which writes files and prints
    world: int = 1      # how many processes there are

    @property
    def chief(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """Which of n pieces of work this process does: every world-th one."""
        return range(self.rank, n, self.world)

    def gather(self, rows: Tensor, n: int) -> Tensor:
        """The rows of all processes, each with one row for every index of its `share`: n rows."""
        if self.world == 1:
            return rows
        whole = torch.zeros(n, *rows.shape[1:], dtype=rows.dtype, device=self.device)
        whole[list(self.share(n))] = rows.to(self.device)
        dist.all_reduce(whole)
        return whole.to(rows.device)

    @contextlib.contextmanager
    def chief_first(self) -> Iterator[None]:
        """The chief runs the block before the others: it downloads a file, and they find it."""
        if self.world > 1 and not self.chief:
            dist.barrier()
        yield
        if self.world > 1 and self.chief:
            dist.barrier()

    def model(self, net: nn.Module) -> ddpm.Model:
        """ε_θ(x_t, t): `net` computed in this machine's precision, with a float32 result."""
        def call(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
                return net(x, t).float()
        return call

def find_machine(device: str = "auto", precision: str = "auto") -> Machine:
    """The machine that --device and --precision ask for. UsageError if it is not there."""
    rank, world = (os.environ.get(name, default) for name, default in (("RANK", "0"),
                                                                      ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world) < 10 ** 6):
        raise UsageError(f"RANK {shown(rank)} and WORLD_SIZE {shown(world)} in the environment are "
                         "not those of torchrun")
    rank, world = int(rank), int(world)
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda" and world > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except Exception as error:  # each kind of device has its own
        raise UsageError(f"--device {device}: there is none here ({first_line(error)})") from error
    cuda = found.type == "cuda"
    if precision == "tf32" and not cuda:
        raise UsageError("--precision tf32 is a format of NVIDIA GPUs: use bf16 or fp32 here")
    if cuda:
        torch.cuda.set_device(found)
        has_bf16 = torch.cuda.get_device_capability(found) >= (8, 0)
        torch.backends.cudnn.benchmark = True
        tf32 = precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    else:
        cpu = getattr(torch.cpu, "get_capabilities", dict)() if found.type == "cpu" else {}
        has_bf16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    if precision == "auto":
        precision = "bf16" if has_bf16 else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo",
                                timeout=timedelta(days=1))  # the others wait for a long download
    return Machine(found, dtype, rank, world)

def require(need: float, what: str, device: torch.device = torch.device("cpu")) -> None:
    """ValueError if `what` needs more bytes than the device has free, as far as that is known."""
    free = math.inf
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu" and Path("/proc/meminfo").exists():
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    if need > free:
        raise ValueError(f"{what} needs about {need / 2 ** 30:,.1f} GiB of memory, and "
                         f"{free / 2 ** 30:,.1f} GiB are free")

# === Random numbers ===============================================================================

def seed_of(*keys) -> int:
    """63 bits, hashed from what the seed is for, such as (seed, "step", 17).

    With a sum, seed + step, the runs of neighbouring seeds would share their random numbers. (Of
    these bits torch's CPU generator uses 32.)
    """
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "big") >> 1

class Noise:
    """z ~ N(0, I), (B, …). Image i is drawn from generators of its own, seeded by (seed, i).

    So its noise does not depend on the batch it is computed in (but on the kind of device).
    torch's CPU generator uses 32 bits of a seed, with which two among 50,000 images get the same
    noise with a probability of 25 %. So each image has two generators there, one for each half of
    its seed. If u and v are independent and uniform on [0, 1), then u + v modulo 1 is uniform too,
    and independent of u, and of v.
    """

    def __init__(self, seed: int, indices, shape: tuple[int, ...], device):
        self.shape, self.device = tuple(shape), torch.device(device)
        seeds = [seed_of(seed, "image", i) for i in indices]
        if self.device.type == "cpu":
            pairs = [(k % 2 ** 32, k >> 32) for k in seeds]
        else:
            pairs = [(k,) for k in seeds]
        self.generators = [[torch.Generator(device).manual_seed(k) for k in pair] for pair in pairs]

    def __call__(self, t: int | None = None) -> Tensor:
        z = torch.zeros(len(self.generators), *self.shape, device=self.device)
        if self.device.type != "cpu":
            for row, (generator,) in zip(z, self.generators):
                row.normal_(generator=generator)
            return z
        u = z.double()
        for row, pair in zip(u, self.generators):
            for generator in pair:
                row += torch.rand(self.shape, dtype=torch.float64, generator=generator)
        return torch.special.ndtri((u % 1).clamp(min=2 ** -60)).float()  # Φ⁻¹ of a uniform number

# === The network and the schedule of a run's settings =============================================

def build_network(settings: dict) -> nn.Module:
    """The U-Net of `settings`. With a learned variance it has twice the output channels."""
    c = settings["in_channels"]
    return UNet(c, 2 * c if settings["variance"] == "learned" else c, settings["channels"],
                tuple(settings["multipliers"]), settings["blocks"], tuple(settings["attention"]),
                settings["image_size"], settings["dropout"])

def _shaped(layer: nn.Module, x: Tensor) -> Tensor:
    """A tensor of the shape of layer(x) that holds no image, and needs no weights."""
    if isinstance(layer, nn.GroupNorm):
        return torch.empty_like(x)
    if isinstance(layer, nn.Linear):
        return torch.empty(len(x), layer.out_features)
    sides = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], layer.padding,
                                                            layer.kernel_size, layer.stride)]
    return torch.empty(len(x), layer.out_channels, *sides)

def require_network(settings: dict, machine: Machine, copies: int, batch: int, kept: bool) -> None:
    """ValueError if the network cannot be computed in the memory that is free.

    copies: how often the memory holds its weights; batch: images at a time; kept: whether the
    outputs of all layers are kept, for a backward pass. Nothing is allocated to find out.
    """
    sizes = []
    with torch.device("meta"):  # weights without memory
        net = build_network(settings)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm)):
            module.forward = functools.partial(_shaped, module)
        if not list(module.children()):
            module.register_forward_hook(lambda _, x, y: sizes.append(math.prod(y.shape[1:])))
    side = settings["image_size"]
    net(torch.zeros(0, settings["in_channels"], side, side), torch.ones(0, dtype=torch.int64))
    outputs = batch * machine.dtype.itemsize * (sum(sizes) if kept else 2 * max(sizes))
    outputs += batch * 20_000  # random generators and the like
    weights = 4 * copies * sum(p.numel() for p in net.parameters())
    require(weights + outputs, f"this network with {batch:,} images at a time", machine.device)

def build_schedule(settings: dict) -> ddpm.Schedule:
    """The noise schedule of `settings`."""
    return ddpm.make_schedule(*(settings[name] for name in (
        "timesteps", "schedule", "beta_start", "beta_end")))

# === Checkpoints ==================================================================================

FORMAT = "ddpm checkpoint 1"

def save_checkpoint(path: Path, payload: dict) -> None:
    """Writes torch.save's bytes and their SHA-256; the file before it stays as checkpoint.prev.pt.

    OSError if it cannot be written; then the checkpoint that was there is still there.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **payload}, buffer)
    with written(path, keep=previous(path)) as file:
        file.write(buffer.getbuffer())
        file.write(hashlib.sha256(buffer.getbuffer()).digest())

def load_checkpoint(path: Path) -> dict:
    """What `save_checkpoint` wrote: a file, or its folder. ValueError if a single byte changed."""
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.exists() and previous(path).exists():
        path = previous(path)  # where there are no hard links, a kill can fall between two renames
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    require(3 * size_of(path), f"reading {path}")
    raw = memoryview(path.read_bytes())
    if hashlib.sha256(raw[:-32]).digest() != raw[-32:]:
        way_out = ""
        if previous(path) != path and previous(path).exists():
            way_out = f"; delete it to continue from the one before it, {previous(path)}"
        raise ValueError(f"{path} is damaged, or it is no checkpoint of train.py: its checksum "
                         f"does not match{way_out}")
    try:
        payload = torch.load(io.BytesIO(raw[:-32]), map_location="cpu", weights_only=True)
        step = payload["step"]
        if payload["format"] != FORMAT or type(step) is not int or not 0 <= step <= 10 ** 9:
            raise ValueError("another format")
    except Exception as error:  # torch.load raises many kinds of error
        raise ValueError(f"{path} is not a checkpoint of this version of train.py") from error
    judged(payload.get("settings"), str(path), REQUIRED)
    return payload

def previous(path: Path) -> Path:
    """checkpoint.pt → checkpoint.prev.pt"""
    return path if path.stem.endswith(".prev") else path.with_suffix(".prev.pt")

@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the folder while the block runs. ValueError if another process has locked it.

    The lock ends with the process, even with a kill. Windows has no such lock.
    """
    check_writable(folder / ".lock")
    if (folder / ".lock").exists():
        size_of(folder / ".lock")
    with open(folder / ".lock", "a") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another process: wait for it, or give this "
                             "run another --out") from None
        try:
            yield
        finally:
            if os.listdir(folder) == [".lock"]:  # a mistake came before the run began
                (folder / ".lock").unlink()
                folder.rmdir()

# === Progress =====================================================================================

class Progress:
    """A line on stderr with what is done, the rate and the time left.

    It is drawn anew twice a second on a terminal, and printed every 10 seconds elsewhere.
    """

    def __init__(self, total: float, unit: str, done: float = 0, quiet: bool = False):
        self.total, self.unit, self.first, self.quiet = total, unit, done, quiet
        self.terminal = sys.stderr.isatty()
        self.started = self.shown = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to draw the line again."""
        return not self.quiet and time.monotonic() - self.shown >= (0.5 if self.terminal else 10)

    def update(self, done: float, note: str = "", force: bool = False) -> None:
        """Draws the line if it is due, forced or the last one, which stays."""
        if self.quiet or not (force or done >= self.total or self.due()):
            return
        self.shown = time.monotonic()
        line = f"{done:.0f}/{self.total:.0f} {self.unit} {note}"
        if done > self.first:  # before that nobody knows the rate
            rate = (done - self.first) / max(self.shown - self.started, 1e-9)
            speed = f"{rate:.1f} {self.unit}/s" if rate >= 0.1 else f"{1 / rate:.0f} s each"
            line += f" {speed}, {timedelta(seconds=round((self.total - done) / rate))} left"
        end = "" if self.terminal and done < self.total else "\n"
        say(("\r\x1b[K" if self.terminal else "") + " ".join(line.split()), end=end)

def pyplot():
    """matplotlib.pyplot, which draws into files alone; None if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot
