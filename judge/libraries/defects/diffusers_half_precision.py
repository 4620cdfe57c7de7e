# diffusers: eq04_the_jump_is_iterated_steps, in bfloat16 and float16
# Eq. 4 adds noise of variance 1 − ᾱ_t > 0 at every t. add_noise rounds ᾱ_t to the dtype of the
# images before it subtracts, so that at the first times 1 − ᾱ_t is 0.
import torch
from diffusers import DDPMScheduler

for dtype, least in ((torch.bfloat16, 10), (torch.float16, 2)):
    nil, t = torch.zeros(1000, 1, dtype=dtype), torch.arange(1000)
    none = (DDPMScheduler().add_noise(nil, nil + 1, t) == 0).sum().item()
    print(f"{dtype}: no noise at {none} of 1000 times", end="; ")
    assert none >= least
