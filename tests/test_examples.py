"""The examples run as a user runs them, each in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flexrec.decoding.windows import Plan
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.stages import run_experiment
from flexrec.policy.lora import load_model
from flexrec.task.own_needs import read_needs

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DOCS = EXAMPLES.parent / "docs"


def run(script, *arguments):
    """What the example prints."""
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_files_of_needs_are_read():
    trained, unseen = (read_needs(EXAMPLES / f"{name}.yaml") for name in ("film_needs", "unseen_film_needs"))
    assert [len(need.wordings) for need in trained] == [5] * 6  # two of each are kept from training
    assert [need.wordings[0].split()[-1] for need in unseen] == ["film.", "gangsters", "war.", "please.", "recent"]
    names = {need.name for need in trained}
    assert not names & {need.name for need in unseen}
    for page in ("language-models.md", "notes/language-model-gpu.md"):  # which say what came of them
        text = (DOCS / page).read_text()
        assert "examples/film_needs.yaml" in text
        assert all(name in text for name in names)


@pytest.mark.parametrize("more", [[], ["--all-actions"]])
def test_plain_pytorch_learns(more):
    shown = run("plain_pytorch.py", "--steps", "10", "--prompts", "32", *more)
    before, *steps, after = [float(value) for value in re.findall(r"ndcg@5 (\S+)", shown)]
    assert len(steps) == 10
    assert after > before + 0.08, "on users never trained on"


def test_a_data_set_made_in_python_is_learnt(tmp_path):
    shown = run("own_data.py", "--output", str(tmp_path / "run"), "--steps", "12", "--prompts", "32")
    figures = dict(re.findall(r"^(\S+): ndcg@5 (\S+)$", shown, flags=re.MULTILINE))
    assert float(figures["trained"]) > float(figures["random"]) + 0.1
    assert "politics story" in shown.split("for a reader of politics:")[1]


def test_lora_learns_and_saves_both_ways(tmp_path):
    pytest.importorskip("peft")
    shown = run("lora.py", "--output", str(tmp_path), "--steps", "6", "--prompts", "32")
    before, supervised, reinforced = (float(value) for value in re.findall(r"ndcg@5 (\S+)", shown))
    assert supervised > before + 0.05
    assert reinforced > before + 0.05
    adapters = load_model(tmp_path, AutoTokenizer.from_pretrained(tmp_path))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.tensor([[3, 4, 400, 5]])
    with torch.no_grad():
        torch.testing.assert_close(adapters(tokens).logits, merged(tokens).logits, atol=1e-5, rtol=0)


def test_replay_takes_the_bias_out_of_ratios():
    pytest.importorskip("trl")
    shown = run("replay_grpo.py", "--steps", "20")
    whole, kept = (float(value) for value in re.findall(r"outside \[0\.9, 1\.1\] (\S+)%", shown))
    assert kept == 0.0
    assert whole > 10
    for before, after in re.findall(r"right (\S+) -> (\S+)", shown):
        assert float(after) > float(before) + 0.05


def test_a_policy_from_logs_is_worth_what_is_estimated():
    shown = run("off_policy.py")
    values = {name: float(value) for name, value in re.findall(r"^(\w+): ([\d.]+)", shown, flags=re.MULTILINE)}
    assert values["truth"] > values["logged"] + 0.1
    for name in ("ips", "snips", "dr"):
        low, high = re.search(rf"^{name}: \S+ \[(\S+), (\S+)\]", shown, flags=re.MULTILINE).groups()
        assert float(low) - 0.05 < values["truth"] < float(high) + 0.05


def test_lines_for_a_loop_of_ones_own_work_as_they_are_written():
    """The page's code, in a loop around a model and two lists."""
    (lines,) = re.findall(r"```python\n(.*?)```", (DOCS / "plain_loop.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "prompts": [[1, 2, 3], [4, 5]],
        "candidates": [[[10], [11], [12]], [[11], [12], [13]]],
        "gains": torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5]]),
    }
    for _ in range(30):
        names["optimizer"].zero_grad()
        exec(lines, names)
    best = names["sample_rankings"](model, names["prompts"], names["candidates"], greedy=True).rankings
    assert best.tolist() == [[1, 2, 0], [0, 2, 1]]


def test_completions_that_share_their_prompt_have_the_same_gradients():
    shown = run("shared_prompts.py", "--prompt-length", "300", "--prompts", "2", "--repeats", "1")
    losses = re.findall(r"loss (\S+),", shown)
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-4)
    assert float(re.search(r"at most (\S+) of", shown).group(1)) < 1e-5
    assert float(re.search(r"(\S+)x as fast", shown).group(1)) > 1.5


def test_lines_for_shared_prompts_work_as_they_are_written():
    of_rankings, of_completions = re.findall(
        r"```python\n(.*?)```", (DOCS / "shared-prompts.md").read_text(), re.DOTALL
    )
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).double()
    prompts, candidates = [[1, 2, 3], [4, 5]], [[[10], [11], [12]], [[11], [12], [13]]]
    rankings = np.array([np.random.default_rng(i).permutation(3) for i in range(16)])
    completions = [np.array([6, 7, 8, 9][: 1 + i % 4]) for i in range(16)]
    names = {"model": model, "prompts": prompts, "candidates": candidates, "rankings": rankings, "np": np}
    exec(of_rankings, names)
    alone = names["make_batch"](prompts, candidates, rankings, num_generations=8)
    expected = names["ranking_scores"](names["ranking_states"](model, alone), alone).logprobs
    torch.testing.assert_close(names["scores"].logprobs, expected)
    for n in (0, 7, 11):
        lines = of_completions.replace("logits[rows.row[n], columns]", "found = logits[rows.row[n], columns]")
        whole = torch.tensor([[*prompts[n // 8], *completions[n]]])
        expected = model(whole).logits[0, len(prompts[n // 8]) - 1 : -1]
        found = {**names, "completions": completions, "n": n}
        exec(lines, found)
        torch.testing.assert_close(found["found"], expected)


def test_plain_pytorch_is_short_and_uses_no_trainer():
    text = (EXAMPLES / "plain_pytorch.py").read_text()
    assert len(text.splitlines()) < 120
    assert not re.search(r"import.*\b(trainer|Trainer)", text)


def test_a_judge_s_need_is_learnt(tmp_path):
    shown = run("judge.py", "--output", str(tmp_path / "run"), "--steps", "4", "--prompts", "16")
    at_random, _, trained = (float(value) for value in re.findall(r"ndcg@5 (\S+)", shown))
    assert trained > at_random + 0.05


def test_long_lists_are_ranked_by_every_strategy(tmp_path):
    sizes = {"num_candidates": 8, "max_train_lists": 200}
    short = {"warmup_steps": 1, "listwise_steps": 2, "steps": 1, "prompts_per_step": 8, "critic_model": "knn"}
    config = ExperimentConfig(
        output=str(tmp_path / "run"), needs=("interest",), baselines=("none",), data_options=sizes, **short
    )
    run_experiment(config, lambda text: None)
    out = run("long_lists.py", "--run", tmp_path / "run", "--candidates", 30, "--lists", 4, "--window", 8, "--step", 4)
    lines = {line[:24].strip(): line.split() for line in out.splitlines()[2:]}
    assert {name: float(line[-2]) for name, line in lines.items()} == {
        "as they stand": 0,
        "all at once": 1,
        "all at once, one pass": 1,
        "sliding windows": Plan("sliding", 8, 4).calls(30),
        "tournament": Plan("tournament", 8, 4).calls(30),
        "pre-ranked in one pass": Plan("prerank", 8, 4).calls(30),
    }
