"""
Data: lists of samples, the chat template, examples, held-out sets, batches.

An item is a sample as a list names it; an example is an item as token ids with its labels. Which examples a step has is
a function of (settings, step): there is no state to save, and any number of ranks sees the same ones.

Letters: B examples, T tokens of all examples together, L tokens of the longest, M labels, N image tokens, P patches.
"""
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from common import in_parts, read_sealed, write_sealed
from media import BadSample

# -----------------------------------------------------------------------------
# lists of samples


@dataclass(frozen=True)
class Item:
    """One sample: an image path (or None) and its turns, [(question, answer)]; captions have one turn that asks
    nothing."""
    id: str
    image: str | None
    turns: tuple


def parse_json(text):
    """json.loads that refuses NaN, Infinity and duplicate keys with a ValueError."""
    def refuse(name):
        raise ValueError(f'{name} is not JSON')

    def unique(pairs):
        keys = [key for key, _ in pairs]               # Python's own parser keeps the last and says nothing
        if len(set(keys)) < len(keys):
            raise ValueError(f'key {max(keys, key=keys.count)!r} stands twice in one object')
        return dict(pairs)
    return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)


def read_records(path):
    """The list in a JSON file, or the lines of a JSONL file; exits with one line when it is neither."""
    try:
        text = Path(path).read_text(encoding='utf-8-sig')   # without the byte order mark of Windows programs
    except OSError as e:
        raise SystemExit(f'{path}: cannot read the data set ({e.strerror}); set data_json to a LLaVA JSON file')
    except ValueError as e:
        raise SystemExit(f'{path}: not UTF-8 ({e})')
    is_jsonl = text.lstrip().startswith('{')
    # not splitlines: it also splits at U+2028, which may stand in a text
    parts = text.split('\n') if is_jsonl else [text]
    records = []
    for n, part in enumerate(parts, 1):
        if is_jsonl and not part.strip():
            continue
        try:
            records.append(parse_json(part))
        except (ValueError, RecursionError) as e:
            where = f'{path}:{n}' if is_jsonl else path
            raise SystemExit(f'{where}: not valid JSON: {e}; wanted a list of samples, or one a line')
    if is_jsonl:
        return records
    if not isinstance(records[0], list):
        raise SystemExit(f'{path}: found a JSON {type(records[0]).__name__}, wanted a list of samples')
    return records[0]


def path_inside(root, name, where, kind='image'):
    """root / name as a path that stays inside root; else BadSample. where: the sample, for the line."""
    if not isinstance(name, str) or not name:
        raise BadSample(f'{where}: {kind} is {name!r}, wanted a path relative to the {kind} root')
    if '://' in name or Path(name).is_absolute() or '..' in Path(name).parts:
        raise BadSample(f'{where}: {kind} {name!r} leaves the {kind} root, wanted a relative path without ..')
    path = Path(root) / name
    try:
        is_inside = path.resolve().is_relative_to(Path(root).resolve())   # links followed
    except ValueError as e:
        raise BadSample(f'{where}: {kind} {name!r} is no file name ({e})')
    if not is_inside:
        raise BadSample(f'{where}: {kind} {name!r} is a link out of the {kind} root')
    return str(path)


def plain_text(text, where):
    """A text with something in it, without the white space around it; else BadSample."""
    if not isinstance(text, str) or not text.strip():
        raise BadSample(f'{where}: text is {text!r}, wanted some')
    require_unicode(text, where)
    return text.strip()


def require_unicode(text, where):
    """BadSample for half a character, which JSON and a command line in Latin-1 may hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadSample(f'{where}: a text that is not Unicode ({e.reason})')


def sample_id(record, n):
    """The id of a record as its list gives it, or its number n where it has none; else BadSample."""
    if not isinstance(record, dict):
        raise BadSample(f'sample {n} is a JSON {type(record).__name__}, wanted an object')
    id = record.get('id')
    if id is None:
        return str(n)
    if not isinstance(id, str | int):
        raise BadSample(f'sample {n}: id is {id!r}, wanted a text or a whole number')
    return str(id)


def unique_id(id, uses):
    """The id, or id#2, id#3, ... when it has been there before: LLaVA-Instruct's ids are picture numbers, and it has
    several chats about one picture. uses: {id: how often so far}, kept by the caller."""
    unique = id
    while unique in uses:
        uses[id] += 1
        unique = f'{id}#{uses[id]}'
    uses[unique] = 1
    return unique


def read_llava(path, image_root, bad_samples, captions=False):
    """LLaVA JSON or JSONL -> [Item]. captions: the human turn of LLaVA-Pretrain is a prompt that is not used.

    [{"id", "image"?, "conversations": [{"from": "human", "value": "<image>\\n..."},
                                        {"from": "gpt", "value": "..."}, ...]}]
    A sample that is wrong goes to bad_samples, which says when it is too much.
    """
    records = read_records(path)
    items = []
    id_uses = {}
    for n, record in enumerate(records):
        try:
            id = unique_id(sample_id(record, n), id_uses)
        except BadSample as e:
            bad_samples.add(str(n), BadSample(f'{path}, {e}'), key=n)
            continue
        where = f'{path}, sample {n} (id {id})'
        try:
            items.append(read_llava_item(record, id, image_root, where, captions))
        except BadSample as e:
            bad_samples.add(id, e, key=n)
    if not items:
        raise SystemExit(f'{path}: no usable sample in it')
    return items


def read_llava_item(record, id, image_root, where, captions):
    image = record.get('image')
    if isinstance(image, list):                        # as sets with several pictures a sample write it
        if len(image) > 1:
            raise BadSample(f'{where}: {len(image)} images, wanted one')
        image = image[0] if image else None
    if image is not None:
        image = path_inside(image_root, image, where)
    turns = read_turns(record.get('conversations'), image, where)
    if captions:
        if image is None:
            raise BadSample(f'{where}: a caption without an image')
        caption = turns[0][1]
        turns = (('', caption),)
    return Item(id, image, turns)


def read_turns(turns, image, where):
    """LLaVA's list of human and gpt turns -> ((question, answer), ...), the <image> mark taken out."""
    if not isinstance(turns, list) or len(turns) < 2 or len(turns) % 2:
        raise BadSample(f'{where}: conversations is not a list of human and gpt turns in pairs')
    for n, turn in enumerate(turns):
        speaker = ('human', 'gpt')[n % 2]
        if not isinstance(turn, dict) or turn.get('from') != speaker or not isinstance(turn.get('value'), str):
            raise BadSample(f'{where}: turns must alternate human and gpt, each with a "value"')
        require_unicode(turn['value'], where)
    pairs = []
    n_marks = 0
    for question, answer in zip(turns[::2], turns[1::2]):
        if not answer['value'].strip():
            raise BadSample(f'{where}: an empty answer')
        n_marks += question['value'].count('<image>')  # the block's place is the template's choice, not the mark's
        pairs.append((question['value'].replace('<image>', '').strip(), answer['value'].strip()))
    n_images = int(image is not None)
    if n_marks != n_images:
        raise BadSample(f'{where}: {n_marks} <image> marks for {n_images} images, wanted one each')
    return tuple(pairs)


def read_texts(path):
    """JSONL with one {"text": ...} a line -> [text], as they stand. A line that is not one ends the run."""
    try:
        lines = Path(path).read_text(encoding='utf-8-sig').split('\n')
    except OSError as e:
        raise SystemExit(f'{path}: cannot read this text file ({e.strerror}); '
                         'set text_jsonl to lines of {"text": ...}')
    except ValueError as e:
        raise SystemExit(f'{path}: not UTF-8 ({e})')
    texts = []
    for n, line in enumerate(lines, 1):
        where = f'{path}:{n}'
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except (ValueError, RecursionError) as e:
            raise SystemExit(f'{where}: not valid JSON: {e}; wanted {{"text": ...}}')
        if not isinstance(record, dict):
            raise SystemExit(f'{where}: found a JSON {type(record).__name__}, wanted {{"text": ...}}')
        text = record.get('text')
        plain_text(text, where)                        # or one line; what is kept has its white space
        texts.append(text)
    if not texts:
        raise SystemExit(f'{path}: holds no text')
    return texts


# -----------------------------------------------------------------------------
# examples: ids and labels, assembled turn by turn


@dataclass(frozen=True)
class Example:
    """A training sample as ids. A label is predicted from the position before it."""
    item: Item                         # or a Record of shards.py
    ids: np.ndarray                    # int32 (tokens,)
    label_positions: np.ndarray        # int32, positions whose id is a label
    image_start: int                   # position of the first image pad, or -1
    truncated: bool
    label_ranges: np.ndarray | None = None   # int16, the range of the token space that each label is from; None: text

    def __len__(self):
        return len(self.ids)


class ChatTemplate:
    """How a sample becomes ids. Markers are looked up once; text is encoded so that markers typed in it stay plain."""
    def __init__(self, tokenizer, num_image_tokens, max_seq_len):
        self.tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.max_seq_len = max_seq_len
        names = ('<|vision_start|>', '<|vision_end|>', '<|image_pad|>', '<|im_start|>', '<|im_end|>')
        ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names)))
        for name, id in ids.items():
            if id is None or id == tokenizer.unk_token_id:
                raise SystemExit(f'the tokenizer has no {name}: wanted a Qwen3 tokenizer')
        self.start = ids['<|im_start|>']
        self.end = ids['<|im_end|>']
        pads = [ids['<|image_pad|>']] * num_image_tokens
        self.image_block = [ids['<|vision_start|>'], *pads, ids['<|vision_end|>']]
        if max_seq_len < len(self.image_block) + 8:
            raise SystemExit(f'max_seq_len = {max_seq_len} leaves no room for text after {num_image_tokens} image '
                             'tokens')

    def encode(self, text):
        # split_special_tokens: a user's '<|image_pad|>' becomes ordinary characters, never an image
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def example(self, item, ids, label_positions, image_start):
        """Cut to max_seq_len at the end; the image block stands near the start and is never cut."""
        n = self.max_seq_len
        label_positions = np.array(label_positions, np.int32)
        kept_labels = label_positions[label_positions < n]
        return Example(item, np.array(ids[:n], np.int32), kept_labels, image_start, truncated=len(ids) > n)

    def caption(self, item):
        """image block, newline, caption, end token; labels: the caption and its end."""
        caption = item.turns[-1][1]
        ids = [*self.image_block, *self.encode('\n')]
        first_label = len(ids)
        ids += [*self.encode(caption), self.end]
        return self.example(item, ids, range(first_label, len(ids)), image_start=1)

    def chat(self, item):
        """ChatML without a system turn, the image block first in the first user turn; labels: answers and ends.

        An answer that is None leaves its turn open: the prompt of a reply.
        """
        ids = []
        label_positions = []
        image_start = -1
        newline = self.encode('\n')
        for n, (question, answer) in enumerate(item.turns):
            ids += [self.start, *self.encode('user\n')]
            if n == 0 and item.image is not None:
                image_start = len(ids) + 1             # after <|vision_start|>
                ids += [*self.image_block, *newline]
            ids += [*self.encode(question), self.end, *newline]
            ids += [self.start, *self.encode('assistant\n')]
            if answer is None:
                break
            first_label = len(ids)
            ids += [*self.encode(answer), self.end]    # the end token is learned too: it is what stops a reply
            label_positions += range(first_label, len(ids))
            ids += newline                             # between turns, no label
        return self.example(item, ids, label_positions, image_start)

    def text(self, text, name):
        """Plain text as it stands, markers in it included; every id after the first is a label."""
        item = Item(name, None, (('', text),))
        ids = self.tokenizer.encode(text, add_special_tokens=False)    # here a marker is the marker
        return self.example(item, ids, range(1, len(ids)), image_start=-1)


def answer_starts(example):
    """Where each answer begins, [position]: the ids before it are the prompt of that answer."""
    starts = []
    previous = None
    for position in example.label_positions.tolist():
        if previous is None or position != previous + 1:   # a gap: the next question was in it
            starts.append(position)
        previous = position
    return starts


# -----------------------------------------------------------------------------
# held-out sets


def media_key(item):
    """What a split is decided by: the bytes of the image file, never the caption; the text of a sample without one."""
    if item.image is None:
        return hashlib.sha256(repr(item.turns).encode()).hexdigest()
    try:
        return hashlib.sha256(Path(item.image).read_bytes()).hexdigest()
    except OSError as e:
        raise BadSample(f'{item.image}: cannot read this image ({e.strerror})')


def media_keys(examples, bad_samples):
    """{id: media_key} of the examples whose file can be read; the others go to bad_samples."""
    keys = {}
    for example in examples:
        try:
            keys[example.item.id] = media_key(example.item)
        except BadSample as e:
            bad_samples.add(example.item.id, e)
    return keys


def samples_sha256(examples):
    """Of their ids and texts, whatever their order. Not of image paths: a data set may be moved."""
    samples = [(example.item.id, example.item.turns) for example in examples]
    return hashlib.sha256(repr(sorted(samples)).encode()).hexdigest()


def bucket_of(n_labels, edges):
    """0 short, 1 medium, 2 long; edges: the most labels of a short and of a medium example."""
    return sum(n_labels > edge for edge in edges)


def length_buckets(counts, edges):
    """{name: mask over the examples} of the buckets that hold any, from each example's number of labels."""
    buckets = np.array([bucket_of(n, edges) for n in counts])                                   # (examples,)
    masks = {name: buckets == n for n, name in enumerate(('short', 'medium', 'long'))}
    return {name: mask for name, mask in masks.items() if mask.any()}


def choose_split(examples, n_eval, n_golden, edges, path, bad_samples, read):
    """Write `path`, the choice of eval and golden ids and of every id held out of training, unless it is there. Rank 0.
    Exits when it is there and was made with another n_eval, n_golden or edges.

    eval and golden are balanced over the three length buckets; a picture that is in one of them, by its bytes, is in no
    other set. read(path) decodes an image: a held-out one has to be whole.
    """
    asked = {'n_eval': n_eval, 'n_golden': n_golden, 'edges': list(edges)}
    if Path(path).exists():
        chosen = read_sealed(path, 'this script')
        for name, wanted in asked.items():
            if chosen.get(name) != wanted:
                raise SystemExit(f'{path} was made with {name} = {chosen.get(name)!r}, this run has {wanted!r}: remove '
                                 'the file to choose anew, then train anew')
        return
    keys = media_keys(examples, bad_samples)
    used_keys = set()

    def eligible(example, bucket):
        whole = example.item.id in keys and not example.truncated and len(example.label_positions)
        return whole and example.image_start >= 0 and bucket_of(len(example.label_positions), edges) == bucket

    def choose(n, bucket):
        """Up to n ids of a bucket in the order of a hash, each with a picture of its own that is whole."""
        pool = [example for example in examples if eligible(example, bucket)]
        # a hash decides, not the list's order: adding samples moves few of the others
        pool.sort(key=lambda e: hashlib.sha256(f'{keys[e.item.id]} {e.item.id}'.encode()).digest())
        ids = []
        for example in pool:
            id = example.item.id
            if len(ids) == n:
                break
            if keys[id] in used_keys:
                continue
            try:
                read(example.item.image)
            except BadSample as e:
                bad_samples.add(id, e)
                continue
            used_keys.add(keys[id])                    # no other item with this picture
            ids.append(id)
        return ids

    chosen = {'samples_sha256': samples_sha256(examples), **asked}
    for name, n in ('golden', n_golden), ('eval', n_eval):
        third = n // 3
        ids = []
        for bucket, share in enumerate((third, third, n - 2 * third)):
            ids += choose(share, bucket)
        # in the order of another hash, so that any part of the set is a fair one
        chosen[name] = sorted(ids, key=lambda id: hashlib.sha256(f'order {id}'.encode()).digest())
    held_out = []                                      # also every other caption of a picture that is held out
    for example in examples:
        id = example.item.id
        if id not in keys or keys[id] in used_keys:
            held_out.append(id)
    chosen['held_out'] = held_out
    write_sealed(path, chosen)


def load_split(examples, path, n_eval):
    """(train, eval, golden), lists of examples, as choose_split wrote it. Exits when it was made for other samples."""
    by_id = {example.item.id: example for example in examples}
    chosen = read_sealed(path, 'this script')
    for id in chosen['eval'] + chosen['golden']:
        if id not in by_id:
            raise SystemExit(f'{path} names {id!r}, which the data set no longer has: remove the file to choose anew, '
                             'then train anew')
    if chosen['samples_sha256'] != samples_sha256(examples):
        raise SystemExit(f'{path} was made for other samples or other texts: remove the file to choose anew, then '
                         'train anew')
    held_out = set(chosen['held_out'])
    train_set = [example for example in examples if example.item.id not in held_out]
    eval_set = [by_id[id] for id in chosen['eval']]
    golden_set = [by_id[id] for id in chosen['golden']]
    if not train_set or len(eval_set) < 8:
        raise SystemExit(f'{len(examples)} samples leave {len(train_set)} to train on and {len(eval_set)} of {n_eval} '
                         'to evaluate on: add data or lower n_eval and n_golden')
    return train_set, eval_set, golden_set


# -----------------------------------------------------------------------------
# batches


@dataclass
class Batch:
    """Examples laid end to end, T tokens, with every position that the step needs found beforehand, on the host."""
    input_ids: torch.Tensor            # (T,)
    position_ids: torch.Tensor         # (T,) counted anew in each example
    layout: list                       # how attention lays the examples out, a group at a time: see padded_layout
    image_positions: torch.Tensor      # (images * N,)
    logit_positions: torch.Tensor      # (M,) the position before each label: its logits predict the label
    labels: torch.Tensor               # (M,)
    label_examples: torch.Tensor       # (M,) which of the B examples a label is in
    images: torch.Tensor | None        # uint8 (B, 3, H, W) or features (B, P, Dv)
    n_labels: int
    ids: list
    label_ranges: list = field(default_factory=list)   # Track B: labels stand sorted by range, [(range, how many)]

    def to(self, device):
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        layout = [(pad_index.to(device), unpad_index.to(device)) for pad_index, unpad_index in self.layout]
        return replace(self, layout=layout, **moved)


def padded_layout(lengths, group_size=16):
    """[(pad_index (B, L), unpad_index (tokens,))], one for each group of group_size examples of an unpadded batch.

    pad_index says which of the group's tokens stands at each place of the padded group; a short example is filled up
    with token 0, which the causal mask hides. unpad_index says where in B * L each of the group's tokens is. Two
    examples of 3 and 1 tokens: pad_index [[0, 1, 2], [3, 0, 0]], unpad_index [0, 1, 2, 3].
    Examples come in the order of their lengths, so that little is filled up.
    """
    layout = []
    for group in in_parts(np.array(lengths), group_size):
        starts = np.cumsum(group) - group
        columns = np.arange(group.max())
        is_token = columns < group[:, None]                                                     # (B, L)
        pad_index = np.where(is_token, columns + starts[:, None], 0)                            # (B, L)
        unpad_index = np.flatnonzero(is_token)                                                  # (tokens,)
        layout.append((torch.from_numpy(pad_index), torch.from_numpy(unpad_index)))
    return layout


def collate(examples, images=None, num_image_tokens=0):
    """[Example], the array of each one's image or None -> Batch.

    Where examples say the ranges of their labels, the labels of all are sorted by range, so that a typed head takes one
    slice for each.
    """
    lengths = [len(example) for example in examples]
    starts = np.cumsum([0, *lengths[:-1]])
    ids = np.concatenate([example.ids for example in examples]).astype(np.int64)                # (T,)
    position_ids = np.concatenate([np.arange(n) for n in lengths])                              # (T,)
    image_positions = [np.zeros(0, np.int64)]
    label_positions = []
    for start, example in zip(starts, examples):
        label_positions.append(start + example.label_positions.astype(np.int64))
        if example.image_start >= 0:
            image_positions.append(start + example.image_start + np.arange(num_image_tokens))
    label_examples = np.repeat(np.arange(len(examples)), [len(positions) for positions in label_positions])
    label_positions = np.concatenate(label_positions)                                           # (M,)
    label_ranges = []
    if any(example.label_ranges is not None for example in examples):
        ranges = np.concatenate([ranges_of(example) for example in examples])
        order = np.argsort(ranges, kind='stable')      # stable: inside a range the batch's own order stays
        label_positions = label_positions[order]
        label_examples = label_examples[order]
        for label_range, count in zip(*np.unique(ranges, return_counts=True)):
            label_ranges.append((int(label_range), int(count)))
    kept_images = [image for image in images or [] if image is not None]
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(position_ids),
        layout=padded_layout(lengths),
        image_positions=torch.from_numpy(np.concatenate(image_positions)),
        logit_positions=torch.from_numpy(label_positions - 1),
        labels=torch.from_numpy(ids[label_positions]),
        label_examples=torch.from_numpy(label_examples),
        images=torch.from_numpy(np.stack(kept_images)) if kept_images else None,
        n_labels=len(label_positions),
        ids=[example.item.id for example in examples],
        label_ranges=label_ranges,
    )


def ranges_of(example):
    """The range of each of its labels; text, range 0, where it does not say."""
    if example.label_ranges is None:
        return np.zeros(len(example.label_positions), int)
    return example.label_ranges


@lru_cache(maxsize=16)
def epoch_order(n, epoch, seed):
    return np.random.default_rng([seed, epoch]).permutation(n)


def shuffled_index(n, k, seed):
    """Which of n examples the k-th of the run is: a new permutation each epoch, a function of (seed, k)."""
    return int(epoch_order(n, k // n, seed)[k % n])    # the permutation of its epoch, kept by lru_cache


class ShuffledSampler:
    """Which examples a global step has: all of them in a new order each epoch."""
    def __init__(self, examples, global_batch_size, seed):
        self.examples = examples
        self.global_batch_size = global_batch_size
        self.seed = seed

    def step(self, n):
        """The examples of step n, longest first: micro-batches hold ones of like length, and memory peaks at once."""
        first = n * self.global_batch_size
        chosen = []
        for k in range(first, first + self.global_batch_size):
            chosen.append(self.examples[shuffled_index(len(self.examples), k, self.seed)])
        return sorted(chosen, key=len, reverse=True)


def image_reader(read, cache=None):
    """example -> array: uint8 pixels by read(path), or patch features from a cache, {path: array}."""
    def get_image(example):
        path = example.item.image
        if cache is None:
            return read(path)
        if path not in cache:
            raise BadSample(f'{path}: no such image')
        return cache[path]
    return get_image


class Loader:
    """Examples -> batches. `workers` threads read images; one more stays a step ahead.

    get_image(example) -> array, raising BadSample: such an example is left out of its batch and goes to bad_samples.
    """
    def __init__(self, get_image: Callable | None = None, num_image_tokens=0, bad_samples=None, workers=2):
        self.get_image = get_image
        self.num_image_tokens = num_image_tokens
        self.bad_samples = bad_samples
        self.readers = ThreadPoolExecutor(workers)
        self.ahead = ThreadPoolExecutor(1)             # its own: waiting for `readers` in `readers` would lock up

    def image_or_reason(self, example):
        """The image of an example, None where it has none, or the BadSample that says why there is none."""
        if example.image_start < 0:
            return None
        try:
            return self.get_image(example)
        except BadSample as e:
            return e

    def collate(self, examples):
        """[Example] -> Batch of those whose image can be read, or None."""
        kept = []
        images = []
        for example, image in zip(examples, self.readers.map(self.image_or_reason, examples)):
            if isinstance(image, BadSample):
                self.bad_samples.add(example.item.id, image)
            else:
                kept.append(example)
                images.append(image)
        return collate(kept, images, self.num_image_tokens) if kept else None

    def images(self, examples):
        """The images of examples that all have a whole one, as one tensor, (B, ...)."""
        return torch.from_numpy(np.stack(list(self.readers.map(self.get_image, examples))))

    def rank_batches(self, examples, micro_batch_size, rank, world_size):
        """This rank's part of a step's examples: every world_size-th micro-batch."""
        batches = []
        # micro-batches are given out in turn: neighbours have like lengths, so that ranks have like work
        for first in range(rank * micro_batch_size, len(examples), world_size * micro_batch_size):
            batch = self.collate(examples[first:first + micro_batch_size])
            if batch is not None:
                batches.append(batch)
        return batches

    def steps(self, sampler, first, last, micro_batch_size, rank, world_size):
        """This rank's batches of step `first`, then `first` + 1, ... `last` - 1, a list each; the next step's are made
        while this one's are used."""
        def make(step):
            return self.rank_batches(sampler.step(step), micro_batch_size, rank, world_size)

        if first >= last:
            return
        next_batches = self.ahead.submit(make, first)
        for step in range(first, last):
            batches = next_batches.result()
            if step + 1 < last:
                next_batches = self.ahead.submit(make, step + 1)
            yield batches
