"""Images as 8-bit tensors: the data sets of the paper, and images of one's own.

    data = load("cifar10")             # .images: uint8 (50000, 3, 32, 32)
    x0 = to_model(data.images[:128])   # float32 in [−1, 1]

The structure of every file is checked when it is read, and a download is checked before it is kept.
"""
from __future__ import annotations

import contextlib
import ctypes
import gzip
import hashlib
import http.client
import io
import os
import struct
import sys
import tarfile
import time
import urllib.request
import zlib
from pathlib import Path
from typing import BinaryIO, Callable, Iterator, NamedTuple

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
    """A data set in memory, or mapped from disk: uint8 N×C×H×W with C = 1 or 3."""
    images: Tensor
    split: str              # "train" or "test"; "" if these data have no such parts
    padded: bool = False    # whether a border was added (to digits and clothes of 28×28)

def to_model(images: Tensor) -> Tensor:
    """{0 … 255} → [−1, 1], linearly: uint8 in, float32 out.   [DDPM §3.3]"""
    return images.float() / 127.5 - 1

def to_uint8(x: Tensor) -> Tensor:
    """[−1, 1] → {0 … 255}, the inverse of `to_model`: clamped, scaled and rounded."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

def load(name: str, data_dir: str | Path = "data", split: str = "train",
         image_size: int | None = None) -> Data:
    """The images of `name`: one of NAMES, a .pt file with a uint8 tensor, or a folder of pictures.

    split: "train" or "test", the part of the data to take. A .pt file has no such parts, and a
    folder only if it has subfolders with these names. image_size: side of the images of a folder
    (256 unless given) and of shapes (16); the other data have a size of their own. ValueError if
    the data are not what they should be, OSError if they cannot be had.
    """
    folder = Path(data_dir)
    if name == "shapes":
        if image_size and image_size > 512:
            raise ValueError(f"shapes of {image_size}×{image_size} pixels need tens of GiB of "
                             "memory: at most 512")
        return Data(shapes(8192 if split == "train" else 1024, image_size or 16, split), split)
    if name == "cifar10":
        data = Data(read_cifar10(_local(folder, name, *CIFAR10.items()), split), split)
    elif name in IDX:
        address, files = IDX[name]
        file = next(f for f in files if f.startswith("train" if split == "train" else "t10k"))
        images = read_idx(_local(folder, name, (file, (address + file, *files[file]))))
        pad = [max(0, 32 - side) for side in images.shape[2:]]
        data = Data(F.pad(images, (pad[1] // 2, pad[1] - pad[1] // 2,
                                   pad[0] // 2, pad[0] - pad[0] // 2)), split, any(pad))
    elif name.endswith(".pt"):
        data = Data(read_tensor(Path(name)), "")
    elif Path(name).is_dir():
        parts = [part for part in ("train", "test") if Path(name, part).is_dir()]
        if parts and split not in parts:
            raise ValueError(f"{name} has a folder {parts[0]}/, but none called {split}/")
        source, split = (Path(name, split), split) if parts else (Path(name), "")
        return Data(read_folder(source, folder, image_size or 256), split)
    else:
        raise ValueError(f"no data set is called {name!r}: choose {', '.join(NAMES)}, a .pt file "
                         "or a folder of pictures")
    sides = data.images.shape[2:]
    if image_size and tuple(sides) != (image_size, image_size):
        raise ValueError(f"the images of {name} are {sides[0]}×{sides[1]}, not {image_size}×"
                         f"{image_size}: leave out --image-size")
    return data

# === Files ========================================================================================

@contextlib.contextmanager
def written(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` when the block ends without an error.

    Until then it has a name of this process's own, and after an error nothing of it is left. It is
    on the disk before it gets its name, so that a power cut cannot leave a file with holes. keep:
    the name that the file before it gets.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with naming(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep and path.exists():
                rename_to(path, keep)
            os.replace(part, path)
            if os.name == "posix":  # the folder's entry, too
                folder = os.open(path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
        finally:
            with contextlib.suppress(OSError):  # the first error is the one to report
                part.unlink(missing_ok=True)

@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of writing in this block becomes an OSError that names `path`."""
    try:
        yield
    except OSError as error:
        if str(error).startswith("cannot "):
            raise
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    except RuntimeError as error:  # torch.save, when the disk is full
        if "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error):
            raise OSError(f"cannot write {path}: the disk may be full") from error
        raise

def rename_to(path: Path, keep: Path) -> None:
    """Gives the file a second name, so that it never is without the first; or another one."""
    link = keep.with_name(f"{keep.name}.{os.getpid()}.part")
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        link = path
    os.replace(link, keep)

def check_writable(path: Path) -> None:
    """OSError if `path` cannot be written: now, and not after hours of work."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    probe = path.with_name(f"{path.name}.{os.getpid()}.test")
    try:
        with written(probe):
            pass
    except OSError as error:
        raise OSError(str(error).replace(probe.name, path.name)) from error
    probe.unlink()

def say(text: str, end: str = "\n") -> None:
    """Prints on stderr. If nobody can read that any more, the work goes on."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr, flush=True)

def fingerprint(images: Tensor, shape: tuple) -> str:
    """`shape`, and a hash of all bytes of the images."""
    digest = hashlib.sha256()
    for part in images.split(max(1, 2 ** 26 // images[0].numel())):  # some 64 MB at a time
        digest.update(raw_bytes(part))
    return f"{shape} {digest.hexdigest()}"

def raw_bytes(x: Tensor) -> bytes:
    """The bytes of a tensor as they lie in memory, without the help of NumPy."""
    x = x.cpu().contiguous()
    return ctypes.string_at(x.data_ptr(), x.nbytes)

def first_line(error: BaseException) -> str:
    """The first line of an error's text, printable and short, or the name of its class."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "".join(c if c.isprintable() else "?" for c in line)[:280]

def _local(folder: Path, name: str, entry: tuple) -> Path:
    """The file of a data set: in folder/name, in the folder itself, or fetched to folder/name."""
    file, (address, size, checksum) = entry
    # MNIST and Fashion-MNIST share file names: a folder of one is not taken for the other.
    bare = name not in IDX or ("fashion" in folder.resolve().name.lower()) == ("fashion" in name)
    for path in [folder / name / file] + [folder / file] * bare:
        if path.exists():
            return path
    return fetch(address, folder / name / file, size, checksum)

def fetch(address: str, path: Path, size: int | None = None, checksum: str | None = None,
          check: Callable[[Path], object] | None = None) -> Path:
    """Downloads `address` to `path`, which is written only if size and checksum agree.

    size: bytes, by default what the server announces, at most 4 GB; checksum: MD5 or SHA-256 in
    hexadecimal; check: raises an error if the file, still under another name, is not what it must
    be. OSError names the address, the reason and the place where the file can be put by hand.
    """
    digest = hashlib.md5() if checksum and len(checksum) == 32 else hashlib.sha256()
    done, shown, started = 0, 0.0, time.monotonic()
    opener = urllib.request.OpenerDirector()  # of http and https alone: no file:, no ftp:
    for handler in ("Proxy", "Unknown", "HTTP", "HTTPS", "HTTPDefaultError", "HTTPRedirect"):
        opener.add_handler(getattr(urllib.request, handler + "Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    try:
        with opener.open(address, timeout=60) as answer, written(path) as file:
            length = answer.headers.get("Content-Length") or ""
            size = size or (int(length) if length.isdecimal() else None)
            while chunk := answer.read1(1 << 18):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                now = time.monotonic()
                if done > (size or 4e9):
                    raise OSError(f"more than {size or 4e9:.0f} bytes came")
                if now - started > 60 and done < 5000 * (now - started):
                    raise OSError("it is slower than 5 kB/s")
                if now - shown > 0.5:
                    shown = now
                    of = f" of {size / 1e6:.1f} MB ({done / size:.0%})" if size else " MB"
                    say(f"\r{path.name}: {done / 1e6:.1f}{of} ", end="")
            if size is not None and done != size:
                raise OSError(f"{done} bytes came in place of {size}")
            if checksum and digest.hexdigest() != checksum:
                raise OSError(f"its checksum is {digest.hexdigest()}, not {checksum}")
            file.flush()
            if check:
                check(Path(file.name))
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise OSError(f"cannot download {address} ({reason}); get the file by other means and put "
                      f"it at {path}") from error
    finally:
        if shown:
            say("")
    return path

# === Formats ======================================================================================

def size_of(path: Path) -> int:
    """Bytes in a file. ValueError if it is a folder, a pipe or a device, which may never end."""
    if not path.is_file():
        raise ValueError(f"{path} is no file" if path.exists() else f"there is no file {path}")
    return path.stat().st_size

def gunzip(path: Path, limit: int) -> bytes:
    """The content of a gzip file, its checksum verified. ValueError beyond `limit` bytes."""
    size_of(path)
    try:
        with gzip.open(path) as file:
            raw = file.read(limit + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to fetch it anew") from error
    if len(raw) > limit:
        raise ValueError(f"{path} unpacks to more than {limit:,} bytes: it is another file")
    return raw

def read_cifar10(path: Path, split: str = "train") -> Tensor:
    """The *binary* archive of CIFAR-10, read inside the .tar.gz: uint8 (N, 3, 32, 32).

    A record is a label byte (0 … 9) and 3,072 bytes of pixels: red, green, blue, each by rows.
    ValueError if a file is missing, cut or has other labels.
    """
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    found: dict[str, Tensor] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(gunzip(path, 200_000_000))) as archive:
            for member in archive:
                name = Path(member.name).name
                if name in names and member.isreg() and member.size and not member.size % 3073:
                    raw = bytearray(archive.extractfile(member).read())
                    found[name] = torch.frombuffer(raw, dtype=torch.uint8).view(-1, 3073)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to fetch it anew") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path} holds no whole {missing[0]}: it is not CIFAR-10's binary archive")
    records = torch.cat([found[name] for name in names])
    if records[:, 0].max() > 9:
        raise ValueError(f"{path} has a label above 9: it is not CIFAR-10's binary archive")
    return records[:, 1:].reshape(-1, 3, 32, 32)

def read_idx(path: Path) -> Tensor:
    """Gzipped IDX images: big-endian 2051, count, rows, columns, then the bytes → (N, 1, H, W)."""
    raw = gunzip(path, 16 + 60_000 * 28 * 28)
    magic, n, rows, columns = (int.from_bytes(raw[i:i + 4], "big") for i in (0, 4, 8, 12))
    if magic != 2051:
        raise ValueError(f"{path} is no IDX file of images: it begins with {magic}, not 2051")
    if not n * rows * columns or len(raw) != 16 + n * rows * columns:
        raise ValueError(f"{path} announces {n} images of {rows}×{columns} but holds "
                         f"{max(0, len(raw) - 16)} bytes of pixels")
    return torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8).view(n, 1, rows, columns)

def read_tensor(path: Path) -> Tensor:
    """A tensor saved by `torch.save`: uint8 N×C×H×W, C = 1 or 3. ValueError on anything else."""
    size_of(path)
    try:
        images = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises many kinds of error for a damaged file
        raise ValueError(f"{path} is no tensor file of torch.save: {first_line(error)}") from error
    if not isinstance(images, Tensor):
        raise ValueError(f"{path} holds a {type(images).__name__}, not a tensor of images")
    shape = "×".join(map(str, images.shape))
    if (images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3)
            or images.is_meta):
        raise ValueError(f"{path} holds {images.dtype} {shape}; images are torch.uint8 N×C×H×W "
                         "with C = 1 or 3")
    if not images.numel():
        raise ValueError(f"{path} holds no images: {shape}")
    return images

def png(image: Tensor) -> bytes:
    """uint8 (1 or 3, H, W) as an 8-bit PNG, grey or RGB: the smallest of six.

    A PNG filter predicts a byte from the one to its left, the one above or both. Each of the five
    filters is tried for all lines, and, as the specification advises, the one with the smallest
    differences for each line.
    """
    c, height, width = image.shape
    if image.dtype != torch.uint8 or c not in (1, 3) or not height * width:
        raise ValueError(f"a picture is uint8 (1 or 3, H, W), not {image.dtype} "
                         f"{tuple(image.shape)}")
    x = image.permute(1, 2, 0).reshape(height, -1).int()
    around = F.pad(x, (c, 0, 1, 0))
    left, above, corner = around[1:, :-c], around[:-1, c:], around[:-1, :-c]
    lines = torch.stack([x, x - left, x - above, x - (left + above) // 2,
                         x - paeth(left, above, corner)]) % 256
    best = torch.minimum(lines, 256 - lines).sum(2).argmin(0)
    parts = []
    for kind in [torch.full_like(best, i) for i in range(5)] + [best]:
        filtered = lines[kind, torch.arange(height)]
        rows = torch.cat([kind[:, None], filtered], 1).to(torch.uint8)
        parts.append(zlib.compress(raw_bytes(rows), 9))
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if c == 1 else 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", min(parts, key=len)), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + kind + body
        content += struct.pack(">I", zlib.crc32(kind + body))
    return content

def paeth(left: Tensor, above: Tensor, corner: Tensor) -> Tensor:
    """Of three neighbours the one that is nearest to left + above − corner (PNG's filter 4)."""
    guess = left + above - corner
    a, b, c = (guess - left).abs(), (guess - above).abs(), (guess - corner).abs()
    return torch.where((a <= b) & (a <= c), left, torch.where(b <= c, above, corner))

def read_png(path: Path) -> Tensor:
    """The pixels of an 8-bit PNG, grey or RGB, not interlaced: uint8 (1 or 3, H, W).

    ValueError for other pictures, which `png` does not write, and for a damaged file.
    """
    if size_of(path) > 2 ** 28:
        raise ValueError(f"{path} is larger than a picture may be here")
    content, chunks, at = path.read_bytes(), {}, 8
    while content.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" not in chunks:
        size, kind = int.from_bytes(content[at:at + 4], "big"), content[at + 4:at + 8]
        body, check = content[at + 8:at + 8 + size], content[at + 8 + size:at + 12 + size]
        if check != struct.pack(">I", zlib.crc32(kind + body)):
            raise ValueError(f"{path} is damaged")
        chunks[kind] = chunks.get(kind, b"") + body
        at += 12 + size
    header = chunks.get(b"IHDR", b"").ljust(13)
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", header[:13])
    if depth != 8 or colour not in (0, 2) or any(rest) or not 0 < width * height <= 2 ** 26:
        raise ValueError(f"{path} is no PNG with 8 bits, grey or RGB, not interlaced")
    c = 3 if colour else 1
    unpacker = zlib.decompressobj()
    try:
        raw = unpacker.decompress(chunks.get(b"IDAT", b""), height * (1 + c * width) + 1)
    except zlib.error as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if len(raw) != height * (1 + c * width) or max(raw[::1 + c * width]) > 4:
        raise ValueError(f"{path} is damaged")
    lines, above = [], bytes(c * width)
    for y in range(height):
        kind, *line = raw[y * (1 + c * width):(y + 1) * (1 + c * width)]
        for i in range(len(line)):  # each byte by those before it, so that no tensor helps
            a, b = line[i - c] if i >= c else 0, above[i]
            e = above[i - c] if i >= c else 0
            near = min((abs(b - e), 0, a), (abs(a - e), 1, b), (abs(a + b - 2 * e), 2, e))[2]
            line[i] = (line[i] + (0, a, b, (a + b) // 2, near)[kind]) % 256
        lines.append(bytes(line))
        above = lines[-1]
    pixels = torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8)
    return pixels.view(height, width, c).permute(2, 0, 1).contiguous()

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
    key = hashlib.sha256(f"2 {size} {listing}".encode()).hexdigest()[:16]
    path = cache / f"{source.resolve().name}-{size}-{key}.u8"
    n = len(files) * 3 * size * size
    if not path.exists():
        with written(path) as out:
            for i, file in enumerate(files, 1):
                out.write(raw_bytes(decode(file, size)))
                if i % 500 == 0 or i == len(files):
                    say(f"\rdecoding {source}: {i} of {len(files)} ", end="")
        say("")
    if path.stat().st_size != n:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, not {n}: delete it")
    return torch.from_file(str(path), size=n, dtype=torch.uint8).view(-1, 3, size, size)

def decode(file: Path, size: int) -> Tensor:
    """A picture as it is meant to be seen, its middle square resized: uint8 (3, size, size).

    It is turned as its EXIF data say, 16-bit grey is scaled to 8 bits, and what is transparent
    becomes white. ValueError if Pillow cannot read it, or if its numbers have no known range.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ValueError("a folder of pictures needs Pillow: pip install pillow") from error
    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I;16") or (picture.mode, opened.format) == ("I", "PNG"):
                picture = picture.convert("I").point(lambda level: level * (1 / 257) + 0.5)
                picture = picture.convert("L")
        if picture.mode in ("I", "F"):
            raise ValueError("grey of 32 bits has no known range")
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        square = ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except Exception as error:  # Pillow raises many kinds of error for a damaged picture
        raise ValueError(f"{file} cannot be decoded: {first_line(error)}") from error
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, 3).permute(2, 0, 1)

# === Shapes =======================================================================================

def shapes(n: int, size: int = 16, split: str = "train") -> Tensor:
    """A data set made here: one disc, square, triangle or ring on black: uint8 (n, 3, …).

    Its hue and its place are random. The same n, size and split are the same images, always.
    """
    g = torch.Generator().manual_seed({"train": 1, "test": 2}[split])
    hue, x, y = torch.rand(3, n, generator=g)
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6          # hue → red, green, blue
    colour = 1 - 0.8 * torch.minimum(k, 4 - k).clamp(0, 1)              # (n, 3), saturation 0.8
    kind = torch.randint(4, (n,), generator=g)
    cover = covers(0.4 * x - 0.2, 0.4 * y - 0.2, torch.full((n,), 0.65), size)
    return to_uint8(2 * colour[..., None, None] * cover[kind, torch.arange(n), None] - 1)

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
