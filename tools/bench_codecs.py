"""
What batches gain in stage B2: the media of one of its configs as ids, each alone through the bare codec, each alone
through UTI, which fills a batch up so that ids never depend on batch mates, and in the batches that build_b2.py makes.

The ids are asserted equal first. The ways take turns; medians of CPU seconds, or of a GPU's.

$ python -m tools.bench_codecs configs/b2_small.py
"""
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from configure import configure
from common import in_parts
from lists import read_llava
from media import BadSamples, read_audio, read_image
from shards import read_manifest
from tools.bench import seconds
from uti import UTI, TokenSpace

N_MEDIA = 64                                           # in each modality


def settings_of(script, arguments):
    """A script's settings after config files and --key=value: its lines above configure(), and then configure()."""
    # nothing but imports and literals stands there, so running it does no work
    source = Path(script).read_text()
    namespace = {'__file__': script}
    exec(source[:source.index('config = configure(')], namespace)
    return configure(namespace, arguments)


@torch.no_grad()
def bare_images(uti, images):
    """ids (N, codes), one at a time, nothing filled up and nothing checked."""
    codes = [uti.image_codec.to_codes(torch.from_numpy(image)[None] / 127.5 - 1) for image in images]
    return torch.cat(codes).numpy() + uti.space['image'].first


@torch.no_grad()
def bare_sounds(uti, waves):
    codes = []
    for wave in waves:
        clip = np.pad(wave, (0, uti.space.audio['samples'] - len(wave)))
        codes.append(uti.audio_codec.to_codes(torch.from_numpy(clip)[None]))                    # (1, K, F)
    return (torch.cat(codes).transpose(1, 2).numpy() + uti.book_starts).reshape(len(waves), -1)   # (N, F K)


def through_uti(encode, media, batch_size):
    return np.concatenate([encode(part)[0] for part in in_parts(media, batch_size)])            # (N, codes)


def compare_encoders(modality, bare, encode, media, batch_size, n):
    """Assert that the ids are the same, then print what each way to them takes."""
    variants = {
        'bare codec, one at a time': lambda: bare(media),
        'UTI, one at a time': lambda: through_uti(encode, media, 1),
        f'UTI, {batch_size} at a time': lambda: through_uti(encode, media, batch_size)}
    wanted, *others = [ids_of() for ids_of in variants.values()]
    assert all(np.array_equal(wanted, other) for other in others), modality
    times = seconds(variants, n)
    for name, spent in times.items():
        ratio = np.median(times['bare codec, one at a time'] / spent)
        print(f'{modality}: {name:<26} {len(media) / np.median(spent):8.1f} a second, {ratio:.2f}x')


def compare_codecs(arguments, n=7):
    settings = settings_of('build_b2.py', arguments)
    audit_dir = settings['audit_dir']
    space = TokenSpace.load(Path(audit_dir) / 'token_space.json')
    uti = UTI.of_space(space, audit_dir, settings['llm'], settings['image_codec'], settings['audio_codec'],
                       image_prefix=settings['image_prefix'], audio_prefix=settings['audio_prefix'])
    bad_samples = BadSamples('bad.jsonl', 0, active=False)   # not active: writes no file
    items = read_llava(settings['data_json'], settings['image_root'], bad_samples, captions=True)
    images = [read_image(item.images[0], space.image['size']) for item in items[:N_MEDIA]]
    sounds = {media.path: None for media in read_manifest(settings['manifests'][0], bad_samples)}   # each file once
    waves = []
    for path in list(sounds)[:N_MEDIA]:
        waves.append(read_audio(path, space.audio['sample_rate'], space.audio['samples']))
    print(f'{N_MEDIA} media, {n} rounds, {torch.get_num_threads()} thread(s)')
    batch_size = settings['batch_size']
    compare_encoders('image', partial(bare_images, uti), uti.encode_image, images, batch_size, n)
    compare_encoders('audio', partial(bare_sounds, uti), uti.encode_audio, waves, batch_size, n)


if __name__ == '__main__':
    compare_codecs(sys.argv[1:])
