"""The studies whose runs are those of ``flexrec train``: main, transfer, diverse, cold."""

from __future__ import annotations

from flexrec.experiment.studies.design import Options, Part, Study, Table

_REAL = ("movielens", "kuairec")

# The steps of the quickstart, chosen on validation users of the simulator; real data get the package's defaults.
_QUICKSTART: Options = {"warmup_steps": 6, "listwise_steps": 150, "warmup_learning_rate": 2e-3, "steps": 10}
_TENTH: Options = {"data.feedback": 10}
_SEARCH: Options = {"needs": ["search"]}
_SHORT_RUN: Options = {
    "data.num_candidates": 8,
    "data.max_train_lists": 200,
    "critic_model": "knn",
    "needs": ["interest"],
    "metric": "ndcg@5",
    "warmup_steps": 1,
    "listwise_steps": 2,
    "steps": 2,
    "prompts_per_step": 16,
    "baselines": ["random", "popularity"],
}


def _trained(name: str, title: str, by: str, metric: str, items: str = "all") -> Table:
    """The trained policy minus every other ranker, of each data set and ``by`` what else."""
    return Table(name, title, "ranker", ("dataset", by), metric, "trained", turned=True, where={"items": items})


# --- main -------------------------------------------------------------------------------------------------------------

MAIN = Study(
    "main",
    "Main comparison",
    "Is the trained policy above every baseline, above its own base and above its warm start, on each need of each "
    "data set? `sequence_grpo` and `rank_grpo` are trained from the same warm start with as many steps and rankings, "
    "`listwise` from the same base in the same time. KuaiRec keeps a tenth of its feedback, as the simulator does.",
    parts=(
        Part(
            "experiment",
            datasets=("simulated", "movielens", "kuairec", "esci"),
            start={"baselines": ["all"]},
            of_dataset={"simulated": _QUICKSTART, "kuairec": _TENTH, "esci": _SEARCH},
            short_start=_SHORT_RUN,
        ),
    ),
    tables=tuple(
        _trained(metric.replace("@", "_at_"), f"{metric}, trained against the others", "need", metric)
        for metric in ("ndcg@5", "recall@5")
    ),
)

# --- transfer ---------------------------------------------------------------------------------------------------------

_ASKED = [
    "interest",
    "explore",
    "trend",
    "0.7 interest + 0.3 explore",
    "0.5 interest + 0.5 trend",
    "interest, other words",
    "explore, other words",
    "trend, other words",
]

TRANSFER = Study(
    "transfer",
    "Other needs, other words",
    "What does a policy that was trained on one need do when it is asked another, a mixture that it never saw, or a "
    "need in words that it never read? Of each need's wordings the last two are kept from training; the embedded model "
    "has no tokens for words that stand in these alone.",
    parts=(
        Part(
            "transfer",
            datasets=("simulated", "movielens"),
            axes={
                "trained on": {
                    **{need: {"needs": [need]} for need in ("interest", "explore", "trend")},
                    "all three": {"needs": ["interest", "explore", "trend"], "base": True, "examples": True},
                }
            },
            start={"baselines": ["none"], "asked": _ASKED, **_QUICKSTART, "listwise_steps": 100},
            short_axes={"trained on": ("all three",)},
            short_start={
                **{name: value for name, value in _SHORT_RUN.items() if name != "needs"},
                "baselines": ["none"],
                "asked": [_ASKED[0], _ASKED[1], _ASKED[3], _ASKED[5]],
            },
        ),
    ),
    tables=tuple(
        Table(
            data,
            f"{said}: trained on, and asked",
            "trained on",
            ("asked",),
            "ndcg@5",
            "all three",
            where={"dataset": data},
        )
        for data, said in (("simulated", "Simulator"), ("movielens", "MovieLens"))
    ),
)

# --- diverse ----------------------------------------------------------------------------------------------------------

DIVERSE = Study(
    "diverse",
    "Lists of many topics",
    "Do rewards that value the list as a whole make better lists than labels of items, sorted or made diverse by MMR, "
    "whose trade-off is chosen on training lists? Once after imitating the greedy order of the expected gains, and "
    "once by rewards alone ([the need](../diverse.md)).",
    parts=(
        Part(
            "experiment",
            datasets=("simulated", "movielens"),
            axes={
                "training": {
                    "imitation, then rewards": {"listwise_steps": 60, "steps": 20},
                    "rewards alone": {"warmup": "format", "steps": 80},
                }
            },
            start={"needs": ["diverse"], "warmup_steps": 6},
            short_axes={"training": ("rewards alone",)},
            short_start={**_SHORT_RUN, "needs": ["diverse"]},
        ),
    ),
    tables=tuple(
        _trained(metric.replace("@", "_at_"), metric, "training", metric) for metric in ("alpha_ndcg@5", "ndcg@5")
    ),
)

# --- cold -------------------------------------------------------------------------------------------------------------

COLD = Study(
    "cold",
    "Items and users never seen",
    "How well are items ranked that nobody was trained with, by users whom nobody was trained on, with a history of 20 "
    "items and with one of 5? A fifth of the items is kept from the log and from all training lists; `new` are test "
    "lists of these alone.",
    parts=(
        Part(
            "experiment",
            datasets=("simulated", *_REAL),
            axes={"history": {"20": {"data.history_length": 20}, "5": {"data.history_length": 5}}},
            shared=("history",),
            start={"needs": ["interest"], "cold_items": 0.2, **_QUICKSTART, "listwise_steps": 60},
            of_dataset={"kuairec": _TENTH},
            short_axes={"history": ("5",)},
            short_start=_SHORT_RUN,
        ),
    ),
    tables=tuple(
        _trained(f"{items}_items", title, "history", "ndcg@5", items)
        for items, title in (("new", "New items among each other"), ("all", "All candidates"))
    ),
)
