# monai: eq05_terms_of_the_bound, with variance_type="fixed_large"
# L_{t−1} is KL(N(μ̃_t, β̃_t) ‖ N(μ_θ, β_t)). get_likelihood takes β_t for both, so that a perfect μ_θ
# costs nothing.
import torch
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import DDPMScheduler

s = DDPMScheduler(1000, variance_type="fixed_large", prediction_type="sample")
s.timesteps = torch.tensor([1])
kl = DiffusionInferer(s).get_likelihood(torch.zeros(1, 1), lambda x, **_: 0 * x, verbose=False)
print(f"timestep 1, μ_θ = μ̃_t: {kl.item():.4f} nats, and ½(log β/β̃ + β̃/β − 1) is 0.1214")
assert kl < 0.01
