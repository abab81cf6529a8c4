# The small world's B1: 16 codes of 1,024 a picture of 32 x 32, 20 frames x 2 codes of 512 a second of sound.
# $ python uti.py configs/b1_small.py
# Half a CPU minute. 16 gates; over 512 of each 28.8 dB and SSIM 0.96, SI-SNR 7.0 dB. small/score.py then finds 98.5 %
# of what is seen and 98.8 % of what is heard.
from small.make import ensure

_small = ensure('captions', 'sounds', 'llm', 'image_codec', 'audio_codec')
llm = f'{_small}/llm'
image_codec = f'{_small}/image_codec'
audio_codec = f'{_small}/audio_codec'
data_json = f'{_small}/captions/data.json'
image_root = f'{_small}/captions/images'
manifest_jsonl = f'{_small}/sounds/manifest.jsonl'
out_dir = 'out/b1_small'
n_items = 512
gate_psnr = 28.0
gate_ssim = 0.9
gate_si_snr = 6.0
gate_log_mel = 0.7             # silence would have 0.74
