-- The tables of the catalog. Each section is one schema version and runs once, in order, in one transaction.
-- Released sections are never edited: a change is a new section at the end.

-- version 1

CREATE TABLE snapshots (
    snapshot_id VARCHAR PRIMARY KEY,
    parent_snapshot_id VARCHAR,
    taken_at TIMESTAMP NOT NULL,        -- UTC
    files BIGINT NOT NULL,
    documents BIGINT NOT NULL,          -- kept
    bytes_read BIGINT NOT NULL,
    bytes_kept BIGINT NOT NULL,
    bytes_dropped JSON NOT NULL,        -- reason -> bytes
    config JSON NOT NULL
);

-- One row per distinct text that a snapshot has kept.
CREATE TABLE documents (
    document_id VARCHAR PRIMARY KEY,    -- SHA-256 of the text's UTF-8 bytes
    path VARCHAR NOT NULL,              -- where it was first seen, relative to the raw text folder
    bytes BIGINT NOT NULL,
    characters BIGINT NOT NULL,
    split VARCHAR NOT NULL,             -- train | val
    first_seen TIMESTAMP NOT NULL       -- UTC
);

-- Every document of a snapshot, duplicates and rejected ones included.
CREATE TABLE snapshot_documents (
    snapshot_id VARCHAR NOT NULL,
    document_id VARCHAR NOT NULL,
    path VARCHAR NOT NULL,
    start_byte BIGINT NOT NULL,         -- in the decompressed file
    end_byte BIGINT NOT NULL,
    status VARCHAR NOT NULL             -- kept | duplicate | reason it was dropped
);

CREATE TABLE tokenizers (
    tokenizer_id VARCHAR PRIMARY KEY,
    tokenizer_type VARCHAR NOT NULL,
    vocab_size BIGINT NOT NULL,
    snapshot_id VARCHAR NOT NULL,       -- the text it was trained on
    train_bytes BIGINT NOT NULL,
    bytes_per_token DOUBLE NOT NULL,
    tokens_per_word DOUBLE NOT NULL,
    vocab_used DOUBLE NOT NULL,         -- share of the vocabulary that the measured text uses
    sha256 VARCHAR NOT NULL,
    config JSON NOT NULL
);

CREATE TABLE shards (
    shard_id VARCHAR PRIMARY KEY,
    tokenizer_id VARCHAR NOT NULL,
    split VARCHAR NOT NULL,
    dtype VARCHAR NOT NULL,
    tokens BIGINT NOT NULL,
    documents BIGINT NOT NULL,
    bytes BIGINT NOT NULL,              -- of text
    file_bytes BIGINT NOT NULL,
    sha256 VARCHAR NOT NULL
);

CREATE TABLE shard_documents (
    shard_id VARCHAR NOT NULL,
    document_id VARCHAR NOT NULL,
    token_start BIGINT NOT NULL,        -- in the shard, end-of-text included
    token_count BIGINT NOT NULL
);

CREATE TABLE datasets (
    dataset_id VARCHAR PRIMARY KEY,
    snapshot_id VARCHAR NOT NULL,
    tokenizer_id VARCHAR NOT NULL,
    parent_dataset_id VARCHAR,
    train_tokens BIGINT NOT NULL,
    val_tokens BIGINT NOT NULL,
    train_documents BIGINT NOT NULL,
    val_documents BIGINT NOT NULL,
    dtype VARCHAR NOT NULL
);

CREATE TABLE dataset_shards (
    dataset_id VARCHAR NOT NULL,
    shard_id VARCHAR NOT NULL,
    position BIGINT NOT NULL,
    removed_documents BIGINT NOT NULL,
    PRIMARY KEY (dataset_id, shard_id)
);

CREATE TABLE training_runs (
    run_id VARCHAR PRIMARY KEY,
    dataset_id VARCHAR NOT NULL,
    tokenizer_id VARCHAR NOT NULL,
    parent_run_id VARCHAR,              -- whose weights it started from
    parent_step BIGINT,
    config JSON NOT NULL,
    seed BIGINT NOT NULL,
    code_version VARCHAR NOT NULL,
    git_commit VARCHAR,
    status VARCHAR NOT NULL,            -- running | finished | preempted | failed
    error VARCHAR,
    started_at TIMESTAMP NOT NULL,      -- UTC
    finished_at TIMESTAMP,
    steps_done BIGINT NOT NULL,
    tokens_seen BIGINT NOT NULL,
    skipped_steps BIGINT NOT NULL,
    parameters BIGINT NOT NULL,
    world_size INTEGER NOT NULL,
    threads INTEGER NOT NULL,
    device VARCHAR NOT NULL,
    precision VARCHAR NOT NULL,
    attention VARCHAR NOT NULL,
    torch_version VARCHAR NOT NULL
);

-- One row per optimizer step; the validation columns are NULL at steps without a validation.
CREATE TABLE train_metrics (
    run_id VARCHAR NOT NULL,
    step BIGINT NOT NULL,
    tokens BIGINT NOT NULL,
    loss DOUBLE,                        -- nats per token; NULL where it was not finite
    learning_rate DOUBLE,
    grad_norm DOUBLE,                   -- before clipping
    tokens_per_second DOUBLE,
    skipped BOOLEAN,
    val_loss DOUBLE,
    val_bits_per_byte DOUBLE,
    PRIMARY KEY (run_id, step)
);

-- The first optimizer step (0-based) with tokens of a document as targets.
CREATE TABLE run_documents (
    run_id VARCHAR NOT NULL,
    document_id VARCHAR NOT NULL,
    first_step BIGINT NOT NULL
);

CREATE TABLE checkpoints (
    checkpoint_id VARCHAR PRIMARY KEY,
    run_id VARCHAR NOT NULL,
    step BIGINT NOT NULL,               -- completed optimizer steps
    tokens_seen BIGINT NOT NULL,
    path VARCHAR NOT NULL,              -- relative to the checkpoints folder
    sha256 VARCHAR NOT NULL,
    bytes BIGINT NOT NULL,
    val_loss DOUBLE,
    on_disk BOOLEAN NOT NULL            -- false after retention has deleted it
);

CREATE TABLE evaluations (
    evaluation_id VARCHAR NOT NULL,
    checkpoint_id VARCHAR NOT NULL,
    dataset_id VARCHAR NOT NULL,
    metric VARCHAR NOT NULL,
    split VARCHAR NOT NULL,
    source VARCHAR NOT NULL,
    value DOUBLE NOT NULL,
    evaluated_at TIMESTAMP NOT NULL,    -- UTC
    PRIMARY KEY (evaluation_id, metric, split, source)
);

CREATE TABLE models (
    model_id VARCHAR PRIMARY KEY,
    checkpoint_id VARCHAR NOT NULL,
    run_id VARCHAR NOT NULL,
    released_at TIMESTAMP NOT NULL,     -- UTC
    reason VARCHAR NOT NULL,
    bits_per_byte DOUBLE NOT NULL
);

-- The runs that produced a checkpoint: its own run up to its step, and each parent run (generation 1, 2, ...) up to the step
-- that the child started from.
CREATE VIEW checkpoint_ancestry AS
WITH RECURSIVE ancestry(checkpoint_id, generation, run_id, step) AS (
    SELECT checkpoint_id, 0, run_id, step FROM checkpoints
    UNION ALL
    SELECT a.checkpoint_id, a.generation + 1, r.parent_run_id, r.parent_step
    FROM ancestry a
    JOIN training_runs r USING (run_id)
    WHERE r.parent_run_id IS NOT NULL
)
FROM ancestry;

-- The lineage of a checkpoint: for each run that produced it, one row for each place in a raw file that the run was trained on.
-- Values that are not recorded are NULL: a gap in the catalog does not hide the rest.
CREATE VIEW checkpoint_lineage AS
SELECT a.checkpoint_id, a.generation, a.run_id, a.step, r.dataset_id, d.snapshot_id, r.tokenizer_id, r.config, r.code_version, r.git_commit,
       r.seed, seen.document_id, seen.first_step, raw.path, raw.start_byte, raw.end_byte
FROM checkpoint_ancestry a
LEFT JOIN training_runs r USING (run_id)
LEFT JOIN datasets d USING (dataset_id)
LEFT JOIN run_documents seen ON seen.run_id = a.run_id AND seen.first_step < a.step
LEFT JOIN snapshot_documents raw ON raw.snapshot_id = d.snapshot_id AND raw.document_id = seen.document_id;

-- The checkpoints trained on a document, in their own run (seen_by_run_id = run_id) or in a parent run.
CREATE VIEW document_usage AS
SELECT seen.document_id, c.checkpoint_id, c.run_id, c.step, seen.run_id AS seen_by_run_id, seen.first_step, c.on_disk
FROM run_documents seen
JOIN checkpoint_ancestry a ON a.run_id = seen.run_id AND seen.first_step < a.step
JOIN checkpoints c USING (checkpoint_id);

-- version 2

ALTER TABLE train_metrics ADD COLUMN mfu DOUBLE; -- model FLOPs utilization: share of the device's peak; NULL in older runs

-- version 3

-- The snapshot that the run was trained on. That of the dataset can differ: the same documents may be in other files.
ALTER TABLE training_runs ADD COLUMN snapshot_id VARCHAR; -- NULL in older runs

CREATE OR REPLACE VIEW checkpoint_lineage AS
SELECT a.checkpoint_id, a.generation, a.run_id, a.step, r.dataset_id, coalesce(r.snapshot_id, d.snapshot_id) AS snapshot_id,
       r.tokenizer_id, r.config, r.code_version, r.git_commit, r.seed, seen.document_id, seen.first_step, raw.path, raw.start_byte,
       raw.end_byte
FROM checkpoint_ancestry a
LEFT JOIN training_runs r USING (run_id)
LEFT JOIN datasets d USING (dataset_id)
LEFT JOIN run_documents seen ON seen.run_id = a.run_id AND seen.first_step < a.step
LEFT JOIN snapshot_documents raw
    ON raw.snapshot_id = coalesce(r.snapshot_id, d.snapshot_id) AND raw.document_id = seen.document_id;

-- version 4

ALTER TABLE snapshots ADD COLUMN documents_dropped JSON; -- reason -> documents; NULL in older snapshots
ALTER TABLE snapshots ADD COLUMN files_ignored JSON;     -- extension -> files of other formats; NULL in older snapshots
ALTER TABLE datasets ADD COLUMN unknown_text DOUBLE;     -- share of the text that the tokenizer cannot spell; NULL in older ones

-- The held-out text that was read. Evaluations of the same text can be compared.
ALTER TABLE evaluations ADD COLUMN text_id VARCHAR; -- NULL in older evaluations and for lm-eval tasks

-- When garbage collection removed the checkpoints of a run or the files of a model; NULL while it has them.
ALTER TABLE training_runs ADD COLUMN removed_at TIMESTAMP; -- UTC
ALTER TABLE models ADD COLUMN removed_at TIMESTAMP; -- UTC

CREATE OR REPLACE VIEW checkpoint_lineage AS
SELECT a.checkpoint_id, a.generation, a.run_id, a.step, r.dataset_id, coalesce(r.snapshot_id, d.snapshot_id) AS snapshot_id,
       r.tokenizer_id, r.config, r.code_version, r.git_commit, r.seed, seen.document_id, seen.first_step, raw.path, raw.start_byte,
       raw.end_byte, r.removed_at
FROM checkpoint_ancestry a
LEFT JOIN training_runs r USING (run_id)
LEFT JOIN datasets d USING (dataset_id)
LEFT JOIN run_documents seen ON seen.run_id = a.run_id AND seen.first_step < a.step
LEFT JOIN snapshot_documents raw
    ON raw.snapshot_id = coalesce(r.snapshot_id, d.snapshot_id) AND raw.document_id = seen.document_id;

CREATE OR REPLACE VIEW document_usage AS
SELECT seen.document_id, c.checkpoint_id, c.run_id, c.step, seen.run_id AS seen_by_run_id, seen.first_step, c.on_disk, r.removed_at
FROM run_documents seen
JOIN checkpoint_ancestry a ON a.run_id = seen.run_id AND seen.first_step < a.step
JOIN checkpoints c USING (checkpoint_id)
LEFT JOIN training_runs r ON r.run_id = c.run_id;

-- version 5

ALTER TABLE snapshots ADD COLUMN files_skipped JSON; -- reason -> entries that are never read; NULL in older rows until a rebuild
