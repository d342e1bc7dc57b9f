"""What our code never does: run what it reads, draw from a random generator that it was not given, grow too long."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = [ROOT / "train.py", *sorted((ROOT / "lora_diffusion").rglob("*.py"))]
WEBUI = sorted((ROOT / "webui").rglob("*.py"))
FILES = [*PRODUCT, *sorted((ROOT / "samples").rglob("*.py"))]

RUNS_WHAT_IT_READS = {
    *("eval", "exec", "torch.load", "torch.save", "yaml.load", "os.system", "os.popen", "extractall"),
    *("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"),
}
TORCH_DRAWS = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"),
    *("multinomial", "poisson", "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_"),
    *("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "trunc_normal_", "orthogonal_"),
}
SEEDS_ALL = {"torch.manual_seed", "torch.seed", "torch.cuda.manual_seed_all", "accelerate.utils.set_seed"}
SEEDED_CLASSES = {"Random", "SystemRandom", "Generator", "default_rng", "SeedSequence", "Philox", "PCG64"}


def calls_of(source: str) -> Iterator[tuple[int, str, ast.Call]]:
    """(line, dotted name with import names resolved, call)."""
    tree = ast.parse(source)
    names = {
        alias.asname or alias.name.partition(".")[0]: (f"{node.module}." if isinstance(node, ast.ImportFrom) else "")
        + (alias.name if alias.asname or isinstance(node, ast.ImportFrom) else alias.name.partition(".")[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""
            first, dot, rest = name.partition(".")
            yield node.lineno, names.get(first, first) + dot + rest, node


def dangers(source: str) -> list[str]:
    """Calls and imports through which a file could run code."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: import {name}" for name in modules if name.split(".")[0] in RUNS_WHAT_IT_READS]
    for line, name, call in calls_of(source):
        if name in RUNS_WHAT_IT_READS or name.rpartition(".")[2] == "extractall":
            found.append(f"{line}: {name}")
        for keyword in call.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and not is_false:
                found.append(f"{line}: {keyword.arg}")
    return found


def global_draws(source: str) -> list[str]:
    """Calls that draw from, or seed, a generator of the whole process."""
    found: list[str] = []
    for line, name, call in calls_of(source):
        last = name.rpartition(".")[2]
        is_module_draw = re.fullmatch(r"(random|numpy\.random)\.\w+", name) and last not in SEEDED_CLASSES
        is_torch_draw = last in TORCH_DRAWS and (name.startswith("torch.") or last.endswith("_"))
        is_given = any(keyword.arg == "generator" for keyword in call.keywords)
        if is_module_draw or name in SEEDS_ALL or (is_torch_draw and not is_given):
            found.append(f"{line}: {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_cannot_be_made_to_run_what_it_reads(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_draws_random_numbers_from_given_generators_only(path: Path) -> None:
    assert global_draws(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [*PRODUCT, *WEBUI], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_and_no_function_is_too_long_to_be_read_at_once(path: Path) -> None:
    """At most 450 and 80 lines; the style guide aims at 400 and 60."""
    source = path.read_text(encoding="utf-8")
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}

    assert len(source.splitlines()) <= 450
    assert {name: lines for name, lines in lengths.items() if lines > 80} == {}


def test_the_scan_sees_all_product_code() -> None:
    assert len(PRODUCT) > 100
    assert len(WEBUI) > 50


@pytest.mark.parametrize(
    "line",
    [
        *("eval('1')", "exec('1')", "import pickle", "from pickle import loads", "import torch\ntorch.load('x')"),
        *("from torch import load as fetch\nfetch('x')", "import yaml\nyaml.load('x')", "z.extractall('x')"),
        *(
            "import subprocess\nsubprocess.run('ls', shell=True)",
            "f(trust_remote_code=True)",
            "f(trust_remote_code=flag)",
        ),
    ],
)
def test_the_scan_finds_what_is_forbidden(line: str) -> None:
    assert dangers(line)


@pytest.mark.parametrize(
    "line",
    [
        *("import torch\ntorch.randn(3)", "import torch as t\nt.randperm(3)", "from torch import rand\nrand(3)"),
        *("import random\nrandom.shuffle(x)", "from random import choice\nchoice(x)", "import random as r\nr.seed(1)"),
        *(
            "import numpy as np\nnp.random.normal()",
            "x.normal_()",
            "from torch.nn import init\ninit.kaiming_uniform_(w)",
        ),
        *("import torch\ntorch.manual_seed(1)", "from numpy import random\nrandom.rand()"),
    ],
)
def test_the_scan_finds_draws_from_global_generators(line: str) -> None:
    assert global_draws(line)


@pytest.mark.parametrize(
    "line",
    [
        *(
            "import torch\ntorch.randn(3, generator=g)",
            "x.normal_(generator=g)",
            "import random\nrandom.Random(1).choice(x)",
        ),
        *(
            "import numpy as np\nnp.random.default_rng(1)",
            "rng.choice(x)",
            "import torch\ntorch.Generator().manual_seed(1)",
        ),
        *("re.compile('x')", "model.eval()", "f(trust_remote_code=False)"),
    ],
)
def test_the_scan_lets_given_generators_pass(line: str) -> None:
    assert global_draws(line) == []
    assert dangers(line) == []
