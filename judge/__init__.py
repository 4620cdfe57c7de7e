"""The judge: tests any implementation against the paper's statements: `python -m judge FILE`.

interface.py lists what an implementation may offer, theorems.py has the paper's statements about
it, reference.py computes the right answers, and judging.py compares. Nothing here imports ddpm.py.
"""
import warnings

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # nothing here needs it
