"""Tiny random models and tokenizers for tests, made from config in a folder; no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

BOS, EOS, PAD, TURN_END = "<|begin|>", "<|end|>", "<|pad|>", "<|turn_end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (BOS, EOS, PAD, TURN_END, *ROLES)
VOCABULARY = 256 + len(SPECIAL_TOKENS)
TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|turn_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
TEMPLATE_WITHOUT_BOS = TEMPLATE.replace("{{- bos_token -}}", "")


def make_tokenizer(
    path: Path, *, template: str | None = TEMPLATE, adds_bos: bool = True, pad: bool = True, bos: bool = True
) -> Any:
    """A byte-level tokenizer, saved in `path`: ids 0-255 are bytes, then SPECIAL_TOKENS.

    adds_bos: plain encoding puts BOS in front, as with Llama 3, whose template writes one too.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    if adds_bos:
        number = tokenizer.token_to_id(BOS)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, number)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS if bos else None, eos_token=EOS, pad_token=PAD if pad else None,
        extra_special_tokens=[TURN_END, *ROLES], clean_up_tokenization_spaces=False, chat_template=template,
    ).save_pretrained(path)  # fmt: skip
    return AutoTokenizer.from_pretrained(path)


def make_spaced_tokenizer(path: Path) -> Any:
    """A tokenizer of the SentencePiece kind, as Mistral 7B's: puts a space in front of whatever it encodes."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "▁": 4}
    for letter in "abcdefghijklmnopqrstuvwxyz[]/INST.,!?":
        vocabulary.setdefault(letter, len(vocabulary))
    for piece in ("▁▁", "▁h", "▁hi"):
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=[("▁", "▁"), ("▁", "h"), ("▁h", "i")], unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    ).save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def _shape(context: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": context,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }


def make_llama(path: Path, *, seed: int = 0, context: int = 256, stop: float = 0.0, **tokenizer_options: Any) -> Path:
    """A random Llama with two layers, heads of 32 dimensions and its tokenizer; two eos ids in its generation config.

    stop: added to the logits of EOS and the end of turn, through a hidden state that is constant, so that responses
    really end.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(path, **tokenizer_options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**_shape(context), pad_token_id=258, tie_word_embeddings=False))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
            # one coordinate of every hidden state is large and positive; it is what the two stop ids look at
            model.model.embed_tokens.weight[:, 0] = 3.0
            model.lm_head.weight[:, 0] = 0.0
            model.lm_head.weight[[257, 259], 0] = stop
    model.save_pretrained(path)
    # top_k and a penalty, as hub models have them, which must not leak into sampling
    generation = {"eos_token_id": [257, 259], "top_k": 2, "repetition_penalty": 1.8, "do_sample": True}
    (path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return path


def make_reward_model(
    path: Path, *, seed: int = 0, context: int = 256, labels: int = 1, pad_token_id: int | None = 258, **options: Any
) -> Path:
    """A random LlamaForSequenceClassification with the same tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    make_tokenizer(path, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(**_shape(context), pad_token_id=pad_token_id, num_labels=labels)
        model = LlamaForSequenceClassification(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
    model.save_pretrained(path)
    return path
