# monai: fewer_steps_of_ddim fails
# DDIM goes from a time of its list to the next. set_timesteps spaces them from T − 1 to 0, and step
# goes T // n back instead.
import torch
from monai.networks.schedulers import DDIMScheduler

s = DDIMScheduler(1000, clip_sample=False, prediction_type="sample")
s.set_timesteps(3)
now, then = s.alphas_cumprod[s.timesteps[0]] ** 0.5, s.alphas_cumprod[s.timesteps[1]] ** 0.5
x = s.step(torch.ones(1, 1), s.timesteps[0], now * torch.ones(1, 1))[0].item()
print(f"x_0 = 1, timesteps {s.timesteps.tolist()}: step gives {x:.4f}, and Eq. 4 {then:.4f}")
assert abs(x - then) > 0.1
