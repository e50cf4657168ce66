#!/usr/bin/env bash
# The five stages as five commands, chained by the artifact path that each prints: no YAML needed.
#   examples/end_to_end.sh [MODEL] [PROMPTS] [LIMIT]
# With the defaults it aligns the embedded model on a few prompts of its own world, in about a minute.
set -euo pipefail

MODEL=${1:-lab}
PROMPTS=${2:-lab:chat}
LIMIT=${3:-40}

RESPONSES=$(bnfctl generate --model "$MODEL" --prompts "$PROMPTS" --limit "$LIMIT" --max-tokens 100 --sampler hf)
REWARDS=$(bnfctl score "$RESPONSES" --scorer rules --rule lab)
PAIRS=$(bnfctl build "$REWARDS")
ALIGNED=$(bnfctl train --model "$MODEL" --data "$PAIRS" --loss bnf --batch-size 8 --name aligned)

BASE=$(bnfctl eval "$MODEL" --tasks lab-chat,lab-reasoning --limit "$LIMIT" --sampler hf)
bnfctl eval "$ALIGNED" --tasks lab-chat,lab-reasoning --limit "$LIMIT" --sampler hf --base "$BASE"
