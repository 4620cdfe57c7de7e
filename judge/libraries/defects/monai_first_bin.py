# monai: eq13_the_outermost_bins_are_open, with the default scaled_input_range=(0, 1)
# Eq. 13's outermost bins are open, and 256 probabilities sum to 1. get_likelihood opens those below
# −0.999 and above 0.999, and not the bin of 0.
import torch
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import DDPMScheduler

s = DDPMScheduler(1, beta_start=0.01, variance_type="fixed_large", prediction_type="sample")
x = torch.arange(256)[:, None] / 255
nll = DiffusionInferer(s).get_likelihood(x, lambda x, **_: 0 * x, verbose=False)
print(f"the probabilities of the 256 levels sum to {nll.neg().exp().sum():.3f}")
assert nll.neg().exp().sum() < 0.9
