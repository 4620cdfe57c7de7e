"""What all scripts share, at its limits: flags, statuses, the machine, noise, checkpoints."""
import argparse
import hashlib
import io
import math
import re
import signal
import statistics
import sys
import types
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import common
import ddpm
from common import KINDS, Machine, UsageError
from test_commands import SETTINGS, assert_equal

CPU, META = torch.device("cpu"), torch.device("meta")


# -------------------------------------------------------------------------------------------- flags

def test_a_mistyped_flag_is_answered_with_the_nearest_one():
    """Only a flag is compared with the flags, without its value, and the first wrong one counts."""
    parser = common.Parser("text")
    parser.add("--steps", "--seed", "--device")
    for words, near in (("--stesp 3", "--steps"), ("--devise=a-very-long-value", "--device"),
                        ("--seeed --something-else", "--seed"), ("steps", ""), ("--zzz", ""),
                        ("--ste 3", "--steps")):
        with pytest.raises(UsageError) as error:
            parser.parse_args(words.split())
        flags = [flag for flag in ("--steps", "--seed", "--device") if flag in str(error.value)]
        assert flags == [near] * bool(near)


def test_help_shows_the_text_of_the_script_line_by_line():
    text = "One.\n\n    two   three\n"
    parser = common.Parser(text, prog="x.py")
    assert text in parser.format_help() and "usage: x.py " in parser.format_help()


def refused(judge, *values) -> list[str]:
    """What is said about each of these values, which it names. The judge may accept none."""
    said = []
    for value in values:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            judge(value)
        said.append(str(error.value))
        assert common.shown(value) in said[-1]
    return said


def test_numbers_at_their_limits():
    """Both limits count, the lower one not with `above`; a text is converted, nothing else is."""
    whole, part = common.number(int, 21, 57), common.number(float, 21, 57)
    above = common.number(float, 21, 57, above=True)
    for judge, good, bad in (
            (whole, [21, 57, "21", "57"], [20, 58, "20", "58", 30.0, "30.0", None, [30], "", "x"]),
            (part, [21, 57, 21.0, "21", "56"], [20.99, 57.01, "20.99", "nan", math.inf, None, "x"]),
            (above, [57, "57", 21.01], [21, 21.0, "21", 57.01, math.nan])):
        for value in good:
            assert judge(value) == float(value)
        assert all("21" in line and "57" in line for line in refused(judge, *bad))
    assert len({refused(judge, 99)[0] for judge in (whole, part, above)}) == 3
    refused(common.number(int, 0, 9), True)
    refused(common.number(float, 0, 9), True)
    assert [type(judge("30")) for judge in (whole, part, above)] == [int, float, float]
    assert whole.range == (int, 21, 57, False) and above.range == (float, 21, 57, True)


def test_words_and_switches():
    """A word of a list, any name that is not blank, a truth value and not a number like it."""
    judge = common.one_of("left", "right")
    assert judge("left") == "left" and judge.values == ("left", "right")
    for line in refused(judge, "", "leftright", None, 1):
        assert "left" in line and "right" in line
    assert common.word(" a b ") == " a b "
    refused(common.word, "", " ", "\t\n", "a\0b", None, 3, ["a"])
    assert common.switch(True) is True and common.switch(False) is False
    refused(common.switch, 0, 1, "True", None)


def test_a_value_from_outside_takes_60_printable_characters():
    assert common.shown("é\n") == r"'\xe9\n'"
    assert common.shown("a" * 58) == repr("a" * 58)
    assert common.shown("a" * 59) == "'" + "a" * 56 + "..."
    for n in (10 ** 30 - 1, 1 - 10 ** 30):
        assert common.shown(n) == str(n)
    for n in (10 ** 30, -10 ** 30, 10 ** 5000):  # Python refuses to write the last one
        assert not re.search(r"\d", common.shown(n))


@pytest.mark.parametrize("name", KINDS)
def test_a_setting_is_judged_by_its_kind(name):
    """At the limits of its range; a list has one to eight such elements; None where it may be."""
    kind, good, bad = KINDS[name], [], [math.nan, {}, " "]
    if hasattr(kind, "range"):
        _, low, high, above = kind.range
        good, bad = [high, *[low] * (not above)], [*bad, *[low] * above, low - 1, high + 1]
        bad.append(str(high))  # the text of a flag, which a file must not have for a number
    else:
        good += {common.word: ["a"], common.switch: [True, False]}.get(kind) or kind.values
    if name in common.LISTS:
        bad = [[x] for x in bad] + [[], good[:1] * 9, (high,), high, [high] * 7 + [low - 1]]
        good = [[x] for x in good] + [good[:1] * 8]
    (good if name in common.OPTIONAL else bad).append(None)
    for value in good:
        settings = {name: value}
        assert common.judged(settings, "here") is settings
    for value in bad:
        with pytest.raises(ValueError, match=rf"here.*\b{name}\b"):
            common.judged({name: value}, "here")


def test_settings_that_are_missing_or_unknown():
    """The first one that is missing is named, in the order of the alphabet."""
    assert common.judged({"lr": 1}, "here", ["lr"]) == {"lr": 1}
    for settings, named in (({"steps": 1}, "clip"), ({"steps": 1, "clip": 1.0}, "lr"), ([], ""),
                            ({"clip": 1.0, "lr": 1, "steps": 1, "colour": 2}, "colour")):
        with pytest.raises(ValueError, match=f"here.*{named}"):
            common.judged(settings, "here", ["steps", "lr", "clip"])


# ------------------------------------------------------------------------ exit statuses and signals

def ends(with_error) -> int:
    """The status of a command that ends so."""
    @common.command
    def main(argv):
        if isinstance(with_error, BaseException):
            raise with_error
        return with_error
    return main([])


@pytest.mark.parametrize("error, status, said", [
    (None, 0, []), (3, 3, []), (SystemExit(4), 4, []), (SystemExit(None), 0, []),
    (UsageError("flag 5"), 2, ["flag 5"]), (ValueError("value 5"), 1, ["value 5"]),
    (OSError("file 5"), 1, ["file 5"]), (KeyError("key 5"), 1, ["KeyError", "key 5"]),
    (RuntimeError("CUDA out of memory. 5"), 1, ["--batch-size"]),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, ["--batch-size"]),
    (KeyboardInterrupt(), 128 + signal.SIGINT, [])])
def test_the_status_tells_how_a_command_ended(error, status, said, capsys, monkeypatch):
    """One line that begins with the name of the script. DDPM_TRACEBACK lets errors through."""
    monkeypatch.delenv("DDPM_TRACEBACK", raising=False)
    assert ends(error) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == isinstance(error, (Exception, KeyboardInterrupt))
    assert all(line.startswith("test_common.py: ") for line in lines)
    assert all(text in lines[0] for text in said)
    monkeypatch.setenv("DDPM_TRACEBACK", "1")
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            ends(error)
    else:
        assert ends(error) == status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_command_or_waits_until_it_is_asked_for(number, capsys, monkeypatch):
    """A second signal of either kind ends the process; afterwards the handlers are what they were.
    Only the first process of torchrun says that it stops."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(common.signals, "number", 0)  # and put back for the other tests
    monkeypatch.setattr(common.signals, "deferred", False)
    for deferred, rank in ((False, None), (True, None), (True, "0"), (True, "1")):
        monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)

        @common.command
        def main(argv):
            assert common.signals.number == 0 and not common.signals.deferred
            common.signals.deferred = deferred
            try:
                signal.raise_signal(number)
            finally:
                for n in (signal.SIGINT, signal.SIGTERM):
                    assert signal.getsignal(n) == signal.SIG_DFL
            return common.signals.number
        assert main([]) == (number if deferred else 128 + number)
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
        assert bool(capsys.readouterr().err) == (rank != "1")


# -------------------------------------------------------------------------------------- the machine

@pytest.fixture
def pretend(monkeypatch):
    """Lets a machine have certain devices, without any; returns what was asked of them."""
    def machine(cuda=False, mps=False, capability=(8, 0), cpu=None, **environment) -> list:
        asked = []
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        backends = torch.backends
        for owner, name, value in (
                (torch.cuda, "is_available", lambda: cuda),
                (backends.mps, "is_available", lambda: mps),
                (torch.cuda, "set_device", asked.append),
                (torch.cuda, "get_device_capability", lambda x: asked.append(x) or capability),
                (torch, "zeros", lambda n, device: asked.append(device)),
                (torch.cpu, "get_capabilities", lambda: cpu or {}),
                (common.dist, "init_process_group", lambda *a, **b: asked.append((a, b))),
                (backends, "cudnn", types.SimpleNamespace()),
                (backends.cuda, "matmul", types.SimpleNamespace())):
            monkeypatch.setattr(owner, name, value, raising=False)
        return asked
    return machine


def test_the_precision_of_a_cpu(pretend, monkeypatch):
    """bfloat16 where the CPU computes with it, else float32; otherwise what was asked for."""
    for cpu, precision, dtype in (
            ({}, "auto", torch.float32), ({"avx2": True}, "auto", torch.float32),
            ({"avx512_bf16": 1}, "auto", torch.bfloat16), ({"amx_bf16": 1}, "auto", torch.bfloat16),
            ({"amx_bf16": 1}, "fp32", torch.float32), ({}, "bf16", torch.bfloat16),
            ({}, "fp16", torch.float16)):
        asked = pretend(cpu=cpu)
        assert common.find_machine("cpu", precision) == (CPU, dtype, 0, 1) and asked == [CPU]
    pretend(cpu={"amx_bf16": True})
    assert common.find_machine() == (CPU, torch.bfloat16, 0, 1)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older versions of torch
    assert common.find_machine() == (CPU, torch.float32, 0, 1)


@pytest.mark.parametrize("capability, precision, dtype, tf32", [
    ((8, 0), "auto", torch.bfloat16, True), ((7, 5), "auto", torch.float32, True),
    ((9, 0), "tf32", torch.float32, True), ((9, 0), "fp32", torch.float32, False),
    ((7, 5), "bf16", torch.bfloat16, True), ((9, 0), "fp16", torch.float16, True)])
def test_the_precision_of_a_gpu(pretend, capability, precision, dtype, tf32):
    """bfloat16 from compute capability 8.0 on, else TF32; fp32 alone is without TF32."""
    asked = pretend(cuda=True, mps=True, capability=capability)
    gpu = torch.device("cuda")
    assert common.find_machine("auto", precision) == (gpu, dtype, 0, 1) and asked == [gpu] * 3
    assert torch.backends.cudnn.benchmark is True
    assert torch.backends.cudnn.allow_tf32 is tf32 is torch.backends.cuda.matmul.allow_tf32


def test_the_first_device_that_is_there(pretend):
    """cuda, then mps, then cpu. What a CPU can compute says nothing about mps."""
    for cuda, mps, found in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        pretend(cuda, mps, cpu={"amx_bf16": True})
        assert common.find_machine().device == torch.device(found)
    pretend(mps=True, cpu={"amx_bf16": True})
    assert common.find_machine().dtype == torch.float32


def test_processes_of_torchrun(pretend, monkeypatch):
    """Each takes the GPU of its LOCAL_RANK, unless one was named; they meet once, for a day."""
    day = {"timeout": timedelta(days=1)}
    for device, local, found, backend in (
            ("auto", {"LOCAL_RANK": "1"}, "cuda:1", "nccl"), ("cuda", {}, "cuda:3", "nccl"),
            ("cuda:0", {"LOCAL_RANK": "1"}, "cuda:0", "nccl"), ("cpu", {}, "cpu", "gloo")):
        asked = pretend(cuda=True, RANK="3", WORLD_SIZE="5", **local)
        machine = common.find_machine(device, "fp32")
        assert machine == (torch.device(found), torch.float32, 3, 5) and not machine.chief
        assert asked[-1] == ((backend,), day)
    asked = pretend(cuda=True, LOCAL_RANK="1")
    assert common.find_machine("cuda").device == torch.device("cuda") and len(asked) == 3
    monkeypatch.setattr(common.dist, "is_initialized", lambda: True)
    asked = pretend(RANK="0", WORLD_SIZE="2")
    assert common.find_machine("cpu").chief and asked == [CPU]


def test_machines_that_are_not_there(pretend):
    """Unknown devices, TF32 without an NVIDIA GPU, and ranks that torchrun does not give."""
    pretend()
    for device, precision in (("tpu", "auto"), ("cpu", "tf32"), ("", "auto")):
        with pytest.raises(UsageError):
            common.find_machine(device, precision)
    for rank, world in (("2", "2"), ("0", "0"), ("-1", "2"), ("x", "2"), ("0", "x"),
                        ("0", "1000000")):
        pretend(RANK=rank, WORLD_SIZE=world)
        with pytest.raises(UsageError):
            common.find_machine("cpu")
    pretend(RANK="0", WORLD_SIZE="999999")
    assert common.find_machine("cpu").world == 999_999


def test_shares_and_gathered_rows(monkeypatch):
    """Every piece is one process's, and the sum over processes has every row in its place."""
    rows, parts = torch.arange(14).view(7, 2), []
    monkeypatch.setattr(common.dist, "all_reduce", parts.append)
    for rank in range(3):
        machine = Machine(CPU, torch.float32, rank, 3)
        assert list(machine.share(7)) == [[0, 3, 6], [1, 4], [2, 5]][rank]
        assert machine.gather(rows[list(machine.share(7))], 7) is parts[-1]
    assert torch.equal(sum(parts), rows) and parts[0].dtype == rows.dtype
    assert Machine(CPU, torch.float32).gather(rows, 7) is rows and len(parts) == 3


def test_the_chief_goes_first(monkeypatch):
    """The others wait before the block, the chief after it, and one process alone never."""
    for rank, world, order in ((0, 1, ["block"]), (0, 2, ["block", "wait"]),
                               (1, 2, ["wait", "block"])):
        events = []
        monkeypatch.setattr(common.dist, "barrier", lambda: events.append("wait"))
        with Machine(CPU, torch.float32, rank, world).chief_first():
            events.append("block")
        assert events == order


def test_a_network_is_computed_in_the_precision_of_the_machine():
    """And its result is float32 in every precision, with the x and t that were given."""
    layer, x, t = torch.nn.Linear(2, 2), torch.ones(1, 2), torch.ones(1)

    def net(*given):
        assert given[0] is x and given[1] is t
        seen.append(layer(x).dtype)
        return layer(x)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        seen = []
        assert Machine(CPU, dtype).model(net)(x, t).dtype == torch.float32 and seen == [dtype]


def test_memory_that_is_free_is_enough_and_a_byte_more_is_not(monkeypatch, tmp_path):
    """MemAvailable of /proc/meminfo, or what CUDA has free; where nobody knows, anything may be."""
    (tmp_path / "proc").mkdir()
    free = 3 * 2 ** 20
    (tmp_path / "proc/meminfo").write_text(
        f"MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:   {free} kB\nBuffers: 5 kB\n")
    monkeypatch.setattr(common, "Path", lambda name: tmp_path / name[1:])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(device.index), 2 ** 60))
    for limit, *device in ((1024 * free,), (1024 * free, CPU), (7, torch.device("cuda:7"))):
        common.require(limit, "a thing", *device)
        with pytest.raises(ValueError, match="a thing"):
            common.require(limit + 1, "a thing", *device)
    with pytest.raises(ValueError, match=r"a thing\D+1,024\.0 GiB\D+3\.0 GiB"):
        common.require(2 ** 40, "a thing")
    common.require(math.inf, "a thing", META)
    (tmp_path / "proc/meminfo").unlink()
    common.require(math.inf, "a thing")


# ---------------------------------------------------- random numbers, the network and the schedule

def test_a_seed_is_63_bits_of_a_hash():
    digest = hashlib.sha256(b"(0, 'step', 17)").hexdigest()
    assert common.seed_of(0, "step", 17) == int(digest[:16], 16) // 2


def test_noise_by_hand(monkeypatch):
    """Φ⁻¹ of u + v modulo 1, from generators seeded by the two halves of an image's seed."""
    noise, halves = common.Noise(3, [8, "b"], (2, 2), "cpu"), []
    for i in (8, "b"):
        seed = common.seed_of(3, "image", i)
        halves.append([torch.Generator().manual_seed(half) for half in divmod(seed, 2 ** 32)])
    for _ in range(2):
        z = noise()
        assert z.dtype == torch.float32 and z.shape == (2, 2, 2)
        for got, pair in zip(z, halves):
            u, v = (torch.rand(4, generator=g, dtype=torch.float64) for g in pair)
            want = [statistics.NormalDist().inv_cdf(p) for p in ((u + v) % 1).tolist()]
            torch.testing.assert_close(got.flatten(), torch.tensor(want), rtol=1e-6, atol=1e-6)
    for uniform, p in ((0.75, 0.5), (0.5, 2 ** -60)):  # a sum of 1 is 0, whose Φ⁻¹ is not finite
        monkeypatch.setattr(torch, "rand", lambda *_, **__: uniform)
        want = torch.full((2, 2, 2), statistics.NormalDist().inv_cdf(p))
        torch.testing.assert_close(noise(), want, rtol=1e-6, atol=1e-6)


def test_noise_of_another_device_has_one_generator_for_each_image(monkeypatch):
    """Its generators take all 63 bits of a seed, so z is what they draw."""
    real, zeros, places = torch.Generator, torch.zeros, []
    monkeypatch.setattr(torch, "Generator", lambda device: real() if device == "meta" else None)
    monkeypatch.setattr(torch, "zeros", lambda *n, device: places.append(device) or zeros(*n))
    z = common.Noise(3, [8, 9], (2, 5), "meta")()
    assert places == [META]
    for row, i in zip(z, (8, 9), strict=True):
        generator = real().manual_seed(common.seed_of(3, "image", i))
        assert torch.equal(row, zeros(2, 5).normal_(generator=generator))


def test_the_network_of_settings(monkeypatch):
    """Every setting of the network reaches it; a learned variance doubles the output channels."""
    monkeypatch.setattr(common, "UNet", lambda *given: given)
    settings = {"in_channels": 3, "channels": 64, "multipliers": [1, 5], "blocks": 7,
                "attention": [8, 9], "image_size": 11, "dropout": 0.2, "variance": "fixed_small"}
    assert common.build_network(settings) == (3, 3, 64, (1, 5), 7, (8, 9), 11, 0.2)
    assert common.build_network({**settings, "variance": "learned"})[:2] == (3, 6)


def test_the_schedule_of_settings():
    settings = {"timesteps": 7, "schedule": "quadratic", "beta_start": 0.1, "beta_end": 0.3}
    want = ddpm.make_schedule(7, "quadratic", 0.1, 0.3)
    assert torch.equal(common.build_schedule(settings).alpha_bars, want.alpha_bars)


def test_the_memory_of_a_network_by_hand(monkeypatch):
    """4 bytes for each weight of each copy; for each image the outputs of all layers, or twice the
    largest one, in the machine's precision, and 20,000 bytes more."""
    settings = {**SETTINGS, "channels": 32, "multipliers": [1], "blocks": 1, "attention": [99],
                "in_channels": 1, "image_size": 4}
    asked, layer = [], 32 * 4 * 4  # numbers in the output of most layers
    monkeypatch.setattr(common, "require", lambda *given: asked.append(given))
    outputs = 3 * 128 + layer               # the embedding of the time, conv_in
    outputs += 3 * (7 * layer + 32) + 4 * layer   # down, middle (one of them with attention)
    outputs += 2 * (8 * layer + 32)         # up: the first norm has the channels of the skip, too
    outputs += layer + 16                   # norm_out, conv_out
    block = 2 * 64 + 2 * (32 * 32 * 9 + 32) + 128 * 32 + 32
    weights = 32 * 128 + 128 + 128 * 128 + 128 + (9 * 32 + 32)
    weights += 3 * block + 64 + 4 * (32 * 32 + 32)
    weights += 2 * (block + 64 + 32 * 32 * 9 + 64 * 32 + 32) + 64 + (32 * 9 + 1)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        for copies, batch, kept, held in ((1, 1, False, 4 * layer), (3, 1234, True, outputs)):
            common.require_network(settings, Machine(META, dtype), copies, batch, kept)
            need, what, device = asked.pop()
            assert need == 4 * copies * weights + batch * (size * held + 20_000) and device == META
            assert f"{batch:,}" in what


# -------------------------------------------------------------------------------------- checkpoints

def sealed(path: Path, content: bytes) -> None:
    path.write_bytes(content + hashlib.sha256(content).digest())


def pickled(**payload) -> bytes:
    torch.save(payload, buffer := io.BytesIO())
    return buffer.getvalue()


GOOD = {"format": "ddpm checkpoint 1", "step": 0, "settings": SETTINGS}


def test_a_checkpoint_is_what_torch_saves_and_its_sha256(tmp_path):
    """The file before it is kept under another name, which stays its own name."""
    path, kept = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.prev.pt"
    assert common.previous(path) == kept == common.previous(kept)
    for step in (0, 10 ** 9):
        payload = {**GOOD, "step": step, "w": torch.arange(3)}
        common.save_checkpoint(path, {key: payload[key] for key in ("step", "settings", "w")})
        raw = path.read_bytes()
        assert hashlib.sha256(raw[:-32]).digest() == raw[-32:]
        assert_equal(torch.load(io.BytesIO(raw[:-32]), weights_only=True), payload)
        for name in (path, str(path), tmp_path):
            assert_equal(common.load_checkpoint(name), payload)
    assert common.load_checkpoint(kept)["step"] == 0
    path.unlink()
    for name in (path, tmp_path):  # a kill between two renames
        assert common.load_checkpoint(name)["step"] == 0


@pytest.mark.parametrize("change", [
    {"format": "ddpm checkpoint 2"}, {"format": None}, {"step": "1"}, {"step": True}, {"step": -1},
    {"step": 10 ** 9 + 1}, {"step": 1.0}, {"settings": None}, {"settings": {}}, {"more": Path("x")},
    {"settings": {k: v for k, v in SETTINGS.items() if k != "blocks"}}])
def test_a_sound_file_that_is_no_checkpoint_is_refused_by_its_name(tmp_path, change):
    """Another format, a step or settings that cannot be, an object that is not plain data."""
    path = tmp_path / "some.pt"
    sealed(path, pickled(**GOOD))
    assert common.load_checkpoint(path)["step"] == 0
    sealed(path, pickled(**{**GOOD, **change}))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        common.load_checkpoint(path)


def test_a_damaged_checkpoint_names_the_one_before_it_if_there_is_one(tmp_path):
    path, kept = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.prev.pt"
    with pytest.raises(ValueError, match=re.escape(str(path))):
        common.load_checkpoint(path)
    for content in (b"", bytes(31), bytes(32), bytes(99)):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            common.load_checkpoint(path)
        text = str(error.value).replace(str(path), "it")
        assert "it" in text and str(tmp_path) not in text and "None" not in text
    path.rename(kept)
    path.write_bytes(b"")
    for name in (path, kept):
        with pytest.raises(ValueError) as error:
            common.load_checkpoint(name)
        assert str(error.value).count(str(kept)) == 1


def test_reading_a_checkpoint_takes_three_times_its_size_and_no_gpu(tmp_path, monkeypatch):
    """Whatever device it was saved on, it is read on the CPU."""
    path, asked, real = tmp_path / "checkpoint.pt", [], torch.load
    sealed(path, pickled(**GOOD))
    monkeypatch.setattr(common, "require", lambda *given: asked.append(given))
    monkeypatch.setattr(torch, "load", lambda *a, **b: asked.append(b["map_location"]) or
                        real(*a, **b))
    common.load_checkpoint(path)
    (need, what), place = asked
    assert need == 3 * path.stat().st_size and str(path) in what and place == "cpu"


def test_a_folder_has_one_user_at_a_time(tmp_path):
    """A block that leaves nothing behind takes the folder with it, and others may follow."""
    pytest.importorskip("fcntl", reason="Windows has no such lock")
    folder = tmp_path / "run"
    with common.locked(folder):
        with pytest.raises(ValueError, match=re.escape(str(folder))), common.locked(folder):
            pytest.fail("locked twice")
    assert not folder.exists()
    for _ in range(2):
        with common.locked(folder):
            (folder / "log").write_text("")
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()
    with pytest.raises((OSError, ValueError)), common.locked(folder):
        pytest.fail("a folder was locked")


# ----------------------------------------------------------------------------------------- progress

@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [1000.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 1000.0 + seconds)


def test_progress_prints_a_line_every_ten_seconds(clock, capsys):
    """What is done, the rate since it began and the time left, or the seconds that one takes."""
    progress = common.Progress(100, "images", 40)
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
    progress.update(40, force=True)
    assert "40/100" in (err := capsys.readouterr().err) and ":" not in err  # nobody knows yet
    endless = common.Progress(10 ** 9, "images")
    clock(10 ** 6)
    endless.update(0, force=True)
    assert re.findall(r"\d+", capsys.readouterr().err) == ["0", "1000000000"]  # nor any rate


def test_progress_is_drawn_anew_on_a_terminal(clock, monkeypatch):
    """Twice a second in the same line; the last one stays. Nothing is drawn if it is quiet."""
    stderr = io.StringIO()
    stderr.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stderr)
    quiet, progress = common.Progress(4, "x", quiet=True), common.Progress(4, "x")
    for seconds, done, text in ((0.49, 1, None), (0.5, 1, "1/4 x 2.0 x/s, "), (0.9, 2, None),
                                (1, 4, "4/4 x 4.0 x/s, ")):
        clock(seconds)
        assert progress.due() == (text is not None) and not quiet.due()
        progress.update(done)
        quiet.update(done, force=True)
        shown = stderr.getvalue()
        stderr.seek(0), stderr.truncate()
        assert shown.startswith("\r\x1b[K") and text in shown if text else not shown
        assert shown.endswith("\n") == (done == 4)
    instant = common.Progress(1, "x")
    instant.update(1)  # no time has passed
    assert stderr.getvalue()


def test_pyplot_draws_into_files_or_is_none(monkeypatch):
    used = []
    fake = types.SimpleNamespace(use=used.append, pyplot="drawer")
    monkeypatch.setitem(sys.modules, "matplotlib", fake)
    assert common.pyplot() == "drawer" and used == ["Agg"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert common.pyplot() is None
