"""
Tokenized shards: captioned media as lists name them, the shards that stage B2 makes of them, their examples for the
tasks of Track B, and mixtures of tasks.
"""
import csv
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import safe_open

from common import read_sealed, write_atomic, write_sealed
from data import ChatTemplate, Example, shuffled_index
from lists import json_lines, path_inside, read_list, read_records, read_text_lines, require_text
from media import BadSample
from uti import TASKS, TokenSpace, tokenizer_sha256

# -----------------------------------------------------------------------------
# captioned media: what B2 reads


@dataclass(frozen=True)
class CaptionedMedia:
    """One image or one clip, by its path, and one text that describes it."""
    id: str
    modality: str                      # 'image' or 'audio'
    path: str
    text: str


def read_manifest(path, bad_samples):
    """JSONL of {"id"?, "source"?, "image": path | "audio": path, "text"} -> [CaptionedMedia]; paths are relative to the
    manifest's folder. A line that is wrong goes to bad_samples."""
    def read(record, id, where):
        return read_manifest_record(record, id, where, root=Path(path).parent)

    return read_records(json_lines(read_list(path, 'manifest'), path), read, bad_samples)


def read_manifest_record(record, id, where, root):
    modalities = [modality for modality in ('image', 'audio') if record.get(modality) is not None]
    if len(modalities) != 1:
        found = ' and '.join(modalities) or 'neither image nor audio'
        raise BadSample(f'{where}: {found}, wanted one of these')
    modality = modalities[0]
    file = path_inside(root, record[modality], where, modality)
    text = require_text(record.get('text'), where)
    return CaptionedMedia(id, modality, file, text.strip())


def read_sound_folder(folder, captions_csv, bad_samples):
    """Captions as Clotho has them, a CSV of file_name, caption_1, caption_2, ..., for sounds in a folder ->
    [CaptionedMedia], one for each caption."""
    try:
        with open(captions_csv, newline='', encoding='utf-8-sig') as f:
            records = list(csv.DictReader(f))
    except OSError as e:
        raise SystemExit(f'{captions_csv}: cannot read these captions ({e.strerror}); is the path right?')
    except (csv.Error, ValueError) as e:
        raise SystemExit(f'{captions_csv}: not a CSV of file_name, caption_1, ... ({e})')
    found = []
    for n, record in enumerate(records, 2):            # the first line names the columns
        where = f'{captions_csv}:{n}'
        columns = [name for name in record if name and name.startswith('caption')]
        if 'file_name' not in record or not columns:
            raise SystemExit(f'{captions_csv}: wanted columns file_name, caption_1, ..., found '
                             f'{", ".join(map(str, record))}')
        for column in columns:                         # each caption is an item of its own
            id = f'{record["file_name"]}#{column}'
            try:
                file = path_inside(folder, record['file_name'], where, 'audio')
                text = require_text(record[column], where)
                found.append(CaptionedMedia(id, 'audio', file, text.strip()))
            except BadSample as e:
                bad_samples.add(id, e, key=f'{where} {column}')
    return found


# -----------------------------------------------------------------------------
# shards: stage B2 writes them, Track B trains on them

KINDS = ('text', 'image', 'audio')                     # what the numbers in a shard's `kinds` mean
SPLITS = ('train', 'eval', 'golden')


class Medium(NamedTuple):
    """A tokenized file."""
    sha256: str                        # of its bytes
    modality: str
    codes: np.ndarray                  # int32, global ids
    meta: dict                         # what decoding its codes takes


class Caption(NamedTuple):
    """A text about one of the media of a shard."""
    id: str
    medium: int                        # index into the shard's media
    text: np.ndarray                   # int32 ids


@dataclass(frozen=True)
class Record:
    """A caption with its medium, as read from a shard: global ids without markers."""
    id: str
    modality: str
    payload: np.ndarray                # int32, the codes of its image or clip
    text: np.ndarray                   # int32
    media_sha256: str                  # captions of one file share it
    meta: dict


def write_shard(folder, name, space, media, captions, **more):
    """Write folder/name.safetensors and then name.json, which says that the shard is whole and what is in it.

    media: [Medium], each stored once; captions: [Caption]; more: JSON-able, kept in name.json. The same input gives the
    same bytes. Returns what name.json says.

    Tensors: ids int32, all segments end to end, first the media, then a text for each caption; offsets int64, segment s
    is ids[offsets[s]:offsets[s + 1]]; kinds uint8, what each segment is; items int32 (n, 2), segments (medium, text).
    """
    segments = [medium.codes for medium in media] + [caption.text for caption in captions]
    segments = [np.asarray(segment, np.int32) for segment in segments]   # uint16 would wrap Qwen's ids
    lengths = [len(segment) for segment in segments]
    kinds = [KINDS.index(medium.modality) for medium in media] + [KINDS.index('text')] * len(captions)
    items = [(caption.medium, len(media) + n) for n, caption in enumerate(captions)]
    tensors = {
        'ids': np.concatenate([np.zeros(0, np.int32), *segments]),
        'offsets': np.cumsum([0, *lengths], dtype=np.int64),
        'kinds': np.array(kinds, np.uint8),
        'items': np.array(items, np.int32).reshape(-1, 2),
    }
    # one key of metadata: several would be written in any order
    body = safetensors.numpy.save(tensors, metadata={'token_space': space.sha256})
    side = {
        'name': name,
        'shard_sha256': hashlib.sha256(body).hexdigest(),
        'token_space': space.sha256,
        'bytes': len(body),
        'ids': sum(lengths),
        'media': [medium.sha256 for medium in media],
        'metas': [medium.meta for medium in media],
        'items': [caption.id for caption in captions],
        **more,
    }
    try:
        write_atomic(Path(folder) / f'{name}.safetensors', body)
        write_sealed(Path(folder) / f'{name}.json', side)
    except SystemExit as e:
        raise SystemExit(f'{e.code}; fix that and start again, the finished shards are kept')
    return side


def load_shard(folder, name, sha256, space):
    """(tensors, what name.json says); exits with one line unless the bytes and the token space are the right ones."""
    path = Path(folder) / f'{name}.safetensors'
    side = read_sealed(Path(folder) / f'{name}.json', 'build_b2.py')
    try:
        body = path.read_bytes()
    except OSError as e:
        raise SystemExit(f'{path}: cannot read this shard ({e.strerror}); run build_b2.py again')
    found = hashlib.sha256(body).hexdigest()           # safetensors itself takes flipped bits for whole
    if found != sha256 or side['shard_sha256'] != sha256:
        raise SystemExit(f'{path}: sha256 {found[:12]}, wanted {sha256[:12]}: damaged or exchanged; remove it and run '
                         'build_b2.py again')
    with safe_open(path, 'np') as f:
        in_header = f.metadata()['token_space']
    for made_for in in_header, side['token_space']:    # a file may have been exchanged alone
        if made_for != space.sha256:
            raise SystemExit(f'{path}: made for token space {made_for[:12]}, wanted {space.sha256[:12]}: build it anew')
    return safetensors.numpy.load(body), side


def read_index(folder, space=None):
    """(index, TokenSpace) of a folder of shards; exits if they are damaged or made for another space than `space`."""
    index = read_sealed(Path(folder) / 'index.json', 'build_b2.py')
    stored = TokenSpace.load(Path(folder) / 'token_space.json')
    if index['token_space'] != stored.sha256:
        raise SystemExit(f'{folder}: index.json and token_space.json are not of one build; run build_b2.py again')
    if space is not None:
        space.require(stored, folder)
    return index, stored


def shards_fingerprint(folder):
    """{name: what tells it from another}, as a checkpoint keeps it, of a folder of shards, by its index; a new index of
    the same shards has the same."""
    index, _ = read_index(folder)
    found = {}
    for split in index['splits'].values():
        for shard in split['shards']:
            found[f'shard {shard["name"]}'] = shard['sha256'][:12]
    return found


def read_shards(folder, split, space=None):
    """The [Record] of a split: 'train', 'eval' or 'golden'. Every file is checked against its sha256 in index.json."""
    index, space = read_index(folder, space)
    if split not in index['splits']:
        raise SystemExit(f'{folder} has no split {split!r}: wanted one of {", ".join(index["splits"])}')
    records = []
    for shard in index['splits'][split]['shards']:
        tensors, side = load_shard(folder, shard['name'], shard['sha256'], space)
        segments = np.split(tensors['ids'], tensors['offsets'][1:-1])   # views, no copies
        for id, (medium, text) in zip(side['items'], tensors['items'].tolist()):
            records.append(Record(
                id=id,
                modality=KINDS[tensors['kinds'][medium]],
                payload=segments[medium],
                text=segments[text],
                media_sha256=side['media'][medium],
                meta=side['metas'][medium],
            ))
    return records


# -----------------------------------------------------------------------------
# examples of the tasks


def token_example(record, task, grammar, max_seq_len):
    """A Record as the document of a task ('i2t', 'a2t', 't2i', 't2a', 'text') -> Example, whose item is the Record.

    What does not fit is cut from the text, never from the payload: the end of a description, or of a prompt.
    """
    modality, direction = TASKS[task]
    if modality not in (None, record.modality):
        raise SystemExit(f'item {record.id} has an {record.modality}: task {task} wants an {modality}')
    n_others = grammar.length(modality) + 3 if modality else 1     # codes, two markers, an end
    room = max_seq_len - n_others
    if room < 1:
        raise SystemExit(f'max_seq_len = {max_seq_len} leaves no room for text in {task}: wanted at least '
                         f'{n_others + 1}')
    # a prompt is cut here, before its payload; a description below, at its end
    text = record.text[:room] if direction == 'write' else record.text
    document = grammar.document(task, record.payload, text)
    fits = document.label_positions < max_seq_len
    return Example(
        item=record,
        ids=document.ids[:max_seq_len],
        label_positions=document.label_positions[fits],
        image_start=-1,
        truncated=len(record.text) > room,
        label_ranges=document.label_ranges[fits],
    )


def prompt_of(example):
    """The text ids that a writing example starts with."""
    start_marker = example.label_positions[0] - 1
    return example.ids[:start_marker]


def with_prompt(example, text):
    """A writing example whose payload follows another prompt: text ids, or none."""
    start_marker = example.label_positions[0] - 1
    ids = np.concatenate([np.asarray(text, np.int32), example.ids[start_marker:]])
    return replace(example, ids=ids, label_positions=example.label_positions - start_marker + len(text))


def with_media(example, codes):
    """A reading example with other codes in the place of its own, which stand after the start marker."""
    ids = example.ids.copy()                           # the example's own stay
    ids[1:1 + len(codes)] = codes
    return replace(example, ids=ids)


def load_space(shards_dir, tokenizer, llm):
    """The TokenSpace of a folder of shards; exits when llm has another tokenizer than they were made with."""
    space = TokenSpace.load(Path(shards_dir) / 'token_space.json')
    if tokenizer_sha256(tokenizer) != space.base['tokenizer_sha256']:
        raise SystemExit(f'{llm} has another tokenizer than {shards_dir} was made with: take the base model of stage '
                         'B1')
    return space


def token_sets(shards_dir, split, tasks, grammar, max_seq_len, n=None):
    """{task: [Example]} of the first n items of each task in a split of the shards."""
    records = read_shards(shards_dir, split, grammar.space)
    sets = {}
    for task in tasks:
        modality, _ = TASKS[task]
        chosen = [record for record in records if record.modality == modality][:n]   # in the shards' random order
        sets[task] = [token_example(record, task, grammar, max_seq_len) for record in chosen]
    return sets


def require_enough(train_sets, eval_sets, shards_dir):
    """Exit when a task has nothing to train on, or too little to judge by."""
    for task, train_set in train_sets.items():
        n_eval = len(eval_sets[task])
        if not train_set or n_eval < 8:
            raise SystemExit(f'{shards_dir} has {len(train_set)} items to train and {n_eval} to evaluate {task} on: '
                             'add data, or set its task_weights to 0')


def text_examples(path, tokenizer, max_seq_len, n=None):
    """[Example] of the first n texts of a file."""
    template = ChatTemplate(tokenizer, 0, max_seq_len)
    return [template.text(text, where) for where, text in read_text_lines(path)[:n]]


# -----------------------------------------------------------------------------
# mixtures of tasks


def task_shares(weights, grammar):
    """{task: share of the examples} from weights of any sum, without the tasks of weight 0. Exits with one line when a
    task is not one that the token space has codes for."""
    known = [task for task, (modality, _) in TASKS.items() if modality in grammar.payload_ranges]
    if set(weights) - set(known) or min(weights.values(), default=-1) < 0 or not any(weights.values()):
        raise SystemExit(f'task weights {weights}: wanted shares of the tasks that this token space has codes for, '
                         f'{", ".join(known)}')
    total = sum(weights.values())
    return {task: weight / total for task, weight in weights.items() if weight}


class MixtureSampler:
    """Which examples a global step has, when they come from several tasks in shares that may change with the step.

    sets: {task: [Example]}; shares_at(progress) -> {task: share}, which sum to 1; progress: from 0, at the first step,
    towards 1, after the last of n_steps. Rounding errors carry over to the next step: of 0.3 x 4 = 1.2 examples, 1
    comes and 0.2 are owed, then 1 of 1.4, 1 of 1.6, 1 of 1.8, and 2 of 2.0. Each task has an order of its own, new each
    time it has been through. The share prompt_dropout of the examples of writing tasks comes without its prompt, others
    each time. All of it is a function of (seed, step).
    """
    def __init__(self, sets, shares_at, n_steps, global_batch_size, seed, prompt_dropout=0.0):
        self.sets = sets
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.prompt_dropout = prompt_dropout
        self.counts = self.count_steps(shares_at, n_steps)                                      # (steps, tasks)
        self.before = np.cumsum(self.counts, axis=0) - self.counts     # of each task, before a step

    def count_steps(self, shares_at, n_steps):
        """How many examples of each task every step has, (steps, tasks)."""
        counts = np.zeros((n_steps, len(self.sets)), int)
        owed = np.zeros(len(self.sets))
        for step in range(n_steps):
            shares = shares_at(step / n_steps)         # examples in whole and in part
            owed += [shares.get(task, 0) * self.global_batch_size for task in self.sets]
            count = np.floor(owed.clip(0) + 1e-9).astype(int)
            while count.sum() < self.global_batch_size:    # one more for the task that is owed most
                count[np.argmax(owed - count)] += 1
            while count.sum() > self.global_batch_size:    # some were owed more from before
                count[np.argmin(np.where(count > 0, owed - count, np.inf))] -= 1
            owed -= count                              # may be negative: one came early
            counts[step] = count
        return counts

    def step(self, n):
        """The examples of step n, longest first."""
        chosen = []
        for t, (task, examples) in enumerate(self.sets.items()):
            seed = 1000 * self.seed + t                # tasks over the same media must not come in the same order
            dropout = self.prompt_dropout if TASKS[task][1] == 'write' else 0.0
            first = self.before[n, t]
            for k in range(first, first + self.counts[n, t]):
                i = shuffled_index(len(examples), k, seed)
                epoch = int(k) // len(examples)
                drops_prompt = np.random.default_rng([seed, epoch, i, 1]).random() < dropout
                chosen.append(with_prompt(examples[i], ()) if drops_prompt else examples[i])
        return sorted(chosen, key=len, reverse=True)
