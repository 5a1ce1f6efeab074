"""Arrays from and to files; numpy is imported when one is read."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from horq_tvm.errors import UsageError
from horq_tvm.files import replacing

if TYPE_CHECKING:
    import numpy as np


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
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: not an .npz or .npy of numeric arrays: {error}") from error


def write_outputs(path: str, outputs: Mapping[str, np.ndarray]) -> None:
    """An .npy of the only output where `path` says .npy, else an .npz of all by name.

    Raises:
        UsageError: an .npy for several outputs.
    """
    import numpy as np

    if not path.endswith(".npy"):
        write_npz(path, outputs)
        return
    if len(outputs) != 1:
        raise UsageError(f"{path}: one array for {len(outputs)} outputs; accepted: an .npz for {', '.join(outputs)}")
    [array] = outputs.values()
    with replacing(path) as partial, partial.open("wb") as file:
        np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)


def write_npz(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays under their names, whatever these are (`np.savez` stumbles over one called `file`)."""
    import numpy as np

    with replacing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
