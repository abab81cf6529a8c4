"""
Examples: samples as token ids with their labels, by the hundred thousand. They are columns, flat arrays, and one is
made when it is asked for. What becomes of a list is prepared once, in a file beside it, which every rank and every
later start maps into its memory.
"""
import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from columns import ColumnWriter, open_columns, pack_texts, sealed_columns, text_at
from common import barrier, canonical, gather_in_order, on_rank_0, one_process_at_a_time, read_sealed, sha256_file
from lists import Item, Root, llava_items, text_lines
from media import BadSample

# -----------------------------------------------------------------------------
# an example, and many of them as columns


@dataclass(frozen=True)
class Example:
    """A training sample as ids. A label is predicted from the position before it."""
    item: Item                         # or a Record of shards.py
    ids: np.ndarray                    # int32 (tokens,)
    label_positions: np.ndarray        # int32, positions whose id is a label
    image_starts: np.ndarray           # int32 (images,), position of the first pad of each image of the item
    truncated: bool
    label_ranges: np.ndarray | None = None   # int16, the range of the token space that each label is from; None: text

    def __len__(self):
        return len(self.ids)


NO_IMAGES = np.zeros(0, np.int32)      # the image_starts of a text
HASH_DIGITS = 12                                       # of a sample in split.json, 8 MB for LLaVA's 665,000


def file_size(path):
    """The bytes of an image, -1 where there is no file."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1


def sample_hash(item, sizes):
    """HASH_DIGITS hex digits over what a sample is: its texts, its images' paths and sizes. Not over the images' bytes:
    reading them all takes too long for every start. sizes: of file_size, of each image."""
    sizes = [None if n_bytes < 0 else n_bytes for n_bytes in sizes]
    image, n_bytes, (turn, offset) = None, None, (0, 0)
    if item.images:
        image, n_bytes, (turn, offset) = item.images[0], sizes[0], item.image_places[0]
    content = [item.id, image, n_bytes, item.turns, item.system, offset]
    if turn or len(item.images) > 1:                   # without: as every split.json of one image has it
        content.append([item.images, sizes, item.image_places])
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:HASH_DIGITS]


def columns_of(examples, ends=None):
    """{name: array} of examples of chats, captions and texts. ends: {name: the last end} of the part before.

    A column of ends says where in another one what belongs to an example, or to a text, ends: it begins where that of
    the one before ended.
    """
    texts = []
    n_texts = []
    spans = []
    n_spans = []
    sizes = [[file_size(path) for path in example.item.images] for example in examples]
    hashes = [sample_hash(example.item, of_images) for example, of_images in zip(examples, sizes)]
    places = []
    for example in examples:
        item = example.item
        turns = [text for turn in item.turns for text in turn]
        texts += [item.id, item.system, *item.images, *turns]
        n_texts.append(2 + len(item.images) + len(turns))
        places += item.image_places
        runs = label_spans(example.label_positions)
        spans.append(runs)
        n_spans.append(len(runs))
    packed, text_bytes = pack_texts(texts)
    counts = {'token_ends': [len(example) for example in examples], 'span_ends': n_spans, 'text_ends': n_texts,
              'byte_ends': text_bytes, 'image_ends': [len(of_images) for of_images in sizes]}
    columns = {name: np.cumsum(count, dtype=np.int64) for name, count in counts.items()}
    for name in columns:
        columns[name] += (ends or {}).get(name, 0)
    return columns | {
        'ids': np.concatenate([np.zeros(0, np.int32), *[example.ids for example in examples]], dtype=np.int32),
        'spans': np.concatenate([np.zeros((0, 2), np.int32), *spans]).reshape(-1),
        'n_labels': np.array([len(example.label_positions) for example in examples], np.int32),
        'image_starts': np.concatenate([NO_IMAGES, *[example.image_starts for example in examples]], dtype=np.int32),
        'image_places': np.array(places, np.int32).reshape(-1),
        'truncated': np.array([example.truncated for example in examples], np.uint8),
        'texts': packed,
        'image_bytes': np.array(list(chain.from_iterable(sizes)), np.int64),
        'hashes': np.frombuffer(bytes.fromhex(''.join(hashes)), np.uint8),
    }


def label_spans(label_positions):
    """int32 (spans, 2), first and one past the last of positions that follow one another."""
    if not len(label_positions):
        return np.zeros((0, 2), np.int32)
    first, last = int(label_positions[0]), int(label_positions[-1])
    if last - first == len(label_positions) - 1:       # one answer, as captions have it
        return np.array([[first, last + 1]], np.int32)
    gaps = np.flatnonzero(np.diff(label_positions) != 1)
    firsts = label_positions[np.concatenate([[0], gaps + 1])]
    lasts = label_positions[np.concatenate([gaps, [-1]])]
    return np.stack([firsts, lasts + 1], axis=1).astype(np.int32)


class Examples(Sequence):
    """[Example] kept as columns_of them."""
    def __init__(self, columns):
        self.columns = columns

    @classmethod
    def of(cls, examples):
        """The same examples, as columns in memory."""
        return examples if isinstance(examples, cls) else cls(columns_of(examples))

    def __len__(self):
        return len(self.columns['image_ends'])

    def bounds(self, name, i):
        """Where the part of `i` begins and ends, by a column of ends."""
        ends = self.columns[name]
        return int(ends[i - 1]) if i else 0, int(ends[i])

    def text(self, n):
        return text_at(self.columns['texts'], *self.bounds('byte_ends', n))

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]                        # from the end too, and the IndexError that ends a loop
        columns = self.columns
        first, last = self.bounds('token_ends', i)
        start, end = self.bounds('span_ends', i)
        spans = columns['spans'][2 * start:2 * end].reshape(-1, 2).tolist()
        positions = [np.arange(*span, dtype=np.int32) for span in spans]
        return Example(
            self.item(i),
            columns['ids'][first:last].copy(),
            np.concatenate(positions) if positions else np.zeros(0, np.int32),
            columns['image_starts'][slice(*self.bounds('image_ends', i))].copy(),
            bool(columns['truncated'][i]),
        )

    def item(self, i):
        id, system, *texts = [self.text(n) for n in range(*self.bounds('text_ends', i))]
        first, last = self.bounds('image_ends', i)
        turns = texts[last - first:]
        places = self.columns['image_places'][2 * first:2 * last].reshape(-1, 2).tolist()
        return Item(id, tuple(texts[:last - first]), tuple(zip(turns[::2], turns[1::2])), system,
                    tuple(map(tuple, places)))

    def ids(self):
        """The id of each, one after the other."""
        for i in range(len(self)):
            yield self.text(self.bounds('text_ends', i)[0])

    def images(self):
        """The path of every image of each, one after the other."""
        for i in range(len(self)):
            first, last = self.bounds('image_ends', i)
            if first < last:
                start = self.bounds('text_ends', i)[0] + 2     # after id and system
                yield from (self.text(start + k) for k in range(last - first))

    def image_counts(self):
        """(examples,), how many images each has."""
        return np.diff(self.columns['image_ends'], prepend=0)

    def label_counts(self):
        """(examples, cut ones, ones without a label), without making any."""
        return len(self), int(self.columns['truncated'].sum()), int((self.columns['n_labels'] == 0).sum())

    def hashes(self, image_bytes):
        """The sample_hash of each, in their order, as one text: where two differ is which sample differs.

        image_bytes: (images,), what file_size says of each now."""
        hashes = self.columns['hashes'].reshape(len(self), -1).copy()
        changed = np.flatnonzero(image_bytes != self.columns['image_bytes'])
        for i in np.unique(np.searchsorted(self.columns['image_ends'], changed, side='right')).tolist():
            sizes = image_bytes[slice(*self.bounds('image_ends', i))].tolist()
            hashes[i] = list(bytes.fromhex(sample_hash(self.item(i), sizes)))
        return hashes.tobytes().hex()


class Chosen(Sequence):
    """Some of several collections of examples, one after the other. parts: (examples, the numbers of those chosen)."""
    def __init__(self, *parts):
        self.parts = [(examples, np.asarray(numbers, np.int32)) for examples, numbers in parts]

    def __len__(self):
        return sum(len(numbers) for _, numbers in self.parts)

    def __add__(self, other):
        return Chosen(*self.parts, *other.parts)

    def __getitem__(self, i):
        i = range(len(self))[i]
        for examples, numbers in self.parts:
            if i < len(numbers):
                return examples[int(numbers[i])]
            i -= len(numbers)


# -----------------------------------------------------------------------------
# the pictures of examples


def media_sha256(path, kind='file'):
    """Of the bytes of a media file; raises BadSample for one that cannot be read, a pipe or a device among them."""
    require_media_file(path, kind)
    try:
        return sha256_file(path)
    except OSError as e:
        raise BadSample(f'{path}: cannot read this {kind} ({e.strerror})')


def require_media_file(path, kind='file'):
    """BadSample for a media file that cannot be read, as far as that can be told without reading it."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):    # a pipe would be waited for, a device has no end
            raise BadSample(f'{path}: cannot read this {kind} (it is no file)')
    except (OSError, ValueError) as e:
        raise BadSample(f'{path}: cannot read this {kind} ({getattr(e, "strerror", None) or e})')
    if not os.access(path, os.R_OK):
        raise BadSample(f'{path}: cannot read this {kind} (Permission denied)')


def media_key(item):
    """The bytes of a sample's images, as a text: their sha256, one behind the other; that of the text of a sample
    without one."""
    if not item.images:
        return hashlib.sha256(repr(item.turns).encode()).hexdigest()
    return ' '.join(media_sha256(path, 'image') for path in item.images)


def image_sizes(examples):
    """(images,) int64, the bytes of every image now, -1 where there is no file."""
    return np.fromiter(map(file_size, Examples.of(examples).images()), np.int64)


def in_hash_order(ids, numbers, word):
    """numbers, of examples, in the order of a hash of their ids. Another word gives another order."""
    digests = [hashlib.sha256(f'{word} {ids[i]}'.encode(errors='surrogateescape')).digest() for i in numbers]
    return np.array(numbers, np.int64)[np.argsort(np.array(digests, 'S32'), kind='stable')]


class Pictures:
    """The pictures of examples, by their bytes, never the captions: which are held out. Equal bytes have equal sizes:
    the bytes of those that are held out are read, and of those that have the size of one of them, and no others."""
    def __init__(self, examples, bad_samples):
        self.examples = Examples.of(examples)
        self.bad_samples = bad_samples
        self.sizes = image_sizes(self.examples)                                                 # (images,)
        self.examples_of = np.repeat(np.arange(len(examples)), self.examples.image_counts())    # (images,)
        self.is_there = np.ones(len(examples), bool)   # and as far as can be told its pictures can be read
        self.known = {}                                # {path: the sha256 of the picture, None: it cannot be read}
        self.taken = {}                                # {number of an example that was chosen: those of its pictures}
        self.taken_keys = set()
        for i, path in zip(self.examples_of.tolist(), self.examples.images(), strict=True):
            try:
                require_media_file(path, 'image')
            except BadSample as e:
                self.leave_out(i, e)

    def leave_out(self, i, reason):
        self.is_there[i] = False
        self.bad_samples.add(self.examples.item(i).id, reason)

    def keys(self, i):
        """The sha256 of each picture of an example; None for one that cannot be read."""
        keys = []
        for path in self.examples.item(i).images:
            if path not in self.known:
                self.known[path] = None
                try:
                    self.known[path] = media_sha256(path, 'image')
                except BadSample as e:
                    self.leave_out(i, e)
            keys.append(self.known[path])
        return keys

    def take(self, i, read):
        """Choose example i, when no other one that was chosen has one of its pictures and they are whole; whether it
        was."""
        keys = self.keys(i)
        if None in keys or self.taken_keys.intersection(keys):
            return False
        item = self.examples.item(i)
        try:
            for path in item.images:
                read(path)
        except BadSample as e:
            self.bad_samples.add(item.id, e)
            return False
        self.taken[i] = keys
        self.taken_keys.update(keys)
        return True

    def held_out(self):
        """The numbers of all examples that have a picture of a chosen one, or one that cannot be read."""
        held_out = set(self.taken)
        # equal bytes have equal sizes: only pictures of the size of a chosen one are hashed
        sizes = self.sizes[np.isin(self.examples_of, list(self.taken))]
        for i in np.unique(self.examples_of[np.isin(self.sizes, sizes)]).tolist():
            if self.is_there[i] and self.taken_keys.intersection(self.keys(i)):
                held_out.add(i)
        return sorted(held_out.union(np.flatnonzero(~self.is_there).tolist()))


def stamp_of(path):
    """(size, time of the last change in ns) of a file; (-1, -1) where there is none."""
    try:
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    except (OSError, ValueError):
        return -1, -1


def picture_keys(paths, folder, rank=0, world_size=1):
    """uint8 (paths, 32), the sha256 of each picture, zeros for one that cannot be read; on every rank.

    A picture whose size and time are those that the folder has a key for, by remember_pictures, is not read again; the
    ranks share the others. Returns also, on rank 0, the stamps that are new, for remember_pictures, or None.
    """
    keys, stamps, unknown = on_rank_0(known_keys, paths, folder)
    digests = []
    for i in unknown[rank::world_size]:
        try:
            digests.append(bytes.fromhex(media_sha256(paths[i])))
        except BadSample:
            digests.append(bytes(32))
    barrier()
    for i, digest in zip(unknown, gather_in_order(digests), strict=True):
        keys[i] = list(digest)
    return keys, stamps if rank == 0 and len(unknown) else None


def known_keys(paths, folder):
    """(uint8 (paths, 32), the keys that the folder has; int64 (paths, 2), stamps of the files now; the numbers of those
    that have to be read)."""
    keys = np.zeros((len(paths), 32), np.uint8)
    stamps = np.array([stamp_of(path) for path in paths], np.int64).reshape(-1, 2)
    is_known = stamps[:, 0] < 0                        # no file: nothing to read
    file = keys_file(paths, folder)
    if sealed_columns(file) is not None:
        columns = open_columns(file)
        had = (columns['stamps'].reshape(-1, 2) == stamps).all(axis=1)
        keys[had] = columns['keys'].reshape(-1, 32)[had]
        is_known |= had
    return keys, stamps, np.flatnonzero(~is_known)


def keys_file(paths, folder):
    name = hashlib.sha256('\n'.join(paths).encode(errors='surrogateescape')).hexdigest()[:16]
    return Path(folder) / f'pictures-{name}.safetensors'


def remember_pictures(paths, folder, stamps, keys):
    """Keep the keys of these paths, in a folder that can be written; else the next start reads the pictures again."""
    if os.access(folder, os.W_OK):
        writer = ColumnWriter(folder)
        writer.add({'stamps': stamps.reshape(-1), 'keys': keys.reshape(-1)})
        writer.write(keys_file(paths, folder))


# -----------------------------------------------------------------------------
# prepared examples: a list, read and tokenized once

FORMAT = 2                                             # of columns_of: with another one, files are made anew
PART = 2000                                            # examples that are in memory while a list is prepared


class Noted:
    """BadSamples that keeps what a list enters, for the starts that do not read it."""
    def __init__(self, bad_samples):
        self.bad_samples = bad_samples
        self.entries = []

    def add(self, id, reason, key):
        self.bad_samples.add(id, reason, key=key)
        self.entries.append([id, str(reason), key])


def prepare(kind, path, template, bad_samples, rank, image_root='', max_images=1):
    """Examples of a list, on every rank; rank 0 prepares them when no earlier start has.

    kind: 'caption' or 'chat', of LLaVA's lists, or 'text', of JSONL. Its file is named by all that decides what is in
    it: the list's bytes and path, the template with its tokenizer and max_seq_len, the image root and how many images a
    sample may have. It is made anew when it is damaged, or when a link leads out of the root, or one no longer does.
    What is wrong in the list goes to bad_samples at every start.
    """
    file = on_rank_0(prepared_file, kind, path, template, bad_samples, image_root=image_root, max_images=max_images)
    if not file.exists():                              # on another machine, with a disk of its own
        file = prepared_file(kind, path, template, bad_samples, image_root=image_root, max_images=max_images)
    if rank > 0:
        enter_bad_samples(read_sealed(file.with_suffix('.json'), 'the training script'), bad_samples)
    return Examples(open_columns(file))


def prepared_file(kind, path, template, bad_samples, image_root, max_images):
    """The file of prepare, which is there and whole when this returns."""
    try:
        sha256 = sha256_file(path)
    except OSError as e:
        raise SystemExit(f'{path}: cannot read this {"text file" if kind == "text" else "data set"} ({e.strerror}); '
                         'is the path right?')
    key = canonical([FORMAT, kind, sha256, os.fspath(path), os.fspath(image_root), max_images, template.sha256()])
    name = f'{kind}s-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors'
    root = Root(image_root)
    folder = writable_folder(Path(path), name)
    with one_process_at_a_time(folder / f'.{name}.lock', f'prepares {path}'):
        sealed = sealed_columns(folder / name)
        if sealed is not None and links_are_as_they_were(folder / name, root, sealed['links_out']):
            enter_bad_samples(sealed, bad_samples)
        else:
            write_prepared(folder / name, kind, path, template, root=root, bad_samples=bad_samples,
                           max_images=max_images)
    return folder / name


def writable_folder(path, name):
    """Where prepared examples of a list are: beside it, or in the user's cache where the list's folder is read-only."""
    beside = path.with_name(f'{path.name}.prepared')
    cache = Path.home() / '.cache' / 'nanograft'
    for folder in beside, cache:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f'.{name}.lock', 'a'):
                return folder
        except OSError as e:
            reason = e.strerror
    raise SystemExit(f'{beside}, {cache}: cannot write prepared examples to either ({reason}); make one of them '
                     'writable')


def links_are_as_they_were(file, root, links_out):
    """Whether what a list's links were found to be when this file was written is still true."""
    if any(root.holds(path) for path in links_out):
        return False
    return all(root.holds(path) for path in Examples(open_columns(file)).images())


def enter_bad_samples(sealed, bad_samples):
    for id, reason, key in sealed['bad_samples']:
        bad_samples.add(id, reason, key=key)


def write_prepared(file, kind, path, template, root, bad_samples, max_images):
    """Read a list and write its examples, columns_of them, and beside them what was wrong in it."""
    noted = Noted(bad_samples)
    if kind == 'text':
        items = text_lines(path)
    else:
        items = llava_items(path, root, noted, captions=kind == 'caption', max_images=max_images)
    writer = ColumnWriter(file.parent)
    ends = {}
    n_examples = 0
    while part := list(islice(items, PART)):
        columns = columns_of(template.examples(kind, part), ends)
        ends = {name: column[-1] for name, column in columns.items() if name.endswith('_ends')}
        writer.add(columns)
        n_examples += len(part)
    writer.write(file, bad_samples=noted.entries, links_out=root.links_out)
    print(f'{file}: {n_examples:,} examples prepared', flush=True)
