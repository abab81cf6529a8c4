"""
The unified token interface: one token space for text, images and sounds, and the one grammar that all stages share.

Letters: V text rows of the base model (151,936 for Qwen3, not the tokenizer's 151,669), K codebooks, F audio frames,
N codes of an image.
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import write_atomic

SPECIALS = ('<|img_start|>', '<|img_end|>', '<|aud_start|>', '<|aud_end|>')
MODALITIES = ('image', 'audio')

# -----------------------------------------------------------------------------
# the token space: which id means what


@dataclass(frozen=True)
class Range:
    """Ids [first, first + size)."""
    name: str
    first: int
    size: int

    @property
    def end(self):
        return self.first + self.size


class TokenSpace:
    """Text keeps ids [0, V); then special, image, audio_0 .. audio_{K-1}, each contiguous, one after the other.

    base: {'name', 'text_rows', 'tokenizer_sha256', 'end_of_text'}, the last being the id of <|im_end|>.
    image: {'class', 'settings', 'sha256', 'size', 'grid': (rows, columns), 'codes'} or None.
    audio: {'class', 'settings', 'sha256', 'sample_rate', 'samples', 'frames', 'codebooks', 'codes'} or None.
    All JSON-able and free of paths, dates and devices: the same inputs give the same sha256 on every machine.
    """
    def __init__(self, base, image=None, audio=None):
        self.base, self.image, self.audio = base, image, audio
        sizes = [('text', base['text_rows']), ('special', len(SPECIALS))]
        sizes += [('image', image['codes'])] if image else []
        sizes += [(f'audio_{k}', audio['codes']) for k in range(audio['codebooks'])] if audio else []
        first, ranges = 0, []
        for name, size in sizes:
            ranges.append(Range(name, first, size))
            first += size
        self.ranges, self.total = tuple(ranges), first
        self.by_name = {r.name: n for n, r in enumerate(ranges)}
        self.special = {name: self['special'].first + n for n, name in enumerate(SPECIALS)}
        self.text_end = base['end_of_text']
        self.n_text, self.n_new = base['text_rows'], self.total - base['text_rows']

    def __getitem__(self, name):
        """The Range of this name."""
        return self.ranges[self.by_name[name]]

    def fields(self):
        return {'base': self.base, 'image': self.image, 'audio': self.audio, 'special': self.special,
                'ranges': [[r.name, r.first, r.size] for r in self.ranges]}

    @property
    def sha256(self):
        """Over the canonical JSON of all fields."""
        return hashlib.sha256(canonical(self.fields()).encode()).hexdigest()

    def save(self, path):
        write_atomic(path, json.dumps({**self.fields(), 'sha256': self.sha256}, indent=1) + '\n')

    @classmethod
    def load(cls, path):
        """Raises SystemExit when the file is absent, damaged, or says another sha256 than its content has."""
        try:
            stored = json.loads(Path(path).read_text())
            space = cls(stored['base'], stored['image'], stored['audio'])
        except OSError as e:
            raise SystemExit(f'{path}: no token space here ({e.strerror}); stage B1 writes it')
        except (ValueError, KeyError, TypeError) as e:
            raise SystemExit(f'{path}: not a token space ({e}); stage B1 writes it')
        if canonical({**space.fields(), 'sha256': space.sha256}) != canonical(stored):
            raise SystemExit(f'{path}: its sha256 is not that of its content; restore the file or run stage B1 again')
        return space

    def require(self, other, where):
        """Exit unless `other`, the token space of `where`, is this one; the line names the first field that differs."""
        if other.sha256 != self.sha256:
            mine, theirs = flat(self.fields()), flat(other.fields())
            field = next(k for k in sorted(mine.keys() | theirs.keys()) if mine.get(k) != theirs.get(k))
            raise SystemExit(f'{where} has another token space: {field} is {theirs.get(field)!r} there and '
                             f'{mine.get(field)!r} here; build it again with this one')

    def check(self, ids, name, where='ids'):
        """Exit at the first id outside the range of this name, with its value, position and the range."""
        ids, r = np.asarray(ids), self[name]
        wrong = np.flatnonzero((ids < r.first) | (ids >= r.end))
        if len(wrong):
            raise SystemExit(f'{where}: id {ids.ravel()[wrong[0]]} at position {wrong[0]} is outside {name} '
                             f'[{r.first}, {r.end})')


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(',', ':'), ensure_ascii=True, allow_nan=False)


def flat(value, prefix=''):
    """{'image.size': 32, ...} of nested dicts, for naming what differs."""
    if not isinstance(value, dict):
        return {prefix: json.loads(json.dumps(value))}
    return {k: v for key, part in value.items() for k, v in flat(part, f'{prefix}.{key}'.strip('.')).items()}


# -----------------------------------------------------------------------------
# the grammar: how documents are built, masked, and constrained while they are sampled


TASKS = {'i2t': ('image', 'read'), 'a2t': ('audio', 'read'), 't2i': ('image', 'write'), 't2a': ('audio', 'write'),
         'text': (None, 'read')}


@dataclass(frozen=True)
class Document:
    """ids (T,) int32; labelled (M,): places whose id is a label; ranges (M,): index of each label's range."""
    task: str
    ids: np.ndarray
    labelled: np.ndarray
    ranges: np.ndarray


class Grammar:
    """read: start payload end text <|im_end|>. write: text start payload end. text: text <|im_end|>.

    Labels are what the model has to say: the text and its end, or the payload and its end. The start marker is given.
    A payload has the exact length that the token space says; audio goes frame by frame, book 0, 1, .. of each.
    """
    def __init__(self, space):
        self.space, special = space, space.special
        self.markers = {'image': (special['<|img_start|>'], special['<|img_end|>']),
                        'audio': (special['<|aud_start|>'], special['<|aud_end|>'])}
        self.payload_ranges = {}                       # modality: index of the range of each of its codes
        if space.image:
            rows, columns = space.image['grid']
            self.payload_ranges['image'] = np.full(rows * columns, space.by_name['image'], np.int16)
        if space.audio:
            books = [space.by_name[f'audio_{k}'] for k in range(space.audio['codebooks'])]
            self.payload_ranges['audio'] = np.tile(np.array(books, np.int16), space.audio['frames'])

    def length(self, modality):
        """Codes of one image, or of one clip."""
        if modality not in self.payload_ranges:
            raise SystemExit(f'this token space has no {modality}: wanted one of {", ".join(self.payload_ranges)}')
        return len(self.payload_ranges[modality])

    def check_payload(self, modality, codes, where='payload'):
        """Exit unless codes, global ids, has the right length and each id is in the range of its place."""
        codes = np.asarray(codes)
        if codes.shape != (self.length(modality),):
            raise SystemExit(f'{where}: {codes.shape} codes, wanted ({self.length(modality)},) of one {modality}')
        first, end = self.bounds(self.payload_ranges[modality])
        wrong = np.flatnonzero((codes < first) | (codes >= end))
        if len(wrong):
            p = wrong[0]
            name = self.space.ranges[self.payload_ranges[modality][p]].name
            raise SystemExit(f'{where}: id {codes[p]} at position {p} is outside {name} [{first[p]}, {end[p]})')

    def bounds(self, ranges):
        table = np.array([(r.first, r.end) for r in self.space.ranges])
        return table[ranges, 0], table[ranges, 1]

    def prompt(self, task, payload=None, text=()):
        """The ids before the first label. payload: codes of one item, for reading; text: ids, for writing."""
        modality, way = TASKS[task]
        if modality is None:
            return np.zeros(0, np.int32)
        start, end = self.markers[modality]
        if way == 'read':
            self.check_payload(modality, payload)
            return np.array([start, *payload, end], np.int32)
        self.space.check(text, 'text', 'prompt')
        return np.array([*text, start], np.int32)

    def expected(self, task, n_text=0):
        """Range index of every label: of the payload and its end for writing, of n_text ids and their end for reading.

        This is what constrains sampling: label n of a written document may only come from range expected(task)[n].
        """
        modality, way = TASKS[task]
        if way == 'read':
            return np.full(n_text + 1, self.space.by_name['text'], np.int16)
        return np.append(self.payload_ranges[modality], np.int16(self.space.by_name['special']))

    def document(self, task, payload=None, text=()):
        """A training document; every id is checked against the range of its place."""
        modality, way = TASKS[task]
        prompt = self.prompt(task, payload, text)
        if way == 'read':
            self.space.check(text, 'text', 'text')
            said = [*text, self.space.text_end]
        else:
            self.check_payload(modality, payload)
            said = [*payload, self.markers[modality][1]]
        ids = np.concatenate([prompt, np.array(said, np.int32)])
        labelled, ranges = np.arange(len(prompt), len(ids), dtype=np.int32), self.expected(task, len(text))
        if len(prompt) == 0:                           # nothing stands before the first id: it cannot be predicted
            labelled, ranges = labelled[1:], ranges[1:]
        return Document(task, ids, labelled, ranges)
