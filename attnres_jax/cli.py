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
    `--help` prints the script's docstring and flags.
    """
    argv, changes = overrides(sys.argv)
    try:
        if "--help" in argv or "-h" in argv:
            print(_help())
            sys.exit()
        sys.exit(main(flags.FLAGS(argv)[1:], changes))
    except KeyboardInterrupt:
        sys.exit(130)
    except flags.Error as error:
        _fail(str(error), UserError.exit_code)
    except UserError as error:
        _fail(str(error), error.exit_code)


def _help() -> str:
    """The docstring of the script, and its flags and the project's; those of libraries are left out."""
    modules = sorted(flags.FLAGS.flags_by_module_dict())
    own = [name for name in modules if name not in sys.modules or name.split(".")[0] in ("attnres_jax", name)]
    described = "".join(flags.FLAGS.module_help(name) for name in own)
    return f"{sys.modules['__main__'].__doc__}\nFlags:\n{described}"


def _fail(message: str, code: int) -> None:
    print(f"{sys.argv[0]}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
