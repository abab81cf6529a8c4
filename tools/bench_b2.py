"""
What tokenizing in batches gains on the codecs of a config of stage B2. Not a test: asserts no time.

The same media, read beforehand: each alone through the bare codec; each alone through UTI, which fills a batch up so
that ids never depend on batch mates; and in the batches that build_b2.py makes. The ids are asserted equal first. Runs
are interleaved in one process, medians printed.

$ python -m tools.bench_b2 configs/b2_small.py
"""
import sys
import time
from pathlib import Path

import numpy as np
import torch
from test_docs import settings_of

from configure import configure
from data import Ledger, read_audio, read_image, read_llava, read_manifest
from uti import UTI, TokenSpace

N, ROUNDS = 64, 7

s = configure(settings_of('build_b2.py'), sys.argv[1:])
space, ledger = TokenSpace.load(Path(s['audit_dir']) / 'token_space.json'), Ledger('bad.jsonl', 0, active=False)
uti = UTI.of_space(space, s['audit_dir'], s['llm'], s['image_codec'], s['audio_codec'], s['image_prefix'],
                   s['audio_prefix'])
images = [item.image for item in read_llava(s['data_json'], s['image_root'], ledger, True)]
sounds = list(dict.fromkeys(pair.path for pair in read_manifest(s['manifests'][0], ledger)))
media = {'image': [read_image(path, space.image['size']) for path in images[:N]],
         'audio': [read_audio(path, space.audio['sample_rate'], space.audio['samples']) for path in sounds[:N]]}
encode = {'image': uti.encode_image, 'audio': uti.encode_audio}


@torch.no_grad()
def bare(modality):
    """ids (N, codes), one at a time, nothing filled up and nothing checked."""
    if modality == 'image':
        ids = [uti.image_codec.to_codes(torch.from_numpy(x)[None] / 127.5 - 1) for x in media['image']]
        return torch.cat(ids).numpy() + space['image'].first
    n = space.audio['samples']
    codes = [uti.audio_codec.to_codes(torch.from_numpy(np.pad(x, (0, n - len(x))))[None]) for x in media['audio']]
    return (torch.cat(codes).transpose(1, 2).numpy() + uti.first).reshape(len(codes), -1)          # (N, F K)


def by(size):
    return lambda modality: np.concatenate(
        [encode[modality](media[modality][i:i + size])[0] for i in range(0, N, size)])


ways = {'bare codec, one at a time': bare, 'UTI, one at a time': by(1),
        f'UTI, {s["batch_size"]} at a time': by(s['batch_size'])}
print(f'{N} media, {ROUNDS} rounds, {torch.get_num_threads()} thread(s)')
for modality in media:
    ids, seconds = [way(modality) for way in ways.values()], {name: [] for name in ways}
    assert all(np.array_equal(ids[0], other) for other in ids), modality
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way(modality)
            seconds[name].append(time.perf_counter() - start)
    for name, spent in seconds.items():
        ratio = np.median(np.array(seconds['bare codec, one at a time']) / np.array(spent))
        print(f'{modality}: {name:<26} {N / np.median(spent):8.1f} a second, {ratio:.2f}x')
