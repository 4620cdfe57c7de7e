"""The diffusers layout, in and out, and the safetensors format, whose reader takes nothing on
trust."""
import inspect
import io
import json
import math
import struct
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


@pytest.fixture
def folder(tmp_path):
    """A diffusers folder of the layout above."""
    for place, name, content in (("unet", "config.json", CONFIG),
                                 ("scheduler", "scheduler_config.json", SCHEDULER)):
        (tmp_path / place).mkdir()
        (tmp_path / place / name).write_text(json.dumps(content))
    (tmp_path / "unet" / weights.MODEL[0]).write_bytes(safetensors(state()))
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


@pytest.mark.parametrize("key, value", [
    ("act_fn", "gelu"), ("attention_head_dim", 8), ("norm_eps", 1e-5), ("downsample_padding", 1),
    ("flip_sin_to_cos", True), ("freq_shift", 0), ("out_channels", 5), ("sample_size", None),
    ("down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"]), ("block_out_channels", [32, 48]),
    ("block_out_channels", 32), ("up_block_types", ["UpBlock2D", "UpBlock2D"])])
def test_another_architecture_is_refused(folder, key, value):
    """A config under which UNet2DModel is another function is refused by name, never
    approximated."""
    (folder / "unet" / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    with pytest.raises(ValueError, match="config.json"):
        sample.load(str(folder), "data", machine=CPU)


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
    {"variance_type": "learned_range"}, {"trained_betas": [0.1]}, {"num_train_timesteps": "x"}])
def test_another_schedule_is_refused(folder, change):
    """What the sampler here does not know is refused, with what it knows."""
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**SCHEDULER, **change}))
    with pytest.raises(ValueError, match="scheduler_config"):
        sample.load(str(folder), "data", machine=CPU)


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


# --------------------------------------------------------------------------- the safetensors format

def test_safetensors_round_trip(tmp_path):
    """Every type, empty and scalar tensors too, by our writer and our reader."""
    tensors = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    for i, dtype in enumerate(weights.DTYPES.values()):
        tensors[f"x{i}"] = torch.arange(-3, 4).to(dtype).reshape(1, 7)
    weights.write_safetensors(tmp_path / "x.safetensors", tensors)
    back = weights.read_safetensors(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for name, x in tensors.items():
        assert back[name].dtype == x.dtype and torch.equal(back[name], x), name


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


@pytest.mark.parametrize("header", [
    {"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}},                 # overlap
    {"a": ENTRY, "b": {**ENTRY, "data_offsets": [9, 17]}},                 # gap
    {"a": {**ENTRY, "shape": [3]}}, {"a": {**ENTRY, "shape": [-2]}}, {"a": {**ENTRY, "shape": 2}},
    {"a": {**ENTRY, "shape": [True, 2]}}, {"a": {**ENTRY, "dtype": "F8"}},
    {"a": {**ENTRY, "data_offsets": [8, 0]}}, {"a": {**ENTRY, "data_offsets": [0, 2 ** 70]}},
    {"a": {**ENTRY, "shape": [2 ** 62, 2 ** 62]}}, {"a": {"dtype": "F32"}}, {"a": []}, [], 3])
def test_safetensors_unsound_headers(tmp_path, header):
    """Overlaps, gaps, sizes that do not fit, unknown types: refused before a tensor is made."""
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match="no sound safetensors file"):
        weights.read_safetensors(path)
    path.write_bytes(struct.pack("<Q", 60) + b'{"a": 1, "a": 2}'.ljust(60))
    with pytest.raises(ValueError, match="twice"):
        weights.read_safetensors(path)


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
