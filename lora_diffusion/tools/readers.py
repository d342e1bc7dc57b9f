"""What other programs do with an adapter file: a table of rules, each about one property of the file.

The rules are what the programs' own code did on small models, or says: ComfyUI 0.3.64, stable-diffusion-webui-forge,
SD.Next, diffusers 0.42 with peft 0.21, and sd-scripts (`networks.lora`), all as of 2025. No weights are needed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from lora_diffusion.adapters.geometry import ALPHA, DORA_SCALE, DOWN, MID, Geometry, Shape

COMFYUI, FORGE, SDNEXT, DIFFUSERS, SD_SCRIPTS = "ComfyUI", "Forge / A1111", "SD.Next", "diffusers", "sd-scripts"
READERS = (COMFYUI, FORGE, SDNEXT, DIFFUSERS, SD_SCRIPTS)

_FORGE_LIMIT = 12  # keys that Forge cannot place before it refuses the file
_LDM_KEY = re.compile(r"lora_unet_(?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_\d")
_ATTENTION = re.compile(r"_attn[12]_to_(?:q|k|v|out_0)$")
_OUTER = re.compile(r"lora_unet_(?:conv_in|conv_out|time_embedding|add_embedding)(?:_|$)")


class Verdict(StrEnum):
    """How a program reads a file, the best first."""

    AS_TRAINED = "as trained"
    UNKNOWN = "not known"
    IN_PART = "in part"
    WRONG = "differently"
    NOTHING = "not at all"
    REFUSES = "refuses it"


_ORDER = list(Verdict)


@dataclass(frozen=True)
class FileFacts:
    """What the rules look at. Mappings are by canonical module name.

    format: "kohya", "peft" (older diffusers forms too) or "positional". keys: part → key in the file. shapes: part →
    shape. alphas: what the file means, also where it has no alpha. unread: keys that belong to no module.
    """

    format: str
    family: str
    keys: Mapping[str, Mapping[str, str]]
    shapes: Mapping[str, Mapping[str, Shape]]
    geometries: Mapping[str, Geometry]
    alphas: Mapping[str, float]
    unread: tuple[str, ...] = ()

    def first_key(self, name: str) -> str:
        return next(iter(self.keys[name].values()))


@dataclass(frozen=True)
class Reading:
    """What one program makes of a file, and why if that is not what was trained."""

    verdict: Verdict
    reasons: tuple[str, ...]


Finding = tuple[str, Verdict, str]
"""(reader, verdict, reason)."""


def what_readers_do(facts: FileFacts) -> dict[str, Reading]:
    """Each reader's worst verdict, with the reasons of all."""
    findings = [finding for rule in RULES for finding in rule(facts)]
    return {
        reader: Reading(
            max((verdict for name, verdict, _ in findings if name == reader), key=_ORDER.index, default=_ORDER[0]),
            tuple(dict.fromkeys(reason for name, _, reason in findings if name == reader)),
        )
        for reader in READERS
    }


def numbered_names(facts: FileFacts) -> Iterator[Finding]:
    if facts.format == "positional":
        yield from _all(READERS, Verdict.NOTHING, "the modules are numbered, as in 2022, not named")


def dotted_names(facts: FileFacts) -> Iterator[Finding]:
    """PEFT files and the older forms of diffusers."""
    if facts.format != "peft":
        return
    yield from _all((SDNEXT, SD_SCRIPTS), Verdict.NOTHING, "it looks for kohya names")
    if any(facts.first_key(name).startswith("base_model.") for name in facts.keys):
        yield from _all((COMFYUI, FORGE, DIFFUSERS), Verdict.UNKNOWN, "the names are those of PEFT without diffusers")
        return
    lost = [name for name in facts.keys if _is_lost_in_comfyui(facts.first_key(name))]
    lost_keys = [key for name in lost for key in facts.keys[name].values()]
    lost_keys += [key for keys in facts.keys.values() for part, key in keys.items() if part == DORA_SCALE]
    if lost_keys:
        reason = f"it does not find {len(lost)} of {len(facts.keys)} modules by their PEFT names"
        yield COMFYUI, Verdict.NOTHING if len(lost) == len(facts.keys) else Verdict.IN_PART, reason
        yield FORGE, Verdict.REFUSES if len(lost_keys) > _FORGE_LIMIT else Verdict.IN_PART, reason
    silent = [name for name in facts.keys.keys() - set(lost) if ALPHA not in facts.keys[name]]
    if any(facts.alphas[name] != facts.geometries[name].rank for name in silent):
        yield from _all((COMFYUI, FORGE), Verdict.WRONG, "it ignores alpha in the metadata: the strength is another")


def _is_lost_in_comfyui(key: str) -> bool:
    if key.startswith("unet."):
        return re.search(r"\.attn[12]\.to_", key) is not None
    return ".text_model." not in key or "_lora." in key


def alphas_beside_dotted_names(facts: FileFacts) -> Iterator[Finding]:
    if facts.format == "peft" and any(ALPHA in keys for keys in facts.keys.values()):
        yield DIFFUSERS, Verdict.REFUSES, "in a file of dotted names it takes no alpha tensors, only metadata"


def differing_alphas_in_attention(facts: FileFacts) -> Iterator[Finding]:
    if facts.format != "kohya":
        return
    for members in _by_component(facts).values():
        odd = _odd_ones(facts, [name for name in members if ALPHA in facts.keys[name]])
        if any(_ATTENTION.search(name) for name in odd):
            reason = "where attention layers have different alphas, it takes the most frequent one for all"
            yield DIFFUSERS, Verdict.WRONG, reason


def differing_alphas_in_a_text_encoder(facts: FileFacts) -> Iterator[Finding]:
    if facts.format != "kohya":
        return
    for component, members in _by_component(facts).items():
        if component != "lora_unet" and _odd_ones(facts, [name for name in members if ALPHA in facts.keys[name]]):
            reason = "where a text encoder has different alphas, it takes the most frequent one for all"
            yield DIFFUSERS, Verdict.WRONG, reason


def some_alphas_missing(facts: FileFacts) -> Iterator[Finding]:
    if facts.format != "kohya":
        return
    for members in _by_component(facts).values():
        given = Counter(facts.alphas[name] for name in members if ALPHA in facts.keys[name])
        missing = [name for name in members if ALPHA not in facts.keys[name]]
        if given and any(facts.alphas[name] != given.most_common(1)[0][0] for name in missing):
            reason = "where some modules have no alpha, it takes the most frequent one for them"
            yield DIFFUSERS, Verdict.WRONG, reason


def alpha_of_zero(facts: FileFacts) -> Iterator[Finding]:
    if facts.format == "kohya" and any(alpha == 0 for alpha in facts.alphas.values()):
        yield SD_SCRIPTS, Verdict.WRONG, "it takes alpha 0 for alpha = rank, which is strength 1"


def loha_and_lokr(facts: FileFacts) -> Iterator[Finding]:
    names = [name for name, geometry in facts.geometries.items() if geometry.kind != "lora"]
    if names:
        yield DIFFUSERS, Verdict.REFUSES, "it has no LoHa and LoKr"
        yield _without(facts, SD_SCRIPTS, names, "networks.lora has no LoHa and LoKr")


def tucker_cores(facts: FileFacts) -> Iterator[Finding]:
    if any(MID in shapes for shapes in facts.shapes.values()):
        yield DIFFUSERS, Verdict.REFUSES, "it has no lora_mid (Tucker convolutions)"
        yield SD_SCRIPTS, Verdict.WRONG, "it leaves out lora_mid (Tucker convolutions)"


def flat_convolutions(facts: FileFacts) -> Iterator[Finding]:
    """A matrix where the model has a 1x1 convolution."""
    ends = ("_conv_shortcut", "_proj_in", "_proj_out") if facts.family == "sd1" else ("_conv_shortcut",)
    if any(len(facts.shapes[name].get(DOWN, (0,) * 4)) == 2 for name in facts.shapes if name.endswith(ends)):
        reason = "the weights of 1x1 convolutions are matrices; it wants them with 4 sizes"
        yield from _all((DIFFUSERS, SD_SCRIPTS), Verdict.REFUSES, reason)


def dora_per_input(facts: FileFacts) -> Iterator[Finding]:
    if facts.format == "kohya" and any(geometry.dora_axis == 1 for geometry in facts.geometries.values()):
        yield from _all((DIFFUSERS, SD_SCRIPTS), Verdict.WRONG, "it leaves out dora_scale, which is part of the change")


def dora_per_output(facts: FileFacts) -> Iterator[Finding]:
    if facts.format == "kohya" and any(geometry.dora_axis == 0 for geometry in facts.geometries.values()):
        yield COMFYUI, Verdict.WRONG, "with dora_scale per output it divides by the norm of W instead of W + change"
        yield FORGE, Verdict.WRONG, "with dora_scale per output it divides by another norm than in training"
        yield from _all((DIFFUSERS, SD_SCRIPTS), Verdict.WRONG, "it leaves out dora_scale, which is part of the change")


def ldm_block_names(facts: FileFacts) -> Iterator[Finding]:
    names = _in_ldm_names(facts)
    if names and facts.family in ("sd1", "sd2"):
        yield DIFFUSERS, Verdict.WRONG, "it numbers input_blocks, output_blocks as in SDXL, whatever the model"
        yield _without(facts, SD_SCRIPTS, names, "it knows input_blocks, output_blocks for SDXL only")


def two_spellings_of_blocks(facts: FileFacts) -> Iterator[Finding]:
    names = _in_ldm_names(facts)
    if facts.family == "sdxl" and 0 < len(names) < len(_by_component(facts).get("lora_unet", ())):
        reason = f"the UNet is spelled in two ways; it drops the {len(names)} modules named input_blocks and so on"
        yield DIFFUSERS, Verdict.IN_PART, reason
        yield SD_SCRIPTS, Verdict.IN_PART, "the UNet is spelled in two ways; it leaves some modules out"


def prefix_of_the_text_encoder(facts: FileFacts) -> Iterator[Finding]:
    if facts.format != "kohya" or not facts.family:
        return
    wrong, right = ("lora_te_", "lora_te1_") if facts.family == "sdxl" else ("lora_te1_", "lora_te_")
    if names := [name for name in facts.keys if name.startswith(wrong)]:
        for reader in (SDNEXT, SD_SCRIPTS):
            yield _without(facts, reader, names, f"it looks for the text encoder as {right}, here it is {wrong}")


def text_encoder_without_text_model(facts: FileFacts) -> Iterator[Finding]:
    if facts.format != "kohya":
        return
    names = [name for name in facts.keys if re.match(r"lora_te[12]?_encoder_", name)]
    if names:
        reason = "it looks for text_model in the names of the text encoder"
        yield _without(facts, COMFYUI, names, reason)
        yield _without(facts, SD_SCRIPTS, names, reason)
        if sum(len(facts.keys[name]) for name in names) > _FORGE_LIMIT:
            yield FORGE, Verdict.REFUSES, reason
        else:
            yield _without(facts, FORGE, names, reason)


def outer_layers(facts: FileFacts) -> Iterator[Finding]:
    if names := [name for name in facts.keys if _OUTER.match(name)]:
        yield _without(facts, SD_SCRIPTS, names, "it leaves out the layers before and after the blocks")


def text_projections(facts: FileFacts) -> Iterator[Finding]:
    if facts.format == "kohya" and (names := [name for name in facts.keys if name.endswith("_text_projection")]):
        yield _without(facts, SD_SCRIPTS, names, "it leaves out the projection at the end of a text encoder")


def tensors_of_no_module(facts: FileFacts) -> Iterator[Finding]:
    if facts.unread:
        reason = f"there are {len(facts.unread)} tensors of no module, such as {facts.unread[0][:60]}"
        yield DIFFUSERS, Verdict.REFUSES, reason
        if len(facts.unread) > _FORGE_LIMIT:
            yield FORGE, Verdict.REFUSES, reason


def lycoris_prefix(facts: FileFacts) -> Iterator[Finding]:
    names = [name for name in facts.keys if facts.first_key(name).startswith("lycoris_")]
    if names:
        reason = "the modules are called lycoris_…, not lora_unet_…"
        yield DIFFUSERS, Verdict.REFUSES, reason
        yield _without(facts, SD_SCRIPTS, names, reason)
        yield from _all((COMFYUI, FORGE, SDNEXT), Verdict.UNKNOWN, reason)


RULES: tuple[Callable[[FileFacts], Iterable[Finding]], ...] = (
    numbered_names,
    dotted_names,
    alphas_beside_dotted_names,
    differing_alphas_in_attention,
    differing_alphas_in_a_text_encoder,
    some_alphas_missing,
    alpha_of_zero,
    loha_and_lokr,
    tucker_cores,
    flat_convolutions,
    dora_per_input,
    dora_per_output,
    ldm_block_names,
    two_spellings_of_blocks,
    prefix_of_the_text_encoder,
    text_encoder_without_text_model,
    outer_layers,
    text_projections,
    tensors_of_no_module,
    lycoris_prefix,
)


def spelling_of_blocks(facts: FileFacts) -> str:
    """How a kohya file calls the UNet's blocks: "LDM", "diffusers", "LDM and diffusers"; "" without such blocks."""
    if facts.format != "kohya":
        return ""
    num_ldm = len(_in_ldm_names(facts))
    num_unet = len(_by_component(facts).get("lora_unet", ()))
    return " and ".join([*(["LDM"] if num_ldm else []), *(["diffusers"] if num_unet > num_ldm else [])])


def _in_ldm_names(facts: FileFacts) -> list[str]:
    return [name for name in facts.keys if _LDM_KEY.match(facts.first_key(name))]


def _by_component(facts: FileFacts) -> dict[str, list[str]]:
    components: dict[str, list[str]] = {}
    for name in facts.keys:
        components.setdefault("_".join(name.split("_", 2)[:2]), []).append(name)
    return components


def _odd_ones(facts: FileFacts, names: Collection[str]) -> list[str]:
    """Those whose alpha is not the most frequent one; all if none is the most frequent."""
    counts = Counter(facts.alphas[name] for name in names).most_common(2)
    if len(counts) == 2 and counts[0][1] == counts[1][1]:
        return list(names)
    return [name for name in names if facts.alphas[name] != counts[0][0]]


def _without(facts: FileFacts, reader: str, names: Collection[str], reason: str) -> Finding:
    """The reader does without these modules."""
    is_all = len(names) == len(facts.keys)
    detail = reason if is_all else f"{reason} ({len(names)} of {len(facts.keys)} modules)"
    return reader, Verdict.NOTHING if is_all else Verdict.IN_PART, detail


def _all(readers: Iterable[str], verdict: Verdict, reason: str) -> Iterator[Finding]:
    yield from ((reader, verdict, reason) for reader in readers)
