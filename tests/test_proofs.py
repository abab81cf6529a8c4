"""The slow proofs: the small world for real, from nothing to answers, judged by the truth. `make proofs`."""
import pytest
from conftest import run_script

pytestmark = pytest.mark.slow


def require(*command):
    done = run_script(*command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_frozen_language_model_learns_to_caption_and_then_to_answer(tmp_path):
    require('train_a1.py', 'configs/a1_small.py', f'--out_dir={tmp_path}/a1')
    require('-m', 'small.score', f'{tmp_path}/a1')
    require('train_a2.py', 'configs/a2_small.py', f'--align_dir={tmp_path}/a1', f'--out_dir={tmp_path}/a2')
    require('-m', 'small.score', f'{tmp_path}/a2')


def test_the_sweep_finds_a_run_that_passes(tmp_path):
    require('sweep_a11.py', 'configs/a11_small.py', f'--out_dir={tmp_path}')
    assert (tmp_path / 'best.py').exists()


def test_the_chain_of_the_real_configs_comes_to_its_last_gate_at_real_widths(tmp_path):
    require('-m', 'tools.rehearsal', f'--root={tmp_path}/rehearsal')


def test_the_small_codecs_keep_what_is_in_a_picture_and_in_a_sound(tmp_path):
    require('uti.py', 'configs/b1_small.py', f'--out_dir={tmp_path}')
    require('-m', 'small.score', tmp_path)


def test_a_janus_vq_that_was_trained_decodes_what_it_encodes(tmp_path):
    """A codec class of transformers, trained through its own modules: autoencoder, k-means on the sphere, decoder."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image
    from transformers import JanusVQVAE, JanusVQVAEConfig

    from codec import load_image_codec, psnr
    from small.codecs import k_means
    from small.world import draw, random_scene
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    generator = torch.Generator().manual_seed(1)
    pictures = []
    for _ in range(1500):
        picture = Image.fromarray(draw(random_scene(rng), rng)).resize((32, 32), Image.BICUBIC)
        pictures.append(np.asarray(picture))
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)                               # uint8
    train_set = pixels[:1400]
    held_out = pixels[1400:]
    model = JanusVQVAE(JanusVQVAEConfig(embed_dim=8, num_embeddings=256, latent_channels=32, base_channels=32,
                                        channel_multiplier=[1, 1, 1], num_res_blocks=1, num_patches=8))

    def latents(x):
        return F.normalize(model.quant_conv(model.encoder(x)), dim=1)                               # (B, 8, 8, 8)

    def train(parameters, through, n_steps):
        optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
        for step in range(n_steps):
            for group in optimizer.param_groups:
                group['lr'] = 2e-3 * min(1, (n_steps - step) / (0.5 * n_steps))
            x = train_set[torch.randint(1400, (32,), generator=generator)] / 127.5 - 1
            loss = F.mse_loss(model.decoder(model.post_quant_conv(through(x))), x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    train(model.parameters(), latents, 300)
    with torch.no_grad():
        points = latents(train_set[:400] / 127.5 - 1).permute(0, 2, 3, 1).reshape(-1, 8)
        book = F.normalize(k_means(points, 256, generator), dim=1)
        model.quantize.embedding.weight.copy_(book)

    @torch.no_grad()
    def quantised(x):
        codes = (latents(x).permute(0, 2, 3, 1) @ book.T).argmax(-1)                                # (B, 8, 8)
        return book[codes].permute(0, 3, 1, 2)

    train([*model.decoder.parameters(), *model.post_quant_conv.parameters()], quantised, 300)
    model.save_pretrained(tmp_path)
    codec = load_image_codec(tmp_path)
    codes = codec.encode(held_out)
    assert codes.shape == (100, 64) and len(codes.unique()) > 64

    def psnr_of(codes):
        decoded = codec.decode(codes)
        return psnr(held_out.permute(0, 2, 3, 1).numpy(), decoded.permute(0, 2, 3, 1).numpy()).mean()

    own = psnr_of(codes)
    shuffled = psnr_of(codes.roll(1, 0))
    print(f'PSNR {own:.1f} dB, with the codes of another picture {shuffled:.1f}')
    assert own > 17 > shuffled + 3
