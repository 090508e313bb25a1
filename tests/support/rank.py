"""Entry point of a rank of ``run_ranks``: calls the function given on the command line."""

from __future__ import annotations

import importlib
import json
import sys


def main() -> None:
    module, name, arguments = json.loads(sys.argv[1])
    result = getattr(importlib.import_module(module), name)(*arguments)
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
