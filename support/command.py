"""The command line: flags, one line for an error, signals, progress, files.

`reading` is the one way to read a file from outside, `written` the one way to write a file.
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
    """An argparse type: a number of this kind between `low` and `high`."""
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
    """An argparse type: a text that is not blank, as an unset shell variable would be."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be blank")
    return text

def path_of(text: str) -> Path:
    """An argparse type: a path that is not blank; Path("") would be the current folder."""
    return Path(nonblank(text))

FLAGS = {  # shared by several commands
    "--checkpoint": dict(type=nonblank, help="a checkpoint or its folder (default: newest run)"),
    "--no-ema": dict(action="store_true", help="use the last weights instead of their average"),
    "--data-dir": dict(type=nonblank, default="data", help="data folder (default: data)"),
    "--steps": dict(type=positive_int, help="network calls per image, at times evenly spaced from "
                    "T to 1 (default: all T)"),
    "--no-clip": dict(action="store_true", help="do not clip x̂_0 to [−1, 1] (the paper has no "
                      "clipping; the authors' code clips)"),
    "--seed": dict(type=seed, default=0, help="seed of all random numbers (default: 0)"),
    "--batch-size": dict(type=positive_int, help="images per batch (default: 256 on CUDA, "
                         "else 16)"),
    "--device": dict(help="cuda, cuda:N, mps or cpu (default: the first that is available)"),
    "--precision": dict(choices=("bf16", "fp16", "tf32", "fp32"), help="of convolutions and matrix "
                        "products (default: bf16 if the hardware has it, else fp16 on CUDA of "
                        "capability 7, tf32 on older CUDA, fp32 elsewhere; for bits/dim fp32)"),
    "--compile": dict(action=argparse.BooleanOptionalAction, help="use torch.compile "
                      "(default: only for training on CUDA)"),
}

class Parser(argparse.ArgumentParser):
    """argparse with errors as UsageError. `text` begins the --help; `flags` are keys of FLAGS."""

    def __init__(self, text: str, *flags: str, **options):
        super().__init__(description=text, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        for flag in flags:
            self.add_argument(flag, **FLAGS[flag])

    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")

    def parse_mode(self, argv, mode: Callable, reads: dict[str, str]) -> argparse.Namespace:
        """The flags. mode(flags) names the mode that they select; reads[name] lists the flags that
        this mode uses, without hyphens. UsageError for any other flag that was given."""
        args, unset = self.parse_args(argv), object()
        seen = vars(self.parse_args(argv, argparse.Namespace(
            **{action.dest: unset for action in self._actions})))
        name = mode(args)
        for flag in seen:
            if seen[flag] is not unset and flag not in reads[name].split():
                where = " and ".join(other for other in reads if flag in reads[other].split())
                raise UsageError(f"--{flag.replace('_', '-')} has no effect on {name}" + (
                    f", only on {where}" if where else ": it is in no entry of READS"))
        return args

def own_places(error: BaseException) -> list[traceback.FrameSummary]:
    """The error's frames in files of this project or the user, the innermost last."""
    return [place for place in traceback.extract_tb(error.__traceback__)
            if not Path(place.filename).is_relative_to(LIBRARY)
            and "-packages" not in place.filename]

LIBRARY = Path(os.__file__).parent  # Python's standard library
ROOT = Path(__file__).resolve().parents[1]
OURS = {*(f"{name}.py" for name in ("ddpm", "unet", "train", "sample", "evaluate")),
        "support", "extras", "judge", "page", "tools"}
PACKAGES = {"PIL": "pillow", "diffusers": "diffusers", "safetensors": "safetensors"}

def is_expected(error: BaseException) -> bool:
    """Whether this project itself raised it as a ValueError, not the user's code or a library."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(last.filename).resolve()
    return (isinstance(error, ValueError) and (last.line or "").startswith("raise")
            and path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS)

def command(main: Callable) -> Callable:
    """Wraps main(argv) → exit status, so that every failure prints one line on stderr.

    The status is 2 for a mistake in the arguments, 128 + its number for a signal, and 1 for
    anything else. An OSError and this project's own ValueErrors print their text; any other
    exception is named with its place. DDPM_TRACEBACK=1 in the environment shows the traceback.
    """
    script = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run(argv=None) -> int:
        stop.number, stop.later = 0, False
        sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
        for stream in (sys.stdout, sys.stderr):  # print ? for ≤ if it is not UTF-8
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        handlers = {n: signal.signal(n, stop) for n in signals()}
        try:
            status = main(argv) or 0
            sys.stdout.flush()
            return status
        except BrokenPipeError:  # `| head` has read enough; Python would flush once more at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
            return 0
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
                text = "out of memory: use fewer images per batch or a smaller network"
            elif isinstance(error, getattr(dist, "DistError", ())) or (
                    isinstance(error, RuntimeError) and "gloo" in text):
                text = "another process has failed; its own message says why"
            elif not (isinstance(error, OSError) or is_expected(error)):
                last = own_places(error)[-1]
                place = f"{Path(last.filename).name}, line {last.lineno}"
                text = (f"unexpected {type(error).__name__} in {place}: {text} "
                        "(DDPM_TRACEBACK=1 shows the traceback)")
            say(f"{script}: {text}")
            return 2 if isinstance(error, UsageError) else 1
        finally:
            for n, handler in handlers.items():
                signal.signal(n, handler)
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()
    return run

def signals() -> list[int]:
    """SIGINT, SIGTERM and SIGHUP, except those that are ignored (as under nohup); none outside the
    main thread, where Python accepts no handlers."""
    if threading.current_thread() is not threading.main_thread():
        return []
    numbers = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
    return [n for n in numbers if n and signal.getsignal(n) != signal.SIG_IGN]

class Stop:
    """The first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt; a second ends the process.

    While `later` is true, the first only sets `number`, which the training loop polls.
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
    """text without control characters, which could move a terminal's cursor, or worse."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)

def say(text: str, start: str = "", end: str = "\n") -> None:
    """Prints on stderr. Ignores a closed stderr."""
    with contextlib.suppress(OSError, ValueError):
        print(start + plain(text), end=end, file=sys.stderr, flush=True)

def one_line(error: BaseException) -> str:
    """An error's text on one line, printable and short; if it has none, the name of its class."""
    return plain(" ".join(str(error).split()) or type(error).__name__)[:280]

class Progress:
    """A line on stderr: work done, rate and time left.

    It is redrawn twice a second on a terminal, and printed every 10 seconds elsewhere.
    """

    def __init__(self, total: float, unit: str, done: float = 0, quiet: bool = False):
        self.total, self.unit, self.first, self.quiet = total, unit, done, quiet
        self.terminal = sys.stderr.isatty()
        self.started = self.shown = time.monotonic()

    def due(self) -> bool:
        """Whether the line should be redrawn."""
        return not self.quiet and time.monotonic() - self.shown >= (0.5 if self.terminal else 10)

    def update(self, done: float, note: str = "") -> None:
        """Draws the line if it is due, or the last one, which stays on the screen."""
        if self.quiet or not (done >= self.total or self.due()):
            return
        self.shown = time.monotonic()
        line = f"{done:.0f}/{self.total:.0f} {self.unit} {note}"
        if done > self.first:  # otherwise the rate is unknown
            rate = (done - self.first) / max(self.shown - self.started, 1e-9)
            speed = f"{rate:.1f} {self.unit}/s" if rate >= 0.1 else f"{1 / rate:.0f} s each"
            line += f" {speed}, {timedelta(seconds=round((self.total - done) / rate))} left"
        say(" ".join(line.split()), start="\r\x1b[K" if self.terminal else "",
            end="" if self.terminal and done < self.total else "\n")

@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turns any error in the block into the ValueError "PATH cannot be read as WHAT: …".

    So no caller repeats the checks of a parser. The ImportError of a missing package passes. Only a
    regular file is read, because a pipe may never end.
    """
    try:
        if not Path(path).is_file():
            raise ValueError("not a regular file" if Path(path).exists() else "no such file")
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as {what}: {one_line(error)}") from error

@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that becomes `path` when the block succeeds.

    Until then it has a random name; on an error it is deleted. It is flushed to the disk before it
    is renamed, so that a power cut cannot leave a file with holes. A path that cannot be written
    fails before the block, which may be hours of work.
    """
    place = Path(os.path.realpath(path))  # a link stays one, to a file on another disk, say
    part = place.with_name(f".{secrets.token_hex(8)}.part")
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise OSError(f"cannot write {path}: it is {kind}")
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as file:  # x: it must not exist, not even as a link
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, place)
        if os.name == "posix":  # flush the folder's entry, too
            folder = os.open(place.parent, os.O_RDONLY)
            with lacking(path.parent, "flushing folders"):
                os.fsync(folder)
            os.close(folder)
    except BrokenPipeError:  # of what the block prints
        raise
    except OSError as error:  # of this file, not of the work in the block
        if error.errno is None or error.filename not in (None, str(part), str(place.parent)):
            raise
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # so that the first error is reported
            part.unlink(missing_ok=True)

@contextlib.contextmanager
def lacking(folder: Path, what: str) -> Iterator[None]:
    """Turns an error into one warning if the folder's file system does not support `what`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
            raise
        if what not in WARNED:
            WARNED.add(what)
            say(f"warning: the file system of {folder} does not support {what} "
                f"({error.strerror})")

WARNED: set[str] = set()

@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the folder during the block; ValueError if another process holds it. Not on Windows.

    If the folder is empty at the end, it is removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        kind = "a link to nothing" if os.path.islink(file) else "a file, not a folder"
        raise ValueError(f"--out {folder}: {file} is {kind}") from error
    with open(folder / ".lock", "a") as file:
        with contextlib.suppress(ImportError):
            import fcntl
            try:
                with lacking(folder, "locks: let only one process use it"):
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
