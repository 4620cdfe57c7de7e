"""Every data format, on small files made here. Whatever is wrong with one is a ValueError that names
it, or an OSError if it cannot be had."""
import colorsys
import contextlib
import gzip
import hashlib
import io
import math
import os
import re
import struct
import sys
import tarfile
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import clean
import simulated_cuda
from helpers import decode_png as read_png
from simulated_cuda import simulated
from support import command, data


def picture(*shape) -> torch.Tensor:
    """Random pixels, so that no turning, mirroring or exchange of channels leaves them alike."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_sec33_scaling_is_linear_and_inverted_exactly():
    """{0 … 255} ↔ [−1, 1]; going back clamps, scales and rounds.

    Kills: images in [0, 1], an 8-bit cast without clamping or that truncates."""
    levels = torch.arange(256, dtype=torch.uint8)
    x = data.to_model(levels)
    assert x.dtype == torch.float32
    assert x[0] == -1 and x[255] == 1 and torch.allclose(x.diff(), torch.tensor(2 / 255))
    assert torch.equal(data.to_uint8(x), levels)
    assert torch.equal(data.to_uint8(x + 0.9 / 255), levels)
    assert torch.equal(data.to_uint8(x - 0.9 / 255), levels)
    assert data.to_uint8(torch.tensor([-7.0, 1.01, 300.0])).tolist() == [0, 255, 255]


# ------------------------------------------------------------------------ MNIST and Fashion-MNIST

def idx(n: int, rows: int = 28, columns: int = 28, magic: int = 2051, size: int | None = None) -> bytes:
    """A file of IDX images, and how many pixels follow its header. No pixel is 0."""
    size = n * rows * columns if size is None else size
    return struct.pack(">IIII", magic, n, rows, columns) + bytes(1 + 7 * i % 255 for i in range(size))


def test_idx(tmp_path):
    """Rows from the top, padded from 28×28 to 32×32 with the picture in the middle.

    Kills: pictures transposed, the header read as pixels, one split for the other."""
    for split, file, n in (("train", "train-images-idx3-ubyte.gz", 5),
                           ("test", "t10k-images-idx3-ubyte.gz", 2)):
        (tmp_path / file).write_bytes(gzip.compress(idx(n)))
        images, about = data.load("mnist", tmp_path, split)
        assert images.shape == (n, 1, 32, 32) and images.dtype == torch.uint8
        rows = [[[[1 + 7 * (784 * i + 28 * y + x) % 255 for x in range(28)] for y in range(28)]]
                for i in range(n)]
        assert images[:, :, 2:30, 2:30].tolist() == rows == data.read_idx(tmp_path / file).tolist()
        assert images.count_nonzero() == n * 784
        assert split in about and "32×32" in about


@pytest.mark.parametrize("raw", [
    idx(2, magic=2049), idx(2, 27, 28), idx(2, 28, 27), idx(2, 56, 14), idx(2, size=1567),
    idx(2, size=1569), idx(3, size=1568), idx(1, size=1568), idx(2 ** 32 - 1, size=784), idx(0),
    idx(2)[:15], b""], ids=lambda raw: raw[:16].hex() or "empty")
def test_idx_of_other_images(tmp_path, raw):
    """Labels, other sizes, a count that does not fit the pixels, nothing at all."""
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(raw))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        data.load("mnist", tmp_path)


@given(st.integers(0, 2 ** 31), st.sampled_from(["cut", "byte", "more"]))
def test_idx_corrupted(tmp_path_factory, where, how):
    """Cut anywhere, any compressed byte changed, anything appended: read as it was, or refused."""
    raw = bytearray(gzip.compress(idx(1), mtime=0))
    if how == "cut":
        raw = raw[:where % len(raw)]
    elif how == "byte":
        raw[where % len(raw)] ^= 1 + where % 255
    else:
        raw += bytes([1 + where % 255])
    path = tmp_path_factory.mktemp("idx") / "x.gz"
    path.write_bytes(raw)
    try:
        images = data.read_idx(path)
    except ValueError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert images.flatten().tolist() == list(idx(1)[16:])


@pytest.mark.parametrize("name, file", [("mnist", "train-images-idx3-ubyte.gz"),
                                        ("cifar10", "cifar-10-binary.tar.gz")])
def test_a_file_that_grows_without_end_is_refused(tmp_path, name, file):
    """2 GiB of zeros in 2 MB are read as far as the true file would go, with IDX's header or without.

    Kills: a read without a bound, which takes the memory of the machine."""
    first = idx(1)[:16] if name == "mnist" else b""
    zeros = gzip.compress(bytes(2 ** 26))
    (tmp_path / file).write_bytes(gzip.compress(first) + zeros * 32)
    tracemalloc.start()
    with pytest.raises(ValueError, match=file):
        data.load(name, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 ** 30


# ---------------------------------------------------------------------------------------- CIFAR-10

BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)]


def batches(images: torch.Tensor, label: int = 9) -> dict[str, bytes]:
    """The six files of CIFAR-10 with these images, byte by byte: label, then c, y, x."""
    records = [bytes([label, *(image[c][y][x] for c in range(3) for y in range(32) for x in range(32))])
               for image in images.tolist()]
    n = len(records) // 6
    return {name: b"".join(records[i * n:(i + 1) * n])
            for i, name in enumerate([*BATCHES, "test_batch.bin"])}


def archive(path, files: dict[str, bytes | None]):
    """A .tar.gz with these files, and folders for None, in the folder that CIFAR-10 has."""
    with tarfile.open(path, "w:gz") as file:
        for name, body in files.items():
            entry = tarfile.TarInfo("cifar-10-batches-bin/" + name)
            entry.type, entry.size = (tarfile.DIRTYPE, 0) if body is None else (b"0", len(body))
            file.addfile(entry, io.BytesIO(body or b""))
    return path


def test_cifar10_is_read_inside_the_archive(tmp_path):
    """A label byte, then 1,024 bytes of red in rows from the top, then green, then blue. Five files
    are the training set, in their order; wherever they stand, and whatever stands beside them.

    Kills: rows and columns exchanged, colours in another order, pictures upside down, labels taken
    for pixels, the order of the archive."""
    images = picture(12, 3, 32, 32)
    files = batches(images)
    order = ["data_batch_4.bin", "test_batch.bin", "data_batch_2.bin", "data_batch_5.bin",
             "data_batch_1.bin", "data_batch_3.bin"]
    archive(tmp_path / "cifar-10-binary.tar.gz", {
        "": None, "batches.meta.txt": b"airplane", "data_batch_6.bin": bytes(3073),
        **{name: files[name] for name in order}, "other/": None, "other/data_batch_1.bin": b"1"})
    for split, want in (("train", images[:10]), ("test", images[10:])):
        found, about = data.load("cifar10", tmp_path, split)
        assert torch.equal(found, want) and found.dtype == torch.uint8 and split in about
    assert os.listdir(tmp_path) == ["cifar-10-binary.tar.gz"]


LABELLED = {name: bytes(3073) for name in [*BATCHES, "test_batch.bin"]}


@pytest.mark.parametrize("split, change", [
    ("train", {"data_batch_4.bin": ...}), ("train", {"data_batch_4.bin": None}),
    ("train", {"data_batch_4.bin": bytes(3072)}), ("train", {"data_batch_4.bin": bytes(3074)}),
    ("train", {"data_batch_5.bin": bytes([10]) + bytes(3072)}), ("test", {"test_batch.bin": ...}),
    ("test", {"test_batch.bin": b""}), ("test", {"test_batch.bin": bytes([255]) + bytes(3072)})])
def test_cifar10_of_other_files(tmp_path, split, change):
    """A batch that is missing, a folder, cut, too long or with labels above 9."""
    files = {name: body for name, body in (LABELLED | change).items() if body is not ...}
    path = archive(tmp_path / "cifar-10-binary.tar.gz", files)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        data.load("cifar10", tmp_path, split)
    assert len(data.read_cifar10(path, "test" if split == "train" else "train")) in (1, 5)


@given(st.integers(0, 2 ** 31), st.sampled_from(["cut", "byte"]), st.sampled_from(["train", "test"]))
def test_cifar10_corrupted(tmp_path_factory, where, how, split):
    """Cut anywhere, any compressed byte changed: read as it was, or refused.

    Kills: an archive whose checksum nobody has reached."""
    path, images = tmp_path_factory.mktemp("cifar") / "x.tar.gz", picture(6, 3, 32, 32)
    raw = bytearray(archive(path, batches(images)).read_bytes())
    if how == "cut":
        raw = raw[:where % len(raw)]
    else:
        raw[where % len(raw)] ^= 1 + where % 255
    path.write_bytes(raw)
    try:
        found = data.read_cifar10(path, split)
    except ValueError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert torch.equal(found, images[:5] if split == "train" else images[5:])


# ------------------------------------------------------------------------------- where they are from

CIFAR, MNIST, FASHION = (
    "https://www.cs.toronto.edu/~kriz/", "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/")
TRAIN, TEST = "train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"
FILES = [  # as their publishers and others have them
    ("cifar10", "train", CIFAR, "cifar-10-binary.tar.gz",
     "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
    ("cifar10", "test", CIFAR, "cifar-10-binary.tar.gz",
     "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
    ("mnist", "train", MNIST, TRAIN,
     "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    ("mnist", "test", MNIST, TEST,
     "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    ("fashion_mnist", "train", FASHION, TRAIN,
     "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
    ("fashion_mnist", "test", FASHION, TEST,
     "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073")]


@pytest.mark.parametrize("name, split, address, file, checksum", FILES, ids=lambda word: word[:13])
def test_what_is_missing_is_fetched_from_its_address(tmp_path, server, monkeypatch, name, split, address, file,
                                                     checksum):
    """With its SHA-256, to the folder with the name of the data set. A file that lies there is
    taken, or one in the data folder itself, before any download; but by the name of this folder
    MNIST's file is not taken for that of Fashion-MNIST, nor the reverse: those share names.

    Kills: one data set or split taken for another, a part of a checksum, two downloads."""
    at, files = data.FILES[name]
    assert (at, *files[split == "test"]) == (address, file, checksum)

    def content(k: int) -> bytes:  # k images for each file of the archive, or k images
        return (gzip.compress(idx(k)) if name != "cifar10" else
                archive(tmp_path / "x", batches(picture(6 * k, 3, 32, 32))).read_bytes())

    def load(folder) -> int:
        return len(data.load(name, folder, split)[0]) // (5 if (name, split) == ("cifar10", "train") else 1)
    address, body = f"{server.address}/{name}/", content(1)
    server.files[f"/{name}/{file}"] = body
    sums = [(other, hashlib.sha256(body).hexdigest() if other == file else "0" * 64) for other, _ in files]
    for folder in ("data", "my-Fashion-MNIST"):
        folder = tmp_path / folder
        named, bare = folder / name / file, folder / file
        other = name != "cifar10" and (name == "fashion_mnist") != (folder.name != "data")
        with monkeypatch.context() as patch:
            patch.setattr(data, "FILES", {name: (address, [(file, "0" * 64)] * 2)})
            with pytest.raises(OSError, match=re.escape(address + file)):
                load(folder)
            assert not named.exists() and len(server.asked) == 1
            server.asked.clear()
            patch.setattr(data, "FILES", {name: (address, sums)})
            assert load(folder) == 1 and named.read_bytes() == body and not bare.exists()
            named.unlink()
            bare.write_bytes(content(2))
            assert load(folder) == (1 if other else 2) and named.exists() == other
            named.write_bytes(content(3))
            assert load(folder) == 3
            bare.unlink()
            assert load(folder) == 3
            assert server.asked == [f"/{name}/{file}"] * (1 + other)
            server.asked.clear()


def test_a_file_in_the_folder_of_its_data_set_is_taken_first(tmp_path, monkeypatch):
    """A file of the same name above it may be another data set's. All folders are in data/.

    Kills: Fashion-MNIST, put by hand into the data folder, taken for the MNIST that is below it."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("data/mnist")
    for place, n in (("data", 2), ("data/mnist", 3)):
        with open(f"{place}/{TRAIN}", "wb") as file:
            file.write(gzip.compress(idx(n)))
        assert len(data.load("mnist")[0]) == n


def half(handler) -> None:
    """Announces 5,000 bytes, sends 100 and hangs up."""
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(bytes(100))


def test_download_is_whole_or_not_there(tmp_path, server, capsys):
    """The SHA-256 is checked before the file takes its name. An error names the address and the
    place, and leaves nothing. What is there already is not asked for.

    Kills: half a download taken for the data, an error without the address and the place."""
    body, target = bytes(picture(5000).tolist()), tmp_path / "data" / "x.bin"
    right = hashlib.sha256(body).hexdigest()
    server.files.update({"/x": body, "/half": half, "/other": bytes(5000), "/broken": 500})
    for path, checksum in (("/x", "0" * 64), ("/x", right[:-1] + "x"), ("/half", right),
                           ("/other", right), ("/missing", right), ("/missing", None),
                           ("/broken", right)):
        address = server.address + path
        with pytest.raises(OSError) as error:
            data.fetch(address, target, checksum)
        assert address in str(error.value) and str(target) in str(error.value)
        assert "\n" not in str(error.value) and not list(target.parent.iterdir())
    capsys.readouterr()
    assert data.fetch(server.address + "/x", target, right) == target
    assert target.read_bytes() == body and server.address + "/x" in capsys.readouterr().err
    server.asked.clear()
    assert data.fetch(server.address + "/other", target, right) == target
    assert target.read_bytes() == body and server.asked == []


# ------------------------------------------------------------------------------------ a .pt file

def test_tensor_file(tmp_path):
    """A .pt of torch.save is taken if it is uint8 N×C×H×W with C = 1 or 3, and with no other."""
    path = tmp_path / "images.pt"
    for channels in (1, 3):
        images = picture(4, channels, 8, 6)
        torch.save(images, path)
        assert torch.equal(data.load(str(path))[0], images)
        assert torch.equal(data.load(str(path), split="test")[0], images)
    torch.save({"a": images, "b": 1}, path)
    with pytest.raises(ValueError, match="it holds a dict of a, b"):
        data.load(str(path))
    for bad in (images.float(), images.bool(), images[0], images[:, :2], images[:0],
                [images], "text", images[:, [0, 1, 2, 0]], images[None], images[..., :0]):
        torch.save(bad, path)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            data.load(str(path))
    path.write_bytes(data.png(images[0, :1]))
    with pytest.raises(ValueError, match="begins with b'.x89PNG': it is not in torch.save's format$"):
        data.load(str(path))
    path.write_bytes(b"PK\x03\x04 not really")
    for bad in (path, tmp_path / "missing.pt", tmp_path):
        with pytest.raises(ValueError, match=re.escape(str(bad))):
            data.read_tensor(bad)


def test_a_tensor_without_pixels_is_no_data_set(tmp_path):
    """One on no device, or one whose zeros are not stored, has the shape of images, and is none."""
    path, images = tmp_path / "images.pt", picture(4, 3, 8, 8)
    for bad in (images.to("meta"), images.to_sparse()):
        torch.save(bad, path)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            data.load(str(path))


def test_a_tensor_that_is_one_image_many_times_is_no_data_set(tmp_path):
    """A file of a few bytes that claims a million million images would be walked through for days.
    Another order of the bytes, as NHWC has, is no harm."""
    path, images = tmp_path / "images.pt", picture(4, 3, 8, 8)
    torch.save(images[:1].expand(2 ** 40, 3, 8, 8), path)
    with pytest.raises(ValueError, match="all the same"):
        data.load(str(path))
    torch.save(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), path)
    assert torch.equal(data.load(str(path))[0], images)


class Deed:
    """What a pickle can do when it is read: here it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("done",)


def test_no_code_in_a_tensor_file_is_run(tmp_path, monkeypatch):
    """A file from a stranger can do nothing. The variable makes torch.load trust every file, unless it
    is told not to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Deed(), "deed.pt")
    with pytest.raises(ValueError, match="deed.pt"):
        data.load("deed.pt")
    assert not os.path.exists("done")
    torch.load("deed.pt", weights_only=False)  # the control
    assert os.path.exists("done")


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the system does not tell what is mapped")
def test_a_tensor_file_is_mapped(tmp_path):
    """So that one larger than memory can be used."""
    path = tmp_path / "images.pt"
    torch.save(picture(4, 3, 8, 6), path)

    def mapped() -> bool:
        with open("/proc/self/maps") as maps:
            return str(path) in maps.read()
    images = torch.load(path, weights_only=True)
    assert not mapped()  # the control
    images = data.load(str(path))[0]
    assert mapped() and torch.equal(images, picture(4, 3, 8, 6))


@pytest.mark.skipif(bool(simulated_cuda.MISSING), reason=str(simulated_cuda.MISSING))
def test_a_tensor_file_of_a_gpu_is_read_on_the_cpu(tmp_path):
    """Whether there is a GPU or not."""
    path, images = tmp_path / "images.pt", picture(4, 3, 8, 6)
    with simulated():
        torch.save(images.to("cuda"), path)
        assert torch.load(path).device.type == "cuda"  # the control
        assert torch.equal(data.load(str(path))[0], images)
    assert torch.equal(data.load(str(path))[0], images)


# ---------------------------------------------------------------------------- pictures, with Pillow

def pillow():
    """PIL.Image, or a skip: it is needed for folders of pictures alone."""
    return pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def pil(x: torch.Tensor, mode: str = "RGB"):
    """Pillow's image of these pixels."""
    pixels = bytes(x.permute(1, 2, 0).flatten().tolist())
    return pillow().frombytes(mode, (x.shape[2], x.shape[1]), pixels)


def decode(path, size: int, *notes: str) -> torch.Tensor:
    """The picture, of which this and nothing else is noted."""
    seen = Counter()
    x = data.decode(path, size, seen)
    assert len(seen) == len(notes) and all(note in text for note, text in zip(notes, seen))
    return x


def test_pictures_of_a_folder_are_as_one_sees_them(tmp_path):
    """The pixels of a PNG by `data.png` and by Pillow; the middle of a wide and of a high one; what
    EXIF turns; 16-bit grey; white behind what is transparent.

    Kills: pictures transposed or mirrored, RGB as BGR, the left part instead of the middle."""
    Image = pillow()
    folder, rgb = tmp_path / "p", picture(3, 16, 16)
    folder.mkdir()
    (folder / "a.png").write_bytes(data.png(rgb))
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
    images = data.load(str(folder), tmp_path / "data", image_size=16)[0]
    for name, got in zip("abcdef", images):
        assert torch.equal(got, rgb), name
    assert (images[6] == 255).all()
    for got in images[7:]:
        assert torch.equal(got, grey.expand(3, -1, -1))


@pytest.mark.skipif(os.name != "posix", reason="the false program is a script of the shell")
def test_a_picture_of_a_kind_that_runs_a_program_is_none(tmp_path, monkeypatch):
    """Pillow opens PostScript with Ghostscript, whatever the file is called. (Here Ghostscript is a
    program that writes that it was run.)"""
    Image = pillow()
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho run >> {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ValueError, match="a.png cannot be read as a picture: cannot identify"):
        data.load(str(tmp_path / "p"), tmp_path / "data", image_size=8)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(OSError), Image.open(tmp_path / "p" / "a.png") as image:
        image.load()
    assert (tmp_path / "ran").exists()  # the control


def test_a_picture_of_too_many_pixels_is_refused(tmp_path):
    """13,000² white pixels, 32 KB as a PNG, would be 500 MB. Pillow only warns of them."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    (tmp_path / "p").mkdir()
    image.new("1", (13_000, 13_000)).save(tmp_path / "p" / "a.png")
    with pytest.raises(ValueError, match="a.png cannot be read as a picture: .*exceeds limit"):
        data.load(str(tmp_path / "p"), tmp_path / "data", image_size=8)


def test_what_is_no_picture_is_named_and_nothing_is_kept(tmp_path):
    """Neither with a broken picture nor without Pillow is there a file of decoded pictures."""
    fill(tmp_path / "p", a_png=1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ImportError) as error:
        patch.setitem(sys.modules, "PIL", None)
        data.load(str(tmp_path / "p"), tmp_path / "data")
    assert error.value.name == "PIL"                        # which `command` tells the user
    pillow()
    for content in (b"broken", data.png(picture(3, 40, 40))[:3000]):
        (tmp_path / "p" / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match="a.png"):
            data.load(str(tmp_path / "p"), tmp_path / "data", image_size=16)
    assert not list(tmp_path.glob("data/*")) and not list(tmp_path.glob("data/.*"))


@pytest.mark.parametrize("size", [16, 5])
def test_pictures_are_reduced_with_lanczos_kernel(tmp_path, size):
    """Reduced k-fold, a pixel is the mean of its surroundings with weights sinc(x) sinc(x/3).

    x is the distance in pixels of the result, below 3. Kills: other kernels, and no filter."""
    side, image = 64, picture(3, 64, 64)
    pil(image).save(tmp_path / "a.png")
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * side / size
    x = (torch.arange(side) + 0.5 - centre[:, None]) * size / side
    weights = torch.sinc(x) * torch.sinc(x / 3) * (x.abs() < 3)
    weights /= weights.sum(1, keepdim=True)
    want = (weights @ image.double() @ weights.T).clamp(0, 255)
    assert (decode(tmp_path / "a.png", size) - want).abs().max() < 2


def test_grey_of_16_bits_is_divided_by_257(tmp_path, monkeypatch):
    """All 65,536 levels are rounded to the nearest of 256, also if Pillow calls the mode I, as older
    versions do: that is what stood in their table; and a PGM's. The levels of other pictures of that
    mode, and of decimal numbers, have no known range, and are refused."""
    Image = pillow()
    levels = torch.arange(2 ** 16).view(256, 256)
    image = Image.frombytes("I;16", (256, 256), struct.pack("<65536H", *range(2 ** 16)))
    image.save(tmp_path / "a.png")
    want = ((levels + 128) // 257).expand(3, -1, -1)
    (tmp_path / "a.pgm").write_bytes(b"P5 256 256 65535\n" + struct.pack(">65536H", *range(2 ** 16)))
    assert torch.equal(decode(tmp_path / "a.pgm", 256).int(), want.int())
    assert torch.equal(decode(tmp_path / "a.png", 256).int(), want.int())
    for mode in "IF":
        image.convert("I").convert(mode).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match="a.tif"):
            decode(tmp_path / "a.tif", 256)
    monkeypatch.setitem(pytest.importorskip("PIL.PngImagePlugin")._MODES, (16, 0), ("I", "I;16B"))
    assert Image.open(tmp_path / "a.png").mode == "I"
    assert torch.equal(decode(tmp_path / "a.png", 256).int(), want.int())


def tiff(level: int, bits: int, white: int) -> bytes:
    """Eight pixels of grey in TIFF, uncompressed; white: 1, or 0 if that is the level of white."""
    row = struct.pack("<8H", *[level] * 8) if bits == 16 else int(f"{level:0{bits}b}" * 8, 2).to_bytes(bits, "big")
    entries = {256: 8, 257: 1, 258: bits, 259: 1, 262: white, 273: 8, 278: 1, 279: len(row)}
    return struct.pack("<2sHI", b"II", 42, 8 + len(row)) + row + struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", key, 3, 1, value) for key, value in entries.items()) + bytes(4)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_depth_and_polarity_of_grey_are_those_of_the_file(tmp_path, bits):
    """Black, white and what is between in TIFF. (12 bits with white as 0 are unknown to Pillow.)

    Kills: 12 bits that are read as black, white that is zero read as a negative."""
    pillow()
    top = 2 ** bits - 1
    for level in {0, top // 3, top // 2, top}:
        (tmp_path / "a.tif").write_bytes(tiff(level, bits, 1))
        assert (decode(tmp_path / "a.tif", 1) - 255 * level / top).abs().max() <= 0.5
        (tmp_path / "a.tif").write_bytes(tiff(level, bits, 0))
        with pytest.raises(ValueError, match="a.tif") if bits == 12 else contextlib.nullcontext():
            assert (decode(tmp_path / "a.tif", 1) - 255 * (1 - level / top)).abs().max() <= 0.5


def test_colours_are_those_of_the_profile(tmp_path):
    """Two profiles made here by exchanging and by keeping the primaries: what one calls red is the
    other's blue. A profile that is none, or one of another kind of picture, is noted, and the colours
    stay."""
    pillow()
    cms = pytest.importorskip("PIL.ImageCms")
    image, names = pil(picture(3, 1, 1)), {}
    srgb = cms.ImageCmsProfile(cms.createProfile("sRGB")).tobytes()
    count, = struct.unpack(">I", srgb[128:132])
    for i in range(count):
        place = 132 + 12 * i
        names[srgb[place:place + 4]] = place
    swapped = bytearray(srgb)
    swapped[names[b"rXYZ"]:names[b"rXYZ"] + 4], swapped[names[b"bXYZ"]:names[b"bXYZ"] + 4] = b"bXYZ", b"rXYZ"
    lab = cms.ImageCmsProfile(cms.createProfile("LAB", 5000)).tobytes()
    for profile, change, *notes in ((srgb, [0, 1, 2]), (bytes(swapped), [2, 1, 0]),
                                    (b"none", [0, 1, 2], "profile"), (lab, [0, 1, 2], "profile")):
        image.save(tmp_path / "a.png", icc_profile=profile)
        assert (decode(tmp_path / "a.png", 1, *notes).int() - picture(3, 1, 1)[change]).abs().max() <= 1
    image.convert("L").save(tmp_path / "a.png", icc_profile=srgb)
    decode(tmp_path / "a.png", 1, "profile")


def test_of_several_frames_the_first_is_taken_and_noted(tmp_path):
    """But not of a photograph with a small one behind it."""
    Image = pillow()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "white", "blue")]
    for kind in ("GIF", "TIFF", "PNG", "WEBP", "MPO"):
        frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
        x = decode(tmp_path / "a", 1, *["frames"] * (kind != "MPO"))
        assert (x.flatten().int() - torch.tensor([255, 0, 0])).abs().max() < 4


def test_a_picture_is_not_refused_for_its_metadata(tmp_path):
    """EXIF data that are none, a text of ten million letters, one that is not closed."""
    pillow()
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    image = data.png(picture(3, 4, 4))
    for more in (chunk(b"eXIf", b"nonsense"), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10 ** 7))),
                 chunk(b"zTXt", b"a\0\0nonsense"), chunk(b"iTXt", b"a")):
        (tmp_path / "a.png").write_bytes(image[:33] + more + image[33:])
        assert torch.equal(decode(tmp_path / "a.png", 4), picture(3, 4, 4))


def test_pillow_below_10_1_is_not_the_fault_of_the_pictures(tmp_path, monkeypatch):
    pillow()
    fill(tmp_path / "p", a_png=1)
    for version in ("9.5.0", "10.0.1"):
        monkeypatch.setattr("PIL.__version__", version)
        with pytest.raises(ValueError, match=f"^Pillow {version} .*pillow>=10.1"):
            data.load(str(tmp_path / "p"), tmp_path / "data")
    monkeypatch.setattr("PIL.__version__", "10.1.0.dev0")
    data.load(str(tmp_path / "p"), tmp_path / "data", image_size=1)


def test_what_is_half_transparent_is_half_white(tmp_path):
    """Black at α/255 becomes 255 − α. The one transparent colour of a palette becomes white."""
    Image = pillow()
    for mode in ("RGBA", "LA"):
        for alpha in (0, 1, 127, 200, 255):
            colour = (0,) * (len(mode) - 1) + (alpha,)
            Image.new(mode, (4, 4), colour).save(tmp_path / "a.png")
            assert (decode(tmp_path / "a.png", 4) == 255 - alpha).all()
    palette = Image.frombytes("P", (2, 2), bytes([0, 1, 1, 0]))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "a.png", transparency=1)
    assert decode(tmp_path / "a.png", 2).flatten(1).tolist() == [
        [10, 255, 255, 10], [20, 255, 255, 20], [30, 255, 255, 30]]


def test_pixels_of_a_pillow_image():
    """Grey has one channel, and width and height are not exchanged."""
    for mode, x in (("L", picture(1, 3, 5)), ("RGB", picture(3, 5, 2))):
        assert torch.equal(data.pixels(pil(x, mode)), x)


# ---------------------------------------------------------------------- folders, and what is decoded

@pytest.fixture
def decoded(tmp_path, monkeypatch, capsys):
    """In a folder of one's own: how many pictures were decoded since this was asked last, as it is said."""
    pillow()
    monkeypatch.chdir(tmp_path)
    return lambda: sum(map(int, re.findall(r"decoding .* of (\d+)", capsys.readouterr().err)))


def fill(folder, **pictures: int) -> None:
    """A folder with such pictures, each of one grey pixel, in PNG whatever their names are."""
    os.makedirs(folder)
    for name, value in pictures.items():
        with open(f"{folder}/{name.replace('_', '.')}", "wb") as file:
            file.write(data.png(torch.full((3, 1, 1), value, dtype=torch.uint8)))


def test_a_folder_is_all_its_pictures_in_order(decoded):
    """In folders of the folder too, whatever the case of the ending; other files are no pictures.

    The side is 256 unless it is given."""
    fill("p/b", c_JPG=3, a_png=2, b_Jpeg=9)
    fill("p/c.png", d_tiff=4, e_pt=5, f_txt=6)
    fill("p/a", z_webp=1)
    images = data.load("p", "cache", image_size=2)[0]
    assert images.shape == (5, 3, 2, 2) and images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [1, 2, 9, 3, 4]
    assert all((image == image[0, 0, 0]).all() for image in images)
    assert data.load("p", "cache")[0].shape == (5, 3, 256, 256)
    for suffix in ("png", "jpg", "jpeg", "webp", "bmp", "ppm", "pgm", "gif", "tif", "tiff"):
        fill(suffix, **{f"x_{suffix}": 7})
        assert data.load(suffix, "cache", image_size=1)[0].flatten().tolist() == [7] * 3


def test_a_folder_has_splits_if_train_and_another_lie_in_it(decoded):
    """In any case of letters. Then the folder of the split is taken, and nothing else: val/, valid/ or
    validation/ for the test images, too, if there is no test/. A class called train, or test, alone is
    no split."""
    for parts, found in ((["train", "x"], "1+2 1+2 1+2"), (["test", "x"], "1+2 1+2 1+2"),
                         (["train", "test"], "1 2 no"), (["Train", "VAL"], "1 2 2"), (["TRAIN", "valid"], "1 2 2"),
                         (["train", "validation", "test", "x"], "1 3 2"), (["train", "testing"], "1+2 1+2 1+2")):
        folder = "p" + "".join(parts)
        for i, part in enumerate(parts):
            fill(f"{folder}/{part}", a_png=i + 1)
        for split, want in zip(("train", "test", "val"), found.split()):
            if want == "no":
                with pytest.raises(ValueError, match=f"{folder} has no {split}/"):
                    data.load(folder, "cache", split, 1)
                continue
            images, about = data.load(folder, "cache", split, 1)
            assert "+".join(map(str, sorted(images[:, 0, 0, 0].tolist()))) == want
            assert ("split" in about) == ("+" not in want) and "centre-cropped" in about and "RGB" in about
            assert "+" in want or parts[int(want) - 1] in about
    fill("photos", a_png=1, b_txt=1)
    fill("photos/train", a_png=1), fill("photos/test", a_png=2)
    assert "without 1 pictures beside it" in data.load("photos", "cache", "test", 1)[1]
    for name in data.NAMES:
        with pytest.raises(ValueError, match=f"{name} has no val split"):
            data.load(name, "cache", "val")


def test_linked_folders_are_read_and_none_twice(decoded):
    """Loops end; a picture that is linked twice is there twice; a link to nothing is no picture."""
    fill("p/b", a_png=1)
    fill("elsewhere/deep", a_png=2)
    os.symlink("../elsewhere", "p/c")
    for link, place in (("p/loop", "."), ("p/b/up", ".."), ("elsewhere/deep/b", "../../p/b"), ("q", "p")):
        os.symlink(place, link)
    os.symlink("nothing", "p/x.png")
    os.symlink("b/a.png", "p/z.png")
    for name in "pq":
        images = data.load(name, "cache", image_size=1)[0]
        assert images[:, 0, 0, 0].tolist() == [1, 2, 1]


def test_one_line_says_how_many_pictures_there_are_and_what_is_left_out(decoded, capsys):
    """By kind, the most frequent first; of hidden folders the content does not count."""
    fill("p", a_png=1, b_JPG=2, c_mov=3, d_MOV=4, e_mov=5, f_eps=6, _DS=7, __a_png=8)
    fill("p/b", name=7)
    for folder in ("__MACOSX", "$RECYCLE.BIN", "@Recycle", "lost+found", ".thumbnails", "b/.git"):
        fill(f"p/{folder}", a_png=9, b_png=9)
    data.load("p", "cache", image_size=1)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("p: 2 pictures; skipped: 8 hidden, 3 .mov, 1 ") and len(said) == 2
    assert {*said[0].split("3 .mov, ")[1].split(", ")} == {"1 .eps", "1 without a suffix"}
    fill("q", a_mov=1)
    with pytest.raises(ValueError, match=r"^q: 0 pictures; skipped: 1 \.mov$"):
        data.load("q", "cache")


def test_samples_of_a_folder_have_one_size(decoded):
    """A grid among them, or pictures that are no squares, would be resized and scored like samples."""
    fill("one", a_png=1, b_png=2)
    assert data.read_samples(Path("one"), "cache").shape == (2, 3, 1, 1)
    for name, shape in (("grid", (3, 4, 4)), ("wide", (3, 1, 2))):
        Path(f"one/{name}.png").write_bytes(data.png(torch.zeros(shape, dtype=torch.uint8)))
        with pytest.raises(ValueError, match=f"squares of one size, not a.png 1×1, {name}.png"):
            data.read_samples(Path("one"), "cache")
        Path(f"one/{name}.png").unlink()
    Path("one/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="--skip-bad"):
        data.read_samples(Path("one"), "cache")
    assert data.read_samples(Path("one"), "cache", True).shape == (2, 3, 1, 1)
    fill("none", a_txt=1)
    with pytest.raises(ValueError, match="no pictures"):
        data.read_samples(Path("none"), "cache")


def test_samples_that_are_missing_or_were_added_are_not_scored(decoded):
    """In a folder of sample.py, which numbers them: a copy would count twice, as if it were drawn."""
    fill("s", **{f"{i:06d}_png": i for i in range(3)})
    Path("s/samples.json").write_bytes(b"{}")
    assert len(data.read_samples(Path("s"), "cache")) == 3
    for other in ("000000 (1).png", "sub/000003.png", "000004.png"):
        Path("s/sub").mkdir(exist_ok=True)
        Path("s", other).write_bytes(Path("s/000000.png").read_bytes())
        with pytest.raises(ValueError, match="one is missing, or was added"):
            data.read_samples(Path("s"), "cache")
        Path("s", other).unlink()
    Path("s/000001.png").unlink()
    with pytest.raises(ValueError, match="one is missing, or was added"):
        data.read_samples(Path("s"), "cache")


def test_an_unreadable_folder_is_an_error(decoded):
    """As anyone but root."""
    fill("p/b", a_png=1)
    os.chmod("p/b", 0)
    pid = os.fork()
    if not pid:
        status = 1
        with contextlib.suppress(Exception):
            if os.getuid() == 0:
                os.chmod(".", 0o777)
                os.setuid(65534)
            try:
                data.listing(Path("p"))
            except OSError as error:
                status = 0 if "p/b" in str(error) else 2
        os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    os.chmod("p/b", 0o700)


def test_endings_are_those_that_pillow_reads(decoded):
    """Also .jfif and .jpe. A film, or what Pillow reads with another program, is no picture."""
    fill("p", a_jfif=1, b_jpe=2, c_pnm=3, d_eps=4, e_mpg=5, f_pdf=6, g_apng=7)
    assert data.load("p", "cache", image_size=1)[0][:, 0, 0, 0].tolist() == [1, 2, 3, 7]


def test_all_pictures_that_cannot_be_read_are_named_at_once(decoded, capsys):
    """And nothing is kept. With skip_bad the others are the images, and it is said how many are not."""
    fill("p", a_png=1, c_png=2, e_png=3)
    for name, content in (("b", b""), ("d", b"text"), ("f", data.png(picture(3, 40, 40))[:3000])):
        with open(f"p/{name}.png", "wb") as file:
            file.write(content)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^3 of 6 pictures .*--skip-bad.*p/f\.png cannot be read"):
            data.load("p", "cache", image_size=1)
        assert not os.listdir("cache")
        said = capsys.readouterr().err
        assert all(f"p/{name}.png cannot be read" in said for name in "bdf") and "p/a.png" not in said
    for n in (6, 0):
        assert data.load("p", "cache", image_size=1, skip_bad=True)[0][:, 0, 0, 0].tolist() == [1, 2, 3]
        said = capsys.readouterr().err
        assert len(re.findall("decoding", said)) == bool(n) == ("3 of them cannot be read" in said)
    with pytest.raises(ValueError, match="^3 of 6"):
        data.load("p", "cache", image_size=1)
    os.makedirs("q")
    with open("q/a.png", "wb"), pytest.raises(ValueError, match="^1 of 1"):
        data.load("q", "cache", skip_bad=True)


@pytest.mark.parametrize("name", ["a b", "é😀", "photos.2024", "x" * 255, os.fsdecode(b"\xff\xfe")])
def test_a_folder_may_have_any_name(decoded, name):
    try:
        fill(name, a_png=1)
    except OSError:
        pytest.skip("the file system does not take the name")
    assert data.load(name, "cache" + name[-3:], image_size=1)[0].flatten().tolist() == [1] * 3
    assert data.load(name, "cache" + name[-3:], image_size=1)[0].flatten().tolist() == [1] * 3


def test_the_shape_is_known_before_anything_is_decoded(decoded):
    """It is that of the images; of a folder whose pictures cannot be read, too."""
    fill("p", a_png=1)
    torch.save(picture(4, 1, 8, 6), "x.pt")
    for name, size in (("p", None), ("p", 3), ("shapes", None), ("shapes", 5), ("x.pt", None), ("x.pt", 3)):
        assert data.shape(name, size) == data.load(name, "cache", image_size=size)[0].shape[1:]
    open("p/a.png", "wb").close()
    assert data.shape("p", 9) == (3, 9, 9)
    assert (data.shape("cifar10"), data.shape("mnist", 7)) == ((3, 32, 32), (1, 32, 32))
    with pytest.raises(ValueError, match="nothing"):
        data.shape("nothing")


def test_a_folder_is_decoded_anew_if_and_only_if_something_changed(decoded):
    """A name, a size in bytes, a time of change, or the size asked for. How the folder is called
    makes no difference. A picture that cannot be decoded leaves no file, not even a part."""
    def load(size: int = 2, name="p"):
        images = data.load(name, "cache", image_size=size)[0]
        return decoded(), images[:, 0, 0, 0].tolist()
    fill("p", a_png=1, b_png=2)
    for name in "ab":
        os.utime(f"p/{name}.png", ns=(5, 5))
    assert load() == (2, [1, 2]) and load() == (0, [1, 2]) == load(2, os.path.abspath("p"))
    assert load(3) == (2, [1, 2]) and load(3) == (0, [1, 2])
    os.rename("p/a.png", "p/c.png")
    assert load() == (2, [2, 1])
    fill("q", c_png=3)
    with open("q/c.png", "ab") as file:
        file.write(b"more")
    os.utime("q/c.png", ns=(5, 5))
    os.replace("q/c.png", "p/c.png")
    assert load() == (2, [2, 3])
    os.utime("p/c.png", ns=(5, 6))
    assert load() == (2, [2, 3]) and load() == (0, [2, 3])
    fill("r", c_png=4)  # as many bytes, and the same time: a copy that keeps it
    os.truncate("r/c.png", os.path.getsize("p/c.png"))
    os.utime("r/c.png", ns=(5, 6))
    os.replace("r/c.png", "p/c.png")
    assert load() == (2, [2, 4])
    before = sorted(os.listdir("cache"))
    with open("p/d.png", "wb"):
        pass
    with pytest.raises(ValueError, match="d.png"):
        load()
    assert sorted(os.listdir("cache")) == before


def test_a_file_of_decoded_pictures_that_is_damaged_is_refused(decoded):
    """Cut, or another in any byte; by its name, because to delete it is the cure."""
    fill("p", a_png=1, b_png=2)
    data.load("p", "cache", image_size=2)
    path, = os.listdir("cache")
    with open(f"cache/{path}", "rb") as file:
        sound = file.read()
    for bad in (sound[:11], sound[:-1], b"", sound[12:], sound + b"0", sound[:12] + sound,
                *(sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1:] for i in range(len(sound)))):
        with open(f"cache/{path}", "wb") as file:
            file.write(bad)
        with pytest.raises(ValueError, match=re.escape(path) + ".*delete it"):
            data.load("p", "cache", image_size=2)
    os.remove(f"cache/{path}")
    assert data.load("p", "cache", image_size=2)[0][:, 0, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize("n, said", [(1, [[1, 1]]), (502, [[500, 502], [502, 502]])])
def test_decoding_says_every_500_and_the_last(decoded, capsys, n, said):
    fill("p", **{f"i{i}_png": 0 for i in range(n)})
    data.load("p", "cache", image_size=1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"p: {n} pictures; skipped: nothing"
    assert [[int(x) for x in re.findall(r"\d+", line)] for line in lines[1:]] == said


def test_no_such_data(tmp_path):
    """An unknown name, an empty folder, and a file that is neither a .pt nor a folder."""
    pillow()
    (tmp_path / "a.png").write_bytes(data.png(picture(3, 4, 4)))
    (tmp_path / "empty").mkdir()
    for name in ("cifar11", str(tmp_path / "empty"), str(tmp_path / "a.png")):
        with pytest.raises(ValueError, match=re.escape(name)):
            data.load(name)


# -------------------------------------------------------------------------------- pictures, written

@given(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_a_png_holds_every_pixel(tmp_path_factory, c, height, width, seed):
    """An independent decoder finds them, and the checksums, in whatever order they lie in memory.

    Kills: lines that differ from the wrong one, rows and columns exchanged, a wrong checksum."""
    image = torch.randint(256, (height, c, width), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(seed)).transpose(0, 1)
    path = tmp_path_factory.mktemp("png") / "x.png"
    path.write_bytes(data.png(image))
    size, pixels, channels = read_png(path)
    assert size == (width, height) and channels == c
    assert list(pixels) == [image[k, y, x] for y in range(height) for x in range(width) for k in range(c)]


def test_pillow_reads_a_png(tmp_path):
    """The same pixels, in the mode for grey and in that for colours, of noise and of smooth pictures
    of up to 64 pixels and more."""
    Image = pillow()
    slope = torch.arange(64)[:, None] * 3 + torch.arange(64)
    for mode, image in (("L", picture(1, 30, 17)), ("RGB", picture(3, 7, 300)),
                        ("RGB", data.shapes(1, 48)[0]), ("L", slope.to(torch.uint8)[None]),
                        ("RGB", torch.stack([slope, slope.T, 255 - slope]).to(torch.uint8))):
        with Image.open(io.BytesIO(data.png(image))) as found:
            assert (found.format, found.mode, found.size) == ("PNG", mode, tuple(image.shape[:0:-1]))
            assert found.tobytes() == pil(image, mode).tobytes()


@pytest.mark.parametrize("depth", [2, 4, 8, 16])
def test_a_transparent_level_of_grey_is_white_or_refused(tmp_path, depth):
    """With 8 bits the level is white, as all that is transparent; Pillow confuses it at other depths."""
    pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    row, level = bytes(2 * [7] * depth), (7 << 8 | 7 if depth == 16 else 7)  # 16 pixels, or 8 of other levels
    content = b"\x89PNG\r\n\x1a\n" + data.chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 1, depth, 0, 0, 0, 0))
    content += data.chunk(b"tRNS", struct.pack(">H", level)) + data.chunk(b"IDAT", zlib.compress(b"\0" + row))
    (tmp_path / "x.png").write_bytes(content + data.chunk(b"IEND", b""))
    if depth == 8:
        assert (data.decode(tmp_path / "x.png", 8, Counter()) == 255).all()
    else:
        with pytest.raises(ValueError, match="x.png.*transparent level"):
            data.decode(tmp_path / "x.png", 8, Counter())


@pytest.mark.parametrize("colour, tags", [
    (2, {277: 3, 284: 2, 258: (16, 16, 16)}), (1, {277: 1, 258: (8,), 339: (2,)})], ids=["planes", "signed"])
def test_what_pillow_misreads_is_refused(tmp_path, colour, tags):
    """TIFF with 16 bits in planes, of which Pillow reads the first one alone, and with signed numbers."""
    pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    raw = bytes(8 * 8 * 6)
    tags, at, body, more = {256: 8, 257: 8, 259: 1, 262: colour, 273: 8, 278: 8, 279: len(raw), **tags}, 8 + len(raw), b"", b""
    for name, value in sorted(tags.items()):
        value = value if isinstance(value, tuple) else (value,)
        place = value[0] if len(value) == 1 else at + 2 + 12 * len(tags) + 4 + len(more)  # or behind the list
        body += struct.pack("<HHII", name, 3, len(value), place)
        more += struct.pack(f"<{len(value)}H", *value) if len(value) > 1 else b""
    (tmp_path / "x.tif").write_bytes(
        b"II*\0" + struct.pack("<I", at) + raw + struct.pack("<H", len(tags)) + body + bytes(4) + more)
    with pytest.raises(ValueError, match="not supported"):
        data.decode(tmp_path / "x.tif", 8, Counter())


def test_small_pictures_are_enlarged_and_it_is_said(tmp_path):
    """Without --image-size those of 32×32 pixels would become 256×256 without a word."""
    pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for side, notes in ((32, ()), (33, ("are smaller than 33×33, and enlarged",))):
        (tmp_path / "x.png").write_bytes(data.png(picture(3, 32, 40)))
        assert decode(tmp_path / "x.png", side, *notes).shape == (3, side, side)


@pytest.mark.parametrize("folders, said", [
    ("cats dogs", ""), ("train test", ""), ("train dogs", ""), ("training testing", "in testing/"), ("test val", "in test/"),
    ("train dev", "in dev/")])
def test_what_only_looks_like_a_split_is_said(decoded, capsys, folders, said):
    """training/ and testing/ are used together, like test/ and val/ without train/; with a warning."""
    for folder in folders.split():
        fill(f"p/{folder}", a_png=1)
    data.load("p", "cache")
    err = capsys.readouterr().err
    assert ("warning: p has no train/ beside" in err) == bool(said) and said in err


def test_images_of_0_and_1_are_said_to_be_black(tmp_path, capsys):
    """`.byte()` of images in [0, 1]."""
    for x, black in ((torch.rand(4, 3, 2, 2), True), (torch.rand(4, 3, 2, 2) * 255, False)):
        torch.save(x.byte(), tmp_path / "x.pt")
        data.load(str(tmp_path / "x.pt"))
        assert ("is black" in capsys.readouterr().err) == black


def test_a_split_in_two_spellings_is_refused(decoded):
    """Where both can be: one of them would be left out without a word. A class in two spellings stays two."""
    fill("p/train/Cat", a_png=1)
    fill("p/train/cat", b_png=2)
    fill("p/val", c_png=3)
    if len(os.listdir("p/train")) == 1:
        pytest.skip("the file system does not know upper and lower case")
    assert len(data.load("p", "cache")[0]) == 2
    fill("p/Train", d_png=4)
    with pytest.raises(ValueError, match="p has .rain/ in upper and in lower case"):
        data.load("p", "cache")


def test_every_byte_of_a_png_counts(tmp_path):
    """A picture of a folder that was damaged on its way is drawn again."""
    path, content = tmp_path / "x.png", data.png(picture(3, 4, 5))
    path.write_bytes(content)
    assert data.is_png(path, (3, 4, 5)) and not data.is_png(path, (3, 5, 4))
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1:])
        assert not data.is_png(path, (3, 4, 5)), i
        path.write_bytes(content[:i])
        assert not data.is_png(path, (3, 4, 5)), i


@given(st.integers(1, 12), st.sampled_from([1, 3]), st.integers(1, 3),
       st.sampled_from([1, 2, 7, 100, 320, 321, 500]), st.none() | st.integers(1, 13))
def test_every_cell_of_a_tiled_picture(n, c, height, width, columns):
    """Image i is in row i // columns and column i % columns; cells beyond the last are black. Each
    pixel becomes a square, such that the whole is as near to 480 pixels wide as it can be.

    Kills: columns first, a grid that is higher than wide, images that are stretched."""
    images = torch.randint(1, 256, (n, c, height, width), dtype=torch.uint8)
    picture = data.tiled(images, columns)
    columns = columns or min(k for k in range(1, 13) if k * k >= n)
    rows = (n + columns - 1) // columns
    k = picture.shape[2] // (columns * width)
    assert picture.shape == (c, rows * height * k, columns * width * k) and picture.dtype == torch.uint8
    distances = [abs(480 - columns * width * m) for m in range(1, 481)]
    assert distances[k - 1] == min(distances)
    for i in range(rows * columns):
        y, x = i // columns * height * k, i % columns * width * k
        cell = picture[:, y:y + height * k, x:x + width * k].reshape(c, height, k, width, k)
        assert (cell == images[i][:, :, None, :, None]).all() if i < n else not cell.any()


def test_a_plot_is_drawn_if_it_can_be(tmp_path, capsys, monkeypatch):
    """With matplotlib, the file holds what was drawn, or a line says what failed, and the run goes on.
    Without matplotlib nothing is printed or written, and the result is False."""
    drawn = []

    def draw(axes):
        drawn.append(axes)
        axes.plot([1, 2], [3, 5])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert data.plot(tmp_path / "x.png", draw) is False
        assert not list(tmp_path.iterdir()) and not drawn and capsys.readouterr().err == ""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert data.plot(tmp_path / "y.png", lambda axes: 1 / 0) is True
    assert not list(tmp_path.iterdir()) and str(tmp_path / "y.png") in capsys.readouterr().err
    assert data.plot(tmp_path / "x.png", draw) is True and capsys.readouterr().err == ""
    assert drawn[0].lines[0].get_ydata()[1] == 5
    assert [path.read_bytes()[:8] for path in tmp_path.iterdir()] == [b"\x89PNG\r\n\x1a\n"]


# ----------------------------------------------------------------------------------------- shapes

def test_shapes_are_the_same_always():
    """Made by the code: a function of n, size and split; test images are not training images."""
    a, b = data.shapes(16), data.shapes(16)
    assert torch.equal(a, b) and a.shape == (16, 3, 16, 16) and a.dtype == torch.uint8
    assert not torch.equal(a, data.shapes(16, split="test"))
    assert a.float().std() > 20 and len(a.flatten(1).unique(dim=0)) == 16


def test_shapes_are_drawn_in_parts():
    """Eight thousand of 128 pixels at once would take seven gigabytes: no tensor of decimal numbers on
    the way has the four kinds of more than 256 images. The parts are in their order, and together they
    are what all images at once would be: the hue, by the standard library's formula, of what is covered."""
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = (x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_floating_point())
            self.seen = max(self.seen, *sizes, 0)
            return out
    with Largest() as largest:
        many = data.shapes(600, 16)
    assert largest.seen == 256 * 4 * 16 ** 2
    g = torch.Generator().manual_seed(1)
    (hue, x, y), kind = torch.rand(3, 600, generator=g), torch.randint(4, (600,), generator=g)
    cover = data.covers(0.4 * x - 0.2, 0.4 * y - 0.2, torch.full_like(x, 0.65), 16)[kind, range(600)]
    colour = torch.tensor([colorsys.hsv_to_rgb(h, 0.8, 1) for h in hue.tolist()])
    assert (many - 255 * colour[:, :, None, None] * cover[:, None]).abs().max() < 0.501


def test_shapes_have_8192_images_of_16_pixels_to_train_and_1024_to_test():
    """Another size is drawn if it is asked for."""
    images, about = data.load("shapes", split="test")
    assert torch.equal(images, data.shapes(1024, 16, "test")) and "test" in about
    for split, size, n, side in (("train", None, 8192, 16), ("train", 8, 8192, 8), ("test", 24, 1024, 24)):
        images, about = data.load("shapes", split=split, image_size=size)
        assert images.shape == (n, 3, side, side) and split in about
        assert torch.equal(images, data.shapes(n, side, split))


@pytest.mark.parametrize("split, colours", [
    ("train", [21, 12, 10, 21, 2, 21, 10, 21, 20, 10, 20, 20]),
    ("test", [20, 10, 20, 10, 21, 20, 10, 2, 20, 2, 20, 20])])
def test_shapes_stay_the_same_in_later_versions(split, colours):
    """So that a published number can be had again: the strongest channel and the weakest."""
    peaks = data.shapes(12, split=split).amax((2, 3))
    assert (10 * peaks.argmax(1) + peaks.argmin(1)).tolist() == colours


def test_a_square_covers_of_each_pixel_what_lies_inside():
    """Along its middle row: the length of what a pixel and the square have in common.

    Kills: edges that are blurred, or not smooth."""
    x, r, side = torch.tensor([0.03]), torch.tensor([0.5]), 16
    left = torch.arange(side) * 2 / side - 1
    inside = torch.minimum(left + 2 / side, x + 0.85 * r) - torch.maximum(left, x - 0.85 * r)
    row = data.covers(x, torch.zeros(1), r, side)[1, 0, side // 2]
    torch.testing.assert_close(row, inside.clamp(min=0) * side / 2, rtol=0, atol=1e-5)


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


def test_clean():
    """It takes the generator's test images; not noise, nothing, blurs, or two shapes."""
    real = data.shapes(40, split="test")
    blurred = torch.nn.functional.avg_pool2d(real.float(), 5, 1, 2).byte()
    two = torch.maximum(real, real.roll(1, 0))
    g = torch.Generator().manual_seed(0)
    noisy = (real + 20 * torch.randn(real.shape, generator=g)).clamp(0, 255).byte()
    kinds = torch.stack([real, blurred, two, noisy, torch.zeros_like(real)])
    good, *bad = clean.clean(*clean.fit(kinds.flatten(0, 1))).view(5, 40).double().mean(1).tolist()
    assert good == 1 and max(bad) < 0.06


# ------------------------------------------------------------------------ small things for all

def test_the_bytes_of_a_tensor_are_those_of_its_numbers_in_order():
    """Whatever its strides and its type; an empty one has none."""
    x = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 9.0]])
    assert data.raw_bytes(x.T) == struct.pack("<6f", 1, 3, -2, 0, 0.5, 9)
    assert data.raw_bytes(x[:, 1:].half()) == struct.pack("<4e", -2, 0.5, 0, 9)
    assert data.raw_bytes(torch.tensor([1.0, -2.0]).bfloat16()) == bytes([0x80, 0x3F, 0, 0xC0])
    assert data.raw_bytes(torch.tensor(300)) == struct.pack("<q", 300)
    assert data.raw_bytes(x[:0]) == b""


@pytest.mark.parametrize("n, side", [(1, 1), (3, 2), (1001, 3), (5, 2000)])
def test_fingerprint_is_a_hash_of_the_shape_and_of_all_pixels(n, side):
    """However they lie, and in whatever parts they are read.

    Kills: a data set taken for another one of the same size, or of the same bytes."""
    images = picture(n, 1, side + 1, side).transpose(2, 3)
    want = data.fingerprint(images)
    assert data.fingerprint(images.contiguous()) == want == data.fingerprint(images.clone())
    for place in (0, n // 2, n - 1):
        other = images.clone()
        other[place, 0, -1, -1] ^= 1
        assert data.fingerprint(other) != want
    assert len({want, *(data.fingerprint(images.reshape(shape)) for shape in (
        (n, 1, side + 1, side), (1, n, side, side + 1)))}) == 2 + (n > 1)


@pytest.mark.parametrize("text, line", [
    ("", "KeyError"), (" \n ", "KeyError"), ("\n one \n two", "one two"),
    ("a\tb\x1b[31m\0é×", "a b?[31m?é×"),
    ("x" * 281, "x" * 280)])
def test_an_error_is_one_printable_short_line(text, line):
    class KeyError(Exception):
        pass
    assert command.one_line(KeyError(text)) == line


class Stream(io.StringIO):
    """A stream that keeps what has been flushed, or fails."""

    def __init__(self, error=None):
        super().__init__()
        self.error, self.flushed = error, ""

    def flush(self):
        self.flushed = self.getvalue()
        if self.error:
            raise self.error


def test_what_is_said_is_on_stderr_at_once(capsys):
    """With the end that is asked for, a new line by default."""
    with contextlib.redirect_stderr(Stream()) as stream:
        command.say("a", end="")
        assert stream.flushed == "a"
        command.say("b")
        assert stream.flushed == "ab\n" and capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("closed")])
def test_work_goes_on_if_nobody_can_read_what_is_said(error):
    """The reader of a pipe has ended, or the stream is closed. Other errors are mistakes."""
    with contextlib.redirect_stderr(Stream(error)):
        command.say("a")
    with contextlib.redirect_stderr(Stream(KeyError())), pytest.raises(KeyError):
        command.say("a")
