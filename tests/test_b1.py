"""Stage B1: the small world's codecs, UTI's promises, and an audit that can fail at each gate."""
import concurrent.futures
import json
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from test_build_b2 import run_inline
from transformers import Qwen3Config

import codec
import uti
from media import BadSample, BadSamples
from small.codecs import make_audio_codec, make_image_codec
from small.make import make_captions, make_sounds
from small.models import make_tokenizer
from small.world import play, random_sound

# -----------------------------------------------------------------------------
# the small world's codecs and the way through them


@pytest.fixture(scope='module')
def world_b(tmp_path_factory):
    """A folder with captions/, sounds/, llm/, image_codec/ and audio_codec/, made of less than the small world's; and
    manifest.jsonl, which has pictures and sounds in one list."""
    root = tmp_path_factory.mktemp('b')
    make_captions(root / 'captions', n=40)
    make_sounds(root / 'sounds', n=40)
    make_image_codec(root / 'image_codec', n_pictures=300, n_tested=32)
    make_audio_codec(root / 'audio_codec', n_clips=250, n_tested=32)
    records = json.loads((root / 'captions' / 'data.json').read_text())
    texts = [record['conversations'][1]['value'] for record in records]
    make_tokenizer(texts, n_ids=300).save_pretrained(root / 'llm')
    Qwen3Config(vocab_size=512).save_pretrained(root / 'llm')
    with open(root / 'manifest.jsonl', 'w') as f:
        for record, text in zip(records, texts):
            image = f'captions/images/{record["image"]}'
            f.write(json.dumps({'id': record['id'], 'image': image, 'text': text}) + '\n')
        for line in (root / 'sounds' / 'manifest.jsonl').read_text().splitlines():
            record = json.loads(line)
            f.write(json.dumps({**record, 'audio': f'sounds/{record["audio"]}'}) + '\n')
    return root


@pytest.fixture(scope='module')
def both(world_b):
    return uti.UTI.build(str(world_b / 'llm'), str(world_b / 'image_codec'), str(world_b / 'audio_codec'))


def clips(n, seed=0):
    rng = np.random.default_rng(seed)
    return [play(random_sound(rng), rng) for _ in range(n)]


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
    whole = clips(1)[0]
    ids, metas = both.encode_audio([np.tile(whole, 2), whole, whole[:5_000]])
    assert ids.dtype == np.int32 and ids.shape == (3, 40) and np.array_equal(ids[0], ids[1])   # cut to the clip
    codes = both.audio_codec.encode(torch.from_numpy(whole)[None])[0]                           # (F, K)
    for k in 0, 1:
        assert np.array_equal(ids[1, k::2] - both.space[f'audio_{k}'].first, codes[:, k])
    assert [meta['n_samples'] for meta in metas] == [16_000, 16_000, 5_000]
    assert [len(wave) for wave in both.decode_audio(ids, metas)] == [16_000, 16_000, 5_000]


def test_an_id_in_the_wrong_place_is_refused_on_its_way_to_a_codec(both):
    ids, metas = both.encode_audio(clips(2))
    ids[1, 4:6] = ids[1, 5:3:-1]                       # the two books of a frame, exchanged
    with pytest.raises(SystemExit, match=r'audio 1: id \d+ at position 4 is outside audio_0'):
        both.decode_audio(ids, metas)
    ids, metas = both.encode_image([np.zeros((3, 32, 32), np.uint8)])
    ids[0, 0] = both.space['image'].end
    with pytest.raises(SystemExit, match='image 0: id 1540 at position 0 is outside image'):
        both.decode_image(ids, metas)


def test_what_does_not_fit_the_codec_is_refused(both, world_b):
    with pytest.raises(SystemExit, match='wanted float32'):
        both.encode_audio([clips(1)[0].astype(np.float64)])
    ids, metas = both.encode_audio(clips(1))
    with pytest.raises(SystemExit, match='this codec makes 16000 samples at 16000 Hz'):
        both.decode_audio(ids, [{'n_samples': 16_001, 'sample_rate': 16_000}])
    with pytest.raises(SystemExit, match='wanted uint8'):
        both.encode_image([np.zeros((3, 64, 64), np.uint8)])
    with pytest.raises(SystemExit, match='this token space has no audio'):
        uti.UTI(uti.TokenSpace(both.space.base, both.space.image), both.tokenizer, both.image_codec).encode_audio([])
    other = codec.load_image_codec(world_b / 'image_codec')
    other.sha256 = 'f00'                               # as if of another weight
    with pytest.raises(SystemExit, match="image.sha256 is 'f00' here"):
        uti.UTI(both.space, both.tokenizer, other, both.audio_codec)


def test_the_small_codecs_keep_what_is_seen_and_heard(world_b):
    """Made from a tenth of the data; `python -m small.score out/b1_small` finds what the real ones keep."""
    for part, measure, floor in ('image_codec', 'psnr', 25), ('audio_codec', 'si_snr', 4):
        report = json.loads((world_b / part / 'report.json').read_text())
        assert report[measure] > floor and report['attributes_surviving'] > 0.9


def test_an_encodec_can_be_a_linear_transform(both):
    """Before its codebooks: half the sound has half the code, and what came back once comes back the same again."""
    model = both.audio_codec.model
    wave = torch.from_numpy(np.stack(clips(4, seed=9)))
    code = model.encoder(wave[:, None])
    half = model.encoder(wave[:, None] / 2)
    back = model.decoder(code)
    again = model.decoder(model.encoder(back))
    assert abs(half - code / 2).max() < 1e-3 < 1 < abs(code).max()
    assert abs(again - back).max() < 1e-3
    # what comes back is the nearest that 79 components a frame can hold: what is missing stands at a right angle to it
    frames = back[:, 0].view(4, 20, 800)
    missing = wave.view(4, 20, 800) - frames
    assert abs((frames * missing).sum(-1)).max() < 1e-2 < 1 < (frames ** 2).sum(-1).max()


# -----------------------------------------------------------------------------
# the audit


class InThisProcess:
    """A ProcessPoolExecutor that spares the tests a second process, and its answer: wrong in the first id if asked."""
    wrong = 0

    def __init__(self, *args, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def submit(self, function, *args):
        ids = function(*args)
        ids['image'][0, 0] += self.wrong
        future = Future()
        future.set_result(ids)
        return future


def audit(world_b, out, *args):
    return run_inline(
        'uti.py', f'--llm={world_b}/llm', f'--image_codec={world_b}/image_codec',
        f'--audio_codec={world_b}/audio_codec', f'--out_dir={out}', '--n_items=32', '--n_alone=2', '--n_shown=2',
        f'--data_json={world_b}/captions/data.json', f'--image_root={world_b}/captions/images',
        f'--manifest_jsonl={world_b}/sounds/manifest.jsonl', *args)


@pytest.fixture(scope='module')
def audited(world_b, tmp_path_factory):
    """The out dir of an audit, which has encoded all of it in a second process too, and what was printed."""
    out = tmp_path_factory.mktemp('out')
    code, printed = audit(world_b, out)
    assert code == 0, printed
    return out, printed


def test_the_audit_passes_and_leaves_what_it_promises(audited):
    out, printed = audited
    assert {p.name for p in out.iterdir()} >= {'token_space.json', 'report.json', 'baseline.json', 'gates.json'}
    assert (out / 'pictures' / 'original_decoded.png').exists() and len(list((out / 'sounds').iterdir())) == 4
    report = json.loads((out / 'report.json').read_text())
    assert report['token_space'] == uti.TokenSpace.load(out / 'token_space.json').sha256
    assert 'pass  audio: ids that differ in another process' in printed
    assert 'against the baseline' not in printed and report['psnr'] > 24


def test_a_folder_of_sounds_with_captions_is_audited_as_a_manifest_of_them(audited, world_b, tmp_path):
    """The same sounds, as B2 reads them; each has two captions there, and counts once."""
    rows = ['file_name,caption_1,caption_2']
    for line in (world_b / 'sounds' / 'manifest.jsonl').read_text().splitlines():
        rows.append(f'{json.loads(line)["audio"]},a tone,another')
    (tmp_path / 'c.csv').write_text('\n'.join(dict.fromkeys(rows)) + '\n')
    code, printed = audit(world_b, tmp_path / 'out', '--manifest_jsonl=', f'--sound_dir={world_b}/sounds',
                          f'--sound_captions={tmp_path}/c.csv')
    assert code == 0, printed
    wanted, found = (json.loads((out / 'baseline.json').read_text()) for out in (audited[0], tmp_path / 'out'))
    assert found == wanted                             # of the same items the same measures


def test_a_second_audit_compares_and_a_regression_or_a_missed_floor_fails(audited, world_b, monkeypatch):
    """Of the same items: their pictures come from the manifest now."""
    out, _ = audited
    monkeypatch.setattr(concurrent.futures, 'ProcessPoolExecutor', InThisProcess)
    stored = json.loads((out / 'baseline.json').read_text())
    (out / 'baseline.json').write_text(json.dumps({**stored, 'psnr': stored['psnr'] + 1}))
    code, printed = audit(world_b, out, '--data_json=', f'--manifest_jsonl={world_b}/manifest.jsonl',
                          '--gate_ssim=0.999')
    assert code == 1
    for line in ('FAIL  psnr against the baseline', 'FAIL  ssim ', 'pass  si_snr against the baseline',
                 'pass  ssim against the baseline', 'pass  items is not that of the baseline'):
        assert line in printed


def test_a_codec_whose_ids_depend_on_company_fails_the_audit(world_b, tmp_path, monkeypatch):
    real = codec.PatchImages.encode

    def encode(self, images):
        return (real(self, images) + len(images)) % self.codes
    monkeypatch.setattr(codec.PatchImages, 'encode', encode)
    monkeypatch.setattr(InThisProcess, 'wrong', 1)
    monkeypatch.setattr(concurrent.futures, 'ProcessPoolExecutor', InThisProcess)
    code, printed = audit(world_b, tmp_path, '--audio_codec=', '--n_items=9', '--n_shown=0')
    assert code == 1
    for gate in ('image: ids that differ alone', 'image: ids that differ in another process', 'image: items measured',
                 'psnr'):
        assert f'FAIL  {gate}' in printed


@pytest.mark.parametrize('arg, baseline, message', [
    ('--clip_seconds=0', None, 'clip_seconds = 0.0: wanted more than 0'),
    ('--audio_codebooks=-1', None, 'audio_codebooks = -1: wanted at least 0'),
    ('--n_alone=0', None, 'n_alone = 0: wanted at least 1'), ('--n_shown=-1', None, 'n_shown = -1: wanted at least 0'),
    ('--n_items=0', None, 'n_items = 0: wanted at least 1'), ('--n_shown=0', '{"psnr": ', 'not what an earlier run'),
    ('--n_shown=0', '[]', 'not what an earlier run'), ('--n_shown=0', '{"psnr": null}', 'not what an earlier run')])
def test_what_cannot_be_used_is_one_line_before_the_work(world_b, tmp_path, monkeypatch, arg, baseline, message):
    monkeypatch.setattr(uti.UTI, 'build', lambda **_: pytest.fail('it went to work'))
    if baseline:
        (tmp_path / 'baseline.json').write_text(baseline)
    code, _ = audit(world_b, tmp_path, arg)
    assert message in code and len(code.splitlines()) == 1


def test_data_without_a_usable_file_ends_in_one_line(world_b, tmp_path, monkeypatch):
    (tmp_path / 'm.jsonl').write_text('{"id": "x", "audio": "gone.wav", "text": "t"}\n')
    args = f'--manifest_jsonl={tmp_path}/m.jsonl', '--image_codec='
    assert 'gone.wav: no such sound; fix or remove it' in audit(world_b, tmp_path / 'out', *args)[0]
    code, _ = audit(world_b, tmp_path / 'out', *args, '--max_bad_samples=1')
    assert code == 'the data has no audio that can be read: see data_json and manifest_jsonl'
    assert 'gone.wav' in (tmp_path / 'out' / 'bad_samples.jsonl').read_text()


def test_only_a_bad_sample_is_one_and_another_line_ends_the_audit(tmp_path):
    def read(path):
        raise (BadSample if path == 'cut' else SystemExit)(f'{path}: wrong')
    bad_samples = BadSamples(tmp_path / 'bad.jsonl', 1)
    assert uti.first_usable([('a', 'cut')], read, 1, bad_samples) == [] and len(bad_samples.entries) == 1
    with pytest.raises(SystemExit, match='the disk is full: wrong'):
        uti.first_usable([('a', 'the disk is full')], read, 1, bad_samples)
