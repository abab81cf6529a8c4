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

BASE = {'name': 'tiny', 'text_rows': 320, 'tokenizer_sha256': 'ab', 'end_of_text': 299}
IMAGE = {'class': 'StubImage', 'settings': {}, 'sha256': 'cd', 'size': 4, 'grid': [2, 2], 'codes': 16}
AUDIO = {'class': 'StubAudio', 'settings': {}, 'sha256': 'ef', 'sample_rate': 8, 'samples': 8, 'frames': 4,
         'codebooks': 2, 'codes': 8}


class StubUTI:
    """encode_* and decode_* of the real one. STUB_SECONDS makes every call that slow, so that a test can interrupt."""
    def __init__(self, space, tokenizer):
        self.space = space
        self.tokenizer = tokenizer
        self.image_codec = None
        self.audio_codec = None
        if space.audio:
            self.book_starts = np.tile([space['audio_0'].first, space['audio_1'].first], 4).astype(np.int32)   # (F K,)

    @classmethod
    def build(cls, llm, image_codec='', audio_codec='', **sizes):
        return cls(uti.TokenSpace(BASE, IMAGE, AUDIO), AutoTokenizer.from_pretrained(llm))

    of_space = classmethod(uti.UTI.of_space.__func__)

    def encode_text(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_image(self, images):
        time.sleep(float(os.environ.get('STUB_SECONDS', 0)))
        gray = np.stack(images).astype(float).mean(1)                              # (B, 4, 4)
        patches = gray.reshape(-1, 2, 2, 2, 2).mean((2, 4)).reshape(-1, 4)         # (B, N)
        return (patches // 16).astype(np.int32) + self.space['image'].first, [{'size': 4} for _ in images]

    def decode_image(self, ids, metas):
        self.space.check(ids, 'image')
        pixels = (np.asarray(ids) - self.space['image'].first).reshape(-1, 1, 2, 2) * 16
        whole = pixels.repeat(3, 1).repeat(2, 2).repeat(2, 3)                      # (B, 3, 4, 4)
        return list(whole.astype(np.uint8))

    def encode_audio(self, waves):
        metas = [{'n_samples': len(wave), 'sample_rate': 8} for wave in waves]
        clips = np.stack([np.pad(wave, (0, 8 - len(wave))) for wave in waves])
        steps = clips.clip(-1, 0.999) * 4 + 4                                      # (B, F K)
        return steps.astype(np.int32) + self.book_starts, metas

    def decode_audio(self, ids, metas):
        waves = ((np.asarray(ids) - self.book_starts - 4) / 4).astype(np.float32)
        return [wave[:meta['n_samples']] for wave, meta in zip(waves, metas)]


def put_in_place():
    uti.UTI = StubUTI


if __name__ == '__main__':
    put_in_place()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name='__main__')
