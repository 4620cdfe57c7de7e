"""Weights from elsewhere and for elsewhere: safetensors, and the layout of the library diffusers.

    python sample.py --checkpoint google/ddpm-cifar10-32          the authors' weights, converted
    python weights.py --export FOLDER --checkpoint runs/cifar10   for DDPMPipeline.from_pretrained

No pickle is executed here: .bin files are read by torch.load(weights_only=True).
"""
from __future__ import annotations

import json
import math
import re
import struct
import sys
from pathlib import Path

import runs  # before torch: it quiets a warning of torch's import

import torch
from torch import Tensor

import data
from unet import Attention, Block, UNet

HUB = "https://huggingface.co"
MODEL = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def load(name: str | None, data_dir: str | Path, ema: bool, where: runs.Machine) -> runs.Trained:
    """The network that `name` names, on the machine's device.

    None: the newest run's checkpoint. Else a checkpoint.pt or its folder, a diffusers folder
    (unet/ and scheduler/, or flat), a .safetensors or .bin file, or a hub name, ORGANISATION/MODEL,
    downloaded once to data_dir/hub. ValueError or OSError where that cannot be used.
    """
    path = Path(name) if name else runs.newest_checkpoint()
    if path.suffix in (".safetensors", ".bin") or (path / "config.json").exists() or (
            path / "unet" / "config.json").exists():
        trained = from_diffusers(path)
    elif path.exists() or path.suffix == ".pt" or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        trained = runs.load_trained(path, ema)
    else:
        trained = from_diffusers(download(str(name), Path(data_dir) / "hub", where))
    net = trained.net.to(where.device, memory_format=torch.channels_last)
    return trained._replace(net=net)


def download(name: str, folder: Path, where: runs.Machine) -> Path:
    """The files of hub model `name` in folder/name, fetched unless they are there."""
    target, files = folder / name, ["config.json", "scheduler_config.json"]
    with where.chief_first():
        try:
            for file in files:
                if not (target / file).exists():
                    data.fetch(f"{HUB}/{name}/resolve/main/{file}", target / file)
            if not any((target / file).exists() for file in MODEL):
                address = f"{HUB}/{name}/resolve/main/"
                try:
                    data.fetch(address + MODEL[0], target / MODEL[0])
                except OSError as error:  # older models have only the second
                    if getattr(error.__cause__, "code", None) != 404:
                        raise
                    data.fetch(address + MODEL[1], target / MODEL[1])
        except OSError as error:
            reason = getattr(error.__cause__, "reason", None) or error
            raise OSError(f"cannot fetch {HUB}/{name} ({reason}); put its files config.json, "
                          f"scheduler_config.json and {MODEL[0]} (or .bin) into {target}"
                          ) from error
    return target


# ------------------------------------------------------------------------ the layout of diffusers

# The configuration of UNet2DModel under which it is this network: key → (value, its default there).
FIXED = {
    "act_fn": ("silu", "silu"), "attention_head_dim": (None, 8), "norm_eps": (1e-6, 1e-5),
    "downsample_padding": (0, 1), "flip_sin_to_cos": (False, True), "freq_shift": (1, 0),
    "norm_num_groups": (32, 32), "time_embedding_type": ("positional", "positional"),
    "center_input_sample": (False, False), "mid_block_scale_factor": (1, 1),
    "resnet_time_scale_shift": ("default", "default"), "add_attention": (True, True),
    "downsample_type": ("conv", "conv"), "upsample_type": ("conv", "conv"),
    "class_embed_type": (None, None), "num_class_embeds": (None, None),
    "attn_norm_num_groups": (None, None), "time_embedding_dim": (None, None),
}
SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic"}
PREDICTS = {"epsilon": "eps", "sample": "x0"}


def from_diffusers(path: Path) -> runs.Trained:
    """A UNet2DModel's weights as a UNet, with the schedule of its scheduler. ValueError if unlike.

    Without a config.json the architecture is read off the shapes (`inferred`), and the schedule is
    the paper's.
    """
    folder = path if path.is_dir() else path.parent
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    file = path
    if path.is_dir():
        file = next((unet / f for f in MODEL if (unet / f).exists()), None)
        if file is None:
            raise ValueError(f"{unet} holds neither {MODEL[0]} nor .bin")
    state = {rename_old(k): v for k, v in read_weights(file).items()}
    config = read_json(unet / "config.json")
    settings = from_config(config, unet) if config else inferred(state, file)
    places = (folder / "scheduler", folder.parent / "scheduler", folder)
    scheduler = next(filter(None, (read_json(p / "scheduler_config.json") for p in places)), None)
    settings.update(from_scheduler(scheduler or {"variance_type": "fixed_large" if
                                                 settings["image_size"] < 256 else "fixed_small"}))
    net = runs.build_net(settings)
    ours, fitted = net.state_dict(), {}
    for key, other in names(net).items():
        for leaf in ("weight", "bias"):
            if (value := state.pop(f"{other}.{leaf}", None)) is None:
                raise ValueError(f"{file} lacks {other}.{leaf}")
            if value.squeeze().shape != ours[f"{key}.{leaf}"].squeeze().shape:
                raise ValueError(f"{file}: {other}.{leaf} is {tuple(value.shape)}, where the "
                                 f"network has {tuple(ours[f'{key}.{leaf}'].shape)}")
            fitted[f"{key}.{leaf}"] = value.float().reshape(ours[f"{key}.{leaf}"].shape)
    if state:
        raise ValueError(f"{file} has weights that this network lacks, such as {min(state)}")
    net.load_state_dict(fitted)
    return runs.Trained(net, runs.build_schedule(settings), settings, str(file))


def names(net: UNet) -> dict[str, str]:
    """Each layer's name here → its name in UNet2DModel, found by walking the network."""
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
                if any(True for _ in getattr(module, ours).parameters()):
                    found[f"{here}.{ours}"] = f"{there}.resnets.{j}.{theirs}"
            if isinstance(module.attention, Attention):
                for ours, theirs in in_attention.items():
                    found[f"{here}.attention.{ours}"] = f"{there}.attentions.{j}.{theirs}"
            j += 1
    return found


def rename_old(key: str) -> str:
    """The attention's weights were called query, key, value and proj_attn until 2022."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"),
                     ("proj_attn", "to_out.0")):
        key = re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", key)
    return key


def from_config(config: dict, place: Path) -> dict:
    """UNet2DModel's config.json → settings. ValueError naming the first entry that differs."""
    for key, (needed, default) in FIXED.items():
        if config.get(key, default) != needed:
            raise ValueError(f"{place / 'config.json'}: {key} is {config.get(key, default)!r}; "
                             f"this network is UNet2DModel with {needed!r}")
    try:
        widths, down, up = (list(config[k]) for k in
                            ("block_out_channels", "down_block_types", "up_block_types"))
        size, c, out = config["sample_size"], config["in_channels"], config["out_channels"]
        attend = [kind == "AttnDownBlock2D" for kind in down]
        mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
        if (set(down) - {"DownBlock2D", "AttnDownBlock2D"} or up != mirrored
                or out not in (c, 2 * c) or len(widths) != len(down)
                or any(w % widths[0] for w in widths)
                or not isinstance(size, int)):
            raise ValueError("blocks, widths, channels or sample_size of another network")
        return architecture(c, size, widths, int(config.get("layers_per_block", 2)), attend)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{place / 'config.json'} does not describe this network: "
                         f"{error!r}") from error


def inferred(state: dict[str, Tensor], file: Path) -> dict:
    """The settings that the shapes of a UNet2DModel's weights imply; ValueError if they do not.

    Shapes do not tell the size of the images: it is known if just one level attends, at 16×16.
    """
    def indices(pattern: str) -> list[int]:
        return sorted({int(m[1]) for k in state if (m := re.match(pattern, k))})
    levels = indices(r"down_blocks\.(\d+)\.")
    attend = [bool(indices(rf"down_blocks\.{i}\.attentions\.(\d+)\.")) for i in levels]
    try:
        conv_in = state["conv_in.weight"]
        widths = [len(state[f"down_blocks.{i}.resnets.0.conv1.weight"]) for i in levels]
        if sum(attend) != 1 or any(w % len(conv_in) for w in widths) or widths[0] != len(conv_in):
            raise ValueError
        return architecture(conv_in.shape[1], 16 * 2 ** attend.index(True), widths,
                            len(indices(r"down_blocks\.0\.resnets\.(\d+)\.")), attend)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"the shapes in {file} do not tell the architecture for certain: put its "
                         "config.json beside it") from error


def architecture(c: int, size: int, widths: list[int], blocks: int, attend: list[bool]) -> dict:
    """Settings of the network from UNet2DModel's terms."""
    return dict(in_channels=c, image_size=size, channels=widths[0], blocks=blocks, dropout=0.0,
                multipliers=[w // widths[0] for w in widths],
                attention=[size // 2 ** level for level, yes in enumerate(attend) if yes])


def from_scheduler(config: dict) -> dict:
    """DDPMScheduler's config (or another with β's) → settings. ValueError for other chains."""
    T = config.get("num_train_timesteps", 1000)
    schedule = SCHEDULES.get(config.get("beta_schedule", "linear"))
    predict = PREDICTS.get(config.get("prediction_type", "epsilon"))
    variance = config.get("variance_type", "fixed_small")
    if (not schedule or not predict or variance not in ("fixed_small", "fixed_large")
            or config.get("trained_betas") or not isinstance(T, int) or T < 1
            or not all(isinstance(config.get(k, 1e-4), float) for k in ("beta_start", "beta_end"))):
        raise ValueError("scheduler_config.json: this sampler knows beta_schedule linear and "
                         "scaled_linear, prediction_type epsilon and sample, variance_type "
                         f"fixed_small and fixed_large, not {config}")
    # `make_schedule` scales the ends by 1000/T; these are not scaled.
    return dict(timesteps=T, schedule=schedule, predict=predict, variance=variance,
                beta_start=config.get("beta_start", 1e-4) * T / 1000,
                beta_end=config.get("beta_end", 0.02) * T / 1000)


def export(trained: runs.Trained, folder: Path) -> None:
    """A folder that DDPMPipeline.from_pretrained opens. ValueError for what it cannot express."""
    s = trained.settings
    if s["predict"] == "mean" or s["variance"] == "learned":
        raise ValueError("diffusers has no DDPM scheduler for a predicted mean or log-variance: "
                         "this network cannot be exported")
    scale = 1000 / s["timesteps"]
    first, last = (min(s[k] * scale, 0.999) for k in ("beta_start", "beta_end"))
    down = [("Attn" if s["image_size"] // 2 ** level in s["attention"] else "") + "DownBlock2D"
            for level in range(len(s["multipliers"]))]
    config = {"_class_name": "UNet2DModel", **{k: v for k, (v, _) in FIXED.items()},
              "sample_size": s["image_size"], "in_channels": s["in_channels"],
              "out_channels": s["in_channels"], "layers_per_block": s["blocks"],
              "block_out_channels": [s["channels"] * m for m in s["multipliers"]],
              "down_block_types": down, "dropout": 0.0,
              "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)]}
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": s["timesteps"],
                 "beta_start": last if s["schedule"] == "constant" else first, "beta_end": last,
                 "beta_schedule": "scaled_linear" if s["schedule"] == "quadratic" else "linear",
                 "variance_type": s["variance"], "clip_sample": True, "clip_sample_range": 1.0,
                 "prediction_type": {v: k for k, v in PREDICTS.items()}[s["predict"]],
                 "trained_betas": None, "thresholding": False, "timestep_spacing": "leading",
                 "steps_offset": 0}
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"],
             "unet": ["diffusers", "UNet2DModel"]}
    own = trained.net.state_dict()
    state = {}
    for ours, theirs in names(trained.net).items():
        weight = own[f"{ours}.weight"]
        linear = ".attentions." in theirs and weight.dim() == 4  # a 1×1 convolution here
        state[f"{theirs}.weight"] = weight.flatten(1) if linear else weight
        state[f"{theirs}.bias"] = own[f"{ours}.bias"]
    write_safetensors(folder / "unet" / MODEL[0], state)
    for file, content in (("unet/config.json", config), ("model_index.json", index),
                          ("scheduler/scheduler_config.json", scheduler)):
        with runs.written_aside(folder / file) as part:
            part.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict | None:
    """A JSON object, or None where there is no file. ValueError for anything else."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


# ------------------------------------------------------------------------------------ the formats

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def read_weights(path: Path) -> dict[str, Tensor]:
    """A .safetensors or .bin file: name → tensor, every float in it finite. ValueError if not."""
    if path.suffix == ".safetensors":
        state = read_safetensors(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # torch.load meets a damaged file in a dozen ways
            raise ValueError(f"{path} is no file of weights: {data.first_line(error)}") from error
        if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
            raise ValueError(f"{path} is no dictionary of tensors")
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path}: {key} has values that are not finite")
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file: 8 bytes of header length, a JSON header, the tensors' bytes end to end.

    All of the header is checked before a tensor is made. ValueError says what is wrong.
    """
    raw = memoryview(Path(path).read_bytes())

    def wrong(what: str) -> ValueError:
        return ValueError(f"{path} is no sound safetensors file: {what}")

    def unique(pairs: list) -> dict:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a name stands twice")
        return dict(pairs)

    if len(raw) < 8:
        raise wrong(f"it has {len(raw)} bytes")
    length, = struct.unpack("<Q", raw[:8])
    if length > min(len(raw) - 8, 100_000_000):
        raise wrong(f"its header of {length} bytes does not fit")
    try:
        header = json.loads(bytes(raw[8:8 + length]).decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise wrong(f"its header is not JSON ({data.first_line(error)})") from error
    if not isinstance(header, dict):
        raise wrong("its header is no JSON object")
    header.pop("__metadata__", None)
    body, spans = raw[8 + length:], []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise wrong(f"{name!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise wrong(f"{name!r} has the unknown type {dtype!r}")
        for numbers in (shape, offsets):
            if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2 ** 63
                                                    for n in numbers):
                raise wrong(f"{name!r} has a shape or offsets that are not lists of sizes")
        if (len(offsets) != 2 or not offsets[0] <= offsets[1] <= len(body)
                or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize):
            raise wrong(f"{name!r} has offsets {offsets}, which do not fit its type and shape")
        spans.append((offsets, name))
    end = 0
    for (begin, stop), name in sorted(spans):
        if begin != end:
            raise wrong(f"the bytes of {name!r} overlap others or leave a gap")
        end = stop
    if end != len(body):
        raise wrong(f"{len(body) - end} bytes belong to no tensor")
    tensors = {}
    for (begin, stop), name in spans:
        dtype, shape = DTYPES[header[name]["dtype"]], header[name]["shape"]
        flat = (torch.frombuffer(bytearray(body[begin:stop]), dtype=torch.uint8).view(dtype)
                if stop > begin else torch.empty(0, dtype=dtype))
        tensors[name] = flat.reshape(shape)
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """The tensors as a safetensors file, the header padded to a multiple of 8."""
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, x in ordered:
        header[name] = {"dtype": kinds[x.dtype], "shape": list(x.shape),
                        "data_offsets": [offset, offset + x.nbytes]}
        offset += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with runs.written_aside(path) as part, open(part, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, x in ordered:
            file.write(data.raw_bytes(x))


@runs.command
def main(argv=None) -> int:
    """Export a trained network to the layout of diffusers."""
    parser = runs.Parser(__doc__)
    parser.add_argument("--export", type=Path, required=True, help="the folder to write")
    parser.add_argument("--checkpoint", help="what to export (default: the newest run)")
    parser.add_argument("--data-dir", default="data", help="downloads (default: data)")
    parser.add_argument("--no-ema", action="store_true", help="the weights as trained")
    args = parser.parse_args(argv)
    trained = load(args.checkpoint, args.data_dir, not args.no_ema, runs.machine("cpu", "fp32"))
    export(trained, args.export)
    print(f"{args.export} holds {trained.source} for DDPMPipeline.from_pretrained", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
