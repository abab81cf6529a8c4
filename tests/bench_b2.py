"""
What tokenizing in batches gains on the codecs of a config of stage B2: the same media one at a time and in batches, in
turns in one process; the same ids are asserted first.

$ python tests/bench_b2.py configs/b2_small.py
"""
import sys
import time
from pathlib import Path

import numpy as np
import torch
from test_docs import settings_of

from configure import configure
from data import Ledger, read_audio, read_image, read_llava, read_manifest
from model import load_tokenizer
from uti import UTI, TokenSpace, load_audio_codec, load_image_codec

N, ROUNDS = 64, 7

s = configure(settings_of('build_b2.py'), sys.argv[1:])
space, ledger = TokenSpace.load(Path(s['audit_dir']) / 'token_space.json'), Ledger('/dev/null', 0, active=False)
uti = UTI(space, load_tokenizer(s['llm']), load_image_codec(s['image_codec'], s['image_codec_prefix']),
          load_audio_codec(s['audio_codec'], space.audio['samples'] / space.audio['sample_rate'],
                           s['audio_codec_prefix']))
paths = {'image': [i.image for i in read_llava(s['data_json'], s['image_root'], ledger, True)][:N],
         'audio': list(dict.fromkeys(p.path for p in read_manifest(s['manifests'][0], ledger)))[:N]}
READ = {'image': lambda path: read_image(path, space.image['size']),
        'audio': lambda path: read_audio(path, space.audio['sample_rate'], space.audio['samples'])}
ENCODE = {'image': uti.encode_image, 'audio': uti.encode_audio}


def tokenize(modality, media, size):
    """ids (N, codes) of media encoded `size` at a time."""
    return np.concatenate([ENCODE[modality](media[i:i + size])[0] for i in range(0, len(media), size)])


print(f'{N} media, {ROUNDS} rounds, {torch.get_num_threads()} thread, batches of {s["batch_size"]}')
for modality in READ:
    media = [READ[modality](path) for path in paths[modality]]
    assert np.array_equal(tokenize(modality, media, 1), tokenize(modality, media, s['batch_size']))
    seconds = {1: [], s['batch_size']: []}
    for _ in range(ROUNDS):
        for size in seconds:
            start = time.perf_counter()
            tokenize(modality, media, size)
            seconds[size].append(time.perf_counter() - start)
    alone, batched = (N / np.median(v) for v in seconds.values())
    ratio = np.median(np.array(seconds[1]) / np.array(seconds[s['batch_size']]))
    print(f'{modality}: {alone:.1f} a second one at a time, {batched:.1f} in batches, {ratio:.2f}x, the same ids')
