# lucidrains: fewer_steps_of_ddim, with LearnedGaussianDiffusion
# sampling_timesteps below timesteps means DDIM. Its model_predictions uses names not imported.
import sys
from unittest import mock
sys.modules["torchvision"] = mock.MagicMock()
from denoising_diffusion_pytorch import LearnedGaussianDiffusion, Unet
d = LearnedGaussianDiffusion(Unet(8, learned_variance=True), image_size=8, sampling_timesteps=9)
try:
    said = d.sample(1)
except NameError as error:
    said = error
sys.exit(print(f"sample: {said!r}") if isinstance(said, NameError) else "it samples")
