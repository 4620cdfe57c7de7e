"""What an implementation may offer: the table that the judge uses and prints."""

USAGE = """The judge: tests any implementation against the paper's statements.

    python -m judge my_ddpm.py     a file, or a module's name
    python -m judge                prints this text

The status is 0 if nothing fails, 1 if a theorem fails, and 2 if there is nothing to judge.

The implementation is a module with some of these functions, or with an object `implementation` that
has them; judge/template.py is one to fill in. t is (B,) int64 in 1 … T (T may be 1), x (B, D) in
[−1, 1] with 256 levels for Eq. 13, a variance (B,), (B, 1) or (B, D), and s is what `schedule`
returns. Arrays are torch tensors, or NumPy arrays if the module uses NumPy and not torch.
"""
INTERFACE = {  # name: its arguments, their meaning and what it returns
    "schedule": ("betas", "β_1 … β_T, a list → s, anything"),
    "q_sample": ("s, x0, t, eps", "Eq. 4 → x_t"),
    "q_posterior": ("s, x0, x_t, t", "Eqs. 6, 7 → mean, variance of x_{t−1}"),
    "predict_x0": ("s, x_t, t, eps", "Eq. 15 → x̂_0"),
    "p_mean_variance": ("s, model, x_t, t", "Eq. 11, σ_t² → mean, variance; model is ε_θ"),
    "sample": ("s, model, x_T, noise", "Algorithm 2 → x_0; noise(t): z from t to t − 1"),
    "loss": ("s, model, x0, t, eps", "Eq. 14 → (B,), a mean or a sum over D"),
    "log_likelihood": ("x0, mean, variance",
                       "Eq. 13 → log p, (B, D) or summed to (B,); nats"),
    "kl": ("mean_q, variance_q, mean_p, variance_p",
           "KL(q ‖ p), (B, D) or summed to (B,); nats"),
    "vlb_term": ("s, model, x0, x_t, t",
                 "L_{t−1} of Eq. 5, at t = 1 L_0 → (B,), nats, a sum"),
    "respaced": ("s, times", "a schedule of only τ_1 < … < τ_n = T: its t counts\n"
                             "1 … n, and the network is given τ_t"),
    "ddim": ("s, model, x_T, noise, eta", "DDIM with this η → x_0"),
    "interpolate": ("s, model, x0, other, lam, t, eps, eps_other, noise",
                    "§4.4 → x_0; lam (B,), t one int")}


def interface() -> str:
    """The text that `python -m judge` prints."""
    lines = [USAGE]
    for name, (arguments, meaning) in INTERFACE.items():
        call = f"    {name}({arguments})"
        lines += [call] * (len(call) > 49)                 # a long one gets its own line
        first, *rest = meaning.split("\n")
        lines += [f"{call if len(call) <= 49 else '':50}{first}", *(" " * 50 + x for x in rest)]
    return "\n".join(lines)
