"""Checkpoints, and a trained network with everything needed to use it."""
from __future__ import annotations

import copy
import functools
import hashlib
import io
import json
import operator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import ddpm
from support import winograd
from support.command import reading, written
from support.data import raw_bytes
from support.machine import Machine, start_machine
from unet import build_network

FORMAT = "ddpm checkpoint 2"

def save_checkpoint(path: Path, payload: dict) -> None:
    """Writes torch.save's bytes and their SHA-256. OSError if that fails; an existing checkpoint
    is then unchanged."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **payload}, buffer)
    with written(path) as file:
        file.write(buffer.getbuffer())
        file.write(hashlib.sha256(buffer.getbuffer()).digest())

def load_checkpoint(path: Path) -> dict:
    """Reads what `save_checkpoint` wrote. ValueError if a single byte changed."""
    with reading(path, "a checkpoint of train.py"):
        raw = memoryview(path.read_bytes())
        if hashlib.sha256(raw[:-32]).digest() != raw[-32:]:
            raise ValueError("its checksum does not match: it is damaged or not a checkpoint")
        payload = torch.load(io.BytesIO(raw[:-32]), map_location="cpu", weights_only=True)
        if payload["format"] != FORMAT:
            raise ValueError(f"its format is {payload['format']}, not {FORMAT}")
    return payload

class Trained(NamedTuple):
    """A network in evaluation mode, with everything needed to use it."""
    net: nn.Module
    s: ddpm.Schedule
    settings: dict          # of train.py
    source: str             # where it comes from, in words

    @property
    def model_settings(self) -> dict:
        """The settings of the network and of its noise schedule."""
        return {name: self.settings[name] for name in (
            "in_channels", "image_size", "channels", "multipliers", "blocks", "attention",
            "timesteps", "schedule", "beta_start", "beta_end", "predict", "variance")}

    @property
    def model(self) -> ddpm.Model:
        """p_θ as it was trained."""
        return ddpm.Model(self.s, self.net, self.settings["predict"], self.settings["variance"],
                          self.settings.get("clip", True))

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of one image."""
        side = self.settings["image_size"]
        return self.settings["in_channels"], side, side

def load(name: str | Path | None = None, ema: bool = True,
         machine: Machine | None = None) -> Trained:
    """A trained network on the machine's device (default: the best one available).

    name: a checkpoint or its run's folder (default: the run in runs/ that saved last). ema: use the
    averaged weights. ValueError or OSError if that fails.
    """
    machine = machine or start_machine()
    path = newest_checkpoint() if name is None else Path(name)
    file = path / "checkpoint.pt" if path.is_dir() else path
    if not file.exists():
        how = f"python -m extras.weights {path.as_posix()} runs/{path.name}"
        raise ValueError(f"{file}: no such file or folder" + (
            f"; convert weights of diffusers first: {how}" if is_diffusers(path) else ""))
    state = load_checkpoint(file)
    settings, kind = state["settings"], "averaged" if ema else "last"
    if not ema and "net" not in state:
        raise ValueError(f"{file} has the averaged weights alone: omit --no-ema")
    with reading(file, f"{kind} weights of this network"):
        weights = state["ema" if ema else "net"]
        if not all(x.isfinite().all() for x in weights.values()):
            raise ValueError("they are not finite")
        known = Trained(nn.Identity(), None, settings, "").model_settings
        for name in ("in_channels", "image_size", "channels", "blocks", "multipliers", "attention"):
            for x in known[name] if isinstance(known[name], list) else [known[name]]:
                operator.index(x)
    net = build_network(settings)  # outside `reading`: its errors are its own
    with reading(file, f"{kind} weights of this network"):
        net.load_state_dict(weights)
    made = f"from {state['source']}" if "source" in state else f"step {state['step']}"
    return Trained(machine.placed(net).eval(), build_schedule(settings), settings,
                   f"{file}, {made}, {kind} weights")

def is_diffusers(path: Path) -> bool:
    """Whether this is a folder in diffusers' layout, or could be a model's name on the hub."""
    return any((path / file).exists() for file in ("config.json", "unet/config.json")) or (
        len(path.parts) == 2 and path.parts[0] != "runs" and path.suffix != ".pt"
        and not path.exists() and not path.parent.is_dir())

def newest_checkpoint(root: Path = Path("runs")) -> Path:
    """The checkpoint saved last by any run under `root`."""
    found = sorted(root.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no run under {root}/: train one first (python train.py --dataset shapes)"
                         " or give a --checkpoint")
    return found[-1]

def build_schedule(settings: dict) -> ddpm.Schedule:
    """The noise schedule that the settings name."""
    return ddpm.make_schedule(settings["timesteps"], settings["schedule"], settings["beta_start"],
                              settings["beta_end"])

@functools.lru_cache(maxsize=1)  # a run's sample grids compile once
def inference_copy(net: nn.Module, machine: Machine, *shape: int) -> tuple[nn.Module, nn.Module]:
    """A copy of `net` in the machine's precision, and the same compiled for batches of this shape,
    if a shape and --compile are given."""
    with torch.inference_mode(False):  # inference tensors could not be changed later
        own = copy.deepcopy(net).eval()
        for module in own.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(machine.dtype)
    return own, machine.compiled(own, *shape) if shape else own

def inference_model(model: ddpm.Model, machine: Machine, *shape: int) -> ddpm.Model:
    """The same p_θ for sampling on this machine: its weights are cast once, not in every call."""
    if model.predict == "mean":  # its x̂_0 magnifies 16-bit rounding errors
        machine = machine._replace(dtype=torch.float32)
    own, fast = inference_copy(model.net, machine, *shape)
    own.load_state_dict(model.net.state_dict())  # the copy may be older
    winograd.keep_filters(own)
    return replace(model, s=model.s.to(machine.device), net=machine.network(fast))

def weights_hash(trained: Trained) -> bytes:
    """SHA-256 of the network's settings and weights."""
    settings = trained.settings
    choices = {"predict": settings["predict"], "variance": settings["variance"],
               "clip": settings.get("clip", True)}
    sha = hashlib.sha256(json.dumps([trained.model_settings, choices]).encode())
    for name, weight in sorted(trained.net.state_dict().items()):
        sha.update(name.encode() + raw_bytes(weight))
    return sha.digest()
