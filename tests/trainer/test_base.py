"""What trainers of rankings share: the order of examples, the noise of a step, numbers in the log, batches."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from flexrec.profiling import profile_steps
from flexrec.task.examples import Example
from flexrec.trainer import base as module
from flexrec.trainer import flexrec as trainer_module
from flexrec.trainer.base import EpochOrder, RankingTrainer, pad_rows
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer


def example_of(index: int) -> Example:
    """Told from the others by its user."""
    nothing = np.zeros(2, dtype=np.float32)
    return Example([1, 2, 3 + index], [[10], [11, 12]], nothing, nothing, (1, 2), "interest", index)


class Numbered(Dataset):
    def __init__(self, size: int = 10) -> None:
        self.size = size
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        return example_of(index)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class Recorder(RankingTrainer):
    """Learns nothing, and keeps where it was when it was asked for the loss of which examples."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int, int, list[int], tuple[int, ...]]] = []
        self.counter = itertools.count()

    def ranking_loss(self, model: Any, examples: list[Example]) -> module.LossAndMetrics:
        noise = tuple(self._randomness().generate_state(2).tolist())
        self.seen.append((self.state.global_step, self._slot, [example.user for example in examples], noise))
        loss = sum(parameter.sum() for parameter in model.parameters())
        return loss, {"number": float(next(self.counter)), "twice": torch.tensor(2.0)}


def model_of() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return LlamaForCausalLM(config)


def arguments(tmp_path: Any, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "learning_rate": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
        "use_cpu": True,
        **options,
    }


def recorded(tmp_path: Any, dataset: Dataset, **options: Any) -> Recorder:
    trainer = Recorder(model_of(), TrainingArguments(**arguments(tmp_path, **options)), dataset)
    trainer.train()
    return trainer


def users(trainer: Recorder) -> list[int]:
    return [user for _, _, examples, _ in trainer.seen for user in examples]


# -------------------------------------------------------------------------------------------------- order of examples


def test_an_order_is_that_of_its_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochOrder(50, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert len(EpochOrder(50, 0)) == 50
    assert sorted(order(3, 1)) == list(range(50))
    assert order(3, 1) == order(3, 1)
    found = [order(3, 1), order(3, 0), order(3, 2), order(4, 1), order(1, 3)]
    for i, one in enumerate(found):
        assert one not in found[:i]


def test_examples_of_an_update_come_again_for_every_update_with_them() -> None:
    plain, sampler = EpochOrder(11, 5), EpochOrder(11, 5, per_update=4, repeats=3)
    order = list(plain)
    assert list(sampler) == order[:4] * 3 + order[4:8] * 3, "what is too little for an update is left out"
    assert len(sampler) == 24
    with pytest.raises(ValueError, match="an update takes 4 examples, the data set has 3"):
        EpochOrder(3, 0, per_update=4)


def test_a_training_shows_everything_in_every_epoch_in_another_order(tmp_path) -> None:
    dataset = Numbered(12)
    found = {seed: users(recorded(tmp_path, dataset, num_train_epochs=3, seed=seed)) for seed in (0, 1)}
    for order in found.values():
        epochs = [order[start : start + 12] for start in (0, 12, 24)]
        assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert found[0][:12] != found[1][:12]
    assert users(recorded(tmp_path, dataset, num_train_epochs=1, seed=1)) == found[1][:12]
    expected = EpochOrder(12, 1)
    expected.set_epoch(2)
    assert found[1][24:] == list(expected)


def test_the_data_set_is_told_every_epoch(tmp_path) -> None:
    dataset = Numbered(8)
    recorded(tmp_path, dataset, num_train_epochs=3)
    assert [epoch for epoch, _ in itertools.groupby(dataset.epochs)] == [0, 1, 2]


def test_data_set_and_order_are_told_the_epoch_that_begins(tmp_path) -> None:
    """By the trainer itself: not every data loader does, nor in all processes."""
    dataset = Numbered(8)
    trainer = Recorder(model_of(), TrainingArguments(**arguments(tmp_path)), dataset)
    order = trainer._get_train_sampler()
    trainer.state.epoch = 2.25
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert dataset.epochs == [2]
    expected = EpochOrder(8, trainer.args.seed)
    expected.set_epoch(2)
    assert list(order) == list(expected)


def test_a_training_that_is_resumed_in_a_later_epoch_goes_on_as_if_it_had_not_stopped(tmp_path) -> None:
    """The same examples, in the same places and with the same noise; the data set is told the epoch it is in."""
    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4}
    whole = recorded(tmp_path, Numbered(12), **options)
    dataset = Numbered(12)
    resumed = Recorder(model_of(), TrainingArguments(**arguments(tmp_path, **options)), dataset)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(whole.seen) == 9
    assert resumed.seen == whole.seen[4:]
    assert [epoch for epoch, _ in itertools.groupby(dataset.epochs)] == [1, 2]


def test_a_batch_is_whole_or_left_out(tmp_path) -> None:
    trainer = recorded(tmp_path, Numbered(10), num_train_epochs=2)
    assert [len(examples) for _, _, examples, _ in trainer.seen] == [4] * 4
    assert FlexRecConfig(output_dir=str(tmp_path), use_cpu=True).dataloader_drop_last


def test_several_updates_see_the_same_examples(tmp_path, monkeypatch) -> None:
    """With two micro-batches in an update and three updates with a batch of rankings; sampled once for each."""
    sampled = []

    def spy(self: Any, model: Any, examples: list[Example]) -> Any:
        sampled.append((self.state.global_step, self._slot, [example.user for example in examples]))
        return sample(self, model, examples)

    def spy_on_states(model: Any, batch: Any) -> Any:
        used.append([prompt_end - 3 for prompt_end in batch.tokens.input_ids[:, 2].tolist()])
        return states(model, batch)

    sample, states, used, seen = FlexRecTrainer._sample, trainer_module.ranking_states, [], []
    monkeypatch.setattr(FlexRecTrainer, "_sample", spy)
    monkeypatch.setattr(trainer_module, "ranking_states", spy_on_states)
    options = arguments(tmp_path, gradient_accumulation_steps=2, num_iterations=3, max_steps=6, seed=5, entropy_coef=0)
    options["per_device_train_batch_size"] = 2
    trainer = FlexRecTrainer(model_of(), FlexRecConfig(**options), Numbered(9))
    loss = trainer.ranking_loss

    def recording(model: Any, examples: list[Example]) -> Any:
        seen.append([example.user for example in examples])
        return loss(model, examples)

    monkeypatch.setattr(trainer, "ranking_loss", recording)
    trainer.train()
    order = list(EpochOrder(9, 5))
    first, second = [order[0:2], order[2:4]], [order[4:6], order[6:8]]
    assert seen == used == first * 3 + second * 3
    assert sampled == [(0, 0, first[0]), (0, 1, first[1]), (3, 0, second[0]), (3, 1, second[1])]


# ------------------------------------------------------------------------------------------------------------- a step


def test_micro_batches_are_numbered_anew_in_every_update(tmp_path) -> None:
    trainer = recorded(tmp_path, Numbered(24), gradient_accumulation_steps=3, max_steps=2)
    assert [(step, slot) for step, slot, _, _ in trainer.seen] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_noise_differs_between_steps_micro_batches_and_seeds_and_is_that_of_the_place(tmp_path) -> None:
    options = {"gradient_accumulation_steps": 2, "max_steps": 3}
    noise = {
        seed: [noise for *_, noise in recorded(tmp_path, Numbered(24), seed=seed, **options).seen] for seed in (0, 7)
    }
    assert len({*noise[0], *noise[7]}) == 12
    again = recorded(tmp_path, Numbered(24), seed=7, **options)
    assert [place[-1] for place in again.seen] == noise[7]


def test_the_log_holds_means_over_what_came_since_the_last_line(tmp_path) -> None:
    trainer = recorded(tmp_path, Numbered(24), gradient_accumulation_steps=3, max_steps=4, logging_steps=2)
    logs = [entry for entry in trainer.state.log_history if "number" in entry]
    assert [entry["number"] for entry in logs[:2]] == [2.5, 8.5], "of 0 to 5, and of 6 to 11"
    assert [entry["twice"] for entry in logs[:2]] == [2.0, 2.0]


def test_the_gradient_of_an_update_is_the_mean_of_its_micro_batches(tmp_path) -> None:
    """The loss is a mean: it is divided among micro-batches, however many there are."""
    found = {}
    for micro_batches in (1, 3):
        args = arguments(tmp_path, gradient_accumulation_steps=micro_batches, max_steps=1, optim="sgd")
        args |= {"learning_rate": 0.25, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        trainer = Recorder(model_of(), TrainingArguments(**args), Numbered(24))
        before = next(trainer.model.parameters()).detach().clone()
        trainer.train()
        found[micro_batches] = before - next(trainer.model.parameters()).detach()
    for moved in found.values():
        torch.testing.assert_close(moved, torch.full_like(moved, 0.25))


def test_a_share_is_of_the_mean_over_the_processes(tmp_path, monkeypatch) -> None:
    trainer = Recorder(model_of(), TrainingArguments(**arguments(tmp_path)), Numbered())
    assert trainer.share(3) == 1

    def with_another(tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        """As if a second process had five things."""
        assert reduction == "mean"
        return (tensor + 5) / 2

    monkeypatch.setattr(trainer.accelerator, "reduce", with_another)
    assert trainer.share(torch.tensor(3)) == 0.75
    assert trainer.share(0) == 0
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda tensor, reduction: tensor)
    assert trainer.share(0) == 0, "nobody has any"


def test_what_a_profile_heard_is_logged(tmp_path) -> None:
    with profile_steps() as profile:
        trainer = recorded(tmp_path, Numbered(24), max_steps=3)
    logs = [entry for entry in trainer.state.log_history if "seconds/backward" in entry]
    assert len(logs) >= 3
    assert profile.steps == 3
    assert {"seconds/log-probs and loss", "seconds/backward", "seconds/optimizer"} <= set(logs[0])
    for part in ("backward", "optimizer"):
        logged = sum(entry.get(f"seconds/{part}", 0.0) for entry in logs)
        assert logged == pytest.approx(profile.seconds[part], abs=1e-4)


def test_batches_are_encoded_with_the_trainers_spelling(tmp_path, monkeypatch) -> None:
    asked = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))

    monkeypatch.setattr(module, "make_batch", spy)
    args = TrainingArguments(**arguments(tmp_path))
    trainer = Recorder(model_of(), args, Numbered(), separator=[20], end=[21, 22])
    examples = [example_of(user) for user in (0, 5)]
    rankings, said = np.array([[0, 1]] * 6), object()
    trainer._batch(examples, rankings, 3, 2, said)
    ((positional, options),) = asked
    prompts, candidates, placed = positional
    assert prompts == [[1, 2, 3], [1, 2, 8]]
    assert candidates == [[[10], [11, 12]]] * 2
    assert placed is rankings
    assert options == {
        "separator": (20,),
        "end": (21, 22),
        "num_generations": 3,
        "rankings_per_row": 2,
        "reasoning": said,
        "device": torch.device("cpu"),
        "one_pass": False,
    }


def test_rows_are_padded_behind() -> None:
    rows = [np.array([3.0, 1.0], dtype=np.float32), np.zeros(0, dtype=np.float32), np.array([2.0], dtype=np.float32)]
    padded = pad_rows(rows, -1)
    assert padded.tolist() == [[3, 1], [-1, -1], [2, -1]]
    assert padded.dtype == np.float32


def test_what_cannot_be_trained_is_refused(tmp_path) -> None:
    trainer = RankingTrainer(model_of(), TrainingArguments(**arguments(tmp_path)), Numbered())
    with pytest.raises(TypeError, match="defines ranking_loss"):
        trainer.ranking_loss(trainer.model, [])
