"""What processes share and say to each other, seen from one of them; tests/trainer has several train together."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexrec.policy import distributed


def make_model():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )


def test_work_is_shared_out_in_order(monkeypatch):
    """Three processes, of which one has less to do."""
    seen = {}

    def gather(parts, part):
        parts[:] = [[f"{x}!" for x in "abcde"[first::3]] for first in range(3)]
        seen["part"] = part

    monkeypatch.setattr(distributed, "num_processes", lambda: 3)
    monkeypatch.setattr(distributed, "process_index", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_gather_object", gather)
    found = distributed.map_over_processes(lambda items: [f"{x}!" for x in items], list("abcde"))
    assert found == ["a!", "b!", "c!", "d!", "e!"]
    assert seen["part"] == ["c!"]


def test_the_main_process_writes_and_says_what_holds_for_all(monkeypatch):
    """As the main process and as another one sees it."""
    done = []

    def broadcast(values):
        values[0] = "the main process's"

    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "barrier", lambda: done.append("waited"))
    monkeypatch.setattr(distributed.dist, "broadcast_object_list", broadcast)
    for rank, expected in ((0, ["wrote", "waited"]), (1, ["waited"])):
        monkeypatch.setattr(distributed.dist, "get_rank", lambda rank=rank: rank)
        done.clear()
        distributed.on_main_process(lambda: done.append("wrote"))
        assert done == expected
        assert distributed.of_main_process("its own") == "the main process's"


@pytest.mark.parametrize(
    ("environment", "spread"),
    [({}, False), ({"FSDP": "true"}, True), ({"DEEPSPEED": "True"}, True), ({"FSDP": "false"}, False)],
)
def test_the_launcher_says_whether_parameters_are_spread(monkeypatch, environment, spread):
    for engine in ("FSDP", "DEEPSPEED"):
        monkeypatch.delenv(f"ACCELERATE_USE_{engine}", raising=False)
    for engine, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_USE_{engine}", value)
    assert distributed.spreads_parameters() == spread


class Shard(torch.nn.Module):
    """What FSDP2 makes of a module, as far as it is used here."""

    def __init__(self, name, events, **children):
        super().__init__()
        self.name, self.events = name, events
        for child, module in children.items():
            self.add_module(child, module)

    def unshard(self):
        self.events.append(f"{self.name} is whole")

    def reshard(self):
        self.events.append(f"{self.name} is spread")

    def set_reshard_after_forward(self, value):
        self.events.append(value)


@pytest.mark.parametrize("reshard", [False, True])
def test_a_model_is_whole_for_a_while_and_then_as_before(monkeypatch, reshard):
    monkeypatch.setattr(distributed, "is_fsdp", lambda module: isinstance(module, Shard))
    events = []
    model = Shard("model", events, layer=Shard("layer", events))
    with distributed.whole_model(model, reshard_after_forward=reshard) as inside:
        assert inside is model
        events.append("sampling")
    whole, spread = ["model is whole", "layer is whole"], ["model is spread", "layer is spread"]
    assert events == [False, *whole, "sampling", *spread, reshard]


def test_a_layer_is_gathered_by_the_innermost_shard_that_owns_it(monkeypatch):
    monkeypatch.setattr(distributed, "is_fsdp", lambda module: isinstance(module, Shard))
    events, head, other = [], torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    model = Shard("model", events, below=Shard("below", events), top=Shard("top", events, head=head))
    assert distributed.gather_layer(model, head)
    assert events == ["top is whole"]
    assert not distributed.gather_layer(model, other)


def test_a_reference_is_frozen_and_follows_the_accelerators_plugin(monkeypatch):
    state = SimpleNamespace(deepspeed_plugin=None)
    accelerator = SimpleNamespace(state=state, device=torch.device("cpu"))
    reference = distributed.place_reference(make_model().train(), accelerator)
    assert not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    configured = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "more": 1}, "optimizer": {}}
    state.deepspeed_plugin = SimpleNamespace(zero_stage=3, deepspeed_config=configured)
    engine = SimpleNamespace(initialize=lambda model, config: ((model, config),))
    monkeypatch.setitem(sys.modules, "deepspeed", engine)
    model, config = distributed.place_reference(reference, accelerator)
    assert model is reference
    precision = {"bf16": {"enabled": True}}
    assert config == {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, **precision}
