"""Every option of a training run: its type, range, default and meaning. The docstrings also make the UI and the docs.

`TrainConfig.load` is the way in. Paths are relative to the working directory. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError

from lora_diffusion import config_file
from lora_diffusion.config_checks import conflicts, ineffective
from lora_diffusion.config_errors import ConfigError, KeyPath, Problem, explain, repaired
from lora_diffusion.timesteps import NUM_TIMESTEPS, max_denoising_steps

V = TypeVar("V")
Auto = Literal["auto"]
Side = Annotated[int, Field(ge=16, le=8192)]
WidthHeight = Annotated[tuple[Side, Side], Strict(False)]  # TOML has lists only: a tuple must be built from one
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
MAX_STEPS = 10_000_000


def _square(size: object) -> object:
    return [size, size] if type(size) is int else size


def _file_name(name: str) -> str:
    if not re.fullmatch(r'[^<>:,"/\\|?*\x00-\x1f\x7f]{1,100}', name) or name[0] in ". " or name[-1] in ". ":
        raise ValueError(
            'it becomes a file name: 1 to 100 characters, none of < > : , " / \\ | ? *, no dot or space at an end'
        )
    return name


def _expanded(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("a path cannot contain the character NUL")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"no home folder is known for {path.parts[0]}") from error


def _not_blank(text: V) -> V:
    if isinstance(text, str) and not text.strip():
        raise ValueError("it must not be blank")
    return text


def _regular_expressions(targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if not targets:
        raise ValueError("the list must name at least one regular expression")
    for pattern in () if isinstance(targets, str) else targets:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return targets


def _patterns(patterns: dict[str, V]) -> dict[str, V]:
    _regular_expressions(tuple(patterns) or (".",))
    return patterns


# An empty text would be a path too, that of the current folder.
FilePath = Annotated[Path, Strict(False), BeforeValidator(_not_blank), AfterValidator(_expanded)]
Text = Annotated[str, AfterValidator(_not_blank)]
Texts = Annotated[tuple[Text, ...], Strict(False), Field(max_length=100)]


class Section(BaseModel):
    """One table of the TOML file."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RunConfig(Section):
    """How long, how often and where to."""

    name: Annotated[str, AfterValidator(_file_name)]
    """Name of the adapter file, without `.safetensors`; also the name to type in other programs."""
    output: FilePath = Field(default_factory=lambda run: Path("runs") / run.get("name", "adapter"))
    """Run folder: everything the run writes is in it. Not given: `runs/<name>`."""
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    """Optimiser steps of the whole run. Give this or `epochs`."""
    epochs: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    """Passes over all images (each as often as its `repeats`). Give this or `steps`."""
    batch_size: int = Field(default=4, ge=1, le=4096)
    """Images per forward pass and process. Less needs less memory."""
    gradient_accumulation: int = Field(default=1, ge=1, le=4096)
    """Forward passes per optimiser step: a larger effective batch in the same memory, in more time."""
    seed: Seed = 42
    """Decides everything random. The same config with the same seed gives the same adapter."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. `auto`: the GPU if there is one."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format of the frozen model; the adapter itself stays in fp32. `auto`: bf16 on GPUs that have it, fp16 on
    older ones, fp32 on the CPU."""
    save_precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Number format of the adapter file. `fp32` doubles its size; checkpoints for `--resume` are always exact."""
    save_format: Literal["kohya", "peft"] = "kohya"
    """Naming in the adapter file. `kohya`: read by ComfyUI, Forge, A1111, SD.Next and diffusers. `peft`: by diffusers
    and PEFT only."""
    metadata: Literal["full", "minimal"] = "full"
    """What the adapter file tells besides its weights. `minimal`: only what programs need to sort it, nothing about
    your pictures, captions or settings."""
    save_every: int = Field(default=200, ge=0, le=MAX_STEPS)
    """Steps between checkpoints, each with an adapter file to try. 0: only at the end."""
    keep_checkpoints: int = Field(default=2, ge=2, le=1000)
    """How many of the newest checkpoints to keep for `--resume`. At least 2, so that one damaged file is no loss."""
    log_every: int = Field(default=1, ge=1, le=MAX_STEPS)
    """Steps between lines in `metrics.jsonl` and on the terminal."""
    loader_workers: int = Field(default=0, ge=0, le=64)
    """Processes that prepare batches ahead. 0: the training process does it, enough while latents are cached."""
    cuda_graph: bool = True
    """Launch each step as a whole in place of some thousand operations, which is faster: as a CUDA graph on one NVIDIA
    card, as a recording on a CPU. Left out by itself where a step cannot be: fp16, dropout, `max_norm`, text encoder
    training, adamw8bit, several processes."""


class ModelConfig(Section):
    """The base model, which stays as it is."""

    path: Text
    """Folder in diffusers layout, a single `.safetensors` checkpoint, or a Hugging Face id such as `owner/model`."""
    configs: FilePath | None = None
    """Folder in diffusers layout with the configs and the tokenizer of a single-file checkpoint; only what is there is
    used, the rest is the family's own."""
    family: Literal["auto", "sd1", "sd2", "sdxl"] = "auto"
    """Model family: SD 1.x, SD 2.x or SDXL. `auto`: read from the model's files."""
    prediction: Literal["auto", "epsilon", "v"] = "auto"
    """What the model predicts: the noise or the velocity. `auto`: as the model's files say, else the noise. A value
    that contradicts the files is refused."""
    zero_terminal_snr: Auto | bool = "auto"
    """Whether the last timestep is pure noise. `auto`: as the model's files say, else not. A value that contradicts the
    files is refused."""
    clip_skip: int = Field(default=1, ge=1, le=12)
    """Which layer of the text encoder to read, counted from the end as in A1111: 1 is the last one. SDXL always reads
    the last but one."""
    max_tokens: Literal[75, 150, 225] = 75
    """Longest caption in tokens; what goes beyond it is cut off and reported. Longer costs time and memory."""
    quantise: Literal["none", "nf4", "int8"] = "none"
    """How the frozen linear layers of the UNet are kept in memory; they compute in `run.precision` either way. `nf4`:
    a quarter of the size of 16 bits, weights off by 9 %; needs the package bitsandbytes. `int8`: half the size, weights
    off by 0.8 %. Both cost time in every step. `none`: as they are."""
    attention: Literal["auto", "sdpa", "eager", "xformers"] = "auto"
    """Implementation of attention. `auto`: the fastest one for the device; the results differ only by rounding."""
    merge: Texts = ()
    """Adapters to merge into the base before training, as `"file.safetensors"` or `"file.safetensors:0.8"`. The new
    adapter is made for that mixture: use it together with them."""
    gradient_checkpointing: bool | Literal["outer"] = False
    """Compute parts of the forward pass twice instead of storing them: far less memory, about a third more time.
    `outer`: only those on the largest pictures, which keep the most."""
    compile: bool = False
    """Let torch compile the UNet's transformer blocks into fewer, larger operations. The first steps of each size of
    picture take minutes, so it is for thousands of steps; needs a C++ compiler, on a GPU Triton."""


class AdapterConfig(Section):
    """What is trained: small matrices beside the frozen layers."""

    kind: Literal["lora", "dora", "loha", "lokr"] = "lora"
    """Kind of adapter. `lora`: read everywhere. `dora`: also trains the size of each input's weights; closer to full
    fine-tuning, slower; not read by diffusers. `loha`, `lokr`: more rank from as many numbers; LyCORIS files."""
    rank: int = Field(default=16, ge=1, le=1024)
    """Inner size of the adapter: how much it can learn, and how large its file is. 4 to 32 suits a style."""
    alpha: float = Field(default_factory=lambda adapter: float(adapter.get("rank", 16)), gt=0, le=1e6)
    """The adapter acts with alpha / rank. Not given: equal to `rank`. Half of it acts like half the learning rate."""
    rslora: bool = False
    """Let the adapter act with alpha / √rank instead, so that higher ranks need no other learning rate
    (arXiv:2312.03732). The file says the alpha that gives the same strength everywhere."""
    targets: Annotated[
        Literal["attention", "attention-mlp", "full"] | Annotated[tuple[str, ...], Strict(False)],
        AfterValidator(_regular_expressions),
    ] = "attention"
    """Which layers get one: `attention` (its four projections), `attention-mlp` (also the feed-forward layers around
    it), `full` (also the convolutions), or your own list of regular expressions over module paths."""
    rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1, le=1024)]], AfterValidator(_patterns)] = {}
    """Another rank for some layers: regular expression over module paths → rank; the first one found in a path counts.
    Alpha follows, so that alpha / rank stays, unless `alpha_pattern` says otherwise."""
    alpha_pattern: Annotated[dict[str, Annotated[float, Field(gt=0, le=1e6)]], AfterValidator(_patterns)] = {}
    """Another alpha for some layers, as in `rank_pattern`."""
    lr_pattern: Annotated[dict[str, Annotated[float, Field(ge=0, le=1000)]], AfterValidator(_patterns)] = {}
    """Multiples of the learning rate for some layers, as in `rank_pattern`. 0: these layers get no adapter."""
    lokr_factor: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Size of the small side of a LoKr: less is larger files. Not given: split as evenly as the layer allows."""
    text_encoder: bool = False
    """Train adapters of the text encoders too: learns new words better, forgets others sooner."""
    init: Literal["default", "gaussian", "pissa", "olora"] = "default"
    """How the matrices start; the adapter always begins without effect. `default` as torch initialises a linear layer,
    `gaussian` from N(0, 1 / rank²), `pissa` (arXiv:2404.02948) and `olora` (arXiv:2406.01775) from the main directions
    of the frozen weight, which learns faster; their files have twice the rank."""
    start_from: FilePath | None = None
    """Adapter file whose weights to start from, of the same kind and rank. Not given: a fresh start."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of leaving out each number between the two matrices, per step; against overfitting. LoRA and DoRA."""
    rank_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of leaving out each component of the rank, per picture. LoRA and DoRA."""
    module_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of leaving out each layer's adapter, per step."""
    max_norm: float = Field(default=0.0, ge=0, le=1e6)
    """Largest norm of a layer's change; what is larger after a step is scaled down. 0: no limit. 1 is usual."""


class DatasetConfig(Section):
    """A folder of images with captions; repeat the table for more folders."""

    path: FilePath
    """Folder of images, each with a caption in a `.txt` or `.caption` file of the same name, or in `metadata.jsonl`."""
    resolution: Side | WidthHeight = 512
    """Side of the training images in pixels, or `[width, height]`. With buckets: their area. 512 suits SD 1.x,
    768 SD 2.1, 1024 SDXL."""
    repeats: int = Field(default=1, ge=1, le=100_000)
    """How often each image is seen per epoch; balances folders of different size."""
    default_caption: str | None = None
    """Caption of images that have none. Not given: such images are trained with an empty caption, and reported."""
    caption_prefix: str = ""
    """Put before each caption as it is, for example `"in sks style, "`."""
    caption_suffix: str = ""
    """Put after each caption as it is."""
    shuffle_tags: bool = False
    """Shuffle the comma-separated parts of a caption every time it is used."""
    keep_tokens: int = Field(default=0, ge=0, le=1000)
    """Number of comma-separated parts at the start that are neither shuffled nor dropped."""
    tag_dropout: Share = 0.0
    """Probability of leaving out each comma-separated part."""
    caption_dropout: Share = 0.0
    """Probability of training an image with an empty caption, which makes guidance stronger later."""
    flip: bool = False
    """Mirror each image left to right half of the time. Not for text, faces or anything with a side."""
    buckets: bool = True
    """Keep the aspect ratio: images are grouped by shape. Off: all are cropped to `resolution`."""
    bucket_min: Side | None = None
    """Shortest side of a bucket in pixels. Not given: half of the shorter side of `resolution`."""
    bucket_max: Side | None = None
    """Longest side of a bucket in pixels. Not given: twice the longer side of `resolution`."""
    bucket_step: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"
    """Bucket sides are multiples of this. `auto`: the smallest step the model can take."""


class OptimizerConfig(Section):
    """How weights follow gradients."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
    """Optimiser. `adamw8bit` keeps its running means in 8 bits; needs a GPU and the package bitsandbytes."""
    lr: float = Field(default=1e-4, gt=0, le=10)
    """Learning rate: the first thing to change. Too high looks burnt or noisy, too low changes nothing."""
    text_encoder_lr: Annotated[float, Field(ge=0, le=10)] | None = None
    """Learning rate of the text encoder's adapter. Not given: half of `lr`. 0: no adapter for it."""
    text_encoder_2_lr: Annotated[float, Field(ge=0, le=10)] | None = None
    """Learning rate of the adapter of SDXL's second text encoder. Not given: that of the first. 0: no adapter."""
    text_encoder_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    """Steps after which the text encoders' adapters stay as they are, while the UNet's go on. Not given: never."""
    weight_decay: float = Field(default=0.01, ge=0, le=10)
    """Pull of the adapter's weights towards zero, in units of the learning rate (decoupled). Weights whose zero would
    change the base are left out: the magnitudes of `dora`, and all with `init` `pissa` or `olora`."""
    betas: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Strict(False)] = (
        0.9,
        0.999,
    )
    """Memory of the running means of gradient and squared gradient."""
    eps: float = Field(default=1e-8, gt=0, le=1)
    """Added to the divisor against division by zero."""
    max_grad_norm: float = Field(default=1.0, ge=0, le=1e6)
    """Longer gradients are scaled down to this norm. 0: never."""


class ScheduleConfig(Section):
    """The learning rate over time."""

    name: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after the warm-up: stay, or fall in a line or a half cosine until the last step."""
    warmup_steps: int = Field(default=0, ge=0, le=MAX_STEPS)
    """Optimiser steps during which the learning rate rises from 0."""
    min_lr_ratio: Share = 0.0
    """Where the fall ends, as a share of the learning rate."""


class LossConfig(Section):
    """What is minimised, and at which noise levels."""

    kind: Literal["mse", "huber"] = "mse"
    """Distance between prediction and target. `huber` counts outliers less: for data sets with bad images."""
    min_snr_gamma: float = Field(default=5.0, ge=0, le=1000)
    """Weight timesteps by min(SNR, gamma) / SNR, so that nearly clean images do not rule the training
    (Hang et al. 2023, arXiv:2303.09556). Adapted for v-prediction. 0: off."""
    noise_offset: float = Field(default=0.0, ge=0, le=1)
    """Shift each channel of the noise by a random amount of this size, for darker darks and brighter lights."""
    timestep_min: int = Field(default=0, ge=0, le=NUM_TIMESTEPS - 1)
    """Lowest timestep trained; low ones decide texture."""
    timestep_max: int = Field(default=NUM_TIMESTEPS, ge=1, le=NUM_TIMESTEPS)
    """Timesteps trained are below this; high ones decide composition."""


class PreviewConfig(Section):
    """Pictures generated while training. They cost time but do not change the adapter."""

    every: int = Field(default=100, ge=0, le=MAX_STEPS)
    """Steps between previews, besides those before the first and after the last step. 0: only those two."""
    prompts: Texts = ()
    """One picture each. None given: no previews."""
    negative: str = ""
    """What the pictures should not show."""
    seed: Seed = 7
    """Seed of the first prompt's picture; the following ones count up."""
    steps: int = Field(default=25, ge=1, le=max_denoising_steps())
    """Denoising steps per picture."""
    cfg: float = Field(default=7.0, ge=1, le=100)
    """How strictly to follow the prompt. 1: no guidance, twice as fast."""
    sampler: Literal["ddim", "euler", "euler-a", "heun", "lms", "dpm++2m", "dpm++2m-karras", "unipc"] = "ddim"
    """Sampling method, by the name other programs use."""
    size: Annotated[WidthHeight, BeforeValidator(_square)] | None = None
    """`[width, height]` of the pictures in pixels, or one number for both. Not given: the base model's own size."""


class ValidationConfig(Section):
    """Loss on images kept out of training, always with the same noise: falling means learning, rising overfitting."""

    every: int = Field(default=0, ge=0, le=MAX_STEPS)
    """Steps between measurements. 0: never, and all images are trained on."""
    fraction: float = Field(default=0.1, gt=0, le=0.5)
    """Share of the images kept out; at least one."""


class CacheConfig(Section):
    """Encoded images and captions on disk: the second run on the same images starts at once."""

    enabled: bool = True
    """Keep encoded images on disk. Off: they are encoded at every start and held in memory."""
    folder: FilePath = Path(".cache")
    """Where; can be shared by runs and deleted at any time."""


class TrainConfig(Section):
    """A training run."""

    run: RunConfig
    model: ModelConfig
    adapter: AdapterConfig = Field(default_factory=lambda: AdapterConfig())
    dataset: Annotated[tuple[DatasetConfig, ...], Strict(False), Field(min_length=1, max_length=1000)]
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    preview: PreviewConfig = PreviewConfig()
    validation: ValidationConfig = ValidationConfig()
    cache: CacheConfig = CacheConfig()

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Self:
        """Read a TOML file; `overrides` are `section.key=value` as of `--set`. Raises ConfigError with all problems."""
        return cls.parse(config_file.read_text(Path(path)), str(path), overrides)

    @classmethod
    def parse(cls, text: str, source: str = "config", overrides: Sequence[str] = ()) -> Self:
        """Read TOML text that came from `source`, the name errors call it by. Raises ConfigError with all problems."""
        draft = config_file.parse_toml(text, source)
        problems = config_file.apply_overrides(draft, overrides, cls, instead_of=INSTEAD_OF)
        config = None
        try:
            config = cls.model_validate(draft.data)
            rest: Self | None = config
        except ValidationError as error:
            problems += explain(error, draft.data, cls)
            rest = cls._without(problems, draft)
        if rest is not None:
            wrong = {problem.key for problem in problems}
            problems += [problem for keys, problem in conflicts(rest) if wrong.isdisjoint(keys)]
        if config is None or problems:
            raise ConfigError(source, draft.placed(problems))
        return config

    @classmethod
    def _without(cls, problems: Sequence[Problem], draft: config_file.Draft) -> Self | None:
        """What is left of a draft, to look for conflicts in; None where too little is right."""
        try:
            return cls.model_validate(repaired(draft.data, problems, _REQUIRED))
        except ValidationError:
            return None

    def to_toml(self) -> str:
        """All values with their docstrings as comments. Reading it gives an equal config; keys not given stay out."""
        return config_file.to_toml(self)

    def warnings(self) -> tuple[str, ...]:
        """Settings that will have no effect and what to change; none of them is a reason not to start."""
        return tuple(ineffective(self))


_REQUIRED = {"run": {"name": "x"}, "model": {"path": "x"}, "dataset": [{"path": "x"}]}
"""Stand-ins for required keys while the rest of an incomplete config is checked."""

INSTEAD_OF: dict[KeyPath, KeyPath] = {("run", "epochs"): ("run", "steps"), ("run", "steps"): ("run", "epochs")}
"""`--set` of the one takes the place of the other in the file."""
