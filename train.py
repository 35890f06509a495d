"""Train a world action model; the same as `wam train`.

python train.py --config configs/metaworld_tiny.yaml training.steps=200
"""

import sys

from wam.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
