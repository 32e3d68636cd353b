"""The floors of the house: a file may import what stands above it in this list, and nothing below."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import jaxformer

PACKAGE = Path(jaxformer.__file__).parent
FLOORS = [
    *("spec", "overrides", "user_code", "declarations", "platform", "keys", "mesh"),
    *(
        f"data.{n}"
        for n in (
            "files",
            "locks",
            "hashes",
            "corpora",
            "definitions",
            "tables",
            "tasks",
            "tokenizers",
            "rendering",
            "templates",
            "dialogues",
            "sources",
            "datasets",
            "batches",
        )
    ),
    *(f"model.{n}" for n in ("cache", "masks", "layers", "residuals", "positions", "implementations", "kernels")),
    *(f"model.{n}" for n in ("mixers", "blocks", "heads", "agreement")),
    *(f"model.{n}" for n in ("models", "baselines")),
    *(
        f"learning.{n}"
        for n in (
            "rows",
            "chunks",
            "objectives",
            "schedules",
            "optimizers",
            "muon",
            "groups",
            "adapters",
            "adafactor",
            "by_depth",
            "schedule_free",
            "guards",
        )
    ),
    *(f"generation.{n}" for n in ("logits_processors", "decode", "texts", "predict")),
    *("pictures", "writers", "config"),
    *(
        f"run.{n}"
        for n in ("signals", "step", "plan", "manifest", "checkpoint", "metrics", "starts", "peaks", "directory")
    ),
    *(
        f"run.{n}"
        for n in (
            "inspection",
            "budget",
            "attention",
            "opened",
            "chat",
            "notices",
            "warm_start",
            "dry_run",
            "members",
        )
    ),
    *(f"run.{n}" for n in ("checks", "beginning", "reports", "profile", "pauses", "loop")),
    *(f"interop.{n}" for n in ("tensors", "architecture", "gpt2", "llama", "bert", "families")),
    *(f"interop.{n}" for n in ("import_folder", "export_folder")),
    *(f"lab.{n}" for n in ("intervals", "tables", "groups", "compare", "measures", "experiments")),
    *(f"lab.{n}" for n in ("probe", "properties", "devices", "check", "interruptions", "verify_resume")),
    *("commands.arguments", "commands.programs"),
    *(f"commands.{n}" for n in ("train", "presets", "new", "plan", "sample", "evaluate", "predict", "inspect")),
    *("commands.import_", "commands.export"),
    "commands.compare",
    "commands.check",
    "commands.reproduce",
    "commands.verify_resume",
    "commands.main",
    "__main__",
]
NEEDS_NO_MODEL = {"data"}  # knows nothing of models


def modules():
    files = sorted(PACKAGE.rglob("*.py"))
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in files if f.name != "__init__.py"}


def imported(path):
    """Names of jaxformer modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxformer":
            base = node.module.removeprefix("jaxformer").lstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                yield name if name in FLOORS else base
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("jaxformer.") for a in node.names if a.name.startswith("jaxformer"))


def test_every_module_has_its_floor():
    assert set(modules()) == set(FLOORS)
    assert all(f.read_text() == "" for f in PACKAGE.rglob("__init__.py") if f.parent != PACKAGE)


@pytest.mark.parametrize("name", FLOORS)
def test_imports_point_up(name):
    for other in imported(modules()[name]):
        assert other in FLOORS, f"{name} imports {other}, which is no module"
        assert FLOORS.index(other) < FLOORS.index(name), f"{name} imports {other}, which stands below it"
        if name.split(".")[0] in NEEDS_NO_MODEL:
            assert other.split(".")[0] in ("spec", "user_code", "data"), f"{name} imports {other}"


def test_nothing_needs_an_extra_to_be_imported():
    """In a process where no package of the extras can be imported, nor those that few runs need."""
    hidden = ["chex", "pytest", "beartype", "torch", "transformers", "tokenizers", "matplotlib"]
    hidden += ["zstandard", "pyarrow", "tensorboardX", "wandb", "IPython"]
    names = [f"jaxformer.{name}" for name in FLOORS]
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden}))\nimport importlib\n"
    subprocess.run([sys.executable, "-c", code + f"[importlib.import_module(n) for n in {names}]"], check=True)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, jaxformer; sys.exit(bool({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names():
    assert len(jaxformer.__all__) == 12
    for name in jaxformer.__all__:
        assert getattr(jaxformer, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = jaxformer.nothing
    assert importlib.import_module("jaxformer") is jaxformer
    assert {*jaxformer.__all__, "__version__"} <= {*dir(jaxformer)}
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'version = "{jaxformer.__version__}"' in project
