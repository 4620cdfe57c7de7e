# lucidrains: eq04_the_jump_is_iterated_steps, with beta_schedule="linear" and timesteps below 20
# β_t lies in (0, 1). linear_beta_schedule multiplies β by 1000 / T, and the tables become nan.
import sys
from unittest import mock
import torch
sys.modules["torchvision"] = mock.MagicMock()
from denoising_diffusion_pytorch import GaussianDiffusion
network = mock.Mock(channels=1, out_dim=1, self_condition=0, random_or_learned_sinusoidal_cond=0)
d = GaussianDiffusion(network, image_size=8, timesteps=10, beta_schedule="linear")
x = d.q_sample(torch.zeros(1, 1, 8, 8), torch.tensor([9]))
print(f"T = 10: the largest β is {d.betas.max():.1f}, and q_sample at T gives {x[0, 0, 0, 0]}")
assert d.betas.max() > 1 and x.isnan().all()
