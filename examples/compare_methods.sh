#!/usr/bin/env bash
# Compares losses as the paper does: the same pairs, several seeds, one base model; one page at the end.
#   examples/compare_methods.sh [MODEL] [PROMPTS] [LIMIT] [FOLDER] [LOSSES] [SEEDS]
# With the defaults it compares BNF with DPO on the embedded model, two seeds each, in about five minutes on a CPU.
set -euo pipefail

MODEL=${1:-lab}
PROMPTS=${2:-lab:chat}
LIMIT=${3:-300}
FOLDER=${4:-reports/comparison}
LOSSES=${5:-bnf dpo}
SEEDS=${6:-0 1}
TASKS=lab-chat,lab-reasoning

RESPONSES=$(bnfctl generate --model "$MODEL" --prompts "$PROMPTS" --limit "$LIMIT" --max-tokens 100)
REWARDS=$(bnfctl score "$RESPONSES" --scorer rules --rule lab)
PAIRS=$(bnfctl build "$REWARDS")
BASE=$(bnfctl eval "$MODEL" --tasks "$TASKS" --limit "$LIMIT")

EVALS=("$BASE")
for LOSS in $LOSSES; do
  for SEED in $SEEDS; do
    TRAINED=$(bnfctl train --model "$MODEL" --data "$PAIRS" --loss "$LOSS" --seed "$SEED" --eval-every 5 --name "$LOSS-$SEED")
    EVALS+=("$(bnfctl eval "$TRAINED" --tasks "$TASKS,shifts" --base "$BASE" --limit "$LIMIT" --shift-prompts "$PROMPTS" \
      --shift-responses reference)")
  done
done

# Everything else (trainings, builds, responses) is found by lineage.
bnfctl report "${EVALS[@]}" -o "$FOLDER"
