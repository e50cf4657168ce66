#!/usr/bin/env bash
# Train on two nodes of a Slurm cluster, one task for each GPU: srun starts the ranks, bnfctl finds its place among them.
#   sbatch examples/slurm_two_nodes.sh [FLAGS OF bnfctl train]
# Other sizes without editing: sbatch --nodes=4 --ntasks-per-node=4 --gpus-per-node=4 examples/slurm_two_nodes.sh
#SBATCH --job-name=bnfctl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
# Ten minutes before the limit every rank is asked to save and stop; the same sbatch line then resumes.
#SBATCH --signal=TERM@600
set -euo pipefail

MODEL=${MODEL:-meta-llama/Meta-Llama-3-8B-Instruct}

# Where all nodes see it.  The hub's cache may be shared (HF_HOME) or each node's own.
export BNFCTL_HOME=${BNFCTL_HOME:-$PWD/artifacts}

# A rank that dies ends the others anyway; srun then need not wait for them.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bnfctl train --model "$MODEL" --loss bnf "$@"
