"""The command line: flags, one line for an error, signals, progress, files.

There is one way to read what comes from outside, `reading`, and one to write, `written`.
"""
from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, Callable, Iterator

import torch.distributed as dist

class UsageError(ValueError):
    """A mistake in the arguments: exit status 2."""

def between(kind: type, name: str, low: float, high: float) -> Callable:
    """A type of flags: a number of this kind from `low` to `high`."""
    def parse(text: str):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{ascii(text)[:60]} is not a {name} from {low:g} to "
                                         f"{high:g}")
    return parse

int_between = functools.partial(between, int, "whole number")
float_between = functools.partial(between, float, "number")
positive_int, seed = int_between(1, 10 ** 9), int_between(0, 2 ** 63 - 1)

def nonblank(text: str) -> str:
    """A type of flags: a text that is not blank, as an unset variable of the shell would be."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is blank")
    return text

FLAGS = {  # those that several commands have
    "--checkpoint": dict(type=nonblank, help="a checkpoint or its folder (default: newest run)"),
    "--no-ema": dict(action="store_true", help="the last weights, not their average"),
    "--data-dir": dict(type=nonblank, default="data", help="folder of data (default: data)"),
    "--steps": dict(type=positive_int, help="network calls per sample, at times evenly spaced from "
                    "T to 1 (default: all T)"),
    "--no-clip": dict(action="store_true", help="do not clip x̂_0 to [−1, 1] (the paper has no "
                      "clipping; the authors' code clips)"),
    "--seed": dict(type=seed, default=0, help="seed of all random numbers (default: 0)"),
    "--batch-size": dict(type=positive_int, help="images at a time (default: 256 on CUDA, "
                         "else 16)"),
    "--device": dict(help="cuda, cuda:N, mps or cpu (default: the first that is there)"),
    "--precision": dict(choices=("bf16", "fp16", "tf32", "fp32"), help="of convolutions and matrix "
                        "products (default: bf16 if the hardware has it, else fp16 on CUDA of "
                        "capability 7, tf32 on older CUDA, fp32 elsewhere; for bits/dim fp32)"),
    "--compile": dict(action=argparse.BooleanOptionalAction, help="use torch.compile (default: for "
                      "training on CUDA only)"),
}

class Parser(argparse.ArgumentParser):
    """argparse with errors as UsageError. The text at the head of a script begins its --help."""

    def __init__(self, text: str, *flags: str, **options):
        super().__init__(description=text, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        for flag in flags:
            self.add_argument(flag, **FLAGS[flag])

    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")

    def parse_mode(self, argv, mode: Callable, reads: dict[str, str]) -> argparse.Namespace:
        """The flags. mode(flags) is the name of what they ask for, reads[name] the flags that it
        reads, without their hyphens; UsageError for another one that was given."""
        args, unset = self.parse_args(argv), object()
        seen = vars(self.parse_args(argv, argparse.Namespace(
            **{action.dest: unset for action in self._actions})))
        name = mode(args)
        for flag in seen:
            if seen[flag] is not unset and flag not in reads[name].split():
                where = " and ".join(other for other in reads if flag in reads[other].split())
                raise UsageError(f"--{flag.replace('_', '-')} has no effect on {name}, only on "
                                 f"{where}")
        return args

def own_places(error: BaseException) -> list[traceback.FrameSummary]:
    """Where an error went through this project's files, or the user's; the last one is nearest."""
    return [place for place in traceback.extract_tb(error.__traceback__)
            if not Path(place.filename).is_relative_to(LIBRARY)
            and "-packages" not in place.filename]

LIBRARY = Path(os.__file__).parent  # Python's own
ROOT = Path(__file__).resolve().parents[1]
OURS = {*(f"{name}.py" for name in ("ddpm", "unet", "train", "sample", "evaluate")),
        "support", "extras", "judge", "page", "tools"}
PACKAGES = {"PIL": "pillow", "diffusers": "diffusers", "safetensors": "safetensors"}

def is_foreseen(error: BaseException) -> bool:
    """Whether a line of this project raised it as a ValueError, and not the user's or a library's.
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(last.filename).resolve()
    return (isinstance(error, ValueError) and (last.line or "").startswith("raise")
            and path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS)

def command(main: Callable) -> Callable:
    """Wraps main(argv) → exit status, so that every failure prints one line on stderr.

    The status is 2 for a mistake in the arguments, 128 + its number for a signal, and 1 for
    anything else. What was foreseen is a ValueError or an OSError with a text of its own; another
    exception is named with its place. DDPM_TRACEBACK=1 in the environment shows all of them.
    """
    script = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run(argv=None) -> int:
        stop.number, stop.later = 0, False
        sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
        for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 gets ? for ≤
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        handlers = {n: signal.signal(n, stop) for n in signals()}
        try:
            return main(argv) or 0
        except SystemExit as end:  # --help
            return end.code if isinstance(end.code, int) else 0
        except KeyboardInterrupt:
            say(f"{script}: stopped")
            return 128 + (stop.number or signal.SIGINT)
        except Exception as error:
            if os.environ.get("DDPM_TRACEBACK"):
                raise
            text = one_line(error)
            if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
                text = ("this needs a package that is not installed: pip install "
                        f"{PACKAGES[error.name]}")
            elif "out of memory" in text or "can't allocate memory" in text:
                text = "out of memory: fewer images at a time, or a smaller network, need less"
            elif isinstance(error, getattr(dist, "DistError", ())) or "[gloo" in text:
                text = "another process has ended, and its line says why"
            elif not (isinstance(error, OSError) or is_foreseen(error)):
                last = own_places(error)[-1]
                place = f"{Path(last.filename).name}, line {last.lineno}"
                text = (f"unforeseen {type(error).__name__} in {place}: {text} "
                        "(DDPM_TRACEBACK=1 shows all)")
            say(f"{script}: {text}")
            return 2 if isinstance(error, UsageError) else 1
        finally:
            for n, handler in handlers.items():
                signal.signal(n, handler)
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()
    return run

def signals() -> list[int]:
    """SIGINT, SIGTERM and SIGHUP, but for those that are ignored (as under nohup); none in a
    thread, where Python takes no handlers."""
    if threading.current_thread() is not threading.main_thread():
        return []
    numbers = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
    return [n for n in numbers if n and signal.getsignal(n) != signal.SIG_IGN]

class Stop:
    """SIGINT, SIGTERM, SIGHUP: the first raises KeyboardInterrupt, a second one ends the process.

    While `later` is true, the first only sets `number`, for a loop that looks at it.
    """
    number, later = 0, False

    def __call__(self, number: int, frame) -> None:
        self.number = number
        for n in signals():
            signal.signal(n, signal.SIG_DFL)
        if os.environ.get("RANK", "0") == "0":
            say("\nstopping; a second signal ends at once")
        if not self.later:
            raise KeyboardInterrupt

stop = Stop()

def plain(text: str) -> str:
    """text without control characters, which would move a terminal's cursor, or worse."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)

def say(text: str, start: str = "", end: str = "\n") -> None:
    """Prints on stderr. Ignores a closed stderr."""
    with contextlib.suppress(OSError, ValueError):
        print(start + plain(text), end=end, file=sys.stderr, flush=True)

def one_line(error: BaseException) -> str:
    """The text of an error on one line, printable and short, or the name of its class."""
    return plain(" ".join(str(error).split()) or type(error).__name__)[:280]

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

    def update(self, done: float, note: str = "") -> None:
        """Draws the line if it is due or the last one, which stays."""
        if self.quiet or not (done >= self.total or self.due()):
            return
        self.shown = time.monotonic()
        line = f"{done:.0f}/{self.total:.0f} {self.unit} {note}"
        if done > self.first:  # before that nobody knows the rate
            rate = (done - self.first) / max(self.shown - self.started, 1e-9)
            speed = f"{rate:.1f} {self.unit}/s" if rate >= 0.1 else f"{1 / rate:.0f} s each"
            line += f" {speed}, {timedelta(seconds=round((self.total - done) / rate))} left"
        say(" ".join(line.split()), start="\r\x1b[K" if self.terminal else "",
            end="" if self.terminal and done < self.total else "\n")

@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong in the block becomes "PATH cannot be read as WHAT: …", a ValueError.

    So nobody who reads a file from outside checks what its parser checks. A library that is missing
    keeps its ImportError. What is no ordinary file (a pipe may never end) is refused.
    """
    try:
        if not Path(path).is_file():
            raise ValueError("it is no file" if Path(path).exists() else "there is no such file")
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as {what}: {one_line(error)}") from error

@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` when the block ends without an error.

    Until then it has a name that nobody can foresee, and after an error nothing of it is left. It
    is on the disk before it gets its name, so that a power cut cannot leave a file with holes. The
    block may hold hours of work: a place that cannot be written is an error before it.
    """
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise OSError(f"cannot write {path}: it is {kind}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as file:  # x: it must not exist, not even as a link
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # the folder's entry, too
            folder = os.open(path.parent, os.O_RDONLY)
            with lacking(path.parent, "flushing of folders"):
                os.fsync(folder)
            os.close(folder)
    except OSError as error:  # of writing, not of the work in the block
        if error.errno is None or error.filename not in (None, str(part), str(path.parent)):
            raise
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to report
            part.unlink(missing_ok=True)

@contextlib.contextmanager
def lacking(folder: Path, what: str) -> Iterator[None]:
    """A warning, once, if the block fails as the file system of the folder has no such thing."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
            raise
        if what not in WARNED:
            WARNED.add(what)
            say(f"warning: the file system of {folder} has no {what} ({error.strerror})")

WARNED: set[str] = set()

@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the folder while the block runs; ValueError if another process has. Not on Windows.

    A folder that is empty at the end is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        with contextlib.suppress(ImportError):
            import fcntl
            try:
                with lacking(folder, "locks, so see to it yourself that one process uses it"):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another process uses {folder}: give another --out") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if [path.name for path in folder.iterdir()] == [".lock"]:
                    (folder / ".lock").unlink()
                    folder.rmdir()
