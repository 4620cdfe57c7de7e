"""Training, resuming and sampling on each kind of device that is here, and the CPU against the GPU."""
import os
from pathlib import Path

import pytest
import torch

import sample
import train
from helpers import assert_equal, random_run, SMALL_NET
from support.checkpoint import Trained, load_checkpoint
from support.machine import Machine, start_machine

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
FLAGS = ("--dataset images.pt --channels 32 --multipliers 1 --timesteps 20 --batch-size 2 --samples 0 "
         "--dropout 0.1 --precision fp32 --no-compile").split()
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which CUDA is not deterministic
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    yield request.param
    torch.use_deterministic_algorithms(False)


def test_a_training_step_is_that_of_its_seed(device):
    """On the same device the same loss, gradient and weights, to the bit; another step has others."""
    def losses(k):
        run = train.begin({"init": None, "dataset": "shapes", "channels": 32, "multipliers": [1],
                           "batch_size": 4}, torch.load("images.pt"), {},
                          Machine(torch.device(device), torch.float32), Path("r"))
        torch.use_deterministic_algorithms(True)
        loss, t, norm = train.training_step(run, k)
        assert {x.device.type for x in (loss, t, norm, *run.net.parameters())} == {device}
        return loss, t, norm, *run.net.parameters(), *run.ema.parameters()
    one, two, other = losses(3), losses(3), losses(4)
    assert all(map(torch.equal, one, two)) and not torch.equal(one[0], other[0])


def test_a_resumed_run_is_an_uninterrupted_one(device):
    """With --deterministic the weights of 2 + 2 steps are those of 4, to the bit."""
    same = [*FLAGS, "--device", device, "--deterministic"]
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        assert train.main([*same, "--out", out, "--steps", str(steps)]) == 0
    one, two = (load_checkpoint(Path(out, "checkpoint.pt")) for out in ("whole", "parts"))
    for part in ("net", "ema"):
        assert_equal(dict(one[part]), dict(two[part]))


def images_on(device: str, run: dict) -> torch.Tensor:
    s = train.build_schedule(SMALL_NET)
    trained = Trained(run["ema"].to(device), s, SMALL_NET, "")
    machine = Machine(torch.device(device), torch.float32)
    return sample.draw_samples(trained, 5, 3, 2, machine)


def test_the_same_command_draws_the_same_samples(device):
    """The images of two commands on the same device are the same to the bit, and lie on the CPU."""
    run = random_run()
    one = images_on(device, run)
    assert one.device.type == "cpu" and torch.equal(one, images_on(device, run))


@GPU
def test_a_gpu_draws_the_samples_of_a_cpu():
    """In float32, without TF32, 99 % of the pixels to one level of 255. (The noise: test_command.py.)"""
    start_machine("cuda", "fp32")
    run = random_run()
    here, there = (images_on(place, run).int() for place in ("cpu", "cuda"))
    assert ((here - there).abs() <= 1).double().mean() >= 0.99
