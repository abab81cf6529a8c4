"""
Tokenized shards: captioned media as lists name them, the shards that stage B2 makes of them, their examples for the
tasks of Track B, and mixtures of tasks.
"""
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import safe_open

from common import barrier, gather_in_order, rank_of, read_sealed, sha256_file, write_atomic, write_sealed
from data import shuffled_index
from examples import NO_IMAGES, Example
from lists import (
    UniqueIds, good_records, json_lines, path_inside, read_csv, read_list, require_text, text_lines)
from media import BadSample
from templates import ChatTemplate
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

    return list(good_records(json_lines(read_list(path, 'manifest'), path), read, bad_samples))


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
    wanted = 'columns file_name, caption_1, ...'
    columns, records = read_csv(captions_csv, wanted)
    caption_columns = [name for name in columns if name.startswith('caption')]
    if 'file_name' not in columns or not caption_columns:
        raise SystemExit(f'{captions_csv}: wanted {wanted}, found {", ".join(columns) or "nothing"}')
    if not records:
        raise SystemExit(f'{captions_csv}: no captions in it')
    unique = UniqueIds()
    found = []
    for where, record in records:
        if isinstance(record, BadSample):
            bad_samples.add(where, record)
            continue
        for column in caption_columns:                 # each caption is an item of its own
            id = unique(f'{record["file_name"]}#{column}')
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


def check_shard(folder, name, sha256, space):
    """{modality: captions} of a shard; exits with one line unless its bytes and its token space are the right ones."""
    path = Path(folder) / f'{name}.safetensors'
    try:
        found = sha256_file(path)                      # safetensors itself takes flipped bits for whole
    except OSError as e:
        raise SystemExit(f'{path}: cannot read this shard ({e.strerror}); run build_b2.py again')
    if found != sha256:
        raise SystemExit(f'{path}: sha256 {found[:12]}, wanted {sha256[:12]}: damaged or exchanged; remove it and run '
                         'build_b2.py again')
    side = read_side(folder, name, sha256)
    with safe_open(path, 'np') as f:
        in_header = f.metadata()['token_space']
        kinds = f.get_tensor('kinds')[f.get_tensor('items')[:, 0]]     # of each caption's medium
    for made_for in in_header, side['token_space']:    # a file may have been exchanged alone
        if made_for != space.sha256:
            raise SystemExit(f'{path}: made for token space {made_for[:12]}, wanted {space.sha256[:12]}: build it anew')
    return {modality: int((kinds == KINDS.index(modality)).sum()) for modality in ('image', 'audio')}


def read_side(folder, name, sha256):
    """What name.json says of the shard of this sha256."""
    path = Path(folder) / f'{name}.json'
    side = read_sealed(path, 'build_b2.py')
    if side['shard_sha256'] != sha256:
        raise SystemExit(f'{path}: of a shard with sha256 {side["shard_sha256"][:12]}, wanted {sha256[:12]}; '
                         'remove it and run build_b2.py again')
    return side


def stamp_of(path):
    """[bytes, time of the last change in ns] of a file, by which it is known again. path: or the handle of one."""
    try:
        found = os.stat(path)
    except OSError as e:
        raise SystemExit(f'{path}: cannot read this shard ({e.strerror}); run build_b2.py again')
    return [found.st_size, found.st_mtime_ns]


def read_checked(folder, space):
    """{name: {'sha256', 'stamps', 'items'}} of the shards that have been compared with their sha256 before."""
    try:
        checked = read_sealed(Path(folder) / 'checked.json', '')
    except SystemExit:                                 # none yet, or damaged: all are compared again
        return {}
    return checked['shards'] if checked['token_space'] == space.sha256 else {}


def check_shards(folder, entries, space):
    """Of each shard of an index, {'sha256', 'stamps', 'items': {modality: captions}}, or a line on what is wrong.

    On every rank: each reads its part of the shards. What is whole is remembered in folder/checked.json, and is not
    read again while its size and time stay the same.
    """
    folder = Path(folder)
    known = read_checked(folder, space)

    def check(entry):
        name = entry['name']
        sha256 = entry['sha256']
        try:
            # from before they are read: a later change is one
            stamps = [stamp_of(folder / f'{name}.{ending}') for ending in ('safetensors', 'json')]
            had = known.get(name)
            if had is not None and (had['sha256'], had['stamps']) == (sha256, stamps):
                return had
            return {'sha256': sha256, 'stamps': stamps, 'items': check_shard(folder, name, sha256, space)}
        except SystemExit as e:
            return str(e)

    rank, world_size = rank_of()
    with ThreadPoolExecutor(4) as threads:             # hashing lets go of Python: a disk is kept busy
        found = list(threads.map(check, entries[rank::world_size]))
    barrier()
    found = gather_in_order(found)
    whole = {entry['name']: one for entry, one in zip(entries, found) if isinstance(one, dict)}
    if rank == 0 and any(known.get(name) != one for name, one in whole.items()):
        try:
            write_sealed(folder / 'checked.json', {'token_space': space.sha256, 'shards': {**known, **whole}})
        except SystemExit as e:                        # a folder of somebody else's
            print(f'{e.code}; the next start reads all shards again')
    return found


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


class StoredRecord(NamedTuple):
    """A Record that stays in its shard: what only messages and held-out items need is read when it is asked for."""
    modality: str
    payload: np.ndarray                # int32, as those of a Record
    text: np.ndarray                   # int32
    side: Callable                     # () -> what the shard's .json says
    medium: int                        # number in the shard
    item: int

    @property
    def id(self):
        return self.side()['items'][self.item]

    @property
    def media_sha256(self):
        return self.side()['media'][self.medium]

    @property
    def meta(self):
        return self.side()['metas'][self.medium]


class Segments(NamedTuple):
    """Where things are in a shard: a few kB."""
    start: int                         # of its ids, in bytes of the file
    offsets: np.ndarray                # int64 (segments + 1,)
    items: np.ndarray                  # int32 (items, 2), segments of its medium and its text
    modalities: np.ndarray             # uint8 (items,), numbers in KINDS


class Records(Sequence):
    """The records of some shards in their order, or those of one modality: each is read when it is asked for.

    names: of the shards; checked: what check_shards says of each. What is kept in memory does not grow with the shards,
    but for a number for each of them.
    """
    KNOWN = 4096                       # shards whose segments are kept: 10 kB each
    SIDES = 64                         # and whose .json is

    def __init__(self, folder, names, checked, modality=None):
        self.folder = Path(folder)
        self.names = names
        self.checked = checked
        self.modality = modality
        kinds = ('image', 'audio') if modality is None else (modality,)
        counts = [sum(one['items'][kind] for kind in kinds) for one in checked]
        self.ends = np.cumsum(counts, dtype=np.int64)  # the number of records up to the end of each shard
        self.segments = lru_cache(self.KNOWN)(self.read_segments)
        self.side = lru_cache(self.SIDES)(self.read_side)

    def of(self, modality):
        """The records of one modality."""
        some = Records(self.folder, self.names, self.checked, modality)
        some.segments = self.segments                  # what is known is known to all
        some.side = self.side
        return some

    def path(self, n):
        return f'{self.folder}/{self.names[n]}.safetensors'

    def require_unchanged(self, n, file):
        """file: the shard's path, or a handle of it."""
        if stamp_of(file) != self.checked[n]['stamps'][0]:
            raise SystemExit(f'{self.path(n)} has changed since this run began: start it again')

    def read_segments(self, n):
        self.require_unchanged(n, self.path(n))
        with open(self.path(n), 'rb') as f:
            n_bytes = int.from_bytes(f.read(8), 'little')
            start = 8 + n_bytes + json.loads(f.read(n_bytes))['ids']['data_offsets'][0]
        with safe_open(self.path(n), 'np') as f:
            items = f.get_tensor('items')
            return Segments(start, f.get_tensor('offsets'), items, modalities=f.get_tensor('kinds')[items[:, 0]])

    def read_ids(self, n, segments):
        """The ids of some segments of shard n. Read and not mapped: of most shards a step wants one record, and to map
        a file takes longer than to read that."""
        known = self.segments(n)
        try:
            handle = os.open(self.path(n), os.O_RDONLY)
        except OSError as e:
            raise SystemExit(f'{self.path(n)}: cannot read this shard ({e.strerror}); run build_b2.py again')
        try:
            self.require_unchanged(n, handle)
            found = []
            for segment in segments:
                first, end = known.offsets[segment:segment + 2].tolist()
                found.append(np.frombuffer(os.pread(handle, 4 * (end - first), known.start + 4 * first), np.int32))
            return found
        finally:
            os.close(handle)

    def read_side(self, n):
        return read_side(self.folder, self.names[n], self.checked[n]['sha256'])

    def items_of(self, n):
        """The numbers of the items of shard n that are among the records."""
        modalities = self.segments(n).modalities
        if self.modality is None:
            return np.arange(len(modalities))
        return np.flatnonzero(modalities == KINDS.index(self.modality))

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        i = range(len(self))[i]                        # from the end too; an IndexError ends a loop over them
        n = int(np.searchsorted(self.ends, i, side='right'))
        items = self.items_of(n)
        item = int(items[i - self.ends[n]])            # from the shard's end: records end where it does
        medium, text = self.segments(n).items[item].tolist()
        payload_ids, text_ids = self.read_ids(n, (medium, text))
        return StoredRecord(
            modality=KINDS[self.segments(n).modalities[item]],
            payload=payload_ids,
            text=text_ids,
            side=partial(self.side, n),
            medium=medium,
            item=item,
        )

    def text_lengths(self):
        """How many ids the text of each record has, (records,), without reading any."""
        lengths = [np.zeros(0, np.int64)]
        for n in range(len(self.names)):
            segments = self.segments(n)
            texts = segments.items[self.items_of(n), 1]
            lengths.append(segments.offsets[texts + 1] - segments.offsets[texts])
        return np.concatenate(lengths)


def read_shards(folder, split, space=None):
    """The Records of a split: 'train', 'eval' or 'golden'. On every rank. Exits at the first file that is not of the
    sha256 in index.json."""
    index, space = read_index(folder, space)
    if split not in index['splits']:
        raise SystemExit(f'{folder} has no split {split!r}: wanted one of {", ".join(index["splits"])}')
    entries = index['splits'][split]['shards']
    checked = check_shards(folder, entries, space)
    for one in checked:
        if isinstance(one, str):
            raise SystemExit(one)
    return Records(folder, [entry['name'] for entry in entries], checked)


# -----------------------------------------------------------------------------
# examples of the tasks


def token_example(record, task, grammar, max_seq_len):
    """A Record as the document of a task ('i2t', 'a2t', 't2i', 't2a', 'text') -> Example, whose item is the Record.

    What does not fit is cut from the text, never from the payload: the end of a description, or of a prompt.
    """
    modality, direction = TASKS[task]
    if modality not in (None, record.modality):
        raise SystemExit(f'item {record.id} has an {record.modality}: task {task} wants an {modality}')
    room = room_for_text(task, grammar, max_seq_len)
    # a prompt is cut here, before its payload; a description below, at its end
    text = record.text[:room] if direction == 'write' else record.text
    document = grammar.document(task, record.payload, text)
    fits = document.label_positions < max_seq_len
    return Example(
        item=record,
        ids=document.ids[:max_seq_len],
        label_positions=document.label_positions[fits],
        image_starts=NO_IMAGES,
        truncated=len(record.text) > room,
        label_ranges=document.label_ranges[fits],
    )


def room_for_text(task, grammar, max_seq_len):
    """How many ids of text an example of this task can have."""
    modality, _ = TASKS[task]
    n_others = grammar.length(modality) + 3 if modality else 1     # codes, two markers, an end
    if max_seq_len <= n_others:
        raise SystemExit(f'max_seq_len = {max_seq_len} leaves no room for text in {task}: wanted at least '
                         f'{n_others + 1}')
    return max_seq_len - n_others


class TokenExamples(Sequence):
    """The examples of a task about Records of its modality: each is made when a step asks for it."""
    def __init__(self, records, task, grammar, max_seq_len):
        self.records = records
        self.task = task
        self.grammar = grammar
        self.max_seq_len = max_seq_len

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        return token_example(self.records[i], self.task, self.grammar, self.max_seq_len)

    def label_counts(self):
        """(truncated or not, number of labels) of each example, (examples,) each, without making any."""
        n_text = self.records.text_lengths()
        room = room_for_text(self.task, self.grammar, self.max_seq_len)
        modality, direction = TASKS[self.task]
        n_labels = np.minimum(n_text + 1, room + 1)    # a text and its end; the end is cut first
        if direction == 'write':
            n_labels = np.full(len(n_text), self.grammar.length(modality) + 1)
        return n_text > room, n_labels


def label_counts(*groups):
    """(examples, truncated ones, ones without a label) of several {task: examples}."""
    n = n_truncated = n_unlabelled = 0
    for sets in groups:
        for examples in sets.values():
            if isinstance(examples, TokenExamples):
                truncated, n_labels = examples.label_counts()
            else:
                truncated = np.array([example.truncated for example in examples], bool)
                n_labels = np.array([len(example.label_positions) for example in examples])
            n += len(examples)
            n_truncated += int(truncated.sum())
            n_unlabelled += int((n_labels == 0).sum())
    return n, n_truncated, n_unlabelled


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
    """{task: its examples in a split of the shards}; n: the first n of each, in the shards' random order, made at once.
    On every rank."""
    records = read_shards(shards_dir, split, grammar.space)
    sets = {}
    for task in tasks:
        modality, _ = TASKS[task]
        examples = TokenExamples(records.of(modality), task, grammar, max_seq_len)
        sets[task] = examples if n is None else examples[:n]
    return sets


def require_enough(train_sets, eval_sets, golden_sets, shards_dir, n_eval=8, n_golden=0):
    """Exit when a task has nothing to train on, or fewer held-out items than its gates ask: 8 of every task, n_eval and
    n_golden of those that write."""
    for task, train_set in train_sets.items():
        wanted_eval, wanted_golden = (max(8, n_eval), n_golden) if TASKS[task][1] == 'write' else (8, 0)
        found_eval = len(eval_sets[task])
        found_golden = len(golden_sets[task])
        if not train_set or found_eval < wanted_eval or found_golden < wanted_golden:
            raise SystemExit(f'{shards_dir} has {len(train_set)} items to train and {found_eval} to evaluate {task} on '
                             f'and {found_golden} golden ones; its gates ask {wanted_eval} and {wanted_golden}: set '
                             'n_eval and n_golden of stage B2 and of this one, or its task_weights to 0')


def text_examples(path, tokenizer, max_seq_len, n=None):
    """[Example] of the first n texts of a file."""
    template = ChatTemplate(tokenizer, 0, max_seq_len)
    return [template.text(text, where) for where, text in list(text_lines(path))[:n]]


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

    sets: {task: [Example]}; shares_at(done) -> {task: share}, which sum to 1; done: from 0, at the first step,
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

    def passes(self):
        """{task: how often all steps together go through its examples}."""
        drawn = self.counts.sum(0)
        return {task: drawn[t] / len(examples) for t, (task, examples) in enumerate(self.sets.items())}

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
                drops_prompt = dropout and np.random.default_rng([seed, epoch, i, 1]).random() < dropout
                chosen.append(with_prompt(examples[i], ()) if drops_prompt else examples[i])
        return sorted(chosen, key=len, reverse=True)


def passes_line(sampler, epochs):
    """How often an epoch goes through the examples of each task, for a line of a script."""
    parts = []
    for task, n in sampler.passes().items():
        parts.append(f'{len(sampler.sets[task]):,} examples of {task} {n / epochs:.3g} times')
    return ', '.join(parts)
