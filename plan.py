"""
What stage B2 plans with: the captions of its lists and the hashes of their media files. They lie in a folder, for all
ranks, and take some bytes each in memory; what has been hashed is not read again at the next start.
"""
import hashlib
import json
import os
from array import array
from itertools import islice
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from common import (
    all_gather, barrier, one_line_io_errors, rank_of, read_sealed, sha256_file, write_atomic, write_sealed)
from examples import media_sha256
from media import BadSample

MODALITIES = ('audio', 'image')                        # as they sort


class File(NamedTuple):
    """One media file by its bytes, whatever the number of its names and captions."""
    sha256: str
    modality: str
    path: str                          # one of its names
    captions: list                     # [(id, text)]


class Captions:
    """The captions of all lists, written one by one to folder/captions.jsonl, and the paths of their media files to
    folder/paths.jsonl, each once. For one rank."""
    def __init__(self, folder):
        self.paths = {}                                # (path, modality): its number
        self.path_of = array('q')                      # of each caption
        self.starts = array('q')                       # of each caption's line
        with one_line_io_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(folder / 'captions.jsonl', 'w+b')
            self.path_file = open(folder / 'paths.jsonl', 'wb')

    def add(self, caption, id):
        key = caption.path, caption.modality
        with one_line_io_errors(self.file.name):
            if key not in self.paths:
                self.paths[key] = len(self.paths)
                self.path_file.write(json.dumps(key).encode() + b'\n')
            self.path_of.append(self.paths[key])
            self.starts.append(self.file.tell())
            self.file.write(json.dumps((id, caption.text)).encode() + b'\n')

    def close(self):
        """From here on they are read."""
        with one_line_io_errors(self.file.name):
            self.path_file.close()
            self.file.flush()

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, n):
        """(id, text)"""
        self.file.seek(self.starts[n])
        return tuple(json.loads(self.file.readline()))


# -----------------------------------------------------------------------------
# hashes


def read_paths(folder):
    """(path, modality) of each media file, one after the other."""
    with open(folder / 'paths.jsonl', 'rb') as f:
        for line in f:
            yield json.loads(line)


def read_hashed(folder, paths_sha256):
    """{'stamps': (files, 2), 'hashes': (files, 32)} of an earlier start over the same paths; None for none."""
    try:
        sealed = read_sealed(folder / 'media.json', '')
        body = (folder / 'media.safetensors').read_bytes()
    except (SystemExit, OSError):                      # none yet, or damaged: all are hashed again
        return None
    if (sealed['paths'], sealed['media']) != (paths_sha256, hashlib.sha256(body).hexdigest()):
        return None
    return safetensors.numpy.load(body)


def hash_media(folder, threads):
    """(sha256 of each media file of paths.jsonl, uint8 (files, 32); {number: why it cannot be read}), on every rank,
    each of which reads its part. A file of the size and time that it had at an earlier start is not read."""
    rank, world_size = rank_of()
    paths_sha256 = sha256_file(folder / 'paths.jsonl')
    known = read_hashed(folder, paths_sha256)

    def hash_file(numbered):
        """([bytes, time of the last change in ns], its 32 bytes or the reason)"""
        n, (path, _) = numbered
        try:
            found = os.stat(path)
            stamp = [found.st_size, found.st_mtime_ns]
            if known is not None and known['stamps'][n].tolist() == stamp:
                return stamp, known['hashes'][n].tobytes()
            return stamp, bytes.fromhex(media_sha256(path))
        except OSError as e:
            return [-1, -1], f'{path}: cannot read this file ({e.strerror})'
        except BadSample as e:
            return [-1, -1], str(e)                    # a stamp that no file has: it is looked at again

    stamps = []
    hashes = []
    reasons = {}
    of_rank = islice(enumerate(read_paths(folder)), rank, None, world_size)
    while part := list(islice(of_rank, 1024)):         # so many at a time: a task of a thread takes a kilobyte
        for (n, _), (stamp, result) in zip(part, threads.map(hash_file, part)):
            stamps.append(stamp)
            hashes.append(result if isinstance(result, bytes) else bytes(32))
            if isinstance(result, str):
                reasons[n] = result
    tensors = {
        'stamps': interleaved(np.array(stamps, np.int64).reshape(-1, 2)),
        'hashes': interleaved(np.frombuffer(b''.join(hashes), np.uint8).reshape(-1, 32)),
    }
    barrier()
    for others in all_gather(reasons):
        reasons.update(others)
    if rank == 0 and (known is None or not np.array_equal(known['stamps'], tensors['stamps'])):
        body = safetensors.numpy.save(tensors)
        write_atomic(folder / 'media.safetensors', body)
        write_sealed(folder / 'media.json', {'paths': paths_sha256, 'media': hashlib.sha256(body).hexdigest()})
    return tensors['hashes'], reasons


def interleaved(part):
    """Rows rank, rank + world_size, ... of every rank -> all rows, on every rank."""
    parts = all_gather(part)
    rows = np.zeros((sum(map(len, parts)), *part.shape[1:]), part.dtype)
    for rank, of_rank in enumerate(parts):
        rows[rank::len(parts)] = of_rank
    return rows


# -----------------------------------------------------------------------------
# media files by their bytes


class Media:
    """The media files that can be read, by their bytes: numbers in the order of (sha256, modality).

    captions: Captions; hashes: uint8 (paths, 32); wanted: bool (captions,), those that can be used.
    """
    def __init__(self, captions, hashes, wanted):
        self.captions = captions
        self.paths = list(captions.paths)              # [(path, modality)]
        modalities = np.array([[MODALITIES.index(modality)] for _, modality in self.paths], np.uint8)
        keys = np.concatenate([hashes, modalities.reshape(-1, 1)], axis=1)                      # (paths, 33)
        numbers = np.flatnonzero(wanted)               # of the captions
        path_of = np.array(captions.path_of, np.int64)[numbers]
        self.keys, media_of = np.unique(keys[path_of], axis=0, return_inverse=True)             # (files, 33)
        self.order = numbers[np.argsort(media_of, kind='stable')]      # captions, those of a file together
        n_captions = np.bincount(media_of.ravel(), minlength=len(self.keys))    # ravel: numpy 2.0 gives (captions, 1)
        self.ends = np.cumsum(n_captions)
        self.n_captions = len(numbers)

    def __len__(self):
        return len(self.keys)

    def modalities(self):
        return [MODALITIES[k] for k in np.unique(self.keys[:, 32])]

    def modality(self, n):
        return MODALITIES[self.keys[n, 32]]

    def sha256(self, n):
        return self.keys[n, :32].tobytes().hex()

    def __getitem__(self, n):
        """The File of this number, its captions in the order of the lists."""
        first = self.ends[n - 1] if n else 0
        numbers = self.order[first:self.ends[n]].tolist()
        path, modality = self.paths[self.captions.path_of[numbers[0]]]
        return File(self.sha256(n), modality, path, [self.captions[k] for k in numbers])


# -----------------------------------------------------------------------------
# what is in a shard


def write_planned(folder, name, files):
    """folder/name.json: the Files of a shard."""
    with one_line_io_errors(folder / f'{name}.json'):
        (folder / f'{name}.json').write_text(json.dumps(files))


def read_planned(folder, name):
    return [File(*fields) for fields in json.loads((folder / f'{name}.json').read_text())]


def take_shards(folder, names):
    """The names that this rank is the first to take, one after the other: a fast rank takes more of them."""
    for name in names:
        with one_line_io_errors(folder):
            try:
                (folder / f'{name}.taken').touch(exist_ok=False)
            except FileExistsError:
                continue
        yield name
