"""Weights in the layout of the library diffusers, in and out.

No pickled code is run: .bin files are read by torch.load(weights_only=True).
"""
from __future__ import annotations

import json
import re
from pathlib import Path

import torch

import ddpm
from support.command import reading, written
from support.data import fetch
from unet import Attention, Block, UNet, build_network

HUB = "https://huggingface.co"
MODEL = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# What UNet2DModel and DDPMScheduler take for an entry that is missing in their files.
UNET_DEFAULTS = dict(
    act_fn="silu", add_attention=True, attention_head_dim=8, attn_norm_num_groups=None,
    center_input_sample=False, class_embed_type=None, downsample_padding=1, downsample_type="conv",
    dropout=0.0, flip_sin_to_cos=True, freq_shift=0, in_channels=3, layers_per_block=2,
    mid_block_scale_factor=1, mid_block_type="UNetMidBlock2D", norm_eps=1e-5, norm_num_groups=32,
    num_class_embeds=None, out_channels=3, resnet_time_scale_shift="default",
    time_embedding_dim=None, time_embedding_type="positional", upsample_type="conv")
SCHEDULER_DEFAULTS = dict(
    num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
    trained_betas=None, variance_type="fixed_small", clip_sample=True, clip_sample_range=1.0,
    prediction_type="epsilon", thresholding=False, rescale_betas_zero_snr=False)
# What this network needs in place of a default, and their words for choices here.
UNET = UNET_DEFAULTS | dict(attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False,
                            freq_shift=1, norm_eps=1e-6)
WORDS = {"schedule": {"constant": "linear", "linear": "linear", "quadratic": "scaled_linear"},
         "predict": {"eps": "epsilon", "x0": "sample"},
         "variance": {"fixed_small": "fixed_small", "fixed_large": "fixed_large"}}

def unet_config(settings: dict) -> dict:
    """config.json of a UNet2DModel with these settings."""
    side, c = settings["image_size"], settings["in_channels"]
    down = [("Attn" if side // 2 ** level in settings["attention"] else "") + "DownBlock2D"
            for level in range(len(settings["multipliers"]))]
    return UNET | dict(
        sample_size=side, in_channels=c, out_channels=c, layers_per_block=settings["blocks"],
        block_out_channels=[settings["channels"] * m for m in settings["multipliers"]],
        down_block_types=down, up_block_types=[kind.replace("Down", "Up") for kind in down[::-1]])

def scheduler_config(settings: dict) -> dict:
    """scheduler_config.json of a DDPMScheduler with these settings. KeyError if it has no such."""
    kind, T = settings["schedule"], settings["timesteps"]
    betas = ddpm.make_schedule(T, kind, settings["beta_start"], settings["beta_end"]).betas.tolist()
    theirs = {key: words[settings[key]] for key, words in WORDS.items()}
    return SCHEDULER_DEFAULTS | dict(
        num_train_timesteps=T, beta_start=betas[1], beta_end=betas[T],
        beta_schedule=theirs["schedule"], prediction_type=theirs["predict"],
        variance_type=theirs["variance"], clip_sample=settings.get("clip", True))

def settings_of(config: dict, scheduler: dict) -> dict:
    """The settings whose configurations these are.

    They are read off some entries; then all entries must be those that the settings give.
    ValueError or KeyError names the first that is not.
    """
    config, scheduler = UNET_DEFAULTS | config, SCHEDULER_DEFAULTS | scheduler
    ours = {key: {theirs: ours for ours, theirs in words.items()} for key, words in WORDS.items()}
    widths, side, T = (config["block_out_channels"], config["sample_size"],
                       scheduler["num_train_timesteps"])
    found = dict(
        in_channels=config["in_channels"], image_size=side, channels=widths[0], dropout=0.0,
        multipliers=[width // widths[0] for width in widths], blocks=config["layers_per_block"],
        attention=[side // 2 ** level for level, kind in enumerate(config["down_block_types"])
                   if "Attn" in kind],
        timesteps=T, schedule=ours["schedule"][scheduler["beta_schedule"]],
        beta_start=scheduler["beta_start"] * T / 1000,  # `make_schedule` multiplies by 1000/T
        beta_end=scheduler["beta_end"] * T / 1000,
        predict=ours["predict"][scheduler["prediction_type"]],
        variance=ours["variance"][scheduler["variance_type"]], clip=scheduler["clip_sample"])
    for key, value in (unet_config(found) | scheduler_config(found)).items():
        given = (config | scheduler)[key]
        if key not in ("dropout", "beta_start", "beta_end") and given != value:
            raise ValueError(f"{key} is {given!r}, and here it can only be {value!r}")
    return found

def is_diffusers(path: Path) -> bool:
    """Whether this folder, or the file's folder, holds a UNet2DModel."""
    folder = path if path.is_dir() else path.parent
    return path.exists() and path.suffix != ".pt" and any(
        (folder / file).exists() for file in ("config.json", "unet/config.json"))

def from_diffusers(path: Path) -> tuple[UNet, dict]:
    """A UNet2DModel and its scheduler as a UNet and settings. ValueError if they do not fit.

    path: a folder (unet/ and scheduler/, or flat), or the file of weights in it.
    """
    folder = path if path.is_dir() else path.parent
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    file = path if path.is_file() else next(
        (unet / name for name in MODEL if (unet / name).exists()), unet / MODEL[0])
    places = (folder / "scheduler", folder.parent / "scheduler", folder)
    chains = [place / "scheduler_config.json" for place in places]
    chain = next(filter(Path.exists, chains), chains[-1])
    configs = []
    for config in (unet / "config.json", chain):
        with reading(config, "a configuration of diffusers"):
            configs.append(json.loads(config.read_bytes()))
    with reading(unet / "config.json", "a network and a schedule that are known here"):
        settings = settings_of(*configs)
    with reading(file, "weights of the network in its config.json"):
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        state = {current_name(key): value for key, value in state.items()}
        if settings["blocks"] > len(state):
            raise ValueError(f"layers_per_block {settings['blocks']} exceeds what the file holds")
        net = build_network(settings)
        shapes, fitted = {key: x.shape for key, x in net.state_dict().items()}, {}
        for here, there in names(net).items():
            for leaf in ("weight", "bias"):  # a Linear there may be a 1×1 convolution here
                value, shape = state.pop(f"{there}.{leaf}").float(), shapes[f"{here}.{leaf}"]
                if value.squeeze().shape != torch.Size(n for n in shape if n != 1):
                    raise ValueError(f"{there}.{leaf} is {tuple(value.shape)}, not {tuple(shape)}")
                if not value.isfinite().all():
                    raise ValueError(f"{there}.{leaf} holds numbers that are not finite")
                fitted[f"{here}.{leaf}"] = value.reshape(shape)
        if state:
            raise ValueError(f"{min(state)} is no part of this network")
        net.load_state_dict(fitted)
    return net, settings

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

def download(name: str, folder: Path) -> Path:
    """The files of the model `name` on the hub in folder/name, fetched unless they are there."""
    target, address = folder / name, f"{HUB}/{name}/resolve/main/"
    for file in ("config.json", "scheduler_config.json"):
        fetch(address + file, target / file)
    if not (target / MODEL[1]).exists():  # older models have only this one
        try:
            fetch(address + MODEL[0], target / MODEL[0])
        except OSError as error:
            if getattr(error.__cause__, "code", None) != 404:
                raise
            fetch(address + MODEL[1], target / MODEL[1])
    return target

def export(net: UNet, settings: dict, folder: Path) -> None:
    """Writes a folder that DDPMPipeline.from_pretrained opens. ValueError if that is impossible."""
    from safetensors.torch import save
    if (folder / "checkpoint.pt").exists():
        raise ValueError(f"{folder} is the folder of a run: export to another one")
    try:
        if not isinstance(net, UNet) or settings["multipliers"][0] != 1:
            raise KeyError("U-Net like this")
        configs = {"unet/config.json": ("UNet2DModel", unet_config(settings)),
                   "scheduler/scheduler_config.json": ("DDPMScheduler", scheduler_config(settings))}
    except KeyError as error:
        raise ValueError(f"the export does not know {error}, or diffusers has none") from error
    configs["model_index.json"] = ("DDPMPipeline", {
        "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]})
    own, state = net.state_dict(), {}
    for here, there in names(net).items():
        weight = own[f"{here}.weight"]
        linear = ".attentions." in there and weight.dim() == 4  # a 1×1 convolution here
        state[f"{there}.weight"] = (weight.flatten(1) if linear else weight).contiguous()
        state[f"{there}.bias"] = own[f"{here}.bias"]
    with written(folder / "unet" / MODEL[0]) as out:
        out.write(save(state, {"format": "pt"}))
    for file, (kind, content) in configs.items():
        with written(folder / file) as out:
            out.write((json.dumps({"_class_name": kind, **content}, indent=2) + "\n").encode())
