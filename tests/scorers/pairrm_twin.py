"""PairRM written down a second time, slowly: one comparison at a time, float64, no padding, none of the package's code.

What it follows: the published DeBERTa-v3 (He et al. 2021, arXiv 2111.09543; disentangled attention of arXiv 2006.03654),
LLM-Blender's DebertaV2PairRM (head and logit), its `tokenize_pair` (input and lengths) and its full comparison
(scores).  `float64[...]` are the tensors of model.safetensors under their published names.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

SOURCE, FIRST, SECOND = "<|source|>", "<|candidate1|>", "<|candidate2|>"
SOURCE_LIMIT, TOTAL = 1224, 2048


class Twin:
    """heads, buckets, positions: num_attention_heads, position_buckets and max_position_embeddings of the backbone."""

    def __init__(self, folder: Path, heads: int, buckets: int, positions: int) -> None:
        self.float64 = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.heads, self.buckets, self.positions = heads, buckets, positions
        self.layers = 1 + max(int(name.split(".")[3]) for name in self.float64 if ".encoder.layer." in name)

    # ---- input

    def ids(self, source: str, first: str, second: str, source_limit: int, total: int) -> list[int]:
        """[CLS]<|source|>SRC[SEP][CLS]<|candidate1|>A[SEP][CLS]<|candidate2|>B[SEP]"""
        start = self.segment(SOURCE + source, source_limit)
        limit = (total - len(start)) // 2
        return start + self.segment(FIRST + first, limit) + self.segment(SECOND + second, limit)

    def segment(self, text: str, limit: int) -> list[int]:
        """[CLS] text [SEP], cut on the right to `limit` ids; the last [SEP] stays."""
        found: list[int] = self.tokenizer.encode(text).ids
        return found if len(found) <= limit else [*found[: limit - 1], found[-1]]

    # ---- the model

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.float64[f"{name}.weight"].T + self.float64[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.float64[f"{name}.weight"], self.float64[f"{name}.bias"], 1e-7)

    def bucket(self, distance: int) -> int:
        """Distances up to half the buckets count one by one, farther ones by their logarithm."""
        middle = self.buckets // 2
        if abs(distance) <= middle:
            return distance
        share = math.log(abs(distance) / middle) / math.log((self.positions - 1) / middle)
        return int(math.copysign(math.ceil(share * (middle - 1)) + middle, distance))

    def row(self, distance: int) -> int:
        """Which relative embedding stands for query position - key position."""
        return min(max(self.bucket(distance) + self.buckets, 0), 2 * self.buckets - 1)

    def hidden(self, ids: list[int]) -> Tensor:
        """[T, H] of the last layer."""
        body = "pretrained_model."
        x = self.norm(self.float64[body + "embeddings.word_embeddings.weight"][ids], body + "embeddings.LayerNorm")
        relative = self.norm(self.float64[body + "encoder.rel_embeddings.weight"], body + "encoder.LayerNorm")
        length = len(ids)
        rows = torch.tensor([[self.row(i - j) for j in range(length)] for i in range(length)])
        for number in range(self.layers):
            layer = f"{body}encoder.layer.{number}."
            attended = self.attention(x, relative, rows, layer + "attention.self.")
            x = self.norm(
                self.linear(attended, layer + "attention.output.dense") + x, layer + "attention.output.LayerNorm"
            )
            inner = gelu(self.linear(x, layer + "intermediate.dense"))
            x = self.norm(self.linear(inner, layer + "output.dense") + x, layer + "output.LayerNorm")
        return x

    def attention(self, x: Tensor, relative: Tensor, rows: Tensor, name: str) -> Tensor:
        """Content to content, content to position and position to content; positions share the content's projections."""
        size = x.shape[1] // self.heads
        query, key, value = (self.linear(x, name + part) for part in ("query_proj", "key_proj", "value_proj"))
        position_query, position_key = (self.linear(relative, name + part) for part in ("query_proj", "key_proj"))
        out = torch.empty_like(x)
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[:, part] @ key[:, part].T
            for i in range(len(x)):
                scores[i] += position_key[rows[i]][:, part] @ query[i, part]
                scores[i] += (position_query[rows[i]][:, part] * key[:, part]).sum(-1)
            out[:, part] = torch.softmax(scores / math.sqrt(3 * size), -1) @ value[:, part]
        return out

    def logit(
        self, source: str, first: str, second: str, source_limit: int = SOURCE_LIMIT, total: int = TOTAL
    ) -> float:
        """Above 0: the first is better."""
        ids = self.ids(source, first, second, source_limit, total)
        hidden = self.hidden(ids)
        markers = [self.tokenizer.token_to_id(marker) or 0 for marker in (SOURCE, FIRST, SECOND)]
        assert [ids.count(marker) for marker in markers] == [1, 1, 1]
        s, a, b = (hidden[ids.index(marker)] for marker in markers)
        return float((self.head(s, a) - self.head(s, b)).mean())

    def head(self, source: Tensor, candidate: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(torch.cat([source, candidate]), "head_layer.1")), "head_layer.4")

    # ---- N responses

    def scores(self, source: str, responses: list[str], **limits: int) -> list[float]:
        """The mean over all N columns of C[i, j] - C[j, i], the diagonal being 0."""
        n = len(responses)
        table = torch.zeros(n, n, dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                if i != j:
                    table[i, j] = self.logit(source, responses[i], responses[j], **limits)
        return [float(score) for score in (table - table.T).mean(1)]
