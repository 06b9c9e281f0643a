"""FlexRec in TRL's GRPO: a reward function for the plain GRPOTrainer, or the trainer with a reward for every item.

    python examples/trl_grpo.py                     FlexRecGRPOTrainer; a minute on two CPU cores, nothing is downloaded
    python examples/trl_grpo.py --trainer plain     trl.GRPOTrainer with RankingReward, which also has to learn the form

A small model made from the data ranks for users of a simulated video platform; a critic fills in missing feedback and
says how sure it is. Prints the metric of the sampled rankings during training, and before and after training that of
greedy rankings for users never trained on (by what these users truly like).
"""

import argparse
import tempfile

import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from flexrec import ranking_metric
from flexrec.data import simulate
from flexrec.decoding import sample_rankings
from flexrec.integrations.trl import FlexRecGRPOConfig, FlexRecGRPOTrainer, RankingReward
from flexrec.policy.small_model import build_model, build_tokenizer, item_vectors, starting_rows
from flexrec.task import Critic, PromptBuilder, RankingTask, TrainingExamples, get_need
from flexrec.trainer import SupervisedTrainer

METRIC, SHOWN = "ndcg@5", 5

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--trainer", choices=["flexrec", "plain"], default="flexrec")
parser.add_argument("--credit", default="swap", help="of FlexRecGRPOTrainer: how an item is rewarded")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
folder = tempfile.mkdtemp()

# The data, a tokenizer with a token for each item, and a small model that has seen the users' histories.
sizes = {"num_users": 400, "num_items": 50, "num_topics": 6, "num_candidates": 8, "num_test_users": 100}
data = simulate(**sizes, watches_per_user=30, history_length=8, seed=options.seed)
need = get_need("interest")
tokenizer = build_tokenizer(data.catalogue, need.wordings, vocab_size=300)
vectors = item_vectors(data.log, len(data.catalogue), 64, seed=options.seed)
model = build_model(tokenizer, rows=starting_rows(data.catalogue, vectors), hidden_size=64, num_layers=2)
builder = PromptBuilder(tokenizer, encoding="item_token", show_titles=False, show_rising=False)
task = RankingTask(data.catalogue, [need], builder, Critic.fit(data.log, data.catalogue, seed=options.seed))
examples = TrainingExamples(task, data.train, seed=options.seed)
common = {"output_dir": folder, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3}
warm_up = TrainingArguments(max_steps=60, per_device_train_batch_size=64, remove_unused_columns=False, **common)
SupervisedTrainer(model, warm_up, examples, stage="format").train()

# What TRL reads: a prompt, the candidates' names, what each is worth and how unsure that is.
rows = Dataset.from_list(
    [
        {
            "prompt": tokenizer.decode(example.prompt),
            "candidates": [tokenizer.decode(name) for name in example.candidates],
            "gains": example.gains.tolist(),
            "gain_variance": example.variance.tolist(),
        }
        for example in (examples[i] for i in range(len(examples)))
    ]
)


def greedy_metric():
    """The metric of the greedy rankings for the test users."""
    tests = [task.test_example(lst, need) for lst in data.test]
    prompts, candidates = [e.prompt for e in tests], [e.candidates for e in tests]
    rankings = sample_rankings(model, prompts, candidates, greedy=True).rankings
    gains = np.take_along_axis(np.stack([e.gains for e in tests]), rankings, axis=1)
    return ranking_metric(torch.from_numpy(gains), METRIC).mean().item()


class Report(TrainerCallback):
    """A line per ten steps."""

    def on_log(self, args, state, control, logs, **kwargs):
        if "reward" in logs:
            shown = ("reward", f"{METRIC}/valid", f"{METRIC}/missing", f"{METRIC}/gain@1", "entropy")
            print(f"step {state.global_step}: " + "  ".join(f"{name} {logs[name]:.3f}" for name in shown), flush=True)


grpo = {
    "max_steps": options.steps,
    "per_device_train_batch_size": 128,  # completions: 32 prompts
    "num_generations": 4,
    "max_completion_length": SHOWN + 1,
    "temperature": 0.5,
    "logging_steps": 10,
    "lr_scheduler_type": "constant",
    "bf16": torch.cuda.is_available(),
    "seed": options.seed,
    **common,
}
more = {"train_dataset": rows, "processing_class": tokenizer, "callbacks": [Report()]}
if options.trainer == "flexrec":
    config = FlexRecGRPOConfig(metric=METRIC, credit=options.credit, separator="", **grpo)
    trainer = FlexRecGRPOTrainer(model, args=config, **more)
else:
    # TRL drops special tokens, such as the items', from the text that reward functions see.
    reward = RankingReward(METRIC, num_ranked=SHOWN, separator="", tokenizer=tokenizer)
    trainer = GRPOTrainer(model, reward, args=GRPOConfig(**grpo), **more)
trainer.remove_callback(PrinterCallback)

print(f"test users, before: {METRIC} {greedy_metric():.3f}")
trainer.train()
print(f"test users, after: {METRIC} {greedy_metric():.3f}")
