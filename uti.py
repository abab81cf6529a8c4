"""
The unified token interface: one token space for text, images and sounds, the one grammar that all stages share, and the
way from texts, pictures and sounds to ids and back.

As a script, stage B1: the audit of a base model's tokenizer and two codecs.

reads   data_json and image_root (LLaVA JSON), manifest_jsonl and audio_root (JSONL), llm, image_codec, audio_codec
writes  out_dir/{token_space.json,report.json,baseline.json,pictures/,sounds/,bad_samples.jsonl,gates.json}
done    when every gate passes; exits 1 when one does not

$ python uti.py configs/b1_small.py
$ python uti.py configs/b1_small.py --out_dir=out/b1_again

Letters: V text rows of the base model (151,936 for Qwen3, not the tokenizer's 151,669), K codebooks, F audio frames,
N codes of an image, B items, H, W pixels.
"""
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from codec import load_audio_codec, load_image_codec, log_mel_distance, psnr, si_snr, ssim
from common import init_ranks, lock_run, provenance, write_atomic

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


# -----------------------------------------------------------------------------
# texts, pictures and sounds to ids and back


class UTI:
    """Global ids in and out. Every id is checked against the range of its place, on the way in and on the way out."""
    def __init__(self, space, tokenizer, image_codec=None, audio_codec=None):
        for name, codec, described in ('image', image_codec, space.image), ('audio', audio_codec, space.audio):
            if (codec and codec.describe()) != described:
                mine, theirs = (flat(d or {}) for d in (codec and codec.describe(), described))
                field = next((k for k in sorted(mine.keys() | theirs.keys()) if mine.get(k) != theirs.get(k)), '')
                raise SystemExit(f'this {name} codec is not that of the token space: {name}.{field} is '
                                 f'{mine.get(field)!r} here and {theirs.get(field)!r} there')
        self.space, self.grammar, self.tokenizer = space, Grammar(space), tokenizer
        self.image_codec, self.audio_codec = image_codec, audio_codec
        if audio_codec:                                # what turns code c of book k into its id, (F * K,)
            self.first = np.array([space[f'audio_{k}'].first for k in range(audio_codec.codebooks)])

    @classmethod
    def build(cls, llm, image_codec='', audio_codec='', clip_seconds=1.0, image_prefix='', image_size=0,
              audio_prefix='', audio_codebooks=0, device='cpu'):
        """A token space over a base model and one or two codecs, each a Hugging Face folder or name, or ''."""
        from transformers import AutoConfig, AutoTokenizer
        try:
            tokenizer, config = AutoTokenizer.from_pretrained(llm), AutoConfig.from_pretrained(llm)
        except (OSError, ValueError) as e:
            raise SystemExit(f'{llm}: cannot load the tokenizer of this model ({str(e).splitlines()[0]})')
        end = tokenizer.convert_tokens_to_ids('<|im_end|>')
        if end is None or end == tokenizer.unk_token_id:
            raise SystemExit(f'{llm}: the tokenizer has no <|im_end|>: wanted a Qwen3 tokenizer')
        base = {'name': base_name(llm), 'text_rows': config.get_text_config().vocab_size,
                'tokenizer_sha256': tokenizer_sha256(tokenizer), 'end_of_text': end}
        if len(tokenizer) > base['text_rows']:
            raise SystemExit(f'{llm}: the tokenizer has {len(tokenizer)} ids, the model {base["text_rows"]} rows')
        image = load_image_codec(image_codec, image_prefix, image_size) if image_codec else None
        audio = load_audio_codec(audio_codec, clip_seconds, audio_prefix, audio_codebooks) if audio_codec else None
        for codec in filter(None, (image, audio)):
            codec.to(device)
        space = TokenSpace(base, image and image.describe(), audio and audio.describe())
        return cls(space, tokenizer, image, audio)

    @classmethod
    def of_space(cls, space, where, llm, image_codec='', audio_codec='', image_prefix='', audio_prefix='',
                 device='cpu'):
        """The UTI that a token space was made for, which is stored at `where`; its sizes are the space's. Exits, naming
        the first field that differs, when base model or codecs are not those of the space."""
        sizes = {'image_prefix': image_prefix, 'image_size': space.image['size']} if space.image else {}
        if space.audio:
            sizes.update(clip_seconds=space.audio['samples'] / space.audio['sample_rate'], audio_prefix=audio_prefix,
                         audio_codebooks=space.audio['codebooks'])
        built = cls.build(llm, image_codec, audio_codec, **sizes, device=device)
        built.space.require(space, where)
        return built

    def encode_text(self, text):
        """str -> [id]. Markers typed in it stay plain text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        self.space.check(ids, 'text', 'encoded text')
        return ids

    def decode_text(self, ids):
        """[id] -> str, without the end of text."""
        self.space.check(ids, 'text', 'text')
        return self.tokenizer.decode([int(i) for i in ids if i != self.space.text_end])

    def encode_image(self, images):
        """[uint8 (3, H, W)] of the codec's size -> int32 (B, N) ids, [{'size': H}]."""
        codec = self.have('image')
        codes = codec.encode(torch.from_numpy(np.stack(images))).numpy()
        ids = (codes + self.space['image'].first).astype(np.int32)
        return self.checked('image', ids), [{'size': codec.size} for _ in images]

    def decode_image(self, ids, metas):
        """int (B, N) ids -> [uint8 (3, H, W)]."""
        codec = self.have('image')
        codes = self.checked('image', np.asarray(ids)).astype(np.int64) - self.space['image'].first
        for _, meta in zip(ids, metas, strict=True):
            if meta['size'] != codec.size:
                raise SystemExit(f'picture of {meta["size"]} pixels: this codec makes {codec.size}')
        return list(codec.decode(torch.from_numpy(codes)).numpy())

    def encode_audio(self, waves):
        """[float32 (n,)] mono at the codec's rate -> int32 (B, F * K) ids, book 0, 1, .. of each frame, and
        [{'n_samples', 'sample_rate'}]. A wave longer than the clip is cut, a shorter one filled up with silence."""
        codec, clips = self.have('audio'), []
        for n, wave in enumerate(waves):
            if wave.ndim != 1 or wave.dtype != np.float32 or not len(wave):
                raise SystemExit(f'sound {n}: {wave.dtype} {wave.shape}, wanted float32 (samples,), mono')
            clips.append(np.pad(wave[:codec.samples], (0, max(0, codec.samples - len(wave)))))
        codes = codec.encode(torch.from_numpy(np.stack(clips))).numpy()            # (B, F, K)
        ids = (codes + self.first).reshape(len(waves), -1).astype(np.int32)
        return self.checked('audio', ids), [{'n_samples': min(len(wave), codec.samples), 'sample_rate': codec.rate}
                                            for wave in waves]

    def decode_audio(self, ids, metas):
        """int (B, F * K) ids -> [float32 (n_samples,)]."""
        codec = self.have('audio')
        ids = self.checked('audio', np.asarray(ids)).astype(np.int64)
        for _, meta in zip(ids, metas, strict=True):
            if not 0 < meta['n_samples'] <= codec.samples or meta['sample_rate'] != codec.rate:
                raise SystemExit(f'sound of {meta}: this codec makes {codec.samples} samples at {codec.rate} Hz')
        codes = ids.reshape(len(ids), codec.frames, codec.codebooks) - self.first
        waves = codec.decode(torch.from_numpy(codes)).numpy()
        return [wave[:meta['n_samples']] for wave, meta in zip(waves, metas)]

    def have(self, modality):
        codec = getattr(self, f'{modality}_codec')
        if codec is None:
            raise SystemExit(f'this token space has no {modality}')
        return codec

    def checked(self, modality, ids):
        for n, row in enumerate(ids):
            self.grammar.check_payload(modality, row, f'{modality} {n}')
        return ids


def base_name(llm):
    """The last part of a local folder, or a hub name whole: nothing of this machine's paths."""
    return Path(llm).resolve().name if Path(llm).exists() else llm


def tokenizer_sha256(tokenizer):
    """Over what decides ids: how text is normalised and cut, the vocabulary with its merges, the added tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {k: backend[k] for k in ('normalizer', 'pre_tokenizer', 'model', 'added_tokens')}
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


# -----------------------------------------------------------------------------
# stage B1


def encode_again(built, items):
    """{modality: ids} of the same items by a UTI built anew: what a second process is asked for."""
    again = UTI.build(**built)
    return {modality: getattr(again, f'encode_{modality}')(some)[0] for modality, some in items.items()}


if __name__ == '__main__':
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    import soundfile
    from PIL import Image

    import gates
    from configure import configure
    from data import Ledger, inside, read_audio, read_image, read_llava
    from small.world import Scene, Sound, Thing, agreement, hear, see

    # -----------------------------------------------------------------------------
    # settings; override any with a config file or --key=value
    # what goes in and out
    llm = ''                       # Hugging Face folder or name: its tokenizer and rows; no weight of it is read
    image_codec = ''               # Hugging Face folder or name; '' leaves pictures out
    image_prefix = ''              # where in a larger checkpoint the codec is
    image_size = 0                 # pixels, for a codec that takes any
    audio_codec = ''               # Hugging Face folder or name; '' leaves sounds out
    audio_prefix = ''
    audio_codebooks = 0            # 0: all that the codec has. Each is a range of its own and an id in every frame
    clip_seconds = 1.0             # longer sounds are cut, shorter ones filled up with silence
    data_json = ''                 # LLaVA JSON, for its pictures
    image_root = ''
    manifest_jsonl = ''            # {"id", "source", "audio", "text"} a line, for its sounds
    audio_root = ''
    image_truth = ''               # the small world's truth.json: what should still be seen ...
    audio_truth = ''               # ... and heard
    out_dir = 'out/b1'
    max_bad_samples = 0            # more unusable files than this end the run
    # how much is measured
    n_items = 64                   # of each modality, from the start of the data
    n_alone = 32                   # of these also one by one
    n_shown = 16                   # originals beside decoded ones
    # gates: floors, and how much worse than the first run, out_dir/baseline.json, is still the same
    gate_psnr = 20.0               # dB, mean over the pictures
    gate_ssim = 0.6
    gate_si_snr = 0.0              # dB, mean over the sounds, at the codec's own rate
    gate_log_mel = 1.0             # nats, mean distance of the log mel spectra
    gate_surviving = 0.97          # share of attributes, where a truth is given
    gate_psnr_drop = 0.5
    gate_ssim_drop = 0.02
    gate_si_snr_drop = 1.0
    gate_log_mel_rise = 0.05       # of the baseline's
    # machine
    device = 'auto'
    config = configure(globals(), required=('llm',))
    # -----------------------------------------------------------------------------

    lock, out = lock_run(out_dir), Path(out_dir)
    built = {'llm': llm, 'image_codec': image_codec, 'image_prefix': image_prefix, 'image_size': image_size,
             'audio_codec': audio_codec, 'audio_prefix': audio_prefix, 'audio_codebooks': audio_codebooks,
             'clip_seconds': clip_seconds, 'device': str(init_ranks(device)[2])}
    uti = UTI.build(**built)
    space, grammar = uti.space, uti.grammar
    space.save(out / 'token_space.json')
    print(f'token space {space.sha256[:12]}: {space.n_text} text rows and {space.n_new} new ids: '
          + ', '.join(f'{r.name} [{r.first}, {r.end})' for r in space.ranges[1:]))

    # the items: the first usable ones, every file once
    (out / 'bad_samples.jsonl').unlink(missing_ok=True)
    ledger, items, names = Ledger(out / 'bad_samples.jsonl', max_bad_samples), {}, {}

    def first_usable(listed, read):
        """({id: path} in order, path -> array) -> ids and arrays of the first n_items files that can be read."""
        found, seen = {}, set()
        for id, path in listed:
            if len(found) == n_items:
                break
            if path not in seen:
                seen.add(path)
                try:
                    found[id] = read(path)
                except SystemExit as e:
                    ledger.add(id, e)
        if not found:
            raise SystemExit('no file of the data can be read')
        return list(found), list(found.values())

    if uti.image_codec:
        listed = [(item.id, item.image) for item in read_llava(data_json, image_root, ledger) if item.image]
        size = uti.image_codec.size
        names['image'], items['image'] = first_usable(listed, lambda path: read_image(path, size))
    if uti.audio_codec:
        try:
            records = [json.loads(line) for line in Path(manifest_jsonl).read_text().splitlines()]
            listed = [(r['id'], inside(audio_root, r['audio'], r['id'])) for r in records]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise SystemExit(f'{manifest_jsonl}: wanted lines of {{"id", "source", "audio", "text"}} ({e})')
        rate, samples = uti.audio_codec.rate, uti.audio_codec.samples
        names['audio'], items['audio'] = first_usable(listed, lambda path: read_audio(path, rate, samples))

    # the same ids again: in another order, alone, in another process
    ids, decoded, verdicts, measured = {}, {}, [], {}
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        elsewhere = pool.submit(encode_again, built, items).result()
    for modality, some in items.items():
        encode, decode = getattr(uti, f'encode_{modality}'), getattr(uti, f'decode_{modality}')
        ids[modality], metas = encode(some)
        alone = np.concatenate([encode([item])[0] for item in some[:n_alone]])
        first, end = grammar.bounds(grammar.payload_ranges[modality])
        decoded[modality] = decode(ids[modality], metas)
        shapes = [d.shape == item.shape and d.dtype == item.dtype for d, item in zip(decoded[modality], some)]
        verdicts += [
            gates.at_least(f'{modality}: items measured', len(some), 32),
            gates.exactly(f'{modality}: ids that differ in another order',
                          (encode(some[::-1])[0][::-1] != ids[modality]).sum(), 0),
            gates.exactly(f'{modality}: ids that differ alone', (alone != ids[modality][:n_alone]).sum(), 0),
            gates.exactly(f'{modality}: ids that differ in another process',
                          (elsewhere[modality] != ids[modality]).sum(), 0),
            gates.exactly(f'{modality}: ids outside their range',
                          ((ids[modality] < first) | (ids[modality] >= end)).sum(), 0),
            gates.exactly(f'{modality}: decoded to another shape, length or type', shapes.count(False), 0)]
        measured[f'{modality}_ids_used'] = len(np.unique(ids[modality]))

    # how near, and what is still seen and heard
    if 'image' in items:
        (out / 'pictures').mkdir(exist_ok=True)
        before, after = (np.stack(v).transpose(0, 2, 3, 1) for v in (items['image'], decoded['image']))
        measured.update(psnr=psnr(before, after).mean(), ssim=ssim(before, after).mean())
        zoom = max(1, 128 // before.shape[1])
        pairs = [np.concatenate(pair, 1).repeat(zoom, 0).repeat(zoom, 1) for pair in zip(before, after)][:n_shown]
        Image.fromarray(np.concatenate(pairs)).save(out / 'pictures' / 'original_decoded.png')
        if image_truth:
            truth = json.loads(Path(image_truth).read_text())
            scenes = [Scene(tuple(Thing(*t) for t in truth[name][0]), truth[name][1]) for name in names['image']]
            tally = [agreement(see(picture), scene) for picture, scene in zip(after, scenes)]
            measured['image_surviving'] = np.divide(*map(sum, zip(*tally)))
    if 'audio' in items:
        (out / 'sounds').mkdir(exist_ok=True)
        per_item = [(si_snr(a, b), log_mel_distance(a[None], b[None], rate)[0])
                    for a, b in zip(items['audio'], decoded['audio'])]
        measured['si_snr'], measured['log_mel'] = np.mean(per_item, axis=0)
        for n, pair in enumerate(list(zip(items['audio'], decoded['audio']))[:n_shown]):
            for wave, which in zip(pair, ('original', 'decoded')):
                soundfile.write(out / 'sounds' / f'{n:02d}_{which}.wav', wave, rate)
        if audio_truth:
            truth = json.loads(Path(audio_truth).read_text())
            tally = [agreement(hear(wave), Sound(*truth[name])) for name, wave in zip(names['audio'], decoded['audio'])]
            measured['audio_surviving'] = np.divide(*map(sum, zip(*tally)))
    measured = {key: round(float(value), 4) for key, value in measured.items()}

    # gates: floors first, then the first run
    for key, floor in ('psnr', gate_psnr), ('ssim', gate_ssim), ('si_snr', gate_si_snr):
        verdicts += [gates.at_least(key, measured[key], floor)] if key in measured else []
    verdicts += [gates.at_most('log_mel', measured['log_mel'], gate_log_mel)] if 'log_mel' in measured else []
    for key in 'image_surviving', 'audio_surviving':
        verdicts += [gates.at_least(key, measured[key], gate_surviving)] if key in measured else []
    content = hashlib.sha256(b''.join(item.tobytes() for some in items.values() for item in some))
    same = {'token_space': space.sha256, 'items': content.hexdigest()}
    if (out / 'baseline.json').exists():
        verdicts += gates.no_regression(measured, json.loads((out / 'baseline.json').read_text()), same, {
            'psnr': -gate_psnr_drop, 'ssim': -gate_ssim_drop, 'si_snr': -gate_si_snr_drop,
            'log_mel': gate_log_mel_rise})
    elif all(v.passed for v in verdicts):              # what misses a floor is no measure for later runs
        write_atomic(out / 'baseline.json', json.dumps({**measured, **same}, indent=1))
    write_atomic(out / 'report.json', json.dumps(
        {**measured, **same, 'settings': config, **provenance()}, indent=1))
    sys.exit(gates.conclude(out, verdicts, measured=measured))
