# diffusers: fewer_steps_of_ddim fails, with timestep_spacing="linspace", or an uneven "trailing"
# DDIM goes from a time of its list to the next. step goes T // n back instead (its issue 12633).
import torch
from diffusers import DDIMScheduler

for spacing in ("leading", "trailing", "linspace"):
    s = DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing=spacing)
    s.set_timesteps(3)
    now, then = (s.alphas_cumprod[s.timesteps[i]].item() ** 0.5 for i in (1, 2))
    x = s.step(torch.ones(1, 1), s.timesteps[1], torch.full((1, 1), now)).prev_sample.item()
    print(f"{spacing}: {x:.4f}, where Eq. 4 has {then:.4f}", end="; ")
assert abs(x - then) > 0.1
