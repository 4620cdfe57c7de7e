"""Every data format, on small files made here; whatever is wrong with one is a single clear
line."""
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


def idx_of(rows: int, columns: int) -> bytes:
    """A gzipped IDX file of two images, in which no pixel is 0."""
    pixels = bytes(1 + i % 255 for i in range(2 * rows * columns))
    return gzip.compress(struct.pack(">IIII", 2051, 2, rows, columns) + pixels)


@pytest.mark.parametrize("rows, columns, top, left", [
    (27, 21, 2, 5), (21, 27, 5, 2), (32, 31, 0, 0), (40, 32, 0, 0), (32, 32, 0, 0)])
def test_idx_is_padded_to_32_in_each_direction(tmp_path, rows, columns, top, left):
    """Half of what is missing is added before the picture, and if it is odd, one more after it."""
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(idx_of(rows, columns))
    images, split, padded = data.load("mnist", tmp_path, "test")
    assert images.shape == (2, 1, max(32, rows), max(32, columns))
    inside = images[:, :, top:top + rows, left:left + columns]
    assert inside.flatten().tolist() == [1 + i % 255 for i in range(2 * rows * columns)]
    assert images.count_nonzero() == inside.numel()
    assert (split, padded) == ("test", rows < 32 or columns < 32)


def test_size_of_images_is_judged_by_both_sides(tmp_path):
    """A size that is asked for is taken if both sides have it."""
    file = tmp_path / "train-images-idx3-ubyte.gz"
    for rows, columns, size, good in ((28, 28, 32, True), (40, 32, 32, False),
                                      (32, 40, 32, False), (28, 28, 28, False)):
        file.write_bytes(idx_of(rows, columns))
        if good:
            assert data.load("mnist", tmp_path, image_size=size).images.shape[2:] == (size, size)
        else:
            with pytest.raises(ValueError, match=f"{max(rows, 32)}×{max(columns, 32)}"):
                data.load("mnist", tmp_path, image_size=size)


def test_no_more_is_unpacked_than_a_data_set_can_have(tmp_path, monkeypatch):
    """A file of exactly the limit is read, one byte more is refused before the rest is unpacked.

    The limits: all of MNIST, and for CIFAR-10 its 60,000 records and some room for the rest."""
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(bytes(1000)))
    assert data.gunzip(path, 1000) == bytes(1000)
    with pytest.raises(ValueError, match="999"):
        data.gunzip(path, 999)
    path.write_bytes(gzip.compress(bytes(2 ** 24), 1))
    tracemalloc.start()
    with pytest.raises(ValueError):
        data.gunzip(path, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 ** 22
    limits = []
    monkeypatch.setattr(data, "gunzip", lambda path, limit: limits.append(limit) or b"")
    for read in (data.read_idx, data.read_cifar10):
        with pytest.raises(ValueError):
            read(path)
    assert limits[0] == 16 + 60_000 * 28 * 28 and 60_000 * 3073 < limits[1] <= 200_000_000


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


def test_cifar10_in_any_order_and_with_other_entries(tmp_path):
    """The batches are put in order; folders, texts and files of other names are passed over.

    An entry that is empty, a folder, a link, or not of whole records is no batch."""
    def archive(*entries):
        with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as file:
            for name, body, kind in entries:
                entry = tarfile.TarInfo("cifar-10-batches-bin/" + name)
                entry.type, entry.size, entry.linkname = kind, len(body), "other.bin"
                file.addfile(entry, io.BytesIO(body))

    def batch(i):
        return f"data_batch_{i}.bin", bytes([9] + [i] * 3072), tarfile.REGTYPE
    rest = [("", b"", tarfile.DIRTYPE), ("batches.meta.txt", b"airplane", tarfile.REGTYPE),
            ("other.bin", bytes([200] * 3073), tarfile.REGTYPE),
            ("empty.txt", b"", tarfile.REGTYPE), ("link", b"", tarfile.SYMTYPE)]
    archive(*rest, *map(batch, (4, 2, 5, 1, 3)))
    d = data.load("cifar10", tmp_path)
    assert d.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5] and d[1:] == ("train", False)
    for body, kind in ((b"", tarfile.REGTYPE), (b"", tarfile.DIRTYPE), (b"", tarfile.SYMTYPE),
                       (bytes(3072), tarfile.REGTYPE), (bytes(3074), tarfile.REGTYPE)):
        archive(*rest, *map(batch, (1, 2, 3, 5)), ("data_batch_4.bin", body, kind))
        with pytest.raises(ValueError, match="data_batch_4.bin"):
            data.load("cifar10", tmp_path)


@pytest.mark.parametrize("name, split, file", [
    ("cifar10", "train", "cifar-10-binary.tar.gz"), ("cifar10", "test", "cifar-10-binary.tar.gz"),
    ("mnist", "train", "train-images-idx3-ubyte.gz"),
    ("mnist", "test", "t10k-images-idx3-ubyte.gz"),
    ("fashion_mnist", "test", "t10k-images-idx3-ubyte.gz")])
def test_what_is_missing_is_fetched_as_the_tables_say(tmp_path, monkeypatch, name, split, file):
    """Address, size and checksum are those of the file that is needed; it is put at name/file.

    A file that lies there is taken, before one in the data folder itself."""
    if name == "cifar10":
        address, size, checksum = data.CIFAR10[file]
    else:
        size, checksum = data.IDX[name][1][file]
        address = f"{data.IDX[name][0]}{file}"
    asked = []
    monkeypatch.setattr(data, "fetch", lambda *given: asked.append(given) or given[1])
    read, images = [], torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    for reader in ("read_idx", "read_cifar10"):
        monkeypatch.setattr(data, reader, lambda path, *_: read.append(path) or images)
    place = tmp_path / name / file
    data.load(name, tmp_path, split)
    assert asked == [(address, place, size, checksum)] and read == [place]
    place.parent.mkdir()
    place.touch()
    if name != "fashion_mnist":
        (tmp_path / file).touch()
    data.load(name, tmp_path, split)
    assert len(asked) == 1 and read[1] == place


def test_tensor_file(tmp_path):
    """A .pt of torch.save is taken if it is uint8 N×C×H×W with C = 1 or 3, and with no other.

    It has no splits, and no border is added."""
    path = tmp_path / "images.pt"
    for channels in (1, 3):
        images = torch.randint(256, (4, channels, 8, 8), dtype=torch.uint8)
        torch.save(images, path)
        d = data.load(str(path))
        assert torch.equal(d.images, images) and d[1:] == ("", False)
    with pytest.raises(ValueError, match="8×8, not 16×16"):
        data.load(str(path), image_size=16)
    for bad in (images.float(), images[0], images[:, :2], images[:0], {"a": images}, "text",
                images[:, [0, 1, 2, 0]], images[None], images.to("meta")):
        torch.save(bad, path)
        with pytest.raises(ValueError):
            data.load(str(path))
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match="no tensor file"):
        data.load(str(path))


class Deed:
    """What a pickle can do when it is read: here it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("done",)


def test_tensor_file_is_mapped_and_no_code_in_it_is_run(tmp_path, monkeypatch):
    """A file larger than memory can be used, or one of a GPU; one from a stranger can do nothing.

    The variable makes torch.load trust every file, unless it is told not to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    load, options = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **b: options.append(b) or load(*a, **b))
    torch.save(Deed(), "deed.pt")
    with pytest.raises(ValueError, match="deed.pt"):
        data.load("deed.pt")
    assert not os.path.exists("done")
    assert options[0]["mmap"] is True and options[0]["map_location"] == "cpu"


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


@pytest.mark.parametrize("size", [16, 5])
def test_pictures_are_reduced_with_lanczos_kernel(tmp_path, size):
    """Reduced k-fold, a pixel is the mean of its surroundings with weights sinc(x) sinc(x/3).

    x is the distance in pixels of the result, below 3. Kills: other kernels, and no filter."""
    pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    side, image = 64, picture(3, 64, 64)
    sample.write_png(tmp_path / "a.png", image)
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * side / size
    x = (torch.arange(side) + 0.5 - centre[:, None]) * size / side
    weights = torch.sinc(x) * torch.sinc(x / 3) * (x.abs() < 3)
    weights /= weights.sum(1, keepdim=True)
    want = (weights @ image.double() @ weights.T).clamp(0, 255)
    assert (data.decode(tmp_path / "a.png", size) - want).abs().max() < 2


def test_grey_of_16_bits_is_divided_by_257(tmp_path, monkeypatch):
    """All 65,536 levels are rounded to the nearest of 256, also if Pillow calls the mode I.

    Older versions of Pillow do so. The levels of other pictures of that mode, and of decimal
    numbers, have no known range, and are refused."""
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    levels = torch.arange(2 ** 16).view(256, 256)
    image = Image.frombytes("I;16", (256, 256), struct.pack("<65536H", *range(2 ** 16)))
    image.save(tmp_path / "a.png")
    want = ((levels + 128) // 257).expand(3, -1, -1)
    assert torch.equal(data.decode(tmp_path / "a.png", 256).int(), want.int())
    for mode in "IF":
        wide = image.convert("I").convert(mode)
        wide.save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match="a.tif"):
            data.decode(tmp_path / "a.tif", 256)
        wide.format = "PNG"
        monkeypatch.setattr(Image, "open", lambda file, wide=wide: wide)
        if mode == "I":
            assert torch.equal(data.decode(tmp_path / "a.png", 256).int(), want.int())
        monkeypatch.undo()


def test_what_is_half_transparent_is_half_white(tmp_path):
    """Black at α/255 becomes 255 − α. The one transparent colour of a palette becomes white."""
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for mode in ("RGBA", "LA"):
        for alpha in (0, 1, 127, 200, 255):
            colour = (0,) * (len(mode) - 1) + (alpha,)
            Image.new(mode, (4, 4), colour).save(tmp_path / "a.png")
            assert (data.decode(tmp_path / "a.png", 4) == 255 - alpha).all()
    palette = Image.frombytes("P", (2, 2), bytes([0, 1, 1, 0]))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "a.png", transparency=1)
    assert data.decode(tmp_path / "a.png", 2).flatten(1).tolist() == [
        [10, 255, 255, 10], [20, 255, 255, 20], [30, 255, 255, 30]]


@pytest.fixture
def decoded(tmp_path, monkeypatch):
    """What was decoded, by a decoder made here that fills the image with the file's first byte."""
    def decode(file, size):
        names.append(str(file))
        return torch.full((3, size, size), file.read_bytes()[0], dtype=torch.uint8)
    names: list[str] = []
    monkeypatch.setattr(data, "decode", decode)
    monkeypatch.chdir(tmp_path)
    return names


def fill(folder: str, **pictures: int) -> None:
    """A folder with such pictures, each of one byte."""
    os.makedirs(folder)
    for name, value in pictures.items():
        with open(f"{folder}/{name.replace('_', '.')}", "wb") as file:
            file.write(bytes([value]))


def test_a_folder_is_all_its_pictures_in_order(decoded):
    """In folders of the folder too, whatever the case of the ending; other files are no pictures.

    The side is 256 unless it is given."""
    fill("p/b", c_JPG=3, a_png=2, b_Jpeg=9)
    fill("p/c.png", d_tiff=4, e_pt=5, f_txt=6)
    fill("p/a", z_webp=1)
    d = data.load("p", "cache", image_size=2)
    assert d.images.shape == (5, 3, 2, 2) and d[1:] == ("", False)
    assert d.images[:, 0, 0, 0].tolist() == [1, 2, 9, 3, 4]
    assert all((image == image[0, 0, 0]).all() for image in d.images)
    assert data.load("p", "cache").images.shape == (5, 3, 256, 256)


def test_a_folder_has_splits_if_its_folders_are_called_so(decoded):
    """The folder of the split is taken, and nothing else; without such a folder all pictures."""
    fill("p/train", a_png=1)
    fill("p/other", b_png=2)
    for split, found in (("train", [1]), ("test", None)):
        if found:
            d = data.load("p", "cache", split, 1)
            assert d.images[:, 0, 0, 0].tolist() == found and d.split == split
        else:
            with pytest.raises(ValueError, match="train/.* test/"):
                data.load("p", "cache", split, 1)
    fill("q/test", a_png=3)
    assert data.load("q", "cache", "test", 1)[1:] == ("test", False)
    with pytest.raises(ValueError, match="test/.* train/"):
        data.load("q", "cache", "train", 1)
    fill("p/test", a_png=4)
    assert data.load("p", "cache", "test", 1).images.flatten().tolist() == [4] * 3
    assert data.load("p/other", "cache", "test", 1).split == ""


def test_a_folder_is_decoded_anew_if_and_only_if_something_changed(decoded):
    """A name, a size in bytes, a time of change, or the size asked for.

    Only the file of decoded pictures is then read. One that is cut is refused."""
    def load(size: int = 2):
        before = len(decoded)
        images = data.load("p", "cache", image_size=size).images
        return len(decoded) - before, images[:, 0, 0, 0].tolist()
    fill("p", a_png=1, b_png=2)
    for name in "ab":
        os.utime(f"p/{name}.png", ns=(5, 5))
    assert load() == (2, [1, 2]) and load() == (0, [1, 2])
    assert load(3) == (2, [1, 2]) and load(3) == (0, [1, 2])
    os.rename("p/a.png", "p/c.png")
    assert load() == (2, [2, 1])
    with open("p/c.png", "wb") as file:
        file.write(b"\3\3")
    os.utime("p/c.png", ns=(5, 5))
    assert load() == (2, [2, 3])
    os.utime("p/c.png", ns=(5, 6))
    assert load() == (2, [2, 3]) and load() == (0, [2, 3])
    for path in os.listdir("cache"):
        os.truncate(f"cache/{path}", 11)
    with pytest.raises(ValueError, match=" 11 .* 24"):
        load()


def test_decoding_says_every_500_and_the_last(decoded, capsys):
    fill("p", **{f"i{i}_png": 0 for i in range(502)})
    data.load("p", "cache", image_size=1)
    lines = capsys.readouterr().err.split("\r")
    numbers = [[int(x) for x in re.findall(r"\d+", line)] for line in lines[1:]]
    assert numbers == [[500, 502], [502, 502]]
    assert lines[-1].endswith("\n")


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


def test_shapes_have_8192_images_of_16_pixels_to_train_and_1024_to_test(monkeypatch):
    """Another size is drawn if it is asked for, up to 512 pixels."""
    d = data.load("shapes", split="test")
    assert torch.equal(d.images, data.shapes(1024, 16, "test")) and d[1:] == ("test", False)
    monkeypatch.setattr(data, "shapes", lambda *given: given)
    assert data.load("shapes") == ((8192, 16, "train"), "train", False)
    assert data.load("shapes", image_size=8).images == (8192, 8, "train")
    assert data.load("shapes", split="test", image_size=512).images == (1024, 512, "test")
    with pytest.raises(ValueError, match="513"):
        data.load("shapes", image_size=513)


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


# --- a server and a clock made here

def scripted(monkeypatch, *parts: tuple[float, bytes], length: int | None = None) -> None:
    """Each part comes at its time, in seconds after the start; the server may announce a length."""
    class Answer(io.BytesIO):
        headers = {} if length is None else {"Content-Length": str(length)}

        def read1(self, size):
            clock[0], part = next(coming, (clock[0], b""))
            return part
    def open_it(self, address, timeout):
        assert timeout <= 60                # one that says nothing is given up after a minute
        return Answer()
    clock, coming = [1000.0], iter((1000 + t, part) for t, part in parts)
    monkeypatch.setattr(data.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(data.urllib.request.OpenerDirector, "open", open_it)


@pytest.mark.parametrize("parts, good", [
    ([(1, 1), (59, 1), (60, 1)], True),                 # nobody is judged in the first minute
    ([(60.5, 302_499)], False), ([(60.5, 302_500)], True),
    ([(30, 500_000), (100, 1)], True), ([(30, 500_000), (101, 1)], False),
    ([(100, 500_000), (200, 499_999)], False), ([(100, 500_000), (200, 500_000)], True)])
def test_download_must_have_5_kilobytes_a_second_after_a_minute(tmp_path, monkeypatch, parts, good):
    """All bytes so far count, over all seconds since the start."""
    scripted(monkeypatch, *((t, bytes(n)) for t, n in parts))
    if good:
        data.fetch("http://x/x", tmp_path / "x")
        assert (tmp_path / "x").stat().st_size == sum(n for _, n in parts)
    else:
        with pytest.raises(OSError, match="5 kB/s"):
            data.fetch("http://x/x", tmp_path / "x")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [2_500_000, None])
def test_download_shows_megabytes_and_percent_twice_a_second(tmp_path, monkeypatch, capsys, length):
    """At once, and then more than half a second after the line before; without a length no percent.

    The line is ended, so that what follows does not stand in it."""
    times = (0, 0.5, 0.625, 1, 1.25)
    scripted(monkeypatch, *((t, bytes(500_000)) for t in times), length=length)
    data.fetch("http://x/x", tmp_path / "x")
    err = capsys.readouterr().err
    lines = [[float(x) for x in re.findall(r"[\d.]+", line)] for line in err.split("\r")[1:]]
    if length:
        assert lines == [[0.5, 2.5, 20], [1.5, 2.5, 60], [2.5, 2.5, 100]]
    else:
        assert lines == [[0.5], [1.5], [2.5]]
    assert err.endswith("\n") and err.count("\n") == 1


def test_download_that_does_not_begin_shows_no_progress(tmp_path, capsys):
    with pytest.raises(OSError):
        data.fetch("nonsense", tmp_path / "x")
    assert capsys.readouterr().err == ""


class Chunk(bytes):
    """A byte that counts as two gigabytes."""

    def __len__(self):
        return 2 * 10 ** 9


def test_download_of_unknown_length_ends_at_4_gigabytes(tmp_path, monkeypatch):
    """4 GB are taken, and not a byte more. What is expected to be larger may be."""
    parts = [(0, Chunk(b"a")), (0, Chunk(b"b"))]
    scripted(monkeypatch, *parts)
    assert data.fetch("http://x/x", tmp_path / "x").read_bytes() == b"ab"
    scripted(monkeypatch, *parts, (0, b"c"))
    with pytest.raises(OSError, match="4000000000"):
        data.fetch("http://x/x", tmp_path / "y")
    scripted(monkeypatch, *parts, (0, b"c"))
    assert data.fetch("http://x/x", tmp_path / "z", 4 * 10 ** 9 + 1).read_bytes() == b"abc"


def test_download_is_checked_by_md5_or_sha256(tmp_path, monkeypatch):
    """32 digits are MD5, 64 are SHA-256; the size asked for counts, not the announced one."""
    for digest in (hashlib.md5, hashlib.sha256):
        scripted(monkeypatch, (0, b"ab"), (0, b"cd"), length=3)
        path = data.fetch("http://x/x", tmp_path / "x", 4, digest(b"abcd").hexdigest())
        assert path.read_bytes() == b"abcd"
        scripted(monkeypatch, (0, b"abcd"))
        with pytest.raises(OSError, match=digest(b"abcd").hexdigest()):
            data.fetch("http://x/x", tmp_path / "y", 4, digest(b"abce").hexdigest())


# --- small things that everything uses

@given(st.integers(1, 3), st.sampled_from([(1, 4, 4), (3, 2, 5)]))
def test_fingerprint_is_the_shape_and_the_hash_of_all_bytes(n, shape):
    images = picture(n, *shape).flip(3).transpose(2, 3)
    want = hashlib.sha256(bytes(images.flatten().tolist())).hexdigest()
    assert data.fingerprint(images, (n, 7)) == f"({n}, 7) {want}"


@pytest.mark.parametrize("shape, parts", [((5, 3, 2 ** 12, 2 ** 11), [2, 2, 1]),
                                          ((2, 1, 2 ** 14, 2 ** 13), [1, 1])])
def test_fingerprint_copies_64_megabytes_at_a_time(monkeypatch, shape, parts):
    """So a data set larger than memory has one; an image larger than that is copied alone.

    The images are one byte, expanded."""
    seen = []
    monkeypatch.setattr(data, "raw_bytes", lambda part: seen.append(len(part)) or b"")
    data.fingerprint(torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(shape), shape)
    assert seen == parts


@pytest.mark.parametrize("text, line", [
    ("", "KeyError"), (" \n ", "KeyError"), ("\n one \n two", "one "),
    ("a\tb\x1b[31m\0é×", "a?b?[31m?é×"),
    ("x" * 281, "x" * 280)])
def test_first_line_of_an_error_is_printable_and_short(text, line):
    class KeyError(Exception):
        pass
    assert data.first_line(KeyError(text)) == line


class Stream(io.StringIO):
    """A stream that keeps what has been flushed, or fails."""

    def __init__(self, error=None):
        super().__init__()
        self.error, self.flushed = error, ""

    def flush(self):
        self.flushed = self.getvalue()
        if self.error:
            raise self.error


def test_what_is_said_is_on_stderr_at_once(monkeypatch, capsys):
    """With the end that is asked for, a new line by default."""
    monkeypatch.setattr(sys, "stderr", Stream())
    data.say("a", end="")
    assert sys.stderr.flushed == "a"
    data.say("b")
    assert sys.stderr.flushed == "ab\n" and capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("closed")])
def test_work_goes_on_if_nobody_can_read_what_is_said(monkeypatch, error):
    """The reader of a pipe has ended, or the stream is closed. Other errors are mistakes."""
    monkeypatch.setattr(sys, "stderr", Stream(error))
    data.say("a")
    monkeypatch.setattr(sys, "stderr", Stream(KeyError()))
    with pytest.raises(KeyError):
        data.say("a")


@pytest.mark.parametrize("links", [True, False])
def test_second_name_of_a_file(tmp_path, monkeypatch, links):
    """With hard links the first name stays; without them it goes. An older file makes room."""
    path, keep = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"new")
    keep.write_bytes(b"old")
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError()))
    data.rename_to(path, keep)
    assert keep.read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == (["a", "b"] if links else ["b"])


def test_check_writable_leaves_nothing_and_names_the_file(tmp_path):
    """A file that is there keeps its content; a folder, or a file in place of one, is an error."""
    path = tmp_path / "new" / "a"
    data.check_writable(path)
    assert not list(path.parent.iterdir())
    path.write_bytes(b"kept")
    data.check_writable(path)
    assert path.read_bytes() == b"kept" and list(path.parent.iterdir()) == [path]
    for bad in (path.parent, path / "b"):
        with pytest.raises(OSError, match=re.escape(f"{bad}:")):
            data.check_writable(bad)
