"""
The small world's codecs, made in seconds without a training loop.

The picture codec is a codebook of patches. The sound codec is an EnCodec whose convolutions are worked out, not
trained: they make it a linear transform, frames of 800 samples times the principal components of the small world's
sounds. Its codebooks are k-means of what comes out.

Letters: n points, d their dimensions, N centres.
"""
import json

import numpy as np
import torch
from PIL import Image
from transformers import EncodecConfig, EncodecModel

from codec import PatchBook, load_audio_codec, load_image_codec, psnr, si_snr
from common import progress
from small.world import RATE, agreement, draw, hear, part_seed, play, random_scene, random_sound, see


def nearest(x, centres, chunk=8192):
    """Index of the nearest of centres (N, d) to each of x: (n, d) -> (n,)."""
    squares = (centres ** 2).sum(1)
    found = []
    for part in x.split(chunk):                        # all n x N distances at once would fill the memory
        found.append((squares - 2 * part @ centres.T).argmin(1))
    return torch.cat(found)


def random_points(x, n, generator):
    return x[torch.randperm(len(x), generator=generator)[:n]]


def k_means(x, n, generator, rounds=12):
    """(n, d) centres of x; one that loses all its points starts again at a random point."""
    centres = random_points(x, n, generator)
    for _ in range(rounds):
        which = nearest(x, centres)
        counts = torch.bincount(which, minlength=n)[:, None]                                   # (n, 1)
        sums = torch.zeros_like(centres).index_add_(0, which, x)
        others = random_points(x, n, generator)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), others)
    return centres


def write_report(folder, measured, found, truth):
    """report.json: what was measured, and the share of attributes that see() or hear() still finds."""
    right = asked = 0
    for found_one, true_one in zip(found, truth):
        agreed = agreement(found_one, true_one)
        right += agreed[0]
        asked += agreed[1]
    measured = {name: round(float(value), 3) for name, value in measured.items()}
    measured['attributes_surviving'] = round(right / asked, 4)
    (folder / 'report.json').write_text(json.dumps(measured))


# -----------------------------------------------------------------------------
# pictures


def make_image_codec(folder, n_pictures=4000, n_codes=1024, n_plain=16, size=32, patch=8, n_tested=256, seed=1,
                     position=0):
    """A codebook of patches, four to an object: with patches of 4 a picture has 64 codes that say no more.

    Nearly half of the patches show plain background. k-means would spend its codes on their tints, so they get n_plain
    of their own. size: pixels of a picture; n_tested: pictures that the report is measured on.
    """
    rng = np.random.default_rng(part_seed('image_codec', seed))
    generator = torch.Generator().manual_seed(part_seed('image_codec', seed))

    def picture(scene):
        return np.asarray(Image.fromarray(draw(scene, rng)).resize((size, size), Image.BICUBIC))

    steps = progress(range(n_pictures), 'image_codec', position=position)
    pictures = np.stack([picture(random_scene(rng)) for _ in steps])                   # (B, size, size, 3)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    patches = torch.nn.functional.unfold(pixels, patch, stride=patch).transpose(1, 2)  # (B, patches, 3 patch^2)
    patches = patches.reshape(-1, 3 * patch ** 2)
    is_plain = patches.view(-1, 3, patch ** 2).std(2).sum(1) < 3       # one colour, up to rounding
    plain_codes = k_means(patches[is_plain][::8], n_plain, generator)   # an eighth of them is plenty
    other_codes = k_means(patches[~is_plain], n_codes - n_plain, generator, rounds=20)
    book = torch.cat([plain_codes, other_codes]).round().clamp(0, 255)   # whole numbers: exact on every machine
    PatchBook(book, size, patch).save(folder)

    codec = load_image_codec(folder)
    scenes = [random_scene(rng) for _ in range(n_tested)]
    original = np.stack([picture(scene) for scene in scenes])
    codes = codec.encode(torch.from_numpy(original).permute(0, 3, 1, 2))
    decoded = codec.decode(codes).permute(0, 2, 3, 1).numpy()
    write_report(folder, {'psnr': psnr(original, decoded).mean()}, map(see, decoded), scenes)


# -----------------------------------------------------------------------------
# sounds. Letters: d components, n strides of 5 samples in a frame of 5 n


@torch.no_grad()
def make_audio_codec(folder, n_clips=2000, n_codes=512, n_codebooks=2, frame=800, filters=20, n_tested=256, seed=1,
                     position=0):
    """An EnCodec of 20 frames a second and two codebooks: 40 codes a clip. frame: samples."""
    torch.manual_seed(part_seed('audio_codec', seed))
    rng = np.random.default_rng(part_seed('audio_codec', seed))
    generator = torch.Generator().manual_seed(part_seed('audio_codec', seed))
    steps = progress(range(n_clips), 'audio_codec', position=position)
    clips = np.stack([play(random_sound(rng), rng) for _ in steps])
    model = linear_encodec(clips, RATE, frame, n_codes=n_codes, n_codebooks=n_codebooks, filters=filters,
                           generator=generator)
    model.save_pretrained(folder)

    codec = load_audio_codec(folder, clip_seconds=1.0)
    sounds = [random_sound(rng) for _ in range(n_tested)]
    original = np.stack([play(sound, rng) for sound in sounds])
    decoded = codec.decode(codec.encode(torch.from_numpy(original))).numpy()
    write_report(folder, {'si_snr': si_snr(original, decoded).mean()}, map(hear, decoded), sounds)


@torch.no_grad()
def linear_encodec(clips, rate, frame, n_codes, n_codebooks, filters, generator):
    """An EnCodec of float32 clips (B, S), S whole frames: a frame times the clips' principal components, then k-means.

    rate: samples a second; frame: samples, a multiple of 5; filters: a fourth of the components, and one.
    """
    frames = torch.from_numpy(clips).view(-1, frame)
    some = random_points(frames, 8000, generator)
    # the layers in the middle have 4 * filters channels: one is kept for the offset, see become_linear
    components = torch.linalg.svd(some, full_matrices=False)[2][:4 * filters - 1].contiguous()   # (d, frame)

    bits = (n_codes - 1).bit_length()
    bandwidth = n_codebooks * rate // frame * bits / 1000              # kbit/s of all codebooks
    model = EncodecModel(EncodecConfig(
        sampling_rate=rate,
        upsampling_ratios=[frame // 5, 5],
        num_filters=filters,
        hidden_size=len(components),
        codebook_size=n_codes,
        target_bandwidths=[bandwidth + 0.01],          # a hair more: EnCodec rounds the number of books down
        num_lstm_layers=1,
        use_causal_conv=False,
        pad_mode='constant'))
    become_linear(model.eval(), components)
    residual = frames @ components.T                                   # (frames, d)
    for layer in model.quantizer.layers:               # each book codes what the ones before it left
        centres = k_means(residual, n_codes, generator)
        layer.codebook.embed.copy_(centres)
        layer.codebook.embed_avg.copy_(centres)
        residual = residual - centres[nearest(residual, centres)]
    return model


@torch.no_grad()
def become_linear(model, components, wave_offset=2.0, code_offset=25.0):
    """Set an EnCodec's weights so that it multiplies frames of 5 n samples by components (d, 5 n), and back.

    An ELU lets through what is positive, so everything travels with an offset that the next layer takes away.
    Residual blocks and LSTMs add nothing. The strides, 5 and n, first lay 5 samples side by side as channels, then
    take the products.
    """
    d, size = components.shape
    encoder = model.encoder.layers
    decoder = model.decoder.layers
    by_sample = components.view(d, size // 5, 5).transpose(1, 2)       # (d, 5, n): sample j of five in each stride
    first = size // 10                                 # filters of a strided layer have 2 n taps: the middle n
    for layers in (encoder, decoder):
        for k in (1, 4, 7):                            # two residual blocks and an LSTM, in either order
            add_nothing(layers[k])

    # encoder: the wave, lifted above 0; five samples side by side; products with the components, lifted; the codes
    pass_on(encoder[0], tap=3, n=1, bias=wave_offset)
    side_by_side(encoder[3])
    weight = torch.zeros_like(encoder[6].conv.weight)
    weight[:d, :5, first:first + size // 5] = by_sample
    bias = torch.full_like(encoder[6].conv.bias, code_offset)
    bias[:d] -= wave_offset * components.sum(1)        # every sample came with wave_offset
    put(encoder[6], weight, bias)
    pass_on(encoder[9], tap=3, bias=-code_offset)

    # decoder: the same backwards, by the transposed components
    pass_on(decoder[0], tap=3, bias=code_offset)
    weight = torch.zeros_like(decoder[3].conv.weight)
    weight[:d, :5, first:first + size // 5] = by_sample
    # channel d holds the offset alone: it takes the offset of the others away, of each sample its own sum
    weight[d, :5, first:first + size // 5] = -by_sample.sum(0)
    put(decoder[3], weight, wave_offset)
    side_by_side(decoder[6])
    pass_on(decoder[9], tap=3, n=1, bias=-wave_offset)


def put(layer, weight, bias=0.0):
    """Set a layer's weights, with a grain of noise: weight norm divides by a filter's length, which must not be 0."""
    layer.conv.weight = weight + 1e-7 * torch.randn_like(weight)
    layer.conv.bias.copy_(torch.as_tensor(bias).expand_as(layer.conv.bias))


def pass_on(layer, tap, n=None, bias=0.0):
    """Channel k goes to channel k, for the first n channels, by one tap of its filter."""
    weight = torch.zeros_like(layer.conv.weight)
    channels = range(n or min(weight.shape[:2]))
    weight[channels, channels, tap] = 1
    put(layer, weight, bias)


def side_by_side(layer):
    """Stride 5: sample j of five goes to channel j, or in the decoder back from it."""
    weight = torch.zeros_like(layer.conv.weight)
    for j in range(5):
        weight[j, 0, 3 + j] = 1
    put(layer, weight)


def add_nothing(layer):
    """A residual block, or an LSTM with its skip, that lets everything through as it is."""
    if hasattr(layer, 'lstm'):
        for p in layer.parameters():
            p.zero_()
    else:
        pass_on(layer.shortcut, tap=0)
        put(layer.block[3], torch.zeros_like(layer.block[3].conv.weight))
