"""The command line shared by the scripts: flags in, one line and an exit code out."""

import sys
from collections.abc import Callable, Sequence

from absl import flags

from attnres_jax.errors import UserError


def overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits `--config.a.b=c` off the command line: (what is left, `["a.b=c", ...]`)."""
    own = [arg for arg in argv if arg.startswith("--config.")]
    return [arg for arg in argv if arg not in own], [arg.removeprefix("--config.") for arg in own]


def launch(main: Callable[[list[str], list[str]], int | None]) -> None:
    """Parses the flags, calls `main(positional arguments, overrides)` and exits.

    The exit code is main's own (0 for none); an error that the user can mend gives one line on stderr and its code.
    """
    argv, changes = overrides(sys.argv)
    try:
        sys.exit(main(flags.FLAGS(argv)[1:], changes))
    except KeyboardInterrupt:
        sys.exit(130)
    except flags.Error as error:
        _fail(str(error), UserError.exit_code)
    except UserError as error:
        _fail(str(error), error.exit_code)


def _fail(message: str, code: int) -> None:
    print(f"{sys.argv[0]}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
