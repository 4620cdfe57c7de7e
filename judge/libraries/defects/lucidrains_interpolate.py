# lucidrains: sec44_interpolation fails
# §4.4 decodes from the time that was encoded. interpolate encodes at timestep t and decodes from
# timestep t − 1, so that t=0 adds noise and never asks the network.
import sys
from unittest import mock
import torch
sys.modules["torchvision"] = mock.MagicMock()
from denoising_diffusion_pytorch import GaussianDiffusion
network = mock.Mock(channels=1, out_dim=1, self_condition=0, random_or_learned_sinusoidal_cond=0)
x = GaussianDiffusion(network, image_size=8).interpolate(*torch.zeros(2, 9, 1, 8, 8), t=0, lam=0.0)
print(f"t=0: noise of deviation {x.std():.2f}, the network was asked {network.call_count} times")
assert x.std() > 0 and network.call_count == 0
