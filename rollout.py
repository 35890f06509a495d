"""Drive a robot in a simulator with a trained model; the same as `wam rollout`.

python rollout.py --checkpoint runs/demo/train/checkpoint --env metaworld/drawer-open-v3 --mode joint --episodes 50
"""

import sys

from wam.cli import main

if __name__ == "__main__":
    sys.exit(main(["rollout", *sys.argv[1:]]))
