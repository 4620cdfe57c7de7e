"""Whatever comes from outside: one line, status 1 or 2, soon, and nothing is left behind.

The strategies come from the tables of the code: for every entry a value of another type, out of its
range, missing, huge or nested.
"""
import contextlib
import inspect
import io
import math
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import sample
import train
from extras import compress, weights
from support import checkpoint as checkpoints
from support import data
from support import command
from support.command import FLAGS

TINY = ("--dataset images.pt --channels 32 --multipliers 1 --blocks 1 --attention 8 --timesteps 20 "
        "--batch-size 4 --samples 0 --device cpu --precision fp32 --steps 1").split()
HUGE = [10 ** 400, -10 ** 400, 2 ** 63, 1e308]
JUNK = st.sampled_from([None, True, False, "", "x", "\x1b[31m\n\r\0", "9" * 400, [], {}, [[1]], -1, 0,
                        0.5, math.nan, math.inf, -math.inf, {"a": [1]}, ["a"], [None], *HUGE])
many = settings(max_examples=120)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with small images and a trained network."""
    folder, before = tmp_path_factory.mktemp("hostile"), os.getcwd()
    os.chdir(folder)
    torch.save(data.shapes(16, 8), "images.pt")
    Path("grey.png").write_bytes(data.png(data.shapes(1, 8)[0, :1]))
    assert train.main([*TINY, "--out", "run"]) == 0
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def nothing_stays(place):
    """What a command left behind fails its own test, and no other."""
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


# ------------------------------------------------------------------------------------------- flags

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


@many
@given(st.sampled_from(sorted(KINDS)).flatmap(lambda flag: st.tuples(st.just(flag), wrong_texts(KINDS[flag]))))
def test_train_flags(place, case):
    """A flag of the wrong type or out of range is refused by its name."""
    flag, text = case
    assert flag in refused(train.main, [*TINY, "--out", "new", f"{flag}={text}"])


@pytest.mark.parametrize("flag", ["--dataset", "--schedule", "--init"])
@pytest.mark.parametrize("text", ["", " ", "\0", "a\0b", "x" * 5000, "\x1b[31m\n", "../gone", "/dev/zero", "x.pt"])
def test_train_words(place, flag, text):
    """A name of what is not there, or cannot be."""
    refused(train.main, [*TINY, "--out", "new", f"{flag}={text}"])


OTHER_FLAGS = [(sample, flag) for flag in (
    "--n", "--steps", "--seed", "--batch-size", "--time", "--variance", "--sampler", "--eta", "--device",
    "--precision", "--checkpoint", "--dataset", "--data-dir")] + [(evaluate, flag) for flag in (
        "--n", "--terms", "--seed", "--batch-size", "--split", "--device", "--checkpoint", "--dataset")] + [
            (compress, flag) for flag in ("--n", "--b", "--bytes", "--checkpoint")]


@settings(max_examples=60)
@given(st.sampled_from(OTHER_FLAGS), st.sampled_from([
    "", " ", "\0", "x", "-1", "nan", "1e9", "9" * 400, "9" * 5000, "1.5", "٣x", "\x1b[31m", "hpu",
    "cuda:99", "a\nb", "None", "--n"]))
def test_other_flags(place, case, text):
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


# -------------------------------------------------------------------------- what a checkpoint holds

@pytest.mark.parametrize("change", [
    {"settings": None}, {"settings": [1]}, {"settings": {}}, {"format": 2}, {"format": None}, {"ema": {}}, {"ema": None},
    {"ema": {"a": torch.ones(1)}}, {"settings": {"channels": 64}}, {"settings": {"channels": "x"}},
    {"settings": {"in_channels": None}}, {"settings": {"multipliers": []}}, {"settings": {"blocks": 0.5}}])
def test_a_checkpoint_with_something_else_inside(place, change):
    """No settings, those of another network, weights that do not fit: who wants to sample from it is
    told which file it is."""
    good = checkpoints.load_checkpoint(Path("run/checkpoint.pt"))
    if isinstance(change.get("settings"), dict) and change["settings"]:
        change = {"settings": {**good["settings"], **change["settings"]}}
    Path("bad").mkdir(exist_ok=True)
    checkpoints.save_checkpoint(Path("bad/checkpoint.pt"), {**good, **change})
    line = refused(sample.main, "--checkpoint bad --n 1 --device cpu --out y.png".split())
    assert "bad" in line and "unforeseen" not in line, line
    Path("bad/checkpoint.pt").unlink()


# ------------------------------------------------------------------------------------------ the rest

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
    assert len(lines) == 1 and "pipe.pt" in lines[0] and "unforeseen" not in lines[0]


def test_an_error_of_the_work_is_not_one_of_writing(place, server, monkeypatch):
    """Data that cannot be had while a picture's file is open: the address is named, and not the
    picture."""
    address = f"{server.address}/mnist/"
    monkeypatch.setattr(data, "FILES", {**data.FILES, "mnist": (address, data.FILES["mnist"][1])})
    line = refused(sample.main, "--checkpoint run --interpolate --dataset mnist --device cpu --out x.png".split())
    assert address in line and "404" in line and "x.png" not in line and len(server.asked) == 1


def test_what_was_not_foreseen_is_one_line_too(place, monkeypatch):
    """An exception of any kind: its kind, its text on one line, and how to see more."""
    class Odd(Exception):
        pass
    for error in (Odd("first\nsecond"), Odd("x" * 5000), Odd("\x1b[2J\x07"), Odd(), KeyError("a"),
                  AssertionError(), ZeroDivisionError("by 0"), RecursionError("deep")):
        @command.command
        def main(argv, error=error):
            raise error
        monkeypatch.delenv("DDPM_TRACEBACK", raising=False)
        line = refused(main, [])
        assert f"unforeseen {type(error).__name__}" in line and "DDPM_TRACEBACK=1" in line
        assert "\n" not in line
        monkeypatch.setenv("DDPM_TRACEBACK", "1")
        with pytest.raises(type(error)) as seen:
            main([])
        assert seen.value is error


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
