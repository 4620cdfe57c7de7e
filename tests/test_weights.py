"""The layout of diffusers, in and out: what is read computes the same function there, and whatever
would be another function is refused."""
import contextlib
import functools
import inspect
import io
import json
import math
import os
import socket
import struct
import sys
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ddpm
import sample
import train
from support import checkpoint, data, weights
from support.machine import Machine
from unet import build_network

CPU = Machine(torch.device("cpu"), torch.float32)
CONFIG = {
    "_class_name": "UNet2DModel", "sample_size": 16, "in_channels": 3, "out_channels": 3,
    "block_out_channels": [32, 64], "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"], "layers_per_block": 1,
    "attention_head_dim": None, "norm_eps": 1e-6, "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "act_fn": "silu", "norm_num_groups": 32}
SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_start": 1e-4,
             "beta_end": 0.02, "beta_schedule": "linear", "variance_type": "fixed_large",
             "clip_sample": True, "prediction_type": "epsilon"}


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


def safetensors(tensors: dict[str, torch.Tensor]) -> bytes:
    """A file of safetensors, written by the definition of the format."""
    header, body = {}, b""
    for name, x in tensors.items():
        raw = b"".join(struct.pack("<f", v) for v in x.flatten().tolist())
        header[name] = {"dtype": "F32", "shape": list(x.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@functools.cache
def state_bytes() -> bytes:
    """A .bin file of these weights."""
    buffer = io.BytesIO()
    torch.save(state(), buffer)
    return buffer.getvalue()


def write(folder: Path, config=CONFIG, scheduler=SCHEDULER, nested: bool = True) -> Path:
    """The two configurations, in folders of their own or not."""
    for place, name, content in (("unet", "config.json", config),
                                 ("scheduler", "scheduler_config.json", scheduler)):
        path = folder / place / name if nested else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def folder(tmp_path):
    """A folder of diffusers with the network above."""
    write(tmp_path / "model")
    (tmp_path / "model" / "unet" / weights.MODEL[1]).write_bytes(state_bytes())
    return tmp_path / "model"


def outputs(net) -> torch.Tensor:
    """Per image: first, second and last value, mean, mean square."""
    with torch.no_grad():
        y = net(*golden_input()).flatten(1)
    return torch.stack([y[:, 0], y[:, 1], y[:, -1], y.mean(1), y.square().mean(1)], 1)


def loaded(path) -> checkpoint.Trained:
    return checkpoint.load(str(path), machine=CPU)


def refused(path, *parts) -> None:
    """Nothing is loaded from there, and a ValueError of one line names these."""
    with pytest.raises(ValueError) as error:
        loaded(path)
    assert "\n" not in str(error.value)
    for part in parts:
        assert str(part) in str(error.value)


# ------------------------------------------------------------------------------ the network, inwards

def test_golden_outputs_of_diffusers(folder):
    """The same function as UNet2DModel, weights loaded from its layout.

    Kills: a missing nonlinearity before the time projection, symmetric padding, another order."""
    trained = loaded(folder)
    torch.testing.assert_close(outputs(trained.net), torch.tensor(GOLDEN), rtol=1e-4, atol=1e-5)
    assert trained.settings["variance"] == "fixed_large" and trained.settings["attention"] == [16]
    assert trained.s.T == 1000 and abs(trained.s.betas[1000] - 0.02) < 1e-12
    assert trained.source == str(folder) and not trained.net.training


def test_every_form_of_the_layout_loads(folder, tmp_path):
    """Flat or nested, by the folder or by a file of weights in it, attention by its old names, numbers
    of fewer bits or a linear layer in place of a 1×1 convolution and the reverse."""
    want = outputs(loaded(folder).net)
    old = {k.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace(
        "to_out.0", "proj_attn"): v for k, v in state().items()}
    assert old.keys() != state().keys()
    flat = write(tmp_path / "flat", nested=False)
    torch.save(old, flat / weights.MODEL[1])
    (folder / "unet" / "other.bin").write_bytes(state_bytes())
    as_convolutions = {k: v[..., None, None] if "attentions" in k and v.dim() == 2 else v
                       for k, v in state().items()}
    torch.save(as_convolutions, flat / "convolutions.bin")
    for name in (flat, flat / weights.MODEL[1], flat / "convolutions.bin", folder / "unet",
                 folder / "unet" / weights.MODEL[1], folder / "unet" / "other.bin"):
        assert torch.equal(outputs(loaded(name).net), want), name
    torch.save({k: v.half() for k, v in state().items()}, flat / "half.bin")
    net = loaded(flat / "half.bin").net
    assert all(p.dtype == torch.float32 for p in net.parameters())
    torch.testing.assert_close(outputs(net), want, rtol=0.05, atol=0.01)


def test_safetensors_are_read_and_come_first(folder):
    """The same numbers as from a .bin file, which is not read where both are."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    want = outputs(loaded(folder).net)
    path = folder / "unet" / weights.MODEL[0]
    path.write_bytes(safetensors(state()))
    (folder / "unet" / weights.MODEL[1]).write_bytes(b"")
    for name in (folder, folder / "unet", path):
        assert torch.equal(outputs(loaded(name).net), want)
    for content in (b"", path.read_bytes()[:-1], b"\xff" * 100):
        path.write_bytes(content)
        refused(folder, path)


def test_without_safetensors_the_package_is_named(folder, tmp_path, monkeypatch):
    """An ImportError, of which `command` makes a line; a .bin file does not need the package."""
    monkeypatch.delitem(sys.modules, "safetensors.torch", raising=False)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    trained = loaded(folder)
    with pytest.raises(ImportError) as error:
        weights.export(trained.net, trained.settings, tmp_path / "out")
    assert error.value.name.startswith("safetensors") and not (tmp_path / "out").exists()
    (folder / "unet" / weights.MODEL[0]).write_bytes(safetensors(state()))
    with pytest.raises(ImportError) as error:
        loaded(folder)
    assert error.value.name.startswith("safetensors")


def test_a_missing_file_is_not_replaced_by_another(folder, monkeypatch):
    """Whoever names a file means this file.

    Kills: a mistyped name, for which the folder's usual file is loaded without a word."""
    for name in (folder / "unet" / "typo.bin", folder / "unet" / "typo"):
        refused(name, name)
    monkeypatch.chdir(write(folder, nested=False))
    (folder / weights.MODEL[1]).write_bytes(state_bytes())
    refused("typo", "typo")


def test_a_checkpoint_stays_one_beside_a_configuration(folder):
    """A .pt file is of train.py, whatever lies in its folder."""
    net, settings = weights.from_diffusers(folder)
    ema = {name: x + 1 for name, x in net.state_dict().items()}
    path = write(folder, nested=False) / "ema-0000007.pt"
    checkpoint.save_checkpoint(path, {"settings": settings, "step": 7, "ema": ema})
    trained = loaded(path)
    assert "step 7" in trained.source
    assert all(torch.equal(x, ema[name]) for name, x in trained.net.state_dict().items())


def test_no_network_is_built_that_the_file_cannot_hold(folder, monkeypatch):
    """Kills: a number in a configuration for which the machine computes until it has no memory."""
    monkeypatch.setattr(weights, "build_network", lambda _: pytest.fail("built"))
    write(folder, CONFIG | {"layers_per_block": 10 ** 9})
    refused(folder, "layers_per_block")


# Other networks of the family: the widths, blocks in a level, channels and the level that attends.
FAMILY = [([32, 64], 1, 3, 0), ([32, 32, 64], 3, 1, 1), ([64, 128, 128, 64], 2, 2, 3),
          ([128, 128, 256, 256, 512, 512], 2, 3, 4)]


def config_of(widths: list[int], blocks: int, channels: int, attending: int) -> dict:
    """The config.json of one that attends at 16×16."""
    kinds = ["DownBlock2D"] * len(widths)
    kinds[attending] = "AttnDownBlock2D"
    return {**CONFIG, "block_out_channels": widths, "layers_per_block": blocks,
            "in_channels": channels, "out_channels": channels, "down_block_types": kinds,
            "sample_size": 16 * 2 ** attending,
            "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)]}


@pytest.mark.parametrize("member", FAMILY)
def test_the_layers_of_both_layouts_are_in_one_to_one_correspondence(member):
    """Each layer of UNet2DModel has one name here, and there are no others; the shapes agree, but
    for the 1×1 convolutions in attention, which are linear layers there."""
    config = config_of(*member)
    settings = weights.settings_of(config, SCHEDULER)
    with torch.device("meta"):
        net = build_network(settings)
    names, ours, theirs = weights.names(net), net.state_dict(), layout(config)
    leaves = ("weight", "bias")
    assert len(set(names.values())) == len(names)
    assert {f"{name}.{leaf}" for name in names for leaf in leaves} == ours.keys()
    assert {f"{name}.{leaf}" for name in names.values() for leaf in leaves} == theirs.keys()
    for here, there in names.items():
        shape = list(ours[f"{here}.weight"].shape)
        assert (shape[:2] if ".attentions." in there else shape) == theirs[f"{there}.weight"]


def test_the_old_names_of_attention_are_the_current_ones():
    """They are renamed in attention only, and current names stay as they are."""
    old, new = ("query", "key", "value", "proj_attn"), ("to_q", "to_k", "to_v", "to_out.0")
    for a, b in zip(old, new):
        place, elsewhere = "up_blocks.10.attentions.2.", f"up_blocks.1.resnets.2.{a}.bias"
        assert weights.current_name(f"{place}{a}.bias") == f"{place}{b}.bias"
        assert weights.current_name(elsewhere) == elsewhere
    for name in layout(CONFIG):
        assert weights.current_name(name) == name


def test_wrong_weights_are_refused(folder):
    """Missing, surplus or misshapen: one line that names the tensor and the file."""
    path, good = folder / "unet" / weights.MODEL[1], state()
    square = "down_blocks.0.attentions.0.to_q.weight"
    for change, named in (
            ({"conv_in.bias": None}, "conv_in.bias"), ({square: None}, square),
            ({"extra": torch.zeros(2)}, "extra"), ({"conv_in.bias": torch.zeros(31)}, "conv_in.bias"),
            ({"conv_in.bias": torch.zeros(4, 8)}, "conv_in.bias"),
            ({square: torch.zeros(1024)}, square), ({"conv_out.bias": torch.tensor(1.0)}, "conv_out.bias"),
            ({"conv_in.weight": good["conv_in.weight"].transpose(0, 1)}, "conv_in.weight")):
        torch.save({k: v for k, v in (good | change).items() if v is not None}, path)
        refused(folder, path, named)
    for content in ([torch.ones(1)], {1: torch.ones(1)}, {"conv_in.bias": 1}, 3, None, "text", {}):
        torch.save(content, path)
        refused(folder, path)
    path.write_bytes(state_bytes()[:-100])
    refused(folder, path)
    path.unlink()
    refused(folder, weights.MODEL[0])


def test_weights_that_are_not_finite_are_refused(folder):
    """By name: a network with one of them makes images without a sense, and no error."""
    name = "up_blocks.1.resnets.0.conv1.weight"
    for bad in (math.nan, math.inf, -math.inf):
        changed = state()
        changed[name][3, 2, 1, 0] = bad
        torch.save(changed, folder / "unet" / weights.MODEL[1])
        refused(folder, name)


class Code:
    """A pickle that would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickled_code_is_run(folder, tmp_path, monkeypatch):
    """Nor where torch.load trusts every file unless it is told not to."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({**state(), "a": Code(tmp_path / "made")}, folder / "unet" / weights.MODEL[1])
    refused(folder, weights.MODEL[1])
    assert not (tmp_path / "made").exists()


# ------------------------------------------------------------------------------- the configurations

# What UNet2DModel and DDPMScheduler of diffusers 0.42 take where a file says nothing.
UNET_DEFAULTS = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0,
    "flip_sin_to_cos": True, "mid_block_type": "UNetMidBlock2D", "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896], "mid_block_scale_factor": 1,
    "downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0,
    "act_fn": "silu", "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None,
    "norm_eps": 1e-5, "resnet_time_scale_shift": "default", "add_attention": True,
    "class_embed_type": None, "num_class_embeds": None, "num_train_timesteps": None}
SCHEDULER_DEFAULTS = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "variance_type": "fixed_small", "clip_sample": True,
    "prediction_type": "epsilon", "thresholding": False, "dynamic_thresholding_ratio": 0.995,
    "clip_sample_range": 1.0, "sample_max_value": 1.0, "timestep_spacing": "leading",
    "steps_offset": 0, "rescale_betas_zero_snr": False}


READ = {"sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types",
        "layers_per_block", "block_out_channels"}       # entries that settings are read off
LEFT = {"dropout", "num_train_timesteps"}               # entries without effect on this network
NEEDED = {key: (UNET_DEFAULTS | CONFIG)[key] for key in UNET_DEFAULTS.keys() - READ - LEFT}
NEEDED_CHAIN = {key: SCHEDULER_DEFAULTS[key] for key in (
    "trained_betas", "thresholding", "clip_sample_range", "rescale_betas_zero_snr")}
JUNK = ["other", 8, 0.25, None, True, False, [1], UNET_DEFAULTS]


def read(config: dict, scheduler: dict = SCHEDULER):
    """The settings, or what is said in their place. Both files have passed through JSON."""
    try:
        return weights.settings_of(*json.loads(json.dumps([config, scheduler])))
    except Exception as error:
        return f"{type(error).__name__} {error}"


@pytest.mark.parametrize("key", sorted(NEEDED | NEEDED_CHAIN))
def test_an_entry_that_means_another_function_is_refused_by_name(key):
    """All entries of UNet2DModel and DDPMScheduler but those that settings are read off must have
    the one value with which they compute what is computed here.

    Kills: a network or a chain that is only approximated, an entry that nobody looks at."""
    needed, unet = (NEEDED | NEEDED_CHAIN)[key], key in NEEDED
    given, default = (CONFIG, UNET_DEFAULTS[key]) if unet else (SCHEDULER, SCHEDULER_DEFAULTS[key])
    assert read(*((given | {key: needed}, SCHEDULER) if unet else (CONFIG, given | {key: needed}))
                ) == read(CONFIG)
    bad = [value for value in [*JUNK, default] if value != needed]
    assert len(bad) >= len(JUNK) - 1
    for value in bad:
        changed = given | {key: value}
        said = read(changed) if unet else read(CONFIG, changed)
        assert said.startswith("ValueError") and key in said


@pytest.mark.parametrize("key, value", [
    ("out_channels", 5), ("in_channels", 1), ("sample_size", None), ("sample_size", [16, 16]),
    ("down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"]), ("down_block_types", None),
    ("down_block_types", ["DownBlock2D", "AttnDownBlock2D"]), ("down_block_types", ["DownBlock2D"]),
    ("up_block_types", ["UpBlock2D", "UpBlock2D"]), ("block_out_channels", [32, 48]),
    ("up_block_types", ["AttnUpBlock2D", "UpBlock2D"]), ("block_out_channels", [32, 64, 64]),
    ("block_out_channels", 32), ("block_out_channels", []), ("block_out_channels", [0, 0]),
    ("block_out_channels", [48, 96]), ("layers_per_block", "1"), ("layers_per_block", None),
    ("norm_eps", 1e-5)])
def test_another_architecture_is_refused(folder, key, value):
    """Widths, blocks, channels or attention that no settings give: the folder is named."""
    write(folder, CONFIG | {key: value})
    refused(folder, folder)


@pytest.mark.parametrize("change", [
    {"prediction_type": "v_prediction"}, {"beta_schedule": "squaredcos_cap_v2"},
    {"variance_type": "learned_range"}, {"trained_betas": [0.1]}, {"num_train_timesteps": "x"},
    {"beta_schedule": ["linear"]}, {"prediction_type": None}, {"variance_type": 1},
    {"beta_end": "x"}, {"beta_start": -1}, {"thresholding": True}, {"clip_sample_range": 2.0},
    {"num_train_timesteps": 0}, {"num_train_timesteps": -1000}, {"num_train_timesteps": 999.5},
    {"num_train_timesteps": 100}, {"beta_end": math.nan}, {"rescale_betas_zero_snr": True}])
def test_another_chain_is_refused(folder, change):
    """What the sampler here does not know, and 100 steps of the paper's β, which leave the image in
    x_T: the folder is named."""
    write(folder, CONFIG, SCHEDULER | change)
    refused(folder, folder)


def test_a_word_of_another_entry_is_refused():
    """A word that one entry may have is none for the others.

    Kills: a table of all words for all entries."""
    words = {"beta_schedule": ("linear", "scaled_linear"), "prediction_type": ("epsilon", "sample"),
             "variance_type": ("fixed_small", "fixed_large")}
    for key, good in words.items():
        for word in sum(words.values(), ()):
            assert isinstance(read(CONFIG, SCHEDULER | {key: word}), dict if word in good else str)


def test_files_that_are_no_configurations_are_named(folder):
    """Missing, no JSON, or no object. Without its scheduler a network says nothing of its chain."""
    for place in ("unet/config.json", "scheduler/scheduler_config.json"):
        path = folder / place
        good = path.read_bytes()
        for text in ("", "[]", "3", "null", "{", "[" * 100_000, "\x00"):
            path.write_text(text)
            refused(folder, folder)
        path.unlink()
        refused(folder, folder)
        path.write_bytes(good)
    assert loaded(folder).settings["channels"] == 32


@pytest.mark.parametrize("key", UNET_DEFAULTS)
def test_what_a_config_lacks_has_diffusers_default(key):
    """Without an entry, a config.json means what it means with diffusers' default for it, whether
    the network can then be built here or not. Only sizes are refused if they are missing."""
    lacking = {k: v for k, v in CONFIG.items() if k != key}
    with_default = read(CONFIG | {key: UNET_DEFAULTS[key]})
    if key in ("sample_size", "down_block_types", "up_block_types", "block_out_channels"):
        assert key in read(lacking)
    else:
        assert read(lacking) == with_default
        assert isinstance(with_default, dict) == (key not in (
            "freq_shift", "flip_sin_to_cos", "downsample_padding", "norm_eps", "attention_head_dim"))


@pytest.mark.parametrize("key", SCHEDULER_DEFAULTS)
def test_what_a_scheduler_lacks_has_diffusers_default(key):
    """The same for scheduler_config.json. An empty one is DDPMScheduler()."""
    other = {"num_train_timesteps": 1500, "beta_start": 2e-4, "beta_end": 0.05,
             "beta_schedule": "scaled_linear", "variance_type": "fixed_large", "clip_sample": False,
             "prediction_type": "sample"}
    lacking = {k: v for k, v in other.items() if k != key}
    said = read(CONFIG, {**other, key: SCHEDULER_DEFAULTS[key]})
    assert isinstance(said, dict) and read(CONFIG, lacking) == said
    assert (said != read(CONFIG, other)) == (key in other)
    assert read(CONFIG, {}) == {
        "in_channels": 3, "image_size": 16, "channels": 32, "dropout": 0.0, "blocks": 1,
        "multipliers": [1, 2], "attention": [16], "timesteps": 1000, "beta_start": 1e-4,
        "beta_end": 0.02, "clip": True, "schedule": "linear", "predict": "eps",
        "variance": "fixed_small"}


@pytest.mark.parametrize("T", [100, 1000, 4000])
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_schedules_are_those_of_diffusers(T, name):
    """β_1 … β_T of an imported chain: from beta_start to beta_end in equal steps of β, or of √β.

    diffusers does not rescale the ends for another T.
    Kills: ends multiplied by 1000/T, one schedule read as the other."""
    first, last = (0.02, 0.3) if T == 100 else (0.0015, 0.0195)
    settings = weights.settings_of(CONFIG, {"num_train_timesteps": T, "beta_start": first,
                                            "beta_end": last, "beta_schedule": name})
    power = 1 if name == "linear" else 2
    want = [(first ** (1 / power) + (last ** (1 / power) - first ** (1 / power)) * i / (T - 1)) ** power
            for i in range(T)]
    got = checkpoint.build_schedule(settings).betas[1:]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=0)


@st.composite
def settings_that_diffusers_has(draw) -> dict:
    """Settings of a run whose network and chain both sides know."""
    multipliers = [1, *draw(st.lists(st.integers(1, 5), max_size=4))]
    side = draw(st.integers(1, 40)) * 2 ** (len(multipliers) - 1)
    levels = [side // 2 ** level for level in range(len(multipliers))]
    return {"in_channels": draw(st.sampled_from([1, 3])), "image_size": side, "dropout": 0.0,
            "channels": 32 * draw(st.integers(1, 5)), "multipliers": multipliers,
            "blocks": draw(st.integers(1, 4)), "timesteps": draw(st.integers(100, 4000)),
            "attention": [level for level in levels if draw(st.booleans())],
            "schedule": draw(st.sampled_from(["linear", "quadratic"])),
            "beta_start": draw(st.floats(1e-5, 0.02)), "beta_end": draw(st.floats(0.03, 0.06)),
            "predict": draw(st.sampled_from(["eps", "x0"])), "clip": draw(st.booleans()),
            "variance": draw(st.sampled_from(["fixed_small", "fixed_large"]))}


@given(settings_that_diffusers_has())
def test_settings_and_configurations_are_inverse(settings):
    """Settings → configurations → settings is the identity, through JSON too; so no setting that
    matters is lost or exchanged on the way. The same the other way round."""
    configs = json.loads(json.dumps([weights.unet_config(settings), weights.scheduler_config(settings)]))
    back = weights.settings_of(*configs)
    for end in ("beta_start", "beta_end"):
        assert math.isclose(back.pop(end), settings[end], rel_tol=1e-9)
    assert {**back, "beta_start": settings["beta_start"], "beta_end": settings["beta_end"]} == settings
    assert weights.unet_config(back) == configs[0] and configs[0].keys() >= NEEDED.keys()


def test_the_scheduler_is_found_beside_the_weights_or_their_folder(folder, tmp_path):
    """Whatever of the layout is named, its scheduler counts."""
    write(folder, CONFIG, SCHEDULER | {"num_train_timesteps": 700})
    flat = write(tmp_path / "flat", CONFIG, SCHEDULER | {"num_train_timesteps": 800}, nested=False)
    (flat / weights.MODEL[1]).write_bytes(state_bytes())
    inner, outer = folder / "unet" / weights.MODEL[1], flat / weights.MODEL[1]
    for path, T in ((folder, 700), (folder / "unet", 700), (inner, 700), (flat, 800), (outer, 800)):
        assert weights.from_diffusers(path)[1]["timesteps"] == T


# ---------------------------------------------------------------------------------------- the hub

def model(server, name: str) -> str:
    """Puts a model without safetensors on the server, and returns its address there."""
    here = f"/{name}/resolve/main/"
    server.files.update({here + weights.MODEL[1]: state_bytes(),
                         here + "config.json": json.dumps(CONFIG).encode(),
                         here + "scheduler_config.json": json.dumps(SCHEDULER).encode()})
    return here


def test_hub_name(tmp_path, monkeypatch, server):
    """Each file is downloaded once, the .bin file where there is no safetensors. The chief does it,
    and the others wait for it."""
    here, order = model(server, "someone/model"), []
    monkeypatch.setattr(weights, "HUB", server.address)

    class Ranked(Machine):
        @contextlib.contextmanager
        def chief_first(self):
            order.append(len(server.asked))
            yield
            order.append(len(server.asked))
    for _ in range(2):
        trained = checkpoint.load("someone/model", tmp_path / "data", machine=Ranked(*CPU))
    assert server.asked == [here + name for name in ("config.json", "scheduler_config.json",
                                                     *weights.MODEL)]
    assert order == [0, 4, 4, 4]
    assert torch.equal(outputs(trained.net), outputs(loaded(tmp_path / "data/hub/someone/model").net))
    assert {path.name for path in (tmp_path / "data/hub/someone/model").iterdir()} == {
        "config.json", "scheduler_config.json", weights.MODEL[1]}


def test_a_model_with_safetensors_has_no_other_file_downloaded(tmp_path, monkeypatch, server):
    """Kills: both files of weights, or the one that runs code where it is not told not to."""
    here = model(server, "a/b")
    server.files[here + weights.MODEL[0]] = b"weights"
    monkeypatch.setattr(weights, "HUB", server.address)
    for _ in range(2):
        assert weights.download("a/b", tmp_path) == tmp_path / "a" / "b"
    assert server.asked == [here + name for name in ("config.json", "scheduler_config.json",
                                                     weights.MODEL[0])]
    assert (tmp_path / "a" / "b" / weights.MODEL[0]).read_bytes() == b"weights"


def test_a_failed_download_names_the_address_and_the_place(tmp_path, monkeypatch, server):
    """Only what is missing has a substitute: any other error ends the download.

    Kills: the .bin file taken because the connection broke."""
    here = model(server, "a/b")
    monkeypatch.setattr(weights, "HUB", server.address)
    for missing, error in ((weights.MODEL[0], 500), (weights.MODEL[1], 404), ("config.json", 404),
                           ("scheduler_config.json", 403)):
        before = server.files.get(here + missing)
        server.files[here + missing] = error
        with pytest.raises(OSError) as caught:
            checkpoint.load("a/b", tmp_path / missing, machine=CPU)
        assert server.address + here + missing in str(caught.value)
        assert str(tmp_path / missing / "hub" / "a" / "b" / missing) in str(caught.value)
        assert not list((tmp_path / missing).rglob("*.bin"))
        server.files[here + missing] = before or 404
    with socket.socket() as nobody:        # it has a port, and does not listen
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(weights, "HUB", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        place = tmp_path / "hub" / "some" / "other"
        for file in ("config.json", weights.MODEL[0]):
            with pytest.raises(OSError) as caught:
                checkpoint.load("some/other", tmp_path, machine=CPU)
            assert f"{weights.HUB}/some/other/resolve/main/{file}" in str(caught.value)
            assert str(place / file) in str(caught.value)
            write(place, nested=False)     # what is there is not asked for


@pytest.mark.parametrize("name", ["runs/nothere", "../x", "./x", "a/..", "../..", "a/b/c", "-", "a/",
                                  "someone/model.pt", "a b/c"])
def test_what_is_no_hub_name(tmp_path, monkeypatch, name):
    """A mistyped run and a name that leaves its folder are not looked up on the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(weights, "download", lambda *_: pytest.fail("looked up"))
    refused(name)


# ----------------------------------------------------------------------------------------- outwards

def needs_safetensors() -> None:
    """A skip where the package is not, which writing needs, and which writes with NumPy."""
    for package in ("safetensors", "numpy"):
        pytest.importorskip(package, reason=f"{package} is not installed")


def test_export_is_read_back(folder, tmp_path, capsys):
    """--export and load are inverse: the same function, schedule and choices; --init starts from
    it."""
    needs_safetensors()
    out = tmp_path / "out"
    flags = ["--device", "cpu", "--precision", "fp32"]
    assert sample.main(["--export", str(out), "--checkpoint", str(folder), *flags]) == 0
    assert str(out) in capsys.readouterr().err
    a, b = loaded(folder), loaded(out)
    assert torch.equal(outputs(a.net), outputs(b.net))
    assert a.settings == b.settings and torch.equal(a.s.betas, b.s.betas)

    torch.save(data.shapes(8, 16), tmp_path / "x.pt")
    flags += ["--dataset", str(tmp_path / "x.pt"), "--init", str(out), "--steps", "1", "--samples", "0",
              "--batch-size", "2"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    tuned = loaded(tmp_path / "run")
    assert tuned.model_settings == a.model_settings  # warm-up: lr is 0 at the first step
    torch.testing.assert_close(outputs(tuned.net), outputs(a.net))
    assert train.main([*flags, "--out", str(tmp_path / "other"), "--channels", "64"]) == 2
    assert "--init" in capsys.readouterr().err


CHOICES = {  # the settings of a network to export, which differ from the defaults of diffusers
    "image_size": 37, "in_channels": 1, "channels": 32, "multipliers": [1, 2, 2], "blocks": 1,
    "attention": [37, 9], "dropout": 0.1, "timesteps": 500, "schedule": "quadratic",
    "beta_start": 0.001, "beta_end": 0.02, "predict": "x0", "variance": "fixed_small", "clip": False}


EXPORTED = {  # and its config.json, apart from what all networks here have in common
    "sample_size": 37, "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 64, 64],
    "layers_per_block": 1, "dropout": 0.0,
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"]}


def test_every_entry_of_the_configurations():
    """All that the two classes would otherwise have a default for, if it matters.

    The ends of the schedule are those of the β_t themselves, which depend on T. A side that cannot
    be halved is rounded down, as in the network."""
    config = {**UNET_DEFAULTS, **CONFIG, **EXPORTED}
    del config["num_train_timesteps"], config["_class_name"]
    assert weights.unet_config(CHOICES) == config
    scheduler = weights.scheduler_config(CHOICES)
    assert abs(scheduler.pop("beta_start") - 0.002) < 1e-12
    assert abs(scheduler.pop("beta_end") - 0.04) < 1e-12
    assert scheduler == {
        "num_train_timesteps": 500, "trained_betas": None, "beta_schedule": "scaled_linear",
        "variance_type": "fixed_small", "clip_sample": False, "prediction_type": "sample",
        "thresholding": False, "clip_sample_range": 1.0, "rescale_betas_zero_snr": False}


def test_what_is_not_clipped_unless_told_so_and_a_constant_schedule_is_linear():
    """Settings of train.py say nothing of clipping. A constant β is a line that does not rise."""
    settings = {**CHOICES, "schedule": "constant", "beta_start": 0.01}
    del settings["clip"]
    found = weights.scheduler_config(settings)
    assert found["clip_sample"] is True and found["beta_schedule"] == "linear"
    assert found["beta_start"] == found["beta_end"] and abs(found["beta_end"] - 0.04) < 1e-12


def test_every_file_of_an_export(tmp_path):
    """The pipeline, the two configurations in lines that people can read, and the weights: names and
    shapes are those of UNet2DModel, and the numbers those of the network."""
    needs_safetensors()
    net = build_network(CHOICES).to(memory_format=torch.channels_last)
    for p in net.parameters():
        p.data.normal_()
    weights.export(net, CHOICES, tmp_path)
    texts = {p.relative_to(tmp_path).as_posix(): p.read_text() for p in tmp_path.rglob("*.json")}
    found = {name: json.loads(text) for name, text in texts.items()}
    for name, text in texts.items():
        assert text == json.dumps(found[name], indent=2) + "\n"
    assert found == {
        "unet/config.json": {"_class_name": "UNet2DModel", **weights.unet_config(CHOICES)},
        "scheduler/scheduler_config.json": {"_class_name": "DDPMScheduler",
                                            **weights.scheduler_config(CHOICES)},
        "model_index.json": {
            "_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"]}}
    raw = (tmp_path / "unet" / weights.MODEL[0]).read_bytes()
    length, = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}       # diffusers asks for it
    assert {name: entry["shape"] for name, entry in header.items()} == layout({**CONFIG, **EXPORTED})
    own = net.state_dict()
    for here, there in weights.names(net).items():
        for leaf in ("weight", "bias"):
            entry, x = header[f"{there}.{leaf}"], own[f"{here}.{leaf}"]
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            stored = torch.frombuffer(bytearray(raw[begin:end]), dtype=torch.float32)
            assert entry["dtype"] == "F32" and torch.equal(stored, x.flatten()), here


@pytest.mark.parametrize("change", [
    {"variance": "learned"}, {"predict": "mean"}, {"predict": "v"}, {"schedule": "cosine"},
    {"multipliers": [2, 4]}, {}])
def test_what_diffusers_has_not_is_not_exported(tmp_path, change):
    """A ValueError, and no folder. Nor is a network of one's own, whatever its settings."""
    needs_safetensors()
    settings = {**CHOICES, **change}
    net = torch.nn.Identity() if not change else build_network(settings | {"variance": "fixed_small"})
    with pytest.raises(ValueError):
        weights.export(net, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_does_not_go_into_the_folder_of_a_run(tmp_path):
    """What is there stays as it is.

    Kills: a run whose folder then stands for the exported network, however long it goes on."""
    needs_safetensors()
    (tmp_path / "checkpoint.pt").write_bytes(b"a run")
    with pytest.raises(ValueError):
        weights.export(build_network(CHOICES), CHOICES, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


# ------------------------------------------------------------------ against the installed package

def diffusers():
    """The package, or a skip: it is no dependency."""
    return pytest.importorskip("diffusers", reason="diffusers is not installed")


def test_the_stored_defaults_are_diffusers_own():
    """Every parameter of the two classes, so a new one is noticed."""
    diffusers()
    from diffusers import DDPMScheduler, UNet2DModel
    for stored, kind in ((UNET_DEFAULTS, UNet2DModel), (SCHEDULER_DEFAULTS, DDPMScheduler)):
        parameters = inspect.signature(kind.__init__).parameters.values()
        found = {p.name: p.default for p in parameters if p.name != "self"}
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()} == stored


SIZED = [
    (CONFIG, ((1, 16), (3, 16), (2, 24))),
    ({**CONFIG, "sample_size": 32, "block_out_channels": [64, 128, 128, 128], "layers_per_block": 2,
      "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
      "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]},
     ((1, 32), (2, 16), (1, 48))),
    ({**CONFIG, "sample_size": 256, "block_out_channels": [32, 32, 64, 64, 128, 128],
      "layers_per_block": 2, "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D",
                                                                      "DownBlock2D"],
      "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4}, ((1, 64),))]


@pytest.mark.parametrize("config, sizes", SIZED)
def test_diffusers_weights_load_here(tmp_path, config, sizes):
    """Random weights that diffusers saved give the same outputs, within 1e-5, in several sizes."""
    torch.manual_seed(0)
    theirs = diffusers().UNet2DModel(**{k: v for k, v in config.items() if k != "_class_name"}).eval()
    for p in theirs.parameters():
        p.data += 0.02 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path)
    diffusers().DDPMScheduler().save_pretrained(tmp_path)
    assert {k: list(v.shape) for k, v in theirs.state_dict().items()} == layout(config)
    ours = loaded(tmp_path).net
    for n, side in sizes:
        x, t = torch.randn(n, 3, side, side), torch.randint(1, 1001, (n,))
        with torch.no_grad():
            torch.testing.assert_close(ours(x, t), theirs(x, t - 1).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_diffusers_scheduler_steps_alike(monkeypatch, variance, prediction):
    """All 1000 steps of DDPMScheduler with the same noise: the same x_{t−1}, in float64, with the
    schedule and the choices that its configuration is read as."""
    theirs = diffusers().DDPMScheduler(variance_type=variance, prediction_type=prediction)
    settings = weights.settings_of(CONFIG, dict(theirs.config))
    theirs.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # theirs are float32
    theirs.alphas = 1 - theirs.betas
    theirs.alphas_cumprod = theirs.alphas.cumprod(0)
    trained = checkpoint.Trained(None, checkpoint.build_schedule(settings), settings, "")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for t in range(1000, 0, -1):
        z = torch.randn_like(x)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: z)
        out = torch.sin(3 * x)
        want = theirs.step(out, t - 1, x).prev_sample
        p = ddpm.p_mean_variance(trained.s, lambda *_: out, x, torch.full((2,), t), **trained.choices)
        x = ddpm.p_sample(p, z if t > 1 else 0 * z)
        torch.testing.assert_close(x, want, rtol=1e-7, atol=1e-7)


def test_diffusers_opens_what_is_exported(folder, tmp_path, monkeypatch):
    """DDPMPipeline.from_pretrained makes the same images from the same noise."""
    trained, out = loaded(folder), tmp_path / "out"
    DDPMPipeline = diffusers().DDPMPipeline
    weights.export(trained.net, trained.settings, out)
    pipe = DDPMPipeline.from_pretrained(str(out))
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    start, draws = torch.randn(2, 3, 16, 16), torch.randn(50, 2, 3, 16, 16)
    feed = iter(draws)
    monkeypatch.setattr("diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", lambda *a, **k: start)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(feed))
    images = torch.as_tensor(pipe(batch_size=2, num_inference_steps=50,
                                  output_type="np").images).permute(0, 3, 1, 2)
    # Fifty steps there are the times 0, 20, …, 980, counted from 0. The same chain here:
    alpha_bars = trained.s.alpha_bars
    tau = torch.cat([torch.tensor([0]), torch.arange(0, 1000, 20) + 1])
    alphas = torch.cat([alpha_bars[:1], alpha_bars[tau][1:] / alpha_bars[tau][:-1]])
    s, feed = ddpm.Schedule(1 - alphas, alphas, alpha_bars[tau], tau, trained.s), iter(draws)
    with torch.no_grad():
        *_, last = ddpm.p_sample_loop(s, trained.net, start, lambda t: next(feed), **trained.choices)
    torch.testing.assert_close((last.x_t.clamp(-1, 1) + 1) / 2, images, rtol=1e-3, atol=1e-3)
