# diffusers: sec32_the_variance, with variance_type="fixed_large_log"
# σ_t² = β_t is one of the paper's two. step takes the root of its logarithm, which is negative
# (its issue 14569).
import torch
from diffusers import DDPMScheduler

s = DDPMScheduler(variance_type="fixed_large_log")
x = s.step(torch.zeros(1, 1), 500, torch.zeros(1, 1)).prev_sample
print(f"step gives {x.item()}")
assert x.isnan().all()
