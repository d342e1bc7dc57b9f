"""Who may import whom, and who must never load torch. `docs/architecture.md` explains the layers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_diffusion"

FOUNDATION = {"errors", "files", "progress", "streams", "container", "ldm_names", "timesteps"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "progress": set(),
    "streams": set(),
    "files": {"errors"},
    "container": {"errors"},
    "ldm_names": set(),
    "timesteps": set(),
    "config": {"errors", "timesteps"},
    "runs": {"config", "errors", "files"},
    "workspace": set(),
    "jobs": {"config", "runs", "workspace"} | FOUNDATION,
    "captioning": {"data", "models"} | FOUNDATION,
    "serving": {"generation", "models", "adapters", "formats", "diffusion", "workspace"} | FOUNDATION,
    "adapters": {"errors", "progress"},
    "diffusion": {"errors"},
    "data": FOUNDATION,
    "formats": {"adapters"} | FOUNDATION,
    "models": {"diffusion"} | FOUNDATION,
    "generation": {"models", "adapters", "formats", "diffusion"} | FOUNDATION,
    "tools": {"models", "adapters", "formats"} | FOUNDATION,
    "kohya": {"config", "data"} | FOUNDATION,
    "training": {"data", "models", "adapters", "formats", "diffusion", "generation", "runs"} | FOUNDATION,
}
"""Group (a folder, a file, or the files config*.py) → groups below it. Everything else is on top and imports freely."""

ON_TOP = {
    *(
        "launch",
        "caption_run",
        "recipe",
        "recipe_adapters",
        "recipe_base",
        "recipe_data",
        "training_run",
        "check",
        "sweep_run",
        "sweep_pictures",
    ),
    *(
        "cli",
        "cli_base",
        "cli_captions",
        "cli_files",
        "cli_import",
        "cli_merge",
        "cli_serve",
        "cli_sweep",
        "cli_queue",
        "cli_ui",
        "__main__",
    ),
}
NEVER_TORCH = [
    *(
        "errors",
        "files",
        "progress",
        "container",
        "ldm_names",
        "config",
        "config_captions",
        "config_checks",
        "config_errors",
        "config_file",
        "config_sweep",
        "runs",
        "workspace",
        "cli",
        "cli_base",
        "cli_captions",
        "cli_queue",
        "cli_files",
        "cli_import",
        "kohya.write",
        "cli_merge",
        "cli_sweep",
        "cli_ui",
    ),
    *("jobs.queue", "jobs.runner", "jobs.follow", "jobs.device_lock", "jobs.record"),
    *("captioning.find", "captioning.folder", "captioning.proposals"),
    *("data.captions", "data.buckets", "data.images", "data.folder", "data.duplicates", "formats.metadata"),
]


def modules() -> dict[str, ast.Module]:
    """Dotted name below the package → syntax tree."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}


def group_of(module: str) -> str:
    first = module.partition(".")[0]
    return "config" if first.startswith("config") else first


def imports(tree: ast.Module) -> Iterator[str]:
    """Modules of the package that `tree` imports, wherever in the file; imports for annotations only do not count."""
    for node in _running(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name[15:] for alias in node.names if alias.name.startswith("lora_diffusion."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            if node.module == "lora_diffusion":
                yield from (alias.name for alias in node.names)
            elif node.module and node.module.startswith("lora_diffusion."):
                yield node.module[15:]


def _running(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from _running(child)


def test_every_module_belongs_to_a_layer() -> None:
    groups = {group_of(name) for name in modules()} - {"__init__"}

    assert groups <= MAY_IMPORT.keys() | ON_TOP
    assert len(modules()) > 30


def test_imports_point_downwards_only() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, tree in modules().items()
        if (group := group_of(name)) in MAY_IMPORT
        for imported in imports(tree)
        if group_of(imported) not in MAY_IMPORT[group] | {group}
    ]

    assert wrong == []


def test_the_table_itself_has_no_cycle() -> None:
    order: list[str] = []
    while waiting := MAY_IMPORT.keys() - set(order):
        free = sorted(group for group in waiting if MAY_IMPORT[group] <= set(order))
        assert free, f"a cycle among {sorted(waiting)}"
        order += free


def test_no_module_imports_itself_through_others() -> None:
    trees = modules()
    edges = {name: {imported for imported in imports(tree) if imported in trees} for name, tree in trees.items()}
    while leaves := [name for name, imported in edges.items() if not imported & edges.keys()]:
        for name in leaves:
            del edges[name]

    assert edges == {}


def test_package_init_files_hold_a_docstring_and_at_most_constants() -> None:
    inits = {name: tree.body for name, tree in modules().items() if name.endswith("__init__")}
    code = [
        f"{name}, line {statement.lineno}"
        for name, (docstring, *rest) in inits.items()
        for statement in (docstring, *rest)
        if not (isinstance(statement, ast.Expr | ast.Assign) and isinstance(statement.value, ast.Constant))
    ]

    assert len(inits) >= 5
    assert code == []


@pytest.mark.parametrize("module", NEVER_TORCH)
def test_a_module_for_the_web_server_does_not_load_torch(module: str) -> None:
    script = f"import sys, lora_diffusion.{module}; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_models_of_diffusers_and_transformers_are_imported_in_one_place() -> None:
    """Elsewhere they would come with all that `models/libraries.py` lets wait. Captioners are models of their own."""
    allowed = {"models.libraries", "captioning.captioner"}
    found = {
        name
        for name, tree in modules().items()
        for node in tree.body
        if isinstance(node, ast.ImportFrom | ast.Import)
        for module in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [x.name for x in node.names])
        if module.split(".")[0] in {"diffusers", "transformers"}
    }

    assert found == allowed


WEBUI = ROOT / "webui"
WEBUI_MAY_IMPORT = {"config", "runs", "workspace", "jobs", "files", "errors", "container"}
WEBUI_MODULES = {
    *("data.captions", "data.buckets", "data.duplicates", "data.images", "data.listing", "data.sidecars"),
    *("captioning.find", "captioning.proposals"),
    *("formats.families", "formats.layout", "formats.metadata"),
    *("generation.infotext", "generation.request", "generation.samplers", "generation.sheet"),
}
"""Modules without torch from packages of which others have it."""


def webui_modules() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in WEBUI.rglob("*.py")}


def test_the_web_ui_imports_nothing_of_the_training() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path, tree in webui_modules().items()
        for imported in imports(tree)
        if group_of(imported) not in WEBUI_MAY_IMPORT and imported not in WEBUI_MODULES
    ]

    assert len(webui_modules()) > 25
    assert wrong == []


def test_services_of_the_web_ui_know_no_page_and_no_gradio() -> None:
    wrong: list[str] = []
    for path, tree in webui_modules().items():
        names = {
            name
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        is_service = path.parent.name == "services"
        is_component = path.parent.name == "components" and path.name != "live.py"
        if (is_service or is_component) and any(name.split(".")[0] == "gradio" for name in names):
            wrong.append(f"{path.name} imports gradio")
        if is_service and any(name.startswith(("webui.pages", "webui.components")) for name in names):
            wrong.append(f"{path.name} imports a page or a component")

    assert wrong == []
