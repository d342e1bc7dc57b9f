"""From a folder of pictures to captions: which pictures, in batches, and what becomes of each caption. No torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_diffusion.captioning.errors import CaptionerError
from lora_diffusion.captioning.proposals import Proposal, Proposals
from lora_diffusion.data.captions import CaptionError, joined, one_line, read_caption
from lora_diffusion.data.images import ImageError, open_image
from lora_diffusion.data.listing import is_image_name, list_folder, relative_name
from lora_diffusion.data.sidecars import CaptionIndex, check_caption_file, write_caption
from lora_diffusion.progress import Track, silent

Describe = Callable[[Sequence[Image.Image]], list[str]]
"""RGB pictures → their captions."""


@dataclass(frozen=True)
class Picture:
    """One to caption. name: path below the data set's folder. file: where its caption is or would be written."""

    name: str
    path: Path
    file: Path
    caption: str | None


@dataclass(frozen=True)
class Choice:
    """problems: picture → why it is not captioned. num_captioned: those left out because they have a caption."""

    pictures: list[Picture]
    problems: dict[str, str]
    num_captioned: int


def choose_pictures(root: Path, *, overwrite: bool = False, done: Collection[str] = ()) -> Choice:
    """The pictures of a folder to caption: those without a caption, or with `overwrite` all; those in `done` never.

    Raises CaptionerError if `root` is no folder or holds no pictures, and DataError for a damaged metadata.jsonl.
    """
    if not root.is_dir():
        raise CaptionerError(f"{root}: {'is not a folder' if root.exists() else 'there is no such folder'}.")
    listing = list_folder(root)
    if not listing.images:
        raise CaptionerError(f"{root}: there are no pictures in this folder and its subfolders.")
    index = CaptionIndex(root, listing)
    left_out = (item for item in listing.left_out if is_image_name(item.path))
    choice = Choice([], {relative_name(item.path, root): item.reason for item in left_out}, 0)
    owners: dict[Path, str] = {}
    num_captioned = 0
    for path in listing.images:
        name, file = relative_name(path, root), index.file_of(path)
        owner = owners.setdefault(file, name)
        try:
            caption, _ = index.find(path)
            check_caption_file(file, root)
        except (CaptionError, OSError) as error:
            choice.problems[name] = f"its caption file is left as it is: {error}"
            continue
        if name in done:
            continue
        if caption is not None and not overwrite:
            num_captioned += 1
        elif owner != name:
            choice.problems[name] = f"shares the caption file {file.name} with {owner}; rename one of the pictures"
        else:
            choice.pictures.append(Picture(name, path, file, caption))
    return Choice(choice.pictures, choice.problems, num_captioned)


def caption_pictures(
    pictures: Sequence[Picture],
    describe: Describe,
    into: Proposals,
    *,
    write: Callable[[Picture], bool],
    prefix: str = "",
    suffix: str = "",
    batch_size: int = 4,
    after_batch: Callable[[int], bool] = lambda _: True,
    track: Track = silent,
) -> None:
    """Caption `pictures` in batches; what comes of each is noted in `into`.

    write: whether a picture's caption goes into the data set. One whose caption was changed since it was chosen keeps
    that. after_batch: told how many pictures are done; False ends it. Raises CaptionerError if a file cannot be
    written.
    """
    starts = range(0, len(pictures), batch_size)
    for start in track(starts, "captioning"):
        batch = pictures[start : start + batch_size]
        images: dict[str, Image.Image] = {}
        for picture in batch:
            try:
                images[picture.name] = open_image(picture.path)
            except ImageError as error:
                into.problems[picture.name] = str(error)
        texts = dict(zip(images, describe(list(images.values())), strict=True)) if images else {}
        for picture in batch:
            if picture.name not in texts:
                continue
            caption = one_line(joined(joined(prefix, texts[picture.name]), suffix))
            if caption:
                into.made[picture.name] = _settle(picture, caption, is_to_write=write(picture))
            else:
                into.problems[picture.name] = "the model wrote an empty caption"
        if not after_batch(start + len(batch)):
            return


def _settle(picture: Picture, caption: str, *, is_to_write: bool) -> Proposal:
    if not is_to_write:
        return Proposal(caption, picture.caption)
    try:
        now = (read_caption(picture.file) or None) if picture.file.exists() else None
        if now is not None and now != picture.caption:
            return Proposal(caption, now)
        write_caption(picture.file, caption)
    except OSError as error:
        raise CaptionerError(f"{picture.file} cannot be written: {error.strerror}.") from error
    return Proposal(caption, picture.caption, is_written=True)
