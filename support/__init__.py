"""What any program needs, one subject a file. Import it before torch: it says if torch lacks."""
import signal
import threading
import warnings

# torch says this once in an environment without NumPy, which nothing here needs.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
if interrupts := threading.current_thread() is threading.main_thread():
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # the import loses Ctrl-C
try:
    import torch  # noqa: F401
except ImportError:
    raise SystemExit("PyTorch is missing: pip install torch==2.13.0") from None
finally:
    if interrupts:
        signal.signal(signal.SIGINT, handler)
