"""Rankings from vLLM: films for a user, ranked by any causal language model, every answer a permutation.

    python examples/vllm_rank.py --model Qwen/Qwen2.5-0.5B-Instruct
    python examples/vllm_rank.py --model Qwen/Qwen3-0.6B --think 256        reasons first, in at most 256 tokens

Needs vLLM. On a CPU also VLLM_WORKER_MULTIPROC_METHOD=spawn in the environment; see docs/vllm.md.
"""

import argparse
from importlib.util import find_spec

HISTORY = ["Alien (1979)", "Blade Runner (1982)", "The Terminator (1984)"]
CANDIDATES = [
    *("Toy Story (1995)", "Aliens (1986)", "Casablanca (1942)", "RoboCop (1987)", "Notting Hill (1999)"),
    *("Total Recall (1990)", "Shakespeare in Love (1998)", "The Matrix (1999)", "Babe (1995)", "Predator (1987)"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of a causal language model")
    parser.add_argument("--think", type=int, help="let the model reason before it ranks, in at most so many tokens")
    parser.add_argument("--generations", type=int, default=3, help="rankings to sample")
    parser.add_argument("--max-model-len", type=int, default=2048)
    options = parser.parse_args()
    if find_spec("vllm") is None:
        parser.exit(1, "This example needs vLLM, which is not installed: .venv/bin/pip install -e '.[vllm]'\n")

    # Here, because processes that vLLM starts import this file too, and must not import FlexRec before they are ready.
    from vllm import LLM, SamplingParams

    from flexrec.integrations.vllm_request import RankingRequest
    from flexrec.task import Item, PromptBuilder, get_need

    llm = LLM(
        options.model,
        logits_processors=["flexrec.integrations.vllm:RankingLogitsProcessor"],
        max_model_len=options.max_model_len,
    )
    tokenizer = llm.get_tokenizer()
    builder = PromptBuilder(tokenizer, encoding="index", show_rising=False)
    history, candidates = ([Item(title, title) for title in titles] for titles in (HISTORY, CANDIDATES))
    prompt, _ = builder.prompt(get_need("interest").wordings[0], history, candidates)

    marker = tokenizer.encode("</think>\n\n", add_special_tokens=False) if options.think is not None else None
    request = RankingRequest(
        builder.candidate_tokens(candidates),
        separator=builder.separator,
        end=builder.end,
        reasoning_end=marker,
        max_reasoning_tokens=options.think,
    )
    params = SamplingParams(
        n=options.generations, temperature=0.7, max_tokens=request.max_tokens, extra_args=request.extra_args
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params)
    for completion in output.outputs:
        print()
        print(completion.text)
        for rank, candidate in enumerate(request.ranking(completion.token_ids), start=1):
            print(f"{rank:4d}. {CANDIDATES[candidate]}")


if __name__ == "__main__":
    main()
