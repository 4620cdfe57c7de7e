# monai: fewer_steps_of_alg2 fails
# A step has the marginals of Eq. 4 at a time and at the next of the list. After set_timesteps(n),
# step uses t − 1 and β_t of the full schedule, and so removes next to none of the noise.
import torch
from monai.networks.schedulers import DDPMScheduler

torch.manual_seed(0)
s = DDPMScheduler(1000, clip_sample=False, prediction_type="sample")
s.set_timesteps(2)
x = s.step(torch.ones(20000, 1), s.timesteps[0], torch.randn(20000, 1))[0]
print(f"x_0 = 1, to timestep 0: mean {x.mean():.2f}, deviation {x.std():.2f}; Eq. 4: 1.00, 0.01")
assert x.mean() < 0.1 and x.std() > 0.9
