#!/usr/bin/env bash
# Qwen2.5-3B-Instruct on the 4 GPUs of this machine with verl: data first, if there is none, then training.
#
#   DATASET=movielens DATA=ml-1m NEED=interest examples/verl/run.sh [key=value ..]
#
# Needs what docs/verl.md says under "Install". PYTHON chooses the interpreter, LISTS the folder of the prepared lists.
# On a cluster: examples/verl/ray_cluster.sh.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
dataset="${DATASET:-movielens}"
need="${NEED:-interest}"
lists="${LISTS:-$PWD/data/verl-$dataset-$need}"

if [ ! -e "$lists/train.parquet" ]; then
    "${PYTHON:-python}" "$here/prepare.py" --dataset "$dataset" ${DATA:+--data "$DATA"} --need "$need" --output "$lists"
fi
# An error in the plugin ends the run here; as a plugin alone it would be a line at debug level.
export VERL_USE_EXTERNAL_MODULES=flexrec.integrations.verl_plugin
exec "${PYTHON:-python}" -m verl.trainer.main_ppo --config-path "$here" --config-name qwen2_5_3b \
    data.train_files="$lists/train.parquet" data.val_files="$lists/test.parquet" \
    actor_rollout_ref.rollout.agent.agent_loop_config_path="$here/agent_loop.yaml" "$@"
