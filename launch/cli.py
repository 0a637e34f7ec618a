"""The program ``anemoi-dist``: parse, import the command's module, run it. Torch is never imported here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from anemoi_dist.errors import AnemoiDistError, ExitCode, print_error
from anemoi_dist.process.output import fill_descriptors, protect_output

from .commands.parser import parse

#: Commands that own ranks. All others end when nobody reads what they print.
_TRAINING = ("train", "resume")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (``anemoi_dist.errors.ExitCode``).

    Parameters
    ----------
    arguments : Sequence[str], optional
        Command-line arguments; those of this process where left out.
    """
    fill_descriptors()
    options = parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        if options.name in _TRAINING:
            # Whoever reads the output, through a pipe to head for one, may leave before training ends.
            protect_output()
        # Before the import: on a shared file system that alone takes seconds.
        if getattr(options, "first_line", "") and not options.dry_run:
            print(options.first_line, flush=True)
        command = importlib.import_module(f".commands.{options.name}", __package__)
        return int(command.run(options))
    except AnemoiDistError as error:
        print_error(error)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # Output was piped into something that stopped reading, such as head: nobody is left to read an error.
        sys.stderr.close()
        return int(ExitCode.FINISHED)
    except OSError as error:  # the disk is full, a directory is not ours
        print_error(error)
        return int(ExitCode.PREFLIGHT)


if __name__ == "__main__":
    sys.exit(main())
