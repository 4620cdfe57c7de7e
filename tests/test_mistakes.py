"""Proof that the tests can fail: each mistake is put into the source, and its test must notice.

The wrong lines are executed in the module itself, the named test runs alone, and the module is put
back. A test that starts other processes runs on a copy of the files. With --long the same tests
also run alone on the right lines.
"""
import importlib
import inspect
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

import test_commands
import test_compress
import test_data
import test_ddpm
import test_evaluate
import test_unet
import test_weights
from test_compress import file  # a fixture, as is the next one
from test_weights import folder

HERE = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

# name: (file, test, [(right, wrong), …]); PAPER.md says what each of them does
D, C, E, R = "test_ddpm.", "test_commands.", "test_evaluate.", "test_compress."
U, W = "test_unet.", "test_weights."
MISTAKES = {
    # --- the schedule and the forward process
    "ᾱ_0 ≠ 1": ("ddpm.py", D + "test_sec2_alpha_bar_is_the_running_product", [
        ("torch.cat([betas.new_zeros(1), betas])", "torch.cat([betas[:1], betas])")]),
    "ᾱ_t as a product up to T": ("ddpm.py", D + "test_sec2_alpha_bar_is_the_running_product", [
        ("alphas.cumprod(0)", "alphas.prod().expand(len(alphas))")]),
    "T changed, β not rescaled": ("ddpm.py", D + "test_sec4_schedules_by_name", [
        ("min(beta * 1000 / T, 0.999)", "beta")]),
    "β_t in place of √β_t in Eq. 2": ("ddpm.py", D + "test_eq02_forward_step", [
        ("_like(s.betas[t].sqrt(), x) * eps", "_like(s.betas[t], x) * eps")]),
    "α_t and β_t exchanged in Eq. 2": ("ddpm.py", D + "test_eq02_forward_step", [
        ("_like(s.alphas[t].sqrt(), x) * x + _like(s.betas[t].sqrt(), x) * eps",
         "_like(s.betas[t].sqrt(), x) * x + _like(s.alphas[t].sqrt(), x) * eps")]),
    "1 − ᾱ_t in place of its root in Eq. 4": (
        "ddpm.py", D + "test_eq04_jump_is_iterated_steps", [
            ("mean + variance.sqrt() * eps", "mean + variance * eps")]),
    # --- the posterior and the reverse process
    "β_t in place of β̃_t in Eq. 7": ("ddpm.py", D + "test_eq07_posterior_is_bayes_rule", [
        ("beta_tilde = (1 - alpha_bar_before) / (1 - alpha_bar) * beta", "beta_tilde = beta")]),
    "√ᾱ_t in place of √α_t in Eq. 7": (
        "ddpm.py", D + "test_eq03_integrand_equals_eq21_along_every_path", [
            ("weight_x_t = alpha.sqrt() * (1", "weight_x_t = alpha_bar.sqrt() * (1")]),
    "σ_1² = β̃_1 = 0": ("ddpm.py", D + "test_sec32_the_two_fixed_variances", [
        ("u = t.clamp(min=2)", "u = t")]),
    "√ᾱ_t in place of √α_t in Eq. 11": (
        "ddpm.py", D + "test_eq11_every_prediction_gives_the_posterior_mean", [
            ("/ _like(s.alphas[t].sqrt(), x_t)", "/ _like(s.alpha_bars[t].sqrt(), x_t)")]),
    "Eq. 15 divided by ᾱ_t": ("ddpm.py", D + "test_eq15_inverts_the_jump", [
        ("* eps) / _like(alpha_bar.sqrt(), x_t)", "* eps) / _like(alpha_bar, x_t)")]),
    "x̂_0 clipped after the mean was taken": (
        "ddpm.py", D + "test_eq11_clipping_comes_before_the_mean", [
            ('if predict != "mean" or s.full is not None:', "if False:")]),
    "the halves of a learned variance exchanged": (
        "ddpm.py", D + "test_table2_learned_variance_is_the_second_half", [
            ("out, log_variance = out.chunk(2, dim=1)", "log_variance, out = out.chunk(2, dim=1)")]),
    # --- Algorithms 1 and 2
    "the top t never drawn": ("train.py", C + "test_alg1_draws", [
        ("torch.randint(1, s.T + 1,", "torch.randint(1, s.T,")]),
    "t = 0 drawn": ("train.py", C + "test_alg1_draws", [
        ("torch.randint(1, s.T + 1,", "torch.randint(0, s.T + 1,")]),
    "the same draws in every step": (
        "train.py", C + "test_alg1_draws_are_a_function_of_seed_and_step", [
            ('seed_of(settings["seed"], "step", k)', 'seed_of(settings["seed"], "step")')]),
    "the loss summed, not averaged": ("ddpm.py", D + "test_eq14_loss_simple", [
        ("s.times[t])).square().flatten(1).mean(1)", "s.times[t])).square().flatten(1).sum(1)")]),
    "ε as the target of `--predict mean`": ("ddpm.py", D + "test_eq14_loss_simple", [
        ("target = q_posterior_mean_variance(s, x0, x_t, t).mean", "target = eps")]),
    "σ_t² in place of σ_t": ("ddpm.py", D + "test_alg2_moments_of_the_sampler", [
        ("p.mean + p.variance.sqrt() * z", "p.mean + p.variance * z")]),
    "noise at the last step": ("ddpm.py", D + "test_alg2_moments_of_the_sampler", [
        ("noise(t) if t > 1 else torch.zeros_like(x_t)", "noise(t)")]),
    "a loop that ends at t = 2": (
        "ddpm.py", D + "test_alg2_paper_schedule_standard_normal_data", [
            ("for t in range(start, 0, -1):", "for t in range(start, 1, -1):")]),
    "β_t of the full schedule with fewer steps": (
        "ddpm.py", D + "test_respace_is_the_chain_of_fewer_steps", [
            ("Schedule(1 - alphas, alphas, alpha_bars, s.times",
             "Schedule(s.betas[tau], s.alphas[tau], alpha_bars, s.times")]),
    "the network given i in place of τ_i": (
        "ddpm.py", D + "test_respace_is_the_chain_of_fewer_steps", [
            ("alpha_bars, s.times[tau], full)", "alpha_bars, torch.arange(len(tau)), full)")]),
    # --- the decoder and the bound
    "DDIM's noise and direction not balanced": (
        "ddpm.py", D + "test_ddim_has_the_marginals_of_eq04_for_every_eta", [
            ("(1 - alpha_bar_before - sigma2)", "(1 - alpha_bar_before)")]),
    "finite outermost bins": ("ddpm.py", D + "test_eq13_probabilities_sum_to_one", [
        ("torch.where(x0 > -1, x0 - 1 / 255, -infinity)", "x0 - 1 / 255")]),
    "bins half a level too wide": ("ddpm.py", D + "test_eq13_each_bin_is_an_integral", [
        ("x0 - 1 / 255, -infinity", "x0 - 2 / 255, -infinity")]),
    "a floor under the decoder": ("ddpm.py", D + "test_eq13_gradient", [
        ("torch.log(-torch.expm1(log_a - log_b))",
         "torch.log(-torch.expm1(log_a - log_b)).clamp(min=-28)"),
        ("return log_b + ", "return (log_b + 0 * log_b.clamp(min=-28)).clamp(min=-28) + ")]),
    "the KL without its −1": ("ddpm.py", D + "test_eq05_kl_is_the_mean_log_ratio", [
        ("/ p.variance - 1)", "/ p.variance)")]),
    "the quotient of variances inverted in the KL": (
        "ddpm.py", D + "test_eq16_equals_eq05_for_gaussian_data", [
            ("(p.variance / q.variance).log()", "(q.variance / p.variance).log()")]),
    "L_T taken at T − 1": ("ddpm.py", D + "test_eq05_prior_term", [
        ("q = q_mean_variance(s, x0, _all(s.T, x0))",
         "q = q_mean_variance(s, x0, _all(s.T - 1, x0))")]),
    "L_0 without its minus sign": ("ddpm.py", D + "test_eq05_terms_are_mean_log_ratios", [
        ("L_0 = -discretized", "L_0 = discretized")]),
    "half of each KL lost": (
        "ddpm.py", D + "test_eq05_bound_is_above_the_entropy_and_approaches_it", [
            ("torch.where(is_first, L_0, normal_kl(q, p))",
             "torch.where(is_first, L_0, 0.5 * normal_kl(q, p))")]),
    "Eq. 12 without its ½": ("ddpm.py", D + "test_eq12_weight", [
        ("weight / (2 * p_variance(s, t, variance))", "weight / p_variance(s, t, variance)")]),
    "nats called bits": ("ddpm.py", D + "test_table1_bits_per_dim", [
        ("x0[0].numel() * math.log(2))", "x0[0].numel())")]),
    "strata weighted alike": ("evaluate.py", E + "test_eq05_stratified_estimate_is_unbiased", [
        ("terms.append(length * ", "terms.append(s.T / K * ")]),
    # --- progressive coding and interpolation
    "L_T left out of the rate": (
        "ddpm.py", D + "test_alg3_alg4_rate_and_distortion_are_the_bound", [
            ("    rate = prior_kl(s, x0)", "    rate = 0 * prior_kl(s, x0)")]),
    "the rate not accumulated": ("ddpm.py", E + "test_bits_per_dim_command", [
        ("rate = rate + vlb_term(s, x0, x, sent, p)", "rate = vlb_term(s, x0, x, sent, p)")]),
    "the noise of another time sent": (
        "ddpm.py", D + "test_alg3_the_senders_chain_has_the_marginals_of_eq04", [
            ("q.variance.sqrt() * noise(t)", "q.variance.sqrt() * noise(t + 1)")]),
    "a sample μ + σ² ε": ("ddpm.py", D + "test_alg3_the_senders_chain_has_the_marginals_of_eq04", [
        ("q.variance.sqrt() * noise(t)", "q.variance * noise(t)")]),
    "distortion on the scale of [−1, 1]": ("ddpm.py", D + "test_sec43_distortion", [
        ("return 127.5 * (x0 - x0_hat)", "return (x0 - x0_hat)")]),
    "interpolation decoded from t − 1": ("ddpm.py", D + "test_sec44_interpolation", [
        ("noise, start=t, **choices)", "noise, start=t - 1, **choices)")]),
    # --- real bits
    "the candidate with the largest ratio": (
        "compress.py", R + "test_the_chosen_candidate_is_a_sample_of_q", [
            ("(waits.cumsum(0).log() - log_w", "(-log_w")]),
    "all octaves of K equally likely": (
        "compress.py", R + "test_the_mean_length_keeps_the_bound", [
            ("-torch.arange(b)", "-0 * torch.arange(b)")]),
    "candidates from torch.randn": ("compress.py", R + "test_candidates_are_standard_normal", [
        ("NORMAL[words.view(torch.int16).int() + 32768].view(BLOCK, n)",
         "torch.randn(BLOCK, n, generator=g)")]),
    "bits beyond the end read as zeros": (
        "compress.py", R + "test_code_length_is_that_of_the_probabilities", [
            ("if symbol != other or symbol", "if symbol")]),
    "the sender goes on with a sample of its own": (
        "compress.py", R + "test_a_file_gives_the_picture_back", [
            ("sigma * z.view_as(x)", "sigma * (z if code.content else delta).view_as(x)")]),
    "a file without a checksum": ("compress.py", R + "test_every_damaged_byte_is_noticed", [
        ("if [code([256] * 256, byte) for byte in check] != list(check):", "if False:")]),
    # --- the network
    "attention's softmax over the queries": ("unet.py", U + "test_softmax_is_over_the_keys", [
        ("scores.softmax(dim=2)", "scores.softmax(dim=1)")]),
    "no SiLU before the time projections": ("unet.py", W + "test_golden_outputs_of_diffusers", [
        ("emb = F.silu(self.time(time_embedding(t, self.channels, x.dtype)))",
         "emb = self.time(time_embedding(t, self.channels, x.dtype))")]),
    "a normalisation left out": ("unet.py", U + "test_every_parameter_matters", [
        ("self.conv1(F.silu(self.norm1(x)))", "self.conv1(F.silu(x))")]),
    "t embedded in place of t − 1": ("unet.py", U + "test_time_1_is_embedded_as_0", [
        ("angles = (t - 1)", "angles = t")]),
    "zeros left and above when down-sampling": (
        "unet.py", U + "test_downsampling_pads_right_and_below", [
            ("F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))")]),
    "dropout on while sampling": (
        "unet.py", U + "test_dropout_drops_a_tenth_and_is_off_when_sampling", [
            ("if not self.training or level in", "if level in")]),
    # --- data and training
    "images in [0, 1]": ("data.py", "test_data.test_sec33_scaling_is_linear_and_inverted_exactly", [
        ("images.float() / 127.5 - 1", "images.float() / 255")]),
    "an 8-bit cast without clamping": (
        "data.py", "test_data.test_sec33_scaling_is_linear_and_inverted_exactly", [
            ("((x.clamp(-1, 1) + 1)", "((x + 1)")]),
    "half a download kept": ("data.py", "test_data.test_download_is_whole_or_not_there", [
        ("if size is not None and done != size:", "if False:")]),
    "flips drawn but not applied": ("train.py", C + "test_flips_and_clipping_happen", [
        ('if settings["flip"]:', "if False:")]),
    "the gradient not clipped": ("train.py", C + "test_flips_and_clipping_happen", [
        ('clip_grad_norm_(params, settings["clip"])', "clip_grad_norm_(params, 1e9)")]),
    "averages taken before the step": (
        "train.py", C + "test_ema_follows_the_weights_after_each_step", [
            ("    scaler.step(adam)\n", ""),
            ("1 - ema_decay(settings, k))\n",
             "1 - ema_decay(settings, k))\n    scaler.step(adam)\n")]),
    "decay and 1 − decay exchanged": (
        "train.py", C + "test_ema_follows_the_weights_after_each_step", [
            ("params, 1 - ema_decay(settings, k))", "params, ema_decay(settings, k))")]),
    "resuming without Adam's state": ("train.py", C + "test_resume_at_any_step_is_exact", [
        ('            self.adam.load_state_dict(state["adam"])\n', "")]),
    "resuming without the averages": ("train.py", C + "test_resume_at_any_step_is_exact", [
        ('            self.ema.load_state_dict(state["ema"])\n', "")]),
    "resuming at the first batch": ("train.py", C + "test_resume_at_any_step_is_exact", [
        ('self.step = self.saved = state["step"]', 'self.step, self.saved = 0, state["step"]')]),
    "a checkpoint after a NaN": ("train.py", C + "test_a_step_that_is_not_finite_ends_the_run", [
        ("if (bad := self.bad.item()) >= 0:", "if (bad := self.bad.item()) >= 10 ** 9:")]),
    "the same images in every process": ("train.py", C + "test_two_ranks_are_one_run", [
        ("rows = slice(machine.rank * part, (machine.rank + 1) * part)", "rows = slice(part)")]),
    "checkpoints without verification": ("common.py", C + "test_a_damaged_checkpoint_is_refused", [
        ("if hashlib.sha256(raw[:-32]).digest() != raw[-32:]:",
         "if False:")]),
    # --- evaluation and figures
    "the deviation called standard error": ("evaluate.py", E + "test_standard_error_and_rmse_by_hand", [
        ("values.std().item() / math.sqrt(len(values))", "values.std().item()")]),
    "covariances in float32": (
        "evaluate.py", E + "test_frechet_distance_of_commuting_covariances", [
            ("for x in (a.double(), b.double()):", "for x in (a.float(), b.float()):")]),
    "samples of the last weights": ("sample.py", "test_pictures.test_samples", [
        ('state.get("ema" if ema else "model")', 'state.get("model" if ema else "ema")')]),
    "grids of the last weights": ("train.py", "test_pictures.test_grids_during_training", [
        ("sample.Trained(self.ema,", "sample.Trained(self.model,")]),
    "Figure 7 with the same noise": ("sample.py", "test_pictures.test_fig7_samples_that_share_x_t", [
        ('[("shared", t, i) for i', '[("shared", t, 0) for i')]),
    "Figure 6 without x_0": ("sample.py", "test_pictures.test_fig6_x0_hat_over_time", [
        (".tolist()} | {0}", ".tolist()}")]),
    "Figure 7 without x_t": ("sample.py", "test_pictures.test_fig7_samples_that_share_x_t", [
        ("torch.cat([x[t], state.x_t])", "state.x_t")]),
}
BY_PROCESS = {"the same images in every process"}  # the test starts scripts: it needs files, not a module


def wrong_source(file: str, replacements: list) -> str:
    """The file with the mistake in it; each right line must be there exactly once."""
    source = (HERE / file).read_text()
    for right, wrong in replacements:
        if right == wrong:
            continue
        assert source.count(right) == 1, f"{file} has {source.count(right)} × {right!r}"
        source = source.replace(right, wrong)
    return source


def run_alone(test: str, request) -> None:
    """One test function with the fixtures that it asks for; hypothesis generates, and no more."""
    module_name, function_name = test.split(".")
    function = getattr(importlib.import_module(module_name), function_name)
    if module_name in ("test_commands", "test_pictures"):
        request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
        torch.save(test_commands.train.data.shapes(64, 8), "images.pt")
    fixtures = {}
    if hasattr(function, "hypothesis"):
        before = function._hypothesis_internal_use_settings
        function._hypothesis_internal_use_settings = settings(
            before, phases=(Phase.explicit, Phase.generate), database=None)
        names = [n for n in inspect.signature(function).parameters if n == "tmp_path_factory"]
        try:
            function(**{n: request.getfixturevalue(n) for n in names})
        finally:
            function._hypothesis_internal_use_settings = before
        return
    if "run" in inspect.signature(function).parameters:  # a fixture of the test's own module
        run = importlib.import_module(module_name).run
        set_up = getattr(run, "__wrapped__", None) or run.__pytest_wrapped__.obj
        fixtures = {"run": set_up(**{name: request.getfixturevalue(name)
                                     for name in inspect.signature(set_up).parameters})}
    for name in inspect.signature(function).parameters:
        if name not in fixtures:
            fixtures = {**fixtures, name: request.getfixturevalue(name)}
    function(**fixtures)


@pytest.mark.parametrize("name", MISTAKES)
def test_the_mistake_is_noticed(name, request, tmp_path, monkeypatch):
    """With the wrong line in place the named test fails."""
    file, test, replacements = MISTAKES[name]
    source = wrong_source(file, replacements)
    if name in BY_PROCESS:
        for path in HERE.glob("*.py"):
            shutil.copy(path, tmp_path)
        (tmp_path / file).write_text(source)
        monkeypatch.setattr(test_commands, "HERE", tmp_path)
        with pytest.raises(BaseException):
            run_alone(test, request)
        return
    module = importlib.import_module(Path(file).stem)
    before = dict(vars(module))
    exec(compile(source, file, "exec"), vars(module))
    try:
        with pytest.raises(BaseException) as caught:
            run_alone(test, request)
        assert not isinstance(caught.value, (NameError, SyntaxError, pytest.skip.Exception)), caught
    finally:
        vars(module).clear()
        vars(module).update(before)


@pytest.mark.long
@pytest.mark.parametrize("test", sorted({test for _, test, _ in MISTAKES.values()}))
def test_the_right_lines_pass(test, request):
    """The control: run in the same way on the source as it is, the same tests pass."""
    run_alone(test, request)
