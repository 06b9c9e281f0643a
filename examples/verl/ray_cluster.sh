#!/usr/bin/env bash
# A Ray cluster for examples/verl/run.sh. On every machine: the same environment at the same path, and this repository,
# the data and the model in a folder that all machines share.
#
#   examples/verl/ray_cluster.sh head                        on the first machine
#   examples/verl/ray_cluster.sh worker HEAD_ADDRESS         on each of the others
#   NODES=2 GPUS=8 examples/verl/ray_cluster.sh train [key=value ..]      on the first, when all have joined
#   examples/verl/ray_cluster.sh stop                        on every machine, at the end
#
# PORT (6379) is the head's. Under Slurm, srun starts "head" and "worker" on the nodes of an allocation.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
port="${PORT:-6379}"
case "${1:-}" in
head)
    exec ray start --head --port "$port"
    ;;
worker)
    exec ray start --address "${2:?the address of the first machine}:$port"
    ;;
train)
    shift
    nodes="${NODES:?the number of machines}"
    gpus="${GPUS:?the number of GPUs of each}"
    # verl joins the running cluster; without this it would start one of its own on this machine.
    export RAY_ADDRESS="${RAY_ADDRESS:-127.0.0.1:$port}"
    exec "$here/run.sh" trainer.nnodes="$nodes" trainer.n_gpus_per_node="$gpus" "$@"
    ;;
stop)
    exec ray stop
    ;;
*)
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
