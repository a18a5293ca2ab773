"""One typed, flat configuration per stage.

The same class is the command line (`llm_core.cli`), the Dagster launchpad (by inheritance in `pipeline`) and the record in
manifests, checkpoints and the catalog. Paths are not here: they do not change a result.
"""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from llm_core.errors import UserError
from llm_core.recipe import DEFAULT_STEPS, batch_windows, choose_optimizer, recipe_defaults
from llm_core.system import has_fast_bf16, is_unicode

PositiveInt = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# Marks a field that affects how a result is computed, not the result: it is not part of an artifact's id.
EXECUTION = "execution"

# Marks a field that the first versions did not have: it is part of an id only where it has a value.
ADDED = "added"

END_OF_TEXT = "<|endoftext|>"
MIN_DOCUMENT_BYTES = 256
MIN_VOCAB_SIZE = 258  # 256 bytes, one special token and one merge
AUTO = "auto"
MODEL_NAMES = Literal["auto", "tiny", "small", "medium", "large", "xl"]

# The options that say how long to train.
BUDGETS = ("max_steps", "max_tokens", "max_epochs", "train_minutes")

# The options that are the sizes of the model.
SHAPE = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size")

# hidden_size, num_layers, num_heads, num_kv_heads.
PRESETS: dict[str, tuple[int, int, int, int]] = {
    "tiny": (256, 6, 8, 8),
    "small": (768, 12, 12, 12),
    "medium": (1024, 24, 16, 8),
    "large": (1536, 24, 16, 8),
    "xl": (2048, 32, 32, 8),
}


Stage = TypeVar("Stage", bound="StageConfig")


class StageConfig(BaseModel):
    """Base of every stage's configuration. Unknown fields are refused; instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("contains a NUL character, which neither a path nor a command line can hold; remove it")
        texts = [value] if isinstance(value, str) else value if isinstance(value, list | dict) else []
        if not all(is_unicode(text) for text in texts if isinstance(text, str)):
            raise ValueError("not UTF-8; write it in UTF-8, or rename the file or folder")
        return value

    def identity(self) -> dict[str, Any]:
        """The fields that determine the result, for `content_id`. A field stays marked in subclasses that override it."""
        stages = [stage for stage in type(self).__mro__ if issubclass(stage, StageConfig)]
        marks = [(name, field.metadata) for stage in stages for name, field in stage.model_fields.items()]
        excluded = {name for name, mark in marks if EXECUTION in mark or (ADDED in mark and getattr(self, name) is None)}
        return self.model_dump(mode="json", exclude=excluded)

    def stage(self, stage: type[Stage]) -> Stage:
        """The fields of one stage, from a subclass such as a tool's options or a Dagster launchpad."""
        return stage.model_validate(self.model_dump(include=set(stage.model_fields)))


class CorpusConfig(StageConfig):
    """How files become documents."""

    text_field: str = Field(
        "text", min_length=1, description="Name of the field or column that holds the text in .jsonl and .parquet files."
    )
    max_document_bytes: int = Field(
        32 * 1024,
        ge=MIN_DOCUMENT_BYTES,
        description="Longer texts are split at line ends into documents of at most this many UTF-8 bytes.",
    )
    val_fraction: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="Share of documents held out for validation, chosen by the hash of each document's content.",
    )
    invalid_utf8: Literal["quarantine", "replace"] = Field(
        "quarantine",
        description="Text that is not UTF-8: quarantine it, or replace each bad sequence with U+FFFD.",
    )
    min_characters: PositiveInt | None = Field(
        None, description="Drop texts (files, lines, rows) of fewer characters than this; default: none."
    )
    max_characters: PositiveInt | None = Field(
        None, description="Drop texts of more characters than this, before they are split into documents; default: none."
    )
    max_repetition: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="Drop documents in which a larger share of the characters is in repeated five-word sequences;"
        " Rae et al. 2021 (Gopher) use 0.15; default: none.",
    )
    min_letter_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Drop documents with a smaller share of letters among non-white-space characters; default: none.",
    )
    near_duplicates: Annotated[float, Field(ge=0.5, lt=1)] | None = Field(
        None,
        description="Drop documents whose similarity to an earlier one is at least this: estimated Jaccard similarity of"
        " five-word shingles; 0.8 is usual; default: none. Needs the extra dedup.",
    )

    @model_validator(mode="after")
    def _lengths_fit(self) -> "CorpusConfig":
        if self.min_characters and self.max_characters and self.min_characters > self.max_characters:
            raise ValueError(f"min_characters {self.min_characters} must not exceed max_characters {self.max_characters}")
        return self


class TokenizerConfig(StageConfig):
    """How text becomes token ids."""

    tokenizer_type: Literal["bpe", "wordpiece", "tiktoken"] = Field(
        "bpe", description="Byte-level BPE or WordPiece trained on the corpus, or a published tiktoken encoding."
    )
    vocab_size: int = Field(
        32000,
        ge=MIN_VOCAB_SIZE,
        le=1_000_000,
        description="Tokens in the vocabulary, special tokens included (bpe and wordpiece).",
    )
    special_tokens: list[str] = Field(
        [END_OF_TEXT], min_length=1, description="Special tokens; the first one separates documents."
    )
    tokenizer_train_bytes: int = Field(
        1 << 30, ge=1 << 16, description="The tokenizer is trained on a seeded sample of at most this many bytes of text."
    )
    tokenizer_seed: int = Field(0, ge=0, description="Seed of that sample.")
    tiktoken_encoding: str = Field("gpt2", description="Name of the tiktoken encoding (tokenizer_type tiktoken).")
    tiktoken_ranks: str | None = Field(
        None, description="A local ranks file (.tiktoken) to use instead of the named encoding's download."
    )
    retrain_tokenizer: Annotated[bool, EXECUTION] = Field(
        False,
        description="Train a new tokenizer on the current text instead of keeping the one with the same configuration. One is "
        "also trained when none of the text that it was trained on remains.",
    )
    retrain_on_drift: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, EXECUTION] = Field(
        None,
        description="Train a new tokenizer when text added since it was trained has this share fewer bytes per token; "
        "default: never.",
    )

    @model_validator(mode="after")
    def _ranks_need_tiktoken(self) -> "TokenizerConfig":
        if self.tiktoken_ranks is not None and self.tokenizer_type != "tiktoken":
            raise ValueError(
                f"tiktoken_ranks {self.tiktoken_ranks}: not with tokenizer_type {self.tokenizer_type}, only tiktoken"
            )
        return self


class ShardConfig(StageConfig):
    """How token ids are stored and cut into windows."""

    max_length: Annotated[int, EXECUTION] = Field(
        2048, ge=8, le=1 << 20, description="Window length in tokens: the context of the model."
    )
    stride: Annotated[int, EXECUTION] = Field(0, ge=0, description="Overlap between consecutive windows in tokens.")
    num_workers: Annotated[int, EXECUTION] = Field(
        0, ge=0, le=1024, description="Encoding workers; 0: one per core of this machine or of the Ray cluster."
    )
    engine: Annotated[Literal["local", "ray"], EXECUTION] = Field(
        "local",
        description="local: threads of this process; ray: Ray, here or on the cluster RAY_ADDRESS (needs the extra ray). "
        "Both write the same bytes.",
    )
    shard_bytes: int = Field(
        128 << 20, ge=1 << 16, description="Bytes of text in one shard; a document is never split between shards."
    )

    @model_validator(mode="after")
    def _stride_fits(self) -> "ShardConfig":
        if self.stride >= self.max_length:
            raise ValueError(f"stride {self.stride} must be smaller than max_length {self.max_length}")
        return self


class TrainConfig(StageConfig):
    """Shape of the model, data, optimization and execution of one training run."""

    # Shape.
    # `model` enters the run's id through its sizes, `init_from` through the checkpoint's id.
    model: Annotated[MODEL_NAMES, EXECUTION] = Field(
        "auto",
        description="Preset of the four sizes below; any of them overrides it; auto: tiny, or with train_minutes what suits the "
        "time.",
    )
    hidden_size: PositiveInt | None = Field(None, description="Width of the residual stream; default: the preset's.")
    num_layers: PositiveInt | None = Field(None, description="Decoder blocks; default: the preset's.")
    num_heads: PositiveInt | None = Field(None, description="Query heads; must divide hidden_size; default: the preset's.")
    num_kv_heads: PositiveInt | None = Field(
        None, description="Key and value heads (grouped-query attention); must divide num_heads; default: the preset's."
    )
    intermediate_size: PositiveInt | None = Field(
        None, description="Hidden width of SwiGLU; default: 8/3 of hidden_size, rounded up to a multiple of 64."
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
        description="Relative weight of each source in the windows read; a source is a top-level folder of the raw text "
        "('.': files in no folder; '*': all other sources); empty: no mixture.",
    )
    max_source_epochs: float = Field(
        4.0, ge=1, description="Maximum epochs over each group of documents; the excess goes to the other groups in proportion."
    )

    # Continued training.
    init_from: Annotated[str | None, EXECUTION] = Field(
        None, description="Start from the weights of this checkpoint, or of a run's folder, with a new warm-up and optimizer."
    )
    replay_share: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="With init_from: share of the windows from documents its parents have read; the rest are from new ones."
    )

    # Optimization.
    batch_size: Annotated[int, Field(gt=0, le=1 << 24)] | None = Field(
        None, description="Windows per optimizer step, over all ranks; default: by the recipe."
    )
    micro_batch_size: Annotated[PositiveInt | None, EXECUTION] = Field(
        None, description="Windows per rank and forward pass; default: all of the rank. Gradient accumulation follows from it."
    )
    max_steps: PositiveInt | None = Field(
        None, description=f"Optimizer steps of the whole run; default: {DEFAULT_STEPS:,}, unless another budget is given."
    )
    max_tokens: Annotated[PositiveInt | None, ADDED] = Field(
        None, description="Tokens to train on, in whole steps, in place of max_steps."
    )
    max_epochs: Annotated[Annotated[float, Field(gt=0, le=1000)] | None, ADDED] = Field(
        None, description="Passes over the training text, in whole steps, in place of max_steps."
    )
    train_minutes: Annotated[Annotated[float, Field(gt=0, le=1_000_000)] | None, ADDED] = Field(
        None,
        description="Minutes for the whole training, in place of max_steps: measures this machine, then chooses the batch, the "
        "steps and, if none of its sizes is given, the model; the text is read at most max_source_epochs times.",
    )
    optimizer: Literal["auto", "adamw", "muon"] = Field(
        "auto",
        description="muon: Muon for the matrices in the blocks and AdamW for everything else; auto: muon, but adamw if only "
        "learning_rate is given.",
    )
    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Peak learning rate; with muon, of the matrices in the blocks; default: by the recipe."
    )
    embedding_lr: Annotated[Annotated[float, Field(gt=0, lt=100)] | None, ADDED] = Field(
        None, description="Peak learning rate of the embedding; default: by the recipe."
    )
    head_lr: Annotated[Annotated[float, Field(gt=0, lt=100)] | None, ADDED] = Field(
        None, description="Peak learning rate of the head; default: by the recipe."
    )
    min_lr: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Learning rate of the last step; default: by the recipe."
    )
    lr_schedule: Literal["auto", "cosine", "linear", "wsd"] = Field(
        "auto",
        description="Decay after warm-up: cosine, linear, or wsd (constant, then linear: warm-up-stable-decay); auto: by the "
        "recipe.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="Steps of linear warm-up; default: by the recipe.")
    decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Share of the steps in the final decay of lr_schedule wsd; default: by the recipe."
    )
    weight_decay: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Decoupled weight decay of matrices; norms are never decayed; default: by the recipe."
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon: momentum.")
    beta1: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="AdamW: decay of the first moment; default: by the recipe."
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="AdamW: decay of the second moment; default: by the recipe."
    )
    adam_eps: Annotated[float, Field(gt=0, lt=1e-2)] | None = Field(None, description="AdamW: epsilon; default: by the recipe.")
    grad_clip: float = Field(1.0, ge=0, description="Maximum global gradient norm; 0 disables clipping.")
    max_skipped_steps: Annotated[PositiveInt, EXECUTION] = Field(
        10, description="Stop the run after this many consecutive steps with gradients that are not finite."
    )

    # Execution.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Dtype of the matrix products; auto: bf16 where the device has fast units for it, else fp32."
    )
    mixed_precision: bool = Field(
        False, description="With precision auto: fp16 rather than fp32 on GPUs without fast units for bf16."
    )
    attention: Annotated[Literal["auto", "flash", "sdpa"], EXECUTION] = Field(
        "auto", description="flash: the flash-attn package (CUDA, bf16 or fp16); sdpa: PyTorch's own; auto: flash where it runs."
    )
    compile_model: Annotated[bool, EXECUTION] = Field(False, description="Compile each block with torch.compile.")
    gradient_checkpointing: Annotated[bool, EXECUTION] = Field(
        False, description="Recompute each block in the backward pass: less memory, more time."
    )
    sharding: Annotated[Literal["ddp", "fsdp"], EXECUTION] = Field(
        "ddp",
        description="ddp: each rank holds the model; fsdp: weights, gradients and optimizer state are sharded over the ranks "
        "(FSDP2), for models that do not fit on one device.",
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], EXECUTION] = Field(
        "auto", description="Where to train; auto: CUDA where there is a GPU."
    )
    threads_per_process: Annotated[int, EXECUTION] = Field(
        0, ge=0, le=1024, description="CPU threads of each process; 0: an equal share of this machine's cores."
    )
    collective_timeout: Annotated[int, EXECUTION] = Field(
        600,
        ge=10,
        le=86400,
        description="Seconds a rank waits for the others before the run fails, for instance when a network link is cut; "
        "must exceed the time rank 0 takes to save a checkpoint.",
    )

    # Logging, validation and checkpoints.
    profile: Annotated[Annotated[str, Field(pattern=r"^\d+:\d+$")] | None, EXECUTION] = Field(
        None, description="START:END: trace these steps into trace_rank<R>.json in the run folder."
    )
    log_interval: Annotated[PositiveInt, EXECUTION] = Field(10, description="Steps between two log lines.")
    eval_interval: Annotated[int, EXECUTION] = Field(100, ge=0, description="Steps between two validations; 0: only at the end.")
    eval_tokens: Annotated[PositiveInt | None, EXECUTION] = Field(
        None,
        description="Held-out tokens of each validation, the same every time and spread evenly over the text; default: as many "
        "as take 5 % of the training time, at least one window, at most 1,048,576.",
    )
    save_interval: Annotated[int, EXECUTION] = Field(500, ge=0, description="Steps between two checkpoints; 0: only at the end.")
    background_save: Annotated[bool, EXECUTION] = Field(
        True,
        description="Write intermediate checkpoints in the background, from a copy of the state in CPU memory; "
        "--no-background_save saves that memory, 12 bytes per parameter with AdamW, and pauses training instead.",
    )
    keep_checkpoints: Annotated[int, EXECUTION] = Field(2, ge=2, description="Newest checkpoints to keep.")

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        hidden_size, _, num_heads, num_kv_heads = self.shape()
        if hidden_size % num_heads or (hidden_size // num_heads) % 2:
            raise ValueError(f"num_heads {num_heads} must divide hidden_size {hidden_size} into heads of even width")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads {num_kv_heads} must divide num_heads {num_heads}")
        if self.max_length is not None and self.stride is not None and self.stride >= self.max_length:
            raise ValueError(f"stride {self.stride} must be smaller than max_length {self.max_length}")
        if self.min_lr is not None and self.learning_rate is not None and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr {self.min_lr} must not exceed learning_rate {self.learning_rate}")
        if self.profile is not None and int(self.profile.split(":")[0]) >= int(self.profile.split(":")[1]):
            raise ValueError(f"profile {self.profile} must end after it starts")
        if self.replay_share is not None and self.init_from is None:
            raise ValueError(f"replay_share {self.replay_share} needs init_from: only a continued run has old text")
        budgets = {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}
        if len(budgets) > 1:
            given = " and ".join(f"{name} {value}" for name, value in budgets.items())
            raise ValueError(f"{given}: each says how long to train; give one of them")
        steps = self.max_steps or (DEFAULT_STEPS if not budgets else None)
        if steps is not None and (problem := self._past_the_end(steps)) is not None:
            raise ValueError(problem)
        return self

    def _past_the_end(self, steps: int) -> str | None:
        """What is wrong with options that count steps, in a run of so many."""
        if self.profile is not None and int(self.profile.split(":")[1]) > steps:
            return f"profile {self.profile} must end within the {steps} steps of the run"
        if self.warmup_steps is not None and self.warmup_steps > steps:
            return f"warmup_steps {self.warmup_steps} must not exceed the {steps} steps of the run"
        return None

    def shape(self) -> tuple[int, int, int, int]:
        """hidden_size, num_layers, num_heads, num_kv_heads, with the preset's value for each that is None.

        num_heads without num_kv_heads means multi-head attention.
        """
        hidden_size, num_layers, num_heads, num_kv_heads = PRESETS["tiny" if self.model == AUTO else self.model]
        if self.num_heads is not None:
            num_kv_heads = self.num_heads
        return (
            self.hidden_size or hidden_size,
            self.num_layers or num_layers,
            self.num_heads or num_heads,
            self.num_kv_heads or num_kv_heads,
        )

    @property
    def has_shape(self) -> bool:
        """Whether any size of the model is given."""
        return self.model != AUTO or any(getattr(self, name) is not None for name in SHAPE)

    def resolved(self, max_length: int, stride: int, train_tokens: int | None = None) -> "ResolvedTrainConfig":
        """A copy with every derived default filled in, without `train_minutes`, which needs a plan.

        max_length, stride, train_tokens: those of the dataset; only max_epochs needs the last one.

        Raises:
            UserError: two values do not fit together, one of them derived.
        """
        assert self.train_minutes is None, "a plan replaces it"
        length = self.max_length or max_length
        stride = self.stride if self.stride is not None else stride
        if stride >= length:
            raise UserError(f"--stride {stride} must be smaller than --max_length {length}")
        optimizer = choose_optimizer(self.optimizer, self.learning_rate)
        tokens = self.max_tokens
        if self.max_epochs is not None:
            assert train_tokens is not None, "epochs are passes over a dataset"
            tokens = round(self.max_epochs * train_tokens * length / (length - stride))
        steps = self.max_steps or (DEFAULT_STEPS if tokens is None else None)
        batch_size = self.batch_size or batch_windows(optimizer, self.learning_rate, length, max_steps=steps, tokens=tokens)
        if steps is None:
            assert tokens is not None, "without steps there is another budget"
            steps = max(1, int(tokens / (batch_size * length)))
        if (problem := self._past_the_end(steps)) is not None:
            raise UserError(f"--{problem}")
        hidden_size, num_layers, num_heads, num_kv_heads = self.shape()
        values: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "intermediate_size": swiglu_width(hidden_size),
            "max_length": length,
            "stride": stride,
            "batch_size": batch_size,
            "optimizer": optimizer,
            "max_steps": steps,
        }
        if not self.mixed_precision and has_fast_bf16(self.device):
            values["precision"] = "bf16"
        values |= recipe_defaults(
            optimizer,
            self.learning_rate,
            hidden_size=hidden_size,
            max_steps=steps,
            tied=self.tie_embeddings,
            continued=self.init_from is not None,
        )
        given = self.model_dump(include=set(TrainConfig.model_fields), exclude=set(BUDGETS), exclude_none=True)
        values |= {name: value for name, value in given.items() if name not in values or value != AUTO}
        if "eval_tokens" not in values:
            values["eval_tokens"] = self._affordable_eval_tokens(length, steps, batch_size)
        if values["min_lr"] > values["learning_rate"]:
            raise UserError(f"--min_lr {values['min_lr']} must not exceed the learning rate {values['learning_rate']:.2g}")
        return ResolvedTrainConfig.model_validate(values)

    def validations(self, max_steps: int) -> int:
        """How often a run of so many steps is validated."""
        return -(-max_steps // self.eval_interval) if self.eval_interval else 1

    def _affordable_eval_tokens(self, max_length: int, max_steps: int, batch_size: int) -> int:
        """Whole windows for each validation, such that all of them take at most 5 % of the training time; at least one.

        A forward pass takes a third of the time of a forward and a backward pass. The number follows from the options alone, so
        that a resumed run validates on the same text.
        """
        windows = 3 * max_steps * batch_size // (20 * self.validations(max_steps))
        return max(1, min(windows, (1 << 20) // max_length)) * max_length


class ResolvedTrainConfig(TrainConfig):
    """A training configuration without open defaults, from `TrainConfig.resolved`: it determines a run."""

    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    intermediate_size: PositiveInt
    max_length: int
    stride: int
    batch_size: int
    max_steps: PositiveInt
    optimizer: Literal["adamw", "muon"]
    learning_rate: float
    min_lr: float
    lr_schedule: Literal["cosine", "linear", "wsd"]
    warmup_steps: int
    decay_fraction: float
    weight_decay: float
    beta1: float
    beta2: float
    adam_eps: float
    eval_tokens: int


class EvaluateConfig(StageConfig):
    """How a checkpoint is evaluated on held-out text."""

    max_eval_tokens: int = Field(
        4 << 20, ge=0, description="Held-out tokens to read, spread evenly over the text, each source by its share; 0: all."
    )
    eval_window: Annotated[int, Field(ge=8)] | None = Field(
        None,
        description="Tokens of each window of this text; default: the model's max_length. Models with another max_length read "
        "the same text with the same number.",
    )
    eval_batch_size: Annotated[PositiveInt, EXECUTION] = Field(8, description="Windows per forward pass.")
    sample_prompts: list[str] = Field(["The ", "Return the "], min_length=1, description="Prompts for the text samples.")
    sample_tokens: int = Field(64, ge=1, description="Tokens to generate for each prompt.")
    sample_temperature: float = Field(0.8, ge=0, description="Sampling temperature; 0 always takes the most likely token.")
    sample_top_k: int = Field(50, ge=0, description="Sample from the k most likely tokens; 0: from all.")
    sample_seed: int = Field(0, ge=0, description="Seed of the sampling.")

    def resolved(self, max_length: int) -> Self:
        """A copy with every derived default filled in. max_length: that of the model."""
        return self.model_copy(update={"eval_window": self.eval_window or max_length})


def _split_at_commas(names: Any) -> Any:
    """Names of tasks contain no comma: `a,b` is two of them, as in lm-eval's own command."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return names
    return [stripped for name in names for part in name.split(",") if (stripped := part.strip())]


class TasksConfig(StageConfig):
    """Which tasks of EleutherAI's lm-eval a model is evaluated on."""

    lm_eval_tasks: Annotated[list[str], BeforeValidator(_split_at_commas)] = Field(
        [],
        validation_alias=AliasChoices("lm_eval_tasks", "tasks"),
        description="Names of tasks, groups and tags, each an item or separated by commas; empty: none. Most download their data "
        "from the Hugging Face hub.",
    )
    lm_eval_task_dir: Annotated[str | None, EXECUTION] = Field(
        None,
        validation_alias=AliasChoices("lm_eval_task_dir", "task_dir"),
        description="Folder with your own task definitions (YAML); their data_files are relative to the working directory.",
    )
    lm_eval_limit: PositiveInt | None = Field(
        None,
        validation_alias=AliasChoices("lm_eval_limit", "limit"),
        description="Examples of each task, from its start; default: all.",
    )
    lm_eval_batch_size: Annotated[PositiveInt, EXECUTION] = Field(
        8, validation_alias=AliasChoices("lm_eval_batch_size", "batch_size"), description="Requests per forward pass."
    )


class ReleaseConfig(StageConfig):
    """When a checkpoint becomes the released model."""

    min_improvement: float = Field(
        0.0,
        description="Bits per byte by which a new model must beat the released one on the same held-out text. Above 0, a tie "
        "never replaces it. Below 0, a model may also be worse, if it is certainly not worse by more than this.",
    )


class ModelConfig(StageConfig):
    """The resolved shape of a model, enough to rebuild it from a checkpoint."""

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
    def of(cls, config: ResolvedTrainConfig, vocab_size: int) -> Self:
        """The model that a training configuration describes."""
        fields = set(cls.model_fields) - {"vocab_size"}
        return cls(vocab_size=vocab_size, **config.model_dump(include=fields))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Trainable parameters. A tied matrix counts once; padding rows of the vocabulary count."""
        kv_size = self.num_kv_heads * self.head_dim
        attention = 2 * self.hidden_size * (self.hidden_size + kv_size)
        block = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        ends = self.padded_vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2) + self.hidden_size
        return ends + self.num_layers * block

    @property
    def computing_parameters(self) -> int:
        """Parameters without the embedding, which is only looked up unless it is also the head."""
        return self.num_parameters - (0 if self.tie_embeddings else self.padded_vocab_size * self.hidden_size)

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token: 6 per matmul parameter (the head counts, the embedding lookup does not), plus attention.

        The two products of attention take 12 * layers * hidden_size * length, forward and backward; causality halves that.
        """
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return 6 * (self.computing_parameters - norms) + 6 * self.num_layers * self.hidden_size * self.max_length

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head, a multiple of 64, at which matrix products are fastest."""
        return round_up(self.vocab_size, 64)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def swiglu_width(hidden_size: int) -> int:
    """8/3 of the hidden size, which keeps the parameter count of a 4x MLP, rounded up to a multiple of 64."""
    return round_up(-(-8 * hidden_size // 3), 64)


# Target of positions that carry no loss: the padding of the last window.
IGNORE_INDEX = -100


def decay_start(config: ResolvedTrainConfig) -> int:
    """The step at which the learning rate starts to fall."""
    if config.lr_schedule != "wsd":
        return config.warmup_steps
    return max(config.warmup_steps, config.max_steps - 1 - round(config.decay_fraction * config.max_steps))


def step_before_decay(config: ResolvedTrainConfig) -> int | None:
    """The step whose checkpoint is kept for continued training; None if that is the last one.

    It is the start of the final decay of wsd, unless that is most of the run.
    """
    return decay_start(config) if config.lr_schedule == "wsd" and config.decay_fraction <= 0.5 else None


def micro_batch_size(config: ResolvedTrainConfig, world_size: int) -> int:
    """Windows per rank and forward pass. Raises UserError: see `divide_batch`."""
    return divide_batch(config.batch_size, config.micro_batch_size, world_size)


def divide_batch(batch: int, micro: int | None, world_size: int) -> int:
    """Windows per rank and forward pass. micro: as configured; None for all of the rank.

    Raises:
        UserError: the batch does not divide evenly.
    """
    if micro is None:
        if batch % world_size:
            raise UserError(f"--batch_size {batch} does not divide among {world_size} ranks; use a multiple of {world_size}")
        return batch // world_size
    if batch % (micro * world_size):
        raise UserError(
            f"--batch_size {batch} is not a multiple of --micro_batch_size {micro} x {world_size} ranks = {micro * world_size};"
            " use a multiple of it"
        )
    return micro
