"""Settings of all tests, and the flag for the long forms."""
import warnings

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # the networks are tiny, and sums in the same order are the same bits

hypothesis.settings.register_profile("ddpm", deadline=None, derandomize=True, database=None,
                                     max_examples=50)
hypothesis.settings.load_profile("ddpm")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the long forms of the tests too")


@pytest.fixture
def long(request):
    return request.config.getoption("--long")
