"""Images as 8-bit tensors: the paper's data sets, your own images, and writing pictures.

    images, about = load("cifar10")    # uint8 (50000, 3, 32, 32), "train split"
    x0 = to_model(images[:128])        # float32 in [−1, 1]
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import gzip
import hashlib
import io
import math
import mmap
import os
import struct
import tarfile
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from support.command import UsageError, one_line, reading, say, written

FILES = {  # name → base address; file and SHA-256 of the training and of the test images
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
VAL = ("val", "valid", "validation")
SPLITS = {"train": ("train",), "test": ("test", *VAL), "val": VAL}  # the first subfolder
LIKE_SPLITS = ("training", "testing", "eval", "evaluation", "dev")  # are none
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "GIF", "TIFF", "AVIF", "HEIF")
COPIES = ("__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "lost+found",
          "System Volume Information")  # made by the system, skipped like hidden folders

def to_model(images: Tensor) -> Tensor:
    """{0 … 255} → [−1, 1], linearly: uint8 in, float32 out.   [DDPM §3.3]"""
    return images.float() / 127.5 - 1

def to_uint8(x: Tensor) -> Tensor:
    """[−1, 1] → {0 … 255}, the inverse of `to_model`: clamps, scales and rounds.

    ValueError if x is not finite: NaN would become black.
    """
    if not x.isfinite().all():
        raise ValueError("the images are not finite: the network overflows (try --precision fp32)")
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

def shape(name: str, image_size: int | None = None) -> tuple[int, int, int]:
    """C, H, W of the images that `load` returns, before anything is downloaded or decoded."""
    if name in FILES:
        return 3 if name == "cifar10" else 1, 32, 32
    if name.endswith(".pt"):
        return tuple(read_tensor(Path(name)).shape[1:])
    if name != "shapes" and not Path(name).is_dir():
        raise UsageError(f"no data set and no folder is called {name!r}: --dataset takes "
                         f"{', '.join(NAMES)}, a .pt file or a folder of pictures")
    side = image_size or (16 if name == "shapes" else 256)
    return 3, side, side

def load(name: str, data_dir: str | Path = "data", split: str = "train",
         image_size: int | None = None, skip_bad: bool = False,
         exact: bool = False) -> tuple[Tensor, str]:
    """The images of `name`: one of NAMES, a .pt file with a uint8 tensor, or a folder of pictures.

    Returns them, uint8 N×C×H×W, C = 1 or 3, in memory or mapped from disk, and what they are, in
    words. split: one of SPLITS. A .pt file has no splits; a folder has them if it has subfolders
    train/ and test/ or val/, in upper or lower case (train/ alone may be a class). image_size: side
    of the images of a folder (default: 256) and of shapes (16). skip_bad: skip the pictures of a
    folder that cannot be read. exact: refuse data without splits. ValueError for invalid data,
    OSError if they cannot be obtained.
    """
    about, side = f"{split} split", shape(name, image_size)[1]
    if name in NAMES and split == "val":
        raise ValueError(f"{name} has no val split: choose train or test")
    if name == "shapes":
        return shapes(8192 if split == "train" else 1024, side, split), about
    if name in FILES:
        address, files = FILES[name]
        file, sha256 = files[split == "test"]
        path, own = Path(data_dir, file), Path(data_dir, name, file)
        # MNIST and Fashion-MNIST share file names: never take a folder of one for the other.
        other = name != "cifar10" and ("fashion" in path.resolve().parent.name.lower()) != (
            name == "fashion_mnist")
        if own.exists() or other or not path.exists():
            path = fetch(address + file, own, sha256)
        if name == "cifar10":
            return read_cifar10(path, split), about
        return F.pad(read_idx(path), (2, 2, 2, 2)), f"{about}, padded from 28×28 to 32×32"
    folder, about = Path(name), "all pictures"
    parts = subfolders(folder)
    splits = "train" in parts and parts.keys() & SPLITS["test"]
    if exact and not splits:
        raise UsageError(f"--split {split}: {name} has no splits")
    if not folder.is_dir():
        x = read_tensor(folder)
        if x[:1000].max() <= 1:
            say(f"warning: {name} is black: its values are at most 1, of 255")
        return x, "which has no splits"
    if not splits and (others := sorted(parts.keys() & {*SPLITS["test"], *LIKE_SPLITS})):
        say(f"warning: {name} has no train/ beside test/ or val/: all its pictures are used, those "
            f"in {others[0]}/, too")
    if splits:
        beside = sum(file.suffix.lower() in picture_endings() for file in folder.iterdir())
        folder = next((parts[part] for part in SPLITS[split] if part in parts), None)
        if folder is None:
            raise ValueError(f"{name} has no {split}/: choose another --split")
        about = f"{folder.name} split" + f", without {beside} pictures beside it" * (beside > 0)
    return (read_folder(folder, Path(data_dir), side, skip_bad),
            f"{about}, centre-cropped, in RGB")

def subfolders(folder: Path) -> dict[str, Path]:
    """Its subfolders by their names in lower case; of a file none. ValueError for a split twice."""
    found = [part for part in folder.iterdir() if part.is_dir()] if folder.is_dir() else []
    parts = {part.name.lower(): part for part in found}
    for part in found:
        if part not in parts.values() and part.name.lower() in ("train", *SPLITS["test"]):
            raise ValueError(f"{folder} has {part.name}/ in upper and in lower case: rename one")
    return parts

def fetch(address: str, path: Path, sha256: str | None = None) -> Path:
    """Downloads `address` to `path`, unless it exists. OSError says where to put it by hand."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        say(f"downloading {address}")
        try:
            torch.hub.download_url_to_file(address, str(path), sha256)
        except Exception as error:  # of the network, or RuntimeError for a wrong SHA-256
            raise OSError(f"cannot download {address} ({one_line(error)}); download the file "
                          f"yourself and put it at {path}") from error
    return path

@functools.lru_cache(maxsize=1)  # it can take minutes for a folder, and is needed twice
def fingerprint(images: Tensor) -> str:
    """A hash of the pixels and the shape."""
    found = hashlib.blake2b(digest_size=32)
    for part in images.split(-(-2 ** 22 // images[0].numel())):  # never copies all of them
        found.update(raw_bytes(part))
    found.update(f"{tuple(images.shape)}".encode())
    return found.hexdigest()

def raw_bytes(x: Tensor) -> bytes:
    """The bytes of a tensor as they lie in memory, without NumPy."""
    x = x.cpu().contiguous()
    return ctypes.string_at(x.data_ptr(), x.nbytes)

def read_cifar10(path: Path, split: str = "train") -> Tensor:
    """The *binary* archive of CIFAR-10, read inside the .tar.gz: uint8 (N, 3, 32, 32).

    A record is a label byte (0 … 9) and 3,072 bytes of pixels: red, green, blue, each by rows.
    """
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    with reading(path, "CIFAR-10's binary archive"):
        content = gzip.open(path).read(2 ** 28)  # to the end, which verifies its checksum
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
        with open(path, "rb") as file:
            if (start := file.read(4)) != b"PK\3\4":
                raise ValueError(f"it begins with {start}: it is not in torch.save's format")
        try:
            x = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except UnicodeEncodeError as error:
            raise ValueError("its name is not UTF-8: rename it") from error
        except Exception as error:  # whose text gives advice on unsafe loading
            raise ValueError("it is cut off, or holds more than tensors") from error
        if not isinstance(x, Tensor):
            keys = f" of {', '.join(map(str, x))}" if isinstance(x, dict) else ""
            raise ValueError(f"it holds a {type(x).__name__}{keys}")
        if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1] not in (1, 3) or not x.numel():
            raise ValueError(f"it holds {x.dtype} {tuple(x.shape)}")
        if 0 in x.stride():
            raise ValueError("its images are all the same one")
        raw_bytes(x[:1])  # an error if there are no pixels, as in a sparse tensor
    return x

def picture_endings() -> set[str]:
    """The suffixes of the pictures that Pillow reads, in lower case."""
    return {end for end, kind in pillow()[0].registered_extensions().items() if kind in FORMATS}

def listing(source: Path) -> tuple[list[Path], Counter]:
    """The pictures in a folder and its subfolders, sorted; and the skipped files, counted by kind.

    Follows links, and reads no folder twice. OSError for a folder that cannot be read.
    """
    def fail(error: OSError):
        raise error
    endings, files, out, seen = picture_endings(), [], Counter(), set()
    for folder, folders, names in os.walk(source, onerror=fail, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:
            folders[:], names = [], []
            out["linked twice"] += 1
        seen.add(place)
        hidden = {name for name in (*folders, *names) if name[0] == "." or name in COPIES}
        folders[:] = sorted({*folders} - hidden)
        out["hidden"] += len(hidden)
        for file in (Path(folder, name) for name in {*names} - hidden):
            if (end := file.suffix.lower()) in endings and file.is_file():
                files.append(file)
            else:  # a broken link, or a pipe, may have the suffix of a picture
                out["not a regular file" if end in endings else end or "without a suffix"] += 1
    return sorted(files), +out

def read_samples(path: Path, cache: str | Path, skip_bad: bool = False) -> Tensor:
    """Existing samples: a .pt file, or a folder of square pictures of one size.

    ValueError for other sizes: resized, a grid among the samples would be scored like one.
    """
    if not path.is_dir():
        return read_tensor(path)
    sizes, files = {}, listing(path)[0]
    names = [f"{i:06d}.png" for i in range(len(files))]  # as sample.py draws them
    if (path / "samples.json").exists() and [str(f.relative_to(path)) for f in files] != names:
        raise ValueError(f"{path} holds other pictures than samples 000000.png, 000001.png, … in "
                         "turn: one is missing, or was added")
    for file in files:
        with contextlib.suppress(ValueError):  # `read_folder` reports or skips it
            with reading(file, "a picture"), opened(file) as picture:
                sizes.setdefault(picture.size, file)
    if len(sizes) != 1 or len({*[*sizes][0]}) != 1:
        found = ", ".join(f"{file.name} {w}×{h}" for (w, h), file in [*sizes.items()][:3])
        raise ValueError(f"{path}: samples are squares of one size, not {found or 'no pictures'}")
    return read_folder(path, Path(cache), [*sizes][0][0], skip_bad)

def opened(file: Path):
    """The picture, by a format of FORMATS that this Pillow has."""
    Image, _ = pillow()
    return Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])

def read_folder(source: Path, cache: Path, size: int, skip_bad: bool = False) -> Tensor:
    """A folder of pictures, centre-cropped and resized: uint8 (N, 3, size, size).

    Pillow decodes them once into a file in `cache`, which is memory-mapped, so the data may exceed
    memory. Its name has a hash of the folder's listing: after a change all is decoded again.
    The file ends with the fingerprint of the images.
    """
    files, out = listing(source)
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in out.most_common(20)) or "nothing"
    text = f"{source}: {len(files):,} pictures; skipped: {kinds}"
    if out[".heic"] and ".heic" not in picture_endings():
        text += " (pip install pillow-heif reads .heic)"
    if not files:
        raise ValueError(text)
    stats = [(file.resolve(), file.stat()) for file in files]
    known = repr([(str(p), x.st_size, x.st_mtime_ns, x.st_ctime_ns) for p, x in stats])
    key = hashlib.sha256(f"{size} {skip_bad} {known}".encode()).hexdigest()[:16]
    path = cache / f"{source.resolve().name[:40]}-{size}-{key}.u8"
    if not path.exists():
        say(text)
        notes, found = Counter(), hashlib.blake2b(digest_size=32)
        with written(path) as target:
            for i, file in enumerate(files, 1):
                try:
                    raw = raw_bytes(decode(file, size, notes))
                    found.update(raw)
                    target.write(raw)
                except ValueError as error:
                    say(one_line(bad := error))
                    notes["cannot be read"] += 1
                if i % 500 == 0 or i == len(files):
                    say(f"decoding {source}: {i} of {len(files)}")
            n = len(files) - notes["cannot be read"]
            if n < len(files) and not (n and skip_bad):
                raise ValueError(f"{len(files) - n} of {len(files)} pictures cannot be read "
                                 f"(train.py and evaluate.py skip them with --skip-bad): {bad}")
            found.update(f"{(n, 3, size, size)}".encode())
            target.write(found.hexdigest().encode())
        for what, n in notes.items():
            say(f"{n:,} of them {what}")
    with reading(path, "decoded pictures: delete it"), open(path, "rb") as file:
        raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        x = torch.frombuffer(raw, dtype=torch.uint8)[:-64].view(-1, 3, size, size)
        if fingerprint(x).encode() != raw[-64:]:
            raise ValueError("it is damaged")
    return x

def pillow():
    """Pillow's Image and ImageOps, set to refuse a picture of more than 89 million pixels."""
    import PIL
    from PIL import Image, ImageOps, PngImagePlugin
    if tuple(map(int, PIL.__version__.split(".")[:2])) < (10, 1):
        raise ValueError(f"Pillow {PIL.__version__} is too old: pip install 'pillow>=10.1'")
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif
        pillow_heif.register_heif_opener()
    PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26  # accept a picture with a long text
    warnings.filterwarnings("ignore", module="PIL")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    return Image, ImageOps

def decode(file: Path, size: int, notes: Counter) -> Tensor:
    """A picture as it is meant to be seen, centre-cropped and resized: uint8 (3, size, size).

    Applies the EXIF rotation, scales grey of up to 16 bits to 8, puts transparent pixels on white
    and converts colour profiles to sRGB. notes: counts oddities.
    """
    Image, ImageOps = pillow()
    with reading(file, "a picture"), opened(file) as original:
        original.load()
        picture, tags = original, getattr(original, "tag_v2", {})  # of TIFF
        if isinstance(original.info.get("transparency"), int) and picture.mode != "P" and (
                original.format == "PNG" and file.read_bytes()[24] != 8):
            raise ValueError("grey with a transparent level is read with 8 bits alone")
        if tags.get(284) == 2 and 16 in tags.get(258, ()) or 2 in tags.get(339, ()):
            raise ValueError("16 bits in planes and signed numbers are not supported")
        with contextlib.suppress(Exception):  # ignore invalid metadata
            ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode[:4] == "I;16" or picture.mode == "I" and original.format in ("PNG", "PPM"):
            scale = 255 / (2 ** tags.get(258, [16])[0] - 1)  # BitsPerSample
            picture = picture.convert("I").point(lambda level: level * scale + 0.5).convert("L")
            if tags.get(262) == 0:  # PhotometricInterpretation: white is zero
                picture = ImageOps.invert(picture)
        if picture.mode in ("I", "F"):
            raise ValueError("32-bit grey has no known range")
        mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(picture.mode, "RGB")
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        if min(picture.size) < size:
            notes[f"are smaller than {size}×{size}, and enlarged"] += 1
        picture = ImageOps.fit(picture.convert(mode), (size, size), Image.Resampling.LANCZOS)
        if profile := original.info.get("icc_profile"):
            try:
                from PIL import ImageCms
                ends = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
                picture = ImageCms.profileToProfile(picture, *ends, outputMode="RGB")
            except Exception:
                notes["have an unusable colour profile"] += 1
        with contextlib.suppress(Exception):  # of the second frame
            if original.format != "MPO" and original.is_animated:
                notes["have several frames: the first is used"] += 1
        return pixels(picture.convert("RGB"))

def pixels(picture) -> Tensor:
    """The pixels of a Pillow image in mode L or RGB: uint8 (1 or 3, H, W)."""
    raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return raw.view(*picture.size[::-1], -1).permute(2, 0, 1)

def png(image: Tensor) -> bytes:
    """uint8 (1 or 3, H, W) as an 8-bit PNG, each row as its difference from the one above."""
    c, height, width = image.shape
    x = image.permute(1, 2, 0).reshape(height, c * width).int()
    lines = F.pad(x.diff(dim=0, prepend=0 * x[:1]) % 256, (1, 0), value=2)  # 2: this filter
    header = struct.pack(">IIBBBBB", width, height, 8, c - 1, 0, 0, 0)
    body = zlib.compress(raw_bytes(lines.to(torch.uint8)), 9)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body)
            + chunk(b"IEND", b""))

def chunk(kind: bytes, body: bytes) -> bytes:
    """A part of a PNG: its length, kind and checksum around it."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

def is_png(path: Path, shape: tuple[int, int, int]) -> bool:
    """Whether the file is, by its checksums, a PNG that `png` wrote for an image of this shape."""
    content = path.read_bytes() if path.is_file() else b""
    whole = png(torch.zeros(shape, dtype=torch.uint8))
    return content == whole[:33] + chunk(b"IDAT", content[41:-16]) + whole[-12:]

def tiled(images: Tensor, columns: int | None = None) -> Tensor:
    """uint8 (N, C, H, W) → one picture (C, …) with `columns` per row (default: about square); each
    pixel is repeated so that the picture is at least about 480 pixels wide."""
    n, c, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows, k = math.ceil(n / columns), max(1, round(480 / (columns * width)))
    cells = F.pad(images, (0, 0, 0, 0, 0, 0, 0, rows * columns - n))
    cells = cells.view(rows, columns, c, height, width).permute(2, 0, 3, 1, 4)
    picture = cells.reshape(c, rows * height, columns * width)
    return picture.repeat_interleave(k, 1).repeat_interleave(k, 2)

def plot(path: Path, draw: Callable) -> bool:
    """Writes draw(axes) as a PNG; an error is only printed. Returns whether matplotlib exists."""
    try:
        from matplotlib.figure import Figure
        figure = Figure(figsize=(7, 4), layout="constrained")
        draw(figure.add_subplot())
        figure.axes[0].grid(alpha=0.3)
        with written(path) as file:
            figure.savefig(file, dpi=120, format="png")
    except ImportError:
        return False
    except Exception as error:
        say(f"cannot draw {path}: {one_line(error)}")
    return True

def shapes(n: int, size: int = 16, split: str = "train") -> Tensor:
    """A synthetic data set: a disc, square, triangle or ring on black: uint8 (n, 3, size, size).

    Hue and position are random, but a function of n, size and split.
    """
    g = torch.Generator().manual_seed({"train": 1, "test": 2}[split])
    hue, x, y = torch.rand(3, n, generator=g)
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6          # hue → red, green, blue
    colour = 1 - 0.8 * torch.minimum(k, 4 - k).clamp(0, 1)              # (n, 3), saturation 0.8
    kind = torch.randint(4, (n,), generator=g)
    parts = []
    for i in torch.arange(n).split(256):  # all at once would take gigabytes
        cover = covers(0.4 * x[i] - 0.2, 0.4 * y[i] - 0.2, torch.full_like(x[i], 0.65), size)
        cover = cover[kind[i], torch.arange(len(i)), None]
        parts.append(to_uint8(2 * colour[i, :, None, None] * cover - 1))
    return torch.cat(parts)

def covers(x: Tensor, y: Tensor, radius: Tensor, size: int) -> Tensor:
    """Coverage of each pixel by a disc, square, triangle, ring: (4, n, size, size) in [0, 1].

    x, y, radius: (n,), where the image has side 2 and centre 0.
    """
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    u, v, r = axis - x[:, None, None], axis[:, None] - y[:, None, None], radius[:, None, None]
    disc = (u ** 2 + v ** 2).sqrt() - r                      # distances to the outlines, < 0 inside
    square = torch.maximum(u.abs(), v.abs()) - 0.85 * r
    triangle = torch.maximum(0.866 * u.abs() - 0.5 * v, v) - 0.55 * r
    ring = (disc + 0.25 * r).abs() - 0.25 * r
    return (0.5 - torch.stack([disc, square, triangle, ring]) * size / 2).clamp(0, 1)
