"""An experiment without training: recorders stand for the trainers.

They note what they are asked for and mark the model instead of training it.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flexrec.data import simulate
from flexrec.evaluation import evaluate
from flexrec.experiment import model as model_module
from flexrec.experiment import stages, training
from flexrec.experiment.config import ExperimentConfig
from flexrec.trainer import callbacks

SIZES = {"num_users": 24, "num_items": 70, "num_topics": 4, "num_test_users": 6, "num_candidates": 8}
GUESS, DOUBT = 0.625, 0.04  # what the fake critic says of every pair without feedback
MARKS = {"format": 1.0, "listwise": 10.0, "reinforcement": 100.0}  # what a stage adds to a weight that was 1


@pytest.fixture(scope="module")
def dataset():
    """Feedback is scarce, as in the default, but every user has logged more than a history shows."""
    return simulate(**SIZES, observed_share=0.6, history_length=5, lists_per_user=2)


class FakeCritic:
    def save(self, folder):
        (folder / "critic.npz").touch()

    def interval_many(self, lists, level):
        return [(m - level * DOUBT, m + level * DOUBT) for m, _ in self.predict_many(lists)]

    def predict_many(self, lists):
        """The later in the catalogue, the better."""
        return [(lst.candidates.astype(np.float32) / 100, np.full(len(lst.candidates), DOUBT)) for lst in lists]

    def fill_many(self, lists):
        unknown = [np.isnan(lst.interest) for lst in lists]
        return [
            (np.where(u, GUESS, lst.interest).astype(np.float32), np.where(u, DOUBT, 0.0).astype(np.float32))
            for u, lst in zip(unknown, lists, strict=True)
        ]


class Recorder:
    """A trainer that trains nothing: what it was made with, and what was asked of it."""

    def __init__(self, recorded, model, args, examples, *, stage="reinforcement", **options):
        self.recorded, self.model, self.args, self.examples = recorded, model, args, examples
        self.stage, self.options = stage, options
        self.callbacks = list(options.pop("callbacks"))
        self.checkpoint = None
        self.mark_before = recorded.mark_of(model)
        recorded.stages.append(self)

    def train(self, resume_from_checkpoint=None):
        self.checkpoint = resume_from_checkpoint
        self.recorded.seconds += self.recorded.pace[self.stage] * self.args.max_steps
        with torch.no_grad():
            marked(self.model).add_(MARKS[self.stage])
        if self.stage == self.recorded.stops_after:
            raise KeyboardInterrupt

    def remove_callback(self, callback):
        pass

    def add_callback(self, callback):
        self.callbacks.append(callback)

    @contextmanager
    def whole_model(self):
        yield self.model


def marked(model):
    """The weight that stages mark: the norm before the output layer, or B of the first adapter."""
    named = dict(model.named_parameters())
    return next((p for n, p in named.items() if "lora_B" in n), named.get("model.norm.weight"))


class Recorded:
    """Runs of the experiment's own code, and what was seen of them."""

    guess, doubt = GUESS, DOUBT
    marked = staticmethod(marked)

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.stages, self.evaluated, self.said, self.seeds, self.num_ranked = [], [], [], {}, set()
        self.stops_after = None
        self.seconds = 0.0
        self.pace = {"format": 1.0, "listwise": 1.0, "reinforcement": 1.0}  # seconds a step

    def run(self, folder, **changes):
        few = {"steps": 4, "warmup_steps": 3, "listwise_steps": 2, "prompts_per_step": 4}
        few |= {"needs": ("interest",), "baselines": ("none",)}
        config = ExperimentConfig(output=str(folder), **{**few, **changes})
        return stages.run_experiment(config, say=self.said.append)

    def interrupt(self, folder, **changes):
        """Run up to the last step of reinforcement."""
        self.stops_after = "reinforcement"
        with pytest.raises(KeyboardInterrupt):
            self.run(folder, **changes)
        self.stops_after = None

    def of(self, stage):
        return [one for one in self.stages if one.stage == stage]

    @staticmethod
    def mark_of(model):
        return marked(model).detach().flatten()[0].item()

    def saved_mark(self, folder):
        return self.mark_of(AutoModelForCausalLM.from_pretrained(folder))

    def marks(self):
        """The mark of each model that was evaluated, by what it was called."""
        return {shown.removeprefix("Evaluating ").split(",")[0]: mark for shown, mark in self.evaluated}


@pytest.fixture
def recorded(monkeypatch, dataset):
    """Time stands still but in the stages."""
    seen = Recorded(monkeypatch)

    def seeded(owner, name, result=None):
        function = getattr(owner, name)

        def spy(*args, seed, **kwargs):
            seen.seeds[name] = seed
            return function(*args, seed=seed, **kwargs) if result is None else result

        monkeypatch.setattr(owner, name, spy)

    def fit(*args, seed, lists, **kwargs):
        seen.seeds["critic"] = seed
        seen.lists_of_critic, seen.critic_options = lists, kwargs
        return FakeCritic()

    seeded(stages, "simulate", dataset)
    seeded(model_module, "item_vectors")
    seeded(model_module, "build_model")
    monkeypatch.setattr(stages, "Critic", type("Critic", (FakeCritic,), {"fit": staticmethod(fit)}))
    monkeypatch.setattr(stages, "set_seed", lambda seed: seen.seeds.update(set_seed=seed))
    for name in ("SupervisedTrainer", "FlexRecTrainer"):
        monkeypatch.setattr(training, name, lambda *args, **kwargs: Recorder(seen, *args, **kwargs))
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: seen.seconds)
    rank = evaluate.rank_examples

    def spy(model, examples, builder, *, num_ranked, description):
        if (description or "").startswith("Evaluating "):  # not people to show, nor needs in other words
            seen.evaluated.append((description, seen.mark_of(model)))
        seen.num_ranked.add(num_ranked)
        return rank(model, examples, builder, num_ranked=num_ranked)

    monkeypatch.setattr(evaluate, "rank_examples", spy)
    return seen
