"""FlexRec inside the installed verl: its plugin loader, registries, trainer's functions, agent loop and configuration.

``make test-verl`` installs verl and runs this with FLEXREC_REQUIRE_VERL=1, under which a missing verl is a failure.
"""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flexrec
from flexrec.data import Catalogue, simulate
from flexrec.integrations.responses import score_responses
from flexrec.integrations.verl import compute_score, item_advantage_estimator, unpack_token_rewards
from flexrec.policy.small_model import build_tokenizer
from flexrec.rankings.text import item_values_to_tokens

if importlib.util.find_spec("verl") is None and os.environ.get("FLEXREC_REQUIRE_VERL", "") in ("", "0"):
    pytest.skip("verl is not installed", allow_module_level=True)

import hydra
import verl
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.protocol import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.padding_utils import construct_minimal_padding_template
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.replica import TokenOutput
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_to_nested

EXAMPLE = Path(__file__).parents[2] / "examples" / "verl"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}> {% endif %}"
)
GAINS = [[1.0, 0.0, 0.5], [0.0, 0.25, 0.0]]
VARIANCE = [[0.0, 0.1, 0.2], [0.3, 0.0, 0.1]]
ANSWERS = ["[1] > [3] > [2]", "[2] > [1] > [3]", "I say [3] > [1]", "[2] > [3] > [1]", "[1] > [2] > [3]", "no"]


@pytest.fixture(scope="module")
def tokenizer():
    made = build_tokenizer(Catalogue(("a",), ("Alien",), (("space",),)), ANSWERS)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def config():
    """examples/verl/qwen2_5_3b.yaml on top of verl's own defaults."""
    return compose("qwen2_5_3b")


def compose(name, folder=EXAMPLE):
    with hydra.initialize_config_dir(str(folder), version_base=None):
        return hydra.compose(name, overrides=["data.train_files=train.parquet", "data.val_files=test.parquet"])


@pytest.fixture(scope="module")
def outputs(config, tokenizer):
    """What verl's TransferQueue gets of the agent loop of examples/verl, with an engine that gives fixed answers."""

    class Engine:
        async def generate(self, **_):
            ids = tokenizer.encode(next(answers), add_special_tokens=False)
            return TokenOutput(token_ids=[*ids, tokenizer.eos_token_id], log_probs=[-0.5] * (len(ids) + 1))

    answers = iter(ANSWERS)
    (agent_loop_config,) = OmegaConf.load(EXAMPLE / "agent_loop.yaml")
    assert agent_loop_config.name == config.actor_rollout_ref.rollout.agent.default_agent_loop

    async def run(row):
        agent_loop = hydra.utils.instantiate(
            config=agent_loop_config,
            trainer_config=DictConfigWrap(config),
            server_manager=Engine(),
            tokenizer=tokenizer,
            processor=None,
            dataset_cls=RLHFDataset,
            data_config=DictConfigWrap(config.data),
            tools=ToolListWrap([]),
        )
        truth = {"gains": GAINS[row // 3], "gain_variance": VARIANCE[row // 3]}
        fields = {"raw_prompt": [{"role": "user", "content": "[1] [2] [3]?"}], "uid": f"uid-{row // 3}"}
        reward_model = {"style": "rule", "ground_truth": json.dumps(truth)}
        return (await agent_loop.run({}, **fields, reward_model=reward_model)).as_dict() | fields

    async def run_all():
        return [await run(row) for row in range(len(ANSWERS))]

    return asyncio.run(run_all())


def to_batch(outputs):
    """As PPOTrainer._compute_advantage makes it of the TransferQueue."""
    data = list_of_dict_to_tensordict(outputs)
    mask = data["response_mask"]
    padded = data.select("response_mask", "rm_scores").to_padded_tensor()
    batch = DataProto(batch=padded)
    batch.batch["token_level_rewards"] = batch.batch["rm_scores"]
    batch.non_tensor_batch["uid"] = np.array([output["uid"] for output in outputs], dtype=object)
    return data, mask, batch


def advantages_of(outputs, config):
    _, mask, batch = to_batch(outputs)
    batch = compute_advantage_for_multi_trajectories(
        batch,
        batch_keys=[f"{output['uid']}_{i}_0" for i, output in enumerate(outputs)],
        adv_estimator=config.algorithm.adv_estimator,
        num_repeat=3,
        config=config.algorithm,
    )
    return response_to_nested(batch.batch["advantages"], mask)


def expected_advantages(outputs, tokenizer):
    truths = [{"gains": GAINS[row // 3], "gain_variance": VARIANCE[row // 3]} for row in range(6)]
    scored = score_responses(tokenizer, [output["responses"] for output in outputs], truths)
    named = torch.arange(3) < (scored.item_ids.max(1).values + 1)[:, None]
    total = (scored.completions.variance * named).sum(1, keepdim=True)
    rewards = scored.completions.item_rewards
    size = (rewards * named).norm(dim=1, keepdim=True)
    weights = flexrec.uncertainty_weights(total, 3, rewards=size, item_mask=named.any(1, keepdim=True))
    return flexrec.item_advantages(rewards, 3, item_mask=named, weights=weights), scored.item_ids


def test_verl_loads_the_entry_point():
    """In a fresh process, by nothing but ``import verl``."""
    program = (
        "import verl, sys\n"
        "from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY\n"
        "print('flexrec' in ADV_ESTIMATOR_REGISTRY, 'flexrec' in POLICY_LOSS_REGISTRY)"
    )
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "auto", "VERL_USE_EXTERNAL_MODULES": ""}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split()[-2:] == ["True", "True"]


def test_registries_hold_our_functions():
    assert core_algos.get_adv_estimator_fn("flexrec") is item_advantage_estimator
    assert core_algos.get_policy_loss_fn("flexrec").__module__ == "flexrec.integrations.verl_plugin"
    assert verl.__version__ >= "0.9"


def test_agent_loop_puts_item_rewards_at_item_ends(outputs, tokenizer):
    for output, answer in zip(outputs, ANSWERS, strict=True):
        assert output["rm_scores"].shape == output["responses"].shape
        assert tokenizer.decode(output["responses"]) == answer + "</s>"
    found = unpack_token_rewards(outputs[2]["rm_scores"][None], torch.ones(1, len(outputs[2]["rm_scores"])))
    rewards = flexrec.swap_rewards(torch.tensor([[0.5, 1.0, 0.0]]), "ndcg", num_ranked=2)
    torch.testing.assert_close(found.rewards, rewards[:, :2])  # "I say [3] > [1]" left out [2]
    spelled = [tokenizer.decode(outputs[2]["responses"][found.item_ids[0] == rank]) for rank in range(2)]
    assert [text.strip() for text in spelled] == ["[3]", "[1]"]
    info = [output["extra_fields"]["reward_extra_info"] for output in outputs]
    assert [entry["valid"] for entry in info] == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    assert info[0]["acc"] == 1.0


def test_advantages_through_the_trainers_own_function(outputs, config, tokenizer):
    advantages, item_ids = expected_advantages(outputs, tokenizer)
    found = advantages_of(outputs, config).to_padded_tensor(0.0)
    torch.testing.assert_close(found, item_values_to_tokens(advantages, item_ids), rtol=3e-7, atol=1e-30)
    assert (found != 0).any()


def test_padding_rows_of_verl_change_nothing(outputs, config):
    template, _ = construct_minimal_padding_template(outputs[0], {}, eos_token_id=2)
    padding = {**{name: template[name] for name in outputs[0]}, "uid": "pad"}
    filled = advantages_of([*outputs, padding, padding], config).to_padded_tensor(0.0)
    alone = advantages_of(outputs, config).to_padded_tensor(0.0)
    torch.testing.assert_close(filled[:6], alone, rtol=0, atol=0)


def test_rewards_of_verls_own_agent_loop_are_refused(outputs, config):
    scalar = [{**output, "rm_scores": torch.zeros_like(output["rm_scores"])} for output in outputs]
    for output in scalar:
        output["rm_scores"][-1] = 1.0
    with pytest.raises(ValueError, match="default_agent_loop=flexrec"):
        advantages_of(scalar, config)


def loss_of(config, outputs, advantages, log_probs, rows, dp_size=1, ref=-0.7):
    """verl's loss of some rows of a mini-batch; ``log_probs`` and entropy nested over prompts and responses."""
    data = list_of_dict_to_tensordict([outputs[row] for row in rows])
    mask = data["response_mask"]

    def nested(value):
        return torch.nested.as_nested_tensor(value, layout=torch.jagged)

    old = [torch.full((len(outputs[row]["responses"]),), -0.5) for row in rows]
    batch = TensorDict(
        {
            "prompts": nested(list(data["prompts"].unbind())),
            "responses": data["responses"],
            "response_mask": mask,
            "old_log_probs": nested(old),
            "ref_log_prob": nested([value + (ref + 0.5) for value in old]),
            "advantages": nested([advantages[row] for row in rows]),
        },
        batch_size=len(rows),
    )
    num_tokens = sum(int(output["response_mask"].sum()) for output in outputs)
    for key, value in {"dp_size": dp_size, "batch_num_tokens": num_tokens, "global_batch_size": len(outputs)}.items():
        tensordict_utils.assign_non_tensor_data(batch, key, value)
    model_output = {"log_probs": nested([log_probs[row] for row in rows])}
    model_output["entropy"] = nested([torch.full_like(log_probs[row], 1.5) for row in rows])
    return ppo_loss(config, model_output, batch)


@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_loss_through_verls_own_function(outputs, config, tokenizer, mode):
    """Item-level ratios, verl's KL and entropy; two micro-batches on two ranks add up to the whole mini-batch."""
    scale = {"actor": {"loss_agg_mode": mode, "loss_scale_factor": 16}}
    actor = omega_conf_to_dataclass(OmegaConf.merge(config.actor_rollout_ref, scale).actor)
    advantages = advantages_of(outputs, config)
    generator = torch.Generator().manual_seed(0)
    sizes = [(len(output["prompts"]), len(output["responses"])) for output in outputs]
    log_probs = [(-0.5 + 0.2 * torch.randn(p + r, generator=generator)).requires_grad_() for p, r in sizes]

    # The model's output at a token is about the next one, so the response's log-probs begin one token earlier.
    responses = torch.nn.utils.rnn.pad_sequence(
        [row[p - 1 : -1] for row, (p, _) in zip(log_probs, sizes, strict=True)], batch_first=True
    )
    mask = torch.nn.utils.rnn.pad_sequence([output["response_mask"] for output in outputs], batch_first=True).float()
    item_advantages, item_ids = expected_advantages(outputs, tokenizer)
    surrogate, _ = flexrec.policy_loss(
        responses, torch.full_like(responses, -0.5), item_advantages, mask, item_ids=item_ids, loss_agg="sum"
    )
    to_ref = -0.7 - responses
    kl = (to_ref.exp() - to_ref - 1).clamp(-10, 10)
    others = ((0.01 * kl - 0.005 * 1.5) * mask).sum()
    divisor = {"token-mean": mask.sum(), "token-sum": 1.0, "seq-mean-token-sum": 6.0, "seq-mean-token-sum-norm": 96.0}
    expected = (surrogate + others) / divisor[mode]
    gradients = torch.autograd.grad(expected, log_probs)

    whole, metrics = loss_of(actor, outputs, advantages, log_probs, range(6))
    torch.testing.assert_close(whole, expected)
    for found, wanted in zip(torch.autograd.grad(whole, log_probs), gradients, strict=True):
        torch.testing.assert_close(found, wanted)
    assert {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_loss", "kl_loss"} <= set(metrics)
    parts = [loss_of(actor, outputs, advantages, log_probs, rows, dp_size=2)[0] for rows in ([0, 3, 5], [1, 2, 4])]
    torch.testing.assert_close(sum(parts) / 2, expected)


def test_losses_that_weigh_items_by_length_are_refused(outputs, config):
    changed = OmegaConf.merge(config.actor_rollout_ref, {"actor": {"loss_agg_mode": "seq-mean-token-mean"}})
    advantages = advantages_of(outputs, config)
    log_probs = [torch.full((len(o["prompts"]) + len(o["responses"]),), -0.5) for o in outputs]
    with pytest.raises(ValueError, match="seq-mean-token-mean"):
        loss_of(omega_conf_to_dataclass(changed.actor), outputs, advantages, log_probs, range(6))


def test_compute_score_through_the_reward_manager(config, tokenizer):
    """What ``reward.custom_reward_function`` loads, called as verl calls it."""
    reward = {"custom_reward_function": {"path": "pkg://flexrec.integrations.verl", "name": "compute_score"}}
    reward["custom_reward_function"]["reward_kwargs"] = {"metric": "ndcg@2"}
    settings = OmegaConf.create({"reward": reward})
    ids = torch.tensor([[*tokenizer.encode("[1] > [3] > [2]"), tokenizer.eos_token_id]])
    batch = {"responses": ids, "attention_mask": torch.ones_like(ids)}
    truth = {"ground_truth": json.dumps({"gains": GAINS[0]})}
    rows = {"data_source": ["flexrec/interest"], "reward_model": [truth], "extra_info": [{}]}
    data = DataProto(TensorDict(batch, batch_size=1), {k: np.array(v, dtype=object) for k, v in rows.items()})

    async def run():
        manager = NaiveRewardManager(settings, tokenizer, get_custom_reward_fn(settings))
        return await manager.run_single(data)

    result = asyncio.run(run())
    expected = compute_score("flexrec/interest", "[1] > [3] > [2]", {"gains": GAINS[0]}, metric="ndcg@2")
    assert result == {"reward_score": expected["score"], "reward_extra_info": expected}
    assert expected["score"] == pytest.approx(1.0)


def test_every_key_of_the_example_exists_in_verl(config):
    """A key that verl does not know would be read by nobody; ``algorithm.flexrec`` is ours."""
    defaults = compose("ppo_trainer", Path(verl.__file__).parent / "trainer" / "config")
    ours = OmegaConf.load(EXAMPLE / "qwen2_5_3b.yaml")
    keys = [key for key in leaves(ours) if key.partition(".")[0] not in ("hydra", "defaults")]
    assert len(keys) > 30
    unknown = [key for key in keys if not has_key(defaults, key)]
    assert unknown == [f"algorithm.flexrec.{name}" for name in ("baseline", "scale", "uncertainty")]
    assert [key for key in keys if OmegaConf.select(config, key) != OmegaConf.select(ours, key)] == []


def leaves(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, DictConfig):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def has_key(config, key):
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return isinstance(node, DictConfig) and name in list(node.keys())  # also if it is "???"


def test_the_example_is_the_papers_setting_and_passes_verls_checks(config):
    assert need_reference_policy(config)
    assert not need_critic(config)
    validate_config(config, use_reference_policy=True, use_critic=False)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert (actor.kl_loss_coef, actor.entropy_coeff, actor.policy_loss.loss_mode) == (0.01, 0.005, "flexrec")
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen2.5-3B-Instruct"
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (1, 4)
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    assert rollout.n > 1
    assert rollout.agent.default_agent_loop == "flexrec"


def test_launch_script_gives_verl_a_configuration(tmp_path):
    """run.sh as far as verl's own command line resolves it, with lists that are there already."""
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.parquet").touch()
    environment = {**os.environ, "PYTHON": sys.executable, "LISTS": str(lists)}
    command = [EXAMPLE / "run.sh", "trainer.total_epochs=7", "--cfg", "job", "--resolve"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    config = OmegaConf.create(ran.stdout)
    assert config.data.train_files == str(lists / "train.parquet")
    assert config.trainer.total_epochs == 7
    assert config.actor_rollout_ref.rollout.agent.agent_loop_config_path == str(EXAMPLE / "agent_loop.yaml")
    assert config.algorithm.flexrec.scale == "batch"


def test_prepared_lists_are_read_by_verls_data_set(tmp_path, config, tokenizer, monkeypatch):
    spec = importlib.util.spec_from_file_location("prepare", EXAMPLE / "prepare.py")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    small = simulate(num_users=60, num_items=120, max_train_lists=20)
    monkeypatch.setattr(prepare, "load_dataset", lambda *_: small)
    options = "--dataset simulated --need interest --train-lists 4 --test-lists 3 --format verl --output"
    written = prepare.prepare(prepare.parse([*options.split(), str(tmp_path)]))
    changes = {"cache_dir": str(tmp_path / "cache"), "filter_overlong_prompts": False}
    settings = OmegaConf.create({**config.data, **changes, "tool_config_path": None, "function_tool_path": None})
    for split, size in (("train", 4), ("test", 3)):
        rows = RLHFDataset(str(written[split]), tokenizer, settings)
        assert len(rows) == size
        row = rows[1]
        assert row["index"] == 1
        labels = " > ".join(f"[{i}]" for i in range(30, 0, -1))
        assert labels.count("[") == 30
        score = compute_score(row["data_source"], labels, row["reward_model"]["ground_truth"])
        assert score["valid"] == 1.0
        assert 0 < score["score"] < 1
        assert "[30] " in row["raw_prompt"][0]["content"]
