"""The trainers: what a step computes, on a bandit-like task whose best ranking is known."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from flexrec.decoding.sample import sample_rankings
from flexrec.ops.ranking_metric import ranking_metric
from flexrec.task.examples import Example
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer
from flexrec.trainer.options import TRAINER_CREDITS
from flexrec.trainer.supervised import SupervisedTrainer

GAINS = np.array([0.0, 1.0, 0.25, 0.0, 0.5], dtype=np.float32)
SINGLE = [[10], [11], [12], [13], [14]]
TITLES = [[10, 20], [10, 21], [11, 20], [12], [12, 22]]


class Fixed(Dataset):
    """The same list again and again, the candidates' order turned by the index."""

    def __init__(self, candidates, gains=GAINS, variance=None, size=64):
        self.candidates, self.gains, self.size = candidates, gains, size
        self.variance = np.zeros_like(gains) if variance is None else variance

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        order = np.roll(np.arange(len(self.gains)), index)
        return Example(
            prompt=[1, 2, 3, 4],
            candidates=[self.candidates[i] for i in order],
            gains=self.gains[order],
            variance=self.variance[order],
            history_span=(1, 3),
            need="interest",
            user=0,
        )


def make_model(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


def options(tmp_path, steps=30, **more):
    return {
        "output_dir": str(tmp_path),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
        **more,
    }


def ndcg(model, candidates, separator=(), end=()):
    example = Fixed(candidates)[0]
    rollout = sample_rankings(model, [example.prompt], [example.candidates], separator=separator, end=end, greedy=True)
    gains = torch.tensor(example.gains[rollout.rankings])
    return ranking_metric(gains, "ndcg").item()


def sampled(model, dataset, metric="ndcg", num_ranked=None, separator=(), end=()):
    """The metric's mean over 40 sampled rankings of each of five lists. A greedy one may be good before training."""
    examples = [dataset[index] for index in range(5)]
    rollout = sample_rankings(
        model,
        [example.prompt for example in examples],
        [example.candidates for example in examples],
        separator=separator,
        end=end,
        num_generations=40,
        num_ranked=num_ranked,
        generator=torch.Generator().manual_seed(0),
    )
    values = []
    for n, ranking in enumerate(rollout.rankings):
        gains = examples[n // 40].gains
        placed = ranking[ranking >= 0]
        ordered = torch.tensor(np.concatenate([gains[placed], np.delete(gains, placed)]))
        values.append(ranking_metric(ordered[None], metric, num_ranked=len(placed)).item())
    return np.mean(values)


class History(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("credit", TRAINER_CREDITS)
def test_every_credit_learns_the_best_order(tmp_path, credit):
    grouped = credit in ("sequence", "rank", "independent", "noncausal")
    model = make_model()
    args = FlexRecConfig(
        **options(tmp_path),
        credit=credit,
        num_generations=8 if grouped else 2,
        baseline="rank" if grouped else "none",
        entropy_coef=0.0,
    )
    FlexRecTrainer(model, args, Fixed(SINGLE)).train()
    biased = credit in ("independent", "noncausal")  # their expected direction is not quite the gradient's
    assert ndcg(model, SINGLE) > (0.95 if biased else 0.99)


@pytest.mark.parametrize(
    # A branch is worth the mean of the items below it: a sure 0.25, and 0 or 0.5 behind one token, are equal to it.
    ("candidates", "separator", "end", "least"),
    [(SINGLE, (), (), 0.99), (TITLES, (30,), (31,), 0.95)],
)
def test_tilted_all_actions_learns_single_and_several_tokens(tmp_path, candidates, separator, end, least):
    model, spelling = make_model(), {"separator": separator, "end": end}
    assert sampled(model, Fixed(candidates), **spelling) < 0.75
    args = FlexRecConfig(**options(tmp_path), tilt=0.1, entropy_coef=0.0)
    FlexRecTrainer(model, args, Fixed(candidates), **spelling).train()
    assert sampled(model, Fixed(candidates), **spelling) > least


@pytest.mark.parametrize("credit", ["all_actions", "swap", "sequence"])
def test_candidates_of_several_tokens(tmp_path, credit):
    model, spelling = make_model(), {"separator": (30,), "end": (31,)}
    assert sampled(model, Fixed(TITLES), **spelling) < 0.75
    args = FlexRecConfig(
        **options(tmp_path, steps=60),
        credit=credit,
        num_generations=4,
        baseline="none" if credit == "all_actions" else "rank",
        entropy_coef=0.0,
    )
    FlexRecTrainer(model, args, Fixed(TITLES), **spelling).train()
    assert sampled(model, Fixed(TITLES), **spelling) > 0.95


def test_policy_credit_needs_single_tokens(tmp_path):
    args = FlexRecConfig(**options(tmp_path, steps=1), credit="policy")
    with pytest.raises(ValueError, match="item_token"):
        FlexRecTrainer(make_model(), args, Fixed(TITLES), separator=(30,)).train()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_several_updates_with_one_batch(tmp_path, accumulation):
    """The first update with a batch has ratio 1; the next ones compare with the log-probs it was sampled with."""
    history = History()
    args = FlexRecConfig(
        **options(tmp_path, steps=6, gradient_accumulation_steps=accumulation, per_device_train_batch_size=4),
        credit="swap",
        num_generations=2,
        num_iterations=3,
    )
    FlexRecTrainer(make_model(), args, Fixed(SINGLE), callbacks=[history]).train()
    ratios = [log["ratio_mean"] for log in history.logs if "ratio_mean" in log]
    rewards = [log["reward"] for log in history.logs if "reward" in log]
    assert len(ratios) == 6
    assert ratios[0] == ratios[3] == 1.0
    assert all(ratio != 1.0 for i, ratio in enumerate(ratios) if i % 3)
    assert rewards[0] == rewards[1] == rewards[2] != rewards[3], "one batch of rankings per three updates"


def test_kl_holds_the_policy_to_the_reference(tmp_path):
    kls = {}
    for beta in (1e-6, 10.0):
        history = History()
        model, reference = make_model(), make_model()
        args = FlexRecConfig(**options(tmp_path), beta=beta, entropy_coef=0.0)
        FlexRecTrainer(model, args, Fixed(SINGLE), reference=reference, callbacks=[history]).train()
        found = [log["kl"] for log in history.logs if "kl" in log]
        assert abs(found[0]) < 1e-6, "the policy begins as the reference"
        kls[beta] = found[-1]
    assert kls[10.0] < 0.1 * kls[1e-6]
    with pytest.raises(ValueError, match="reference"):
        FlexRecTrainer(make_model(), FlexRecConfig(**options(tmp_path), beta=0.1), Fixed(SINGLE))


@pytest.mark.parametrize("level", ["rollout", "item"])
@pytest.mark.parametrize("credit", ["all_actions", "swap"])
def test_uncertain_rewards_count_less(tmp_path, level, credit):
    """One gain in doubt changes what a step follows; the same doubt about nothing changes nothing."""

    def step(uncertainty, variance):
        model = make_model()
        args = FlexRecConfig(
            **options(tmp_path, steps=1), credit=credit, num_generations=4, uncertainty=uncertainty, entropy_coef=0.0
        )
        FlexRecTrainer(model, args, Fixed(SINGLE, variance=variance)).train()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    doubt = np.array([0.0, 1.0, 0.0, 0.0, 0.0], dtype=np.float32)
    assert not torch.equal(step(level, doubt), step("none", doubt))
    torch.testing.assert_close(step(level, 0 * doubt), step("none", 0 * doubt), rtol=0, atol=0)


@pytest.mark.parametrize(("candidates", "separator"), [(SINGLE, ()), (TITLES, (30,))], ids=["tokens", "titles"])
def test_sharing_prompts_changes_only_the_time(tmp_path, candidates, separator):
    """Three steps with a KL to a reference end at the same parameters, with fewer rows through the model.

    By plain SGD: Adam moves a parameter whose gradient is rounding alone as far as any other.
    """
    found = {}
    for share in (True, False):
        model, reference, rows = make_model(), make_model(1), []

        def count(_, args, kwargs, rows=rows):
            rows.append(len(kwargs["input_ids"]))

        model.register_forward_pre_hook(count, with_kwargs=True)
        small = {**options(tmp_path, steps=3), "optim": "sgd", "learning_rate": 0.1}
        args = FlexRecConfig(**small, num_generations=4, share_prompts=share, beta=0.1)
        FlexRecTrainer(model, args, Fixed(candidates), reference=reference, separator=separator).train()
        found[share] = (rows, torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert sum(found[True][0]) < sum(found[False][0])
    torch.testing.assert_close(found[True][1], found[False][1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("metric", "untrained", "best"), [("mrr@2", 0.8, 1.0), ("recall@2", 0.45, 2 / 3)])
def test_partial_rankings_and_other_metrics(tmp_path, metric, untrained, best):
    model, dataset = make_model(), Fixed(SINGLE)
    assert sampled(model, dataset, metric, num_ranked=2) < untrained
    args = FlexRecConfig(**options(tmp_path), metric=metric, num_ranked=2, uncertainty="none", entropy_coef=0.0)
    FlexRecTrainer(model, args, dataset).train()
    assert sampled(model, dataset, metric, num_ranked=2) > 0.99 * best


class Ragged(Fixed):
    """The list's first candidates: from one of them to all five."""

    def __getitem__(self, index):
        example = super().__getitem__(0)
        size = 1 + index % 5
        cut = {name: getattr(example, name)[:size] for name in ("candidates", "gains", "variance")}
        return Example(**{**vars(example), **cut})


@pytest.mark.parametrize("credit", ["all_actions", "swap"])
def test_lists_of_different_lengths(tmp_path, credit):
    model, dataset = make_model(), Ragged(SINGLE)
    before = sampled(model, dataset)
    args = FlexRecConfig(**options(tmp_path, steps=20), credit=credit, num_generations=2)
    FlexRecTrainer(model, args, dataset).train()
    # A list of one candidate without a gain is worth 0 in any order, which leaves 4/5.
    assert before < 0.65
    assert sampled(model, dataset) > 0.78


def test_listwise_reaches_the_order_of_the_gains_and_format_does_not(tmp_path):
    listwise, formatted = make_model(), make_model()
    for model, stage in ((listwise, "listwise"), (formatted, "format")):
        args = TrainingArguments(**options(tmp_path))
        SupervisedTrainer(model, args, Fixed(SINGLE), stage=stage).train()
    assert ndcg(listwise, SINGLE) > 0.99
    with torch.no_grad():
        logits = formatted(torch.tensor([[1, 2, 3, 4]])).logits[0]
    first = logits[-1, 10:15].softmax(0)
    assert first.max() < 0.35, "rankings in random order teach no preference"
    assert logits[0].argmax() == 2, "the history is modelled as language"
    assert logits[1].argmax() == 3


def test_resume_continues_where_it_stopped(tmp_path):
    def run(folder, steps, resume=False):
        model = make_model()
        args = FlexRecConfig(
            **{
                **options(folder, steps=8, save_strategy="steps", save_steps=4, lr_scheduler_type="constant"),
                "max_steps": steps,
            }
        )
        FlexRecTrainer(model, args, Fixed(SINGLE)).train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole", 8)
    run(tmp_path / "parts", 4)
    resumed = run(tmp_path / "parts", 8, resume=True)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    state = json.loads((tmp_path / "parts" / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"credit": "magic"}, "credit must be one of"),
        ({"credit": "swap", "baseline": "rank"}, "num_generations > 1"),
        ({"baseline": "group"}, "its own baseline"),
        ({"num_generations": 0}, "at least 1"),
    ],
)
def test_config_errors(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        FlexRecConfig(**options(tmp_path), **wrong)
