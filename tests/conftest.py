import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # many small things; and sums, so bits, depend on the number of threads
sys.path.insert(0, str(Path(__file__).parents[1]))  # so that plain `pytest` finds the scripts

import torch

torch.set_num_threads(1)  # a plugin may have imported it before the line above
