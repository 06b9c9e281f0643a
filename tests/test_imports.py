"""What ``import flexrec`` loads: nothing heavy before it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flexrec
from flexrec import cli, metrics

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

HEAVY = ("numba", "llvmlite", "triton", "transformers", "accelerate", "torch.distributed.fsdp")


def loaded_after(program: str) -> list[str]:
    found = subprocess.run(
        [sys.executable, "-c", f"import sys\n{program}\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.splitlines()[-1].split()


def test_import_loads_nothing_heavy():
    """Beside what torch and NumPy load themselves, the modules of this package and little more."""
    bare, whole = loaded_after("import numpy, torch"), loaded_after("import flexrec")
    assert not {name for name in HEAVY if name in whole and name not in bare}
    assert len(set(whole) - set(bare)) < 100


LIGHT = [
    ["--help"],
    ["train", "--help"],
    ["rank", "--help"],
    ["--version"],
    ["train"],
    ["train", "--config", "no.yaml"],
]


@pytest.mark.parametrize("arguments", LIGHT)
def test_the_command_line_is_read_without_torch(arguments):
    """Help, the version and a mistake in the options: nothing heavy stands in the way of an answer."""
    program = f"""
from flexrec.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass"""
    whole = loaded_after(program)
    assert not {"torch", "rich", *HEAVY} & set(whole)
    assert len(set(whole) - set(loaded_after("import numpy"))) < 150


def test_the_version_is_that_of_the_installed_package(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    written = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
    assert capsys.readouterr().out.split() == ["flexrec", flexrec.__version__] == ["flexrec", written]


def test_numba_is_loaded_by_the_first_call_that_needs_it():
    start = "import torch, flexrec; gains = torch.rand(2, 3)\n"
    assert "numba" not in loaded_after(start + "flexrec.item_advantages(gains, num_generations=1)")
    assert "numba" not in loaded_after(start + "flexrec.swap_rewards(gains, 'ndcg', backend='torch')")
    assert "numba" in loaded_after(start + "flexrec.swap_rewards(gains, 'ndcg')")


def test_metrics_need_neither_torch_nor_numba():
    tree = ast.parse(Path(metrics.__file__).read_text())
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not {name.partition(".")[0] for name in imported} & {"torch", "numba", "flexrec"}
