"""
The small world's codecs, made in seconds. The picture codec is a codebook of patches. The sound codec is an EnCodec,
not trained but worked out: its convolutions are set so that it is a linear transform, frames of 800 samples times the
principal components of the small world's sounds, and its codebooks are k-means of what comes out.
"""
import json

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from codec import Patches, load_audio_codec, load_image_codec, psnr, si_snr
from small.world import RATE, agreement, draw, hear, play, random_scene, random_sound, see


def nearest(x, centres, chunk=8192):
    """Index of the nearest of centres (N, d) to each of x (n, d)."""
    squares = (centres ** 2).sum(1)
    return torch.cat([(squares - 2 * part @ centres.T).argmin(1) for part in x.split(chunk)])


def k_means(x, n, generator, rounds=12):
    """(n, d) centres of x; one that loses all its points starts again at a point drawn anew."""
    centres = x[torch.randperm(len(x), generator=generator)[:n]].clone()
    for _ in range(rounds):
        which = nearest(x, centres)
        counts = torch.bincount(which, minlength=n)
        sums = torch.zeros_like(centres).index_add_(0, which, x)
        anew = x[torch.randperm(len(x), generator=generator)[:n]]
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), anew)
    return centres


# -----------------------------------------------------------------------------
# pictures


def make_image_codec(folder, n_pictures=4000, n_codes=1024, n_flat=16, size=32, patch=8, n_tested=256):
    """A codebook of patches, four to an object: with patches of 4 a picture has 64 codes that say no more. Nearly half
    of the patches show plain background: k-means would spend its codes on their tints, so they get their own few."""
    rng, generator = np.random.default_rng(106), torch.Generator().manual_seed(106)

    def picture(scene):
        return np.asarray(Image.fromarray(draw(scene, rng)).resize((size, size), Image.BICUBIC))

    pictures = np.stack([picture(random_scene(rng)) for _ in tqdm(range(n_pictures), 'image_codec', disable=None)])
    cut = torch.nn.functional.unfold(torch.from_numpy(pictures).permute(0, 3, 1, 2).float(), patch, stride=patch)
    cut = cut.transpose(1, 2).reshape(-1, 3 * patch ** 2)
    flat = cut.view(-1, 3, patch ** 2).std(2).sum(1) < 3
    book = torch.cat([k_means(cut[flat][::8], n_flat, generator), k_means(cut[~flat], n_codes - n_flat, generator, 20)])
    Patches(book.round().clamp(0, 255), size, patch).save(folder)

    codec = load_image_codec(folder)
    scenes = [random_scene(rng) for _ in range(n_tested)]
    truth = np.stack([picture(scene) for scene in scenes])
    decoded = codec.decode(codec.encode(torch.from_numpy(truth).permute(0, 3, 1, 2))).permute(0, 2, 3, 1).numpy()
    report(folder, 'image_codec', {'psnr': psnr(truth, decoded).mean()}, map(see, decoded), scenes)


def report(folder, name, measured, found, truth):
    right, asked = map(sum, zip(*(agreement(f, t) for f, t in zip(found, truth))))
    measured = {**{k: round(float(v), 3) for k, v in measured.items()}, 'attributes_surviving': round(right / asked, 4)}
    (folder / 'report.json').write_text(json.dumps(measured))
    print(f'{name}: {measured}')


# -----------------------------------------------------------------------------
# sounds


@torch.no_grad()
def become_linear(model, components, wave_offset=2.0, code_offset=25.0):
    """Set an EnCodec's weights so that it multiplies frames of 5 n samples by components (d, 5 n), and back.

    An ELU lets through what is positive, so everything travels with an offset that the next layer takes away.
    Residual blocks and LSTMs add nothing. The strides, 5 and n, first lay 5 samples side by side, then take the
    products. Every filter gets a grain of noise: weight norm divides by a filter's length.
    """
    (d, size), encoder, decoder = components.shape, model.encoder.layers, model.decoder.layers
    by_phase, first = components.view(d, size // 5, 5).transpose(1, 2), size // 10     # (d, 5, n); filters are 2 n

    def put(layer, weight, bias=0.0):
        layer.conv.weight = weight + 1e-7 * torch.randn_like(weight)
        layer.conv.bias.copy_(torch.as_tensor(bias).expand_as(layer.conv.bias))

    def through(layer, at, n=None, bias=0.0):
        """Channel i goes to channel i, by the tap in the middle."""
        weight = torch.zeros_like(layer.conv.weight)
        n = range(n or min(weight.shape[:2]))
        weight[n, n, at] = 1
        put(layer, weight, bias)

    def add_nothing(*layers):
        for layer in layers:
            if hasattr(layer, 'lstm'):
                for p in layer.parameters():
                    p.zero_()
            else:
                through(layer.shortcut, 0)
                put(layer.block[3], torch.zeros_like(layer.block[3].conv.weight))

    def like(layer, *where):
        """The strided layer's weights: zero, but for these (channels, channels, first tap, values (.., .., taps))."""
        weight = torch.zeros_like(layer.conv.weight)
        for rows, columns, tap, values in where:
            weight[rows, columns, tap:tap + values.shape[-1]] = values
        return weight

    lay_out = [(j, 0, 3 + j, torch.ones(1)) for j in range(5)]                 # sample j of five to channel j
    add_nothing(encoder[1], encoder[4], encoder[7], decoder[1], decoder[4], decoder[7])
    through(encoder[0], 3, 1, wave_offset)
    put(encoder[3], like(encoder[3], *lay_out))
    bias = torch.full_like(encoder[6].conv.bias, code_offset)
    bias[:d] -= wave_offset * components.sum(1)
    put(encoder[6], like(encoder[6], (slice(d), slice(5), first, by_phase)), bias)
    through(encoder[9], 3, bias=-code_offset)
    # channel d of the decoder is the offset alone: it takes the offset of the others away, at each place its own
    through(decoder[0], 3, bias=code_offset)
    put(decoder[3], like(decoder[3], (slice(d), slice(5), first, by_phase), (d, slice(5), first, -by_phase.sum(0))),
        wave_offset)
    put(decoder[6], like(decoder[6], *lay_out))
    through(decoder[9], 3, 1, -wave_offset)


@torch.no_grad()
def make_audio_codec(folder, n_clips=2000, n_codes=512, n_codebooks=2, frame=800, filters=20, n_tested=256):
    """An EnCodec of 20 frames a second and two codebooks: 40 codes a clip."""
    from transformers import EncodecConfig, EncodecModel
    torch.manual_seed(107)
    rng, generator = np.random.default_rng(107), torch.Generator().manual_seed(107)
    clips = np.stack([play(random_sound(rng), rng) for _ in tqdm(range(n_clips), 'audio_codec', disable=None)])
    frames = torch.from_numpy(clips).view(-1, frame)
    some = frames[torch.randperm(len(frames), generator=generator)[:8000]]
    components = torch.linalg.svd(some, full_matrices=False)[2][:4 * filters - 1].contiguous()

    bits = n_codebooks * RATE // frame * (n_codes - 1).bit_length() / 1000                # kbit/s of all codebooks
    model = EncodecModel(EncodecConfig(
        sampling_rate=RATE, upsampling_ratios=[frame // 5, 5], num_filters=filters, hidden_size=len(components),
        codebook_size=n_codes, target_bandwidths=[bits + 0.01], num_lstm_layers=1, use_causal_conv=False,
        pad_mode='constant')).eval()
    become_linear(model, components)
    residual = frames @ components.T
    for layer in model.quantizer.layers:
        centres = k_means(residual, n_codes, generator)
        layer.codebook.embed.copy_(centres)
        layer.codebook.embed_avg.copy_(centres)
        residual = residual - centres[nearest(residual, centres)]
    model.save_pretrained(folder)

    codec = load_audio_codec(folder, clip_seconds=1.0)
    sounds = [random_sound(rng) for _ in range(n_tested)]
    truth = np.stack([play(sound, rng) for sound in sounds])
    decoded = codec.decode(codec.encode(torch.from_numpy(truth))).numpy()
    report(folder, 'audio_codec', {'si_snr': si_snr(truth, decoded).mean()}, map(hear, decoded), sounds)
