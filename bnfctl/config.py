"""What each stage can be asked: five frozen dataclasses, the one place where a parameter is declared.

A field's help, default, range and choices become its flag, its YAML key and its share of the cache key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bnfctl.options import opt
from bnfctl.tables import LOSSES, RULES, SAMPLERS, SCORERS, TASKS

_SPEED_ONLY = "Changes speed, not results, so it is not in the key."
_SAME = "Float rounding apart, results are the same, so it is not in the key."
_EXACT = "A resumed run is exact, so it is not in the key."
_MACHINE = "A fact of the machine, so it is not in the key."
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SAMPLERS = ("auto", *SAMPLERS)
ABOUT_SERVERS = ("server", "served_model", "concurrency", "timeout", "retries", "api_key_env")
"""The fields of generate and score that only a client of servers has a use for."""
_SERVED_JUDGE = "Name of the judge on the servers, one name for one model. Default: the only one they have."
_TEMPLATE = "Argument of the chat template, name=value, e.g. enable_thinking=false; may be repeated."


def _processes(what: str) -> Any:
    return opt(None, help=f"{what}; default: all GPUs, one process on a CPU. " + _SAME, key=False, low=1)


def _servers() -> Any:
    return opt((), help="Base URL of an OpenAI-compatible endpoint (http://host:8000/v1); may be repeated. " + _MACHINE,
               key=False)  # fmt: skip


def _concurrency() -> Any:
    return opt(64, help="Requests in flight, over all servers. " + _SPEED_ONLY, key=False, low=1)


def _timeout() -> Any:
    return opt(600.0, help="Seconds to wait for one answer. " + _MACHINE, key=False, low=0.001)


def _retries() -> Any:
    return opt(8, help="Attempts after a failed request. " + _MACHINE, key=False, low=0)


def _api_key_env() -> Any:
    return opt("OPENAI_API_KEY", help="Environment variable with the servers' key. " + _MACHINE, key=False)


@dataclass(frozen=True)
class GenerateConfig:
    """Sample n responses to every prompt."""

    prompts: str = opt(
        help="JSONL, Parquet or CSV file, folder saved by datasets, hub data set (owner/name[@revision]) or lab:FAMILY.",
        input="data",
    )
    model: str | None = opt(None, help="Hub id (owner/name[@revision]), folder, train artifact or lab.", input="model")
    split: str = opt("train", help="Split of a data set or of the lab.")
    subset: str | None = opt(None, help="Configuration of a hub data set.")
    prompt_column: str = opt("prompt", help="Column with the prompt: text, or a list of chat messages.")
    answer_column: str = opt("answer", help="Column with the right answer, where there is one.")
    id_column: str | None = opt(
        None,
        help="Column with the prompt's id. Default: prompt_id or id, else a hash of the prompt.",
        since_default=True,
    )
    system: str | None = opt(None, help="System prompt for prompts that have none.", since_default=True)
    sort: bool = opt(False, help="Sort the prompts by their text, as SimPO's scripts do.", since_default=True)
    shuffle_seed: int | None = opt(None, help="Shuffle the prompts, before --limit.", since_default=True)
    limit: int | None = opt(None, help="Take the first N prompts.", low=1)
    sampler: str = opt(
        "auto", help="auto takes vllm where it is installed; server asks endpoints; file imports responses.",
        choices=_SAMPLERS,
    )  # fmt: skip
    n: int = opt(5, help="Responses per prompt.", low=1)
    temperature: float = opt(0.8, help="0 is greedy. The paper samples at 0.8.", low=0, high=10)
    top_p: float = opt(0.95, help="Nucleus mass; 0.95 as in the paper's data sets.", low=1e-6, high=1)
    max_tokens: int = opt(4096, help="Longest response in tokens; the context may end it sooner.", low=1)
    seed: int = opt(0, help="Run seed; each prompt's own seed is a hash of it and the prompt id.")
    long_prompts: str = opt(
        "error", help="A prompt that fills the context: stop, or drop it.", choices=("error", "drop")
    )
    dtype: str = opt("auto", help="Compute type; auto is bfloat16 on a GPU, float32 on a CPU.", choices=_DTYPES)
    chat_template_kwargs: tuple[str, ...] = opt((), help=_TEMPLATE, since_default=True)
    chunk: int = opt(64, help="Prompts per chunk: hf samples (and all samplers save) chunk by chunk.", low=1)
    gpu_memory: float = opt(0.9, help="Share of the GPU's memory for vLLM. " + _MACHINE, key=False, low=0.05, high=1)
    devices: int | None = _processes("GPUs to use, one engine each (or one per --tensor-parallel of them)")
    tensor_parallel: int = opt(1, help="GPUs that share one vLLM engine. " + _SAME, key=False, low=1)
    server: tuple[str, ...] = _servers()
    served_model: str | None = opt(
        None, help="Name of the model on the servers. Default: the only one they have.", since_default=True
    )
    concurrency: int = _concurrency()
    timeout: float = _timeout()
    retries: int = _retries()
    api_key_env: str = _api_key_env()
    trust_remote_code: bool = opt(False, help="Run code that comes with the model.")


@dataclass(frozen=True)
class ScoreConfig:
    """Give every candidate a reward."""

    input: str = opt(help="Generate artifact, or a JSONL file of responses.", input="generate", positional=True)
    scorer: str = opt("rules", help="How to score.", choices=tuple(SCORERS))
    rule: str = opt(
        "numeric", help="The verifier of `rules`; python:MODULE:FUNCTION is your own.", choices=tuple(RULES),
        prefixes=("python:",),
    )  # fmt: skip
    pattern: str | None = opt(None, help="Regular expression of `--rule regex`; group 1, if any, is the answer.")
    model: str | None = opt(None, help="Reward model; `reward-model` takes any one-label classifier.", input="model")
    max_length: int = opt(4096, help="Longest prompt + response in tokens; longer ones get a null reward.", low=1)
    dtype: str = opt("auto", help="Compute type; auto is bfloat16 on a GPU, float32 on a CPU.", choices=_DTYPES)
    thinking: str = opt(
        "keep", help="strip hides <think>...</think> of a response from the scorer; training keeps it.",
        choices=("keep", "strip"), since_default=True,
    )  # fmt: skip
    engine: str = opt(
        "transformers", help="What runs `reward-model`.", choices=("transformers", "vllm"), since_default=True
    )
    judge_mode: str = opt(
        "pairwise", help="How `judge` asks: two responses in both orders, or one response for a number.",
        choices=("pairwise", "pointwise"), since_default=True,
    )  # fmt: skip
    judge_prompt: str | None = opt(
        None, help="File with the judge's instructions in place of the built-in ones.", input="file", since_default=True
    )
    judge_tokens: int = opt(1024, help="Longest answer of the judge in tokens.", low=1, since_default=True)
    judge_temperature: float = opt(0.0, help="0 is greedy.", low=0, high=10, since_default=True)
    served_model: str | None = opt(None, help=_SERVED_JUDGE, since_default=True)
    server: tuple[str, ...] = _servers()
    concurrency: int = _concurrency()
    timeout: float = _timeout()
    retries: int = _retries()
    api_key_env: str = _api_key_env()
    batch_tokens: int = opt(8192, help="Padded tokens per forward. " + _SPEED_ONLY, key=False, low=1)
    gpu_memory: float = opt(0.9, help="Share of the GPU's memory for vLLM. " + _MACHINE, key=False, low=0.05, high=1)
    devices: int | None = _processes("GPUs to use (or CPU processes), each with a scorer of its own")
    trust_remote_code: bool = opt(False, help="Run code that comes with the model.")


@dataclass(frozen=True)
class BuildConfig:
    """Turn scored candidates, or a ready preference file, into training records."""

    input: str = opt(
        help="Score artifact, or a preference or feedback set: file, folder or hub data set.", input="score",
        positional=True,
    )  # fmt: skip
    also: tuple[str, ...] = opt(
        (),
        help="More score artifacts of the same candidates; their rewards are added up.",
        input="score",
    )
    weights: tuple[float, ...] = opt(
        (), help="Weights of INPUT and of each --also. Default: 1 each.", since_default=True
    )
    combine: str = opt(
        "zscore", help="Before adding: rewards of a prompt to mean 0 and deviation 1 per scorer, or as they are.",
        choices=("zscore", "raw"), since_default=True,
    )  # fmt: skip
    filter: str | None = opt(
        None, help="Score artifact that only decides which candidates take part, by --filter-min or -max.",
        input="score",
    )  # fmt: skip
    filter_min: float | None = opt(None, help="Least reward in --filter.", since_default=True)
    filter_max: float | None = opt(None, help="Largest reward in --filter.", since_default=True)
    split: str = opt("train", help="Split of a data set.")
    subset: str | None = opt(None, help="Configuration of a hub data set.")
    format: str = opt(
        "auto", help="Of a set that is read: chosen and rejected, or one response and its label.",
        choices=("auto", "preference", "unpaired"), since_default=True,
    )  # fmt: skip
    prompt_column: str = opt("prompt", help="Column with the prompt.", since_default=True)
    chosen_column: str = opt("chosen", help="Column with the chosen response.", since_default=True)
    rejected_column: str = opt("rejected", help="Column with the rejected response.", since_default=True)
    response_column: str | None = opt(
        None, help="Column with the response of a labelled row. Default: completion or response.", since_default=True
    )
    label_column: str = opt("label", help="Column that says whether a response is good.", since_default=True)
    choose: str = opt(
        "best-worst", help="Which responses become records; threshold makes single labelled ones.",
        choices=("best-worst", "best-random", "all-pairs", "top-bottom", "threshold"), since_default=True,
    )  # fmt: skip
    top_k: int = opt(1, help="Of top-bottom: the best k against the worst k.", low=1, since_default=True)
    good: float | None = opt(None, help="Of threshold: rewards from here up are labelled +1.", since_default=True)
    bad: float | None = opt(None, help="Of threshold: rewards from here down are labelled -1.", since_default=True)
    scope: str = opt(
        "prompt", help="Of threshold: compare the reward minus the prompt's mean reward, or the reward itself.",
        choices=("prompt", "global"), since_default=True,
    )  # fmt: skip
    pairing_ratio: float = opt(1.0, help="Chance that a pair keeps both sides (paper 5.2).", low=0, high=1)
    min_margin: float = opt(0.0, help="Drop a pair whose margin (chosen - rejected reward) is not above this.", low=0)
    max_margin: float | None = opt(None, help="Drop a pair whose margin is above this.", low=0, since_default=True)
    drop_cut: bool = opt(False, help="Leave out responses that were cut off at max_tokens.", since_default=True)
    drop_empty: bool = opt(True, help="Leave out responses without a visible character.", since_default=True)
    min_chars: int = opt(0, help="Leave out responses shorter than this.", low=0, since_default=True)
    max_chars: int | None = opt(None, help="Leave out responses longer than this.", low=1, since_default=True)
    min_edit: float = opt(
        0.0, help="Drop a pair whose edit distance, as a share of the longer response, is below this.", low=0, high=1,
        since_default=True,
    )  # fmt: skip
    length_balance: float | None = opt(
        None, help="Of a prompt's pairs with at least this share of its largest margin, take the most equal in length.",
        low=0, high=1, since_default=True,
    )  # fmt: skip
    test_fraction: float = opt(0.05, help="Share of the prompts kept for the test split.", low=0, high=0.9)
    limit: int | None = opt(None, help="Take the first N prompts (rows of a set that is read).", low=1)
    seed: int = opt(0, help="Seed of the split and of the masking.")


@dataclass(frozen=True)
class TrainConfig:
    """Align a model with preference records."""

    model: str = opt(help="Hub id (owner/name[@revision]), folder, train artifact or lab.", input="model")
    data: str | None = opt(None, help="Build artifact. Default: the only one made from this model.", input="build")
    loss: str = opt("bnf", help="The objective.", choices=tuple(LOSSES))
    loss_arg: tuple[str, ...] = opt((), help="Hyper-parameter of the loss, name=value; may be repeated.")
    lr: float = opt(5e-7, help="Peak learning rate; the paper's models have their own.", low=0)
    batch_size: int = opt(128, help="Records (pairs or single responses) per step.", low=1)
    epochs: int = opt(1, help="Passes over the training split.", low=1)
    max_length: int = opt(4096, help="Longest prompt + response in tokens.", low=2)
    warmup: float = opt(0.1, help="Share of the steps that warm up.", low=0, high=1)
    beta1: float = opt(0.9, help="AdamW.", low=0, high=0.999999)
    beta2: float = opt(0.999, help="AdamW.", low=0, high=0.9999999)
    eps: float = opt(1e-8, help="AdamW.", low=0)
    weight_decay: float = opt(0.0, help="AdamW.", low=0)
    clip: float = opt(1.0, help="Largest gradient norm, after normalisation; 0 turns clipping off.", low=0)
    seed: int = opt(0, help="Seed of the data order.")
    chat_template_kwargs: tuple[str, ...] = opt((), help=_TEMPLATE, since_default=True)
    retokenize: bool = opt(False, help="Ignore sampled token ids and tokenize the texts with this model.")
    dtype: str = opt("auto", help="Compute type; auto is bfloat16 on a GPU. Masters are float32.", choices=_DTYPES[:3])
    save_dtype: str = opt("auto", help="Type of the saved model; auto is the base's.", choices=_DTYPES)
    reference: str = opt(
        "cached",
        help="cached: log-odds from one pass, kept for every later run; live: a second model in memory.",
        choices=("cached", "live"),
    )
    allow_drift: bool = opt(
        False, help="Train even if the policy differs from its reference at step 0. Only a gate, not in the key.",
        key=False,
    )  # fmt: skip
    lora: int = opt(0, help="Rank of LoRA adapters; 0 trains all parameters.", low=0)
    lora_alpha: float | None = opt(None, help="LoRA's scale is alpha / rank. Default: twice the rank.", low=1e-6)
    lora_targets: tuple[str, ...] = opt(
        ("all-linear",), help="Modules that get adapters; all-linear leaves the head out."
    )
    lora_save: str = opt("merged", help="Save a whole model, or the adapter alone.", choices=("merged", "adapter"))
    quantize: str = opt(
        "none", help="4bit loads the frozen base in NF4 (QLoRA; extra bitsandbytes).", choices=("none", "4bit")
    )
    optimizer: str = opt(
        "adamw", help="adamw-8bit keeps the moments in 8 bits (extra bitsandbytes).", choices=("adamw", "adamw-8bit")
    )
    eval_every: int = opt(0, help="Report on the test split every N steps and at the end; 0 is never.", low=0)
    log_every: int = opt(1, help="A line in metrics.jsonl every N steps.", low=1)
    devices: int | None = opt(
        None, help="GPUs (or CPU processes) to use; default: all GPUs. " + _SAME, key=False, low=1
    )
    parallel: str = opt(
        "auto",
        help="ddp: every device has all parameters; fsdp: a share of them; auto: ddp where it fits. " + _SAME,
        key=False,
        choices=("auto", "ddp", "fsdp"),
    )
    layout: str = opt(
        "auto", help="packed computes no padding, and a shared prompt once; auto: where it is right. " + _SAME, key=False,
        choices=("auto", "packed", "padded"),
    )  # fmt: skip
    attention: str = opt(
        "auto", help="Implementation of attention; auto is sdpa. " + _SAME, key=False,
        choices=("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"),
    )  # fmt: skip
    share_prompt: bool = opt(True, help="Compute the prompt of a pair once. " + _SAME, key=False)
    micro_tokens: int | None = opt(
        None, help="Tokens per micro-batch; default 1024 on a CPU, 16384 on a GPU. " + _SAME, key=False, low=1
    )
    activation_checkpointing: str = opt(
        "auto", help="Compute layers again in the backward; auto: where memory asks for it. " + _SAME, key=False,
        choices=("auto", "on", "off"),
    )  # fmt: skip
    save_every: int = opt(50, help="Checkpoint every N steps; 0 is never. " + _EXACT, key=False, low=0)
    save_minutes: float = opt(0.0, help="Checkpoint every so many minutes; 0 is never. " + _EXACT, key=False, low=0)
    keep: int = opt(1, help="Checkpoints to keep. " + _EXACT, key=False, low=1)
    track: tuple[str, ...] = opt(
        (), help="Send metrics there too. A copy of metrics.jsonl, so it is not in the key.", key=False,
        choices=("tensorboard", "wandb", "trackio"),
    )  # fmt: skip
    trust_remote_code: bool = opt(False, help="Run code that comes with the model.")


@dataclass(frozen=True)
class ReferenceConfig:
    """The code path that reference log-odds came through: no stage, but the config of `reference` artifacts."""

    dtype: str = opt(help="Compute type.")
    device: str = opt(help="cpu or cuda.")
    attention: str = opt(help="Implementation of attention.")
    packed: bool = opt(help="Packed or padded sequences.")
    narrow: bool = opt(help="Parameters in the compute type (FSDP2, LoRA's base), not autocast over float32 masters.")
    quantize: str = opt(help="Quantization of the base.")


@dataclass(frozen=True)
class EvalConfig:
    """Grade responses on tasks: a model's, or those in files; compare models on the same items."""

    tasks: tuple[str, ...] = opt(help="Tasks, separated by commas.", choices=lambda: list(TASKS))
    model: str | None = opt(
        None, help="Hub id, folder, train artifact or lab; not needed with --responses.", input="model", positional=True
    )
    responses: tuple[str, ...] = opt(
        (), input="eval",
        help="File with responses or judgments made elsewhere, or an eval artifact; several make a table. One task.",
    )  # fmt: skip
    base: str | None = opt(None, help="Eval artifact of the base model: adds paired differences.", input="eval")
    data_dir: str | None = opt(None, help="Folder with the tasks' items, instead of the hub's.", input="data")
    template: str | None = opt(None, help="Prompt of gsm8k, math-l5, crux and mmlu-redux, not ours.", input="file")
    mathverify: bool = opt(False, help="Grade gsm8k and math-l5 by math-verify too (extra math).", since_default=True)
    crux_grader: str = opt(
        "zeroeval-20240922", help="What decides in crux; the others are reported beside it.", since_default=True,
        choices=("zeroeval-20240922", "zeroeval-20240801", "literal"),
    )  # fmt: skip
    reference: str | None = opt(
        None, help="Model that `shifts` compares with. Default: the one that a train artifact started from.",
        input="model",
    )  # fmt: skip
    shift_prompts: str | None = opt(
        None, help="Prompts of `shifts`, as `generate --prompts`. Default: the first 1,000 of WildBench.", input="data"
    )
    shift_responses: str = opt(
        "policy", help="Who writes the greedy responses of `shifts`; of the reference, methods compare token by token.",
        choices=("policy", "reference"), since_default=True,
    )  # fmt: skip
    judge: str | None = opt(
        None, help="Judge model (hub id or folder) that vLLM serves here for the time of the run; or give --server.",
        input="model",
    )  # fmt: skip
    served_model: str | None = opt(None, help=_SERVED_JUDGE, since_default=True)
    judge_prompt: str | None = opt(
        None, help="File with the judge's prompt in place of the built-in one, e.g. the original.", input="file",
        since_default=True,
    )  # fmt: skip
    judge_temperature: float | None = opt(
        0.0, help="0 is greedy; none sends none, for judges that take only their own.", low=0, high=10,
        since_default=True,
    )  # fmt: skip
    judge_tokens: int | None = opt(
        None, help="Longest judgment in tokens, for judges that think first. Default: the protocol's.", low=1,
        since_default=True,
    )  # fmt: skip
    judge_json: bool = opt(
        True, help="Ask for JSON where the protocol does; off for servers that refuse it.", since_default=True
    )
    verdicts: str = opt(
        "2024", help="How arena-hard reads verdicts: as the code of 2024 (v0.1), or as that of 2025.",
        choices=("2024", "2025"), since_default=True,
    )  # fmt: skip
    length_unit: str = opt(
        "characters", help="Unit of arena-hard's length control: characters, or a model whose tokenizer counts tokens.",
        since_default=True,
    )  # fmt: skip
    server: tuple[str, ...] = _servers()
    concurrency: int = _concurrency()
    timeout: float = _timeout()
    retries: int = _retries()
    api_key_env: str = _api_key_env()
    max_calls: int | None = opt(
        None, help="Most calls of the judge in this run; then exit 1, and the next run goes on. A limit, so not in the key.",
        key=False, low=1,
    )  # fmt: skip
    sampler: str = opt("auto", help="auto takes vllm where it is installed.", choices=("auto", "vllm", "hf"))
    limit: int | None = opt(None, help="Take the first N items of each task.", low=1)
    seed: int = opt(0, help="Run seed of tasks that sample.")
    dtype: str = opt("auto", help="Compute type; auto is bfloat16 on a GPU, float32 on a CPU.", choices=_DTYPES)
    chunk: int = opt(256, help="Prompts per chunk.", low=1)
    chat_template_kwargs: tuple[str, ...] = opt((), help=_TEMPLATE, since_default=True)
    require: tuple[str, ...] = opt(
        (), key=False,
        help="Gate, e.g. 'gsm8k>=0.3', 'lab-chat.gain>=0.15' or 'reasoning.drop<=0.02'; exit 3. Checked after, so not "
        "in the key.",
    )  # fmt: skip
    gpu_memory: float = opt(0.9, help="Share of the GPU's memory for vLLM. " + _MACHINE, key=False, low=0.05, high=1)
    devices: int | None = _processes("GPUs to use, one engine each (or one per --tensor-parallel of them)")
    tensor_parallel: int = opt(1, help="GPUs that share one vLLM engine. " + _SAME, key=False, low=1)
    trust_remote_code: bool = opt(False, help="Run code that comes with the model.")


CONFIGS: dict[str, type] = {
    "generate": GenerateConfig,
    "score": ScoreConfig,
    "build": BuildConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
}
