"""Whatever comes from outside: one line, status 1 or 2, soon, and nothing is left behind.

The strategies come from the tables of the code: for every entry a value of another type, out of its
range, missing, huge or nested.
"""
import contextlib
import copy
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import data
import evaluate
import sample
import train
import weights
from test_weights import CONFIG, SCHEDULER, safetensors, state

TINY = ("--dataset images.pt --channels 32 --multipliers 1 --blocks 1 --attention 8 --timesteps 20 "
        "--batch-size 4 --samples 0 --device cpu --precision fp32 --steps 1").split()
HUGE = [10 ** 400, -10 ** 400, 2 ** 63, 1e308]
JUNK = st.sampled_from([None, True, False, "", "x", "\x1b[31m\n\r\0", "9" * 400, [], {}, [[1]], -1, 0,
                        0.5, math.nan, math.inf, -math.inf, {"a": [1]}, ["a"], [None], *HUGE])
many = settings(max_examples=120)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with small images, a trained network and a diffusers folder."""
    folder, before = tmp_path_factory.mktemp("hostile"), os.getcwd()
    os.chdir(folder)
    torch.save(data.shapes(16, 8), "images.pt")
    assert train.main([*TINY, "--out", "run"]) == 0
    for name, file, content in (("unet", "config.json", CONFIG),
                                ("scheduler", "scheduler_config.json", SCHEDULER)):
        Path("hub", name).mkdir(parents=True)
        Path("hub", name, file).write_text(json.dumps(content))
    Path("hub/unet", weights.MODEL[0]).write_bytes(safetensors(state()))
    yield folder
    os.chdir(before)


def files() -> dict[str, float]:
    """Every file and its size; a run's folder may keep its lock."""
    return {str(path): path.stat().st_size for path in Path().rglob("*")
            if path.name != ".lock" or len(list(path.parent.iterdir())) == 1}


def refused(main, argv, may_succeed: bool = False) -> str:
    """Runs a command that has to fail, and checks the rule; returns its line."""
    before, started, said = files(), time.monotonic(), io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main([str(word) for word in argv])
    err = said.getvalue()
    if may_succeed and status == 0:
        return ""
    line = err.rstrip("\n").split("\n")[-1]
    assert status in (1, 2), (argv, status)
    assert line.split(":")[0].endswith(".py") and len(line) <= 320, line
    assert all(c.isprintable() for c in line) and "Traceback" not in err, err
    assert time.monotonic() - started < 10
    assert files() == before, argv
    return line


# ------------------------------------------------------------------------------------------- flags

def wrong_texts(kind) -> st.SearchStrategy:
    """Texts that this kind of setting must not be."""
    if kind is common.word:
        return st.sampled_from(["", " ", "\0", "a\0b"])
    if hasattr(kind, "values"):
        return st.text(max_size=9).filter(lambda text: text not in kind.values)
    number, low, high, above = kind.range
    beyond = [low - 1, high * 2 + 1, -high - 1, 10 ** 400] + [low] * above
    words = ["", "x", "nan", "inf", "-inf", "1e999", "0x10", "1_", "None", "9" * 5000, "1 2", "٣x"]
    if number is int:
        words += ["1.5", "1e3", "True"]
    return st.sampled_from([str(n) if abs(n) < 10 ** 300 else "1" + "0" * 400 for n in beyond] + words)


FLAGS = [name for name, kind in common.KINDS.items() if kind is not common.switch
         and name in train.SETTINGS]


@many
@given(st.sampled_from(FLAGS).flatmap(lambda n: st.tuples(st.just(n), wrong_texts(common.KINDS[n]))))
def test_train_flags(place, case):
    """A flag of the wrong type or out of range is refused by its name."""
    name, text = case
    flag = "--" + name.replace("_", "-")
    line = refused(train.main, [*TINY, "--out", "new", f"{flag}={text}"])
    assert flag in line


OTHER_FLAGS = [(sample, flag) for flag in (
    "--n", "--steps", "--seed", "--batch-size", "--time", "--variance", "--eta", "--device", "--precision",
    "--checkpoint", "--dataset", "--data-dir")] + [(evaluate, flag) for flag in (
        "--n", "--terms", "--seed", "--batch-size", "--split", "--device", "--checkpoint")]


@settings(max_examples=60)
@given(st.sampled_from(OTHER_FLAGS), st.sampled_from([
    "", " ", "\0", "x", "-1", "nan", "1e9", "9" * 400, "9" * 5000, "1.5", "٣x", "\x1b[31m", "hpu",
    "cuda:99", "a\nb", "None", "--n"]))
def test_other_flags(place, case, text):
    """The flags of the other scripts, with a network that is there."""
    script, flag = case
    line = refused(script.main, ["--checkpoint", "run", "--out", "x.png", "--device", "cpu", *(
        ["--interpolate"] if flag in ("--time", "--dataset") else []), f"{flag}={text}"],
                   may_succeed=flag == "--data-dir")
    assert line or Path("x.png").unlink() is None


# -------------------------------------------------------------------------- settings of a checkpoint

@settings(max_examples=40)
@given(st.sampled_from(sorted(common.KINDS)) | st.just("unknown"), JUNK, st.booleans())
def test_checkpoint_settings(place, name, value, missing):
    """A checkpoint whose settings are not what they can be: refused by all who read it."""
    payload = copy.copy(common.load_checkpoint(Path("run")))
    payload["settings"] = {**payload["settings"], name: value}
    if missing and name not in ("unknown", "ema_ramp", "clip_sample"):
        del payload["settings"][name]
    Path("bad").mkdir(exist_ok=True)
    common.save_checkpoint(Path("bad/checkpoint.pt"), payload)
    for main, argv in ((sample.main, "--checkpoint bad --n 1 --steps 2 --device cpu --out bad/x.png"),
                       (train.main, "--dataset images.pt --out bad --device cpu --steps 1")):
        line = refused(main, argv.split(), may_succeed=True)
        Path("bad/x.png").unlink(missing_ok=True)
        if not line:  # then the value was one that the setting can have
            assert missing or name != "unknown"
            common.judged(payload["settings"], "here")


def test_settings_that_are_none(place):
    """No dictionary of settings, weights that do not fit them, a step that is none."""
    good = common.load_checkpoint(Path("run"))
    Path("bad").mkdir(exist_ok=True)
    for change in ({"settings": None}, {"settings": [1]}, {"step": "1"}, {"format": 2},
                   {"settings": {**good["settings"], "channels": 64}}, {"ema": {}}, {"ema": None}):
        common.save_checkpoint(Path("bad/checkpoint.pt"), {**good, **change})
        line = refused(sample.main, "--checkpoint bad --n 1 --out y.png".split())
        assert "bad" in line and "unforeseen" not in line


# --------------------------------------------------------------------------- diffusers' configurations

KEYS = ([("unet/config.json", key) for key in [*weights.CONFIG, *CONFIG] if key != "_class_name"]
        + [("scheduler/scheduler_config.json", key) for key in [*weights.SCHEDULER, *SCHEDULER]
           if key != "_class_name"])


@many
@given(st.sampled_from(KEYS), JUNK)
def test_configurations(place, case, value):
    """A configuration with one entry that it cannot have here; without it diffusers' default counts."""
    file, key = case
    path = Path("hub", file)
    kept = path.read_text()
    content = json.loads(kept)
    path.write_text(json.dumps({**content, key: value}))
    try:
        line = refused(weights.main, ["--export", "new", "--checkpoint", "hub"],
                       may_succeed=True)
        if not line:  # then it is a value with which diffusers means the same or a known network
            trained = sample.load("hub")
            assert key == "clip_sample" or trained.settings["channels"] == 32
            for left in sorted(Path("new").rglob("*"), reverse=True):
                left.unlink() if left.is_file() else left.rmdir()
            Path("new").rmdir()
    finally:
        path.write_text(kept)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "\xff", '{"a": NaN', "[" * 100_000])
def test_configurations_that_are_no_json(place, text):
    """No JSON, or no object."""
    for file in ("unet/config.json", "scheduler/scheduler_config.json"):
        path = Path("hub", file)
        kept = path.read_bytes()
        path.write_bytes(text.encode("latin-1"))
        try:
            line = refused(sample.main, "--checkpoint hub --n 1 --out z.png".split())
            assert "unforeseen" not in line
        finally:
            path.write_bytes(kept)


HOSTILE = {  # in place of a plain float32 tensor of the shape (32,)
    "integers": lambda: torch.ones(32, dtype=torch.int64), "bools": lambda: torch.ones(32) > 0,
    "complex": lambda: torch.ones(32, dtype=torch.complex64), "sparse": lambda: torch.ones(32).to_sparse(),
    "expanded": lambda: torch.ones(1).expand(2 ** 40), "huge": lambda: torch.ones(32).double() * 1e300,
    "nan": lambda: torch.ones(32) * math.nan, "no dimension": lambda: torch.tensor(1.0),
    "empty": lambda: torch.zeros(0), "other shape": lambda: torch.ones(31),
    "meta": lambda: torch.ones(32, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(32), 1.0, 0, torch.qint8)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HOSTILE)
def test_tensors(place, tmp_path, kind):
    """Tensors that are not plain finite floats of the right shape are refused."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save({**state(), "conv_in.bias": HOSTILE[kind]()}, folder / weights.MODEL[1])
    line = refused(sample.main, ["--checkpoint", folder, "--n", 1, "--out", "t.png"])
    assert "unforeseen" not in line


@pytest.mark.parametrize("content", [[], "text", {"a": "b"}, {1: torch.ones(1)}, {"a": [torch.ones(1)]},
                                     torch.ones(3), None, {}])
def test_files_of_weights_that_hold_something_else(place, tmp_path, content):
    """A .bin file that holds no dictionary of tensors."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(content, tmp_path / weights.MODEL[1])
    line = refused(sample.main, ["--checkpoint", tmp_path, "--n", 1, "--out", "t.png"])
    assert "unforeseen" not in line


# -------------------------------------------------------------------------------- sizes, and the rest

@pytest.mark.parametrize("argv", [
    "--channels 4096 --multipliers 64 64 64 64", "--blocks 32 --channels 4096 --multipliers 1 8 8 8",
    "--batch-size 1000000 --channels 4096", "--dataset shapes --image-size 4096"])
def test_what_cannot_fit(place, argv):
    """Its memory is estimated before anything is allocated, and both numbers are named."""
    line = refused(train.main, [*TINY, "--out", "new", *argv.split()])
    assert "GiB" in line


@pytest.mark.parametrize("argv", ["--n 1000000000", "--n 1000000000 --progressive",
                                  "--n 100000000 --shared", "--n 1000000 --batch-size 1000000"])
def test_samples_that_cannot_fit(place, argv):
    """The same for what is drawn."""
    line = refused(sample.main, ["--checkpoint", "run", "--out", "x.png", "--device",
                                                 "cpu", *argv.split()])
    assert "GiB" in line


def test_what_was_not_foreseen_is_one_line_too(place, monkeypatch):
    """An exception of any kind: its kind, the first line of its text, and how to see more."""
    class Odd(Exception):
        pass
    for error in (Odd("first\nsecond"), Odd("x" * 5000), Odd("\x1b[2J\x07"), Odd(), KeyError("a"),
                  AssertionError(), ZeroDivisionError("by 0"), RecursionError("deep")):
        def broken(*_, **__):
            raise error
        with monkeypatch.context() as patch:
            patch.setattr(sample, "load", broken)
            line = refused(sample.main, ["--n", "1"])
        assert f"unforeseen {type(error).__name__}" in line and "DDPM_TRACEBACK=1" in line
        assert "second" not in line
        monkeypatch.setenv("DDPM_TRACEBACK", "1")
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(sample, "load", broken)
            sample.main(["--n", "1"])
        monkeypatch.delenv("DDPM_TRACEBACK")


def test_the_environment_of_torchrun(place, monkeypatch):
    """Ranks that are none."""
    for name, value in (("WORLD_SIZE", "0"), ("WORLD_SIZE", "x"), ("RANK", "-1"), ("RANK", "3")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert "torchrun" in refused(sample.main, "--checkpoint run".split())


def test_a_terminal_that_is_not_utf8(place, monkeypatch):
    """Results and help are printed whatever the encoding of the terminal is."""
    for argv in (["--help"], "--checkpoint run --n 2 --terms 2 --device cpu".split()):
        with monkeypatch.context() as patch:
            raw = io.BytesIO()
            patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
            assert evaluate.main(argv) == 0
            sys.stdout.flush()
            assert b"bits/dim" in raw.getvalue() and b"?" in raw.getvalue()
