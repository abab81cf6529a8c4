"""
Stage B2: encode images and sounds once, and lay them with their texts into shards that Track B trains on.

reads   audit_dir/token_space.json   from uti.py, with the codecs it was made for
        manifests (JSONL of {id, image | audio, text}), data_json (LLaVA captions), sound_dir with captions in a CSV
writes  out_dir/{train,eval,golden}-00000.{safetensors,json} ..., token_space.json, plan.json, index.json,
        checked.json, plan/, bad_samples.jsonl, report.json, gates.json
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
from pathlib import Path

import numpy as np

import gates
from common import (
    Progress, all_gather, all_sum, barrier, canonical, from_rank_0, gather_in_order, in_parts, init_ranks, lock_run,
    provenance, read_sealed, shutdown_ranks, write_atomic, write_sealed)
from configure import configure
from data import collate
from lists import UniqueIds, read_llava
from media import BadSample, BadSamples, read_audio, read_image
from plan import Captions, Media, hash_media, read_planned, take_shards, write_planned
from shards import (
    SPLITS, Caption, CaptionedMedia, Medium, Records, check_shard, check_shards, read_index, read_manifest,
    read_sound_folder, token_example, write_shard)
from training import require_not_negative, require_positive, require_share
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
n_eval = 512                   # of the other files, held out to evaluate on, of each modality: B4's gates ask 256 ...
eval_share = 0.02              # ... or this share of them, when that is more
split_seed = 1
# shards
shard_media = 512              # files in a shard, the unit of work: a kill loses at most one of them a rank
max_seq_len = 1024             # an item whose longest document is longer is left out: nothing is cut later
# gates
n_checked = 64                 # files of each modality that are decoded, and encoded again beside other ones
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
require_positive(config, 'timeout', 'max_seq_len', 'n_checked')
require_not_negative(config, 'n_golden', 'n_eval')
require_share(config, 'eval_share')
for path in manifests:
    if type(path) is not str:
        raise SystemExit(f'manifests = {manifests}: {path!r} is no path of a file')
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
grammar = Grammar(space)
ENCODE = {'image': uti.encode_image, 'audio': uti.encode_audio}
DECODE = {'image': uti.decode_image, 'audio': uti.decode_audio}

# -----------------------------------------------------------------------------
# the captions of all lists, read by one rank, and the media by their bytes


def captioned_media():
    """Every CaptionedMedia of the lists, one after the other."""
    for path in manifests:
        yield from read_manifest(path, bad_samples)
    if data_json:
        for item in read_llava(data_json, image_root, bad_samples, captions=True):
            yield CaptionedMedia(item.id, 'image', item.images[0], item.turns[0][1])
    if sound_dir:
        yield from read_sound_folder(sound_dir, sound_captions, bad_samples)


def read_captions():
    """The Captions of all lists."""
    captions = Captions(work)
    unique = UniqueIds()                               # over all lists: each may have the ids of another
    for caption in captioned_media():
        captions.add(caption, unique(caption.id))
    captions.close()
    return captions


def usable_media(captions, hashes, reasons):
    """The Media of the captions that can be used. hashes, reasons: of hash_media."""
    wanted = np.ones(len(captions), bool)
    paths = list(captions.paths)
    for n, path_number in enumerate(captions.path_of):
        path, modality = paths[path_number]
        reason = reasons.get(path_number)
        if modality not in grammar.payload_ranges:
            reason = reason or f'{path}: {audit_dir} has no {modality} in its token space'
        if reason:
            id, _ = captions[n]
            bad_samples.add(id, BadSample(reason), key=f'caption {n}')
            wanted[n] = False
    if not wanted.any():
        raise SystemExit('no usable sample: set manifests, data_json or sound_dir to data that exists')
    return Media(captions, hashes, wanted)


work = out / 'plan'                                    # what the ranks share while they work
bad_samples = BadSamples(out / 'bad_samples.jsonl', max_bad_samples, active=rank == 0)
if rank == 0:
    captions = read_captions()
barrier()
hashes, reasons = hash_media(work, threads)            # every rank its part
if rank == 0:
    media = usable_media(captions, hashes, reasons)


def read(file):
    """uint8 (3, H, W) pixels, or float32 (n,) samples; raises BadSample."""
    if file.modality == 'image':
        return read_image(file.path, space.image['size'])
    return read_audio(file.path, space.audio['sample_rate'], space.audio['samples'])


def text_ids(file, id, text):
    """The ids of one of its captions; raises BadSample when the longest of its documents is too long."""
    ids = np.asarray(uti.encode_text(text), np.int32)
    length = len(ids) + grammar.length(file.modality) + 3          # two markers, an end
    if length > max_seq_len:
        raise BadSample(f'{file.path}: id {id} takes {length} ids, wanted at most '
                        f'max_seq_len = {max_seq_len}')
    return ids


# -----------------------------------------------------------------------------
# the plan: which file goes into which split and shard


def draw(purpose, key):
    """A number in [0, 1) that the seed and the key, the sha256 of a file, decide: no order of files, no rank."""
    digest = hashlib.sha256(f'{purpose} {split_seed} {key}'.encode()).digest()
    return int.from_bytes(digest[:8], 'big') / 2**64


def is_usable(n):
    """Whether media file n can be read and its first caption fits: those that are counted have to, the shards of others
    say why not."""
    file = media[n]
    try:
        read(file)
        text_ids(file, *file.captions[0])
    except BadSample:
        return False
    return True


def in_drawn_order(purpose, numbers):
    """[(what is drawn for it, the media file's number)]"""
    return sorted((draw(purpose, media.sha256(n)), n) for n in numbers)


def split_modality(modality):
    """{split: numbers of its media files of a modality}."""
    numbers = [n for n in range(len(media)) if media.modality(n) == modality]
    golden = []
    for _, n in in_drawn_order('golden', numbers):
        if len(golden) == n_golden:
            break
        if is_usable(n):
            golden.append(n)
    train = []
    held_out = []
    n_usable = 0
    for drawn, n in in_drawn_order('eval', set(numbers) - set(golden)):
        if n_usable >= n_eval and drawn >= eval_share:
            train.append(n)
            continue
        held_out.append(n)
        if n_usable < n_eval and is_usable(n):         # no more are looked at than are wanted
            n_usable += 1
    if len(golden) < n_golden or n_usable < n_eval or not held_out or not train:
        raise SystemExit(f'{len(numbers)} media files of {modality}: {len(train)} to train on, {n_usable} of {n_eval} '
                         f'to evaluate on and {len(golden)} of {n_golden} golden; add data or change n_eval and '
                         'n_golden')
    return {'train': train, 'eval': held_out, 'golden': golden}


def choose():
    """{split: numbers of its media files, in the order of its shards, whatever order they came in}."""
    chosen = {split: [] for split in SPLITS}
    for modality in media.modalities():
        for split, numbers in split_modality(modality).items():
            chosen[split] += numbers
    return {split: [n for _, n in in_drawn_order('order', numbers)] for split, numbers in chosen.items()}


def planned(split, n):
    """Media file n as its shard has it."""
    file = media[n]
    if split != 'train':                               # held out with one caption, which the seed decides
        file.captions.sort(key=lambda caption: draw('caption', caption[0]))
    return file


def plan_shards(chosen):
    """Write what goes into each shard; returns their names and a sha256 over it all."""
    names = []
    digest = hashlib.sha256(b'[')                      # of one list of all files, which is never in memory
    comma = b''
    for split, numbers in chosen.items():
        for k, part in enumerate(in_parts(numbers, shard_media)):
            names.append(f'{split}-{k:05d}')
            files = [planned(split, n) for n in part]
            write_planned(work, names[-1], files)
            for file in files:
                digest.update(comma + canonical((file.sha256, file.modality, file.captions)).encode())
                comma = b','
    digest.update(b']')
    return names, digest.hexdigest()


names = samples_sha256 = None
if rank == 0:
    chosen = choose()
    names, samples_sha256 = plan_shards(chosen)
    plan = {
        'token_space': space.sha256,
        'shard_media': shard_media,
        'max_seq_len': max_seq_len,
        'n_golden': n_golden,
        'n_eval': n_eval,
        'eval_share': eval_share,
        'split_seed': split_seed,
        'n_media': len(media),
        'n_items': media.n_captions,
        'samples_sha256': samples_sha256,
    }
    if (out / 'plan.json').exists():
        space.require(TokenSpace.load(out / 'token_space.json'), out_dir)
        for key, value in read_sealed(out / 'plan.json', 'build_b2.py').items():
            if plan.get(key) != value:
                raise SystemExit(f'{out_dir} holds shards with {key} = {value!r}, this run has {plan.get(key)!r}: '
                                 'remove it or set another out_dir')
    space.save(out / 'token_space.json')
    write_sealed(out / 'plan.json', plan)
    sizes = ', '.join(f'{len(numbers)} to {split}' for split, numbers in chosen.items())
    print(f'{plan["n_items"]} items, {len(media)} media files: {sizes}, in {len(names)} shards')
    del captions, media, chosen                        # what goes into each shard is on disk
    for path in work.glob('*.taken'):                  # of a start before this one
        path.unlink()
barrier()
names, samples_sha256 = from_rank_0((names, samples_sha256))
del hashes, reasons

# -----------------------------------------------------------------------------
# encode


def read_or_reason(file):
    try:
        return read(file)
    except BadSample as e:
        return e


def batches_of(names):
    """(name, files of its shard, those of a batch, whether it is the shard's last) of all shards, one after another."""
    for name in names:
        files = read_planned(work, name)
        batches = []
        for modality in ENCODE:
            batches += in_parts([file for file in files if file.modality == modality], batch_size)
        for n, batch in enumerate(batches):
            yield name, files, batch, n == len(batches) - 1


def read_ahead(batches):
    """Every one of batches_of with the array, or the BadSample, of each file; the next one is being read meanwhile."""
    current = None
    for following in batches:
        reading = [threads.submit(read_or_reason, file) for file in following[2]]
        if current is not None:
            yield *current[0], [future.result() for future in current[1]]
        current = following, reading
    if current is not None:
        yield *current[0], [future.result() for future in current[1]]


def encode(batch, arrays):
    """{sha256: (codes, meta), or the BadSample} of a batch's files."""
    encoded = dict(zip([file.sha256 for file in batch], arrays))       # the reason of a bad one stays
    whole = [file for file in batch if not isinstance(encoded[file.sha256], BadSample)]
    if whole:                                          # they keep their ids without the bad ones
        codes, metas = ENCODE[whole[0].modality]([encoded[file.sha256] for file in whole])      # (B, N) or (B, F K)
        encoded.update(zip([file.sha256 for file in whole], zip(codes, metas)))
    return encoded


def make_shard(name, files, encoded):
    """Write a shard; returns the numbers of media and of captions in it. encoded: as encode returns it, by modality."""
    media = []
    captions = []
    skipped = []
    for file in files:
        texts = []
        result = encoded[file.modality, file.sha256]
        for id, text in file.captions:
            try:
                if isinstance(result, BadSample):
                    raise result
                texts.append((id, text_ids(file, id, text)))
            except BadSample as e:
                skipped.append((id, str(e)))
                too_many.add(id, e, key=f'shard {id}')
        if not name.startswith('train'):               # held out once, whatever the number of its captions
            texts = texts[:1]
        if texts:
            codes, meta = result
            captions += [Caption(id, len(media), ids) for id, ids in texts]
            media.append(Medium(file.sha256, file.modality, codes, meta))
    write_shard(out, name, space, media, captions, skipped=skipped, plan=samples_sha256)
    return len(media), len(captions)


def is_finished(name):
    """Whether this shard is whole and of this plan."""
    try:
        side = read_sealed(out / f'{name}.json', 'build_b2.py')
        check_shard(out, name, side['shard_sha256'], space)
    except SystemExit:
        return False
    return side['plan'] == samples_sha256


finished = [is_finished(name) for name in names[rank::world_size]]
barrier()
finished = gather_in_order(finished)
missing = [name for name, is_there in zip(names, finished) if not is_there]
# ends the run as soon as a rank has met too many; bad_samples.jsonl is written in the end, from all shards
too_many = BadSamples(out / 'bad_samples.jsonl', max_bad_samples, active=False)
too_many.entries |= from_rank_0(bad_samples.entries)
wait_at_most(timeout)                                  # until here a day: every file had to be read
n_made_media = 0
n_made_captions = 0
start = time.perf_counter()                            # a clock that nobody sets back
shown = Progress(len(missing), 'shards', active=rank == 0)
encoded = {}                                           # of the shard at work
for name, files, batch, is_last, arrays in read_ahead(batches_of(take_shards(work, missing))):
    for sha256, result in encode(batch, arrays).items():
        encoded[batch[0].modality, sha256] = result
    if is_last:
        n_media, n_captions = make_shard(name, files, encoded)
        n_made_media += n_media
        n_made_captions += n_captions
        encoded = {}
        shown.update(world_size)                       # the other ranks are about as far
shown.close()
seconds = time.perf_counter() - start
barrier()                                              # of the last shards some take longer
seconds = max(all_gather(seconds))
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


if rank == 0:
    splits = {}
    ids_of = {}
    media_of = {}
    for split in SPLITS:
        entries = []
        ids_of[split] = []
        media_of[split] = []
        for name in names:
            if not name.startswith(split):
                continue
            side = read_sealed(out / f'{name}.json', 'build_b2.py')
            for id, reason in side['skipped']:
                bad_samples.add(id, reason, key=f'shard {id}')
            entries.append(entry(side))
            ids_of[split] += side['items']
            media_of[split] += [bytes.fromhex(sha256) for sha256 in side['media']]     # a third of the text's memory
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


def decodes(records):
    """Whether the codes of records of one modality become pictures or waves of the right size, all of it finite."""
    try:
        decoded = DECODE[records[0].modality](np.stack([record.payload for record in records]),
                                              [record.meta for record in records])
    except SystemExit:                                 # an id out of range, another rate, NaN
        return False
    for record, array in zip(records, decoded):
        shape = (3, space.image['size'], space.image['size'])
        if record.modality == 'audio':
            shape = (record.meta['n_samples'],)
        if array.shape != shape or not np.isfinite(array).all():
            return False
    return True


index, _ = read_index(out, space)
entries = []
for split in SPLITS:
    entries += index['splits'][split]['shards']
checked = check_shards(out, entries, space)
wrong_shards = [line for line in checked if isinstance(line, str)]
records = Records(out, [], [])                         # nothing can be looked at, and those gates fail too
if not wrong_shards:
    records = Records(out, [entry['name'] for entry in entries], checked)


def file_of(record):
    """The File of a record."""
    for file in read_planned(work, record.side()['name']):
        if (file.sha256, file.modality) == (record.media_sha256, record.modality):
            return file


count = Counter()
for modality in ENCODE:
    of_one = records.of(modality)
    spread = np.linspace(0, len(of_one) - 1, min(n_checked, len(of_one))).round().astype(int)
    spread = np.random.default_rng(0).permutation(spread)      # beside other files than they were encoded with
    for part in in_parts(spread[rank::world_size], batch_size):
        of_part = [of_one[n] for n in part]
        codes, _ = ENCODE[modality]([read(file_of(record)) for record in of_part])
        count['checked'] += len(of_part)
        for record, again in zip(of_part, codes):
            count['mismatches'] += not np.array_equal(again, record.payload)
        if not decodes(of_part):                       # one by one: which of them
            count['wrong_decodes'] += sum(not decodes([record]) for record in of_part)

lengths = {}                                           # task: of its documents, on all ranks
for task, (modality, _) in TASKS.items():
    of_task = records.of(modality)
    of_rank = []
    for part in in_parts(range(rank, len(of_task), world_size), 64):
        examples = [token_example(of_task[i], task, grammar, max_seq_len) for i in part]
        batch = collate(examples)
        count['unlabelled'] += len(examples) - len(np.unique(batch.label_examples))
        count['truncated'] += sum(example.truncated for example in examples)
        of_rank += [len(example) for example in examples]
    lengths[task] = np.concatenate(all_gather(np.array(of_rank, np.int32)))
total = {name: int(all_sum(count[name])) for name in ('checked', 'mismatches', 'wrong_decodes', 'unlabelled',
                                                      'truncated')}

# -----------------------------------------------------------------------------
# report and gates

status = 0
if rank == 0:
    for path in work.iterdir():                        # every start plans anew, but for the hashes
        if not path.name.startswith('media.'):
            path.unlink()
    skipped = []
    if bad_samples.keys:
        skipped = [json.loads(line) for line in (out / 'bad_samples.jsonl').read_text().splitlines()]
    length_report = {}
    for task, of_task in lengths.items():
        if len(of_task):
            length_report[task] = {'items': len(of_task), 'mean': round(float(np.mean(of_task)), 1)}
            for q in (0, 5, 25, 50, 75, 95, 99, 100):
                length_report[task][f'p{q}'] = int(np.percentile(of_task, q))
    bytes_of = {}
    for split in SPLITS:
        bytes_of[split] = sum(shard['bytes'] for shard in index['splits'][split]['shards'])
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
barrier()
status = int(all_sum(status))
shutdown_ranks()
sys.exit(status)
