"""Data preparation, training and evaluation of decoder language models: a library and its command-line tools.

Packages, from the bottom up. An import leads downwards only; each `__init__.py` lists what others may use.

    errors        exceptions, by who can fix the problem, with exit codes
    interrupts    Ctrl-C: one line and an exit code
    recipe        the value of each training option that is not given
    config        every option of every stage, with its bounds and units
    layout        every path on disk
    cli           a configuration class as a command line
    system        files, locks, temporary folders, processes, code version
    corpus        a folder of text becomes documents: readers, filters, deduplication, snapshots
    tokenizer     text to token ids: training, store, drift, encoding on many workers
    dataset       token shards, the manifest of each dataset version, windows and their order
    artifact_ids  the id of each run, evaluation and model
    model         the transformer, its kernels, loss, precision and text generation
    distributed   ranks, process start and stop, DDP and FSDP
    checkpoint    records and checkpoints of a run folder, resume, continued training
    evaluation    held-out loss and bits per byte, lm-eval tasks
    training      mixture, trainer, loop, optimizers, metrics, cost estimate
    huggingface   export as a Hugging Face directory

Tools, each `python -m llm_core.<name>`:

    data_prep_tool   a folder of text to a tokenizer and token shards
    train            training, alone or under torchrun
    generate         text from a checkpoint
    evaluate_text    a checkpoint on held-out text
    evaluate_tasks   an exported model on lm-eval tasks
    export           a checkpoint as a Hugging Face directory
    collect_garbage  removes prepared data that nothing needs

The library imports neither Dagster nor DuckDB; `pipeline` builds on it.
"""
