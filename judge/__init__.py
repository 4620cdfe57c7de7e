"""The judge: the paper's statements on any implementation, as a command, `python -m judge FILE`.

interface.py lists what an implementation may offer, theorems.py states what the paper says of it,
reference.py computes the right answers, and judging.py compares. Nothing here imports ddpm.py.
"""
