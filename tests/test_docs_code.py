"""The code of README and of docs/: every block of Python runs, every command is one that there is.

Blocks of a page run in order and share their names. Where a page assumes that the reader has something (a model,
tensors, a folder with a log), ``ASSUMED`` has it, small.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexrec.cli import build_parser
from flexrec.experiment.arguments import given, given_data_options
from flexrec.experiment.config import ExperimentConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/notes").glob("*.md"))]
}
# Blocks that import what is not installed are left out.
OTHERS = ("openai", "openrlhf", "peft", "sglang", "trl", "verl", "vllm")
ELSEWHERE = ("docs/serving.md",)  # which tests/serving/test_docs.py runs against a server
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", flags=re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return [code for _, kind, code in BLOCK.findall(text) if kind == language]


@cache
def world() -> dict[str, Any]:
    """Examples of a small simulated world, and the tokenizer of a model for them."""
    from flexrec.data import simulate
    from flexrec.policy.small_model import build_tokenizer
    from flexrec.task import PromptBuilder, RankingTask, TrainingExamples, get_need

    data, need = (
        simulate(num_users=20, num_items=80, num_topics=4, num_test_users=4, num_candidates=6),
        get_need("interest"),
    )
    tokenizer = build_tokenizer(data.catalogue, need.wordings)
    builder = PromptBuilder(tokenizer, encoding="item_token")
    examples = TrainingExamples(RankingTask(data.catalogue, [need], builder), data.train)
    return {"tokenizer": tokenizer, "examples": [examples[n] for n in range(8)]}


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(world()["tokenizer"]), **sizes))


def tokens() -> dict[str, Any]:
    """Prompts, candidates and gains of a plain loop, and a model that reads them."""
    return {
        "model": small_model(),
        "prompts": [[1, 2, 3], [4, 5]],
        "candidates": [[[10], [11], [12]], [[11], [12], [13]]],
        "gains": torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5]]),
    }


def plain_loop() -> dict[str, Any]:
    names = tokens()
    return {**names, "optimizer": torch.optim.AdamW(names["model"].parameters())}


def completed() -> dict[str, Any]:
    names = tokens()
    rankings = np.array([[1, 2, 0], [0, 1, 2]]).repeat(8, axis=0)
    return {**names, "rankings": rankings, "completions": [np.array([6, 7])] * 16, "n": 3, "np": np}


def trained_somewhere() -> dict[str, Any]:
    from flexrec.trainer import FlexRecConfig, FlexRecTrainer

    names = tokens()
    args = FlexRecConfig(output_dir="out", report_to="none", use_cpu=True)
    return {**names, "trainer": FlexRecTrainer(names["model"], args, world()["examples"])}


def adapters() -> dict[str, Any]:
    from flexrec.policy.batch import make_batch
    from flexrec.policy.scores import ranking_scores, ranking_states

    names = tokens()
    batch = make_batch(names["prompts"], names["candidates"], torch.tensor([[1, 2, 0], [0, 1, 2]]))
    return {
        **names,
        "language_model": small_model(),
        "examples": world()["examples"],
        "batch": batch,
        "ranking_scores": ranking_scores,
        "ranking_states": ranking_states,
    }


def with_trl() -> dict[str, Any]:
    if importlib.util.find_spec("trl") is None:
        return {}
    sys.path.insert(0, str(ROOT / "tests" / "integrations"))
    from tiny_trl import make_model, make_rows, make_tokenizer
    from trl import GRPOConfig

    tokenizer = make_tokenizer()
    options = {"output_dir": "out", "report_to": "none", "use_cpu": True, "bf16": False}
    make_model(tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    model = LlamaForCausalLM.from_pretrained("model")  # by its name TRL finds the tokenizer
    return {
        "model": model,
        "tokenizer": tokenizer,
        "options": options,
        "config": GRPOConfig(num_generations=8, **options),
        "dataset": make_rows(),
    }


def with_vllm() -> dict[str, Any]:
    return {"tokenizer": world()["tokenizer"], "prompt_token_ids": [1, 2, 3]}


def shop() -> dict[str, Any]:
    """The folder that docs/your-data.md is about."""
    folder = Path("shop")
    folder.mkdir()
    rows = [
        f"C-{person},SKU-{(7 * person + 11 * month) % 40},{13 + person % 15}.{month:02}.2024 11:{person:02},1"
        for person in range(60)
        for month in range(1, 10)
    ]
    (folder / "interactions.csv").write_text("\n".join(["customer,sku,when,quantity", *rows]) + "\n")
    items = [f"SKU-{n},Thing {n},{'AB'[n % 2]},{n}.50" for n in range(40)]
    (folder / "items.csv").write_text("\n".join(["id,name,department,price", *items]) + "\n")
    return {}


def walks() -> dict[str, Any]:
    import flexrec
    from flexrec.trainer import FlexRecConfig, FlexRecTrainer

    names = {"flexrec": flexrec, "FlexRecConfig": FlexRecConfig, "FlexRecTrainer": FlexRecTrainer}
    return {**tokens(), **names, "examples": world()["examples"]}


def from_logs() -> dict[str, Any]:
    """Rankings of the small world that somebody has shown, and how probable each rank was then."""
    size = len(world()["examples"][0].gains)
    rankings = [torch.randperm(size).numpy() for _ in world()["examples"]]
    logprobs = [-torch.arange(size, 0, -1).log().numpy() for _ in rankings]
    return {"model": small_model(), "examples": world()["examples"], "rankings": rankings, "logprobs": logprobs}


def with_replay() -> dict[str, Any]:
    return {**with_trl(), "reward": lambda completions, **columns: [0.0] * len(completions)}


def first_run() -> dict[str, Any]:
    """A finished run, hardly trained."""
    from flexrec.experiment import ExperimentConfig, run_experiment

    short = {"warmup_steps": 1, "listwise_steps": 1, "steps": 1, "prompts_per_step": 8, "critic_model": "knn"}
    data = {"num_candidates": 8, "max_train_lists": 100}
    options = {"needs": ("interest",), "baselines": ("none",), "data_options": data}
    run_experiment(ExperimentConfig(output="runs/first", **options, **short), lambda text: None)
    return {}


ASSUMED: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": with_trl,
    "docs/architecture.md": walks,
    "docs/distributed.md": lambda: {**trained_somewhere(), "sample_rankings": sampler()},
    "docs/long-lists.md": first_run,
    "docs/off-policy.md": from_logs,
    "docs/peft.md": adapters,
    "docs/plain_loop.md": plain_loop,
    "docs/replay.md": with_replay,
    "docs/sglang.md": with_vllm,
    "docs/shared-prompts.md": completed,
    "docs/trl.md": with_trl,
    "docs/vllm.md": with_vllm,
    "docs/your-data.md": shop,
}


def sampler() -> Any:
    from flexrec.decoding import sample_rankings

    return sample_rankings


def missing(code: str) -> set[str]:
    named = set(re.findall(rf"^\s*(?:from|import) ({'|'.join(OTHERS)})\b", code, flags=re.MULTILINE))
    return {name for name in named if importlib.util.find_spec(name) is None}


@pytest.mark.parametrize(
    "page", [page for page, text in PAGES.items() if blocks(text, "python") and page not in ELSEWHERE]
)
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "page", **ASSUMED.get(page, dict)()}
    for number, code in enumerate(blocks(PAGES[page], "python"), start=1):
        compiled = compile(code, f"{page}, block {number}", "exec")
        if not missing(code):
            exec(compiled, names)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a page's blocks, as words."""
    for block in blocks(text, "bash"):
        whole = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)(^|\s)#.*$", "", block))
        lexer = shlex.shlex(whole, posix=True, punctuation_chars="|;&\n")
        lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
        command: list[str] = []
        for word in [*lexer, "\n"]:
            if not set(word) <= set("|;&\n"):
                command.append(word)
            elif command:
                yield command
                command = []


def called(page: str) -> list[list[str]]:
    """What follows ``flexrec`` in the commands of a page, whatever launches it."""
    found = []
    for command in commands(PAGES[page]):
        at = [n for n, word in enumerate(command) if word in ("flexrec", ".venv/bin/flexrec")]
        found += [command[at[0] + 1 :]] if at else []
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if called(page)])
def test_commands_are_understood(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their options exist, their values are choices, and go together."""
    monkeypatch.chdir(tmp_path)
    for words in called(page):
        try:
            arguments = build_parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"flexrec {shlex.join(words)}")
        if words[0] == "train" and arguments.config is None:
            ExperimentConfig(**given(arguments, ExperimentConfig), data_options=given_data_options(arguments))


def test_commands_of_all_kinds_were_read() -> None:
    read = [words[0] for page in PAGES for words in called(page)]
    assert {"train", "evaluate", "rank", "report", "data", "study"} <= set(read)
    assert len(read) > 30
    (piped,) = (words for words in called("docs/items.md") if "--items" in words)
    assert piped[:3] == ["rank", "--run", "runs/interest"]
    launched = [words for words in called("docs/distributed.md") if "runs/qwen" in words]
    assert launched
    assert all(words[-2:] == ["--output", "runs/qwen"] for words in launched)


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    asked = set()
    for text in (*PAGES.values(), (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        asked |= set(re.findall(r"`make ([a-z-]+)", text))
        asked |= {command[1] for command in commands(text) if command[0] == "make"}
    assert {"quickstart", "llm", "test", "docs"} <= asked
    assert asked <= targets


def test_scripts_that_are_called_exist() -> None:
    for page, text in PAGES.items():
        for command in commands(text):
            for word in command:
                if word.startswith("examples/"):
                    assert (ROOT / word).exists(), f"{page}: {word}"


def test_extras_exist_and_are_installed_from_here() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"^([a-z-]+) = \[", project.partition("[project.optional-dependencies]")[2], flags=re.M))
    sources = {str(path): path.read_text(encoding="utf-8") for path in (ROOT / "flexrec").rglob("*.py")}
    for name, text in {**PAGES, **sources}.items():
        assert not re.search(r"install [^\n]*flexrec\[", text), f'{name}: no registry has flexrec; -e ".[..]" finds it'
        for asked in re.findall(r"-e \"?'?\.\[([a-z,-]+)\]", text):
            assert set(asked.split(",")) <= extras, f"{name}: {asked}"
