"""Converts weights from and to the layout of diffusers (pip install diffusers).

    python -m extras.weights google/ddpm-ema-cifar10-32 runs/official   in, from the hub
    python -m extras.weights FOLDER runs/mine                           in, from its folder
    python -m extras.weights runs/cifar10 FOLDER                        out, to such a folder

The result is a checkpoint like any other: sample.py and evaluate.py use it, train.py --init starts
from it. DDPMPipeline.from_pretrained opens the folder.
"""
from __future__ import annotations

import os
import secrets
import shutil
import sys
from pathlib import Path

from support.checkpoint import is_diffusers, load, load_checkpoint, save_checkpoint
from support.command import Parser, UsageError, command, nonblank, one_line, reading, say
from support.machine import start_machine

import torch
from torch import nn

import ddpm
from unet import Attention, Block, UNet, build_network

# Names of our choices in diffusers, and its schedulers of chains that were trained as the paper's.
WORDS = {"schedule": {"constant": "linear", "linear": "linear", "quadratic": "scaled_linear"},
         "predict": {"eps": "epsilon", "x0": "sample"},
         "variance": {"fixed_small": "fixed_small", "fixed_large": "fixed_large"}}
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")

def unet_config(settings: dict) -> dict:
    """The arguments of a UNet2DModel that computes the same function."""
    side, c = settings["image_size"], settings["in_channels"]
    down = [("Attn" if side // 2 ** level in settings["attention"] else "") + "DownBlock2D"
            for level in range(len(settings["multipliers"]))]
    return dict(
        sample_size=side, in_channels=c, out_channels=c, layers_per_block=settings["blocks"],
        block_out_channels=[settings["channels"] * m for m in settings["multipliers"]],
        down_block_types=down, up_block_types=[kind.replace("Down", "Up") for kind in down[::-1]],
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
        norm_eps=1e-6)

def scheduler_config(settings: dict) -> dict:
    """The arguments of a DDPMScheduler. KeyError for a choice that it does not have."""
    theirs, T = {key: words[settings[key]] for key, words in WORDS.items()}, settings["timesteps"]
    betas = ddpm.make_schedule(T, settings["schedule"], settings["beta_start"],
                               settings["beta_end"]).betas.tolist()
    return dict(num_train_timesteps=T, beta_start=betas[1], beta_end=betas[T],
                beta_schedule=theirs["schedule"], prediction_type=theirs["predict"],
                variance_type=theirs["variance"], clip_sample=settings.get("clip", True))

def network_settings(config: dict) -> dict:
    """The settings that a UNet2DModel's config implies; the caller verifies them."""
    widths, side = config["block_out_channels"], config["sample_size"]
    if not isinstance(side, int):
        raise ValueError(f"sample_size is {side!r}, not the side of a square")
    return dict(
        in_channels=config["in_channels"], image_size=side, channels=widths[0], dropout=0.0,
        multipliers=[width // widths[0] for width in widths], blocks=config["layers_per_block"],
        attention=[side // 2 ** level for level, kind in enumerate(config["down_block_types"])
                   if "Attn" in kind])

def chain_settings(config: dict) -> dict:
    """The settings that a scheduler's config implies; the caller verifies them."""
    def ours(key: str, name: str, default: str | None = None) -> str:
        words, theirs = WORDS[key], config.get(name, default)
        if theirs not in words.values():
            known = " or ".join(dict.fromkeys(words.values()))
            raise ValueError(f"{name} is {theirs!r}, but only {known} is supported")
        return [here for here, there in words.items() if there == theirs][-1]

    T = config["num_train_timesteps"]
    return dict(
        timesteps=T, schedule=ours("schedule", "beta_schedule"),
        beta_start=config["beta_start"] * T / 1000,  # `make_schedule` multiplies by 1000/T
        beta_end=config["beta_end"] * T / 1000, predict=ours("predict", "prediction_type"),
        variance=ours("variance", "variance_type", "fixed_small"),
        clip=config.get("clip_sample", False))

def supported(config: dict, known: dict) -> None:
    """ValueError if an entry of the config is not the known one."""
    for key, value in known.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} is {config[key]!r}, but only {value!r} is supported")

def from_diffusers(path: Path, cache: Path) -> tuple[UNet, dict]:
    """A UNet2DModel and its scheduler as a UNet and settings.

    path: a folder (unet/ and scheduler/, or flat), or a model on the hub, downloaded once into
    `cache`. ValueError unless both networks have the same output for the same x_t and t, and both
    schedules the same β_t.
    """
    import diffusers
    diffusers.logging.set_verbosity(50)  # errors are raised here
    if not path.exists():
        try:
            path = Path(diffusers.DDPMPipeline.download(path.as_posix(), cache_dir=cache))
        except Exception as error:  # of the network, the hub or the disk
            raise OSError(f"{path.as_posix()} is not here, and cannot be downloaded from the hub: "
                          f"{one_line(error.__cause__ or error)}") from error
    unet, chain = (path / part if (path / part).is_dir() else path
                   for part in ("unet", "scheduler"))
    with reading(chain / "scheduler_config.json", "a DDPM scheduler"):
        given = diffusers.DDPMScheduler.load_config(chain)
        if given.get("_class_name") not in SCHEDULERS:
            raise ValueError(f"it is a {given.get('_class_name')}, not a {' or '.join(SCHEDULERS)}")
        scheduler = getattr(diffusers, given["_class_name"]).from_config(given)
        supported(scheduler.config, {"clip_sample_range": 1.0, "thresholding": False})
        settings = chain_settings(scheduler.config)
        again = diffusers.DDPMScheduler(**scheduler_config(settings))
        if not torch.allclose(again.betas, scheduler.betas, rtol=1e-4):
            raise ValueError("its β_t match no schedule of ddpm.py")
    with reading(unet / "config.json", "a supported network"):
        theirs, report = diffusers.UNet2DModel.from_pretrained(
            unet, output_loading_info=True, low_cpu_mem_usage=False)
        if wrong := [f"{what}: {keys[0]}" for what, keys in report.items() if keys]:
            raise ValueError(f"its weights have {wrong[0]}")
        settings |= network_settings(theirs.config)
        supported(theirs.config, unet_config(settings))
    net, weights = build_network(settings).eval(), theirs.float().state_dict()
    with reading(unet / "config.json", "a supported network"):
        own = net.state_dict()
        net.load_state_dict({here: weights[there].reshape(own[here].shape)
                             for here, there in names(net).items()})
        side, t = 2 ** len(settings["multipliers"]), torch.tensor([1, settings["timesteps"]])
        x = torch.arange(2.0 * settings["in_channels"] * side ** 2).sin().view(2, -1, side, side)
        with torch.no_grad():
            a, b = net(x, t), theirs(x, t - 1).sample
        if not (a - b).abs().max() <= 1e-4 * b.abs().max():  # true for NaN, too
            raise ValueError("it computes a different function from unet.py")
    return net, settings

def names(net: UNet) -> dict[str, str]:
    """Each weight's name here → its name in UNet2DModel, found by walking the network."""
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
                if not isinstance(getattr(module, ours), nn.Identity):
                    found[f"{here}.{ours}"] = f"{there}.resnets.{j}.{theirs}"
            if isinstance(module.attention, Attention):
                for ours, theirs in in_attention.items():
                    found[f"{here}.attention.{ours}"] = f"{there}.attentions.{j}.{theirs}"
            j += 1
    return {f"{here}.{leaf}": f"{there}.{leaf}" for here, there in found.items()
            for leaf in ("weight", "bias")}

def export(net: nn.Module, settings: dict, folder: Path) -> None:
    """Writes a folder for DDPMPipeline.from_pretrained. ValueError if that is impossible."""
    import diffusers
    if folder.exists():
        raise ValueError(f"{folder} already exists: export to a new folder")
    if not isinstance(net, UNet) or settings["multipliers"][0] != 1:
        raise ValueError("diffusers only has the network of unet.py, with a first multiplier of 1")
    try:
        theirs = diffusers.UNet2DModel(**unet_config(settings))
        scheduler = diffusers.DDPMScheduler(**scheduler_config(settings))
    except KeyError as error:
        raise ValueError(f"diffusers has no equivalent of {error}") from error
    own, shapes = net.state_dict(), theirs.state_dict()
    theirs.load_state_dict({there: own[here].reshape(shapes[there].shape)
                            for here, there in names(net).items()})
    part = folder.with_name(f".{secrets.token_hex(8)}.part")
    try:
        diffusers.DDPMPipeline(theirs, scheduler).save_pretrained(part)
        os.replace(part, folder)
    except Exception as error:  # each of the library's writers raises its own
        raise OSError(f"cannot write {folder}: {one_line(error)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)

@command
def main(argv=None) -> int:
    """Converts from SOURCE to TARGET: see the text at the head of this file."""
    parser = Parser(__doc__, "--no-ema", "--data-dir", prog="python -m extras.weights")
    parser.add_argument("source", type=nonblank, metavar="SOURCE", help="a checkpoint of train.py, "
                        "its folder, a folder of diffusers, or ORGANISATION/MODEL on the hub, "
                        "downloaded once to hub/ in the data folder")
    parser.add_argument("target", type=nonblank, metavar="TARGET", help="the folder to write: a "
                        "run or, from a checkpoint, a new folder of diffusers")
    args = parser.parse_args(argv)
    source, target = Path(args.source), Path(args.target)
    if (source / "checkpoint.pt" if source.is_dir() else source).exists():
        trained = load(source, not args.no_ema, start_machine("cpu"))
        export(trained.net, trained.settings, target)
        say(f"{target} holds {trained.source}")
        return 0
    if not is_diffusers(source):
        raise ValueError(f"{source} has neither a checkpoint.pt nor a network's config.json"
                         if source.is_dir() else f"{source}: no such file or folder")
    if args.no_ema:
        raise UsageError(f"--no-ema needs a checkpoint of train.py, which {source} is not")
    name = str(source.resolve()) if source.exists() else source.as_posix()
    path = target / "checkpoint.pt"
    if path.exists() and load_checkpoint(path).get("source") != name:
        raise ValueError(f"{path} already exists, and is not from {name}: give another TARGET")
    net, settings = from_diffusers(source, Path(args.data_dir) / "hub")
    weights = net.state_dict()
    save_checkpoint(path, {"settings": settings, "step": 0, "net": weights, "ema": weights,
                           "source": name})
    say(f"{path} holds {name}")
    return 0

if __name__ == "__main__":
    sys.exit(main())
