"""Files that must not be applied: each is refused quickly, by name and with the reason, before a model is touched."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from lora_diffusion.formats.adapter_file import AdapterFile, AdapterFileError
from lora_diffusion.models.base import DiffusionModel, weights_id
from lora_diffusion.models.load import load_model
from tests.tiny import make_tiny_sd1

Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
K = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
PEFT_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load_model(make_tiny_sd1(tmp_path_factory.mktemp("base")))


def good(width: int = 32, channels: int = 16, rank: int = 4) -> Tensors:
    """Two modules that fit the tiny base, whose text conditioning has 32 channels."""
    tensors = {}
    for name, inputs in ((Q, channels), (K, width)):
        tensors[f"{name}.lora_down.weight"] = torch.full((rank, inputs), 0.1)
        tensors[f"{name}.lora_up.weight"] = torch.full((channels, rank), 0.1)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def peft(rank: int = 4, **config: object) -> tuple[Tensors, dict[str, str]]:
    tensors = {f"{PEFT_K}.lora_A.weight": torch.ones(rank, 32), f"{PEFT_K}.lora_B.weight": torch.ones(16, rank)}
    return tensors, {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}


def loha() -> Tensors:
    sizes = {"w1_a": (16, 2), "w1_b": (2, 32), "w2_a": (16, 2), "w2_b": (2, 32)}
    return {f"{K}.hada_{part}": torch.ones(size) for part, size in sizes.items()}


HANGS_S = 30.0
"""CPU seconds that no file may take, on any machine; what they take on a quiet one is the test marked `timed`."""


def read_and_attach(path: Path, model: DiffusionModel, limit: float = HANGS_S) -> None:
    """Attempts to use the file; asserts that this takes less than `limit` CPU s and leaves the model as it was."""
    before, text = weights_id("", tuple(model.state_dict().items())), str(model)
    start = time.process_time()  # what a busy machine does meanwhile is not ours
    try:
        AdapterFile.read(path).attach(model.parts)
    finally:
        assert time.process_time() - start < limit
        assert weights_id("", tuple(model.state_dict().items())) == before
        assert str(model) == text


def test_the_good_files_that_the_bad_ones_are_made_from_are_accepted(model: DiffusionModel, tmp_path: Path) -> None:
    save_file(good(), tmp_path / "kohya.safetensors")
    tensors, metadata = peft(r=4, lora_alpha=8)
    save_file(tensors, tmp_path / "peft.safetensors", metadata)
    for name in ("kohya", "peft"):
        attachment = AdapterFile.read(tmp_path / f"{name}.safetensors").attach(model.parts)
        assert len(attachment.matches) > 0
        assert attachment.unread == ()


def one_value(key: str, value: float) -> Tensors:
    tensors = good()
    tensors[key].view(-1)[-1] = value
    return tensors


def without(key: str) -> Tensors:
    tensors = good()
    del tensors[key]
    return tensors


DOWN, UP = f"{K}.lora_down.weight", f"{K}.lora_up.weight"
BAD_TENSORS: dict[str, tuple[Tensors, str]] = {
    "one NaN": (one_value(UP, float("nan")), f"{UP} holds NaN or infinity"),
    "one infinity": (one_value(DOWN, float("-inf")), f"{DOWN} holds NaN or infinity"),
    "NaN alpha": (one_value(f"{K}.alpha", float("nan")), f"{K}.alpha holds NaN or infinity"),
    "ranks differ": (good() | {UP: torch.ones(16, 3)}, "has rank 4, lora_up.weight has rank 3"),
    "no up": (without(UP), f"{K}: lora_up.weight is missing"),
    "no down": (without(DOWN), f"{K}: lora_down.weight is missing"),
    "rank 0": (good() | {UP: torch.ones(16, 0), DOWN: torch.ones(0, 32)}, r"lora_down.weight has shape \(0, 32\)"),
    "one dimension": (good() | {UP: torch.ones(16)}, r"lora_up.weight has shape \(16,\)"),
    "three dimensions": (good() | {UP: torch.ones(16, 4, 1)}, r"lora_up.weight has shape \(16, 4, 1\)"),
    "integers": (good() | {UP: torch.ones(16, 4, dtype=torch.int64)}, "lora_up.weight is I64"),
    "complex": (good() | {UP: torch.ones(16, 4, dtype=torch.complex64)}, "lora_up.weight is C64"),
    "alpha of two": (good() | {f"{K}.alpha": torch.ones(2)}, r"alpha has shape \(2,\)"),
    "up not 1x1": (good() | {UP: torch.ones(16, 4, 3, 3), DOWN: torch.ones(4, 32, 3, 3)}, "do not belong together"),
    "no tensors": ({}, "it holds no tensors"),
    "no keys we know": ({"foo.bar": torch.ones(2)}, r"none of its 1 tensors is named like one \(the first: foo.bar"),
    "SDXL": (
        good(width=2048),
        "made for SDXL .cross-attention width 2048.; this base has a cross-attention width of 32",
    ),
    "SD 2": (good(width=1024), "made for SD 2.x .cross-attention width 1024."),
    "other width": (
        good(channels=320),
        r"attn2_to_[qk] is made for a layer of 320 x 32\d?, the base's is Linear",
    ),
    "FLUX": (
        {key.replace("mid_block_attentions_0_transformer_blocks", "double_blocks"): t for key, t in good().items()},
        "made for FLUX.* It has none of the 2 modules",
    ),
    "FLUX in PEFT names": ({"transformer.x.lora_A.weight": torch.ones(2, 2)}, "is no part of an adapter"),
    "SDXL in LDM names": (
        {key.replace("mid_block_attentions_0", "input_blocks_4_1"): t for key, t in good(width=2048).items()},
        "made for SDXL",
    ),
    "checkpoint": ({"model.diffusion_model.out.2.weight": torch.ones(2)}, "a full checkpoint; use it as model.path"),
    "UNet": ({"down_blocks.0.resnets.0.conv1.weight": torch.ones(2)}, "a part of a base model"),
    "embedding": ({"emb_params": torch.ones(3, 32)}, "a textual inversion embedding"),
    "numbered, half of it": ({"unet:0:down": torch.ones(4, 32)}, "lora_up.weight is missing"),
    "numbered, too many": ({"unet:144:down": torch.ones(4, 32)}, "unet:144:down is no part of an adapter"),
    "numbered and kohya": (good() | {"unet:0:down": torch.ones(4, 32)}, "mixes kohya names .* and numbered names"),
    "both namings": (good() | peft()[0], "mixes kohya names .* and PEFT names"),
    "DoRA of another size": (good() | {f"{K}.dora_scale": torch.ones(1, 31)}, r"dora_scale has shape \(1, 31\)"),
    "DoRA scale a vector": (good() | {f"{K}.dora_scale": torch.ones(32)}, r"dora_scale has shape \(32,\)"),
    "DoRA alone": ({f"{K}.dora_scale": torch.ones(1, 32)}, "dora_scale alone are no adapter"),
    "PEFT DoRA of another size": (
        peft()[0] | {f"{PEFT_K}.lora_magnitude_vector": torch.ones(17)},
        r"dora_scale has shape \(17, 1\)",
    ),
    "a quarter of a LoHa": ({f"{K}.hada_w1_a": torch.ones(16, 2)}, "hada_w1_b is missing"),
    "LoHa of two ranks": (loha() | {f"{K}.hada_w2_b": torch.ones(3, 32)}, "hada_w2_a has rank 2, hada_w2_b has rank 3"),
    "LoHa of two sizes": (
        loha() | {f"{K}.hada_w2_b": torch.ones(2, 33)},
        "cannot be multiplied entry by entry",
    ),
    "LoHa with half a Tucker core": (loha() | {f"{K}.hada_t1": torch.ones(2, 3, 3, 3)}, "hada_w1_a has rank 16"),
    "half a LoKr": ({f"{K}.lokr_w1": torch.ones(4, 4)}, "lokr_w2 is missing"),
    "LoKr whole and factored": (
        {f"{K}.lokr_{x}": torch.ones(4, 4) for x in ("w1", "w1_a", "w1_b", "w2")},
        "lokr_w1 is there whole and factored",
    ),
    "LoKr of two ranks": (
        {f"{K}.lokr_w1": torch.ones(4, 4), f"{K}.lokr_w2_a": torch.ones(4, 2), f"{K}.lokr_w2_b": torch.ones(3, 8)},
        "lokr_w2_a has rank 2, lokr_w2_b has rank 3",
    ),
    "LoKr of another layer": (
        {f"{K}.lokr_w1": torch.ones(4, 4), f"{K}.lokr_w2": torch.ones(4, 4)},
        "made for a layer of 16 x 16, the base's is Linear",
    ),
    "two kinds in one module": (good() | {f"{K}.lokr_w1": torch.ones(4, 4)}, "lokr_w1 does not belong to a lora"),
    "Tucker core without a kernel": (
        good() | {f"{K}.lora_mid.weight": torch.ones(4, 4, 3, 3)},
        "does not belong between",
    ),
    "NaN in a LoHa": (loha() | {f"{K}.hada_w1_a": torch.full((16, 2), torch.nan)}, "hada_w1_a holds NaN"),
    "NaN in a magnitude": (good() | {f"{K}.dora_scale": torch.full((1, 32), torch.nan)}, "dora_scale holds NaN"),
    "GLoRA": ({f"{K}.a1.weight": torch.ones(4, 4)}, "belongs to GLoRA"),
    "OFT": ({f"{K}.oft_blocks": torch.ones(4, 4)}, "belongs to OFT"),
    "norm layers": (good() | {"lora_unet_conv_norm_out.w_norm": torch.ones(4)}, "belongs to trained norm layers"),
    "full difference": ({f"{K}.diff": torch.ones(16, 32)}, "full weight differences"),
    "unknown part": (good() | {f"{K}.scale": torch.tensor(1.0)}, f"{K}.scale is no part of an adapter"),
    "PEFT bias": (peft()[0] | {f"{PEFT_K}.lora_B.bias": torch.ones(16)}, "lora_B.bias is no part of an adapter"),
    "PEFT full difference": (peft()[0] | {f"{PEFT_K}.diff_b": torch.ones(16)}, "diff_b belongs to full weight diff"),
    "PEFT norm": (peft()[0] | {f"{PEFT_K}.w_norm.weight": torch.ones(16)}, "w_norm.weight belongs to trained norm"),
    "PEFT alpha of no module": (peft()[0] | {"unet.mid_block.alpha": torch.ones(())}, "alpha alone are no adapter"),
    "PEFT alpha of two": (peft()[0] | {f"{PEFT_K}.alpha": torch.ones(2)}, r"alpha has shape \(2,\)"),
    "same PEFT tensor twice": (
        peft()[0] | {f"{PEFT_K.replace('to_k', 'processor.to_k')}_lora.down.weight": torch.ones(4, 32)},
        "name the same tensor",
    ),
}
EVIL_KEYS = [
    "lora_unet___class__.lora_down.weight",
    "__import__('os').system('touch canary').lora_down.weight",
    "../../etc/passwd.lora_down.weight",
    "lora_unet_../x.alpha",
    f"lora_unet_{'a' * 5000}.alpha",
    "lora_unet_x\n.alpha",
    "lora_unet_\N{CYRILLIC SMALL LETTER A}.alpha",
    "unet.\N{CYRILLIC SMALL LETTER A}.alpha",
    f"{K}.diff\n",
]


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_refused_with_the_reason(name: str, model: DiffusionModel, tmp_path: Path) -> None:
    tensors, reason = BAD_TENSORS[name]
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises(AdapterFileError, match=rf"bad\.safetensors: .*{reason}"):
        read_and_attach(path, model)


@pytest.mark.parametrize("key", EVIL_KEYS)
def test_keys_that_are_no_module_names_are_refused(key: str, model: DiffusionModel, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(good() | {key: torch.ones(1)}, path)
    with pytest.raises(AdapterFileError, match=r"cannot be a tensor's name") as error:
        read_and_attach(path, model)
    assert len(str(error.value)) < 1000
    assert not Path("canary").exists()


@pytest.mark.parametrize("stem", ["t{}", "lora_unet_x{}.lora_down.weight"])
def test_sixty_thousand_empty_tensors_are_refused(stem: str, model: DiffusionModel, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    save_file({stem.format(i): torch.ones(0) for i in range(60_000)}, path)
    with pytest.raises(AdapterFileError, match=r"none of its 60000 tensors|has shape \(0,\)"):
        read_and_attach(path, model)


@pytest.mark.slow
@pytest.mark.timed
def test_the_longest_header_is_refused_within_two_seconds(model: DiffusionModel, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    save_file({f"lora_unet_x{i}.lora_down.weight": torch.ones(0) for i in range(60_000)}, path)
    with pytest.raises(AdapterFileError):
        read_and_attach(path, model, limit=2.0)


BAD_METADATA: dict[str, tuple[dict[str, object] | str, str]] = {
    "another rank": ({"r": 16, "lora_alpha": 8}, "says rank 16 for .* tensors have rank 4"),
    "another rank by pattern": ({"r": 4, "lora_alpha": 8, "rank_pattern": {"attn2.to_k": 2}}, "says rank 2"),
    "no rank": ({"lora_alpha": 8}, "gives unet.r as None"),
    "no alpha": ({"r": 4}, "gives unet.lora_alpha as None"),
    "NaN alpha": ({"r": 4, "lora_alpha": float("nan")}, "gives unet.lora_alpha as nan"),
    "alpha is text": ({"r": 4, "lora_alpha": "8"}, "gives unet.lora_alpha as '8'"),
    "slow expression": ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"(.*.*)*x": 1}}, "not a plain module path"),
    "pattern is a list": ({"r": 4, "lora_alpha": 8, "rank_pattern": [1]}, "is not a table"),
    "not JSON": ("{", "cannot be read"),
    "not an object": ("[]", "not a JSON object"),
    "nested": ("[" * 200_000, "nested too deep"),
    "huge": (" " * 2_000_000, "it has 2000000 characters"),
}


@pytest.mark.parametrize("name", BAD_METADATA)
def test_metadata_that_leaves_the_scale_unknown_is_refused(name: str, model: DiffusionModel, tmp_path: Path) -> None:
    content, reason = BAD_METADATA[name]
    tensors, metadata = (
        peft(**content) if isinstance(content, dict) else (peft()[0], {"lora_adapter_metadata": content})
    )
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(AdapterFileError, match=rf"bad\.safetensors: .*{reason}"):
        read_and_attach(path, model)


def with_header(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


BAD_CONTAINERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut short"),
    "seven bytes": (bytes(7), "cut short"),
    "header cut": (save(good())[:100], "cut short"),
    "data cut": (save(good())[:-1], "cut short"),
    "data extended": (save(good()) + b"PK", "extended"),
    "header too long": ((1 << 60).to_bytes(8, "little") + b"{}", "cut short"),
    "pickle": (pickle.dumps({"a": 1}), "pickled PyTorch file"),
    "zip": (b"PK\x03\x04" + bytes(100), "pickled PyTorch file"),
    "HTML": (b"<!DOCTYPE html><html>404</html>", "not a safetensors file"),
    "header no JSON": (with_header(b"{nonsense"), "header is damaged"),
    "header a list": (with_header([]), "does not start with"),
    "header no UTF-8": (with_header(b"{\xff\xfe"), "header is damaged"),
    "nested header": (with_header(b'{"a":' * 100_000), "header is damaged"),
    "name twice": (
        with_header(b'{"a":%b,"a":%b}' % (json.dumps(entry(0, 8)).encode(), json.dumps(entry(0, 8)).encode())),
        "a name occurs twice",
    ),
    "overlap": (with_header({"a": entry(0, 8), "b": entry(4, 8)}), "overlap or leave a gap"),
    "gap": (with_header({"a": entry(4, 8)}), "overlap or leave a gap"),
    "backwards": (with_header({"a": entry(8, 0)}), "impossible dtype, shape or place|does not fill"),
    "outside": (with_header({"a": entry(0, 80)}), "need 80 bytes, the file has 8"),
    "negative": (with_header({"a": entry(0, 8, [-2])}), "impossible"),
    "shape lies": (with_header({"a": entry(0, 8, [1 << 40, 1 << 40])}), "does not fill"),
    "unknown dtype": (with_header({"a": entry(0, 8, dtype="F7")}), "impossible dtype"),
    "boolean shape": (with_header({"a": entry(0, 4, [True])}), "impossible dtype, shape"),
    "no offsets": (with_header({"a": {"dtype": "F32", "shape": [2]}}), "header is damaged"),
    "metadata no text": (with_header({"__metadata__": {"a": 1}}), "map strings to strings"),
}


@pytest.mark.parametrize("name", BAD_CONTAINERS)
def test_damaged_containers_are_refused(name: str, model: DiffusionModel, tmp_path: Path) -> None:
    data, reason = BAD_CONTAINERS[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(AdapterFileError, match=rf"bad\.safetensors: .*({reason})"):
        read_and_attach(path, model)


def test_a_path_that_is_no_file_is_refused(model: DiffusionModel, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"missing.safetensors: there is no such file"):
        read_and_attach(tmp_path / "missing.safetensors", model)
    with pytest.raises(AdapterFileError, match=r"not a file|cannot be read"):
        read_and_attach(tmp_path, model)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_refused_without_waiting_for_a_writer(model: DiffusionModel, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(AdapterFileError, match="not a file"):
        read_and_attach(tmp_path / "pipe.safetensors", model)


def make_bomb(canary: Path) -> bytes:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return (Path.touch, (canary,))

    return pickle.dumps(Bomb())


def test_a_pickle_named_safetensors_is_not_run(model: DiffusionModel, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(make_bomb(tmp_path / "canary"))
    with pytest.raises(AdapterFileError, match="pickled PyTorch file"):
        read_and_attach(path, model)
    assert not (tmp_path / "canary").exists()
