"""launch/halo-mpirun, but with --rejoin it looks for hosts every half second."""

import runpy
import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))
import mpirun_rejoin  # noqa: E402

mpirun_rejoin.LOOK_EVERY_S = 0.5
runpy.run_path(str(LAUNCH / "halo-mpirun"), run_name="__main__")
