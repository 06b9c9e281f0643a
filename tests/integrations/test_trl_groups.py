"""Groups that nothing tells apart, in TRL: advantage 0, no NaN, others unchanged, the gradient the KL's alone."""

import sys
from pathlib import Path

import pytest
import torch
import trl
from transformers import LlamaForCausalLM

from flexrec.integrations.trl import FlexRecGRPOTrainer, RankingReward

sys.path.insert(0, str(Path(__file__).parent))

from tiny_trl import GAINS, make_args, make_model, make_rows, make_tokenizer, make_trainer, seam

# TRL and transformers warn of each other, and TRL of what is experimental.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

NOTHING = ["I cannot say", "no", "so [ ]", ">"]
WHOLE = ["[1] > [2] > [3]", "[3] > [1] > [2]", "[2] > [3] > [1]", "[1] > [3] > [2]"]


def saved_model(folder, tokenizer):
    """A model that TRL can load again, as the reference."""
    make_model(tokenizer).save_pretrained(folder / "model")
    return LlamaForCausalLM.from_pretrained(folder / "model")


def plain_trainer(folder, reward, **options):
    tokenizer = make_tokenizer()
    return trl.GRPOTrainer(
        saved_model(folder, tokenizer),
        reward,
        args=make_args(folder, trl.GRPOConfig, **options),
        train_dataset=make_rows(),
        processing_class=tokenizer,
    )


def batch_of(trainer, monkeypatch, texts, gains):
    """What TRL makes of these completions, four to a prompt; the policy has moved away from its reference."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    ids = [[*trainer.processing_class.encode(text), trainer.processing_class.eos_token_id] for text in texts]
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *args, **kwargs: (ids, None))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [{"prompt": f"rank {i // 4}", "gains": gains[i // 4]} for i in range(len(texts))]
    return trainer._generate_and_score_completions(rows)


def gradient_of(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])


def check_gradient_is_the_divergence(trainer, batch, which):
    """The KL to the reference by hand, TRL's estimate of it, averaged over the tokens that count."""
    loss = gradient_of(trainer, trainer.compute_loss(trainer.model, batch))
    logps = seam(trainer, batch, which)[0]
    change = batch["ref_per_token_logps"] - logps
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    of_tokens = (change.exp() - change - 1) * mask
    if getattr(trainer.args, "use_bias_correction_kl", False):  # times the ratio, which is 1 with a slope
        of_tokens = of_tokens * (logps - logps.detach()).exp()
    by_hand = trainer.beta * (of_tokens.sum(1) / mask.sum(1).clamp(min=1)).mean()
    expected = gradient_of(trainer, by_hand)
    assert torch.isfinite(loss).all()
    assert expected.norm() > 1e-3
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("reward", "texts"),
    [
        (RankingReward(invalid="none"), NOTHING),
        (RankingReward(), NOTHING),
        (RankingReward(), WHOLE[:1] * 4),
        (RankingReward("recall@3"), WHOLE),
    ],
    ids=["none", "nothing", "same", "equal"],
)
def test_a_plain_trainer_learns_nothing_from_them(tmp_path, monkeypatch, reward, texts):
    trainer = plain_trainer(tmp_path, reward, beta=0.1, loss_type="grpo")
    batch = batch_of(trainer, monkeypatch, [*texts, *texts], GAINS[:1] * 2)
    assert (batch["advantages"] == 0).all()
    check_gradient_is_the_divergence(trainer, batch, trl.GRPOTrainer)

    trainer = plain_trainer(tmp_path, reward, beta=0.1, loss_type="grpo")
    mixed = ["[1] > [3] > [2]", "[1] > [2] > [3]", "[2] > [1] > [3]", "[2] > [3] > [1]"]
    gains = [GAINS[0], [0.0, 0.0, 0.0] if reward.metric == "recall@3" else GAINS[0]]
    alone = batch_of(trainer, monkeypatch, [*mixed, *mixed], GAINS[:1] * 2)["advantages"][:4]
    beside = batch_of(trainer, monkeypatch, [*mixed, *texts], gains)["advantages"]
    assert torch.equal(beside[:4], alone)
    assert (beside[4:] == 0).all()
    assert reward.metric == "recall@3" or (alone != 0).all()


@pytest.mark.parametrize("statistics", [("none", "batch"), ("rank", "rank"), ("group", "group"), ("none", "none")])
@pytest.mark.parametrize("kind", ["constrained", "equal", "nothing"])
def test_item_rewards_learn_nothing_from_them(tmp_path, monkeypatch, kind, statistics):
    baseline, scale = statistics
    options = {"baseline": baseline, "scale": scale, "constrained": kind == "constrained"}
    options |= {"beta": 0.1, "loss_type": "grpo"}
    texts, gains = (NOTHING, GAINS[0]) if kind == "nothing" else (WHOLE, [0.5, 0.5, 0.5])
    tokenizer = make_tokenizer()
    trainer = make_trainer(tmp_path, tokenizer=tokenizer, model=saved_model(tmp_path, tokenizer), **options)
    batch = batch_of(trainer, monkeypatch, [*texts, *texts], [gains] * 2)
    assert (batch["advantages"] == 0).all()
    check_gradient_is_the_divergence(trainer, batch, FlexRecGRPOTrainer)

    beside = batch_of(trainer, monkeypatch, [*WHOLE, *texts], [GAINS[0], gains])["advantages"]
    alone = batch_of(trainer, monkeypatch, WHOLE, [GAINS[0]])["advantages"]
    assert (beside[4:] == 0).all()
    assert torch.isfinite(beside).all()
    assert (alone != 0).any()
    factor = 1.0
    if scale == "batch" and kind != "nothing":  # items of reward 0 are items of the batch, whose spread they halve
        factor = 2.0**0.5
    torch.testing.assert_close(beside[:4, : alone.shape[1]], alone * factor, rtol=1e-5, atol=1e-7)
