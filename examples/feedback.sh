#!/usr/bin/env bash
# Thumbs up and thumbs down, as users leave them: no pairs, several responses or one per prompt.  BNF trains on them as
# they are.
#   examples/feedback.sh [MODEL] [FEEDBACK] [LIMIT]      FEEDBACK: rows of prompt, response, label (JSONL, Parquet, CSV)
# Where there is no FEEDBACK it makes a log of LIMIT prompts first: the embedded model answers prompts of its own world,
# and each response gets a thumb by itself, from a verifier in the place of the user.
set -euo pipefail

MODEL=${1:-lab}
FEEDBACK=${2:-feedback.jsonl}
LIMIT=${3:-40}

if [ ! -e "$FEEDBACK" ]; then
  echo "no $FEEDBACK: making one from lab:chat" >&2
  RESPONSES=$(bnfctl generate --model "$MODEL" --prompts lab:chat --limit "$LIMIT" --n 2 --max-tokens 100 --sampler hf)
  REWARDS=$(bnfctl score "$RESPONSES" --scorer rules --rule lab)
  THUMBS=$(bnfctl build "$REWARDS" --choose threshold --scope global --good 0.7 --bad 0.3)
  bnfctl export "$THUMBS" "$FEEDBACK" --format unpaired
fi

RECORDS=$(bnfctl build "$FEEDBACK" --test-fraction 0.1)
bnfctl show "$RECORDS" >&2
bnfctl train --model "$MODEL" --data "$RECORDS" --loss bnf --batch-size 16
