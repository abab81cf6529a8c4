"""media.py: pictures and sounds as they are in the field, damaged ones among them, against values by hand."""
import io
import json
import os
import struct
import threading
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_common import no_file_larger_than
from test_data import one_line

from media import BadSample, BadSamples, contact_sheet, read_audio, read_image, resample, upright_rgb

RED = (255, 0, 0)
GREEN = (0, 255, 0)
BLUE = (0, 0, 255)
WHITE = (255, 255, 255)


def test_bad_samples_are_noted_once_each_up_to_the_limit(tmp_path):
    bad_samples = BadSamples(tmp_path / 'bad.jsonl', 2)
    for id in 'a', 'b', 'a':
        bad_samples.add(id, f'{id}: why')
    other_rank = BadSamples(tmp_path / 'bad.jsonl', 2, active=False)
    other_rank.add('c', 'c: why')
    lines = [json.loads(line) for line in (tmp_path / 'bad.jsonl').read_text().splitlines()]
    assert lines == [{'id': 'a', 'reason': 'a: why'}, {'id': 'b', 'reason': 'b: why'}]
    with pytest.raises(SystemExit) as e:
        bad_samples.add('b', 'another b: why', key='line 9')   # the same id, but another sample
    one_line(e.value, 'another b: why; fix or remove it, or set max_bad_samples above 2 to skip such samples')


def test_a_sample_that_a_full_disk_cannot_note_ends_the_run_in_one_line(tmp_path):
    with no_file_larger_than(0), pytest.raises(SystemExit) as e:
        BadSamples(tmp_path / 'bad.jsonl', 2).add('a', 'why')
    one_line(e.value, f'{tmp_path}/bad.jsonl: cannot write here, is the disk full?')


def test_a_resumed_run_notes_no_sample_twice(tmp_path):
    for _ in range(2):
        bad_samples = BadSamples(tmp_path / 'bad.jsonl', 3)
        bad_samples.add('a', 'a: why')
    bad_samples.add('b', 'b: why')
    lines = [json.loads(line) for line in (tmp_path / 'bad.jsonl').read_text().splitlines()]
    assert [line['id'] for line in lines] == ['a', 'b']


def through_pipe(path, content):
    """A pipe at this path, in which the content waits for every reader."""
    def feed():
        while True:
            try:
                path.write_bytes(content)
            except BrokenPipeError:                    # a reader that did not want it all
                pass
    os.mkfifo(path)
    threading.Thread(target=feed, daemon=True).start()


@pytest.mark.parametrize('make, says', [
    (lambda path, content: through_pipe(path, content), 'no file'), (lambda path, content: path.mkdir(), 'no file'),
    (lambda path, content: path.symlink_to('/dev/zero'), 'no file'),
    (lambda path, content: path.touch(), 'not a whole'),
    (lambda path, content: path.symlink_to('nowhere'), 'no such'),
    (lambda path, content: path.symlink_to(path), 'Too many levels of symbolic links')])
@pytest.mark.parametrize('kind', ['picture', 'sound'])
def test_a_pipe_a_folder_or_a_device_is_no_picture_and_no_sound(tmp_path, make, says, kind):
    make(tmp_path / 'a', png(np.zeros((8, 8), np.uint8)) if kind == 'picture' else sound('WAV', TONE))
    with pytest.raises(BadSample) as e:
        read_image(tmp_path / 'a', 8) if kind == 'picture' else read_audio(tmp_path / 'a', 16_000, 16_000)
    one_line(e.value, tmp_path / 'a', says)
def test_bad_samples_of_a_run_that_goes_on_count_and_are_not_listed_twice(tmp_path):
    path = tmp_path / 'bad.jsonl'
    path.write_text('{"id": "b", "reason": "b: why"}\n[1]\n{"id": "a", "rea')   # a kill came here
    bad_samples = BadSamples(path, 2)
    bad_samples.add('b', 'b: why')
    bad_samples.add('a', 'a: why')
    bad_samples.gather()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{'id': 'a', 'reason': 'a: why'}, {'id': 'b', 'reason': 'b: why'}]
    with pytest.raises(SystemExit) as e:
        BadSamples(path, 1).gather()
    one_line(e.value, 'b: why; fix or remove it, or set max_bad_samples above 1')
    with pytest.raises(SystemExit) as e:
        bad_samples.add('c', 'c: why')
    one_line(e.value, 'c: why; ')


# -----------------------------------------------------------------------------
# pictures


def colours(path, size):
    """The colours along the top row and the left column of a picture."""
    pixels = read_image(path, size).transpose(1, 2, 0)
    return [tuple(p) for p in pixels[0].tolist()], [tuple(p) for p in pixels[:, 0].tolist()]


def save(path, array, **named):
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **named)
    return path


def chunk(name, body):
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def png(gray, *chunks):
    """A PNG of uint8 or uint16 (H, W), with more chunks."""
    depth = 8 * gray.dtype.itemsize
    rows = b''.join(b'\0' + row.astype(gray.dtype.newbyteorder('>')).tobytes() for row in gray)
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', *gray.shape[::-1], depth, 0, 0, 0, 0))
    return (b'\x89PNG\r\n\x1a\n' + header + b''.join(chunks) + chunk(b'IDAT', zlib.compress(rows))
            + chunk(b'IEND', b''))


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""
    return png(np.zeros((1, 1), np.uint8)).replace(
        chunk(b'IHDR', struct.pack('>IIBBBBB', 1, 1, 8, 0, 0, 0, 0)),
        chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)))


def tiff(gray, order='<', **tags):
    """A TIFF of numbers (H, W); tags: t262=0 and the like."""
    body = gray.astype(gray.dtype.newbyteorder(order)).tobytes()
    kind = {'u': 1, 'i': 2, 'f': 3}[gray.dtype.kind]
    entries = {256: gray.shape[1], 257: gray.shape[0], 258: 8 * gray.dtype.itemsize, 259: 1, 262: 1, 273: 8, 277: 1,
               278: gray.shape[0], 279: len(body), 339: kind}
    entries.update({int(name[1:]): value for name, value in tags.items()})
    head = b'II*\0' if order == '<' else b'MM\0*'
    directory = struct.pack(order + 'H', len(entries))
    for tag, value in sorted(entries.items()):
        directory += struct.pack(order + 'HHIHH', tag, 3, 1, value, 0)
    return head + struct.pack(order + 'I', 8 + len(body)) + body + directory + bytes(4)


def noise():
    """10 x 10 pixels of noise around a plain square."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 10, 3))
    pixels[3:8, 3:8] = 200, 30, 60
    return pixels


def cut_jpeg(path):
    save(path.with_suffix('.jpg'), noise())
    path.write_bytes(path.with_suffix('.jpg').read_bytes()[:-100])


@pytest.mark.parametrize('make, says', [
    (cut_jpeg, 'not a whole image'), (lambda path: path.write_text('a dot'), 'not a whole image'),
    (lambda path: None, 'no such image')])
def test_what_is_no_whole_picture_is_refused_in_one_line(make, says, tmp_path):
    make(tmp_path / 'a')
    with pytest.raises(BadSample) as e:
        read_image(tmp_path / 'a', 16)
    one_line(e.value, tmp_path / 'a', says)


def test_a_picture_file_starts_no_program(tmp_path, monkeypatch):
    """PostScript by another name, which Pillow would give to Ghostscript."""
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *args, **options: pytest.fail('it started Ghostscript'))
    path = tmp_path / 'x.png'
    path.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n9 9 lineto showpage\n')
    with pytest.raises(BadSample, match='not a whole image'):
        read_image(path, 8)


def test_no_flipped_byte_of_a_png_changes_pixels_unseen(tmp_path):
    path = save(tmp_path / 'a.png', noise())
    raw = path.read_bytes()
    whole = read_image(path, 10)
    refused = 0
    for where in range(len(raw)):
        path.write_bytes(raw[:where] + bytes([raw[where] ^ 0x55]) + raw[where + 1:])
        try:
            assert np.array_equal(read_image(path, 10), whole)
        except BadSample as e:
            one_line(e, path, 'not a whole image')
            refused += 1
    assert refused > 0.9 * len(raw)


TURNED = struct.pack('<HHIHH', 274, 3, 1, 6, 0)          # clockwise


def exif(*entries):
    return b'Exif\0\0II*\0' + struct.pack('<IH', 8, len(entries)) + b''.join(entries) + bytes(12)


@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'WEBP'])
@pytest.mark.parametrize('damaged, is_turned', [
    (exif(TURNED, struct.pack('<HHI4s', 256, 2, 1, b'x')), True),              # a text as width: Pillow cannot write it
    (exif(struct.pack('<HHIi', 258, 9, 1, -5), TURNED), True),                 # nor a negative number of bits
    (exif(struct.pack('<HHII', 271, 2, 1000, 60_000), TURNED), True),          # beyond the end
    (exif(TURNED, struct.pack('<HHII', 0x8769, 4, 1, 50_000)), True),          # a directory that is not there
    (b'Exif\0\0garbage!', False), (b'Exif\0\0II*\0', False), (b'Exif\0\0II*\0\x08\0\0\0\xff\xff', False)])
@pytest.mark.filterwarnings('ignore::UserWarning')     # of Pillow, about the EXIF
def test_damaged_exif_does_not_matter_and_its_rotation_is_obeyed_if_readable(tmp_path, format, damaged, is_turned):
    named = {'quality': 95} if format == 'JPEG' else {'lossless': True} if format == 'WEBP' else {}
    halves = np.zeros((16, 16, 3), np.uint8)
    halves[:, :8] = 200                                # the left half is bright; turned, the upper one
    save(tmp_path / 'a', halves, format=format, exif=damaged, **named)
    pixels = read_image(tmp_path / 'a', 16)[0].astype(int)
    wanted = halves[..., 0].T if is_turned else halves[..., 0]
    assert abs(pixels - wanted).max() <= 4


@pytest.mark.parametrize('side', [8_001, 60_000])      # PIL lets the first pass and stops the second
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    (tmp_path / 'bomb.png').write_bytes(png_header(side, side))
    with pytest.raises(BadSample) as e:
        read_image(tmp_path / 'bomb.png', 8)
    one_line(e.value, tmp_path / 'bomb.png', 'pixels')


@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'MPO', 'WEBP', 'GIF', 'BMP', 'TIFF'])
def test_a_picture_of_every_format_is_read_whatever_its_name(tmp_path, format):
    others = {'save_all': True, 'append_images': [Image.new('RGB', (8, 8), WHITE)]} if format == 'MPO' else {}
    Image.new('RGB', (8, 8), (90, 90, 90)).save(tmp_path / 'a.png', format, **others)
    assert abs(read_image(tmp_path / 'a.png', 8).astype(int) - 90).max() <= 2


def test_transparent_pixels_are_laid_on_white(tmp_path):
    path = save(tmp_path / 'a.png', [[(255, 0, 0, 255), (0, 0, 0, 0)], [(0, 0, 0, 128), (0, 0, 255, 255)]])
    assert colours(path, 2) == ([RED, WHITE], [RED, (127, 127, 127)])          # 255 * (255 - 128) / 255 = 127


@pytest.mark.parametrize('transparency, middle, last', [
    (None, GREEN, BLUE), (1, WHITE, BLUE), (bytes([255, 128, 0]), (127, 255, 127), WHITE)])
def test_a_palette_picture_gives_its_colours(tmp_path, transparency, middle, last):
    image = Image.new('P', (3, 3))
    image.putdata([0, 1, 2] * 3)
    image.putpalette([*RED, *GREEN, *BLUE])
    named = {} if transparency is None else {'transparency': transparency}
    image.save(tmp_path / 'a.png', **named)
    assert colours(tmp_path / 'a.png', 3)[0] == [RED, middle, last]


GRAY = np.arange(256).reshape(16, 16)


def gray(white, kind):
    """GRAY with white in place of 255."""
    return (GRAY * (white / 255)).astype(kind)


def as_12_bits(values):
    """uint16 below 4096, packed two to three bytes, as a TIFF has them."""
    first, second = values.astype(np.uint16).reshape(-1, 2).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1)
    return packed.astype(np.uint8).reshape(len(values), -1)


@pytest.mark.parametrize('content', [
    png(gray(65535, 'u2')), png(gray(4095, 'u2')), tiff(gray(65535, 'u2')), tiff(gray(65535, 'u2'), '>'),
    tiff(gray(4095, 'u2')), tiff(gray(4095, 'u2'), '>'), tiff(as_12_bits(gray(4095, 'u2')), t256=16, t258=12),
    tiff(gray(65535, 'u2')[::-1, ::-1], t262=0),       # white is zero
    tiff(gray(32767, 'i2')), tiff(gray(2**31 - 1, 'i4'), '>'), tiff(gray(2**32 - 1, 'u4')), tiff(gray(65535, 'i4')),
    tiff(gray(4095, 'i4')), tiff(gray(255, 'u4')), tiff(gray(1, 'f4')), tiff(gray(1, 'f4'), '>'),
    tiff(gray(255, 'f4')), tiff(gray(65535, 'f4'))])
def test_gray_of_more_than_8_bits_keeps_its_brightness(tmp_path, content):
    (tmp_path / 'a').write_bytes(content)
    pixels = read_image(tmp_path / 'a', 16)
    assert abs(pixels - GRAY).max() <= 1 and pixels.std(0).max() == 0


@pytest.mark.parametrize('content, value', [
    (png(np.array([[0, 257], [200 * 257, 65535]], np.uint16)), [[0, 1], [200, 255]]),
    (png(np.array([[0, 999], [200 * 257, 65535]], np.uint16), chunk(b'tRNS', struct.pack('>H', 999))),
     [[0, 255], [200, 255]]),                          # the transparent one is laid on white
    (tiff(np.array([[0, 0.25], [0.5, 0.5]], np.float32)), [[0, 64], [128, 128]]),
    (tiff(np.array([[0, -0.25], [1, 1.2]], np.float32)), [[0, 0], [255, 255]]),
    (tiff(np.zeros((2, 2), np.int32)), [[0, 0], [0, 0]])])
def test_deep_gray_by_hand(tmp_path, content, value):
    (tmp_path / 'a').write_bytes(content)
    assert read_image(tmp_path / 'a', 2)[1].tolist() == value


TEXT = np.random.default_rng(0).bytes(2**20).hex().encode()            # 2 MiB, which do not pack to nothing


@pytest.mark.parametrize('extra', [
    chunk(b'tEXt', b'k\0' + TEXT), chunk(b'zTXt', b'k\0\0' + zlib.compress(TEXT)),
    chunk(b'iTXt', b'k\0\1\0\0\0' + zlib.compress(TEXT)), chunk(b'iCCP', b'k\0\0' + zlib.compress(TEXT)),
    b''.join(chunk(b'tEXt', b'%d\0' % n + TEXT) for n in range(40))])
def test_a_png_with_much_text_or_a_large_profile_is_whole(tmp_path, extra):
    (tmp_path / 'a.png').write_bytes(png(GRAY.astype(np.uint8), extra))
    assert np.array_equal(read_image(tmp_path / 'a.png', 16)[0], GRAY)


@pytest.mark.parametrize('make', [
    lambda f: f.write(b''), lambda f: f.write(png(GRAY.astype(np.uint8))[:33] + b'\x7f\xff\xff\xf0tEXt'),
    lambda f: Image.new('RGB', (8, 8)).save(f, 'WEBP')])
def test_a_picture_of_2_gib_is_not_read(tmp_path, make):
    with open(tmp_path / 'a.png', 'wb') as f:
        make(f)
        f.truncate(2**31)
    with pytest.raises(BadSample) as e:
        read_image(tmp_path / 'a.png', 8)
    one_line(e.value, tmp_path / 'a.png', '2,147,483,648 bytes, wanted at most 512,000,000')


@pytest.mark.parametrize('orientation, top, left', [
    (1, [RED, BLUE], [RED, RED]), (2, [BLUE, RED], [BLUE, BLUE]),
    (6, [RED, RED], [RED, BLUE]), (8, [BLUE, BLUE], [BLUE, RED])])       # 6: turn clockwise, 8: counter-clockwise
def test_an_exif_rotated_picture_is_turned_upright(tmp_path, orientation, top, left):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / 'a.png', [[RED, BLUE]] * 2, exif=exif)
    assert colours(tmp_path / 'a.png', 2) == (top, left)


def test_the_contact_sheet_shows_pictures_as_the_model_sees_them(tmp_path):
    Image.fromarray(np.full((8, 8), 40 * 257, np.uint16)).save(tmp_path / 'a.png')
    contact_sheet(tmp_path / 'new' / 'sheet.png', [[tmp_path / 'a.png']] * 3, ['a dark square'] * 3, columns=2, side=16)
    with Image.open(tmp_path / 'new' / 'sheet.png') as sheet:
        assert sheet.size == (2 * 24, 2 * 114)         # 8 more for each side, six lines of 15 below
        assert [sheet.getpixel(place) for place in ((12, 12), (36, 12), (12, 126))] == [(40, 40, 40)] * 3
        assert sheet.getpixel((36, 126)) == WHITE


@pytest.mark.parametrize('format', ['TIFF', 'PNG'])
def test_a_turned_picture_is_turned_once(tmp_path, format):
    tags = Image.Exif()
    tags[0x0112] = 6
    save(tmp_path / 'a', [[RED, BLUE]] * 2, format=format, exif=tags)
    with Image.open(tmp_path / 'a') as image:          # not loaded yet
        assert [upright_rgb(image).getpixel(place) for place in ((0, 0), (1, 0), (0, 1))] == [RED, RED, BLUE]


# -----------------------------------------------------------------------------
# sounds

TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32)


def tone(rate, pitch=440):
    """A second of it."""
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(rate) / rate)).astype(np.float32)


def write(path, wave, rate=16_000, **named):
    soundfile.write(path, wave, rate, **named)
    return path


def sound(format, wave, rate=16_000, subtype=None):
    """The bytes of a sound file."""
    content = io.BytesIO()
    soundfile.write(content, wave, rate, format=format, subtype=subtype)
    return content.getvalue()


@pytest.mark.parametrize('ending, subtype, tolerance', [
    ('wav', 'PCM_16', 1e-4), ('wav', 'FLOAT', 1e-7), ('wav', 'PCM_U8', 1e-2), ('flac', 'PCM_24', 1e-6),
    ('ogg', 'VORBIS', 0.1)])
def test_samples_of_any_width_and_format_come_as_floats(tmp_path, ending, subtype, tolerance):
    wave = read_audio(write(tmp_path / f'a.{ending}', TONE, subtype=subtype), 16_000, 16_000)
    assert wave.dtype == np.float32 and wave.shape == (16_000,) and abs(wave - TONE).max() < tolerance


def test_channels_are_averaged(tmp_path):
    wave = read_audio(write(tmp_path / 'a.wav', np.stack([TONE, 0 * TONE], 1), subtype='FLOAT'), 16_000, 16_000)
    assert abs(wave - TONE / 2).max() < 1e-7


@pytest.mark.parametrize('rate', [48_000, 44_101, 8_000])  # 44,101 is prime to 16,000: no filter of a table fits it
def test_another_rate_is_resampled_to_the_same_tone(tmp_path, rate):
    wave = read_audio(write(tmp_path / 'a.wav', tone(rate), rate, subtype='FLOAT'), 16_000, 32_000)
    assert wave.shape == (16_000,) and wave.dtype == np.float32
    assert abs(wave - TONE)[500:-500].max() < 1e-3


def test_what_lies_above_the_new_rate_does_not_come_back_as_another_tone():
    assert abs(resample(tone(48_000, pitch=11_000), 48_000, 16_000)[500:-500]).max() < 1e-2   # would fold to 5,000 Hz
    assert resample(TONE, 16_000, 16_000) is TONE


def test_the_clip_is_the_start_of_the_whole_and_of_a_long_file_only_that_is_read(tmp_path, monkeypatch):
    wave = np.random.default_rng(0).uniform(-1, 1, 100 * 44_100).astype(np.float32)
    path = write(tmp_path / 'a.wav', wave, 44_100, subtype='FLOAT')
    asked = []
    real = soundfile.SoundFile.read

    def noted(self, frames, **named):
        asked.append(frames)
        return real(self, frames, **named)
    monkeypatch.setattr(soundfile.SoundFile, 'read', noted)
    np.testing.assert_allclose(read_audio(path, 16_000, 16_000), resample(wave, 44_100, 16_000)[:16_000], atol=1e-5)
    assert len(asked) == 1 and asked[0] < 50_000


@pytest.mark.parametrize('rate', [1, 7, 11_127, 15_991, 192_001, 999_983, 2**22, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize('want', [16_000, 24_000])
def test_any_rate_of_a_header_gives_its_sound_or_one_line(tmp_path, rate, want):
    content = sound('WAV', TONE)
    (tmp_path / 'a.wav').write_bytes(content[:24] + struct.pack('<I', rate) + content[28:])
    if rate > 4_000_000:
        with pytest.raises(BadSample) as e:
            read_audio(tmp_path / 'a.wav', want, want)
        one_line(e.value, tmp_path / 'a.wav')
        return
    wave = read_audio(tmp_path / 'a.wav', want, want)
    assert wave.dtype == np.float32 and abs(len(wave) - min(want, len(TONE) * want / rate)) <= 1


NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 48_000).astype(np.float32)
KINDS = [('WAV', 'PCM_16'), ('WAVEX', 'PCM_16'), ('RF64', 'PCM_16'), ('W64', 'PCM_16'), ('AIFF', 'PCM_16'),
         ('AU', 'PCM_16'), ('CAF', 'PCM_16'), ('FLAC', 'PCM_16'), ('MP3', 'MPEG_LAYER_III'), ('OGG', 'VORBIS'),
         ('OGG', 'OPUS')]


@pytest.mark.parametrize('format, subtype', KINDS)
def test_a_sound_whose_end_is_missing_is_noticed_also_behind_the_clip(tmp_path, format, subtype):
    content = sound(format, NOISE, subtype=subtype)
    path = tmp_path / 'a'
    path.write_bytes(content)
    assert read_audio(path, 16_000, 16_000).shape == (16_000,)
    n_bytes = [len(content) // 2, len(content) - 200]
    if format == 'OGG':
        path.write_bytes(content + bytes(128))         # what taggers leave behind the end is not its business
        assert read_audio(path, 16_000, 16_000).shape == (16_000,)
        n_bytes += [content.rindex(b'OggS'), content.rindex(b'OggS') + 20, len(content) - 1]
    for n in n_bytes:
        path.write_bytes(content[:n])
        with pytest.raises(BadSample) as e:
            read_audio(path, 16_000, 16_000)
        one_line(e.value, path, 'not a whole sound' if format == 'CAF' and n == n_bytes[0] else 'truncated')


@pytest.mark.parametrize('riff, data', [
    (0, 0), (36, 0), (96_036, 0), (0xffffffff, 0), (0x7fffffff, 0x7fffffff), (0xffffffff, 0xffffffff), (0, 0x7fffffff),
    (0x7ffff024, 0x7ffff000), (0x80000024, 0x80000000),                        # of SoX and arecord
    (96_044, 96_000), (96_036, 96_008), (96_037, 96_001), (96_080, 96_044), (0, 96_000)])
def test_a_wav_from_a_pipe_or_a_few_bytes_off_is_whole(tmp_path, riff, data):
    content = sound('WAV', NOISE)
    sizes = [content[:4], struct.pack('<I', riff), content[8:40], struct.pack('<I', data), content[44:]]
    (tmp_path / 'a.wav').write_bytes(b''.join(sizes))
    (tmp_path / 'whole.wav').write_bytes(content)
    wave = read_audio(tmp_path / 'a.wav', 16_000, 64_000)
    assert np.array_equal(wave, read_audio(tmp_path / 'whole.wav', 16_000, 64_000)) and len(wave) == 48_000


@pytest.mark.parametrize('n', [16_000, 48_000])        # as long as the clip, and longer
def test_other_sounds_from_a_pipe_are_whole_as_well(tmp_path, n):
    flac = bytearray(sound('FLAC', NOISE[:n]))
    flac[22:26] = bytes(4)                             # the number of its samples
    rf64 = bytearray(sound('RF64', NOISE[:n]))
    rf64[20:44] = bytes(24)                            # three sizes
    for content in flac, rf64:
        (tmp_path / 'a').write_bytes(content)
        assert abs(read_audio(tmp_path / 'a', 16_000, 32_000) - NOISE[:min(n, 32_000)]).max() < 1e-4


def cut(path, wave, n_bytes, **named):
    path.write_bytes(write(path, wave, **named).read_bytes()[:n_bytes])


def of_no_sample():
    content = sound('WAV', TONE)
    return content[:4] + bytes(4) + content[8:40] + bytes(4)


@pytest.mark.parametrize('damage, says', [
    (lambda path: cut(path, TONE, 20_000), 'truncated, 20000 bytes of 32044'),
    (lambda path: cut(path, np.random.default_rng(0).uniform(-1, 1, 16_000), 10_000, format='FLAC'), 'a.wav: '),
    (lambda path: write(path, TONE[:0]), 'holds no sample'),
    (lambda path: write(path, 0 * TONE), 'silent in its first 1 s'),
    (lambda path: write(path, np.where(np.arange(16_000) == 99, np.nan, TONE), subtype='FLOAT'), 'NaN or infinity'),
    (lambda path: path.write_text('no sound'), 'not a whole sound'),
    (lambda path: path.write_bytes(sound('VOC', TONE)), 'VOC, wanted one of WAV'),
    (lambda path: path.write_bytes(of_no_sample()), 'holds no sample'),
    (lambda path: path.write_bytes(of_no_sample() + b'LIST' + bytes([96, 0, 0, 0]) + bytes(96)), 'holds no sample'),
    (lambda path: None, 'no such sound')])
def test_a_bad_sound_is_refused_in_one_line(tmp_path, damage, says):
    damage(tmp_path / 'a.wav')
    with pytest.raises(BadSample) as e:
        read_audio(tmp_path / 'a.wav', 16_000, 16_000)
    one_line(e.value, tmp_path / 'a.wav', says)
