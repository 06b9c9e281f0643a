"""What a run keeps for people to look at, beside its metrics: users' lists under every need, answers without a
constraint, how far the critic can be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from flexrec.data.lists import Catalogue, RankingDataset, RankingList
from flexrec.evaluation.critic import critic_reliability
from flexrec.evaluation.evaluate import Evaluation
from flexrec.evaluation.statistics import bootstrap_interval, headline_of
from flexrec.rankings.state import parse_rankings
from flexrec.task.examples import Example, RankingTask, prompts_and_candidates
from flexrec.task.prompts import PromptBuilder

USERS, TOP, LATEST = 3, 10, 12  # whose lists are kept, how much of them, and of their history
MAX_ANSWERS = 32  # a language model takes seconds for each


def shown_of_run(model: Any, task: RankingTask, dataset: RankingDataset, num_ranked: int | None) -> dict[str, Any]:
    """What report.json holds of a trained model and its critic: "users", "answers" and "critic"."""
    shown: dict[str, Any] = {"users": side_by_side(model, task, dataset, num_ranked=num_ranked)}
    # A model of described items, or of scores, chooses among candidates only: it writes no text that could be wrong.
    if not task.builder.described and task.builder.encoding != "score":
        lists = dataset.test[:MAX_ANSWERS]
        asked = [task.test_example(lst, task.needs[n % len(task.needs)]) for n, lst in enumerate(lists)]
        shown["answers"] = free_answers(model, asked, task.builder, num_ranked=num_ranked)
    if task.critic is not None:
        shown["critic"] = critic_reliability(task.critic, dataset.test)
    return shown


def side_by_side(
    model: Any, task: RankingTask, dataset: RankingDataset, *, num_ranked: int | None = None
) -> list[dict[str, Any]]:
    """The first test lists of the first test users, nobody chosen, as ``model`` ranks them under every need.

    Returns:
        of each the "user", the "query" if there is one, the "history" (its latest items, the latest last, each with
        "title", "topics", "liked": None where that is not known) and by need the "metric" it is measured by, its
        "value", the "best" items that there were, and the "ranking": the first items with "title", "topics" and "gain".
    """
    first: dict[int, RankingList] = {}
    for lst in dataset.test:
        if len(first) < USERS:
            first.setdefault(lst.user, lst)
    lists, catalogue = list(first.values()), task.catalogue
    ids = dataset.user_ids
    found: list[dict[str, Any]] = [
        {
            "user": str(lst.user) if ids is None else ids[lst.user],
            "query": lst.query,
            "history": _history(lst, catalogue),
            "needs": {},
        }
        for lst in lists
    ]
    for need in task.needs:
        examples = [task.test_example(lst, need) for lst in lists]
        evaluation = Evaluation({need.name: examples}, task.builder, num_ranked)
        rankings = evaluation.rank(model, examples)
        values = evaluation.of_rankings({need.name: rankings})[need.name]
        metric = headline_of(values)
        shown = zip(found, lists, examples, rankings, values[metric], strict=True)
        for of_user, lst, example, ranking, value in shown:
            best = np.argsort(-example.gains, kind="stable")
            of_user["needs"][need.name] = {
                "wording": need.wordings[0],
                "metric": metric,
                "value": round(float(value), 4),
                "ranking": [_item(catalogue, lst, example, k) for k in ranking[:TOP].tolist()],
                "best": [_item(catalogue, lst, example, k) for k in best[:TOP].tolist()],
            }
    return found


def _item(catalogue: Catalogue, lst: RankingList, example: Example, k: int) -> dict[str, Any]:
    item = int(lst.candidates[k])
    return {
        "id": catalogue.ids[item],
        "title": catalogue.titles[item],
        "topics": list(catalogue.topics[item]),
        "gain": round(float(example.gains[k]), 4),
    }


def _history(lst: RankingList, catalogue: Catalogue) -> list[dict[str, Any]]:
    interest = np.full(len(lst.history), np.nan) if lst.history_interest is None else lst.history_interest
    return [
        {
            "title": catalogue.titles[item],
            "topics": list(catalogue.topics[item]),
            "liked": None if np.isnan(how) else bool(how >= 0.5),
        }
        for item, how in zip(lst.history[-LATEST:].tolist(), interest[-LATEST:].tolist(), strict=True)
    ]


@torch.no_grad()
def free_answers(
    model: Any, examples: Sequence[Example], builder: PromptBuilder, *, num_ranked: int | None = None
) -> dict[str, float]:
    """How well ``model`` keeps to the form of an answer when nothing makes it: greedily, token by token.

    Returns:
        "answers", how many there are; "valid", the share that are rankings exactly as they stand; means over answers of
        "missing", the share of ranks that the repair had to fill, and of "repeated" and "unknown", how many mentions
        are so.
    """
    if not examples:
        return {"answers": 0}
    prompts, candidates = prompts_and_candidates(examples)
    plain: Any = candidates  # tokens that are no descriptions
    ranks = [min(num_ranked or len(of_list), len(of_list)) for of_list in candidates]
    limit = max(
        sum(sorted(map(len, of_list))[-shown:]) + shown * len(builder.separator) + len(builder.end)
        for of_list, shown in zip(candidates, ranks, strict=True)
    )
    width = max(map(len, prompts))
    end = builder.end[-1] if builder.end else int(builder.tokenizer.pad_token_id or 0)
    ids = torch.full((len(prompts), width), end, device=model.device)
    mask = torch.zeros_like(ids)
    for n, prompt in enumerate(prompts):
        ids[n, width - len(prompt) :] = torch.tensor(prompt, device=model.device)
        mask[n, width - len(prompt) :] = 1
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )
    # What follows the end is padding. Where nothing ends an answer, items are single tokens.
    answers = [
        row[: row.index(end) + 1 if builder.end and end in row else limit if builder.end else shown]
        for row, shown in zip(written[:, width:].tolist(), ranks, strict=True)
    ]
    parsed = parse_rankings(answers, plain, separator=builder.separator, end=builder.end, num_ranked=np.array(ranks))
    return {
        "answers": len(answers),
        "valid": round(float(parsed.valid.mean()), 4),
        "missing": round(float((parsed.missing / np.array(ranks)).mean()), 4),
        "repeated": round(float(parsed.repeated.mean()), 4),
        "unknown": round(float(parsed.unknown.mean()), 4),
    }


def intervals_of(
    values: Mapping[str, Mapping[str, np.ndarray]], users: np.ndarray
) -> dict[str, dict[str, tuple[float, float]]]:
    """need -> metric -> 95 % interval over users, of what each need is compared by: a point of the curves."""
    headlines = {need: headline_of(metrics) for need, metrics in values.items()}
    return {
        need: {metric: bootstrap_interval(values[need][metric], clusters=users)}
        for need, metric in headlines.items()
        if metric in values[need]
    }
