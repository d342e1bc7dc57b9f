"""Captions by a model equal those of transformers itself, and are never written over what a person wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoProcessor, BlipForConditionalGeneration, LlavaForConditionalGeneration
from typer.testing import CliRunner, Result

from lora_diffusion.captioning.captioner import NUM_BEAMS, load_captioner
from lora_diffusion.captioning.errors import CaptionerError
from lora_diffusion.captioning.find import captioners, find_captioner
from lora_diffusion.captioning.folder import Picture, caption_pictures, choose_pictures
from lora_diffusion.captioning.proposals import Proposal, Proposals
from lora_diffusion.cli import app
from lora_diffusion.container import ContainerError, read_header
from lora_diffusion.errors import UserError
from tests.captioners import save_tiny_blip, save_tiny_llava

CPU = torch.device("cpu")
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_blip(tmp_path_factory.mktemp("captioner") / "blip", seed=3)


def draw(number: int) -> Image.Image:
    image = Image.new("RGB", (60 + 7 * number, 50), (number * 45 % 256, 255 - number * 45 % 256, 50))
    ImageDraw.Draw(image).ellipse((5, 5, 30, 30), fill=(255, number * 60 % 256, 0))
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures in `set`: 0 with a caption by hand, 3 in a subfolder, 4 turned by EXIF."""
    root = tmp_path / "set"
    (root / "more").mkdir(parents=True)
    for number in range(3):
        draw(number).save(root / f"{number}.png")
    draw(3).save(root / "more" / "3.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(4).save(root / "4.jpg", exif=exif, quality=95)
    (root / "0.txt").write_text("by hand\n")
    return root


def named(images: Sequence[Image.Image]) -> list[str]:
    """A captioner that says the size of each picture."""
    return [f"{image.width} by {image.height}" for image in images]


def captions(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): path.read_text() for path in sorted(root.rglob("*.txt"))}


def write_all(picture: Picture) -> bool:
    return True


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_captions_equal_those_that_transformers_generates_for_each_picture_alone(blip: Path, prompt: str) -> None:
    images = [draw(number) for number in range(6)]
    model = BlipForConditionalGeneration.from_pretrained(blip).eval()
    processor = AutoProcessor.from_pretrained(blip)
    expected: list[str] = []
    for image in images:
        inputs = processor(images=image, text=prompt or None, return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**inputs, do_sample=False, num_beams=NUM_BEAMS, max_new_tokens=MAX_TOKENS)
        expected.append(processor.decode(tokens[0], skip_special_tokens=True))
    captioner = load_captioner(find_captioner(str(blip)), dtype=torch.float32, device=CPU)

    assert captioner.describe(images, prompt=prompt, max_tokens=MAX_TOKENS) == expected
    assert captioner.describe(images, prompt=prompt, max_tokens=MAX_TOKENS) == expected
    assert len(set(expected)) > 2, "pictures are told apart"
    assert all(caption.startswith(prompt) for caption in expected)


def test_a_model_that_chats_is_asked_and_only_its_answer_is_the_caption(tmp_path: Path) -> None:
    folder = save_tiny_llava(tmp_path / "llava")
    image = draw(1)
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text="user : <image> a red cat", images=image, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=False, num_beams=NUM_BEAMS, max_new_tokens=6)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    captioner = load_captioner(find_captioner(str(folder)), dtype=torch.float32, device=CPU)

    assert captioner.describe([image, draw(2)], prompt="a red cat", max_tokens=6)[0] == answer


def test_half_precision_describes_too(blip: Path) -> None:
    captioner = load_captioner(blip, dtype=torch.bfloat16, device=CPU)

    assert captioner.model.dtype == torch.bfloat16
    assert len(captioner.describe([draw(1), draw(2)], max_tokens=2)) == 2


def test_pictures_without_a_caption_get_one_turned_upright_with_prefix_and_suffix(folder: Path) -> None:
    choice, made = choose_pictures(folder), Proposals()
    caption_pictures(
        choice.pictures, named, made, write=write_all, prefix="sks", suffix=", ink style", batch_size=3
    )  # two batches

    assert choice.num_captioned == 1
    assert captions(folder) == {
        "0.txt": "by hand\n",
        "1.txt": "sks 67 by 50, ink style\n",
        "2.txt": "sks 74 by 50, ink style\n",
        "4.txt": "sks 50 by 88, ink style\n",
        "more/3.txt": "sks 81 by 50, ink style\n",
    }
    assert made.made["4.jpg"] == Proposal("sks 50 by 88, ink style", None, is_written=True)


def test_overwriting_is_asked_for_and_goes_to_the_file_that_the_caption_came_from(folder: Path) -> None:
    (folder / "1.caption").write_text("old\n")
    choice = choose_pictures(folder, overwrite=True)
    made = Proposals()
    caption_pictures(choice.pictures, named, made, write=write_all)

    assert len(choice.pictures) == 5
    assert captions(folder)["0.txt"] == "60 by 50\n"
    assert (folder / "1.caption").read_text() == "67 by 50\n" and not (folder / "1.txt").exists()
    assert made.made["0.png"] == Proposal("60 by 50", "by hand", is_written=True)


def test_a_caption_that_is_written_by_hand_meanwhile_stays(folder: Path) -> None:
    choice, made = choose_pictures(folder), Proposals()
    (folder / "1.txt").write_text("quicker\n")
    caption_pictures(choice.pictures, named, made, write=write_all)

    assert captions(folder)["1.txt"] == "quicker\n"
    assert made.made["1.png"] == Proposal("67 by 50", "quicker", is_written=False)


def test_proposals_are_written_nowhere_else_and_read_back(folder: Path, tmp_path: Path) -> None:
    before, made = captions(folder), Proposals(problems={"x.png": "why"})
    caption_pictures(choose_pictures(folder, overwrite=True).pictures, named, made, write=lambda _: False)
    made.write(tmp_path / "proposals.json")

    assert captions(folder) == before
    assert Proposals.read(tmp_path / "proposals.json") == made
    assert made.made["0.png"] == Proposal("60 by 50", "by hand")
    assert Proposals.read(tmp_path / "none.json") == Proposals()
    (tmp_path / "proposals.json").write_text("{")
    with pytest.raises(CaptionerError, match="proposals"):
        Proposals.read(tmp_path / "proposals.json")


def test_it_ends_after_the_batch_in_which_that_is_asked_and_goes_on_with_the_rest(folder: Path) -> None:
    made, seen = Proposals(), list[int]()

    def after_batch(done: int) -> bool:
        seen.append(done)
        return len(seen) < 1

    caption_pictures(
        choose_pictures(folder).pictures, named, made, write=lambda _: False, batch_size=2, after_batch=after_batch
    )
    assert (seen, len(made.made)) == ([2], 2)
    rest = choose_pictures(folder, done=made.made).pictures

    assert len(rest) == 2 and made.made.keys().isdisjoint(picture.name for picture in rest)


def test_what_cannot_be_captioned_is_named_and_the_rest_goes_on(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(b"<html>")
    (folder / "2.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "1.jpg").write_bytes((folder / "4.jpg").read_bytes())
    (tmp_path / "elsewhere.txt").write_text("private")
    (folder / "more" / "3.txt").symlink_to(tmp_path / "elsewhere.txt")
    choice, made = choose_pictures(folder), Proposals()
    caption_pictures(choice.pictures, named, made, write=write_all)
    problems = choice.problems | made.problems

    assert "an HTML page" in problems["broken.png"]
    assert "left as it is" in problems["2.png"]
    assert "shares the caption file 1.txt with 1.jpg" in problems["1.png"]
    assert "leads out" in problems["more/3.png"]
    assert made.made.keys() == {"1.jpg", "4.jpg"}
    assert (folder / "2.txt").read_bytes() == b"\xff\xfe\xff"
    assert (tmp_path / "elsewhere.txt").read_text() == "private"


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_a_folder_without_pictures_is_an_error(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path / "empty")
    with pytest.raises(CaptionerError, match="empty"):
        choose_pictures(tmp_path / "empty")


def broken(blip: Path, folder: Path, how: str) -> Path:
    shutil.copytree(blip, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    values = json.loads(config.read_text())
    match how:
        case "pickle":
            weights.rename(folder / "pytorch_model.bin")
        case "no weights":
            weights.unlink()
        case "cut short":
            weights.write_bytes(weights.read_bytes()[:-10])
        case "no config":
            config.unlink()
        case "base":
            (folder / "model_index.json").write_text("{}")
        case "questions":
            config.write_text(json.dumps(values | {"architectures": ["BlipForQuestionAnswering"]}))
        case "no tokenizer":
            for name in ("tokenizer.json", "vocab.txt"):
                (folder / name).unlink(missing_ok=True)
        case "no processor":
            for path in folder.glob("*processor_config.json"):
                path.unlink()
        case "other weights":
            other = {"text_config": values["text_config"] | {"num_hidden_layers": 3}}
            config.write_text(json.dumps(values | other))
        case "remote code":
            config.write_text(json.dumps(values | {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}))
            (folder / "evil.py").write_text("raise SystemExit('ran')")
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("pickle", r"only pytorch_model.bin, a pickle.*\n.*model.safetensors"),
        ("no weights", r"model.safetensors is missing"),
        ("cut short", r"cut short"),
        ("no config", r"config.json is missing"),
        ("base", r"a base that draws pictures"),
        ("questions", r"BlipForQuestionAnswering describes no pictures"),
        ("no tokenizer", r"tokenizer.json is missing"),
        ("no processor", r"cannot use this captioner"),
        ("other weights", r"lack \d+ tensors"),
        ("remote code", r"cannot use this captioner"),
    ],
)
def test_what_is_no_captioner_is_refused_with_the_reason(blip: Path, tmp_path: Path, how: str, message: str) -> None:
    folder = broken(blip, tmp_path / "model", how)

    with pytest.raises((CaptionerError, ContainerError), match=message) as error:
        load_captioner(find_captioner(str(folder)), dtype=torch.float32, device=CPU)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "owner/not-cached"])
def test_a_captioner_that_is_not_there_is_told(name: str) -> None:
    with pytest.raises(UserError, match=name):
        find_captioner(name)


def test_captioners_at_hand_are_folders_and_what_the_hub_cached(
    blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for repo, how in (("a--good", ""), ("a--pickled", "pickle"), ("a--base", "base")):
        snapshot = cache / f"models--{repo}" / "snapshots" / "0123"
        snapshot.parent.mkdir(parents=True)
        broken(blip, snapshot, how)
        (cache / f"models--{repo}" / "refs").mkdir()
        (cache / f"models--{repo}" / "refs" / "main").write_text("0123")
    models = tmp_path / "models"
    broken(blip, models / "mine", "")
    broken(blip, models / "not-mine", "questions")

    assert captioners(models) == [str(models / "mine"), "a/good"]
    assert captioners(tmp_path / "nowhere") == ["a/good"]
    assert find_captioner("a/good") == cache / "models--a--good" / "snapshots" / "0123"


def test_what_an_interrupted_download_lacks_is_downloaded(
    blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--a--large" / "snapshots" / "0123"
    shutil.copytree(blip, snapshot)
    (cache / "models--a--large" / "refs").mkdir()
    (cache / "models--a--large" / "refs" / "main").write_text("0123")
    shard = "model-00001-of-00001.safetensors"
    (snapshot / "model.safetensors").rename(tmp_path / shard)
    weight_map = dict.fromkeys(read_header(tmp_path / shard).tensors, shard)
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    asked: list[str] = []

    def download(repo: str, **_: object) -> str:
        asked.append(repo)
        shutil.copy(tmp_path / shard, snapshot)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    assert find_captioner("a/large") == snapshot
    assert find_captioner("a/large") == snapshot
    assert asked == ["a/large"], "what is whole is not asked for"


def caption(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["caption", *arguments])


def test_the_command_writes_captions_names_what_got_none_and_is_repeated_without_harm(blip: Path, folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"<html>")
    first = caption(str(folder), "--captioner", str(blip), "--prefix", "sks,", "--max-tokens", "4")
    written = captions(folder)

    assert first.exit_code == 3
    assert "4 captions written" in first.stdout
    assert "1 picture got no caption" in first.stderr and "broken.png: not a picture but an HTML page" in first.stderr
    assert len(written) == 5 and written["0.txt"] == "by hand\n"
    assert all(text.startswith("sks,") for name, text in written.items() if name != "0.txt")
    (folder / "broken.png").unlink()
    again = caption(str(folder), "--captioner", str(blip))
    assert (again.exit_code, captions(folder)) == (0, written)
    assert "every picture has one" in again.stdout


def test_the_command_proposes_in_a_file_that_is_new(blip: Path, folder: Path, tmp_path: Path) -> None:
    arguments = (str(folder), "--captioner", str(blip), "--overwrite", "--prefix", "sks", "--max-tokens", "4")
    file = tmp_path / "proposals.json"
    assert caption(*arguments, "--proposals", str(file)).exit_code == 0
    assert captions(folder) == {"0.txt": "by hand\n"}
    assert len(Proposals.read(file).made) == 5
    refused = caption(*arguments, "--proposals", str(file))

    assert refused.exit_code == 2 and "there is such a file already" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "int4"), "`caption.precision`"),
        (("--device", "tpu"), "`caption.device`"),
        (("--precision", "fp16", "--device", "cpu"), "overflows and is slow"),
    ],
)
def test_options_that_make_no_sense_are_told(
    blip: Path, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = caption(str(folder), "--captioner", str(blip), *arguments)

    assert result.exit_code == 2
    assert message in result.stderr
