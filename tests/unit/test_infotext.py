from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import MAX_TEXT_CHUNK, PngInfo

from lora_diffusion.generation.infotext import (
    ParametersError,
    read_parameters,
    read_png,
    save_png,
    write_parameters,
)
from lora_diffusion.generation.request import Request, resolve_tags
from lora_diffusion.generation.samplers import SAMPLERS

PROMPTS = [
    "a cat",
    "",
    'a "quoted" cat, with: colons, commas\\backslash',
    "two\nlines",
    "  spaces around  ",
    "Кошка 猫 🐈 ünïcödé",
    "line\r\nbreaks\r\nof Windows\n\n",
    "Negative prompt: no, this is the prompt",
    "first\nNegative prompt: still the prompt\nSteps: 3, Sampler: Euler, Seed: 1",
    "Steps: 20, Sampler: DDIM, CFG scale: 7",
    "(weighted:1.2) [less] <lora> <lora:> {a|b}",
    "\n",
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("negative", PROMPTS)
def test_any_prompt_pair_reads_back_the_same(prompt: str, negative: str) -> None:
    request = Request(prompt, negative, seed=3, adapters={"ink": 0.8})
    assert read_parameters(write_parameters(request, "base", {})).request == request
    plain = Request(prompt, negative)
    assert read_parameters(write_parameters(plain, "", {})).request == plain


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_field_reads_back_the_same(sampler: str) -> None:
    request = Request(
        "a cat",
        "blurry",
        seed=2**62 + 1,
        steps=13,
        cfg=4.35,
        size=(512, 768),
        sampler=sampler,
        clip_skip=2,
        adapters={"ink v1-000200": 0.1 + 0.2, "neon": -1.0, "off": 0.0},
    )
    parameters = read_parameters(write_parameters(request, 'sd, "15": best', {"neon": "0123456789abcdef"}))
    assert parameters.request == request
    assert parameters.model == 'sd, "15": best'
    assert parameters.hashes == {"neon": "0123456789ab"}


def test_tags_in_the_prompt_are_written_once_with_the_strength_that_counted() -> None:
    request = Request("a cat <lora:ink:0.8>", adapters={"ink": 0.1, "neon": 0.5})
    text = write_parameters(request, "base", {})
    assert text.splitlines()[0] == "a cat <lora:ink:0.8> <lora:neon:0.5>"
    assert read_parameters(text).request == resolve_tags(request)


def test_the_text_has_the_form_other_programs_read() -> None:
    request = Request(
        "a cat", "blurry", seed=1, size=(64, 96), sampler="dpm++2m-karras", adapters={"ink": 0.8, "neon": 1.0}
    )
    text = write_parameters(request, "base", {"ink": "a" * 64, "neon": "b" * 64, "unused": "c" * 64})
    assert text == (
        "a cat <lora:ink:0.8> <lora:neon:1>\n"
        "Negative prompt: blurry\n"
        "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 64x96, Model: base, "
        'Lora hashes: "ink: aaaaaaaaaaaa, neon: bbbbbbbbbbbb", Version: lora-diffusion'
    )


def test_plain_dpm_is_written_so_that_other_programs_do_not_take_it_for_karras() -> None:
    text = write_parameters(Request("a cat", sampler="dpm++2m"), "", {})
    assert "Sampler: DPM++ 2M, Schedule type: Uniform, CFG scale" in text
    assert "Schedule type" not in write_parameters(Request("a cat", sampler="euler"), "", {})


def test_a_picture_of_another_program_is_read() -> None:
    text = (
        "masterpiece, a cat <lora:ink_v2:0.7>\nin a hat\nNegative prompt: blurry,\nugly\n"
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 42, Size: 512x640, Model hash: 6ce0161689, "
        'Model: v1-5-pruned, Clip skip: 2, ENSD: 31337, Lora hashes: "ink_v2: 0123456789ab", Version: v1.6.0'
    )
    parameters = read_parameters(text)
    assert parameters.request == Request(
        "masterpiece, a cat\nin a hat",
        "blurry,\nugly",
        seed=42,
        steps=20,
        cfg=6.5,
        size=(512, 640),
        sampler="dpm++2m-karras",
        clip_skip=2,
        adapters={"ink_v2": 0.7},
    )
    assert parameters.model == "v1-5-pruned"


@pytest.mark.parametrize(
    ("fields", "sampler"),
    [
        ("Sampler: DPM fast", "DPM fast"),
        ("Sampler: DPM fast, Schedule type: Automatic", "DPM fast"),
        ("Sampler: Euler, Schedule type: Karras", "Euler Karras"),
        ("Sampler: DPM++ 2M, Schedule type: SGM Uniform", "DPM++ 2M SGM Uniform"),
    ],
)
def test_a_foreign_sampler_or_schedule_keeps_its_name(fields: str, sampler: str) -> None:
    request = read_parameters(f"a\nSteps: 2, {fields}, Seed: 1").request
    assert request.sampler == sampler
    assert read_parameters(write_parameters(request, "", {})).request == request


@pytest.mark.parametrize("schedule_type", ["Automatic", "Uniform"])
def test_a_schedule_that_is_the_samplers_own_changes_nothing(schedule_type: str) -> None:
    text = f"a\nSteps: 2, Sampler: Euler, Schedule type: {schedule_type}, Seed: 1"
    assert read_parameters(text).request.sampler == "euler"


def test_text_without_a_line_of_fields_is_a_prompt() -> None:
    assert read_parameters("a cat\nNegative prompt: dog").request == Request("a cat", "dog")


@pytest.mark.parametrize("field", ["Seed: x", "Size: 512", "CFG scale: high", "Clip skip: two"])
def test_a_field_that_is_no_number_is_refused(field: str) -> None:
    with pytest.raises(ParametersError, match="not a number"):
        read_parameters(f"a\nSteps: 2, {field}")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_saved_png_gives_its_request_back(tmp_path: Path, prompt: str) -> None:
    request = Request(prompt, prompt, adapters={"ink": 0.5})
    path = tmp_path / "a.png"
    image = Image.new("RGB", (8, 6), (1, 2, 3))
    save_png(image, path, write_parameters(request, "base", {}))
    assert read_png(path).request == request
    with Image.open(path) as read:
        assert read.size == (8, 6)
        assert read.getpixel((0, 0)) == (1, 2, 3)


def test_a_png_without_parameters_and_a_file_that_is_no_picture_are_refused_by_name(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ParametersError, match=r"plain\.png.*no generation parameters"):
        read_png(tmp_path / "plain.png")
    with pytest.raises(ParametersError, match=r"text\.png.*cannot be read"):
        read_png(tmp_path / "text.png")


def test_a_png_whose_size_or_text_would_fill_the_memory_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = PngInfo()
    bomb.add_text("parameters", "a" * (MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "text.png", pnginfo=bomb)
    save_png(Image.new("RGB", (40, 40)), tmp_path / "size.png", "a cat")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40 // 2 - 1)  # Pillow refuses twice as many
    for name in ("text", "size"):
        with pytest.raises(ParametersError, match=rf"{name}\.png.*cannot be read"):
            read_png(tmp_path / f"{name}.png")
