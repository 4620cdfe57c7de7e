"""What all commands share: flags, statuses, signals, progress, files read and written, folders with one user; and odd
inputs from outside, which are one line, status 1 or 2, soon, and nothing is left behind.

The flags and their limits come from the tables of the code.
"""
import argparse
import contextlib
import importlib
import inspect
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import ddpm
import evaluate
import sample
import train
from extras import compress, weights
from helpers import CPU, HERE, SMALL, TINY, hooked, said, trains
from support import checkpoint, command, data
from support.command import FLAGS, UsageError

ONE_STEP = [*TINY, *map(str, SMALL), "--steps", "1"]


# -------------------------------------------------------------------------------------------- flags

def test_a_mistyped_flag_is_named():
    parser = command.Parser("text", "--steps", "--seed", "--device")
    for words in ("--stesp 3", "--devise=a-very-long-value", "--ste 3", "steps"):
        with pytest.raises(UsageError, match=f"{words.split()[0]}.*--help"):
            parser.parse_args(words.split())


def test_a_flag_without_effect_is_refused():
    """The line names the modes that use it, or says that no entry of READS does."""
    parser, reads = command.Parser("text", "--steps", "--seed"), {"samples": "", "figures": "steps"}
    for words, end in (("--steps 3", "samples, only on figures"), ("--seed 3", "samples: it is in no entry of READS")):
        with pytest.raises(UsageError, match=f"^{words[:-2]} has no effect on {end}$"):
            parser.parse_mode(words.split(), lambda args: "samples", reads)
    assert parser.parse_mode(["--steps", "3"], lambda args: "figures", reads).steps == 3


def test_help_shows_the_text_of_the_script_line_by_line():
    text = "One.\n\n    two   three\n"
    parser = command.Parser(text, prog="x.py")
    assert text in parser.format_help() and "usage: x.py " in parser.format_help()


def test_every_shared_flag_has_a_default_and_a_meaning():
    """None stands for "as it is best here", and the seed is 0; each is explained, on lines of text."""
    parser = command.Parser("text", *command.FLAGS)
    assert vars(parser.parse_args([])) == {
        "checkpoint": None, "no_ema": False, "data_dir": "data", "steps": None, "no_clip": False, "seed": 0,
        "batch_size": None, "device": None, "precision": None, "compile": None}
    given = parser.parse_args("--steps 1 --seed 9223372036854775807 --batch-size 1000000000".split())
    assert (given.steps, given.seed, given.batch_size) == (1, 2 ** 63 - 1, 10 ** 9)
    assert all(len(action.help) > 20 for action in parser._actions)


def refused_texts(judge, *texts) -> list[str]:
    """What is said about each of these texts, which it names. The judge may accept none."""
    said = []
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            judge(text)
        said.append(str(error.value))
        assert ascii(text)[:60] in said[-1] and len(said[-1]) < 120
    return said


def test_numbers_at_their_limits():
    """Both limits count; what is refused is named with both of them, on one line of ASCII."""
    whole, real = command.int_between(21, 57), command.float_between(21, 57)
    for judge, kind, good, bad in (
            (whole, int, ["21", "57"], ["20", "58", "30.0", "3e1", "", "x", "nan", "9" * 5000, "é\n"]),
            (real, float, ["21", "57", "21.0", "3e1"], ["20.99", "57.01", "nan", "inf", "-inf", "1e999", "", "x"])):
        for text in good:
            assert judge(text) == float(text) and type(judge(text)) is kind
        for line in refused_texts(judge, *bad):
            assert "21" in line and "57" in line and line.isascii() and line.isprintable()
    assert refused_texts(whole, "99") != refused_texts(real, "99")
    for judge, low, high in ((command.positive_int, 1, 10 ** 9), (command.seed, 0, 2 ** 63 - 1)):
        assert judge(str(low)) == low and judge(str(high)) == high
        refused_texts(judge, str(low - 1), str(high + 1))


# ------------------------------------------------------------------------ exit statuses and signals

def ends(with_error) -> int:
    """The status of a command that ends so."""
    @command.command
    def main(argv):
        if isinstance(with_error, BaseException):
            raise with_error
        return with_error
    return main([])


class Odd(Exception):
    """An error that nobody expects."""


MORE = ["DDPM_TRACEBACK=1"]


@pytest.mark.parametrize("error, status, said", [
    (None, 0, []), (3, 3, []), (SystemExit(4), 4, []), (SystemExit(None), 0, []),
    (UsageError("flag 5"), 2, ["flag 5"]), (ValueError("value 5\nmore"), 1, [*MORE, "unexpected ValueError", "value 5 more"]),
    (OSError("file 5"), 1, ["file 5"]), (KeyError("key 5"), 1, [*MORE, "unexpected KeyError", "key 5"]),
    (ModuleNotFoundError("No module named 'PIL'", name="PIL"), 1, ["pip install pillow"]),
    (ModuleNotFoundError("No module named 'diffusers'", name="diffusers"), 1, ["pip install diffusers"]),
    (ImportError("cannot import name 'Nett' from 'mynet'", name="mynet"), 1, ["ImportError", "Nett"]),
    (ModuleNotFoundError("No module named 'mynett'", name="mynett"), 1, ["'mynett'", "test_command.py, line"]),
    (RuntimeError("CUDA out of memory. 5"), 1, ["fewer images"]),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, ["fewer images"]),
    (KeyboardInterrupt(), 128 + signal.SIGINT, []),
    *((Odd(text), 1, [*MORE, "unexpected Odd"]) for text in ("first\nsecond", "x" * 5000, "\x1b[2J\x07", "")),
    *((error, 1, [*MORE, f"unexpected {type(error).__name__}"]) for error in (
        AssertionError(), ZeroDivisionError("by 0"), RecursionError("deep")))])
def test_the_status_tells_how_a_command_ended(error, status, said, capsys, monkeypatch):
    """One short line that begins with the name of the script; of an unexpected error its kind, its text, and
    how to see more. DDPM_TRACEBACK lets errors through."""
    monkeypatch.delenv("DDPM_TRACEBACK", raising=False)
    assert ends(error) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == isinstance(error, (Exception, KeyboardInterrupt))
    assert all(line.startswith("test_command.py: ") for line in lines)
    assert all(text in lines[0] for text in said) and all(c.isprintable() for line in lines for c in line)
    assert all(len(line) <= 400 for line in lines)
    monkeypatch.setenv("DDPM_TRACEBACK", "1")
    if isinstance(error, Exception):
        with pytest.raises(type(error)) as seen:
            ends(error)
        assert seen.value is error
    else:
        assert ends(error) == status


@pytest.mark.parametrize("flags, status, said", [("--out ''", 2, "blank"), ("--out images.pt", 1, "a file, not a folder"), ("--out images.pt/x", 1, "images.pt is a file, not a folder"),
                                                 ("--out link/run", 1, "link is a link to nothing")])
def test_a_folder_that_cannot_be_one_is_said(flags, status, said, in_a_folder_of_its_own, capsys):
    """Kills: a run in the current folder because a variable of the shell was not set."""
    os.symlink("nowhere", "link")
    before = sorted(os.listdir())
    assert train.main([*ONE_STEP, *shlex.split(flags)]) == status
    assert said in (line := capsys.readouterr().err) and "--out" in line and sorted(os.listdir()) == before


def test_whoever_reads_no_more_ends_the_output_without_a_word(tmp_path):
    """As `| head` does: no second error at the end of the program, and the file that was written is there."""
    (tmp_path / "mine.py").write_text("""
from pathlib import Path
from support.command import command, written
@command
def main(argv=None):
    with written(Path("file")) as file:
        file.write(b"1")
    print("x" * 100_000)
raise SystemExit(main())
""")
    reading_end, end = os.pipe()
    os.close(reading_end)
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, stdout=end, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": str(HERE)})
    os.close(end)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "file").read_bytes() == b"1"


NETWORK = """
import random
from torch import nn

class Net(nn.Module):
    def forward(self, x, t):
        {line}
"""


@pytest.mark.parametrize("line, place, said", [
    ('raise ValueError("oops")', "net.py, line 7", "ValueError in {}: oops"),
    ("return random.sample([], 1)", "net.py, line 7", "ValueError in {}: Sample larger"),
    ("return random.choice([])", "net.py, line 7", "IndexError in {}: "),
    ("return self.nothing", "net.py, line 7", "AttributeError in {}: 'Net' object has no attribute 'nothing'"),
    ("return x @ x[:, :, 1:]", "net.py, line 7", "RuntimeError in {}: "),
    ("x * 2", "machine.py, line", "TypeError in {}"), ("return x, t", "machine.py, line", "the network returned tuple"),
    ("return x[..., 1:]", "", "(1, 3, 8, 8) torch.float32 and (1, 3, 8, 7) torch.float32")])
def test_an_error_of_ones_own_network_is_told_with_its_place(line, place, said, in_a_folder_of_its_own, capsys, monkeypatch):
    """Also where Python's own library raises it, or it is a ValueError; and what no tensor of this shape is."""
    monkeypatch.delenv("DDPM_TRACEBACK", raising=False)
    Path("net.py").write_text(NETWORK.format(line=line))
    monkeypatch.syspath_prepend(".")
    monkeypatch.delitem(sys.modules, "net", raising=False)
    net = CPU.network(importlib.import_module("net").Net())

    @command.command
    def main(argv):
        ddpm.predict_x0(ddpm.Model(ddpm.make_schedule(), net), torch.zeros(1, 3, 8, 8), torch.tensor([1]))
    assert main([]) == 1
    assert said.format(place) in (err := capsys.readouterr().err) and place in err and err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_command_or_waits_until_it_is_asked_for(number, capsys, monkeypatch):
    """A second signal of either kind ends the process; afterwards the handlers are what they were.
    Only the first process of torchrun says that it stops."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    for later, rank in ((False, None), (True, None), (True, "0"), (True, "1")):
        monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)

        @command.command
        def main(argv):
            assert command.stop.number == 0 and not command.stop.later
            command.stop.later = later
            try:
                signal.raise_signal(number)
            finally:
                for n in (signal.SIGINT, signal.SIGTERM):
                    assert signal.getsignal(n) == signal.SIG_DFL
            return command.stop.number
        assert main([]) == (number if later else 128 + number)
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
        assert bool(capsys.readouterr().err) == (rank != "1")
    command.stop.number, command.stop.later = 0, False


def test_what_is_printed_moves_no_cursor(capsys):
    """Texts from a file, as a checkpoint's: control characters are question marks, line breaks of
    our own stay."""
    command.say("a\x1b[31mb\x07\rc\nd é", start="\r")
    assert capsys.readouterr().err == "\ra?[31mb??c\nd é\n"
    assert command.plain("x\u202ey\0") == "x?y?"


# ----------------------------------------------------------------------------------------- progress

@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [1000.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 1000.0 + seconds)


def test_progress_prints_a_line_every_ten_seconds(clock, capsys):
    """What is done, the rate since it began and the time left, or the seconds that one takes."""
    progress = command.Progress(100, "images", 40)
    for seconds, done, numbers in (
            (9.99, 50, []), (10, 60, ["60/100", "2.0", "0:00:20"]), (19.9, 61, []),
            (40, 44, ["44/100", "0.1", "0:09:20"]), (50, 43, ["43/100", "17", "0:15:50"]),
            (60, 40.5, ["40/100", "120", "1:59:00"]), (61, 100, ["100/100", "1.0", "0:00:00"])):
        clock(seconds)
        assert progress.due() == (seconds in (10, 40, 50, 60))
        progress.update(done, "note")
        err = capsys.readouterr().err
        assert re.findall(r"[\d:/.]*\d", err) == numbers
        assert not numbers or (err.endswith("\n") and err.count("images") >= 1 and "note" in err)
    clock(80)
    progress.update(40)
    assert "40/100" in (err := capsys.readouterr().err) and ":" not in err  # nobody knows yet
    endless = command.Progress(10 ** 9, "images")
    clock(10 ** 6)
    endless.update(0)
    assert re.findall(r"\d+", capsys.readouterr().err) == ["0", "1000000000"]  # nor any rate


def test_progress_is_drawn_anew_on_a_terminal(clock):
    """Twice a second in the same line; the last one stays. Nothing is drawn if it is quiet."""
    stderr = io.StringIO()
    stderr.isatty = lambda: True
    with contextlib.redirect_stderr(stderr):
        quiet, progress = command.Progress(4, "x", quiet=True), command.Progress(4, "x")
        for seconds, done, text in ((0.49, 1, None), (0.5, 1, "1/4 x 2.0 x/s, "), (0.9, 2, None),
                                    (1, 4, "4/4 x 4.0 x/s, ")):
            clock(seconds)
            assert progress.due() == (text is not None) and not quiet.due()
            progress.update(done)
            quiet.update(done)
            shown = stderr.getvalue()
            stderr.seek(0), stderr.truncate()
            assert shown.startswith("\r\x1b[K") and text in shown if text else not shown
            assert shown.endswith("\n") == (done == 4)
        instant = command.Progress(1, "x")
        instant.update(1)  # no time has passed
        assert stderr.getvalue()


# ------------------------------------------------------------------------------ reading and writing

def test_whatever_goes_wrong_in_reading_is_one_line_with_the_path(tmp_path):
    """The path, what it should be and the reason; a missing package and a signal stay what they
    are, and the block runs once."""
    path = tmp_path / "some.file"
    path.write_text("")
    for error in (ValueError("a"), KeyError("b"), OSError(5, "c"), RecursionError("d"), struct_error(), EOFError(),
                  RuntimeError("e\nf"), MemoryError(), AssertionError(), ZeroDivisionError("g")):
        with pytest.raises(ValueError) as seen, command.reading(path, "a thing"):
            raise error
        text = str(seen.value)
        assert str(path) in text and "a thing" in text and "\n" not in text
        assert text.endswith(" ".join(str(error).split()) or type(error).__name__)
        assert seen.value.__cause__ is error
    for passes in (ModuleNotFoundError("x", name="PIL"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(passes)) as seen, command.reading(path, "a thing"):
            raise passes
        assert seen.value is passes
    with command.reading(path, "a thing"):
        done = True
    assert done


def struct_error() -> Exception:
    """An error of a module in C."""
    import struct
    with pytest.raises(struct.error) as seen:
        struct.unpack(">I", b"")
    return seen.value


def test_what_is_no_file_is_not_read(tmp_path):
    """Neither what is not there nor a folder, nor a pipe, which may never end: the block is not
    begun."""
    places = [tmp_path / "none", tmp_path, tmp_path / "none" / "x", tmp_path / "link"]
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        places.append(tmp_path / "pipe")
    for path in places:
        with pytest.raises(ValueError, match=re.escape(str(path))), command.reading(path, "a thing"):
            pytest.fail("it was read")


def test_a_file_has_its_name_when_it_is_whole(tmp_path):
    """Until the block ends the old content is there, and another file beside it whose name is
    random; afterwards the new content alone. Folders on the way are made."""
    path, names = tmp_path / "new" / "folder" / "file", set()
    for old, new in ((None, b"first"), (b"first", b"second")):
        with command.written(path) as file:
            file.write(new[:3])
            file.flush()
            part, = set(path.parent.iterdir()) - {path}
            assert re.fullmatch(r"\.[0-9a-f]{16}\.part", part.name) and part.read_bytes() == new[:3]
            assert (path.read_bytes() if path.exists() else None) == old
            file.write(new[3:])
            names.add(part.name)
        assert path.read_bytes() == new and list(path.parent.iterdir()) == [path]
    assert len(names) == 2
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [
    ValueError("a"), OSError(28, "No space left on device"), KeyboardInterrupt(), UsageError("b"), KeyError("c")])
def test_after_an_error_nothing_new_is_there(tmp_path, error):
    """What was there is still there; the error is the block's, and for a full disk it has the path."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as seen, command.written(path) as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    if isinstance(error, OSError):
        assert str(path) in str(seen.value) and "No space left on device" in str(seen.value)
    else:
        assert seen.value is error


def test_what_cannot_be_written_is_an_error_before_the_block(tmp_path):
    """A folder, a path through a file, a folder without the right to write: nothing is begun."""
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "closed").mkdir(mode=0o500)
    places = [tmp_path, tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"]
    if os.name == "posix" and os.getuid():  # root may write everywhere
        places.append(tmp_path / "closed" / "x")
    for path in places:
        with pytest.raises(OSError, match=re.escape(str(path))), command.written(path):
            pytest.fail("the block was begun")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "closed"}


def test_nobody_can_have_the_file_written_elsewhere(tmp_path):
    """A link with the name of the new file is not followed, should somebody guess the name. (Here it is
    made at the last moment, when Python announces which file it will open.)"""
    (tmp_path / "victim").write_bytes(b"mine")
    guessed = []

    def attack(event, given):
        if event == "open" and str(given[0]).endswith(".part") and not guessed:
            guessed.append(Path(given[0]))
            guessed[0].symlink_to(tmp_path / "victim")
    sys.addaudithook(attack)  # for ever; but it acts once
    with pytest.raises(OSError), command.written(tmp_path / "file") as file:
        file.write(b"new")
    assert len(guessed) == 1 and guessed[0].parent == tmp_path
    assert (tmp_path / "victim").read_bytes() == b"mine" and not (tmp_path / "file").exists()


def test_a_link_stays_a_link(tmp_path):
    """To a file on a larger disk, say, which gets the content, whether it is there already or not.

    Kills: a link that is replaced by a file."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "x.pt").symlink_to("disk/y.pt")
    for content in (b"first", b"second"):
        with command.written(tmp_path / "x.pt") as file:
            file.write(content)
        assert (tmp_path / "x.pt").is_symlink() and (tmp_path / "disk" / "y.pt").read_bytes() == content
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "x.pt", "y.pt"]
    (tmp_path / "x.pt").unlink()
    (tmp_path / "x.pt").symlink_to("none/y/x.pt")
    (tmp_path / "none").write_bytes(b"")  # by the name that was given
    with pytest.raises(OSError, match=re.escape(f"cannot write {tmp_path / 'x.pt'}: ")), command.written(tmp_path / "x.pt"):
        pytest.fail("the block was begun")


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    """Each has a file of its own, and the last to end is the one that stays."""
    with command.written(tmp_path / "file") as first:
        with command.written(tmp_path / "file") as second:
            first.write(b"11"), second.write(b"2")
        assert (tmp_path / "file").read_bytes() == b"2"
    assert (tmp_path / "file").read_bytes() == b"11" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_has_one_user_at_a_time(tmp_path):
    """Until the block ends, also by an error; then others may follow."""
    pytest.importorskip("fcntl", reason="Windows has no such lock")
    folder = tmp_path / "new" / "run"
    for error in (None, ValueError("inner"), KeyboardInterrupt()):
        with contextlib.suppress(type(error)) if error else contextlib.nullcontext(), command.locked(folder):
            with pytest.raises(ValueError, match=re.escape(str(folder))), command.locked(folder):
                pytest.fail("locked twice")
            (folder / "log").write_text("")
            if error:
                raise error
    assert (folder / "log").exists()
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()
    with pytest.raises((OSError, ValueError)), command.locked(folder):
        pytest.fail("a folder was locked")


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_a_place_that_cannot_be_written_is_an_error_before_the_work(capsys):
    """The network is not called once: neither for samples nor for figures, nor for files.

    Kills: hours of work that end with "no such folder"."""
    trains(*SMALL, "--steps", 1)
    Path("file").write_text("")
    Path("folder.png").mkdir()

    calls = []
    for main, flags in ((sample.main, "--n 2 --out file/x.png"), (sample.main, "--n 2 --out file/x.pt"),
                        (sample.main, "--n 2 --out file/folder"), (sample.main, "--n 2 --out folder.png"),
                        (sample.main, "--progressive --out file/x.png"), (sample.main, "--shared --out folder.png"),
                        (compress.main, "encode images.png file/x.ddpm")):
        with hooked(nn.Module, lambda *_: calls.append(1)):
            assert main(flags.split()) == 1 and not calls, flags
        assert "file" in (line := said(capsys)) or "folder.png" in line
        assert "unexpected" not in line


# --------------------------------------------------------------------------------------- odd inputs

many = settings(max_examples=50)


@pytest.fixture(scope="module")
def trained_place(tmp_path_factory):
    """A folder with small images and a trained network."""
    folder, patch = tmp_path_factory.mktemp("odd"), pytest.MonkeyPatch
    with patch.context() as there:
        there.chdir(folder)
        torch.save(data.shapes(16, 8), "images.pt")
        Path("grey.png").write_bytes(data.png(data.shapes(1, 8)[0, :1]))
        assert train.main([*ONE_STEP, "--out", "run"]) == 0
    return folder


@pytest.fixture
def place(trained_place, monkeypatch):
    """The test is in that folder. What a command left behind fails its own test, and no other."""
    monkeypatch.chdir(trained_place)
    yield
    for name in ("new", "data", "bad", "pictures"):
        shutil.rmtree(name, ignore_errors=True)


def files() -> dict[str, float]:
    """Every file and its size; a run's folder may keep its lock, and there may be empty folders for
    downloads."""
    return {str(path): path.stat().st_size for path in Path().rglob("*")
            if (path.name != ".lock" or len(list(path.parent.iterdir())) == 1)
            and not (path.is_dir() and path.parts[0] == "data")}


def refused(main, argv, may_succeed: bool = False) -> str:
    """Runs a command that has to fail, and checks the rule; returns its line."""
    before, said = files(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main([str(word) for word in argv])
    err = said.getvalue()
    if may_succeed and status == 0:
        return ""
    line = err.rstrip("\n").split("\n")[-1]
    assert status in (1, 2), (argv, status)
    assert line.split(":")[0].endswith(".py") and len(line) <= 400, line
    assert all(c.isprintable() for c in line) and "Traceback" not in err, err
    assert files() == before, argv
    return line


def wrong_texts(kind) -> st.SearchStrategy:
    """Texts that this kind of setting must not be."""
    if isinstance(kind, list):
        kind, = kind
    if isinstance(kind, tuple):
        return st.text(max_size=9).filter(lambda text: text not in kind)
    limits = inspect.getclosurevars(kind).nonlocals
    low, high, number = limits["low"], limits["high"], limits["kind"]
    beyond = [low - 1, high * 2 + 1, -high - 1, 10 ** 400]
    words = ["", "x", "nan", "inf", "-inf", "1e999", "0x10", "1_", "None", "9" * 5000, "1 2", "٣x"]
    if number is int:
        words += ["1.5", "1e3", "True"]
    return st.sampled_from([str(n) if abs(n) < 10 ** 300 else "1" + "0" * 400 for n in beyond] + words)


KINDS = {"--" + name.replace("_", "-"): kind for name, (_, kind, _) in train.SETTINGS.items()
         if kind not in (command.nonblank, bool)}


@pytest.mark.usefixtures("place")
@many
@given(st.sampled_from(sorted(KINDS)).flatmap(lambda flag: st.tuples(st.just(flag), wrong_texts(KINDS[flag]))))
def test_train_flags(case):
    """A flag of the wrong type or out of range is refused by its name."""
    flag, text = case
    assert flag in refused(train.main, [*ONE_STEP, "--out", "new", f"{flag}={text}"])


@pytest.mark.parametrize("flag", ["--dataset", "--schedule", "--init"])
@pytest.mark.parametrize("text", ["", " ", "\0", "a\0b", "x" * 5000, "\x1b[31m\n", "../gone", "/dev/zero", "x.pt"])
def test_train_words(place, flag, text):
    """A name of what is not there, or cannot be."""
    refused(train.main, [*ONE_STEP, "--out", "new", f"{flag}={text}"])


OTHER_FLAGS = [(sample, flag) for flag in (
    "--n", "--steps", "--seed", "--batch-size", "--time", "--variance", "--sampler", "--eta", "--device",
    "--precision", "--checkpoint", "--dataset", "--data-dir")] + [(evaluate, flag) for flag in (
        "--n", "--terms", "--seed", "--batch-size", "--split", "--device", "--checkpoint", "--dataset")] + [
            (compress, flag) for flag in ("--n", "--b", "--bytes", "--checkpoint")]


@pytest.mark.usefixtures("place")
@settings(max_examples=60)
@given(st.sampled_from(OTHER_FLAGS), st.sampled_from([
    "", " ", "\0", "x", "-1", "nan", "1e9", "9" * 400, "9" * 5000, "1.5", "٣x", "\x1b[31m", "hpu",
    "cuda:99", "a\nb", "None", "--n"]))
def test_other_flags(case, text):
    """The flags of the other scripts, with a network that is there."""
    script, flag = case
    more = ["--interpolate"] if flag in ("--time", "--dataset") and script is sample else []
    more += ["encode", "grey.png", "x.png"] if script is compress else ["--out", "x.png", "--device", "cpu"]
    line = refused(script.main, ["--checkpoint", "run", *more, f"{flag}={text}"], may_succeed=flag == "--data-dir")
    assert line or Path("x.png").unlink() is None


def test_every_flag_of_every_command_is_refused_without_its_value(place):
    """A flag at the end of the line, the shared ones in all commands that have them."""
    for script, more in ((train, []), (sample, []), (evaluate, []), (compress, ["decode", "a", "b"])):
        known = [flag for flag, options in FLAGS.items() if "action" not in options]
        for flag in known:
            line = refused(script.main, [*more, flag])
            assert flag in line


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("main, flags", [
    (sample.main, "--checkpoint pipe.pt --n 1 --out t.png"), (train.main, "--dataset pipe.pt --device cpu --out new"),
    (evaluate.main, "--fid --samples pipe.pt --dataset images.pt --device cpu"),
    (train.main, "--dataset images.pt --init pipe.pt --device cpu --out new"),
    (compress.main, "decode pipe.pt t.png --checkpoint run"), (compress.main, "encode pipe.pt t.ddpm --checkpoint run")])
def test_a_pipe_is_not_waited_for(place, main, flags):
    """A pipe to which nobody writes has the name of a file: it is refused at once, by name."""
    if "encode" in flags:
        pytest.importorskip("PIL", reason="Pillow is not installed")
    os.mkfifo("pipe.pt")
    lines, ended = [], threading.Event()

    def rescue():  # if it is read after all, the reader is let go, and the test fails
        if not ended.wait(60):
            with open("pipe.pt", "wb"):
                lines.append("it was read")
    thread = threading.Thread(target=rescue)
    thread.start()
    try:
        lines.append(refused(main, flags.split()))
    finally:
        ended.set()
        thread.join()
        os.unlink("pipe.pt")
    assert len(lines) == 1 and "pipe.pt" in lines[0] and "unexpected" not in lines[0]


def test_an_error_of_the_work_is_not_one_of_writing(place, server, monkeypatch):
    """Data that cannot be had while a picture's file is open: the address is named, and not the
    picture."""
    address = f"{server.address}/mnist/"
    monkeypatch.setattr(data, "FILES", {**data.FILES, "mnist": (address, data.FILES["mnist"][1])})
    line = refused(sample.main, "--checkpoint run --interpolate --dataset mnist --device cpu --out x.png".split())
    assert address in line and "404" in line and "x.png" not in line and len(server.asked) == 1


def test_a_missing_package_is_one_line_that_installs_it(place, monkeypatch):
    """Each option that needs one names it; the others work without."""
    Path("pictures").mkdir()
    Path("pictures/grey.png").write_bytes(Path("grey.png").read_bytes())
    for name, main, argv in (("PIL", compress.main, "encode grey.png x.ddpm --checkpoint run"),
                             ("PIL", train.main, "--dataset pictures --device cpu --out new"),
                             ("diffusers", weights.main, "run new")):
        with monkeypatch.context() as patch:
            for module in [key for key in sys.modules if key.split(".")[0] == name] + [name]:
                patch.setitem(sys.modules, module, None)
            line = refused(main, argv.split())
        assert f"pip install {'pillow' if name == 'PIL' else name}" in line
    with monkeypatch.context() as patch:
        for name in ("PIL", "diffusers", "matplotlib"):
            patch.setitem(sys.modules, name, None)
        assert sample.main("--checkpoint run --n 1 --steps 2 --device cpu --out x.png".split()) == 0
        assert evaluate.main("--checkpoint run --n 1 --terms 1 --device cpu".split()) == 0
    Path("x.png").unlink()


def test_a_terminal_that_is_not_utf8(place):
    """Results and help are printed whatever the encoding of the terminal is."""
    for argv in (["--help"], "--checkpoint run --n 2 --terms 2 --device cpu".split()):
        raw = io.BytesIO()
        with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding="ascii")) as terminal:
            assert evaluate.main(argv) == 0
        terminal.flush()
        assert b"bits/dim" in raw.getvalue() and b"?" in raw.getvalue()


# ------------------------------------------------------------------------------- what a system lacks

LACKS = r"""
#include <errno.h>
#include <sys/stat.h>
int flock(int fd, int how) { errno = ENOSYS; return -1; }
int fsync(int fd) {
    struct stat s;
    fstat(fd, &s);
    if (S_ISDIR(s.st_mode)) { errno = EINVAL; return -1; }
    return 0;
}
"""
SHORT = ("--dataset shapes --channels 32 --multipliers 1 2 --blocks 1 --timesteps 10 --batch-size 2 --steps 2 --samples 1 "
         "--sample-steps 2 --save-every 1 --device cpu --precision fp32 --out r").split()


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("gcc"), reason="it needs Linux and gcc")
def test_a_file_system_without_locks_or_flushing_of_folders(tmp_path):
    """As on Lustre, some NFS, CIFS and FUSE: a library between Python and the system says that it has
    neither. The run works, and each is one warning."""
    (tmp_path / "lacks.c").write_text(LACKS)
    subprocess.run(f"gcc -shared -fPIC -o {tmp_path}/lacks.so {tmp_path}/lacks.c".split(), check=True)
    done = subprocess.run([sys.executable, HERE / "train.py", *SHORT], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "LD_PRELOAD": f"{tmp_path}/lacks.so", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and (tmp_path / "r" / "checkpoint.pt").exists(), done.stderr
    assert done.stderr.count("does not support locks") == done.stderr.count("does not support flushing folders") == 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_ends_a_run_with_its_step_saved(tmp_path, ignored):
    """SIGHUP is SIGTERM, unless it was ignored when the program began, as under nohup."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN) if ignored else None
    try:
        steps = ["--steps", "60" if ignored else "1000000", "--log-every", "1", "--save-every", "1000000"]
        process = subprocess.Popen([sys.executable, HERE / "train.py", *SHORT, *steps], cwd=tmp_path, stderr=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    finally:
        if ignored:
            signal.signal(signal.SIGHUP, handler)
    log = tmp_path / "r" / "log.jsonl"
    while not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == (0 if ignored else 128 + signal.SIGHUP)
    step = checkpoint.load_checkpoint(tmp_path / "r" / "checkpoint.pt")["step"]
    assert step == 60 if ignored else step == len(log.read_text().splitlines())


def test_a_command_runs_in_a_thread(tmp_path):
    """As in a notebook or a web app, where Python takes no handlers of signals."""
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(train.main([*SHORT[:-1], str(tmp_path / "r")])))
    thread.start()
    thread.join()
    assert statuses == [0] and (tmp_path / "r" / "checkpoint.pt").exists()


@pytest.mark.skipif(os.name != "posix", reason="it needs a shell")
def test_a_closed_stderr_is_no_error(tmp_path):
    """Nor a closed stdin or stdout: the files are written."""
    words = " ".join(["OMP_NUM_THREADS=1", sys.executable, str(HERE / "train.py"), *SHORT])
    assert subprocess.run(f"{words} <&- >&- 2>&-", shell=True, cwd=tmp_path).returncode == 0
    assert (tmp_path / "r" / "samples-0000002.png").exists()


def test_nothing_replaces_what_is_not_a_regular_file(tmp_path):
    """A pipe, as a device would be, stays what it is."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("Windows has no pipes in folders")
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(OSError, match="x.png.*not a regular file"), command.written(tmp_path / "x.png"):
        pytest.fail("the block was begun")
    assert (tmp_path / "x.png").is_fifo()
