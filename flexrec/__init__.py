"""FlexRec: post-train LLMs as recommenders."""
