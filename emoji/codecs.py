"""
The emoji's codecs, made on the spot from what is not held out: a codebook of patches whose picture of 64 pixels is 64
codes, and an EnCodec of the names as espeak-ng says them. And a Janus VQ, trained, with as many codes.

reads   data/emoji/{captions,eval_known,eval_new}.json and their pictures; data/emoji/speech/, of emoji.speech
writes  data/emoji/{image_codec,audio_codec}/ or data/emoji/janus/, Hugging Face folders, with report.json in each

$ python -m emoji.codecs
$ python -m emoji.codecs janus

Janus takes minutes where the patches take seconds, and in the five that it had it stayed behind them (LOG.md). With
--image_codec=data/emoji/janus the stages take it.

Letters: B pictures, P codes of one, D width of a code's vector.
"""
import json
import sys

import numpy as np
import torch
import torch.nn.functional as F
from transformers import JanusVQVAE, JanusVQVAEConfig

from codec import PatchBook, load_audio_codec, load_image_codec, log_mel, log_mel_distance, psnr, si_snr, ssim
from common import progress
from emoji.pictures import PIXELS, ROOT, read_list
from emoji.speech import FRAME, RATE, SECONDS, SPEEDS, VOICES
from media import read_audio, read_image
from small.codecs import k_means, linear_encodec, random_points
from small.models import descend

# -----------------------------------------------------------------------------
# pictures


def read_pictures(records):
    """uint8 (B, 3, PIXELS, PIXELS), as the stages read them: on white."""
    pictures = [read_image(ROOT / record['image'], PIXELS) for record in progress(records, 'pictures')]
    return torch.from_numpy(np.stack(pictures))


def make_image_codec(folder, n_codes=1024, n_plain=16, patch=8, seed=1):
    """Patches of every third picture; those of one colour have n_plain codes of their own, as in the small world."""
    generator = torch.Generator().manual_seed(seed)
    pictures = read_pictures(read_list('captions')[::3])
    patches = F.unfold(pictures.float(), patch, stride=patch).transpose(1, 2).flatten(0, 1)    # (B P, 3 patch^2)
    is_plain = patches.std(1) < 3                      # of 255: all channels alike, so white, gray and black
    drawn = random_points(patches[~is_plain], 60_000, generator)
    drawn_codes = k_means(drawn, n_codes - n_plain, generator, rounds=10)
    plain_codes = k_means(patches[is_plain][::8], n_plain, generator)
    PatchBook(torch.cat([plain_codes, drawn_codes]).round().clamp(0, 255), PIXELS, patch).save(folder)
    write_image_report(folder)


def tiny_janus(n_codes):
    """Most of its arithmetic is in the layers of all pixels: they get the 32 channels that its norms want at least."""
    return JanusVQVAE(JanusVQVAEConfig(
        num_embeddings=n_codes, embed_dim=16, latent_channels=64, base_channels=32, channel_multiplier=(1, 1, 2, 4),
        num_res_blocks=1, num_patches=PIXELS // 8, projection_dim=32, image_token_embed_dim=32))


def latents_of(model, x):
    """(B, 3, PIXELS, PIXELS) in -1 .. 1 -> (B, P, D) of length 1."""
    latents = model.quant_conv(model.encoder(x)).float()               # (B, D, side, side)
    return F.normalize(latents.flatten(2).transpose(1, 2), dim=2)


def pixels_of(model, latents):
    """The other way."""
    side = model.config.num_patches
    grid = latents.transpose(1, 2).unflatten(2, (side, side))          # (B, D, side, side)
    return model.decoder(model.post_quant_conv(grid)).float()


def codes_of(model, latents):
    """(B, P, D) -> the nearest vectors of the codebook, (B, P, D), which learn."""
    book = F.normalize(model.quantize.embedding.weight, dim=1)
    nearest = (latents.detach() @ book.T).argmax(2)                    # (B, P)
    return book[nearest]


@torch.no_grad()
def begin_codebook(model, pictures, n_codes, generator):
    """The codebook at the middles of what the pictures have become."""
    latents = [latents_of(model, part / 127.5 - 1) for part in pictures.split(64)]
    centres = k_means(torch.cat(latents).flatten(0, 1), n_codes, generator)
    model.quantize.embedding.weight.copy_(F.normalize(centres, dim=1))


def varied(pictures):
    """uint8 -> (B, 3, PIXELS, PIXELS) in -1 .. 1: half of them mirrored, all moved by up to 4 pixels."""
    x = torch.where(torch.rand(len(pictures), 1, 1, 1) < 0.5, pictures, pictures.flip(3))
    wider = F.pad(x / 127.5 - 1, (4, 4, 4, 4), value=1.0)
    left, top = torch.randint(0, 9, (2,)).tolist()
    return wider[:, :, top:top + PIXELS, left:left + PIXELS]


def make_janus(folder, n_steps=6000, batch=8, n_codes=1024, learning_rate=1e-3, seed=1):
    """A fifth of the steps without codes, then with: the gradient passes them as if they were not there. Half way they
    begin anew: the first ones were the middles of what was hardly trained, and half of them fell out of use."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    pictures = read_pictures(read_list('captions'))
    model = tiny_janus(n_codes)
    with_codes = n_steps // 5

    def loss_of_step(step):
        if step in (with_codes, n_steps // 2):
            some = rng.choice(len(pictures), min(1024, len(pictures)), replace=False)
            begin_codebook(model, pictures[some], n_codes, generator)
        x = varied(pictures[rng.choice(len(pictures), batch)])
        latents = latents_of(model, x)                                 # (B, P, D)
        apart = 0.0
        if step >= with_codes:
            codes = codes_of(model, latents)
            apart = (codes - latents.detach()).square().sum(2).mean()
            apart = apart + 0.25 * (codes.detach() - latents).square().sum(2).mean()
            latents = latents + (codes - latents).detach()
        decoded = pixels_of(model, latents)
        return F.mse_loss(decoded, x) + F.l1_loss(decoded, x) + apart

    descend(model, loss_of_step, n_steps, learning_rate, 'janus')
    model.eval().save_pretrained(folder)
    write_image_report(folder)


def write_image_report(folder):
    """PSNR in dB and SSIM of the decoded pictures of both held-out lists, and how many of the codes they have."""
    codec = load_image_codec(folder)
    report = {}
    for name in 'eval_known', 'eval_new':
        pictures = read_pictures(read_list(name))
        codes = codec.encode(pictures)
        original = pictures.permute(0, 2, 3, 1).numpy()
        decoded = codec.decode(codes).permute(0, 2, 3, 1).numpy()
        report[name] = {'psnr': round(float(psnr(original, decoded).mean()), 2),
                        'ssim': round(float(ssim(original, decoded).mean()), 3),
                        'codes_used': len(codes.unique()), 'pictures': len(pictures)}
    (folder / 'report.json').write_text(json.dumps(report))
    print(f'{folder.name}: {report}')


# -----------------------------------------------------------------------------
# sounds


def read_speech(manifest):
    """({id: text}, float32 (B, SECONDS * RATE)) of a manifest of emoji.speech."""
    records = [json.loads(line) for line in (ROOT / 'speech' / manifest).read_text().splitlines()]
    clips = np.zeros((len(records), round(SECONDS * RATE)), np.float32)
    for clip, record in zip(clips, records):
        wave = read_audio(ROOT / 'speech' / record['audio'], RATE, len(clip))
        clip[:len(wave)] = wave
    return {record['id']: record['text'] for record in records}, clips


def recognised(sounds, clips):
    """Index of the one of clips (B, S) whose log mel spectrum is nearest to each of sounds (B, S)."""
    spectra = log_mel(clips, RATE)
    return [int((spectra - one).abs().mean((1, 2)).argmin()) for one in log_mel(sounds, RATE)]


def make_audio_codec(folder, n_codes=512, n_codebooks=2, filters=20, seed=1):
    torch.manual_seed(seed)
    _, clips = read_speech('manifest.jsonl')
    linear_encodec(clips, RATE, FRAME, n_codes=n_codes, n_codebooks=n_codebooks, filters=filters,
                   generator=torch.Generator().manual_seed(seed)).save_pretrained(folder)
    report = audio_report(folder)
    (folder / 'report.json').write_text(json.dumps(report))
    print(f'audio_codec: {report}')


def audio_report(folder):
    """Of the names that nobody learns, by one voice: distances of what is decoded, and how often it is still the
    nearest to what was spoken, of all these names."""
    codec = load_audio_codec(folder, clip_seconds=SECONDS)
    texts, clips = read_speech('new.jsonl')
    clips = clips[[id.endswith(f'-{VOICES[0]}-{SPEEDS[0]}') for id in texts]]
    decoded = codec.decode(codec.encode(torch.from_numpy(clips))).numpy()
    right = np.mean(np.array(recognised(decoded, clips)) == np.arange(len(clips)))
    return {'si_snr': round(float(si_snr(clips, decoded).mean()), 2), 'recognised': round(float(right), 3),
            'log_mel': round(float(log_mel_distance(clips, decoded, RATE).mean()), 3), 'sounds': len(clips)}


if __name__ == '__main__':
    if sys.argv[1:] == ['janus']:
        make_janus(ROOT / 'janus')
    elif len(sys.argv) == 1:
        make_image_codec(ROOT / 'image_codec')
        make_audio_codec(ROOT / 'audio_codec')
    else:
        raise SystemExit(__doc__.strip())
