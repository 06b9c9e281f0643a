"""The agent loop through which item rewards enter verl: one response to one prompt, each of its items rewarded.

Named in the file of ``actor_rollout_ref.rollout.agent.agent_loop_config_path``, which holds its options too; see
examples/verl/agent_loop.yaml.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from flexrec.integrations.responses import OPTIONS, score_of, score_responses
from flexrec.integrations.verl import pack_token_rewards


class RankingOutput(AgentLoopOutput):
    """A response with token rewards of :func:`flexrec.integrations.verl.pack_token_rewards`."""

    token_rewards: list[float]

    def as_dict(self) -> dict[str, Any]:
        """verl's own, with ``rm_scores`` of every token where it has one number at the last."""
        output = super().as_dict()
        output["rm_scores"] = torch.tensor(output.pop("token_rewards"), dtype=torch.float32)
        return output


class RankingAgentLoop(SingleTurnAgentLoop):
    """verl's single-turn agent loop with a reward for every item of the response.

    Args:
        args, kwargs: what verl passes to an agent loop, and options of
            :func:`flexrec.integrations.responses.score_texts`: metric, credit, separator, num_ranked, reasoning_end,
            invalid.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        super().__init__(*args, **kwargs)
        self.score = partial(score_responses, self.tokenizer, **options)

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> RankingOutput:
        """Generate and reward; ``kwargs`` are the fields of the data row, ``reward_model`` among them.

        The output's score is the metric, which validation reports as "acc"; the sum of its token rewards is that of
        the item rewards.
        """
        output = await super().run(sampling_params, **kwargs)
        ground_truth = kwargs["reward_model"]["ground_truth"]
        score = partial(self.score, [output.response_ids], [ground_truth])
        scored = await self.loop.run_in_executor(None, score)
        completions = scored.completions
        rewards = pack_token_rewards(completions.item_rewards, scored.item_ids, completions.variance)
        info = score_of(completions, 0)
        fields = {name: getattr(output, name) for name in output.model_fields_set}
        fields["extra_fields"] = {**output.extra_fields, "reward_extra_info": info}
        fields["reward_score"] = info["score"]
        return RankingOutput(**fields, token_rewards=rewards[0].tolist())
