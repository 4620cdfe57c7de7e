"""What any program needs, one subject a file. Import it before torch: it says if torch lacks."""
import warnings

# torch says this once in an environment without NumPy, which nothing here needs.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
try:
    import torch  # noqa: F401
except ImportError:
    raise SystemExit("PyTorch is missing: pip install torch==2.13.0") from None
except KeyboardInterrupt:  # the import takes seconds
    raise SystemExit(130) from None
