"""
Media: pictures and sounds from files of the field, read to their end, and the samples that had to be left out.
"""
import io
import json
import math
import mmap
import os
import re
import stat
import textwrap
import warnings
from pathlib import Path

import numpy as np
import soxr
from PIL import ExifTags, Image, ImageDraw, ImageFile, PngImagePlugin

from common import all_gather, barrier, first_line, one_line_io_errors, write_atomic

MAX_PIXELS = 64_000_000                                # about 8,000 x 8,000; PIL's limit only warns below twice 89 M
MAX_IMAGE_BYTES = 8 * MAX_PIXELS                       # as many as 16-bit RGBA takes: some formats are read whole
IMAGE_FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF')   # some phones' JPEGs are MPO; JPEG opens them
ImageFile.LOAD_TRUNCATED_IMAGES = False
PngImagePlugin.MAX_TEXT_CHUNK = 2**26                  # a text or colour profile, unpacked; PIL ends at 1 MiB
PngImagePlugin.MAX_TEXT_MEMORY = 2**28
SOUND_FORMATS = ('WAV', 'WAVEX', 'RF64', 'W64', 'AIFF', 'AU', 'CAF', 'FLAC', 'OGG', 'MP3')   # a cut one is noticed
MAX_RATE = 4_000_000                                   # a header that says more is damaged
SIZE_SLACK = 64                                        # bytes that a size may be off: some count their header twice

# -----------------------------------------------------------------------------
# samples that cannot be used


class BadSample(SystemExit):
    """A sample that cannot be used: one line that names the file and what is wrong with it. Uncaught, it ends the run
    with that line."""


class BadSamples:
    """Samples that were left out, and why: bad_samples.jsonl. More than max_bad_samples of them is an error.

    What a run that goes on has listed before counts, and is not listed again. active: on rank 0, which writes the list.
    """
    def __init__(self, path, max_bad_samples, active=True):
        self.path = Path(path)
        self.limit = max_bad_samples
        self.active = active
        self.keys = set()                              # of what this rank has met
        self.entries = set()                           # (id, reason) of all ranks, as far as they have been gathered
        if active and self.path.exists():
            for line in self.path.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    self.entries.add((entry['id'], entry['reason']))
                except (ValueError, TypeError, KeyError):
                    pass                               # a kill can leave half a line; it is met again

    def add(self, id, reason, key=None):
        """Enter a sample, once. key tells samples of one id apart."""
        if key is None:
            key = id
        entry = (id, str(reason))
        if key in self.keys or entry in self.entries:
            return
        self.keys.add(key)
        self.entries.add(entry)
        self.require_few(reason)
        if self.active:
            with one_line_io_errors(self.path), open(self.path, 'a') as f:
                f.write(json_line(entry))

    def gather(self):
        """The list of all ranks, on every rank. Between two calls each rank knows only of its own new ones."""
        barrier()                                      # rank 0 may still draw or write what came before
        had = list(self.entries)                       # at once: the loader's thread may add some meanwhile
        for part in all_gather(had):
            self.entries.update(part)
        everything = sorted(self.entries)              # the same list on any number of ranks
        if everything:
            self.require_few(everything[-1][1])
            if self.active:
                write_atomic(self.path, ''.join(json_line(entry) for entry in everything))

    def require_few(self, reason):
        if len(self.entries) > self.limit:
            raise SystemExit(f'{reason}; fix or remove it, or set max_bad_samples above {self.limit} '
                             'to skip such samples')


def json_line(entry):
    id, reason = entry
    return json.dumps({'id': id, 'reason': reason}) + '\n'


def require_file(path, kind):
    """Bytes of a file; raises BadSample for what is none: a pipe would be waited for, a device has no end."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise BadSample(f'{path}: no such {kind}')
    except (OSError, ValueError) as e:                 # ValueError: a NUL in the name
        raise BadSample(f'{path}: not a whole {kind} ({first_line(e)})')
    if not stat.S_ISREG(status.st_mode):
        raise BadSample(f'{path}: not a whole {kind} (it is no file)')
    return status.st_size


# -----------------------------------------------------------------------------
# pictures


def read_image(path, size, resample=3, shortest=0):
    """Picture file -> uint8 (3, size, size), RGB, upright, resized as the tower's processor does; with shortest, its
    shorter side gets that many pixels, and the middle is cut out.

    EXIF rotation is applied; transparency is laid on white; palettes and deep gray are converted. The file is decoded
    to its end, so a truncated one is noticed. Raises BadSample with one line.
    """
    n_bytes = require_file(path, 'image')
    if n_bytes > MAX_IMAGE_BYTES:
        raise BadSample(f'{path}: {n_bytes:,} bytes, wanted at most {MAX_IMAGE_BYTES:,}')
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
                image = upright_rgb(image)             # ... and the whole picture, which verify leaves out
                if shortest:
                    image = middle_of(image, shortest, size=size, resample=resample)
                elif image.size != (size, size):
                    image = image.resize((size, size), Image.Resampling(resample))
    except Exception as e:                             # decoders fail in as many ways as files are damaged
        raise BadSample(f'{path}: not a whole image ({first_line(e)})')
    return np.asarray(image).transpose(2, 0, 1).copy()                                          # (3, size, size)


def middle_of(image, shortest, size, resample):
    """A PIL picture with this shorter side, cut to (size, size)."""
    scaled = tuple(int(shortest * side / min(image.size)) for side in image.size)
    image = image.resize(scaled, Image.Resampling(resample))
    left, top = [(side - size) // 2 for side in scaled]
    return image.crop((left, top, left + size, top + size))


# what PIL's exif_transpose does, which also writes the EXIF anew, and fails where it cannot
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright_rgb(image):
    """A PIL picture of any mode -> RGB, rotated as its EXIF says, transparency on white."""
    image.load()                                       # PIL turns a TIFF here, which then says that it is upright
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:                                  # no EXIF that can be read, in as many ways
        turn = None
    if image.mode.startswith('I') or image.mode == 'F':
        image = Image.fromarray(gray_to_8_bits(image))
    if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image.convert('RGBA'))
    image = image.convert('RGB')
    return image if turn is None else image.transpose(turn)


def gray_to_8_bits(image):
    """Gray of 12, 16 or 32 bits or floats -> uint8 (H, W); PIL's own convert would clip it at 255.

    White is the end of the range that the header names, or of a smaller one into which all values fit: cameras leave
    12 bits in 16, programs 8 bits in 32. Floats end at 1, or hold whole numbers.
    """
    tags = getattr(image, 'tag_v2', {})                # of a TIFF; a PNG has 16 bits
    is_signed = tags.get(339, (1,))[0] == 2            # SampleFormat
    full = 2 ** (tags.get(258, (16,))[0] - is_signed) - 1              # BitsPerSample
    gray = np.asarray(image)
    if image.mode == 'I' and full == 2**32 - 1:        # PIL keeps them as signed numbers
        gray = gray.view(np.uint32)
    gray = gray.astype(np.float32)
    if not np.isfinite(gray).all():
        raise ValueError('NaN or infinity in its pixels')
    smaller = {'I': (255, 4095, 65535), 'F': (1, 255, 4095, 65535)}.get(image.mode, (4095,))
    overshoot = 1.25 if image.mode == 'F' else 1       # what sharpening leaves above white is white
    fitting = [white for white in smaller if white < full and gray.max() <= white * overshoot]
    white = min(fitting, default=full)
    scaled = gray.clip(0, white) * (255 / white)
    if tags.get(262) == 0:                             # WhiteIsZero, which PIL obeys up to 8 bits only
        scaled = 255 - scaled
    if 'transparency' in image.info:
        scaled[gray == image.info['transparency']] = 255
    return scaled.round().astype(np.uint8)


def write_picture(path, image):
    """A PIL picture as PNG, whole or not at all."""
    content = io.BytesIO()
    image.save(content, 'PNG')
    write_atomic(path, content.getvalue())


def contact_sheet(path, images, captions, columns=8, side=160, lines=6):
    """One PNG of all pictures with their captions below. images: the files of each cell, side by side in squares."""
    if not images:
        return
    cell_width = side + 8
    cell_height = side + 15 * lines + 8
    n_rows = math.ceil(len(images) / columns)
    sheet = Image.new('RGB', (columns * cell_width, n_rows * cell_height), 'white')
    pen = ImageDraw.Draw(sheet)
    for n, (files, text) in enumerate(zip(images, captions)):
        x = n % columns * cell_width + 4
        y = n // columns * cell_height + 4
        n_beside = math.ceil(len(files) ** 0.5)        # of k pictures, in rows
        each = side // max(n_beside, 1)
        for k, file in enumerate(files):
            pixels = read_image(file, each).transpose(1, 2, 0)
            sheet.paste(Image.fromarray(pixels), (x + k % n_beside * each, y + k // n_beside * each))
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
    """File of one of SOUND_FORMATS -> float32 (n,), mono, at sample_rate, n <= clip_samples; of what follows only the
    end is looked at.

    Channels are averaged, whole numbers come as [-1, 1], other rates are resampled. Raises BadSample with one line for
    a file that is absent, truncated, no sound, empty, silent in the clip, or holds NaN or infinity.
    """
    import soundfile
    n_bytes = require_file(path, 'sound')
    try:
        check_before_opening(path, n_bytes)
        with soundfile.SoundFile(with_size(path)) as f:
            rate = f.samplerate
            if f.format not in SOUND_FORMATS:
                raise BadSample(f'{path}: {f.format}, wanted one of {", ".join(SOUND_FORMATS)}')
            if rate > MAX_RATE:
                raise BadSample(f'{path}: {rate:,} samples a second, wanted at most {MAX_RATE:,}')
            check_log(path, n_bytes, f.extra_info)
            wanted = math.ceil(clip_samples * rate / sample_rate)
            if rate != sample_rate:
                wanted += max(rate // 10, 400)         # as far as the resampler's filter reaches
            wanted = min(f.frames, wanted)
            f.seekable = lambda: False                 # or it seeks after reading: an error where the end is not known
            wave = f.read(wanted, dtype='float32', always_2d=True)                              # (n, channels)
            if f.frames < 2**62:                       # FLAC from a pipe does not know
                if len(wave) < wanted:
                    raise BadSample(f'{path}: truncated, {len(wave)} samples where there should be {wanted}')
                if f.format == 'FLAC':
                    check_last_sample(path, f)
    except Exception as e:                             # decoders fail in as many ways as files are damaged
        raise BadSample(f'{path}: not a whole sound ({first_line(e)})')
    if not np.isfinite(wave).all():
        raise BadSample(f'{path}: NaN or infinity in the samples')
    wave = resample(wave.mean(1), rate, sample_rate)[:clip_samples]
    if not len(wave):
        raise BadSample(f'{path}: holds no sample')
    if not np.abs(wave).max() > 1e-4:                  # 80 dB below full scale: not even 8-bit noise
        raise BadSample(f'{path}: silent in its first {clip_samples / sample_rate:g} s')
    return wave


# libsndfile takes what is there of a file for all of it: the following look whether its end is there


def check_before_opening(path, n_bytes):
    """Raise BadSample for an Ogg or MP3 file whose end is missing."""
    with open(path, 'rb') as f:
        head = f.read(10)
        if head[:4] == b'OggS':
            f.seek(max(0, n_bytes - 2**17))            # two of the longest pages
            if not ends_with_last_page(f.read()):
                raise BadSample(f'{path}: truncated, it does not end with a last page')
            return
        start = 0
        if head[:3] == b'ID3':                         # 7 bits a byte
            start = 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
        f.seek(start)
        frame = f.read(200)
    tag = re.search(rb'^\xff.{8,40}(?:Xing|Info)\0\0\0(.)', frame, re.DOTALL)
    flags = tag[1][0] if tag else 0
    if flags & 2:                                      # it says its size, after the number of its frames
        position = tag.end() + 4 * (flags & 1)
        declared = start + int.from_bytes(frame[position:position + 4])
        if declared > n_bytes + SIZE_SLACK:
            raise BadSample(f'{path}: truncated, {n_bytes} bytes of {declared}')


def ends_with_last_page(tail):
    """Whether the end of an Ogg file holds its last page, marked as such and whole."""
    page = tail[max(tail.rfind(b'OggS'), 0):]
    if len(page) < 27:
        return False
    n_segments = page[26]
    return bool(page[5] & 4) and len(page) >= 27 + n_segments + sum(page[27:27 + n_segments])


def with_size(path):
    """The path; for a WAV from a pipe, whose header does not know how much data follows, its content with a size."""
    with open(path, 'rb') as f:
        head = f.read(4096)
        at = head.find(b'data')
        if head[:4] == b'RF64':
            has_no_size = head[28:36] in (bytes(8), b'\xff' * 8)
        else:
            has_no_size = head[:4] == b'RIFF' and head[at + 4:at + 8] == bytes(4) and head[at + 8:at + 12] != b'LIST'
        if at < 0 or not has_no_size:
            return path
        content = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)    # only what is read comes into memory
    content[:4] = b'RIFF'
    size = min(len(content) - at - 8, 2**32 - 1) // 2 * 2              # no odd byte, nothing behind the end
    content[at + 4:at + 8] = size.to_bytes(4, 'little')
    return content


LOGGED_SIZE = re.compile(r'^ *(?:riff|riff size|form|ssnd|data|data size) *: (\d+) \(should be (\d+)\)', re.M | re.I)


def check_log(path, n_bytes, log):
    """Raise BadSample where libsndfile has noted that a file is shorter than its header says."""
    for groups in LOGGED_SIZE.findall(log):
        declared, found = map(int, groups)
        n_missing = declared - found
        # into a pipe, where the size is not known yet, programs write something near 2 or 4 GiB
        is_unknown = declared > 2**30 and (declared + 2**24) % 2**31 < 2**25
        if n_missing > SIZE_SLACK and not is_unknown:
            raise BadSample(f'{path}: truncated, {n_bytes} bytes of {n_bytes + n_missing}')


def check_last_sample(path, f):
    """Raise BadSample when an open FLAC file ends before its last sample; finding it takes a few reads."""
    import soundfile
    try:
        f.seek(f.frames - 1)
        is_there = len(f.read(1)) == 1
    except soundfile.SoundFileError:
        is_there = False
    if f.frames and not is_there:
        raise BadSample(f'{path}: truncated, its last of {f.frames} samples is missing')


def resample(wave, have, want):
    """float32 (n,) at rate `have` -> (about n want / have,) at rate `want`, by soxr at its high quality."""
    if have == want:
        return wave
    return soxr.resample(wave, have, want, quality='HQ')
