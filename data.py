"""Images as 8-bit tensors: what the paper trains on, and what people bring.

    data = load("cifar10")             # .images: uint8 (50000, 3, 32, 32), .name, .padded
    x0 = to_model(data.images[:128])   # float32 in [−1, 1]

Each data set is judged by its structure when it is read; a download is checked before it counts.
"""
from __future__ import annotations

import ctypes
import gzip
import hashlib
import http.client
import math
import os
import sys
import tarfile
import time
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# name → address, size in bytes, checksum (MD5 or SHA-256, told apart by length)
CIFAR10 = {"cifar-10-binary.tar.gz": (
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", 170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")}
IDX = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", {
        "train-images-idx3-ubyte.gz": (9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        "t10k-images-idx3-ubyte.gz": (1_648_877, "9fb629c4189551a2d022fa330f9573f3")}),
    "fashion_mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", {
        "train-images-idx3-ubyte.gz": (26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        "t10k-images-idx3-ubyte.gz": (4_422_102, "bef4ecab320f06d8554ea6380940ec79")}),
}
NAMES = ("cifar10", "mnist", "fashion_mnist", "shapes")
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff"}


class Data(NamedTuple):
    """A data set in memory (or mapped from disk): uint8 N×C×H×W, C = 1 or 3."""
    images: Tensor
    name: str
    padded: bool = False    # whether a border was added (28×28 digits and clothes)


def to_model(images: Tensor) -> Tensor:
    """{0 … 255} → [−1, 1], linearly (§3.3): uint8 in, float32 out."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[−1, 1] → {0 … 255}: clamped, scaled and rounded, the inverse of `to_model`."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def load(name: str, data_dir: str | Path = "data", split: str = "train",
         image_size: int | None = None) -> Data:
    """The images of `name`: one of NAMES, a .pt file of a uint8 tensor, or a folder of images.

    split: "train" or "test" (a .pt file has none; a folder may have such subfolders). image_size:
    for a folder (256 unless given) and shapes (32); the others have a size of their own.
    ValueError where the data are not what they should be, OSError where they cannot be had.
    """
    folder = Path(data_dir)
    if name == "shapes":
        return Data(shapes(8192 if split == "train" else 1024, image_size or 32, split), name)
    if name == "cifar10":
        data = Data(read_cifar10(_local(folder, name, *CIFAR10.items()), split), name)
    elif name in IDX:
        address, files = IDX[name]
        file = next(f for f in files if f.startswith("train" if split == "train" else "t10k"))
        images = read_idx(_local(folder, name, (file, (address + file, *files[file]))))
        pad = [max(0, 32 - side) for side in images.shape[2:]]
        data = Data(F.pad(images, (pad[1] // 2, pad[1] - pad[1] // 2,
                                   pad[0] // 2, pad[0] - pad[0] // 2)), name, any(pad))
    elif name.endswith(".pt"):
        data = Data(read_tensor(Path(name)), name)
    elif Path(name).is_dir():
        source = Path(name, split) if Path(name, split).is_dir() else Path(name)
        return Data(read_folder(source, folder, image_size or 256), name)
    else:
        raise ValueError(f"no data set is called {name!r}: {', '.join(NAMES)}, a .pt file or a "
                         "folder of images")
    sides = data.images.shape[2:]
    if image_size and tuple(sides) != (image_size, image_size):
        raise ValueError(f"the images of {name} are {sides[0]}×{sides[1]}, not {image_size}×"
                         f"{image_size}: leave out the image size")
    return data


# ------------------------------------------------------------------------------------ downloads

def _local(folder: Path, name: str, entry: tuple) -> Path:
    """The file of a data set: in folder/name, in the folder itself, or fetched to folder/name."""
    file, (address, size, checksum) = entry
    # MNIST and Fashion-MNIST share file names: a folder of one is not taken for the other.
    bare = name not in IDX or ("fashion" in folder.resolve().name.lower()) == ("fashion" in name)
    for path in (folder / name / file, folder / file)[:1 + bare]:
        if path.exists():
            return path
    return fetch(address, folder / name / file, size, checksum)


def fetch(address: str, path: Path, size: int | None = None, checksum: str | None = None) -> Path:
    """Download `address` to `path`, whole or not at all.

    It grows in a file beside it and is renamed once size (bytes) and checksum (MD5 or SHA-256 in
    hexadecimal) agree; without a size the server's Content-Length is the size. OSError names the
    address, the reason and the place where the file can be put by hand.
    """
    part = path.with_name(path.name + ".part")
    digest = hashlib.md5() if checksum and len(checksum) == 32 else hashlib.sha256()
    done, shown = 0, 0.0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(address, timeout=60) as answer, open(part, "wb") as file:
            length = answer.headers.get("Content-Length")
            size = size or (int(length) if length else None)
            while chunk := answer.read(1 << 18):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if time.monotonic() - shown > 0.5:
                    shown = time.monotonic()
                    of = f" of {size / 1e6:.1f} MB ({done / size:.0%})" if size else " MB"
                    print(f"\r{path.name}: {done / 1e6:.1f}{of} ", end="", file=sys.stderr)
        if size is not None and done != size:
            raise OSError(f"{done} bytes came in place of {size}")
        if checksum and digest.hexdigest() != checksum:
            raise OSError(f"its checksum is {digest.hexdigest()}, not {checksum}")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:  # urllib's URLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise OSError(f"cannot download {address} ({reason}); get the file by other means and put "
                      f"it at {path}") from error
    finally:
        part.unlink(missing_ok=True)
        if shown:
            print(file=sys.stderr)
    return path


# -------------------------------------------------------------------------------------- formats

def read_cifar10(path: Path, split: str = "train") -> Tensor:
    """The *binary* archive of CIFAR-10, read inside the .tar.gz: uint8 (N, 3, 32, 32).

    A record is a label byte (0 … 9) and 3,072 pixel bytes: red, green, blue, each by rows.
    ValueError if a file is missing, cut or has other labels.
    """
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    found: dict[str, Tensor] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = Path(member.name).name
                if name in names and member.isfile():
                    raw = archive.extractfile(member).read()
                    if not raw or len(raw) % 3073:
                        raise ValueError(f"{name} in {path} has {len(raw)} bytes, not a multiple "
                                         "of 3,073")
                    found[name] = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 3073)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to fetch it anew") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path} holds no {missing[0]}: it is not CIFAR-10's binary archive")
    records = torch.cat([found[name] for name in names])
    if records[:, 0].max() > 9:
        raise ValueError(f"{path} has a label above 9: it is not CIFAR-10's binary archive")
    return records[:, 1:].reshape(-1, 3, 32, 32)


def read_idx(path: Path) -> Tensor:
    """Gzipped IDX images: big-endian 2051, count, rows, columns, then the bytes → (N, 1, H, W)."""
    try:
        raw = gzip.decompress(Path(path).read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to fetch it anew") from error
    magic, n, rows, columns = (int.from_bytes(raw[i:i + 4], "big") for i in (0, 4, 8, 12))
    if magic != 2051:
        raise ValueError(f"{path} is no IDX file of images: it begins with {magic}, not 2051")
    if not n * rows * columns or len(raw) != 16 + n * rows * columns:
        raise ValueError(f"{path} announces {n} images of {rows}×{columns} but holds "
                         f"{max(0, len(raw) - 16)} bytes of pixels")
    return torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8).view(n, 1, rows, columns)


def read_tensor(path: Path) -> Tensor:
    """A tensor saved by `torch.save`: uint8 N×C×H×W, C = 1 or 3. ValueError on anything else."""
    try:
        images = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load meets a damaged file in a dozen ways
        raise ValueError(f"{path} is no tensor file of torch.save: {first_line(error)}") from error
    if not isinstance(images, Tensor):
        raise ValueError(f"{path} holds a {type(images).__name__}, not a tensor of images")
    shape = "×".join(map(str, images.shape))
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"{path} holds {images.dtype} {shape}; images are torch.uint8 N×C×H×W "
                         "with C = 1 or 3")
    if not images.numel():
        raise ValueError(f"{path} holds no images: {shape}")
    return images


def read_folder(source: Path, cache: Path, size: int) -> Tensor:
    """A folder of pictures, the middle square of each resized to `size`: uint8 (N, 3, size, size).

    Decoded once (Pillow) into one file in `cache`, which is mapped, not read, so that a set larger
    than memory works. The file's name is a hash of what the folder holds: a change decodes anew.
    """
    files = sorted(f for f in source.rglob("*") if f.suffix.lower() in PICTURES and f.is_file())
    if not files:
        raise ValueError(f"{source} holds no pictures ({' '.join(sorted(PICTURES))})")
    listing = repr([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    key = hashlib.sha256(f"{size} {listing}".encode()).hexdigest()[:16]
    path = cache / f"{source.resolve().name}-{size}-{key}.u8"
    n = len(files) * 3 * size * size
    if not path.exists():
        try:
            from PIL import Image, ImageOps
        except ImportError as error:
            raise ValueError("a folder of images needs Pillow: pip install pillow") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        try:
            with open(part, "wb") as out:
                for i, file in enumerate(files, 1):
                    try:
                        with Image.open(file) as picture:
                            square = ImageOps.fit(picture.convert("RGB"), (size, size),
                                                  Image.Resampling.LANCZOS)
                    except Exception as error:  # Pillow meets a damaged picture in many ways
                        reason = first_line(error)
                        raise ValueError(f"{file} cannot be decoded: {reason}") from error
                    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
                    chw = pixels.view(size, size, 3).permute(2, 0, 1).contiguous()
                    out.write(raw_bytes(chw))
                    if i % 500 == 0 or i == len(files):
                        print(f"\rdecoding {source}: {i} of {len(files)} ", end="", file=sys.stderr)
            print(file=sys.stderr)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    if path.stat().st_size != n:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, not {n}: delete it")
    return torch.from_file(str(path), size=n, dtype=torch.uint8).view(-1, 3, size, size)


def raw_bytes(x: Tensor) -> bytes:
    """The bytes of a tensor as they lie in memory (without NumPy, which torch does not need)."""
    x = x.cpu().contiguous()
    return ctypes.string_at(x.data_ptr(), x.nbytes)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --------------------------------------------------------------------------------------- shapes

def shapes(n: int, size: int = 32, split: str = "train") -> Tensor:
    """A data set made here: a disc, square, triangle or ring on a shaded ground, uint8 (n, 3, …).

    The same n, size and split are the same images, always.
    """
    g = torch.Generator().manual_seed({"train": 1, "test": 2}[split])

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    # Colours: hue → RGB, vivid for the shape, pale for the two ends of the ground.
    hue, saturation = uniform(0, 6, 3, 1), torch.tensor([[0.85], [0.35], [0.35]])
    value = torch.cat([uniform(0.75, 1, 1, 1), uniform(0.35, 0.9, 2, 1)], dim=1)
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue) % 6
    colour = value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1))       # (n, 3, RGB)

    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")                               # (size, size)
    tilt = uniform(0, 2 * math.pi, 1, 1)
    shade = ((x * tilt.cos() + y * tilt.sin()) / 2.4 + 0.5).clamp(0, 1)[:, None]    # (n, 1, …)

    radius = uniform(0.35, 0.6, 1, 1)
    x = x - uniform(-1, 1, 1, 1) * (0.95 - radius)
    y = y - uniform(-1, 1, 1, 1) * (0.95 - radius)
    turn = uniform(0, 2 * math.pi, 1, 1)
    u, v = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()

    # Signed distances to the outlines, negative inside.
    disc = (u ** 2 + v ** 2).sqrt() - radius
    square = torch.maximum(u.abs(), v.abs()) - 0.8 * radius
    triangle = torch.maximum(torch.maximum(0.866 * u + 0.5 * v, -0.866 * u + 0.5 * v), -v)
    outlines = torch.stack([disc, square, triangle - 0.5 * radius,
                            (disc + 0.2 * radius).abs() - 0.2 * radius])            # (4, n, …)
    kind = torch.randint(4, (n,), generator=g)
    cover = (0.5 - outlines[kind, torch.arange(n)] * size / 2).clamp(0, 1)[:, None]

    shape, near, far = (colour[:, i, :, None, None] for i in range(3))
    ground = near * (1 - shade) + far * shade
    return to_uint8((ground * (1 - cover) + shape * cover) * 2 - 1)
