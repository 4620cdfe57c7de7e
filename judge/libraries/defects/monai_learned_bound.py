# monai: eq05_terms_of_the_bound, with variance_type="learned" or "learned_range"
# A learned variance has a bound too. get_likelihood asks for the truth of a tensor, and raises.
import torch
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import DDPMScheduler
infer = DiffusionInferer(DDPMScheduler(1000, variance_type="learned_range"))
try:
    said = infer.get_likelihood(torch.zeros(2, 1), lambda x, **_: torch.ones(2, 2), verbose=False)
except RuntimeError as error:
    said = error
print(f"get_likelihood: {said!r}")
assert isinstance(said, RuntimeError)
