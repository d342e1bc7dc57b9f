"""Metadata of adapter files: what readers sort by, and nothing private."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import torch
from safetensors.torch import save

from lora_diffusion.formats.metadata import MINIMUM_KEYS, TrainingFacts, build_metadata, tensor_hash

FACTS = TrainingFacts(
    output_name="ink",
    base_model="/home/ada/models/dreamy-v3",
    base_model_version="sd_v1",
    architecture="stable-diffusion-v1",
    rank=16,
    alpha=8.0,
    resolution=(512, 768),
    seed=42,
    steps=400,
    max_steps=2000,
    started_at=1_700_000_000.5,
    finished_at=1_700_003_600.25,
    clip_skip=2,
    unet_lr=1e-4,
    tag_frequency={"/home/ada/pictures/ink": {"a house": 3}, "/mnt/other/ink": {"a boat": 1}},
    image_counts={"C:\\Users\\ada\\pictures\\ink": (2, 28)},
    bucket_counts={(512, 768): 20, (512, 512): 8},
)


def test_all_values_are_strings() -> None:
    assert all(isinstance(value, str) for value in build_metadata(FACTS).values())


def test_no_folder_above_the_data_or_the_base_is_named() -> None:
    text = json.dumps(build_metadata(FACTS))
    for private in ("ada", "/home", "Users", "pictures", "/mnt"):
        assert private not in text


def test_folders_of_one_name_keep_their_own_tags() -> None:
    tags = json.loads(build_metadata(FACTS)["ss_tag_frequency"])
    assert tags == {"ink": {"a house": 3}, "ink 2": {"a boat": 1}}


def test_keys_that_readers_sort_by() -> None:
    metadata = build_metadata(FACTS)
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_v2"] == "False"
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == "16"
    assert float(metadata["ss_network_alpha"]) == 8
    assert metadata["ss_sd_model_name"] == "dreamy-v3"
    assert metadata["ss_output_name"] == "ink"
    assert metadata["ss_text_encoder_lr"] == "None"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.implementation"] == "diffusers"
    assert metadata["modelspec.resolution"] == "512x768"
    assert metadata["modelspec.date"] == "2023-11-14T23:13:20"


def test_bucket_info_has_the_shape_that_model_browsers_read() -> None:
    buckets = json.loads(build_metadata(FACTS)["ss_bucket_info"])["buckets"]
    assert buckets == {"0": {"resolution": [512, 512], "count": 8}, "1": {"resolution": [512, 768], "count": 20}}
    dirs = json.loads(build_metadata(FACTS)["ss_dataset_dirs"])
    assert dirs == {"ink": {"n_repeats": 2, "img_count": 28}}


def test_the_minimum_is_what_sd_scripts_keeps_without_metadata() -> None:
    metadata = build_metadata(FACTS, only_minimum=True)
    assert tuple(metadata) == MINIMUM_KEYS
    assert len(MINIMUM_KEYS) == 6


def test_absent_values_are_left_out_of_modelspec() -> None:
    assert "modelspec.trigger_phrase" not in build_metadata(FACTS)
    assert build_metadata(replace(FACTS, trigger="sks"))["modelspec.trigger_phrase"] == "sks"


def test_same_facts_give_the_same_metadata() -> None:
    assert build_metadata(FACTS) == build_metadata(replace(FACTS))


def test_tensor_hash_is_the_sha256_after_the_header_whatever_the_metadata() -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.ones(3, dtype=torch.float16)}
    data = save(tensors, {"x": "y"})
    assert tensor_hash(data) == tensor_hash(save(tensors, {"other": "text" * 50}))
    assert tensor_hash(data) == hashlib.sha256(data[-22:]).hexdigest()  # 4 · 4 + 3 · 2 bytes of values
