"""Every option of a captioning: which folder, which model, which captions are written. Nothing here imports torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationError

from lora_diffusion import config_file
from lora_diffusion.config import FilePath, Section, Text
from lora_diffusion.config_errors import ConfigError, explain

MAX_TEXT = 2000

Written = Literal["all", "missing", "none"]


class CaptionConfig(Section):
    """A model looks at the pictures of a folder and writes a caption for each."""

    folder: FilePath
    """The data set's folder."""
    captioner: Text
    """Folder of an image-to-text model of transformers, such as BLIP, or its Hugging Face id."""
    prefix: str = Field(default="", max_length=MAX_TEXT)
    """Text in front of every caption, such as the trigger word."""
    suffix: str = Field(default="", max_length=MAX_TEXT)
    """Text behind every caption."""
    prompt: str = Field(default="", max_length=MAX_TEXT)
    """What the model is given to go on with (BLIP, GIT: the caption begins with it) or to answer (models that chat)."""
    overwrite: bool = False
    """Caption also the pictures that have a caption."""
    write: Written = "all"
    """Which captions go into the data set: all, those of pictures that have none, or none. The others are proposals."""
    batch_size: int = Field(default=4, ge=1, le=256)
    """Pictures at a time. Less needs less memory."""
    max_tokens: int = Field(default=60, ge=1, le=1000)
    """Length of a caption at most, in tokens of the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. `auto`: the GPU if there is one."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format of the model. `auto`: bf16 on GPUs that have it, fp16 on older ones, fp32 on the CPU."""


class CaptionOrder(Section):
    """The file of a captioning that waits in the queue."""

    caption: CaptionConfig

    @classmethod
    def of(cls, **options: object) -> Self:
        """From values as of CaptionConfig. Raises ConfigError with all that is wrong."""
        return cls._checked({"caption": options}, "options")

    @classmethod
    def parse(cls, text: str, source: str = "order") -> Self:
        """Read TOML text that came from `source`. Raises ConfigError with all that is wrong."""
        return cls._checked(config_file.parse_toml(text, source).data, source)

    @classmethod
    def _checked(cls, data: dict[str, object], source: str) -> Self:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(source, explain(error, data, cls)) from None

    def to_toml(self) -> str:
        """All values with their docstrings as comments."""
        return config_file.to_toml(self)
