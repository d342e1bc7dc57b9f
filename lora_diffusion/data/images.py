"""Pictures from untrusted files: checked, turned upright, freed of transparency, resized.

Every picture becomes sRGB with 8 bits per channel. It is resized with Pillow's Lanczos filter, which widens with the
factor when shrinking, so that fine lines are averaged and not skipped.
Only `to_pixels` loads torch: the web UI looks at pictures too.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageCms
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from lora_diffusion.data.buckets import Bucket, Fit, Size
from lora_diffusion.data.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

FILTER_VERSION = "lanczos-2"
"""Part of the latent cache's key: change it with anything here that changes a pixel."""

MAX_PIXELS = 89_478_485
"""Above this Pillow warns of a decompression bomb. As RGB such a picture takes 270 MB."""

MAX_FILE_BYTES = 512 * 2**20

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # no format that runs another program
_ORIENTATION_TAG = 0x0112
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = frozenset({b"eXIf", b"iTXt", b"tEXt", b"zTXt"})  # EXIF itself, and texts that hold EXIF or XMP
_UPRIGHT = {  # EXIF orientation -> what turns the stored picture upright (EXIF 2.3, table 4.6.4 A)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIGNATURES = (  # how files begin that are often named like a picture by mistake
    (b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull`"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<?xml", "an XML or SVG text"),
    (b"<svg", "an SVG drawing"),
    (b"{", "a JSON text"),
    (b"%pdf", "a PDF document"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"8bps", "a Photoshop document"),
    (b"\x1f\x8b", "a gzip archive"),
)


class ImageError(DataError):
    """A file is not a picture that can be trained on. The message says why, without the file's name."""


@dataclass(frozen=True)
class ImageHeader:
    """What a picture file says about itself.

    size: as seen by a viewer, that is after EXIF rotation. is_animated: it holds more pictures than the first.
    """

    size: Size
    format: str
    mode: str
    orientation: int
    is_animated: bool


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file. Raises ImageError for a pipe, a device, an empty, huge or unreadable file."""
    try:
        # Without O_NONBLOCK the open of a named pipe waits for a writer, for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise ImageError(f"{status.st_size:,} bytes; files above {MAX_FILE_BYTES:,} are not read")
            data = file.read()
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror or error})") from None
    if not data:
        raise ImageError("empty file (0 bytes)")
    return data


def read_header(data: bytes) -> ImageHeader:
    """Size and kind of a picture from its first bytes; no pixel is decoded. Raises ImageError."""
    with _opened(data) as image:
        return _header(image)


def check_image(data: bytes) -> ImageHeader:
    """Decode the picture once to see that it is whole. JPEGs are decoded at an eighth, which reads every byte too.

    Raises ImageError when the file is damaged, cut off, or holds pixels that have no meaning as a colour.
    """
    with _opened(data) as image:
        if image.format == "PNG":
            image.verify()  # the checksums, which decoding passes over; the image cannot be used afterwards
    with _opened(data) as image:
        header = _header(image)
        image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
        if image.mode == "I":
            _grey_from_16_bits(image)
        return header


def check_whole(data: bytes) -> ImageHeader:
    """Like `check_image`, but a PNG's pixels are not decoded: its checksums tell whether the file is as it was written.

    That is ten times faster, and the decoding that follows sooner or later finds what a program wrote wrongly. Of a
    PNG with texts behind its pixels all is decoded, as they may say how to turn the picture.
    """
    if not data.startswith(_PNG_START):
        return check_image(data)
    with _opened(data) as image:
        # PNG's own `getexif` decodes all pixels first, to get at what stands behind them: here, nothing does.
        header = _header(image, Image.Image.getexif)
    kinds = _png_chunk_kinds(data)
    return check_image(data) if _PNG_TEXTS & set(kinds[kinds.index(b"IDAT") :]) else header


def open_image(path: Path, background: Colour = WHITE, *, content: str | None = None) -> Image.Image:
    """The picture as RGB: upright, its transparent parts laid over `background`, its first frame if it is animated.

    content: sha256 (hex) that the file must have, since it was scanned. Raises ImageError.
    """
    data = read_bytes(path)
    if content is not None and hashlib.sha256(data).hexdigest() != content:
        raise ImageError("the file has changed since the data set was scanned")
    return decode_image(data, background)


def decode_image(data: bytes, background: Colour = WHITE) -> Image.Image:
    """Like `open_image`, from the bytes of a file."""
    with _opened(data) as image:
        header = _header(image)
        image.load()
        rgb = _to_rgb(image, background)
        is_upright = header.orientation == 1 or isinstance(image, TiffImageFile)  # Pillow turns a TIFF as it loads it
        return rgb if is_upright else rgb.transpose(_UPRIGHT[header.orientation])


def to_pixels(image: Image.Image, fit: Fit, bucket: Bucket) -> Tensor:
    """Resize and crop an RGB picture as `fit` says: (3, H, W) of `bucket`, float32 in [-1, 1]."""
    import torch

    # Only the part inside the bucket is computed: a 4000x4 picture never becomes 64000 px wide in memory.
    x_scale, y_scale = image.width / fit.resized.width, image.height / fit.resized.height
    left, top = fit.crop.left * x_scale, fit.crop.top * y_scale
    right = min(float(image.width), left + bucket.width * x_scale)
    bottom = min(float(image.height), top + bucket.height * y_scale)
    if image.size != tuple(bucket) or fit.resized != bucket:
        image = image.resize(bucket, Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(bucket.height, bucket.width, 3).permute(2, 0, 1)  # (H, W, 3) → (3, H, W)
    return pixels.to(torch.float32) / 127.5 - 1


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings about odd files; what matters of them is in our verdicts. Not for use in a thread."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The opened picture. Whatever Pillow raises on it, here or in the body, becomes an ImageError."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except (DataError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(_describe(data)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"more than {MAX_PIXELS:,} pixels (a decompression bomb?); shrink it first") from None
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise ImageError(f"damaged or cut off ({str(error) or type(error).__name__})") from None


def _png_chunk_kinds(data: bytes) -> list[bytes]:
    """The kinds of a PNG's chunks up to its end mark, all with the right checksum. Raises ImageError."""
    kinds: list[bytes] = []
    view, start = memoryview(data), len(_PNG_START)
    while b"IEND" not in kinds[-1:]:
        length = int.from_bytes(view[start : start + 4])
        end = start + 8 + length
        if end + 4 > len(data):
            raise ImageError("damaged or cut off (its end is missing)")
        kinds.append(data[start + 4 : start + 8])
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4]):
            raise ImageError(f"damaged or cut off (wrong checksum in chunk {kinds[-1]!r})")
        start = end + 4
    if b"IDAT" not in kinds:
        raise ImageError("damaged or cut off (it holds no pixels)")
    return kinds


def _header(
    image: Image.Image, getexif: Callable[[Image.Image], Image.Exif] = lambda image: image.getexif()
) -> ImageHeader:
    width, height = _stored_size(image)
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height} has more than {MAX_PIXELS:,} pixels (a decompression bomb?); shrink it")
    if image.mode == "F":
        raise ImageError("pixels are floating-point numbers without a fixed range; save it with 8 or 16 bits")
    orientation = _orientation(image, getexif)
    return ImageHeader(
        size=Size(height, width) if orientation >= 5 else Size(width, height),
        format=image.format or "",
        mode=image.mode,
        orientation=orientation,
        # A phone's MPO is a JPEG with a preview behind it, no animation.
        is_animated=image.format != "MPO" and bool(getattr(image, "is_animated", False)),
    )


def _stored_size(image: Image.Image) -> Size:
    """As the pixels lie in the file. Pillow turns the size of a TIFF when it is opened, unless its XMP asks for it."""
    if isinstance(image, TiffImageFile):
        return Size(image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH])
    return Size(*image.size)


def _orientation(image: Image.Image, getexif: Callable[[Image.Image], Image.Exif]) -> int:
    """The EXIF orientation, 1 to 8; 1 when the EXIF block is missing or damaged."""
    try:
        value = getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block does not make the pixels wrong, and any error may come of it
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _to_rgb(image: Image.Image, background: Colour) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey_from_16_bits(image).convert("RGB")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (*background, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque.convert("RGB")
    elif image.mode not in ("RGB", "CMYK"):
        image = image.convert("RGB")
    return _to_srgb(image, profile).convert("RGB")


def _grey_from_16_bits(image: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255, where a plain conversion would clip nearly every pixel to white."""
    wide = image.convert("I")
    low, high = wide.getextrema()
    if not (isinstance(low, int | float) and isinstance(high, int | float) and low >= 0 and high <= 65535):
        raise ImageError("pixels have more than 16 bits; save it with 8 or 16 bits per channel")
    return wide.point(lambda value: value * (1 / 257) + 0.5).convert("L")


def _to_srgb(image: Image.Image, profile: object) -> Image.Image:
    """Apply an embedded colour profile. One that is damaged or for another kind of picture is ignored."""
    if not isinstance(profile, bytes):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        converted = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    return converted or image


def _describe(data: bytes) -> str:
    """What a file seems to be that Pillow does not know."""
    start = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for signature, name in _SIGNATURES:
        if start.startswith(signature):
            return f"not a picture but {name}"
    if data[4:8] == b"ftyp":
        return "a HEIC picture or a film, which are not read; convert it to PNG or JPEG"
    if not data.strip(b"\0"):
        return "holds nothing but zero bytes"
    return f"not a picture, or damaged (its first bytes are {data[:8].hex(' ')})"
