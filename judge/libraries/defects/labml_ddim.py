# labml: fewer_steps_of_ddim, with the DDIMSampler of its Stable Diffusion
# Its τ, a subsequence of 1 … T, is the index of a table that begins with ᾱ_1: T steps read past it.
import sys
from unittest import mock
import torch
sys.modules["transformers"] = mock.MagicMock()
from labml_nn.diffusion.stable_diffusion.sampler.ddim import DDIMSampler
try:
    said = DDIMSampler(mock.Mock(n_steps=1000, alpha_bar=torch.ones(1000)), n_steps=1000)
except IndexError as error:
    said = error
sys.exit(print(f"n_steps=1000: {said!r}") if isinstance(said, IndexError) else "it has T steps")
