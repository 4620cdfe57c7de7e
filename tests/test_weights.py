"""The diffusers layout, in and out, and the safetensors format, whose reader takes nothing on
trust."""
import functools
import inspect
import io
import json
import math
import os
import struct
import urllib.error
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import ddpm
import common
import sample
import train
import weights

CPU = common.Machine(torch.device("cpu"), torch.float32)
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
    """The format written by its definition, apart from the code's own writer."""
    header, body = {}, b""
    for name, x in tensors.items():
        raw = b"".join(struct.pack("<f", v) for v in x.flatten().tolist())
        header[name] = {"dtype": "F32", "shape": list(x.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@functools.cache
def state_file() -> bytes:
    return safetensors(state())


@pytest.fixture
def folder(tmp_path):
    """A diffusers folder of the layout above."""
    for place, name, content in (("unet", "config.json", CONFIG),
                                 ("scheduler", "scheduler_config.json", SCHEDULER)):
        (tmp_path / place).mkdir()
        (tmp_path / place / name).write_text(json.dumps(content))
    (tmp_path / "unet" / weights.MODEL[0]).write_bytes(state_file())
    return tmp_path


def outputs(net) -> torch.Tensor:
    """Per image: first, second and last value, mean, mean square."""
    with torch.no_grad():
        y = net(*golden_input()).flatten(1)
    return torch.stack([y[:, 0], y[:, 1], y[:, -1], y.mean(1), y.square().mean(1)], 1)


def test_golden_outputs_of_diffusers(folder):
    """The same function as UNet2DModel, weights loaded from its layout.

    Kills: a missing nonlinearity before the time projection, symmetric padding, another order."""
    trained = sample.load(str(folder), "data", machine=CPU)
    torch.testing.assert_close(outputs(trained.net.eval()), torch.tensor(GOLDEN), rtol=1e-4, atol=1e-5)
    assert trained.settings["variance"] == "fixed_large" and trained.settings["attention"] == [16]
    assert trained.schedule.T == 1000 and abs(trained.schedule.betas[1000] - 0.02) < 1e-12


def test_every_form_of_the_layout_loads(folder, tmp_path_factory):
    """Flat or nested, .safetensors or .bin, attention by its old names, and without a config."""
    want = outputs(sample.load(str(folder), "data", machine=CPU).net.eval())
    flat = tmp_path_factory.mktemp("flat")
    old = {k.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace(
        "to_out.0", "proj_attn"): v for k, v in state().items()}
    torch.save(old, flat / weights.MODEL[1])
    (flat / "config.json").write_text(json.dumps(CONFIG))
    bare = tmp_path_factory.mktemp("bare") / "model.safetensors"
    bare.write_bytes((folder / "unet" / weights.MODEL[0]).read_bytes())
    for name in (flat, flat / weights.MODEL[1], bare, folder / "unet"):
        trained = sample.load(str(name), "data", machine=CPU)
        assert torch.equal(outputs(trained.net.eval()), want), name


# Other networks of the family: the widths, blocks in a level, channels and the level that attends.
FAMILY = [([32, 64], 1, 3, 0), ([32, 32, 64], 3, 1, 1), ([64, 128, 128, 64], 2, 2, 3)]


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
    settings = weights.from_config(config, "config.json")
    with torch.device("meta"):
        net = common.build_network({**settings, "variance": "fixed_large"})
    names, ours, theirs = weights.names(net), net.state_dict(), layout(config)
    leaves = ("weight", "bias")
    assert len(set(names.values())) == len(names)
    assert {f"{name}.{leaf}" for name in names for leaf in leaves} == ours.keys()
    assert {f"{name}.{leaf}" for name in names.values() for leaf in leaves} == theirs.keys()
    for here, there in names.items():
        shape = list(ours[f"{here}.weight"].shape)
        assert (shape[:2] if ".attentions." in there else shape) == theirs[f"{there}.weight"]


@pytest.mark.parametrize("member", FAMILY)
def test_a_config_is_inferred_from_the_shapes(member):
    """If one level attends, at 16×16, the shapes determine every entry that matters."""
    config = config_of(*member)
    shapes = {name: torch.empty(shape, device="meta") for name, shape in layout(config).items()}
    found = weights.inferred(shapes, "file")
    for key in config.keys() - {"_class_name"}:
        assert found[key] == config[key], key
    assert weights.from_config(found, "file") == weights.from_config(config, "file")


def test_shapes_that_leave_a_choice_are_not_guessed(tmp_path):
    """Two levels that attend, none, or no first layer: ValueError that names the file."""
    two = {**CONFIG, "down_block_types": ["AttnDownBlock2D"] * 2,
           "up_block_types": ["AttnUpBlock2D"] * 2}
    none = {**CONFIG, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    headless = layout(CONFIG)
    del headless["conv_in.weight"]
    path = tmp_path / "x.safetensors"
    for shapes in (layout(two), layout(none), headless):
        path.write_bytes(safetensors({name: torch.zeros(1) for name in shapes}))
        with pytest.raises(ValueError) as error:
            weights.from_diffusers(path)
        assert str(path) in str(error.value)


def test_the_old_names_of_attention_are_the_current_ones():
    """They are renamed in attention only, and current names stay as they are."""
    old, new = ("query", "key", "value", "proj_attn"), ("to_q", "to_k", "to_v", "to_out.0")
    for a, b in zip(old, new):
        place, elsewhere = "up_blocks.10.attentions.2.", f"up_blocks.1.resnets.2.{a}.bias"
        assert weights.current_name(f"{place}{a}.bias") == f"{place}{b}.bias"
        assert weights.current_name(elsewhere) == elsewhere
    for name in layout(CONFIG):
        assert weights.current_name(name) == name


@pytest.mark.parametrize("key, value", [
    ("act_fn", "gelu"), ("attention_head_dim", 8), ("norm_eps", 1e-5), ("downsample_padding", 1),
    ("flip_sin_to_cos", True), ("freq_shift", 0), ("out_channels", 5), ("sample_size", None),
    ("down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"]), ("block_out_channels", [32, 48]),
    ("block_out_channels", 32), ("up_block_types", ["UpBlock2D", "UpBlock2D"])])
def test_another_architecture_is_refused(folder, key, value):
    """A config under which UNet2DModel is another function is refused by name, never
    approximated."""
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**CONFIG, key: value}))
    with pytest.raises(ValueError) as error:
        weights.from_diffusers(folder)
    assert str(error.value).startswith(str(file))


def test_settings_beyond_what_is_known_are_refused(folder):
    """The text names the folder that they are from."""
    (folder / "unet" / "config.json").write_text(json.dumps({**CONFIG, "layers_per_block": 99}))
    with pytest.raises(ValueError) as error:
        weights.from_diffusers(folder)
    assert str(error.value).startswith(str(folder))


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


def read(function, *arguments):
    """What it returns, or what it says."""
    try:
        return function(*arguments)
    except ValueError as error:
        return str(error)


def test_what_a_config_sets():
    """All settings of the network that it describes. Whole numbers stay whole."""
    config = {**CONFIG, **EXPORTED, "layers_per_block": 3}
    assert json.dumps(weights.from_config(config, "config.json"), sort_keys=True) == json.dumps({
        "attention": [37, 9], "blocks": 3, "channels": 32, "dropout": 0.0, "image_size": 37,
        "in_channels": 1, "multipliers": [1, 2, 2]})


@pytest.mark.parametrize("key", UNET_DEFAULTS)
def test_what_a_config_lacks_has_diffusers_default(key):
    """Without an entry, a config.json means what it means with diffusers' default for it; this is
    so whether the network can then be built here or not, and it can with all other entries."""
    lacking = {k: v for k, v in CONFIG.items() if k != key}
    said = read(weights.from_config, {**CONFIG, key: UNET_DEFAULTS[key]}, "config.json")
    assert read(weights.from_config, lacking, "config.json") == said
    assert isinstance(said, dict) == (key not in (
        "sample_size", "freq_shift", "flip_sin_to_cos", "downsample_padding", "norm_eps",
        "attention_head_dim", "down_block_types", "up_block_types", "block_out_channels"))
    blocks = {k: CONFIG[k] for k in ("sample_size", "freq_shift", "flip_sin_to_cos", "norm_eps",
                                     "downsample_padding", "attention_head_dim")}
    whole = weights.from_config(blocks, "config.json")   # widths and blocks by default
    assert whole["channels"] == 224 and whole["multipliers"] == [1, 2, 3, 4]
    assert whole["blocks"] == 2 and whole["in_channels"] == 3


@pytest.mark.parametrize("key", SCHEDULER_DEFAULTS)
def test_what_a_scheduler_lacks_has_diffusers_default(key):
    """The same for scheduler_config.json. An empty one is DDPMScheduler()."""
    other = {"num_train_timesteps": 500, "beta_start": 2e-4, "beta_end": 0.03,
             "beta_schedule": "scaled_linear", "variance_type": "fixed_large", "clip_sample": False,
             "prediction_type": "sample"}
    lacking = {k: v for k, v in other.items() if k != key}
    said = weights.from_scheduler({**other, key: SCHEDULER_DEFAULTS[key]})
    assert weights.from_scheduler(lacking) == said
    assert (said != weights.from_scheduler(other)) == (key in other)
    assert weights.from_scheduler({}) == {
        "timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": True,
        "schedule": "linear", "predict": "eps", "variance": "fixed_small"}


@pytest.mark.parametrize("T", [100, 1000, 4000])
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_schedules_are_those_of_diffusers(T, name):
    """β_1 … β_T of an imported chain: from beta_start to beta_end in equal steps of β, or of √β.

    diffusers does not rescale the ends for another T.
    Kills: ends multiplied by 1000/T, one schedule read as the other."""
    first, last = (0.02, 0.3) if T == 100 else (0.0015, 0.0195)
    settings = weights.from_scheduler({"num_train_timesteps": T, "beta_start": first,
                                       "beta_end": last, "beta_schedule": name})
    power = 1 if name == "linear" else 2
    want = [(first ** (1 / power) + (last ** (1 / power) - first ** (1 / power)) * i / (T - 1)) ** power
            for i in range(T)]
    got = common.build_schedule(settings).betas[1:]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("change", [
    {"prediction_type": "v_prediction"}, {"beta_schedule": "squaredcos_cap_v2"},
    {"variance_type": "learned_range"}, {"trained_betas": [0.1]}, {"num_train_timesteps": "x"},
    {"beta_schedule": ["linear"]}, {"prediction_type": None}, {"variance_type": 1},
    {"beta_end": "x"}, {"beta_start": -1}, {"clip_sample": 2}, {"thresholding": True},
    {"clip_sample_range": 2.0}, {"rescale_betas_zero_snr": True}])
def test_another_schedule_is_refused(change):
    """What the sampler here does not know is refused. The text begins with the file's name."""
    with pytest.raises(ValueError) as error:
        weights.from_scheduler({**SCHEDULER, **change})
    assert str(error.value).startswith("scheduler_config.json: ")


def test_the_scheduler_is_found_beside_the_weights_or_their_folder(folder, tmp_path_factory):
    """Whatever of the layout is named, its scheduler counts, and the file of weights is named."""
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**SCHEDULER, "num_train_timesteps": 500}))
    flat = tmp_path_factory.mktemp("flat")
    for place in ("unet", "scheduler"):
        for file in (folder / place).iterdir():
            (flat / file.name).write_bytes(file.read_bytes())
    inner, outer = folder / "unet" / weights.MODEL[0], flat / weights.MODEL[0]
    for path, file in ((folder, inner), (folder / "unet", inner), (inner, inner), (flat, outer),
                       (outer, outer)):
        _, settings, source = weights.from_diffusers(path)
        assert settings["timesteps"] == 500 and source == str(file)


@pytest.mark.parametrize("side, variance", [(254, "fixed_large"), (256, "fixed_small")])
def test_without_a_scheduler_the_chain_is_that_of_the_paper(folder, side, variance):
    """Its variance is fixed_large for images below 256×256, as that of the released models."""
    (folder / "scheduler" / "scheduler_config.json").unlink()
    (folder / "unet" / "config.json").write_text(json.dumps({**CONFIG, "sample_size": side}))
    settings = weights.from_diffusers(folder)[1]
    assert settings == {
        "in_channels": 3, "image_size": side, "channels": 32, "dropout": 0.0, "blocks": 1,
        "multipliers": [1, 2], "attention": [side], "timesteps": 1000, "beta_start": 1e-4,
        "beta_end": 0.02, "clip_sample": True, "schedule": "linear", "predict": "eps",
        "variance": variance}


def test_an_empty_scheduler_file_stands_for_its_defaults(folder):
    """DDPMScheduler's variance is fixed_small if its configuration does not name one."""
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    assert weights.from_diffusers(folder)[1]["variance"] == "fixed_small"


def test_memory_is_asked_for_before_it_is_taken(folder, monkeypatch):
    """A file needs three times its size, and a network two copies of its weights and outputs. The
    text of a refusal names the file."""
    asked = []
    monkeypatch.setattr(common, "require", lambda need, what, *_: asked.append((need, what)))
    file = folder / "unet" / weights.MODEL[0]
    net, *_ = weights.from_diffusers(folder)
    size = 4 * sum(p.numel() for p in net.parameters())
    (reading, what), (building, _) = asked
    assert reading == 3 * file.stat().st_size and str(file) in what
    outputs = 2 * 4 * 96 * 16 * 16 + 20_000    # the widest input of a block on the way up, twice
    assert building == 2 * size + outputs
    torch.save(state(), file.with_name(weights.MODEL[1]))
    asked.clear()
    weights.read_bin(file.with_name(weights.MODEL[1]))
    (reading, what), = asked
    assert reading == 3 * file.with_name(weights.MODEL[1]).stat().st_size
    assert str(file.with_name(weights.MODEL[1])) in what


def test_wrong_weights_are_refused(folder):
    """Missing, surplus, misshapen, not finite: one line that names the tensor."""
    path = folder / "unet" / weights.MODEL[0]
    good = state()
    for change, match in (
            (lambda s: s.pop("conv_in.bias"), "lacks conv_in.bias"),
            (lambda s: s.update(extra=torch.zeros(2)), "such as extra"),
            (lambda s: s.update({"conv_in.bias": torch.zeros(31)}), "conv_in.bias is"),
            (lambda s: s["conv_in.bias"].fill_(math.nan), "finite numbers")):
        bad = {k: v.clone() for k, v in good.items()}
        change(bad)
        path.write_bytes(safetensors(bad))
        with pytest.raises(ValueError, match=match):
            sample.load(str(folder), "data", machine=CPU)
    path.unlink()
    with pytest.raises(ValueError, match="neither"):
        sample.load(str(folder), "data", machine=CPU)
    lone = {k: v for k, v in good.items() if ".attentions" not in k}
    path.write_bytes(safetensors(lone))
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match="put its config.json beside it"):
        sample.load(str(path), "data", machine=CPU)


def test_hub_name(tmp_path, monkeypatch, server):
    """Downloaded once, .bin where there is no safetensors; without a network the files and the place
    are named."""
    buffer = io.BytesIO()
    torch.save(state(), buffer)
    here = "/someone/model/resolve/main/"
    server.files.update({here + weights.MODEL[1]: buffer.getvalue(),
                         here + "config.json": json.dumps(CONFIG).encode(),
                         here + "scheduler_config.json": json.dumps(SCHEDULER).encode()})
    monkeypatch.setattr(weights, "HUB", server.address)
    for _ in range(2):
        trained = sample.load("someone/model", tmp_path / "data", machine=CPU)
    assert server.asked == [here + name for name in ("config.json", "scheduler_config.json",
                                                     *weights.MODEL)]
    assert trained.settings["channels"] == 32
    server.files[here.replace("model", "page") + "config.json"] = b"<html>"
    with pytest.raises(OSError, match="not JSON.*put its files config.json.*hub/someone/page"):
        sample.load("someone/page", tmp_path / "data", machine=CPU)
    assert not list((tmp_path / "data" / "hub" / "someone").glob("page/*"))
    monkeypatch.setattr(weights, "HUB", "http://127.0.0.1:1")
    with pytest.raises(OSError, match="refused.*put its files config.json.*hub/some/other"):
        sample.load("some/other", tmp_path / "data", machine=CPU)


class Hub:
    """Takes the place of data.fetch. `answers`: by the name of a file, its bytes or an error."""

    def __init__(self, **answers):
        self.answers, self.asked = answers, []

    def __call__(self, address, path, check):
        self.asked.append(address)
        answer = self.answers[path.suffix[1:]]
        if isinstance(answer, Exception):
            raise OSError("outer") from answer
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(answer)
        check(path)


MISSING = urllib.error.HTTPError("", 404, "missing", None, None)


@pytest.mark.parametrize("first, asked", [
    (safetensors({"a": torch.ones(1)}), weights.MODEL[:1]), (MISSING, weights.MODEL)])
def test_a_download_fetches_each_file_once(tmp_path, monkeypatch, first, asked):
    """The second file of weights is asked for only if the first one is missing."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(1)}, buffer)
    hub = Hub(json=b"{}", safetensors=first, bin=buffer.getvalue())
    monkeypatch.setattr(data, "fetch", hub)
    for _ in range(2):
        target = weights.download("someone/model", tmp_path)
        names = ["config.json", "scheduler_config.json", *asked]
        assert hub.asked == [f"{weights.HUB}/someone/model/resolve/main/{name}" for name in names]
        assert target == tmp_path / "someone" / "model"
        assert {p.name for p in target.iterdir()} == {*names[:2], asked[-1]}


@pytest.mark.parametrize("change", [{"json": b"<html>"}, {"safetensors": b"<html>"},
                                    {"safetensors": MISSING, "bin": b"<html>"}])
def test_every_download_is_checked(tmp_path, monkeypatch, change):
    """A page in place of a file is not taken for the file."""
    sound = safetensors({"a": torch.ones(1)})
    monkeypatch.setattr(data, "fetch", Hub(**{"json": b"{}", "safetensors": sound, **change}))
    with pytest.raises(ValueError):
        weights.download("someone/model", tmp_path)


@pytest.mark.parametrize("cause, said", [
    (urllib.error.HTTPError("", 500, "broken", None, None), "broken"),
    (urllib.error.URLError("refused"), "refused"), (TimeoutError(), "outer"), (MISSING, "missing")])
def test_a_failed_download_tells_the_reason_and_the_place(tmp_path, monkeypatch, cause, said):
    """The reason is that of the network, or else the error's own text."""
    hub = Hub(json=b"{}", safetensors=cause, bin=cause)
    monkeypatch.setattr(data, "fetch", hub)
    with pytest.raises(OSError) as error:
        weights.download("someone/model", tmp_path)
    assert said in str(error.value) and str(tmp_path / "someone" / "model") in str(error.value)
    assert len(hub.asked) == (4 if cause is MISSING else 3)


def test_what_is_no_hub_name(tmp_path, monkeypatch):
    """A mistyped run and a name that leaves its folder are not looked up on the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(weights, "download", lambda *_: pytest.fail("looked up"))
    for name in ("runs/nothere", "../x", "./x", "a/..", "a/b/c", "-"):
        with pytest.raises(ValueError, match="no checkpoint"):
            sample.load(name, machine=CPU)


def test_export_is_read_back(folder, tmp_path, capsys):
    """--export and load are inverse: the same function, schedule and choices; --init starts from
    it."""
    out = tmp_path / "out"
    assert weights.main(["--export", str(out), "--checkpoint", str(folder)]) == 0
    a, b = (sample.load(str(f), "data", machine=CPU) for f in (folder, out))
    assert torch.equal(outputs(a.net), outputs(b.net))
    assert a.settings == b.settings and torch.equal(a.schedule.betas, b.schedule.betas)
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    header = (out / "unet" / weights.MODEL[0]).read_bytes()
    assert struct.unpack("<Q", header[:8])[0] % 8 == 0

    torch.save(data.shapes(8, 16), tmp_path / "x.pt")
    flags = ["--dataset", str(tmp_path / "x.pt"), "--init", str(out), "--steps", "1", "--out",
             str(tmp_path / "run"), "--batch-size", "2", "--samples", "0", "--device", "cpu"]
    assert train.main(flags) == 0
    tuned = sample.load(tmp_path / "run", machine=CPU)
    assert tuned.model_settings == a.model_settings  # warm-up: lr is 0 at the first step
    torch.testing.assert_close(outputs(tuned.net.eval()), outputs(a.net.eval()))
    assert train.main([*flags[:-6], "--out", str(tmp_path / "other"), "--channels", "64",
                       "--steps", "1"]) == 2
    assert sample.main(["--checkpoint", str(out), "--n", "1", "--steps", "3", "--out",
                        str(tmp_path / "x.png")]) == 0
    for change in ({"variance": "learned"}, {"predict": "mean"}, {"predict": "v"},
                   {"schedule": "cosine"}, {"multipliers": [2, 4]}):
        with pytest.raises(ValueError, match="cannot be exported"):
            weights.export(a.net, {**a.settings, **change}, out)


CHOICES = {  # the settings of a network to export, which differ from the defaults of diffusers
    "image_size": 37, "in_channels": 1, "channels": 32, "multipliers": [1, 2, 2], "blocks": 1,
    "attention": [37, 9], "dropout": 0.1, "timesteps": 500, "schedule": "quadratic",
    "beta_start": 0.001, "beta_end": 0.02, "predict": "x0", "variance": "fixed_small",
    "clip_sample": False}


EXPORTED = {  # and its config.json, apart from what all networks here have in common
    "sample_size": 37, "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 64, 64],
    "layers_per_block": 1, "dropout": 0.0,
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"]}


def test_every_entry_of_an_export(tmp_path):
    """The three files that describe the pipeline, entry by entry, in lines that people can read.

    The ends of the schedule are those of the β_t themselves, which depend on T. A side that cannot
    be halved is rounded down, as in the network."""
    weights.export(common.build_network(CHOICES), CHOICES, tmp_path)
    texts = {p.relative_to(tmp_path).as_posix(): p.read_text() for p in tmp_path.rglob("*.json")}
    found = {name: json.loads(text) for name, text in texts.items()}
    for name, text in texts.items():
        assert text == json.dumps(found[name], indent=2) + "\n"
    scheduler = found["scheduler/scheduler_config.json"]
    assert abs(scheduler.pop("beta_start") - 0.002) < 1e-12
    assert abs(scheduler.pop("beta_end") - 0.04) < 1e-12
    config = {**UNET_DEFAULTS, **CONFIG, **EXPORTED}
    del config["num_train_timesteps"]  # it is for networks of another time embedding
    assert found == {
        "unet/config.json": config,
        "scheduler/scheduler_config.json": {
            "_class_name": "DDPMScheduler", "num_train_timesteps": 500, "trained_betas": None,
            "beta_schedule": "scaled_linear", "variance_type": "fixed_small", "clip_sample": False,
            "prediction_type": "sample", "thresholding": False, "clip_sample_range": 1.0,
            "timestep_spacing": "leading", "steps_offset": 0, "rescale_betas_zero_snr": False},
        "model_index.json": {
            "_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"]}}


def test_every_tensor_of_an_export(tmp_path):
    """Its names and shapes are those of UNet2DModel, and its numbers those of the network."""
    net = common.build_network(CHOICES)
    weights.export(net, CHOICES, tmp_path)
    tensors, own = weights.read_safetensors(tmp_path / "unet" / weights.MODEL[0]), net.state_dict()
    assert {name: list(x.shape) for name, x in tensors.items()} == layout({**CONFIG, **EXPORTED})
    for here, there in weights.names(net).items():
        for leaf in ("weight", "bias"):
            x = own[f"{here}.{leaf}"]
            assert torch.equal(tensors[f"{there}.{leaf}"].reshape(x.shape), x), here


def test_an_export_clips_unless_told_not_to_and_a_constant_schedule_is_linear(tmp_path):
    """Settings of train.py say nothing of clipping. A constant β is a line that does not rise."""
    settings = {**CHOICES, "schedule": "constant", "beta_start": 0.01}
    del settings["clip_sample"]
    weights.export(common.build_network(CHOICES), settings, tmp_path)
    found = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert found["clip_sample"] is True and found["beta_schedule"] == "linear"
    assert found["beta_start"] == found["beta_end"]


def test_an_export_does_not_go_into_the_folder_of_a_run(tmp_path):
    """What is there stays as it is."""
    (tmp_path / "checkpoint.pt").write_bytes(b"a run")
    with pytest.raises(ValueError):
        weights.export(None, CHOICES, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


# ------------------------------------------------------------------------- files of another kind

class Code:
    """A pickle that would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickled_code_is_run(tmp_path):
    torch.save({"a": Code(tmp_path / "made")}, tmp_path / "x.bin")
    with pytest.raises(ValueError):
        weights.read_weights(tmp_path / "x.bin")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [
    [torch.ones(1)], {1: torch.ones(1)}, {"a": 1}, {"a": torch.ones(1), "b": [1]}, 3, None])
def test_a_bin_file_must_be_a_dictionary_of_tensors(tmp_path, content):
    path = tmp_path / "x.bin"
    torch.save(content, path)
    with pytest.raises(ValueError) as error:
        weights.read_weights(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("bad", [
    torch.ones(2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.int64),
    torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.complex64), torch.ones(1).expand(2),
    torch.tensor([1.0, math.nan]), torch.tensor([-math.inf]), torch.tensor([math.inf]).half()])
def test_weights_are_plain_tensors_of_finite_numbers(tmp_path, bad):
    """Others in a .bin file are refused by name. A view whose storage is not larger is plain."""
    path, good = tmp_path / "x.bin", torch.arange(6.0).reshape(2, 3).T
    torch.save({"good": good, "half": good.half()}, path)
    assert torch.equal(weights.read_weights(path)["good"], good)
    torch.save({"good": good, "bad": bad, "half": good.half()}, path)
    with pytest.raises(ValueError) as error:
        weights.read_weights(path)
    assert str(path) in str(error.value) and "bad" in str(error.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_not_plain(tmp_path):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(ValueError, match="bad"):
        weights.finite({"bad": nested}, tmp_path)


def test_averages_of_train_py_are_finite_too(tmp_path):
    """A file with the metadata of --keep is judged as other weights are."""
    about = {"ddpm": json.dumps({"settings": {}, "step": 1})}
    weights.write_safetensors(tmp_path / "x.safetensors", {"bad": torch.tensor([math.nan])}, about)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample.common, "judged", lambda *_: None)
        with pytest.raises(ValueError, match="bad"):
            sample.kept_weights(tmp_path / "x.safetensors", None)


def test_read_json_takes_an_object_or_nothing(tmp_path):
    """None if there is no file; ValueError that names it for anything but an object."""
    path = tmp_path / "x.json"
    assert weights.read_json(path) is None
    path.write_text('{"a": [1]}')
    assert weights.read_json(path) == {"a": [1]}
    for text in ("", "[]", "3", "null", "{", "[" * 100_000, "\x00"):
        path.write_text(text)
        with pytest.raises(ValueError) as error:
            weights.read_json(path)
        assert str(path) in str(error.value)
    with pytest.raises(ValueError):
        weights.read_json(tmp_path)


# --------------------------------------------------------------------------- the safetensors format

def test_safetensors_round_trip(tmp_path):
    """Every type, empty and scalar tensors too, by our writer and our reader."""
    tensors = {"scalar": torch.tensor(2.5)}
    for i, dtype in enumerate(weights.DTYPES.values()):
        tensors[f"empty{i}"] = torch.zeros(0, 3, dtype=dtype)
        tensors[f"x{i}"] = torch.arange(-3, 4).to(dtype).reshape(1, 7)
    weights.write_safetensors(tmp_path / "x.safetensors", tensors)
    back = weights.read_safetensors(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for name, x in tensors.items():
        assert back[name].dtype == x.dtype and back[name].shape == x.shape, name
        assert torch.equal(back[name], x), name


def test_a_written_file_is_ordered_aligned_and_holds_the_metadata(tmp_path):
    """Large types come first, then names in order, so that each tensor lies at a multiple of its
    type's size. The header is filled up with spaces, and says that the tensors are PyTorch's."""
    path = tmp_path / "x.safetensors"
    tensors = {"d": torch.ones(3, dtype=torch.float16), "c": torch.ones(1), "b": torch.ones(3),
               "e": torch.ones(3, dtype=torch.float64), "a": torch.ones(1, dtype=torch.bfloat16)}
    weights.write_safetensors(path, tensors, {"who": "we"})
    raw = path.read_bytes()
    length, = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + length])
    assert length % 8 == 0 and raw[8:8 + length].rstrip(b" ").endswith(b"}")
    metadata = header.pop("__metadata__")
    assert metadata == weights.read_header(path)[1] == {"format": "pt", "who": "we"}
    assert list(header) == ["e", "b", "c", "a", "d"]
    assert [entry["data_offsets"] for entry in header.values()] == [
        [0, 24], [24, 36], [36, 40], [40, 42], [42, 48]]
    weights.write_safetensors(path, tensors)
    assert weights.read_header(path)[1] == {"format": "pt"}


SOUND = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@given(st.integers(0, 10 ** 6), st.integers(0, 255), st.sampled_from(["byte", "cut", "grow"]))
def test_safetensors_corrupted(tmp_path_factory, where, value, how):
    """Any byte of the header changed, cut anywhere, anything appended: an error, or the same
    shapes.

    A changed byte of the names or of the data cannot be noticed; a wrong size can, always."""
    good = safetensors(SOUND)
    raw = bytearray(good)
    if how == "byte":
        raw[where % len(raw)] = value
    elif how == "cut":
        raw = raw[:where % len(raw)]
    else:
        raw += bytes([value]) * (1 + where % 9)
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    path.write_bytes(raw)
    try:
        tensors = weights.read_safetensors(path)
    except ValueError as error:
        assert "no sound safetensors file" in str(error) and "\n" not in str(error)
    else:
        assert how == "byte" and sum(x.nbytes for x in tensors.values()) == 40
        length = struct.unpack("<Q", good[:8])[0]
        if where % len(raw) >= 8 + length and list(tensors) == ["a", "b"]:
            assert tensors["a"].shape == (2, 3)


@given(st.dictionaries(st.text(max_size=3), st.recursive(
    st.none() | st.integers() | st.text(max_size=3) | st.sampled_from(["F32", "I8"]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets"]), x, max_size=3), max_leaves=8), max_size=3))
def test_safetensors_any_header(tmp_path_factory, header):
    """Whatever JSON the header is: ValueError or tensors that fill the file exactly, never a
    crash."""
    text = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    try:
        tensors = weights.read_safetensors(path)
    except ValueError as error:
        assert "no sound safetensors file" in str(error)
    else:
        assert sum(x.nbytes for x in tensors.values()) == 8


def file_of(path, header, body: bytes = b"", length: int | None = None):
    """Writes a safetensors file: the header, as JSON if it is no text yet, and its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def reason(path) -> str:
    """What is said of an unsound file after its name: something, and in one line."""
    with pytest.raises(ValueError) as error:
        weights.read_safetensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    said = str(error.value).partition("file: ")[2]
    assert len(said.split()) > 2
    return said


@pytest.mark.parametrize("entry", [
    {"dtype": "F32"}, {"dtype": "F32", "shape": [2]}, {**ENTRY, "more": 1}, [], 3,
    {**ENTRY, "dtype": "I8"}, {**ENTRY, "dtype": ["F32"]}, {**ENTRY, "dtype": None},
    {**ENTRY, "shape": 2}, {**ENTRY, "shape": [3]}, {**ENTRY, "shape": [2.0]},
    {**ENTRY, "shape": [True, 2]}, {**ENTRY, "shape": [-2]}, {**ENTRY, "shape": [-1, -2]},
    {**ENTRY, "shape": [1] * 8 + [2]}, {**ENTRY, "shape": [2 ** 62, 2 ** 62]},
    {**ENTRY, "shape": [0, 2 ** 63], "data_offsets": [0, 0]},
    {**ENTRY, "shape": [0, 2 ** 62, 2 ** 62], "data_offsets": [0, 0]},
    {**ENTRY, "data_offsets": None}, {**ENTRY, "data_offsets": []}, {**ENTRY, "data_offsets": [0]},
    {**ENTRY, "data_offsets": [0, 8, 8]}, {**ENTRY, "data_offsets": [0, 7]},
    {**ENTRY, "data_offsets": [8, 0]}, {**ENTRY, "data_offsets": [-8, 0]},
    {**ENTRY, "data_offsets": [0, 2 ** 70]}])
def test_an_unsound_entry_is_refused_by_the_name_of_its_tensor(tmp_path, entry):
    """Missing or surplus parts, unknown types, sizes that do not fit: no tensor is made."""
    path = file_of(tmp_path / "x.safetensors", {"one tensor": entry}, bytes(8))
    assert "one tensor" in reason(path)


def placed(*begins: int) -> dict:
    """A header of tensors of 8 bytes that begin there."""
    return {str(i): {**ENTRY, "data_offsets": [b, b + 8]} for i, b in enumerate(begins)}


@pytest.mark.parametrize("header, size", [
    (b"", 0), (b"{", 0), (b"\xff", 0), (b"[" * 100_000, 0), ([], 0), (3, 0), ({}, 1),  # no object
    (b'{"a": %b, "a": %b}' % (2 * (json.dumps(ENTRY).encode(),)), 8),                 # names twice
    (b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', 8),
    (placed(0), 7), (placed(0), 9), (placed(8), 8), (placed(8), 16), (placed(0, 9), 17),  # gaps
    (placed(0, 0), 8), (placed(0, 0), 16), (placed(0, 4), 12), (placed(0, 4), 16)])  # overlaps
def test_an_unsound_file_is_refused_with_a_reason(tmp_path, header, size):
    assert reason(file_of(tmp_path / "x.safetensors", header, bytes(size)))


def test_the_header_may_fill_the_file_but_not_more(tmp_path):
    """A length beyond the file is refused, also where it is negative as a signed number. So is a
    file that is too short for a length."""
    path, text = tmp_path / "x.safetensors", json.dumps({"a": ENTRY}).encode()
    assert weights.read_safetensors(file_of(path, b"{}")) == {}
    for length in (3, 2 ** 63, 2 ** 64 - 1):
        assert reason(file_of(path, b"{}", length=length))
    # As a signed number this length leaves the last 8 bytes to the tensor.
    assert reason(file_of(path, text, bytes(8), length=2 ** 64 - 16))
    for size in range(8):
        path.write_bytes(bytes(size))
        assert reason(path)


def test_a_header_beyond_100_million_bytes_is_refused(tmp_path, monkeypatch):
    path, size = file_of(tmp_path / "x.safetensors", b"{}"), 100_000_001
    raw = struct.pack("<Q", size) + b"{}".ljust(size)
    monkeypatch.setattr(type(path), "read_bytes", lambda _: raw)
    assert reason(path)


@pytest.mark.parametrize("shape", [[], [0], [2], [1] * 7 + [2], [0, 2 ** 31], [2, 0, 3]])
def test_shapes_up_to_eight_dimensions_are_read(tmp_path, shape):
    """Their tensors may stand in the header in another order than in the file."""
    body = struct.pack(f"<{math.prod(shape) + 1}f", *range(math.prod(shape) + 1))
    last = {"dtype": "F32", "shape": [1], "data_offsets": [len(body) - 4, len(body)]}
    first = {"dtype": "F32", "shape": shape, "data_offsets": [0, len(body) - 4]}
    path = file_of(tmp_path / "x.safetensors", {"last": last, "first": first}, body)
    tensors = weights.read_safetensors(path)
    assert list(tensors["first"].shape) == shape and tensors["last"].tolist() == [math.prod(shape)]
    assert tensors["first"].flatten().tolist() == list(range(math.prod(shape)))


@pytest.mark.parametrize("metadata, found", [
    ({}, {}), ({"a": "b"}, {"a": "b"}), (3, {}), (None, {})])
def test_metadata_is_an_object_or_nothing(tmp_path, metadata, found):
    path = file_of(tmp_path / "x.safetensors", {"__metadata__": metadata, "a": ENTRY}, bytes(8))
    tensors, said = weights.read_header(path)
    assert said == found and tensors.keys() == {"a"}
    assert weights.read_header(file_of(path, {"a": ENTRY}, bytes(8)))[1] == {}


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


@pytest.mark.parametrize("config, sizes", [
    (CONFIG, ((1, 16), (3, 16), (2, 24))),
    ({**CONFIG, "sample_size": 32, "block_out_channels": [128, 256, 256, 256], "layers_per_block": 2,
      "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
      "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]},
     ((1, 32), (2, 16), (1, 48))),
    ({**CONFIG, "sample_size": 256, "block_out_channels": [128, 128, 256, 256, 512, 512],
      "layers_per_block": 2, "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D",
                                                                      "DownBlock2D"],
      "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4}, ((1, 64),))])
def test_diffusers_weights_load_here(tmp_path, config, sizes):
    """Random weights that diffusers saved give the same outputs, within 1e-5, in several sizes."""
    torch.manual_seed(0)
    theirs = diffusers().UNet2DModel(**{k: v for k, v in config.items() if k != "_class_name"}).eval()
    for p in theirs.parameters():
        p.data += 0.02 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path)
    assert {k: list(v.shape) for k, v in theirs.state_dict().items()} == layout(config)
    ours = sample.load(str(tmp_path), "data", machine=CPU).net.eval()
    for n, side in sizes:
        x, t = torch.randn(n, 3, side, side), torch.randint(1, 1001, (n,))
        with torch.no_grad():
            torch.testing.assert_close(ours(x, t), theirs(x, t - 1).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("predict", ["eps", "x0"])
def test_diffusers_scheduler_steps_alike(monkeypatch, variance, predict):
    """All 1000 steps of DDPMScheduler with the same noise: the same x_{t−1}, in float64."""
    kinds = {v: k for k, v in weights.PREDICTS.items()}
    theirs = diffusers().DDPMScheduler(variance_type=variance, prediction_type=kinds[predict])
    theirs.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # theirs are float32
    theirs.alphas = 1 - theirs.betas
    theirs.alphas_cumprod = theirs.alphas.cumprod(0)
    s, x = ddpm.make_schedule(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for t in range(1000, 0, -1):
        z = torch.randn_like(x)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: z)
        out = torch.sin(3 * x)
        want = theirs.step(out, t - 1, x).prev_sample
        p = ddpm.p_mean_variance(s, lambda *_: out, x, torch.full((2,), t), predict, variance)
        x = ddpm.p_sample(p, z if t > 1 else 0 * z)
        torch.testing.assert_close(x, want, rtol=1e-7, atol=1e-7)


def test_diffusers_opens_what_is_exported(folder, tmp_path, monkeypatch):
    """DDPMPipeline.from_pretrained makes the same images from the same noise."""
    out = tmp_path / "out"
    weights.main(["--export", str(out), "--checkpoint", str(folder)])
    pipe = diffusers().DDPMPipeline.from_pretrained(str(out))
    pipe.set_progress_bar_config(disable=True)
    trained = sample.load(str(out), "data", machine=CPU)
    start, draws = torch.randn(2, 3, 16, 16), torch.randn(50, 2, 3, 16, 16)
    feed = iter(draws)
    monkeypatch.setattr("diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", lambda *a, **k: start)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(feed))
    images = torch.as_tensor(pipe(batch_size=2, num_inference_steps=50,
                                  output_type="np").images).permute(0, 3, 1, 2)
    # Fifty steps there are the times 0, 20, …, 980, counted from 0. The same chain here:
    alpha_bars = trained.schedule.alpha_bars
    tau = torch.cat([torch.tensor([0]), torch.arange(0, 1000, 20) + 1])
    alphas = torch.cat([alpha_bars[:1], alpha_bars[tau][1:] / alpha_bars[tau][:-1]])
    s, feed = ddpm.Schedule(1 - alphas, alphas, alpha_bars[tau], tau, trained.schedule), iter(draws)
    with torch.no_grad():
        *_, last = ddpm.p_sample_loop(s, trained.net.eval(), start, lambda t: next(feed),
                                      **trained.choices)
    torch.testing.assert_close((last.x_t.clamp(-1, 1) + 1) / 2, images, rtol=1e-3, atol=1e-3)
