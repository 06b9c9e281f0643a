"""The studies of what a step is made of: credit, uncertainty, critic, estimator."""

from __future__ import annotations

from flexrec.experiment.studies.design import Options, Part, Study, Table

_REAL = ("movielens", "kuairec")
_TENTH: Options = {"data.feedback": 10}

# Short reinforcement from a shared start: of 1,500 users, 64 rankings a step, an embedded model of width 64.
_WORLD: Options = {"data.num_users": 1500, "data.num_test_users": 300, "data.history_length": 12}
_SMALL_LISTS: Options = {"data.max_train_lists": 4500, "data.max_test_lists": 600, "data.history_length": 12}
_STARTS: dict[str, Options] = {"format": {}, "warm start": {"listwise_steps": 40}}
_SHORT_START: Options = {
    "data.num_users": 60,
    "data.num_test_users": 20,
    "data.num_items": 120,
    "data.num_topics": 5,
    "data.num_candidates": 8,
    "rankings": 16,
    "format_steps": 2,
    "hidden_size": 32,
}
_RATES: dict[str, Options] = {f"{percent} %": {"data.observed_share": percent / 100} for percent in (100, 30, 10, 3)}
_KUAIREC_RATES: dict[str, Options] = {f"{percent} %": {"data.feedback": percent} for percent in (30, 10, 3)}
_MISSING: dict[str, Options] = {name: {"data.missing": name} for name in ("random", "exposure")}

# --- credit -----------------------------------------------------------------------------------------------------------

_ITEM_CREDITS = ("swap", "noncausal", "policy", "independent", "rank", "sequence")
_ALONE: dict[str, Options] = {
    "the start": {"steps": 0},
    **{credit: {"credit": credit} for credit in ("all_actions", "all_actions_corrected", *_ITEM_CREDITS)},
}
_IN_GROUPS: dict[str, Options] = {
    f"{credit}, G 8, {baseline} mean, scale {scale}": {
        "credit": credit,
        "num_generations": 8,
        "baseline": baseline,
        "scale": scale,
    }
    for credit in _ITEM_CREDITS
    for baseline, scale in (("rank", "batch"), ("rank", "rank"), ("group", "batch"), ("group", "group"))
}
_TARGETS: dict[str, Options] = {
    "expectation": {},
    **{f"exp(A / {tilt:g})": {"tilt": tilt} for tilt in (0.01, 0.03, 0.1, 0.3)},
}
_GROUP_SIZES: dict[str, Options] = {
    f"{credit}, G {size}": {
        "credit": credit,
        "num_generations": size,
        "baseline": "rank" if credit in ("rank", "sequence") and size > 1 else "none",
    }
    for credit in ("all_actions", "all_actions_corrected", "swap", "rank", "sequence")
    for size in (1, 2, 4, 8, 16)
}


def _of_starts(name: str, axis: str, levels: dict[str, Options], short: tuple[str, ...]) -> Part:
    return Part(
        "reinforcement",
        name,
        datasets=("simulated", *_REAL),
        axes={"start": _STARTS, axis: levels},
        shared=("start",),
        start={"need": "interest"},
        of_dataset={
            "simulated": _WORLD,
            "movielens": _SMALL_LISTS,
            "kuairec": {**_SMALL_LISTS, **_TENTH},
        },
        options={"early": 12},
        short_axes={"start": ("format",), axis: short},
        short_start=_SHORT_START,
        short_options={"steps": 2, "early": 1},
    )


CREDIT = Study(
    "credit",
    "Credits",
    "Which credit learns most from as many rankings? All runs of a data set, a seed and a start share the critic and "
    "the model that they begin with, and are reinforced for 40 steps of 64 rankings: 64 prompts, or with G rankings of "
    "a prompt 64 / G. Adam does not see a common factor of all advantages, so that the scale `none` is not run beside "
    "`batch`.",
    parts=(
        _of_starts(
            "credits",
            "credit",
            {**_ALONE, **_IN_GROUPS},
            ("the start", "all_actions", "all_actions_corrected", "sequence"),
        ),
        _of_starts("targets", "target", _TARGETS, ("expectation", "exp(A / 0.1)")),
        _of_starts("group sizes", "group", _GROUP_SIZES, ("all_actions, G 1", "sequence, G 8")),
    ),
    tables=tuple(
        Table(name, title, axis, ("dataset", "start"), metric, base, where={"part": part})
        for part, name, title, axis, metric, base in (
            ("credits", "credits", "Credits", "credit", "ndcg@5", "all_actions"),
            ("credits", "credits_early", "Credits, after 12 steps", "credit", "ndcg@5 early", "all_actions"),
            ("targets", "targets", "Targets", "target", "ndcg@5", "expectation"),
            ("group sizes", "group_sizes", "Rankings of a prompt", "group", "ndcg@5", "all_actions, G 1"),
        )
    ),
)

# --- uncertainty ------------------------------------------------------------------------------------------------------

_VARIANTS: dict[str, Options] = {
    "none": {"fuse": False},
    "fused": {},
    "rollout": {"uncertainty": "rollout"},
    "item": {"uncertainty": "item"},
    "shuffled": {"uncertainty": "item", "shuffle_weights": True},
    "pessimism": {"pessimism": 1.0},
    "posterior": {"sample_gains": True},
}
_UNCERTAIN: Options = {"early": 12}
_SHORT_VARIANTS = ("fused", "item")

UNCERTAINTY = Study(
    "uncertainty",
    "What is done with what is not known",
    "Does it help to weigh what the critic does not know, where little feedback is left, and is it the weights or "
    "only that there are some (`shuffled`)? For each condition and seed one world, one critic and one start, from "
    "which each variant is reinforced for 40 steps of 64 prompts ([what the variants are](../notes/uncertainty.md)). "
    "With all of the feedback what is left to know is its noise.",
    parts=(
        *(
            Part(
                "reinforcement",
                name,
                axes={"missing": _MISSING, "feedback": feedback, "variant": _VARIANTS},
                shared=("missing", "feedback"),
                start={**_WORLD, **warmed},
                options=_UNCERTAIN,
                short_axes={"missing": (short,), "feedback": ("10 %",), "variant": _SHORT_VARIANTS},
                short_start={**_SHORT_START, **dict.fromkeys(warmed, 2)},
                short_options={"steps": 2, "early": 1},
            )
            for name, feedback, warmed, short in (
                ("format stage", _RATES, {}, "random"),
                ("warm start", {"10 %": _RATES["10 %"]}, _STARTS["warm start"], "exposure"),
            )
        ),
        Part(
            "reinforcement",
            "KuaiRec",
            datasets=("kuairec",),
            axes={"missing": {"random": {}}, "feedback": _KUAIREC_RATES, "variant": _VARIANTS},
            shared=("feedback",),
            start=_SMALL_LISTS,
            options=_UNCERTAIN,
        ),
    ),
    tables=tuple(
        Table(
            name=f"{part.replace(' ', '_').lower()}{suffix}",
            title=f"{said}{after}",
            rows="variant",
            columns=("missing", "feedback"),
            metric=metric,
            base="fused",
            where={"part": part},
        )
        for part, said in (
            ("format stage", "Simulator, from the format stage"),
            ("warm start", "Simulator, from the warm start"),
            ("KuaiRec", "KuaiRec, from the format stage"),
        )
        for metric, suffix, after in (("ndcg@5", "", ""), ("ndcg@5 early", "_early", ", after 12 steps"))
    ),
)

# --- critic -----------------------------------------------------------------------------------------------------------

_MODELS: dict[str, Options] = {name: {"model": name} for name in ("ensemble", "mf", "knn")}
_BY = ("dataset", "missing", "feedback")

CRITIC = Study(
    "critic",
    "Critics",
    "How well do the critic's models know the interest of users who are not in the log: their error, their likelihood, "
    "how often their intervals hold what they say, and where they are wrong? Against the true interest on the "
    "simulator, against all feedback on KuaiRec, whose noise is in the errors there.",
    parts=(
        Part(
            "critic",
            axes={"missing": _MISSING, "feedback": _RATES, "model": _MODELS},
            shared=("missing", "feedback"),
            short_axes={"missing": ("random",), "feedback": ("10 %",), "model": ("ensemble", "knn")},
            short_start={name: value for name, value in _SHORT_START.items() if name.startswith("data.")},
        ),
        Part(
            "critic",
            datasets=("kuairec",),
            axes={"missing": {"random": {}}, "feedback": _KUAIREC_RATES, "model": _MODELS},
            shared=("feedback",),
        ),
    ),
    tables=(
        Table("error", "Squared error", "model", _BY, "squared error", "ensemble", where={"of": "all"}, digits=4),
        *(
            Table(name.replace("@", "_"), title, "model", _BY, name, where={"of": "all"}, only_means=True)
            for name, title in (
                ("rmse", "Root mean square error"),
                ("bias", "Bias: predicted minus found"),
                ("nll", "Negative log-likelihood"),
                ("coverage@50", "Inside the 50 % interval, per cent"),
                ("coverage@80", "Inside the 80 % interval, per cent"),
                ("coverage@95", "Inside the 95 % interval, per cent"),
            )
        ),
        *(
            Table(
                f"parts_{name.replace(' ', '_')}", title, "of", _BY, name, where={"model": "ensemble"}, only_means=True
            )
            for name, title in (
                ("predicted", "Reliability of the ensemble: predicted, by fifths of the prediction"),
                ("found", "Reliability of the ensemble: found, by fifths of the prediction"),
                ("predicted sd", "Reliability of the ensemble: predicted sd, by fifths of it"),
            )
        ),
        *(
            Table(f"{model}_by_popularity", title, "of", _BY, "rmse", where={"model": model}, only_means=True)
            for model, title in (
                ("ensemble", "Error of the ensemble, by fifths of popularity and of the predicted sd"),
                ("knn", "Error of the neighbours, by fifths of popularity and of the predicted sd"),
            )
        ),
    ),
)

# --- estimator --------------------------------------------------------------------------------------------------------

_POLICIES: dict[str, Options] = {
    f"{policy}, {strength:g}": {"policy": policy, "strength": strength}
    for policy, strengths in {
        "plackett-luce": (1.0, 2.0),
        "stepwise": (1.0, 2.0),
        "pairs": (0.5, 1.0, 2.0),
        "prefixes": (1.0, 2.0),
        "trigger": (5.0,),
    }.items()
    for strength in strengths
}
_OBJECTIVES = ("ndcg", "ndcg@3")

ESTIMATOR = Study(
    "estimator",
    "Estimators, exactly",
    "How far is what a credit estimates from the gradient of the expected metric, and how noisy is a single ranking? "
    "All rankings of 5 (6) items are enumerated, with random gains, under policies whose later choices depend on what "
    "stands above in several ways: `plackett-luce` (a logit for each item, of this standard deviation), `stepwise` "
    "(for each rank and item), `pairs` (and for each pair of an item and one that stands above it, of this standard "
    "deviation), `prefixes` (for each prefix and item), and `trigger`, where an item of gain 0 at the first rank makes "
    "the policy order the others well. Means and spreads of groups are those of endless groups.",
    parts=(
        Part(
            "estimator",
            datasets=("none",),
            axes={"items": {"5": {"size": 5}, "6": {"size": 6}}, "policy": _POLICIES},
            start={"instances": 10, "metrics": list(_OBJECTIVES)},
            without=({"items": "6", "policy": tuple(p for p in _POLICIES if p not in ("pairs, 1", "prefixes, 1"))},),
            short_axes={"items": ("5",), "policy": ("pairs, 1", "trigger, 5")},
            short_start={"instances": 2, "metrics": ["ndcg@3"]},
        ),
    ),
    tables=tuple(
        Table(
            f"{measure}_{objective.replace('@', '_at_')}_{items}",
            f"{title}, {objective}, {items} items",
            "credit",
            ("policy",),
            measure,
            base,
            where={"objective": objective, "items": items},
            only_means=not base,
        )
        for items in ("5", "6")
        for objective in _OBJECTIVES
        for measure, title, base in (
            ("cosine", "Cosine with the true gradient", ""),
            ("sign_errors", "Parameters moved the wrong way", ""),
            ("bias", "Bias, relative to the gradient", ""),
            ("snr", "Signal-to-noise ratio of one ranking", ""),
            ("error", "Error of the mean of 64 rankings, relative to the gradient", "all_actions"),
        )
    ),
)
