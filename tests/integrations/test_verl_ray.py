"""Item rewards on their way through Ray: verl's agent loop workers, TransferQueue and trainer, without GPU and engine.

Starts a Ray of its own, so it runs only where FLEXREC_REQUIRE_VERL=1 asks for it, as `make test-verl` does.
"""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

import flexrec
from flexrec.data import Catalogue
from flexrec.integrations.responses import score_responses
from flexrec.policy.small_model import build_tokenizer
from flexrec.rankings.text import item_values_to_tokens

if os.environ.get("FLEXREC_REQUIRE_VERL", "") in ("", "0"):
    pytest.skip("starts Ray: only with FLEXREC_REQUIRE_VERL=1", allow_module_level=True)

import hydra
import ray
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl.trainer.ppo.v1 import AgentLoopManagerTQ
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils import tensordict_utils

EXAMPLE = Path(__file__).parents[2] / "examples" / "verl"
TRUTHS = [{"gains": [1.0, 0.0, 0.5], "gain_variance": [0.0, 0.1, 0.2]}, {"gains": [0.0, 0.25, 0.0]}]
GENERATIONS = 4
ANSWERS = ["[1] > [3] > [2]", "hm [2] > [1]", "[3] > [2] > [1]", "no"]


def make_engine(folder):
    """An engine with a different answer for each generation of a prompt; a local class travels to workers by value."""

    class Engine:
        calls = 0

        async def generate(self, **_):
            from transformers import AutoTokenizer
            from verl.workers.rollout.replica import TokenOutput

            tokenizer = AutoTokenizer.from_pretrained(folder)
            text = ANSWERS[self.calls % len(ANSWERS)]
            self.calls += 1
            ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
            steps = {"min_global_steps": 0, "max_global_steps": 0}
            return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids), extra_fields=steps)

    return Engine()


def prompts():
    columns = {
        "raw_prompt": [[{"role": "user", "content": "rank"}]] * 2,
        "reward_model": [{"style": "rule", "ground_truth": json.dumps(truth)} for truth in TRUTHS],
        "data_source": ["flexrec"] * 2,
        "uid": ["0", "1"],
    }
    stacked = {name: NonTensorStack(*map(NonTensorData, values)) for name, values in columns.items()}
    batch = TensorDict({**stacked, "index": torch.arange(2)}, batch_size=[2])
    tensordict_utils.assign_non_tensor_data(batch, "global_steps", 0)
    return batch


def finished(partition="train", seconds=120):
    """Keys and tags of the responses, once all prompts are done."""
    for _ in range(seconds * 5):
        entries = tq.kv_list(partition).get(partition, {})
        if [entries[uid]["status"] for uid in ("0", "1")] == ["finished"] * 2:
            return {key: tag for key, tag in sorted(entries.items()) if "_" in key}
        assert "failure" not in [entries[uid]["status"] for uid in ("0", "1")]
        time.sleep(0.2)
    raise TimeoutError("the agent loops did not finish")


def test_item_rewards_reach_the_trainers_advantages(tmp_path):
    tokenizer = build_tokenizer(Catalogue(("a",), ("Alien",), (("space",),)), ANSWERS)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=len(tokenizer), architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    changes = {
        "actor_rollout_ref.model.path": tmp_path,
        "actor_rollout_ref.rollout.n": GENERATIONS,
        "actor_rollout_ref.rollout.agent.num_workers": 1,
        "actor_rollout_ref.rollout.agent.agent_loop_config_path": EXAMPLE / "agent_loop.yaml",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    }
    with hydra.initialize_config_dir(str(EXAMPLE), version_base=None):
        config = hydra.compose("qwen2_5_3b", [f"{name}={value}" for name, value in changes.items()])
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))

    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=128 * 2**20, log_to_driver=False)
    try:
        tq.init(config.transfer_queue)
        engine = make_engine(str(tmp_path))
        manager = AgentLoopManagerTQ.create(config=config, llm_client=engine, reward_loop_worker_handles=None)
        tags = [{"is_prompt": True, "status": "pending", "global_steps": 0}] * 2
        tq.kv_batch_put(keys=["0", "1"], partition_id="train", tags=tags)
        manager.generate_sequences(prompts())
        responses = finished()
        batch = tq.KVBatchMeta(keys=list(responses), tags=list(responses.values()), partition_id="train")
        # What the trainer computes first; then its own method, which reads of the trainer the configuration alone.
        sampled = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["rollout_log_probs"])
        old = TensorDict({"old_log_probs": sampled["rollout_log_probs"]}, batch_size=len(batch.keys))
        tq.kv_batch_put(keys=batch.keys, partition_id="train", fields=old)
        PPOTrainer._compute_advantage(SimpleNamespace(config=config), batch, {})
        found = tq.kv_batch_get(
            keys=batch.keys, partition_id="train", select_fields=["advantages", "responses", "rm_scores"]
        )
    finally:
        ray.shutdown()

    assert len(batch.keys) == 2 * GENERATIONS
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in found["responses"].unbind()]
    assert sorted(texts) == sorted(ANSWERS * 2)
    truths = [TRUTHS[int(key[0])] for key in batch.keys]
    scored = score_responses(tokenizer, found["responses"].unbind(), truths)
    named = torch.arange(3) < (scored.item_ids.max(1).values + 1)[:, None]
    total = (scored.completions.variance * named).sum(1, keepdim=True)
    rewards = scored.completions.item_rewards
    size = (rewards * named).norm(dim=1, keepdim=True)
    weights = flexrec.uncertainty_weights(total, GENERATIONS, rewards=size, item_mask=named.any(1, keepdim=True))
    advantages = flexrec.item_advantages(rewards, GENERATIONS, item_mask=named, weights=weights)
    expected = item_values_to_tokens(advantages, scored.item_ids)
    torch.testing.assert_close(found["advantages"].to_padded_tensor(0.0), expected, rtol=3e-7, atol=1e-30)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found["rm_scores"].to_padded_tensor(0.0).sum(1), (rewards * named).sum(1))
