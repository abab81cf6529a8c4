"""
Shards of random codes, as many as a real run has: what it takes to start on them and to make a step's examples.

reads   nothing; out_dir, when it is there already
writes  out_dir/, as build_b2.py does
done    when it has printed seconds, CPU seconds, private memory and the time of a step, of each rank

$ python -m tools.many_shards --out_dir=out/many --pictures=10000 --clips=5000
$ torchrun --standalone --nproc_per_node=2 -m tools.many_shards --out_dir=out/many --pictures=10000 --clips=5000
"""
import re
import time
from pathlib import Path

import numpy as np

from common import all_gather, barrier, init_ranks, progress, write_sealed
from configure import configure
from shards import Caption, Medium, MixtureSampler, token_sets, write_shard
from uti import Grammar, TokenSpace

# -----------------------------------------------------------------------------
# settings; override any with --key=value
out_dir = ''                   # a folder for the shards: 1 M pictures and 500 k clips take 5 GB
pictures = 1_000_000
clips = 500_000
picture_side = 24              # a picture is the square of this many codes
clip_frames = 125              # a clip is this many frames of 8 codes: ten seconds of Mimi
shard_media = 512
held_out = 512                 # of each modality
global_batch_size = 256
n_steps = 20
config = configure(globals(), required=('out_dir',))
# -----------------------------------------------------------------------------

rank, world_size, _ = init_ranks('cpu')
out = Path(out_dir)
space = TokenSpace(
    base={'name': 'random', 'text_rows': 151_936, 'tokenizer_sha256': '', 'end_of_text': 151_645},
    image={'class': '', 'settings': {}, 'sha256': '', 'size': 384, 'grid': [picture_side, picture_side],
           'codes': 16_384},
    audio={'class': '', 'settings': {}, 'sha256': '', 'sample_rate': 24_000, 'samples': 1920 * clip_frames,
           'frames': clip_frames, 'codebooks': 8, 'codes': 2048})
grammar = Grammar(space)
METAS = {'image': {'size': 384}, 'audio': {'n_samples': 1920 * clip_frames, 'sample_rate': 24_000}}


def make_shard(name, n_pictures, n_clips, rng):
    """Its entry in the index."""
    media = []
    captions = []
    for modality, n in ('image', n_pictures), ('audio', n_clips):
        first, end = grammar.bounds(grammar.payload_ranges[modality])
        for codes in rng.integers(first, end, (n, len(first)), dtype=np.int32):
            text = rng.integers(0, 150_000, rng.integers(8, 40), dtype=np.int32)
            captions.append(Caption(f'{name} {len(media)}', len(media), text))
            media.append(Medium(rng.bytes(32).hex(), modality, codes, METAS[modality]))
    side = write_shard(out, name, space, media, captions)
    return {'name': name, 'sha256': side['shard_sha256'], 'media': len(media), 'items': len(captions)}


def make_split(split, n_pictures, n_clips):
    """Pictures and clips in every shard, as the hash of B2 mixes them."""
    rng = np.random.default_rng([len(split), n_pictures])
    n_shards = -(-(n_pictures + n_clips) // shard_media)
    ends = np.linspace(0, [n_pictures, n_clips], n_shards + 1).astype(int)
    entries = []
    for n in progress(range(n_shards), split):
        entries.append(make_shard(f'{split}-{n:05d}', *(ends[n + 1] - ends[n]), rng))
    return {'shards': entries}


def private_mb():
    """Memory of this process alone: what it has mapped of a file, others share."""
    lines = Path('/proc/self/smaps_rollup').read_text()
    return sum(int(kb) for kb in re.findall(r'Private_\w+: +(\d+) kB', lines)) / 1024


if rank == 0 and not (out / 'index.json').exists():
    out.mkdir(parents=True, exist_ok=True)
    space.save(out / 'token_space.json')
    splits = {
        'train': make_split('train', pictures, clips),
        'eval': make_split('eval', held_out, held_out),
        'golden': make_split('golden', 64, 64),
    }
    write_sealed(out / 'index.json', {'token_space': space.sha256, 'splits': splits})
barrier()

# as train_b3.py and train_b4.py start
memory = private_mb()
start = time.perf_counter(), time.process_time()
tasks = ['i2t', 'a2t', 't2i', 't2a'] if clips else ['i2t', 't2i']
sets = {}
for split, n in ('train', None), ('eval', held_out), ('golden', 64):
    sets[split] = token_sets(out, split, tasks, grammar=grammar, max_seq_len=2048, n=n)
seconds = time.perf_counter() - start[0]
cpu = time.process_time() - start[1]

shares = {task: 1 / len(tasks) for task in tasks}
sampler = MixtureSampler(sets['train'], lambda progress: shares, n_steps, global_batch_size, seed=1, prompt_dropout=0.1)
sampler.step(0)                                        # draws the orders of the first epoch
start_steps = time.process_time()
for step in range(1, n_steps):
    sampler.step(step)
step_ms = 1000 * (time.process_time() - start_steps) / (n_steps - 1)

sizes = ', '.join(f'{len(examples):,} of {task}' for task, examples in sets['train'].items())
line = (f'{sizes}: start {seconds:.1f} s, {cpu:.1f} CPU s; {private_mb() - memory:.0f} MB private memory; '
        f'{step_ms:.0f} CPU ms for the {global_batch_size} examples of a step')
for n, of_rank in enumerate(all_gather(line)):
    if rank == 0:
        print(f'rank {n}: {of_rank}')
