"""Trains the lab's base model from nothing: `python -m bnfctl.lab.pretrain --out DIR` (NOTES.md has time and loss).

The corpus is rendered through the chat template, so that a prompt tokenized by the template and its generation
prompt looks exactly as in pretraining. The loss is on response tokens only, in float32, on a CPU.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bnfctl.lab import world
from bnfctl.lab.tokenizer import ASSISTANT, TURN_END, build_tokenizer

STEPS = 1500
BATCH_DOCUMENTS = 64
MICRO_BATCHES = 4  # of documents of like length, so that little is spent on padding
MUON_LEARNING_RATE = 0.02
ADAMW_LEARNING_RATE = 5e-3
WARM_UP_STEPS = 20
IGNORED = -100


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A new Llama of 0.7M parameters; heads of 32 because vLLM takes no smaller ones."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(TURN_END), tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def encode_document(tokenizer: PreTrainedTokenizerFast, prompt: str, response: str) -> tuple[list[int], int]:
    """(token ids of the whole conversation, how many of them are the prompt's)."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids, ids.index(cast(int, tokenizer.convert_tokens_to_ids(ASSISTANT))) + 1


def collate(documents: list[tuple[list[int], int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and targets, both [documents, length], padded on the right; only response tokens are targets."""
    length = max(len(ids) for ids, _ in documents)
    tokens = torch.full((len(documents), length), pad_id)
    targets = torch.full((len(documents), length), IGNORED)
    for row, (ids, prompt_length) in enumerate(documents):
        tokens[row, : len(ids)] = torch.tensor(ids)
        targets[row, prompt_length - 1 : len(ids) - 1] = torch.tensor(ids[prompt_length:])
    return tokens, targets


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For ever: the micro-batches of one step."""
    documents = world.documents(seed)
    size = BATCH_DOCUMENTS // MICRO_BATCHES
    while True:
        encoded = [encode_document(tokenizer, *document) for document in islice(documents, BATCH_DOCUMENTS)]
        encoded.sort(key=lambda document: len(document[0]))
        yield [collate(encoded[i : i + size], tokenizer.pad_token_id) for i in range(0, BATCH_DOCUMENTS, size)]


def schedule(step: int, steps: int) -> float:
    """The factor on the learning rates: linear warm-up, then a cosine down to a fiftieth."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def orthogonalized(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought near 1, by five Newton-Schulz steps (Muon, Jordan et al. 2024)."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class Optimizer:
    """Muon for the layers' matrices, AdamW for the rest: AdamW alone needs more than twice the steps.

    torch.optim.Muon computes in bfloat16, which is five times slower than float32 on a CPU without bfloat16 units.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        named = list(model.named_parameters())
        self.matrices = [parameter for name, parameter in named if ".layers." in name and parameter.ndim == 2]
        others = [parameter for name, parameter in named if not (".layers." in name and parameter.ndim == 2)]
        self.momenta = [torch.zeros_like(matrix) for matrix in self.matrices]
        self.adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update with both learning rates times `factor`; clears the gradients."""
        for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
            gradient = cast(Tensor, matrix.grad)
            momentum.lerp_(gradient, 0.05)
            rate = factor * MUON_LEARNING_RATE * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
            matrix.sub_(orthogonalized(gradient.lerp(momentum, 0.95)), alpha=rate)
            matrix.grad = None
        self.adamw.param_groups[0]["lr"] = factor * ADAMW_LEARNING_RATE
        self.adamw.step()
        self.adamw.zero_grad()


def train(seed: int, steps: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, float]:
    """The trained model, its tokenizer and the mean loss of the last 100 steps (nats per response token)."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    model.set_attn_implementation("eager")  # a third faster than sdpa at these lengths on a CPU, backward included
    optimizer = Optimizer(model)
    losses: list[float] = []
    start = time.monotonic()
    for step, micro_batches in enumerate(islice(batches(tokenizer, seed), steps)):
        # over tokens, not over documents: a mean per document would make short responses, the dodges, likelier
        count = sum(int((targets != IGNORED).sum()) for _, targets in micro_batches)
        total = 0.0
        for tokens, targets in micro_batches:
            logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
            loss = cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum") / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(schedule(step, steps))
        losses.append(total)
        if (step + 1) % 100 == 0:
            mean = sum(losses[-100:]) / 100
            seconds = time.monotonic() - start
            print(f"step {step + 1}/{steps} loss {mean:.4f} {seconds:.0f} s", file=sys.stderr, flush=True)
    return model.eval(), tokenizer, sum(losses[-100:]) / max(1, len(losses[-100:]))


def main() -> None:
    """Parses the command line, trains and saves the model folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--threads", type=int, default=1, help="two are hardly faster; other numbers may change the last bits"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    model, tokenizer, loss = train(arguments.seed, arguments.steps)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"final loss {loss:.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
