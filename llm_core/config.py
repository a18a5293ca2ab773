"""One typed, flat configuration per stage.

The same class is the command line (`llm_core.cli`), the Dagster launchpad (by inheritance in `pipeline`) and what manifests,
checkpoints and the catalog store. Paths are not here: where something lies does not change what it is.
"""

from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from llm_core.errors import UserError

PositiveInt = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

END_OF_TEXT = "<|endoftext|>"
MODEL_NAMES = Literal["tiny", "small", "medium", "large", "xl"]

# hidden_size, num_layers, num_heads, num_kv_heads: the table of the user's document.
PRESETS: dict[str, tuple[int, int, int, int]] = {
    "tiny": (256, 6, 8, 8),
    "small": (768, 12, 12, 12),
    "medium": (1024, 24, 16, 8),
    "large": (1536, 24, 16, 8),
    "xl": (2048, 32, 32, 8),
}


Stage = TypeVar("Stage", bound="StageConfig")


class StageConfig(BaseModel):
    """Base of every stage's configuration: unknown fields are refused, values cannot change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # Fields that say how a result is reached, not what it is: they do not enter an artifact's id.
    execution_fields: ClassVar[frozenset[str]] = frozenset()

    def identity(self) -> dict[str, Any]:
        """The fields that determine the result, for `files.content_id`."""
        return self.model_dump(mode="json", exclude=set(self.execution_fields))

    def part(self, stage: type[Stage]) -> Stage:
        """The fields of one stage out of a class that inherits from it: a tool's options or a Dagster launchpad."""
        return stage.model_validate(self.model_dump(include=set(stage.model_fields)))


class CorpusConfig(StageConfig):
    """How files become documents."""

    text_field: str = Field(
        "text", min_length=1, description="Name of the field or column that holds the text in .jsonl and .parquet files."
    )
    max_document_bytes: int = Field(
        32 * 1024,
        ge=256,
        description="Longer texts are divided at line ends into documents of at most this many UTF-8 bytes.",
    )
    val_fraction: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="Share of documents held out for validation; which ones is decided by each document's content hash.",
    )
    invalid_utf8: Literal["quarantine", "replace"] = Field(
        "quarantine",
        description="What is done with text that is not UTF-8: set it aside, or put U+FFFD for each bad sequence.",
    )
    min_characters: PositiveInt | None = Field(
        None, description="Drop texts (files, lines, rows) of fewer characters than this; default: none."
    )
    max_characters: PositiveInt | None = Field(
        None, description="Drop texts of more characters than this, whole, before they are divided; default: none."
    )
    max_repetition: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="Drop documents with a larger share of characters in runs of five words that occurred before in them;"
        " 0.15 is the limit of Rae et al. 2021 (Gopher); default: none.",
    )
    min_letter_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Drop documents with a smaller share of letters in what is not white space; default: none.",
    )
    near_duplicates: Annotated[float, Field(ge=0.5, lt=1)] | None = Field(
        None,
        description="Drop documents that resemble an earlier one by at least this much: estimated Jaccard similarity of their"
        " five-word shingles; 0.8 is usual; default: none. Needs the extra dedup.",
    )

    @model_validator(mode="after")
    def _lengths_fit(self) -> "CorpusConfig":
        if self.min_characters and self.max_characters and self.min_characters > self.max_characters:
            raise ValueError(f"min_characters {self.min_characters} must not exceed max_characters {self.max_characters}")
        return self


class TokenizerConfig(StageConfig):
    """How text becomes token ids."""

    execution_fields = frozenset({"retrain_tokenizer", "retrain_on_drift"})

    tokenizer_type: Literal["bpe", "wordpiece", "tiktoken"] = Field(
        "bpe", description="Byte-level BPE or WordPiece trained on the corpus, or a ready tiktoken encoding."
    )
    vocab_size: int = Field(
        32000, ge=258, le=1_000_000, description="Tokens in the vocabulary, special tokens included (bpe and wordpiece)."
    )
    special_tokens: list[str] = Field(
        [END_OF_TEXT], min_length=1, description="Special tokens; the first one stands between documents."
    )
    tokenizer_train_bytes: int = Field(
        1 << 30, ge=1 << 16, description="The tokenizer learns from a seeded sample of at most this many bytes of text."
    )
    tokenizer_seed: int = Field(0, ge=0, description="Seed of that sample.")
    tiktoken_encoding: str = Field("gpt2", description="Name of the tiktoken encoding (tokenizer_type tiktoken).")
    tiktoken_ranks: str | None = Field(
        None, description="A local ranks file (.tiktoken) to use instead of the named encoding's download."
    )
    retrain_tokenizer: bool = Field(
        False, description="Train again on the present text; otherwise a tokenizer of the same configuration is kept as it is."
    )
    retrain_on_drift: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Train again when text that is new since the tokenizer was made has this share fewer bytes per token than "
        "the text it was made for; default: never.",
    )

    @model_validator(mode="after")
    def _ranks_are_of_use(self) -> "TokenizerConfig":
        if self.tiktoken_ranks is not None and self.tokenizer_type != "tiktoken":
            raise ValueError(
                f"tiktoken_ranks {self.tiktoken_ranks}: not with tokenizer_type {self.tokenizer_type}, only tiktoken"
            )
        return self


class ShardConfig(StageConfig):
    """How token ids are stored and cut into windows."""

    execution_fields = frozenset({"max_length", "stride", "num_workers", "engine"})

    max_length: int = Field(2048, ge=8, le=1 << 20, description="Window length in tokens: what the model sees at once.")
    stride: int = Field(0, ge=0, description="Overlap between consecutive windows in tokens.")
    num_workers: int = Field(
        0, ge=0, le=1024, description="Workers that encode; 0 means one per core, of this machine or of the Ray cluster."
    )
    engine: Literal["local", "ray"] = Field(
        "local",
        description="Where they work: threads of this process, or Ray, here or on the cluster that RAY_ADDRESS names "
        "(needs the extra ray). The bytes written are the same.",
    )
    shard_bytes: int = Field(
        128 << 20, ge=1 << 16, description="Text bytes that go into one shard; a document is never divided between shards."
    )

    @model_validator(mode="after")
    def _stride_fits(self) -> "ShardConfig":
        if self.stride >= self.max_length:
            raise ValueError(f"stride {self.stride} must be smaller than max_length {self.max_length}")
        return self


class TrainConfig(StageConfig):
    """Shape of the model and everything that decides its training."""

    execution_fields = frozenset(
        {
            "model",  # enters through the sizes it stands for
            "init_from",  # enters through the checkpoint's id
            "micro_batch_size",
            "attention",
            "compile_model",
            "gradient_checkpointing",
            "sharding",
            "device",
            "threads_per_process",
            "collective_timeout",
            "profile",
            "log_interval",
            "eval_interval",
            "eval_tokens",
            "save_interval",
            "background_save",
            "keep_checkpoints",
            "max_skipped_steps",
        }
    )

    # Shape.
    model: MODEL_NAMES = Field("tiny", description="Preset of the four sizes below; any of them overrides it.")
    hidden_size: PositiveInt | None = Field(None, description="Width of the residual stream; default: the preset's.")
    num_layers: PositiveInt | None = Field(None, description="Decoder blocks; default: the preset's.")
    num_heads: PositiveInt | None = Field(None, description="Query heads; must divide hidden_size; default: the preset's.")
    num_kv_heads: PositiveInt | None = Field(
        None, description="Key and value heads (grouped-query attention); must divide num_heads; default: the preset's."
    )
    intermediate_size: PositiveInt | None = Field(
        None, description="Width inside SwiGLU; default: 8/3 of hidden_size, rounded up to a multiple of 64."
    )
    tie_embeddings: bool = Field(False, description="Share one matrix between the embedding and the output head.")
    rope_theta: float = Field(10000.0, ge=1, description="Base of the rotary position angles.")
    norm_eps: float = Field(1e-5, gt=0, lt=1e-2, description="Epsilon of RMSNorm.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the residual branches; 0 suits a single pass over the data.")

    # Data.
    max_length: Annotated[int, Field(ge=8)] | None = Field(
        None, description="Window length in tokens; default: the dataset's max_length."
    )
    stride: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Overlap between consecutive windows in tokens; default: the dataset's stride."
    )
    document_masking: bool = Field(False, description="Tokens attend only inside their own document; positions restart there.")
    seed: int = Field(1337, ge=0, lt=1 << 63, description="Seed of the initial weights, the data order and dropout.")
    source_weights: dict[str, Weight] = Field(
        {},
        description="Share of the windows from each source, as relative weights by top-level folder of the raw text "
        "('.': files in none; '*': every other source); empty: all text alike.",
    )
    max_source_epochs: float = Field(
        4.0, ge=1, description="Times a part of a mixture is read at most; what is cut goes to the others in proportion."
    )

    # Continued training.
    init_from: str | None = Field(
        None, description="Start from the weights of this checkpoint, or of a run's folder, with a new warm-up and optimizer."
    )
    replay_share: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="With init_from: share of the windows from text its parents have seen, the others from new text."
    )

    # Optimisation.
    batch_size: int = Field(8, gt=0, le=1 << 24, description="Windows per optimizer step, over all ranks.")
    micro_batch_size: PositiveInt | None = Field(
        None, description="Windows per rank and forward pass; default: the whole share of the rank. Accumulation is derived."
    )
    max_steps: PositiveInt = Field(1000, description="Optimizer steps of the whole run.")
    learning_rate: float = Field(3e-4, gt=0, lt=1, description="Peak learning rate.")
    min_lr: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Learning rate of the last step; default: a tenth of the peak."
    )
    lr_schedule: Literal["cosine", "linear", "wsd"] = Field(
        "cosine", description="Decay after the warm-up: half a cosine, a line, or flat with a linear end (warm-up-stable-decay)."
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Steps of linear warm-up; default: 5 % of max_steps, at most 2000."
    )
    decay_fraction: float = Field(0.2, gt=0, le=1, description="Share of the steps in the final decay of lr_schedule wsd.")
    weight_decay: float = Field(0.1, ge=0, le=1, description="Decoupled weight decay of matrices; norms are never decayed.")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for the matrices inside the blocks, AdamW for the rest."
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon: momentum.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW: decay of the second moment.")
    adam_eps: float = Field(1e-8, gt=0, lt=1e-2, description="AdamW: epsilon.")
    grad_clip: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 switches clipping off.")
    max_skipped_steps: PositiveInt = Field(
        10, description="The run stops after this many steps in a row whose gradients are not finite."
    )

    # Execution.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Dtype of the matrix products; auto: fp32, or with mixed_precision the device's best."
    )
    mixed_precision: bool = Field(
        False, description="With precision auto: bf16 where the device has fast units for it, fp16 on older GPUs, else fp32."
    )
    attention: Literal["auto", "flash", "sdpa"] = Field(
        "auto", description="flash: the flash-attn package (CUDA, bf16 or fp16); sdpa: PyTorch's own; auto: flash where it runs."
    )
    compile_model: bool = Field(False, description="Compile each block with torch.compile.")
    gradient_checkpointing: bool = Field(False, description="Recompute each block in the backward pass: less memory, more time.")
    sharding: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="ddp: each rank holds the whole model; fsdp: the ranks share weights, gradients and optimizer state (FSDP2), "
        "for models that outgrow one device.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train; auto: CUDA where there is a GPU.")
    threads_per_process: int = Field(
        0, ge=0, le=1024, description="CPU threads of each process; 0 shares the cores between the processes of this machine."
    )
    collective_timeout: int = Field(
        600,
        ge=10,
        le=86400,
        description="Seconds a rank waits for the others before the run fails, as after a cut link; "
        "longer than the first rank takes to save a checkpoint.",
    )

    # Watching and keeping.
    profile: Annotated[str, Field(pattern=r"^\d+:\d+$")] | None = Field(
        None, description="START:END traces these steps of the process into trace_rank<R>.json in the run's folder."
    )
    log_interval: PositiveInt = Field(10, description="Steps between two log lines.")
    eval_interval: int = Field(100, ge=0, description="Steps between two validations; 0: only at the end.")
    eval_tokens: int = Field(
        1 << 20, ge=1, description="Validation tokens of each validation during training, the same each time."
    )
    save_interval: int = Field(500, ge=0, description="Steps between two checkpoints; 0: only at the end.")
    background_save: bool = Field(
        True,
        description="Write the checkpoints between while the training goes on, from a copy of the state in the CPU's memory; "
        "--no-background_save spares that memory, 12 bytes a parameter with AdamW, and lets the training wait.",
    )
    keep_checkpoints: int = Field(2, ge=2, description="Newest checkpoints to keep.")

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        hidden_size, _, num_heads, num_kv_heads = self.shape()
        if hidden_size % num_heads or (hidden_size // num_heads) % 2:
            raise ValueError(f"num_heads {num_heads} must divide hidden_size {hidden_size} into heads of even width")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads {num_kv_heads} must divide num_heads {num_heads}")
        if self.max_length is not None and self.stride is not None and self.stride >= self.max_length:
            raise ValueError(f"stride {self.stride} must be smaller than max_length {self.max_length}")
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr {self.min_lr} must not exceed learning_rate {self.learning_rate}")
        if self.profile is not None and int(self.profile.split(":")[0]) >= int(self.profile.split(":")[1]):
            raise ValueError(f"profile {self.profile} must end after it starts")
        if self.profile is not None and int(self.profile.split(":")[1]) > self.max_steps:
            raise ValueError(f"profile {self.profile} must end within the {self.max_steps} steps of the run")
        if self.replay_share is not None and self.init_from is None:
            raise ValueError(f"replay_share {self.replay_share} needs init_from: only a continued run has old text")
        if self.warmup_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must not exceed max_steps {self.max_steps}")
        return self

    def shape(self) -> tuple[int, int, int, int]:
        """hidden_size, num_layers, num_heads, num_kv_heads, with the preset's value where none is given.

        A head count without a num_kv_heads of its own means plain multi-head attention, as the user's document has it.
        """
        hidden_size, num_layers, num_heads, num_kv_heads = PRESETS[self.model]
        if self.num_heads is not None:
            num_kv_heads = self.num_heads
        return (
            self.hidden_size or hidden_size,
            self.num_layers or num_layers,
            self.num_heads or num_heads,
            self.num_kv_heads or num_kv_heads,
        )

    def resolved(self, max_length: int, stride: int) -> Self:
        """The same configuration with every default that depends on something else filled in; takes the dataset's windows.

        Raises:
            UserError: the dataset's window does not go together with one given here.
        """
        hidden_size, num_layers, num_heads, num_kv_heads = self.shape()
        values: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "intermediate_size": self.intermediate_size or swiglu_width(hidden_size),
            "max_length": self.max_length or max_length,
            "stride": stride if self.stride is None else self.stride,
            "min_lr": self.learning_rate / 10 if self.min_lr is None else self.min_lr,
            "warmup_steps": min(2000, self.max_steps // 20) if self.warmup_steps is None else self.warmup_steps,
        }
        if values["stride"] >= values["max_length"]:
            raise UserError(f"--stride {values['stride']} must be smaller than --max_length {values['max_length']}")
        return self.model_copy(update=values)


class EvaluateConfig(StageConfig):
    """How a checkpoint is judged on the held-out text."""

    execution_fields = frozenset({"eval_batch_size"})

    max_eval_tokens: int = Field(
        4 << 20, ge=0, description="The budget: validation tokens to read, from the start of the held-out stream; 0: all of them."
    )
    eval_batch_size: PositiveInt = Field(8, description="Windows per forward pass.")
    sample_prompts: list[str] = Field(
        ["The ", "Return the "], min_length=1, description="Prompts that are continued to show what the model writes."
    )
    sample_tokens: int = Field(64, ge=1, description="Tokens to write for each prompt.")
    sample_temperature: float = Field(0.8, ge=0, description="0 always takes the likeliest token.")
    sample_top_k: int = Field(50, ge=0, description="Draw from this many likeliest tokens; 0: from all.")
    sample_seed: int = Field(0, ge=0, description="Seed of the draws.")


class HarnessConfig(StageConfig):
    """Which tasks of EleutherAI's harness (lm-eval) a model is tried on."""

    execution_fields = frozenset({"lm_eval_batch_size", "lm_eval_task_dir"})

    lm_eval_tasks: list[str] = Field(
        [],
        validation_alias=AliasChoices("lm_eval_tasks", "tasks"),
        description="Tasks, groups and tags by name; empty: none. Most of them download their data from the Hugging Face hub.",
    )
    lm_eval_task_dir: str | None = Field(
        None,
        validation_alias=AliasChoices("lm_eval_task_dir", "task_dir"),
        description="Folder with task definitions (YAML) of your own; data_files in them are relative to the working directory.",
    )
    lm_eval_limit: PositiveInt | None = Field(
        None,
        validation_alias=AliasChoices("lm_eval_limit", "limit"),
        description="The budget: examples of each task, from its start; default: all of them.",
    )
    lm_eval_batch_size: PositiveInt = Field(
        8, validation_alias=AliasChoices("lm_eval_batch_size", "batch_size"), description="Requests per forward pass."
    )


class ReleaseConfig(StageConfig):
    """When a checkpoint becomes the released model."""

    min_improvement: float = Field(
        0.0, description="Bits per byte by which a new model must beat the released one on the same held-out text."
    )


class ModelConfig(StageConfig):
    """The resolved shape of one model: what a checkpoint needs to be rebuilt."""

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    intermediate_size: PositiveInt
    max_length: PositiveInt
    tie_embeddings: bool
    rope_theta: float
    norm_eps: float
    dropout: float
    document_masking: bool

    @classmethod
    def of(cls, config: TrainConfig, vocab_size: int) -> Self:
        """The model that a resolved training configuration describes."""
        fields = set(cls.model_fields) - {"vocab_size"}
        return cls(vocab_size=vocab_size, **config.model_dump(include=fields))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, a tied matrix counted once, the padding rows of the vocabulary included."""
        kv_size = self.num_kv_heads * self.head_dim
        attention = 2 * self.hidden_size * (self.hidden_size + kv_size)
        block = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        ends = self.padded_vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2) + self.hidden_size
        return ends + self.num_layers * block

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head: matrix products like multiples of 64."""
        return round_up(self.vocab_size, 64)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def swiglu_width(hidden_size: int) -> int:
    """Width inside SwiGLU: 8/3 of the hidden size keeps a 4x MLP's parameter count, rounded up to a multiple of 64."""
    return round_up(-(-8 * hidden_size // 3), 64)
