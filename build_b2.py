"""
Stage B2: encode images and sounds once, and lay them with their texts into shards that Track B trains on.

reads   audit_dir/token_space.json   from uti.py, with the codecs it was made for
        manifests (JSONL of {id, image | audio, text}), data_json (LLaVA captions), sound_dir with captions in a CSV
writes  out_dir/{train,eval,golden}-00000.{safetensors,json} ..., token_space.json, plan.json, index.json,
        bad_samples.jsonl, report.json, gates.json
done    when every gate passes; exits 1 when one does not

$ python build_b2.py configs/b2_small.py
$ torchrun --standalone --nproc_per_node=8 build_b2.py configs/b2_qwen3_8b.py

Started again it makes what is missing or damaged; killed or not, on any number of ranks, the bytes are the same.
Letters: B files of a batch, N codes of an image, F audio frames, K codebooks.
"""
import hashlib
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import gates
from common import (
    all_gather, all_sum, barrier, canonical, gather_in_order, init_ranks, lock_run, progress, provenance, read_sealed,
    shutdown_ranks, write_atomic, write_sealed)
from configure import configure
from data import collate, media_sha256
from lists import UniqueIds, read_llava
from media import BadSample, BadSamples, read_audio, read_image
from shards import (
    SPLITS, Caption, CaptionedMedia, Medium, load_shard, read_index, read_manifest, read_shards, read_sound_folder,
    token_example, write_shard)
from uti import TASKS, UTI, Grammar, TokenSpace
from watch import wait_at_most

# -----------------------------------------------------------------------------
# settings; override any with a config file or --key=value
# inputs and outputs
manifests = ()                 # JSONL files of {"id"?, "source"?, "image": path | "audio": path, "text"}; paths in a
                               # manifest are relative to its folder and stay inside it
data_json = ''                 # LLaVA-Pretrain JSON or JSONL: [{id, image, conversations}]; '' for none
image_root = ''                # image paths in data_json are relative to this folder and stay inside it
sound_dir = ''                 # folder of WAV, FLAC or OGG files; '' for none
sound_captions = ''            # CSV of file_name, caption_1, caption_2, ... for them
audit_dir = ''                 # of stage B1: the token space, and the verdict on its codecs
llm = ''                       # Hugging Face folder or name: only its tokenizer and vocabulary size are read
image_codec = ''               # Hugging Face folder or name; '' where the token space has no images
image_prefix = ''              # where in a larger checkpoint the codec is
audio_codec = ''               # clip length and picture size are those of the token space
audio_prefix = ''
out_dir = 'out/b2'
max_bad_samples = 0            # more unusable samples than this end the run; up to it they go to bad_samples.jsonl
allow_failed_gates = False     # take codecs whose audit failed
# the split, by the bytes of the media file: all captions of one file stay together
n_golden = 64                  # held out for looking at, of each modality
eval_share = 0.02              # of the other files
split_seed = 1
# shards
shard_media = 512              # files in a shard, the unit of work: a kill loses at most one of them a rank
max_seq_len = 1024             # an item whose longest document is longer is left out: nothing is cut later
# gates
n_checked = 64                 # files of each modality that are decoded, and encoded again one at a time
# machine
device = 'auto'
batch_size = 32                # files encoded at once: memory and speed only, the ids stay the same
workers = 4                    # threads that read media files
timeout = 120.0                # minutes that a rank waits for another one: longer than a shard takes
config = configure(globals(), required=('audit_dir', 'llm'))
# -----------------------------------------------------------------------------

# ranks
for name in 'shard_media', 'batch_size', 'workers':
    if config[name] < 1:
        raise SystemExit(f'{name} = {config[name]}: wanted at least 1')
if not timeout > 0:
    raise SystemExit(f'timeout = {timeout}: wanted more than 0')
rank, world_size, device = init_ranks(device)
out = Path(out_dir)
if rank == 0:
    lock = lock_run(out_dir)                           # held until this process ends
    (out / 'bad_samples.jsonl').unlink(missing_ok=True)    # every start finds them anew
barrier()
threads = ThreadPoolExecutor(workers)

# the token space, and the codecs it was made for
gates.require_passed(audit_dir, allow_failed_gates)
space = TokenSpace.load(Path(audit_dir) / 'token_space.json')
uti = UTI.of_space(space, audit_dir, llm, image_codec=image_codec, audio_codec=audio_codec, image_prefix=image_prefix,
                   audio_prefix=audio_prefix, device=device)
torch.backends.cudnn.allow_tf32 = False                # codes come from float32, as they did in the audit
grammar = Grammar(space)
ENCODE = {'image': uti.encode_image, 'audio': uti.encode_audio}
DECODE = {'image': uti.decode_image, 'audio': uti.decode_audio}

# -----------------------------------------------------------------------------
# the media by their bytes; the same on every rank


class File(NamedTuple):
    """One media file by its bytes, whatever the number of its names and captions."""
    sha256: str
    modality: str


bad_samples = BadSamples(out / 'bad_samples.jsonl', max_bad_samples, active=rank == 0)
captioned = []                                         # every caption with the path of its file
for path in manifests:
    captioned += read_manifest(path, bad_samples)
if data_json:
    for item in read_llava(data_json, image_root, bad_samples, captions=True):
        captioned.append(CaptionedMedia(item.id, 'image', item.image, item.turns[0][1]))
if sound_dir:
    captioned += read_sound_folder(sound_dir, sound_captions, bad_samples)


def sha256_or_reason(path):
    try:
        return media_sha256(path)
    except BadSample as e:
        return e


paths = sorted({caption.path for caption in captioned})
sha256s = gather_in_order(threads.map(sha256_or_reason, paths[rank::world_size]))
sha256_of = dict(zip(paths, sha256s))
captions_of = {}                                       # File: its captions; the first one's path is read
n_items = 0
unique = UniqueIds()                                   # over all lists: each may have the ids of another
for n, caption in enumerate(captioned):
    caption = replace(caption, id=unique(caption.id))
    sha256 = sha256_of[caption.path]
    reason = None
    if isinstance(sha256, BadSample):
        reason = sha256
    elif caption.modality not in grammar.payload_ranges:
        reason = BadSample(f'{caption.path}: {audit_dir} has no {caption.modality} in its token space')
    if reason is not None:
        bad_samples.add(caption.id, reason, key=f'caption {n}')
        continue
    n_items += 1
    captions_of.setdefault(File(sha256, caption.modality), []).append(caption)
if not captions_of:
    raise SystemExit('no usable sample: set manifests, data_json or sound_dir to data that exists')


def read(file):
    """uint8 (3, H, W) pixels, or float32 (n,) samples; raises BadSample."""
    path = captions_of[file][0].path
    if file.modality == 'image':
        return read_image(path, space.image['size'])
    return read_audio(path, space.audio['sample_rate'], space.audio['samples'])


def text_ids(caption):
    """The ids of its text; raises BadSample when the longest of its documents is too long."""
    ids = np.asarray(uti.encode_text(caption.text), np.int32)
    length = len(ids) + grammar.length(caption.modality) + 3       # two markers, an end
    if length > max_seq_len:
        raise BadSample(f'{caption.path}: id {caption.id} takes {length} ids, wanted at most '
                        f'max_seq_len = {max_seq_len}')
    return ids


# -----------------------------------------------------------------------------
# the plan: which file goes into which split and shard


def draw(purpose, key):
    """A number in [0, 1) that the seed and the key, the sha256 of a file, decide: no order of files, no rank."""
    digest = hashlib.sha256(f'{purpose} {split_seed} {key}'.encode()).digest()
    return int.from_bytes(digest[:8], 'big') / 2**64


def is_usable(file):
    """Whether a file can be read and its first caption fits: a golden one has to, the shards of others say why not."""
    try:
        read(file)
        text_ids(captions_of[file][0])
    except BadSample:
        return False
    return True


chosen = {split: [] for split in SPLITS}
for modality in sorted({file.modality for file in captions_of}):
    files = [file for file in captions_of if file.modality == modality]
    golden = []
    for file in sorted(files, key=lambda file: draw('golden', file.sha256)):
        if len(golden) == n_golden:
            break
        if is_usable(file):
            golden.append(file)
    train = []
    held_out = []
    for file in set(files) - set(golden):
        if draw('eval', file.sha256) < eval_share:
            held_out.append(file)
        else:
            train.append(file)
    if len(golden) < n_golden or not held_out or not train:
        raise SystemExit(f'{len(files)} media files of {modality}: {len(train)} to train on, {len(held_out)} to '
                         f'evaluate on and {len(golden)} of {n_golden} golden; add data or change eval_share and '
                         'n_golden')
    chosen['train'] += train
    chosen['eval'] += held_out
    chosen['golden'] += golden

shards = {}                                            # name: [File]
for split, files in chosen.items():
    files.sort(key=lambda file: (draw('order', file.sha256), file))    # whatever order they came in
    for n in range(0, len(files), shard_media):
        shards[f'{split}-{n // shard_media:05d}'] = files[n:n + shard_media]
for file in chosen['eval'] + chosen['golden']:         # held out with one caption, which the seed decides
    captions_of[file].sort(key=lambda caption: draw('caption', caption.id))

samples = []                                           # all that goes into the shards, in its order
for files in shards.values():
    for file in files:
        samples.append((file.sha256, file.modality, [(caption.id, caption.text) for caption in captions_of[file]]))
plan = {
    'token_space': space.sha256,
    'shard_media': shard_media,
    'max_seq_len': max_seq_len,
    'n_golden': n_golden,
    'eval_share': eval_share,
    'split_seed': split_seed,
    'n_media': len(captions_of),
    'n_items': n_items,
    'samples_sha256': hashlib.sha256(canonical(samples).encode()).hexdigest(),
}
if rank == 0:
    if (out / 'plan.json').exists():
        space.require(TokenSpace.load(out / 'token_space.json'), out_dir)
        for key, value in read_sealed(out / 'plan.json', 'build_b2.py').items():
            if plan.get(key) != value:
                raise SystemExit(f'{out_dir} holds shards with {key} = {value!r}, this run has {plan.get(key)!r}: '
                                 'remove it or set another out_dir')
    space.save(out / 'token_space.json')
    write_sealed(out / 'plan.json', plan)
    sizes = ', '.join(f'{len(files)} to {split}' for split, files in chosen.items())
    print(f'{n_items} items, {len(captions_of)} media files: {sizes}, in {len(shards)} shards')

# -----------------------------------------------------------------------------
# encode


def read_or_reason(file):
    try:
        return read(file)
    except BadSample as e:
        return e


def read_ahead(batches):
    """(files, array or BadSample of each) of every batch; the next one is being read meanwhile."""
    reading = [threads.submit(read_or_reason, file) for file in batches[0]]
    for n, batch in enumerate(batches):
        following = batches[n + 1] if n + 1 < len(batches) else []
        current = reading
        reading = [threads.submit(read_or_reason, file) for file in following]
        yield batch, [future.result() for future in current]


def encode(files):
    """{File: (codes, meta)} of those that can be read, {File: BadSample} of the others."""
    batches = []
    for modality in ENCODE:
        of_one = [file for file in files if file.modality == modality]
        batches += [of_one[i:i + batch_size] for i in range(0, len(of_one), batch_size)]
    encoded = {}
    for batch, arrays in read_ahead(batches):
        whole = []
        for file, array in zip(batch, arrays):
            encoded[file] = array                      # the reason of a bad one stays
            if not isinstance(array, BadSample):
                whole.append(file)
        if whole:                                      # they keep their ids without the bad ones
            arrays = [encoded[file] for file in whole]
            codes, metas = ENCODE[whole[0].modality](arrays)           # (B, N) or (B, F K)
            encoded.update(zip(whole, zip(codes, metas)))
    return encoded


def make_shard(name, files):
    """Write a shard; returns the numbers of media and of captions in it."""
    encoded = encode(files)
    media = []
    captions = []
    skipped = []
    for file in files:
        texts = []
        for caption in captions_of[file]:
            try:
                if isinstance(encoded[file], BadSample):
                    raise encoded[file]
                texts.append((caption.id, text_ids(caption)))
            except BadSample as e:
                skipped.append((caption.id, str(e)))
                too_many.add(caption.id, e, key=f'shard {caption.id}')
        if not name.startswith('train'):               # held out once, whatever the number of its captions
            texts = texts[:1]
        if texts:
            codes, meta = encoded[file]
            captions += [Caption(id, len(media), ids) for id, ids in texts]
            media.append(Medium(file.sha256, file.modality, codes, meta))
    write_shard(out, name, space, media, captions, skipped=skipped, plan=plan['samples_sha256'])
    return len(media), len(captions)


def is_finished(name):
    """Whether this shard is whole and of this plan."""
    try:
        side = read_sealed(out / f'{name}.json', 'build_b2.py')
        load_shard(out, name, side['shard_sha256'], space)
    except SystemExit:
        return False
    return side['plan'] == plan['samples_sha256']


names = list(shards)
finished = gather_in_order([is_finished(name) for name in names[rank::world_size]])
missing = [name for name, is_there in zip(names, finished) if not is_there]
# ends the run as soon as a rank has met too many; bad_samples.jsonl is written in the end, from all shards
too_many = BadSamples(out / 'bad_samples.jsonl', max_bad_samples, active=False)
too_many.entries |= bad_samples.entries
wait_at_most(timeout)                                  # until here a day: every file had to be read
n_made_media = 0
n_made_captions = 0
start = time.time()
for name in progress(missing[rank::world_size], 'shards', active=rank == 0):
    n_media, n_captions = make_shard(name, shards[name])
    n_made_media += n_media
    n_made_captions += n_captions
seconds = max(all_gather(time.time() - start))
n_made_media = int(all_sum(n_made_media))
n_made_captions = int(all_sum(n_made_captions))

# -----------------------------------------------------------------------------
# the index: the same on every machine and for any number of starts

NOT_IN_INDEX = 'date', 'device', 'out_dir', 'batch_size', 'workers', 'timeout'    # of provenance and settings


def entry(side):
    """A shard's part of the index, from what its .json says."""
    return {
        'name': side['name'],
        'sha256': side['shard_sha256'],
        'media': len(side['media']),
        'items': len(side['items']),
        'ids': side['ids'],
        'bytes': side['bytes'],
    }


def without_machine(record):
    return {key: value for key, value in record.items() if key not in NOT_IN_INDEX}


sides = {split: [] for split in SPLITS}
for name in names:
    split = name.split('-')[0]
    sides[split].append(read_sealed(out / f'{name}.json', 'build_b2.py'))
if rank == 0:
    splits = {}
    for split in SPLITS:
        for side in sides[split]:
            for id, reason in side['skipped']:
                bad_samples.add(id, reason, key=f'shard {id}')
        entries = [entry(side) for side in sides[split]]
        splits[split] = {
            'media': sum(e['media'] for e in entries),
            'items': sum(e['items'] for e in entries),
            'shards': entries,
        }
    codecs = {}
    for modality, described in ('image', space.image), ('audio', space.audio):
        codecs[modality] = described and {key: described[key] for key in ('class', 'sha256')}
    write_sealed(out / 'index.json', {
        'token_space': space.sha256,
        'codecs': codecs,
        'splits': splits,
        'provenance': {**without_machine(provenance()), 'settings': without_machine(config)},
    })
barrier()

# -----------------------------------------------------------------------------
# measure, through what the next stages read with; every rank its part


def what_is_wrong(shard):
    """A line on what is wrong with a shard of the index, or None."""
    try:
        load_shard(out, shard['name'], shard['sha256'], space)
    except SystemExit as e:
        return str(e)


def decodes(record):
    """Whether its codes become a picture or a wave of the right size, all of it finite."""
    if record.modality == 'image':
        shape = (3, space.image['size'], space.image['size'])
    else:
        shape = (record.meta['n_samples'],)
    try:
        decoded = DECODE[record.modality](record.payload[None], [record.meta])[0]
    except SystemExit:                                 # an id out of range, another rate, NaN
        return False
    return decoded.shape == shape and bool(np.isfinite(decoded).all())


index, _ = read_index(out, space)
entries = []
for split in SPLITS:
    entries += index['splits'][split]['shards']
problems = gather_in_order([what_is_wrong(shard) for shard in entries[rank::world_size]])
wrong_shards = [line for line in problems if line]
records = []
if not wrong_shards:                                   # else nothing can be looked at, and those gates fail too
    for split in SPLITS:
        records += read_shards(out, split, space)

count = Counter()
for modality in ENCODE:
    record_of = {record.media_sha256: record for record in records if record.modality == modality}
    of_one = list(record_of.values())
    spread = np.linspace(0, len(of_one) - 1, min(n_checked, len(of_one))).round().astype(int)
    for n in spread[rank::world_size]:
        record = of_one[n]
        original = read(File(record.media_sha256, modality))
        codes, _ = ENCODE[modality]([original])
        count['checked'] += 1
        count['mismatches'] += not np.array_equal(codes[0], record.payload)
        count['wrong_decodes'] += not decodes(record)

lengths = {}                                           # task: of its documents, on all ranks
for task, (modality, _) in TASKS.items():
    of_task = [record for record in records[rank::world_size] if modality in (None, record.modality)]
    examples = [token_example(record, task, grammar, max_seq_len) for record in of_task]
    for i in range(0, len(examples), 64):
        batch = collate(examples[i:i + 64])
        count['unlabelled'] += len(batch.ids) - len(np.unique(batch.label_examples))
    count['truncated'] += sum(example.truncated for example in examples)
    lengths[task] = []
    for part in all_gather([len(example) for example in examples]):
        lengths[task] += part
total = {name: int(all_sum(count[name])) for name in ('checked', 'mismatches', 'wrong_decodes', 'unlabelled',
                                                      'truncated')}

# -----------------------------------------------------------------------------
# report and gates

status = 0
if rank == 0:
    skipped = []
    if bad_samples.keys:
        skipped = [json.loads(line) for line in (out / 'bad_samples.jsonl').read_text().splitlines()]
    length_report = {}
    for task, of_task in lengths.items():
        if of_task:
            length_report[task] = {'items': len(of_task), 'mean': round(float(np.mean(of_task)), 1)}
            for q in (0, 5, 25, 50, 75, 95, 99, 100):
                length_report[task][f'p{q}'] = int(np.percentile(of_task, q))
    ids_of = {split: [] for split in SPLITS}
    media_of = {split: [] for split in SPLITS}
    bytes_of = Counter()
    for split in SPLITS:
        for side in sides[split]:
            ids_of[split] += side['items']
            media_of[split] += side['media']
            bytes_of[split] += side['bytes']
    report = {
        'media': {split: len(media_of[split]) for split in SPLITS},
        'items': {split: len(ids_of[split]) for split in SPLITS},
        'bytes': bytes_of,
        'lengths': length_report,
        'skipped': skipped,
        'wrong_shards': wrong_shards,
        'this_start': {
            'shards': len(missing),
            'media': n_made_media,
            'items': n_made_captions,
            'seconds': round(seconds, 2),
            'items_per_s': round(n_made_captions / seconds, 2),
            'media_per_s': round(n_made_media / seconds, 2),
            'world_size': world_size,
            'batch_size': batch_size,
            'device': str(device),
        },
    }
    write_atomic(out / 'report.json', json.dumps(report, indent=1) + '\n')
    print(f'{n_made_captions} items of {n_made_media} media files in {seconds:.1f} s, '
          f'{n_made_captions / seconds:.1f} items/s; {len(skipped)} samples skipped')
    verdicts = gates.shard_gates(
        n_shards=len(entries),
        n_wrong_shards=len(wrong_shards),
        ids=ids_of,
        media=media_of,
        n_checked=total['checked'],
        n_wrong_decodes=total['wrong_decodes'],
        n_mismatches=total['mismatches'],
        n_examples=sum(len(of_task) for of_task in lengths.values()),
        n_unlabelled=total['unlabelled'],
        n_truncated=total['truncated'],
    )
    status = gates.conclude(out, verdicts)
status = int(all_sum(status))
shutdown_ranks()
sys.exit(status)
