"""Calls of the public functions that are right or nearly so, made of random numbers; and values that are not."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch

METRICS = ("dcg", "ndcg@3", "dcg_burges", "ndcg_burges@2", "recall@2", "precision@3", "hit_rate@1", "mrr", "map@2")
METRICS += ("rbp.8", "err@3", "err.4", "ndcg@1000")
CREDITS = ("swap", "noncausal", "independent", "rank", "sequence")
BACKENDS = ("auto", "numba", "torch")
LEVELS = ("token", "item", "sequence")

Arguments = dict[str, Any]


def one_of(*values: Any) -> Callable[[Random], Any]:
    return lambda rng: rng.choice(values)


def floats(rng: Random, *shape: int, low: float = -2.0, high: float = 2.0) -> torch.Tensor:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(rng.getrandbits(32))) * (high - low) + low
    return values.to(rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16]))


def gains(rng: Random, n: int, k: int) -> torch.Tensor:
    values = floats(rng, n, k, low=0.0, high=0.4)
    return values * (torch.rand(n, k) < rng.choice([0.0, 0.5, 1.0])) * rng.choice([1.0, 1.0, 1e-20, 1e-38])


def sizes(rng: Random) -> tuple[int, int]:
    return rng.choice([0, 1, 2, 5]), rng.choice([0, 1, 2, 3, 9])


def options(rng: Random, choices: Arguments, share: float = 0.4) -> Arguments:
    return {name: value(rng) for name, value in choices.items() if rng.random() < share}


def of_lists(rng: Random, *, backend: bool = True, credit: bool = False, variance: bool = False) -> Arguments:
    n, k = sizes(rng)
    call: Arguments = {"gains": gains(rng, n, k)}
    if variance:
        call["variance"] = floats(rng, n, k, low=0.0, high=0.1)
    call["metric"] = rng.choice(METRICS)
    counts = {"lengths": one_of(torch.full((n,), k), k, torch.zeros(n, dtype=torch.int64))}
    counts["num_ranked"] = one_of(0, 1, k, torch.full((n,), min(1, k)))
    if backend:
        counts["backend"] = one_of(*BACKENDS)
    if credit:
        counts["credit"] = one_of(*CREDITS, "policy")
        counts["weights"] = lambda rng: floats(rng, n, k, k, low=0.0)
    return call | options(rng, counts)


def of_window(rng: Random) -> Arguments:
    return {**of_lists(rng), "start": rng.choice([0, 0, 1, 2]), "stop": rng.choice([1, 2, 3, 9])}


def model(rng: Random, states: tuple[int, ...], dim: int, prefix: str = "") -> Arguments:
    scale = rng.choice([1.0, 1.0, 0.0, 100.0])
    hidden, weight = floats(rng, *states, dim), floats(rng, 12, dim).mul(scale)
    return {prefix + "hidden": hidden, prefix + "weight": weight.to(hidden.dtype)}


SOFTMAX: Arguments = {
    "temperature": one_of(1.0, 0.3, 1e-3, 100.0, 1),
    "backend": one_of(*BACKENDS),
    "weight_grad": one_of("dense", "sparse", "accumulate"),
}


def of_rankings(rng: Random, *, extra: str = "", backend: bool = True) -> Arguments:
    prompts, per_prompt, k = rng.choice([1, 2]), rng.choice([1, 3]), rng.choice([1, 2, 5])
    n, t, dim = prompts * per_prompt, rng.randint(1, k), rng.choice([1, 4])
    call = model(rng, (n, t), dim)
    if extra == "reference":
        call |= model(rng, (n, t), dim, "ref_")
    call["candidates"] = torch.tensor([rng.sample(range(12), k) for _ in range(prompts)])
    call["ranking"] = torch.tensor([rng.sample(range(k), t) for _ in range(n)])
    choices = dict(SOFTMAX) if backend else {"temperature": SOFTMAX["temperature"]}
    choices |= {"lengths": one_of(torch.full((n,), k), torch.full((prompts,), k)), "bias": lambda rng: floats(rng, 12)}
    if extra == "objective":
        call |= {"gains": gains(rng, n, k), "metric": rng.choice(METRICS)}
        choices |= {"num_ranked": one_of(1, t), "tilt": one_of(0.02, 1.0), "foresight": one_of(0.0, 0.5, "auto")}
    elif extra == "kl":
        call |= model(rng, (n, t), dim, "ref_")
    elif extra == "values":
        choices["values"] = lambda rng: floats(rng, n, k, 2)
    return call | options(rng, choices)


def of_sets(rng: Random, *, extra: str = "") -> Arguments:
    sizes = [rng.choice([1, 1, 2, 4]) for _ in range(rng.choice([1, 3]))]
    m, dim = len(sizes), rng.choice([1, 4])
    sets = [rng.sample(range(12), size) for size in sizes]
    call = model(rng, (m,), dim)
    if extra:
        call |= model(rng, (m,), dim, "ref_")
    call["allowed_ids"] = torch.tensor([token for one in sets for token in one])
    call["allowed_offsets"] = torch.tensor([0, *sizes]).cumsum(0)
    if extra != "reference":
        call["targets"] = torch.tensor([rng.choice(one) for one in sets])
    return call | options(rng, SOFTMAX | {"bias": lambda rng: floats(rng, 12)})


def of_replay(rng: Random) -> Arguments:
    sizes = [rng.choice([0, 1, 2, 4]) for _ in range(rng.choice([1, 3]))]
    sets = [rng.sample(range(12), size) for size in sizes]
    call = model(rng, (len(sizes),), rng.choice([1, 4]))
    call["token_ids"] = torch.tensor([token for one in sets for token in one], dtype=torch.int64)
    call["offsets"] = torch.tensor([0, *sizes]).cumsum(0)
    call["targets"] = torch.tensor([rng.choice(one or range(12)) for one in sets])
    choices = {name: SOFTMAX[name] for name in SOFTMAX if name != "values"}
    return call | options(rng, choices | {"bias": lambda rng: floats(rng, 12), "chunk_size": one_of(1, 2, 512)})


def of_advantages(rng: Random) -> Arguments:
    per_prompt, k = rng.choice([1, 2, 3]), rng.choice([0, 1, 4])
    n = per_prompt * rng.choice([0, 1, 2])
    choices = {
        "baseline": one_of("none", "rank", "group"),
        "scale": one_of("none", "rank", "group", "batch"),
        "item_mask": lambda rng: torch.rand(n, k) < rng.random(),
        "weights": one_of(torch.ones(n, 1), torch.rand(n, k)),
    }
    rewards = floats(rng, n, k) * rng.choice([0.0, 1.0, 1e-30, 1e-45])
    return {"item_rewards": rewards, "num_generations": per_prompt} | options(rng, choices)


def of_weights(rng: Random) -> Arguments:
    per_prompt, k = rng.choice([1, 2, 3]), rng.choice([0, 1, 4])
    n = per_prompt * rng.choice([0, 1, 2])
    choices = {
        "level": one_of("rollout", "item"),
        "eps": one_of("auto", 0.1, 1e-30, 1),
        "normalise": one_of("batch", "group", "none"),
        "rewards": lambda rng: floats(rng, n, k),
        "item_mask": lambda rng: torch.rand(n, k) < rng.random(),
        "max_ratio": one_of(10.0, 1.0),
    }
    variance = floats(rng, n, k, low=0.0) * rng.choice([0.0, 1.0, 1e-30])
    if rng.random() < 0.3:
        variance = variance.t().contiguous().t()
    return {"variance": variance, "num_generations": per_prompt} | options(rng, choices)


def of_loss(rng: Random) -> Arguments:
    n, length, k = rng.choice([1, 2]), rng.choice([1, 3]), rng.choice([1, 2])
    level = rng.choice(LEVELS)

    def logps(rng: Random) -> torch.Tensor:
        return floats(rng, n, length, low=-5.0, high=0.0) * rng.choice([1.0, 100.0])

    call = {
        "per_token_logps": logps(rng).requires_grad_(),
        "old_per_token_logps": rng.choice([None, logps(rng)]),
        "advantages": floats(rng, *rng.choice([(n,), (n, length), (n, k), (n, 1)])),
        "completion_mask": torch.rand(n, length) < rng.choice([0.0, 0.7, 1.0]),
        "importance_level": level,
    }
    choices = {
        "item_ids": lambda rng: torch.randint(-1, k, (n, length)),
        "epsilon_low": one_of(0.0, 0.2, 0.9),
        "beta": one_of(0.0, 0.01, 1.0),
        "kl": lambda rng: floats(rng, n, length, low=0.0),
        "ref_per_token_logps": logps,
        "entropy": lambda rng: floats(rng, n, length, low=0.0),
        "entropy_coef": one_of(0.0, 0.005),
        "advantage_level": one_of(*LEVELS),
        "loss_agg": one_of("token-mean", "item-mean", "seq-mean-token-mean", "sequence-mean"),
    }
    return call | options(rng, choices)


def lists_of_tokens(rng: Random) -> list[list[list[int]]]:
    def candidate() -> list[int]:
        return [rng.randint(1, 6) for _ in range(rng.choice([1, 1, 2, 3]))]

    return [[candidate() for _ in range(rng.choice([1, 2, 4]))] for _ in range(rng.choice([1, 2]))]


SPELLED: Arguments = {
    "separator": one_of([], [7], [1], [7, 8]),
    "end": one_of([], [9], [7], [1]),
    "num_ranked": one_of(1, 2),
    "num_generations": one_of(1, 2),
}


def of_state(rng: Random) -> Arguments:
    return {"candidates": lists_of_tokens(rng)} | options(rng, SPELLED)


def of_parser(rng: Random) -> Arguments:
    lists = lists_of_tokens(rng)
    rows = [[rng.randint(0, 9) for _ in range(rng.choice([0, 3, 8]))] for _ in lists]
    return {"completions": rows, "candidates": lists} | options(rng, {n: SPELLED[n] for n in ("separator", "end")})


def of_encoder(rng: Random) -> Arguments:
    lists = lists_of_tokens(rng)
    least = min(map(len, lists))
    rankings = np.array([rng.sample(range(least), least) for _ in lists])
    return {"candidates": lists, "rankings": rankings} | options(rng, SPELLED)


def of_permutations(rng: Random) -> Arguments:
    k = rng.choice([1, 4])
    return {"rankings": np.array([rng.sample(range(k), k) for _ in range(2)]), "num_candidates": k}


def of_text(rng: Random) -> Arguments:
    pieces = [
        "[1]",
        "[2]",
        " > ",
        ", ",
        "1",
        "2",
        "\n",
        "1. ",
        "[02]",
        "[1, 2]",
        "ten",
        "[",
        "]",
        "\uff3b\uff12\uff3d",
        "\ud800",
        "",
    ]
    texts = ["".join(rng.choices(pieces, k=rng.choice([0, 2, 6]))) for _ in range(2)]
    names = rng.choice([["[1]", "[2]"], ["ten", "tenth"], ["The Matrix", "The Matrix > 2"]])
    choices = {"separator": one_of("", " > ", "\n"), "end": one_of("", "."), "num_ranked": one_of(1, 2)}
    return {"texts": texts, "candidates": [names] * 2} | options(rng, choices | {"after": one_of("]", "</think>")})


def of_scores(rng: Random) -> Arguments:
    call = of_text(rng)
    call["completions"] = call.pop("texts")
    choices = {"credit": one_of(*CREDITS), "invalid": one_of("partial", "repair"), "variance": one_of([[0.1, 0.0]] * 2)}
    return call | {"gains": [[0.3, 0.0], [0.0, 0.0]], "metric": rng.choice(METRICS)} | options(rng, choices)


def of_bootstrap(rng: Random) -> Arguments:
    size = rng.choice([1, 2, 7])
    choices = {"clusters": one_of(np.arange(size) // 2), "level": one_of(0.5, 0.99), "seed": one_of(0, 7)}
    return {"values": floats(rng, size).double().numpy(), "num_samples": rng.choice([1, 20])} | options(rng, choices)


def of_change(rng: Random) -> Arguments:
    call = of_bootstrap(rng)
    call["new"] = call.pop("values")
    return call | {"base": rng.choice([call["new"] * 0.0, call["new"], -call["new"]])}


def of_rank_metrics(rng: Random) -> Arguments:
    call = of_lists(rng, backend=False)
    return {"gains": call["gains"].float().numpy(), "metrics": [call["metric"]]}


def of_decoding(rng: Random) -> Arguments:
    choices = {
        "num_beams": one_of(1, 4),
        "best_of": one_of(1, 4),
        "temperature": one_of(0.5),
        "top_p": one_of(0.5, 1.0),
    }
    return options(rng, choices | {"num_ranked": one_of(1, 5)})


def of_processor(rng: Random) -> Arguments:
    choices = {"prompt_length": one_of(0, 3), "eos_token_id": one_of(0, [0, 9]), "num_beams": one_of(1, 2)}
    return {"candidates": lists_of_tokens(rng)} | options(rng, choices | {n: SPELLED[n] for n in ("separator", "end")})


def of_tokens(rng: Random) -> Arguments:
    n, k, length = rng.choice([0, 2]), rng.choice([1, 3]), rng.choice([0, 4])
    return {
        "values": floats(rng, n, k),
        "item_ids": torch.randint(-1, k, (n, length)),
        "at": rng.choice(["all", "end"]),
    }


# --- what nobody should pass ------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
WRONG: tuple[Callable[[Any], Any], ...] = (
    lambda value: None,
    lambda value: "",
    lambda value: "ndcg@0",
    lambda value: "no-such",
    lambda value: b"ndcg",
    lambda value: -1,
    lambda value: 0,
    lambda value: 3,
    lambda value: 2**63,
    lambda value: -(2**70),
    lambda value: 1e-300,
    lambda value: 1e300,
    lambda value: NAN,
    lambda value: -INF,
    lambda value: True,
    lambda value: object(),
    lambda value: [],
    lambda value: [[]],
    lambda value: [["a"]],
    lambda value: {"a": 1},
    lambda value: np.zeros((2, 2), dtype=np.complex64),
    lambda value: np.array(["x"]),
    lambda value: np.array([2**64 - 1], dtype=np.uint64),
    lambda value: torch.zeros(()),
    lambda value: torch.zeros(2, 2, 2, 2),
    lambda value: torch.zeros(0),
    lambda value: torch.full((2, 3), NAN),
    lambda value: torch.eye(3).to_sparse(),
    lambda value: torch.zeros(2, 3, device="meta"),
    lambda value: torch.zeros(2, 3, dtype=torch.complex64),
)
SPOILT: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda value: value.to(torch.float16),
    lambda value: value.to(torch.int32),
    lambda value: value.bool(),
    lambda value: value[None],
    lambda value: value[:0],
    lambda value: torch.cat([value, value]),
    lambda value: value.t() if value.dim() == 2 else value,
    lambda value: ~value if value.dtype == torch.bool else -value,
    lambda value: value + 1,
    lambda value: value * 1000,
    lambda value: value.new_full(value.shape, -1),
    lambda value: value.to_sparse(),
    lambda value: value.to("meta"),
    lambda value: torch._neg_view(value) if value.is_floating_point() else value,
    lambda value: value.double() * NAN,
    lambda value: value.double() + INF,
    lambda value: value.expand(*value.shape),
    lambda value: value.numpy() if not value.requires_grad and value.dtype != torch.bfloat16 else value.tolist(),
)


def spoil(rng: Random, value: Any) -> Any:
    """Something else in the place of an argument."""
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        return rng.choice(SPOILT)(value.detach())
    if isinstance(value, list) and value and rng.random() < 0.5:
        return rng.choice([value[:-1], [*value, value[0]], [value], [*value[:-1], None], [*value[:-1], []], value * 2])
    return rng.choice(WRONG)(value)
