"""Images as 8-bit tensors: the data sets of the paper, images of one's own, pictures written.

    images, about = load("cifar10")    # uint8 (50000, 3, 32, 32), "train split"
    x0 = to_model(images[:128])        # float32 in [−1, 1]
"""
from __future__ import annotations

import ctypes
import gzip
import hashlib
import io
import math
import struct
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from support.command import one_line, reading, say, written

FILES = {  # name → folder of the address; name and SHA-256 of the training and the test images
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", 2 * [("cifar-10-binary.tar.gz",
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")]),
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", [("train-images-idx3-ubyte.gz",
              "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
              ("t10k-images-idx3-ubyte.gz",
               "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6")]),
    "fashion_mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", [
        ("train-images-idx3-ubyte.gz",
         "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        ("t10k-images-idx3-ubyte.gz",
         "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073")]),
}
NAMES = (*FILES, "shapes")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "GIF", "TIFF")
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff"}

def to_model(images: Tensor) -> Tensor:
    """{0 … 255} → [−1, 1], linearly: uint8 in, float32 out.   [DDPM §3.3]"""
    return images.float() / 127.5 - 1

def to_uint8(x: Tensor) -> Tensor:
    """[−1, 1] → {0 … 255}, the inverse of `to_model`: clamped, scaled and rounded."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

def load(name: str, data_dir: str | Path = "data", split: str = "train",
         image_size: int | None = None) -> tuple[Tensor, str]:
    """The images of `name`: one of NAMES, a .pt file with a uint8 tensor, or a folder of pictures.

    In memory or mapped from disk, uint8 N×C×H×W, C = 1 or 3; and what they are, in words.
    split: "train" or "test". A .pt file has no such parts, and a folder only if it has subfolders
    with these names. image_size: side of the images of a folder (256 unless given) and of shapes
    (16). ValueError if the data are not what they should be, OSError if they cannot be had.
    """
    about = f"{split} split"
    if name == "shapes":
        return shapes(8192 if split == "train" else 1024, image_size or 16, split), about
    if name in FILES:
        address, files = FILES[name]
        file, sha256 = files[split == "test"]
        path, own = Path(data_dir, file), Path(data_dir, name, file)
        # MNIST and Fashion-MNIST share file names: a folder of one is not taken for the other.
        other = name != "cifar10" and ("fashion" in path.resolve().parent.name.lower()) != (
            name == "fashion_mnist")
        if own.exists() or other or not path.exists():
            path = fetch(address + file, own, sha256)
        if name == "cifar10":
            return read_cifar10(path, split), about
        return F.pad(read_idx(path), (2, 2, 2, 2)), f"{about}, padded from 28×28 to 32×32"
    if name.endswith(".pt"):
        return read_tensor(Path(name)), "which has no splits"
    if not Path(name).is_dir():
        raise ValueError(f"no data set is called {name!r}: choose {', '.join(NAMES)}, a .pt file "
                         "or a folder of pictures")
    parts = any(Path(name, part).is_dir() for part in ("train", "test"))
    folder, about = (Path(name, split), about) if parts else (Path(name), "all pictures")
    return (read_folder(folder, Path(data_dir), image_size or 256),
            f"{about}, the middle square of each in RGB")

def fetch(address: str, path: Path, sha256: str | None = None) -> Path:
    """Downloads `address` to `path`, unless it is there. OSError says where to put it by hand."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        say(f"downloading {address}")
        try:
            torch.hub.download_url_to_file(address, str(path), sha256)
        except Exception as error:  # of the network, or RuntimeError for another SHA-256
            raise OSError(f"cannot download {address} ({one_line(error)}); get the file by other "
                          f"means and put it at {path}") from error
    return path

def fingerprint(images: Tensor) -> str:
    """A hash of the shape and of at most 1,000 images, evenly spaced."""
    some = images[::math.ceil(len(images) / 1000)]
    return hashlib.sha256(f"{tuple(images.shape)}".encode() + raw_bytes(some)).hexdigest()

def raw_bytes(x: Tensor) -> bytes:
    """The bytes of a tensor as they lie in memory, without the help of NumPy."""
    x = x.cpu().contiguous()
    return ctypes.string_at(x.data_ptr(), x.nbytes)

def read_cifar10(path: Path, split: str = "train") -> Tensor:
    """The *binary* archive of CIFAR-10, read inside the .tar.gz: uint8 (N, 3, 32, 32).

    A record is a label byte (0 … 9) and 3,072 bytes of pixels: red, green, blue, each by rows.
    """
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    with reading(path, "CIFAR-10's binary archive"):
        content = gzip.open(path).read(2 ** 28)  # all of it, so that its checksum is verified
        archive = tarfile.open(fileobj=io.BytesIO(content), mode="r:")
        raw = b"".join(archive.extractfile("cifar-10-batches-bin/" + f).read() for f in files)
        records = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 3073)
        if records[:, 0].max() > 9:
            raise ValueError("it has a label above 9")
    return records[:, 1:].reshape(-1, 3, 32, 32)

def read_idx(path: Path) -> Tensor:
    """Gzipped IDX images: big-endian 2051, count, 28, 28, then the bytes → (N, 1, 28, 28)."""
    with reading(path, "28×28 images in IDX format"), gzip.open(path) as file:
        magic, n, rows, columns = struct.unpack(">4I", file.read(16))
        if (magic, rows, columns) != (2051, 28, 28):
            raise ValueError(f"it begins with {magic}, {n}, {rows}, {columns}")
        return torch.frombuffer(bytearray(file.read(2 ** 26)), dtype=torch.uint8).view(n, 1, 28, 28)

def read_tensor(path: Path) -> Tensor:
    """A tensor saved by `torch.save`: uint8 N×C×H×W, C = 1 or 3. ValueError for anything else."""
    with reading(path, "images, a uint8 tensor N×C×H×W with C = 1 or 3"):
        x = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1] not in (1, 3) or not x.numel():
            raise ValueError(f"it holds {x.dtype} {tuple(x.shape)}")
        if 0 in x.stride():
            raise ValueError("its images are one and the same")
        raw_bytes(x[:1])  # an error if no pixels are stored, as in a sparse tensor
    return x

def read_folder(source: Path, cache: Path, size: int) -> Tensor:
    """A folder of pictures, the middle square of each resized: uint8 (N, 3, size, size).

    They are decoded once with Pillow into a file in `cache`, which is mapped and not read, so that
    a set larger than memory works. Its name is a hash of what the folder holds: after a change of
    the folder everything is decoded again.
    """
    files = sorted(f for f in source.rglob("*") if f.suffix.lower() in PICTURES and f.is_file())
    if not files:
        raise ValueError(f"{source} holds no pictures ({' '.join(sorted(PICTURES))})")
    listing = repr([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    key = hashlib.sha256(f"{size} {listing}".encode()).hexdigest()[:16]
    path = cache / f"{source.resolve().name}-{size}-{key}.u8"
    if not path.exists():
        with written(path) as out:
            for i, file in enumerate(files, 1):
                out.write(raw_bytes(decode(file, size)))
                if i % 500 == 0 or i == len(files):
                    say(f"decoding {source}: {i} of {len(files)}")
    with reading(path, "pictures decoded before: delete it"):
        x = torch.from_file(str(path), size=len(files) * 3 * size * size, dtype=torch.uint8)
    return x.view(-1, 3, size, size)

def pillow():
    """Pillow's two modules, which refuse a picture of more than 89 million pixels."""
    from PIL import Image, ImageOps
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    return Image, ImageOps

def decode(file: Path, size: int) -> Tensor:
    """A picture as it is meant to be seen, its middle square resized: uint8 (3, size, size).

    It is turned as its EXIF data say, 16-bit grey is scaled to 8 bits, and what is transparent
    becomes white.
    """
    Image, ImageOps = pillow()
    with reading(file, "a picture"), Image.open(file, formats=FORMATS) as picture:
        ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PNG"):
            picture = picture.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L")
        if picture.mode in ("I", "F"):
            raise ValueError("grey of 32 bits has no known range")
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return pixels(ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.LANCZOS))

def pixels(picture) -> Tensor:
    """A picture of Pillow, grey (L) or RGB: uint8 (1 or 3, H, W)."""
    raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return raw.view(*picture.size[::-1], -1).permute(2, 0, 1)

def png(image: Tensor) -> bytes:
    """uint8 (1 or 3, H, W) as an 8-bit PNG, each line as its difference to the one above."""
    c, height, width = image.shape
    x = image.permute(1, 2, 0).reshape(height, c * width).int()
    lines = F.pad(x.diff(dim=0, prepend=0 * x[:1]) % 256, (1, 0), value=2)  # 2: that difference
    header = struct.pack(">IIBBBBB", width, height, 8, c - 1, 0, 0, 0)
    body, content = zlib.compress(raw_bytes(lines.to(torch.uint8)), 9), b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + body, b"IEND"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content

def tiled(images: Tensor, columns: int | None = None) -> Tensor:
    """uint8 (N, C, H, W) → one picture (C, …) in rows of `columns`, as square as possible unless
    given; each pixel becomes a square, so that the picture is about 480 pixels wide, or wider."""
    n, c, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows, k = math.ceil(n / columns), max(1, round(480 / (columns * width)))
    cells = F.pad(images, (0, 0, 0, 0, 0, 0, 0, rows * columns - n))
    cells = cells.view(rows, columns, c, height, width).permute(2, 0, 3, 1, 4)
    picture = cells.reshape(c, rows * height, columns * width)
    return picture.repeat_interleave(k, 1).repeat_interleave(k, 2)

def plot(path: Path, draw: Callable) -> bool:
    """draw(axes) as a picture, if matplotlib is there; whether it is. No plot ends a run."""
    try:
        from matplotlib.figure import Figure
        figure = Figure(figsize=(7, 4), layout="constrained")
        draw(figure.add_subplot())
        figure.axes[0].grid(alpha=0.3)
        with written(path) as file:
            figure.savefig(file, dpi=120, format="png")
        return True
    except ImportError:
        return False
    except Exception as error:
        say(f"{path} is not drawn: {one_line(error)}")
        return False

def shapes(n: int, size: int = 16, split: str = "train") -> Tensor:
    """A data set made here: one disc, square, triangle or ring on black: uint8 (n, 3, …).

    Its hue and its place are random. The same n, size and split are the same images, always.
    """
    g = torch.Generator().manual_seed({"train": 1, "test": 2}[split])
    hue, x, y = torch.rand(3, n, generator=g)
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6          # hue → red, green, blue
    colour = 1 - 0.8 * torch.minimum(k, 4 - k).clamp(0, 1)              # (n, 3), saturation 0.8
    kind = torch.randint(4, (n,), generator=g)
    parts = []
    for i in torch.arange(n).split(256):  # all of them at once would take gigabytes
        cover = covers(0.4 * x[i] - 0.2, 0.4 * y[i] - 0.2, torch.full_like(x[i], 0.65), size)
        cover = cover[kind[i], torch.arange(len(i)), None]
        parts.append(to_uint8(2 * colour[i, :, None, None] * cover - 1))
    return torch.cat(parts)

def covers(x: Tensor, y: Tensor, radius: Tensor, size: int) -> Tensor:
    """How much of each pixel a disc, a square, a triangle, a ring covers: (4, n, size, size).

    x, y, radius: (n,), where the side of the image is 2 and its centre is 0.
    """
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    u, v, r = axis - x[:, None, None], axis[:, None] - y[:, None, None], radius[:, None, None]
    disc = (u ** 2 + v ** 2).sqrt() - r                      # distances to the outlines, < 0 inside
    square = torch.maximum(u.abs(), v.abs()) - 0.85 * r
    triangle = torch.maximum(0.866 * u.abs() - 0.5 * v, v) - 0.55 * r
    ring = (disc + 0.25 * r).abs() - 0.25 * r
    return (0.5 - torch.stack([disc, square, triangle, ring]) * size / 2).clamp(0, 1)
