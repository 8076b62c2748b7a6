"""What must be in no file that promptkd writes: pickles, and secrets."""

import zipfile
from pathlib import Path

_PROTOCOLS = tuple(bytes([0x80, number]) for number in range(2, 6))


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, or an archive of torch.save around one."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    return path.read_bytes()[:2] in _PROTOCOLS


def pickles_in(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in files_in(folder) if is_pickle(path)]


def holding(folder: Path, *secrets: str) -> dict[str, str]:
    """By file, a secret that it or its name holds."""
    found = {}
    for path in files_in(folder):
        content = path.read_bytes() + str(path.relative_to(folder)).encode()
        found |= {str(path): secret for secret in secrets if secret.encode() in content}
    return found


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
