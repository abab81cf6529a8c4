"""
Codecs: pictures and sounds to codes and back, over the classes that transformers ships, behind one interface; and how
far a decoded one is from what went in.

    describe()              what TokenSpace wants to know: class, settings, sha256 of the weights, sizes
    pictures   encode       uint8 (B, 3, H, W) -> int64 (B, N), codes from 0       decode: the other way
    sounds     encode       float32 (B, samples) -> int64 (B, F, K)                decode: the other way

Letters: B items, H, W pixels, N codes of a picture, F frames, K codebooks. A code outside [0, codes) ends the run with
one line, in and out; none is clamped or replaced.
"""
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common import sha256_tensors

TOGETHER = 8                       # items that go through a codec at once, always: see in_equal_batches


def in_equal_batches(function, items):
    """function over a tensor of items, TOGETHER at a time, the last batch filled up with copies.

    Every item meets the same kernels with the same shapes whoever its batch mates are, so an id at the edge between
    two codes cannot fall one way alone and the other way in company.
    """
    parts = []
    for some in items.split(TOGETHER):
        filled = torch.cat([some, some[:1].expand(TOGETHER - len(some), *some.shape[1:])])
        parts.append(function(filled)[:len(some)])
    return torch.cat(parts)


class Codec:
    """What all adapters share. model: a module without gradients, in eval mode, float32."""
    def __init__(self, model, settings):
        self.model, self.settings = model.eval().float().requires_grad_(False), settings
        self.sha256, self.device = sha256_tensors(model.state_dict().items()), torch.device('cpu')

    def to(self, device):
        """The same codec with its arithmetic on this device; what goes in and comes out stays on the CPU."""
        self.device = torch.device(device)
        self.model.to(self.device)
        return self

    def run(self, function, items):
        return in_equal_batches(lambda x: function(x.to(self.device)).cpu(), items)

    def check(self, codes, shape, where):
        """Exit unless codes has this shape, (B, *shape), and every one is in [0, codes)."""
        if codes.shape[1:] != shape or codes.dtype not in (torch.int32, torch.int64):
            raise SystemExit(f'{where}: {codes.dtype} {tuple(codes.shape)}, wanted whole numbers (B, {shape})')
        wrong = torch.nonzero(((codes < 0) | (codes >= self.codes)).flatten())
        if len(wrong):
            at = int(wrong[0])
            raise SystemExit(f'{where}: code {codes.flatten()[at]} at position {at} is outside [0, {self.codes})')
        return codes.long()

    def described(self, **sizes):
        return {'class': type(self.model).__name__, 'settings': self.settings, 'sha256': self.sha256, **sizes,
                'codes': self.codes}


def finite(decoded, where):
    if not torch.isfinite(decoded).all():
        raise SystemExit(f'{where}: decoded to NaN or infinity; are the weights whole?')
    return decoded


# -----------------------------------------------------------------------------
# pictures


class ImageCodec(Codec):
    """to_codes: float (B, 3, H, W) in [-1, 1] -> (B, N); to_pixels: the other way. Set by each class below."""
    def describe(self):
        return self.described(size=self.size, grid=[self.side, self.side])

    @torch.no_grad()
    def encode(self, images):
        if images.dtype != torch.uint8 or images.shape[1:] != (3, self.size, self.size):
            raise SystemExit(f'pictures: {images.dtype} {tuple(images.shape)}, wanted uint8 (B, 3, {self.size}, '
                             f'{self.size}), the size of {type(self.model).__name__}')
        codes = self.run(lambda x: self.to_codes(x / 127.5 - 1), images)
        return self.check(codes, (self.side ** 2,), 'encoded picture')

    @torch.no_grad()
    def decode(self, codes):
        pixels = self.run(self.to_pixels, self.check(codes, (self.side ** 2,), 'picture'))
        return ((finite(pixels, 'picture') + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class JanusImages(ImageCodec):
    """Its codebook was trained on the unit sphere: the reference compares and decodes unit vectors. The class that
    transformers ships normalises when it decodes but not when it encodes; here both do."""
    def __init__(self, model, settings):
        super().__init__(model, settings)
        self.codes, self.side = model.config.num_embeddings, model.config.num_patches
        self.size = self.side * 2 ** (len(model.config.channel_multiplier) - 1)

    def to_codes(self, x):
        latents = F.normalize(self.model.quant_conv(self.model.encoder(x)), dim=1).flatten(2)   # (B, d, N)
        return (F.normalize(self.model.quantize.embedding.weight, dim=1) @ latents).argmax(1)

    def to_pixels(self, codes):
        return self.model.decode(codes)


class Emu3Images(ImageCodec):
    """Takes pictures of any size; a picture is its video of one step."""
    def __init__(self, model, settings, size):
        super().__init__(model, settings)
        factor = model.spatial_scale_factor
        if size == 0 or size % factor:
            raise SystemExit(f'image_size = {size}: Emu3 takes any size, set a multiple of {factor}')
        self.codes, self.side, self.size = model.config.codebook_size, size // factor, size

    def to_codes(self, x):
        sizes = torch.tensor([[self.size, self.size]] * len(x))
        return torch.stack(self.model.encode(x, sizes).image_tokens).flatten(1)

    def to_pixels(self, codes):
        return self.model.decode(codes.view(-1, self.side, self.side))


class Patches(torch.nn.Module):
    """The small world's own picture codec: a picture is its patches, each the nearest of a codebook.

    patches: (codes, 3 * patch * patch), whole numbers 0 to 255, so that sums of squares are exact in float32 and the
    nearest is the same on every machine.
    """
    def __init__(self, patches, size, patch):
        super().__init__()
        self.register_buffer('patches', patches)
        self.size, self.patch = size, patch

    def save(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / 'model.safetensors')
        (folder / 'config.json').write_text(json.dumps(
            {'model_type': 'patches', 'size': self.size, 'patch': self.patch, 'codes': len(self.patches)}))


class PatchImages(ImageCodec):
    def __init__(self, model, settings):
        super().__init__(model, settings)
        self.codes, self.size, self.side = len(model.patches), model.size, model.size // model.patch

    def to_codes(self, x):
        cut = F.unfold(((x + 1) * 127.5).round(), self.model.patch, stride=self.model.patch)   # (B, 3 p p, N)
        book = self.model.patches
        return ((book ** 2).sum(1)[:, None] - 2 * book @ cut).argmin(1)

    def to_pixels(self, codes):
        cut = self.model.patches[codes].transpose(1, 2)
        return F.fold(cut, self.size, self.model.patch, stride=self.model.patch) / 127.5 - 1


# -----------------------------------------------------------------------------
# sounds


class AudioCodec(Codec):
    """to_codes: (B, samples) -> (B, K, F); to_wave: the other way. Set by each class below, with hop, samples a frame.

    A clip is clip_seconds rounded up to whole frames; codebooks: how many of the codec's, from the first; 0 is all.
    """
    def __init__(self, model, settings, clip_seconds, codebooks, has, hop, codes):
        super().__init__(model, settings)
        self.rate, self.codes, self.codebooks = model.config.sampling_rate, codes, codebooks or has
        if not 1 <= self.codebooks <= has:
            raise SystemExit(f'audio_codebooks = {codebooks}: {type(model).__name__} has {has}')
        if getattr(model.config, 'audio_channels', 1) != 1:
            raise SystemExit(f'{type(model).__name__} of {model.config.audio_channels} channels: wanted a mono codec')
        self.frames = math.ceil(round(clip_seconds * self.rate) / hop)
        self.samples = self.frames * hop
        if self.frames < 1:
            raise SystemExit(f'clip_seconds = {clip_seconds}: shorter than one frame')

    def describe(self):
        return self.described(sample_rate=self.rate, samples=self.samples, frames=self.frames,
                              codebooks=self.codebooks)

    @torch.no_grad()
    def encode(self, waves):
        if waves.dtype != torch.float32 or waves.shape[1:] != (self.samples,):
            raise SystemExit(f'sounds: {waves.dtype} {tuple(waves.shape)}, wanted float32 (B, {self.samples}), '
                             f'whole clips at {self.rate} Hz')
        if not torch.isfinite(waves).all():
            raise SystemExit('sounds: NaN or infinity in the samples')
        codes = self.run(self.to_codes, waves).transpose(1, 2).contiguous()
        return self.check(codes, (self.frames, self.codebooks), 'encoded sound')

    @torch.no_grad()
    def decode(self, codes):
        codes = self.check(codes, (self.frames, self.codebooks), 'sound').transpose(1, 2)
        waves = finite(self.run(self.to_wave, codes), 'sound')
        # some codecs return a few samples more or less than their frames hold: cut, or filled up with silence
        return F.pad(waves, (0, max(0, self.samples - waves.shape[1])))[:, :self.samples].float()


class EncodecSounds(AudioCodec):
    def __init__(self, model, settings, clip_seconds, codebooks):
        config = model.config
        if config.normalize or config.chunk_length_s is not None:
            raise SystemExit('this EnCodec scales its chunks by numbers that the codes do not hold (the 48 kHz kind): '
                             'wanted one without, such as facebook/encodec_24khz')
        super().__init__(model, settings, clip_seconds, codebooks, config.num_quantizers, config.hop_length,
                         config.codebook_size)

    def to_codes(self, x):
        # the lowest rate that has enough codebooks; they are residual, so the first of many are those of few
        enough = next(b for b in sorted(self.model.config.target_bandwidths)
                      if self.model.quantizer.get_num_quantizers_for_bandwidth(b) >= self.codebooks)
        return self.model.encode(x[:, None], bandwidth=enough).audio_codes[0][:, :self.codebooks]

    def to_wave(self, codes):
        return self.model.decode(codes[None], [None]).audio_values[:, 0]


class DacSounds(AudioCodec):
    """Decodes to fewer samples than it was given; the clip is filled up with silence at its end."""
    def __init__(self, model, settings, clip_seconds, codebooks):
        config = model.config
        super().__init__(model, settings, clip_seconds, codebooks, config.n_codebooks, config.hop_length,
                         config.codebook_size)

    def to_codes(self, x):
        return self.model.encode(x[:, None], n_quantizers=self.codebooks).audio_codes

    def to_wave(self, codes):
        return self.model.decode(audio_codes=codes).audio_values


class MimiSounds(AudioCodec):
    """Its codebooks are divided out once and kept: forgotten here, so that they are those of the loaded weights. It is
    never given a padding mask: clips are all of one length."""
    def __init__(self, model, settings, clip_seconds, codebooks):
        config = model.config
        for module in model.modules():
            if hasattr(module, '_embed'):
                module._embed = None
        hop = round(config.sampling_rate / config.frame_rate)
        super().__init__(model, settings, clip_seconds, codebooks, config.num_quantizers, hop, config.codebook_size)
        if self.codebooks < config.num_semantic_quantizers:
            raise SystemExit(f'audio_codebooks = {codebooks}: Mimi needs its {config.num_semantic_quantizers} semantic '
                             'ones at least')

    def to_codes(self, x):
        return self.model.encode(x[:, None], num_quantizers=self.codebooks).audio_codes

    def to_wave(self, codes):
        return self.model.decode(codes).audio_values[:, 0]


class Xcodec2Sounds(AudioCodec):
    """One codebook, the product of its levels. It also hears through a speech encoder, which is fed each clip's mel
    spectrum, 80 bands every 10 ms, two by two: one a frame."""
    def __init__(self, model, settings, clip_seconds, codebooks):
        from transformers import SeamlessM4TFeatureExtractor
        self.mel = SeamlessM4TFeatureExtractor()       # the same arithmetic as its own extractor, without torchaudio
        config = model.config
        super().__init__(model, settings, clip_seconds, codebooks, 1, config.hop_length,
                         math.prod(config.quantization_levels))
        if config.hop_length != 320 or config.sampling_rate != 16_000:
            raise SystemExit(f'this XCodec2 has frames of {config.hop_length} samples at {config.sampling_rate} Hz; '
                             'its speech encoder takes one of 320 at 16000')

    def to_codes(self, x):
        padded = F.pad(x, (160, 160)).cpu().numpy()
        features = [self.mel(wave, sampling_rate=16_000, padding=False)['input_features'][0] for wave in padded]
        features = torch.from_numpy(np.stack(features))[:, :self.frames].to(x.device)
        return self.model.encode(x[:, None], input_features=features).audio_codes

    def to_wave(self, codes):
        return self.model.decode(audio_codes=codes).audio_values[:, 0]


# -----------------------------------------------------------------------------
# loading


def checkpoint(path, prefix=''):
    """(config dict, {name: tensor} or None) of a Hugging Face folder or name.

    With a prefix, such as 'model.vqmodel.', only the tensors below it are read, and the config is the sub-config of
    the codec; without one the tensors are left to from_pretrained.
    """
    from transformers.utils import cached_file
    try:
        config = json.loads(Path(cached_file(path, 'config.json') or Path(path) / 'config.json').read_text())
        if not prefix:
            return config, None
        index = cached_file(path, 'model.safetensors.index.json', _raise_exceptions_for_missing_entries=False)
        places = json.loads(Path(index).read_text())['weight_map'] if index else None
        files = {f for k, f in places.items() if k.startswith(prefix)} if places else {'model.safetensors'}
        tensors = {}
        for name in sorted(files):
            with safe_open(cached_file(path, name), 'pt') as f:
                tensors.update({k.removeprefix(prefix): f.get_tensor(k) for k in f.keys() if k.startswith(prefix)})
    except (OSError, ValueError, KeyError) as e:
        raise SystemExit(f'{path}: cannot read a codec here ({str(e).splitlines()[0]})')
    if not tensors:
        raise SystemExit(f'{path}: no weight below {prefix!r}')
    if 'vq_config' in config:
        return {'model_type': f'{config.get("model_type")}_vqgan', **config['vq_config']}, tensors
    return config, tensors


def load_model(path, prefix, config, tensors, cls):
    """The codec with exactly the weights of the checkpoint; one missing or left over is an error."""
    from transformers.utils import logging
    logging.disable_progress_bar()
    where = f'{path} {prefix}'.strip()
    try:
        if tensors is None:
            model, found = cls.from_pretrained(path, output_loading_info=True)
        else:
            made = cls.config_class.from_dict(config)
            model, found = cls.from_pretrained(None, config=made, state_dict=tensors, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as e:
        raise SystemExit(f'{where}: cannot load {cls.__name__} ({str(e).splitlines()[0]})')
    for what in 'missing_keys', 'unexpected_keys', 'mismatched_keys':
        if found[what]:
            raise SystemExit(f'{where}: {what.replace("_", " ")} for {cls.__name__}: {sorted(found[what], key=str)[0]} '
                             f'and {len(found[what]) - 1} more; is this the right checkpoint and prefix?')
    return model


def plain(config):
    """A codec's settings as the token space keeps them: without what depends on a version, a machine or a path."""
    dropped = ('transformers_version', 'architectures', 'dtype', 'torch_dtype', 'model_type', '_name_or_path')
    return {k: v for k, v in config.items() if k not in dropped}


def load_image_codec(path, prefix='', size=0):
    """Hugging Face folder or name -> adapter. prefix: the codec is a part of a larger checkpoint, for example
    'model.vqmodel.' of Janus. size: pixels, for codecs that take any."""
    import transformers                                # each of its classes is a second of imports: only the one
    config, tensors = checkpoint(path, prefix)
    kind = config.get('model_type')
    if kind == 'patches':
        model = Patches(load_file(Path(path) / 'model.safetensors')['patches'].float(), config['size'], config['patch'])
        codec = PatchImages(model, plain(config))
    elif kind == 'janus_vqgan':
        model = load_model(path, prefix, config, tensors, transformers.JanusVQVAE)
        codec = JanusImages(model, plain(config))
    elif kind == 'emu3_vqgan':
        model = load_model(path, prefix, config, tensors, transformers.Emu3VQVAE)
        codec = Emu3Images(model, plain(config), size)
    else:
        raise SystemExit(f'{path}: model_type {kind!r} is no picture codec that decodes: wanted janus_vqgan, '
                         'emu3_vqgan or patches (of a larger checkpoint: set its prefix)')
    if size not in (0, codec.size):
        raise SystemExit(f'image_size = {size}: this codec takes pictures of {codec.size}; set 0')
    return codec


def load_audio_codec(path, clip_seconds, prefix='', codebooks=0):
    """Hugging Face folder or name -> adapter for clips of clip_seconds. codebooks: how many to use, 0 for all."""
    import transformers
    config, tensors = checkpoint(path, prefix)
    kinds = {'encodec': ('EncodecModel', EncodecSounds), 'dac': ('DacModel', DacSounds),
             'mimi': ('MimiModel', MimiSounds), 'xcodec2': ('Xcodec2Model', Xcodec2Sounds)}
    if config.get('model_type') not in kinds:
        raise SystemExit(f'{path}: model_type {config.get("model_type")!r} is no sound codec known here: wanted '
                         f'{", ".join(kinds)}')
    name, adapter = kinds[config['model_type']]
    model = load_model(path, prefix, config, tensors, getattr(transformers, name))
    return adapter(model, plain(config), clip_seconds, codebooks)


# -----------------------------------------------------------------------------
# how far a decoded one is from what went in


def psnr(truth, decoded):
    """uint8 pictures (..., H, W, 3) -> dB each; 99 for equal ones."""
    error = ((np.asarray(truth, np.float64) - decoded) ** 2).mean((-3, -2, -1))
    return 10 * np.log10(255 ** 2 / np.maximum(error, 255 ** 2 / 10 ** 9.9))


def ssim(truth, decoded, window=7):
    """uint8 (B, H, W, 3) -> structural similarity each, of the luma, in windows of 7 x 7, means over all windows."""
    def means(x):
        return F.avg_pool2d(x, window, stride=1)
    weights = np.array([0.299, 0.587, 0.114])
    x, y = (torch.from_numpy(np.asarray(v, np.float64) @ weights)[:, None] for v in (truth, decoded))
    mx, my = means(x), means(y)
    vx, vy, vxy = means(x * x) - mx ** 2, means(y * y) - my ** 2, means(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))
    return value.mean((1, 2, 3)).numpy()


def si_snr(truth, decoded):
    """float (B, samples) at one rate -> scale-invariant signal to noise in dB each; within -99 and 99."""
    x, y = (np.asarray(v, np.float64) for v in (truth, decoded))
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    part = (x * y).sum(-1, keepdims=True) / ((x * x).sum(-1, keepdims=True) + 1e-20) * x
    ratio = ((part ** 2).sum(-1) + 1e-20) / (((y - part) ** 2).sum(-1) + 1e-20)
    return np.clip(10 * np.log10(ratio), -99, 99)


def log_mel(waves, rate, bands=40):
    """(B, samples) -> (B, bands, windows) natural log of the mel spectrum, windows of 32 ms every 16 ms."""
    n = 2 ** round(math.log2(0.032 * rate))
    spectrum = torch.stft(torch.as_tensor(np.asarray(waves), dtype=torch.float32), n, n // 2,
                          window=torch.hann_window(n), return_complex=True).abs() ** 2
    edges = np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), bands + 2)
    edges = 700 * (10 ** (edges / 2595) - 1)
    f = np.linspace(0, rate / 2, n // 2 + 1)
    rising = (f - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - f) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.from_numpy(np.clip(np.minimum(rising, falling), 0, None)).float()
    return torch.log(filters @ spectrum + 0.1)         # the floor is 50 dB below a tone at full scale


def log_mel_distance(truth, decoded, rate):
    """Mean absolute difference of the log mel spectra, in nats, each."""
    return (log_mel(truth, rate) - log_mel(decoded, rate)).abs().mean((1, 2)).numpy()
