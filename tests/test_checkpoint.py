"""Checkpoints: saved whole and read back or refused, the network that is loaded from one, the newest run."""
import copy
import hashlib
import io
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

import ddpm
import simulated_cuda
from helpers import CPU, SETTINGS, SIDE, SMALL_NET, assert_equal
from simulated_cuda import simulated
from support import checkpoint as checkpoints

SIMULATED = pytest.mark.skipif(bool(simulated_cuda.MISSING), reason=str(simulated_cuda.MISSING))


# ----------------------------------------------------------------------------------------- the file

def sealed(path: Path, content: bytes) -> None:
    path.write_bytes(content + hashlib.sha256(content).digest())


def pickled(**payload) -> bytes:
    torch.save(payload, buffer := io.BytesIO())
    return buffer.getvalue()


GOOD = {"format": "ddpm checkpoint 2", "step": 0, "settings": SETTINGS}


def test_a_checkpoint_is_what_torch_saves_and_its_sha256(tmp_path):
    path = tmp_path / "new" / "checkpoint.pt"
    for step in (0, 10 ** 9):
        payload = {**GOOD, "step": step, "w": torch.arange(3)}
        checkpoints.save_checkpoint(path, {key: payload[key] for key in ("step", "settings", "w")})
        raw = path.read_bytes()
        assert hashlib.sha256(raw[:-32]).digest() == raw[-32:]
        assert_equal(torch.load(io.BytesIO(raw[:-32]), weights_only=True), payload)
        assert_equal(checkpoints.load_checkpoint(path), payload)
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


@SIMULATED
def test_a_checkpoint_is_read_on_the_cpu(tmp_path):
    """Whatever device it was saved on, and whether that is here."""
    path, w = tmp_path / "checkpoint.pt", torch.arange(3)
    with simulated():
        checkpoints.save_checkpoint(path, {**GOOD, "w": w.to("cuda")})
        assert torch.load(io.BytesIO(path.read_bytes()[:-32]))["w"].device.type == "cuda"  # the control
        assert_equal(checkpoints.load_checkpoint(path), {**GOOD, "w": w})
    assert_equal(checkpoints.load_checkpoint(path), {**GOOD, "w": w})


class Deed:
    """What a pickle can do when it is read: here it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("done",)


def test_no_code_in_a_checkpoint_is_run(tmp_path, monkeypatch):
    """One from a stranger, with the right SHA-256, is refused by its name, and does nothing; also with the
    variable that makes torch.load trust every file, unless it is told not to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    sealed(Path("bad.pt"), content := pickled(**GOOD, more=Deed()))
    with pytest.raises(ValueError, match="bad.pt"):
        checkpoints.load_checkpoint(Path("bad.pt"))
    assert not Path("done").exists()
    torch.load(io.BytesIO(content), weights_only=False)  # the control
    assert Path("done").exists()


@pytest.mark.parametrize("change", [
    {"format": "ddpm checkpoint 1"}, {"format": None}, {"format": 2}, {"more": Path("x")}])
def test_a_sound_file_that_is_no_checkpoint_is_refused_by_its_name(tmp_path, change):
    """Another format, or an object that is not plain data. A format that is read is named."""
    path = tmp_path / "some.pt"
    sealed(path, pickled(**GOOD))
    assert checkpoints.load_checkpoint(path)["step"] == 0
    for content in (pickled(**{**GOOD, **change}), pickled(step=0), b"", b"no pickle"):
        sealed(path, content)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            checkpoints.load_checkpoint(path)
    sealed(path, pickled(**{**GOOD, "format": "ddpm checkpoint 1"}))
    with pytest.raises(ValueError, match="ddpm checkpoint 1.*ddpm checkpoint 2"):
        checkpoints.load_checkpoint(path)


def test_a_file_without_its_sha256_is_no_checkpoint(tmp_path):
    """Nothing, too little, the content alone."""
    path = tmp_path / "checkpoint.pt"
    for content in (None, b"", bytes(31), bytes(32), bytes(99), pickled(**GOOD)):
        path.write_bytes(content) if content is not None else None
        with pytest.raises(ValueError, match=re.escape(str(path))):
            checkpoints.load_checkpoint(path)


@given(st.integers(0, 2 ** 40), st.integers(1, 255), st.booleans())
def test_a_damaged_checkpoint_is_refused(tmp_path_factory, where, flip, cut):
    """Cut anywhere or any byte changed: ValueError with its name, never other weights."""
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    checkpoints.save_checkpoint(path, {"step": 2, "settings": SETTINGS, "w": torch.arange(50.0)})
    raw = bytearray(path.read_bytes())
    raw = raw[:where % len(raw)] if cut else raw
    if not cut:
        raw[where % len(raw)] ^= flip
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="checkpoint.pt"):
        checkpoints.load_checkpoint(path)


def test_the_schedule_of_settings():
    """All four of them: √β in equal steps between the ends, which are multiplied by 1000/T."""
    settings = {"timesteps": 500, "schedule": "quadratic", "beta_start": 0.001, "beta_end": 0.02}
    want = [(0.002 ** 0.5 + (0.04 ** 0.5 - 0.002 ** 0.5) * i / 499) ** 2 for i in range(500)]
    assert checkpoints.build_schedule(settings).betas.tolist() == pytest.approx([0, *want])


def test_the_hash_of_a_network_changes_with_all_that_its_numbers_depend_on():
    """Each weight and its name, the network's settings, the schedule and what is predicted; not with
    how it was trained, or where it lies."""
    net = torch.nn.Linear(2, 2)
    trained = checkpoints.Trained(net, ddpm.make_schedule(), SETTINGS, "here")
    hashes = [checkpoints.weights_hash(trained)]
    same = trained._replace(settings={**SETTINGS, "lr": 7, "steps": 3, "dataset": "x", "clip": True}, source="there")
    assert checkpoints.weights_hash(same) == hashes[0] and len(hashes[0]) == 32
    for name in trained.model_settings:
        hashes.append(checkpoints.weights_hash(trained._replace(settings={**SETTINGS, name: "other"})))
    hashes.append(checkpoints.weights_hash(trained._replace(settings={**SETTINGS, "clip": False})))
    with torch.no_grad():
        for i in range(6):
            [*net.weight.view(-1), *net.bias.view(-1)][i].add_(1)
            hashes.append(checkpoints.weights_hash(trained))
    other = torch.nn.Module()
    other.weights, other.bias = net.weight, net.bias
    hashes.append(checkpoints.weights_hash(trained._replace(net=other)))
    assert len(set(hashes)) == len(hashes) == 12 + 9
    assert set(trained.model_settings) == {
        "in_channels", "image_size", "channels", "multipliers", "blocks", "attention", "timesteps", "schedule",
        "beta_start", "beta_end", "predict", "variance"}


# -------------------------------------------------------------------------------------- the network

def assert_has(net, state) -> None:
    assert_equal(dict(net.state_dict()), dict(state))


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_what_is_loaded_of_a_checkpoint(small):
    """The averages unless told otherwise, for evaluation; from a file of --keep too, which has no
    others. channels_last makes convolutions fast."""
    state = small.net.state_dict()
    ema = {key: value + 1 for key, value in state.items()}
    file, folder, kept = Path("runs/x/checkpoint.pt"), Path("runs/x"), Path("runs/x/ema-0000012.pt")
    whole = {"step": 12, "settings": SMALL_NET, "net": state, "ema": ema}
    checkpoints.save_checkpoint(file, whole)
    checkpoints.save_checkpoint(kept, {key: whole[key] for key in ("step", "settings", "ema")})
    for words, path, weights, which in (
            (("runs/x",), file, ema, "averaged"), ((), file, ema, "averaged"),
            ((None, False), file, state, "last"), ((folder, True, CPU), file, ema, "averaged"),
            ((str(kept), True, CPU), kept, ema, "averaged")):
        trained = checkpoints.load(*words)
        assert trained.source.startswith(str(path)) and "12" in trained.source and which in trained.source
        assert_has(trained.net, weights)
        assert trained.settings == SMALL_NET and trained.shape == (3, SIDE, SIDE)
        model = trained.model
        assert (model.predict, model.variance, model.clip) == ("eps", "fixed_large", True)
        assert not any(module.training for module in trained.net.modules())
        assert trained.net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(trained.s.alpha_bars, small.s.alpha_bars)
    with pytest.raises(ValueError, match="ema-0000012.pt has the averaged weights alone: omit --no-ema"):
        checkpoints.load(kept, ema=False, machine=CPU)


@pytest.mark.usefixtures("in_a_folder_of_its_own")
@SIMULATED
def test_a_network_is_loaded_to_the_best_machine(run):
    """That of this moment, unless one is named."""
    def place(**machine):
        return {p.device.type for p in checkpoints.load("runs/images", **machine).net.parameters()}
    with simulated():
        assert place() == {"cuda"} and place(machine=CPU) == {"cpu"}
    assert torch.cuda.is_available() or place() == {"cpu"}


@pytest.mark.usefixtures("in_a_folder_of_its_own")
@pytest.mark.parametrize("change", [
    {"ema": {}}, {"ema": None}, {"ema": {"more": torch.ones(1)}}, {"ema": {"conv_in.bias": torch.ones(31)}},
    {"settings": None}, {"settings": [1]}, {"settings": {}}, *({"settings": {**SMALL_NET, **wrong}} for wrong in (
        {"channels": 64}, {"channels": "x"}, {"in_channels": None}, {"multipliers": []}, {"blocks": 0.5}))])
def test_weights_must_fit_their_settings(small, change):
    """Missing, other or more weights, no settings, or those of another network: the file is named."""
    state = {"step": 12, "settings": SMALL_NET, "ema": small.net.state_dict()}
    if isinstance(change.get("ema"), dict) and change["ema"]:
        change = {"ema": {**state["ema"], **change["ema"]}}
    checkpoints.save_checkpoint(Path("x.pt"), {**state, **change})
    with pytest.raises(ValueError, match="x.pt"):
        checkpoints.load("x.pt", machine=CPU)


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_the_newest_run_is_the_one_that_saved_last():
    """Not the last one by name, and no other file of a run counts."""
    with pytest.raises(ValueError, match="elsewhere"):
        checkpoints.newest_checkpoint(Path("elsewhere"))
    for when, file in ((1, "c/checkpoint.pt"), (3, "a/checkpoint.pt"), (2, "b/checkpoint.pt"),
                       (9, "d/other.pt"), (5, "b/checkpoint.pt")):
        Path("runs", file).parent.mkdir(parents=True, exist_ok=True)
        Path("runs", file).touch()
        os.utime(Path("runs", file), (when, when))
        want = {1: "c", 2: "a", 3: "a", 9: "a", 5: "b"}[when]
        assert checkpoints.newest_checkpoint() == Path("runs", want, "checkpoint.pt")


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_weights_are_cast_once_in_a_copy(small):
    """Those of convolutions and matrix products; the normalisation stays float32."""
    seen, net = [], copy.deepcopy(small.net).train()
    hook = torch.nn.Module.register_forward_hook
    machine = CPU._replace(dtype=torch.bfloat16)
    net.apply(lambda module: hook(module, lambda module, x, y: seen.append(module)))
    model = checkpoints.inference_model(ddpm.Model(small.s, net), machine)
    x = model.net(torch.zeros(1, *small.shape), torch.ones(1))
    assert x.dtype == torch.float32 and seen and not any(module.training for module in seen)
    for module in seen:
        for weight in module.parameters(recurse=False):
            cast = isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
            assert weight.dtype == (torch.bfloat16 if cast else torch.float32)
    assert all(weight.dtype == torch.float32 for weight in net.parameters()) and net.training
