"""Algorithms 3 and 4 with real bits: the arithmetic code, the chosen candidate, whole files."""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

import common
import compress
import data
import ddpm
import evaluate
import sample
import test_pictures

HERE = Path(__file__).resolve().parents[1]

# --- the arithmetic code

laws = st.lists(st.floats(0, 1), min_size=2, max_size=9).filter(lambda p: sum(p) > 1e-9).map(
    lambda p: compress.frequencies(torch.tensor(p, dtype=torch.float64)).tolist())
messages = st.lists(laws.flatmap(lambda law: st.tuples(
    st.just(law), st.integers(0, len(law) - 1))), max_size=30)


@given(messages)
def test_code_length_is_that_of_the_probabilities(message):
    """8 · bytes ≤ Σ −log₂ p + 2, rounded up to whole bytes, for any list of probabilities; the
    symbols come back, and the first bytes give the first symbols and then no wrong one."""
    code, ideal = compress.Code(), 0.0
    for law, symbol in message:
        assert sum(law) == 2 ** 16 and min(law) > 0
        assert code(law, symbol) == symbol
        ideal -= math.log2(law[symbol] / 2 ** 16)
    content = code.to_bytes()
    assert len(content) <= math.ceil((ideal + 2 + 1e-9) / 8)
    for n in {0, len(content) // 2, len(content) - 1, len(content)} - {-1}:
        code, found = compress.Code(content[:n]), []
        try:
            for law, _ in message:
                found.append(code(law))
        except EOFError:
            assert n < len(content)
        assert found == [symbol for _, symbol in message][:len(found)]
        assert n < len(content) or code.to_bytes() == content


@given(st.lists(st.floats(0, 1), min_size=2, max_size=300).filter(lambda p: sum(p) > 1e-9))
def test_frequencies_are_proportional(p):
    """Each is within its rounding of 2^16 p / Σp, but for the 1 that every symbol gets."""
    found = compress.frequencies(torch.tensor(p, dtype=torch.float64)).double()
    want = torch.tensor(p, dtype=torch.float64) / sum(p) * (2 ** 16 - len(p))
    assert found.sum() == 2 ** 16 and found.min() >= 1
    assert (found - want - 1).abs().sort().values[:-1].max() <= 1

# --- the chosen candidate


def test_the_chosen_candidate_is_a_sample_of_q():
    """z_K ~ N(δ, 1) by χ² over ten equally likely cells, with 2,000 keys, for 0.5 bits."""
    delta = torch.tensor([math.sqrt(2 * 0.5 * math.log(2))], dtype=torch.float64)
    z = torch.cat([compress.candidates(("χ²", i), 0, 1)[compress.choose(("χ²", i), delta, 8) - 1]
                   for i in range(2000)])
    cells = (torch.special.ndtr(z.double() - delta) * 10).long().clamp(0, 9).bincount(minlength=10)
    assert ((cells - 200.0) ** 2 / 200).sum() < 27.9  # exceeded with a probability of 0.001


@pytest.mark.parametrize("kl", [0.1, 1.0, 3.0])
def test_the_mean_length_keeps_the_bound(kl):
    """E[−log₂ p(K)] ≤ KL + log₂(KL + 1) + 4, and it is not below KL, for an exact sample of q."""
    b, n = 14, 200
    delta = torch.full((4,), math.sqrt(2 * kl * math.log(2) / 4), dtype=torch.float64)
    law, lengths = torch.tensor(compress.zipf(kl, b)) / 2 ** 16, []
    for i in range(n):
        k = compress.choose(("bound", i), delta, b)
        octave = k.bit_length() - 1
        lengths.append(octave - law[octave].log2().item())
    assert kl <= sum(lengths) / n <= kl + math.log2(kl + 1) + 4


def test_candidates_are_standard_normal():
    """Mean 0, variance 1, no two blocks or keys alike, and multiples of 2⁻¹⁶."""
    blocks = [compress.candidates((1, 2), 0, 64), compress.candidates((1, 2), 1, 64),
              compress.candidates((1, 3), 0, 64)]
    for z in blocks:
        assert abs(z.mean()) < 0.02 and abs(z.var() - 1) < 0.02
        assert torch.equal(z * 2 ** 16, (z * 2 ** 16).round())
        assert sum(torch.equal(z, other) for other in blocks) == 1

# --- whole files


def network(channels: int = 1, seed: int = 0, **others) -> sample.Trained:
    """A small network with random weights and T = 30."""
    settings = {"in_channels": channels, "image_size": 8, "channels": 32, "multipliers": [1],
                "blocks": 1, "attention": [8], "timesteps": 30, "schedule": "linear",
                "beta_start": 1e-4, "beta_end": 0.02, "predict": "eps", "variance": "fixed_large",
                "dropout": 0.0, "dataset": "images.pt", "data_dir": "data", **others}
    torch.manual_seed(seed)
    net = common.build_network(settings).eval()
    torch.nn.init.normal_(net.conv_out.weight, std=0.05)
    return sample.Trained(net, common.build_schedule(settings), settings, "a test")


def picture(channels: int = 1) -> torch.Tensor:
    return data.shapes(3, 8)[2][:channels]


@pytest.fixture(scope="module")
def file():
    return compress.encode(network(), picture(), 6)


def test_a_file_gives_the_picture_back():
    """Grey and colour, and whatever the network predicts."""
    for channels, predict in ((1, "eps"), (3, "x0"), (3, "mean")):
        trained = network(channels, predict=predict)
        content = compress.encode(trained, picture(channels), 6)
        found, step = compress.decode(trained, content)
        assert step == 0 and torch.equal(found, picture(channels))


def test_a_file_is_as_long_as_algorithm_3_says(file):
    """The sender's x_t are those of the posterior, so the length is near Eq. 5 for this chain."""
    trained, nats = network(), []
    T = trained.schedule.T
    times = sorted({round((T / 1) ** (i / (compress.STEPS - 1))) for i in range(compress.STEPS)})
    s = ddpm.respace(trained.schedule, times)
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(10):
            bound = ddpm.variational_bound(s, trained.net, data.to_model(picture())[None],
                                           lambda t: torch.randn(1, 1, 8, 8),
                                           variance="fixed_small")
            nats.append(sum(bound).item())
    bits = sum(nats) / len(nats) / math.log(2)
    assert 0.7 * bits < 8 * len(file) < 1.4 * bits + 8 * compress.HEADER


def test_every_beginning_shows_what_the_sender_had(file):
    """The first n bytes give x̂_0 of a state of the sender, a later one for a larger n."""
    states = {s.t: data.to_uint8(s.x0_hat)[0]
              for s in compress.transmit(network(), compress.Code(), 6, picture())}
    steps = []
    for n in range(compress.HEADER + 1, len(file) + 1, 6):
        try:
            found, step = compress.decode(network(), file[:n])
        except ValueError as error:
            assert "too few" in str(error) and n < compress.HEADER + 6
            continue
        assert torch.equal(found, states[step])
        steps.append(step)
    assert steps == sorted(steps, reverse=True) and len(set(steps)) > 5


def test_every_damaged_byte_is_noticed(file, long, monkeypatch):
    """So is a file in which all is well but the checksum, as other pixels would make it."""
    for i in range(0, len(file), 1 if long else 7):
        wrong = bytearray(file)
        wrong[i] ^= 1 << i % 8
        with pytest.raises(ValueError, match="damaged|no file|another network|version"):
            compress.decode(network(), bytes(wrong))
    with pytest.raises(ValueError, match="damaged"):
        compress.decode(network(), file + b"\0")
    with monkeypatch.context() as patch:
        patch.setattr(compress.zlib, "crc32", lambda pixels: 7)
        wrong = compress.encode(network(), picture(), 6)
    with pytest.raises(ValueError, match="damaged"):
        compress.decode(network(), wrong)


def test_what_is_not_such_a_file_is_refused(file):
    trained = network()
    for content, wrong in ((b"", "no file"), (b"\x89PNG" + file[4:], "no file"),
                           (file[:compress.HEADER - 1], "no file"),
                           (file[:compress.HEADER], "too few"),
                           (file[:4] + b"\7" + file[5:], "version")):
        with pytest.raises(ValueError, match=wrong):
            compress.decode(trained, content)
    for other in (network(seed=1), network(schedule="quadratic")):
        with pytest.raises(ValueError, match="another network"):
            compress.decode(other, file)
    for wrong in (picture(3), torch.zeros(1, 8, 9, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="the network takes"):
            compress.encode(trained, wrong)

# --- the command


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with images.pt, a run whose weights are random, and a picture.png."""
    monkeypatch.chdir(tmp_path)
    torch.save(data.shapes(64, 8), "images.pt")
    test_pictures.random_run()
    sample.write_png(tmp_path / "picture.png", picture(3))
    return tmp_path


def test_both_sides_compute_the_same_bits(run, capsys):
    """A second process with other threads and without vector instructions reads the file."""
    assert compress.main("encode --b 6 picture.png --checkpoint runs/images a.ddpm".split()) == 0
    settings = {"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "default"}
    subprocess.run([sys.executable, HERE / "compress.py", "decode", "a.ddpm", "b.png"], check=True,
                   env={**os.environ, **settings})
    assert torch.equal(data.read_png(run / "b.png"), picture(3))
    assert compress.main("decode --bytes 40 a.ddpm c.png".split()) == 0
    assert (data.read_png(run / "c.png") != picture(3)).any()
    size = Path("a.ddpm").stat().st_size
    assert f"40 of {size} bytes" in capsys.readouterr().err


def test_measure_prints_every_format(run, capsys):
    """The whole files are exact, as PNG is; their beginnings err less and less."""
    assert compress.main("measure --n 2 --b 6".split()) == 0
    rows = [line for line in capsys.readouterr().out.splitlines()]
    errors = {row[:22].strip(): float(row.split()[-1]) for row in rows}
    sizes = {row[:22].strip(): float(row[22:].split()[0]) for row in rows}
    content = [compress.encode(sample.load(machine=common.find_machine("cpu")), image, 6)
               for image in torch.load("images.pt")[:2]]
    assert sizes["whole files"] == sum(map(len, content)) / 2
    assert errors["whole files"] == errors["PNG"] == 0 < errors["their first 64 bytes"]
    assert errors["their first 64 bytes"] < errors["their first 32 bytes"]
    shown = data.read_png(run / "compress.png")         # 2 pictures, 5 beginnings and the whole
    side = shown.shape[1] // 2
    assert shown.shape == (3, 2 * side, 6 * side)
    whole = shown[:, side // 16:side:side // 8, 5 * side + side // 16::side // 8]
    assert torch.equal(whole, torch.load("images.pt")[0])


def test_what_cannot_be_shown_is_grey_but_a_file_that_is_wrong_is_an_error(tmp_path):
    image, out = picture(), tmp_path / "x.png"

    def decode(content):
        if len(content) < 20:
            raise ValueError("too few")
        return image
    evaluate.files(image[None], lambda image: bytes(100), decode, out)
    assert (data.read_png(out)[:, :8, :8] == 128).all()
    with pytest.raises(ValueError, match="too few"):
        evaluate.files(image[None], lambda image: bytes(9), decode, out)


@pytest.mark.parametrize("line, status, said", [
    ("encode picture.png", 2, "two"), ("decode a.ddpm a.ddpm", 2, "two"),
    ("measure a b", 2, "none"),
    ("encode --bytes 9 picture.png a", 2, "--bytes"), ("decode --b 9 a b", 2, "--b "),
    ("decode --n 9 a b", 2, "--n"), ("encode picture.png runs", 1, "folder"),
    ("encode no.png a", 1, "no file no.png"), ("encode . a", 1, "no file"),
    ("decode picture.png b.png", 1, "no file of compress"),
    ("encode images.pt a", 1, "no PNG"), ("squeeze a b", 2, "squeeze")])
def test_a_mistake_is_one_line(run, capsys, line, status, said):
    assert compress.main(line.split()) == status
    captured = capsys.readouterr().err
    assert said in captured and captured.count("\n") == 1

# --- pictures as PNG files


@given(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_read_png_inverts_png(tmp_path_factory, c, height, width, seed):
    """Whatever filter is the smallest: noise, a ramp and a flat picture have different ones."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (c, height, width), generator=g)
    ramp = torch.arange(height)[:, None] * 3 + torch.arange(width) * (seed % 5)
    path = tmp_path_factory.mktemp("png") / "x.png"
    for image in (noise, ramp.expand(c, -1, -1), noise // 128 + ramp, noise * 0):
        path.write_bytes(data.png(image.to(torch.uint8)))
        assert torch.equal(data.read_png(path), image.to(torch.uint8))


def test_damaged_and_other_pngs_are_refused(tmp_path):
    path, whole = tmp_path / "x.png", data.png(picture(3))
    for i in range(8, len(whole)):
        wrong = bytearray(whole)
        wrong[i] ^= 1 << i % 8
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="damaged|no PNG"):
            data.read_png(path)
    for n in (0, 7, 8, 20, 40, len(whole) - 5):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="damaged|no PNG"):
            data.read_png(path)


def test_pillow_reads_png_and_its_files_are_read(tmp_path):
    """The two readers and the two writers of PNG agree."""
    image = pytest.importorskip("PIL.Image")
    for c, mode in ((1, "L"), (3, "RGB")):
        pixels = data.shapes(2, 16)[1][:c]
        (tmp_path / "a.png").write_bytes(data.png(pixels))
        opened = image.open(tmp_path / "a.png")
        assert opened.mode == mode
        assert opened.tobytes() == data.raw_bytes(pixels.permute(1, 2, 0))
        opened.save(tmp_path / "b.png", optimize=True)
        assert torch.equal(data.read_png(tmp_path / "b.png"), pixels)
