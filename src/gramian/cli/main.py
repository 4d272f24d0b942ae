"""`gramian`: reads the arguments, runs one command, and says failures in one sentence."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

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
from gramian.memory import shortage
from gramian.offline import kept_offline
from gramian.ranks import have_said, is_main, launched, leave_launcher, may_say, processes

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

OFFLINE = "--offline"
"""Anywhere among the arguments: nothing is fetched, and what was fetched earlier is used."""

SHARED = ("train", "compare", "trajectory", "prune", "regress")
"""Commands that the processes of a launcher share; of the others the first process does all."""


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
    if OFFLINE in arguments:
        with kept_offline():
            return run([each for each in arguments if each != OFFLINE])
    quieten()  # transformers imports torchao, which logs the kernels that it goes without
    if launched() > 1 and not _shared(arguments) and leave_launcher() > 0:
        return 0
    try:
        with processes(), _printing_once(), _notes():
            return _ended(arguments)
    except GramianError as error:
        _say(str(error), "red")
        return 1


def _shared(arguments: list[str]) -> bool:
    """Tell whether a command's work is divided among processes: `predict` is by `--sde` alone."""
    command = next((each for each in arguments if not each.startswith("-")), "")
    return command in SHARED or (command == "predict" and "--sde" in arguments)


def _ended(arguments: list[str]) -> int:
    """Call the command and tell how it ended."""
    try:
        _call(arguments)
    except StoppedError as error:
        _say(str(error), "yellow")
        return 130
    except GramianError as error:
        _say(str(error), "red")
        return 1
    except KeyboardInterrupt:
        _say("interrupted", "yellow")
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that may not be written
        what = f"{error.filename}: " if error.filename else ""
        _say(f"{what}{error.strerror or error}", "red")
        return 1
    except Exception as error:
        if (said := shortage(error)) is None:
            raise
        _say(said, "red")
        return 1
    return 0


def _say(message: str, style: str) -> None:
    """Print why the command ended, on one of the processes."""
    if may_say():
        errors = Console(stderr=True, highlight=False, soft_wrap=True)
        shown = "".join(each if each.isprintable() else "\ufffd" for each in message)  # names hold anything
        errors.print(f"gramian: {shown}", style=style, markup=False)
        have_said()


@contextmanager
def _printing_once() -> Iterator[None]:
    """Let only the main process print."""
    if is_main():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def _notes() -> Iterator[None]:
    """Print this package's warnings as notes of one line."""

    def note(
        message: Warning | str, category: type[Warning], filename: str, *_: object, **__: object
    ) -> None:
        if is_main():
            shown = "note" if issubclass(category, UserWarning) else category.__name__
            print(f"gramian: {shown}: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = note
        yield


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
        description="Predict, train, compare and observe deep networks through their Gram matrices. The "
        "network is asked only for a model that is named by its id on the hub, and with --offline not even "
        "then: what was fetched earlier is taken.",
        args=arguments,
        config=settings,
    )
