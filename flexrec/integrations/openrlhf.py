"""FlexRec in OpenRLHF: a reward for ``--reward.remote_url``, and item-level advantages for an experience maker.

OpenRLHF takes one number for a response and has no registry of advantage estimators or losses. The reward below is
therefore the metric; :func:`set_item_advantages` gives every item its own where one can call it. See docs/openrlhf.md
for what that leaves out. This module needs no OpenRLHF.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flexrec.checks import check_choice
from flexrec.integrations.responses import GroundTruth, score_of, score_responses, score_texts
from flexrec.ops.advantages import item_advantages, uncertainty_weights
from flexrec.rankings.text import item_values_to_tokens

ENDINGS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<eos>", "<pad>")

# A truncated prompt is recognised by so many characters of its end, which hold what opens the answer and some before.
_TAIL = 64


class MetricReward:
    """``reward_func`` of a file for ``--reward.remote_url``: the metric of the ranking that a response is read as.

    Args:
        endings: text that a response may end with and that is no part of it, end-of-sequence and padding tokens.
        options: of :func:`flexrec.integrations.responses.score_texts`: metric, separator, num_ranked, reasoning_end,
            invalid.

    Raises:
        ValueError, TypeError: an unknown metric; when called, a query that does not begin with its prompt, and as
            ``score_texts``. OpenRLHF logs what is raised at level INFO and goes on without a reward.
    """

    def __init__(self, *, endings: Sequence[str] = ENDINGS, **options: Any) -> None:
        score_texts(["[1]"], [{"gains": [1.0]}], **options)  # what is wrong with options is said before training
        self.endings, self.options = tuple(filter(None, endings)), options

    def __call__(
        self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[GroundTruth]
    ) -> dict[str, torch.Tensor | dict[str, torch.Tensor]]:
        """Called by OpenRLHF with N prompts, N queries (a prompt and its response) and N labels, the ground truths.

        Returns:
            "rewards" and "scores", (N,) float32, the metric; "extra_logs", (N,) each: valid, repeated, missing and
            unknown of the parser.
        """
        if not len(queries) == len(prompts) == len(labels):
            raise ValueError(
                f"queries, prompts and labels must have the same length, got {len(queries)}, {len(prompts)} and "
                f"{len(labels)}"
            )
        answers = [
            self._answer(query, prompt, i) for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True))
        ]
        scored = score_texts(answers, labels, **self.options)
        rows = [score_of(scored, row) for row in range(len(answers))]
        logs = {name: torch.tensor([row[name] for row in rows]) for name in ("valid", "repeated", "missing", "unknown")}
        return {"rewards": scored.metric, "scores": scored.metric.clone(), "extra_logs": logs}

    def _answer(self, query: str, prompt: str, index: int) -> str:
        tail = prompt[-_TAIL:]
        start = query.find(prompt)
        if start >= 0:
            answer = query[start + len(prompt) :]
        elif tail and tail in query:  # the prompt was truncated, on the left
            answer = query[query.index(tail) + len(tail) :]
        else:
            raise ValueError(f"queries[{index}] does not contain its prompt, nor the end of it, {tail!r}")
        while answer.endswith(self.endings):
            answer = min((answer.removesuffix(ending) for ending in self.endings), key=len)
        return answer


def set_item_advantages(
    experiences: Sequence[Any],
    tokenizer: Any,
    n_samples_per_prompt: int,
    *,
    baseline: str = "none",
    scale: str = "batch",
    uncertainty: str = "rollout",
    **options: Any,
) -> Sequence[Any]:
    """Replace the ``advantages`` of OpenRLHF's experiences by those of the ranked items, at all of their tokens.

    For the end of ``RemoteExperienceMaker.compute_advantages_and_returns``. The labels of the experiences are the
    ground truths; tokens of no item get 0.

    Args:
        experiences: with sequences (B, T), action_mask (B, T - 1), index, labels and info.
        tokenizer: the policy's.
        n_samples_per_prompt: as ``--rollout.n_samples_per_prompt``; responses of one prompt are adjacent by index.
        baseline, scale: of :func:`flexrec.item_advantages`.
        uncertainty: "rollout" weighs responses by :func:`flexrec.uncertainty_weights` where labels have a
            gain_variance; "none".
        options: of :func:`flexrec.integrations.responses.score_texts`.

    Returns:
        ``experiences``, changed.

    Raises:
        ValueError, TypeError: as the functions named; a divergence in the rewards, which would be lost.
    """
    check_choice("uncertainty", uncertainty, ("none", "rollout"))
    for experience in experiences:
        divergence = experience.info.get("kl")
        if experience.base_action_log_probs is None and divergence is not None and bool((divergence != 0).any()):
            raise ValueError(
                "the divergence from the reference is in the rewards, which item advantages replace: "
                "use --algo.kl.use_loss, or --algo.kl.init_coef 0"
            )
    where = [(experience, row) for experience in experiences for row in range(len(experience.sequences))]
    by_index = sorted(where, key=lambda at: at[0].index[at[1]])
    masks = [experience.action_mask[row].bool() for experience, row in by_index]
    responses = [e.sequences[row, 1:][mask].tolist() for (e, row), mask in zip(by_index, masks, strict=True)]
    scored = score_responses(tokenizer, responses, [e.labels[row] for e, row in by_index], **options)
    rewards, variance = scored.completions.item_rewards, scored.completions.variance

    counts = scored.item_ids.max(1).values + 1 if scored.item_ids.shape[1] else scored.item_ids.new_zeros(len(masks))
    item_mask = torch.arange(rewards.shape[1]) < counts[:, None]  # (N, K)
    weights = None
    if variance is not None and uncertainty == "rollout":
        weights = uncertainty_weights(variance, n_samples_per_prompt, rewards=rewards, item_mask=item_mask)
    advantages = item_advantages(
        rewards, n_samples_per_prompt, baseline=baseline, scale=scale, item_mask=item_mask, weights=weights
    )
    per_token = item_values_to_tokens(advantages, scored.item_ids)

    for experience in experiences:
        experience.advantages = torch.zeros(experience.action_mask.shape, device=experience.action_mask.device)
    for (experience, row), mask, values in zip(by_index, masks, per_token, strict=True):
        experience.advantages[row, mask] = values[: int(mask.sum())].to(experience.advantages.device)
    return experiences
