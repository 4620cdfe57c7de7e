# monai: eq04_the_jump_is_iterated_steps, in bfloat16
# Eq. 4 adds noise of variance 1 − ᾱ_t > 0 at every t. add_noise rounds ᾱ_t to the dtype of the
# images, where 1 − ᾱ_t is 0 at first, and keeps that table: step gives nan at these times.
import torch
from monai.networks.schedulers import DDPMScheduler

s, nil = DDPMScheduler(1000), torch.zeros(1000, 1, dtype=torch.bfloat16)
none = (s.add_noise(nil, nil + 1, torch.arange(1000)) == 0).sum().item()
x = s.step(torch.zeros(1, 1), 1, torch.ones(1, 1))[0]
print(f"no noise at the first {none} times; afterwards step in float32 gives {x.item()}")
assert none >= 10 and x.isnan().all()
