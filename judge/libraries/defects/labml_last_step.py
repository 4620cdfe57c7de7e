# labml: alg2_sampling fails
# Algorithm 2 has z = 0 at the last step, t = 1. p_sample adds noise at each.
import torch
from labml_nn.diffusion.ddpm import DenoiseDiffusion

d = DenoiseDiffusion(eps_model=lambda x, t: 0 * x, n_steps=1000, device=torch.device("cpu"))
x = d.p_sample(torch.zeros(20000, 1, 1, 1), torch.zeros(20000, dtype=torch.long))
print(f"the last step adds noise of standard deviation {x.std():.2f}")
assert x.std() > 0.009
