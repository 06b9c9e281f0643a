"""FlexRec in a plain PyTorch loop, with nothing but its functions: model, rollout, swap rewards, loss, step.

    python examples/plain_pytorch.py                        a minute on two CPU cores: a small model made from the data
    python examples/plain_pytorch.py --model MODEL --prompts 4 --learning-rate 1e-6       a causal language model's name

It ranks for users of a simulated video platform. Nine tenths of their feedback are missing; a critic guesses them, and
says how sure it is. Prints NDCG@5 of the sampled rankings at every step (by the critic), and before and after training
that of greedy rankings for users never trained on (by what these users truly like).
"""

import argparse

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexrec import item_advantages, policy_loss, ranking_metric, swap_rewards_with_variance, uncertainty_weights
from flexrec.data import simulate
from flexrec.decoding import sample_rankings
from flexrec.ops.rank_order import rank_order
from flexrec.policy.batch import make_batch
from flexrec.policy.packing import sharing
from flexrec.policy.scores import all_actions, ranking_scores, ranking_states
from flexrec.policy.small_model import build_model, build_tokenizer, item_vectors, starting_rows
from flexrec.task import Critic, PromptBuilder, RankingTask, TrainingExamples, get_need

METRIC, TEMPERATURE = "ndcg@5", 0.5

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="name or folder; default: a small model made from the data")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--prompts", type=int, default=64, help="in a step")
parser.add_argument("--generations", type=int, default=4, help="rankings sampled of each prompt")
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--all-actions", action="store_true", help="train by the swap value of every remaining candidate")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
torch.manual_seed(options.seed)

# The data: lists of candidates with a user's history before them; a need says what a good ranking is.
data = simulate(num_users=500, num_items=200, num_topics=8, num_candidates=12, num_test_users=100, seed=options.seed)
need = get_need("interest")
critic = Critic.fit(data.log, data.catalogue, seed=options.seed)

# The model, and how an answer names a candidate: a token for each item, or labels such as "[3]".
if options.model:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    builder = PromptBuilder(tokenizer, encoding="index", show_rising=False)
else:
    tokenizer = build_tokenizer(data.catalogue, need.wordings)
    vectors = item_vectors(data.log, len(data.catalogue), 64, seed=options.seed)
    model = build_model(tokenizer, rows=starting_rows(data.catalogue, vectors), hidden_size=64, num_layers=2)
    builder = PromptBuilder(tokenizer, encoding="item_token", show_titles=False, show_rising=False)
device = "cuda" if torch.cuda.is_available() else "cpu"
model.to(device)
answer = {"separator": builder.separator, "end": builder.end}
optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
task = RankingTask(data.catalogue, [need], builder, critic)
examples = TrainingExamples(task, data.train, seed=options.seed)


def in_rank_order(rows, order, generations):
    """(N, K) values by candidate of P lists, in the order of each of their N rankings."""
    values = torch.tensor(np.stack(rows), dtype=torch.float32, device=device)
    return values.repeat_interleave(generations, dim=0).gather(1, order)


def greedy_ndcg():
    """NDCG@5 of the greedy rankings for the test users."""
    tests = [task.test_example(lst, need) for lst in data.test]
    prompts, candidates = [e.prompt for e in tests], [e.candidates for e in tests]
    rankings = torch.tensor(sample_rankings(model, prompts, candidates, greedy=True, **answer).rankings)
    gains = in_rank_order([e.gains for e in tests], rankings.long().to(device), 1)
    return ranking_metric(gains, METRIC).mean().item()


print(f"test users, before: {METRIC} {greedy_ndcg():.3f}")
order_of_examples = np.random.default_rng(options.seed).permutation(len(examples))
for step in range(options.steps):
    chosen = np.take(order_of_examples, range(step * options.prompts, (step + 1) * options.prompts), mode="wrap")
    batch_examples = [examples[int(i)] for i in chosen]
    prompts, candidates = [e.prompt for e in batch_examples], [e.candidates for e in batch_examples]
    generations = options.generations

    # Rollout: every sampled answer is a permutation of its list.
    rollout = sample_rankings(
        model, prompts, candidates, num_generations=generations, num_ranked=5, temperature=TEMPERATURE, **answer
    )
    # The model's input: the rankings of a prompt behind one copy of it, where the model can attend so.
    share = sharing(model, prompts, candidates, separator=builder.separator, num_ranked=5, num_generations=generations)
    sizes = {"num_generations": generations, "rankings_per_row": share}
    batch = make_batch(prompts, candidates, rollout.rankings, **sizes, device=device, **answer)
    # What each placed item is worth, and how sure that is.
    order = rank_order(batch.rankings, batch.lengths, len(candidates[0]))  # (N, K)
    gains = in_rank_order([e.gains for e in batch_examples], order, generations)
    doubt = in_rank_order([e.variance for e in batch_examples], order, generations)
    rewards, variance = swap_rewards_with_variance(gains, doubt, METRIC, num_ranked=5)  # (N, K)
    rewards, variance = rewards[:, :5], variance[:, :5]
    weights = uncertainty_weights(variance, generations)  # (N, 1): unsure rankings count less

    # Log-probs among the remaining candidates, and the loss.
    states = ranking_states(model, batch)
    if options.all_actions:
        result = all_actions(states, batch, gains, METRIC, temperature=TEMPERATURE, num_ranked=5)
        loss = -(weights * result.objective / rewards.square().mean().sqrt() + 0.005 * result.entropy).mean()
    else:
        scores = ranking_scores(states, batch, temperature=TEMPERATURE)
        advantages = item_advantages(rewards, generations, weights=weights)
        ranked = torch.ones_like(rewards, dtype=torch.bool)  # (N, 5)
        old = scores.logprobs.detach()  # the same rankings could be used for several updates
        loss, _ = policy_loss(scores.logprobs, old, advantages, ranked, entropy=scores.entropy, entropy_coef=0.005)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    print(f"step {step + 1}: {METRIC} {ranking_metric(gains, METRIC, num_ranked=5).mean().item():.3f}", flush=True)
print(f"test users, after: {METRIC} {greedy_ndcg():.3f}")
