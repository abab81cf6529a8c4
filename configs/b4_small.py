# The small world's B4: LoRA and the new rows learn to draw and to sound, and go on describing.
# $ python train_b4.py configs/b4_small.py
# About 8 CPU minutes. Not enough yet: text +2.2 % and about 30 % of what is drawn is right; LOG.md, 2026-11-23, B4.
from make_small import ensure

_small = ensure('text', 'llm', 'image_codec', 'audio_codec')
shards_dir = 'out/b2_small'
rows_dir = 'out/b3_small'
image_codec = f'{_small}/image_codec'
audio_codec = f'{_small}/audio_codec'
text_jsonl = f'{_small}/text/eval.jsonl'
replay_jsonl = f'{_small}/text/replay.jsonl'
out_dir = 'out/b4_small'
lora_r = 32
lora_alpha = 32
lora_dropout = 0.0
max_seq_len = 512
batch_size = 48
rows_per_step = 48
learning_rate = 5e-3
lora_learning_rate = 3e-3
epoch_samples = 33_600         # 700 steps
eval_every = 350
n_eval = 256
n_text = 256
max_new_tokens = 48
guidance = (1.0, 2.0)
log_every = 50
