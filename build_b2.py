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
Letters: B media of a batch, N codes of an image, F audio frames, K codebooks.
"""
import hashlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import gates
from common import all_gather, all_sum, init_ranks, lock_run, provenance, sha256_file, write_atomic
from configure import configure
from data import (SPLITS, BadSample, Ledger, Pair, collate, load_shard, read_audio, read_image, read_index, read_llava,
                  read_manifest, read_sealed, read_shards, read_sound_folder, token_row, write_sealed, write_shard)
from uti import TASKS, UTI, Grammar, TokenSpace, canonical

# -----------------------------------------------------------------------------
# settings; override any with a config file or --key=value
# what goes in and out
manifests = ()                 # JSONL files of {"id", "source", "image": path | "audio": path, "text"}; paths in a
                               # manifest are relative to its folder and stay inside it
data_json = ''                 # LLaVA-Pretrain JSON: [{id, image, conversations}]; '' for none
image_root = ''                # image paths in data_json are relative to this folder and stay inside it
sound_dir = ''                 # folder of WAV, FLAC or OGG files; '' for none
sound_captions = ''            # CSV of file_name, caption_1, caption_2, ... for them
audit_dir = ''                 # of stage B1: the token space, and the verdict on its codecs
llm = ''                       # Hugging Face folder or name: its tokenizer and rows; no weight of it is read
image_codec = ''               # Hugging Face folder or name; '' where the token space has no images
image_prefix = ''              # where in a larger checkpoint the codec is
audio_codec = ''               # how long a clip is, and how large a picture, the token space says
audio_prefix = ''
out_dir = 'out/b2'
max_bad_samples = 0            # more unusable samples than this end the run; up to it they go to bad_samples.jsonl
allow_failed_gates = False     # take codecs whose audit failed
# the split, by the bytes of the media file: all captions of one file stay together
n_golden = 64                  # held out for looking at, of each modality
eval_share = 0.02              # of the other media
split_seed = 1
# shards
shard_media = 512              # media in a shard, the unit of work: a kill loses at most one of them a rank
max_seq_len = 1024             # an item whose longest document is longer is left out: nothing is cut later
# gates
n_checked = 64                 # media of each modality that are decoded, and encoded again one at a time
# machine
device = 'auto'
batch_size = 32                # media encoded at once: memory and speed only, the ids stay the same
workers = 4                    # threads that read media files
config = configure(globals(), required=('audit_dir', 'llm'))
# -----------------------------------------------------------------------------

# ranks
rank, world_size, device = init_ranks(device)
lock = lock_run(out_dir) if rank == 0 else None
all_sum(0)                                             # nobody goes on before rank 0 has the lock
out, threads = Path(out_dir), ThreadPoolExecutor(workers)
if rank == 0:
    (out / 'bad_samples.jsonl').unlink(missing_ok=True)   # every start finds them anew
all_sum(0)

# the token space, and the codecs it was made for
gates.require_passed(audit_dir, allow_failed_gates)
space = TokenSpace.load(Path(audit_dir) / 'token_space.json')
uti = UTI.of_space(space, audit_dir, llm, image_codec, audio_codec, image_prefix, audio_prefix, device)
torch.backends.cudnn.allow_tf32 = False                # codes come from float32, as they did in the audit
grammar = Grammar(space)
READ = {'image': lambda path: read_image(path, space.image['size']),
        'audio': lambda path: read_audio(path, space.audio['sample_rate'], space.audio['samples'])}
ENCODE = {'image': uti.encode_image, 'audio': uti.encode_audio}
DECODE = {'image': uti.decode_image, 'audio': uti.decode_audio}

# the samples, and their media by the bytes of the file; the same on every rank
ledger = Ledger(out / 'bad_samples.jsonl', max_bad_samples, active=rank == 0)
pairs = [p for path in manifests for p in read_manifest(path, ledger)]
if data_json:
    pairs += [Pair(i.id, 'image', i.image, i.turns[0][1]) for i in read_llava(data_json, image_root, ledger, True)]
if sound_dir:
    pairs += read_sound_folder(sound_dir, sound_captions, ledger)


def sha256_or_reason(path):
    try:
        return sha256_file(path)
    except OSError as e:
        return BadSample(f'{path}: cannot read this file ({e.strerror})')


paths = sorted({p.path for p in pairs})
hashed = all_gather(list(threads.map(sha256_or_reason, paths[rank::world_size])))
sha256_of = {path: hashed[n % world_size][n // world_size] for n, path in enumerate(paths)}
media, seen = {}, set()                                # sha256: the pairs of one file; the first of them gives the path
for n, pair in enumerate(pairs):
    sha256 = sha256_of[pair.path]
    try:
        if isinstance(sha256, BadSample):
            raise sha256
        if pair.id in seen:
            raise BadSample(f'{pair.path}: id {pair.id} stands twice')
        if pair.modality not in grammar.payload_ranges:
            raise BadSample(f'{pair.path}: {audit_dir} has no {pair.modality} in its token space')
        seen.add(pair.id)
        media.setdefault((sha256, pair.modality), []).append(pair)
    except BadSample as e:
        ledger.add(pair.id, e, key=n)


# the plan: what goes into which split and shard
def draw(name, sha256):
    """A number in [0, 1) that the bytes of a file and the seed decide."""
    return int.from_bytes(hashlib.sha256(f'{name} {split_seed} {sha256}'.encode()).digest()[:8], 'big') / 2**64


def text_ids(pair):
    """The ids of its text; raises BadSample when the longest of its documents is too long."""
    ids = np.asarray(uti.encode_text(pair.text), np.int32)
    length = len(ids) + grammar.length(pair.modality) + 3
    if length > max_seq_len:
        raise BadSample(f'{pair.path}: id {pair.id} takes {length} ids, wanted at most max_seq_len = {max_seq_len}')
    return ids


def usable(key):
    """Whether a medium can be read and has a text: a golden one has to."""
    try:
        READ[key[1]](media[key][0].path)
        return any(len(text_ids(pair)) for pair in media[key])
    except BadSample:
        return False                                   # its shard says why


chosen = {split: [] for split in SPLITS}
for modality in sorted({modality for _, modality in media}):
    keys, golden = [key for key in media if key[1] == modality], []
    for key in sorted(keys, key=lambda key: draw('golden', key[0])):
        golden += [key] if len(golden) < n_golden and usable(key) else []
        if len(golden) == n_golden:
            break
    chosen['golden'] += golden
    looked_at = set(golden)
    held = [key for key in keys if key not in looked_at and draw('eval', key[0]) < eval_share]
    train = [key for key in keys if key not in looked_at and draw('eval', key[0]) >= eval_share]
    chosen['eval'] += held
    chosen['train'] += train
    if len(golden) < n_golden or not held or not train:
        raise SystemExit(f'{len(keys)} media files of {modality}: {len(train)} to train on, {len(held)} to evaluate on '
                         f'and {len(golden)} of {n_golden} golden; add data or change eval_share and n_golden')
if not media:
    raise SystemExit('no usable sample: set manifests, data_json or sound_dir to data that exists')
for split, keys in chosen.items():
    keys.sort(key=lambda key: draw('order', key[0]))
    if split != 'train':                               # held out once, whatever the number of its captions
        media.update({key: sorted(media[key], key=lambda pair: draw('caption', pair.id)) for key in keys})
shards = {f'{split}-{n // shard_media:05d}': keys[n:n + shard_media]
          for split, keys in chosen.items() for n in range(0, len(keys), shard_media)}
plan = {'token_space': space.sha256, 'shard_media': shard_media, 'max_seq_len': max_seq_len, 'n_golden': n_golden,
        'eval_share': eval_share, 'split_seed': split_seed, 'n_media': len(media), 'n_items': len(seen),
        'samples_sha256': hashlib.sha256(canonical(
            [(*key, [(p.id, p.text) for p in media[key]]) for keys in shards.values() for key in keys]
        ).encode()).hexdigest()}
if rank == 0 and (out / 'plan.json').exists():
    space.require(TokenSpace.load(out / 'token_space.json'), out_dir)
    for key, had in read_sealed(out / 'plan.json').items():
        if plan.get(key) != had:
            raise SystemExit(f'{out_dir} holds shards with {key} = {had!r}, this run has {plan.get(key)!r}: remove it '
                             'or set another out_dir')
if rank == 0:
    space.save(out / 'token_space.json')
    write_sealed(out / 'plan.json', plan)
    print(f'{len(seen)} items, {len(media)} media files: ' + ', '.join(
        f'{len(keys)} to {split}' for split, keys in chosen.items()) + f', in {len(shards)} shards')


# encode
def encode(keys):
    """{key: (codes, meta)} of the media that can be read, {key: BadSample} of the others. Files are read one batch
    ahead of the codec; a bad one leaves its batch, whose other members keep their ids."""
    batches, done, coming = [], {}, []
    for modality in READ:
        of_one = [key for key in keys if key[1] == modality]
        batches += [of_one[i:i + batch_size] for i in range(0, len(of_one), batch_size)]
    for batch, after in zip([[], *batches], [*batches, []]):
        now, coming = coming, [threads.submit(read_or_reason, key) for key in after]
        read = dict(zip(batch, [future.result() for future in now]))
        done.update({key: bad for key, bad in read.items() if isinstance(bad, BadSample)})
        whole = [key for key in batch if key not in done]
        if whole:
            ids, metas = ENCODE[whole[0][1]]([read[key] for key in whole])             # (B, N) or (B, F K)
            done.update({key: (codes, meta) for key, codes, meta in zip(whole, ids, metas)})
    return done


def read_or_reason(key):
    try:
        return READ[key[1]](media[key][0].path)
    except BadSample as e:
        return e


def make_shard(name, keys):
    codes, kept, items, skipped = encode(keys), [], [], []
    for key in keys:
        texts = []
        for pair in media[key]:
            try:
                if isinstance(codes[key], BadSample):
                    raise codes[key]
                texts.append((pair.id, text_ids(pair)))
            except BadSample as e:
                skipped.append((pair.id, str(e)))
                spent.add(pair.id, e, key=f'shard {pair.id}')
        texts = texts if name.startswith('train') else texts[:1]
        items += [(id, len(kept), ids) for id, ids in texts]
        kept += [key] if texts else []
    write_shard(out, name, space, [(*key, codes[key][0]) for key in kept], items, metas=[codes[key][1] for key in kept],
                skipped=skipped, plan=plan['samples_sha256'])
    return len(kept), len(items)


def finished(name):
    """Whether this shard is whole and of this plan."""
    try:
        side = read_sealed(out / f'{name}.json')
        load_shard(out, name, side['shard_sha256'], space)
        return side['plan'] == plan['samples_sha256']
    except SystemExit:
        return False


names = list(shards)
there = all_gather([finished(name) for name in names[rank::world_size]])
missing = [name for n, name in enumerate(names) if not there[n % world_size][n // world_size]]
spent = Ledger(out / 'bad_samples.jsonl', max_bad_samples, active=False)   # ends the run early; the file comes later
spent.keys |= ledger.keys
made, start = [], time.time()
for name in tqdm(missing[rank::world_size], disable=None if rank == 0 else True):
    made.append(make_shard(name, shards[name]))
seconds = max(all_gather(time.time() - start))
n_made_media, n_made_items = (int(all_sum(sum(n))) for n in (zip(*made) if made else ([], [])))
# the index: what is in it is the same on every machine and for any number of starts
MACHINE = 'date', 'device', 'out_dir', 'batch_size', 'workers'
sides = {split: [read_sealed(out / f'{n}.json') for n in names if n.startswith(split)] for split in SPLITS}
if rank == 0:
    for id, reason in (s for split in SPLITS for side in sides[split] for s in side['skipped']):
        ledger.add(id, reason, key=f'shard {id}')
    write_sealed(out / 'index.json', {
        'token_space': space.sha256,
        'codecs': {'image': space.image and {k: space.image[k] for k in ('class', 'sha256')},
                   'audio': space.audio and {k: space.audio[k] for k in ('class', 'sha256')}},
        'splits': {split: {
            'media': sum(len(s['media']) for s in sides[split]), 'items': sum(len(s['items']) for s in sides[split]),
            'shards': [{'name': s['name'], 'sha256': s['shard_sha256'], 'media': len(s['media']),
                        'items': len(s['items']), 'ids': s['ids'], 'bytes': s['bytes']} for s in sides[split]]}
            for split in SPLITS},
        'provenance': {**{k: v for k, v in provenance().items() if k not in MACHINE},
                       'settings': {k: v for k, v in config.items() if k not in MACHINE}}})
all_sum(0)


# measure, through what the next stages read with; every rank its part
def wrong(shard):
    try:
        load_shard(out, shard['name'], shard['sha256'], space)
    except SystemExit as e:
        return str(e)


def decodes(record):
    """Whether its codes become a picture or a wave of the right size, all of it finite."""
    shape = (3, space.image['size'], space.image['size']) if record.modality == 'image' else (record.meta['n_samples'],)
    try:
        made = DECODE[record.modality](record.payload[None], [record.meta])[0]
    except SystemExit:                                 # an id out of range, another rate, NaN
        return False
    return made.shape == shape and bool(np.isfinite(made).all())


index, _ = read_index(out, space)
entries = [shard for split in SPLITS for shard in index['splits'][split]['shards']]
wrong_shards = [line for part in all_gather([wrong(s) for s in entries[rank::world_size]]) for line in part if line]
records = [r for split in SPLITS for r in read_shards(out, split, space)] if not wrong_shards else []
checked = wrong_decodes = mismatches = unlabelled = truncated = 0
for modality in READ:
    of_one = list({r.media: r for r in records if r.modality == modality}.values())
    spread = np.unique(np.linspace(0, len(of_one) - 1, n_checked).round().astype(int)) if of_one else []
    for record in (of_one[n] for n in spread[rank::world_size]):
        again, _ = ENCODE[modality]([READ[modality](media[record.media, modality][0].path)])
        mismatches += not np.array_equal(again[0], record.payload)
        wrong_decodes += not decodes(record)
        checked += 1
lengths = {}
for task, (modality, _) in TASKS.items():
    rows = [token_row(r, task, grammar, max_seq_len)
            for r in records[rank::world_size] if modality in (None, r.modality)]
    lengths[task] = [len(row) for row in rows]
    truncated += sum(row.truncated for row in rows)
    for i in range(0, len(rows), 64):
        batch = collate(rows[i:i + 64], [None] * 64, 0)
        unlabelled += len(batch.ids) - len(np.unique(batch.label_rows))
lengths = {task: sum((part[task] for part in all_gather(lengths)), []) for task in TASKS}
checked, wrong_decodes, mismatches, unlabelled, truncated = (
    int(all_sum(n)) for n in (checked, wrong_decodes, mismatches, unlabelled, truncated))

# report and gates
status = 0
if rank == 0:
    skipped = [json.loads(line) for line in (out / 'bad_samples.jsonl').read_text().splitlines()] if ledger.keys else []
    write_atomic(out / 'report.json', json.dumps({
        **{what: {split: index['splits'][split][what] for split in SPLITS} for what in ('media', 'items')},
        'bytes': {split: sum(s['bytes'] for s in sides[split]) for split in SPLITS},
        'lengths': {task: {'items': len(n), 'mean': round(float(np.mean(n)), 1), **{
            f'p{q}': int(np.percentile(n, q)) for q in (0, 5, 25, 50, 75, 95, 99, 100)}}
            for task, n in lengths.items() if n},
        'skipped': skipped, 'wrong_shards': wrong_shards,
        'this_start': {'shards': len(missing), 'media': n_made_media, 'items': n_made_items,
                       'seconds': round(seconds, 2), 'items_per_s': round(n_made_items / seconds, 2),
                       'media_per_s': round(n_made_media / seconds, 2), 'world_size': world_size,
                       'batch_size': batch_size, 'device': str(device)}}, indent=1) + '\n')
    print(f'{n_made_items} items of {n_made_media} media files in {seconds:.1f} s, '
          f'{n_made_items / seconds:.1f} items/s; {len(skipped)} samples skipped')
    status = gates.conclude(out, gates.tokenized(
        len(entries), len(wrong_shards), {split: [id for s in sides[split] for id in s['items']] for split in SPLITS},
        {split: [sha for s in sides[split] for sha in s['media']] for split in SPLITS}, checked, wrong_decodes,
        mismatches, sum(map(len, lengths.values())), unlabelled, truncated))
sys.exit(int(all_sum(status)))
