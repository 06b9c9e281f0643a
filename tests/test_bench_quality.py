"""Quality over time beside TRL: who was where when, and a peer that generates rankings only."""

import importlib.util
import json
from pathlib import Path

import pytest

from bench import time_to_quality
from bench.peer_trl import as_text, ids_tokenizer
from bench.training_task import ROLLOUTS, TrainingTask, embedded_shape, trl_trainer
from flexrec.rankings import parse_rankings

pytest.importorskip("trl")


def curve(*points):
    return [{"step": s, "seconds": t, "cpu_seconds": 2 * t, "ndcg@5": q} for s, t, q in points]


OURS = curve((0, 0, 0.2), (5, 30, 0.4), (10, 40, 0.5))


def test_the_verdict_is_about_the_end_and_about_the_best():
    said = time_to_quality.verdict(OURS, curve((0, 0, 0.2), (25, 100, 0.45), (50, 200, 0.35)))
    end, best = said.splitlines()
    assert "after 50 steps, 400 s: NDCG@5 0.350. FlexRec was there at its evaluation after 30 s (7.5%" in end
    assert "best, after 25 steps, 200 s: NDCG@5 0.450. FlexRec was there at its evaluation after 40 s (20.0%" in best


def test_a_loss_is_said():
    assert "FlexRec ended at 0.500, below it" in time_to_quality.verdict(OURS, curve((0, 0, 0.2), (25, 100, 0.6)))


def test_curves_that_are_there_are_drawn(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "run" / "base").mkdir(parents=True)
    (tmp_path / "run" / "base" / "flexrec.json").write_text(
        json.dumps(
            {
                "encoding": "item_token",
                "show_titles": False,
                "show_rising": False,
                "max_history": 20,
                "num_ranked": None,
                "temperature": 0.3,
                "dataset": "simulated",
                "data": None,
                "needs": ["interest"],
                "seed": 0,
            }
        )
    )
    (tmp_path / "flexrec.json").write_text(json.dumps(OURS))
    (tmp_path / "trl_free.json").write_text(json.dumps(curve((0, 0, 0.2), (25, 100, 0.3))))
    monkeypatch.setattr(
        "sys.argv", ["time_to_quality", str(tmp_path / "run"), "--output", str(tmp_path), "--only", "plot"]
    )
    time_to_quality.main()
    assert capsys.readouterr().out.startswith("free text: TRL after 25 steps")
    assert "TRL GRPO, free text" in (tmp_path / "time_to_quality.svg").read_text()


def test_trl_reads_the_tokens_it_is_given():
    tokens = list(range(500))
    assert ids_tokenizer(500, eos_token_id=2, pad_token_id=0)(as_text(tokens))["input_ids"] == tokens


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


def test_the_curve_of_a_run_begins_at_its_base_and_holds_the_warm_start(tmp_path):
    own = [("format", 0, 0.0, 0.1), ("format", 3, 4.5, 0.2), ("listwise warm-up", 5, 8.5, 0.4)]
    write_log(tmp_path, *own, ("reinforcement", 9, 20.5, 0.5), ("rank_grpo", 9, 18.5, 0.45))
    assert [tuple(point.values()) for point in time_to_quality.flexrec_curve(tmp_path)] == [
        (0, 0.0, pytest.approx(0.3)),
        (2, 4.0, pytest.approx(0.5)),
        (6, 16.0, pytest.approx(0.6)),
    ]


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
