"""Which model family an adapter was made for, told by the names and shapes of its modules and by its metadata."""

from __future__ import annotations

from collections.abc import Mapping

from lora_diffusion.adapters.geometry import Geometry

FAMILY_NAMES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
FAMILY_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Width of the text conditioning, which every published model of the family has."""

_VERSIONS = (("sdxl", "sdxl"), ("sd_v2", "sd2"), ("sd_v1", "sd1"))  # how `ss_base_model_version` begins
_ARCHITECTURES = (
    ("stable-diffusion-xl", "sdxl"),
    ("stable-diffusion-v2", "sd2"),
    ("stable-diffusion-v1", "sd1"),
)  # how `modelspec.architecture` begins


def family_of_tensors(geometries: Mapping[str, Geometry]) -> str:
    """The family by what the modules show, by canonical name; "" if they could be of any."""
    if any(name.startswith("lora_te2_") for name in geometries):
        return "sdxl"
    widths = cross_widths(geometries)
    return FAMILY_WIDTHS.get(max(widths), "") if widths else ""


def family_of_metadata(metadata: Mapping[str, str]) -> str:
    """The family that the metadata names, "" if it names none that we know."""
    for key, beginnings in (("ss_base_model_version", _VERSIONS), ("modelspec.architecture", _ARCHITECTURES)):
        for beginning, family in beginnings:
            if metadata.get(key, "").startswith(beginning):
                return family
    return ""


def cross_widths(geometries: Mapping[str, Geometry]) -> set[int]:
    """Channels of the text conditioning, from every module that reads it."""
    return {geometry.inputs for name, geometry in geometries.items() if name.endswith("attn2_to_k")}


def made_for(geometries: Mapping[str, Geometry]) -> str:
    """For messages: what the modules of a file belong to."""
    widths = cross_widths(geometries)
    if any("double_blocks" in name or "single_blocks" in name for name in geometries):
        return "FLUX"
    family = FAMILY_NAMES.get(family_of_tensors(geometries), "a model" if widths else "another model")
    return f"{family} (cross-attention width {max(widths)})" if widths else family
