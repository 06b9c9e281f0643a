"""RankingReward in TRL's asynchronous GRPO: in the loop that scores rollouts, as its process does."""

import asyncio
import importlib
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState

import flexrec
from flexrec.integrations.trl import RankingReward

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]
try:
    worker = importlib.import_module("trl.experimental.async_grpo.async_rollout_worker")
    worker._AsyncRolloutLoop._score_group  # noqa: B018
except (AttributeError, ImportError) as error:
    pytest.skip(f"this version of TRL scores rollouts otherwise, or not here: {error}", allow_module_level=True)


@pytest.mark.parametrize("invalid", ["partial", "none"])
def test_a_group_is_scored_by_the_loop_of_another_process(invalid):
    """The reward travels by pickle; advantages are of the metric of what each answer ranks."""
    reward = pickle.loads(pickle.dumps(RankingReward("ndcg", invalid=invalid)))
    texts, gains = ["[2] > [1] > [3]", "[1] > [2] > [3]", "sorry"], [0.0, 1.0, 0.5]
    sequence = SimpleNamespace(input_ids=[5, 6, 7], completion_mask=[0, 1, 1], old_log_probs=[0.0, -1.0, -2.0])
    group = worker.RolloutGroup(
        prompts=[[{"role": "user", "content": "rank"}]] * 3,
        reward_kwargs={"gains": [gains] * 3},
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completions_ids=[[6, 7]] * 3,
        completions_sequences=[[sequence]] * 3,
        tool_call_counts=[0] * 3,
        tool_failure_counts=[0] * 3,
        model_version=1,
        group_id=0,
        env_rewards=[None] * 3,
        rollout_rewards=[None] * 3,
    )
    PartialState()  # as TRL's process makes it, for the log
    loop = SimpleNamespace(
        reward_funcs=[reward], reward_func_names=[reward.__name__], _env_reward_types=[], _provides_rollout_reward=False
    )
    samples = asyncio.run(worker._AsyncRolloutLoop._score_group(loop, group))
    ranked = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])  # gains, in the order of the answers
    values = flexrec.ranking_metric(ranked, "ndcg").tolist()
    rewards = np.array([*values, 0.0] if invalid == "partial" else values)
    expected = (rewards - rewards.mean()) / rewards.std()
    found = [sample.advantage for sample in samples]
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=1e-5)
    assert invalid == "partial" or found[2] == 0.0  # left out of the statistics
    assert samples[0].metrics["rewards/ndcg"] == pytest.approx(values[0])
