"""`python -m pipeline.processes.child MODULE ARGS...`: runs a module as a script in a process that dies with its parent."""

import runpy
import sys

from llm_core.system import die_with_parent

if __name__ == "__main__":
    die_with_parent()  # before the module imports PyTorch
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
