# diffusers: fewer_steps_of_alg2, with variance_type="fixed_large"
# Algorithm 2 has z = 0 at the last step. step adds noise there, unless it is at timestep 0; with
# timestep_spacing="trailing" it is not.
import torch
from diffusers import DDPMScheduler

s = DDPMScheduler(variance_type="fixed_large", timestep_spacing="trailing")
s.set_timesteps(50)
x = s.step(torch.zeros(20000, 1), s.timesteps[-1], torch.zeros(20000, 1)).prev_sample
print(f"the last of 50 steps adds noise of standard deviation {x.std():.2f}")
assert x.std() > 0.05
