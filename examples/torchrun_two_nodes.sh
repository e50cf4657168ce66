#!/usr/bin/env bash
# Train on two nodes with torchrun: run this on each of them, with the same RDZV (the first node and a free port).
#   RDZV=node1:29500 examples/torchrun_two_nodes.sh [FLAGS OF bnfctl train]
set -euo pipefail

MODEL=${MODEL:-meta-llama/Meta-Llama-3-8B-Instruct}
NODES=${NODES:-2}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
RDZV=${RDZV:?the first node and a free port, e.g. RDZV=node1:29500}
RDZV_ID=${RDZV_ID:-bnfctl}

# Where all nodes see it.  The hub's cache may be shared (HF_HOME) or each node's own.
export BNFCTL_HOME=${BNFCTL_HOME:-$PWD/artifacts}

exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS_PER_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "$RDZV_ID" \
    --module bnfctl train --model "$MODEL" --loss bnf "$@"
