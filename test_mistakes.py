"""Proof that the tests can fail: each mistake is put into the source, and its test must notice.

The README's "Easy mistakes" are these. A mistake is (file, test, [(right, wrong), …]); the wrong
lines
are executed in the module itself, the named test runs alone, and the module is put back. A few go
through subprocesses, on a copy of the files. With --long the tests also run alone on the right
lines.
"""
import importlib
import inspect
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

import test_commands
import test_data
import test_ddpm
import test_evaluate
import test_unet
import test_weights
from test_weights import folder  # noqa: F401, a fixture

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

# name: (file, test, [(right, wrong), …])
MISTAKES = {
    "top t never drawn": ("train.py", "test_commands.test_alg1_draws", [
        ('torch.randint(1, s["timesteps"] + 1,', 'torch.randint(1, s["timesteps"],')]),
    "t = 0 drawn": ("train.py", "test_commands.test_alg1_draws", [
        ('torch.randint(1, s["timesteps"] + 1,', 'torch.randint(0, s["timesteps"] + 1,')]),
    "ᾱ_0 ≠ 1": ("ddpm.py", "test_ddpm.test_sec2_alpha_bar_is_the_running_product", [
        ("torch.cat([betas.new_zeros(1), betas])", "torch.cat([betas[:1], betas])")]),
    "ᾱ_t a product up to T": ("ddpm.py", "test_ddpm.test_sec2_alpha_bar_is_the_running_product", [
        ("alphas.cumprod(0)", "alphas.prod().expand(len(alphas))")]),
    "T changed, β not": ("ddpm.py", "test_ddpm.test_sec4_schedules_by_name", [
        ("min(beta * 1000 / T, 0.999)", "beta")]),
    "noise scaled by β": ("ddpm.py", "test_ddpm.test_eq02_forward_step", [
        ("_like(s.betas[t].sqrt(), x) * eps", "_like(s.betas[t], x) * eps")]),
    "α and β exchanged": ("ddpm.py", "test_ddpm.test_eq02_forward_step", [
        ("_like(s.alphas[t].sqrt(), x) * x + _like(s.betas[t].sqrt(), x) * eps",
         "_like(s.betas[t].sqrt(), x) * x + _like(s.alphas[t].sqrt(), x) * eps")]),
    "jump with σ² for σ": ("ddpm.py", "test_ddpm.test_eq04_jump_is_iterated_steps", [
        ("mean + variance.sqrt() * eps", "mean + variance * eps")]),
    "posterior variance β_t": ("ddpm.py", "test_ddpm.test_eq07_posterior_is_bayes_rule", [
        ("_like((1 - before) / (1 - alpha_bar) * beta, x_t)", "_like(beta, x_t)")]),
    "√ᾱ_t in Eq. 7": ("ddpm.py", "test_ddpm.test_eq03_integrand_equals_eq21_along_every_path", [
        ("_like(alpha.sqrt() * (1 - before) / (1 - alpha_bar), x_t)",
         "_like(alpha_bar.sqrt() * (1 - before) / (1 - alpha_bar), x_t)")]),
    "σ_1² = β̃_1 = 0": ("ddpm.py", "test_ddpm.test_sec32_the_two_fixed_variances", [
        ("u = t.clamp(min=2)", "u = t")]),
    "√ᾱ_t in Eq. 11": ("ddpm.py", "test_ddpm.test_eq11_every_prediction_gives_the_posterior_mean", [
        ("/ _like(s.alphas[t].sqrt(), x_t)", "/ _like(s.alpha_bars[t].sqrt(), x_t)")]),
    "Eq. 15 divided by ᾱ_t": ("ddpm.py", "test_ddpm.test_eq15_inverts_the_jump", [
        ("* eps) / _like(alpha_bar.sqrt(), x_t)", "* eps) / _like(alpha_bar, x_t)")]),
    "x̂_0 clipped after the mean": ("ddpm.py",
                                   "test_ddpm.test_eq11_clipping_comes_before_the_mean", [
        ("    if clip:\n        x0 = x0.clamp(-1, 1)\n", ""), ("if predict == \"eps\" and not clip",
                                                            "if predict == \"eps\""),
        ("return Reverse(mean, sigma2, x0)",
                               "return Reverse(mean, sigma2, x0.clamp(-1, 1))")]),
    "log σ² halves exchanged": ("ddpm.py", "test_ddpm.test_table2_learned_variance_is_the_second_half", [
        ("out, log_variance = out.chunk(2, dim=1)", "log_variance, out = out.chunk(2, dim=1)")]),
    "z scaled by σ²": ("ddpm.py", "test_ddpm.test_alg2_moments_of_the_sampler", [
        ("p.mean + p.variance.sqrt() * z", "p.mean + p.variance * z")]),
    "noise at the last step": ("ddpm.py", "test_ddpm.test_alg2_moments_of_the_sampler", [
        ("noise(state.t) if state.t > 1 else torch.zeros_like(x_T)", "noise(state.t)")]),
    "the loop stops at t = 2": ("ddpm.py", "test_ddpm.test_alg2_paper_schedule_standard_normal_data", [
        ("if start is None else start, 0, -1)", "if start is None else start, 1, -1)")]),
    "β_t of the full schedule": ("ddpm.py", "test_ddpm.test_respace_is_the_chain_of_fewer_steps", [
        ("Schedule(1 - alphas, alphas, alpha_bars, s", "Schedule(s.betas[tau], s.alphas[tau], alpha_bars, s")]),
    "network shown i, not τ_i": ("ddpm.py", "test_ddpm.test_respace_is_the_chain_of_fewer_steps", [
        ("s.times[tau], s.full or s)", "torch.arange(n + 1), s.full or s)")]),
    "edge bins finite": ("ddpm.py", "test_ddpm.test_eq13_probabilities_sum_to_one", [
        ("torch.where(level <= 0, below, torch.where(level >= 255, above, inside))", "inside")]),
    "bins half too wide": ("ddpm.py", "test_ddpm.test_eq13_each_bin_is_an_integral", [
        ("(level - 0.5) / 127.5", "(level - 1) / 127.5")]),
    "a floor under the decoder": ("ddpm.py", "test_ddpm.test_eq13_gradient", [
        ("torch.where(level >= 255, above, inside))", "torch.where(level >= 255, above, inside)).clamp(min=-28)")]),
    "KL without its −1": ("ddpm.py", "test_ddpm.test_eq05_kl_is_the_mean_log_ratio", [
        ("/ p.variance - 1)", "/ p.variance)")]),
    "KL turned round": ("ddpm.py", "test_ddpm.test_eq16_equals_eq05_for_gaussian_data", [
        ("(p.variance / q.variance).log()", "(q.variance / p.variance).log()")]),
    "L_T at T − 1": ("ddpm.py", "test_ddpm.test_eq05_prior_term", [
        ("s.T, device=s.betas.device)", "s.T - 1, device=s.betas.device)")]),
    "L_0 without its minus": ("ddpm.py", "test_ddpm.test_eq05_terms_are_mean_log_ratios", [
        ("torch.where(first, -decoder", "torch.where(first, decoder")]),
    "a bound that is too good": ("ddpm.py",
                                 "test_ddpm.test_eq05_bound_is_above_the_entropy_and_approaches_it", [
        ("torch.where(first, -decoder, normal_kl(q, p))", "torch.where(first, -decoder, 0.5 * normal_kl(q, p))")]),
    "Eq. 12 without its ½": ("ddpm.py", "test_ddpm.test_eq12_weight", [
        ("weight / (2 * p_variance(s, t, variance))", "weight / p_variance(s, t, variance)")]),
    "loss summed": ("ddpm.py", "test_ddpm.test_eq14_loss_simple", [
        ("model(x_t, s.times[t])).square().flatten(1).mean(1)",
         "model(x_t, s.times[t])).square().flatten(1).sum(1)")]),
    "nats called bits": ("ddpm.py", "test_ddpm.test_table1_bits_per_dim", [
        ("numel() * math.log(2))", "numel())")]),
    "L_T left out of the rate": ("ddpm.py",
                                 "test_ddpm.test_alg3_alg4_rate_and_distortion_are_the_bound", [
        ("rate, t_T = prior_kl(s, x0),", "rate, t_T = 0 * prior_kl(s, x0),")]),
    "the sender's x_t at another t": ("ddpm.py",
                                      "test_ddpm.test_alg3_the_senders_chain_has_the_marginals_of_eq04", [
        ("noise(state.t - 1))", "noise(state.t))")]),
    "grain at the end of a mixture": ("ddpm.py", "test_ddpm.test_sec44_interpolation", [
        ("noise(state.t) if state.t > 1 else", "noise(state.t) if state.t > 1 or start else")]),
    "distortion of [−1, 1]": ("ddpm.py", "test_ddpm.test_sec43_distortion", [
        ("return 127.5 * (x0 - estimate)", "return (x0 - estimate)")]),
    "decoded from t − 1": ("ddpm.py", "test_ddpm.test_sec44_interpolation", [
        ("noise, start=t, **choices)", "noise, start=t - 1, **choices)")]),
    "images in [0, 1]": ("data.py", "test_data.test_sec33_scaling_is_linear_and_inverted_exactly", [
        ("images.float() / 127.5 - 1", "images.float() / 255")]),
    "8-bit cast without clamping": ("data.py",
                                    "test_data.test_sec33_scaling_is_linear_and_inverted_exactly", [
        ("((x.clamp(-1, 1) + 1)", "((x + 1)")]),
    "half a download kept": ("data.py", "test_data.test_download_is_whole_or_not_there", [
        ("if size is not None and done != size:", "if False:")]),
    "softmax over the queries": ("unet.py", "test_unet.test_softmax_is_over_the_keys", [
        ("scores.softmax(dim=2)", "scores.softmax(dim=1)")]),
    "no SiLU before the projections": ("unet.py", "test_weights.test_golden_outputs_of_diffusers", [
        ("emb = F.silu(self.time(time_embedding(t, self.channels)))",
         "emb = self.time(time_embedding(t, self.channels))")]),
    "an unused normalisation": ("unet.py", "test_unet.test_every_parameter_matters", [
        ("self.conv1(F.silu(self.norm1(x)))", "self.conv1(F.silu(x))")]),
    "t embedded without the shift": ("unet.py", "test_unet.test_time_1_is_embedded_as_0", [
        ("angles = (t - 1)", "angles = t")]),
    "symmetric padding": ("unet.py", "test_unet.test_downsampling_pads_right_and_below", [
        ("F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))")]),
    "dropout on while sampling": ("unet.py",
                                  "test_unet.test_dropout_drops_a_tenth_and_is_off_when_sampling", [
        ("if not self.training or not self.p", "if not self.p")]),
    "EMA before the step": ("train.py", "test_commands.test_ema_follows_the_weights_after_each_step", [
        ("            self.adam.step()\n", ""),
        ("(self.averages, self.params, None)\n",
         "(self.averages, self.params, None)\n            self.adam.step()\n")]),
    "EMA that never warms up": ("train.py",
                                "test_commands.test_ema_follows_the_weights_after_each_step", [
        ("return min(decay, (1 + step) / (10 + step))", "return decay")]),
    "resume without Adam's state": ("train.py", "test_commands.test_resume_at_any_step_is_exact", [
        ('        self.adam.load_state_dict(state["adam"])\n', "")]),
    "resume without the EMA": ("train.py", "test_commands.test_resume_at_any_step_is_exact", [
        ('        self.ema.load_state_dict(state["ema"])\n', "")]),
    "resume from the first batch": ("train.py", "test_commands.test_resume_at_any_step_is_exact", [
        ('self.step, self.summed = state["step"], state["summed"]',
         'self.step, self.summed = 0, state["summed"]')]),
    "a checkpoint after a NaN": ("train.py",
                                 "test_commands.test_a_step_that_is_not_finite_ends_the_run", [
        ("if (bad := self.bad.item()) >= 0:", "if (bad := self.bad.item()) >= 10 ** 9:")]),
    "flips drawn, not applied": ("train.py", "test_commands.test_flips_and_clipping_happen", [
        ('if s["flip"]:', "if False:")]),
    "gradient not clipped": ("train.py", "test_commands.test_flips_and_clipping_happen", [
        ('clip_grad_norm_(self.params, s["clip"])', "clip_grad_norm_(self.params, 1e9)")]),
    "every rank the same images": ("train.py", "test_commands.test_two_ranks_are_one_run", [
        ("mine = slice(where.rank * share, (where.rank + 1) * share)", "mine = slice(share)")]),
    "checkpoints unverified": ("runs.py", "test_commands.test_a_damaged_checkpoint_is_refused", [
        ("if len(raw) < 32 or hashlib.sha256(raw[:-32]).digest() != raw[-32:]:",
         "if len(raw) < 32:")]),
    "deviation called standard error": ("evaluate.py",
                                        "test_evaluate.test_standard_error_and_rmse_by_hand", [
        ("values.std().item() / math.sqrt(len(values))", "values.std().item()")]),
    "covariances in float32": ("evaluate.py",
                               "test_evaluate.test_frechet_distance_of_commuting_covariances", [
        ("for x in (a.double(), b.double()):", "for x in (a.float(), b.float()):")]),
    "strata weighted alike": ("evaluate.py", "test_evaluate.test_eq05_stratified_estimate_is_unbiased", [
        ("total += (last - first + 1) * term", "total += s.T / len(pieces) * term")]),
    "rate not accumulated": ("ddpm.py", "test_evaluate.test_bits_per_dim_command", [
        ("rate = rate + vlb_term(", "rate = vlb_term(")]),
    "a figure without its x_0": ("sample.py", "test_commands.test_train_resume_sample", [
        (".round().int().tolist()) | {0}", ".round().int().tolist())")]),
    "a figure without its x_t": ("sample.py", "test_commands.test_train_resume_sample", [
        ("torch.cat([parents[t], state.x_t])", "state.x_t")]),
    "μ̃ compared with ε": ("ddpm.py", "test_commands.test_table2_rows_train_sample_and_evaluate", [
        ('"mean": lambda: q_posterior', '"mu": lambda: q_posterior')]),
}
BY_PROCESS = {"every rank the same images"}  # the test starts scripts: it needs files, not a module
ARGUMENTS = {"test_table2_rows_train_sample_and_evaluate": dict(
    predict="mean", variance="fixed_small", objective="simple")}


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
    if module_name == "test_commands":
        request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
        torch.save(test_commands.train.data.shapes(64, 8), "images.pt")
    fixtures = ARGUMENTS.get(function_name, {})
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
    if module_name == "test_evaluate" and "run" in inspect.signature(function).parameters:
        set_up = getattr(test_evaluate.run, "__wrapped__", None) or test_evaluate.run.__pytest_wrapped__.obj
        set_up(request.getfixturevalue("tmp_path"), request.getfixturevalue("monkeypatch"))
        fixtures = {"run": None}
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


@pytest.mark.parametrize("test", sorted({test for _, test, _ in MISTAKES.values()}))
def test_the_right_lines_pass(test, long, request):
    """The control: run in the same way on the source as it is, the same tests pass."""
    if not long:
        pytest.skip("--long runs it; the tests themselves always run")
    run_alone(test, request)


def table(title: str) -> list[list[str]]:
    """The rows of the first table under a heading of the README, as cells."""
    text = (HERE / "README.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def named_tests(text: str) -> list[str]:
    return re.findall(r"`(test_\w+)`", text)


MODULES = (test_commands, test_data, test_ddpm, test_evaluate, test_unet, test_weights)


def test_readme_the_paper_in_code():
    """Every function and test in that table exists; every public function of ddpm.py is in it.

    And every test named there fails on at least one of the mistakes."""
    rows = table("The paper in code")
    named = set()
    for row in rows:
        for file, name in re.findall(r"`(\w+)\.([\w.]+)`", row[1] + " " + row[2]):
            if f"{file}.{name}" in ("ddpm.py", "unet.py"):
                continue
            thing = importlib.import_module(file)
            for part in name.split("."):
                thing = getattr(thing, part)
            named.add(f"{file}.{name}")
        tests = named_tests(row[2] + " " + row[3])
        assert tests, row
        for test in tests:
            assert any(hasattr(module, test) for module in MODULES), test
            assert any(test == entry[1].split(".")[1] for entry in MISTAKES.values()), test
    import ddpm
    for name, thing in vars(ddpm).items():
        if inspect.isfunction(thing) and thing.__module__ == "ddpm" and not name.startswith("_"):
            assert f"ddpm.{name}" in named, name
    labels = " ".join(row[0] for row in rows)
    for label in [*(f"Eq. {i}" for i in range(1, 17)), *(f"Alg. {i}" for i in range(1, 5)),
                  *(f"Table {i}" for i in (1, 2, 4)), *(f"Fig. {i}" for i in range(5, 9))]:
        assert re.search(rf"{label}\b", labels), label


def test_readme_easy_mistakes():
    """The README's list of mistakes is this file's, each with the test that catches it."""
    rows = {row[0]: named_tests(row[-1]) for row in table("Easy mistakes")}
    assert rows.keys() == MISTAKES.keys()
    for name, tests in rows.items():
        assert tests == [MISTAKES[name][1].split(".")[1]], name
