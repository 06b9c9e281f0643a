"""From logs alone: what another policy would be worth, and a policy that learns from them.

    python examples/off_policy.py         half a minute on one CPU core; nothing is downloaded

A small model ranks for users of a simulated video platform and is logged: five of eight candidates, each with its
probability given those before it, and what the user made of it. A second model is trained on the first half of the log
with clipped importance weights, and no simulator. What it is worth is then estimated on the second half in three ways
and compared with the truth, which is known here since users are simulated: they are asked.
"""

import argparse
import tempfile
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch
from transformers import TrainingArguments

from flexrec.data import simulate
from flexrec.decoding import sample_rankings
from flexrec.evaluation import off_policy_value, score_rankings
from flexrec.policy.small_model import build_model, build_tokenizer, item_vectors, starting_rows
from flexrec.task import Critic, LoggedRanking, PromptBuilder, RankingTask, get_need
from flexrec.task.needs import evaluation_gains
from flexrec.trainer import FlexRecConfig, FlexRecTrainer, SupervisedTrainer

SHOWN, CLIP = 5, 5.0
COUNTS = 1 / np.log2(np.arange(2, SHOWN + 2))  # what a rank counts: DCG's discounts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
folder, seed = tempfile.mkdtemp(), options.seed

# The data, a critic of what users like, and a small model that has seen their histories: the policy that is logged.
sizes = {"num_users": 1000, "num_items": 50, "num_topics": 6, "num_candidates": 8, "num_test_users": 50}
data = simulate(**sizes, watches_per_user=30, history_length=8, seed=seed)
need = get_need("interest")
tokenizer = build_tokenizer(data.catalogue, need.wordings, vocab_size=300)
vectors = item_vectors(data.log, len(data.catalogue), 64, seed=seed)
logging = build_model(tokenizer, rows=starting_rows(data.catalogue, vectors), hidden_size=64, num_layers=2)
builder = PromptBuilder(tokenizer, encoding="item_token", show_titles=False, show_rising=False)
task = RankingTask(data.catalogue, [need], builder, Critic.fit(data.log, data.catalogue, seed=seed))
ends = {"separator": builder.separator, "end": builder.end}
feedback = task.training_feedback(data.train)  # what the critic expects where nothing was said
examples = [
    task.training_example(lst, need, need.wordings[0], said) for lst, said in zip(data.train, feedback, strict=True)
]
truth = np.stack([evaluation_gains(need, lst, data.catalogue) for lst in data.train])  # (N, 8)
users = np.array([lst.user for lst in data.train])
common = {"output_dir": folder, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3}
warm_up = TrainingArguments(max_steps=40, per_device_train_batch_size=64, remove_unused_columns=False, **common)
SupervisedTrainer(logging, warm_up, examples, stage="format", **ends).train()


def shown_by(model, some):
    """One sampled ranking of each list."""
    prompts, candidates = [e.prompt for e in some], [e.candidates for e in some]
    generator = torch.Generator().manual_seed(seed)
    return sample_rankings(model.eval(), prompts, candidates, num_ranked=SHOWN, generator=generator, **ends).rankings


def earned(rankings, gains):
    """(N, 5) what the users made of each rank, times what it counts."""
    return np.take_along_axis(gains, rankings, axis=1) * COUNTS


# The log: what was shown, how probable it was, what came of it. Nobody looks at the other candidates again.
rankings = shown_by(logging, examples)
said = score_rankings(logging, examples, rankings, **ends)
rewards = earned(rankings, truth)
half = len(examples) // 2
logged = []
for n in range(half):
    gains = examples[n].gains.copy()
    gains[rankings[n]] = truth[n, rankings[n]]
    logged.append(replace(examples[n], gains=gains, logged=LoggedRanking(rankings[n], said.logprobs[n])))

# A policy that learns from the first half.
learner = deepcopy(logging).train()
args = FlexRecConfig(
    max_steps=options.steps,
    credit="swap",
    metric=f"dcg@{SHOWN}",
    logged_clip=CLIP,
    per_device_train_batch_size=64,
    **common,
)
FlexRecTrainer(learner, args, logged, **ends).train()
learner.eval()

# What it is worth to the users of the second half.
rest = slice(half, None)
scores = score_rankings(learner, examples[rest], rankings[rest], **ends)
guess = {"predicted": scores.predicted * COUNTS, "expected": scores.expected * COUNTS}
print(f"logged: {rewards[rest].sum(1).mean():.3f}, {len(examples) - half} lists")
for name, more in {"ips": {}, "snips": {}, "dr": guess}.items():
    found = off_policy_value(
        scores.logprobs, said.logprobs[rest], rewards[rest], estimator=name, users=users[rest], seed=seed, **more
    )
    print(f"{name}: {found.value:.3f} [{found.low:.3f}, {found.high:.3f}], as good as {found.effective_size:.0f} lists")
print(f"truth: {earned(shown_by(learner, examples[rest]), truth[rest]).sum(1).mean():.3f}")
