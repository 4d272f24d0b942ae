"""`gramian`: reads the arguments, runs one command, and says failures in one sentence."""

import os
import sys

import tyro
from rich.console import Console

from gramian import __version__
from gramian.cli.compare import compare
from gramian.cli.covariance import predict_covariance
from gramian.cli.evaluate import evaluate
from gramian.cli.generate import generate
from gramian.cli.graphs import graphs
from gramian.cli.list import list_names
from gramian.cli.observe import observe
from gramian.cli.predict import predict
from gramian.cli.prune import prune
from gramian.cli.quantise import quantise
from gramian.cli.reconstruct import reconstruct
from gramian.cli.regress import regress
from gramian.cli.train import train
from gramian.cli.trajectory import trajectory
from gramian.cli.verify import verify
from gramian.compress.torch_ao import quieten
from gramian.errors import GramianError, StoppedError

COMMANDS = {
    "predict": predict,
    "compare": compare,
    "train": train,
    "generate": generate,
    "evaluate": evaluate,
    "observe": observe,
    "trajectory": trajectory,
    "quantise": quantise,
    "prune": prune,
    "regress": regress,
    "graphs": graphs,
    "reconstruct": reconstruct,
    "verify": verify,
    "list": list_names,
}


def main() -> None:
    """Run the command that the arguments name.

    Exit codes: 0 done; 1 failed, with one sentence on standard error; 2 arguments that do not parse;
    130 stopped by a signal, with everything saved.
    """
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    if arguments == ["--version"]:
        print(f"gramian {__version__}")
        return 0
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    quieten()  # transformers imports torchao, which logs the kernels that it goes without
    try:
        _call(arguments)
    except StoppedError as error:
        errors.print(f"gramian: {error}", style="yellow", markup=False)
        return 130
    except GramianError as error:
        errors.print(f"gramian: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        errors.print("gramian: interrupted", style="yellow")
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that may not be written
        what = f"{error.filename}: " if error.filename else ""
        errors.print(f"gramian: {what}{error.strerror or error}", style="red", markup=False)
        return 1
    return 0


def _call(arguments: list[str]) -> None:
    """Parse the arguments and call their command; `predict --sde` has settings of its own."""
    settings = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    if arguments[:1] == ["predict"] and "--sde" in arguments:
        rest = [each for each in arguments[1:] if each != "--sde"]
        tyro.cli(predict_covariance, prog="gramian predict --sde", args=rest, config=settings)
        return
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="gramian",
        description="Predict, train, compare and observe deep networks through their Gram matrices.",
        args=arguments,
        config=settings,
    )
