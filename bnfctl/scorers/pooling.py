"""Sequence classifiers in vLLM's pooling runner.  vLLM is imported when an engine is made, never by importing this file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bnfctl.config import ScoreConfig
from bnfctl.errors import UsageError
from bnfctl.model.source import stored_tensors
from bnfctl.model.vllm import load_engine

_INSTEAD = "--engine transformers"
_HEADS = ("score", "classifier")
"""What transformers' sequence classifiers call their heads."""


class PoolingEngine:
    """A classifier in vLLM's engine; vLLM makes the batches itself."""

    def __init__(self, config: ScoreConfig, model_dir: Path, longest: int) -> None:
        """longest: the most tokens of a sequence.

        Raises UsageError where vLLM is missing, or can't load the model, and for a checkpoint without a head.
        """
        _check_head(model_dir)
        self._vllm, self._engine = load_engine(
            model_dir, dtype=config.dtype, gpu_memory=config.gpu_memory, trust_remote_code=config.trust_remote_code,
            instead=_INSTEAD, runner="pooling", max_model_len=longest,
        )  # fmt: skip
        self.version = f"vllm {self._vllm.__version__}"
        # the default is a sigmoid, which puts all good responses at 1.0
        self._raw = self._vllm.PoolingParams(use_activation=False)

    def logits(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """As Engine."""
        # ids, never text: the engine would add a BOS to the one that the template wrote
        prompts = [self._vllm.TokensPrompt(prompt_token_ids=list(ids)) for ids in texts]
        made = self._engine.classify(prompts, pooling_params=self._raw, use_tqdm=False) if prompts else []
        return [float(one.outputs.probs[0]) for one in made]  # named so, but the raw logits here


def _check_head(model_dir: Path) -> None:
    """vLLM makes up a head that the checkpoint lacks, without a word."""
    if not any(part in _HEADS for name in stored_tensors(model_dir) for part in name.split(".")):
        raise UsageError(
            "the checkpoint lacks the head of a sequence classifier",
            where=str(model_dir),
            hint="take a sequence classifier with num_labels 1",
        )
