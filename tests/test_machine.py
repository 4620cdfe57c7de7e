"""The machine: device, precision, processes, noise that is counted; and the CPU against the GPU, where there is one."""
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, strategies as st

import bench
import sample
import simulated_cuda
import train
from helpers import (HERE, SMALL, SMALL_NET, TINY, assert_equal, begin, checkpoint, free_port, losses, processes,
                     random_run, trains)
from simulated_cuda import simulated
from support import machine
from support.checkpoint import Trained, load_checkpoint
from support.command import UsageError, command
from support.machine import Machine, Noise, seed_of, start_machine

ON_CPU = torch.device("cpu")
SIMULATED = pytest.mark.skipif(bool(simulated_cuda.MISSING), reason=str(simulated_cuda.MISSING))


# ----------------------------------------------------------------------------- device and precision

def test_the_precision_of_a_cpu():
    """bfloat16 where the CPU computes with it, else float32; otherwise what was asked for."""
    here = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch lack it
    best = torch.bfloat16 if here.get("avx512_bf16") or here.get("amx_bf16") else torch.float32
    for precision, dtype in ((None, best), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for compiles in (None, True, False):
            assert machine.start_machine("cpu", precision, compiles) == (ON_CPU, dtype, 0, 1, compiles)
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


def test_a_network_is_computed_in_the_precision_of_the_machine():
    """And its result is float32 in every precision, with the x and t that were given."""
    layer, x, t = torch.nn.Linear(2, 2), torch.ones(1, 2), torch.ones(1)

    def net(*given):
        assert given[0] is x and given[1] is t
        seen.append(layer(x).dtype)
        return layer(x)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        seen = []
        assert Machine(ON_CPU, dtype).network(net)(x, t).dtype == torch.float32 and seen == [dtype]


# ---------------------------------------------------------------------------------------- processes

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
        return [used is net, said.getvalue().count("torch.compile failed, going on without it: ")]
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
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": free_port(), "PYTHONPATH": str(HERE)}
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


def in_processes(*commands: str) -> list[tuple[int, str]]:
    """Status and last line on stderr of processes of torchrun, each with a command and folder of its own."""
    port, started = free_port(), []
    for rank, line in enumerate(commands):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(commands)), "LOCAL_RANK": str(rank),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        script, *flags = line.split()
        started.append(subprocess.Popen([sys.executable, HERE / script, *flags], env=env, cwd=f"rank-{rank}",
                                        stderr=subprocess.PIPE, text=True))
    ends = [process.communicate(timeout=120)[1] for process in started]
    return [(process.returncode, err.strip().splitlines()[-1]) for process, err in zip(started, ends)]


@pytest.mark.parametrize("commands, said", [
    (2 * ("sample.py --n 4 --device cpu",), "weights"),
    pytest.param(("sample.py --n 4 --seed 0 --device cpu", "sample.py --n 4 --seed 1 --device cpu"), "command line",
                 marks=pytest.mark.long),
    pytest.param(2 * ("evaluate.py --n 2 --terms 2 --dataset shapes --device cpu",), "weights", marks=pytest.mark.long),
    pytest.param(("train.py --dataset shapes --steps 1 --device cpu --precision bf16",
                  "train.py --dataset shapes --steps 1 --device cpu --precision fp32"), "precision", marks=pytest.mark.long)])
def test_processes_that_differ_end_before_the_work(in_a_folder_of_its_own, commands, said):
    """Another network in its folder of runs, another seed, another precision: both say so, status 1.

    Kills: every second image of another network, with status 0."""
    for rank in range(2):
        random_run(f"rank-{rank}/runs/x", image_size=16, attention=[16], clip=not rank)
    for status, line in in_processes(*commands):
        assert status == 1 and "the processes differ" in line and said in line


def test_rank_and_world_size_go_together(monkeypatch):
    """One of them alone is a mistake of whoever starts processes by hand, and nothing is computed."""
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(other, raising=False)
        with pytest.raises(UsageError, match="RANK and WORLD_SIZE must be set together"):
            start_machine("cpu")
        monkeypatch.delenv(name)
    for rank, world in (("1", "1"), ("-1", "2"), ("2", "2"), ("0", "0"), ("a", "2"), ("", "")):
        monkeypatch.setenv("RANK", rank), monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(UsageError, match="WORLD_SIZE"):
            start_machine("cpu")


def test_processes_without_an_address_say_so(monkeypatch):
    """As RANK and WORLD_SIZE of a scheduler, without torchrun."""
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(OSError, match="2 processes cannot connect.*MASTER_ADDR"):
        start_machine("cpu")


def test_a_seed_is_an_integer():
    """What looks like 3 would draw other images than 3."""
    for bad in (3.0, "3", None, 1.5):
        with pytest.raises(TypeError):
            machine.Noise(bad, [0], (2,))
    assert torch.equal(machine.Noise(torch.tensor(3), [0], (2,))(1), machine.Noise(3, [0], (2,))(1))


def test_whoever_waits_for_a_process_that_ended_says_so():
    """In words of our own, with status 1; the one that ended has said why."""
    def job(machine):
        if machine.is_main:  # the other one is gone by then, or goes
            main, said = command(lambda argv: machine.agree("weights", 1)), io.StringIO()
            with contextlib.redirect_stderr(said):
                return main([]), said.getvalue()
    (status, line), _ = processes(job)
    assert status == 1 and line.endswith("another process has failed; its own message says why\n")
    assert line.count("\n") == 1


def test_one_process_alone_waits_for_nobody():
    """Its rows are all rows, it agrees with itself, and its block is run at once, without any group."""
    alone, rows = Machine(ON_CPU, torch.float32), torch.arange(14).view(7, 2)
    assert not dist.is_initialized() and alone.is_main and list(range(7)[alone.share]) == [*range(7)]
    assert torch.equal(alone.gather(rows, 7), rows)
    alone.agree(1)
    with alone.main_first():
        assert not dist.is_initialized()


def torchrun(first: list[str], second: list[str]) -> None:
    """train.py, and then sample.py in the same processes, under two gloo ranks on the CPU."""
    Path("both.py").write_text(f"""import os, sys, sample, train
cut = sys.argv.index("then")
assert train.main(sys.argv[1:cut]) == 0
os.environ.update(MASTER_PORT="{free_port()}", TORCHELASTIC_USE_AGENT_STORE="False")  # torchrun's is for one meeting
assert sample.main(sys.argv[cut + 1:]) == 0
""")
    # "--": torchrun would take --n for the beginning of its own --nnodes
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--",
                    "both.py", *first, "then", *second], check=True, timeout=120, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_two_ranks_are_one_run():
    """The global batch, its images, times and noise do not depend on the number of ranks; nor do the
    samples.

    Kills: the same seed on every rank, images drawn twice, a gradient summed over ranks."""
    flags = [*TINY, "--steps", "4", "--dropout", "0", "--micro-batch", "1"]
    samples = "--checkpoint one --n 5 --steps 5 --device cpu --precision fp32 --out".split()
    assert train.main([*flags, "--out", "one"]) == 0
    torchrun([*flags, "--out", "two"], [*samples, "b.pt"])
    one, two = checkpoint("one"), checkpoint("two")
    for key in one["net"]:
        torch.testing.assert_close(two["net"][key], one["net"][key], rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(two["ema"][key], one["ema"][key], rtol=1e-3, atol=2e-5)
    for a, b in zip(losses("one"), losses("two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["loss_thirds"] == pytest.approx(b["loss_thirds"], rel=1e-4)

    assert sample.main([*samples, "a.pt"]) == 0
    a, b = torch.load("a.pt"), torch.load("b.pt")
    assert a.shape == b.shape and (a.int() - b.int()).abs().max() <= 1
    assert len(b.flatten(1).unique(dim=0)) == 5


def ranks(*folders) -> list[subprocess.Popen]:
    """train.py as so many processes of one run, each in a folder of its own, as on two machines."""
    port, found = free_port(), []
    for rank, folder in enumerate(folders):
        os.makedirs(folder, exist_ok=True)
        shutil.copy("images.pt", folder)
        environment = dict(os.environ, OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE="2",
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        found.append(subprocess.Popen([sys.executable, HERE / "train.py", *TINY,
                                       *map(str, SMALL), "--steps", "4"], cwd=folder,
                                      stderr=subprocess.PIPE, text=True, env=environment))
    return found


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_machines_without_a_shared_folder():
    """The process of a machine that lacks the folder of the run would begin at step 0 beside one that
    goes on: both end, in one line, and nothing is trained.

    Kills: gradients of different steps that are averaged without a word."""
    trains(*SMALL, "--steps", 2, "--out", "a/runs/images")
    before = Path("a/runs/images/checkpoint.pt").read_bytes()
    for process in ranks("a", "b"):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1 and "the processes differ" in err.splitlines()[-1] and "Traceback" not in err
    assert Path("a/runs/images/checkpoint.pt").read_bytes() == before


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_a_process_that_waits_for_another_hears_a_signal():
    """Also before they have met, where the waiting is not Python's."""
    process, = ranks("a")
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode != 0


# -------------------------------------------------------------------------- random numbers, counted

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


class Whole:
    """A number of another type, as NumPy has them."""

    def __index__(self):
        return 3


def test_numbers_mean_their_value():
    """3, tensor(3), int32 and any other integer are the same seed, image and time; False is 0."""
    want = Noise(3, [3, 1], (2, 2))
    for three in (torch.tensor(3), torch.tensor(3, dtype=torch.int32), Whole()):
        assert seed_of(three, "step", (three, False)) == seed_of(3, "step", (3, 0))
        same = Noise(three, [three, True], (2, 2))
        for t in (three, torch.tensor([3, 3], dtype=torch.int32), torch.tensor([3, 3], dtype=torch.uint8)):
            assert torch.equal(same(t), want(3))
    assert seed_of(3) != seed_of("3") and seed_of(3) != seed_of(4)
    for wrong in (0.5, torch.tensor(0.5), torch.tensor([1.0, 2.0])):
        with pytest.raises(TypeError):
            want(wrong)


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
            for row, i in zip(Noise(3, order, shape, ON_CPU)(t), order, strict=True):
                assert torch.equal(row, rows[i, t])
    for times in ([4, 17, 0, 4], [0, 0, 17, 0]):
        got = noise(torch.tensor(times))
        for row, i, t in zip(got, indices, times, strict=True):
            assert torch.equal(row, rows[i, t])
    for rank in range(3):
        share = Machine(ON_CPU, torch.float32, rank, 3).share
        for row, i in zip(Noise(3, indices[share], shape)(4), indices[share], strict=True):
            assert torch.equal(row, rows[i, 4])
    assert len(torch.stack(list(rows.values())).unique()) == 12 * 12
    assert Noise(3, [], shape)(4).shape == (0, *shape)


def test_noise_of_mps_is_computed_where_float64_is():
    """On MPS, which has none, the numbers are those of the CPU, and moved."""
    noise = Noise(3, [1, 2], (4,), "mps")
    assert noise.images.device == noise.elements.device == ON_CPU
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


# -------------------------------------------------------------- on each kind of device that is here

DETERMINISTIC = ("--dataset images.pt --channels 32 --multipliers 1 --timesteps 20 --batch-size 2 --samples 0 "
         "--dropout 0.1 --precision fp32 --no-compile").split()
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which CUDA is not deterministic
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_a_training_step_is_that_of_its_seed(device):
    """On the same device the same loss, gradient and weights, to the bit; another step has others."""
    def losses(k):
        run = begin({"init": None, "dataset": "shapes", "channels": 32, "multipliers": [1],
                           "batch_size": 4}, torch.load("images.pt"), {},
                          Machine(torch.device(device), torch.float32), Path("r"))
        torch.use_deterministic_algorithms(True)
        loss, t, norm = train.training_step(run, k)
        assert {x.device.type for x in (loss, t, norm, *run.net.parameters())} == {device}
        return loss, t, norm, *run.net.parameters(), *run.ema.parameters()
    one, two, other = losses(3), losses(3), losses(4)
    assert all(map(torch.equal, one, two)) and not torch.equal(one[0], other[0])


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_a_resumed_run_is_an_uninterrupted_one(device):
    """With --deterministic the weights of 2 + 2 steps are those of 4, to the bit."""
    same = [*DETERMINISTIC, "--device", device, "--deterministic"]
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        assert train.main([*same, "--out", out, "--steps", str(steps)]) == 0
    one, two = (load_checkpoint(Path(out, "checkpoint.pt")) for out in ("whole", "parts"))
    for part in ("net", "ema"):
        assert_equal(dict(one[part]), dict(two[part]))


def images_on(device: str, run: dict) -> torch.Tensor:
    s = train.build_schedule(SMALL_NET)
    trained = Trained(run["ema"].to(device), s, SMALL_NET, "")
    machine = Machine(torch.device(device), torch.float32)
    return sample.draw_samples(trained, 5, 3, 2, machine)


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_the_same_command_draws_the_same_samples(device):
    """The images of two commands on the same device are the same to the bit, and lie on the CPU."""
    run = random_run()
    one = images_on(device, run)
    assert one.device.type == "cpu" and torch.equal(one, images_on(device, run))


@pytest.mark.usefixtures("in_a_folder_of_its_own")
@GPU
def test_a_gpu_draws_the_samples_of_a_cpu():
    """In float32, without TF32, 99 % of the pixels to one level of 255. (The noise: above.)"""
    start_machine("cuda", "fp32")
    run = random_run()
    here, there = (images_on(place, run).int() for place in ("cpu", "cuda"))
    assert ((here - there).abs() <= 1).double().mean() >= 0.99


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_bench_runs(capsys):
    """The benchmark works on a tiny network: speeds, the limit, the peak of memory. No number is
    judged."""
    assert bench.main("--channels 32 --multipliers 1 --repeat 1 --batch-size 1 --device cpu".split()) == 0
    out = capsys.readouterr().out
    for text in ("ours +train", "ours +sample", "convolutions +train", "GFLOP/s"):
        assert re.search(text, out)
