"""verl's asynchronous trainers: what FlexRec's seams meet in them is what they meet in the synchronous one.

Read from verl's files, since the trainers import with an engine's packages only.
"""

import ast
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

spec = find_spec("verl")
if spec is None:
    if os.environ.get("FLEXREC_REQUIRE_VERL"):
        pytest.fail("make test-verl puts verl in front of the environment", pytrace=False)
    pytest.skip("needs verl", allow_module_level=True)
TRAINERS = Path(next(iter(spec.submodule_search_locations))) / "trainer" / "ppo" / "v1"
OURS = {"_compute_advantage", "_compute_reward", "_update_actor", "_compute_values"}  # item rewards to gradients


def classes_of(name):
    tree = ast.parse((TRAINERS / name).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def methods_of(node):
    return {part.name for part in node.body if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))}


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_advantages_and_updates_are_those_of_the_common_trainer(mode):
    base = classes_of("trainer_base.py")["PPOTrainer"]
    assert "_compute_advantage" in methods_of(base)
    found = classes_of(f"trainer_{mode}.py")
    trainer = found["PPOTrainer" + mode.title().replace("_", "")]
    assert [ast.unparse(parent) for parent in trainer.bases] == ["PPOTrainer"]
    assert [ast.unparse(part) for part in trainer.decorator_list] == [f"register_trainer({mode!r})"]
    assert not methods_of(trainer) & OURS


def test_only_old_logprobs_differ_where_rollouts_are_separate():
    """They are those of one policy for all updates between two transfers of weights, as item ratios need."""
    separate = classes_of("trainer_separate_async.py")["PPOTrainerSeparateAsync"]
    base = classes_of("trainer_base.py")["PPOTrainer"]
    computed = {name for name in methods_of(separate) & methods_of(base) if name.startswith("_compute")}
    assert computed == {"_compute_old_log_prob"}
