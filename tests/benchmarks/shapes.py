"""Random models and random preference data of a few shapes, made in a folder; no download.

Nothing here imports torch until a model is made: the parent process of a benchmark stays small, because a child's
peak memory starts from its parent's.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bnfctl.data.records import Record, Side

EOS, PAD = 1, 2
"""Token ids; 0 is unknown, text starts at 3."""
FIRST = 3


@dataclass(frozen=True)
class Shape:
    """A Llama and the data it is trained on."""

    hidden: int
    layers: int
    vocabulary: int
    intermediate: int
    heads: int
    kv_heads: int
    pairs: int
    prompt: int
    """Mean length in tokens; lengths are drawn evenly from half to one and a half times that."""
    response: int
    context: int
    tied: bool = False
    stored: str = "float32"

    @property
    def body_parameters(self) -> int:
        """Of the layers' matrices, the ones that cost 6 FLOPs a token in a training step."""
        head_size = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * head_size
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden


SHAPES = {
    "head-heavy": Shape(256, 4, 32_000, 1024, 4, 4, pairs=128, prompt=36, response=45, context=256),
    "body-heavy": Shape(512, 8, 8_000, 2048, 8, 8, pairs=64, prompt=36, response=45, context=256),
    "1b": Shape(
        2048, 16, 128_256, 8192, 32, 8, pairs=128, prompt=1024, response=1024, context=4096, tied=True,
        stored="bfloat16",
    ),
    "tiny": Shape(32, 2, 64, 64, 2, 2, pairs=8, prompt=6, response=7, context=64),
}  # fmt: skip
"""tiny is for the test of this script."""


def draw_records(shape: Shape, pairs: int, seed: int = 0) -> list[Record]:
    """Pairs of random ids with ragged lengths; every response ends with EOS, and has it nowhere else.

    The first records of a longer draw are those of a shorter one.
    """
    numbers = random.Random(seed)

    def ids(mean: int) -> list[int]:
        length = numbers.randint(max(1, mean // 2), mean + mean // 2)
        return [numbers.randrange(FIRST, shape.vocabulary) for _ in range(length)]

    def draw(index: int) -> Record:
        prompt, chosen, rejected = ids(shape.prompt), ids(shape.response - 1), ids(shape.response - 1)
        return Record(f"r{index:06d}", prompt, (Side(1, [*chosen, EOS]), Side(-1, [*rejected, EOS])))

    return [draw(index) for index in range(pairs)]


@dataclass(frozen=True)
class Counts:
    """What one pass over the records costs any trainer."""

    tokens: int
    """Prompt + response of both sequences of every pair."""
    response: int
    flops: float
    """Of the model: 6 per body parameter and token, 6 per head parameter and response token, causal attention."""
    flops_shared: float
    """The same with the prompt of a pair computed once."""


def count(shape: Shape, records: list[Record]) -> Counts:
    """Attention costs 2 L^2 H a layer forward (half of it is masked), three times that with the backward."""
    tokens = response = 0
    attention = shared_attention = 0.0
    shared_tokens = 0
    for record in records:
        prompt = len(record.prompt_ids)
        shared_tokens += prompt
        shared_attention += prompt**2
        for side in record.sides:
            whole = prompt + len(side.ids)
            tokens, response = tokens + whole, response + len(side.ids)
            attention += whole**2
            shared_tokens += len(side.ids)
            shared_attention += whole**2 - prompt**2
    a_square = 6.0 * shape.hidden * shape.layers
    head = 6.0 * shape.head_parameters * response
    return Counts(
        tokens=tokens,
        response=response,
        flops=6.0 * shape.body_parameters * tokens + head + a_square * attention,
        flops_shared=6.0 * shape.body_parameters * shared_tokens + head + a_square * shared_attention,
    )


def make_model(folder: Path, shape: Shape, seed: int = 0) -> None:
    """A random Llama with a tokenizer of one word per id, so that text and ids say the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    LlamaForCausalLM(config).to(getattr(torch, shape.stored)).save_pretrained(folder)
    make_tokenizer(folder, shape.vocabulary)


def make_tokenizer(folder: Path, vocabulary: int) -> Any:
    """Words "t3", "t4", .. for the ids 3, 4, ..; words are told apart by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<eos>": EOS, "<pad>": PAD, **{f"t{i}": i for i in range(FIRST, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>", padding_side="right"
    )
    fast.save_pretrained(folder)
    return fast


def text(ids: list[int]) -> str:
    """What the tokenizer turns back into `ids`, with a space in front so that it can follow a prompt."""
    return "".join(" <eos>" if i == EOS else f" t{i}" for i in ids)


def write_records(path: Path, records: list[Record]) -> None:
    path.write_text(json.dumps([asdict(record) for record in records]), encoding="utf-8")


def read_records(path: Path) -> list[Record]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Record(row["id"], row["prompt_ids"], tuple(Side(**side) for side in row["sides"])) for row in rows]
