"""Weights in the layout of the library diffusers, in and out, and the safetensors format.

    python sample.py --checkpoint google/ddpm-cifar10-32          the authors' weights, converted
    python weights.py --export FOLDER --checkpoint runs/cifar10   for DDPMPipeline.from_pretrained

No pickled code is run: .bin files are read by torch.load(weights_only=True).
"""
from __future__ import annotations

import json
import math
import re
import struct
import sys
from pathlib import Path

import common  # before torch, because it silences a warning of torch's import

import torch
from torch import Tensor

import data
from unet import Attention, Block, UNet

HUB = "https://huggingface.co"
MODEL = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# The entries of UNet2DModel's config.json that must have one value, so that it is this network,
# and the value that diffusers takes for a missing entry.
CONFIG = {
    "act_fn": ("silu", "silu"), "attention_head_dim": (None, 8), "norm_eps": (1e-6, 1e-5),
    "downsample_padding": (0, 1), "flip_sin_to_cos": (False, True), "freq_shift": (1, 0),
    "norm_num_groups": (32, 32), "time_embedding_type": ("positional", "positional"),
    "center_input_sample": (False, False), "mid_block_scale_factor": (1, 1),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"), "time_embedding_dim": (None, None),
    "resnet_time_scale_shift": ("default", "default"), "add_attention": (True, True),
    "downsample_type": ("conv", "conv"), "upsample_type": ("conv", "conv"),
    "class_embed_type": (None, None), "num_class_embeds": (None, None),
    "attn_norm_num_groups": (None, None),
}
# The same for DDPMScheduler's scheduler_config.json.
SCHEDULER = {"trained_betas": (None, None), "thresholding": (False, False),
             "clip_sample_range": (1.0, 1.0), "rescale_betas_zero_snr": (False, False)}
SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic"}
PREDICTS = {"epsilon": "eps", "sample": "x0"}
VARIANCES = {"fixed_small": "fixed_small", "fixed_large": "fixed_large"}

def download(name: str, folder: Path) -> Path:
    """The files of the model `name` on the hub in folder/name, fetched unless they are there."""
    target, address = folder / name, f"{HUB}/{name}/resolve/main/"
    try:
        for file in ("config.json", "scheduler_config.json"):
            if not (target / file).exists():
                data.fetch(address + file, target / file, check=read_json)
        if not any((target / file).exists() for file in MODEL):
            try:
                data.fetch(address + MODEL[0], target / MODEL[0], check=read_safetensors)
            except OSError as error:  # older models have only the second file
                if getattr(error.__cause__, "code", None) != 404:
                    raise
                data.fetch(address + MODEL[1], target / MODEL[1], check=read_bin)
    except OSError as error:
        reason = getattr(error.__cause__, "reason", None) or error
        raise OSError(f"cannot fetch {HUB}/{name} ({reason}); put its files config.json, "
                      f"scheduler_config.json and {MODEL[0]} (or .bin) into {target}") from error
    return target

# === From the layout of diffusers =================================================================

def from_diffusers(path: Path) -> tuple[UNet, dict, str]:
    """A UNet2DModel and its scheduler as a UNet, settings and the file's name.

    path: a folder (unet/ and scheduler/, or flat), or a file of weights. Without a config.json the
    architecture is read off the shapes, and the schedule is the paper's. ValueError if the model is
    not one that the U-Net here can express.
    """
    folder = path if path.is_dir() else path.parent
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    file = path
    if path.is_dir():
        file = next((unet / name for name in MODEL if (unet / name).exists()), None)
        if file is None:
            raise ValueError(f"{unet} holds neither {MODEL[0]} nor {MODEL[1]}")
    state = {current_name(key): value for key, value in read_weights(file).items()}
    config = read_json(unet / "config.json")
    if config is None:
        config = inferred(state, file)
    settings = from_config(config, str(unet / "config.json"))
    places = (folder / "scheduler", folder.parent / "scheduler", folder)
    found = (read_json(place / "scheduler_config.json") for place in places)
    scheduler = {"variance_type": "fixed_large" if settings["image_size"] < 256 else "fixed_small"}
    scheduler = next((config for config in found if config is not None), scheduler)
    settings.update(from_scheduler(scheduler))
    common.judged(settings, str(folder))
    cpu = common.Machine(torch.device("cpu"), torch.float32)
    common.require_network(settings, cpu, 2, 1, False)
    net = common.build_network(settings)
    ours, fitted = net.state_dict(), {}
    for here, there in names(net).items():
        for leaf in ("weight", "bias"):
            if (value := state.pop(f"{there}.{leaf}", None)) is None:
                raise ValueError(f"{file} lacks {there}.{leaf}")
            shape = ours[f"{here}.{leaf}"].shape
            if value.squeeze().shape != ours[f"{here}.{leaf}"].squeeze().shape:
                raise ValueError(f"{file}: {there}.{leaf} is {tuple(value.shape)}, where the "
                                 f"network has {tuple(shape)}")
            fitted[f"{here}.{leaf}"] = value.float().reshape(shape)
    if state:
        raise ValueError(f"{file} has weights that this network lacks, such as {min(state)}")
    net.load_state_dict(fitted)
    return net, settings, str(file)

def names(net: UNet) -> dict[str, str]:
    """The name of each layer here → its name in UNet2DModel, found by walking the network."""
    found = {"conv_in": "conv_in", "time.0": "time_embedding.linear_1",
             "time.2": "time_embedding.linear_2", "norm_out": "conv_norm_out",
             "conv_out": "conv_out"}
    in_block = {"norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2",
                "conv2": "conv2", "shortcut": "conv_shortcut"}
    in_attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    for part, level_name in (("down", "down_blocks.{}"), ("middle", "mid_block"),
                             ("up", "up_blocks.{}")):
        level = j = 0
        for i, module in enumerate(getattr(net, part)):
            here, there = f"{part}.{i}", level_name.format(level)
            if not isinstance(module, Block):
                found[f"{here}.conv"] = f"{there}.{part}samplers.0.conv"
                level, j = level + 1, 0
                continue
            for ours, theirs in in_block.items():
                if not isinstance(getattr(module, ours), torch.nn.Identity):
                    found[f"{here}.{ours}"] = f"{there}.resnets.{j}.{theirs}"
            if isinstance(module.attention, Attention):
                for ours, theirs in in_attention.items():
                    found[f"{here}.attention.{ours}"] = f"{there}.attentions.{j}.{theirs}"
            j += 1
    return found

def current_name(key: str) -> str:
    """Until 2022 the weights of attention were called query, key, value and proj_attn."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"),
                     ("proj_attn", "to_out.0")):
        key = re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", key)
    return key

def required(config: dict, table: dict, place: str) -> None:
    """ValueError naming an entry of `config` whose value is not the one that `table` requires."""
    for key, (needed, default) in table.items():
        if config.get(key, default) != needed:
            raise ValueError(f"{place}: {key} is {common.shown(config.get(key, default))}; here it "
                             f"can only be {needed!r}")

def from_config(config: dict, place: str) -> dict:
    """UNet2DModel's config.json → settings. ValueError naming the first entry that differs."""
    required(config, CONFIG, place)
    config = {"in_channels": 3, "out_channels": 3, "layers_per_block": 2, "sample_size": None,
              "block_out_channels": [224, 448, 672, 896],
              "down_block_types": ["DownBlock2D"] + 3 * ["AttnDownBlock2D"],
              "up_block_types": 3 * ["AttnUpBlock2D"] + ["UpBlock2D"], **config}
    try:
        widths, down = list(config["block_out_channels"]), list(config["down_block_types"])
        size, c = config["sample_size"], config["in_channels"]
        mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
        if (set(down) - {"DownBlock2D", "AttnDownBlock2D"}
                or list(config["up_block_types"]) != mirrored
                or config["out_channels"] != c or len(widths) != len(down)
                or any(type(w) is not int or w % widths[0] for w in widths)
                or type(size) is not int):
            raise ValueError("blocks, widths, channels or sample_size of another network")
    except (TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{place} does not describe this network: {error!r}") from error
    return dict(in_channels=c, image_size=size, channels=widths[0], dropout=0.0,
                blocks=config["layers_per_block"],
                multipliers=[w // widths[0] for w in widths],
                attention=[size // 2 ** level for level, kind in enumerate(down) if "Attn" in kind])

def inferred(state: dict[str, Tensor], file: Path) -> dict:
    """A config.json that fits the shapes of a UNet2DModel's weights, or ValueError.

    Shapes do not tell the size of the images. It is known if one level attends, at 16×16.
    """
    found = {m.groups() for m in map(re.compile(
        r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.").match, state) if m}
    levels = range(len({level for level, *_ in found}))
    down = ["AttnDownBlock2D" if (str(level), "attentions", "0") in found else "DownBlock2D"
            for level in levels]
    if down.count("AttnDownBlock2D") != 1 or "conv_in.weight" not in state:
        raise ValueError(f"the shapes in {file} do not determine the architecture: put its "
                         "config.json beside it")
    blocks = sum(level == "0" and kind == "resnets" for level, kind, _ in found)
    c = state["conv_in.weight"].shape[1]
    widths = [len(state.get(f"down_blocks.{i}.resnets.0.conv1.weight", ())) for i in levels]
    return {**{key: needed for key, (needed, _) in CONFIG.items()}, "in_channels": c,
            "out_channels": c, "sample_size": 16 * 2 ** down.index("AttnDownBlock2D"),
            "layers_per_block": blocks, "block_out_channels": widths, "down_block_types": down,
            "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)]}

def from_scheduler(config: dict) -> dict:
    """DDPMScheduler's scheduler_config.json → settings. ValueError for another chain."""
    required(config, SCHEDULER, "scheduler_config.json")
    config = {"num_train_timesteps": 1000, "clip_sample": True, "beta_start": 1e-4,
              "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "epsilon",
              "variance_type": "fixed_small", **config}
    for key, table in (("beta_schedule", SCHEDULES), ("prediction_type", PREDICTS),
                       ("variance_type", VARIANCES)):
        if not isinstance(config[key], str) or config[key] not in table:
            raise ValueError(f"scheduler_config.json: {key} is {common.shown(config[key])}; only "
                             f"{' and '.join(table)} are known here")
    found = common.judged(dict(timesteps=config["num_train_timesteps"],
                               beta_start=config["beta_start"], beta_end=config["beta_end"],
                               clip_sample=config["clip_sample"]), "scheduler_config.json")
    for end in ("beta_start", "beta_end"):  # `make_schedule` multiplies them by 1000/T
        found[end] *= found["timesteps"] / 1000
    return dict(found, schedule=SCHEDULES[config["beta_schedule"]],
                predict=PREDICTS[config["prediction_type"]],
                variance=VARIANCES[config["variance_type"]])

# === To the layout of diffusers ===================================================================

def export(net: UNet, settings: dict, folder: Path) -> None:
    """Writes a folder that DDPMPipeline.from_pretrained opens. ValueError if that is impossible."""
    if (folder / "checkpoint.pt").exists():
        raise ValueError(f"{folder} is the folder of a run: export to another one")
    schedules = {**{ours: theirs for theirs, ours in SCHEDULES.items()}, "constant": "linear"}
    predicts = {ours: theirs for theirs, ours in PREDICTS.items()}
    for key, known in (("schedule", schedules), ("predict", predicts), ("variance", VARIANCES)):
        if settings[key] not in known:
            raise ValueError(f"diffusers has no {key} {settings[key]}: this network cannot be "
                             "exported")
    if settings["multipliers"][0] != 1:
        raise ValueError("diffusers has no first multiplier other than 1: this network cannot be "
                         "exported")
    betas = common.build_schedule(settings).betas
    first, last = betas[1].item(), betas[-1].item()
    down = ["AttnDownBlock2D" if settings["image_size"] // 2 ** level in settings["attention"]
            else "DownBlock2D" for level in range(len(settings["multipliers"]))]
    config = {"_class_name": "UNet2DModel", **{key: value for key, (value, _) in CONFIG.items()},
              "sample_size": settings["image_size"], "in_channels": settings["in_channels"],
              "out_channels": settings["in_channels"], "layers_per_block": settings["blocks"],
              "block_out_channels": [settings["channels"] * m for m in settings["multipliers"]],
              "down_block_types": down, "dropout": 0.0,
              "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)]}
    scheduler = {"_class_name": "DDPMScheduler", **{k: v for k, (v, _) in SCHEDULER.items()},
                 "num_train_timesteps": settings["timesteps"], "beta_end": last,
                 "beta_start": first,
                 "beta_schedule": schedules[settings["schedule"]],
                 "variance_type": settings["variance"],
                 "clip_sample": settings.get("clip_sample", True), "timestep_spacing": "leading",
                 "steps_offset": 0, "prediction_type": predicts[settings["predict"]]}
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"],
             "unet": ["diffusers", "UNet2DModel"]}
    own, state = net.state_dict(), {}
    for here, there in names(net).items():
        weight = own[f"{here}.weight"]
        linear = ".attentions." in there and weight.dim() == 4  # a 1×1 convolution here
        state[f"{there}.weight"] = weight.flatten(1) if linear else weight
        state[f"{there}.bias"] = own[f"{here}.bias"]
    write_safetensors(folder / "unet" / MODEL[0], state)
    for file, content in (("unet/config.json", config), ("model_index.json", index),
                          ("scheduler/scheduler_config.json", scheduler)):
        with data.written(folder / file) as out:
            out.write((json.dumps(content, indent=2) + "\n").encode())

# === The formats ==================================================================================

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

def read_json(path: Path) -> dict | None:
    """A JSON object, or None if there is no such file. ValueError for anything else."""
    if not path.exists():
        return None
    data.size_of(path)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {data.first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content

def read_weights(path: Path) -> dict[str, Tensor]:
    """A .safetensors or .bin file: name → tensor of finite floating-point numbers, or ValueError.
    """
    state = read_safetensors(path) if path.suffix == ".safetensors" else read_bin(path)
    return finite(state, path)

def finite(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`state`, if it holds plain tensors of finite floating-point numbers. Else ValueError."""
    for key, value in state.items():
        if (value.is_nested or value.layout != torch.strided or value.is_meta
                or not value.is_floating_point()
                or value.numel() * value.itemsize > value.untyped_storage().nbytes()
                or not value.float().isfinite().all()):
            raise ValueError(f"{path}: {key} is no plain tensor of finite numbers")
    return state

def read_bin(path: Path) -> dict[str, Tensor]:
    """A dictionary of tensors that torch.save wrote, or ValueError."""
    common.require(3 * data.size_of(path), f"reading {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds of error for a damaged file
        raise ValueError(f"{path} is no dictionary of tensors: {data.first_line(error)}") from error
    if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise ValueError(f"{path} is no dictionary of tensors")
    return state

def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file: 8 bytes of header length, a JSON header, the tensors' bytes end to end.

    The whole header is checked before a tensor is made. ValueError says what is wrong.
    """
    return read_header(path)[0]

def read_header(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a safetensors file, and the metadata in its header."""
    common.require(3 * data.size_of(path), f"reading {path}")
    raw = memoryview(path.read_bytes())

    def check(sound: bool, what: str) -> None:
        if not sound:
            raise ValueError(f"{path} is no sound safetensors file: {what}")

    def unique(pairs: list) -> dict:
        check(len(dict(pairs)) == len(pairs), "a name stands twice in its header")
        return dict(pairs)

    length = struct.unpack("<Q", raw[:8])[0] if len(raw) >= 8 else math.inf
    check(length <= min(len(raw) - 8, 100_000_000), "its header is cut")
    try:
        header = json.loads(bytes(raw[8:8 + length]), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        check(False, f"its header is not JSON ({data.first_line(error)})")
    check(isinstance(header, dict), "its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    body, spans = raw[8 + length:], []
    for name, entry in header.items():
        check(isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"},
              f"{name!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        check(isinstance(dtype, str) and dtype in DTYPES, f"{name!r} is no float, but {dtype!r}")
        check(all(isinstance(sizes, list) and len(sizes) <= 8 and all(
            type(n) is int and 0 <= n < 2 ** 63 for n in sizes) for sizes in (shape, offsets)),
              f"{name!r} has a shape or offsets that are not lists of sizes")
        check(math.prod(filter(None, shape)) < 2 ** 60, f"{name!r} has a huge shape")
        size = math.prod(shape) * DTYPES[dtype].itemsize
        check(len(offsets) == 2 and offsets[0] + size == offsets[1],
              f"{name!r} has offsets that do not fit its type and shape")
        spans.append(offsets)
    ends = [0] + [end for _, end in sorted(spans)]
    check([begin for begin, _ in sorted(spans)] == ends[:-1] and ends[-1] == len(body),
          "its tensors overlap or leave a gap")
    tensors = {}
    for (name, entry), (begin, end) in zip(header.items(), spans):
        tensors[name] = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        if end > begin:  # torch.frombuffer refuses an empty buffer
            flat = torch.frombuffer(bytearray(body[begin:end]), dtype=DTYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return tensors, metadata if isinstance(metadata, dict) else {}

def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict | None = None) -> None:
    """Writes the tensors as a safetensors file, its header padded to a multiple of 8 bytes.

    metadata: texts by name, which the header holds too.
    """
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    header, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, x in ordered:
        header[name] = {"dtype": kinds[x.dtype], "shape": list(x.shape),
                        "data_offsets": [offset, offset + x.nbytes]}
        offset += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with data.written(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, x in ordered:
            file.write(data.raw_bytes(x))

@common.command
def main(argv=None) -> int:
    """Exports a trained network to the layout of diffusers."""
    import sample  # here, because sample imports this module
    parser = common.Parser(__doc__)
    parser.add_argument("--export", type=Path, required=True, help="the folder to write")
    parser.add("--checkpoint", "--no-ema", "--data-dir")
    args = parser.parse_args(argv)
    machine = common.find_machine("cpu", "fp32")
    trained = sample.load(args.checkpoint, args.data_dir or "data", not args.no_ema, machine)
    export(trained.net, trained.settings, args.export)
    data.say(f"{args.export} holds {trained.source} for DDPMPipeline.from_pretrained")
    return 0

if __name__ == "__main__":
    sys.exit(main())
