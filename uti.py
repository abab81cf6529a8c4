"""
The unified token interface: one token space for text, images and sounds, the one grammar that all stages share, and the
way from texts, pictures and sounds to ids and back.

As a script, stage B1: the audit of a base model's tokenizer and two codecs.

reads   llm, image_codec, audio_codec; data_json and image_root (LLaVA JSON), manifest_jsonl (of sounds, and of pictures
        where there is no data_json)
writes  out_dir/{token_space.json,report.json,baseline.json,pictures/,sounds/,bad_samples.jsonl,gates.json}
done    when every gate passes; exits 1 when one does not

$ python uti.py configs/b1_small.py
$ python uti.py configs/b1_small.py --out_dir=out/b1_again

Letters: V text rows of the base model (151,936 for Qwen3, not the tokenizer's 151,669), K codebooks, F audio frames,
N codes of an image, B items, T ids, M labels, H, W pixels, S samples.
"""
import hashlib
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from codec import load_audio_codec, load_image_codec, log_mel_distance, psnr, si_snr, ssim
from common import canonical, exact_float32, finite, init_ranks, lock_run, provenance, write_atomic
from media import BadSample
from templates import marker_id, plain_tokenizer, turn_format

SPECIALS = ('<|img_start|>', '<|img_end|>', '<|aud_start|>', '<|aud_end|>')

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
        self.base = base
        self.image = image
        self.audio = audio
        sizes = {'text': base['text_rows'], 'special': len(SPECIALS)}
        if image:
            sizes['image'] = image['codes']
        if audio:
            for k in range(audio['codebooks']):
                sizes[f'audio_{k}'] = audio['codes']
        self.total = 0                                 # the first id of the next range, and in the end of none
        self.ranges = []
        for name, size in sizes.items():
            self.ranges.append(Range(name, self.total, size))
            self.total += size
        self.by_name = {r.name: n for n, r in enumerate(self.ranges)}      # index into ranges
        self.n_text = base['text_rows']
        self.n_new = self.total - self.n_text
        self.special = {name: self['special'].first + n for n, name in enumerate(SPECIALS)}
        self.text_end = base['end_of_text']

    def __getitem__(self, name):
        """The Range of this name."""
        return self.ranges[self.by_name[name]]

    def fields(self):
        return {
            'base': self.base,
            'image': self.image,
            'audio': self.audio,
            'special': self.special,
            'ranges': [[r.name, r.first, r.size] for r in self.ranges],
        }

    @classmethod
    def of_fields(cls, fields):
        """The space of fields(), as checkpoints store it."""
        return cls(fields['base'], fields['image'], fields['audio'])

    @property
    def sha256(self):
        """Over the canonical JSON of all fields."""
        return hashlib.sha256(canonical(self.fields()).encode()).hexdigest()

    def save(self, path):
        write_atomic(path, json.dumps({**self.fields(), 'sha256': self.sha256}, indent=1) + '\n')

    @classmethod
    def load(cls, path):
        """Raises SystemExit when the file is absent or damaged, or its sha256 is not that of its content."""
        try:
            stored = json.loads(Path(path).read_text())
            space = cls.of_fields(stored)
            is_whole = canonical({**space.fields(), 'sha256': space.sha256}) == canonical(stored)
        except OSError as e:
            raise SystemExit(f'{path}: no token space here ({e.strerror}); stage B1 writes it')
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise SystemExit(f'{path}: not a token space ({e}); stage B1 writes it')
        if not is_whole:
            raise SystemExit(f'{path}: its sha256 is not that of its content; restore the file or run stage B1 again')
        return space

    def require(self, other, where):
        """Exit unless `other`, the token space of `where`, is this one; the line names the first field that differs."""
        if other.sha256 != self.sha256:
            field, here, there = first_difference(self.fields(), other.fields())
            raise SystemExit(f'{where} has another token space: {field} is {there!r} there and {here!r} here; build it '
                             'again with this one')

    def check(self, ids, name, where='ids'):
        """Exit at the first id outside the range of this name, with its value, position and the range."""
        ids = np.asarray(ids)                          # any shape; positions count through it
        r = self[name]
        wrong = np.flatnonzero((ids < r.first) | (ids >= r.end))
        if len(wrong):
            raise SystemExit(f'{where}: id {ids.ravel()[wrong[0]]} at position {wrong[0]} is outside {name} '
                             f'[{r.first}, {r.end})')


def first_difference(here, there):
    """(field, its value here, its value there) of the first field in which two nested dicts differ."""
    here = flat_fields(here)
    there = flat_fields(there)
    for field in sorted(here.keys() | there.keys()):
        if here.get(field) != there.get(field):
            return field, here.get(field), there.get(field)
    return '', None, None


def flat_fields(value, prefix=''):
    """{'image.size': 32, ...} of nested dicts, for naming what differs."""
    if not isinstance(value, dict):
        return {prefix: json.loads(json.dumps(value))}     # a tuple and the list that a file has of it are the same
    fields = {}
    for key, part in value.items():
        fields.update(flat_fields(part, f'{prefix}.{key}' if prefix else key))
    return fields


# -----------------------------------------------------------------------------
# the grammar: builds documents, masks them, and constrains them while they are sampled


TASKS = {                                              # task: (modality, direction)
    'i2t': ('image', 'read'),
    'a2t': ('audio', 'read'),
    't2i': ('image', 'write'),
    't2a': ('audio', 'write'),
    'text': (None, 'read'),
}


@dataclass(frozen=True)
class Document:
    task: str
    ids: np.ndarray                    # (T,) int32
    label_positions: np.ndarray        # (M,) int32, where the labels stand in ids
    label_ranges: np.ndarray           # (M,) int16, index of each label's range in the token space


class Grammar:
    """read: start payload end text <|im_end|>. write: text start payload end. text: text <|im_end|>.

    Labels are what the model has to produce: the text and its end, or the payload and its end. The start marker is
    given. A payload has the exact length that the token space has for it; audio goes frame by frame, book 0, 1, ..
    """
    def __init__(self, space):
        self.space = space
        self.markers = {
            'image': (space.special['<|img_start|>'], space.special['<|img_end|>']),
            'audio': (space.special['<|aud_start|>'], space.special['<|aud_end|>']),
        }
        self.firsts = np.array([r.first for r in space.ranges])
        self.ends = np.array([r.end for r in space.ranges])
        self.payload_ranges = {}                       # modality: index of the range of each of its codes
        if space.image:
            rows, columns = space.image['grid']
            self.payload_ranges['image'] = np.full(rows * columns, space.by_name['image'], np.int16)      # (N,)
        if space.audio:
            books = [space.by_name[f'audio_{k}'] for k in range(space.audio['codebooks'])]
            self.payload_ranges['audio'] = np.tile(np.array(books, np.int16), space.audio['frames'])      # (F K,)

    def length(self, modality):
        """Codes of one image, or of one clip."""
        if modality not in self.payload_ranges:
            raise SystemExit(f'this token space has no {modality}: wanted one of {", ".join(self.payload_ranges)}')
        return len(self.payload_ranges[modality])

    def check_payload(self, modality, codes, where='payload'):
        """Exit unless codes, global ids, has the right length and each id is in the range of its position."""
        codes = np.asarray(codes)
        if codes.shape != (self.length(modality),):
            raise SystemExit(f'{where}: {codes.shape} codes, wanted ({self.length(modality)},) of one {modality}')
        first, end = self.bounds(self.payload_ranges[modality])
        wrong = np.flatnonzero((codes < first) | (codes >= end))
        if len(wrong):
            p = wrong[0]
            name = self.space.ranges[self.payload_ranges[modality][p]].name
            raise SystemExit(f'{where}: id {codes[p]} at position {p} is outside {name} [{first[p]}, {end[p]})')

    def bounds(self, range_indices):
        """(first, end) id of each of the ranges, both of the shape of range_indices."""
        return self.firsts[range_indices], self.ends[range_indices]

    def prompt(self, task, payload=None, text=()):
        """The ids before the first label. payload: codes of one item, for reading; text: ids, for writing."""
        modality, direction = TASKS[task]
        if modality is None:
            return np.zeros(0, np.int32)
        start, end = self.markers[modality]
        if direction == 'read':                        # what is read is given whole, what is written from its start on
            self.check_payload(modality, payload)
            return np.concatenate([[start], payload, [end]]).astype(np.int32)
        self.space.check(text, 'text', 'prompt')
        return np.array([*text, start], np.int32)

    def expected(self, task, n_text=0):
        """Range index of every label: of the payload and its end for writing, of n_text ids and their end for reading.

        This is what constrains sampling: label n of a written document may only come from range expected(task)[n].
        """
        modality, direction = TASKS[task]
        if direction == 'read':
            return np.full(n_text + 1, self.space.by_name['text'], np.int16)                              # (M,)
        return np.append(self.payload_ranges[modality], np.int16(self.space.by_name['special']))          # (M,)

    def document(self, task, payload=None, text=()):
        """A training document; every id is checked against the range of its position."""
        modality, direction = TASKS[task]
        prompt = self.prompt(task, payload, text)
        if direction == 'read':
            self.space.check(text, 'text', 'text')
            answer = [*text, self.space.text_end]
        else:
            self.check_payload(modality, payload)
            answer = np.append(payload, self.markers[modality][1])
        ids = np.concatenate([prompt, answer]).astype(np.int32)
        label_positions = np.arange(len(prompt), len(ids), dtype=np.int32)
        label_ranges = self.expected(task, len(text))
        if len(prompt) == 0:                           # nothing stands before the first id: it cannot be predicted
            label_positions = label_positions[1:]
            label_ranges = label_ranges[1:]
        return Document(task, ids, label_positions, label_ranges)


# -----------------------------------------------------------------------------
# texts, pictures and sounds to ids and back


class UTI:
    """Global ids in and out. Every id is checked against the range of its position, on its way in and out."""
    def __init__(self, space, tokenizer, image_codec=None, audio_codec=None):
        require_codec('image', image_codec, space.image)
        require_codec('audio', audio_codec, space.audio)
        self.space = space
        self.grammar = Grammar(space)
        self.tokenizer = tokenizer
        self.plain = plain_tokenizer(tokenizer)
        self.image_codec = image_codec
        self.audio_codec = audio_codec
        if audio_codec:                                # code c of book k is id book_starts[k] + c
            self.book_starts = np.array([space[f'audio_{k}'].first for k in range(audio_codec.codebooks)])

    @classmethod
    def build(cls, llm, image_codec='', audio_codec='', *, clip_seconds=1.0, image_prefix='', image_size=0,
              audio_prefix='', audio_codebooks=0, device='cpu'):
        """A token space over a base model and one or two codecs, each a Hugging Face folder or name, or ''."""
        base, tokenizer = load_base(llm)
        image = audio = None
        if image_codec:
            image = load_image_codec(image_codec, image_prefix, image_size).to(device)
        if audio_codec:
            audio = load_audio_codec(audio_codec, clip_seconds, audio_prefix, audio_codebooks).to(device)
        # describe() is of the weights as loaded: a codec of other weights gives another token space
        space = TokenSpace(base, image and image.describe(), audio and audio.describe())
        return cls(space, tokenizer, image, audio)

    @classmethod
    def of_space(cls, space, where, llm, image_codec='', audio_codec='', image_prefix='', audio_prefix='',
                 device='cpu'):
        """The UTI that a token space was made for, which is stored at `where`; its sizes are the space's. Exits, naming
        the first field that differs, when base model or codecs are not those of the space."""
        sizes = {}                                     # of what the space has; a codec too many is refused below
        if space.image:
            sizes.update(image_prefix=image_prefix, image_size=space.image['size'])
        if space.audio:
            sizes.update(audio_prefix=audio_prefix, audio_codebooks=space.audio['codebooks'],
                         clip_seconds=space.audio['samples'] / space.audio['sample_rate'])
        built = cls.build(llm, image_codec, audio_codec, **sizes, device=device)
        built.space.require(space, where)
        return built

    def encode_text(self, text):
        """str -> [id]. Markers typed in it stay plain text."""
        ids = self.plain.encode(text, add_special_tokens=False, split_special_tokens=True)
        self.space.check(ids, 'text', 'encoded text')
        return ids

    def decode_text(self, ids):
        """[id] -> str, without the end of text."""
        self.space.check(ids, 'text', 'text')
        return self.tokenizer.decode([int(i) for i in ids if i != self.space.text_end])

    def encode_image(self, images):
        """[uint8 (3, H, W)] of the codec's size -> int32 (B, N) ids, [{'size': H}]."""
        codec = self.codec_for('image')
        codes = codec.encode(torch.from_numpy(np.stack(images))).numpy()           # (B, N)
        ids = (codes + self.space['image'].first).astype(np.int32)
        self.check_payloads('image', ids)
        return ids, [{'size': codec.size} for _ in images]

    def decode_image(self, ids, metas):
        """int (B, N) ids -> [uint8 (3, H, W)]."""
        codec = self.codec_for('image')
        ids = np.asarray(ids)
        self.check_payloads('image', ids)
        for _, meta in zip(ids, metas, strict=True):
            if meta['size'] != codec.size:
                raise SystemExit(f'picture of {meta["size"]} pixels: this codec makes {codec.size}')
        codes = ids.astype(np.int64) - self.space['image'].first
        return list(codec.decode(torch.from_numpy(codes)).numpy())                 # B of (3, H, W)

    def encode_audio(self, waves):
        """[float32 (n,)] mono at the codec's rate -> int32 (B, F K) ids, book 0, 1, .. of each frame, and
        [{'n_samples', 'sample_rate'}]. A wave longer than the clip is cut, a shorter one filled up with silence."""
        codec = self.codec_for('audio')
        clips = []
        metas = []
        for n, wave in enumerate(waves):
            if wave.ndim != 1 or wave.dtype != np.float32 or not len(wave):
                raise SystemExit(f'sound {n}: {wave.dtype} {wave.shape}, wanted float32 (samples,), mono')
            n_samples = min(len(wave), codec.samples)
            clips.append(np.pad(wave[:n_samples], (0, codec.samples - n_samples)))
            metas.append({'n_samples': n_samples, 'sample_rate': codec.rate})
        codes = codec.encode(torch.from_numpy(np.stack(clips))).numpy()            # (B, F, K)
        ids = (codes + self.book_starts).reshape(len(waves), -1).astype(np.int32)  # (B, F K)
        self.check_payloads('audio', ids)
        return ids, metas

    def decode_audio(self, ids, metas):
        """int (B, F K) ids -> [float32 (n_samples,)]."""
        codec = self.codec_for('audio')
        ids = np.asarray(ids)
        self.check_payloads('audio', ids)
        for _, meta in zip(ids, metas, strict=True):
            if not 0 < meta['n_samples'] <= codec.samples or meta['sample_rate'] != codec.rate:
                raise SystemExit(f'sound of {meta}: this codec makes {codec.samples} samples at {codec.rate} Hz')
        frames = ids.astype(np.int64).reshape(len(ids), codec.frames, codec.codebooks)
        waves = codec.decode(torch.from_numpy(frames - self.book_starts)).numpy()  # (B, S)
        return [wave[:meta['n_samples']] for wave, meta in zip(waves, metas)]

    def codec_for(self, modality):
        codec = {'image': self.image_codec, 'audio': self.audio_codec}[modality]
        if codec is None:
            raise SystemExit(f'this token space has no {modality}')
        return codec

    def check_payloads(self, modality, ids):
        for n, codes in enumerate(ids):
            self.grammar.check_payload(modality, codes, f'{modality} {n}')


def require_codec(modality, codec, described):
    """Exit unless this codec, or None, is the one that the token space describes; the line names the first field that
    differs."""
    here = codec.describe() if codec else {}
    there = described or {}
    if here != there:
        field, here, there = first_difference({modality: here}, {modality: there})
        raise SystemExit(f'this {modality} codec is not that of the token space: {field} is {here!r} here and '
                         f'{there!r} there')


def load_base(llm):
    """(base, as TokenSpace takes it; tokenizer) of a base model. No weight of it is read."""
    from decoders import load_config, load_tokenizer  # here: token spaces are needed where transformers is not
    tokenizer = load_tokenizer(llm)
    config = load_config(llm)
    end = marker_id(tokenizer, turn_format(tokenizer).end)
    text_rows = config.get_text_config().vocab_size
    if len(tokenizer) > text_rows:
        raise SystemExit(f'{llm}: the tokenizer has {len(tokenizer)} ids, the model {text_rows} rows')
    base = {
        'name': base_name(llm),
        'text_rows': text_rows,
        'tokenizer_sha256': tokenizer_sha256(tokenizer),
        'end_of_text': end,
    }
    return base, tokenizer


def base_name(llm):
    """The last part of a local folder, or a hub name whole: nothing of this machine's paths."""
    return Path(llm).resolve().name if Path(llm).exists() else llm


def tokenizer_sha256(tokenizer):
    """Over what decides ids: the normalizer, the cut into words, the vocabulary with its merges, the added tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {key: backend[key] for key in ('normalizer', 'pre_tokenizer', 'model', 'added_tokens')}
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


# -----------------------------------------------------------------------------
# stage B1


def first_usable(listed, read, n_items, bad_samples):
    """[array] of the first n_items files that can be read. listed: (id, path) pairs; a file counts once."""
    arrays = []
    paths = set()
    for id, path in listed:
        if len(arrays) == n_items:
            break
        if path in paths:
            continue
        paths.add(path)
        try:
            arrays.append(read(path))
        except BadSample as e:
            bad_samples.add(id, e)
    return arrays


def encode_anew(build_settings, items):
    """{modality: ids} of the items, by a UTI that is built for it: what the other process does."""
    exact_float32()
    uti = UTI.build(**build_settings)
    encode = {'image': uti.encode_image, 'audio': uti.encode_audio}
    return {modality: encode[modality](originals)[0] for modality, originals in items.items()}


def encode_in_another_process(build_settings, items):
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:      # spawned: it inherits nothing
        return pool.submit(encode_anew, build_settings, items).result()


def read_baseline(path):
    """{name: number or sha256} of the first run that passed its floors, None where there is none yet."""
    if not path.exists():
        return None
    try:
        baseline = json.loads(path.read_text())
        for name in baseline.keys() & {'psnr', 'ssim', 'si_snr', 'log_mel'}:
            float(baseline[name])
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise SystemExit(f'{path}: not what an earlier run wrote ({e}); restore it, or remove it to begin anew')
    return baseline


def save_pictures(folder, originals, decoded):
    """One PNG, a line for each picture: the original beside the decoded one. Both uint8 (B, H, W, 3)."""
    from PIL import Image

    from media import write_picture
    if not len(originals):
        return
    zoom = max(1, 128 // originals.shape[1])           # small pictures are shown larger
    pairs = np.concatenate([originals, decoded], axis=2)               # (B, H, 2 W, 3)
    sheet = np.concatenate(pairs)                                      # (B H, 2 W, 3)
    sheet = sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)
    write_picture(folder / 'original_decoded.png', Image.fromarray(sheet))


def save_sounds(folder, originals, decoded, rate):
    from media import write_sound
    for n, (original, again) in enumerate(zip(originals, decoded)):
        write_sound(folder / f'{n:02d}_original.wav', original, rate)
        write_sound(folder / f'{n:02d}_decoded.wav', again, rate)


if __name__ == '__main__':
    import gates
    from configure import configure
    from lists import read_llava
    from media import BadSamples, read_audio, read_image
    from shards import read_manifest, read_sound_folder

    # -----------------------------------------------------------------------------
    # settings; override any with a config file or --key=value
    # inputs and outputs
    llm = ''                       # Hugging Face folder or name: only its tokenizer and vocabulary size are read
    image_codec = ''               # Hugging Face folder or name; '' leaves pictures out
    image_prefix = ''              # where in a larger checkpoint the codec is
    image_size = 0                 # pixels, for a codec that takes any
    audio_codec = ''               # Hugging Face folder or name; '' leaves sounds out
    audio_prefix = ''
    audio_codebooks = 0            # 0: all that the codec has. Each is a range of its own and an id in every frame
    clip_seconds = 1.0             # longer sounds are cut, shorter ones filled up with silence
    data_json = ''                 # LLaVA JSON, for its pictures; '' takes those of the manifest
    image_root = ''                # image paths in data_json are relative to this folder and stay inside it
    manifest_jsonl = ''            # {"id", "source", "image": path | "audio": path, "text"} a line, for its sounds;
                                   # paths are relative to its folder
    sound_dir = ''                 # or a folder of WAV, FLAC or OGG files, as B2 takes it; '' for none
    sound_captions = ''            # CSV of file_name, caption_1, caption_2, ... for them
    out_dir = 'out/b1'
    max_bad_samples = 0            # more unusable files than this end the run
    # the measurement
    n_items = 64                   # of each modality, from the start of the data
    n_alone = 32                   # of these also one by one
    n_shown = 16                   # originals beside decoded ones
    # gates: floors, and by what a later run may be worse than the first one, out_dir/baseline.json
    gate_psnr = 20.0               # dB, mean over the pictures
    gate_ssim = 0.6
    gate_si_snr = 0.0              # dB, mean over the sounds, at the codec's own rate
    gate_log_mel = 1.0             # nats, mean distance of the log mel spectra
    gate_psnr_drop = 0.5
    gate_ssim_drop = 0.02
    gate_si_snr_drop = 1.0
    gate_log_mel_rise = 0.05       # of the baseline's
    # machine
    device = 'auto'
    config = configure(globals(), required=('llm',))
    # -----------------------------------------------------------------------------

    for name, least in {'n_items': 1, 'n_alone': 1, 'n_shown': 0, 'max_bad_samples': 0, 'image_size': 0,
                        'audio_codebooks': 0}.items():
        if config[name] < least:
            raise SystemExit(f'{name} = {config[name]}: wanted at least {least}')
    if not clip_seconds > 0:
        raise SystemExit(f'clip_seconds = {clip_seconds}: wanted more than 0')

    # the token space
    lock = lock_run(out_dir)                           # held until this process ends
    out = Path(out_dir)
    _, _, device = init_ranks(device)
    build_settings = {
        'llm': llm,
        'image_codec': image_codec,
        'image_prefix': image_prefix,
        'image_size': image_size,
        'audio_codec': audio_codec,
        'audio_prefix': audio_prefix,
        'audio_codebooks': audio_codebooks,
        'clip_seconds': clip_seconds,
        'device': str(device),
    }
    baseline = read_baseline(out / 'baseline.json')    # before the work: a damaged one is met at once
    uti = UTI.build(**build_settings)
    space = uti.space
    space.save(out / 'token_space.json')
    new_ranges = ', '.join(f'{r.name} [{r.first}, {r.end})' for r in space.ranges[1:])
    print(f'token space {space.sha256[:12]}: {space.n_text} text rows and {space.n_new} new ids: {new_ranges}')

    # the items, {modality: [array]}
    (out / 'bad_samples.jsonl').unlink(missing_ok=True)
    bad_samples = BadSamples(out / 'bad_samples.jsonl', max_bad_samples)
    listed = {'image': [], 'audio': []}                # (id, path)
    if manifest_jsonl:
        for medium in read_manifest(manifest_jsonl, bad_samples):
            listed[medium.modality].append((medium.id, medium.path))
    if sound_dir and uti.audio_codec:
        sounds = read_sound_folder(sound_dir, sound_captions, bad_samples)
        listed['audio'] += [(sound.id, sound.path) for sound in sounds]
    if data_json and uti.image_codec:
        llava_items = read_llava(data_json, image_root, bad_samples)
        listed['image'] = [(item.id, item.images[0]) for item in llava_items if item.images]
    read = {}                                          # of each modality that has a codec
    if uti.image_codec:
        read['image'] = partial(read_image, size=uti.image_codec.size)
    if uti.audio_codec:
        rate = uti.audio_codec.rate
        read['audio'] = partial(read_audio, sample_rate=rate, clip_samples=uti.audio_codec.samples)
    items = {}
    for modality in read:
        items[modality] = first_usable(listed[modality], read[modality], n_items, bad_samples)
        if not items[modality]:
            named = 'sound_dir' if sound_dir and modality == 'audio' else 'data_json and manifest_jsonl'
            raise SystemExit(f'the data has no {modality} that can be read: see {named}')

    # the same ids again: in another order, alone, in another process
    elsewhere = encode_in_another_process(build_settings, items)
    decoded = {}
    verdicts = []
    measured = {}
    for modality, originals in items.items():
        encode = {'image': uti.encode_image, 'audio': uti.encode_audio}[modality]
        decode = {'image': uti.decode_image, 'audio': uti.decode_audio}[modality]
        ids, metas = encode(originals)
        # as lists, so that batch mates and the filling of the last batch differ
        backwards = encode(originals[::-1])[0][::-1]
        alone = np.concatenate([encode([original])[0] for original in originals[:n_alone]])
        decoded[modality] = decode(ids, metas)
        first, end = uti.grammar.bounds(uti.grammar.payload_ranges[modality])
        n_misshapen = 0
        for again, original in zip(decoded[modality], originals):
            n_misshapen += again.shape != original.shape or again.dtype != original.dtype
        verdicts += [
            gates.at_least(f'{modality}: items measured', len(originals), 32),
            gates.exactly(f'{modality}: ids that differ in another order', (backwards != ids).sum(), 0),
            gates.exactly(f'{modality}: ids that differ alone', (alone != ids[:n_alone]).sum(), 0),
            gates.exactly(f'{modality}: ids that differ in another process', (elsewhere[modality] != ids).sum(), 0),
            gates.exactly(f'{modality}: ids outside their range', ((ids < first) | (ids >= end)).sum(), 0),
            gates.exactly(f'{modality}: decoded to another shape, length or type', n_misshapen, 0),
        ]
        measured[f'{modality}_ids_used'] = len(np.unique(ids))

    # the distance of decoded ones from their originals
    if 'image' in items:
        originals = np.stack(items['image']).transpose(0, 2, 3, 1)     # (B, H, W, 3)
        again = np.stack(decoded['image']).transpose(0, 2, 3, 1)
        measured['psnr'] = psnr(originals, again).mean()
        measured['ssim'] = ssim(originals, again).mean()
        save_pictures(out / 'pictures', originals[:n_shown], again[:n_shown])
    if 'audio' in items:
        ratios = []
        distances = []
        for original, again in zip(items['audio'], decoded['audio']):  # one by one: they may differ in length
            ratios.append(si_snr(original, again))
            distances.append(log_mel_distance(original[None], again[None], rate))
        measured['si_snr'] = np.mean(ratios)
        measured['log_mel'] = np.mean(distances)
        save_sounds(out / 'sounds', items['audio'][:n_shown], decoded['audio'][:n_shown], rate)
    measured = {key: round(float(value), 4) for key, value in measured.items()}

    # gates: floors first, then the first run
    if 'image' in items:
        verdicts.append(gates.at_least('psnr', measured['psnr'], gate_psnr))
        verdicts.append(gates.at_least('ssim', measured['ssim'], gate_ssim))
    if 'audio' in items:
        verdicts.append(gates.at_least('si_snr', measured['si_snr'], gate_si_snr))
        verdicts.append(gates.at_most('log_mel', measured['log_mel'], gate_log_mel))
    content = hashlib.sha256()                         # of what was measured, not of files: a path may change
    for originals in items.values():
        for original in originals:
            content.update(original.tobytes())
    same = {'token_space': space.sha256, 'items': content.hexdigest()}     # what two runs must share to be compared
    slack = {
        'psnr': -gate_psnr_drop,
        'ssim': -gate_ssim_drop,
        'si_snr': -gate_si_snr_drop,
        'log_mel': gate_log_mel_rise,
    }
    if baseline is not None:
        verdicts += gates.no_regression(measured, baseline, same, slack)
    elif all(verdict.passed for verdict in verdicts):  # what misses a floor is no measure for later runs
        write_atomic(out / 'baseline.json', json.dumps({**measured, **same}, indent=1))
    report = {**measured, **same, 'settings': config, **provenance()}
    write_atomic(out / 'report.json', json.dumps(finite(report), indent=1))
    sys.exit(gates.conclude(out, verdicts, measured=measured))
