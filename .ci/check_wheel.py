"""Check that a built wheel holds the package, whole, and nothing else."""

import sys
import zipfile
from pathlib import Path

PACKAGE = "sae_lens_multimodal"
SIZE_LIMIT_BYTES = 15_000_000


def expected_files(root: Path) -> set[str]:
    """Every file of the package folder that belongs into the wheel."""
    return {
        path.relative_to(root).as_posix()
        for path in (root / PACKAGE).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def main() -> int:
    """Compare the wheel's file list with the tree; return the exit status."""
    wheel = Path(sys.argv[1])
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = expected_files(Path(__file__).resolve().parent.parent)
    for name in sorted(expected - names):
        sys.stderr.write(f"missing from the wheel: {name}\n")
    for name in sorted(names - expected):
        sys.stderr.write(f"unexpected in the wheel: {name}\n")
    size = wheel.stat().st_size
    if size > SIZE_LIMIT_BYTES:
        sys.stderr.write(f"the wheel has {size} bytes; expected at most {SIZE_LIMIT_BYTES}\n")
    sys.stdout.write(f"{wheel.name}: {len(names)} files, {size / 1e6:.1f} MB\n")
    return int(names != expected or size > SIZE_LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
