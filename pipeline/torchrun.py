"""torchrun that dies with the process that started it: `python -m pipeline.torchrun` takes torchrun's own arguments."""

from torch.distributed.run import main

from llm_core.distributed import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    main()
