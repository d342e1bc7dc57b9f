"""Pictures become upright, opaque RGB, resized as documented."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from lora_diffusion.data.buckets import Bucket, Size, fit
from lora_diffusion.data.images import (
    ImageError,
    check_image,
    check_whole,
    decode_image,
    open_image,
    quiet_pillow,
    read_bytes,
    read_header,
    to_pixels,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def red_left_blue_right() -> Image.Image:
    """32x16: the left half red, the right half blue."""
    image = Image.new("RGB", (32, 16), BLUE)
    image.paste(RED, (0, 0, 16, 16))
    return image


def with_orientation(image: Image.Image, value: int, format: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encode(image, format, exif=exif)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats_are_read_by_content(format: str):
    data = encode(red_left_blue_right(), format)
    header = read_header(data)
    assert (header.size, header.format) == (Size(32, 16), format)
    left, right = (decode_image(data).getpixel((x, 8)) for x in (4, 28))
    assert isinstance(left, tuple) and isinstance(right, tuple)
    assert left[0] > 240 > 15 > left[2]
    assert right[2] > 240 > 15 > right[0]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "size", "red_at"),
    [  # where a viewer shows the red half (EXIF 2.3, table 4.6.4 A)
        (1, (32, 16), (4, 8)),
        (2, (32, 16), (28, 8)),
        (3, (32, 16), (28, 8)),
        (4, (32, 16), (4, 8)),
        (5, (16, 32), (8, 4)),
        (6, (16, 32), (8, 4)),
        (7, (16, 32), (8, 28)),
        (8, (16, 32), (8, 28)),
    ],
)
def test_exif_orientation_is_applied_once_to_size_and_pixels(
    orientation: int, size: tuple[int, int], red_at: tuple[int, int], format: str
):
    data = with_orientation(red_left_blue_right(), orientation, format)
    image = decode_image(data)
    assert read_header(data).size == check_whole(data).size == size == image.size
    assert image.getpixel(red_at) == RED
    assert image.getpixel((size[0] - 1 - red_at[0], size[1] - 1 - red_at[1])) == BLUE


def test_a_tiff_that_tells_its_turn_only_in_xmp_is_turned_once():
    tags = ImageFileDirectory_v2()
    tags[700] = b'<rdf:Description tiff:Orientation="6"/>'
    data = encode(red_left_blue_right(), "TIFF", tiffinfo=tags)
    image = decode_image(data)
    assert read_header(data).size == check_whole(data).size == (16, 32) == image.size
    assert (image.getpixel((8, 4)), image.getpixel((8, 28))) == (RED, BLUE)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("value", [0, 9, 65535])
def test_a_meaningless_orientation_turns_nothing(value: int, format: str):
    assert decode_image(with_orientation(red_left_blue_right(), value, format)).size == (32, 16)


def test_a_broken_exif_block_turns_nothing():
    data = encode(red_left_blue_right(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffnonsense")
    with quiet_pillow():
        assert check_image(data).size == decode_image(data).size == (32, 16)


def test_16_bit_grey_is_scaled_and_not_clipped():
    values = [0, 257, 32768, 65535]
    image = Image.frombytes("I;16", (4, 1), b"".join(value.to_bytes(2, "little") for value in values))
    assert decode_image(encode(image)).tobytes()[::3] == bytes([0, 1, 128, 255])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_colours_hidden_by_transparency_do_not_show(mode: str):
    hidden = Image.new("RGBA", (4, 4), (*RED, 0))
    data = encode(hidden.quantize() if mode == "P" else hidden.convert(mode))
    assert decode_image(data).getpixel((1, 1)) == (255, 255, 255)
    assert decode_image(data, (10, 20, 30)).getpixel((1, 1)) == (10, 20, 30)


def test_half_transparent_pixels_mix_with_the_background():
    assert decode_image(encode(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))).getpixel((0, 0)) == (127, 127, 127)


def test_a_transparent_palette_entry_and_a_transparent_colour_show_the_background():
    palette = encode(red_left_blue_right().quantize(2), transparency=0)
    assert (255, 255, 255) in {color for _, color in decode_image(palette).getcolors() or ()}
    colour = encode(red_left_blue_right(), transparency=RED)
    assert decode_image(colour).getpixel((4, 8)) == (255, 255, 255)
    assert decode_image(colour).getpixel((28, 8)) == BLUE


def test_cmyk_becomes_rgb():
    pixel = decode_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).getpixel((8, 8))
    assert isinstance(pixel, tuple)
    assert pixel[0] > 240 and max(pixel[1:]) < 15


def test_a_damaged_colour_profile_is_ignored():
    data = encode(red_left_blue_right(), icc_profile=b"nonsense" * 40)
    assert decode_image(data).tobytes() == red_left_blue_right().tobytes()


def test_an_srgb_profile_changes_nothing_and_another_one_is_applied():
    grey = Image.new("RGB", (2, 2), (200, 120, 40))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode_image(encode(grey, icc_profile=srgb)).tobytes() == grey.tobytes()
    swapped = _profile_with_red_and_blue_swapped(srgb)
    pixel = decode_image(encode(grey, icc_profile=swapped)).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    assert all(abs(a - b) <= 3 for a, b in zip(pixel, (40, 120, 200), strict=True))  # 8-bit rounding in the profile


def _profile_with_red_and_blue_swapped(srgb: bytes) -> bytes:
    """An sRGB profile whose tags rXYZ and bXYZ have changed places and whose description says so."""
    swapped = srgb.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"????", b"bXYZ", 1)
    return swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(b"sRGB", b"swap")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_bytes_behind_the_picture_do_not_matter(format: str):
    data = encode(red_left_blue_right(), format)
    assert decode_image(data + b"\0" * 100).tobytes() == decode_image(data).tobytes()
    check_image(data + b"\0" * 100)


def test_checking_finds_what_decoding_would(tmp_path: Path):
    noisy = Image.frombytes("RGB", (64, 64), bytes((i * 7919 >> 3) % 256 for i in range(64 * 64 * 3)))
    for format in ("PNG", "JPEG", "WEBP", "TIFF"):
        data = encode(noisy, format)
        with pytest.raises(ImageError):
            check_image(data[: len(data) // 2])


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_the_quick_check_tells_the_same_of_whole_pictures_as_decoding_does():
    image = red_left_blue_right()
    pictures = [encode(image, format) for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    pictures += [with_orientation(image, value) for value in range(1, 9)]
    pictures += [encode(image.convert("P")), encode(Image.new("I;16", (8, 4), 30000))]
    pictures.append(encode(image, save_all=True, append_images=[image.rotate(180)]))
    assert len(pictures) == 17
    for data in pictures:
        assert check_whole(data) == check_image(data)


def test_a_turn_that_is_told_behind_the_pixels_of_a_png_is_found():
    turned = Image.Exif()
    turned[0x0112] = 6
    plain = encode(red_left_blue_right())
    data = plain[:-12] + png_chunk(b"eXIf", turned.tobytes().removeprefix(b"Exif\0\0")) + plain[-12:]
    assert check_whole(data) == check_image(data)
    assert check_whole(data).size == check_whole(plain).size[::-1]


def test_every_cut_and_every_flipped_bit_of_a_png_is_found_without_decoding_it():
    data = encode(red_left_blue_right())
    for end in range(len(data)):
        with pytest.raises(ImageError):
            check_whole(data[:end])
    for offset in range(len(data)):
        with pytest.raises(ImageError):
            check_whole(data[:offset] + bytes([data[offset] ^ 16]) + data[offset + 1 :])


def test_pixels_that_were_written_wrongly_under_right_checksums_are_found_when_they_are_decoded():
    whole = encode(red_left_blue_right())
    data = whole[:33] + png_chunk(b"IDAT", zlib.compress(b"\0\0\0")) + png_chunk(b"IEND", b"")
    assert check_whole(data) == check_whole(whole)
    with pytest.raises(ImageError, match="damaged or cut off"):
        decode_image(data)


def test_opening_a_file_that_changed_since_the_scan_is_an_error(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(red_left_blue_right()))
    with pytest.raises(ImageError, match="changed"):
        open_image(path, content="0" * 64)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match="not a regular file"):
        read_bytes(tmp_path / "a.png")


def test_pixels_are_floats_from_minus_one_to_one_channels_first():
    image = Image.new("RGB", (8, 8), (255, 0, 51))
    pixels = to_pixels(image, fit(Size(8, 8), Bucket(8, 8)), Bucket(8, 8))
    assert (pixels.shape, pixels.dtype) == ((3, 8, 8), torch.float32)
    assert pixels[:, 3, 3].tolist() == pytest.approx([1.0, -1.0, -0.6])


def test_rows_are_height_and_columns_are_width():
    pixels = to_pixels(red_left_blue_right(), fit(Size(32, 16), Bucket(32, 16)), Bucket(32, 16))
    assert pixels.shape == (3, 16, 32)
    assert pixels[0, :, :16].eq(1).all() and pixels[2, :, 16:].eq(1).all()


@pytest.mark.parametrize(("size", "bucket"), [((90, 60), (16, 16)), ((40, 70), (48, 64)), ((33, 32), (32, 32))])
def test_cropping_while_resizing_equals_resizing_then_cropping(size: tuple[int, int], bucket: tuple[int, int]):
    image = Image.radial_gradient("L").resize(size).convert("RGB")
    plan = fit(Size(*size), Bucket(*bucket))
    left, top = plan.crop
    whole = image.resize(plan.resized, Image.Resampling.LANCZOS).crop((left, top, left + bucket[0], top + bucket[1]))
    expected = to_pixels(whole, fit(Size(*bucket), Bucket(*bucket)), Bucket(*bucket))
    difference = (to_pixels(image, plan, Bucket(*bucket)) - expected).abs().max()
    assert difference <= 1.01 * 2 / 255  # one level: a fractional box rounds differently


def test_fine_stripes_shrink_to_their_mean():
    stripes = Image.new("L", (256, 256))
    stripes.putdata([255 * (i % 2) for i in range(256 * 256)])
    pixels = to_pixels(stripes.convert("RGB"), fit(Size(256, 256), Bucket(32, 32)), Bucket(32, 32))
    assert pixels.abs().max() < 0.05  # without the filter they would alias to black or white


def test_a_sliver_is_cut_without_ever_being_enlarged_whole():
    size, bucket = Size(40_000, 4), Bucket(64, 64)
    pixels = to_pixels(Image.new("RGB", size, RED), fit(size, bucket), bucket)
    assert pixels.shape == (3, 64, 64)
