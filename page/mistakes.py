"""The easy mistakes: each wrong line, the test that notices it, and what one sees of it.

    python page/mistakes.py --out mistakes            every mistake; hours; a stopped run goes on
    python page/mistakes.py --out mistakes --only "σ_t² instead"
    python page/mistakes.py --out mistakes --keep     numbers and pictures into page/images

The wrong line is put into a copy of the program, and the commands of the mistake's control are run
with the copy: the same commands, noise and images as with the right lines. Kept are what the
commands print, the loss curve, 16 samples and bits/dim. The data are Fashion-MNIST at 16×16 if
--data-dir has it (each pixel the mean of 2×2), and else the synthetic shapes.
"""
from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "page" / "images" / "mistakes"
sys.path.insert(0, str(ROOT))
from support.command import (Parser, Progress, UsageError, command, one_line, positive_int, say,
                             written)

import torch

from support import data

# === The mistakes =================================================================================

# name: (file, test, [(right, wrong), …], names of CONTROLS); docs/mistakes.md tells what was seen. None: no
# command shows the mistake, for example because only tests call the function.
D, E, R = "test_ddpm.", "test_evaluate.", "test_compress."
U, T, G = "test_unet.", "test_train.", "test_simulated_cuda."
S, C, N = "test_sample.", "test_checkpoint.", "test_resume."
MISTAKES = {
    # --- the schedule and the forward process
    "ᾱ_0 ≠ 1": ("ddpm.py", D + "test_sec2_alpha_bar_is_the_running_product", [
        ("[betas.new_zeros(1), betas]", "[betas[:1], betas]")], "sampling bound"),
    "ᾱ_t as a product up to T": ("ddpm.py", D + "test_sec2_alpha_bar_is_the_running_product", [
        ("alphas.cumprod(0)", "alphas.prod().expand(len(alphas))")], "training"),
    "T changed, β not rescaled": ("ddpm.py", D + "test_sec4_schedules_by_name", [
        ("min(beta * 1000 / T, 0.999)", "beta"), ("if s.alpha_bars[T] > 1e-3:", "if False:")],
    "short"),
    "β_t instead of √β_t in Eq. 2": ("ddpm.py", D + "test_eq02_forward_step", [
        ("_like(beta.sqrt(), x) * eps", "_like(beta, x) * eps")], None),
    "α_t and β_t exchanged in Eq. 2": ("ddpm.py", D + "test_eq02_forward_step", [
        ("(alpha.sqrt(), x) * x + _like(beta.sqrt(), x) * eps",
         "(beta.sqrt(), x) * x + _like(alpha.sqrt(), x) * eps")], None),
    "1 − ᾱ_t instead of its root in Eq. 4": (
        "ddpm.py", D + "test_eq04_jump_is_iterated_steps", [
            ("sigma2.sqrt().to(mean.dtype) * eps", "sigma2.to(mean.dtype) * eps")], "training"),
    # --- the posterior and the reverse process
    "β_t instead of β̃_t in Eq. 7": ("ddpm.py", D + "test_eq07_posterior_is_bayes_rule", [
        ("return (1 - _at(s.alpha_bars, t - 1)) / (1 - _at(s.alpha_bars, t)) * _at", "return _at")], "bound eta"),
    "√ᾱ_t instead of √α_t in Eq. 7": (
        "ddpm.py", D + "test_eq03_integrand_equals_eq21_along_every_path", [
            ("weight_x_t = alpha.sqrt() * (1", "weight_x_t = alpha_bar.sqrt() * (1")],
        "sampling bound"),
    "σ_1² = β̃_1 = 0": ("ddpm.py", D + "test_sec32_the_two_fixed_variances", [
        ("_beta_tilde(s, t.clamp(min=2))", "_beta_tilde(s, t)")], "bound"),
    "√ᾱ_t instead of √α_t in Eq. 11": (
        "ddpm.py", D + "test_eq11_every_prediction_gives_the_posterior_mean", [
            ("    mean = q_posterior_mean_variance(s, x0_hat, x_t, t).mean\n",
             "    eps = predict_eps_from_x0(s, x_t, t, x0_hat)\n"
             "    mean = x_t - _like(s.betas[t] / (1 - s.alpha_bars[t]).sqrt(), x_t) * eps\n"
             "    mean = mean / _like(s.alpha_bars[t].sqrt(), x_t)\n")], "no-clip"),
    "Eq. 15 divided by ᾱ_t": ("ddpm.py", D + "test_eq15_inverts_the_jump", [
        ("* eps) / _like(alpha_bar.sqrt(), x_t)", "* eps) / _like(alpha_bar, x_t)")], "sampling"),
    "x̂_0 clipped after the mean was taken": (
        "ddpm.py", D + "test_eq11_clipping_comes_before_the_mean", [
            ("(x0_hat.clamp(-1, 1) if model.clip else x0_hat), log", "x0_hat, log"),
            ("return Reverse(mean, sigma2, x0_hat)",
             "return Reverse(mean, sigma2, x0_hat.clamp(-1, 1) if model.clip else x0_hat)")], "sampling"),
    "the halves of a learned variance exchanged": (
        "ddpm.py", D + "test_table2_learned_variance_is_the_second_half", [
            ("out, log_sigma2 = out", "log_sigma2, out = out")], "learned"),
    # --- Algorithms 1 and 2
    "the top t never drawn": ("train.py", T + "test_alg1_draws", [
        ("torch.randint(1, T + 1,", "torch.randint(1, T,")], "training"),
    "t = 0 drawn": ("train.py", T + "test_alg1_draws", [
        ("torch.randint(1, T + 1,", "torch.randint(0, T + 1,")], "training"),
    "the same draws in every step": (
        "train.py", T + "test_alg1_draws_are_a_function_of_seed_and_step", [
            ('seed_of(run.settings["seed"], "step", k)', 'seed_of(run.settings["seed"], "step")')],
        "training"),
    "the loss summed, not averaged": ("ddpm.py", D + "test_eq14_loss_simple", [
        (".square().flatten(1).mean(1)\n\ndef loss_vlb", ".square().flatten(1).sum(1)\n\ndef loss_vlb")],
    "training"),
    "ε as the target of `--predict mean`": ("ddpm.py", D + "test_eq14_loss_simple", [
        ("lambda s, x0, x_t, t, eps: q_posterior_mean_variance(s, x0, x_t, t).mean,",
         "lambda s, x0, x_t, t, eps: eps,")], "mean"),
    "σ_t² instead of σ_t": ("ddpm.py", D + "test_alg2_moments_of_the_sampler", [
        ("p.sigma2.sqrt().to(p.mean.dtype) * z", "p.sigma2.to(p.mean.dtype) * z")], "sampling"),
    "noise at the last step": ("ddpm.py", D + "test_alg2_moments_of_the_sampler", [
        ("noise(t) if t > 1 else torch.zeros_like(x_t)", "noise(t)")], "sampling"),
    "a loop that ends at t = 2": (
        "ddpm.py", D + "test_alg2_paper_schedule_standard_normal_data", [
            ("start):\n        # 3: z", "start)[:-1]:\n        # 3: z")], "sampling"),
    "β_t of the full schedule with fewer steps": (
        "ddpm.py", D + "test_respace_is_the_chain_of_fewer_steps", [
            ("Schedule(1 - alphas, alphas,", "Schedule(s.betas[tau], s.alphas[tau],")], "steps"),
    "the network given i instead of τ_i": (
        "ddpm.py", D + "test_respace_is_the_chain_of_fewer_steps", [
            ("alpha_bars, s.times[tau], full)", "alpha_bars, torch.arange(len(tau)), full)")],
        "steps"),
    # --- the decoder and the bound
    "DDIM's noise and direction not balanced": (
        "ddpm.py", D + "test_ddim_has_the_marginals_of_eq04_for_every_eta", [
            ("(1 - alpha_bar_before - sigma2)", "(1 - alpha_bar_before)")], "eta"),
    "finite outermost bins": ("ddpm.py", D + "test_eq13_probabilities_sum_to_one", [
        ("torch.where(x0 <= -1, -infinity, x0 - 1 / 255)", "x0 - 1 / 255")], "bound"),
    "bins half a level too wide": ("ddpm.py", D + "test_eq13_each_bin_is_an_integral", [
        ("-infinity, x0 - 1 / 255)", "-infinity, x0 - 2 / 255)")], "bound"),
    "a floor under the decoder": ("ddpm.py", D + "test_eq13_gradient", [
        ("expm1(log_a - log_b))", "expm1(log_a - log_b)).clamp(min=-28)"),
        ("return log_b + ", "return (log_b + 0 * log_b.clamp(min=-28)).clamp(min=-28) + ")],
    None),  # no probability of these networks is as small
    "the KL without its −1": ("ddpm.py", D + "test_eq05_kl_is_the_mean_log_ratio", [
        ("/ p.sigma2 - 1)", "/ p.sigma2)")], "bound"),
    "the quotient of variances inverted in the KL": (
        "ddpm.py", D + "test_eq16_equals_eq05_for_gaussian_data", [
            ("(p.sigma2 / q.sigma2).log()", "(q.sigma2 / p.sigma2).log()")], "bound"),
    "L_T taken at T − 1": ("ddpm.py", D + "test_eq05_prior_term", [
        ("q = q_mean_variance(s, x0, _all(s.T, x0))",
         "q = q_mean_variance(s, x0, _all(s.T - 1, x0))")], None),  # 2 % of 10⁻⁵ bits/dim
    "L_0 without its minus sign": ("ddpm.py", D + "test_eq05_terms_are_mean_log_ratios", [
        ("L_0 = -discretized", "L_0 = discretized")], "bound"),
    "half of each KL lost": (
        "ddpm.py", D + "test_eq05_bound_is_above_the_entropy_and_approaches_it", [
            ("is_first, L_0, normal_kl(q, p)", "is_first, L_0, 0.5 * normal_kl(q, p)")], "bound"),
    "Eq. 12 without its ½": ("ddpm.py", D + "test_eq12_weight", [
        ("weight / (2 * p_variance(s, t, variance))", "weight / p_variance(s, t, variance)")],
    None),
    "nats called bits": ("ddpm.py", D + "test_table1_bits_per_dim", [
        ("x0[0].numel() * math.log(2))", "x0[0].numel())")], "bound"),
    "strata weighted alike": ("evaluate.py", E + "test_eq05_stratified_estimate_is_unbiased", [
        ("terms.append(length * ", "terms.append(s.T / K * ")], "terms"),
    # --- progressive coding and interpolation
    "L_T left out of the rate": (
        "ddpm.py", D + "test_alg3_alg4_rate_and_distortion_are_the_bound", [
            ("    rate = prior_kl(s, x0)", "    rate = 0 * prior_kl(s, x0)")], "bound"),
    "the rate not accumulated": ("ddpm.py", E + "test_bits_per_dim_command", [
        ("rate = rate + vlb_term(s, x0, x, now, p)", "rate = vlb_term(s, x0, x, now, p)")],
    "bound"),
    "the noise of another time sent": (
        "ddpm.py", D + "test_alg3_the_senders_chain_has_the_marginals_of_eq04", [
            ("p_sample(q, noise(t))", "p_sample(q, noise(t + 1))")], "bound"),
    "a sample μ + σ² ε": ("ddpm.py", D + "test_alg3_the_senders_chain_has_the_marginals_of_eq04", [
        ("p_sample(q, noise(t))", "q.mean + q.sigma2 * noise(t)")], "bound"),
    "distortion on the scale of [−1, 1]": ("ddpm.py", D + "test_sec43_distortion", [
        ("return 127.5 * (x0 - x0_hat)", "return (x0 - x0_hat)")], "bound"),
    "interpolation decoded from t − 1": ("ddpm.py", D + "test_sec44_interpolation", [
        ("return loop(model, mixed, noise, start=t)", "return loop(model, mixed, noise, start=t - 1)")], "figure-8"),
    # --- real bits
    "the candidate with the largest ratio": (
        "extras/compress.py", R + "test_the_chosen_candidate_is_a_sample_of_q", [
            ("(waits.cumsum(0).log() - log_w", "(-log_w")], "files"),
    "all octaves of K equally likely": (
        "extras/compress.py", R + "test_the_mean_length_keeps_the_bound", [
            ("-torch.arange(b)", "-0 * torch.arange(b)")], "files"),
    "candidates from torch.randn": (
        "extras/compress.py", R + "test_candidates_are_standard_normal", [
        ("NORMAL[words.view(torch.int16).int() + 32768].view(BLOCK, n)",
         "torch.randn(BLOCK, n, generator=g)")], "files"),
    "bits beyond the end read as zeros": (
        "extras/compress.py", R + "test_code_length_is_that_of_the_probabilities", [
            ("if symbol != other or symbol", "if symbol")], "files"),
    "the sender goes on with a sample of its own": (
        "extras/compress.py", R + "test_a_file_gives_the_picture_back", [
            ("sigma * z.view_as(x)", "sigma * (z if code.content else delta).view_as(x)")],
        "files"),
    "a file without a checksum": ("extras/compress.py", R + "test_every_damaged_byte_is_noticed", [
        ("if [code([256] * 256, byte) for byte in check] != list(check):", "if False:")],
    None),  # without it too, each of 13 flipped bits led to symbols that cannot be
    # --- the network
    "attention's softmax over the queries": ("unet.py", U + "test_softmax_is_over_the_keys", [
        ("scores.softmax(dim=2)", "scores.softmax(dim=1)")], "training"),
    "no SiLU before the time projections": ("unet.py", U + "test_golden_outputs_of_diffusers", [
        ("emb = F.silu(", "emb = (")], "sampling training"),
    "a normalisation left out": ("unet.py", U + "test_every_parameter_matters", [
        ("self.conv1(F.silu(self.norm1(x)))", "self.conv1(F.silu(x))")], "training"),
    "t embedded instead of t − 1": ("unet.py", U + "test_time_1_is_embedded_as_0", [
        ("angles = (t - 1)", "angles = t")], "sampling training"),
    "zeros left and above when down-sampling": (
        "unet.py", U + "test_downsampling_pads_right_and_below", [
            ("F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))")], "sampling training"),
    "dropout on while sampling": (
        "unet.py", U + "test_dropout_drops_a_tenth_and_is_off_when_sampling", [
            ("self.dropout(F.silu(self.norm2(h)))",
             "F.dropout(F.silu(self.norm2(h)), self.dropout.p)")], "sampling"),
    # --- data and training
    "images in [0, 1]": (
        "support/data.py", "test_data.test_sec33_scaling_is_linear_and_inverted_exactly", [
            ("images.float() / 127.5 - 1", "images.float() / 255")], "training"),
    "an 8-bit cast without clamping": (
        "support/data.py", "test_data.test_sec33_scaling_is_linear_and_inverted_exactly", [
            ("((x.clamp(-1, 1) + 1)", "((x + 1)")], "no-clip"),
    "a download without verification": (
        "support/data.py", "test_data.test_download_is_whole_or_not_there", [
            ("str(path), sha256)", "str(path))")], None),
    "flips drawn but not applied": ("train.py", T + "test_flips_and_clipping_happen", [
        ('x0.flip(3), x0) if settings["flip"] else x0', "x0, x0)")], "flips"),
    "the gradient not clipped": ("train.py", T + "test_flips_and_clipping_happen", [
        ('parameters(), run.settings["grad_clip"])', "parameters(), 1e9)")], "training"),
    "averages taken before the step": (
        "train.py", T + "test_ema_follows_the_weights_after_each_step", [
            ("    norm = descend(run, k)\n", ""),
            ("    average(run, k)\n", "    average(run, k)\n    norm = descend(run, k)\n")],
        "training"),
    "decay and 1 − decay exchanged": (
        "train.py", T + "test_ema_follows_the_weights_after_each_step", [
            ("avg_fn(ema_decay(run.settings, k))", "avg_fn(1 - ema_decay(run.settings, k))")], "training"),
    "resuming without Adam's state": ("train.py", N + "test_a_run_goes_on_to_the_bit", [
        ("for name in PARTS:", 'for name in ("net", "ema", "scaler"):')], "resumed"),
    "resuming without the averages": ("train.py", N + "test_a_run_goes_on_to_the_bit", [
        ("for name in PARTS:", 'for name in ("net", "adam", "scaler"):')], "resumed"),
    "resuming at the first batch": ("train.py", N + "test_a_run_goes_on_to_the_bit", [
        ('return state["step"]', "return 0")], "resumed"),
    "a checkpoint after a NaN": (
        "train.py", T + "test_a_number_that_is_not_finite_is_noticed_before_it_is_written", [
            (" if run.scaler.is_enabled() else bad(records[-1]):", ":")], "diverged"),
    "the same images in every process": ("train.py", T + "test_alg1_three_steps_by_hand", [
        ("T, n, share = run.model.s.T, run.settings[\"batch_size\"], run.machine.share",
         "T, n, share = run.model.s.T, run.settings[\"batch_size\"], slice(0, None, 2)"),
        ("run.settings, run.images, run.machine.share", "run.settings, run.images, slice(0, None, 2)")], "two"),
    "checkpoints without verification": (
        "support/checkpoint.py", C + "test_a_damaged_checkpoint_is_refused", [
            ("if hashlib.sha256(raw[:-32]).digest() != raw[-32:]:", "if False:")], "damaged"),
    # --- evaluation and figures
    "the deviation called standard error": (
        "evaluate.py", E + "test_standard_error_and_rmse_by_hand", [
        ("values.std().item() / math.sqrt(len(values))", "values.std().item()")], "terms"),
    "covariances in float32": (
        "evaluate.py", E + "test_frechet_distance_of_commuting_covariances", [
            ("for x in (a.double(), b.double()):", "for x in (a.float(), b.float()):")], "fid"),
    "samples of the last weights": ("support/checkpoint.py", S + "test_samples", [
        ('state["ema" if ema else "net"]', 'state["net" if ema else "ema"]')], "sampling"),
    "grids of the last weights": ("train.py", S + "test_grids_during_training", [
        ("Trained(run.ema,", "Trained(run.net,")], "grid"),
    "Figure 7 with the same noise": (
        "sample.py", S + "test_fig7_samples_that_share_x_t", [
        ('[("shared", t, i) for i', '[("shared", t, 0) for i')], "figure-7"),
    "Figure 6 without x_0": ("sample.py", S + "test_fig6_x0_hat_over_time", [
        (".tolist()} | {0}", ".tolist()}")], "figure-6"),
    "Figure 7 without x_t": ("sample.py", S + "test_fig7_samples_that_share_x_t", [
        ("torch.cat([x[t], state.x_t])", "state.x_t")], "figure-7"),
    "averages without their ramp in a short run": (
        "train.py", T + "test_learning_rates_and_decays", [
        ('min(settings["ema"], (1 + k) / (10 + k)) if settings["ema_ramp"] else settings["ema"]',
         'settings["ema"]')], "ramp"),
    # --- a GPU
    "the index of the device dropped": ("support/machine.py", G + "test_the_precision_of_a_gpu", [
        ("torch.zeros(1, device=device).device", "torch.device(device)")], None),
    "float32 on a GPU of capability 7": ("support/machine.py", G + "test_the_precision_of_a_gpu", [
        ('"fp16" if major == 7', '"fp32" if major == 7')], None),
    "the schedule left on the CPU": ("train.py", G + "test_training_on_a_gpu_is_that_on_a_cpu", [
        ("s = build_schedule(settings).to(machine.device)", "s = build_schedule(settings)")], None),
    "the images of a batch not moved": (
        "train.py", G + "test_images_that_do_not_fit_stay_on_the_cpu", [
            ("data.to_model(images[index].to(run.machine.device))", "data.to_model(images[index])")], None),
    "all images left on the CPU": ("train.py", G + "test_a_training_step_waits_for_nothing", [
        ("        images = images.to(machine.device)\n", "        pass\n")], None),
    "a generator of the CPU": ("train.py", G + "test_training_on_a_gpu_is_that_on_a_cpu", [
        ("torch.Generator(run.machine.device).manual_seed", "torch.Generator().manual_seed")], None),
    "ε drawn on the CPU": ("train.py", G + "test_a_training_step_waits_for_nothing", [
        ("eps = torch.randn(n, *run.images.shape[1:], **draws)[share]",
         "eps = torch.randn(n, *run.images.shape[1:])[share].to(run.machine.device)")], None),
    "a number read in each step": ("train.py", G + "test_a_training_step_waits_for_nothing", [
        ("losses.append(loss.detach())", "losses.append(loss.detach() + 0 * loss.sum().item())")],
    None),
    "the loss checked in each step": ("train.py", G + "test_a_training_step_waits_for_nothing", [
        ('if saves or progress.due() or due("log_every"):', "if True:")], None),
    "the time copied in each step": ("ddpm.py", G + "test_a_sampling_step_waits_for_nothing", [
        ("torch.full((len(x),), t, device=x.device)",
         "torch.tensor([t] * len(x), device=x.device)")], None),
    "z made on the CPU": ("sample.py", G + "test_the_samples_of_a_gpu_are_those_of_a_cpu", [
        ("filled[machine.share], trained.shape, machine.device)",
         "filled[machine.share], trained.shape)")], None),
    "samples left on the GPU": (
        "support/machine.py", G + "test_a_checkpoint_of_the_other_device_is_loaded", [
            ("            return mine.cpu()\n", "            return mine\n")], None),
    "test images left on the CPU": (
        "evaluate.py", G + "test_bits_per_dim_of_a_gpu_are_those_of_a_cpu", [
            ("x0 = data.to_model(images[list(index)]).to(machine.device)",
             "x0 = data.to_model(images[list(index)])")], None),
    "Inception left on the CPU": ("evaluate.py", G + "test_fid_on_a_gpu_is_that_on_a_cpu", [
        ("map_location=machine.device", 'map_location="cpu"')], None),
    "q·k scaled after the product": (
        "unet.py", G + "test_attention_in_float16_overflows_nowhere", [
            ("        q = q * q.shape[1] ** -0.5 ", "        # "),
            ("scores = q.transpose(1, 2) @ k ", "scores = q.transpose(1, 2) @ k * q.shape[1] ** -0.5 ")], None),
    "sampling compiled by default": ("support/checkpoint.py", G + "test_what_is_compiled_on_a_gpu", [
        ("machine.compiled(own, *shape)", "machine.compiled(own, *shape, default=True)")], None),
}

def wrong_source(file: str, replacements: list) -> str:
    """The file with the mistake in it; each right line must be there exactly once."""
    source = (ROOT / file).read_text(encoding="utf-8")
    for right, wrong in replacements:
        assert source.count(right) == 1, f"{file} has {source.count(right)} × {right!r}"
        source = source.replace(right, wrong)
    return source

# === The runs =====================================================================================

# The commands stand for one line each in a folder of their own. TREE is the copy of the program,
# SHARED the run of the right lines under "training", TRAIN and TEST are the images.
FIT = ("python TREE/train.py --dataset TRAIN --no-flip --steps 1000 --batch-size 32 --lr 1e-3 "
       "--warmup 100 --ema 0.99 --channels 64 --multipliers 1 2 --blocks 1 --attention 8 "
       "--samples 0 --log-every 25 --save-every 500 --out run")
DRAW = "python TREE/sample.py --checkpoint run --n 16 --out samples.pt"
BITS = "python TREE/evaluate.py --checkpoint run --dataset TEST --n 200 --terms 20"
BOUND = "python TREE/evaluate.py --checkpoint SHARED --dataset TEST --n 16"
FROM_SHARED = [line.replace("run", "SHARED") for line in (DRAW, BITS)]
FILE = "env PYTHONPATH=TREE python -m extras.compress {} --checkpoint SHARED"
CUT = ("python -c \"p = '{0}'; b = bytearray(open(p, 'rb').read()); b[len(b) // 2] ^= 1; "
       "open(p, 'wb').write(b)\"")
SEEDS = ("seed-1", "seed-2", "seed-3")  # how much chance alone changes
CONTROLS = {
    # --- a training run, and what it makes
    "training": [FIT, DRAW, BITS],
    **{name: [f"{FIT} --seed {name[-1]}", DRAW, BITS] for name in SEEDS},
    "short": [FIT + " --timesteps 100", DRAW, BITS],
    "ramp": [FIT + " --ema 0.9999", DRAW, BITS],
    "mean": [FIT + " --predict mean", DRAW, BITS],
    "learned": [FIT + " --objective vlb --variance learned", DRAW, BITS],
    "flips": [FIT.replace("--no-flip", "--flip"), DRAW, BITS],
    "resumed": [FIT + " --steps 500", FIT, DRAW, BITS],
    "two": ["torchrun --nproc-per-node 2 -- " + FIT[7:], DRAW, BITS],
    "diverged": [FIT + " --grad-clip 1e9 --warmup 0 --lr 30", DRAW],
    "grid": ["python -c \"import shutil; shutil.copytree('SHARED', 'run')\"",
             FIT + " --samples 16 --sample-steps 1000"],
    # --- the network of the right run
    "sampling": FROM_SHARED,
    "no-clip": [FROM_SHARED[0] + " --no-clip"],
    "steps": [FROM_SHARED[0] + " --steps 50 --variance fixed_small"],
    "eta": [FROM_SHARED[0] + " --steps 50 --eta 0.5"],
    "bound": [BOUND],
    "terms": FROM_SHARED[1:],
    "figure-6": ["python TREE/sample.py --checkpoint SHARED --progressive --n 4"],
    "figure-7": ["python TREE/sample.py --checkpoint SHARED --shared --n 5"],
    "figure-8": ["python TREE/sample.py --checkpoint SHARED --interpolate --dataset TEST --n 4"],
    "damaged": ["python -c \"import shutil; shutil.copytree('SHARED', 'run')\"",
                CUT.format("run/checkpoint.pt"), DRAW],
    # --- files, and the distance of two sets of images
    "files": [FILE.format("measure --n 6"), FILE.format("encode PICTURE picture.ddpm"),
              "env ATEN_CPU_CAPABILITY=default " + FILE.format("decode picture.ddpm again.png")],
    "fid": ["python TREE/evaluate.py --checkpoint SHARED --fid --samples TEST --dataset TRAIN "
            "--split train --data-dir . --inception INCEPTION"],
}

def prepare(out: Path, folder: str) -> None:
    """Images of 16×16 for training and testing, one of them as a PNG, and features for FID."""
    for split in ("train", "test"):
        try:
            images, _ = data.load("fashion_mnist", folder, split)
            images = torch.nn.functional.avg_pool2d(images.float(), 2).round().to(torch.uint8)
        except (OSError, ValueError) as error:
            say(f"shapes instead of Fashion-MNIST: {one_line(error)}")
            images, _ = data.load("shapes", folder, split)
        with written(out / f"{split}.pt") as file:
            torch.save(images.contiguous(), file)
    (out / "picture.png").write_bytes(data.png(images[0]))

    class Features(torch.nn.Module):
        """Instead of Inception: 2,048 fixed random features of pixels, most of them near 10³."""

        def __init__(self):
            super().__init__()
            g = torch.Generator().manual_seed(0)
            self.weight = torch.nn.Parameter(torch.randn(768, 2048, generator=g))

        def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
            x = torch.relu(x.float().flatten(1) @ self.weight / 16 + 1000)
            return x if return_features else x[:, :10].softmax(1)

    torch.jit.script(Features().requires_grad_(False)).save(str(out / "features.pt"))

def run(name: str, control: str, out: Path, threads: int) -> dict:
    """Runs the commands of a control with a mistake in the program ("right": with none)."""
    folder = out / control / re.sub(r"\W+", "-", name)
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))
    work, tree = folder / "work", folder / "work" / "tree"
    shutil.rmtree(folder, ignore_errors=True)
    for folder_of in ("support", "extras"):
        shutil.copytree(ROOT / folder_of, tree / folder_of)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tree)
    if name != "right":
        file, _, replacements, _ = MISTAKES[name]
        (tree / file).write_text(wrong_source(file, replacements), encoding="utf-8")
    words = {"TREE": tree, "SHARED": out / "training" / "right" / "work" / "run",
             "TRAIN": out / "train.pt", "TEST": out / "test.pt", "PICTURE": out / "picture.png",
             "INCEPTION": out / "features.pt", "python": sys.executable,
             "torchrun": Path(sys.executable).with_name("torchrun")}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    result: dict = {"name": name, "control": control, "commands": []}
    for line in CONTROLS[control]:
        line = re.sub(r"\b(TREE|SHARED|TRAIN|TEST|PICTURE|INCEPTION)\b|^(?:python|torchrun)\b|"
                      r"(?<=default )python", lambda found: str(words[found[0]]), line)
        started = time.monotonic()
        done = subprocess.run(shlex.split(line), cwd=work, env=environment, text=True,
                              capture_output=True)
        errors = done.stderr.replace("\r", "\n").splitlines()
        result["commands"].append({"line": line.replace(str(out) + "/", ""),
                                   "status": done.returncode, "out": done.stdout.splitlines(),
                                   "err": errors[-3:], "seconds": time.monotonic() - started})
    log = work / "run" / "log.jsonl"
    if "train.py" in "".join(CONTROLS[control]) and log.exists():
        entries = map(json.loads, log.read_text(encoding="utf-8").splitlines())
        result["loss"] = [(x["step"], x["loss"]) for x in entries if x["loss"] is not None]
    if (work / "samples.pt").exists():
        result["samples"] = torch.load(work / "samples.pt").tolist()
    for path in [*work.glob("samples.png"), *work.glob("run/samples-*.png")]:
        shutil.copy(path, folder)
    if (control, name) != ("training", "right"):
        shutil.rmtree(work)
    with written(folder / "result.json") as file:
        file.write(json.dumps(result).encode())
    return result

def bits(result: dict) -> str:
    """Bits/dim, as evaluate.py has printed them."""
    text = "\n".join(line for command in result["commands"] for line in command["out"])
    found = re.search(r"bits/dim ≤ (\S+)", text)
    return found[1] if found else ""

def loss(result: dict) -> str:
    """The mean of the last eight entries of the log, which are 200 steps."""
    last = [value for _, value in result.get("loss", [])[-8:]]
    return f"{sum(last) / len(last):.4f}" if last else ""

def printed(result: dict, right: dict) -> list[tuple[str, str]]:
    """The lines that the commands print otherwise than with the right lines."""
    pairs = [pair for ours, theirs in zip(right["commands"], result["commands"])
             for pair in zip(ours["out"], theirs["out"])]
    pairs = [[re.sub(r" \(±.*|\S*/(?=\w+\.pt)", "", line).strip() for line in pair]
             for pair in pairs]
    return [(a, b) for a, b in pairs if a != b and "checkpoint.pt" not in a][:5]

def picture(result: dict, folder: Path) -> torch.Tensor | None:
    """The samples or the figure of a run, a pixel for each pixel."""
    from PIL import Image
    if result.get("samples"):  # 16×16 each
        return data.tiled(torch.tensor(result["samples"], dtype=torch.uint8), 4)[:, ::8, ::8]
    for path in folder.glob("*.png"):
        found = data.pixels(Image.open(path))
        for k in range(40, 1, -1):  # the pixels are enlarged in the file
            small = found[:, ::k, ::k]
            if torch.equal(small.repeat_interleave(k, 1).repeat_interleave(k, 2), found):
                return small
    return None

def describe(result: dict, right: dict) -> str:
    """What is seen, in one line, beside the same of the right lines."""
    parts = []
    for key, value in (("loss", loss), ("bits/dim", bits)):
        if value(right) == value(result) != "":
            parts.append(f"the same {key}")
        elif value(right):
            parts.append(f"{key} {value(result) or 'none'} instead of {value(right)}")
    if right["shown"] is not None and result["shown"] is not None:
        there, here = right["shown"].double(), result["shown"].double()
        if there.shape != here.shape:
            parts.append("the picture has {}×{} pixels instead of {}×{}".format(
                *here.shape[1:], *there.shape[1:]))
        elif torch.equal(there, here):
            parts.append("the same picture")
        else:
            difference = (there - here).square().mean().sqrt()
            parts.append(f"the pictures differ by {difference:.1f} levels (RMS), and their mean is "
                         f"{here.mean():.0f} instead of {there.mean():.0f}")
    for ours, theirs in zip(right["commands"], result["commands"]):
        if ours["status"] != theirs["status"]:
            bad, which = (ours, "right") if ours["status"] else (theirs, "wrong")
            parts.append(f"status {theirs['status']} instead of {ours['status']} (the {which} line"
                         f" says: {' '.join(bad['err'][-1:])})")
    return "; ".join(parts) or "nothing"

def keep(results: dict) -> None:
    """Numbers and pictures of the runs, small enough for the repository, for page/page.py."""
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir(parents=True)
    rows, numbers = {}, {name: f"{i:02d}" for i, name in enumerate(MISTAKES, 1)}
    for (name, control), result in sorted(results.items(), key=str):
        file, shown = f"{control}-{numbers.get(name, name)}.png", result["shown"]
        if shown is not None:
            (KEPT / file).write_bytes(data.png(shown))
        right = results["right", "training" if control in SEEDS else control]
        rows[f"{control}/{name}"] = {
            "text": describe(result, right), "printed": printed(result, right),
            "loss": [(step, float(f"{value:.4g}")) for step, value in result.get("loss", [])[1::2]],
            "picture": None if shown is None else file,
            **dict(zip(("height", "width"), () if shown is None else shown.shape[1:]))}
    (KEPT / "results.json").write_text(json.dumps(rows, ensure_ascii=False, indent=0),
                                       encoding="utf-8")

@command
def main(argv=None) -> int:
    """Runs the mistakes: see the text at the head of this file."""
    parser = Parser(__doc__, "--data-dir")
    parser.add_argument("--out", type=Path, default=Path("mistakes"), help="(default: mistakes)")
    parser.add_argument("--only", default="", help="only names and controls with this text")
    parser.add_argument("--jobs", type=positive_int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=positive_int, default=1, help="of each (default: 1)")
    parser.add_argument("--keep", action="store_true", help="put numbers and pictures into the "
                        "repository, where the page finds them")
    args = parser.parse_args(argv)
    wanted = [(name, control) for name, (*_, controls) in MISTAKES.items() if controls
              for control in controls.split() if args.only in name or args.only == control]
    import PIL  # noqa: F401  (its lack would be noticed after hours)
    if not wanted:
        raise UsageError(f"--only {args.only}: no mistake and no control is called so")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "features.pt").exists():
        prepare(out, args.data_dir)
    chance = () if args.only else SEEDS
    tasks = [("right", control) for control in CONTROLS
             if any(control == c for _, c in wanted) or control in ("training", *chance)] + wanted
    results, progress = {}, Progress(len(tasks), "runs")

    def work(task: tuple[str, str]) -> None:
        results[task] = run(*task, out, args.threads)
        folder = out / task[1] / re.sub(r"\W+", "-", task[0])
        results[task]["shown"] = picture(results[task], folder)
        progress.update(len(results))

    needs = {control for control, lines in CONTROLS.items() if "SHARED" in "".join(lines)}
    for later in (False, True):  # the runs that need the shared network come last
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(work, [task for task in tasks if (task[1] in needs) == later]))
    for name, control in wanted:
        print(f"{name} [{control}]: {describe(results[name, control], results['right', control])}")
    for seed in chance:
        seen = describe(results["right", seed], results["right", "training"])
        print(f"the right lines with another seed [{seed}]: {seen}")
    if args.keep:
        keep(results)
    return 0

if __name__ == "__main__":
    sys.exit(main())
