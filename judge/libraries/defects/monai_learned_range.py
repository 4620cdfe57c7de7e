# monai: sec32_the_variance, with variance_type="learned_range"
# A learned variance lies between log β̃_t and log β_t (Nichol and Dhariwal, Eq. 15). step lays it
# between β̃_t and β_t, and calls them min_log and max_log.
import torch
from monai.networks.schedulers import DDPMScheduler
s = DDPMScheduler(1000, variance_type="learned_range", clip_sample=False)
v = s.step(torch.zeros(10 ** 6, 2), 1, torch.zeros(10 ** 6, 1))[0].var()
small, large = s.betas[1] * (1 - s.alphas_cumprod[0]) / (1 - s.alphas_cumprod[1]), s.betas[1]
print(f"half way at timestep 1: {v:.1e}; between the logarithms {(small * large).sqrt():.1e}")
assert abs(v - (small + large) / 2) < 1e-6
