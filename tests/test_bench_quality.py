"""Quality over time beside TRL: who was where when, and a peer that generates rankings only."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import time_to_quality
from bench.peer_trl import as_text, grpo_trainer, ids_tokenizer
from bench.training_task import ROLLOUTS, TrainingTask, embedded_shape, trl_trainer
from flexrec.rankings import parse_rankings

pytest.importorskip("trl")


def curve(*points, values=(0.2, 0.4)):
    points = [{"step": step, "seconds": seconds, "mean": mean} for step, seconds, mean in points]
    return {"points": points, "values": list(values), "users": list(range(len(values)))}


def test_when_a_quality_is_reached_is_in_proportion():
    points = curve((0, 0.0, 0.2), (5, 30.0, 0.4), (10, 40.0, 0.3), (15, 50.0, 0.6))["points"]
    assert time_to_quality.seconds_to(points, 0.1) == 0.0
    assert time_to_quality.seconds_to(points, 0.3) == pytest.approx(15.0)
    assert time_to_quality.seconds_to(points, 0.5) == pytest.approx(40.0 + 10.0 * 2 / 3)
    assert time_to_quality.seconds_to(points, 0.7) is None


def test_a_row_says_where_both_end_and_when_ours_was_there():
    ours = curve((0, 0.0, 0.2), (10, 10.0, 0.6), values=[0.5, 0.75, 0.5, 0.75])
    theirs = curve((0, 0.0, 0.2), (5, 50.0, 0.5), (10, 100.0, 0.4), values=[0.25, 0.5, 0.25, 0.5])
    row = time_to_quality.row_of("format", {0: {"FlexRec": ours, "TRL": theirs}})
    assert row.startswith(
        "| format | 1 | 0.200 | 0.400 after 100 s | 0.500 | 0.600 after 10 s | +0.250 [+0.250, +0.250] | "
    )
    assert row.endswith(" | 5.0 % (5.0 to 5.0) |")
    better = curve((0, 0.0, 0.2), (10, 100.0, 0.7), values=[0.75, 1.0, 0.75, 1.0])
    both = {0: {"FlexRec": ours, "TRL": theirs}, 1: {"FlexRec": ours, "TRL": better}}
    row = time_to_quality.row_of("format", both)
    assert row.endswith("| 5.0 % (5.0 to 5.0), in 1 of 2 seeds |")
    assert "| +0.000 [" in row
    assert "| never, in 0 of 1 seeds |" in time_to_quality.row_of("format", {1: both[1]})


SMALL = ("data.num_users=60", "data.num_test_users=20", "data.num_items=120", "data.num_topics=5")
SMALLER = ("data.num_candidates=8", "rankings=16", "format_steps=1", "hidden_size=32")


def test_both_are_trained_from_the_same_starts_once(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    options = ["--seeds", "1", "--steps", "2", "--every", "1", "--start", *SMALL, *SMALLER]
    monkeypatch.setattr("sys.argv", ["time_to_quality", "--output", str(tmp_path), *options])
    time_to_quality.main()
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(" | ")[:2] for line in table] == [[f"| {start}", "1"] for start in time_to_quality.STARTS]
    for start in ("format", "short_warm_start", "warm_start"):
        ours, theirs = (json.loads((tmp_path / f"{start}-0-{name}.json").read_text()) for name in ("flexrec", "trl"))
        assert ours["users"] == theirs["users"]
        assert ours["points"][0]["mean"] == theirs["points"][0]["mean"], "the same start"
        for one in (ours, theirs):
            assert [point["step"] for point in one["points"]] == [0, 1, 2]
            if start != "warm_start":  # where rates are small
                assert one["points"][2]["mean"] != one["points"][0]["mean"], "it has been trained"
            assert one["points"][2]["mean"] == pytest.approx(sum(one["values"]) / len(one["values"]), abs=1e-4)
            assert 0 <= one["points"][0]["seconds"] < one["points"][2]["seconds"]
    figure = tmp_path / "time_to_quality.svg"
    assert "from the warm start" in figure.read_text()
    figure.unlink()
    monkeypatch.setattr(time_to_quality, "Reinforcements", None)  # nothing is made again
    time_to_quality.main()
    assert capsys.readouterr().out.splitlines()[-3:] == table
    assert figure.exists()


def test_trl_reads_the_tokens_it_is_given():
    tokens = list(range(500))
    assert ids_tokenizer(500, eos_token_id=2, pad_token_id=0)(as_text(tokens))["input_ids"] == tokens


def test_described_items_are_refused(tmp_path):
    example = SimpleNamespace(prompt=[1, (2, 3)], candidates=[[4], [5]], gains=[0.0, 1.0])
    with pytest.raises(ValueError, match="items that are described are sums of several"):
        grpo_trainer(
            None, [example], prompts_per_step=1, num_generations=2, answer_length=2, steps=1, output_dir=str(tmp_path)
        )


@pytest.mark.parametrize("method", ROLLOUTS)
def test_every_rollout_ranks_each_prompts_own_candidates(method):
    task = TrainingTask(
        "titles", prompts=3, num_generations=2, candidates=4, prompt_length=6, config=embedded_shape(1, 32)
    )
    rankings = ROLLOUTS[method](task, task.model())
    assert [sorted(ranking) for ranking in rankings.tolist()] == [[0, 1, 2, 3]] * 6


@pytest.mark.parametrize("encoding", ["items", "labels"])
def test_a_constrained_peer_generates_rankings_only(tmp_path, encoding):
    task = TrainingTask(
        encoding, prompts=2, num_generations=2, candidates=4, prompt_length=6, config=embedded_shape(1, 32)
    )
    trainer = trl_trainer(task, str(tmp_path), constrained=True)
    seen = []
    reward = trainer.reward_funcs[0]

    class Listening:
        __name__ = "listening"

        def __call__(self, **columns):
            seen.append(
                parse_rankings(columns["completion_ids"], columns["candidates"], separator=task.separator, end=task.end)
            )
            return reward(**columns)

    trainer.reward_funcs[0] = Listening()
    trainer.train()
    assert seen[0].missing.sum() == seen[0].repeated.sum() == 0


def write_log(folder, *evaluations):
    lines = [{"stage": "format", "step": 1, "steps": 1, "seconds": 1.0}]
    lines += [
        {
            "stage": "evaluation",
            "of": of,
            "step": 0,
            "steps": steps,
            "seconds": seconds,
            "means": {"interest": {"ndcg@5": value}, "trend": {"ndcg@5": value + 0.2}},
        }
        for of, steps, seconds, value in evaluations
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_are_plotted_from_where_training_begins(tmp_path):
    pytest.importorskip("matplotlib")
    path = Path(__file__).resolve().parents[1] / "examples" / "plot_curves.py"
    spec = importlib.util.spec_from_file_location("plot_curves", path)
    plot_curves = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot_curves)
    own = [("format", 0, 0.0, 0.1), ("format", 3, 4.5, 0.2), ("listwise warm-up", 5, 8.5, 0.4)]
    baselines = [("rank_grpo", 9, 18.5, 0.45), ("listwise", 7, 9.0, 0.42)]
    write_log(tmp_path, *own, ("reinforcement", 9, 20.5, 0.5), *baselines)
    points, ends = plot_curves.curve(tmp_path, "interest", "ndcg@5")
    assert points.tolist() == [[0, 0.0, 0.1], [3, 4.5, 0.2], [5, 8.5, 0.4], [9, 20.5, 0.5]]
    assert ends == {"format": 1, "listwise warm-up": 2, "reinforcement": 3}
    points, _ = plot_curves.curve(tmp_path, "interest", "ndcg@5", "rank_grpo")
    assert points.tolist() == [[0, 0.0, 0.1], [3, 4.5, 0.2], [5, 8.5, 0.4], [9, 18.5, 0.45]]
    points, _ = plot_curves.curve(tmp_path, "interest", "ndcg@5", "listwise")
    assert points.tolist() == [[0, 0.0, 0.1], [3, 4.5, 0.2], [7, 9.0, 0.42]]
