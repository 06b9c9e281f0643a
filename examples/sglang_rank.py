"""Rankings from SGLang: films for a user, ranked by any causal language model, every answer a permutation.

    python examples/sglang_rank.py --model Qwen/Qwen2.5-0.5B-Instruct
    python examples/sglang_rank.py --model Qwen/Qwen3-0.6B --think 256        reasons first, in at most 256 tokens

Needs SGLang, and a GPU that it runs on; see docs/sglang.md.
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
    if find_spec("sglang") is None:
        parser.exit(1, "This example needs SGLang, which is not installed: pip install sglang\n")

    # Here, because processes that SGLang starts import this file too.
    import sglang
    from transformers import AutoTokenizer

    from flexrec.integrations.sglang import RankingRequest, ranking_arguments
    from flexrec.task import Item, PromptBuilder, get_need

    engine = sglang.Engine(
        model_path=options.model,
        context_length=options.max_model_len,
        enable_custom_logit_processor=True,
        disable_overlap_schedule=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
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
    answers = engine.generate(input_ids=[prompt] * options.generations, **ranking_arguments(request, temperature=0.7))
    for answer in answers:
        print()
        print(answer["text"])
        for rank, candidate in enumerate(request.ranking(answer["output_ids"]), start=1):
            print(f"{rank:4d}. {CANDIDATES[candidate]}")
    engine.shutdown()


if __name__ == "__main__":
    main()
