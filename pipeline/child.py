"""A program that dies with the process that started it: `python -m pipeline.child MODULE` takes the module's own arguments."""

import runpy
import sys

from llm_core.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent()  # before PyTorch takes its time to load
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
