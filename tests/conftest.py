import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the tests are many small things, two cores may be busy
sys.path.insert(0, str(Path(__file__).parents[1]))  # so that plain `pytest` finds the scripts
