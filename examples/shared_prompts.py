"""The completions of a prompt behind one copy of it, in a loop of your own: any text, not rankings alone.

    python examples/shared_prompts.py                       half a minute on a CPU core: a small model of random weights
    python examples/shared_prompts.py --model MODEL --prompt-length 500 --completions 16

Computes the loss of a policy gradient and its gradients twice, with a row for each completion and with one for all of a
prompt's, and prints how far they are apart and what each takes. Without a mask, attention between completions is never
computed, and each token of a prompt is computed once.
"""

import argparse
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from flexrec.policy.packing import attention_inputs, pack_rankings

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="name or folder; default: 2 layers of width 128")
parser.add_argument("--prompts", type=int, default=4)
parser.add_argument("--prompt-length", type=int, default=400, help="in tokens, which are random")
parser.add_argument("--completions", type=int, default=8, help="of each prompt")
parser.add_argument("--length", type=int, default=30, help="tokens of the longest completion")
parser.add_argument("--repeats", type=int, default=3, help="the least time counts")
options = parser.parse_args()
torch.manual_seed(0)

if options.model:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
else:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=5000, max_position_embeddings=8192, **sizes))
device = "cuda" if torch.cuda.is_available() else "cpu"
model.to(device).train()

draw = np.random.default_rng(0)
tokens = model.config.get_text_config().vocab_size
prompts = [draw.integers(tokens, size=options.prompt_length) for _ in range(options.prompts)]
count = options.prompts * options.completions  # those of a prompt stand next to one another
completions = [draw.integers(tokens, size=draw.integers(1, options.length + 1)) for _ in range(count)]
advantages = draw.normal(size=count)


def loss_of(per_row):
    """Minus the mean of advantage times log-prob, over all completions."""
    rows = pack_rankings(prompts, completions, num_generations=options.completions, per_row=per_row, device=device)
    logits = model(input_ids=rows.input_ids, **attention_inputs(model, rows)).logits  # (B, L, V)
    total = 0.0
    for n, (completion, advantage) in enumerate(zip(completions, advantages, strict=True)):
        columns = rows.predicting_columns(np.full(len(completion), n), np.arange(len(completion)))
        chosen = torch.as_tensor(completion, device=device)[:, None]
        logprobs = logits[rows.row[n], columns].float().log_softmax(-1).gather(1, chosen)
        total = total - advantage * logprobs.sum()
    return total / count


def measured(per_row):
    """Loss, gradients and the least seconds."""
    least = float("inf")
    for _ in range(options.repeats):
        model.zero_grad()
        begun = time.perf_counter()
        loss = loss_of(per_row)
        loss.backward()
        least = min(least, time.perf_counter() - begun)
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None], least


apart, gradients, slow = measured(1)
shared, same, fast = measured(options.completions)
largest = max(gradient.abs().max().item() for gradient in gradients)
off = max((a - b).abs().max().item() for a, b in zip(gradients, same, strict=True))
print(f"a row each: loss {apart:.6f}, {slow:.3f} s")
print(f"shared:     loss {shared:.6f}, {fast:.3f} s, {slow / fast:.1f}x as fast")
print(f"gradients differ by at most {off / largest:.1e} of the largest")
