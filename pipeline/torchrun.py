"""torchrun that dies with the process that started it: `python -m pipeline.torchrun` takes torchrun's own arguments."""

from llm_core.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent()  # before PyTorch takes its time to load

    from torch.distributed.run import main

    main()
