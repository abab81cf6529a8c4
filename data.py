"""
Data: readers, splits, shards, batches. A batch is a pure function of (settings, step): no state to save, any number of
ranks.

Letters: B rows, T tokens of all rows together, L tokens of the longest row, M labels.
"""
import csv
import hashlib
import json
import math
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from PIL import Image, ImageDraw, ImageFile, ImageOps

from common import write_atomic
from uti import TASKS, TokenSpace, canonical

MAX_PIXELS = 64_000_000                                # about 8,000 x 8,000; PIL's limit only warns below twice 89 M
ImageFile.LOAD_TRUNCATED_IMAGES = False

# -----------------------------------------------------------------------------
# images


class BadSample(SystemExit):
    """A sample that cannot be used: one line that names the file and says what is wrong with it. Uncaught, it ends the
    run with that line."""


def read_image(path, size, resample=3):
    """Picture file -> uint8 (3, size, size), RGB, upright, resized as the tower's processor does.

    EXIF rotation is applied; transparency is laid on white; palettes and 16-bit gray are converted. The file is decoded
    to its end, so a truncated one is noticed. Raises BadSample with one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadSample(f'{path}: {image.width} x {image.height} pixels, wanted at most {MAX_PIXELS:,}')
                if image.format == 'PNG':
                    image.verify()                     # the checksums, which decoding leaves out ...
            with Image.open(path) as image:
                image.load()                           # ... and the whole picture, which verify leaves out
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith('I') or image.mode == 'F':   # PIL's own convert would clip 16-bit gray at 255
                    gray = np.asarray(image).astype(np.float64)
                    gray = gray / 257 if image.mode.startswith('I;16') or gray.max() > 255 else gray
                    image = Image.fromarray(gray.clip(0, 255).round().astype(np.uint8))
                if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
                    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
                image = image.convert('RGB')
                if image.size != (size, size):
                    image = image.resize((size, size), Image.Resampling(resample))
    except FileNotFoundError:
        raise BadSample(f'{path}: no such image')
    except Exception as e:                             # decoders fail in as many ways as files are damaged
        raise BadSample(f'{path}: not a whole image ({e})')
    return np.asarray(image).transpose(2, 0, 1).copy()


def image_reader(read, cache=None):
    """row -> array: uint8 pixels by read(path), or features from a cache, {path: array}."""
    def get_image(row):
        if cache is None:
            return read(row.item.image)
        if row.item.image not in cache:
            raise BadSample(f'{row.item.image}: no such image')
        return cache[row.item.image]
    return get_image


def contact_sheet(path, images, captions, columns=8, side=160, lines=6):
    """One PNG of all pictures with their captions below."""
    if not images:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    height = side + 15 * lines + 8
    sheet = Image.new('RGB', (columns * (side + 8), -(-len(images) // columns) * height), 'white')
    pen = ImageDraw.Draw(sheet)
    for n, (image, text) in enumerate(zip(images, captions)):
        x, y = n % columns * (side + 8) + 4, n // columns * height + 4
        sheet.paste(Image.fromarray(read_image(image, side).transpose(1, 2, 0)), (x, y))
        pen.text((x, y + side + 2), '\n'.join(textwrap.wrap(text, side // 6)[:lines]), fill='black')
    sheet.save(path)


# -----------------------------------------------------------------------------
# sounds


def read_audio(path, sample_rate, clip_samples):
    """WAV, FLAC or OGG file -> float32 (n,), mono, at sample_rate, n <= clip_samples; what follows is not read.

    Channels are averaged, whole numbers come as [-1, 1], other rates go through resample(). Raises BadSample with one
    line for a file that is absent, truncated, no sound, empty, silent in the clip, or holds NaN or infinity.
    """
    import soundfile
    try:
        with open(path, 'rb') as f:
            head = f.read(12)
            size = f.seek(0, 2)
        said = int.from_bytes(head[4:8], 'little') + 8
        if head[:4] == b'RIFF' and head[8:] == b'WAVE' and 8 < said < 2 ** 32 and said > size:
            raise BadSample(f'{path}: truncated, {size} bytes of {said}')   # libsndfile takes what is there for all
        with soundfile.SoundFile(path) as f:
            have, length = f.samplerate, f.frames
            wanted = min(length, -(-clip_samples * have // sample_rate) + resample_reach(have, sample_rate))
            wave = f.read(wanted, dtype='float32', always_2d=True)
    except FileNotFoundError:
        raise BadSample(f'{path}: no such sound')
    except (OSError, soundfile.SoundFileError) as e:
        raise BadSample(f'{path}: not a whole sound ({str(e).splitlines()[0]})')
    if len(wave) < wanted:
        raise BadSample(f'{path}: truncated, {len(wave)} samples where there should be {wanted}')
    if not len(wave):
        raise BadSample(f'{path}: holds no sample')
    if not np.isfinite(wave).all():
        raise BadSample(f'{path}: NaN or infinity in the samples')
    wave = resample(wave.mean(1), have, sample_rate)[:clip_samples]
    if not np.abs(wave).max() > 1e-4:                  # 80 dB below full scale: not even 8-bit noise
        raise BadSample(f'{path}: silent in its first {clip_samples / sample_rate:g} s')
    return wave


def resample_reach(have, want, crossings=16, rolloff=0.95):
    """Samples on either side that one resampled sample is made from."""
    return -(-crossings * max(have, want) // int(want * rolloff)) if have != want else 0


def resample(wave, have, want, crossings=16, rolloff=0.95):
    """float32 (n,) at rate have -> (ceil(n want / have),) at rate want, by a sinc under a Hann window, 16 crossings
    to each side, which ends at 0.95 of the lower of the two Nyquist frequencies."""
    if have == want:
        return wave
    common = math.gcd(have, want)
    have, want = have // common, want // common
    cutoff = min(have, want) * rolloff
    reach = math.ceil(crossings * have / cutoff)
    taps = np.arange(-reach, reach + have) / have
    t = np.clip((taps[None] - np.arange(want)[:, None] / want) * cutoff, -crossings, crossings)
    kernel = np.sinc(t) * np.cos(np.pi * t / crossings / 2) ** 2 * cutoff / have        # one row for each phase
    padded = np.pad(wave.astype(np.float64), (reach, reach + have))
    frames = np.lib.stride_tricks.sliding_window_view(padded, len(taps))[::have]
    return (frames @ kernel.T).ravel()[:-(-len(wave) * want // have)].astype(np.float32)


# -----------------------------------------------------------------------------
# readers


@dataclass(frozen=True)
class Item:
    """One sample: an image path (or None) and its turns, [(what is asked, what is answered)]; captions ask nothing."""
    id: str
    image: str | None
    turns: tuple


def parse_json(text):
    """json.loads that refuses NaN, Infinity and duplicate keys with a ValueError."""
    def constant(name):
        raise ValueError(f'{name} is not JSON')

    def pairs(items):
        keys = [k for k, _ in items]
        if len(set(keys)) < len(keys):
            raise ValueError(f'key {max(keys, key=keys.count)!r} stands twice in one object')
        return dict(items)
    return json.loads(text, parse_constant=constant, object_pairs_hook=pairs)


def strict_json(path):
    """parse_json of a file, with one line naming it when it cannot be read."""
    try:
        return parse_json(Path(path).read_text())
    except OSError as e:
        raise SystemExit(f'{path}: cannot read the data set ({e.strerror}); set data_json to a LLaVA JSON file')
    except (ValueError, RecursionError) as e:
        raise SystemExit(f'{path}: not valid JSON: {e}')


def inside(root, name, where, kind='image'):
    """root / name as a path that stays inside root; else BadSample."""
    if not isinstance(name, str) or not name:
        raise BadSample(f'{where}: {kind} is {name!r}, wanted a path relative to the {kind} root')
    if '://' in name or Path(name).is_absolute() or '..' in Path(name).parts:
        raise BadSample(f'{where}: {kind} {name!r} leaves the {kind} root, wanted a relative path without ..')
    path = Path(root) / name
    try:
        linked_out = not path.resolve().is_relative_to(Path(root).resolve())
    except ValueError as e:
        raise BadSample(f'{where}: {kind} {name!r} is no file name ({e})')
    if linked_out:
        raise BadSample(f'{where}: {kind} {name!r} is a link out of the {kind} root')
    return str(path)


def read_llava(path, image_root, ledger, captions=False):
    """LLaVA JSON -> [Item]. captions: the human turn of LLaVA-Pretrain is a prompt that is not used.

    [{"id", "image"?, "conversations": [{"from": "human", "value": "<image>\\n..."},
                                        {"from": "gpt", "value": "..."}, ...]}]
    What is wrong with one sample goes to the ledger, which says when it is too much.
    """
    records = strict_json(path)
    if not isinstance(records, list):
        raise SystemExit(f'{path}: found a JSON {type(records).__name__}, wanted a list of samples')
    items, seen = [], set()
    for n, record in enumerate(records):
        where = f'{path}, sample {n}'
        try:
            if not isinstance(record, dict) or 'id' not in record:
                raise BadSample(f'{where}: no "id"')
            where += f' (id {record["id"]})'
            if str(record['id']) in seen:
                raise BadSample(f'{where}: this id stands twice')
            seen.add(str(record['id']))
            image = inside(image_root, record['image'], where) if record.get('image') is not None else None
            turns = read_turns(record.get('conversations'), image, where)
            if captions:
                if image is None:
                    raise BadSample(f'{where}: a caption without an image')
                turns = (('', turns[0][1]),)
            items.append(Item(str(record['id']), image, turns))
        except BadSample as e:
            ledger.add(str(record.get('id', n)) if isinstance(record, dict) else str(n), e, key=n)
    if not items:
        raise SystemExit(f'{path}: no usable sample in it')
    return items


@dataclass(frozen=True)
class Pair:
    """One image or one clip, by its path, and one text that describes it."""
    id: str
    modality: str
    path: str
    text: str


def read_manifest(path, ledger):
    """JSONL of {"id", "source"?, "image": path | "audio": path, "text"} -> [Pair]; paths are relative to its folder.

    A line that is wrong goes to the ledger.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as e:
        raise SystemExit(f'{path}: cannot read this manifest ({e.strerror}); is the path right?')
    pairs = []
    for n, line in enumerate(lines, 1):
        where, record = f'{path}:{n}', None
        if not line.strip():
            continue
        try:
            record = parse_json(line.decode())
            if not isinstance(record, dict) or not isinstance(record.get('id'), str | int):
                raise BadSample(f'{where}: no "id"')
            where += f' (id {record["id"]})'
            modality = [m for m in ('image', 'audio') if record.get(m) is not None]
            if len(modality) != 1:
                raise BadSample(f'{where}: {" and ".join(modality) or "neither image nor audio"}, wanted one of these')
            file = inside(Path(path).parent, record[modality[0]], where, modality[0])
            pairs.append(Pair(str(record['id']), modality[0], file, plain_text(record.get('text'), where)))
        except (ValueError, RecursionError) as e:
            ledger.add(f'{path}:{n}', BadSample(f'{where}: not valid JSON: {e}'), key=where)
        except BadSample as e:
            ledger.add(str(record.get('id', where)) if isinstance(record, dict) else where, e, key=f'{path}:{n}')
    return pairs


def read_sound_folder(folder, captions_csv, ledger):
    """Captions as Clotho has them, a CSV of file_name, caption_1, caption_2, ..., for sounds in a folder -> [Pair]."""
    try:
        with open(captions_csv, newline='') as f:
            records = list(csv.DictReader(f))
    except OSError as e:
        raise SystemExit(f'{captions_csv}: cannot read these captions ({e.strerror}); is the path right?')
    except (csv.Error, ValueError) as e:
        raise SystemExit(f'{captions_csv}: not a CSV of file_name, caption_1, ... ({e})')
    pairs = []
    for n, record in enumerate(records, 2):
        where, columns = f'{captions_csv}:{n}', [c for c in record if c and c.startswith('caption')]
        if 'file_name' not in record or not columns:
            raise SystemExit(f'{captions_csv}: wanted columns file_name, caption_1, ..., found '
                             f'{", ".join(map(str, record))}')
        for column in columns:
            id = f'{record["file_name"]}#{column}'
            try:
                file = inside(folder, record['file_name'], where, 'audio')
                pairs.append(Pair(id, 'audio', file, plain_text(record[column], where)))
            except BadSample as e:
                ledger.add(id, e, key=f'{where} {column}')
    return pairs


def plain_text(text, where):
    if not isinstance(text, str) or not text.strip():
        raise BadSample(f'{where}: text is {text!r}, wanted some')
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadSample(f'{where}: a text that is not Unicode ({e.reason})')
    return text.strip()


def read_turns(turns, image, where):
    if not isinstance(turns, list) or len(turns) < 2 or len(turns) % 2:
        raise BadSample(f'{where}: conversations is not a list of human and gpt turns in pairs')
    pairs, marks = [], 0
    for ask, answer in zip(turns[::2], turns[1::2]):
        if not all(isinstance(t, dict) and isinstance(t.get('value'), str) for t in (ask, answer)) \
                or (ask.get('from'), answer.get('from')) != ('human', 'gpt'):
            raise BadSample(f'{where}: turns must alternate human and gpt, each with a "value"')
        try:
            (ask['value'] + answer['value']).encode()
        except UnicodeEncodeError as e:
            raise BadSample(f'{where}: a text that is not Unicode ({e.reason})')
        if not answer['value'].strip():
            raise BadSample(f'{where}: an empty answer')
        marks += ask['value'].count('<image>')
        pairs.append((ask['value'].replace('<image>', '').strip(), answer['value'].strip()))
    if marks != (image is not None):
        raise BadSample(f'{where}: {marks} <image> marks for {int(image is not None)} images, wanted one each')
    return tuple(pairs)


class Ledger:
    """Samples that were left out, and why: bad_samples.jsonl. More than max_bad_samples of them is an error."""
    def __init__(self, path, max_bad_samples, active=True):
        self.path, self.limit, self.active, self.keys = Path(path), max_bad_samples, active, set()

    def add(self, id, reason, key=None):
        """Enter a sample, once: key tells samples of one id apart."""
        key = id if key is None else key
        if key in self.keys:
            return
        self.keys.add(key)
        if len(self.keys) > self.limit:
            raise SystemExit(f'{reason}; mend or remove it, or set max_bad_samples above {self.limit} '
                             'to skip such samples')
        if self.active:
            with open(self.path, 'a') as f:
                f.write(json.dumps({'id': id, 'reason': str(reason)}) + '\n')


# -----------------------------------------------------------------------------
# rows: ids and labels, assembled turn by turn


@dataclass(frozen=True)
class Row:
    """One sample as ids. labelled: places whose id is a label (predicted one before); image_at: first pad, or -1."""
    item: Item                         # or a Record
    ids: np.ndarray                    # int32
    labelled: np.ndarray               # int32
    image_at: int
    truncated: bool
    ranges: np.ndarray | None = None   # int16, of each label: which range of the token space it is from; None: text

    def __len__(self):
        return len(self.ids)


class Template:
    """How a sample becomes ids. Markers are looked up once; text is encoded so that markers typed in it stay plain."""
    def __init__(self, tokenizer, num_image_tokens, max_seq_len):
        self.tokenizer, self.n, self.max_seq_len = tokenizer, num_image_tokens, max_seq_len
        names = ('<|vision_start|>', '<|vision_end|>', '<|image_pad|>', '<|im_start|>', '<|im_end|>')
        ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names)))
        missing = [n for n, i in ids.items() if i is None or i == tokenizer.unk_token_id]
        if missing:
            raise SystemExit(f'the tokenizer has no {missing[0]}: wanted a Qwen3 tokenizer')
        self.start, self.end = ids['<|im_start|>'], ids['<|im_end|>']
        self.image_block = [ids['<|vision_start|>'], *[ids['<|image_pad|>']] * self.n, ids['<|vision_end|>']]
        if max_seq_len < len(self.image_block) + 8:
            raise SystemExit(f'max_seq_len = {max_seq_len} leaves no room for text after {self.n} image tokens')

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def cut(self, item, ids, labelled, image_at):
        """Cut to max_seq_len at the end; the image block stands at the start of a row and is never cut."""
        n, labelled = self.max_seq_len, np.array(labelled, np.int32)
        return Row(item, np.array(ids[:n], np.int32), labelled[labelled < n], image_at, len(ids) > n)

    def caption(self, item):
        """image block, newline, caption, end token; labels: the caption and its end."""
        ids = [*self.image_block, *self.encode('\n')]
        first = len(ids)
        ids += [*self.encode(item.turns[-1][1]), self.end]
        return self.cut(item, ids, range(first, len(ids)), 1)

    def chat(self, item):
        """ChatML without a system turn, the image block first in the first user turn; labels: answers and ends."""
        ids, labelled, image_at = [], [], -1
        newline = self.encode('\n')
        for n, (ask, answer) in enumerate(item.turns):
            ids += [self.start, *self.encode('user\n')]
            if n == 0 and item.image is not None:
                image_at = len(ids) + 1
                ids += [*self.image_block, *newline]
            ids += [*self.encode(ask), self.end, *newline, self.start, *self.encode('assistant\n')]
            if answer is None:                         # the open turn of a prompt
                break
            first = len(ids)
            ids += [*self.encode(answer), self.end]
            labelled += range(first, len(ids))
            ids += newline
        return self.cut(item, ids, labelled, image_at)

    def text(self, text, name):
        """Plain text as it stands, markers in it included; every id after the first is a label."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return self.cut(Item(name, None, (('', text),)), ids, range(1, len(ids)), -1)


def answer_starts(row):
    """Where each labelled stretch of a row begins: the ids before it are the prompt of that answer."""
    places = row.labelled
    return [int(p) for n, p in enumerate(places) if n == 0 or p != places[n - 1] + 1]


def read_texts(path):
    """JSONL with one {"text": ...} a line -> [text]."""
    try:
        with open(path) as f:
            texts = [json.loads(line)['text'] for line in f if line.strip()]
    except OSError as e:
        raise SystemExit(f'{path}: cannot read this text file ({e.strerror}); '
                         'set text_jsonl to lines of {"text": ...}')
    except (ValueError, KeyError, TypeError) as e:
        raise SystemExit(f'{path}: wanted lines of {{"text": ...}}, found one that is not ({e})')
    if not texts:
        raise SystemExit(f'{path}: holds no text')
    return texts


# -----------------------------------------------------------------------------
# splits


def media_key(item):
    """What a split is decided by: the image file (its bytes), never the caption; the text for a sample without one."""
    if item.image is None:
        return hashlib.sha256(repr(item.turns).encode()).hexdigest()
    try:
        return hashlib.sha256(Path(item.image).read_bytes()).hexdigest()
    except OSError as e:
        raise BadSample(f'{item.image}: cannot read this image ({e.strerror})')


def bucket_of(n_labels, edges):
    """0 short, 1 medium, 2 long; edges: the most labels of a short and of a medium sample."""
    return sum(n_labels > edge for edge in edges)


def split_rows(rows, n_eval, n_golden, edges, path, ledger, read):
    """(train, eval, golden) rows. eval and golden are balanced over the three length buckets and share no media with
    each other or with train. Written to `path` the first time, with every id held out of training, and read from it
    afterwards. read(path) decodes an image: a held-out one has to be whole."""
    path, by_id = Path(path), {row.item.id: row for row in rows}
    ids_sha256 = hashlib.sha256('\n'.join(sorted(by_id)).encode()).hexdigest()
    if path.exists():
        chosen = json.loads(path.read_text())
        gone = [i for name in ('eval', 'golden') for i in chosen[name] if i not in by_id]
        if gone or chosen['ids_sha256'] != ids_sha256:
            found = f'names {gone[0]!r}, which the data set no longer has' if gone else 'was made for other samples'
            raise SystemExit(f'{path} {found}: remove the file to choose anew, then train anew')
    else:
        keys = {}
        for row in rows:
            try:
                keys[row.item.id] = media_key(row.item)
            except BadSample as e:
                ledger.add(row.item.id, e)

        def whole(row):
            try:
                return row.item.image is None or read(row.item.image) is not None
            except BadSample as e:
                ledger.add(row.item.id, e)
        chosen, used = {'ids_sha256': ids_sha256}, set()
        for name, n in ('golden', n_golden), ('eval', n_eval):
            chosen[name] = []
            for bucket, share in enumerate(balanced(n)):
                pool = [r.item.id for r in rows if r.item.id in keys and len(r.labelled) and not r.truncated
                        and r.image_at >= 0 and bucket_of(len(r.labelled), edges) == bucket]
                fresh = []
                for id in sorted(pool, key=lambda i: hashlib.sha256(f'{keys[i]} {i}'.encode()).digest()):
                    if len(fresh) < share and keys[id] not in used and whole(by_id[id]):
                        used.add(keys[id])
                        fresh.append(id)
                chosen[name] += fresh
            chosen[name].sort(key=lambda i: hashlib.sha256(f'order {i}'.encode()).digest())   # any part is a fair one
        chosen['held_out'] = [i for i in by_id if i not in keys or keys[i] in used]
        write_atomic(path, json.dumps(chosen))
    held_out = set(chosen['held_out'])
    train = [row for row in rows if row.item.id not in held_out]
    if not train or len(chosen['eval']) < 8:
        raise SystemExit(f'{len(rows)} samples leave {len(train)} to train on and {len(chosen["eval"])} of {n_eval} '
                         'to evaluate on: add data or lower n_eval and n_golden')
    return train, [by_id[i] for i in chosen['eval']], [by_id[i] for i in chosen['golden']]


def length_buckets(counts, edges):
    """{name: which items} of the buckets that hold any, from each item's number of labels."""
    which = np.array([bucket_of(n, edges) for n in counts])
    return {name: which == b for b, name in enumerate(('short', 'medium', 'long')) if (which == b).any()}


def balanced(n):
    """n in three shares, 33 / 33 / 34."""
    return n // 3, n // 3, n - 2 * (n // 3)


# -----------------------------------------------------------------------------
# tokenized shards: stage B2 writes them, Track B trains on them

KINDS = ('text', 'image', 'audio')                     # what the numbers in a shard's `kinds` mean
SPLITS = ('train', 'eval', 'golden')


@dataclass(frozen=True)
class Record:
    """An item of a shard: the codes of its image or clip and its text, both global ids without markers."""
    id: str
    modality: str
    payload: np.ndarray                # int32
    text: np.ndarray                   # int32
    media: str                         # sha256 of the media file; captions of one file share it
    meta: dict | None = None           # what decoding its codes takes


def write_sealed(path, content):
    """A dict as JSON, with a sha256 over the rest of it."""
    sha256 = hashlib.sha256(canonical(content).encode()).hexdigest()
    write_atomic(path, json.dumps({**content, 'sha256': sha256}, indent=1) + '\n')


def read_sealed(path):
    """What write_sealed wrote; exits with one line when the file is absent or any of it has changed."""
    try:
        content = json.loads(Path(path).read_text())
        said = content.pop('sha256')
    except OSError as e:
        raise SystemExit(f'{path}: cannot read it ({e.strerror}); build_b2.py writes it when what it names is whole')
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise SystemExit(f'{path}: not what build_b2.py writes ({e}); remove it and run build_b2.py again')
    if said != hashlib.sha256(canonical(content).encode()).hexdigest():
        raise SystemExit(f'{path}: its sha256 is not that of its content; remove it and run build_b2.py again')
    return content


def write_shard(folder, name, space, media, items, **more):
    """Write folder/name.safetensors and then name.json, which says that the shard is whole and what is in it.

    media: [(sha256 of the file, modality, codes)], each stored once; items: [(id, index of its medium, text ids)];
    more: JSON-able, kept in name.json, such as metas, what decoding takes for each of the media. The same input gives
    the same bytes. Returns what name.json says.

    Tensors: ids int32, all segments end to end, first the media, then a text for each item; offsets int64, segment s is
    ids[offsets[s]:offsets[s + 1]]; kinds uint8, what each segment is; items int32 (n, 2), segments (medium, text).
    """
    segments = [codes for *_, codes in media] + [text for *_, text in items]
    body = safetensors.numpy.save({
        'ids': np.concatenate([np.zeros(0, np.int32), *(np.asarray(s, np.int32) for s in segments)]),
        'offsets': np.cumsum([0, *map(len, segments)], dtype=np.int64),
        'kinds': np.array([KINDS.index(modality) for _, modality, _ in media] + [0] * len(items), np.uint8),
        'items': np.array([(at, len(media) + n) for n, (_, at, _) in enumerate(items)], np.int32).reshape(-1, 2),
    }, metadata={'token_space': space.sha256})         # one key: several would come in any order
    side = {'name': name, 'shard_sha256': hashlib.sha256(body).hexdigest(), 'token_space': space.sha256,
            'bytes': len(body), 'ids': sum(map(len, segments)), 'media': [sha for sha, *_ in media],
            'items': [id for id, *_ in items], **more}
    try:
        write_atomic(Path(folder) / f'{name}.safetensors', body)
        write_sealed(Path(folder) / f'{name}.json', side)
    except SystemExit as e:
        raise SystemExit(f'{e.code}; mend that and start again, the finished shards are kept')
    return side


def load_shard(folder, name, sha256, space):
    """(tensors, what name.json says); exits with one line unless the bytes and the token space are the right ones."""
    path, side = Path(folder) / f'{name}.safetensors', read_sealed(Path(folder) / f'{name}.json')
    try:
        body = path.read_bytes()
    except OSError as e:
        raise SystemExit(f'{path}: cannot read this shard ({e.strerror}); run build_b2.py again')
    found = hashlib.sha256(body).hexdigest()
    if {found, side['shard_sha256']} != {sha256}:
        raise SystemExit(f'{path}: sha256 {found[:12]}, wanted {sha256[:12]}: damaged or exchanged; remove it and run '
                         'build_b2.py again')
    header = json.loads(body[8:8 + int.from_bytes(body[:8], 'little')])['__metadata__']
    for made_for in header['token_space'], side['token_space']:
        if made_for != space.sha256:
            raise SystemExit(f'{path}: made for token space {made_for[:12]}, wanted {space.sha256[:12]}: build it anew')
    return safetensors.numpy.load(body), side


def read_index(folder, space=None):
    """(index, TokenSpace) of a folder of shards; exits if they are damaged or made for another space than `space`."""
    index, stored = read_sealed(Path(folder) / 'index.json'), TokenSpace.load(Path(folder) / 'token_space.json')
    if index['token_space'] != stored.sha256:
        raise SystemExit(f'{folder}: index.json and token_space.json are not of one build; run build_b2.py again')
    if space is not None:
        space.require(stored, folder)
    return index, stored


def read_shards(folder, split, space=None):
    """The [Record] of a split: 'train', 'eval' or 'golden'. Every file is checked against its sha256 in index.json."""
    index, space = read_index(folder, space)
    if split not in index['splits']:
        raise SystemExit(f'{folder} has no split {split!r}: wanted one of {", ".join(index["splits"])}')
    records = []
    for shard in index['splits'][split]['shards']:
        tensors, side = load_shard(folder, shard['name'], shard['sha256'], space)
        segments, metas = np.split(tensors['ids'], tensors['offsets'][1:-1]), side.get('metas')
        for id, (medium, text) in zip(side['items'], tensors['items'].tolist()):
            records.append(Record(id, KINDS[tensors['kinds'][medium]], segments[medium], segments[text],
                                  side['media'][medium], metas and metas[medium]))
    return records


def token_row(record, task, grammar, max_seq_len):
    """A Record as the document of a task ('i2t', 'a2t', 't2i', 't2a', 'text') -> Row.

    What does not fit is cut from the text, never from the payload: where the text is said, its end; where it is the
    prompt, the prompt's.
    """
    modality, way = TASKS[task]
    if modality not in (None, record.modality):
        raise SystemExit(f'item {record.id} has an {record.modality}: task {task} wants an {modality}')
    room = max_seq_len - (grammar.length(modality) + 3 if modality else 1)
    if room < 1:
        raise SystemExit(f'max_seq_len = {max_seq_len} leaves no room for text in {task}: wanted at least '
                         f'{max_seq_len - room + 1}')
    document = grammar.document(task, record.payload, record.text[:room] if way == 'write' else record.text)
    n, kept = max_seq_len, document.labelled < max_seq_len
    return Row(record, document.ids[:n], document.labelled[kept], -1, len(record.text) > room, document.ranges[kept])


def with_prompt(row, text):
    """A writing row whose payload follows another prompt: text ids, or none."""
    at = row.labelled[0] - 1                           # of the start marker
    ids = np.concatenate([np.asarray(text, np.int32), row.ids[at:]])
    return replace(row, ids=ids, labelled=row.labelled - at + len(text))


def prompt_of(row):
    """The text ids that a writing row starts with."""
    return row.ids[:row.labelled[0] - 1]


def mixture(rows, weights, seed):
    """{task: [Row]} -> [Row] in which each task has its weight's share. Every row is there at least once; where a task
    has to fill more than it has, its rows come again, evenly."""
    share = {task: weight / sum(weights.values()) for task, weight in weights.items() if weight}
    total, mixed = max(len(rows[task]) / part for task, part in share.items()), []
    for n, (task, part) in enumerate(share.items()):
        order = np.random.default_rng([seed, n]).permutation(len(rows[task]))
        mixed += [rows[task][order[i % len(order)]] for i in range(round(total * part))]
    return mixed


# -----------------------------------------------------------------------------
# batches


@dataclass
class Batch:
    """Rows laid end to end, T tokens, with every place that the step needs found beforehand."""
    input_ids: torch.Tensor            # (T,)
    position_ids: torch.Tensor         # (T,) counted anew in each row
    rows: list                         # how attention lays the rows out, a few at a time: see lay_out
    image_positions: torch.Tensor      # (images * N,)
    label_positions: torch.Tensor      # (M,) the place before each label: the one that predicts it
    labels: torch.Tensor               # (M,)
    label_rows: torch.Tensor           # (M,) which of the B rows a label is in
    images: torch.Tensor | None        # uint8 (B, 3, H, W) or features (B, P, Dv)
    n_labels: int = 0
    ids: list = field(default_factory=list)
    label_ranges: list = field(default_factory=list)   # Track B: labels stand sorted by range, [(range, how many)]

    def to(self, device):
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        rows = [tuple(x.to(device, non_blocking=True) for x in group) for group in self.rows]
        return replace(self, rows=rows, **moved)


def lay_out(lengths, together=16):
    """[(places, slots)] for every `together` rows end to end in T tokens: places (B, L) in T, short rows filled
    up with place 0; slots (T,) in B * L. Rows come in the order of their lengths, so that little is filled up."""
    groups = []
    for first in range(0, len(lengths), together):
        some = lengths[first:first + together]
        ends, longest = np.cumsum(some), max(some)
        within = np.arange(longest) < np.array(some)[:, None]                                   # (B, L)
        places = np.where(within, np.arange(longest) + (ends - some)[:, None], 0)
        groups.append((torch.from_numpy(places), torch.from_numpy(np.flatnonzero(within))))
    return groups


def collate(rows, images, num_image_tokens):
    """[Row], [array or None] -> Batch. When a row says the ranges of its labels, those of all rows are sorted by range,
    so that a typed head takes one slice for each."""
    lengths = [len(r) for r in rows]
    starts = np.cumsum([0, *lengths[:-1]])
    labelled = [start + r.labelled.astype(np.int64) for start, r in zip(starts, rows)]
    ids = np.concatenate([r.ids for r in rows]).astype(np.int64)
    places, label_ranges = np.concatenate(labelled), []
    label_rows = np.repeat(np.arange(len(rows)), [len(p) for p in labelled])
    if any(r.ranges is not None for r in rows):
        ranges = np.concatenate([np.zeros(len(r.labelled), int) if r.ranges is None else r.ranges for r in rows])
        order = np.argsort(ranges, kind='stable')
        places, label_rows = places[order], label_rows[order]
        label_ranges = [(int(r), int(n)) for r, n in zip(*np.unique(ranges, return_counts=True))]
    with_image = [(start, r) for start, r in zip(starts, rows) if r.image_at >= 0]
    kept = [image for image in images if image is not None]
    as_tensor = torch.from_numpy
    return Batch(
        input_ids=as_tensor(ids), rows=lay_out(lengths),
        position_ids=as_tensor(np.concatenate([np.arange(n) for n in lengths])),
        image_positions=as_tensor(np.concatenate(
            [start + r.image_at + np.arange(num_image_tokens) for start, r in with_image] or [np.zeros(0, np.int64)])),
        label_positions=as_tensor(places - 1), labels=as_tensor(ids[places]),
        label_rows=as_tensor(label_rows), images=as_tensor(np.stack(kept)) if kept else None, n_labels=len(places),
        ids=[r.item.id for r in rows], label_ranges=label_ranges)


@lru_cache(maxsize=4)
def epoch_order(n, epoch, seed):
    return np.random.default_rng([seed, epoch]).permutation(n)


def row_order(n, row, seed):
    """Which of n samples row number `row` of the run is: a new permutation each epoch, a function of (seed, row)."""
    return int(epoch_order(n, row // n, seed)[row % n])


class Loader:
    """Rows and a way to get their images -> batches. `workers` threads decode; one more stays a step ahead.

    get_image(row) -> array, raising BadSample: such a row is left out of its batch and entered in the ledger.
    """
    def __init__(self, rows, get_image, num_image_tokens, ledger, seed=0, workers=2):
        self.rows, self.get_image, self.n, self.ledger, self.seed = rows, get_image, num_image_tokens, ledger, seed
        self.pool, self.ahead = ThreadPoolExecutor(workers), ThreadPoolExecutor(1)

    def step_rows(self, step, rows_per_step):
        """The rows of a global step, longest first: micro-batches hold rows of like length; memory peaks at once."""
        first = step * rows_per_step
        chosen = [self.rows[row_order(len(self.rows), r, self.seed)] for r in range(first, first + rows_per_step)]
        return sorted(chosen, key=len, reverse=True)

    def collate(self, rows):
        """[Row] -> Batch of those whose image can be read, or None."""
        kept, images = [], []
        for row, image in zip(rows, self.pool.map(self.try_image, rows)):
            if isinstance(image, BadSample):
                self.ledger.add(row.item.id, image)
            else:
                kept.append(row)
                images.append(image)
        return collate(kept, images, self.n) if kept else None

    def images(self, rows):
        """The images of rows that all have a whole one, as one tensor."""
        return torch.from_numpy(np.stack(list(self.pool.map(self.get_image, rows))))

    def try_image(self, row):
        try:
            return self.get_image(row) if row.image_at >= 0 else None
        except BadSample as e:
            return e

    def micro_batches(self, step, rows_per_step, batch_size, rank, world_size):
        """This rank's part of a step: every world_size-th micro-batch of batch_size rows."""
        rows = self.step_rows(step, rows_per_step)
        micros = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
        return [b for b in map(self.collate, micros[rank::world_size]) if b is not None]

    def steps(self, first, last, *how):
        """micro_batches of step `first`, `first` + 1, ... `last` - 1; the next one is made while this one is used."""
        coming = self.ahead.submit(self.micro_batches, first, *how) if first < last else None
        for step in range(first, last):
            batches = coming.result()
            coming = self.ahead.submit(self.micro_batches, step + 1, *how) if step + 1 < last else None
            yield batches


def ramped(start, end, part):
    """{task: share} on the way from the weights `start` (part 0) to the weights `end` (part 1); each sums to 1."""
    tasks = {**start, **end}
    before, after = ({t: weights.get(t, 0) / sum(weights.values()) for t in tasks} for weights in (start, end))
    return {t: (1 - part) * before[t] + part * after[t] for t in tasks}


class Curriculum(Loader):
    """A Loader over {task: [Row]} whose step s is made of the tasks as shares[s], {task: share}, says.

    What rounding leaves of a share is owed to the next steps. Each task's rows come in a permutation of their own, a
    new one each time they have all been there; the share prompt_dropout of the rows of `dropped` tasks comes without
    its prompt, others each time: a function of (seed, task, row, epoch) alone.
    """
    def __init__(self, rows, shares, rows_per_step, prompt_dropout=0.0, dropped=(), seed=0):
        super().__init__([row for task_rows in rows.values() for row in task_rows], None, 0, None, seed)
        self.tasks, self.prompt_dropout, self.dropped = rows, prompt_dropout, set(dropped)
        self.counts, owed = np.zeros((len(shares), len(rows)), int), np.zeros(len(rows))
        for step, share in enumerate(shares):
            owed += [share.get(task, 0) * rows_per_step for task in rows]
            count = np.floor(owed.clip(0) + 1e-9).astype(int)
            while count.sum() < rows_per_step:         # a row more for the tasks that are owed most
                count[np.argmax(owed - count)] += 1
            while count.sum() > rows_per_step:         # some had more than they were owed before
                count[np.argmin(np.where(count > 0, owed - count, np.inf))] -= 1
            owed -= count
            self.counts[step] = count
        self.before = np.cumsum(self.counts, axis=0) - self.counts

    def step_rows(self, step, rows_per_step):
        chosen = []
        for n, (task, rows) in enumerate(self.tasks.items()):
            seed = 1000 * self.seed + n                # tasks over the same items must not deal them alike
            dropout = self.prompt_dropout if task in self.dropped else 0
            for k in range(self.before[step, n], self.before[step, n] + self.counts[step, n]):
                i, epoch = row_order(len(rows), k, seed), int(k) // len(rows)
                bare = np.random.default_rng([seed, epoch, i, 1]).random() < dropout
                chosen.append(with_prompt(rows[i], ()) if bare else rows[i])
        assert len(chosen) == rows_per_step, 'made for steps of another size'
        return sorted(chosen, key=len, reverse=True)
