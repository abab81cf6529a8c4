"""
Codecs: pictures and sounds to codes and back, over the classes that transformers ships, behind one interface; and the
distance of a decoded one from its original.

    describe()              what TokenSpace wants to know: class, settings, sha256 of the weights, sizes
    pictures   encode       uint8 (B, 3, H, W) -> int64 (B, N), codes from 0       decode: the other way
    sounds     encode       float32 (B, S) -> int64 (B, F, K)                      decode: the other way

Letters: B items, H, W pixels, N codes of a picture, S samples of a clip, F frames, K codebooks, D width of a code's
vector. A code outside [0, codes) ends the run with one line, on its way in and out; none is clamped or replaced.
"""
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common import first_line, sha256_tensors

GROUP_SIZE = 8                                         # items that go through a codec at once, always


def in_equal_groups(function, items):
    """function over a tensor of items, GROUP_SIZE at a time, the last group filled up with copies.

    Every item meets the same kernels with the same shapes whoever its batch mates are, so an id at the edge between
    two codes cannot fall one way alone and the other way in company.
    """
    results = []
    for group in items.split(GROUP_SIZE):
        n_missing = GROUP_SIZE - len(group)
        copies = group[:1].expand(n_missing, *group.shape[1:])
        filled = torch.cat([group, copies])
        results.append(function(filled)[:len(group)])  # the copies are dropped again
    return torch.cat(results)


class Codec:
    """What all adapters share.

    model: the module, here without gradients, in eval mode, float32. settings: JSON-able, of its config.
    codes: the size of a codebook.
    """
    def __init__(self, model, settings, codes):
        self.model = model.eval().float().requires_grad_(False)   # codes must not depend on a checkpoint's dtype
        self.settings = settings
        self.codes = codes
        self.sha256 = sha256_tensors(model.state_dict().items())
        self.device = torch.device('cpu')

    def to(self, device):
        """The same codec with its arithmetic on this device; its inputs and outputs stay on the CPU."""
        self.device = torch.device(device)
        self.model.to(self.device)
        return self

    def run(self, function, items):
        return in_equal_groups(lambda group: function(group.to(self.device)).cpu(), items)

    def check(self, codes, shape, where):
        """int64 codes; exits unless they are whole numbers (B, *shape), every one in [0, self.codes)."""
        if codes.shape[1:] != shape or codes.dtype not in (torch.int32, torch.int64):
            raise SystemExit(f'{where}: {codes.dtype} {tuple(codes.shape)}, wanted whole numbers (B, {shape})')
        outside = (codes < 0) | (codes >= self.codes)
        wrong = torch.nonzero(outside.flatten())
        if len(wrong):
            position = int(wrong[0])
            raise SystemExit(f'{where}: code {codes.flatten()[position]} at position {position} is outside '
                             f'[0, {self.codes})')
        return codes.long()                            # an index into a codebook

    def described(self, **sizes):
        return {
            'class': type(self.model).__name__,
            'settings': self.settings,
            'sha256': self.sha256,
            **sizes,
            'codes': self.codes,
        }


def require_finite(decoded, where):
    if not torch.isfinite(decoded).all():
        raise SystemExit(f'{where}: decoded to NaN or infinity; are the weights whole?')


# -----------------------------------------------------------------------------
# pictures


class ImageCodec(Codec):
    """A picture of size x size pixels is side x side codes.

    Each class below has to_codes, float (B, 3, H, W) in [-1, 1] -> (B, N), and to_pixels, the other way.
    """
    def __init__(self, model, settings, codes, *, side, size):
        super().__init__(model, settings, codes)
        self.side = side
        self.size = size

    def describe(self):
        return self.described(size=self.size, grid=[self.side, self.side])

    @torch.no_grad()
    def encode(self, images):
        if images.dtype != torch.uint8 or images.shape[1:] != (3, self.size, self.size):
            raise SystemExit(f'pictures: {images.dtype} {tuple(images.shape)}, wanted uint8 (B, 3, {self.size}, '
                             f'{self.size}), the size of {type(self.model).__name__}')
        codes = self.run(lambda group: self.to_codes(group / 127.5 - 1), images)     # (B, N)
        return self.check(codes, (self.side ** 2,), 'encoded picture')

    @torch.no_grad()
    def decode(self, codes):
        codes = self.check(codes, (self.side ** 2,), 'picture')
        pixels = self.run(self.to_pixels, codes)                                     # (B, 3, H, W)
        require_finite(pixels, 'picture')
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class JanusImages(ImageCodec):
    """Its codebook was trained on the unit sphere: the reference compares and decodes unit vectors. The class that
    transformers ships normalises when it decodes but not when it encodes; here both do."""
    def __init__(self, model, settings):
        config = model.config
        side = config.num_patches
        size = side * 2 ** (len(config.channel_multiplier) - 1)
        super().__init__(model, settings, config.num_embeddings, side=side, size=size)

    def to_codes(self, x):
        latents = self.model.quant_conv(self.model.encoder(x))       # (B, D, side, side)
        latents = F.normalize(latents, dim=1).flatten(2)             # (B, D, N)
        book = F.normalize(self.model.quantize.embedding.weight, dim=1)
        return (book @ latents).argmax(1)                            # (B, N)

    def to_pixels(self, codes):
        return self.model.decode(codes)                              # (B, 3, H, W)


class Emu3Images(ImageCodec):
    """Takes pictures of any size; a picture is its video of one step."""
    def __init__(self, model, settings, size):
        factor = model.spatial_scale_factor
        if size == 0 or size % factor:
            raise SystemExit(f'image_size = {size}: Emu3 takes any size, set a multiple of {factor}')
        super().__init__(model, settings, model.config.codebook_size, side=size // factor, size=size)

    def to_codes(self, x):
        sizes = torch.tensor([[self.size, self.size]] * len(x))
        grids = self.model.encode(x, sizes).image_tokens             # B of (side, side)
        return torch.stack(grids).flatten(1)                         # (B, N)

    def to_pixels(self, codes):
        return self.model.decode(codes.view(-1, self.side, self.side))   # (B, 3, H, W)


class PatchBook(torch.nn.Module):
    """A codebook of pixel patches, each picture patch the nearest of them: no network, exact arithmetic.

    patches: (codes, 3 * patch * patch), whole numbers 0 to 255, so that sums of squares are exact in float32 and the
    nearest is the same on every machine.
    """
    def __init__(self, patches, size, patch):
        super().__init__()
        self.register_buffer('patches', patches)
        self.size = size
        self.patch = patch

    def save(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / 'model.safetensors')
        # as transformers names a class in this file
        config = {'model_type': 'patches', 'size': self.size, 'patch': self.patch, 'codes': len(self.patches)}
        (folder / 'config.json').write_text(json.dumps(config))

    @classmethod
    def load(cls, folder, config):
        try:
            tensors = load_file(Path(folder) / 'model.safetensors')
            return cls(tensors['patches'].float(), config['size'], config['patch'])
        except Exception as e:
            raise SystemExit(f'{folder}: cannot load its patches ({first_line(e)})')


class PatchImages(ImageCodec):
    def __init__(self, model, settings):
        super().__init__(model, settings, len(model.patches), side=model.size // model.patch, size=model.size)

    def describe(self):
        return {**super().describe(), 'class': 'Patches'}            # its name in token spaces, hashed with them

    def to_codes(self, x):
        pixels = ((x + 1) * 127.5).round()
        cut = F.unfold(pixels, self.model.patch, stride=self.model.patch)            # (B, 3 patch patch, N)
        book = self.model.patches
        squares = (book ** 2).sum(1)
        return (squares[:, None] - 2 * book @ cut).argmin(1)         # |book - cut|^2 but for |cut|^2, the same for all

    def to_pixels(self, codes):
        cut = self.model.patches[codes].transpose(1, 2)              # (B, 3 patch patch, N)
        return F.fold(cut, self.size, self.model.patch, stride=self.model.patch) / 127.5 - 1


# -----------------------------------------------------------------------------
# sounds


class AudioCodec(Codec):
    """A clip of clip_seconds, rounded up to whole frames of hop samples, is frames x codebooks codes.

    codebooks: the number to use of those available, from the first; 0 is all. Each class below has to_codes, (B, S) ->
    (B, K, F), and to_wave, the other way.
    """
    def __init__(self, model, settings, codes, *, clip_seconds, codebooks, available, hop):
        super().__init__(model, settings, codes)
        self.rate = model.config.sampling_rate
        self.codebooks = codebooks or available
        if not 1 <= self.codebooks <= available:
            raise SystemExit(f'audio_codebooks = {codebooks}: {type(model).__name__} has {available}')
        channels = getattr(model.config, 'audio_channels', 1)
        if channels != 1:
            raise SystemExit(f'{type(model).__name__} of {channels} channels: wanted a mono codec')
        self.frames = math.ceil(round(clip_seconds * self.rate) / hop)   # rounded: 0.07 * 24000 is a hair above 1680
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
        codes = self.run(self.to_codes, waves)                       # (B, K, F)
        codes = codes.transpose(1, 2).contiguous()                   # (B, F, K)
        return self.check(codes, (self.frames, self.codebooks), 'encoded sound')

    @torch.no_grad()
    def decode(self, codes):
        codes = self.check(codes, (self.frames, self.codebooks), 'sound')
        waves = self.run(self.to_wave, codes.transpose(1, 2))        # (B, about S)
        require_finite(waves, 'sound')
        # some codecs return a few samples more or less than their frames hold: cut, or fill up with silence
        n_missing = max(0, self.samples - waves.shape[1])
        return F.pad(waves, (0, n_missing))[:, :self.samples].float()


class EncodecSounds(AudioCodec):
    def __init__(self, model, settings, clip_seconds, codebooks):
        config = model.config
        if config.normalize or config.chunk_length_s is not None:
            raise SystemExit('this EnCodec scales its chunks by numbers that the codes do not hold (the 48 kHz kind): '
                             'wanted one without, such as facebook/encodec_24khz')
        super().__init__(model, settings, config.codebook_size, clip_seconds=clip_seconds, codebooks=codebooks,
                         available=config.num_quantizers, hop=config.hop_length)
        # the lowest rate that has enough codebooks; they are residual, so the first of many are those of few
        for bandwidth in sorted(config.target_bandwidths):
            if model.quantizer.get_num_quantizers_for_bandwidth(bandwidth) >= self.codebooks:
                self.bandwidth = bandwidth
                break

    def to_codes(self, x):
        encoded = self.model.encode(x[:, None], bandwidth=self.bandwidth)
        return encoded.audio_codes[0][:, :self.codebooks]            # (B, K, F), of its only chunk

    def to_wave(self, codes):
        return self.model.decode(codes[None], [None]).audio_values[:, 0]   # (B, S)


class DacSounds(AudioCodec):
    """Decodes to fewer samples than it was given; the end of the clip is filled up with silence."""
    def __init__(self, model, settings, clip_seconds, codebooks):
        config = model.config
        super().__init__(model, settings, config.codebook_size, clip_seconds=clip_seconds, codebooks=codebooks,
                         available=config.n_codebooks, hop=config.hop_length)

    def to_codes(self, x):
        return self.model.encode(x[:, None], n_quantizers=self.codebooks).audio_codes     # (B, K, F)

    def to_wave(self, codes):
        return self.model.decode(audio_codes=codes).audio_values     # (B, less than S)


class MimiSounds(AudioCodec):
    """It is never given a padding mask: clips are all of one length."""
    def __init__(self, model, settings, clip_seconds, codebooks):
        config = model.config
        for module in model.modules():
            if hasattr(module, '_embed'):
                module._embed = None                   # computed at first use: forget what other weights left there
        hop = round(config.sampling_rate / config.frame_rate)
        super().__init__(model, settings, config.codebook_size, clip_seconds=clip_seconds, codebooks=codebooks,
                         available=config.num_quantizers, hop=hop)
        if self.codebooks < config.num_semantic_quantizers:
            raise SystemExit(f'audio_codebooks = {codebooks}: Mimi needs its {config.num_semantic_quantizers} semantic '
                             'ones at least')

    def to_codes(self, x):
        return self.model.encode(x[:, None], num_quantizers=self.codebooks).audio_codes   # (B, K, F)

    def to_wave(self, codes):
        return self.model.decode(codes).audio_values[:, 0]           # (B, S)


class Xcodec2Sounds(AudioCodec):
    """One codebook, the product of its levels. It also hears through a speech encoder, which is fed each clip's mel
    spectrum, 80 bands every 10 ms, two by two: one a frame."""
    def __init__(self, model, settings, clip_seconds, codebooks):
        from transformers import SeamlessM4TFeatureExtractor
        self.mel = SeamlessM4TFeatureExtractor()       # the same arithmetic as its own extractor, without torchaudio
        config = model.config
        codes = math.prod(config.quantization_levels)
        super().__init__(model, settings, codes, clip_seconds=clip_seconds, codebooks=codebooks, available=1,
                         hop=config.hop_length)
        # the released one; the speech encoder's features would no longer be one a frame
        if config.hop_length != 320 or config.sampling_rate != 16_000:
            raise SystemExit(f'this XCodec2 has frames of {config.hop_length} samples at {config.sampling_rate} Hz; '
                             'its speech encoder takes one of 320 at 16000')

    def to_codes(self, x):
        features = []
        padded = F.pad(x, (160, 160))                                # half a frame each side, as its own extractor
        for wave in padded.cpu().numpy():
            features.append(self.mel(wave, sampling_rate=16_000, padding=False)['input_features'][0])
        features = torch.from_numpy(np.stack(features))              # (B, F or more, 160)
        features = features[:, :self.frames].to(x.device)
        return self.model.encode(x[:, None], input_features=features).audio_codes         # (B, 1, F)

    def to_wave(self, codes):
        return self.model.decode(audio_codes=codes).audio_values[:, 0]                    # (B, S)


# -----------------------------------------------------------------------------
# loading


def read_weights(path, prefix=''):
    """(config dict, {name: tensor} or None) of a Hugging Face folder or name.

    With a prefix, such as 'model.vqmodel.', only the tensors below it are read, and the config is the sub-config of
    the codec; without one the tensors are left to from_pretrained.
    """
    from transformers.utils import cached_file
    tensors = {}
    try:
        config_file = cached_file(path, 'config.json')
        if config_file is None:
            raise FileNotFoundError('no config.json')
        config = dict(json.loads(Path(config_file).read_text()))
        if not prefix:
            return config, None                        # names may differ from file to class: from_pretrained knows them
        for file in files_with(path, prefix):
            with safe_open(cached_file(path, file), 'pt') as f:
                for name in f.keys():
                    if name.startswith(prefix):
                        tensors[name.removeprefix(prefix)] = f.get_tensor(name)
    except Exception as e:                             # missing, cut or foreign files raise all kinds
        raise SystemExit(f'{path}: cannot read a codec here ({first_line(e)})')
    if not tensors:
        raise SystemExit(f'{path}: no weight below {prefix!r}')
    if 'vq_config' in config:                          # of Janus or Emu3, around a codec that has no name of its own
        model_type = f'{config.get("model_type")}_vqgan'
        config = {'model_type': model_type, **config['vq_config']}
    return config, tensors


def files_with(path, prefix):
    """The files of a checkpoint, in several parts or one, that hold tensors below the prefix."""
    from transformers.utils import cached_file
    index = cached_file(path, 'model.safetensors.index.json', _raise_exceptions_for_missing_entries=False)
    if index is None:
        return ['model.safetensors']
    files = set()
    for name, file in json.loads(Path(index).read_text())['weight_map'].items():
        if name.startswith(prefix):
            files.add(file)
    return sorted(files)


def load_model(name, path, prefix, config, tensors):
    """The transformers class of this name with exactly these weights; one missing or left over is an error."""
    import transformers                                # each of its classes is a second of imports: only the one
    from transformers.utils import logging
    logging.disable_progress_bar()
    cls = getattr(transformers, name)
    where = f'{path} {prefix}'.strip()
    options = {'output_loading_info': True, 'trust_remote_code': False}
    try:
        if tensors is None:
            model, found = cls.from_pretrained(path, **options)
        else:
            config = cls.config_class.from_dict(config)
            model, found = cls.from_pretrained(None, config=config, state_dict=tensors, **options)
    except Exception as e:
        raise SystemExit(f'{where}: cannot load {name} ({first_line(e)})')
    # transformers only warns of these, and goes on with random weights
    for problem in 'missing_keys', 'unexpected_keys', 'mismatched_keys':
        keys = sorted(found[problem], key=str)
        if keys:
            raise SystemExit(f'{where}: {problem.replace("_", " ")} for {name}: {keys[0]} and {len(keys) - 1} more; '
                             'is this the right checkpoint and prefix?')
    return model


def plain_settings(config):
    """A codec's settings as the token space keeps them: without what depends on a version, a machine or a path."""
    dropped = ('transformers_version', 'architectures', 'dtype', 'torch_dtype', 'model_type', '_name_or_path')
    return {key: value for key, value in config.items() if key not in dropped}


def load_image_codec(path, prefix='', size=0):
    """Hugging Face folder or name -> adapter. prefix: the codec is a part of a larger checkpoint, for example
    'model.vqmodel.' of Janus. size: pixels, for codecs that take any."""
    config, tensors = read_weights(path, prefix)
    settings = plain_settings(config)
    kind = config.get('model_type')
    if kind == 'patches':
        codec = PatchImages(PatchBook.load(path, config), settings)
    elif kind == 'janus_vqgan':
        codec = JanusImages(load_model('JanusVQVAE', path, prefix, config, tensors), settings)
    elif kind == 'emu3_vqgan':
        codec = Emu3Images(load_model('Emu3VQVAE', path, prefix, config, tensors), settings, size)
    else:
        raise SystemExit(f'{path}: model_type {kind!r} is no picture codec that decodes: wanted janus_vqgan, '
                         'emu3_vqgan or patches (of a larger checkpoint: set its prefix)')
    if size not in (0, codec.size):                    # Emu3 has the size it was given; the others have their own
        raise SystemExit(f'image_size = {size}: this codec takes pictures of {codec.size}; set 0')
    return codec


def load_audio_codec(path, clip_seconds, prefix='', codebooks=0):
    """Hugging Face folder or name -> adapter for clips of clip_seconds. codebooks: the number to use, 0 for all."""
    kinds = {
        'encodec': ('EncodecModel', EncodecSounds),
        'dac': ('DacModel', DacSounds),
        'mimi': ('MimiModel', MimiSounds),
        'xcodec2': ('Xcodec2Model', Xcodec2Sounds),
    }
    config, tensors = read_weights(path, prefix)
    kind = config.get('model_type')
    if kind not in kinds:
        raise SystemExit(f'{path}: model_type {kind!r} is no sound codec known here: wanted {", ".join(kinds)}')
    name, adapter = kinds[kind]
    model = load_model(name, path, prefix, config, tensors)
    return adapter(model, plain_settings(config), clip_seconds, codebooks)


# -----------------------------------------------------------------------------
# the distance of a decoded one from its original


def psnr(original, decoded):
    """uint8 pictures (..., H, W, 3) -> dB each; 99 for equal ones."""
    error = ((np.asarray(original, np.float64) - decoded) ** 2).mean((-3, -2, -1))
    least = 255 ** 2 / 10 ** 9.9                       # which is 99 dB
    return 10 * np.log10(255 ** 2 / np.maximum(error, least))


def ssim(original, decoded, window=7):
    """uint8 (B, H, W, 3) -> structural similarity each, of the luma, in windows of 7 x 7, means over all windows."""
    def luma(pictures):
        weights = np.array([0.299, 0.587, 0.114])
        return torch.from_numpy(np.asarray(pictures, np.float64) @ weights)[:, None]     # (B, 1, H, W)

    def means(x):
        return F.avg_pool2d(x, window, stride=1)
    x = luma(original)
    y = luma(decoded)
    mean_x = means(x)                                  # (B, 1, H - 6, W - 6)
    mean_y = means(y)
    var_x = means(x * x) - mean_x ** 2
    var_y = means(y * y) - mean_y ** 2
    cov = means(x * y) - mean_x * mean_y
    c1 = (0.01 * 255) ** 2                             # the two constants of its authors (Wang et al. 2004): they
    c2 = (0.03 * 255) ** 2                             # keep the quotient finite where a window is plain
    structure = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    value = structure / ((mean_x ** 2 + mean_y ** 2 + c1) * (var_x + var_y + c2))
    return value.mean((1, 2, 3)).numpy()               # (B,)


def si_snr(original, decoded):
    """float (B, S) at one rate -> scale-invariant signal to noise in dB each, within -99 and 99."""
    x = np.asarray(original, np.float64)
    y = np.asarray(decoded, np.float64)
    x = x - x.mean(-1, keepdims=True)                  # an offset is not heard
    y = y - y.mean(-1, keepdims=True)
    scale = (x * y).sum(-1, keepdims=True) / ((x * x).sum(-1, keepdims=True) + 1e-20)
    signal = scale * x                                 # the part of y that is x, louder or softer
    noise = y - signal
    ratio = ((signal ** 2).sum(-1) + 1e-20) / ((noise ** 2).sum(-1) + 1e-20)
    return np.clip(10 * np.log10(ratio), -99, 99)      # (B,)


def log_mel(waves, rate, bands=40):
    """(B, S) -> (B, bands, windows) natural log of the mel spectrum, windows of 32 ms every 16 ms."""
    from transformers.audio_utils import mel_filter_bank
    waves = torch.as_tensor(np.asarray(waves), dtype=torch.float32)
    n = 2 ** round(math.log2(0.032 * rate))            # samples of a window
    spectrum = torch.stft(waves, n, n // 2, window=torch.hann_window(n), return_complex=True)
    power = spectrum.abs() ** 2                        # (B, n / 2 + 1, windows)
    filters = mel_filter_bank(n // 2 + 1, bands, min_frequency=0, max_frequency=rate / 2, sampling_rate=rate,
                              mel_scale='htk')         # (n / 2 + 1, bands)
    mel = torch.from_numpy(filters).float().T @ power  # (B, bands, windows)
    return torch.log(mel + 0.1)                        # the floor is 50 dB below a tone at full scale


def log_mel_distance(original, decoded, rate):
    """Mean absolute difference of the log mel spectra, in nats, each."""
    difference = log_mel(original, rate) - log_mel(decoded, rate)
    return difference.abs().mean((1, 2)).numpy()       # (B,)
