"""The layout of diffusers, in and out: what is read computes the same function there, and whatever
would be another function is refused. All of it needs that library."""
import contextlib
import http.server
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import ddpm
import evaluate
import sample
import train
from extras import weights
from helpers import CONFIG, CPU, GOLDEN, golden_input, HERE, layout, outputs, state
from support import checkpoint, data
from unet import build_network

BIN, SAFE = "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"
SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_start": 1e-4,
             "beta_end": 0.02, "beta_schedule": "linear", "variance_type": "fixed_large",
             "clip_sample": True, "prediction_type": "epsilon"}


def write(folder, config=CONFIG, scheduler=SCHEDULER, nested=True, tensors=None) -> pathlib.Path:
    """A model of diffusers, in two folders or in one."""
    for place, name, content in (("unet", "config.json", config),
                                 ("scheduler", "scheduler_config.json", scheduler)):
        path = folder / place / name if nested else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    torch.save(state() if tensors is None else tensors, (folder / "unet" if nested else folder) / BIN)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model")


def loaded(path) -> checkpoint.Trained:
    """What the other commands see of a model of diffusers, once it is converted."""
    with tempfile.TemporaryDirectory() as run:
        assert weights.main([str(path), run]) == 0
        return checkpoint.load(run, machine=CPU)


def converted(folder) -> pathlib.Path:
    """A run beside it, with the weights of this model of diffusers."""
    run = folder.with_name(folder.name + "-run")
    assert weights.main([str(folder), str(run)]) == 0
    return run


def refuses(*argv, status=1) -> str:
    """The one line in which the command says why not. It is no unexpected error."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert weights.main([*map(str, argv)]) == status
    line, = said.getvalue().splitlines()
    assert line.startswith("weights.py: ") and "unexpected " not in line
    return line


def refused(path, *parts) -> None:
    """Nothing is converted from there, and one line names these."""
    with tempfile.TemporaryDirectory() as run:
        line = refuses(path, run)
        assert not list(pathlib.Path(run).iterdir())
    for part in parts:
        assert str(part) in line


# ------------------------------------------------------------------------------------------- inwards

def test_what_is_loaded_is_the_network_and_its_chain(folder):
    """Golden outputs, the choices, and the schedule."""
    trained = loaded(folder)
    torch.testing.assert_close(outputs(trained.net), torch.tensor(GOLDEN), rtol=1e-4, atol=1e-5)
    assert trained.settings["variance"] == "fixed_large" and trained.settings["attention"] == [16]
    assert trained.s.T == 1000 and abs(trained.s.betas[1000] - 0.02) < 1e-12
    assert f"from {folder}, " in trained.source and not trained.net.training
    assert all(p.dtype == torch.float32 for p in trained.net.parameters())
    for own in (outputs(checkpoint.load(converted(folder), ema, CPU).net) for ema in (True, False)):
        torch.testing.assert_close(own, torch.tensor(GOLDEN), rtol=1e-4, atol=1e-5)


def test_every_form_of_the_layout_loads(folder, tmp_path):
    """Flat or nested, safetensors or .bin, attention by its old names, numbers of fewer bits."""
    want = outputs(loaded(folder).net)
    old = {k.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace(
        "to_out.0", "proj_attn"): v for k, v in state().items()}
    assert old.keys() != state().keys()
    assert torch.equal(outputs(loaded(write(tmp_path / "old", nested=False, tensors=old)).net), want)
    from safetensors.torch import save_file
    save_file(state(), folder / "unet" / SAFE, {"format": "pt"})
    (folder / "unet" / BIN).write_bytes(b"")                    # it is not read where both are
    assert torch.equal(outputs(loaded(folder).net), want)
    half = write(tmp_path / "half", tensors={k: v.half() for k, v in state().items()})
    torch.testing.assert_close(outputs(loaded(half).net), want, rtol=0.05, atol=0.01)


def test_a_checkpoint_stays_one_beside_a_configuration(folder):
    """A .pt file is of train.py, whatever lies in its folder."""
    net, settings = weights.from_diffusers(folder, folder)
    ema = {name: x + 0.01 for name, x in net.state_dict().items()}
    path = write(folder, nested=False) / "ema-0000007.pt"
    checkpoint.save_checkpoint(path, {"settings": settings, "step": 7, "ema": ema})
    trained = checkpoint.load(path, machine=CPU)
    assert "step 7" in trained.source
    assert all(torch.equal(x, ema[name]) for name, x in trained.net.state_dict().items())
    assert weights.main([str(path), str(folder / "out")]) == 0  # outwards, as it is no model there
    assert all(torch.equal(x, ema[name]) for name, x in loaded(folder / "out").net.state_dict().items())


def test_wrong_weights_are_refused(folder):
    """Missing, surplus, misshapen or not finite: one line that names the folder, and the tensor
    where it is one; also files that hold no tensors, or code."""
    square = "down_blocks.0.attentions.0.to_q.weight"
    for change, named in (
            ({"conv_in.bias": None}, "conv_in.bias"), ({square: None}, square),
            ({"extra": torch.zeros(2)}, "extra"), ({"conv_in.bias": torch.zeros(31)}, "conv_in.bias"),
            ({square: torch.zeros(1024)}, square), ({"conv_out.bias": torch.tensor(1.0)}, "conv_out.bias"),
            ({"conv_in.bias": torch.full((32,), math.nan)}, "function"),
            ({square: torch.full((32, 32), math.inf)}, "function")):
        write(folder, tensors={k: v for k, v in (state() | change).items() if v is not None})
        refused(folder, folder, named)
    for content in ([torch.ones(1)], {1: torch.ones(1)}, {"conv_in.bias": 1}, 3, "text", {}):
        write(folder, tensors=content)
        refused(folder, folder)
    write(folder)
    (folder / "unet" / BIN).write_bytes((folder / "unet" / BIN).read_bytes()[:-100])
    refused(folder, folder)
    (folder / "unet" / BIN).unlink()
    refused(folder, folder)


class Code:
    """A pickle that would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_error_of_build_network_is_not_blamed_on_the_folder(folder, monkeypatch, capsys):
    """One's own network there may be wrong: it is told with its place."""
    monkeypatch.setattr(weights, "build_network", lambda settings: 1 / 0)
    assert weights.main([str(folder), str(folder / "run")]) == 1
    assert "unexpected ZeroDivisionError in test_weights.py" in capsys.readouterr().err


def test_no_pickled_code_is_run(folder, tmp_path):
    write(folder, tensors={**state(), "a": Code(tmp_path / "made")})
    refused(folder, folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("change", [
    {"act_fn": "relu"}, {"norm_eps": 1e-5}, {"flip_sin_to_cos": True}, {"freq_shift": 0},
    {"center_input_sample": True}, {"mid_block_scale_factor": 2}, {"norm_num_groups": 16},
    {"resnet_time_scale_shift": "scale_shift"}, {"attention_head_dim": 8}, {"add_attention": False},
    {"class_embed_type": "timestep"}, {"time_embedding_type": "fourier"}, {"downsample_padding": 1},
    {"downsample_type": "resnet"}, {"out_channels": 5},
    {"in_channels": 1}, {"sample_size": None}, {"sample_size": [16, 16]}, {"layers_per_block": "1"},
    {"down_block_types": ["DownBlock2D", "DownBlock2D"]}, {"down_block_types": ["DownBlock2D"]},
    {"down_block_types": None}, {"up_block_types": ["UpBlock2D", "UpBlock2D"]},
    {"block_out_channels": [32, 48]}, {"block_out_channels": [48, 96]}, {"block_out_channels": []}],
    ids=str)
def test_another_network_is_refused(folder, change):
    """Whatever its entry is called: both networks are asked for the same x_t.

    Kills: an architecture that is only approximated, an entry that nobody looks at."""
    refused(write(folder, CONFIG | change), folder)


@pytest.mark.parametrize("change", [
    {"_class_name": "EulerDiscreteScheduler"}, {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    {"_class_name": "EDMEulerScheduler"}, {"_class_name": None}, {"prediction_type": "v_prediction"},
    {"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "fixed_small"},
    {"variance_type": "learned_range"}, {"variance_type": 1}, {"prediction_type": None},
    {"trained_betas": [0.1]}, {"trained_betas": [0.01] * 1000}, {"rescale_betas_zero_snr": True},
    {"thresholding": True}, {"clip_sample_range": 2.0}, {"num_train_timesteps": "x"},
    {"num_train_timesteps": 0}, {"num_train_timesteps": 100}, {"beta_end": "x"}, {"beta_start": -1},
    {"beta_end": math.nan}], ids=str)
def test_another_chain_is_refused(folder, change):
    """What was not trained as the paper's chains, what the sampler here does not know, and 100 steps
    of the paper's β, which leave the image in x_T."""
    refused(write(folder, CONFIG, SCHEDULER | change), folder)


@pytest.mark.parametrize("file, change", [
    ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}),
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
    ("scheduler/scheduler_config.json", {"variance_type": "learned_range"}),
    ("scheduler/scheduler_config.json", {"thresholding": True}), ("unet/config.json", {"sample_size": None}),
    ("unet/config.json", {"sample_size": [16, 16]}), ("unet/config.json", {"norm_eps": 1e-5})], ids=str)
def test_a_refusal_names_the_file_and_the_entry(folder, file, change):
    """The network's or the chain's, and its value."""
    base = (CONFIG | change, SCHEDULER) if "unet" in file else (CONFIG, SCHEDULER | change)
    refused(write(folder, *base), f"{pathlib.Path(file).name} ", *change)


def test_files_that_are_no_configurations_are_named(folder):
    """Missing, no JSON, or no object. Without its scheduler a network says nothing of its chain."""
    for place in ("unet/config.json", "scheduler/scheduler_config.json"):
        path = folder / place
        good = path.read_bytes()
        for text in ("", "[]", "3", "null", "{", "[" * 100_000, "\x00"):
            path.write_text(text)
            refused(folder, folder)
        path.unlink()
        refused(folder, folder)
        path.write_bytes(good)
    assert loaded(folder).settings["channels"] == 32


@pytest.mark.parametrize("name, clip", [("DDPMScheduler", True), ("DDIMScheduler", True),
                                        ("PNDMScheduler", False)])
def test_defaults_are_the_schedulers_own(folder, name, clip):
    """An entry that is missing means what that class takes for it; a scheduler that does not clip
    is not clipped."""
    settings = loaded(write(folder, CONFIG, {"_class_name": name})).settings
    assert settings["clip"] is clip and settings["variance"] == "fixed_small"
    assert settings["beta_end"] == 0.02 and settings["schedule"] == "linear"
    if clip:
        changed = {"_class_name": name, "clip_sample": False}
        assert loaded(write(folder, CONFIG, changed)).settings["clip"] is False


@pytest.mark.parametrize("T", [100, 1000, 4000])
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_schedules_are_those_of_diffusers(folder, T, name):
    """β_1 … β_T of an imported chain: from beta_start to beta_end in equal steps of β, or of √β.

    diffusers does not rescale the ends for another T.
    Kills: ends multiplied by 1000/T, one schedule read as the other."""
    first, last = (0.02, 0.3) if T == 100 else (0.0015, 0.0195)
    chain = {"num_train_timesteps": T, "beta_start": first, "beta_end": last, "beta_schedule": name}
    got = loaded(write(folder, CONFIG, SCHEDULER | chain)).s.betas[1:]
    power = 1 if name == "linear" else 2
    want = [(first ** (1 / power) + (last ** (1 / power) - first ** (1 / power)) * i / (T - 1)) ** power
            for i in range(T)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["runs/nothere", "../x", "./x", "a/b/c", "-", "a/", "someone/model.pt"])
def test_what_is_no_hub_name(tmp_path, monkeypatch, name):
    """A mistyped run and a name that leaves its folder are not looked up on the hub: such a path is
    not there, for the other commands too.

    Kills: `runs/cifra10` asked for on the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    refused(name, f"{pathlib.Path(name)}: no such file or folder")
    with pytest.raises(ValueError, match="no such file or folder$") as error:
        checkpoint.load(name, machine=CPU)
    assert str(error.value).startswith(str(pathlib.Path(name)))


def test_the_other_commands_say_how_to_convert(folder, tmp_path, monkeypatch):
    """They read one format. A name of the form of the hub's and a folder of diffusers are refused
    with the command that converts them; a folder of neither kind is refused by both."""
    monkeypatch.chdir(tmp_path)
    for name in ("someone/model", folder, write(tmp_path / "flat", nested=False)):
        with pytest.raises(ValueError, match="no such file") as error:
            checkpoint.load(name, machine=CPU)
        way = f"python -m extras.weights {pathlib.Path(name).as_posix()} runs/{pathlib.Path(name).name}"
        assert str(error.value).endswith(way)
    (tmp_path / "empty").mkdir()
    assert "empty has neither" in refuses("empty", "new") and not pathlib.Path("new").exists()
    with pytest.raises(ValueError, match="checkpoint.pt: no such file or folder$"):
        checkpoint.load("empty", machine=CPU)


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub with one model, someone/model: as much of it as a download asks for."""
    folder, sha, asked = None, "1" * 40, []

    def do_GET(self):
        self.asked.append(self.path)
        *_, name = self.path.partition(f"/someone/model/resolve/{self.sha}/")
        files = {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*") if p.is_file()}
        if self.path.startswith("/api/models/someone/model"):
            model = {"id": "someone/model", "sha": self.sha, "siblings": [{"rfilename": f} for f in files]}
            tree = [{"type": "file", "path": f, "size": p.stat().st_size, "oid": self.sha} for f, p in files.items()]
            self.answer(json.dumps(tree if "/tree/" in self.path else model).encode())
        elif name in files:
            self.answer(files[name].read_bytes(), ETag=f'"{name}"')
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, content, **headers):
        self.send_response(200)
        for key, value in {"Content-Length": str(len(content)), "X-Repo-Commit": self.sha, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def test_a_name_of_the_hub_is_downloaded_into_the_data_folder(folder, tmp_path):
    """Once: when the hub is gone, the same is converted again; another name is not there then.

    In processes of their own, because the library reads the hub's address when it is imported."""
    (folder / "model_index.json").write_text(json.dumps({
        "_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"]}))
    handler = type("Handler", (Hub,), {"folder": folder, "asked": []})

    def convert(*argv):
        return subprocess.run(
            [sys.executable, "-m", "extras.weights", *argv, "--data-dir", str(tmp_path / "here")], cwd=HERE,
            capture_output=True, text=True, encoding="utf-8", timeout=300, env={
                **os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "PYTHONIOENCODING": "utf-8"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True).start()
        address = f"http://127.0.0.1:{httpd.server_port}"
        done = convert("someone/model", str(tmp_path / "run"))
        assert done.returncode == 0 and handler.asked, done.stderr
        unknown = convert("someone/else", str(tmp_path / "no"))
        httpd.shutdown()
    assert list((tmp_path / "here" / "hub").rglob(BIN))
    gone, later = convert("someone/else", str(tmp_path / "no")), convert("someone/model", str(tmp_path / "again"))
    for failed in (unknown, gone):
        line, = failed.stderr.splitlines()
        assert failed.returncode == 1 and "someone/else is not here" in line and "unexpected" not in line
        assert "Cannot load" not in line            # which the library says of its cache; the cause is named
    assert later.returncode == 0 and not (tmp_path / "no").exists(), later.stderr
    for run in ("run", "again"):
        trained = checkpoint.load(tmp_path / run, machine=CPU)
        torch.testing.assert_close(outputs(trained.net), torch.tensor(GOLDEN), rtol=1e-4, atol=1e-5)
        assert "from someone/model, " in trained.source


def test_a_run_is_not_written_over(folder, tmp_path):
    """The same source is converted again; a run, what is from another source, and what cannot be
    read stay as they are."""
    run = converted(folder)
    assert converted(folder) == run                 # again
    path, other = run / "checkpoint.pt", write(tmp_path / "other")
    state = checkpoint.load_checkpoint(path)
    checkpoint.save_checkpoint(tmp_path / "trained" / "checkpoint.pt", {**{
        key: value for key, value in state.items() if key not in ("source", "format")}, "step": 9})
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "checkpoint.pt").write_bytes(b"odd")
    for source, target in ((other, run), (folder, tmp_path / "trained"), (folder, tmp_path / "odd")):
        before = (target / "checkpoint.pt").read_bytes()
        assert str(target / "checkpoint.pt") in refuses(source, target)
        assert (target / "checkpoint.pt").read_bytes() == before
        assert len(list(target.iterdir())) == 1
    assert "--no-ema" in refuses(folder, tmp_path / "new", "--no-ema", status=2)
    assert str(tmp_path / "trained") in refuses(folder, tmp_path / "trained" / "checkpoint.pt")
    for words in ([folder], ["", "x"], [folder, " "], []):
        refuses(*words, status=2)


# ----------------------------------------------------------------------------------------- outwards

CHOICES = {  # the settings of a network to export, which differ from the defaults of diffusers
    "image_size": 40, "in_channels": 1, "channels": 32, "multipliers": [1, 2, 2], "blocks": 1,
    "attention": [40, 10], "dropout": 0.0, "timesteps": 500, "schedule": "quadratic",
    "beta_start": 0.001, "beta_end": 0.02, "predict": "x0", "variance": "fixed_small", "clip": False}


def test_export_is_read_back(tmp_path):
    """`export` and `load` are inverse: the same weights, schedule and choices, whatever they are."""
    net = build_network(CHOICES).to(memory_format=torch.channels_last)
    for p in net.parameters():
        p.data.normal_(std=0.1)
    for choice in ({}, {"predict": "eps", "variance": "fixed_large", "clip": True, "schedule": "linear"}):
        settings = CHOICES | choice
        weights.export(net, settings, tmp_path / str(len(choice)))
        back = loaded(tmp_path / str(len(choice)))
        assert {**back.settings, "beta_start": 0.001, "beta_end": 0.02} == settings
        torch.testing.assert_close(back.s.betas, checkpoint.build_schedule(settings).betas)
        for name, x in back.net.state_dict().items():
            assert torch.equal(x, net.state_dict()[name])


def test_the_commands_take_what_is_converted(folder, tmp_path, capsys):
    """sample.py and evaluate.py, and train.py --init; a setting that contradicts the network's is
    refused, and so is resuming where no run is. A run of train.py is exported and comes back."""
    official, flags = converted(folder), ["--device", "cpu", "--precision", "fp32"]
    assert not list(tmp_path.glob("*.part"))
    torch.save(data.shapes(8, 16), tmp_path / "x.pt")
    images = ["--dataset", str(tmp_path / "x.pt")]
    for more in ([], ["--no-ema"]):
        assert sample.main(["--checkpoint", str(official), "--n", "2", "--steps", "2", *more, *flags,
                            "--out", str(tmp_path / "samples.pt")]) == 0
    assert torch.load(tmp_path / "samples.pt").shape == (2, 3, 16, 16)
    assert evaluate.main(["--checkpoint", str(official), *images, "--n", "2", "--terms", "2", *flags]) == 0
    assert "bits/dim" in capsys.readouterr().out
    assert evaluate.main(["--checkpoint", str(official), "--n", "2", "--terms", "2", *flags]) == 2
    assert "--dataset" in capsys.readouterr().err
    flags += [*images, "--steps", "1", "--samples", "0", "--batch-size", "2"]
    for more in ([], ["--init", str(official)]):
        files = lambda: sorted({*official.iterdir()} - {official / ".lock"})
        before = files()
        assert train.main([*flags, *more, "--out", str(official)]) == 1
        line, = capsys.readouterr().err.splitlines()
        assert f"--init {official}" in line and "unexpected" not in line
        assert files() == before
    flags += ["--init", str(official)]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "checkpoint.pt"
    state = checkpoint.load_checkpoint(path)
    checkpoint.save_checkpoint(path, {**state, "net": {key: x + 0.01 for key, x in state["net"].items()}})
    tuned, last = (checkpoint.load(tmp_path / "run", ema, CPU) for ema in (True, False))
    assert not torch.equal(tuned.net.conv_in.weight, last.net.conv_in.weight)
    for network, more in ((tuned, []), (last, ["--no-ema"])):
        out = tmp_path / f"out{len(more)}"
        assert weights.main([str(tmp_path / "run"), str(out), *more]) == 0
        assert str(out) in capsys.readouterr().err
        for name, x in loaded(out).net.state_dict().items():
            assert torch.equal(x, network.net.state_dict()[name])
    assert tuned.model_settings == loaded(folder).model_settings
    torch.testing.assert_close(outputs(tuned.net), torch.tensor(GOLDEN), rtol=1e-4, atol=1e-5)
    assert train.main([*flags, "--out", str(tmp_path / "other"), "--channels", "64"]) == 2
    assert "--init" in capsys.readouterr().err


def test_a_constant_schedule_is_linear_and_clips_unless_told_otherwise():
    """Settings of train.py say nothing of clipping. A constant β is a line that does not rise."""
    settings = {**CHOICES, "schedule": "constant", "beta_start": 0.01}
    del settings["clip"]
    found = weights.scheduler_config(settings)
    assert found["clip_sample"] is True and found["beta_schedule"] == "linear"
    assert found["beta_start"] == found["beta_end"] and abs(found["beta_end"] - 0.04) < 1e-12


@pytest.mark.parametrize("change", [
    {"variance": "learned"}, {"predict": "mean"}, {"predict": "v"}, {"schedule": "cosine"},
    {"multipliers": [2, 4]}, {}])
def test_what_diffusers_has_not_is_not_exported(tmp_path, change):
    """A ValueError, and no folder. Nor is a network of one's own, whatever its settings."""
    settings = {**CHOICES, **change}
    net = torch.nn.Identity() if not change else build_network(settings | {"variance": "fixed_small"})
    with pytest.raises(ValueError):
        weights.export(net, settings, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_goes_into_a_new_folder(tmp_path):
    """What is there stays as it is, and what fails leaves nothing: here a file may have 100 kB.

    Kills: a run whose folder then stands for the exported network, however long it goes on."""
    resource = pytest.importorskip("resource", reason="not on Windows")
    (tmp_path / "checkpoint.pt").write_bytes(b"a run")
    with pytest.raises(ValueError):
        weights.export(build_network(CHOICES), CHOICES, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="cannot write .*new: ") as error:
            weights.export(build_network(CHOICES), CHOICES, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.__cause__ and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


# ----------------------------------------------------------------------------- the same, step by step

SIZED = [
    (CONFIG, ((1, 16), (3, 16), (2, 24))),
    ({**CONFIG, "sample_size": 32, "block_out_channels": [64, 128, 128, 128], "layers_per_block": 2,
      "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
      "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]},
     ((1, 32), (2, 16), (1, 48))),
    ({**CONFIG, "sample_size": 256, "block_out_channels": [32, 32, 64, 64, 128, 128],
      "layers_per_block": 2, "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D",
                                                                      "DownBlock2D"],
      "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4}, ((1, 64),))]


@pytest.mark.parametrize("config, sizes", SIZED)
def test_diffusers_weights_load_here(tmp_path, config, sizes):
    """Random weights that diffusers saved give the same outputs, within 1e-5, in several sizes."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**{k: v for k, v in config.items() if k != "_class_name"}).eval()
    for p in theirs.parameters():
        p.data += 0.02 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path)
    diffusers.DDPMScheduler().save_pretrained(tmp_path)
    assert {k: list(v.shape) for k, v in theirs.state_dict().items()} == layout(config)
    ours = loaded(tmp_path).net
    for n, side in sizes:
        x, t = torch.randn(n, 3, side, side), torch.randint(1, 1001, (n,))
        with torch.no_grad():
            torch.testing.assert_close(ours(x, t), theirs(x, t - 1).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_diffusers_scheduler_steps_alike(variance, prediction):
    """All 1000 steps of DDPMScheduler with the same noise: the same x_{t−1}, in float64, with the
    schedule and the choices that its configuration is read as."""
    theirs = diffusers.DDPMScheduler(variance_type=variance, prediction_type=prediction)
    settings = weights.network_settings(CONFIG) | weights.chain_settings(theirs.config)
    theirs.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # theirs are float32
    theirs.alphas = 1 - theirs.betas
    theirs.alphas_cumprod = theirs.alphas.cumprod(0)
    net = lambda x, t: torch.sin(3 * x)
    model = checkpoint.Trained(net, checkpoint.build_schedule(settings), settings, "").model
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for t in range(1000, 0, -1):
        want = theirs.step(net(x, t), t - 1, x, generator=torch.Generator().manual_seed(t)).prev_sample
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        p = ddpm.p_mean_variance(model, x, torch.full((2,), t))
        x = ddpm.p_sample(p, z if t > 1 else 0 * z)
        torch.testing.assert_close(x, want, rtol=1e-7, atol=1e-7)


def test_diffusers_opens_what_is_exported(folder, tmp_path):
    """DDPMPipeline.from_pretrained makes the same images from the same noise."""
    run, out = converted(folder), tmp_path / "out"
    trained = checkpoint.load(run, machine=CPU)
    assert weights.main([str(run), str(out)]) == 0
    pipe = diffusers.DDPMPipeline.from_pretrained(str(out))
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(pipe.unet(golden_input()[0], golden_input()[1] - 1).sample.detach(),
                               trained.net(*golden_input()).detach(), rtol=1e-5, atol=1e-5)
    images = torch.as_tensor(pipe(batch_size=2, num_inference_steps=50, output_type="np",
                                  generator=torch.Generator().manual_seed(0)).images).permute(0, 3, 1, 2)
    # Fifty steps there are the times 0, 20, …, 980, counted from 0. The same chain here:
    alpha_bars = trained.s.alpha_bars
    tau = torch.cat([torch.tensor([0]), torch.arange(0, 1000, 20) + 1])
    alphas = torch.cat([alpha_bars[:1], alpha_bars[tau][1:] / alpha_bars[tau][:-1]])
    s, same = ddpm.Schedule(1 - alphas, alphas, alpha_bars[tau], tau, trained.s), torch.Generator().manual_seed(0)
    noise = lambda t=None: torch.randn(2, 3, 16, 16, generator=same)
    with torch.no_grad():
        *_, last = ddpm.p_sample_loop(replace(trained.model, s=s), noise(), noise)
    torch.testing.assert_close((last.x_t.clamp(-1, 1) + 1) / 2, images, rtol=1e-3, atol=1e-3)
