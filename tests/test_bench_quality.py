"""Quality over time beside TRL: who was where when, and a peer that generates rankings only."""

import json

import pytest

from bench import time_to_quality
from bench.peer_trl import as_text, ids_tokenizer
from bench.training_task import TrainingTask, embedded_shape, trl_trainer
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
