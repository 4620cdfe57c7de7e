"""Whole commands on a simulated GPU: they give what they give on a CPU, and wait for nothing.

tests/simulated_cuda.py says what is simulated and what is not."""
import copy
import re
from pathlib import Path

import pytest
import torch

import ddpm
import evaluate
import sample
import simulated_cuda
import train
import unet
from helpers import assert_equal, begin, Inception, losses, random_run, read_png
from simulated_cuda import simulated, waits
from support import data, machine
from support.checkpoint import load, load_checkpoint
from support.command import UsageError
from support.machine import Noise, start_machine

pytestmark = [pytest.mark.skipif(bool(simulated_cuda.MISSING), reason=str(simulated_cuda.MISSING)),
              pytest.mark.usefixtures("in_a_folder_of_its_own"),
              pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]
WIDE = {"channels": 64, "blocks": 1}  # two channels for each group, so that no gradient is rounding alone
TRAIN = ("--dataset images.pt --init init --batch-size 4 --lr 1e-3 --warmup 3 --samples 0 --no-compile "
         "--dropout 0 --steps").split()


@pytest.fixture
def gpu():
    """A device of capability 8.0, which has bfloat16."""
    with simulated():
        yield


@pytest.fixture
def run(in_a_folder_of_its_own):
    return random_run()


def trained(place: str, steps: int, *flags: str, device: str, capability=(8, 0), **settings) -> dict:
    """The checkpoint of a training run on that device, from random weights, the same each time."""
    if not Path("init").exists():
        random_run("init", **WIDE, **settings)
    words = [*TRAIN, str(steps), "--out", place, "--device", device, *flags]
    if device == "cpu":
        assert train.main(words) == 0
    else:
        with simulated(capability):
            assert train.main(words) == 0
    return load_checkpoint(Path(place, "checkpoint.pt"))


def distance(one: dict, two: dict) -> float:
    """‖one − two‖, over all weights."""
    return torch.cat([(x - two[name]).flatten() for name, x in one.items()]).norm().item()


def assert_close(one: dict, two: dict) -> None:
    """Two checkpoints with the same weights, averages and averages of Adam, up to rounding."""
    start = load_checkpoint(Path("init/checkpoint.pt"))["ema"]
    for name in ("net", "ema"):
        assert distance(one[name], two[name]) < 0.02 * distance(one[name], start)
    for a, b in zip(one["adam"]["state"].values(), two["adam"]["state"].values(), strict=True):
        assert distance(a, b) <= 0.01 * distance(a, {key: 0 * x for key, x in a.items()})


# ------------------------------------------------------------------------------- the device itself

def test_devices_do_not_mix(gpu):
    """As on CUDA: tensors of two devices, a table on the CPU indexed from the GPU, generators of the
    other device, a second GPU, a device without its index. A CPU scalar may join."""
    here, there = torch.arange(3.0), torch.arange(3.0, device="cuda")
    index = torch.tensor([1], device="cuda")
    assert (there + torch.tensor(2.0)).tolist() == [2, 3, 4] and there.to("cuda") is there
    assert there[torch.tensor([1])].device == index.device == torch.device("cuda:0")
    for wrong, text in ((lambda: here + there, "same device"), (lambda: here + there[0], "same device"),
                        (lambda: torch.cat([here, there]), "same device"), (lambda: here[index], "indices"),
                        (lambda: here.index_select(0, index), "same device"),
                        (lambda: torch.randn(2, device="cuda", generator=torch.Generator()), "generator"),
                        (lambda: torch.randn(2, generator=torch.Generator("cuda")), "generator"),
                        (lambda: torch.zeros(2, device="cuda:1"), "invalid device"),
                        (lambda: torch.cuda.set_device(1), "invalid device"),
                        (lambda: torch.cuda.set_device(torch.device("cuda")), "specified index")):
        with pytest.raises((RuntimeError, ValueError), match=text):
            wrong()


def test_every_wait_is_counted(gpu):
    """What reads a number, copies from or to the device, or has a size that only the device knows."""
    x = torch.arange(4.0, device="cuda")
    for kind, job in (("item", lambda: x.sum().item()), ("item", lambda: bool((x > 1).any())), ("to cpu", x.cpu),
                      ("to cpu", x.tolist), ("to device", lambda: torch.ones(2).to("cuda")),
                      ("to device", lambda: torch.tensor([1], device="cuda")), ("mask", lambda: x[x > 1]),
                      ("nonzero", x.nonzero), ("unique", x.unique), ("equal", lambda: torch.equal(x, x)),
                      ("to cpu", lambda: torch.zeros(4).copy_(x)), ("to device", lambda: x.copy_(torch.zeros(4))),
                      ("to device", lambda: x[torch.tensor([0])]), ("synchronize", torch.cuda.synchronize)):
        waits.clear()
        job()
        assert waits == {kind: 1}
    waits.clear()
    _ = (x * 2).exp() + torch.zeros(4, device="cuda"), torch.rand(3, device="cuda").to("cuda"), x[1:3], x.mean()
    assert not waits


def test_a_saved_tensor_remembers_its_device(tmp_path):
    """It is read there, or where `map_location` says, and not at all without a GPU."""
    path = tmp_path / "x.pt"
    with simulated():
        torch.save({"x": torch.arange(3.0, device="cuda"), "y": torch.zeros(1)}, path)
        for place, devices in ((None, ["cuda", "cpu"]), ("cpu", ["cpu"] * 2), ("cuda", ["cuda"] * 2)):
            found = torch.load(path, map_location=place, weights_only=True)
            assert [found[name].device.type for name in "xy"] == devices and found["x"].tolist() == [0, 1, 2]
        net = torch.nn.Linear(2, 2, device="cuda")
        assert all(p.device.type == "cuda" for p in copy.deepcopy(net).parameters())
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        torch.load(path, weights_only=True)
    assert torch.load(path, map_location="cpu", weights_only=True)["x"].tolist() == [0, 1, 2]


def test_16_bits_scaled_losses_and_the_fused_optimiser_work(gpu):
    """One step of Adam from a scaled loss in float16 is nearly that of float32. A gradient that is not
    finite changes no weight."""
    def step(dtype, bad=False):
        torch.manual_seed(0)
        net, x = torch.nn.Linear(8, 8).to("cuda"), torch.randn(4, 8, device="cuda")
        adam, scaler = torch.optim.Adam(net.parameters(), 0.1, fused=True), torch.amp.GradScaler(
            "cuda", enabled=dtype == torch.half)
        before = net.weight.detach().clone()
        with torch.autocast("cuda", dtype, dtype != torch.float32):
            y = net(x).softmax(1)
        scaler.scale(y.float().square().sum() * (float("inf") if bad else 1)).backward()
        scaler.step(adam)
        scaler.update()
        return before.cpu(), net.weight.detach().cpu()
    (before, wide), (_, half), (_, kept) = step(torch.float32), step(torch.half), step(torch.half, bad=True)
    torch.testing.assert_close(half, wide, rtol=0, atol=0.02)
    assert torch.equal(kept, before) and not torch.equal(half, before)


# ------------------------------------------------------------------------- the machine of a command

def test_the_precision_of_a_gpu():
    """bfloat16 from capability 8 on, float16 with 7, else float32; fp32 alone is without TF32. The
    device has its index, whatever the flag said."""
    b, h, f = torch.bfloat16, torch.float16, torch.float32
    kept = [(x, x.allow_tf32) for x in (torch.backends.cuda.matmul, torch.backends.cudnn)]
    try:
        for capability, precision, dtype, tf32 in (
                ((8, 0), None, b, True), ((9, 0), None, b, True), ((7, 5), None, h, True), ((7, 0), None, h, True),
                ((6, 1), None, f, True), ((9, 0), "tf32", f, True), ((9, 0), "fp32", f, False),
                ((7, 5), "bf16", b, True), ((7, 5), "fp32", f, False), ((9, 0), "fp16", h, True)):
            with simulated(capability):
                for flag in (None, "cuda", "cuda:0"):
                    found = start_machine(flag, precision)
                    assert found == (torch.device("cuda:0"), dtype, 0, 1, None)
                assert all(x.allow_tf32 is tf32 for x, _ in kept)
        with simulated(), pytest.raises(UsageError, match="--device cuda:3"):
            start_machine("cuda:3")
    finally:
        for x, allowed in kept:
            x.allow_tf32 = allowed


# ------------------------------------------------------------------------------------------ train.py

@pytest.mark.parametrize("flags, settings", [
    ("", {}), ("--micro-batch 3", {}), ("--deterministic", {}),
    ("--objective vlb", {"variance": "learned"}), ("", {"predict": "mean", "schedule": "quadratic", "beta_end": 0.02})])
def test_training_on_a_gpu_is_that_on_a_cpu(flags, settings):
    """Weights, averages and Adam's state after three steps in float32, up to rounding."""
    try:
        here, there = (trained(device, 3, "--precision", "fp32", *flags.split(), device=device, **settings)
                       for device in ("cpu", "cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(here, there)


@pytest.mark.parametrize("precision, capability", [("bf16", (8, 0)), ("fp16", (7, 5))])
def test_training_in_16_bits_is_near_that_in_32(precision, capability):
    """The default of such a device; the weights move in the same direction. (With other noise the two
    would differ by √2 of the way.) In float16 the loss is scaled, which costs the first steps here, until
    no gradient overflows; the checkpoint keeps the scale."""
    wide = trained("wide", 5, "--precision", "fp32", "--log-every", "1", device="cpu")
    half = trained("half", 5, "--log-every", "1", device="cuda", capability=capability)
    one, two = (losses(out)[0]["loss"] for out in ("wide", "half"))
    assert precision == "fp16" or one == pytest.approx(two, rel=0.02)
    assert half["dtype"] == {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[precision]
    assert bool(half["scaler"]) == (precision == "fp16")
    first = load_checkpoint(Path("init/checkpoint.pt"))["ema"]
    assert 0 < distance(wide["net"], half["net"]) < distance(wide["net"], first)


@pytest.mark.parametrize("flags", ["--dropout 0.2", "--micro-batch 2 --objective vlb", "--precision fp16"])
def test_a_training_step_waits_for_nothing(flags):
    """Four steps wait as often as two: only saving and the line at the end do."""
    counts = []
    for steps in (2, 4):
        train.permutation.cache_clear()  # the order of an epoch is copied to the device once
        trained(f"run-{steps}", steps, *flags.split(), device="cuda")
        counts.append(dict(waits))
    assert counts[0] == counts[1] and counts[0]["to cpu"] > 0


@pytest.mark.parametrize("first, then", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_on_another_device(first, then):
    """Two steps here and two there are the four steps of one device; so are grids and the log."""
    flags = ("--precision", "fp32", "--samples", "2", "--sample-steps", "3", "--sample-every", "2", "--log-every", "1")
    whole = trained("whole", 4, *flags, device="cpu")
    trained("parts", 2, *flags, device=first)
    parts = trained("parts", 4, *flags, device=then)
    assert_close(whole, parts)
    for grid in ("samples-0000002.png", "samples-0000004.png"):
        pictures = [read_png(Path(out, grid)) for out in ("whole", "parts")]
        assert (pictures[0] - pictures[1]).abs().max() <= 1
    one, two = ([entry["loss"] for entry in losses(out)] for out in ("whole", "parts"))
    assert one == pytest.approx(two, rel=1e-4) and len(one) == 4


def test_a_resumed_run_on_a_gpu_is_an_uninterrupted_one():
    """To the bit, with dropout, whose masks are drawn in another way there than on a CPU."""
    flags = ("--dropout", "0.3", "--deterministic")
    try:
        whole = trained("whole", 3, *flags, device="cuda")
        trained("parts", 1, *flags, device="cuda")
        parts = trained("parts", 3, *flags, device="cuda")
        other = trained("other", 3, "--deterministic", device="cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("net", "ema", "adam"):
        assert_equal(whole[name], parts[name])
    assert distance(whole["net"], other["net"]) > 0


def test_what_is_compiled_on_a_gpu(monkeypatch, capsys):
    """Training by default, sampling and grids only if it is asked for, all grids of a run once. Here
    the compiler fails each time: a line says so, and the command goes on."""
    monkeypatch.setattr(machine, "BACKEND", "none")
    words = [word for word in TRAIN if word != "--no-compile"]
    grids = ["2", "--sample-every", "1", "--samples", "1", "--sample-steps", "2", "--device", "cuda"]
    drawn = "--n 1 --steps 2 --checkpoint a".split()
    random_run("init", **WIDE)
    with simulated():
        for main, flags, tries in (
                (train.main, [*words, *grids, "--out", "a"], 1), (train.main, [*words, *grids, "--out", "b", "--compile"], 2),
                (train.main, [*words, *grids, "--out", "c", "--no-compile"], 0), (sample.main, drawn, 0),
                (sample.main, [*drawn, "--compile"], 1)):
            capsys.readouterr()
            assert main(flags) == 0 and capsys.readouterr().err.count("torch.compile failed, going on without it: ") == tries


# ----------------------------------------------------------------------------------------- sample.py

def sampled(*flags: str, out: str) -> None:
    assert sample.main([*"--checkpoint runs/images --precision fp32 --seed 3 --out".split(), out, *flags]) == 0


@pytest.mark.parametrize("flags, out", [
    ("--n 3", "x.png"), ("--n 3 --batch-size 2", "x.pt"), ("--n 3", "folder"), ("--n 3 --steps 5", "x.pt"),
    ("--n 3 --steps 6 --sampler ddim --eta 0.5", "x.pt"), ("--n 2 --progressive", "x.png"), ("--n 2 --shared --steps 8 --sampler ddpm", "x.png"),
    ("--n 2 --interpolate --time 9", "x.png"), ("--n 2 --no-ema --variance fixed_small", "x.pt")])
def test_the_samples_of_a_gpu_are_those_of_a_cpu(run, flags, out):
    """Grid, tensor, folder and the three figures: the same noise, the same images to one level."""
    def drawn(device):
        Path(device).mkdir()
        sampled(*flags.split(), "--device", device, out=f"{device}/{out}")
        if out.endswith(".pt"):
            return torch.load(f"{device}/{out}", weights_only=True).int()
        files = sorted(Path(device).rglob("*.png"))
        return torch.stack([read_png(file) for file in files])
    here = drawn("cpu")
    with simulated():
        there = drawn("cuda")
    assert here.shape == there.shape and len(here.unique()) > 9
    off = (here - there).abs()
    assert (off <= 1).double().mean() > 0.999 and (off == 0).double().mean() > 0.9


@pytest.mark.parametrize("flags", ["", "--sampler ddim --eta 0.5", "--precision bf16"])
def test_a_sampling_step_waits_for_nothing(run, flags):
    """Twice as many network calls wait as often."""
    counts = []
    with simulated():
        for steps in (3, 6):
            waits.clear()
            sampled("--n", "2", "--steps", str(steps), *flags.split(), out=f"{steps}.pt")
            counts.append(dict(waits))
    assert counts[0] == counts[1] and {kind for kind in counts[0]} == {"to device", "to cpu", "item"}
    assert counts[0]["to cpu"] == counts[0]["item"] == 1           # are they finite, and the images


def test_attention_in_float16_overflows_nowhere(gpu):
    """q·k reaches 10⁵, beyond float16, and q·k/√C does not: the scale comes before the product."""
    attention = unet.Attention(64).to("cuda")
    for layer in (attention.q, attention.k):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, 40.0)
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        assert attention(torch.randn(1, 64, 2, 2, device="cuda")).isfinite().all()


def test_a_figure_waits_only_for_what_it_shows(run):
    with simulated():
        for steps in (11, 13):
            waits.clear()
            sampled("--n", "2", "--steps", str(steps), "--progressive", out=f"{steps}.png")
            assert waits["to cpu"] == waits["item"] == 12            # eleven estimates and the image


def test_noise_is_the_same_on_both_devices(gpu):
    """z of image i at time t, in float32 and to the bit; the draws wait for nothing."""
    here, there = (Noise(5, [0, 3, ("row", 1)], (3, 4, 4), device) for device in ("cpu", "cuda"))
    times = [0, 1, 7]
    waits.clear()
    many = [there(t) for t in times]
    each = there(torch.tensor(times, device="cuda"))
    assert waits == {"to device": 1} and each.device.type == "cuda"
    assert all(torch.equal(here(t), z.cpu()) for t, z in zip(times, many))
    assert torch.equal(here(torch.tensor(times)), each.cpu())


# --------------------------------------------------------------------------------------- evaluate.py

def evaluated(capsys, *flags: str) -> list[float]:
    capsys.readouterr()
    assert evaluate.main([*"--checkpoint runs/images --dataset images.pt --seed 3".split(), *flags]) == 0
    lines = capsys.readouterr().out.split("\n", 1)[1]
    return [float(number) for number in re.findall(r"-?\d+\.\d+", lines)]


@pytest.mark.parametrize("flags", ["--n 2", "--n 5 --terms 4 --batch-size 2", "--n 2 --no-clip"])
def test_bits_per_dim_of_a_gpu_are_those_of_a_cpu(run, capsys, flags):
    """All terms with rate and distortion, and the estimate: to 1e-4."""
    here = evaluated(capsys, *flags.split(), "--device", "cpu")
    with simulated():
        there = evaluated(capsys, *flags.split(), "--device", "cuda")
    assert here == pytest.approx(there, rel=1e-4, abs=1e-4) and len(here) > 3


def test_fid_on_a_gpu_is_that_on_a_cpu(run, capsys):
    """Of samples that are drawn, with a TorchScript in the place of Inception, which is called once
    for each batch of the images and twice for each of the samples."""
    torch.jit.script(Inception()).save("inception.pt")
    flags = "--fid --n 12 --steps 3 --batch-size 6 --inception inception.pt --precision fp32".split()
    here = evaluated(capsys, *flags, "--device", "cpu")
    with simulated():
        there = evaluated(capsys, *flags, "--device", "cuda")
    assert here == pytest.approx(there, rel=1e-2) and len(here) == 3


# ------------------------------------------------------------------------------ from one's own Python

def test_the_example_of_ddpm_runs_where_the_images_are(gpu):
    """The lines at its head, with images there and T = 20. A schedule left on the CPU is one sentence."""
    code = re.search(r"\n    s = make_schedule.*?Algorithm 2\n", ddpm.__doc__, re.S)[0].replace("\n    ", "\n")
    x0 = torch.rand(2, 1, 4, 4, device="cuda") * 2 - 1
    names = {**vars(ddpm), "make_schedule": lambda: ddpm.make_schedule(20), "x0": x0, "x_T": torch.randn(2, 1, 4, 4, device="cuda"), "print": lambda *_: None,
             "net": lambda x, t: 0.1 * x + t[:, None, None, None] / 1000}
    exec(code, names)
    assert names["loss"].device.type == names["state"].x_t.device.type == "cuda"
    s, t = ddpm.make_schedule(), torch.ones(2, dtype=torch.int64, device="cuda")
    waits.clear()
    with pytest.raises(ValueError, match=r"the schedule is on cpu and t on cuda:0.*s\.to\('cuda:0'\)"):
        ddpm.q_sample(s, x0, t, x0)
    assert not waits


def test_a_checkpoint_of_the_other_device_is_loaded(gpu, run):
    """Written on either, the network lies where it is asked for, and gives the same."""
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 20])
    outs = []
    for device in ("cpu", "cuda"):
        found = load("runs/images", machine=start_machine(device, "fp32"))
        assert {p.device.type for p in found.net.parameters()} == {device}
        outs.append(found.net(x.to(device), t.to(device)).cpu())
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    images = sample.draw_samples(load("runs/images", machine=start_machine("cuda", "fp32")), 2, steps=3)
    assert images.device.type == "cpu" and images.dtype == torch.uint8


def test_images_that_do_not_fit_stay_on_the_cpu(monkeypatch):
    """With little memory on the device the batch is copied in each step, and nothing else changes."""
    def weights(memory):
        with simulated(memory=memory):
            run = begin({"init": None, "dataset": "images.pt", "channels": 32, "multipliers": [1],
                               "batch_size": 4, "attention": []}, data.shapes(64, 8), {},
                              start_machine("cuda", "fp32", False), Path("r"))
            train.training_step(run, 0), train.training_step(run, 1)
            return run.images.device.type, [p.detach().cpu() for p in run.net.parameters()]
    (place, many), (other, few) = weights(80 * 2 ** 30), weights(1000)
    assert (place, other) == ("cuda", "cpu") and all(map(torch.equal, many, few))
