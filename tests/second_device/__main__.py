"""`python tests/second_device BUILD COMMANDS`: davae's command line on a device that is not the CPU.

BUILD is the folder to compile it in, COMMANDS a JSON file: a list of commands, each a list of arguments.
"""

from __future__ import annotations

import ctypes
import json
import shlex
import sys
import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

NAME = "second"


def register(build: Path) -> None:
    """Compile the device of `device.cpp`, once a folder, and make it the one that accelerate chooses."""
    torch.utils.rename_privateuse1_backend(NAME)
    source = Path(__file__).with_name("device.cpp")
    compiled = load(
        "second_device", [str(source)], build_directory=str(build), extra_cflags=["-O0"], is_python_module=False
    )
    module: types.ModuleType = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch._register_device_module(NAME, module)
    ctypes.CDLL(compiled).begin()
    torch.utils.generate_methods_for_privateuse1_backend()

    copied = torch.Tensor.__deepcopy__  # which allocates on the CPU for a device that it does not know
    torch.Tensor.__deepcopy__ = lambda self, memo: self.clone() if self.device.type == NAME else copied(self, memo)

    from accelerate.state import PartialState

    PartialState.default_device = property(lambda self: torch.device(NAME))


if __name__ == "__main__":
    register(Path(sys.argv[1]))
    from davae.cli import app

    for arguments in json.loads(Path(sys.argv[2]).read_text()):
        sys.stderr.write(f"davae {shlex.join(arguments)}\n")
        app(arguments, standalone_mode=False)
