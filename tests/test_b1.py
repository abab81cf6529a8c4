"""Stage B1: the small world's codecs, UTI's promises, reading sound files, and an audit that can fail at each gate."""
import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import REPO, run_script

import gates
from small import make as make_small
import uti
from data import BadSample, read_audio, resample

# -----------------------------------------------------------------------------
# sound files


TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32)


def wav(path, wave, rate=16_000, **how):
    soundfile.write(path, wave, rate, **how)
    return path


@pytest.mark.parametrize('subtype, tolerance', [('PCM_16', 1e-4), ('PCM_24', 1e-6), ('FLOAT', 1e-7), ('PCM_U8', 1e-2)])
def test_samples_of_any_width_come_as_floats(tmp_path, subtype, tolerance):
    wave = read_audio(wav(tmp_path / 'a.wav', TONE, subtype=subtype), 16_000, 16_000)
    assert wave.dtype == np.float32 and wave.shape == (16_000,) and abs(wave - TONE).max() < tolerance


@pytest.mark.parametrize('ending', ['flac', 'ogg'])
def test_other_formats_are_read(tmp_path, ending):
    wave = read_audio(wav(tmp_path / f'a.{ending}', TONE), 16_000, 16_000)
    assert len(wave) == 16_000 and np.corrcoef(wave, TONE)[0, 1] > 0.99


def test_channels_are_averaged(tmp_path):
    wave = read_audio(wav(tmp_path / 'a.wav', np.stack([TONE, 0 * TONE], 1), subtype='FLOAT'), 16_000, 16_000)
    assert abs(wave - TONE / 2).max() < 1e-7


@pytest.mark.parametrize('rate', [48_000, 44_100, 8_000])
def test_another_rate_is_resampled_to_the_same_tone(tmp_path, rate):
    other = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    wave = read_audio(wav(tmp_path / 'a.wav', other, rate, subtype='FLOAT'), 16_000, 16_000)
    assert len(wave) == 16_000 and abs(wave - TONE)[500:-500].max() < 1e-3


def test_what_lies_above_the_new_rate_does_not_come_back_as_another_tone():
    high = np.sin(2 * np.pi * 11_000 * np.arange(48_000) / 48_000).astype(np.float32)   # would fold to 5,000 Hz
    assert abs(resample(high, 48_000, 16_000)[500:-500]).max() < 1e-2


def test_a_long_file_is_not_read_whole(tmp_path):
    path = tmp_path / 'hour.wav'
    with soundfile.SoundFile(path, 'w', 48_000, 1, subtype='PCM_U8') as f:
        for _ in range(360):
            f.write(np.full(480_000, 0.25, np.float32))          # 10 s
    asked = []
    real = soundfile.SoundFile.read
    try:
        soundfile.SoundFile.read = lambda self, frames, **how: asked.append(frames) or real(self, frames, **how)
        wave = read_audio(path, 16_000, 16_000)
    finally:
        soundfile.SoundFile.read = real
    assert len(wave) == 16_000 and asked[0] < 48_100


def test_the_clip_is_the_start_of_the_whole(tmp_path):
    noise = np.random.default_rng(0).uniform(-1, 1, 50_000).astype(np.float32)
    path = wav(tmp_path / 'a.wav', noise, 44_100, subtype='FLOAT')
    assert np.array_equal(read_audio(path, 16_000, 8_000), resample(noise, 44_100, 16_000)[:8_000])


@pytest.mark.parametrize('damage, message', [
    (lambda p: p.write_bytes(wav(p, TONE).read_bytes()[:20_000]), 'truncated, 20000 bytes of 32044'),
    (lambda p: wav(p, TONE[:0]), 'holds no sample'),
    (lambda p: wav(p, 0 * TONE), 'silent in its first 1 s'),
    (lambda p: wav(p, np.where(np.arange(16_000) == 99, np.nan, TONE), subtype='FLOAT'), 'NaN or infinity'),
    (lambda p: p.write_bytes(b''), 'not a whole sound'),
    (lambda p: p.write_text('no sound'), 'not a whole sound'),
    (lambda p: None, 'no such sound')])
def test_a_bad_file_is_named_in_one_line(tmp_path, damage, message):
    path = tmp_path / 'a.wav'
    damage(path)
    with pytest.raises(BadSample, match=message) as e:
        read_audio(path, 16_000, 16_000)
    assert str(e.value).startswith(str(path)) and '\n' not in str(e.value)


def test_a_truncated_flac_is_noticed(tmp_path):
    path = wav(tmp_path / 'a.flac', np.random.default_rng(0).uniform(-1, 1, 64_000))
    path.write_bytes(path.read_bytes()[:40_000])
    with pytest.raises(BadSample, match='truncated|not a whole sound'):
        read_audio(path, 16_000, 64_000)


# -----------------------------------------------------------------------------
# the small world's codecs and the way through them


@pytest.fixture(scope='module')
def world_b(tiny, tmp_path_factory):
    """A folder with captions/, sounds/, llm/, image_codec/ and audio_codec/, made of less than the small world's."""
    from small import codecs as small_codecs
    root = tmp_path_factory.mktemp('b')
    make_small.make_sounds(root / 'sounds', n=40)
    small_codecs.make_image_codec(root / 'image_codec', n_pictures=300, n_tested=32)
    small_codecs.make_audio_codec(root / 'audio_codec', n_clips=250, n_tested=32)
    for part in 'captions', 'llm':
        (root / part).symlink_to(tiny / part)
    return root


@pytest.fixture(scope='module')
def both(world_b):
    return uti.UTI.build(str(world_b / 'llm'), str(world_b / 'image_codec'), str(world_b / 'audio_codec'))


def clips(n, seed=0):
    from small import world
    rng = np.random.default_rng(seed)
    return [world.play(world.random_sound(rng), rng) for _ in range(n)]


def test_a_token_space_is_built_from_a_model_and_two_codecs(both, world_b):
    again = uti.UTI.build(f'{world_b}/../{world_b.name}/llm', world_b / 'image_codec', world_b / 'audio_codec')
    assert again.space.sha256 == both.space.sha256 and str(world_b) not in json.dumps(both.space.fields())
    assert [(r.name, r.size) for r in both.space.ranges] == [
        ('text', 512), ('special', 4), ('image', 1024), ('audio_0', 512), ('audio_1', 512)]
    assert both.space.base['name'] == 'llm' and both.tokenizer.decode([both.space.text_end]) == '<|im_end|>'


def test_text_goes_there_and_back_and_typed_markers_stay_text(both):
    ids = both.encode_text('a big red circle <|im_end|>')
    assert both.decode_text(ids) == 'a big red circle <|im_end|>' and both.space.text_end not in ids
    with pytest.raises(SystemExit, match=r'id 512 at position 1 is outside text \[0, 512\)'):
        both.decode_text([3, 512])


def test_sounds_are_laid_out_frame_by_frame_and_trimmed_to_their_length(both):
    long, whole, short = np.tile(clips(1)[0], 2), clips(1)[0], clips(1)[0][:5_000]
    ids, metas = both.encode_audio([long, whole, short])
    assert ids.dtype == np.int32 and ids.shape == (3, 40) and np.array_equal(ids[0], ids[1])   # cut to the clip
    books = both.space['audio_0'], both.space['audio_1']
    assert all((ids[:, k::2] >= r.first).all() and (ids[:, k::2] < r.end).all() for k, r in enumerate(books))
    codes = both.audio_codec.encode(torch.from_numpy(whole)[None])[0]
    assert ids[1, 6] - books[0].first == codes[3, 0] and ids[1, 7] - books[1].first == codes[3, 1]
    assert [m['n_samples'] for m in metas] == [16_000, 16_000, 5_000]
    assert [len(w) for w in both.decode_audio(ids, metas)] == [16_000, 16_000, 5_000]


def test_an_id_in_the_wrong_place_is_refused_on_its_way_to_a_codec(both):
    ids, metas = both.encode_audio(clips(2))
    ids[1, 4], ids[1, 5] = ids[1, 5], ids[1, 4]        # the books of a frame, swapped
    with pytest.raises(SystemExit, match=r'audio 1: id \d+ at position 4 is outside audio_0'):
        both.decode_audio(ids, metas)
    pictures = [np.zeros((3, 32, 32), np.uint8)]
    ids, metas = both.encode_image(pictures)
    ids[0, 0] = both.space['image'].end
    with pytest.raises(SystemExit, match='image 0: id 1540 at position 0 is outside image'):
        both.decode_image(ids, metas)


def test_what_does_not_fit_the_codec_is_refused(both):
    with pytest.raises(SystemExit, match='wanted float32'):
        both.encode_audio([clips(1)[0].astype(np.float64)])
    ids, metas = both.encode_audio(clips(1))
    with pytest.raises(SystemExit, match='this codec makes 16000 samples at 16000 Hz'):
        both.decode_audio(ids, [{'n_samples': 16_001, 'sample_rate': 16_000}])
    with pytest.raises(SystemExit, match='wanted uint8'):
        both.encode_image([np.zeros((3, 64, 64), np.uint8)])
    with pytest.raises(SystemExit, match='this token space has no audio'):
        uti.UTI(uti.TokenSpace(both.space.base, both.space.image), both.tokenizer, both.image_codec).encode_audio([])


def test_a_codec_with_another_weight_is_not_that_of_the_token_space(both, world_b):
    other = uti.load_image_codec(world_b / 'image_codec')
    other.sha256 = 'f00'
    with pytest.raises(SystemExit, match="image.sha256 is 'f00' here"):
        uti.UTI(both.space, both.tokenizer, other, both.audio_codec)


def test_the_small_codecs_keep_what_is_seen_and_heard(world_b):
    """Made from a tenth of the data; the real ones have to keep 97 %, see configs/b1_small.py."""
    for part, measure, floor in ('image_codec', 'psnr', 25), ('audio_codec', 'si_snr', 4):
        report = json.loads((world_b / part / 'report.json').read_text())
        assert report[measure] > floor and report['attributes_surviving'] > 0.9


def test_an_encodec_can_be_a_linear_transform(world_b):
    """Before its codebooks: half the sound has half the code, and what came back once comes back the same again."""
    from codec import load_audio_codec, si_snr
    model, wave = load_audio_codec(world_b / 'audio_codec', 1.0).model, torch.from_numpy(np.stack(clips(4, seed=9)))
    with torch.no_grad():
        code = model.encoder(wave[:, None])
        half, back = model.encoder(wave[:, None] / 2), model.decoder(code)
        again = model.decoder(model.encoder(back))
    assert abs(half - code / 2).max() < 1e-3 < 1 < abs(code).max()
    assert abs(again - back).max() < 1e-3
    # what comes back is the nearest that 79 components a frame can say: what is missing stands at a right angle to it
    frames, missing = back[:, 0].view(4, 20, 800), (wave - back[:, 0]).view(4, 20, 800)
    assert abs((frames * missing).sum(-1)).max() < 1e-2 < 1 < (frames ** 2).sum(-1).max()
    assert np.median(si_snr(wave.numpy(), back[:, 0].numpy())) > 8      # rare shrill sounds may lose most of themselves


# -----------------------------------------------------------------------------
# the audit


def audit(world_b, out, *args):
    return run_script(
        'uti.py', f'--llm={world_b}/llm',
        f'--image_codec={world_b}/image_codec', f'--audio_codec={world_b}/audio_codec',
        f'--data_json={world_b}/captions/data.json', f'--image_root={world_b}/captions/images',
        f'--image_truth={world_b}/captions/truth.json', f'--manifest_jsonl={world_b}/sounds/manifest.jsonl',
        f'--audio_root={world_b}/sounds', f'--audio_truth={world_b}/sounds/truth.json', f'--out_dir={out}',
        '--n_items=32', '--n_alone=2', '--gate_surviving=0.5', '--n_shown=2', *args)


@pytest.fixture(scope='module')
def audited(world_b, tmp_path_factory):
    out = tmp_path_factory.mktemp('out')
    return out, audit(world_b, out)


def test_the_audit_passes_and_leaves_what_it_says(audited):
    out, done = audited
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name for p in out.iterdir()} >= {'token_space.json', 'report.json', 'baseline.json', 'gates.json'}
    assert (out / 'pictures' / 'original_decoded.png').exists() and len(list((out / 'sounds').iterdir())) == 4
    report = json.loads((out / 'report.json').read_text())
    assert report['token_space'] == uti.TokenSpace.load(out / 'token_space.json').sha256
    assert 'regress' not in done.stdout and report['psnr'] > 24


def test_a_second_audit_compares_and_a_regression_or_a_missed_floor_fails(audited, world_b):
    out, _ = audited
    stored = json.loads((out / 'baseline.json').read_text())
    (out / 'baseline.json').write_text(json.dumps({**stored, 'psnr': stored['psnr'] + 1}))
    done = audit(world_b, out, '--gate_ssim=0.999')
    assert done.returncode == 1
    assert 'FAIL  psnr against the baseline' in done.stdout and 'FAIL  ssim ' in done.stdout
    assert 'pass  si_snr against the baseline' in done.stdout and 'pass  ssim against the baseline' in done.stdout


@pytest.mark.parametrize('key, change, fails', [
    ('psnr', -0.49, False), ('psnr', -0.51, True), ('ssim', -0.019, False), ('ssim', -0.021, True),
    ('si_snr', -0.99, False), ('si_snr', -1.01, True), ('log_mel', 0.019, False), ('log_mel', 0.021, True),
    ('psnr', np.nan, True)])
def test_how_much_worse_is_a_regression(key, change, fails):
    baseline = {'psnr': 30.0, 'ssim': 0.9, 'si_snr': 7.0, 'log_mel': 0.4, 'items': 'x'}
    slack = {'psnr': -0.5, 'ssim': -0.02, 'si_snr': -1.0, 'log_mel': 0.05}
    verdicts = gates.no_regression({**baseline, key: baseline[key] + change}, baseline, {'items': 'x'}, slack)
    assert len(verdicts) == 5 and [g.name for g in verdicts if not g.passed] == [f'{key} against the baseline'] * fails


def test_a_baseline_of_other_items_cannot_be_compared_with():
    verdicts = gates.no_regression({}, {'items': 'x'}, {'items': 'y'}, {})
    assert [g.passed for g in verdicts] == [False] and 'items is not that of the baseline' in verdicts[0].name


def test_a_codec_whose_ids_depend_on_company_fails_the_audit(world_b, tmp_path):
    """Its own script: a codec that adds the number of batch mates to every code."""
    code = ('import runpy, sys, codec; '
            'real = codec.PatchImages.encode; '
            'codec.PatchImages.encode = lambda self, x: (real(self, x) + len(x)) % self.codes; '
            'runpy.run_path("uti.py", run_name="__main__")')
    import subprocess
    import sys
    args = [f'--llm={world_b}/llm', f'--image_codec={world_b}/image_codec', f'--out_dir={tmp_path}', '--n_items=9',
            f'--data_json={world_b}/captions/data.json', f'--image_root={world_b}/captions/images', '--n_alone=2']
    done = subprocess.run([sys.executable, '-c', code, *args], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    for name in 'ids that differ alone', 'ids that differ in another process', 'items measured', 'psnr':
        assert f'FAIL  image: {name}' in done.stdout or f'FAIL  {name}' in done.stdout
