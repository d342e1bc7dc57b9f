"""Importing what we use of diffusers leaves the rest unloaded, and the rest is there for whoever asks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *folders: Path) -> str:
    """The output of a fresh interpreter; `folders` come first on its path."""
    path = [*(str(folder) for folder in folders), str(ROOT)]
    script = f"import sys; sys.path[:0] = {path!r}\n{script}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_no_run_needs_is_not_imported() -> None:
    script = """
import lora_diffusion.recipe
for name in sys.modules: print(name)
"""
    loaded = set(run(script).split())

    assert {"lora_diffusion.recipe", "torch", "diffusers.models.unets.unet_2d_condition"} <= loaded
    assert not loaded & {"torch._dynamo", "torch._inductor", "bitsandbytes", "scipy.stats", "scipy.optimize"}
    assert not {name for name in loaded if "flux" in name}


def test_what_was_put_off_is_there_and_the_same() -> None:
    """One process for all, as each takes seconds to start."""
    script = """
from lora_diffusion.models import libraries
import importlib.util
import diffusers, diffusers.models.unets, torch, transformers

ours = {name: getattr(libraries, name) for name in libraries.__all__ if name[0].isupper()}
assert len(ours) >= 13
assert diffusers.UNet2DConditionModel is ours["UNet2DConditionModel"]
assert diffusers.AutoencoderKL is ours["AutoencoderKL"]
assert diffusers.Transformer2DModel is ours["Transformer2DModel"]
assert transformers.CLIPTextModel is ours["CLIPTextModel"]

from diffusers.models.transformers import FluxTransformer2DModel
assert FluxTransformer2DModel is diffusers.FluxTransformer2DModel
assert FluxTransformer2DModel.__module__ == "diffusers.models.transformers.transformer_flux"
assert issubclass(diffusers.models.unets.UNet2DModel, diffusers.ModelMixin)
assert "AutoencoderTiny" in dir(diffusers.models.autoencoders)
assert diffusers.StableDiffusionPipeline.__name__ == "StableDiffusionPipeline"

from diffusers.schedulers import scheduling_lms_discrete
assert abs(scheduling_lms_discrete.integrate.quad(lambda x: 2 * x, 0, 1)[0] - 1) < 1e-9
assert scheduling_lms_discrete.scipy.stats.beta.cdf(0.5, 1, 1) == 0.5
from transformers.loss import loss_for_object_detection
assert [list(x) for x in loss_for_object_detection.linear_sum_assignment([[1, 0], [0, 1]])] == [[0, 1], [1, 0]]

@libraries._disable_later(recursive=False)
def twice(x): return 2 * x
assert twice(3) == 6 and twice.__name__ == "twice"
if importlib.util.find_spec("bitsandbytes"):
    from diffusers.quantizers.bitsandbytes import utils
    linear = utils.bnb.nn.Linear4bit
    import bitsandbytes
    assert bitsandbytes.nn.Linear4bit is linear
"""
    run(script)


def test_the_unet_is_compiled_to_one_graph() -> None:
    script = """
import torch
from lora_diffusion.models.libraries import UNet2DConditionModel

torch.manual_seed(0)
down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
unet = UNet2DConditionModel(
    block_out_channels=(8, 16), down_block_types=down, up_block_types=up, layers_per_block=1, norm_num_groups=4,
    cross_attention_dim=8, attention_head_dim=4,
).requires_grad_(False)
inputs = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, 8)
graphs = []
compiled = torch.compile(unet, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
assert torch.equal(compiled(*inputs).sample, unet(*inputs).sample)
assert len(graphs) == 1
"""
    run(script)


def test_an_optimiser_needs_no_compiler_which_is_there_for_whoever_asks_for_it() -> None:
    script = """
import sys, torch
from lora_diffusion.models.libraries import without_compiler

def train():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for _ in range(2):
        weight.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    return weight.detach()

with without_compiler():
    found = train()
assert not {"torch._dynamo", "torch._dynamo.eval_frame"} & sys.modules.keys()
with without_compiler():
    import torch._dynamo
    torch._dynamo.reset()  # whatever a stand-in does not have is the true one's
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
assert torch._dynamo.disable(train) is not train
assert torch.equal(found, train())
print("the same")
"""
    assert run(script) == "the same\n"


STAND_INS = "from lora_diffusion.models.stand_ins import put_off\n"


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A package `shop` that imports the module `heavy`, and whose package `shop.goods` imports all it has."""
    files = {
        "heavy.py": "print('heavy loads')\ndef weigh(): return 7\nMASS = 3",
        "shop/__init__.py": "",
        "shop/scales.py": "import heavy\nfrom heavy import weigh",
        "shop/goods/__init__.py": "print('goods loads')\nfrom .tea import Tea\nfrom .salt import Salt",
        "shop/goods/tea.py": "class Tea: pass",
        "shop/goods/salt.py": "class Salt: pass",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_module_is_imported_when_it_is_used(library: Path) -> None:
    script = f"""{STAND_INS}
from lora_diffusion.models.stand_ins import call_later
with put_off({{"heavy": {{"weigh": call_later("heavy", "weigh")}}}}, ()):
    from shop import scales
print("heavy" in sys.modules)
print(scales.heavy.MASS, scales.weigh())
import heavy
print(scales.heavy.weigh is heavy.weigh)
"""
    assert run(script, library).splitlines() == ["False", "heavy loads", "3 7", "True"]


@pytest.mark.parametrize("module", ["tea", "pepper"])
def test_a_module_in_a_put_off_package_imports_that_and_each_runs_once(library: Path, module: str) -> None:
    """One that the package imports by itself, after what that one needs of it; and one that it does not."""
    (library / "shop/goods/__init__.py").write_text("print('goods loads')\nPRICE = 2\nfrom .tea import Tea")
    for name in ("tea", "pepper"):
        (library / f"shop/goods/{name}.py").write_text(
            f"print('{name} loads')\nfrom shop.goods import PRICE\nclass Tea: price = PRICE"
        )
    script = f"""{STAND_INS}
import importlib
with put_off({{"shop.goods": {{}}}}, ()):
    import shop.goods
    found = importlib.import_module("shop.goods.{module}")
import shop.goods
print(found.Tea.price, found is sys.modules["shop.goods.{module}"], shop.goods.{module} is found)
print(shop.goods.Tea is shop.goods.tea.Tea, found.__spec__.origin.endswith("{module}.py"), len(sys.meta_path))
"""
    output = run(f"import sys\nprint(len(sys.meta_path))\n{script}", library).splitlines()
    assert output[1:-1] == [
        *("goods loads", "tea loads", *(["pepper loads"] if module == "pepper" else [])),
        "2 True True",
    ]
    assert output[-1] == f"True True {output[0]}"


def test_a_package_runs_when_it_is_asked_for_a_name_and_keeps_its_submodules(library: Path) -> None:
    script = f"""{STAND_INS}
with put_off({{}}, ("shop.goods",)):
    from shop.goods.tea import Tea
print("shop.goods.salt" in sys.modules)
import shop.goods
print(shop.goods.Tea is Tea, shop.goods.Salt.__name__, shop.goods is sys.modules["shop.goods"])
try: shop.goods.Pepper
except AttributeError as error: print(error)
"""
    assert run(script, library).splitlines() == [
        *("False", "goods loads", "True Salt True"),
        "'_LazyPackage' object has no attribute 'Pepper'",
    ]


def test_what_does_not_exist_is_no_error(library: Path) -> None:
    script = f"""{STAND_INS}
with put_off({{"nothing": {{}}, "nothing.at.all": {{}}}}, ("shop.bads", "shop.goods.tea", "nowhere.goods")):
    from shop.goods import Tea
print(Tea.__name__, "nothing" in sys.modules, "shop.bads" in sys.modules)
"""
    assert run(script, library).splitlines() == ["goods loads", "Tea False False"]


def test_after_an_error_everything_is_imported_as_without(library: Path) -> None:
    """A submodule that cannot be imported before its package."""
    (library / "shop/goods/tea.py").write_text(
        "import sys\nsys.modules['shop.goods'].__dict__['PRICE']\nclass Tea: pass"
    )
    (library / "shop/goods/__init__.py").write_text("PRICE = 1\nfrom .tea import Tea")
    script = f"""{STAND_INS}
try:
    with put_off({{"heavy": {{}}}}, ("shop.goods",)):
        from shop.goods.tea import Tea
except KeyError: print("refused")
print("heavy" in sys.modules)
from shop.goods.tea import Tea
print(Tea.__name__, type(sys.modules["shop.goods"]).__name__)
"""
    assert run(script, library).splitlines() == ["refused", "False", "Tea module"]
