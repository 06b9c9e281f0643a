"""What the tests of TRL share: a tiny model that trains on three short lists.

Run as a script, ``tiny_trl.py FOLDER [ENGINE CREDIT ..]``, this file is one of two processes that train together.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flexrec.integrations.trl import FlexRecGRPOConfig, FlexRecGRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from worker_end import end

CHARACTERS = "[]0123456789 >abcdefghijklmnopqrstuvwxyz<:/"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}> {% endif %}"
)
GAINS = [[1.0, 0.0, 0.5], [0.0, 0.25, 0.0, 1.0], [0.0, 0.0, 0.5, 0.25, 1.0]]  # three lists of different lengths


def make_tokenizer(items=0):
    """A token for every character, and one for each of so many items."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.chat_template = TEMPLATE
    fast.add_tokens([f"<item:{i}>" for i in range(items)], special_tokens=True)
    return fast


def make_model(tokenizer, seed=0, tied=False):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # far from uniform, so that a wrong distribution shows
        model.get_output_embeddings().weight.mul_(5.0)
    return model


def make_rows(size=12, **columns):
    """``size`` rows over three lists; a column given as three values is repeated along with them."""
    rows = {"prompt": [f"rank {name}" for name in ("a", "bc", "def")], "gains": GAINS, **columns}
    rows = {name: values for name, values in rows.items() if values is not None}
    return Dataset.from_dict({name: [values[i % 3] for i in range(size)] for name, values in rows.items()})


def make_args(folder, kind=FlexRecGRPOConfig, **more):
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 40,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **more,
    }
    return kind(output_dir=str(folder), **options)


def make_trainer(folder, rows=None, *, tokenizer=None, model=None, kind=FlexRecGRPOTrainer, extra=None, **options):
    tokenizer = tokenizer or make_tokenizer()
    return kind(
        make_model(tokenizer) if model is None else model,
        args=make_args(folder, **options),
        train_dataset=make_rows() if rows is None else rows,
        processing_class=tokenizer,
        **(extra or {}),
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def generate(trainer, rows=None):
    """The batch that TRL trains on: four completions for every row."""
    rows = trainer.train_dataset if rows is None else rows
    trainer.model.train()
    return trainer._generate_and_score_completions([dict(row) for row in rows for _ in range(4)])


def train_and_compare(trainer):
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(np.isfinite(value) for value in logged(trainer, "loss"))
    assert any(not torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))


def seam(trainer, batch, which=FlexRecGRPOTrainer):
    return which._get_per_token_logps_and_entropies(
        trainer,
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        batch["completion_ids"].shape[1],
        compute_entropy=True,
    )


def as_process(folder):
    """One of the processes that train together: saves what it generated and what it learnt."""
    seen = []

    class Recorder(FlexRecGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            completions = [
                ids[mask.bool()].tolist()
                for ids, mask in zip(output["completion_ids"], output["completion_mask"], strict=True)
            ]
            advantages = [a[: len(ids)].tolist() for a, ids in zip(output["advantages"], completions, strict=True)]
            seen.append(([row["prompt"] for row in inputs], completions, advantages, int(output["num_items_in_batch"])))
            return output

    rows, options = process_options()
    trainer = make_trainer(folder, rows, kind=Recorder, per_device_train_batch_size=6, ddp_backend="gloo", **options)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    learnt = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    torch.save((seen, learnt, trainer.state.log_history), f"{folder}/{trainer.accelerator.process_index}.pt")


def process_options():
    variance = [[0.1 * i for i in range(len(gains))] for gains in GAINS]
    options = {"baseline": "rank", "scale": "group", "uncertainty": "item", "shuffle_dataset": False, "max_steps": 2}
    return make_rows(gain_variance=variance), options


def as_shard(folder, engine, *credits):
    """One of two processes with half of the parameters ("fsdp2") or all ("ddp"): saves what each credit taught."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    from flexrec.policy.distributed import whole_state_dict

    class Recorder(FlexRecGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            seen.append(output["completion_ids"].tolist())
            return output

    tokenizer = make_tokenizer(items=16)
    names = [[f"<item:{i + 4 * p}>" for i in range(len(gains))] for p, gains in enumerate(GAINS)]
    found = {}
    for credit in credits:
        seen = []
        options = {"credit": credit, "beta": 0.1, "num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
        options |= {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 1e9, "ddp_backend": "gloo"}
        args = make_args(folder, separator="", per_device_train_batch_size=6, **options)
        if engine == "fsdp2":
            # accelerate leaves FSDP to GPUs, and would fall back to DDP here: FSDP2 itself has nothing against CPUs.
            assert args.device.type == "cpu"
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        rows = make_rows(candidates=names)
        trainer = Recorder(f"{folder}/model", args=args, train_dataset=rows, processing_class=tokenizer)
        assert trainer.accelerator.num_processes == 2
        assert trainer.accelerator.is_fsdp2 == (engine == "fsdp2")
        trainer.train()
        whole = trainer.model_wrapped
        held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in whole.parameters())
        log = trainer.state.log_history
        found[credit] = {"seen": seen, "log": log, "state": whole_state_dict(whole), "held": held}
    torch.save(found, f"{folder}/{engine}-{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    (as_process if len(sys.argv) == 2 else as_shard)(*sys.argv[1:])
    end()
