# B1 at real sizes: the VQ of Janus-Pro, 576 codes of 16,384 a picture of 384 x 384, and Mimi, 12.5 frames a second
# x 8 codes of 2,048: 1,000 ids for 10 s. New rows: 4 + 16,384 + 8 x 2,048 = 32,772.
# $ python uti.py configs/b1_qwen3_0.6b.py
# Cost: not measured, 256 pictures and sounds through both codecs four times. Not run: there was no GPU.
llm = 'Qwen/Qwen3-0.6B'
image_codec = 'deepseek-community/Janus-Pro-1B'
image_prefix = 'model.vqmodel.'
audio_codec = 'kyutai/mimi'    # 'facebook/encodec_24khz' with audio_codebooks = 8: 75 frames a second, 6,000 ids
audio_codebooks = 8
clip_seconds = 10.0
data_json = 'data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json'
image_root = 'data/LLaVA-Pretrain/images'
sound_dir = 'data/Clotho/development'      # what B2 makes shards of, and no other sounds
sound_captions = 'data/Clotho/clotho_captions_development.csv'
out_dir = 'out/b1_qwen3_0.6b'
max_bad_samples = 10
n_items = 256
gate_psnr = 18.0               # floors for codecs that were trained on other data than this; the baseline is the finer
gate_ssim = 0.5                # measure
gate_si_snr = -5.0             # Mimi keeps what is heard, not the wave: its distance in log mel says more
gate_log_mel = 1.5
