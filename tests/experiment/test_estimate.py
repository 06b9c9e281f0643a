"""What a run says of itself before it begins."""

import copy

import pytest
import torch

from flexrec.cli import main
from flexrec.data import simulate
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.estimate import estimate
from flexrec.experiment.model import make_model
from flexrec.task.examples import RankingTask, TrainingExamples
from flexrec.task.needs import get_need

NEEDED = {"num_users": 30, "num_items": 90, "num_topics": 4, "num_test_users": 6, "num_candidates": 8}


@pytest.fixture(scope="module")
def world():
    data = simulate(**NEEDED)
    need = get_need("interest")

    def made(**options):
        config = ExperimentConfig(output="unused", baselines=("none",), **options)
        torch.manual_seed(0)
        model, _, builder = make_model(config, data, [need])
        task = RankingTask(data.catalogue, [need], builder)
        tests = [task.test_example(lst, need) for lst in data.test]
        return config, model, TrainingExamples(task, data.train), tests, builder

    return made


def test_tokens_are_those_of_the_stages(world):
    config, model, examples, tests, builder = world(
        prompts_per_step=6, num_generations=2, warmup_steps=3, listwise_steps=4, steps=5, metric="ndcg@5"
    )
    found = estimate(config, model, examples, tests, builder)
    prompt = found.prompt_tokens
    assert min(len(examples[i].prompt) for i in range(20)) <= prompt <= max(len(examples[i].prompt) for i in range(20))
    by_name = {stage.name: stage for stage in found.stages}
    assert by_name["format"].tokens == pytest.approx(3 * 6 * 2 * (prompt + 5))  # five ranks of a token each
    assert by_name["listwise warm start"].tokens == pytest.approx(4 * 6 * 2 * (prompt + 5))
    assert by_name["reinforcement"].tokens == by_name["rollouts"].tokens == pytest.approx(5 * 6 * (prompt + 2 * 5))
    of_tests = sum(len(example.prompt) for example in tests) / len(tests)
    assert by_name["evaluation of 3 models"].tokens == pytest.approx(3 * len(tests) * (of_tests + 5), rel=0.05)
    inner = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    assert found.parameters == inner
    assert by_name["format"].flops(inner) == 6 * inner * by_name["format"].tokens
    assert by_name["rollouts"].flops(inner) == 2 * inner * by_name["rollouts"].tokens
    assert found.bytes_at_least == 16 * sum(p.numel() for p in model.parameters())
    assert 0 < found.step < found.forward
    assert found.minutes(by_name["format"]) == by_name["format"].tokens / found.step / 60


def test_what_one_pass_decides_is_not_sampled_apart(world):
    config, model, examples, tests, builder = world(mode="one-pass", prompts_per_step=6, num_generations=2, steps=5)
    found = estimate(config, model, examples, tests, builder)
    by_name = {stage.name: stage.tokens for stage in found.stages}
    assert "rollouts" not in by_name
    assert by_name["reinforcement"] == pytest.approx(5 * 6 * found.prompt_tokens)
    assert by_name["listwise warm start"] == pytest.approx(config.listwise_steps * 6 * found.prompt_tokens)


def test_what_does_not_happen_is_not_counted(world):
    config, model, examples, tests, builder = world(warmup="format", steps=1)
    names = [stage.name for stage in estimate(config, model, examples, tests, builder).stages]
    assert names == ["format", "rollouts", "reinforcement", "evaluation of 2 models"]


def test_the_measured_step_leaves_the_model_alone(world):
    config, model, examples, tests, builder = world()
    before = copy.deepcopy(model.state_dict())
    model.eval()
    estimate(config, model, examples, tests, builder)
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_dry_run_says_and_writes_nothing(tmp_path, capsys):
    small = ["--prompts-per-step", "8", "--need", "interest", "--no-critic", "--baselines", "none"]
    assert main(["train", "--output", str(tmp_path / "run"), "--dry-run", *small]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Estimated by a measured step" in said
    assert "listwise warm start:" in said
    assert "in all about" in said
    assert not (tmp_path / "run").exists()
