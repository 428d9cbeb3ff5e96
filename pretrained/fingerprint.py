"""A short hash that tells weights apart: the same for every copy, another after training."""
import hashlib
import os

from pretrained.weights import catalogue

PIECE, N_PIECES = 16_384, 1_024         # bytes per piece, pieces per file: at most 16 MB are read


def fingerprint(folder) -> str:
    """Hash the weights in a folder: size, header and evenly spaced pieces of every file.

    Files of at most 16 MB are read as a whole. At 8 B parameters in four files a piece of each
    4 MB is read, which is several pieces of every large matrix.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted({stored.file for stored in catalogue(folder).values()}):
        size = os.path.getsize(path)
        digest.update(f"{size} ".encode())
        with open(path, "rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(n_header))
            for start in range(8 + n_header, size, max(PIECE, size // N_PIECES)):
                file.seek(start)
                digest.update(file.read(PIECE))
    return digest.hexdigest()
