"""How far a trainer's probabilities are from a truncating sampler's, with and without the supports replayed.

    python bench/replay_ratios.py --model smollm2-135m

Texts are sampled by transformers' ``generate`` at several settings, and scored by the same model, once over the whole
vocabulary and once over what each token was sampled from. Prints a table of docs/replay.md.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexrec.integrations.sampling_masks import SupportRecorder, joined
from flexrec.ops.vocabulary_logprobs import replay_logprobs
from flexrec.policy.gguf import converted, is_gguf
from flexrec.policy.lm_head import last_hidden, output_layer

PROMPTS = (
    "The three films that I would watch again are",
    "A good way to spend a rainy afternoon is",
    "Write a short story about a lighthouse keeper.",
    "My favourite recipe begins with",
    "The history of the city goes back to",
    "To learn a new language you should",
    "Dear customer, thank you for your order of",
    "The most surprising result of the experiment was",
)
SETTINGS: dict[str, dict[str, float | int]] = {
    "top_p 0.8": {"top_p": 0.8, "top_k": 0},
    "top_p 0.95": {"top_p": 0.95, "top_k": 0},
    "top_k 20": {"top_k": 20},
    "top_p 0.9, top_k 50": {"top_p": 0.9, "top_k": 50},
    "min_p 0.1": {"min_p": 0.1, "top_k": 0},
    "nothing": {"top_k": 0},
}


@torch.no_grad()
def ratios(
    model: torch.nn.Module, prompts: dict[str, torch.Tensor], length: int, setting: dict[str, float | int]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(M,) ratios over the whole vocabulary and over the supports, and the mean size of a support."""
    recorder, end = SupportRecorder(), model.config.eos_token_id
    with recorder.of(model):
        out = model.generate(**prompts, do_sample=True, max_new_tokens=length, **setting)
    start = prompts["input_ids"].shape[1]
    completions = [row[: row.index(end) + 1] if end in row else row for row in out[:, start:].tolist()]
    supports = recorder.supports(completions)
    mask = torch.zeros(out.shape, dtype=torch.bool)
    for row, tokens in enumerate(completions):
        mask[row, start : start + len(tokens)] = True
    attention = torch.cat([prompts["attention_mask"], mask[:, start:].long()], dim=1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    hidden = last_hidden(model, input_ids=out, attention_mask=attention, position_ids=positions, use_cache=False)
    weight, bias = output_layer(model)
    token_ids, offsets = joined(supports)
    states, targets = hidden[:, :-1][mask[:, 1:]], out[mask]
    kept = replay_logprobs(states, weight, token_ids, offsets, targets, bias=bias).logprobs
    whole = replay_logprobs(states, weight, token_ids[:0], torch.zeros_like(offsets), targets, bias=bias).logprobs
    said = torch.cat([torch.from_numpy(support.logprobs) for support in supports])
    sizes = torch.where(offsets.diff() == 0, weight.shape[0], offsets.diff())
    return (whole - said).exp(), (kept - said).exp(), float(sizes.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2-135m", help="a folder of transformers, a GGUF file, or smollm2-135m"
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--copies", type=int, default=2, help="completions of each prompt")
    options = parser.parse_args()
    folder = converted(options.model, print) if is_gguf(options.model) else Path(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = tokenizer(
        [prompt for prompt in PROMPTS for _ in range(options.copies)], return_tensors="pt", padding=True
    )
    prompts.pop("token_type_ids", None)
    print(f"{options.model}, {platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print("| sampling | tokens | kept on average | whole vocabulary: mean, outside [0.9, 1.1] | replayed |")
    print("|---|---|---|---|---|")
    for name, setting in SETTINGS.items():
        torch.manual_seed(0)
        whole, kept, size = ratios(model, dict(prompts), options.tokens, setting)
        shown = [f"{x.mean():.3f}, {((x < 0.9) | (x > 1.1)).float().mean():.1%}" for x in (whole, kept)]
        print(f"| {name} | {len(whole)} | {size:,.0f} | {shown[0]} | {shown[1]} |", flush=True)


if __name__ == "__main__":
    main()
