"""`python -m halo_mpi.calibrate`, alone or under mpirun: what matters in a model, and what its parts probably say."""

import time
from pathlib import Path
from statistics import fmean

import click

from halo_mpi.cli import run_command
from halo_mpi.engine.options import threads_option
from halo_mpi.versions import version_option

UNITS = {"neurons": 1, "blocks": 32}  # neurons that stay together
EXAMPLES = """\b
Examples:
  halo-mpi calibrate models/smollm2-135m.halo
  halo-mpi calibrate models/smollm2-135m.halo --text letters.txt --text manual.txt
  launch/halo-mpirun -hostfile hostfiles/pis.txt python -m halo_mpi.calibrate models/smollm2-135m.halo
"""


@click.command(epilog=EXAMPLES, short_help="Measure what matters in a model, and write it into the model.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--text", "paths", type=click.Path(path_type=Path), multiple=True, metavar="FILE",
              show_default="novels, manuals and code that come with halo_mpi",
              help="UTF-8 text to calibrate with; may be given several times.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(2), default=40000, show_default=True, metavar="N", help="How many tokens of it to use.")
@click.option("--context", "--window", "window", type=click.IntRange(16), default=512, show_default=True, metavar="C",
              help="Tokens that are read as one text.")  # fmt: skip
@click.option("--sensitivity-tokens", type=click.IntRange(0), default=512, show_default=True, metavar="N",
              help="Tokens to measure what a missing part of each layer costs; 0: do not measure it.")  # fmt: skip
@click.option("--sort", "sorted_by", type=click.Choice(list(UNITS)), default="neurons", show_default=True,
              help="How the FFN is sorted by importance. neurons: one by one, which tells important groups from unimportant ones best, and "
                   "gives a 4-bit down projection 8 bits. blocks: 32 together, whose 4 bits stay as they are.")  # fmt: skip
@threads_option
@click.option("--verbose", is_flag=True, help="Show a traceback if something fails.")
@version_option
@click.pass_obj
def calibrate(comm, model: Path, paths: tuple[Path, ...], tokens: int, window: int, sensitivity_tokens: int, sorted_by: str,
              threads: int | None, verbose: bool) -> None:  # fmt: skip
    """Measure importance, fit predictor and estimates, and write a calibrated version of MODEL in its place.

    Text streams through the model layer by layer. The new version has the same weights, its FFN neurons sorted by importance (a 4-bit
    or 8-bit down projection is rounded again to 8 bits), and beside them: what tells how much each group and head matters one layer
    ahead, and estimates of what each would contribute, for when it is late. Other files in the folder are lost. A run that was
    stopped goes on where it was. Copy the new version to all hosts: ranks with different ones refuse to work together.

    Memory: the vocabulary, one layer's weights in f32, its moments (about 40 bytes times hidden times the larger of hidden and FFN),
    and 6 bytes per token and hidden channel, which are also written to disk after each layer. Under mpirun, the ranks share the text; each
    needs all shards on its disk.
    """
    from halo_mpi.engine.calibration import Calibration

    begin = time.perf_counter()
    calibration = Calibration(comm, model, threads, verbose)
    calibration.read(paths, tokens, window)
    if outcome := calibration.run(sensitivity_tokens, UNITS[sorted_by]):
        facts, peak = outcome
        groups, heads = (fmean(share for layer in facts[kind]["recovered"] for share in layer) for kind in ("groups", "heads"))
        click.echo(
            f"{model}: calibrated on {facts['tokens']} tokens in {time.perf_counter() - begin:.0f} s and {peak / 1e6:.0f} MB of memory; "
            f"an estimate explains {groups:.0%} of |output|^2 of a late FFN group, {heads:.0%} of a head's; "
            f"`halo-mpi inspect {model}` shows more",
            err=True,
        )


if __name__ == "__main__":
    run_command(calibrate)
