"""
Columns: flat arrays by name in one sealed file, which every process maps and none reads whole. The file is one of
safetensors; beside it X.json, written last, holds its sha256.
"""
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from common import flush_folder, one_line_io_errors, read_sealed, sha256_file, write_sealed

DTYPES = {'I64': np.int64, 'I32': np.int32, 'U8': np.uint8}    # by the names that safetensors has for them


class ColumnWriter:
    """Takes columns a part at a time and keeps none of it in memory; write() makes one file of them.

    folder: where the parts wait, in files without a name, which are gone when the process is.
    """
    def __init__(self, folder):
        self.folder = folder
        self.waiting = {}                              # {name: its file}
        self.dtypes = {}

    def add(self, columns):
        """columns: {name: array (n, ...)}, of the same names, dtypes and widths each time."""
        with one_line_io_errors(self.folder):
            for name, array in columns.items():
                if name not in self.waiting:
                    self.waiting[name] = tempfile.TemporaryFile(dir=self.folder)
                    self.dtypes[name] = array.dtype
                self.waiting[name].write(np.ascontiguousarray(array, self.dtypes[name]).data)

    def header(self):
        """The first bytes of the file, and the names in the order in which their columns follow."""
        # the widest numbers first: then each column begins where its numbers may
        names = sorted(self.waiting, key=lambda name: (-self.dtypes[name].itemsize, name))
        codes = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
        entries = {}
        start = 0
        for name in names:
            dtype = self.dtypes[name]
            end = start + self.waiting[name].tell()
            entries[name] = {'dtype': codes[dtype], 'shape': [(end - start) // dtype.itemsize],
                             'data_offsets': [start, end]}
            start = end
        text = json.dumps(entries).encode()
        text += b' ' * (-len(text) % 8)
        return len(text).to_bytes(8, 'little') + text, names

    def write(self, path, **more):
        """Write the file, and X.json with its sha256 and `more`, JSON-able."""
        path = Path(path)
        beside = path.with_name(f'.{path.name}.tmp')
        header, names = self.header()
        with one_line_io_errors(path):
            try:
                with open(beside, 'wb') as f:
                    f.write(header)
                    for name in names:
                        self.waiting[name].seek(0)
                        shutil.copyfileobj(self.waiting[name], f, 1 << 20)
                    f.flush()
                    os.fsync(f.fileno())
                path.with_suffix('.json').unlink(missing_ok=True)      # of a file that this one takes the place of
                os.replace(beside, path)
                flush_folder(path.parent)
            finally:
                beside.unlink(missing_ok=True)
        write_sealed(path.with_suffix('.json'), {'columns_sha256': sha256_file(path), **more})


def open_columns(path):
    """{name: array (n,)}, memory-mapped, read only."""
    whole = np.memmap(path, np.uint8, 'r').view(np.ndarray)    # slices of a memmap take ten times as long to make
    data = 8 + int.from_bytes(whole[:8].tobytes(), 'little')
    columns = {}
    for name, entry in json.loads(whole[8:data].tobytes()).items():
        start, end = entry['data_offsets']
        columns[name] = whole[data + start:data + end].view(DTYPES[entry['dtype']])
    return columns


def sealed_columns(path):
    """What X.json says, when it and the columns are whole; None when they are not there or any of it has changed."""
    path = Path(path)
    seal_path = path.with_suffix('.json')
    if not path.exists() or not seal_path.exists():
        return None
    try:
        seal = read_sealed(seal_path, 'the training script')
    except SystemExit:
        return None
    return seal if seal.get('columns_sha256') == sha256_file(path) else None


# -----------------------------------------------------------------------------
# texts as columns


def pack_texts(texts):
    """(their UTF-8 end to end, uint8; the length of each in bytes, int64). A path may hold bytes that are not UTF-8."""
    encoded = [text.encode(errors='surrogateescape') for text in texts]
    return np.frombuffer(b''.join(encoded), np.uint8), np.array([len(part) for part in encoded], np.int64)


def text_at(packed, start, end):
    return packed[start:end].tobytes().decode(errors='surrogateescape')
