"""What several files of tests use: a small run, its log and its checkpoint; two processes; a reader of PNGs; weights
in the names of diffusers."""
import contextlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import socket
import struct
import sys
import tempfile
import traceback
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from support import checkpoint as checkpoints
from support import data
from support.machine import Machine
from unet import build_network

HERE = Path(__file__).resolve().parents[1]
TINY = ("--dataset images.pt --channels 32 --multipliers 1 2 --blocks 1 --attention 4 "
        "--timesteps 20 --batch-size 4 --lr 1e-3 --warmup 3 --log-every 2 --save-every 100 "
        "--sample-every 100 --samples 0 --device cpu --precision fp32").split()
SMALL = ("--multipliers", 1, "--attention", 8)  # after TINY: where the network does not matter
SETTINGS = train.settle(train.defaults("shapes", 16), {"dataset": "shapes", "schedule": "linear", "timesteps": 1000},
                        (3, 16, 16))
CPU = Machine(torch.device("cpu"), torch.float32)
T, SIDE = 20, 8
SMALL_NET = {**SETTINGS, "dataset": "images.pt", "channels": 32, "multipliers": [1], "attention": [SIDE],
             "image_size": SIDE, "timesteps": T, "beta_end": 0.012, "variance": "fixed_large"}  # of random_run's networks


# --------------------------------------------------------------------------------------------- runs

def trains(*flags, expect: int = 0) -> int:
    status = train.main([*TINY, *map(str, flags)])
    assert status == expect
    return status


def checkpoint(folder="runs/images") -> dict:
    return checkpoints.load_checkpoint(Path(folder, "checkpoint.pt"))


def losses(folder="runs/images") -> list[dict]:
    """The lines of the log, without the speed, which is another one every time."""
    lines = Path(folder, "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in lines]


def assert_same_log(folder, whole="whole") -> None:
    """The same means of the same steps: where a run was stopped, a line is there in two parts."""
    def sums(entries) -> dict:
        total, before, found = 0.0, 0, {}
        for entry in entries:
            total, before = total + (entry["step"] - before) * entry["loss"], entry["step"]
            found[before] = pytest.approx(total)
        return found
    mine, all_of = sums(losses(folder)), sums(losses(whole))
    assert {step: mine[step] for step in all_of} == all_of and len(mine) >= len(all_of)


def log(folder=".") -> list[dict]:
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def run_of(dtype=torch.float32, images=None, folder=".", **changes) -> train.Run:
    """A run with a small network."""
    settings = {"dataset": "shapes", "channels": 32, "multipliers": [1], "timesteps": 20,
                "batch_size": 2, "warmup": 4, "decay": 0.0, "samples": 0, **changes}
    images = data.shapes(4, 8) if images is None else images
    Path(folder).mkdir(parents=True, exist_ok=True)
    return begin({"init": None, **settings}, images, {}, CPU._replace(dtype=dtype), Path(folder))


def begin(given, images, stored, machine, folder) -> train.Run:
    """The run of these flags, and if it is resumed of the checkpoint's settings."""
    return train.begin(train.decide(given, images.shape[1:], stored, machine), images, machine, folder)


FIXED = {  # of each setting that stays what it is when a run goes on: another value
         "image_size": 16, "flip": False, "batch_size": 6, "micro_batch": 3,
         "lr": 0.5, "warmup": 9, "decay": 0.5, "grad_clip": 3.0, "ema": 0.5, "ema_ramp": False, "dropout": 0.25,
         "channels": 96, "multipliers": [2], "blocks": 7, "attention": [16], "timesteps": 300,
         "schedule": "quadratic", "beta_start": 0.01, "beta_end": 0.5, "predict": "x0",
         "variance": "fixed_large", "objective": "vlb", "seed": 8}


def as_flags(settings: dict) -> list[str]:
    flags = []
    for name, value in settings.items():
        if value == []:  # no flag says so
            continue
        flag, value = name.replace("_", "-"), value if isinstance(value, list) else [value]
        flags += {True: [f"--{flag}"], False: [f"--no-{flag}"]}[value[0]] if (
            isinstance(value[0], bool)) else [f"--{flag}", *map(str, value)]
    return flags


def random_run(folder="runs/images", **changes) -> dict:
    """A run folder whose networks are random: the network at the last step, and the averaged one."""
    settings = {**SMALL_NET, **changes}
    g, nets = torch.Generator().manual_seed(0), {}
    for name in ("net", "ema"):
        nets[name] = build_network(settings).eval()
        for key, value in nets[name].state_dict().items():
            z = torch.randn(value.shape, generator=g)
            value.copy_(0 * z + 1 if re.search(r"norm.*weight", key) else
                        (0.4 if key.startswith("conv_out") else 0.1) * z)
    checkpoints.save_checkpoint(Path(folder, "checkpoint.pt"), {
        "settings": settings, "step": 1, **{name: net.state_dict() for name, net in nets.items()}})
    return nets


def alpha_bars(T: int) -> torch.Tensor:
    """ᾱ_0 … ᾱ_T: β in equal steps from 10⁻⁴ · 1000/T to 0.012 · 1000/T, which 0.999 limits."""
    beta = torch.linspace(0.1 / T, min(12 / T, 0.999), T, dtype=torch.float64)
    return torch.cat([torch.ones(1), (1 - beta).cumprod(0)]).double()


# ------------------------------------------------------------------------- what commands say and do

def assert_equal(a, b) -> None:
    """Nested dictionaries and lists of tensors, to the bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


@contextlib.contextmanager
def when_called(acts: dict):
    """acts[function](frame) at each call of it, before its first line; of a function in C the frame is
    that of the caller. Nothing is replaced: Python's profiler tells of the calls."""
    acts = {getattr(function, "__code__", function): act for function, act in acts.items()}

    def told(frame, event, what) -> None:
        act = acts.get(frame.f_code if event == "call" else what if event == "c_call" else None)
        if act:
            act(frame)
    sys.setprofile(told)
    try:
        yield
    finally:
        sys.setprofile(None)


@contextlib.contextmanager
def hooked(kind: type, hook, after: bool = False):
    """hook(module, inputs), or with `after` hook(module, inputs, output), which may return another
    output, at each call of each module of this kind."""
    modules = torch.nn.modules.module
    add = modules.register_module_forward_hook if after else modules.register_module_forward_pre_hook
    handle = add(lambda module, *rest: hook(module, *rest) if isinstance(module, kind) else None)
    try:
        yield
    finally:
        handle.remove()


def said(capsys) -> str:
    """The last line on stderr; there is no traceback."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def flags_of(main) -> set[str]:
    """The flags of a command: those that its --help lists."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["--help"]) == 0
    entries = re.findall(r"^  (-.*)", out.getvalue().split("\noptions:")[1], re.M)
    return {flag for entry in entries for flag in re.findall(r"(?:^|, )(--[a-z0-9-]+)", entry.split("  ")[0])}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def process(job, rank: int, place: str, pipe) -> None:
    """One of the two processes below."""
    os.environ["RANK"] = str(rank)  # as torchrun says it
    try:
        dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
        found = True, job(CPU._replace(rank=rank, world=2))
    except BaseException:
        found = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(found))
    if dist.is_initialized():  # a command that has failed has ended it
        dist.destroy_process_group()


def processes(job) -> list:
    """What job(machine) returns in each of two processes that exchange by gloo. They begin as copies of
    this one, so they have all that it has, and nothing that they change is changed here. (But after
    a gradient in this one torch takes none in its copies.)"""
    context, ends = multiprocessing.get_context("fork"), []
    with tempfile.TemporaryDirectory() as folder:
        for rank in (0, 1):
            here, there = context.Pipe(duplex=False)
            child = context.Process(target=process, args=(job, rank, f"{folder}/meet", there), daemon=True)
            child.start()
            there.close()
            ends.append((here, child))
        try:
            results = []
            for here, child in ends:
                assert here.poll(60), "a process does not answer"
                works, found = pickle.loads(here.recv_bytes())
                assert works, found
                results.append(found)
        finally:
            for _, child in ends:
                child.join(0 if sys.exc_info()[0] else 60)
                child.kill()
    return results


# ----------------------------------------------------------------------------------------- pictures

def decode_png(path) -> tuple[tuple[int, int], bytes, int]:
    """An independent decoder of 8-bit PNGs: (width, height), pixels, channels."""
    raw = Path(path).read_bytes()
    assert raw[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
    at, body, kinds = 8, b"", []
    while at < len(raw):
        n, = struct.unpack(">I", raw[at:at + 4])
        kind, content = raw[at + 4:at + 8], raw[at + 8:at + 8 + n]
        assert struct.unpack(">I", raw[at + 8 + n:at + 12 + n])[0] == zlib.crc32(kind + content)
        kinds.append(kind)
        if kind == b"IHDR":
            width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", content)
            assert depth == 8 and rest == [0, 0, 0]
        body += content if kind == b"IDAT" else b""
        at += 12 + n
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND"
    channels = {0: 1, 2: 3}[colour]
    lines, stride = zlib.decompress(body), 1 + width * channels
    assert len(lines) == height * stride
    pixels, above = [], bytes(stride - 1)
    for y in range(height):
        kind, *line = lines[y * stride:(y + 1) * stride]
        if kind == 2:  # as below, but at once
            line = [(byte + up) % 256 for byte, up in zip(line, above)]
        for i in range(len(line) if kind not in (0, 2) else 0):  # each byte has a prediction added, by its filter
            left, corner = (line[i - channels], above[i - channels]) if i >= channels else (0, 0)
            guess = left + above[i] - corner
            nearest = min((left, above[i], corner), key=lambda byte: abs(guess - byte))
            line[i] += (0, left, above[i], (left + above[i]) // 2, nearest)[kind]
            line[i] %= 256
        above = bytes(line)
        pixels.append(above)
    return (width, height), b"".join(pixels), channels


def read_png(path) -> torch.Tensor:
    """The pixels of a PNG: (C, H, W)."""
    (width, height), pixels, channels = decode_png(path)
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).int().view(height, width, channels).permute(2, 0, 1)


def cells(path, columns: int, k: int) -> torch.Tensor:
    """The cells of a picture, rows first: (N, C, 8, 8), enlarged by k before."""
    image = read_png(path)
    assert torch.equal(image, image[:, ::k, ::k].repeat_interleave(k, 1).repeat_interleave(k, 2))
    image = image[:, ::k, ::k]
    assert image.shape[2] == columns * SIDE
    return image.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE).permute(1, 2, 0, 3, 4).flatten(0, 1)


# ------------------------------------------------------------------------- a stand-in for Inception

class Inception(torch.nn.Module):
    """A stand-in with the original network's interface, for TorchScript."""

    def __init__(self, power: float = 1.0):
        super().__init__()
        self.power = power
        self.register_buffer("scale", torch.ones(3))

    def forward(self, img: torch.Tensor, return_features: bool = False,
                no_output_bias: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8 and img.size(1) == 3
        x = self.scale * (img.to(torch.float32).mean([2, 3]) / 255) ** self.power
        features = torch.cat([x, x * x, x[:, :1] * x[:, 1:2]], 1)
        if return_features:
            return features
        bias = torch.linspace(0, 0 if no_output_bias else 5, features.size(1), device=img.device)
        return torch.softmax(8 * features + bias, 1)


# --------------------------------------------------------------------------- a network of diffusers

CONFIG = {
    "_class_name": "UNet2DModel", "sample_size": 16, "in_channels": 3, "out_channels": 3,
    "block_out_channels": [32, 64], "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"], "layers_per_block": 1,
    "attention_head_dim": None, "norm_eps": 1e-6, "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "act_fn": "silu", "norm_num_groups": 32}


def layout(config: dict) -> dict[str, list[int]]:
    """A description of UNet2DModel's state: each tensor's name and shape, written out level by
    level."""
    shapes, widths = {}, config["block_out_channels"]
    n, c, time = config["layers_per_block"], config["in_channels"], 4 * widths[0]

    def layer(name, out, *rest):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [out, *rest], [out]

    def resnet(name, a, b):
        layer(f"{name}.norm1", a)
        layer(f"{name}.conv1", b, a, 3, 3)
        layer(f"{name}.time_emb_proj", b, time)
        layer(f"{name}.norm2", b)
        layer(f"{name}.conv2", b, b, 3, 3)
        if a != b:
            layer(f"{name}.conv_shortcut", b, a, 1, 1)

    def attention(name, a):
        layer(f"{name}.group_norm", a)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            layer(f"{name}.{part}", a, a)

    layer("conv_in", widths[0], c, 3, 3)
    layer("time_embedding.linear_1", time, widths[0])
    layer("time_embedding.linear_2", time, time)
    skips, a = [widths[0]], widths[0]
    for i, (kind, b) in enumerate(zip(config["down_block_types"], widths)):
        for j in range(n):
            resnet(f"down_blocks.{i}.resnets.{j}", a, b)
            a = b
            if kind.startswith("Attn"):
                attention(f"down_blocks.{i}.attentions.{j}", b)
            skips.append(b)
        if i < len(widths) - 1:
            layer(f"down_blocks.{i}.downsamplers.0.conv", b, b, 3, 3)
            skips.append(b)
    for j in range(2):
        resnet(f"mid_block.resnets.{j}", a, a)
    attention("mid_block.attentions.0", a)
    for i, (kind, b) in enumerate(zip(config["up_block_types"], reversed(widths))):
        for j in range(n + 1):
            resnet(f"up_blocks.{i}.resnets.{j}", a + skips.pop(), b)
            a = b
            if kind.startswith("Attn"):
                attention(f"up_blocks.{i}.attentions.{j}", b)
        if i < len(widths) - 1:
            layer(f"up_blocks.{i}.upsamplers.0.conv", b, b, 3, 3)
    layer("conv_norm_out", a)
    layer("conv_out", config["out_channels"], a, 3, 3)
    return shapes


def wave(name: str, shape: list[int]) -> torch.Tensor:
    """Weights by a closed formula: a sine whose phase is the name's checksum, scaled by fan-in."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    scale = (3 / math.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.5
    x = scale * torch.sin(1.7 * i + zlib.crc32(name.encode()) % 1000)
    return x.reshape(shape).float()


def golden_input() -> tuple[torch.Tensor, torch.Tensor]:
    i = torch.arange(2 * 3 * 16 * 16, dtype=torch.float64)
    return torch.sin(0.37 * i * (1 + i / 900)).reshape(2, 3, 16, 16).float(), torch.tensor([1, 700])


# What diffusers 0.42 (torch 2.13, float32, CPU) returns for these weights, times and images:
# the first two and the last value of each image, its mean and its mean square.
GOLDEN = [[0.409241, 0.44691, -0.375777, -0.069156, 0.166646],
          [0.371759, 0.470489, -0.449813, -0.069052, 0.178996]]


def state() -> dict[str, torch.Tensor]:
    return {name: wave(name, shape) for name, shape in layout(CONFIG).items()}


def outputs(net) -> torch.Tensor:
    """Per image: first, second and last value, mean, mean square."""
    with torch.no_grad():
        y = net(*golden_input()).flatten(1)
    return torch.stack([y[:, 0], y[:, 1], y[:, -1], y.mean(1), y.square().mean(1)], 1)
