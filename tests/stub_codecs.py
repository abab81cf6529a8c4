"""Codecs that can be worked out by hand, in the place of real ones: `python tests/stub_codecs.py SCRIPT ARGUMENTS`.

A picture of 4 x 4 is 2 x 2 codes, the mean of each patch in 16 steps; a second of sound at 8 Hz is 4 frames of two
codebooks, each sample in 8 steps.
"""
import os
import runpy
import sys
import time
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import uti  # noqa: E402

IMAGE = {'class': 'StubImage', 'settings': {}, 'sha256': 'cd', 'size': 4, 'grid': [2, 2], 'codes': 16}
AUDIO = {'class': 'StubAudio', 'settings': {}, 'sha256': 'ef', 'sample_rate': 8, 'samples': 8, 'frames': 4,
         'codebooks': 2, 'codes': 8}


BASE = {'name': 'tiny', 'text_rows': 320, 'tokenizer_sha256': 'ab', 'end_of_text': 299}


class StubUTI:
    """encode_* and decode_* of the real one. STUB_SECONDS makes every call that slow, so that a test can interrupt."""
    def __init__(self, space, tokenizer):
        self.space, self.tokenizer, self.image_codec, self.audio_codec = space, tokenizer, None, None
        self.books = np.tile([space['audio_0'].first, space['audio_1'].first], 4) if space.audio else None

    @classmethod
    def build(cls, llm, image_codec='', audio_codec='', **sizes):
        return cls(uti.TokenSpace(BASE, IMAGE, AUDIO), AutoTokenizer.from_pretrained(llm))

    of_space = classmethod(uti.UTI.of_space.__func__)

    def encode_text(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_image(self, images):
        time.sleep(float(os.environ.get('STUB_SECONDS', 0)))
        patches = np.stack(images).astype(float).mean(1).reshape(-1, 2, 2, 2, 2).mean((2, 4)).reshape(-1, 4)
        return (patches // 16).astype(np.int32) + self.space['image'].first, [{'size': 4} for _ in images]

    def decode_image(self, ids, metas):
        self.space.check(ids, 'image')
        pixels = (np.asarray(ids) - self.space['image'].first) * 16
        return [np.broadcast_to(p.reshape(2, 2).repeat(2, 0).repeat(2, 1), (3, 4, 4)).astype(np.uint8) for p in pixels]

    def encode_audio(self, waves):
        metas = [{'n_samples': len(w), 'sample_rate': 8} for w in waves]
        steps = np.stack([np.pad(w, (0, 8 - len(w))) for w in waves]).clip(-1, 0.999) * 4 + 4
        return steps.astype(np.int32) + self.books.astype(np.int32), metas

    def decode_audio(self, ids, metas):
        return [((row - self.books - 4) / 4).astype(np.float32)[:m['n_samples']] for row, m in zip(ids, metas)]


def put_in_place():
    uti.UTI = StubUTI


if __name__ == '__main__':
    put_in_place()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name='__main__')
