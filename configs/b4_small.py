# The small world's B4: LoRA and the new rows learn to draw and to generate audio, and go on describing.
# $ python train_b4.py configs/b4_small.py
# 13 CPU minutes. 48 gates; right by the truth: drawn 97 to 98 %, audio 89 to 91 %, pictures described 94 to 97 %,
# sounds 95 to 97 %.
from small.make import ensure

_small = ensure('text', 'llm', 'image_codec', 'audio_codec')
shards_dir = 'out/b2_small'
new_rows_dir = 'out/b3_small'
image_codec = f'{_small}/image_codec'
audio_codec = f'{_small}/audio_codec'
text_jsonl = f'{_small}/text/eval.jsonl'
replay_jsonl = f'{_small}/text/replay.jsonl'
replay_share = 0.12
out_dir = 'out/b4_small'
lora_r = 32
lora_alpha = 32
lora_dropout = 0.0
max_seq_len = 512
task_weights = {'i2t': 1.5, 'a2t': 0.75, 't2i': 2.0, 't2a': 1.25}
micro_batch_size = 32
global_batch_size = 32
learning_rate = 5e-3
lora_learning_rate = 3e-3
min_lr_frac = 0.02
epoch_samples = 160_000        # 5,000 steps
eval_every = 1250
n_eval = 256
n_text = 256
max_new_tokens = 48
temperature = 0.4              # at 1.0 a tenth more of what is generated is wrong
guidance = (1.0, 1.5)
log_every = 100
