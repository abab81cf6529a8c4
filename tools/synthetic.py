"""
Lists of the size and shape of real ones, and what a start of Track A does with them. No picture shows what its caption
says.

captions: LLaVA-Pretrain's JSON, a caption of 4 to 40 words for each picture, which are files of real sizes.
chats: LLaVA-Instruct's, one to five questions with answers of 1 to 150 words, two chats a picture.
start: what a start of train_a1.py or train_a2.py does with its data, and the first steps, on each rank (torchrun
--nproc_per_node=2 -m tools.synthetic ...). With another OUT it is a second start, with the same one, whose split is
there, a resume; a run of the sweep finds a split too. Needs the tokenizer of a Qwen3 and its config.json.

$ python -m tools.synthetic captions out/captions 558128
$ python -m tools.synthetic chats out/chats 157712
$ python -m tools.synthetic start out/captions caption LLM out/start
"""
import hashlib
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from common import barrier, in_parts, init_ranks, on_rank_0, progress, shutdown_ranks
from templates import ChatTemplate
from data import ShuffledSampler, choose_split, collate, data_fingerprint, deal, load_split
from examples import prepare
from media import BadSamples, read_image
from decoders import load_tokenizer

WORDS = (
    'a the of in on with and at to from two three red blue green white black old new small large man woman people '
    'child dog cat horse bird tree house street city car train boat plane table chair window door wall river sea '
    'mountain beach sky cloud sun night morning winter summer snow rain photo image picture view close-up vector '
    'illustration design pattern background logo set portrait fashion wedding party kitchen bedroom living room '
    'garden flower leaf fruit food cake coffee tea bottle glass cup plate book paper pen phone computer screen '
    'game player team match football basketball stadium award actor singer politician premiere festival museum '
    'church castle bridge tower building interior exterior modern vintage traditional wooden metal leather cotton '
    'silk dress shirt shoes bag watch ring necklace gold silver diamond during while standing sitting walking '
    'running holding looking playing eating against across behind under over near between his her their its one '
    'many few beautiful happy young little long short high dark bright colorful isolated seamless abstract').split()
TINY_JPEG = bytes.fromhex(                             # 1 x 1 pixel, gray
    'ffd8ffdb004300' + '01' * 64 + 'ffc0000b080001000101011100ffc40014000100000000000000000000000000000009ffc400141001'
    '00000000000000000000000000000000ffda0008010100003f0054ffd9')


def text(rng, n_words):
    """Words as often as Zipf has them, now and then a number or a name that no vocabulary knows as one token."""
    ranks = np.minimum(rng.zipf(1.3, n_words) - 1, 10 * len(WORDS))
    words = []
    for rank in ranks.tolist():
        words.append(WORDS[rank] if rank < len(WORDS) else f'{WORDS[rank % len(WORDS)].title()}{rank}')
    return ' '.join(words)


def picture(path, n, n_bytes):
    """A JPEG of so many bytes that is like no other one; what follows the picture takes no place on the disk."""
    comment = b'\xff\xfe\x00\x0a' + n.to_bytes(8, 'big')
    with open(path, 'wb') as f:
        f.write(TINY_JPEG[:2] + comment + TINY_JPEG[2:])
        f.truncate(max(n_bytes, f.tell()))


def caption(rng, n):
    n_words = int(np.clip(rng.lognormal(2.5, 0.45), 4, 40))
    turns = [{'from': 'human', 'value': 'Describe the image concisely.\n<image>'},
             {'from': 'gpt', 'value': text(rng, n_words)}]
    return {'id': f'{n:09d}', 'image': f'{n // 1000:05d}/{n:09d}.jpg', 'conversations': turns}


def chat(rng, n):
    turns = []
    for k in range(rng.choice([1, 2, 3, 4, 5], p=[0.6, 0.05, 0.1, 0.15, 0.1])):
        mark = '<image>\n' if k == 0 else ''
        turns.append({'from': 'human', 'value': mark + text(rng, rng.integers(5, 20)) + '?'})
        n_words = int(np.clip(rng.lognormal(3.9, 0.7), 1, 150))
        turns.append({'from': 'gpt', 'value': text(rng, n_words) + '.'})
    n_picture = n // 2
    return {'id': f'{n_picture:012d}', 'image': f'{n_picture:012d}.jpg', 'conversations': turns}


def write_list(folder, kind, n):
    """folder/{data.json,images/} of n samples."""
    folder = Path(folder)
    make = {'captions': caption, 'chats': chat}[kind]
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(10.6, 0.6, n), 1000, 10**6).astype(int)   # half of them below 40 kB
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'data.json', 'w') as f:
        for k in progress(range(n), kind):
            record = make(rng, k)
            f.write(('[' if k == 0 else ',\n') + json.dumps(record))
            path = folder / 'images' / record['image']
            if k % 1000 == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                picture(path, k, int(sizes[k]))
        f.write(']\n')


def memory_mb(path='/proc/self/smaps_rollup'):
    """{kind: MB} of what this process alone has in memory. Private_Clean is pages of files, which the system takes back
    where it needs them."""
    sizes = {}
    for line in Path(path).read_text().splitlines():
        name, number, *_ = line.split()
        if name.startswith('Private_'):
            sizes[name.strip(':')] = int(number) / 1024
    return sizes


def start(folder, kind, llm, out):
    """The data part of train_a1.py and train_a2.py, and what it took on this rank."""
    rank, world_size, _ = init_ranks('cpu')
    template = ChatTemplate(load_tokenizer(llm), 64, 512 if kind == 'caption' else 2048)
    before = memory_mb()
    cpu = time.process_time()
    began = time.perf_counter()

    def say(what):
        grown = ', '.join(f'{name} {mb - before[name]:+.0f} MB' for name, mb in memory_mb().items())
        print(f'rank {rank}, {what}: {time.process_time() - cpu:.1f} CPU s, {time.perf_counter() - began:.0f} s by the '
              f'clock, {grown}', flush=True)

    folder = Path(folder)
    split = Path(out) / 'split.json'
    Path(out).mkdir(exist_ok=True)
    bad_samples = BadSamples(split.with_name('bad_samples.jsonl'), 500, active=rank == 0)
    examples = prepare(kind, folder / 'data.json', template, bad_samples, rank=rank, image_root=folder / 'images')
    say('examples')
    if rank == 0:
        edges = (10, 20) if kind == 'caption' else (64, 128)
        choose_split(examples, 512, 64, edges, path=split, bad_samples=bad_samples, read=partial(read_image, size=8))
        say('split')
    barrier()
    train_set, *_ = load_split(examples, split, 512)
    on_rank_0(data_fingerprint, examples, split)
    say('all of a start')
    sampler = ShuffledSampler(train_set, 256, seed=1)
    ids = [example.item.id for example in sampler.step(0)]     # draws the order of the first epoch
    start = time.process_time()
    for n in range(1, 10):
        examples = sampler.step(n)
        for part in in_parts(deal(examples, world_size)[rank], 32):
            collate(part, num_image_tokens=64)         # all of the loader's work but the pictures
        ids += [example.item.id for example in examples]
    ms = 1000 * (time.process_time() - start) / 9
    say(f'ten steps, samples {hashlib.sha256(" ".join(ids).encode()).hexdigest()[:12]}, {ms:.0f} CPU ms a step of 256')
    n_read = Path('/proc/self/io').read_text().split()[1]
    print(f'rank {rank}: {int(n_read) / 2**20:,.0f} MB read')
    barrier()
    shutdown_ranks()


if __name__ == '__main__':
    match sys.argv[1:]:
        case ['captions' | 'chats' as kind, folder, n]:
            write_list(folder, kind, int(n))
        case ['start', folder, kind, llm, out]:
            start(folder, kind, llm, out)
        case _:
            raise SystemExit(__doc__.strip())
