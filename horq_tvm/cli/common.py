"""What the verbs share: the parser's manners, the options of a model, and how results are written and shown."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from horq_tvm.errors import HorqError, UsageError
from horq_tvm.specs import MAX_ORDER, SCALES

if TYPE_CHECKING:
    import numpy as np

Verbs = Any  # argparse's subparsers action has no public type
FLOAT = "float"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and without guessed abbreviations, which break once options are added."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def add_verb(verbs: Verbs, name: str, summary: str, run: Callable[[argparse.Namespace], None]) -> Parser:
    """A verb's parser; `run` is what `main` calls with the parsed arguments."""
    verb: Parser = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    verb.add_argument("--debug", action="store_true", help="show the traceback of an error, and every warning")
    verb.set_defaults(run=run)
    return verb


def add_json_option(verb: Parser) -> None:
    """--json FILE, `-` for standard output, where nothing else goes then."""
    verb.add_argument("--json", metavar="FILE", help="write the result as JSON; - for standard output")


def add_threads_option(verb: Parser) -> None:
    """--threads N, 1 by default."""
    verb.add_argument("--threads", type=_threads, default=1, metavar="N", help="threads of one run (default: 1)")


def add_model_options(verb: Parser) -> None:
    """What decides how a model is compiled; `build_arguments` hands it to `horq_tvm.build`."""
    group = verb.add_argument_group("how the model is compiled")
    group.add_argument(
        "--target", metavar="NAME", help="one of `horq-tvm targets`, or FILE.yaml:NAME (default: native)"
    )
    group.add_argument(
        "--order",
        type=_order,
        metavar="N|float",
        help=f"binary planes of an activation, 1 to {MAX_ORDER}; float rewrites nothing (default: 2)",
    )
    group.add_argument("--scale", choices=SCALES, help="where a plane's scale is taken (default: sample)")
    group.add_argument("--plan", metavar="PLAN.yaml", help="per-layer plan; it overrides --order and --scale")
    group.add_argument("--calibration", metavar="X.npz", help="inputs by name, axis 0 the samples (for --scale static)")
    group.add_argument(
        "--input",
        type=_input_shape,
        action="append",
        default=[],
        metavar="NAME=1,3,224,224",
        help="shape of an input whose shape the model leaves open; may be repeated",
    )
    group.add_argument(
        "--tap",
        action="append",
        nargs="+",
        default=[],
        metavar="LAYER",
        help="also output a layer's input, scales, planes and output",
    )


def build_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `horq_tvm.build`; what was not given on the command line is left out."""
    options: dict[str, Any] = {
        "target": arguments.target,
        "order": arguments.order,
        "scale": arguments.scale,
        "plan": arguments.plan,
        "taps": tuple(name for names in arguments.tap for name in names),
        "input_shapes": dict(arguments.input),
    }
    if arguments.calibration is not None:
        options["calibration"] = read_npz(arguments.calibration)
    return {name: value for name, value in options.items() if value not in (None, (), {})}


def read_npz(path: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name.

    Raises:
        UsageError: there is no such file, or it is not an .npz of plain arrays.
    """
    arrays = _load_numpy(path)
    if not isinstance(arrays, dict):
        raise UsageError(f"{path}: holds one array without a name; accepted: an .npz keyed by input name")
    return arrays


def read_inputs(path: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays to feed a model with inputs `names`: an .npz by name, or an .npy where there is one input.

    Raises:
        UsageError: the file is no such file, or an .npy for a model of several inputs.
    """
    arrays = _load_numpy(path)
    if isinstance(arrays, dict):
        return arrays
    if len(names) != 1:
        raise UsageError(f"{path}: one array for {len(names)} inputs; accepted: an .npz with {', '.join(names)}")
    return {names[0]: arrays}


def _load_numpy(path: str) -> dict[str, np.ndarray] | np.ndarray:
    import zipfile

    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: not an .npz or .npy of numeric arrays: {error}") from error


def write_npz(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays under their names, whatever these are (`np.savez` stumbles over one called `file`)."""
    import zipfile

    import numpy as np

    with replacing(path) as stream, zipfile.ZipFile(stream, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def check_writable(path: str) -> None:
    """Before long work: a file can be made beside `path`.

    Raises:
        HorqError: names the folder that is missing or not writable.
    """
    if Path(path).is_dir():
        raise UsageError(f"{path}: is a folder; accepted: the name of a file")
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise HorqError(f"{path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise HorqError(f"{path}: the folder {folder} is not writable")


@contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """A binary stream that becomes `path` when all went well, and leaves nothing behind when not."""
    check_writable(path)
    target = Path(path)
    with tempfile.NamedTemporaryFile(dir=target.resolve().parent, prefix=f".{target.name}.", delete=False) as stream:
        temporary = Path(stream.name)
        try:
            yield stream
            stream.flush()
            # NamedTemporaryFile is private to its owner; a result has the permissions of any new file.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(destination: str, value: Any) -> None:
    """`value` to a file, or to standard output for `-`."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if destination == "-":
        sys.stdout.write(text)
        return
    with replacing(destination) as stream:
        stream.write(text.encode())


def say(arguments: argparse.Namespace, text: str) -> None:
    """A line for people: to standard output, or to standard error where JSON has that."""
    print(text, file=sys.stderr if getattr(arguments, "json", None) == "-" else sys.stdout)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned by spaces, numbers to the right."""
    cells = [[("-" if value is None else str(value)) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    right = [
        bool(rows) and all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(columns))
    ]

    def line(row: Sequence[str]) -> str:
        parts = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
        return "  ".join(parts).rstrip()

    return "\n".join(line(row) for row in [list(columns), *cells])


def shape_text(shape: Sequence[int]) -> str:
    """1x3x224x224."""
    return "x".join(map(str, shape)) or "scalar"


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that says what is being done: a spinner where standard error is a terminal and rich is there."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    try:
        from rich.console import Console
    except ImportError:
        yield lambda message: print(f"{message} ...", file=sys.stderr)
        return
    with Console(stderr=True).status("starting") as status:
        yield status.update


def version() -> str:
    """The installed version; of a tree that is not installed, `0+unknown`."""
    from importlib import metadata

    try:
        return metadata.version("horq-tvm")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def _order(text: str) -> int | str:
    if text == FLOAT:
        return FLOAT
    if not text.isdecimal() or not 1 <= int(text) <= MAX_ORDER:
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: 1 to {MAX_ORDER}, or float")
    return int(text)


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: a number from 1")
    return int(text)


def _input_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, equals, shape = text.rpartition("=")
    sizes = shape.split(",")
    if not equals or not name or not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: NAME=1,3,224,224")
    return name, tuple(int(size) for size in sizes)
