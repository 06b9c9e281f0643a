"""Candidates of their own for every prompt that TRL gives to vLLM.

TRL generates a batch with one set of sampling parameters, and a ranking's candidates are among them. What TRL calls to
generate is therefore put behind an object that sets them for each prompt; nothing of TRL or vLLM is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from typing import Any

from accelerate.utils import gather_object

from flexrec.integrations.vllm_request import RankingRequest
from flexrec.rankings.state import Candidates, Spelling

PROCESSOR = "flexrec.integrations.vllm:RankingLogitsProcessor"
MAX_CONNECTIONS = 64


class _PerPrompt:
    """Stands before what generates, and is it in everything else."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.requests: dict[tuple[int, ...], RankingRequest] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def set_candidates(self, prompts: Sequence[Sequence[int]], candidates: Candidates, spelling: Spelling) -> None:
        """What the next prompts may rank; of every process, since one may generate for several.

        Raises:
            ValueError: two equal prompts with other candidates, which nothing tells apart when TRL passes them on.
        """
        self.requests = {}
        for prompt, names in gather_object(list(zip(prompts, candidates, strict=True))):
            known = self.requests.get(tuple(prompt))
            if known is None:
                request = RankingRequest(names, **spelling.of([names]))
                self.requests[tuple(prompt)] = request
            elif known.candidates != names:
                raise ValueError(
                    "two rows have the same prompt but other candidates, which cannot be told apart in vLLM: "
                    "name the candidates in the prompt"
                )


class PerPromptLLM(_PerPrompt):
    """Before the ``vllm.LLM`` of TRL's mode "colocate"."""

    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, **options: Any) -> Any:
        each = []
        for prompt in prompts:
            params = sampling_params.clone()
            own = self.requests[tuple(prompt["prompt_token_ids"])].extra_args
            params.extra_args = {**(params.extra_args or {}), **own}
            each.append(params)
        return self._engine.generate(prompts, sampling_params=each, **options)


class PerPromptClient(_PerPrompt):
    """Before the client of TRL's mode "server": a request for each prompt, all at once, for the server to batch."""

    def generate(
        self, prompts: list[list[int]], generation_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        def send(prompt: list[int]) -> dict[str, Any]:
            own = {**(generation_kwargs or {}), "vllm_xargs": self.requests[tuple(prompt)].vllm_xargs}
            return self._engine.generate(prompts=[prompt], generation_kwargs=own, **options)

        with ThreadPoolExecutor(max_workers=min(MAX_CONNECTIONS, len(prompts))) as pool:
            answers = list(pool.map(send, prompts))
        return {
            name: None if first is None else [value for answer in answers for value in answer[name]]
            for name, first in answers[0].items()
        }


def per_prompt(generation: Any) -> _PerPrompt:
    """Puts such an object before what TRL's ``VLLMGeneration`` generates with; returns it.

    Raises:
        ValueError: nothing would have vLLM load the processor that obeys these parameters.
    """
    if generation.mode == "colocate":
        if PROCESSOR not in [point.value for point in entry_points(group="vllm.logits_processors")]:
            raise ValueError(
                f"TRL starts vLLM without naming a logits processor, and no installed package has {PROCESSOR} as an "
                f"entry point of the group 'vllm.logits_processors': see docs/trl.md, or use vllm_mode='server'"
            )
        generation.llm = PerPromptLLM(generation.llm)
        return generation.llm
    # Only the main process has a client of the server; the others take part in gathering the candidates.
    client = PerPromptClient(getattr(generation, "vllm_client", None))
    generation.vllm_client = client
    return client
