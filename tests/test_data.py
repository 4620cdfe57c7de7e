"""Every data format, on small files made here; whatever is wrong with one is a single clear
line."""
import gzip
import hashlib
import io
import math
import os
import struct
import tarfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import judge
import sample
import weights


def idx(n: int, side: int = 28, magic: int = 2051) -> bytes:
    pixels = bytes((7 * i) % 256 for i in range(n * side * side))
    return struct.pack(">IIII", magic, n, side, side) + pixels


def cifar(folder, records: int = 3, drop: str = "", label: int = 9):
    """An archive of the real layout, with few records."""
    path = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin", "readme.html"]:
            if name == drop:
                continue
            rows = [bytes([label]) + bytes([i % 256] * 1024 + [1] * 1024 + [2] * 1024)
                    for i in range(records)]
            info = tarfile.TarInfo("cifar-10-batches-bin/" + name)
            body = b"".join(rows)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return path


def test_sec33_scaling_is_linear_and_inverted_exactly():
    """{0 … 255} ↔ [−1, 1]; going back clamps, scales and rounds.

    Kills: images in [0, 1], an 8-bit cast without clamping or that truncates."""
    levels = torch.arange(256, dtype=torch.uint8)
    x = data.to_model(levels)
    assert x[0] == -1 and x[255] == 1 and torch.allclose(x.diff(), torch.tensor(2 / 255))
    assert torch.equal(data.to_uint8(x), levels)
    assert torch.equal(data.to_uint8(x + 0.9 / 255), levels)
    assert data.to_uint8(torch.tensor([-7.0, 1.01, 300.0])).tolist() == [0, 255, 255]


def test_idx(tmp_path):
    """Gzipped IDX, padded from 28×28 to 32×32 with the picture in the middle."""
    for name, n in (("train-images-idx3-ubyte.gz", 5), ("t10k-images-idx3-ubyte.gz", 2)):
        (tmp_path / name).write_bytes(gzip.compress(idx(n)))
    d = data.load("mnist", tmp_path)
    assert d.images.shape == (5, 1, 32, 32) and d.padded and d.images.dtype == torch.uint8
    raw = torch.tensor(list(idx(5)[16:]), dtype=torch.uint8).view(5, 1, 28, 28)
    assert torch.equal(d.images[:, :, 2:30, 2:30], raw)
    assert d.images.sum(dtype=torch.int64) == raw.sum(dtype=torch.int64)
    with pytest.raises(OSError, match="put it at"):             # digits are not taken for clothes
        data.load("fashion_mnist", tmp_path, "test")
    (tmp_path / "mnist").mkdir()
    fashion = tmp_path.rename(tmp_path.with_name("fashion-mnist-" + tmp_path.name))
    assert len(data.load("fashion_mnist", fashion, "test").images) == 2


@given(st.integers(0, 2 ** 31), st.sampled_from(["cut", "byte", "header"]))
def test_idx_corrupted(tmp_path_factory, where, how):
    """Cut anywhere, any compressed byte changed, any header: read as it was, or one ValueError."""
    good = gzip.compress(idx(2, 4), mtime=0)
    raw = bytearray(good)
    if how == "cut":
        raw = raw[:where % len(raw)]
    elif how == "byte":
        raw[where % len(raw)] ^= 1 + where % 255
    else:
        raw = bytearray(gzip.compress(struct.pack(">IIII", 2051, where, 4, 4) + bytes(32)))
    path = tmp_path_factory.mktemp("idx") / "x.gz"
    path.write_bytes(raw)
    try:
        images = data.read_idx(path)
    except ValueError as error:
        assert "\n" not in str(error) and "x.gz" in str(error)
    else:
        assert images.flatten().tolist() == list(idx(2, 4)[16:]) or how == "header"


def test_cifar10_is_read_inside_the_archive(tmp_path):
    """A label byte, then 1,024 red, green and blue bytes; five files are the training set."""
    cifar(tmp_path)
    train, test = (data.load("cifar10", tmp_path, split).images for split in ("train", "test"))
    assert train.shape == (15, 3, 32, 32) and test.shape == (3, 3, 32, 32)
    assert train[4].flatten(1).unique(dim=1).flatten().tolist() == [1, 1, 2]
    assert os.listdir(tmp_path) == ["cifar-10-binary.tar.gz"]


def test_cifar10_damaged(tmp_path):
    """A missing file, a cut archive, records of another length, labels above 9."""
    cifar(tmp_path, drop="data_batch_4.bin")
    with pytest.raises(ValueError, match="no whole data_batch_4.bin"):
        data.load("cifar10", tmp_path)
    path = cifar(tmp_path, label=10)
    with pytest.raises(ValueError, match="label above 9"):
        data.load("cifar10", tmp_path)
    whole = cifar(tmp_path).read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError):
        data.load("cifar10", tmp_path)
    path.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="damaged"):
        data.load("cifar10", tmp_path)


def test_tensor_file(tmp_path):
    """A .pt of torch.save is taken if it is uint8 N×C×H×W with C = 1 or 3, and with no other."""
    path = tmp_path / "images.pt"
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    torch.save(images, path)
    assert torch.equal(data.load(str(path)).images, images)
    with pytest.raises(ValueError, match="8×8, not 16×16"):
        data.load(str(path), image_size=16)
    for bad in (images.float(), images[0], images[:, :2], images[:0], {"a": images}, "text"):
        torch.save(bad, path)
        with pytest.raises(ValueError):
            data.load(str(path))
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match="no tensor file"):
        data.load(str(path))


def picture(*shape) -> torch.Tensor:
    """Random pixels, so that no turning, mirroring or exchange of channels leaves them alike."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_cifar10_pixels_are_where_they_belong(tmp_path):
    """1,024 bytes of red in rows from the top, then green, then blue.

    Kills: rows and columns exchanged, colours in another order, pictures upside down."""
    records = picture(30, 3, 32, 32)
    files = {f"data_batch_{i + 1}.bin": records[5 * i:5 * i + 5] for i in range(5)}
    files["test_batch.bin"] = records[25:]
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, images in files.items():
            body = b"".join(bytes([7, *(image[c, y, x].item() for c in range(3) for y in range(32)
                                        for x in range(32))]) for image in images)
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    assert torch.equal(data.load("cifar10", tmp_path).images, records[:25])
    assert torch.equal(data.load("cifar10", tmp_path, "test").images, records[25:])


def test_pictures_of_a_folder_are_as_one_sees_them(tmp_path):
    """The pixels of a PNG by `sample.write_png` and by Pillow; the middle of a wide and of a high
    one; what EXIF turns; 16-bit grey; white behind what is transparent.

    Kills: pictures transposed or mirrored, RGB as BGR, the left part in place of the middle."""
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    folder, rgb = tmp_path / "p", picture(3, 16, 16)
    folder.mkdir()

    def pil(x, mode="RGB"):
        return Image.frombytes(mode, (x.shape[2], x.shape[1]), bytes(x.permute(1, 2, 0).flatten().tolist()))
    sample.write_png(folder / "a.png", rgb)
    pil(rgb).save(folder / "b.png")
    noise = picture(3, 16, 9)
    pil(torch.cat([noise, rgb, noise], 2)).save(folder / "c.png")
    pil(torch.cat([noise.transpose(1, 2), rgb, noise.transpose(1, 2)], 1)).save(folder / "d.png")
    turned = pil(rgb.rot90(1, (1, 2)))                      # by a quarter to the left
    exif = turned.getexif()
    exif[0x0112] = 6                                        # "turn it by a quarter to the right"
    turned.save(folder / "e.png", exif=exif)
    alpha = torch.cat([rgb, torch.full((1, 16, 16), 255, dtype=torch.uint8)])
    pil(alpha, "RGBA").save(folder / "f.png")
    clear = torch.cat([rgb, torch.zeros(1, 16, 16, dtype=torch.uint8)])
    pil(clear, "RGBA").save(folder / "g.png")
    grey = picture(1, 16, 16)
    Image.frombytes("I;16", (16, 16), b"".join(struct.pack("<H", 257 * v) for v in grey.flatten().tolist())
                    ).save(folder / "h.png")
    pil(grey, "L").save(folder / "i.png")
    images = data.load(str(folder), tmp_path / "data", image_size=16).images
    for name, got in zip("abcdef", images):
        assert torch.equal(got, rgb), name
    assert (images[6] == 255).all()
    for got in images[7:]:
        assert torch.equal(got, grey.expand(3, -1, -1))


def test_folder_of_pictures(tmp_path):
    """Centre crop and resize, decoded once into a mapped file; a change decodes anew."""
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    folder, cache = tmp_path / "pictures", tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    for i, place in enumerate(("a.png", "sub/b.jpg")):
        Image.new("RGB", (40 + 20 * i, 30), (200, 10 * i, 5)).save(folder / place, quality=95)
    d = data.load(str(folder), cache, image_size=16)
    assert d.images.shape == (2, 3, 16, 16) and (d.images[0, 0] == 200).all()
    assert len(list(cache.iterdir())) == 1
    assert torch.equal(data.load(str(folder), cache, image_size=16).images, d.images)
    (folder / "c.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="c.png cannot be decoded"):
        data.load(str(folder), cache, image_size=16)
    assert len(list(cache.iterdir())) == 1


def test_no_such_data(tmp_path):
    """An unknown name and an empty folder are told in one line each."""
    with pytest.raises(ValueError, match="no data set is called 'cifar11'"):
        data.load("cifar11")
    with pytest.raises(ValueError, match="no pictures"):
        data.load(str(tmp_path))


def test_shapes_are_the_same_always():
    """Made by the code: a function of n, size and split; test images are not training images."""
    a, b = data.shapes(16), data.shapes(16)
    assert torch.equal(a, b) and a.shape == (16, 3, 16, 16) and a.dtype == torch.uint8
    assert not torch.equal(a, data.shapes(16, split="test"))
    assert a.float().std() > 20 and len(a.flatten(1).unique(dim=0)) == 16


def test_shapes_have_the_areas_of_geometry():
    """Disc πr², square (1.7 r)², triangle 3√3 (0.55 r)², ring 3πr²/4; at their place, base below.

    Kills: rows and columns exchanged, pictures upside down, an outline of another size."""
    x, y, r = torch.tensor([-0.2, 0.1]), torch.tensor([0.15, -0.1]), torch.tensor([0.5, 0.65])
    side, axis = 64, (torch.arange(64) + 0.5) / 32 - 1
    cover = data.covers(x, y, r, side)
    areas = cover.sum((2, 3)) * (2 / side) ** 2
    for area, factor in zip(areas, (math.pi, 1.7 ** 2, 3 ** 1.5 * 0.55 ** 2, 0.75 * math.pi)):
        torch.testing.assert_close(area, factor * r ** 2, rtol=0.02, atol=0)
    for kind in (0, 1, 2, 3):
        across = (cover[kind].sum(1) * axis).sum(1) / cover[kind].sum((1, 2))
        down = (cover[kind].sum(2) * axis).sum(1) / cover[kind].sum((1, 2))
        torch.testing.assert_close(across, x, rtol=0, atol=0.01)
        torch.testing.assert_close(down, y, rtol=0, atol=0.01)
    widths = cover[2, 0].sum(1)
    rows = widths[widths > 1][:-1]                              # the last one is half covered
    assert (rows[1:] > rows[:-1]).all() and rows[-1] > 3 * rows[0]


def test_shapes_have_one_kind_and_one_colour_on_black():
    """All kinds and all hues about equally often; every pixel is a mixture of black and the hue."""
    images = data.shapes(1000).double()
    brightest = images.flatten(2).amax(2)                                       # (N, RGB)
    mixed = images / brightest[..., None, None].clamp(min=1)
    assert (mixed - mixed.amax(1, keepdim=True)).abs().max() < 0.03
    assert (brightest.amax(1) == 255).all() and (brightest.amin(1) == 51).all()
    hues = torch.bincount(brightest.argmax(1) * 3 + brightest.argmin(1), minlength=9)
    assert ((hues > 0) == torch.tensor([0, 1, 1, 1, 0, 1, 1, 1, 0]).bool()).all()
    assert hues[hues > 0].min() > 120


def test_judge():
    """The judge takes the generator's test images; not noise, nothing, blurs, or two shapes."""
    real = data.shapes(40, split="test")
    assert judge.clean(real).all()
    blurred = torch.nn.functional.avg_pool2d(real.float(), 5, 1, 2).byte()
    two = torch.maximum(real, real.roll(1, 0))
    g = torch.Generator().manual_seed(0)
    noisy = (real + 20 * torch.randn(real.shape, generator=g)).clamp(0, 255).byte()
    for bad in (blurred, two, noisy, torch.zeros_like(real)):
        assert judge.clean(bad).double().mean() < 0.06


def test_download_is_whole_or_not_there(tmp_path, server):
    """Size and checksum are checked before the file takes its name; what broke starts again.

    Kills: half a download taken for the data, an error without the address and the place."""
    body, target = os.urandom(5000), tmp_path / "data" / "x.bin"
    server.files["/x"] = body
    address = server.address + "/x"
    for size, checksum, match in ((4000, None, "more than 4000 bytes"),
                                  (6000, None, "5000 bytes came in place of 6000"),
                                  (5000, hashlib.md5(b"").hexdigest(), "checksum"),
                                  (5000, "0" * 64, "checksum")):
        with pytest.raises(OSError, match=match) as error:
            data.fetch(address, target, size, checksum)
        assert address in str(error.value) and f"put it at {target}" in str(error.value)
        assert not list(target.parent.iterdir())
    assert data.fetch(address, target, 5000, hashlib.sha256(body).hexdigest()) == target
    assert target.read_bytes() == body


def half(handler) -> None:
    """Announces 5,000 bytes, sends 100 and hangs up."""
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(bytes(100))


def no_number(handler) -> None:
    """A Content-Length that is no number."""
    handler.send_response(200)
    handler.send_header("Content-Length", "many")
    handler.end_headers()
    handler.wfile.write(b"body")


@pytest.mark.parametrize("answer, match", [
    (half, "100 bytes came in place of 5000"), (404, "Not Found"), (500, "Server Error"),
    ("file:///etc/passwd", "file"), ("ftp://127.0.0.1/x", "ftp"), ("/x", "infinite loop")])
def test_download_mistakes(tmp_path, server, answer, match):
    """A broken, missing or endless answer, and one that leads elsewhere: an OSError, and no file."""
    server.files["/x"] = answer
    with pytest.raises(OSError, match=f"(?s){match}.*put it at"):
        data.fetch(server.address + "/x", tmp_path / "data" / "x.bin")
    assert not list(tmp_path.glob("data/*"))


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/x", "nonsense", "http://"])
def test_download_of_what_is_no_web_address(tmp_path, address):
    """Only http and https are spoken."""
    with pytest.raises(OSError, match="put it at"):
        data.fetch(address, tmp_path / "x.bin")
    assert not list(tmp_path.iterdir())


def test_download_is_checked_before_it_is_kept(tmp_path, server):
    """A file that is not what it must be does not get its name; a length that is none is ignored."""
    server.files["/page"] = b"<html>Please log in</html>"
    with pytest.raises(OSError, match="not JSON"):
        data.fetch(server.address + "/page", tmp_path / "config.json", check=weights.read_json)
    assert not list(tmp_path.iterdir())
    server.files["/x"] = no_number
    assert data.fetch(server.address + "/x", tmp_path / "x").read_bytes() == b"body"


def test_download_that_is_too_slow_ends(tmp_path, server, monkeypatch):
    """Below 5 kB/s after the first minute it is given up, however steadily the bytes come."""
    server.files["/x"] = bytes(1000)
    now = iter(range(0, 10 ** 9, 100))
    monkeypatch.setattr(data.time, "monotonic", lambda: next(now))
    with pytest.raises(OSError, match="slower than 5 kB/s"):
        data.fetch(server.address + "/x", tmp_path / "x.bin")
