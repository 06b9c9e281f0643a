"""TRL's GRPO with top-p, top-k or min-p, scored under what the tokens were sampled from; for any data and rewards.

Truncated sampling draws from a renormalised softmax over the tokens that it keeps. ``trl.GRPOTrainer`` scores them by a
softmax over all: the log-prob of every token lacks the log of the mass that was kept, which is in the ratios of an
engine's log-probs and TRL's, and in every gradient. Here the supports are kept from sampling to the loss, and policy,
old and reference log-probs are all of the distribution that was sampled from. See docs/replay.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
import trl
from accelerate.utils import broadcast_object_list
from packaging.version import Version
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig, GRPOTrainer

from flexrec.integrations.sampling_masks import SamplingSupport, SupportRecorder, from_vllm, joined
from flexrec.ops.vocabulary_logprobs import replay_logprobs
from flexrec.policy.lm_head import last_hidden, output_layer, soft_cap
from flexrec.policy.lora import causal_lm

__all__ = ["ReplayGRPOTrainer"]

# TRL returns the log-probs and entropies of tokens, and later versions the router's loss too.
_NUM_RETURNED = 3 if "compute_aux_loss" in signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters else 2
# What changes scores beyond a temperature and a cut: a support alone does not say what was sampled from.
_NO_TRUNCATION = {
    "repetition_penalty": (1.0, None),
    "encoder_repetition_penalty": (1.0, None),
    "presence_penalty": (0.0, None),
    "frequency_penalty": (0.0, None),
    "logit_bias": (None,),
    "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (1.0, None),
    "watermarking_config": (None,),
    "num_beams": (1, None),
    "do_sample": (True,),
}
MAX_CONNECTIONS = 64


class ReplayGRPOTrainer(GRPOTrainer):
    """``trl.GRPOTrainer`` whose log-probs are those of truncated sampling: give it the same arguments.

    With transformers' ``generate`` the supports are read behind its last processor. vLLM (from 0.28) returns them:
    "colocate" is started with ``return_sampling_mask=True``, a server has to be (``--return-sampling-mask
    --logprobs-mode processed_logprobs --enable-scale-out``); it wants ``top_k`` above 0. The log has
    ``sampling/ratio_outside``, the share of tokens whose probability in the trainer is not within 10 % of what it was
    to the sampler.

    Args:
        model, reward_funcs, args: those of ``trl.GRPOTrainer``, as are all others.
        replay: False scores with the whole vocabulary, as TRL does, and logs the same share: for comparison.

    Raises:
        ValueError: options under which a support does not say what was sampled from (penalties, biases, beams), or
            that this trainer does not take (tools, images, Liger's loss, sharded parameters); when training, a mask
            that is missing or does not fit its tokens.
    """

    def __init__(
        self, model: Any, reward_funcs: Any, args: GRPOConfig | None = None, *, replay: bool = True, **kwargs: Any
    ) -> None:
        if args is not None:
            _check_options(args)
        for name in ("tools", "rollout_func", "environment_factory"):
            if kwargs.get(name):
                raise ValueError(f"supports are recorded of one generation for each row: leave out {name}=")
        self._replay = replay
        self._supports: list[SamplingSupport] | None = None  # of the rows that are generated, scored or trained on
        with _returning_masks():
            super().__init__(model, reward_funcs, args, **kwargs)
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError("replay reads rows of the output layer, which FSDP and ZeRO-3 shard: use DDP")
        if (cap := soft_cap(self.accelerator.unwrap_model(self.model))) is not None:
            raise ValueError(f"the model caps its logits at {cap:g}, which replay does not: use a model without it")
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError("replay computes no router loss: set router_aux_loss_coef=0.0")
        self._recorder = SupportRecorder()
        if self.use_vllm:
            generation = self.vllm_generation
            name = "llm" if generation.mode == "colocate" else "vllm_client"
            self._engine = (_RecordedLLM if name == "llm" else _RecordedClient)(getattr(generation, name, None))
            setattr(generation, name, self._engine)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if not self.use_vllm:
            with self._recorder.of(causal_lm(self.accelerator.unwrap_model(self.model))):
                found = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            self._supports = self._recorder.supports(found[0])
            return found
        found = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        supports = self._engine.supports
        if self.vllm_generation.mode != "colocate":  # the main process has asked for everybody
            everybodys = [supports]
            broadcast_object_list(everybodys, from_process=0)
            start = self.accelerator.process_index * len(prompt_ids)
            supports = everybodys[0][start : start + len(prompt_ids)]
        self._supports = supports
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._supports = None
        output = super()._generate_and_score_completions(inputs)
        output["sampling_supports"] = self._supports
        return output

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self._supports = inputs["sampling_supports"]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **inputs: Any,
    ) -> Any:
        """Where TRL takes log-probs of policy, old and reference from: (B, logits_to_keep) log-probs and entropies."""
        given = [name for name, value in inputs.items() if value is not None]
        if given or compute_aux_loss:
            raise ValueError(f"replay is for text models without a router loss, got {', '.join(given) or 'one'}")
        assert self._supports is not None
        size = batch_size or len(input_ids)
        parts = []
        for start in range(0, len(input_ids), size):
            rows = slice(start, start + size)
            parts.append(
                self._replayed(model, input_ids[rows], attention_mask[rows], logits_to_keep, self._supports[rows])
            )
        logps, entropies = (torch.cat(values) for values in zip(*parts, strict=True))
        self._log_ratios(logps, attention_mask[:, -logits_to_keep:].bool(), self._supports)
        return (logps, entropies if compute_entropy else None, None)[:_NUM_RETURNED]

    def _replayed(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        keep: int,
        supports: Sequence[SamplingSupport],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, keep) log-probs and entropies of the completions' own tokens, 0 elsewhere."""
        with self.accelerator.autocast():
            hidden = last_hidden(model, input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        mask = attention_mask[:, -keep:].bool()  # (B, keep) TRL masks a whole completion that was cut off, if asked to
        lengths = mask.sum(1).tolist()
        for row, (length, support) in enumerate(zip(lengths, supports, strict=True)):
            if length not in (0, len(support)):
                raise ValueError(f"row {row} has {length} tokens to score, but a support of {len(support)} positions")
        own = [support for length, support in zip(lengths, supports, strict=True) if length]
        token_ids, offsets = joined(own, input_ids.device)
        if not self._replay:
            token_ids, offsets = token_ids[:0], torch.zeros_like(offsets)
        weight, bias = output_layer(model)
        found = replay_logprobs(
            hidden[:, -keep - 1 : -1][mask],  # (M, D)
            weight,
            token_ids,
            offsets,
            input_ids[:, -keep:][mask],
            bias=bias,
            temperature=self.temperature,
        )
        at = mask.nonzero(as_tuple=True)
        logps, entropies = (values.new_zeros(mask.shape).index_put(at, values).float() for values in found)
        return logps, entropies

    @torch.no_grad()
    def _log_ratios(self, logps: torch.Tensor, mask: torch.Tensor, supports: Sequence[SamplingSupport]) -> None:
        """How far the trainer's probabilities are from the sampler's; after a step the policy's move is in it too."""
        rows = [row for row, support in enumerate(supports) if support.logprobs is not None and bool(mask[row].any())]
        ratios = [(logps[row][mask[row]].cpu() - torch.from_numpy(supports[row].logprobs)).exp() for row in rows]
        outside = torch.cat([torch.zeros(0), *[((ratio < 0.9) | (ratio > 1.1)).float() for ratio in ratios]])
        counted = torch.stack([outside.sum(), torch.tensor(float(len(outside)))]).to(self.accelerator.device)
        total = self.accelerator.gather(counted[None]).sum(0)
        if total[1] > 0:
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["sampling/ratio_outside"].append(float(total[0] / total[1]))


class _Recorded:
    """Stands before what generates, keeps the supports of what it returns, and is it in everything else."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.supports: list[SamplingSupport] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class _RecordedLLM(_Recorded):
    """Before the ``vllm.LLM`` of TRL's mode "colocate"."""

    def generate(self, prompts: Any, *args: Any, **options: Any) -> Any:
        outputs = self._engine.generate(prompts, *args, **options)
        self.supports = from_vllm(outputs)
        return outputs


class _RecordedClient(_Recorded):
    """Before the client of TRL's mode "server": the same requests to the endpoint that returns masks.

    ``/v1/completions``, which TRL asks, does not say what was sampled from; ``/inference/v1/generate`` does.
    """

    def generate(
        self,
        prompts: list[list[int]],
        features: Any = None,
        *,
        structured_outputs_regex: str | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        **sampling_params: Any,
    ) -> dict[str, Any]:
        if features is not None:
            raise ValueError("replay is for text models, got image features")
        sampling_params["output_kind"] = 2  # the final output alone, with all of the prompt's completions
        if structured_outputs_regex is not None:
            sampling_params["structured_outputs"] = {"regex": structured_outputs_regex}
        sampling_params |= generation_kwargs or {}

        def send(prompt: list[int]) -> list[dict[str, Any]]:
            request = {"model": self._engine.model, "token_ids": prompt, "sampling_params": sampling_params}
            return self._engine._post(f"{self._engine.base_url}/inference/v1/generate", json=request)["choices"]

        with ThreadPoolExecutor(max_workers=min(MAX_CONNECTIONS, len(prompts))) as pool:
            choices = [choice for answer in pool.map(send, prompts) for choice in answer]
        outputs = [_Choice(choice) for choice in choices]
        self.supports = from_vllm(outputs)
        return {
            "prompt_ids": list(prompts),
            "completion_ids": [output.token_ids for output in outputs],
            "logprobs": [[[None if math.isnan(p) else p] for p in output.said] for output in outputs],
            "logprob_token_ids": [[[token] for token in output.token_ids] for output in outputs],
        }


class _Choice:
    """One completion of a server's answer, as ``vllm.CompletionOutput`` has it."""

    def __init__(self, choice: dict[str, Any]) -> None:
        self.token_ids, self.sampling_mask = choice["token_ids"], choice.get("sampling_mask")
        found = [position["logprob"] for position in choice["logprobs"]["content"]]  # of the sampled token
        self.said = [math.nan if p is None else float(p) for p in found]
        self.logprobs = [{t: SimpleNamespace(logprob=p)} for t, p in zip(self.token_ids, self.said, strict=True)]


@contextmanager
def _returning_masks() -> Iterator[None]:
    """Inside, TRL starts vLLM with masks: it has no option of its own for it."""
    module = sys.modules.get("trl.generation.vllm_generation")
    engine = getattr(module, "LLM", None)
    if engine is None:
        yield
        return
    module.LLM = partial(engine, return_sampling_mask=True)  # type: ignore[union-attr]
    try:
        yield
    finally:
        module.LLM = engine  # type: ignore[union-attr]


def _check_options(args: GRPOConfig) -> None:
    given = {"repetition_penalty": args.repetition_penalty, **(args.generation_kwargs or {})}
    for name, harmless in _NO_TRUNCATION.items():
        if name in given and given[name] not in harmless:
            raise ValueError(
                f"{name}={given[name]!r} changes scores and not only which tokens are left, so that a support does "
                f"not say what was sampled from: leave it at {harmless[0]!r}"
            )
    if given.get("temperature", args.temperature) != args.temperature:
        raise ValueError(f"set temperature in the config, where TRL reads it, not in generation_kwargs: {given}")
    for name in ("use_liger_kernel", "use_transformers_paged", "use_transformers_continuous_batching"):
        if getattr(args, name, False):
            raise ValueError(f"{name}=True goes past what supports are recorded by and scored with: leave it out")
    if args.use_vllm:
        if not args.top_k or args.top_k < 1:
            raise ValueError(f"vLLM returns sampling masks where top_k is above 0, which bounds them; got {args.top_k}")
        if args.vllm_mode == "server" and Version(trl.__version__) < Version("1.11"):
            raise ValueError(
                f"replay with vllm_mode='server' needs TRL 1.11 or newer, got {trl.__version__}: the server that this "
                f"version starts itself returns no masks"
            )
        if args.vllm_mode == "colocate" and args.vllm_tensor_parallel_size > 1:
            raise ValueError("replay with vllm_mode='colocate' needs vllm_tensor_parallel_size=1, or a server")
