"""The same as `genflow train`, as a file for launchers: accelerate launch scripts/train.py CONFIG [key=value ...]"""

import sys

from genflow.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    sys.exit(main())
