"""What all scripts share, at its limits: flags, statuses, signals, the machine, noise, checkpoints,
progress, files read and written, folders with one user."""
import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import ddpm
import simulated_cuda
import unet
from helpers import assert_equal, SETTINGS
from simulated_cuda import simulated
from support import checkpoint, command, machine
from support.command import UsageError
from support.machine import Machine, Noise, seed_of

CPU, ROOT = torch.device("cpu"), Path(unet.__file__).parent
SIMULATED = pytest.mark.skipif(bool(simulated_cuda.MISSING), reason=str(simulated_cuda.MISSING))


# -------------------------------------------------------------------------------------------- flags

def test_a_mistyped_flag_is_named():
    parser = command.Parser("text", "--steps", "--seed", "--device")
    for words in ("--stesp 3", "--devise=a-very-long-value", "--ste 3", "steps"):
        with pytest.raises(UsageError, match=f"{words.split()[0]}.*--help"):
            parser.parse_args(words.split())


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


def refused(judge, *texts) -> list[str]:
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
        for line in refused(judge, *bad):
            assert "21" in line and "57" in line and line.isascii() and line.isprintable()
    assert refused(whole, "99") != refused(real, "99")
    for judge, low, high in ((command.positive_int, 1, 10 ** 9), (command.seed, 0, 2 ** 63 - 1)):
        assert judge(str(low)) == low and judge(str(high)) == high
        refused(judge, str(low - 1), str(high + 1))


# ------------------------------------------------------------------------ exit statuses and signals

def ends(with_error) -> int:
    """The status of a command that ends so."""
    @command.command
    def main(argv):
        if isinstance(with_error, BaseException):
            raise with_error
        return with_error
    return main([])


@pytest.mark.parametrize("error, status, said", [
    (None, 0, []), (3, 3, []), (SystemExit(4), 4, []), (SystemExit(None), 0, []),
    (UsageError("flag 5"), 2, ["flag 5"]), (ValueError("value 5\nmore"), 1, ["value 5 more"]),
    (OSError("file 5"), 1, ["file 5"]), (KeyError("key 5"), 1, ["KeyError", "key 5"]),
    (ModuleNotFoundError("No module named 'PIL'", name="PIL"), 1, ["pip install pillow"]),
    (ModuleNotFoundError("No module named 'diffusers'", name="diffusers"), 1, ["pip install diffusers"]),
    (ImportError("cannot import name 'Nett' from 'mynet'", name="mynet"), 1, ["ImportError", "Nett"]),
    (RuntimeError("CUDA out of memory. 5"), 1, ["fewer images"]),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, ["fewer images"]),
    (KeyboardInterrupt(), 128 + signal.SIGINT, [])])
def test_the_status_tells_how_a_command_ended(error, status, said, capsys, monkeypatch):
    """One line that begins with the name of the script. DDPM_TRACEBACK lets errors through."""
    monkeypatch.delenv("DDPM_TRACEBACK", raising=False)
    assert ends(error) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == isinstance(error, (Exception, KeyboardInterrupt))
    assert all(line.startswith("test_command.py: ") for line in lines)
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


# -------------------------------------------------------------------------------------- the machine

def test_the_precision_of_a_cpu():
    """bfloat16 where the CPU computes with it, else float32; otherwise what was asked for."""
    here = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch lack it
    best = torch.bfloat16 if here.get("avx512_bf16") or here.get("amx_bf16") else torch.float32
    for precision, dtype in ((None, best), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for compiles in (None, True, False):
            assert machine.start_machine("cpu", precision, compiles) == (CPU, dtype, 0, 1, compiles)
    if not torch.cuda.is_available():  # with one, test_simulated_cuda.py says the same of None
        assert machine.start_machine().device.type == ("mps" if torch.backends.mps.is_available() else "cpu")


@SIMULATED
def test_each_process_of_torchrun_takes_a_gpu_of_its_own(monkeypatch):
    """That of its LOCAL_RANK, or of its rank, unless one was named; here there is one, so the others
    are refused by name. Processes that have met do not meet again, and one alone takes the first."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for rank, local, device, found in (
                (3, 0, None, "cuda:0"), (3, 0, "cuda", "cuda:0"), (3, 1, None, 1), (3, 1, "cuda", 1),
                (3, None, "cuda", 3), (0, None, "cuda", "cuda:0"), (3, 1, "cuda:0", "cuda:0"), (3, 1, "cpu", "cpu")):
            monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "5")
            monkeypatch.delenv("LOCAL_RANK", raising=False)
            if local is not None:
                monkeypatch.setenv("LOCAL_RANK", str(local))
            with simulated():
                if isinstance(found, int):
                    with pytest.raises(UsageError, match=f"--device cuda:{found}"):
                        machine.start_machine(device, "fp32")
                else:
                    assert machine.start_machine(device, "fp32") == (torch.device(found), torch.float32, rank, 5, None)
    finally:
        dist.destroy_process_group()
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    with simulated():
        assert machine.start_machine("cuda", "fp32").device == torch.device("cuda:0")


def test_machines_that_are_not_there():
    """Unknown devices, and TF32 without an NVIDIA GPU: the flag is named."""
    for device, precision, flag in (("tpu", None, "--device tpu"), ("cpu", "tf32", "--precision tf32"),
                                    ("", None, "--device"), ("cpu:x", None, "--device cpu:x")):
        with pytest.raises(UsageError, match=flag):
            machine.start_machine(device, precision)


PROCESSES = """if True:
    import contextlib, io, json, os, signal, sys, time
    from datetime import timedelta
    from pathlib import Path
    import torch, torch._dynamo
    import torch.distributed as dist
    from torch import nn
    from support import machine

    rank = next((i for i in (1, 2) if not os.fork()), 0)    # three processes, and one import of torch
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, handler := lambda *_: None)
    here = machine.start_machine("cpu", "fp32")
    found = {"machine": [str(here.device), str(here.dtype), *here[2:], here.is_main],
             "again": here == machine.start_machine("cpu", "fp32"), "backend": dist.get_backend(),
             "handler": signal.getsignal(signal.SIGTERM) is handler, "share": list(range(7))[here.share]}

    rows = torch.arange(14, dtype=torch.uint8).view(7, 2)
    whole = here.gather(rows[here.share], 7)
    found["whole"] = [str(whole.dtype), whole.tolist()]

    def agrees(*what):
        with contextlib.suppress(ValueError):
            here.agree(*what)
            return True
        return False
    found["agree"] = [agrees(1, {"a": "b"}), agrees(rank == 0), agrees({"a": rank // 2}), agrees(2)]

    class Net(nn.Linear):
        def forward(self, x, t):
            return super().forward(x) * t[:, None]

    def plain(net, compiles, *failing, **default):
        # whether the network itself is used, and how many lines say so; the compiler fails on these ranks
        machine.BACKEND = "none" if rank in failing else "eager"
        with contextlib.redirect_stderr(io.StringIO()) as said:
            used = here._replace(compiles=compiles).compiled(net, 4, 2, **default)
        return [used is net, said.getvalue().count("without torch.compile: ")]
    net = Net(2, 2)
    shared = nn.parallel.DistributedDataParallel(net)
    found["plain"] = [plain(net, True), plain(shared, True), plain(net, True, 1), plain(shared, True, 1),
                      plain(shared, True, 0, 1, 2), plain(net, None), plain(net, None, default=True),
                      plain(net, False, default=True)]

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.1), dist.group.WORLD)
    with here.main_first():
        if here.is_main:
            time.sleep(0.5)
            Path("file").touch()
        found["file"] = Path("file").exists()
    groups = [group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map]
    found["hours"] = [group.options._timeout.total_seconds() / 3600 for group in groups[1:]]
    try:        # the control: the processes of this group do not wait so long for each other
        time.sleep(0 if rank else 0.5)
        dist.barrier()
    except RuntimeError:
        found["late"] = True
    Path(f"{rank}.json").write_text(json.dumps(found))
    if not rank:
        os.wait(), os.wait()
    os._exit(0)     # without a farewell to the group whose time is over
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_three_processes(tmp_path):
    """They meet on gloo, once, and keep their handlers of signals. Every piece of work is one process's,
    and all get every row in its place. With the same words they agree, with others each one raises.

    Where the compiler fails on one of them, all go on with the plain network, and a line of that one
    says so; none waits for a gradient of another meanwhile. Where it fails nowhere, and is asked for by
    a flag or by default, none has the plain one.

    The main process runs the block first, however long: the others have a day, and not the time of the group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", PROCESSES], cwd=tmp_path, env=environment, timeout=120,
                             stderr=subprocess.PIPE, text=True)
    assert process.returncode == 0 and len(list(tmp_path.glob("*.json"))) == 3, process.stderr
    for rank in range(3):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["machine"] == ["cpu", "torch.float32", rank, 3, None, rank == 0]
        assert found["again"] and found["handler"] and found["backend"] == "gloo"
        assert found["share"] == [[0, 3, 6], [1, 4], [2, 5]][rank]
        assert found["whole"] == ["torch.uint8", [[2 * i, 2 * i + 1] for i in range(7)]]
        assert found["agree"] == [True, False, False, True]
        failed = [True, int(rank == 1)]
        assert found["plain"] == [[False, 0], [False, 0], failed, failed, [True, 1], [True, 0], [False, 0], [True, 0]]
        assert found["file"] and found["hours"] == [24] and found["late"]


def test_one_process_alone_waits_for_nobody():
    """Its rows are all rows, it agrees with itself, and its block is run at once, without any group."""
    alone, rows = Machine(CPU, torch.float32), torch.arange(14).view(7, 2)
    assert not dist.is_initialized() and alone.is_main and list(range(7)[alone.share]) == [*range(7)]
    assert torch.equal(alone.gather(rows, 7), rows)
    alone.agree(1)
    with alone.main_first():
        assert not dist.is_initialized()


def test_a_network_is_computed_in_the_precision_of_the_machine():
    """And its result is float32 in every precision, with the x and t that were given."""
    layer, x, t = torch.nn.Linear(2, 2), torch.ones(1, 2), torch.ones(1)

    def net(*given):
        assert given[0] is x and given[1] is t
        seen.append(layer(x).dtype)
        return layer(x)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        seen = []
        assert Machine(CPU, dtype).network(net)(x, t).dtype == torch.float32 and seen == [dtype]


# --------------------------------------------------------------------------- random numbers, counted

WORD, GOLDEN = 2 ** 64 - 1, 0x9E3779B97F4A7C15


def splitmix(x: int) -> int:
    """The finaliser of splitmix64 on Python's integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


def unmixed(x: int) -> int:
    """The x whose finaliser this is."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        x ^= x >> shift ^ x >> 2 * shift
        x = x * pow(factor, -1, 2 ** 64) & WORD
    return x


def signed(x: int) -> int:
    """These 64 bits as torch's int64."""
    return (x & WORD) - ((x & 2 ** 63) << 1)


def by_hand(seed: int, i, t: int, element: int) -> tuple[int, int]:
    """The word of a stream, and that of its element, which becomes the number."""
    image = int.from_bytes(hashlib.sha256(repr((seed, "image", i)).encode()).digest()[:8], "big") // 2
    stream = splitmix(image + (2 * t + 1) * GOLDEN & WORD)
    return stream, splitmix(stream ^ splitmix(element + 1))


def test_a_seed_is_63_bits_of_a_hash():
    digest = hashlib.sha256(b"(0, 'step', 17)").hexdigest()
    assert seed_of(0, "step", 17) == int(digest[:16], 16) // 2


@given(st.lists(st.integers(0, WORD), min_size=1, max_size=9))
def test_mixed_is_the_finaliser_of_splitmix64(words):
    """For all words, negative ones too, to the last bit, and it is a bijection.

    Kills: a shift that copies the sign, a product that is not modulo 2^64, a wrong constant."""
    got = machine.mixed(torch.tensor([signed(x) for x in words]))
    assert got.tolist() == [signed(splitmix(x)) for x in words]
    assert [unmixed(splitmix(x)) for x in words] == words


def test_mixed_has_the_published_outputs():
    """The first numbers of splitmix64 with the seed 1234567, as its author's C code prints them."""
    states = torch.tensor([signed(1234567 + k * GOLDEN) for k in range(1, 6)])
    assert [x & WORD for x in machine.mixed(states).tolist()] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821]


def test_noise_by_hand():
    """z = Φ⁻¹((⌊bits/2¹²⌋ + ½)/2⁵²), where bits are counted from (seed, i, t, element), for numbers
    and names, for negative words and others; x_T is noise(0)."""
    seen, normal = set(), statistics.NormalDist()
    for seed, t, indices in ((0, 0, [0, 1]), (3, 17, [8, "b"]), (2 ** 63 - 1, 1000, [("row", 2), 10 ** 9]),
                             (7, 10 ** 5, [-1, ("shared", 750, 3)])):
        z = Noise(seed, indices, (2, 2, 3))(t)
        assert z.dtype == torch.float32 and z.shape == (2, 2, 2, 3)
        for row, i in zip(z.flatten(1), indices, strict=True):
            for element, got in enumerate(row.tolist()):
                stream, bits = by_hand(seed, i, t, element)
                seen.add((stream >> 63, bits >> 63))
                want = normal.inv_cdf(((bits >> 12) + 0.5) / 2 ** 52)
                assert got == pytest.approx(want, rel=1e-6, abs=1e-9)
    assert seen == set(itertools.product((0, 1), repeat=2))
    noise = Noise(3, [1, 2], (5,))
    assert torch.equal(noise(), noise(0)) and not torch.equal(noise(), noise(1))


def test_noise_is_the_same_in_any_batch_order_and_process():
    """Rows of an image do not depend on the others; t may be a tensor with one time an image, and
    calls do not depend on earlier calls.

    Kills: generators with a state, a place in the batch that counts, one t for all images."""
    indices, shape = [5, 2, 9, "x"], (3, 2, 2)
    noise = Noise(3, indices, shape)
    noise(99)
    rows = {(i, t): noise(t)[k].clone() for t in (4, 0, 17) for k, i in enumerate(indices)}
    for order in itertools.permutations(indices, 3):
        for t in (17, 0, 4):
            for row, i in zip(Noise(3, order, shape, CPU)(t), order, strict=True):
                assert torch.equal(row, rows[i, t])
    for times in ([4, 17, 0, 4], [0, 0, 17, 0]):
        got = noise(torch.tensor(times))
        for row, i, t in zip(got, indices, times, strict=True):
            assert torch.equal(row, rows[i, t])
    for rank in range(3):
        share = Machine(CPU, torch.float32, rank, 3).share
        for row, i in zip(Noise(3, indices[share], shape)(4), indices[share], strict=True):
            assert torch.equal(row, rows[i, 4])
    assert len(torch.stack(list(rows.values())).unique()) == 12 * 12
    assert Noise(3, [], shape)(4).shape == (0, *shape)


def test_noise_of_mps_is_computed_where_float64_is():
    """On MPS, which has none, the numbers are those of the CPU, and moved."""
    noise = Noise(3, [1, 2], (4,), "mps")
    assert noise.images.device == noise.elements.device == CPU
    if not torch.backends.mps.is_available():
        with pytest.raises(Exception):  # nothing can be moved there
            noise(7)
    else:
        assert noise(7).device.type == "mps" and torch.equal(noise(7).cpu(), Noise(3, [1, 2], (4,))(7))


@SIMULATED
def test_a_time_of_another_device_is_no_reason_for_other_numbers():
    """And they lie where the noise was asked for, not where the time lies."""
    times = torch.tensor([7, 0])
    want = Noise(3, [1, 2], (4,))(times)
    with simulated():
        for device in ("cpu", "cuda"):
            for place in ("cpu", "cuda"):
                z = Noise(3, [1, 2], (4,), device)(times.to(place))
                assert z.device.type == device and torch.equal(z.cpu(), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_noise_of_a_gpu_is_that_of_a_cpu():
    """The counted words are the same to the bit, and Φ⁻¹ to its last digits."""
    for t in (0, 500, torch.tensor([1, 2, 1000])):
        here, there = (Noise(3, [0, 1, "b"], (3, 32, 32), device) for device in ("cpu", "cuda"))
        assert torch.equal(machine.mixed(here.images), machine.mixed(there.images).cpu())
        torch.testing.assert_close(there(t).cpu(), here(t), rtol=1e-6, atol=1e-7)


def test_noise_is_standard_normal():
    """Moments, tails, the distance of Kolmogorov and Smirnov, and the correlation of neighbours in
    element, image and time, of 10⁶ numbers, within five standard errors."""
    noise = Noise(0, range(100), (1000,))
    z = torch.stack([noise(t) for t in range(10)]).double()         # time, image, element
    n = z.numel() ** 0.5
    assert abs(z.mean()) < 5 / n and abs(z.square().mean() - 1) < 5 * 2 ** 0.5 / n
    assert abs((z ** 3).mean()) < 5 * 15 ** 0.5 / n and abs((z ** 4).mean() - 3) < 5 * 96 ** 0.5 / n
    for axis in range(3):
        a, b = z.narrow(axis, 1, z.shape[axis] - 1), z.narrow(axis, 0, z.shape[axis] - 1)
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5
        assert abs((a.square() * b.square()).mean() - 1) < 5 * 8 ** 0.5 / a.numel() ** 0.5
    for limit, p in ((1, 0.3173), (2, 0.0455), (3, 0.0027)):
        assert abs((z.abs() > limit).double().mean() - p) < 5 * (p / 1e6) ** 0.5 + 5e-5
    assert 4.3 < z.abs().max() < 6.5
    # The distance exceeds 2.46/√n with a probability of 2 exp(−2 · 2.46²) ≈ 10⁻⁵.
    u = torch.erfc(-z.flatten().sort().values / 2 ** 0.5) / 2
    rank = torch.arange(z.numel(), dtype=torch.float64) / z.numel()
    assert torch.maximum(u - rank, rank + 1 / z.numel() - u).max() < 2.46 / n
    # Each bit of the words is 1 in half of them, and so is its difference to each other bit.
    streams = torch.tensor([signed(by_hand(0, i, 0, 0)[0]) for i in range(20)])
    words = machine.mixed(streams[:, None] ^ machine.mixed(torch.arange(1, 1001)))
    bits = (words.flatten() >> torch.arange(64)[:, None] & 1).double() * 2 - 1
    assert ((bits @ bits.T / 20_000 - torch.eye(64)).abs() < 6 / 20_000 ** 0.5).all()
    assert (bits.mean(1).abs() < 5 / 20_000 ** 0.5).all()


def test_no_two_streams_share_numbers():
    """10⁶ numbers z, of many seeds, images and times, have as few equal pairs as any that are independent:
    float32 has room for 6,760 of them, and two streams alike would be 1,000 more.

    Kills: seed + i, i + t, a seed of 32 bits (with which images 11105 and 44975 of seed 8 agree)."""
    times = torch.tensor([t for t in range(25) for _ in range(10)])
    many = torch.cat([Noise(seed, list(range(10)) * 25, (1000,))(times) for seed in range(4)])
    independent = torch.special.ndtri(torch.rand(10 ** 6, dtype=torch.float64)).float()
    assert abs(len(many.unique()) - len(independent.unique())) < 5 * (2 * 6760) ** 0.5
    assert seed_of(8, "image", 11105) % 2 ** 32 == seed_of(8, "image", 44975) % 2 ** 32
    assert len(Noise(8, [11105, 44975], (1000,))().unique()) == 2000


def test_no_stream_is_a_shifted_copy_of_another():
    """Also where two streams begin at words that differ by 1, or by the constant by which splitmix64
    counts: the numbers of one are none of the other's, at any place. (Three by chance, in float32.)

    Kills: elements that are added to the stream, stream + element · c, with the next stream's
    numbers among those of this one."""
    noise, (start, _) = Noise(3, [0, 1], (3000,)), by_hand(3, 0, 0, 0)
    for step in (1, 2, 3, 64, GOLDEN, 2 * GOLDEN, 5 * GOLDEN):
        images = [unmixed(word & WORD) - GOLDEN for word in (start, start + step)]
        noise.images = torch.tensor([signed(x) for x in images])
        a, b = noise()
        first = ((by_hand(3, 0, 0, 0)[1] >> 12) + 0.5) / 2 ** 52
        assert a[0].item() == pytest.approx(statistics.NormalDist().inv_cdf(first), rel=1e-6)   # the control
        assert min(len(a.unique()), len(b.unique())) > 2997 and torch.isin(a, b).sum() <= 3


def test_u_is_never_0_or_1():
    """The words 0 and 2⁶⁴ − 1 give the outermost numbers, which are finite and opposite.

    Kills: 53 bits, of which the largest is rounded to u = 1."""
    noise, element = Noise(0, [0, 1], (1,)), splitmix(1)
    images = [unmixed(unmixed(word) ^ element) - GOLDEN for word in (0, WORD)]
    noise.images = torch.tensor([signed(x) for x in images])
    least = statistics.NormalDist().inv_cdf(2.0 ** -53)
    assert noise().flatten().tolist() == pytest.approx([least, -least], rel=1e-6)
    assert math.isfinite(least) and least < -8


# -------------------------------------------------------------------------------------- checkpoints

def sealed(path: Path, content: bytes) -> None:
    path.write_bytes(content + hashlib.sha256(content).digest())


def pickled(**payload) -> bytes:
    torch.save(payload, buffer := io.BytesIO())
    return buffer.getvalue()


GOOD = {"format": "ddpm checkpoint 2", "step": 0, "settings": SETTINGS}


def test_a_checkpoint_is_what_torch_saves_and_its_sha256(tmp_path):
    path = tmp_path / "new" / "checkpoint.pt"
    for step in (0, 10 ** 9):
        payload = {**GOOD, "step": step, "w": torch.arange(3)}
        checkpoint.save_checkpoint(path, {key: payload[key] for key in ("step", "settings", "w")})
        raw = path.read_bytes()
        assert hashlib.sha256(raw[:-32]).digest() == raw[-32:]
        assert_equal(torch.load(io.BytesIO(raw[:-32]), weights_only=True), payload)
        assert_equal(checkpoint.load_checkpoint(path), payload)
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


@SIMULATED
def test_a_checkpoint_is_read_on_the_cpu(tmp_path):
    """Whatever device it was saved on, and whether that is here."""
    path, w = tmp_path / "checkpoint.pt", torch.arange(3)
    with simulated():
        checkpoint.save_checkpoint(path, {**GOOD, "w": w.to("cuda")})
        assert torch.load(io.BytesIO(path.read_bytes()[:-32]))["w"].device.type == "cuda"  # the control
        assert_equal(checkpoint.load_checkpoint(path), {**GOOD, "w": w})
    assert_equal(checkpoint.load_checkpoint(path), {**GOOD, "w": w})


class Deed:
    """What a pickle can do when it is read: here it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("done",)


def test_no_code_in_a_checkpoint_is_run(tmp_path, monkeypatch):
    """One from a stranger, with the right SHA-256, is refused by its name, and does nothing; also with the
    variable that makes torch.load trust every file, unless it is told not to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    sealed(Path("bad.pt"), content := pickled(**GOOD, more=Deed()))
    with pytest.raises(ValueError, match="bad.pt"):
        checkpoint.load_checkpoint(Path("bad.pt"))
    assert not Path("done").exists()
    torch.load(io.BytesIO(content), weights_only=False)  # the control
    assert Path("done").exists()


@pytest.mark.parametrize("change", [
    {"format": "ddpm checkpoint 1"}, {"format": None}, {"format": 2}, {"more": Path("x")}])
def test_a_sound_file_that_is_no_checkpoint_is_refused_by_its_name(tmp_path, change):
    """Another format, or an object that is not plain data. A format that is read is named."""
    path = tmp_path / "some.pt"
    sealed(path, pickled(**GOOD))
    assert checkpoint.load_checkpoint(path)["step"] == 0
    for content in (pickled(**{**GOOD, **change}), pickled(step=0), b"", b"no pickle"):
        sealed(path, content)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            checkpoint.load_checkpoint(path)
    sealed(path, pickled(**{**GOOD, "format": "ddpm checkpoint 1"}))
    with pytest.raises(ValueError, match="ddpm checkpoint 1.*ddpm checkpoint 2"):
        checkpoint.load_checkpoint(path)


def test_a_file_without_its_sha256_is_no_checkpoint(tmp_path):
    """Nothing, too little, the content alone, or one bit of the first or last byte changed."""
    path = tmp_path / "checkpoint.pt"
    for place in (0, -33, -32, -1):
        sealed(path, pickled(**GOOD))
        raw = bytearray(path.read_bytes())
        raw[place] ^= 1
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            checkpoint.load_checkpoint(path)
    path.unlink()
    for content in (None, b"", bytes(31), bytes(32), bytes(99), pickled(**GOOD)):
        path.write_bytes(content) if content is not None else None
        with pytest.raises(ValueError, match=re.escape(str(path))):
            checkpoint.load_checkpoint(path)


def test_the_network_of_settings():
    """Every setting of the network reaches it, and shows; a learned variance doubles the output channels."""
    plain = {"in_channels": 1, "channels": 32, "multipliers": [1, 2], "blocks": 1, "attention": [7, 5],
             "image_size": 11, "dropout": 0.2}
    shown = []
    for change, variance, outputs in (
            ({}, "fixed_small", 1), ({}, "learned", 2), ({"in_channels": 3}, "fixed_large", 3),
            ({"in_channels": 3}, "learned", 6), ({"channels": 64}, "fixed_small", 1),
            ({"multipliers": [2, 1]}, "fixed_small", 1), ({"blocks": 2}, "fixed_small", 1),
            ({"attention": [11]}, "fixed_small", 1), ({"image_size": 16}, "fixed_small", 1),
            ({"dropout": 0.3}, "fixed_small", 1)):
        shown.append(str(unet.build_network({**plain, **change, "variance": variance})))
        assert shown[-1] == str(unet.UNet(out_channels=outputs, **plain | change))
    assert len(set(shown)) == len(shown) == 10


def test_the_schedule_of_settings():
    """All four of them: √β in equal steps between the ends, which are multiplied by 1000/T."""
    settings = {"timesteps": 500, "schedule": "quadratic", "beta_start": 0.001, "beta_end": 0.02}
    want = [(0.002 ** 0.5 + (0.04 ** 0.5 - 0.002 ** 0.5) * i / 499) ** 2 for i in range(500)]
    assert checkpoint.build_schedule(settings).betas.tolist() == pytest.approx([0, *want])


def test_the_hash_of_a_network_changes_with_all_that_its_numbers_depend_on():
    """Each weight and its name, the network's settings, the schedule and what is predicted; not with
    how it was trained, or where it lies."""
    net = torch.nn.Linear(2, 2)
    trained = checkpoint.Trained(net, ddpm.make_schedule(), SETTINGS, "here")
    hashes = [checkpoint.weights_hash(trained)]
    same = trained._replace(settings={**SETTINGS, "lr": 7, "steps": 3, "dataset": "x", "clip": True}, source="there")
    assert checkpoint.weights_hash(same) == hashes[0] and len(hashes[0]) == 32
    for name in trained.model_settings:
        hashes.append(checkpoint.weights_hash(trained._replace(settings={**SETTINGS, name: "other"})))
    hashes.append(checkpoint.weights_hash(trained._replace(settings={**SETTINGS, "clip": False})))
    with torch.no_grad():
        for i in range(6):
            [*net.weight.view(-1), *net.bias.view(-1)][i].add_(1)
            hashes.append(checkpoint.weights_hash(trained))
    other = torch.nn.Module()
    other.weights, other.bias = net.weight, net.bias
    hashes.append(checkpoint.weights_hash(trained._replace(net=other)))
    assert len(set(hashes)) == len(hashes) == 12 + 9
    assert set(trained.model_settings) == {
        "in_channels", "image_size", "channels", "multipliers", "blocks", "attention", "timesteps", "schedule",
        "beta_start", "beta_end", "predict", "variance"}


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
    """Until the block ends the old content is there, and another file beside it whose name nobody
    can foresee; afterwards the new content alone. Folders on the way are made."""
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
