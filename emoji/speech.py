"""
The names of the emoji as espeak-ng says them, for Track B's sounds. It comes with the package espeakng-loader, the
library and its voices (GPL 3): pip install '.[emoji]'

reads   data/emoji/{captions,eval_new}.json
writes  data/emoji/speech/audio/*.wav, 8 kHz; manifest.jsonl, of the names to learn from; new.jsonl, of the others

$ python -m emoji.speech

One pitch without melody: a period of 10 ms, so that a codec's frames of 50 ms begin at the same place of it. Two
codebooks then carry what takes more than four when the pitch moves.
"""
import ctypes
import json

import numpy as np

from common import progress, write_atomic
from emoji.pictures import ROOT, read_list, with_article
from media import resample

RATE = 8000
FRAME = 400                    # samples: 20 frames a second
SECONDS = 1.3                  # what is longer is left out
PITCH = 60                     # of espeak-ng's 0 .. 99: 100 Hz
VOICES = ('en-us', 'en-gb-scotland', 'en-gb-x-rp', 'en-029')
SPEEDS = (200, 230)            # words a minute
# numbers of espeak-ng's parameters
RATE_OF = 1
PITCH_OF = 3
MELODY_OF = 4


class Speaker:
    """espeak-ng, asked for samples; there can be one in a process."""
    def __init__(self):
        try:
            import espeakng_loader
        except ImportError:
            raise SystemExit("speech needs the package espeakng_loader: pip install '.[emoji]'")
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        folder = espeakng_loader.get_data_path().encode()
        retrieve = 1                                   # AUDIO_OUTPUT_RETRIEVAL: to the callback, not to a loudspeaker
        self.rate = self.library.espeak_Initialize(retrieve, 0, folder, 0)
        if self.rate <= 0:
            raise SystemExit(f'espeak-ng does not start ({self.rate}); install espeakng_loader again')
        self.parts = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = kind(self.take)                # kept: the library calls it for as long as it is there
        self.library.espeak_SetSynthCallback(self.callback)

    def take(self, samples, n, _):
        if samples and n:
            self.parts.append(np.ctypeslib.as_array(samples, (n,)).copy())
        return 0

    def say(self, text, voice, speed):
        """float32 (n,) at RATE."""
        self.parts.clear()
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SystemExit(f'espeak-ng has no voice {voice!r}: see VOICES')
        for parameter, value in (RATE_OF, speed), (PITCH_OF, PITCH), (MELODY_OF, 0):
            self.library.espeak_SetParameter(parameter, value, 0)
        spoken = text.encode()
        utf8 = 1
        self.library.espeak_Synth(spoken, len(spoken) + 1, 0, 0, 0, utf8, None, None)
        self.library.espeak_Synchronize()
        return resample(np.concatenate(self.parts).astype(np.float32) / 2 ** 15, self.rate, RATE)


def names_of(name):
    """The names in a list of emoji.pictures, each once."""
    return sorted({record['thing']['name'] for record in read_list(name)})


def write_speech(speaker, names, manifest):
    """WAV files of these names in all voices and speeds, and their manifest; returns how many they are."""
    import soundfile
    folder = ROOT / 'speech'
    (folder / 'audio').mkdir(parents=True, exist_ok=True)
    lines = []
    for name in progress(names, manifest):
        for voice in VOICES:
            for speed in SPEEDS:
                wave = speaker.say(name, voice, speed)
                if len(wave) > SECONDS * RATE:
                    continue
                id = f'{name.replace(" ", "_").replace(":", "")}-{voice}-{speed}'
                soundfile.write(folder / 'audio' / f'{id}.wav', wave, RATE, subtype='PCM_16')
                lines.append({'id': id, 'source': 'speech', 'audio': f'audio/{id}.wav', 'text': with_article(name)})
    write_atomic(folder / manifest, ''.join(json.dumps(line) + '\n' for line in lines))
    return len(lines)


if __name__ == '__main__':
    speaker = Speaker()
    known = names_of('captions')
    print(f'{write_speech(speaker, known, "manifest.jsonl")} sounds of {len(known)} names')
    new = [name for name in names_of('eval_new') if name not in known]
    print(f'{write_speech(speaker, new, "new.jsonl")} sounds of {len(new)} names that nobody learns')
