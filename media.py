"""
Media: pictures and sounds from files of the field, read to their end, and the samples that had to be left out.
"""
import io
import json
import math
import textwrap
import warnings
from pathlib import Path

import numpy as np
import soxr
from PIL import Image, ImageDraw, ImageFile, ImageOps

from common import write_atomic

MAX_PIXELS = 64_000_000                                # about 8,000 x 8,000; PIL's limit only warns below twice 89 M
IMAGE_FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF')   # some phones' JPEGs are MPO; JPEG opens them
ImageFile.LOAD_TRUNCATED_IMAGES = False

# -----------------------------------------------------------------------------
# samples that cannot be used


class BadSample(SystemExit):
    """A sample that cannot be used: one line that names the file and what is wrong with it. Uncaught, it ends the run
    with that line."""


class BadSamples:
    """Samples that were left out, and why: bad_samples.jsonl. More than max_bad_samples of them is an error."""
    def __init__(self, path, max_bad_samples, active=True):
        self.path = Path(path)
        self.limit = max_bad_samples
        self.active = active
        self.keys = set()

    def add(self, id, reason, key=None):
        """Enter a sample, once. key tells samples of one id apart."""
        if key is None:
            key = id
        if key in self.keys:
            return
        self.keys.add(key)
        if len(self.keys) > self.limit:
            raise SystemExit(f'{reason}; fix or remove it, or set max_bad_samples above {self.limit} '
                             'to skip such samples')
        if self.active:
            with open(self.path, 'a') as f:
                f.write(json.dumps({'id': id, 'reason': str(reason)}) + '\n')


# -----------------------------------------------------------------------------
# pictures


def read_image(path, size, resample=3):
    """Picture file -> uint8 (3, size, size), RGB, upright, resized as the tower's processor does.

    EXIF rotation is applied; transparency is laid on white; palettes and 16-bit gray are converted. The file is decoded
    to its end, so a truncated one is noticed. Raises BadSample with one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            # without formats Pillow hands PostScript to Ghostscript, whatever the file is called
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadSample(f'{path}: {image.width} x {image.height} pixels, wanted at most {MAX_PIXELS:,}')
                if image.format == 'PNG':
                    image.verify()                     # the checksums, which decoding leaves out ...
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                image.load()                           # ... and the whole picture, which verify leaves out
                image = upright_rgb(image)
                if image.size != (size, size):
                    image = image.resize((size, size), Image.Resampling(resample))
    except FileNotFoundError:
        raise BadSample(f'{path}: no such image')
    except Exception as e:                             # decoders fail in as many ways as files are damaged
        raise BadSample(f'{path}: not a whole image ({e})')
    return np.asarray(image).transpose(2, 0, 1).copy()                                          # (3, size, size)


def upright_rgb(image):
    """A PIL picture of any mode -> RGB, rotated as its EXIF says, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I') or image.mode == 'F':    # PIL's own convert would clip 16-bit gray at 255
        gray = np.asarray(image).astype(np.float64)
        if image.mode.startswith('I;16') or gray.max() > 255:
            gray = gray / 257
        image = Image.fromarray(gray.clip(0, 255).round().astype(np.uint8))
    if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image.convert('RGBA'))
    return image.convert('RGB')


def write_picture(path, image):
    """A PIL picture as PNG, whole or not at all."""
    content = io.BytesIO()
    image.save(content, 'PNG')
    write_atomic(path, content.getvalue())


def contact_sheet(path, images, captions, columns=8, side=160, lines=6):
    """One PNG of all pictures, files, with their captions below."""
    if not images:
        return
    cell_width = side + 8
    cell_height = side + 15 * lines + 8
    n_rows = math.ceil(len(images) / columns)
    sheet = Image.new('RGB', (columns * cell_width, n_rows * cell_height), 'white')
    pen = ImageDraw.Draw(sheet)
    for n, (image, text) in enumerate(zip(images, captions)):
        x = n % columns * cell_width + 4
        y = n // columns * cell_height + 4
        pixels = read_image(image, side).transpose(1, 2, 0)
        sheet.paste(Image.fromarray(pixels), (x, y))
        wrapped = textwrap.wrap(text, side // 6)[:lines]
        pen.text((x, y + side + 2), '\n'.join(wrapped), fill='black')
    write_picture(path, sheet)


# -----------------------------------------------------------------------------
# sounds


def write_sound(path, wave, rate):
    """float (samples,) as a WAV of 16 bits, whole or not at all."""
    import soundfile
    content = io.BytesIO()
    soundfile.write(content, wave, rate, format='WAV')
    write_atomic(path, content.getvalue())


def read_audio(path, sample_rate, clip_samples):
    """WAV, FLAC or OGG file -> float32 (n,), mono, at sample_rate, n <= clip_samples; what follows is not read.

    Channels are averaged, whole numbers come as [-1, 1], other rates are resampled. Raises BadSample with one line for
    a file that is absent, truncated, no sound, empty, silent in the clip, or holds NaN or infinity.
    """
    import soundfile
    try:
        check_wav_size(path)
        with soundfile.SoundFile(path) as f:
            rate = f.samplerate
            wanted = math.ceil(clip_samples * rate / sample_rate)
            if rate != sample_rate:
                wanted += rate // 10                   # a tenth of a second on: what the resampler's filter reaches
            wanted = min(f.frames, wanted)
            wave = f.read(wanted, dtype='float32', always_2d=True)                              # (n, channels)
    except FileNotFoundError:
        raise BadSample(f'{path}: no such sound')
    except (OSError, soundfile.SoundFileError) as e:
        raise BadSample(f'{path}: not a whole sound ({str(e).splitlines()[0]})')
    if len(wave) < wanted:
        raise BadSample(f'{path}: truncated, {len(wave)} samples where there should be {wanted}')
    if not len(wave):
        raise BadSample(f'{path}: holds no sample')
    if not np.isfinite(wave).all():
        raise BadSample(f'{path}: NaN or infinity in the samples')
    wave = resample(wave.mean(1), rate, sample_rate)[:clip_samples]
    if not np.abs(wave).max() > 1e-4:                  # 80 dB below full scale: not even 8-bit noise
        raise BadSample(f'{path}: silent in its first {clip_samples / sample_rate:g} s')
    return wave


def check_wav_size(path):
    """Raise BadSample for a WAV file shorter than its header declares: libsndfile takes what is there for all."""
    with open(path, 'rb') as f:
        head = f.read(12)
        size = f.seek(0, 2)
    declared_size = int.from_bytes(head[4:8], 'little') + 8
    is_wav = head[:4] == b'RIFF' and head[8:] == b'WAVE'
    if is_wav and 8 < declared_size < 2 ** 32 and declared_size > size:
        raise BadSample(f'{path}: truncated, {size} bytes of {declared_size}')


def resample(wave, have, want):
    """float32 (n,) at rate `have` -> (about n want / have,) at rate `want`, by soxr at its high quality."""
    if have == want:
        return wave
    return soxr.resample(wave, have, want, quality='HQ')
