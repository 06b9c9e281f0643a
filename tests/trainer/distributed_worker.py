"""What tests/trainer/test_distributed.py has several processes do: ``distributed_worker.py TASK ENGINE FOLDER``.

A case is trained by one process or by several with the same examples in a step, and must come to the same. Rankings are
sampled from a seed for each example, so that they do not depend on who samples them.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed import all_gather_object
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from flexrec.decoding.sample import Rollout, sample_rankings
from flexrec.policy.distributed import num_processes, process_index, whole_state_dict
from flexrec.policy.lora import add_lora
from flexrec.task.examples import Example
from flexrec.trainer.base import pad_rows
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer
from flexrec.trainer.supervised import SupervisedTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from worker_end import end

PROMPTS = 8  # in a step
UNTIED = {"tied": False}
CASES = {
    "all_actions": {},
    "all_actions, untied": UNTIED | {"ddp_find_unused_parameters": False},
    "swap": {"credit": "swap", "ddp_find_unused_parameters": False},
    "swap, untied": UNTIED | {"credit": "swap"},
    "kept and accumulated": UNTIED
    | {"credit": "swap", "num_iterations": 2, "gradient_accumulation_steps": 2, "beta": 0.1},
    # Where gains are in doubt, recall reads them as probabilities: on one process they are, or not, for all.
    "doubt on one process": {"credit": "swap", "metric": "recall@2", "doubtful": [5]},
    "lora": UNTIED | {"lora": 2, "beta": 0.1},
    "listwise": {"stage": "listwise"},
    "format": UNTIED | {"stage": "format"},
    # Tokens that are sums, at the input and in the output.
    "described": {"described": True},
    "format, described": UNTIED | {"stage": "format", "described": True},
}


class Lists(Dataset):
    """Lists of several lengths, made anew each epoch; those of ``doubtful`` have gains in doubt. Where they are
    ``described``, candidates and some tokens of the history have another token added."""

    def __init__(self, size, single=False, doubtful=range(0, 16, 2), described=False):
        self.size, self.single, self.doubtful, self.epoch = size, single, doubtful, 0
        self.described = described

    def __len__(self):
        return self.size

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        rng = np.random.default_rng([self.epoch, index])
        length = 1 if self.single else 3 + index % 3
        prompt = [1, *rng.integers(2, 8, size=3 + index % 4).tolist()]
        candidates = [[int(token)] for token in 10 + rng.permutation(20)[:length]]
        if self.described:
            prompt[1:3] = [(token, 31 + index % 4) for token in prompt[1:3]]
            candidates = [[(token, 35 + token % 3)] for (token,) in candidates]
        return Example(
            prompt=prompt,
            candidates=candidates,
            gains=rng.permutation(length).astype(np.float32) / 5,
            variance=(rng.random(length) * (index in self.doubtful)).astype(np.float32),
            history_span=(1, 2 + index % 4),
            need="interest",
            user=index,
        )


class RepeatableTrainer(FlexRecTrainer):
    """Samples the rankings of an example from a seed of its own."""

    def _rollout(self, examples):
        step, rows = self.state.global_step, []
        with self.whole_model() as model:
            for example in examples:
                rollout = sample_rankings(
                    model,
                    [example.prompt],
                    [example.candidates],
                    num_generations=self.args.num_generations,
                    temperature=self.args.temperature,
                    generator=torch.Generator().manual_seed(1000 * step + example.user),
                )
                rows += list(rollout.rankings)
        return Rollout(pad_rows(rows, -1), None)


class Logs(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.steps.append(dict(logs))


class Die(TrainerCallback):
    """Kill this process as if by the system after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def make_model(seed=0, tied=True):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=41,  # not even among two
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


def options(folder, engine, **more):
    """Plain gradient descent, so that parameters show the scale of gradients, whose norm is logged."""
    found = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": PROMPTS // num_processes() // more.get("gradient_accumulation_steps", 1),
        "optim": "sgd",
        "learning_rate": 0.01 if more.get("optim") else 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
        **more,
    }
    if engine == "zero3":
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        found["deepspeed"] = {
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": "auto",
            **dict.fromkeys(sizes, "auto"),
        }
    return found


def make_trainer(
    folder,
    engine,
    tied=True,
    lora=None,
    stage=None,
    make=RepeatableTrainer,
    callbacks=(),
    doubtful=(),
    described=False,
    **more,
):
    model = make_model(tied=tied)
    if lora:
        model = add_lora(model, lora)
    logs = Logs()
    kwargs = {"callbacks": [logs, *callbacks]}
    if stage is None:
        args = FlexRecConfig(**{"uncertainty": "rollout", **options(folder, engine, num_generations=2, **more)})
        kwargs["reference"] = make_model(1, tied) if args.beta and not lora else None
    else:
        args = TrainingArguments(**options(folder, engine, **more))
        make = partial(SupervisedTrainer, stage=stage)
    if engine == "fsdp2":
        # accelerate leaves FSDP to GPUs, and would fall back to DDP here: FSDP2 itself has nothing against CPUs.
        assert args.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    # With one candidate there is only one order, which leaves the loss of the histories.
    lists = Lists(16, single=stage == "format", doubtful=doubtful or range(0, 16, 2), described=described)
    trainer = make(model, args, lists, **kwargs)
    assert trainer.accelerator.is_fsdp2 == (engine == "fsdp2")
    assert trainer.is_deepspeed_enabled == (engine == "zero3")
    return trainer, logs


def result(trainer, logs):
    """What several processes must have in common with one."""
    return {"steps": logs.steps, "state": whole_state_dict(trainer.model_wrapped)}


def held_by_process(model):
    """Numbers of parameters that this process keeps."""
    parameters = [getattr(p, "ds_tensor", p) for p in model.parameters()]
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters)


def train_case(name, engine, folder):
    trainer, logs = make_trainer(folder, engine, **CASES[name])
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    size = held_by_process(trainer.model)
    trainer.train()
    found = result(trainer, logs)
    moved = any(not torch.equal(value, start[name]) for name, value in found["state"].items())
    return found | {"moved": moved, "held": held_by_process(trainer.model_wrapped) / size}


def resume(engine, folder, state_dict):
    """Four steps with rankings at random, and the last two of them again from the checkpoint after two."""
    os.environ["FSDP_STATE_DICT_TYPE"] = state_dict
    found = []
    for checkpoint in (None, str(folder / "checkpoint-2")):
        trainer, logs = make_trainer(
            folder, engine, make=FlexRecTrainer, optim="adamw_torch", max_steps=4, save_strategy="steps", save_steps=2
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append(result(trainer, logs))
    return found


def drawn(trainer):
    """The rankings that each process samples of the same prompt."""
    parts = [None] * num_processes()
    all_gather_object(parts, trainer._rollout([Lists(16)[5]] * 8).rankings.tolist())
    return parts


def train_cases(engine, folder):
    found = {name: train_case(name, engine, folder / name) for name in CASES}
    trainer, _ = make_trainer(folder, engine, make=FlexRecTrainer, max_steps=1)
    trainer.train()
    found["drawn"] = drawn(trainer)
    types = ("FULL_STATE_DICT", "SHARDED_STATE_DICT") if engine == "fsdp2" else ("FULL_STATE_DICT",)
    found["resumed"] = {state_dict: resume(engine, folder / state_dict, state_dict) for state_dict in types}
    return found


def interrupted(engine, folder, dies_at=None):
    """Six steps, with a checkpoint after the second and the fourth; the process of rank 1 may die."""
    callbacks = [Die(dies_at)] if dies_at and process_index() == 1 else []
    checkpoints = sorted(folder.glob("checkpoint-*"))
    trainer, logs = make_trainer(
        folder, engine, callbacks=callbacks, optim="adamw_torch", max_steps=6, save_strategy="steps", save_steps=2
    )
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    return result(trainer, logs)


def command_line(folder):
    """``flexrec train`` on a small world."""
    from flexrec import cli
    from flexrec.data import simulate
    from flexrec.experiment import stages as experiment

    world = {"num_users": 80, "num_items": 90, "num_topics": 4, "num_test_users": 11, "num_candidates": 8}
    experiment.simulate = lambda **options: simulate(**{**options, **world})
    small = ["--steps", "2", "--warmup-steps", "2", "--listwise-steps", "2", "--prompts-per-step", "8"]
    more = ["--need", "interest", "--eval-every", "2", "--baselines", "listwise", "rank_grpo"]
    code = cli.main(["train", "--output", str(folder / "run"), *small, *more])
    assert not torch.distributed.is_initialized()  # what is left of it may abort the process at its exit
    return code


def main():
    task, engine, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if task == "command line":
        sys.exit(command_line(folder))
    PartialState(cpu=True)
    found = {
        "cases": train_cases,
        "killed": partial(interrupted, dies_at=3),
        "interrupted": interrupted,
    }[task](engine, folder)
    if process_index() == 0:
        torch.save(found, folder / "found.pt")
    end()


if __name__ == "__main__":
    main()
