"""TRL's GRPO with top-p, scored by the whole vocabulary and by what was sampled from: no rankings, no vLLM.

    python examples/replay_grpo.py                  half a minute on one CPU core; nothing is downloaded
    python examples/replay_grpo.py --top-p 0.95 --top-k 20 --steps 60

A small model that has read some sums learns to add. It is trained twice from the same start, by ReplayGRPOTrainer with
``replay=False``, which is TRL's own scoring, and with ``replay=True``. Printed are the shares of tokens whose
probability in the trainer is not within 10 % of the sampler's, and the shares of sums that are right.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig

from flexrec.integrations.trl_replay import ReplayGRPOTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--top-p", type=float, default=0.8)
parser.add_argument("--top-k", type=int, default=0)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
folder = tempfile.mkdtemp()
torch.manual_seed(options.seed)

# A token for every character, and a small model.
vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *"0123456789+= "])}
backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
backend.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", padding_side="left")
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **special))

# It has read sums, half of them wrong by one, so that it is unsure.
optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(120):
    terms = torch.randint(2, 7, (64, 2))
    sums = terms.sum(1) + torch.randint(0, 2, (64,))
    texts = [f"{a}+{b}={c:02d}" for (a, b), c in zip(terms.tolist(), sums.tolist(), strict=True)]
    ids = torch.tensor([[*tokenizer.encode(text), 2] for text in texts])
    labels = ids.clone()
    labels[:, :4] = -100  # the question
    model(ids, labels=labels).loss.backward()
    optimiser.step()
    optimiser.zero_grad()
model.save_pretrained(folder)


def is_right(prompts, completions, **columns):
    """1 for the sum of what was asked, written with two digits."""
    wanted = [f"{int(prompt[0]) + int(prompt[2]):02d}" for prompt in prompts]
    return [float(text == sum_) for text, sum_ in zip(completions, wanted, strict=True)]


questions = [{"prompt": f"{a}+{b}="} for a in range(2, 7) for b in range(2, 7)]
for replay in (False, True):
    trainer = ReplayGRPOTrainer(
        LlamaForCausalLM.from_pretrained(folder),
        reward_funcs=is_right,
        args=GRPOConfig(
            output_dir=folder,
            top_p=options.top_p,
            top_k=options.top_k,
            max_steps=options.steps,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=3,
            learning_rate=1e-3,
            logging_steps=1,
            seed=options.seed,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(questions),
        processing_class=tokenizer,
        replay=replay,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    outside = sum(entry["sampling/ratio_outside"] for entry in log) / len(log)
    ends = [sum(entry["reward"] for entry in part) / len(part) for part in (log[:5], log[-5:])]
    name = "the support that was sampled from" if replay else "the whole vocabulary"
    print(f"scored by {name}: ratios outside [0.9, 1.1] {outside:.1%}, sums right {ends[0]:.2f} -> {ends[1]:.2f}")
