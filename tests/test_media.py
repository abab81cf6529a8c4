"""media.py: pictures and sounds as they are in the field, damaged ones among them, against values by hand."""
import json
import struct
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_data import one_line

from media import BadSample, BadSamples, contact_sheet, read_audio, read_image, resample

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


# -----------------------------------------------------------------------------
# pictures


def colours(path, size):
    """The colours along the top row and the left column of a picture."""
    pixels = read_image(path, size).transpose(1, 2, 0)
    return [tuple(p) for p in pixels[0].tolist()], [tuple(p) for p in pixels[:, 0].tolist()]


def save(path, array, **named):
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **named)
    return path


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""
    def chunk(name, body):
        return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(bytes(100))) + chunk(b'IEND', b''))


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
    (lambda path: path.mkdir(), 'not a whole image'), (lambda path: None, 'no such image')])
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


def test_a_jpeg_with_damaged_exif_gives_its_pixels_or_one_line(tmp_path):
    width_as_text = struct.pack('<HHI4s', 256, 2, 1, b'x\0\0\0')
    turned = struct.pack('<HHIHH', 274, 3, 1, 6, 0)
    exif = b'Exif\0\0II*\0' + struct.pack('<IH', 8, 2) + turned + width_as_text + bytes(4)
    Image.new('RGB', (8, 8), RED).save(tmp_path / 'a.jpg', exif=exif)
    try:
        assert read_image(tmp_path / 'a.jpg', 8).shape == (3, 8, 8)
    except BadSample as e:
        one_line(e, tmp_path / 'a.jpg')


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


def test_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257], [200 * 257, 65535]], np.uint16)).save(tmp_path / 'a.png')
    assert read_image(tmp_path / 'a.png', 2)[1].tolist() == [[0, 1], [200, 255]]


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
    contact_sheet(tmp_path / 'new' / 'sheet.png', [tmp_path / 'a.png'] * 3, ['a dark square'] * 3, columns=2, side=16)
    with Image.open(tmp_path / 'new' / 'sheet.png') as sheet:
        assert sheet.size == (2 * 24, 2 * 114)         # 8 more for each side, six lines of 15 below
        assert [sheet.getpixel(place) for place in ((12, 12), (36, 12), (12, 126))] == [(40, 40, 40)] * 3
        assert sheet.getpixel((36, 126)) == WHITE


# -----------------------------------------------------------------------------
# sounds

TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32)


def tone(rate, pitch=440):
    """A second of it."""
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(rate) / rate)).astype(np.float32)


def write(path, wave, rate=16_000, **named):
    soundfile.write(path, wave, rate, **named)
    return path


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


def cut(path, wave, n_bytes, **named):
    path.write_bytes(write(path, wave, **named).read_bytes()[:n_bytes])


@pytest.mark.parametrize('damage, says', [
    (lambda path: cut(path, TONE, 20_000), 'truncated, 20000 bytes of 32044'),
    (lambda path: cut(path, np.random.default_rng(0).uniform(-1, 1, 16_000), 10_000, format='FLAC'), 'a.wav: '),
    (lambda path: write(path, TONE[:0]), 'holds no sample'),
    (lambda path: write(path, 0 * TONE), 'silent in its first 1 s'),
    (lambda path: write(path, np.where(np.arange(16_000) == 99, np.nan, TONE), subtype='FLOAT'), 'NaN or infinity'),
    (lambda path: path.write_text('no sound'), 'not a whole sound'),
    (lambda path: None, 'no such sound')])
def test_a_bad_sound_is_refused_in_one_line(tmp_path, damage, says):
    damage(tmp_path / 'a.wav')
    with pytest.raises(BadSample) as e:
        read_audio(tmp_path / 'a.wav', 16_000, 16_000)
    one_line(e.value, tmp_path / 'a.wav', says)
