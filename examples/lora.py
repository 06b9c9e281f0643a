"""LoRA in a script of one's own: supervision, then reinforcement of the adapters, with the model as its own reference.

    python examples/lora.py --output runs/lora              a minute on two CPU cores: a small model made from the data
    python examples/lora.py --model MODEL --prompts 4 --output runs/lora        a causal language model's name or folder

Needs `.venv/bin/pip install -e '.[peft]'`. The folder of --output gets the adapters, and under "merged" a whole model.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from flexrec.data import simulate
from flexrec.evaluation.evaluate import Evaluation
from flexrec.policy.lora import BACKBONE, add_lora
from flexrec.policy.small_model import build_model, build_tokenizer, item_vectors, starting_rows
from flexrec.task import PromptBuilder, RankingTask, TrainingExamples, get_need, item_token
from flexrec.trainer import FlexRecConfig, FlexRecTrainer, SupervisedTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", required=True)
parser.add_argument("--model", help="default: a small model made from the data")
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--steps", type=int, default=40, help="of reinforcement, after half as many of supervision")
parser.add_argument("--prompts", type=int, default=64, help="in a step")
parser.add_argument("--learning-rate", type=float, default=2e-3)
options = parser.parse_args()
set_seed(0)

data = simulate(num_users=500, num_items=200, num_topics=8, num_candidates=12, num_test_users=100, observed_share=1.0)
need = get_need("interest")
if options.model:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    builder, rows = PromptBuilder(tokenizer, encoding="index", show_rising=False), []
else:
    tokenizer = build_tokenizer(data.catalogue, need.wordings)
    vectors = item_vectors(data.log, len(data.catalogue), 64)
    model = build_model(tokenizer, rows=starting_rows(data.catalogue, vectors), hidden_size=64, num_layers=2)
    model.save_pretrained(Path(options.output) / BACKBONE)  # adapters refer to their model, and this one has no name
    model = AutoModelForCausalLM.from_pretrained(Path(options.output) / BACKBONE)
    builder = PromptBuilder(tokenizer, encoding="item_token", show_titles=False, show_rising=False)
    rows = tokenizer.convert_tokens_to_ids([item_token(i) for i in data.catalogue.ids])

model = add_lora(model, options.rank, token_ids=rows)
model.print_trainable_parameters()

task = RankingTask(data.catalogue, [need], builder)
examples = TrainingExamples(task, data.train)
evaluate = Evaluation({need.name: [task.test_example(lst, need) for lst in data.test]}, builder, None)
common = {
    "output_dir": options.output,
    "per_device_train_batch_size": options.prompts,
    "learning_rate": options.learning_rate,
    "lr_scheduler_type": "cosine",
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 5,
    "remove_unused_columns": False,
    "disable_tqdm": True,
}
answer = {"separator": builder.separator, "end": builder.end}


def show(when: str) -> None:
    print(f"test users, {when}: ndcg@5 {evaluate(model, when)[need.name]['ndcg@5'].mean():.3f}", flush=True)


show("before")
warm_up = TrainingArguments(**common, max_steps=max(1, options.steps // 2))
SupervisedTrainer(model, warm_up, examples, stage="listwise", **answer).train()
show("after supervision")
# The KL is to the policy as it is now: the trainer keeps a copy of the adapters, and no second model.
reinforcement = FlexRecConfig(**common, max_steps=options.steps, metric="ndcg@10", temperature=0.5, beta=0.01)
FlexRecTrainer(model, reinforcement, examples, **answer).train()
show("after reinforcement")

model.save_pretrained(options.output, selected_adapters=["default"], save_embedding_layers=False)
tokenizer.save_pretrained(options.output)
model.merge_and_unload().save_pretrained(Path(options.output) / "merged")
tokenizer.save_pretrained(Path(options.output) / "merged")
