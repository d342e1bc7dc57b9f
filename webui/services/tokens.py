"""How many tokens a caption has, counted with the vocabulary of a base that is at hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.workspace import Workspace

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENS = 75
"""What a CLIP text encoder reads of a prompt, without the marks at its start and end."""

MAX_VOCABULARY_BYTES = 50_000_000


@dataclass(frozen=True)
class Counter:
    """source: the folder of the vocabulary, from the workspace's root."""

    source: str
    count: Callable[[str], int]


def find_counter(workspace: Workspace) -> Counter | None:
    """A counter with the first vocabulary that is found: the user's bases first, then the one that ships."""
    bases = [path for folder in (workspace.models, workspace.samples) if folder.is_dir() for path in _folders(folder)]
    for base in bases:
        file = base / "tokenizer" / "tokenizer.json"
        parts = (base / "tokenizer" / "vocab.json", base / "tokenizer" / "merges.txt")
        try:
            source = file.parent.relative_to(workspace.root).as_posix()
            if file.is_file() and file.stat().st_size < MAX_VOCABULARY_BYTES:
                return Counter(source, _counter_of(file, file.stat().st_mtime_ns))
            if all(part.is_file() for part in parts) and parts[0].stat().st_size < MAX_VOCABULARY_BYTES:
                return Counter(source, _counter_of(parts[0], parts[0].stat().st_mtime_ns))
        except Exception:  # tokenizers raises bare Exceptions on damaged files; the next base may do
            continue
    return None


@lru_cache(maxsize=4)
def _counter_of(file: Path, _modified: int) -> Callable[[str], int]:
    from tokenizers import Tokenizer

    if file.name == "vocab.json":
        tokenizer = _clip_tokenizer(file, file.with_name("merges.txt"))
    else:
        tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    @lru_cache(maxsize=50_000)
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    return count


def _clip_tokenizer(vocabulary: Path, merges: Path) -> Tokenizer:
    """CLIP's tokenizer from its two files: lower case, then pairs of bytes joined inside words."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    lines = merges.read_text(encoding="utf-8").splitlines()
    rules = [line.split(" ") for line in lines if not line.startswith("#version")]
    pairs = [(rule[0], rule[1]) for rule in rules if len(rule) == 2]
    tokenizer = Tokenizer(
        BPE(
            vocab=json.loads(vocabulary.read_text(encoding="utf-8")),
            merges=pairs,
            end_of_word_suffix="</w>",
            unk_token="<|endoftext|>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
