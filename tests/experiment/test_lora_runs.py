"""LoRA by the command line: merged and adapter-only runs, resumed, evaluated, moved; the KL without a second copy."""

import json
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from flexrec.cli import main
from flexrec.data import Catalogue, simulate
from flexrec.experiment import stages as experiment
from flexrec.experiment.run_folder import RunFolder
from flexrec.policy.lora import add_lora, save_adapters
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.task.descriptions import describing_tokens, item_token

SMALL = ["--need", "interest", "--no-critic", "--prompts-per-step", "8", "--baselines", "none"]
SMALL += ["--warmup-steps", "2", "--listwise-steps", "2", "--steps", "4"]


@pytest.fixture(scope="module")
def world():
    sizes = {"num_users": 60, "num_items": 70, "num_topics": 4, "num_test_users": 8, "num_candidates": 8}
    return lambda **options: simulate(**{**options, **sizes})


@pytest.fixture(autouse=True)
def small_world(monkeypatch, world):
    monkeypatch.setattr(experiment, "simulate", world)


def interrupt_at_the_end(monkeypatch, command):
    """Run the command up to where it would save the trained model."""

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", stop)
        assert main(command) == 130


def figures(folder):
    return json.loads((folder / "metrics.json").read_text())


def kl_by_step(folder):
    """What log.jsonl says of each step, which stands there once."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [(line["step"], line["kl"]) for line in lines if "kl" in line]
    assert [step for step, _ in found] == [1, 2, 3, 4]
    return dict(found)


def same_by_evaluate(folder, tmp_path):
    assert main(["evaluate", "--run", str(folder), "--json", str(tmp_path / "scores.json")]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())["interest"]
    of_training = figures(folder)["trained"]["interest"]
    assert "ndcg@5" in found, "those that any order would get are left out"
    return all(value["mean"] == pytest.approx(of_training[name]) for name, value in found.items())


def test_merged_run_is_a_whole_model(tmp_path):
    folder = tmp_path / "run"
    assert main(["train", "--output", str(folder), "--lora", "4", "--beta", "0.1", *SMALL]) == 0
    assert not (folder / "adapter_config.json").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert not hasattr(model, "peft_config")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    start = AutoModelForCausalLM.from_pretrained(folder / "backbone")
    saved = json.loads((folder / "catalogue.json").read_text())
    ids = saved["ids"]
    items = tokenizer.convert_tokens_to_ids([item_token(i) for i in ids])
    change = (model.get_input_embeddings().weight - start.get_input_embeddings().weight).abs().amax(dim=1)
    assert change[items].min() > 0, "every item's row is trained"
    catalogue = Catalogue(tuple(ids), tuple(saved["titles"]), tuple(map(tuple, saved["topics"])))
    marks = tokenizer.convert_tokens_to_ids(describing_tokens(catalogue)[len(ids) :])
    assert (change[marks] > 0).sum() > 6, "and those of what else describes them, where it occurred"
    change[[*items, *marks]] = 0
    assert change.max() == 0, "and no other"
    assert same_by_evaluate(folder, tmp_path)
    kl = kl_by_step(folder)
    assert kl[1] == 0.0, "the reference is the policy after the supervised stages"
    assert kl[4] > 0.0


def test_adapter_run_evaluates_ranks_and_moves(tmp_path):
    folder = tmp_path / "run"
    lora = ["--lora", "4", "--lora-alpha", "4", "--lora-targets", "q_proj", "v_proj"]
    command = ["train", "--output", str(folder), *lora]
    assert main([*command, "--lora-save", "adapter", *SMALL]) == 0
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], set(config["target_modules"])) == (4, 4, {"q_proj", "v_proj"})
    assert not (folder / "model.safetensors").exists()
    elsewhere = folder.rename(tmp_path / "elsewhere")
    assert same_by_evaluate(elsewhere, tmp_path)
    catalogue = json.loads((elsewhere / "catalogue.json").read_text())
    request = {"history": catalogue["ids"][:3], "need": "interest", "candidates": catalogue["ids"][3:7]}
    (tmp_path / "in.jsonl").write_text(json.dumps(request) + "\n")
    assert (
        main(
            ["rank", "--run", str(elsewhere), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]
        )
        == 0
    )
    answer = json.loads((tmp_path / "out").read_text())
    assert sorted(entry["id"] for entry in answer["ranking"]) == sorted(request["candidates"])


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """The folder of a model that knows none of the items, with untied embeddings."""
    folder = tmp_path_factory.mktemp("models") / "other"
    tokenizer = build_tokenizer(Catalogue(ids=("none",), titles=("Of another world",), topics=((),)), ["Rank"])
    config = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2).config
    config.tie_word_embeddings = False
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_new_items_of_another_model_come_with_its_adapters(tmp_path, other_model, monkeypatch, capsys):
    """Rows that its vocabulary lacks are made when the run is loaded, and hold what was trained; resume included."""
    folder = tmp_path / "run"
    whole = ["train", "--output", str(folder), "--model", str(other_model), "--encoding", "item_token", *SMALL]
    whole += ["--beta", "0.1", "--save-every", "2"]
    command = [*whole, "--lora", "4", "--lora-save", "adapter"]

    interrupt_at_the_end(monkeypatch, command)
    assert main([*command, "--resume", "--lora", "8"]) == 2
    assert "with lora=4: got 8" in capsys.readouterr().err
    before = kl_by_step(folder)
    (folder / "checkpoints" / "checkpoint-4").rename(tmp_path / "last")
    assert main([*whole, "--resume"]) == 0, "it knows of its adapters"
    assert "format" not in figures(folder)["seconds"]
    assert not (folder / "backbone").exists(), "the model has a name to load it by"
    assert same_by_evaluate(folder, tmp_path)
    kl = kl_by_step(folder)
    assert kl[1] == 0.0
    assert kl == pytest.approx(before, abs=1e-6), "the reference of the resumed run is that of the first"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora", "4", "--lora-targets", "query"], "no linear layer of the model is called 'query'"),
        (["--lora-alpha", "4"], "--lora-alpha is an option of --lora RANK"),
        (["--lora-save", "adapter"], "--lora-save is an option of --lora RANK"),
        (["--lora-targets", "q_proj"], "--lora-targets is an option of --lora RANK"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    assert main(["train", "--output", str(tmp_path / "run"), *SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_adapters_are_no_model_to_start_from(tmp_path, other_model, capsys):
    save_adapters(add_lora(AutoModelForCausalLM.from_pretrained(other_model), 2), tmp_path / "adapters")
    assert main(["train", "--output", str(tmp_path / "run"), "--model", str(tmp_path / "adapters"), *SMALL]) == 2
    assert "holds adapters: give a whole model" in capsys.readouterr().err


def test_missing_peft_is_told_with_its_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["train", "--output", str(tmp_path / "run"), "--lora", "4", *SMALL]) == 2
    assert ".venv/bin/pip install -e '.[peft]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_kl_of_a_whole_model_starts_where_reinforcement_does(tmp_path, monkeypatch):
    """Without adapters the reference is a copy, kept in the run's folder for --resume."""
    folder = tmp_path / "run"
    command = ["train", "--output", str(folder), "--beta", "0.1", "--save-every", "2", *SMALL]

    interrupt_at_the_end(monkeypatch, command)
    before = kl_by_step(folder)
    (folder / "checkpoints" / "checkpoint-4").rename(tmp_path / "last")
    assert main([*command, "--resume"]) == 0
    kl = kl_by_step(folder)
    assert kl[1] == 0.0
    assert kl == pytest.approx(before, abs=1e-6)
