"""What every program needs, one subject per file. Imported before torch, it reports its lack."""
import signal
import threading
import warnings

# torch warns once if NumPy is not installed; nothing here needs it.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
if interrupts := threading.current_thread() is threading.main_thread():
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # importing torch would swallow Ctrl-C
try:
    import torch  # noqa: F401
except ImportError:
    raise SystemExit("PyTorch is missing: pip install torch==2.13.0") from None
finally:
    if interrupts:
        signal.signal(signal.SIGINT, handler)
