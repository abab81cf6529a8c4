"""The codec adapters, each over a tiny random instance of the real class: shapes, ranges, determinism, refusals, and
what the classes get wrong. The measures of a decoded one's distance, by hand."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import (
    DacConfig, DacModel, Emu3VQVAE, Emu3VQVAEConfig, EncodecConfig, EncodecModel, JanusVQVAE, JanusVQVAEConfig,
    MimiConfig, MimiModel, Wav2Vec2BertConfig, Xcodec2Config, Xcodec2Model)

import codec as c

ENCODEC = {'sampling_rate': 16_000, 'num_filters': 4, 'hidden_size': 8, 'codebook_size': 16, 'num_lstm_layers': 1,
           'upsampling_ratios': [8, 5, 4, 2], 'target_bandwidths': [0.2, 0.4]}


def filled(model):
    """Codebooks that from_config leaves at zero."""
    for name, buffer in model.named_buffers():
        if name.endswith(('codebook.embed', 'codebook.embed_sum')):
            buffer.normal_()
    return model


def janus():
    return JanusVQVAE(JanusVQVAEConfig(embed_dim=4, num_embeddings=16, latent_channels=32, base_channels=32,
                                       channel_multiplier=[1, 1, 1], num_res_blocks=1, num_patches=4))


def emu3():
    return Emu3VQVAE(Emu3VQVAEConfig(codebook_size=16, embed_dim=4, base_channels=32, channel_multiplier=[1, 1],
                                     num_res_blocks=1, attn_resolutions=[1], hidden_size=32))


def patches():
    return c.PatchBook(torch.randint(0, 256, (16, 48)).float(), 16, 4)


def encodec(**changes):
    return filled(EncodecModel(EncodecConfig(**{**ENCODEC, **changes})))


def dac():
    return DacModel(DacConfig(encoder_hidden_size=4, downsampling_ratios=[2, 4, 5, 8], decoder_hidden_size=16,
                              n_codebooks=3, codebook_size=16, codebook_dim=4))


def mimi():
    return filled(MimiModel(MimiConfig(
        sampling_rate=16_000, num_filters=4, hidden_size=16, codebook_size=16, codebook_dim=8, num_quantizers=3,
        vector_quantization_hidden_dimension=8, num_hidden_layers=1, intermediate_size=16, num_attention_heads=2,
        num_key_value_heads=2, upsample_groups=16, upsampling_ratios=[8, 5, 4])))


def xcodec2():
    semantic = Wav2Vec2BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                  feature_projection_input_dim=160, add_adapter=False)
    model = Xcodec2Model(Xcodec2Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, encoder_hidden_size=4, semantic_model_config=semantic, quantization_dim=48,
        quantization_levels=[4, 4]))
    model.quantizer.project_in.weight.data *= 1000     # what from_config leaves rounds to one code
    return model


PICTURES = {'janus': janus, 'emu3': emu3, 'patches': patches}
SOUNDS = {'encodec': encodec, 'dac': dac, 'mimi': mimi, 'xcodec2': xcodec2}
EVERY = pytest.mark.parametrize('name', [*PICTURES, *SOUNDS])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """One folder for each class."""
    root = tmp_path_factory.mktemp('codecs')
    for name, make in {**PICTURES, **SOUNDS}.items():
        torch.manual_seed(0)
        model = make()
        save = model.save if name == 'patches' else model.save_pretrained
        save(root / name)
    return root


def load(folder, name):
    if name in PICTURES:
        return c.load_image_codec(folder / name, size=16 if name == 'emu3' else 0)
    return c.load_audio_codec(folder / name, clip_seconds=0.12)


def items_for(codec, n=3):
    generator = torch.Generator().manual_seed(1)
    if isinstance(codec, c.ImageCodec):
        return torch.randint(0, 256, (n, 3, codec.size, codec.size), generator=generator, dtype=torch.uint8)
    return torch.rand(n, codec.samples, generator=generator) - 0.5


@EVERY
def test_there_and_back_with_the_shapes_that_it_describes(folder, name):
    codec = load(folder, name)
    items = items_for(codec)
    described = codec.describe()
    codes = codec.encode(items)
    if name in PICTURES:
        shape = (described['grid'][0] * described['grid'][1],)
    else:
        shape = (described['frames'], described['codebooks'])
    assert codes.dtype == torch.int64 and codes.shape == (3, *shape)
    assert codes.min() >= 0 and codes.max() < described['codes'] == 16
    assert len(codes.unique()) > 1                     # a dead codec would pass all of this
    decoded = codec.decode(codes)
    assert decoded.dtype == items.dtype and decoded.shape == items.shape
    assert json.loads(json.dumps(described)) == described and str(folder) not in json.dumps(described)
    again = load(folder, name)
    assert again.describe() == described and torch.equal(again.encode(items), codes)


@EVERY
def test_batch_mates_change_neither_codes_nor_what_they_decode_to(folder, name):
    codec = load(folder, name)
    items = items_for(codec, 10)                       # more than go through at once
    codes = codec.encode(items)
    alone = torch.cat([codec.encode(items[i:i + 1]) for i in (0, 4, 9)])
    assert torch.equal(alone, codes[[0, 4, 9]])
    assert torch.equal(codec.decode(codes[4:5]), codec.decode(codes)[4:5])


@EVERY
def test_a_code_outside_its_range_is_refused_and_not_clamped(folder, name):
    codec = load(folder, name)
    codes = codec.encode(items_for(codec))
    for wrong in -1, 16:
        codes.view(-1)[5] = wrong
        with pytest.raises(SystemExit, match=rf'code {wrong} at position 5 is outside \[0, 16\)'):
            codec.decode(codes)
    with pytest.raises(SystemExit, match='wanted whole numbers'):
        codec.decode(codes[:, 1:])


def test_the_hash_is_that_of_the_weights(folder):
    codec = load(folder, 'janus')
    next(iter(codec.model.state_dict().values())).view(-1)[0] += 1
    assert c.JanusImages(codec.model, {}).sha256 != codec.sha256


def test_what_is_no_picture_or_no_clip_is_refused(folder):
    with pytest.raises(SystemExit, match=r'wanted uint8 \(B, 3, 16, 16\)'):
        load(folder, 'janus').encode(torch.zeros(1, 3, 16, 16))
    sounds = load(folder, 'dac')
    with pytest.raises(SystemExit, match=r'wanted float32 \(B, 1920\), whole clips at 16000 Hz'):
        sounds.encode(torch.zeros(1, 1919))
    with pytest.raises(SystemExit, match='NaN or infinity in the samples'):
        sounds.encode(torch.full((1, 1920), torch.nan))


# -----------------------------------------------------------------------------
# what the classes get wrong


def test_janus_compares_unit_vectors_as_it_was_trained_to(folder):
    codec = load(folder, 'janus')
    book = codec.model.quantize.embedding.weight
    book *= torch.rand(16, 1) * 4 + 0.1                # of many lengths: the shipped class would go by length
    x = items_for(codec) / 127.5 - 1
    latents = codec.model.quant_conv(codec.model.encoder(x)).flatten(2).transpose(1, 2).reshape(-1, 4)
    distance = torch.cdist(F.normalize(latents), F.normalize(book))   # the reference: both normalised, then nearest
    assert torch.equal(codec.encode(items_for(codec)).flatten(), distance.argmin(1))
    assert not torch.equal(codec.model.encode(x).image_tokens.flatten(), distance.argmin(1))


@pytest.mark.parametrize('changes, message', [
    ({'normalize': True, 'chunk_length_s': 1.0, 'overlap': 0.01}, 'scales its chunks by numbers that the codes do not'),
    ({'audio_channels': 2}, 'of 2 channels: wanted a mono codec')])
def test_an_encodec_that_codes_cannot_hold_is_refused(tmp_path, changes, message):
    encodec(**changes).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=message):
        c.load_audio_codec(tmp_path, 1.0)


def test_dac_returns_as_many_samples_as_it_got(folder):
    codec = load(folder, 'dac')
    codes = codec.encode(items_for(codec))
    assert codec.to_wave(codes.transpose(1, 2)).shape[1] < codec.samples == codec.decode(codes).shape[1]


def test_mimi_forgets_codebooks_of_other_weights():
    model = mimi()
    book = model.quantizer.semantic_residual_vector_quantizer.layers[0].codebook
    assert book.embed is book._embed                   # kept
    book.embed_sum.normal_()
    c.MimiSounds(model, {}, 0.12, 0)
    assert torch.equal(book.embed, book.embed_sum / book.cluster_usage.clamp(min=1e-5)[:, None])


@pytest.mark.parametrize('name', ['encodec', 'dac', 'mimi'])
def test_fewer_codebooks_are_the_first_of_all(folder, name):
    few = c.load_audio_codec(folder / name, 0.12, codebooks=2)
    every = load(folder, name)
    assert torch.equal(few.encode(items_for(few)), every.encode(items_for(every))[:, :, :2])
    with pytest.raises(SystemExit, match='audio_codebooks = 9'):
        c.load_audio_codec(folder / name, 0.12, codebooks=9)


# -----------------------------------------------------------------------------
# loading


def test_a_codec_inside_a_larger_checkpoint_is_the_same_codec(folder, tmp_path):
    alone = load(folder, 'janus')
    tensors = {f'model.vqmodel.{name}': value.clone() for name, value in alone.model.state_dict().items()}
    config = json.loads((folder / 'janus' / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'janus', 'vq_config': config}))

    def load_inside(more, prefix='model.vqmodel.'):
        save_file({**tensors, **more}, tmp_path / 'model.safetensors')
        return c.load_image_codec(tmp_path, prefix)
    assert load_inside({'model.other.weight': torch.zeros(3)}).describe() == alone.describe()
    with pytest.raises(SystemExit, match="no weight below 'model.vq.'"):
        load_inside({}, 'model.vq.')
    with pytest.raises(SystemExit, match='unexpected keys for JanusVQVAE: more'):
        load_inside({'model.vqmodel.more': torch.zeros(1)})
    del tensors['model.vqmodel.quant_conv.bias']
    with pytest.raises(SystemExit, match='missing keys for JanusVQVAE: quant_conv.bias'):
        load_inside({})


def test_what_cannot_be_a_codec_is_named(folder, tmp_path):
    with pytest.raises(SystemExit, match="model_type 'dac' is no picture codec"):
        c.load_image_codec(folder / 'dac')
    with pytest.raises(SystemExit, match="model_type 'janus_vqgan' is no sound codec"):
        c.load_audio_codec(folder / 'janus', 1.0)
    with pytest.raises(SystemExit, match='cannot read a codec here'):
        c.load_image_codec(tmp_path)
    with pytest.raises(SystemExit, match='image_size = 0: Emu3 takes any size, set a multiple of 2'):
        c.load_image_codec(folder / 'emu3')
    with pytest.raises(SystemExit, match='image_size = 99: this codec takes pictures of 16'):
        c.load_image_codec(folder / 'janus', size=99)


# -----------------------------------------------------------------------------
# measures


def test_psnr_by_hand():
    black = np.zeros((2, 8, 8, 3), np.uint8)
    off = black.copy()
    off[1] = 16                                        # 20 log10(255 / 16) = 24.05
    assert c.psnr(black, off).round(2).tolist() == [99.0, 24.05]


def test_ssim_is_one_for_equal_pictures_and_falls_with_structure_and_not_with_brightness():
    rng = np.random.default_rng(0)
    x = rng.integers(40, 200, (1, 32, 32, 3), dtype=np.uint8)
    assert c.ssim(x, x)[0] == pytest.approx(1)
    assert c.ssim(x, x + 10)[0] > 0.97 > 0.2 > c.ssim(x, rng.permutation(x, axis=1))[0]


def test_si_snr_by_hand():
    x = np.array([[1.0, 1, -1, -1]])
    noise = np.array([[1.0, -1, 1, -1]])               # at a right angle to x, both without a mean
    assert c.si_snr(x, 3 * x + 0.3 * noise)[0] == pytest.approx(20)          # loudness does not count
    assert c.si_snr(x, noise)[0] == -99 and c.si_snr(x, 0 * x)[0] <= 0 and c.si_snr(x, x)[0] == 99


def test_log_mel_distance_is_nothing_for_equal_sounds_and_grows_with_another_pitch():
    t = np.arange(16_000) / 16_000
    low = np.sin(2 * np.pi * 300 * t)[None]
    high = np.sin(2 * np.pi * 900 * t)[None]
    assert c.log_mel_distance(low, low, 16_000)[0] == 0
    assert c.log_mel_distance(low, 0.9 * low, 16_000)[0] < 0.22              # 2 ln 0.9
    assert c.log_mel_distance(low, high, 16_000)[0] > 0.5
