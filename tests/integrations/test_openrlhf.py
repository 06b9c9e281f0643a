"""OpenRLHF's reward file, by its real signature and through its real executor; item advantages in its experiences."""

import asyncio
import importlib.util
import inspect
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flexrec
from flexrec.data import Catalogue, simulate
from flexrec.integrations.openrlhf import MetricReward, set_item_advantages
from flexrec.policy.small_model import build_tokenizer
from flexrec.rankings.text import item_values_to_tokens

ROOT = Path(__file__).parents[2]
REWARD_FILE = ROOT / "examples" / "openrlhf" / "reward.py"
PROMPT = "<|im_start|>user\nRank [1] A [2] B [3] C<|im_end|>\n<|im_start|>assistant\n"
LABEL = json.dumps({"gains": [0.0, 0.5, 1.0]})
ANSWERS = ["[3] > [2] > [1]", "[1] > [2] > [3]", "well [2]", "[2] > [3] > [1]"]


@pytest.fixture
def openrlhf():
    """The installed package; missing is a failure where FLEXREC_REQUIRE_OPENRLHF asks for it."""
    if os.environ.get("FLEXREC_REQUIRE_OPENRLHF", "") in ("", "0"):
        return pytest.importorskip("openrlhf", reason="OpenRLHF is not installed")
    return importlib.import_module("openrlhf")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(Catalogue(("a",), ("Alien",), (("space",),)), [*ANSWERS, PROMPT])


def load(path):
    """As OpenRLHF loads a reward file."""
    spec = importlib.util.spec_from_file_location("reward_func", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ndcg(*gains, num_ranked=3):
    return flexrec.ranking_metric(torch.tensor([gains]), "ndcg", num_ranked=num_ranked).item()


def test_reward_file_has_the_signature():
    reward_func = load(REWARD_FILE).reward_func
    assert list(inspect.signature(reward_func).parameters) == ["queries", "prompts", "labels"]
    queries = [PROMPT + answer + "<|im_end|><|endoftext|>" for answer in ANSWERS]
    result = reward_func(queries, [PROMPT] * 4, [LABEL] * 4)
    assert set(result) == {"rewards", "scores", "extra_logs"}
    expected = [1.0, ndcg(0.0, 0.5, 1.0), ndcg(0.5, 0.0, 1.0, num_ranked=1), ndcg(0.5, 1.0, 0.0)]
    assert result["rewards"].tolist() == pytest.approx(expected)
    assert result["scores"].tolist() == result["rewards"].tolist()
    assert result["extra_logs"]["valid"].tolist() == [1.0, 1.0, 0.0, 1.0]
    assert result["extra_logs"]["missing"].tolist() == [0.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("cut", [0, 8])
def test_labels_in_the_prompt_are_no_answer(cut):
    """The prompt lists [1], [2], [3]; a decoder may put a token in front of it, and OpenRLHF may cut it on the left."""
    query = ("<s>" if cut == 0 else "") + PROMPT[cut:] + "[3] > [2] > [1]"
    result = MetricReward()([query], [PROMPT], [LABEL])
    assert result["rewards"].tolist() == [1.0]
    assert result["extra_logs"]["valid"].tolist() == [1.0]


def test_options_of_the_reward():
    reward = MetricReward(metric="hit_rate@1", reasoning_end="</think>", endings=["<stop>"])
    result = reward([PROMPT + "[1]?</think>[3] > [2] > [1]<stop><stop>"], [PROMPT], [LABEL])
    assert result["rewards"].tolist() == [1.0]
    assert result["extra_logs"]["valid"].tolist() == [1.0]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="metric"):
        MetricReward(metric="ndgc")
    with pytest.raises(TypeError, match="metrics"):
        MetricReward(metrics="ndcg")
    with pytest.raises(ValueError, match=r"queries\[0\] does not contain its prompt"):
        MetricReward()(["[3] > [2] > [1]"], [PROMPT], [LABEL])
    with pytest.raises(ValueError, match="same length, got 1, 1 and 0"):
        MetricReward()([PROMPT], [PROMPT], [])


def make_experiences(tokenizer, make=SimpleNamespace, kl=0.0, base=None, answers=ANSWERS):
    """Two batches of two responses each, padded on the right; index says whose prompt's they are."""
    prompt = tokenizer.encode(PROMPT)
    experiences = []
    for rows in ([2, 0], [1, 3]):
        sequences = [[*prompt, *tokenizer.encode(answers[row]), tokenizer.eos_token_id] for row in rows]
        width = max(map(len, sequences))
        padded = [sequence + [tokenizer.pad_token_id] * (width - len(sequence)) for sequence in sequences]
        attention = torch.tensor([[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in sequences])
        action_mask = attention[:, 1:].clone()
        action_mask[:, : len(prompt) - 1] = 0
        experience = make(
            sequences=torch.tensor(padded),
            attention_mask=attention,
            action_mask=action_mask,
            base_action_log_probs=base,
            advantages=torch.ones(action_mask.shape),
            labels=[LABEL] * 2,
            info={"kl": torch.full((2,), kl)},
        )
        experience.index = rows
        experiences.append(experience)
    return experiences


def expected_advantages(gain_rows, counts, metric="ndcg", credit="swap", **options):
    gains = torch.tensor(gain_rows)
    named = torch.arange(3) < torch.tensor(counts)[:, None]
    rewards = flexrec.swap_rewards(gains, metric, credit=credit, num_ranked=torch.tensor(counts))
    return flexrec.item_advantages(rewards, 2, item_mask=named, **options)


@pytest.mark.parametrize(
    "options", [{}, {"baseline": "rank", "scale": "group"}, {"metric": "dcg@2", "credit": "noncausal", "scale": "none"}]
)
def test_every_token_of_an_item_gets_its_advantage(tokenizer, options):
    advantages = expected_advantages(
        [[1.0, 0.5, 0.0], [0.0, 0.5, 1.0], [0.5, 0.0, 1.0], [0.5, 1.0, 0.0]], [3, 3, 1, 3], **options
    )
    for experience in set_item_advantages(make_experiences(tokenizer), tokenizer, 2, **options):
        assert experience.advantages.shape == experience.action_mask.shape
        for row, index in enumerate(experience.index):
            found = experience.advantages[row]
            at = experience.action_mask[row].bool()
            assert (found[~at] == 0).all()
            tokens = [tokenizer.decode([token]) for token in experience.sequences[row, 1:][at].tolist()]
            rank, item_ids = -1, []
            for token in tokens:  # labels are "[", digit, "]", with what stands before "[" joined to it or not
                rank += "[" in token
                item_ids.append(rank if any(mark in token for mark in "[]123") else -1)
            expected = item_values_to_tokens(advantages[index : index + 1], torch.tensor([item_ids]))
            torch.testing.assert_close(found[at][None], expected)


@pytest.mark.parametrize("third", [ANSWERS[2], "none of them"])
def test_unsure_responses_count_less(tokenizer, third):
    """And one that names nothing neither weighs nor counts in the mean of the weights."""
    variance = [[0.2, 0.1, 0.0], [0.0, 0.1, 0.2], [0.1, 0.0, 0.2], [0.1, 0.2, 0.0]]
    gains = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0], [0.5, 0.0, 1.0], [0.5, 1.0, 0.0]])
    counts = torch.tensor([3, 3, 1 if third == ANSWERS[2] else 0, 3])
    answers = [*ANSWERS[:2], third, ANSWERS[3]]
    rewards, spread = flexrec.swap_rewards_with_variance(gains, torch.tensor(variance), "ndcg", num_ranked=counts)
    named = torch.arange(3) < counts[:, None]
    weights = flexrec.uncertainty_weights(spread, 4, rewards=rewards, item_mask=named)
    label = json.dumps({"gains": [0.0, 0.5, 1.0], "gain_variance": [0.0, 0.1, 0.2]})

    def strength(**options):
        experiences = make_experiences(tokenizer, answers=answers)
        for experience in experiences:
            experience.labels = [label] * 2
        set_item_advantages(experiences, tokenizer, 4, **options)
        rows = {i: e.advantages[row].abs().max().item() for e in experiences for row, i in enumerate(e.index)}
        return torch.tensor([rows[i] for i in range(4)])

    torch.testing.assert_close(strength(), strength(uncertainty="none") * weights[:, 0])


@pytest.mark.parametrize(
    "options", [{}, {"baseline": "rank", "scale": "rank"}, {"baseline": "group", "scale": "group"}]
)
@pytest.mark.parametrize("kind", ["nothing", "equal"])
def test_groups_that_nothing_tells_apart_have_no_advantage(tokenizer, options, kind):
    """Exactly 0 at every token, so that the loss's gradient is the KL's; the other prompt's are as they were."""
    answers = [*ANSWERS[:2], *(("well", "") if kind == "nothing" else ANSWERS[:2])]
    found = {}
    for name in ("both", "alone"):
        experiences = make_experiences(tokenizer, answers=answers)
        for experience in experiences:
            same = json.dumps({"gains": [0.5, 0.5, 0.5]})
            experience.labels = [same if kind == "equal" and index >= 2 else LABEL for index in experience.index]
        if name == "alone":
            for experience in experiences:
                keep = [row for row, index in enumerate(experience.index) if index < 2]
                for field in ("sequences", "attention_mask", "action_mask", "advantages"):
                    setattr(experience, field, getattr(experience, field)[keep])
                experience.labels = [experience.labels[row] for row in keep]
                experience.index = [experience.index[row] for row in keep]
        for experience in set_item_advantages(experiences, tokenizer, 2, **options):
            for row, index in enumerate(experience.index):
                found[name, index] = experience.advantages[row]
    for index in (2, 3):
        assert (found["both", index] == 0).all()
    factor = 2.0**0.5 if kind == "equal" and not options else 1.0  # the batch's spread is over their items too
    for index in (0, 1):
        torch.testing.assert_close(found["both", index], found["alone", index] * factor)
        assert (found["alone", index] != 0).any()


def test_a_divergence_in_the_rewards_would_be_lost(tokenizer):
    with pytest.raises(ValueError, match=r"use --algo\.kl\.use_loss"):
        set_item_advantages(make_experiences(tokenizer, kl=0.1), tokenizer, 4)
    in_loss = make_experiences(tokenizer, kl=0.1, base=torch.zeros(2, 3))
    assert set_item_advantages(in_loss, tokenizer, 4) is in_loss


def test_prepared_lines_are_what_openrlhf_reads(tmp_path, monkeypatch):
    prepare = load(ROOT / "examples" / "verl" / "prepare.py")
    small = simulate(num_users=60, num_items=120, max_train_lists=20)
    monkeypatch.setattr(prepare, "load_dataset", lambda *_: small)
    options = "--dataset simulated --need interest --train-lists 3 --test-lists 2 --format openrlhf --output"
    written = prepare.prepare(prepare.parse([*options.split(), str(tmp_path)]))
    lines = [json.loads(line) for line in written["train"].read_text().splitlines()]
    assert len(lines) == 3
    answer = " > ".join(f"[{i}]" for i in range(1, 31))
    prompt = lines[0]["input"][0]["content"]
    assert 0 < MetricReward()([prompt + answer], [prompt], [lines[0]["label"]])["rewards"].item() < 1


def test_openrlhfs_executor_calls_the_reward_file(openrlhf, tokenizer):
    """``SingleTurnAgentExecutor`` of the installed package, with an engine that gives a fixed answer."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    class Engine:
        async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
            ids = [*tokenizer.encode("[2] > [3] > [1]"), tokenizer.eos_token_id]
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)])

    executor = SingleTurnAgentExecutor([str(REWARD_FILE)])
    parameters = SimpleNamespace(max_tokens=64, logprobs=None)
    ran = executor.execute(PROMPT, LABEL, parameters, 256, tokenizer, Engine())
    output = asyncio.run(ran)
    assert float(output["reward"]) == pytest.approx(ndcg(0.5, 1.0, 0.0))
    assert float(output["scores"]) == float(output["reward"])
    assert torch.tensor([output["reward"]]).shape == (1,)  # what becomes of it in an Experience
    assert output["extra_logs"]["valid"].flatten()[0].item() == 1.0


def test_item_advantages_travel_in_openrlhfs_experiences(openrlhf, tokenizer):
    from openrlhf.trainer.ppo_utils.experience import Experience, make_experience_batch, split_experience_batch

    experiences = set_item_advantages(make_experiences(tokenizer, Experience), tokenizer, 4)
    expected = [row[mask.bool()] for e in experiences for row, mask in zip(e.advantages, e.action_mask, strict=True)]
    items = [item for experience in experiences for item in split_experience_batch(experience)]
    batch = make_experience_batch(items)
    for row, mask, values in zip(batch.advantages, batch.action_mask, expected, strict=True):
        assert torch.equal(row[mask.bool()], values)
    assert batch.advantages.abs().max() > 0


def test_documented_options_exist_in_openrlhf(openrlhf):
    source = Path(openrlhf.__file__).parent / "cli" / "train_ppo_ray.py"
    known = set(re.findall(r'add_argument\(\s*f?"--([\w.{}]+)"', source.read_text()))
    known |= {name.replace("{prefix}", prefix) for name in known for prefix in ("actor", "critic")}
    documented = set(re.findall(r"--([a-z_]+(?:\.[a-z_]+)+)", (ROOT / "docs" / "openrlhf.md").read_text()))
    assert len(documented) > 15
    assert sorted(documented - known) == []
