# labml: sec44_interpolation fails
# §4.4 decodes from the time that it encoded. interpolate decodes from t_ − 1, t_=0 not at all.
import sys
from unittest import mock
import torch
vision = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
sys.modules |= dict.fromkeys(vision, mock.Mock())
from labml_nn.diffusion.ddpm.evaluate import DenoiseDiffusion, Sampler
d = DenoiseDiffusion(eps_model=(network := mock.Mock()), n_steps=1000, device=torch.device("cpu"))
x = Sampler(d, 1, 8, d.beta.device).interpolate(*torch.zeros(2, 9, 1, 8, 8), lambda_=0.0, t_=0)
print(f"t_=0: noise of deviation {x.std():.2f}; the network was asked {network.call_count} times")
assert x.std() > 0 and network.call_count == 0
